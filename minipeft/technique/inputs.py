"""Attention mask, position ids and labels of an input to which n virtual tokens are added.

The `extend_...` functions change `kwargs`, the named inputs of a call, in place.
"""

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from transformers import Cache

from minipeft.batching import position_ids_from_mask
from minipeft.refusals import require
from minipeft.technique.asked import takes


def named_inputs(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    """(all inputs of this call by name, the model's name for its cache argument)."""
    names = inspect.signature(model.forward).parameters
    # transformers renames `past_key_values` to `cache` in 5.24.
    cache_name = "cache" if "cache" in names else "past_key_values"
    return dict(zip(names, args, strict=False)) | kwargs, cache_name


def past_length(cache: Cache | None) -> int:
    """The number of positions in a cache. Raises ValueError for a static cache, which n more
    positions would overflow."""
    if cache is not None and getattr(cache, "is_compileable", False):
        raise ValueError(
            "A static cache has no room for virtual tokens; leave cache_implementation out, for a "
            "cache that grows."
        )
    return 0 if cache is None else cache.get_seq_length()


def refuse_shapes(
    ids: torch.Tensor | None, embeds: torch.Tensor | None, kwargs: dict[str, Any]
) -> None:
    """Raise ValueError for inputs that are missing, empty, or of shapes that do not match."""
    texts = [tensor for tensor in (ids, embeds) if tensor is not None]
    require(len(texts) == 1, "Give either input_ids or inputs_embeds.")
    text, dims = texts[0], 2 if embeds is None else 3
    if text.dim() != dims or 0 in text.shape:
        raise ValueError(
            f"The text has the shape {tuple(text.shape)}; give (batch, seq), with at least one row "
            "and one token."
        )
    batch, seq = text.shape[:2]
    fitting = {
        "attention_mask": lambda shape: len(shape) != 2 or shape[0] == batch,
        "labels": lambda shape: len(shape) != 2 or shape == (batch, seq),
        "position_ids": lambda shape: shape in ((batch, seq), (1, seq)),
        "token_type_ids": lambda shape: shape == (batch, seq),
    }
    for name, fits in fitting.items():
        given = kwargs.get(name)
        if given is not None and not fits(tuple(given.shape)):
            raise ValueError(
                f"{name} has the shape {tuple(given.shape)}, which does not go with a text of "
                f"{batch} rows and {seq} tokens."
            )


def extend_mask(kwargs: dict[str, Any], n: int, known: int, batch: int, seq: int) -> None:
    """Put n columns of ones in front of the mask.

    known: number of positions before the tokens of this call, virtual ones included.
    Raises ValueError for a mask that does not cover the whole text.
    """
    mask = kwargs.get("attention_mask")
    if mask is None:
        return
    require(
        mask.dim() == 2,
        f"The mask has {mask.dim()} dimensions; virtual tokens need one of (batch, seq).",
    )
    require(
        mask.shape[1] + n == known + seq,
        f"The mask has {mask.shape[1]} columns, but the call has {seq} tokens and the "
        f"cache {known - n} of text. To go on from a used cache, give the new tokens only "
        "and a mask over all of the text.",
    )
    kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, n), mask], 1)  # (batch, n + text)


def extend_positions(
    model: nn.Module,
    kwargs: dict[str, Any],
    first: int | None,
    n: int,
    new: int,
    text: torch.Tensor,
) -> None:
    """Shift the position ids of the text by n.

    first: as `positions_of` returns it. new: n if this call puts virtual tokens into the sequence,
    else 0. text: input_ids or inputs_embeds. Raises ValueError for several documents in one row.
    """
    (batch, seq), device = text.shape[:2], text.device
    positions = kwargs.get("position_ids")
    if positions is None:
        virtual: Any = model.virtual_tokens
        skipped = n if virtual.place == "attention" else 0  # these have no columns in the mask
        if skipped and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones(batch, seq, dtype=torch.int64, device=device)
        count_positions(kwargs, first, new + seq, skipped)
        return
    # Without a mask, transformers starts a new document wherever the position ids begin again.
    # Only the first document would see the virtual tokens.
    if kwargs.get("attention_mask") is None and seq > 1 and (positions.diff(dim=-1) <= 0).any():
        raise ValueError(
            "position_ids begin anew within a row, so it holds several documents; virtual tokens "
            "would stand before the first one only. Give each document a row of its own."
        )
    before = (first or 0) + torch.arange(new, device=positions.device).expand(batch, -1)
    after = (positions + n).expand(batch, -1)  # (batch, seq)
    kwargs["position_ids"] = torch.cat([before, after], 1)  # (batch, new + seq)


def count_positions(kwargs: dict[str, Any], first: int | None, last: int, skipped: int = 0) -> None:
    """Set position ids that do not count padding, for the `last` columns of the mask.

    first: as `positions_of` returns it. skipped: positions taken by tokens outside the mask.
    Does nothing without a mask, since then nothing is padded and the model counts correctly; nor
    for a model without position_ids (first is None), which uses the mask, as with ALiBi.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and first is not None:
        positions = position_ids_from_mask(mask)[:, -last:]  # (batch, last)
        kwargs["position_ids"] = first + skipped + positions


def extend_labels(model: nn.Module, kwargs: dict[str, Any], n: int, seq: int) -> None:
    """Label the virtual tokens in front with -100, and ask for no more logits than are needed."""
    labels, keep = kwargs.get("labels"), seq
    if not takes(model, "logits_to_keep"):
        kwargs["labels"] = labels if labels is None else pad(labels, (n, 0), value=-100)
        return
    if labels is not None:
        # Only the last virtual token predicts a label. The logits of the others, which would make
        # the largest tensor of the step larger still, are not computed.
        keep = seq + 1
        kwargs["labels"] = pad(labels, (1, 0), value=-100)  # (batch, seq + 1)
    asked = kwargs.get("logits_to_keep")
    if isinstance(asked, torch.Tensor):  # positions of the text, which begins n later now
        kwargs["logits_to_keep"] = torch.where(asked < 0, asked, asked + n)
    else:
        kwargs["logits_to_keep"] = min(asked or keep, keep)
