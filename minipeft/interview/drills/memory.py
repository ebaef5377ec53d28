"""Drills on bytes: weights, states, activations, logits, caches, files."""

import random

from minipeft.interview.drills.drill import Drill
from minipeft.interview.estimates import estimate_gib
from minipeft.memory.shapes import shape_of

GIB = 2**30
LARGE = ["Llama 2 7B", "Llama 2 13B", "Llama 3 8B"]
SIZES = {"Llama 2 7B": 6.74, "Llama 2 13B": 13.02, "Llama 3 8B": 8.03, "Llama 2 70B": 68.98}


def weights(rng: random.Random) -> Drill:
    """The weights alone, at inference."""
    name, (kind, size) = rng.choice([*SIZES]), rng.choice([("float32", 4), ("bfloat16", 2)])
    answer = SIZES[name] * 1e9 * size / GIB
    return Drill(
        {"en": f"How many GiB do the weights of {name} ({SIZES[name]}B parameters) take in {kind}?",
         "zh": f"{name}（{SIZES[name]}B 参数）的权重用 {kind} 存放，占多少 GiB？"},
        answer, "GiB",
        {"en": f"{SIZES[name]}e9 parameters x {size} bytes / 2^30 = {answer:.1f} GiB.",
         "zh": f"{SIZES[name]}e9 个参数 × {size} 字节 / 2^30 = {answer:.1f} GiB。"},
    )  # fmt: skip


def states(rng: random.Random) -> Drill:
    """Weights, gradients and Adam's moments between two steps (Rajbhandari et al. 2020, 3.1)."""
    name = rng.choice([*SIZES])
    recipe, size, parts = rng.choice([
        ("pure bfloat16", 8, "2 + 2 + 2 + 2"),
        ("float32", 16, "4 + 4 + 4 + 4"),
        ("mixed precision (16-bit weights and gradients, float32 master weights)", 16, "2 + 2 + 4 + 4 + 4"),
    ])  # fmt: skip
    recipe_zh = {"pure bfloat16": "全程 bfloat16", "float32": "float32"}.get(
        recipe, "混合精度（16 位权重和梯度，另存 float32 主权重）"
    )
    answer = SIZES[name] * size
    return Drill(
        {"en": f"Full fine-tuning of {name} ({SIZES[name]}B) with AdamW in {recipe}: how many GB do "
               "weights, gradients and optimizer state hold, all counted?",
         "zh": f"用 AdamW 全量微调 {name}（{SIZES[name]}B），{recipe_zh}：权重、梯度和优化器状态"
               "总共占多少 GB？"},
        answer, "GB",
        {"en": f"Bytes per parameter: {parts} = {size}. {SIZES[name]}e9 x {size} = {answer:.0f} GB.",
         "zh": f"每个参数的字节数：{parts} = {size}。{SIZES[name]}e9 × {size} = {answer:.0f} GB。"},
    )  # fmt: skip


def _lora_step(rng, r, **settings):
    """(the step in words, its shape, tokens, the peak by `estimate`) of LoRA on all linear layers."""
    name, r = rng.choice(LARGE), rng.choice(r)
    batch, seq = rng.choice([1, 2, 4]), rng.choice([512, 1024, 2048])
    answer = estimate_gib(
        name, "lora", r=r, targets="all", batch=batch, seq=seq, dtype="bfloat16", **settings
    )
    shape = shape_of(name)
    words = {
        "en": f"{name} ({shape.num_hidden_layers} layers, hidden size {shape.hidden_size}, vocabulary "
              f"{shape.vocab_size:,}), LoRA r = {r} on all linear layers with AdamW, {batch} x "
              f"{seq:,} tokens, fused attention",
        "zh": f"{name}（{shape.num_hidden_layers} 层，隐藏维 {shape.hidden_size}，词表 "
              f"{shape.vocab_size:,}），所有线性层上 r = {r} 的 LoRA，AdamW，{batch} × {seq:,} 个词元，融合注意力",
    }  # fmt: skip
    return words, name, shape, batch * seq, answer


