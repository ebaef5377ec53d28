"""Checks of exercise 01: they name the mistake and stay silent about the solution."""

import torch

from checks import Mistake


def position_ids(answer):
    """Check a function (attention_mask) -> position ids that count real tokens only."""
    right = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    left = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    got = answer(left.clone())
    if not torch.is_tensor(got) or got.shape != left.shape:
        raise Mistake("Return a tensor of the shape of the mask.")
    if got.dtype != torch.int64:
        raise Mistake(f"Position ids are {got.dtype}; an embedding table is indexed with int64.")
    if got[0].tolist() == [1, 2, 3, 4]:
        raise Mistake("Positions begin at 1; the first real token has position 0.")
    if got[1].tolist() == [0, 1, 2, 3]:
        raise Mistake("On the left, padding is counted: the first real token there has position 2.")
    if (got < 0).any():
        raise Mistake("Padding has a negative position, which no embedding table can look up.")
    if got[0].tolist() != [0, 1, 2, 3] or got[1, 2:].tolist() != [0, 1]:
        raise Mistake(f"For the masks {left.tolist()} the positions are {got.tolist()}.")
    got = answer(right.clone())
    if got[1, :2].tolist() != [0, 1]:
        raise Mistake("With padding on the right, the real tokens no longer count 0, 1, 2, ...")
    if (got < 0).any() or (got > 3).any():
        raise Mistake("With padding on the right, a position lies outside of the sequence.")


def pad_batch(answer):
    """Check a function (rows, pad_token_id, side) -> input_ids and attention_mask."""
    rows = [[7, 8, 9, 2], [5, 2]]  # 2 is the end of each row, and the pad token
    for side, ids, mask in (
        ("right", [[7, 8, 9, 2], [5, 2, 2, 2]], [[1, 1, 1, 1], [1, 1, 0, 0]]),
        ("left", [[7, 8, 9, 2], [2, 2, 5, 2]], [[1, 1, 1, 1], [0, 0, 1, 1]]),
    ):
        batch = answer([list(row) for row in rows], 2, side)
        if not isinstance(batch, dict) or {"input_ids", "attention_mask"} - set(batch):
            raise Mistake('Return a dict with the keys "input_ids" and "attention_mask".')
        for name, tensor in batch.items():
            if not torch.is_tensor(tensor) or tensor.dtype != torch.int64:
                raise Mistake(f"{name} is not an int64 tensor.")
        if tuple(batch["input_ids"].shape) != (2, 4):
            raise Mistake(
                f"input_ids are {tuple(batch['input_ids'].shape)}; the longest row has 4."
            )
        found, found_mask = batch["input_ids"].tolist(), batch["attention_mask"].tolist()
        other = [[7, 8, 9, 2], [2, 2, 5, 2]] if side == "right" else [[7, 8, 9, 2], [5, 2, 2, 2]]
        if found == other:
            raise Mistake(f"side={side!r} puts the padding on the other side.")
        if found != ids:
            raise Mistake(f"side={side!r}: the input_ids are {found}; is the pad token used?")
        if found_mask == [[1 - m for m in row] for row in mask]:
            raise Mistake("The mask is inverted: 1 means a real token, 0 means padding.")
        if found_mask == [[int(i != 2) for i in row] for row in found]:
            raise Mistake(
                "The mask hides the real ends of the rows too. The pad token is the eos token "
                "here, so padding can be told by its position only."
            )
        if found_mask != mask:
            raise Mistake(
                f"side={side!r}: the attention mask is {found_mask}, the rows are {rows}."
            )
    try:
        answer([[1], [2]], 0, "middle")
    except ValueError:
        return
    raise Mistake("side='middle' is accepted in silence; raise a ValueError.")


def last_logits(answer):
    """Check a function (logits, attention_mask) -> the logits behind each row's next token."""
    logits = torch.arange(2 * 4 * 3.0).reshape(2, 4, 3)
    cases = {
        "left": (torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]]), [3, 3]),
        "right": (torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]), [3, 1]),
    }
    for side, (mask, places) in cases.items():
        got = answer(logits, mask)
        if not torch.is_tensor(got) or tuple(got.shape) != (2, 3):
            raise Mistake("Return a tensor (batch, vocab): one row of logits for each prompt.")
        if torch.equal(got, torch.stack([logits[i, p] for i, p in enumerate(places)])):
            continue
        if side == "right" and torch.equal(got, logits[:, -1]):
            raise Mistake(
                "Padded on the right, the last column is padding: it predicts nothing real."
            )
        if side == "left" and torch.equal(got[1], logits[1, 1]):
            raise Mistake(
                "The number of real tokens is taken for a place. Padded on the left, the last real "
                "token stands in the last column."
            )
        if torch.equal(got[0], logits[0, 2]):
            raise Mistake("One too early: this is the token before the last.")
        raise Mistake(
            f"With padding on the {side}, these are not the logits of the last real tokens."
        )


def padded_share(answer):
    """Check a function (lengths, batch_size, grouped) -> share of positions that are padding."""
    lengths = [10, 1, 9, 2, 8, 3]
    got = answer(list(lengths), 2, False)
    if abs(got - 21 / 54) < 1e-9:
        pass
    elif abs(got - 33 / 54) < 1e-9:
        raise Mistake("That is the share of real tokens; the padding is asked for.")
    elif abs(got - 0.5) < 1e-9:
        raise Mistake("That is the share of rows that have padding; count tokens, not rows.")
    elif abs(got - 27 / 60) < 1e-9:
        raise Mistake("All batches are padded to the longest row of the data, not to their own.")
    elif abs(got - 21 / 33) < 1e-9:
        raise Mistake("The padding is divided by the real tokens; divide by all positions.")
    elif abs(got - (9 / 20 + 7 / 18 + 5 / 16) / 3) < 1e-9:
        raise Mistake("This is the mean of the batches' shares; wide batches should weigh more.")
    else:
        raise Mistake(f"Rows of {lengths} tokens, two at a time: the share is not {got:.3f}.")
    got = answer(list(lengths), 2, True)
    if abs(got - 21 / 54) < 1e-9:
        raise Mistake("grouped=True changes nothing: rows of like length should share a batch.")
    if abs(got - 7 / 40) > 1e-9:
        raise Mistake(f"Sorted by length and cut into batches, the share is not {got:.3f}.")
    if abs(answer([4, 4, 2], 2, False)) > 1e-9:
        raise Mistake(
            "The last batch has one row of 2 tokens and no padding, but some was counted."
        )
