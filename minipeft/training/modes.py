"""Train and eval mode, gradient checkpointing and compilation, set within a `with` block."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException  # torch has no public name for it

from minipeft.technique.on_model import evaluating

CUDA_GRAPHS = "reduce-overhead"  # torch.compile's name for a mode that replays CUDA graphs


def switch_checkpointing(model: nn.Module, on: bool) -> None:
    """Enable or disable gradient checkpointing, by either name of the method in transformers 5.

    torch's re-entrant form passes no gradient through a block whose inputs do not require one, as
    above a frozen embedding. The non-reentrant form, used here, has no such limit.
    """
    verb = "enable" if on else "disable"
    method = getattr(model, f"activation_checkpointing_{verb}", None)
    method = method or getattr(model, f"gradient_checkpointing_{verb}")
    method({"use_reentrant": False}) if on else method()


@contextmanager
def in_mode(model: nn.Module, mode: bool) -> Iterator[None]:
    """Set train (True) or eval mode in the block; afterward each module has its own mode again."""
    was_training = model.training
    with evaluating(model):
        model.train(mode)
        try:
            yield
        finally:
            model.train(was_training)  # a model may override train(), so call it again


@contextmanager
def training(model: nn.Module, gradient_checkpointing: bool) -> Iterator[None]:
    """Set train mode and gradient checkpointing in the block; afterward both are as before.

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


@contextmanager
def compiled(model: nn.Module, how: bool | str) -> Iterator[None]:
    """In the block, a training step runs what `torch.compile` makes of the model.

    how: False, True, or "reduce-overhead" for CUDA graphs. The model's modules, names and hooks
    stay as they are: only its `__call__` is replaced, and put back after the block. Dropout draws
    the same numbers as without compilation.
    Raises ValueError if the model cannot be compiled here.
    """
    if not how:
        yield
        return
    torch.compiler.reset()  # torch gives up after eight compilations of a function in one process
    before = model._compiled_call_impl
    model.compile(options={"fallback_random": True, "triton.cudagraphs": how == CUDA_GRAPHS})
    call: Any = model._compiled_call_impl

    def with_gradients(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():  # an evaluation would be compiled apart
            return model._call_impl(*args, **kwargs)
        return call(*args, **kwargs)

    model._compiled_call_impl = with_gradients
    try:
        yield
    except TorchDynamoException as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), "no reason given")
        raise ValueError(
            f"torch.compile cannot compile this {type(model).__name__} here ({reason}). Install a "
            "C++ compiler such as g++ if that is what is missing, or train with compile=False."
        ) from error
    finally:
        model._compiled_call_impl = before
        torch.compiler.reset()  # frees the memory of the graphs
