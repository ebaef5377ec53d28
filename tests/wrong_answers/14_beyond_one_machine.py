"""Wrong answers to exercise 14: (check, source of the answer, part of the message expected)."""


def _rows(body):
    return f"""
def rows_of_rank(batch, rank, ranks):
    n = len(batch["labels"])
    return {{name: {body} for name, t in batch.items()}}
"""


def _loss(formula):
    return f"""
def rank_loss(loss_sum, counts):
    return {formula}
"""


def _bytes(formula):
    return f"""
def bytes_of_rank(total, trainable, ranks, stage):
    n1, n2, n3 = (ranks if stage >= s else 1 for s in (1, 2, 3))
    return {formula}
"""


def _sent(ddp, fsdp="part * (8 * total + 4 * trainable)"):
    return f"""
def bytes_sent(total, trainable, ranks, kind):
    part = (ranks - 1) / ranks
    return {ddp} if kind == "ddp" else {fsdp}
"""


DDP = "8 * trainable * part"
WRONG = [
    ("rows_of_rank", _rows("t[rank * (n // ranks) : (rank + 1) * (n // ranks)]"), "not every Nth"),
    ("rows_of_rank", _rows("t[: n - n % ranks][rank::ranks]"), "would never be learned"),
    ("rows_of_rank", _rows("t"), "taken twice and weigh double"),
    ("rank_loss", _loss("loss_sum / counts[0 if loss_sum.grad_fn is None else -1]"), "on average"),
    (
        "rank_loss",
        "import itertools\n\nturn = itertools.count()\n"
        + _loss("loss_sum / counts[next(turn) % len(counts)]"),
        "a mean of means",
    ),
    ("rank_loss", _loss("loss_sum / sum(counts)"), "averaged, not summed"),
    ("rank_loss", _loss("loss_sum"), "still a sum"),
    (
        "bytes_of_rank",
        _bytes("4 * total / n3 + 4 * total / n2 + 8 * total / n1"),
        "neither gradients nor moments",
    ),
    (
        "bytes_of_rank",
        _bytes("4 * total / n3 + 4 * trainable / n1 + 8 * trainable / n1"),
        "from stage 2 on",
    ),
    (
        "bytes_of_rank",
        _bytes("4 * total / n2 + 4 * trainable / n2 + 8 * trainable / n1"),
        "in stage 3 only",
    ),
    (
        "bytes_of_rank",
        _bytes("4 * total + 4 * trainable / n2 + 8 * trainable / n1"),
        "divides the parameters too",
    ),
    ("bytes_of_rank", _bytes("(4 * total + 12 * trainable) / ranks"), "divides the moments alone"),
    ("bytes_sent", _sent("8 * trainable"), "share to itself"),
    ("bytes_sent", _sent("4 * trainable * part"), "sends twice"),
    ("bytes_sent", _sent("8 * total * part"), "no gradient to be summed"),
    ("bytes_sent", _sent(DDP, "part * 4 * (total + trainable)"), "you gather once"),
    ("bytes_sent", _sent(DDP, "part * 12 * trainable"), "so they travel"),
    # Who takes which rows
    (
        "rows_of_rank",
        """
def rows_of_rank(batch, rank, ranks):
    return {name: batch[name][rank::ranks] for name in ("input_ids", "labels", "weights")}
""",
        "ends in KeyError: 'input_ids'",
    ),
    ("rows_of_rank", _rows("t[rank - 1 :: ranks]"), "rank 0 begins at the last row"),
    ("rows_of_rank", _rows("t[:, rank::ranks] if t.dim() > 1 else t[rank::ranks]"), "other dim"),
    (
        "rows_of_rank",
        """
import torch

def rows_of_rank(batch, rank, ranks):
    rows = range(rank, len(next(iter(batch.values()))), ranks)
    return {name: torch.stack([t[i] for i in rows]) for name, t in batch.items()}
""",
        "has no rows, which ends in RuntimeError",
    ),
    (
        "rows_of_rank",
        """
def rows_of_rank(batch, rank, ranks):
    for name in batch:
        batch[name] = batch[name][rank::ranks]
    return batch
""",
        "the other ranks need it",
    ),
    ("rows_of_rank", _rows("t[rank::ranks].tolist()"), "must be tensors"),
    (
        "rows_of_rank",
        """
def rows_of_rank(batch, rank, ranks):
    return {name: tensor[rank::ranks] for name, tensor in batch.items() if tensor.dim() == 2}
""",
        "keys of the batch, ['input_ids', 'labels', 'weights']",
    ),
    (
        "rows_of_rank",
        """
def rows_of_rank(batch, rank, ranks):
    return {name: tensor[rank::ranks].flip(0) if tensor.is_floating_point()
            else tensor[rank::ranks] for name, tensor in batch.items()}
""",
        "weights is not that of the same rows",
    ),
    # The loss of a rank
    ("rank_loss", _loss("loss_sum * 2 / sum(counts)"), "fits two ranks only"),
    (
        "rank_loss",
        _loss("loss_sum * len([count for count in counts if count]) / sum(counts)"),
        "takes part in the average too",
    ),
    ("rank_loss", _loss("loss_sum * len(counts)"), "averaging is undone"),
    ("rank_loss", _loss("loss_sum / len(counts)"), "a second time"),
    ("rank_loss", _loss("loss_sum.detach() * len(counts) / sum(counts)"), "cut off from loss_sum"),
    ("rank_loss", _loss("loss_sum * (len(counts) // sum(counts))"), "gradient is zero"),
    (
        "rank_loss",
        "import torch\n" + _loss("loss_sum * len(counts) / torch.tensor(counts)"),
        "not a tensor (2,)",
    ),
    ("rank_loss", _loss("loss_sum.mul_(len(counts) / sum(counts))"), "another one after the call"),
    ("rank_loss", _loss("-loss_sum * len(counts) / sum(counts)"), "points the other way"),
    # The bytes of a rank
    (
        "bytes_of_rank",
        _bytes("4 * total / n3 + 4 * trainable / n2 + 8 * trainable / n1").replace(
            "(ranks if", "(4 if"
        ),
        "is not always 4",
    ),
    (
        "bytes_of_rank",
        _bytes("total / n3 + trainable / n2 + 2 * trainable / n1"),
        "a float32 number has four",
    ),
    (
        "bytes_of_rank",
        _bytes("4 * total / n3 + 4 * trainable / n2 + 4 * trainable / n1"),
        "you count one",
    ),
    (
        "bytes_of_rank",
        _bytes("2 * total / n3 + 2 * trainable / n2 + 12 * trainable / n1"),
        "mixed precision",
    ),
    ("bytes_of_rank", _bytes("4 * total / n3 + 8 * trainable / n1"), "gradients are missing"),
    (
        "bytes_of_rank",
        _bytes("4 * total / n1 + 4 * trainable / n2 + 8 * trainable / n3"),
        "wrong order of the stages",
    ),
    (
        "bytes_of_rank",
        _bytes(
            "4 * (total - trainable + trainable / n3) + 4 * trainable / n2 + 8 * trainable / n1"
        ),
        "not the trainable ones alone",
    ),
    (
        "bytes_of_rank",
        _bytes("4 * total // n3 + 4 * trainable // n2 + 8 * trainable // n1"),
        "is rounded",
    ),
    (  # only the newest stage
        "bytes_of_rank",
        """
def bytes_of_rank(total, trainable, ranks, stage):
    parts = [8 * trainable, 4 * trainable, 4 * total]
    if stage:
        parts[stage - 1] /= ranks
    return sum(parts)
""",
        "stage 2 still divides",
    ),
    (
        "bytes_of_rank",
        _bytes("2 * total / n3 + 2 * trainable / n2 + 4 * trainable / n1"),
        "that is half of it",
    ),
    ("bytes_of_rank", _bytes("16 * total / n3 + 1"), "are too many"),
    (
        "bytes_of_rank",
        _bytes("4 * total / n3 + 4 * trainable / n2 + 8 * trainable / ranks"),
        "divides nothing",
    ),
    # Bytes that travel
    ("bytes_sent", _sent("8 * trainable * (ranks - 1)"), "grows with every rank"),
    ("bytes_sent", _sent("8 * trainable / ranks"), "the rank's own share"),
    ("bytes_sent", _sent("2 * trainable * part"), "a float32 number has four"),
    (
        "bytes_sent",
        _sent("part * (8 * total + 4 * trainable)", "8 * trainable * part"),
        "two kinds are swapped",
    ),
    ("bytes_sent", _sent(DDP, "part * 12 * total"), "to be scattered"),
    ("bytes_sent", _sent(DDP, "part * (8 * total + 8 * trainable)"), "not all-reduced"),
    ("bytes_sent", _sent(DDP, "part * 8 * total"), "do not travel at all"),
    ("bytes_sent", _sent(DDP, "part * (4 * total + 2 * trainable)"), "that is half of it"),
    ("bytes_sent", _sent("int(8 * trainable * part)"), "is rounded"),
    ("bytes_sent", _sent("4 * trainable * (ranks - 1) / 8"), "are too few"),
]
