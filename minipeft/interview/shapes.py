"""Model shapes that interviewers name, and the memory of a training step on them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from transformers import LlamaConfig, PretrainedConfig

from minipeft.adapters import add_adapters
from minipeft.lora import add_lora
from minipeft.memory import estimate
from minipeft.prefix_tuning import add_prefix_tuning
from minipeft.prompt_tuning import add_prompt_tuning
from minipeft.quantization import quantize_base
from minipeft.refusals import require, shown

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def shape_of(name: str) -> PretrainedConfig:
    """The configuration of "SmolLM2 135M", "TinyLlama 1.1B", "Llama 2 7B", "Llama 2 13B",
    "Llama 3 8B" or "Llama 2 70B".

    Sizes are those of the models' published configurations. Raises ValueError for another name.
    """
    known = {
        "SmolLM2 135M": (576, 30, 9, 3, 1536, 49152, True),
        "TinyLlama 1.1B": (2048, 22, 32, 4, 5632, 32000, False),
        "Llama 2 7B": (4096, 32, 32, 32, 11008, 32000, False),
        "Llama 2 13B": (5120, 40, 40, 40, 13824, 32000, False),
        "Llama 3 8B": (4096, 32, 32, 8, 14336, 128256, False),
        "Llama 2 70B": (8192, 80, 64, 8, 28672, 32000, False),
    }
    require(name in known, f"The shape of {shown(name)} is not known here, but {shown([*known])}.")
    hidden, layers, heads, kv_heads, inner, vocab, tied = known[name]
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=inner, vocab_size=vocab,
        tie_word_embeddings=tied,
    )  # fmt: skip


def estimate_gib(
    model: str,
    method: str = "full",
    *,
    r: int = 8,
    targets: str = "q, v",
    n: int = 20,
    nf4: bool = False,
    **settings: Any,
) -> float:
    """The peak of one training step in GiB, by `minipeft.memory.estimate` on CUDA.

    method: "full", "lora" (with r, and targets "q, v", "attention" or "all"), "prompt" or "prefix"
    (with n virtual tokens) or "adapters" (of size r). nf4: the frozen base in 4 bits.
    settings: those of `estimate`; dtype is named, as "bfloat16".
    Raises ValueError for an unknown method, target or model.
    """
    named = {"q, v": ["q_proj", "v_proj"], "attention": ATTENTION, "all": ALL}
    require(targets in named, f"targets={shown(targets)} is none of {shown([*named])}.")
    adds: dict[str, Callable] = {
        "full": lambda base: base,
        "lora": partial(add_lora, r=r, alpha=2 * r, targets=named[targets]),
        "prompt": lambda base: add_prompt_tuning(base, n),
        "prefix": lambda base: add_prefix_tuning(base, n),
        "adapters": lambda base: add_adapters(base, r),
    }
    require(method in adds, f"method={shown(method)} is none of {shown([*adds])}.")
    add = adds[method]
    settings["dtype"] = getattr(torch, settings.get("dtype", "float32"))
    both = (lambda base: add(quantize_base(base))) if nf4 else add
    return estimate(shape_of(model), both, device="cuda", **settings).total / 2**30
