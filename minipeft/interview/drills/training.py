"""Drills on steps, schedules, tokens, communication, and intervals."""

import math
import random

from minipeft.interview.drills.drill import Drill


def steps(rng: random.Random) -> Drill:
    """Optimizer steps of a run."""
    rows, epochs = rng.choice([9_104, 20_000, 52_000]), rng.choice([1, 2, 3])
    batch, passes, ranks = rng.choice([2, 4, 8]), rng.choice([1, 4, 8]), rng.choice([1, 2, 8])
    answer = epochs * math.ceil(rows / (batch * passes * ranks))
    return Drill(
        {"en": f"{rows:,} rows, {epochs} epoch(s), batch {batch} per GPU, {passes} accumulation "
               f"pass(es), {ranks} GPU(s): how many optimizer steps?",
         "zh": f"{rows:,} 行数据，{epochs} 个 epoch，每卡 batch {batch}，梯度累积 {passes} 次，{ranks} 张卡："
               "优化器走多少步？"},
        answer, "steps",
        {"en": f"One step takes {batch} x {passes} x {ranks} = {batch * passes * ranks} rows; "
               f"{epochs} x ceil({rows:,} / {batch * passes * ranks}) = {answer:,}.",
         "zh": f"每步用 {batch} × {passes} × {ranks} = {batch * passes * ranks} 行；"
               f"{epochs} × ceil({rows:,} / {batch * passes * ranks}) = {answer:,}。"},
    )  # fmt: skip


