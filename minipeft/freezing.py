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
    for pattern in module_patterns or ("*",):
        matched = [name for name in names if fnmatchcase(name, pattern)]
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"No module with parameters is named {pattern!r}"
                + (f"; near it are {', '.join(near)}." if near else ".")
            )
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


def modules_named(model, last_names, kinds):
    """[(dotted name, module)] of the modules of `kinds` whose last name is in `last_names`.

    Raises ValueError if one of `last_names` names no such module; says which there are.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    present = {name.rpartition(".")[2] for name, _ in found}
    missing = [name for name in last_names if name not in present]
    if missing or not last_names:
        raise ValueError(
            f"{type(model).__name__} has no linear module named "
            f"{' or '.join(map(repr, missing)) or '(no name was given)'}; "
            f"it has {', '.join(sorted(present))}."
        )
    return [(name, module) for name, module in found if name.rpartition(".")[2] in last_names]
