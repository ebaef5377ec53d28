"""Train and eval mode and gradient checkpointing, set within a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from minipeft.technique.on_model import evaluating


def switch_checkpointing(model: nn.Module, on: bool) -> None:
    """Enable or disable gradient checkpointing, by either name of the method in transformers 5.

    torch's re-entrant form passes no gradient through a block whose inputs do not require one, as
    above a frozen embedding (claim 27). The non-reentrant form, used here, has no such limit.
    """
    verb = "enable" if on else "disable"
    method = getattr(model, f"activation_checkpointing_{verb}", None)
    method = method or getattr(model, f"gradient_checkpointing_{verb}")
    method({"use_reentrant": False}) if on else method()


@contextmanager
def in_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """Set train (True) or eval mode in the block; afterwards each module has its own mode again."""
    was_training = model.training
    with evaluating(model):
        model.train(mode)
        try:
            yield
        finally:
            model.train(was_training)  # a model may override train(), so call it again


@contextmanager
def training(model: nn.Module, gradient_checkpointing: bool) -> Iterator[None]:
    """Set train mode and gradient checkpointing in the block; afterwards both are as before.

    Gradients are cleared before and after the block.
    """
    already = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if gradient_checkpointing and not already:
        switch_checkpointing(model, True)
    model.zero_grad(set_to_none=True)
    try:
        with in_mode(model, True):
            yield
    finally:
        model.zero_grad(set_to_none=True)
        if gradient_checkpointing and not already:
            switch_checkpointing(model, False)
