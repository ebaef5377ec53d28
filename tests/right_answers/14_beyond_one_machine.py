"""Right answers to exercise 14, written in other ways: (check, source of the answer)."""

RIGHT = [
    ("rows_of_rank", """
def rows_of_rank(batch, rank, ranks):
    size = len(list(batch.values())[0])
    mine = torch.arange(size) % ranks == rank
    return {key: value[mine] for key, value in batch.items()}
"""),
    ("rows_of_rank", """
def rows_of_rank(batch, rank, ranks):
    part = {}
    for key in batch:
        rows = [i for i in range(batch[key].shape[0]) if i % ranks == rank]
        part[key] = batch[key].index_select(0, torch.tensor(rows, dtype=torch.long))
    return part
"""),
    ("rank_loss", """
def rank_loss(loss_sum, counts):
    per_rank = torch.tensor(counts).float().mean()
    return loss_sum / per_rank
"""),
    ("rank_loss", """
def rank_loss(loss_sum, counts):
    everybody = 0
    for count in counts:
        everybody += count
    return len(counts) * (loss_sum / everybody)
"""),
    ("bytes_of_rank", """
def bytes_of_rank(total, trainable, ranks, stage):
    if stage == 0:
        return 4 * total + 12 * trainable
    if stage == 1:
        return 4 * total + 4 * trainable + 8 * trainable / ranks
    if stage == 2:
        return 4 * total + 12 * trainable / ranks
    return (4 * total + 12 * trainable) / ranks
"""),
    ("bytes_of_rank", """
from fractions import Fraction

def bytes_of_rank(total, trainable, ranks, stage):
    size = torch.finfo(torch.float32).bits // 8
    held = Fraction(0)
    for numbers, first in ((total, 3), (trainable, 2), (trainable, 1), (trainable, 1)):
        held += Fraction(size * numbers, ranks if stage >= first else 1)
    return held
"""),
    ("bytes_sent", """
def bytes_sent(total, trainable, ranks, kind):
    def gather(numbers):
        return 4 * numbers * (ranks - 1) / ranks
    def all_reduce(numbers):
        return gather(numbers) + gather(numbers)
    return {"ddp": all_reduce(trainable), "fsdp": all_reduce(total) + gather(trainable)}[kind]
"""),
    ("bytes_sent", """
def bytes_sent(total, trainable, ranks, kind):
    n = 8 * trainable if kind == "ddp" else 8 * total + 4 * trainable
    return n - n / ranks
"""),
]  # fmt: skip
