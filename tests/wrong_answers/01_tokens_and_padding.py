"""Wrong answers to exercise 01: (check, source of the answer, part of the message expected)."""

_PAD = """
import torch

def pad_batch(rows, pad_token_id, side):
    if side not in ("left", "right"):
        raise ValueError(side)
    width = max(map(len, rows))
    def padded(ids, filler):
        extra = [filler] * (width - len(ids))
        return ids + extra if side == "right" else extra + ids
    ids = [padded(row, pad_token_id) for row in rows]
    mask = [padded([1] * len(row), 0) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
"""
_SHARE = """
def padded_share(lengths, batch_size, grouped):
    lengths = sorted(lengths) if grouped else lengths
    batches = [lengths[i : i + batch_size] for i in range(0, len(lengths), batch_size)]
    positions = sum(max(batch) * len(batch) for batch in batches)
    return (positions - sum(lengths)) / positions
"""


def _positions(expression):
    return f"import torch\ndef position_ids(attention_mask):\n    return {expression}"


def _last(expression):
    return (
        "import torch\ndef last_logits(logits, attention_mask):\n"
        "    n = attention_mask.sum(-1)\n    rows = torch.arange(len(logits))\n"
        f"    return {expression}"
    )


def _pad(old, new):
    assert old in _PAD, old
    return _PAD.replace(old, new)


def _share(old, new):
    assert old in _SHARE, old
    return _SHARE.replace(old, new)


RETURN = "return (positions - sum(lengths)) / positions"

WRONG = [
    ("position_ids", _positions("attention_mask.cumsum(-1)"), "begin at 1"),
    (
        "position_ids",
        _positions("torch.arange(attention_mask.shape[1]).expand_as(attention_mask).clone()"),
        "padding is counted",
    ),
    ("position_ids", _positions("attention_mask.cumsum(-1) - 1"), "negative position"),
    (
        "position_ids",
        _positions("(attention_mask.cumsum(-1) - 1).clamp(min=0).float()"),
        "indexed with int64",
    ),
    ("position_ids", _positions("attention_mask.cumsum(-1)[0] - 1"), "shape of the mask"),
    ("pad_batch", _pad('side == "right"', 'side == "left"'), "on the other side"),
    ("pad_batch", _pad("[1] * len(row), 0", "[0] * len(row), 1"), "is inverted"),
    (
        "pad_batch",
        _pad(
            "[padded([1] * len(row), 0) for row in rows]",
            "[[int(i != pad_token_id) for i in row] for row in ids]",
        ),
        "hides the real ends",
    ),
    ("pad_batch", _pad("padded(row, pad_token_id)", "padded(row, 0)"), "is the pad token used"),
    ("pad_batch", _pad("width = max(map(len, rows))", "width = 8"), "the longest row has 4"),
    ("pad_batch", _pad("raise ValueError(side)", "pass"), "accepted in silence"),
    ("last_logits", _last("logits[:, -1]"), "predicts nothing real"),
    ("last_logits", _last("logits[rows, n - 1]"), "is taken for a place"),
    ("last_logits", _last("logits[rows, n - 2]"), "One too early"),
    ("last_logits", _last("logits.mean(1)"), "not the logits of the last real tokens"),
    ("last_logits", _last("logits"), "one row of logits for each prompt"),
    ("padded_share", _share(RETURN, "return sum(lengths) / positions"), "share of real tokens"),
    (
        "padded_share",
        _share(RETURN, "return sum(n < max(b) for b in batches for n in b) / len(lengths)"),
        "count tokens, not rows",
    ),
    (
        "padded_share",
        _share("max(batch) * len(batch)", "max(lengths) * len(batch)"),
        "longest row of the data",
    ),
    (
        "padded_share",
        _share(RETURN, "return (positions - sum(lengths)) / sum(lengths)"),
        "divided by the real tokens",
    ),
    (
        "padded_share",
        _share(
            RETURN, "return sum(1 - sum(b) / (max(b) * len(b)) for b in batches) / len(batches)"
        ),
        "mean of the batches",
    ),
    (
        "padded_share",
        _share("sorted(lengths) if grouped else lengths", "lengths"),
        "changes nothing",
    ),
    (
        "padded_share",
        _share("max(batch) * len(batch)", "max(batch) * batch_size"),
        "The last batch has one row",
    ),
]
