"""Checks of encoded rows before `Collator` pads them: rows that cannot be trained on raise."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from minipeft.refusals import is_whole_number, require, shown


def checked(rows: Sequence[Mapping[str, object]]) -> list[dict[str, torch.Tensor]]:
    """Check the rows and return them as dicts of tensors. Other keys are dropped.

    Each row gets input_ids, int64 (seq,), and attention_mask, ones (seq,). If all rows have them,
    also token_type_ids, int64 (seq,), and labels: int64 (seq,), or for a classifier () or
    (labels,). Raises ValueError for rows that would silently train the wrong thing.
    """
    if not isinstance(rows, list | tuple) or not rows:
        raise ValueError(f"A batch needs rows, in a list; got {shown(rows)}.")
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping) or "input_ids" not in row:
            raise ValueError(f"Row {i} of the batch is {shown(row)}, without input_ids; encode it.")
    present = {name: [row.get(name) is not None for row in rows]
               for name in ("labels", "token_type_ids")}  # fmt: skip
    for name, found in present.items():
        if any(found) != all(found):
            raise ValueError(f"A batch needs rows with {name} in all of them or in none.")
    new_rows = [{"input_ids": _ids(i, row, "input_ids")} for i, row in enumerate(rows)]
    for i, (row, new) in enumerate(zip(rows, new_rows, strict=True)):
        ids, mask = new["input_ids"], row.get("attention_mask")
        require(
            len(ids) and (mask is None or 0 not in _ids(i, row, "attention_mask")),
            f"Row {i} of the batch is empty or holds padding already. Give unpadded rows: "
            "the collator pads them, and a row of nothing but padding has no meaning.",
        )
        new["attention_mask"] = torch.ones_like(ids)
        if all(present["token_type_ids"]):
            new["token_type_ids"] = _ids(i, row, "token_type_ids", ids)
    if all(present["labels"]):
        _add_labels(rows, new_rows)
    return new_rows


def _add_labels(rows, new_rows):
    """Check the labels of `rows` and add them to `new_rows`."""
    labels = [_tensor(i, row, "labels") for i, row in enumerate(rows)]
    per_row = of_whole_rows(labels)
    for i, (row, new) in enumerate(zip(rows, new_rows, strict=True)):
        if per_row:
            new["labels"] = labels[i]  # () or (labels,)
            _refuse_row_label(i, labels[i], labels[0])
            continue
        new["labels"] = _ids(i, row, "labels", new["input_ids"])
        require(
            set(new["labels"][1:].tolist()) - {-100},
            f"Row {i} of the batch has no target: every label after the first is -100, "
            "so a loss would be 0/0 = NaN. Was the answer empty or cut off?",
        )


def of_whole_rows(labels: Iterable[torch.Tensor]) -> bool:
    """Whether the labels belong to whole rows: class numbers (), or floating-point numbers."""
    return all(v.dim() == 0 or v.is_floating_point() and v.numel() for v in labels)


def _tensor(i, row, name):
    """row[name] as a tensor of real numbers."""
    try:
        value = torch.as_tensor(row[name])
    except (TypeError, ValueError, RuntimeError):
        value = None
    if value is None or value.dtype == torch.bool or value.is_complex():
        raise ValueError(f"Row {i} of the batch has {name} {shown(row[name])}; give whole numbers.")
    return value


def _ids(i, row, name, like=None):
    """row[name] as int64 (seq,), as long as `like`. Only labels may be -100."""
    value = _tensor(i, row, name)
    if like is not None and value.dim() == 1 and len(value) != len(like):
        raise ValueError(
            f"Row {i} of the batch has {len(like)} input_ids but {len(value)} {name}; they must "
            "be of one length."
        )
    empty = value.dim() == 1 and not len(value)
    require(
        empty or (value.dim() == 1 and not value.is_floating_point()),
        f"Row {i} of the batch has {name} {tuple(value.shape)} of {value.dtype}; give one "
        "list of whole numbers, (seq,).",
    )
    wrong = value < 0 if name != "labels" else (value < 0) & (value != -100)
    if wrong.any():
        raise ValueError(
            f"Row {i} of the batch has {int(value[wrong][0])} among its {name}, which is not a "
            "token id; -100 in labels is not a target."
        )
    return value.long()


def _refuse_row_label(i, label, first):
    """Raise ValueError unless it is a class >= 0, or finite numbers, as many as in `first`."""
    fits = label.shape == first.shape and label.dim() <= 1 and label.isfinite().all()
    require(
        fits and (label.is_floating_point() or label >= 0),
        f"Row {i} of the batch has labels {shown(label.tolist())}; a class is a whole number "
        "of at least 0, and other labels of rows are finite numbers, as many in each row.",
    )


def refuse_padding(pad_token_id: object, padding_side: object) -> None:
    """Raise ValueError unless the two say how to pad."""
    require(
        pad_token_id is not None,
        "There is no pad token. Pass tokenizer.eos_token_id: padding is masked by "
        "position here, so the real EOS stays a target.",
    )
    require(
        is_whole_number(pad_token_id) and pad_token_id >= 0,
        f"pad_token_id={shown(pad_token_id)} is not a token id; pass a whole number.",
    )
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={shown(padding_side)} is neither 'left' nor 'right'.")
