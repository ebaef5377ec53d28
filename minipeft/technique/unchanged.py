"""Check that LoRA and adapters, which start as an update of zero, do not change the output."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from minipeft.technique.on_model import evaluating, has_numbers, language_model_head


@contextmanager
def unchanged(model: nn.Module) -> Iterator[dict[str, nn.Module]]:
    """Raise ValueError unless the output for two tokens is the same after the block as before.

    Yields a dict to be filled with {name: layer} of layers that the model's forward must call.
    Checks nothing for a model on the meta device, or one that needs more inputs than tokens.
    """
    before = _output_of_two_tokens(model, plain=True)
    needed: dict[str, nn.Module] = {}
    called = set()
    yield needed
    if before is None:
        return
    handles = [
        layer.register_forward_hook(lambda layer, args, output: called.add(layer))
        for layer in needed.values()
    ]
    try:
        after = _output_of_two_tokens(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot work with it ({type(error).__name__}: {error}); take "
            "other layers, or another base model."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, layer in needed.items() if layer not in called]
    if missing:
        raise ValueError(
            f"{type(model).__name__} does not call {missing[0]}, so nothing that stands there has "
            "an effect; take another base model."
        )
    before, after = before.double(), after.double()
    largest = before.nan_to_num(0, 0, 0).abs().max()
    dtype: Any = model.dtype
    allowed = torch.finfo(dtype).eps ** 0.5 * largest
    if not torch.allclose(after, before, rtol=0, atol=allowed.item(), equal_nan=True):
        raise ValueError(
            f"It would change what {type(model).__name__} answers before anything is trained; take "
            "other layers, or another base model."
        )


@torch.no_grad()
def _output_of_two_tokens(model, plain=False):
    """The first output tensor for two tokens that are not special, or None if there is none.

    plain: is this the model before the block? Modes and random states stay as they were.
    """
    table = _input_embeddings(model)  # (vocab, hidden)
    if table is None or not has_numbers(model):
        return None
    special = set()
    for name, value in model.config.get_text_config().to_dict().items():
        if name.endswith(("token_id", "token_index")):
            special |= set(value if isinstance(value, list) else [value])
    ordinary = [i % len(table) for i in range(len(table) // 2, len(table) // 2 + len(special) + 2)]
    ids = [i for i in ordinary if i not in special][:2]
    ids = torch.tensor([ids], device=table.device)  # (1, 2)
    cuda = [table.device] if table.is_cuda else []
    try:
        with evaluating(model), torch.random.fork_rng(cuda):
            output = model(input_ids=ids)
    except Exception as error:
        if not plain:
            raise
        if language_model_head(model) is None:  # another head may need more inputs
            return None
        raise ValueError(
            f"{type(model).__name__} fails on two ordinary tokens "
            f"({type(error).__name__}: {error}), so nothing can be added to it."
        ) from error
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, torch.Tensor))


def _input_embeddings(model):
    """The embedding table of a model that can be called with input_ids alone; else None."""
    if getattr(model, "main_input_name", None) != "input_ids" or not hasattr(model, "config"):
        return None
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # transformers did not find it
        return None
