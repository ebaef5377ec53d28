"""Drills on numbers of parameters, files, and operations."""

import random

from minipeft.interview.drills.drill import Drill
from minipeft.memory.shapes import shape_of

NAMES = ["SmolLM2 135M", "TinyLlama 1.1B", "Llama 2 7B", "Llama 2 13B", "Llama 3 8B"]


def _shape(rng):
    """(name, hidden, layers, kv_width, inner, vocab): a model, and the widths that are asked for."""
    name = rng.choice(NAMES)
    shape = shape_of(name)
    size = shape.hidden_size // shape.num_attention_heads
    return (name, shape.hidden_size, shape.num_hidden_layers, shape.num_key_value_heads * size,
            shape.intermediate_size, shape.vocab_size)  # fmt: skip


def lora_parameters(rng: random.Random) -> Drill:
    """LoRA on queries and values (Hu et al. 2021, section 4.2)."""
    (name, h, layers, kv, _, _), r = _shape(rng), rng.choice([4, 8, 16, 64])
    answer = layers * r * ((h + h) + (h + kv)) / 1e6
    return Drill(
        {"en": f"{name}: hidden size {h}, {layers} layers, keys and values {kv} wide. How many million "
               f"trainable parameters has LoRA with r = {r} on queries and values?",
         "zh": f"{name}：隐藏维 {h}，{layers} 层，键和值的宽度为 {kv}。在查询和值的投影上用 r = {r} 的 LoRA，"
               "可训练参数有多少百万？"},
        answer, "million",
        {"en": f"r(in + out) for each matrix: {layers} x {r} x (({h} + {h}) + ({h} + {kv})) = "
               f"{answer:.3f} million.",
         "zh": f"每个矩阵 r(in + out)：{layers} × {r} × (({h} + {h}) + ({h} + {kv})) = {answer:.3f} 百万。"},
    )  # fmt: skip


def lora_everywhere(rng: random.Random) -> Drill:
    """LoRA on all seven linear layers of a Llama block."""
    (name, h, layers, kv, inner, _), r = _shape(rng), rng.choice([4, 8, 16, 64])
    attention, mlp = 2 * (h + h) + 2 * (h + kv), 3 * (h + inner)
    answer = layers * r * (attention + mlp) / 1e6
    return Drill(
        {"en": f"{name}: hidden size {h}, {layers} layers, keys and values {kv} wide, inner size "
               f"{inner}. LoRA with r = {r} on q, k, v, o, gate, up and down: how many million "
               "trainable parameters?",
         "zh": f"{name}：隐藏维 {h}，{layers} 层，键和值的宽度为 {kv}，MLP 中间维 {inner}。在 q、k、v、o、gate、up、"
               f"down 上都用 r = {r} 的 LoRA，可训练参数有多少百万？"},
        answer, "million",
        {"en": f"Attention r x {attention:,}, MLP r x 3 x ({h} + {inner}) = r x {mlp:,}; times "
               f"{layers} layers and r = {r}: {answer:.2f} million.",
         "zh": f"注意力 r × {attention:,}，MLP r × 3 × ({h} + {inner}) = r × {mlp:,}；乘以 {layers} 层和 "
               f"r = {r}：{answer:.2f} 百万。"},
    )  # fmt: skip


def adapter_file(rng: random.Random) -> Drill:
    """The file of a LoRA."""
    (name, h, layers, kv, _, _), r = _shape(rng), rng.choice([8, 16, 32])
    (kind, size), count = rng.choice([("float32", 4), ("float16", 2)]), layers * r * (3 * h + kv)
    answer = count * size / 1e6
    return Drill(
        {"en": f"How many MB is the file of a LoRA with r = {r} on queries and values of {name} (hidden "
               f"{h}, {layers} layers, keys and values {kv} wide), stored in {kind}?",
         "zh": f"{name}（隐藏维 {h}，{layers} 层，键和值的宽度为 {kv}）的查询和值投影上 r = {r} 的 LoRA，"
               f"以 {kind} 保存，文件有多少 MB？"},
        answer, "MB",
        {"en": f"{layers} x {r} x (2 x {h} + {h} + {kv}) = {count:,} numbers x {size} bytes = "
               f"{answer:.2f} MB.",
         "zh": f"{layers} × {r} × (2 × {h} + {h} + {kv}) = {count:,} 个数 × {size} 字节 = {answer:.2f} MB。"},
    )  # fmt: skip


def prefix_parameters(rng: random.Random) -> Drill:
    """Keys and values of a prefix, in every layer (Li and Liang 2021, section 4)."""
    (name, h, layers, kv, _, _), n = _shape(rng), rng.choice([10, 20, 64, 128])
    answer = n * layers * 2 * kv / 1e6
    return Drill(
        {"en": f"{name}: hidden size {h}, {layers} layers, keys and values {kv} wide. How many million "
               f"parameters has a prefix of {n} virtual tokens, without a projection?",
         "zh": f"{name}：隐藏维 {h}，{layers} 层，键和值的宽度为 {kv}。{n} 个虚拟词元的前缀（不带投影）有多少百万"
               "参数？"},
        answer, "million",
        {"en": f"A key and a value per layer: {n} x {layers} x 2 x {kv} = {answer:.3f} million.",
         "zh": f"每层一个键、一个值：{n} × {layers} × 2 × {kv} = {answer:.3f} 百万。"},
    )  # fmt: skip