def lora_step(rng: random.Random) -> Drill:
    """A LoRA step without checkpointing: activations decide."""
    words, name, shape, tokens, answer = _lora_step(rng, [8, 16])
    base, one = SIZES[name] * 2e9 / GIB, tokens * shape.hidden_size * 2 / GIB
    width = (answer - base) / shape.num_hidden_layers / one
    return Drill(
        {"en": f"{words['en']}, bfloat16 base, no checkpointing: the peak of a training step in GiB?",
         "zh": f"{words['zh']}，bfloat16 基座，不用梯度检查点：训练一步的显存峰值是多少 GiB？"},
        answer, "GiB",
        {"en": f"Base {SIZES[name]}e9 x 2 bytes = {base:.1f} GiB. The rest is mostly activations: "
               f"{tokens:,} tokens x {shape.hidden_size} x 2 bytes = {one:.3f} GiB for each tensor of "
               f"the hidden size, and about {width:.0f} of them per layer, logits and LoRA's states "
               f"included. Together {answer:.1f} GiB.",
         "zh": f"基座 {SIZES[name]}e9 × 2 字节 = {base:.1f} GiB。其余主要是激活：每个隐藏维大小的张量 {tokens:,} × "
               f"{shape.hidden_size} × 2 字节 = {one:.3f} GiB，每层约相当于 {width:.0f} 个（已含 logits 和 LoRA 的"
               f"状态）。合计 {answer:.1f} GiB。"},
    )  # fmt: skip


def checkpointed_step(rng: random.Random) -> Drill:
    """The same with gradient checkpointing, in bfloat16 or NF4."""
    nf4 = rng.random() < 0.5
    words, name, shape, tokens, answer = _lora_step(rng, [16], checkpointing=True, nf4=nf4)
    kept = shape.num_hidden_layers * tokens * shape.hidden_size * 2 / GIB
    logits_gib = tokens * shape.vocab_size * 4 / GIB
    base = SIZES[name] * (0.55 if nf4 else 2) * 1e9 / GIB
    kind, size = ("NF4", "about 0.55") if nf4 else ("bfloat16", "2")
    return Drill(
        {"en": f"{words['en']}, {kind} base, with gradient checkpointing: the peak of a step in GiB?",
         "zh": f"{words['zh']}，{kind} 基座，使用梯度检查点：一步的显存峰值是多少 GiB？"},
        answer, "GiB",
        {"en": f"Base {SIZES[name]}e9 x {size} bytes = {base:.1f} GiB (embedding and head stay 16 bits). "
               f"Block inputs {shape.num_hidden_layers} x {tokens:,} x {shape.hidden_size} x 2 bytes = "
               f"{kept:.2f} GiB. Each float32 tensor of logits {logits_gib:.2f} GiB. With one block's "
               f"activations and LoRA's states the peak is {answer:.1f} GiB.",
         "zh": f"基座 {SIZES[name]}e9 × {size.replace('about', '约')} 字节 = {base:.1f} GiB（词嵌入和输出头仍是 16 位）。"
               f"各层的输入 {shape.num_hidden_layers} × {tokens:,} × {shape.hidden_size} × 2 字节 = "
               f"{kept:.2f} GiB。每份 float32 logits {logits_gib:.2f} GiB。再加上一层的激活和 LoRA 的状态，"
               f"峰值为 {answer:.1f} GiB。"},
    )  # fmt: skip


def logits(rng: random.Random) -> Drill:
    """One tensor of logits."""
    name, batch, seq = rng.choice(LARGE), rng.choice([2, 4, 8]), rng.choice([1024, 2048, 4096])
    vocab = shape_of(name).vocab_size
    answer = batch * seq * vocab * 4 / GIB
    return Drill(
        {"en": f"{name} has a vocabulary of {vocab:,}. How many GiB is ONE float32 tensor of logits "
               f"for {batch} x {seq:,} tokens?",
         "zh": f"{name} 的词表大小是 {vocab:,}。{batch} × {seq:,} 个词元的一份 float32 logits 占多少 GiB？"},
        answer, "GiB",
        {"en": f"{batch} x {seq:,} x {vocab:,} x 4 bytes = {answer:.2f} GiB; the loss and its "
               "gradient usually need more than one such tensor.",
         "zh": f"{batch} × {seq:,} × {vocab:,} × 4 字节 = {answer:.2f} GiB；"
               "计算损失和它的梯度通常不止需要一份。"},
    )  # fmt: skip


