"""Wrong answers to exercise 01: (check, source of the answer, part of the message expected)."""

from edits import edited

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
    return edited(_PAD, (old, new))


def _share(old, new):
    return edited(_SHARE, (old, new))


RETURN = "return (positions - sum(lengths)) / positions"

WRONG = [
    ("position_ids", _positions("attention_mask.cumsum(-1)"), "begin at 1"),
    (
        "position_ids",
        _positions("torch.arange(attention_mask.shape[1]).expand_as(attention_mask).clone()"),
        "padding is counted",
    ),
    ("position_ids", _positions("attention_mask.cumsum(-1) - 1"), "Padding has a negative one"),
    (
        "position_ids",
        _positions("(attention_mask.cumsum(-1) - 1).clamp(min=0).float()"),
        "indexed by int64",
    ),
    ("position_ids", _positions("attention_mask.cumsum(-1)[0] - 1"), "you return (4,)"),
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
    ("pad_batch", _pad("raise ValueError(side)", "pass"), "side='middle' is accepted in silence;"),
    ("last_logits", _last("logits[:, -1]"), "predicts nothing real"),
    ("last_logits", _last("logits[rows, n - 1]"), "is taken for a place"),
    ("last_logits", _last("logits[rows, n - 2]"), "One too early"),
    ("last_logits", _last("logits.mean(1)"), "With padding on the left, these"),
    ("last_logits", _last("logits"), "you return (2, 4, 3)"),
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
        "rows that do not exist",
    ),
    # Positions
    ("position_ids", _positions("(attention_mask.cumsum_(-1) - 1).clamp(min=0)"), "still needs it"),
    (
        "position_ids",
        _positions(
            "(torch.arange(attention_mask.shape[1])"
            " - attention_mask.argmax(-1, keepdim=True)).clamp(min=0)"
        ),
        "whatever the mask's device",
    ),
    (
        "position_ids",
        _positions(
            "(attention_mask.cumsum(-1) - 1)"
            ".masked_fill(attention_mask == 0, attention_mask.shape[1])"
        ),
        "A table of",
    ),
    (
        "position_ids",
        _positions(
            "(torch.arange(attention_mask.shape[1])"
            " - (attention_mask == 0).sum(-1, keepdim=True)).clamp(min=0)"
        ),
        "padding on the right, the real tokens",
    ),
    ("position_ids", _positions("(attention_mask.cumsum(0) - 1).clamp(min=0)"), "down the batch"),
    (
        "position_ids",
        _positions("attention_mask.flatten().cumsum(0).view_as(attention_mask) - 1"),
        "goes on counting",
    ),
    (
        "position_ids",
        _positions("attention_mask.flip(-1).cumsum(-1).flip(-1) - 1"),
        "run backward",
    ),
    (  # one side for the whole batch
        "position_ids",
        """
import torch

def position_ids(attention_mask):
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    places = places.expand_as(attention_mask)
    if attention_mask[:, -1].all():  # padded on the left
        places = places - (attention_mask == 0).sum(-1, keepdim=True)
    return places.clamp(min=0)
""",
        "differ in their side",
    ),
    # A batch
    ("pad_batch", _pad("max(map(len, rows))", "len(rows[0])"), "Where does your width come from"),
    (
        "pad_batch",
        """
import torch

def pad_batch(rows, pad_token_id, side):
    if side not in ("left", "right"):
        raise ValueError(side)
    width = max(len(row) for row in rows)
    masks = []
    for row in rows:
        extra = width - len(row)
        masks.append([1] * len(row) + [0] * extra if side == "right" else
                     [0] * extra + [1] * len(row))
        if side == "right":
            row.extend([pad_token_id] * extra)
        else:
            row[:0] = [pad_token_id] * extra
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(masks)}
""",
        "are now",
    ),
    (
        "pad_batch",
        _pad('side not in ("left", "right")', "side not in 'leftright'"),
        "not TypeError",
    ),
    (
        "pad_batch",
        _pad('side not in ("left", "right")', "str(side) not in 'left right'"),
        "side='' is accepted",
    ),
    (
        "pad_batch",
        _pad(
            'if side not in ("left", "right"):\n        raise ValueError(side)',
            'assert side in ("left", "right")',
        ),
        "not AssertionError",
    ),
    (
        "pad_batch",
        _pad('side not in ("left", "right")', 'str(side).lower() not in ("left", "right")'),
        "side='RIGHT' is accepted",
    ),
    (  # the side is looked at where there is something to pad
        "pad_batch",
        """
import torch

def pad_batch(rows, pad_token_id, side):
    width = max(len(row) for row in rows)
    ids, masks = [], []
    for row in rows:
        left = right = 0
        if len(row) < width:
            if side == "left":
                left = width - len(row)
            elif side == "right":
                right = width - len(row)
            else:
                raise ValueError(side)
        ids.append([pad_token_id] * left + row + [pad_token_id] * right)
        masks.append([0] * left + [1] * len(row) + [0] * right)
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(masks)}
""",
        "if no row needs padding",
    ),
    ("pad_batch", _pad("max(map(len, rows))", "-(-max(map(len, rows)) // 4) * 4"), "row has 5"),
    (
        "pad_batch",
        _pad("    width =", "    rows = sorted(rows, key=len, reverse=True)\n    width ="),
        "rows come out in another order",
    ),
    (
        "pad_batch",
        """
import torch
from torch.nn.utils.rnn import pad_sequence

def pad_batch(rows, pad_token_id, side):
    if side not in ("left", "right"):
        raise ValueError(side)
    def padded(lists, filler):
        tensors = [torch.tensor(each) for each in lists]
        out = pad_sequence(tensors, batch_first=True, padding_value=filler)
        return out.flip(1) if side == "left" else out
    return {
        "input_ids": padded(rows, pad_token_id),
        "attention_mask": padded([[1] * len(row) for row in rows], 0),
    }
""",
        "come out in reverse",
    ),
    (
        "pad_batch",
        _pad(
            "[padded([1] * len(row), 0) for row in rows]",
            "[[1] * len(row) + [0] * (width - len(row)) for row in rows]",
        ),
        "zeros of the mask are opposite",
    ),
    (  # numpy and torch fill with floating point by default
        "pad_batch",
        """
import torch

def pad_batch(rows, pad_token_id, side):
    if side not in ("left", "right"):
        raise ValueError(side)
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        place = slice(len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, place] = torch.tensor(row)
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask}
""",
        "attention_mask is torch.float32",
    ),
    (  # a row ends at its first eos
        "pad_batch",
        _pad(
            "[padded([1] * len(row), 0) for row in rows]",
            "[[int(pad_token_id not in r[:i]) for i in range(len(r))] + [0] * (width - len(r))"
            " if side == 'right' else padded([1] * len(r), 0) for r in rows]",
        ),
        "may be equal to the pad token",
    ),
    # What comes next
    (
        "last_logits",
        _last("logits.masked_fill(attention_mask[..., None] == 0, -torch.inf).max(1).values"),
        "largest logit of each token",
    ),
    ("last_logits", _last("logits[rows, attention_mask.argmax(-1)]"), "first real token of each"),
    (
        "last_logits",
        _last("logits[rows, n.clamp(max=logits.shape[1] - 1)]"),
        "One too late",
    ),
    (
        "last_logits",
        _last("logits[:, -1] if attention_mask[:, -1].all() else logits[rows, n - 1]"),
        "rows that differ in their side",
    ),
    (
        "last_logits",
        _last("logits[rows, position_ids(attention_mask).argmax(-1)].detach()").replace(
            "def last", "from minipeft import position_ids_from_mask as position_ids\n\ndef last"
        ),
        "No gradient passes",
    ),
    (
        "last_logits",
        _last(
            "logits[rows, (torch.arange(logits.shape[1]) * attention_mask).argmax(-1)].softmax(-1)"
        ),
        "A softmax was taken",
    ),
    (
        "last_logits",
        _last("logits[rows, (torch.arange(logits.shape[1]) * attention_mask).argmax(-1)]"),
        "on the CPU, whatever",
    ),
    (
        "last_logits",
        _last("logits[:, (torch.arange(logits.shape[1]) * attention_mask).argmax(-1)]"),
        "you return (2, 2, 3)",
    ),
    (
        "last_logits",
        """
import torch

def last_logits(logits, attention_mask):
    logits[attention_mask == 0] = -torch.inf
    seq = logits.shape[1]
    last = [max(i for i in range(seq) if row[i]) for row in attention_mask.tolist()]
    return logits[range(len(logits)), last]
""",
        "passed in have changed",
    ),
    (  # a product with a float32 matrix
        "last_logits",
        """
import torch

def last_logits(logits, attention_mask):
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (columns * attention_mask).argmax(-1)
    chosen = torch.nn.functional.one_hot(last, logits.shape[1]).double()
    return torch.einsum("bs,bsv->bv", chosen, logits)
""",
        "expected scalar type",
    ),
    # What is wasted
    (
        "padded_share",
        _share("lengths = sorted(lengths) if grouped else lengths", "lengths.sort()"),
        "was sorted itself",
    ),
    ("padded_share", _share(RETURN, RETURN + " * 100"), "not percent"),
    ("padded_share", _share(RETURN, f"return round({RETURN[7:]}, 3)"), "is rounded"),
    ("padded_share", _share("sorted(lengths)", "sorted(lengths)[::-1]"), "longest come first"),
    (
        "padded_share",
        _share("range(0, len(lengths), batch_size)", "range(0, len(lengths), 2)").replace(
            "i + batch_size", "i + 2"
        ),
        "cut into twos",
    ),
    (
        "padded_share",
        _share(
            RETURN,
            "batches = [b for b in batches if len(b) == batch_size] or batches\n"
            "    kept, positions = sum(map(sum, batches)), sum(max(b) * len(b) for b in batches)\n"
            "    return (positions - kept) / positions",
        ),
        "smaller batch is left out",
    ),
    (
        "padded_share",
        _share("sorted(lengths) if grouped else lengths", "sorted(lengths)"),
        "must keep the order",
    ),
]
