"""Checks of exercise 14: they name the mistake and stay silent about the solution."""

import torch
from torch.nn.functional import cross_entropy

from checks import Mistake


def rows_of_rank(answer):
    """Check a function (batch, rank, ranks) -> the rows of a rank."""
    for size, ranks in ((6, 2), (7, 3), (2, 3)):
        batch = {"input_ids": torch.arange(2 * size).view(size, 2)}
        batch["labels"] = batch["input_ids"] + 100
        parts = [answer(batch, rank, ranks) for rank in range(ranks)]
        if any(not isinstance(part, dict) or part.keys() != batch.keys() for part in parts):
            raise Mistake("Return a dict with the keys of the batch.")
        taken = [part["input_ids"][:, 0].tolist() for part in parts]
        rows = [row // 2 for part in taken for row in part]
        case = f"{size} rows for {ranks} ranks"
        if len(rows) < size:
            raise Mistake(f"{case}: only {len(rows)} are taken. The rest would never be learnt.")
        if len(rows) > len(set(rows)):
            raise Mistake(f"{case}: some are taken twice and weigh double.")
        if rows != [row for rank in range(ranks) for row in range(rank, size, ranks)]:
            raise Mistake(f"{case}: rank 0 takes the rows {rows[: len(taken[0])]}, not every Nth.")
        if any(not torch.equal(p["labels"], p["input_ids"] + 100) for p in parts):
            raise Mistake(f"{case}: the labels are not those of the same rows.")


def rank_loss(answer):
    """Check a function (loss_sum, counts) -> loss, by the gradient of two ranks with one weight."""
    torch.manual_seed(0)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    weight = torch.randn(3, 4)

    def gradient(loss_of):
        w = weight.clone().requires_grad_()
        loss_of(w).backward()
        return w.grad

    truth = gradient(lambda w: cross_entropy(x @ w.T, y))
    counts = [2, 6]
    pieces = [slice(0, 2), slice(2, 8)]
    losses = lambda w, part: cross_entropy(x[part] @ w.T, y[part], reduction="sum")  # noqa: E731
    got = sum(gradient(lambda w, p=part: answer(losses(w, p), counts)) for part in pieces) / 2
    if torch.allclose(got, truth, atol=1e-6):
        return
    means = sum(gradient(lambda w, p=part: losses(w, p) / len(y[p])) for part in pieces) / 2
    ratio = (got / truth).mean().item()
    if torch.allclose(got, means, atol=1e-6):
        raise Mistake(
            "A rank with 2 tokens weighs as much as one with 6: that is a mean of means. Divide by "
            "the tokens of all ranks."
        )
    if torch.allclose(got, truth / 2, atol=1e-6):
        raise Mistake(
            "The gradients are right but for a factor of 1/2: those of the ranks are averaged, not "
            "summed, and you did not make up for it."
        )
    if torch.allclose(got, truth * sum(counts) / 2, atol=1e-4):
        raise Mistake("The loss is still a sum: its size grows with the number of tokens.")
    raise Mistake(f"The gradient is not that of one process (on average {ratio:.2f} times it).")


def bytes_of_rank(answer):
    """Check a function (total, trainable, ranks, stage) -> bytes."""
    for total, trainable in ((1200, 1200), (1200, 12)):
        for stage in range(4):
            got = answer(total, trainable, 4, stage)
            sizes = [4 * total, 4 * trainable, 8 * trainable]
            divided = [size / 4 if stage >= 3 - i else size for i, size in enumerate(sizes)]
            case = f"{total} parameters, {trainable} trained, 4 ranks, stage {stage}"
            if got == sum(divided):
                continue
            everything = [4 * total, 4 * total, 8 * total]
            frozen = [size / 4 if stage >= 3 - i else size for i, size in enumerate(everything)]
            if got == sum(frozen):
                raise Mistake(f"{case}: frozen parameters have neither gradients nor moments.")
            if stage == 0 and got < sum(sizes):
                raise Mistake(f"{case}: plain data parallelism divides nothing.")
            if stage == 1 and got == sizes[0] + (sizes[1] + sizes[2]) / 4:
                raise Mistake(f"{case}: the gradients are divided from stage 2 on.")
            if stage == 2 and got == sum(sizes) / 4:
                raise Mistake(f"{case}: the parameters are divided in stage 3 only.")
            if stage == 3 and got == sizes[0] + (sizes[1] + sizes[2]) / 4:
                raise Mistake(f"{case}: stage 3 divides the parameters too.")
            raise Mistake(f"{case}: {sum(divided):.0f} bytes are held; you say {got}.")


def bytes_sent(answer):
    """Check a function (total, trainable, ranks, kind) -> bytes."""
    for total, trainable in ((1200, 1200), (1200, 12)):
        for ranks in (4, 2):
            case = f"{total} parameters, {trainable} trained, {ranks} ranks"
            part = (ranks - 1) / ranks
            got, truth = answer(total, trainable, ranks, "ddp"), 8 * trainable * part
            if abs(got - truth) > 1e-6:
                if got == 8 * trainable:
                    raise Mistake(f"{case}, ddp: a rank need not send its own share to itself.")
                if got == truth / 2:
                    raise Mistake(f"{case}, ddp: an all-reduce sends twice, to sum and to share.")
                if abs(got - 8 * total * part) < 1e-6:
                    raise Mistake(f"{case}, ddp: frozen parameters have no gradient to be summed.")
                raise Mistake(f"{case}, ddp: a rank sends {truth:.0f} bytes; you say {got}.")
            got, truth = answer(total, trainable, ranks, "fsdp"), part * (8 * total + 4 * trainable)
            if abs(got - truth) > 1e-6:
                if abs(got - part * (4 * total + 4 * trainable)) < 1e-6:
                    raise Mistake(
                        f"{case}, fsdp: you gather once, but after the forward pass each rank has "
                        "given the others' shards back."
                    )
                if abs(got - part * 12 * trainable) < 1e-6:
                    raise Mistake(
                        f"{case}, fsdp: the frozen parameters are divided too, so they travel."
                    )
                raise Mistake(f"{case}, fsdp: a rank sends {truth:.0f} bytes; you say {got}.")
