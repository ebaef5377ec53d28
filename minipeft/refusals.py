"""Argument checks. Each raises a ValueError whose one sentence names the value and the remedy."""

import os
from collections.abc import Mapping
from numbers import Integral, Real
from typing import TypeGuard, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)  # what a function takes and returns


def require(condition: object, message: str) -> None:
    """Raise ValueError(message) unless `condition` is true.

    The message is built on every call. If that is expensive, or only possible once the check has
    failed, write `if ...: raise` instead.
    """
    if not condition:
        raise ValueError(message)


def shown(value: object) -> str:
    """repr(value) for an error message: on one line, cut to 60 characters."""
    return " ".join(repr(value).split())[:60]


def is_number(value: object) -> bool:
    """Is this a real number, of Python or of NumPy, and not a bool?"""
    return isinstance(value, Real) and not isinstance(value, bool)


def is_whole_number(value: object) -> TypeGuard[int]:
    """Is this an integer, of Python or of NumPy, and not a bool?"""
    return isinstance(value, Integral) and not isinstance(value, bool)


def refuse_flag(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a bool."""
    require(isinstance(value, bool), f"{name}={shown(value)} is neither True nor False.")


def refuse_size(name: str, value: object, what: str) -> None:
    """Raise ValueError unless `value` is an int of at least 1."""
    require(
        isinstance(value, int) and not isinstance(value, bool) and value >= 1,
        f"{name}={shown(value)} is not a {what}; give a whole number of at least 1.",
    )


def refuse_no_path(name: str, value: object) -> None:
    """Raise ValueError unless `value` is a path."""
    require(
        isinstance(value, str | os.PathLike),
        f"{name}={shown(value)} is not a path; give a string or a Path.",
    )


def refuse_no_model(model: object) -> None:
    """Raise ValueError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):  # no `require`: the repr of a whole model is expensive
        raise ValueError(
            f"{shown(model)} is not a model; give an nn.Module, the first of the two that "
            "load_base returns."
        )


def refuse_other_shapes(
    state: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise ValueError unless the adapter weights have the shapes that the model expects.

    state: {key: tensor}. expected: {key: shape}.
    """
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found != expected:
        key = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ValueError(
            f"The adapter does not fit this base model: {key} is {found.get(key, 'missing')} in "
            f"the adapter, and {expected.get(key, 'nowhere')} in the model."
        )
