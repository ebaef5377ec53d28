"""Mask, positions and labels of an input to which n virtual tokens are added."""

import inspect

import torch
from torch.nn.functional import pad

from minipeft.batching import position_ids_from_mask
from minipeft.technique.asked import takes


def named_inputs(model, args, kwargs):
    """All inputs of this call by name, and the name under which this model takes its cache."""
    names = inspect.signature(model.forward).parameters
    # transformers renames `past_key_values` to `cache` in 5.24.
    return dict(zip(names, args, strict=False)) | kwargs, (
        "cache" if "cache" in names else "past_key_values"
    )


def past_length(cache):
    """How many positions a cache holds; refuses one with a fixed room, which n would overflow."""
    if cache is not None and getattr(cache, "is_compileable", False):
        raise ValueError(
            "A static cache has no room for virtual tokens; leave cache_implementation out, for a "
            "cache that grows."
        )
    return 0 if cache is None else cache.get_seq_length()


def refuse_shapes(ids, embeds, kwargs):
    """Raise ValueError for inputs that are missing, empty, or do not go together."""
    if (ids is None) == (embeds is None):
        raise ValueError("Give either input_ids or inputs_embeds.")
    text, dims = (ids, 2) if embeds is None else (embeds, 3)
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


def extend_mask(kwargs, n, known, batch, seq):
    """The mask gets n columns of its own dtype."""
    mask = kwargs.get("attention_mask")
    if mask is None:
        return
    if mask.dim() != 2:
        raise ValueError(
            f"The mask has {mask.dim()} dimensions; virtual tokens need one of (batch, seq)."
        )
    if mask.shape[1] + n != known + seq:
        raise ValueError(
            f"The mask has {mask.shape[1]} columns, but the call has {seq} tokens and the "
            f"cache {known - n} of text. To go on from a used cache, give the new tokens only "
            "and a mask over all of the text."
        )
    kwargs["attention_mask"] = torch.cat([mask.new_ones(batch, n), mask], 1)  # (batch, n + text)


def extend_positions(model, kwargs, first, n, new, text):
    """Positions of the text go up by n. new: the virtual positions of this call itself, n or 0."""
    (batch, seq), device = text.shape[:2], text.device
    positions = kwargs.get("position_ids")
    if positions is None:
        skipped = n if model.virtual_tokens.place == "attention" else 0  # no columns of the mask
        if skipped and kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones(batch, seq, dtype=torch.int64, device=device)
        count_positions(kwargs, first, new + seq, skipped)
        return
    # Without a mask transformers takes positions that begin anew for documents in one row. The
    # others would not see the virtual tokens.
    if kwargs.get("attention_mask") is None and seq > 1 and (positions.diff(dim=-1) <= 0).any():
        raise ValueError(
            "position_ids begin anew within a row, so it holds several documents; virtual tokens "
            "would stand before the first one only. Give each document a row of its own."
        )
    virtual = (first or 0) + torch.arange(new, device=positions.device).expand(batch, -1)
    kwargs["position_ids"] = torch.cat([virtual, (positions + n).expand(batch, -1)], 1)


def count_positions(kwargs, first, last, skipped=0):
    """Give the `last` columns of the mask, if there is one, positions that pass over padding.

    Without a mask the model itself counts, which is right where nothing is padded. A model that
    takes no positions (first is None), as with ALiBi, counts the columns of the mask.
    """
    mask = kwargs.get("attention_mask")
    if mask is not None and first is not None:
        positions = position_ids_from_mask(mask)[:, -last:]  # (batch, last)
        kwargs["position_ids"] = first + skipped + positions


def extend_labels(model, kwargs, n, seq):
    """Labels for virtual tokens in front: none of them is a target."""
    labels, keep = kwargs.get("labels"), seq
    if not takes(model, "logits_to_keep"):
        kwargs["labels"] = labels if labels is None else pad(labels, (n, 0), value=-100)
        return
    if labels is not None:
        # The last virtual token predicts the first label, the others predict none. Their logits
        # would be the largest tensor of the step for nothing, so they are not made.
        keep = seq + 1
        kwargs["labels"] = pad(labels, (1, 0), value=-100)  # (batch, seq + 1)
    if not isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
        kwargs["logits_to_keep"] = min(kwargs.get("logits_to_keep") or keep, keep)