def block_activations(rng: random.Random) -> Drill:
    """Korthikanti et al. 2022, equation 1: sbh(34 + 5as/h) bytes for a block of GPT-2's kind."""
    h, a = rng.choice([(768, 12), (1024, 16), (2048, 16), (4096, 32)])
    s, b = rng.choice([512, 1024, 2048]), rng.choice([1, 4, 8])
    answer = s * b * h * (34 + 5 * a * s / h) / GIB
    return Drill(
        {"en": f"A GPT block with hidden size {h}, {a} heads, dropout, attention without a fused kernel "
               f"and 16-bit activations: how many GiB does it keep for {b} x {s:,} tokens?",
         "zh": f"GPT 的一层，隐藏维 {h}，{a} 个头，带 dropout，注意力不用融合 kernel，激活为 16 位："
               f"{b} × {s:,} 个词元要保留多少 GiB 的激活？"},
        answer, "GiB",
        {"en": f"sbh(34 + 5as/h) = {s} x {b} x {h} x (34 + {5 * a * s / h:.0f}) bytes = "
               f"{answer:.3g} GiB (Korthikanti et al. 2022).",
         "zh": f"sbh(34 + 5as/h) = {s} × {b} × {h} × (34 + {5 * a * s / h:.0f}) 字节 = "
               f"{answer:.3g} GiB（Korthikanti et al. 2022）。"},
    )  # fmt: skip


def kv_cache(rng: random.Random) -> Drill:
    """The KV cache at inference."""
    name, batch, seq = rng.choice(LARGE), rng.choice([4, 8, 32]), rng.choice([2048, 4096, 8192])
    shape = shape_of(name)
    layers, heads = shape.num_hidden_layers, shape.num_key_value_heads
    size = shape.hidden_size // shape.num_attention_heads
    answer = 2 * layers * heads * size * seq * batch * 2 / GIB
    return Drill(
        {"en": f"{name} has {layers} layers and {heads} key-value heads of size {size}. How many GiB "
               f"does the KV cache of {batch} sequences of {seq:,} tokens take in 16 bits?",
         "zh": f"{name} 有 {layers} 层、{heads} 个 {size} 维的键值头。{batch} 条长 {seq:,} 的序列，"
               "16 位的 KV 缓存占多少 GiB？"},
        answer, "GiB",
        {"en": f"2 x {layers} x {heads} x {size} numbers per token, 2 bytes each, x {seq:,} x {batch} "
               f"= {answer:.2f} GiB.",
         "zh": f"每个词元 2 × {layers} × {heads} × {size} 个数，各 2 字节，× {seq:,} × {batch} "
               f"= {answer:.2f} GiB。"},
    )  # fmt: skip


def zero_rank(rng: random.Random) -> Drill:
    """What a rank holds under ZeRO (Rajbhandari et al. 2020, figure 1)."""
    name, ranks = rng.choice([*SIZES]), rng.choice([4, 8, 16, 64])
    stage = rng.choice([1, 2, 3])
    size = {1: 4 + 12 / ranks, 2: 2 + 14 / ranks, 3: 16 / ranks}[stage]
    parts = {1: f"2 + 2 + 12/{ranks}", 2: f"2 + (2 + 12)/{ranks}", 3: f"(2 + 2 + 12)/{ranks}"}[
        stage
    ]
    answer = SIZES[name] * size
    return Drill(
        {"en": f"Full training of {name} ({SIZES[name]}B) with Adam, 16-bit weights and gradients and "
               f"float32 master weights, ZeRO stage {stage} on {ranks} GPUs: how many GB of states does each GPU hold?",
         "zh": f"用 Adam 全量训练 {name}（{SIZES[name]}B），16 位权重和梯度，另存 float32 主权重，{ranks} 张卡，ZeRO stage {stage}："
               "每张卡存放的模型状态是多少 GB？"},
        answer, "GB",
        {"en": f"Bytes per parameter: {parts} = {size:.2f}. Times {SIZES[name]}e9 = {answer:.1f} GB.",
         "zh": f"每个参数的字节数：{parts} = {size:.2f}。乘以 {SIZES[name]}e9 = {answer:.1f} GB。"},
    )  # fmt: skip


DRILLS = (
    weights,
    states,
    lora_step,
    checkpointed_step,
    logits,
    block_activations,
    kv_cache,
    zero_rank,
)