def prompt_parameters(rng: random.Random) -> Drill:
    """A soft prompt (Lester et al. 2021, section 2)."""
    (name, h, *_), n = _shape(rng), rng.choice([10, 20, 50, 100])
    answer = n * h
    return Drill(
        {"en": f"How many trainable parameters has a soft prompt of {n} virtual tokens for {name}, "
               f"whose hidden size is {h}?",
         "zh": f"{name} 的隐藏维是 {h}。{n} 个虚拟词元的软提示有多少可训练参数？"},
        answer, "parameters",
        {"en": f"{n} x {h} = {answer:,}; they sit before the first layer alone.",
         "zh": f"{n} × {h} = {answer:,}；它们只加在第一层之前。"},
    )  # fmt: skip


def adapter_parameters(rng: random.Random) -> Drill:
    """Two bottleneck adapters in each block (Houlsby et al. 2019, section 2.1)."""
    (name, h, layers, *_), m = _shape(rng), rng.choice([8, 16, 64])
    answer = layers * 2 * (2 * h * m + h + m) / 1e6
    return Drill(
        {"en": f"{name}: hidden size {h}, {layers} layers. Houlsby's adapters of bottleneck {m}, two in "
               "each block, with biases: how many million parameters?",
         "zh": f"{name}：隐藏维 {h}，{layers} 层。按 Houlsby 的方式，每层放两个瓶颈维度为 {m} 的适配器（带偏置）："
               "共有多少百万参数？"},
        answer, "million",
        {"en": f"2hm + h + m = {2 * h * m + h + m:,} each, x 2 x {layers} = {answer:.3f} million.",
         "zh": f"每个 2hm + h + m = {2 * h * m + h + m:,}，× 2 × {layers} = {answer:.3f} 百万。"},
    )  # fmt: skip


def model_parameters(rng: random.Random) -> Drill:
    """All parameters of a Llama shape."""
    name, h, layers, kv, inner, vocab = _shape(rng)
    tied = shape_of(name).tie_word_embeddings
    block = 2 * h * h + 2 * h * kv + 3 * h * inner + 2 * h
    answer = (layers * block + (1 if tied else 2) * vocab * h + h) / 1e6
    head_en = "tied to the embedding" if tied else "not tied"
    head_zh = "与词嵌入共享" if tied else "不与词嵌入共享"
    return Drill(
        {"en": f"A Llama-like model: hidden size {h}, {layers} layers, keys and values {kv} wide, inner "
               f"size {inner}, vocabulary {vocab:,}, head {head_en}. How many million parameters?",
         "zh": f"一个 Llama 结构的模型：隐藏维 {h}，{layers} 层，键和值的宽度为 {kv}，MLP 中间维 {inner}，词表 {vocab:,}，"
               f"输出头{head_zh}。共有多少百万参数？"},
        answer, "million",
        {"en": f"A block has 2h^2 + 2h x {kv} + 3h x {inner} + 2h = {block:,}; {layers} blocks, and the "
               f"embedding {'once' if tied else 'twice'}: {answer:,.0f} million ({name}).",
         "zh": f"一层有 2h^2 + 2h × {kv} + 3h × {inner} + 2h = {block:,} 个；{layers} 层，加上"
               f"{'一份' if tied else '两份'}词嵌入大小的矩阵：{answer:,.0f} 百万（{name}）。"},
    )  # fmt: skip


def training_hours(rng: random.Random) -> Drill:
    """6 P D operations, at some utilization."""
    billions, tokens = rng.choice([1.1, 7, 13, 70]), rng.choice([10, 100, 500])
    cards, peak, mfu = rng.choice([1, 8, 64]), rng.choice([312, 989]), rng.choice([30, 40, 50])
    answer = 6 * billions * 1e9 * tokens * 1e6 / (cards * peak * 1e12 * mfu / 100) / 3600
    return Drill(
        {"en": f"Full training of {billions}B parameters on {tokens} million tokens, {cards} GPU(s) of "
               f"{peak} TFLOP/s at {mfu} % utilization: how many hours?",
         "zh": f"全量训练 {billions}B 参数的模型，数据 {tokens} 百万词元，{cards} 张峰值 {peak} TFLOP/s 的卡，利用率 {mfu} %："
               "需要多少小时？"},
        answer, "hours",
        {"en": f"6 x {billions}e9 x {tokens}e6 operations / ({cards} x {peak}e12 x {mfu / 100}) / 3600 s "
               f"= {answer:.3g} hours.",
         "zh": f"6 × {billions}e9 × {tokens}e6 次运算 / ({cards} × {peak}e12 × {mfu / 100}) / 3600 秒 "
               f"= {answer:.3g} 小时。"},
    )  # fmt: skip


def frozen_operations(rng: random.Random) -> Drill:
    """With the base frozen, two products per matrix are left of three."""
    billions, tokens = rng.choice([1.1, 7, 13]), rng.choice([4096, 16384, 65536])
    answer = 4 * billions * 1e9 * tokens / 1e12
    return Drill(
        {"en": f"One LoRA step on a {billions}B model with {tokens:,} tokens, counting the base's matrix "
               "products alone: how many TFLOPs?",
         "zh": f"在 {billions}B 模型上做一步 LoRA 训练，{tokens:,} 个词元，只计基座的矩阵乘法：共多少 TFLOPs？"},
        answer, "TFLOPs",
        {"en": "Forward 2P per token, backward to the inputs 2P; the 2P for gradients of frozen weights "
               f"fall away: 4 x {billions}e9 x {tokens:,} = {answer:.1f} TFLOPs.",
         "zh": "前向每个词元 2P，反向传到输入 2P；冻结权重不求梯度，省去 2P："
               f"4 × {billions}e9 × {tokens:,} = {answer:.1f} TFLOPs。"},
    )  # fmt: skip


DRILLS = (lora_parameters, lora_everywhere, adapter_file, prefix_parameters, prompt_parameters,
          adapter_parameters, model_parameters, training_hours, frozen_operations)  # fmt: skip
