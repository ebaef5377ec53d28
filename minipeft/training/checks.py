"""The checks of `train`'s arguments, made before the first step."""

import math
from typing import Any

import torch
from torch import nn

from minipeft.freezing import trainable_parameters
from minipeft.refusals import (
    is_number,
    is_whole_number,
    refuse_flag,
    refuse_no_path,
    require,
    shown,
)
from minipeft.training.distributed import world_size
from minipeft.training.loss import refuse_kind
from minipeft.training.modes import CUDA_GRAPHS

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
COUNTS = ("max_steps", "warmup_steps", "accumulation", "eval_every", "save_every")
FLAGS = ("gradient_checkpointing", "resume", "progress")


def refuse_bad_input(
    model: nn.Module, batches: object, call: dict[str, Any], groups: list[dict[str, Any]]
) -> None:
    """Raise ValueError for input that cannot be trained on, with the remedy.

    call: the arguments of `train` by name. groups: the parameter groups, defaults filled in.
    """
    _refuse_numbers(call, groups)
    for name in FLAGS:
        refuse_flag(name, call[name])
    if call["checkpoint_dir"] is not None:
        refuse_no_path("checkpoint_dir", call["checkpoint_dir"])
    require(
        callable(call["loss_sum"]),
        f"loss_sum={shown(call['loss_sum'])} is not a function of (model, batch); leave it out for "
        "the model's own loss.",
    )
    _refuse_precision(model, call["precision"])
    _refuse_compile(call)
    for name, given in (("batches", batches), ("eval_batches", call["eval_batches"])):
        repeatable = hasattr(given, "__iter__") and iter(given) is not given
        require(
            repeatable or (given is None and name == "eval_batches"),
            f"`{name}` must be iterable more than once: every epoch starts it again. Pass a list, "
            "a DataLoader or minipeft's Batches.",
        )
    _refuse_parameters(model, groups)
    if call["eval_batches"] is not None:
        refuse_kind(model)


def _refuse_numbers(call, groups):
    for name in COUNTS:
        value, minimum = call[name], int(name != "warmup_steps")
        require(
            (is_whole_number(value) and value >= minimum)
            or (value is None and name.endswith("every")),
            f"{name}={value!r} is not a number of steps or batches.",
        )
    for name, value in ((name, g[name]) for g in groups for name in ("lr", "weight_decay")):
        require(
            is_number(value) and 0 <= value < math.inf,
            f"{name}={value!r} must be a number of at least 0.",
        )
    limit, seed = call["max_grad_norm"], call["seed"]
    require(
        limit is None or (is_number(limit) and 0 < limit < math.inf),
        f"max_grad_norm={limit!r} must be above 0, or None for no limit.",
    )
    require(
        is_whole_number(seed) and 0 <= seed < 2**32,
        f"seed={seed!r} must be a whole number from 0 to 2**32 - 1.",
    )
    require(
        call["warmup_steps"] < call["max_steps"],
        f"warmup_steps={call['warmup_steps']} must be below max_steps={call['max_steps']}, or the "
        "rate would never reach lr.",
    )


def _refuse_precision(model, precision):
    known = list(AUTOCAST)
    require(precision in known, f"precision={precision!r} is none of {', '.join(known)}.")
    if precision == "float16":
        device = next(model.parameters()).device.type
        require(
            all(p.dtype != torch.bfloat16 for p in model.parameters()),
            "precision='float16' does not go with weights in bfloat16; take precision='bfloat16'.",
        )
        require(
            world_size() == 1,
            "Loss scaling is untested on several ranks; take bfloat16 or float32.",
        )
        require(
            device in ("cpu", "cuda"),
            f"Loss scaling is untested on {device}; take bfloat16 or float32.",
        )


def _refuse_compile(call):
    how = call["compile"]
    require(
        isinstance(how, bool) or how == CUDA_GRAPHS,
        f'compile={shown(how)} is none of False, True and "{CUDA_GRAPHS}".',
    )
    require(
        not (how and call["gradient_checkpointing"]),
        "compile does not go with gradient_checkpointing: the compiler decides by itself which "
        "activations to recompute. Leave one of them out.",
    )
    require(
        not how or world_size() == 1,
        "compile is untested on several ranks; leave it out.",
    )
    require(
        how != CUDA_GRAPHS or call["accumulation"] == 1,
        f'compile="{CUDA_GRAPHS}" replays into the memory of the last gradients, so they cannot '
        "accumulate; take accumulation=1, or compile=True.",
    )


def _refuse_parameters(model, groups):
    trainable = trainable_parameters(model)
    require(
        trainable,
        "Nothing is trainable: every parameter has requires_grad=False. Add a technique, or "
        "unfreeze some modules.",
    )
    grouped = [id(p) for group in groups for p in group["params"]]
    for name, p in trainable.items():
        require(
            grouped.count(id(p)) == 1,
            f"{name} is trainable, but `groups` does not hold it exactly once.",
        )
        require(
            p.dtype not in (torch.float16, torch.bfloat16),
            f"{name} is trainable but {p.dtype}: small updates would round away. Make "
            "trainables float32, for example with model.float(), and get the speed of half "
            'precision from precision="bfloat16".',
        )
