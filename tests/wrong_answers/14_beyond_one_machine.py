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
    ("rows_of_rank", _rows("t[: n - n % ranks][rank::ranks]"), "would never be learnt"),
    ("rows_of_rank", _rows("t"), "weigh double"),
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
    ("bytes_of_rank", _bytes("(4 * total + 12 * trainable) / ranks"), "divides nothing"),
    ("bytes_sent", _sent("8 * trainable"), "share to itself"),
    ("bytes_sent", _sent("4 * trainable * part"), "sends twice"),
    ("bytes_sent", _sent("8 * total * part"), "no gradient to be summed"),
    ("bytes_sent", _sent(DDP, "part * 4 * (total + trainable)"), "you gather once"),
    ("bytes_sent", _sent(DDP, "part * 12 * trainable"), "so they travel"),
]
