"""The memory of a training step on models that interviewers name."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from minipeft.adapters import add_adapters
from minipeft.lora import add_lora
from minipeft.memory import estimate
from minipeft.memory.shapes import ALL_LINEAR, ATTENTION, shape_of
from minipeft.prefix_tuning import add_prefix_tuning
from minipeft.prompt_tuning import add_prompt_tuning
from minipeft.quantization import quantize_base
from minipeft.refusals import require, shown


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
    named = {"q, v": ["q_proj", "v_proj"], "attention": ATTENTION, "all": ALL_LINEAR}
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
