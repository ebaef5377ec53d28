"""Train mode and activation checkpointing, switched for a while and put back."""

from contextlib import contextmanager


def switch_checkpointing(model, on):
    """Switch gradient checkpointing. `transformers` renamed its two methods within version 5.

    The re-entrant form of torch lets no gradient through a block whose inputs do not require grad,
    as above a frozen embedding (claim 27). The other form, which is used here, has no such limit.
    """
    verb = "enable" if on else "disable"
    method = getattr(model, f"activation_checkpointing_{verb}", None)
    method = method or getattr(model, f"gradient_checkpointing_{verb}")
    method({"use_reentrant": False}) if on else method()


@contextmanager
def training(model, gradient_checkpointing):
    """In the block the model is in train mode; afterwards each mode is as it was before.

    No gradient comes in that the caller left behind, and none is left behind.
    """
    was_training = model.training
    already = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if gradient_checkpointing and not already:
        switch_checkpointing(model, True)
    model.zero_grad(set_to_none=True)
    try:
        yield model.train()
    finally:
        model.zero_grad(set_to_none=True)
        if gradient_checkpointing and not already:
            switch_checkpointing(model, False)
        model.train(was_training)