def linear_rate(rng: random.Random) -> Drill:
    """Linear warm-up and linear decay."""
    total, share = rng.choice([200, 1000, 3000]), rng.choice([3, 5, 10])
    warmup, peak = total * share // 100, rng.choice([1e-4, 2e-4, 1e-3])
    step = rng.choice([warmup // 2, total // 2, total * 9 // 10])
    parts = (step, warmup) if step < warmup else (total - step, total - warmup)
    factor, ratio = parts[0] / parts[1], f"{parts[0]} / {parts[1]}"
    answer = peak * factor * 1e6
    return Drill(
        {"en": f"Linear warm-up over {warmup} steps to {peak:g}, then linear decay to 0 at step {total}. "
               f"What is the learning rate at step {step}, in millionths (1e-6)?",
         "zh": f"学习率在 {warmup} 步内线性升到 {peak:g}，再线性下降，到第 {total} 步降为 0。第 {step} 步的学习率是多少"
               "（以 1e-6 为单位）？"},
        answer, "1e-6",
        {"en": f"The factor is {ratio} = {factor:.3f}; times {peak:g} = {answer:.1f}e-6.",
         "zh": f"系数是 {ratio} = {factor:.3f}；乘以 {peak:g} 得 {answer:.1f}e-6。"},
    )  # fmt: skip


def cosine_rate(rng: random.Random) -> Drill:
    """Cosine decay without warm-up."""
    total, peak = rng.choice([100, 400, 1000]), rng.choice([1e-4, 2e-4, 5e-4])
    step = total * rng.choice([1, 2, 3]) // 4
    answer = peak * (1 + math.cos(math.pi * step / total)) / 2 * 1e6
    return Drill(
        {"en": f"Cosine decay from {peak:g} at step 0 to 0 at step {total}: the learning rate at step "
               f"{step}, in millionths (1e-6)?",
         "zh": f"学习率按余弦从第 0 步的 {peak:g} 下降，到第 {total} 步降为 0：第 {step} 步是多少（以 1e-6 为单位）？"},
        answer, "1e-6",
        {"en": f"{peak:g} x (1 + cos(pi x {step}/{total})) / 2 = {answer:.1f}e-6.",
         "zh": f"{peak:g} × (1 + cos(π × {step}/{total})) / 2 = {answer:.1f}e-6。"},
    )  # fmt: skip


def padded_share(rng: random.Random) -> Drill:
    """Padding in one batch."""
    lengths = [rng.randint(10, 120) for _ in range(6)]
    answer = 100 * (1 - sum(lengths) / (6 * max(lengths)))
    return Drill(
        {"en": f"A batch has rows of {', '.join(map(str, lengths))} tokens. What percentage of the "
               "padded batch is padding?",
         "zh": f"一个 batch 各行的词元数是 {'、'.join(map(str, lengths))}。补齐之后，填充占百分之多少？"},
        answer, "%",
        {"en": f"1 - {sum(lengths)} / (6 x {max(lengths)}) = {answer:.1f} %.",
         "zh": f"1 - {sum(lengths)} / (6 × {max(lengths)}) = {answer:.1f} %。"},
    )  # fmt: skip


def token_weight(rng: random.Random) -> Drill:
    """Accumulation by the mean of means."""
    short, long = rng.randint(2, 10), rng.randint(60, 200)
    answer = long / short
    return Drill(
        {"en": f"Two accumulation passes with {short} and {long} target tokens. Each pass's mean loss is "
               "halved and added. How many times as much does a token of the first pass weigh as one "
               "of the second?",
         "zh": f"梯度累积两次，目标词元分别有 {short} 个和 {long} 个，每次的平均损失减半后相加。第一次中的一个词元，权重是"
               "第二次中一个词元的多少倍？"},
        answer, "times",
        {"en": f"Weights are 1/(2 x {short}) and 1/(2 x {long}): the ratio is {answer:.1f}. By tokens "
               f"both weigh 1/{short + long}.",
         "zh": f"权重分别是 1/(2 × {short}) 和 1/(2 × {long})，比值是 {answer:.1f}。按词元平均时都是 "
               f"1/{short + long}。"},
    )  # fmt: skip


def perplexity(rng: random.Random) -> Drill:
    """Perplexity of two texts together."""
    first, second = rng.randint(100, 900), rng.randint(100, 900)
    one, two = rng.uniform(1.5, 3.5), rng.uniform(1.5, 3.5)
    mean = (first * one + second * two) / (first + second)
    answer = math.exp(mean)
    return Drill(
        {"en": f"{first} tokens have a mean loss of {one:.2f} nats, another {second} tokens "
               f"{two:.2f}. What is the perplexity of both together?",
         "zh": f"{first} 个词元的平均损失是 {one:.2f} nats，另外 {second} 个是 {two:.2f}。合起来的困惑度是多少？"},
        answer, "",
        {"en": f"Mean over tokens: {mean:.3f} nats; exp of it is {answer:.2f}. Averaging the two "
               "perplexities would be wrong.",
         "zh": f"按词元平均为 {mean:.3f} nats，取指数得 {answer:.2f}。对两个困惑度求平均是错的。"},
    )  # fmt: skip


def form_loss(rng: random.Random) -> Drill:
    """The loss of a model that knows the form of the answer and nothing else."""
    classes, targets = rng.choice([2, 3, 5, 10]), rng.choice([1, 2, 3])
    answer = math.log(classes) / targets
    return Drill(
        {"en": f"A row has {targets} target token(s); one is a label word out of {classes}, the others are "
               "certain. A model knows this form and guesses the label evenly. Its mean loss in nats "
               "per target token?",
         "zh": f"每行有 {targets} 个目标词元，其中一个是 {classes} 个标签词之一，其余是确定的。模型只知道这种格式，"
               "对标签均匀地随机猜。每个目标词元的平均损失是多少 nats？"},
        answer, "nats",
        {"en": f"ln({classes}) / {targets} = {answer:.3f} nats.",
         "zh": f"ln({classes}) / {targets} = {answer:.3f} nats。"},
    )  # fmt: skip


def all_reduce(rng: random.Random) -> Drill:
    """What a rank sends in a ring all-reduce of the gradients."""
    billions, ranks, size = (
        rng.choice([0.135, 1.1, 7]),
        rng.choice([2, 4, 8, 16]),
        rng.choice([2, 4]),
    )
    answer = 2 * (ranks - 1) / ranks * billions * size
    return Drill(
        {"en": f"Data parallelism of a {billions}B model on {ranks} GPUs, gradients of {size} bytes per "
               "parameter, ring all-reduce: how many GB does each GPU send in a step?",
         "zh": f"{billions}B 模型在 {ranks} 张卡上做数据并行，梯度每个参数 {size} 字节，用 ring all-reduce："
               "每张卡每步发送多少 GB？"},
        answer, "GB",
        {"en": f"2(N - 1)/N x bytes = 2 x {ranks - 1}/{ranks} x {billions * size:.3g} GB = "
               f"{answer:.3g} GB.",
         "zh": f"2(N - 1)/N × 字节数 = 2 × {ranks - 1}/{ranks} × {billions * size:.3g} GB = {answer:.3g} GB。"},
    )  # fmt: skip


def sharded_volume(rng: random.Random) -> Drill:
    """ZeRO stage 3: gather twice, reduce-scatter once (Rajbhandari et al. 2020, section 7)."""
    billions, ranks = rng.choice([1.1, 7, 13]), rng.choice([4, 8, 16])
    answer = 3 * (ranks - 1) / ranks * billions * 2
    return Drill(
        {"en": f"Fully sharded training (ZeRO stage 3) of a {billions}B model on {ranks} GPUs, weights "
               "and gradients in 16 bits: how many GB does each GPU send in a step?",
         "zh": f"{billions}B 模型在 {ranks} 张卡上全分片训练（ZeRO stage 3），权重和梯度为 16 位："
               "每张卡每步发送多少 GB？"},
        answer, "GB",
        {"en": f"Two gathers of the weights and one reduce-scatter of the gradients: 3 x {ranks - 1}/"
               f"{ranks} x {billions * 2:.3g} GB = {answer:.3g} GB.",
         "zh": f"权重 all-gather 两次，梯度 reduce-scatter 一次：3 × {ranks - 1}/{ranks} × "
               f"{billions * 2:.3g} GB = {answer:.3g} GB。"},
    )  # fmt: skip


def half_width(rng: random.Random) -> Drill:
    """The interval of an accuracy over test rows."""
    rows, right = rng.choice([150, 600, 1000, 2000]), rng.choice([60, 70, 84, 90])
    share = right / 100
    answer = 100 * 1.96 * math.sqrt(share * (1 - share) / rows)
    return Drill(
        {"en": f"A model gets {right} % of {rows:,} test rows right. How wide is the 95 % interval to "
               "each side, in percentage points, counting the rows alone?",
         "zh": f"模型在 {rows:,} 条测试数据上对了 {right} %。只计测试数据的抽样，95 % 置信区间每一侧有多宽（百分点）？"},
        answer, "points",
        {"en": f"1.96 x sqrt({share} x {1 - share:.2f} / {rows:,}) = {answer:.2f} points.",
         "zh": f"1.96 × sqrt({share} × {1 - share:.2f} / {rows:,}) = {answer:.2f} 个百分点。"},
    )  # fmt: skip


def rows_needed(rng: random.Random) -> Drill:
    """Test rows for a given precision."""
    right, points = rng.choice([70, 80, 90]), rng.choice([1, 2, 3])
    share = right / 100
    answer = share * (1 - share) * (1.96 * 100 / points) ** 2
    return Drill(
        {"en": f"How many test rows make the 95 % interval of an accuracy near {right} % as narrow as "
               f"{points} point(s) to each side?",
         "zh": f"准确率在 {right} % 左右，要让 95 % 置信区间每侧只有 {points} 个百分点，需要多少条测试数据？"},
        answer, "rows",
        {"en": f"{share} x {1 - share:.2f} x (1.96 / {points / 100})^2 = {answer:,.0f}.",
         "zh": f"{share} × {1 - share:.2f} × (1.96 / {points / 100})^2 = {answer:,.0f}。"},
    )  # fmt: skip


def three_seeds(rng: random.Random) -> Drill:
    """The interval of a mean over three seeds, by Student's t with two degrees of freedom."""
    scores = [round(rng.uniform(80, 90), 1) for _ in range(3)]
    mean = sum(scores) / 3
    spread = math.sqrt(sum((score - mean) ** 2 for score in scores) / 2)
    answer = 4.303 * spread / math.sqrt(3)
    return Drill(
        {"en": f"Three seeds score {', '.join(map(str, scores))} %. How wide is the 95 % interval of "
               "their mean to each side, in points (t = 4.303)?",
         "zh": f"三个随机种子的得分是 {'、'.join(map(str, scores))} %。均值的 95 % 置信区间每侧有多宽（百分点，t = 4.303）？"},
        answer, "points",
        {"en": f"Standard deviation {spread:.2f} (divided by 2, not 3); 4.303 x {spread:.2f} / sqrt(3) = "
               f"{answer:.2f}.",
         "zh": f"标准差 {spread:.2f}（除以 2，不是 3）；4.303 × {spread:.2f} / sqrt(3) = {answer:.2f}。"},
    )  # fmt: skip


DRILLS = (steps, linear_rate, cosine_rate, padded_share, token_weight, perplexity, form_loss,
          all_reduce, sharded_volume, half_width, rows_needed, three_seeds)  # fmt: skip
