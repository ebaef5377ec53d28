"""Checks of exercise 01: they name the mistake and stay silent about the solution."""

import copy

import torch

from checks import Mistake
from checks.devices import follows_the_device

# Masks by where their padding is. The rows of the last one differ in their side.
_MASKS = {
    "left": [[1, 1, 1, 1], [0, 0, 1, 1]],
    "right": [[1, 1, 1, 1], [1, 1, 0, 0]],
    "mixed": [[0, 0, 0, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "none": [[1]],
}


def position_ids(answer):
    """Check a function (attention_mask) -> position ids that count real tokens only."""
    for side, mask in _MASKS.items():
        mask = torch.tensor(mask)
        before, seq = mask.clone(), mask.shape[1]
        got = answer(mask)
        if not torch.is_tensor(got) or got.shape != mask.shape:
            shown = tuple(got.shape) if torch.is_tensor(got) else type(got).__name__
            raise Mistake(f"For a mask {tuple(mask.shape)} you return {shown}. Return its shape.")
        if got.dtype != torch.int64:
            raise Mistake(f"Position ids are {got.dtype}; an embedding table is indexed by int64.")
        if not torch.equal(mask, before):
            raise Mistake("The mask that was passed in has changed, and the model still needs it.")
        if side == "left":
            _first_positions(got.tolist())
        case = f"For the mask {mask.tolist()} the positions are {got.tolist()}."
        if (got < 0).any():
            raise Mistake(f"{case} Padding has a negative one, which no table can look up.")
        if (got >= seq).any():
            raise Mistake(f"{case} A table of {seq} positions ends at {seq - 1}.")
        for row, places in zip(mask, got, strict=True):
            if places[row == 1].tolist() != list(range(int(row.sum()))):
                told = {
                    "left": "With padding on the left,",
                    "right": "With padding on the right,",
                    "mixed": "Where the rows of a batch differ in their side,",
                    "none": "Without padding,",
                }[side]
                raise Mistake(f"{case} {told} the real tokens do not count 0, 1, 2, ...")
    if not follows_the_device(answer, mask):
        raise Mistake("Your function makes a tensor on the CPU, whatever the mask's device is.")


def _first_positions(got):
    """What often goes wrong with the mask of the left side."""
    if got[0] == [1, 2, 3, 4]:
        raise Mistake("Positions begin at 1; the first real token has position 0.")
    if got[0] == [3, 2, 1, 0]:
        raise Mistake("Positions run backward: the first token of a row has the largest.")
    if got[1][2:] == [2, 3]:
        raise Mistake("On the left, padding is counted: the first real token there has position 2.")
    if got[1][2:] == [4, 5]:
        raise Mistake("The second row goes on counting where the first row ended.")
    if got[1][2:] in ([1, 1], [2, 2]):
        raise Mistake("You count down the batch, over the rows. Count along each row.")


def pad_batch(answer):
    """Check a function (rows, pad_token_id, side) -> input_ids and attention_mask."""
    cases = [
        ([[7, 8, 9, 2], [5, 2]], 2),  # 2 is the end of each row, and the pad token
        ([[1, 2, 1, 2, 1], [2, 2, 3]], 2),  # a chat: 2 is the end of each turn
        ([[3, 4], [5], [6, 7, 8]], 9),
        ([[4]], 0),
    ]
    for rows, pad in cases:
        for side in ("right", "left"):
            _right_batch(answer, rows, pad, side)
    for side in ("middle", None, "", "eft", "RIGHT"):
        for rows in ([[1], [2, 3]], [[1], [2]]):
            try:
                answer(rows, 0, side)
            except ValueError:
                continue
            except Exception as error:
                kind = type(error).__name__
                raise Mistake(f"For side={side!r} raise a ValueError, not {kind}.") from error
            hint = "" if len(rows[1]) > 1 else " if no row needs padding"
            raise Mistake(f"side={side!r} is accepted in silence{hint}; raise a ValueError.")


def _right_batch(answer, rows, pad, side):
    before, width = copy.deepcopy(rows), max(map(len, rows))
    try:
        batch = answer(rows, pad, side)
    except ValueError as error:
        if "expected sequence of length" not in str(error):
            raise
        raise Mistake(
            f"For rows of {[len(row) for row in rows]} tokens your lists come out of unequal "
            "length, so no tensor can be made of them. Where does your width come from?"
        ) from error
    if rows != before:
        raise Mistake(f"The rows that were passed in have changed: {before} are now {rows}.")
    if not isinstance(batch, dict) or {"input_ids", "attention_mask"} - set(batch):
        raise Mistake('Return a dict with the keys "input_ids" and "attention_mask".')
    for name in ("input_ids", "attention_mask"):
        if not torch.is_tensor(batch[name]) or batch[name].dtype != torch.int64:
            kind = getattr(batch[name], "dtype", type(batch[name]).__name__)
            raise Mistake(f"{name} is {kind}, not an int64 tensor.")
        if batch[name].shape != (len(rows), width):
            shape = tuple(batch[name].shape)
            raise Mistake(f"{name} are {shape}, for {len(rows)} rows; the longest row has {width}.")
    told = f"For the rows {rows}, pad token {pad} and side={side!r},"
    ids, mask = batch["input_ids"].tolist(), batch["attention_mask"].tolist()
    wanted, other = _padded(rows, pad, side), _padded(rows, pad, _OPPOSITE[side])
    if ids == other != wanted:
        raise Mistake(f"side={side!r} puts the padding on the other side.")
    if ids == _padded([row[::-1] for row in rows], pad, side) != wanted:
        raise Mistake(f"{told} the tokens of a row come out in reverse: {ids}.")
    if sorted(ids) == sorted(wanted) and ids != wanted:
        raise Mistake(f"{told} the rows come out in another order.")
    if ids != wanted:
        raise Mistake(f"{told} the input_ids are {ids}; is the pad token used?")
    wanted = _padded([[1] * len(row) for row in rows], 0, side)
    if mask == wanted:
        return
    if mask == [[1 - m for m in row] for row in wanted]:
        raise Mistake("The mask is inverted: 1 means a real token, 0 means padding.")
    if mask == _padded([[1] * len(row) for row in rows], 0, _OPPOSITE[side]):
        raise Mistake(f"{told} the padding is in place, but the zeros of the mask are opposite.")
    if mask == [[int(i != pad) for i in row] for row in ids]:
        raise Mistake(
            "The mask hides the real ends of the rows too. The pad token is the eos token "
            "here, so padding can be told by its position only."
        )
    hint = " Real tokens may be equal to the pad token." if any(pad in row for row in rows) else ""
    raise Mistake(f"{told} the attention mask is {mask}.{hint}")


_OPPOSITE = {"left": "right", "right": "left"}


def _padded(rows, filler, side):
    extra = [[filler] * (max(map(len, rows)) - len(row)) for row in rows]
    pairs = zip(rows, extra, strict=True)
    return [row + more if side == "right" else more + row for row, more in pairs]


def last_logits(answer):
    """Check a function (logits, attention_mask) -> logits that predict the next tokens."""
    torch.manual_seed(0)
    for side, mask in _MASKS.items():
        mask = torch.tensor(mask)
        rows, seq = mask.shape
        logits = torch.randn(rows, seq, 3, dtype=torch.float64)
        last = [max(j for j in range(seq) if mask[i, j]) for i in range(rows)]
        before = logits.clone(), mask.clone()
        got = answer(logits, mask)
        if not torch.is_tensor(got) or tuple(got.shape) != (rows, 3):
            shown = tuple(got.shape) if torch.is_tensor(got) else type(got).__name__
            raise Mistake(
                f"Return a tensor (batch, vocab): one row of logits for each prompt. For {rows} "
                f"prompts and 3 tokens in the vocabulary you return {shown}."
            )
        if got.dtype != logits.dtype:
            raise Mistake(f"From {logits.dtype} logits come {got.dtype} logits.")
        if not (torch.equal(logits, before[0]) and torch.equal(mask, before[1])):
            raise Mistake("The tensors that were passed in have changed.")
        if not torch.equal(got, logits[range(rows), last]):
            _explain_logits(got, logits, mask, last, side)
    logits = torch.randn(2, 4, 3, requires_grad=True)
    mask = torch.tensor(_MASKS["left"])
    if not answer(logits, mask).requires_grad:
        raise Mistake("No gradient passes through: the result is cut off from the logits.")
    for dtype in (torch.float32, torch.bfloat16):
        half = torch.randn(2, 4, 3).to(dtype)
        got = answer(half, mask)
        if got.dtype != dtype or not torch.equal(got, half[:, -1]):
            raise Mistake(f"From {dtype} logits come {got.dtype} ones, or others.")
    if not follows_the_device(answer, logits.detach(), mask):
        raise Mistake("Your function makes a tensor on the CPU, whatever the logits' device is.")


def _explain_logits(got, logits, mask, last, side):
    seq, hidden = logits.shape[1], logits.masked_fill(mask[..., None] == 0, -torch.inf)
    told = "rows that differ in their side" if side == "mixed" else f"padding on the {side}"

    def read(columns):
        places = torch.tensor(columns).expand(len(logits)).clamp(0, seq - 1)
        return torch.equal(got, logits[range(len(logits)), places])

    if read(seq - 1) and side == "right":
        raise Mistake("Padded on the right, the last column is padding: it predicts nothing real.")
    if read(mask.sum(-1).tolist()):
        raise Mistake("One too late: n tokens end at column n only if columns count from 1.")
    if read((mask.sum(-1) - 1).tolist()) and side == "left":
        raise Mistake(
            "The number of real tokens is taken for a place. Padded on the left, the last real "
            "token stands in the last column."
        )
    if last[0] and torch.equal(got[0], logits[0, last[0] - 1]):
        raise Mistake("One too early: this is the token before the last.")
    if read(mask.argmax(-1).tolist()):
        raise Mistake("These logits are read at the first real token of each row.")
    if torch.equal(got, hidden.max(1).values):
        raise Mistake("This is the largest logit of each token over all positions of the row.")
    right = logits[range(len(logits)), last]
    if torch.allclose(got, right.softmax(-1)) or torch.allclose(got, right.log_softmax(-1)):
        raise Mistake("A softmax was taken; return the logits as they are.")
    raise Mistake(f"With {told}, these are not the logits of the last real tokens.")


def padded_share(answer):
    """Check a function (lengths, batch_size, grouped) -> share of positions that are padding."""
    lengths, odd = [10, 1, 9, 2, 8, 3], [9, 2, 7, 4, 1, 6, 3, 8]
    cases = [(lengths, 2), (odd, 3), (odd, 5), ([4, 4, 2], 2), ([5, 3], 8)]
    for lengths, size in cases:
        for grouped in (False, True):
            given = list(lengths)
            got = float(answer(given, size, grouped))
            if given != lengths:
                raise Mistake(f"The list that was passed in is now {given}: it was sorted itself.")
            if abs(got - _share(lengths, size, grouped)) > 1e-6:
                _explain_share(got, lengths, size, grouped)


def _cut(lengths, size):
    return [lengths[i : i + size] for i in range(0, len(lengths), size)]


def _share(lengths, size, grouped):
    batches = _cut(sorted(lengths) if grouped else lengths, size)
    return 1 - sum(lengths) / sum(max(batch) * len(batch) for batch in batches)


def _explain_share(got, lengths, size, grouped):
    case = f"{len(lengths)} rows of {lengths} tokens, {size} at a time, grouped={grouped}:"
    truth, batches = _share(lengths, size, grouped), _cut(lengths, size)
    if abs(got - 100 * truth) < 1e-4:
        raise Mistake(f"{case} you return {got:.1f}. Return a share from 0 to 1, not percent.")
    if abs(got - truth) < 0.006 and any(got == round(truth, n) for n in (2, 3, 4)):
        raise Mistake(f"{case} {got} is rounded.")
    if grouped:
        if abs(got - _share(lengths, size, False)) < 1e-9:
            raise Mistake("grouped=True changes nothing: rows of like length should share a batch.")
        if abs(got - _share(sorted(lengths, reverse=True), size, False)) < 1e-9:
            raise Mistake(f"{case} the longest come first, so the small last batch is another one.")
        raise Mistake(f"{case} sorted by length and cut into batches, the share is not {got:.3f}.")
    total, tokens = sum(max(b) * len(b) for b in batches), sum(lengths)
    full = [batch for batch in batches if len(batch) == size] or batches
    known = {
        tokens / total: "That is the share of real tokens; the padding is asked for.",
        sum(n < max(b) for b in batches for n in b) / len(lengths): (
            "That is the share of rows that have padding; count tokens, not rows."
        ),
        1 - tokens / (max(lengths) * len(lengths)): (
            "All batches are padded to the longest row of the data, not to their own."
        ),
        total / tokens - 1: "The padding is divided by the real tokens; divide by all positions.",
        sum(1 - sum(b) / (max(b) * len(b)) for b in batches) / len(batches): (
            "This is the mean of the batches' shares; wide batches should weigh more."
        ),
        1 - tokens / sum(max(b) * size for b in batches): (
            "The last batch has fewer rows, and rows that do not exist were counted as padding."
        ),
        1 - sum(map(sum, full)) / sum(max(b) * len(b) for b in full): (
            "The last, smaller batch is left out."
        ),
        _share(lengths, size, True): "grouped=False must keep the order, but these are sorted.",
        _share(lengths, 2, False): "The rows were cut into twos, whatever batch_size says.",
    }
    for value, message in known.items():
        if abs(got - value) < 1e-9:
            raise Mistake(f"{case} {message}")
    raise Mistake(f"{case} the share is not {got:.3f}.")
