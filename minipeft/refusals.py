"""Refuse bad input in one sentence that says what is wrong, and what to give instead."""

from torch import nn


def require(condition, message):
    """Raise ValueError(message) unless condition holds.

    The message is made at every call. One that costs something, or that can only be made once the
    check has failed, stands under an `if` of its own instead.
    """
    if not condition:
        raise ValueError(message)


def shown(value):
    """A value as messages show it: on one line, and cut where it is long."""
    return " ".join(repr(value).split())[:60]


def refuse_flag(name, value):
    """Raise ValueError unless `value` is True or False."""
    require(isinstance(value, bool), f"{name}={shown(value)} is neither True nor False.")


def refuse_size(name, value, what):
    """Raise ValueError unless `value` is a whole number from 1 on."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(
        whole and value >= 1,
        f"{name}={shown(value)} is no {what}; give a whole number from 1 on.",
    )


def refuse_no_model(model):
    """Raise ValueError unless `model` is an nn.Module."""
    if not isinstance(model, nn.Module):  # to show a model, torch walks through all of it
        raise ValueError(f"{shown(model)} is no model; give an nn.Module, as load_base returns.")


def refuse_other_shapes(state, expected):
    """Raise ValueError unless the tensors of an adapter have the shapes that the model expects.

    state: {key: tensor}. expected: {key: shape}.
    """
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found != expected:
        key = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ValueError(
            f"The adapter does not fit this base model: {key} is {found.get(key, 'missing')} in "
            f"the adapter, and {expected.get(key, 'nowhere')} in the model."
        )
