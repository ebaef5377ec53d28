"""Decide what is trained: freeze the base, unfreeze parts of it by module, count.

A frozen parameter has requires_grad=False. It gets no gradient at all (None, not zero), while
gradients still flow through it to what lies before it (claim 13).
"""

import difflib
from fnmatch import fnmatchcase

import torch


def freeze(model):
    """Set requires_grad=False on every parameter. Returns the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return model


def unfreeze(model, *module_patterns):
    """Set requires_grad=True on the parameters of every module that a pattern matches.

    A pattern is a dotted module name, in which * stands for anything: "model.layers.29",
    "*norm*", "lm_head". With no pattern, everything is unfrozen. A tied weight is one tensor, so
    unfreezing the head also unfreezes the embedding that shares it. Returns the model.
    Raises ValueError for a pattern that matches no module with parameters.
    """
    names = [
        name for name, module in model.named_modules() if any(True for _ in module.parameters())
    ]
    matched = set()
    for pattern in module_patterns or ("*",):
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"No module with parameters is named {pattern!r}"
                + (f"; near it are {', '.join(near)}." if near else ".")
            )
        matched |= fitting
    for name in matched:
        model.get_submodule(name).requires_grad_(True)
    return model


def count_parameters(model):
    """Return (trainable, total): numbers of scalars, a tied weight counted once."""
    total = sum(p.numel() for p in model.parameters())  # parameters() gives each tensor once
    return sum(p.numel() for p in model.parameters() if p.requires_grad), total


def at_least_float32(dtype):
    """The type that trainables get on a base of `dtype`: small updates vanish below float32."""
    return torch.promote_types(dtype, torch.float32)


def modules_named(model, endings, kinds):
    """[(dotted name, module)] of the modules of `kinds` whose name ends in one of `endings`.

    An ending is one or more whole components: "q_proj", or "0.self_attn.q_proj". (HF peft reads
    its target_modules the same way.) Raises ValueError if an ending fits none of them.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    missing = [e for e in endings if not any(f".{name}".endswith(f".{e}") for name, _ in found)]
    if missing or not endings:
        present = sorted({name.rpartition(".")[2] for name, _ in found})
        raise ValueError(
            f"{type(model).__name__} has no linear layer named "
            f"{' or '.join(map(repr, missing)) or 'by an empty list'}; it has {', '.join(present)}."
        )
    return [(n, m) for n, m in found if any(f".{n}".endswith(f".{e}") for e in endings)]
