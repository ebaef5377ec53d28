"""Checks of exercise 14: they name the mistake and stay silent about the solution."""

import torch
from torch.nn.functional import cross_entropy

from checks import Mistake


def rows_of_rank(answer):
    """Check a function (batch, rank, ranks) -> the rows of a rank."""
    for size, ranks in ((6, 2), (7, 3), (2, 3), (5, 2), (1, 1)):
        first = 10 * torch.arange(size)[:, None] + torch.arange(4)
        batch = {"input_ids": first, "labels": first + 100, "weights": first[:, 0] + 200.0}
        if size == 5:
            batch = {"pixels": torch.stack([first, first], -1), "mask": first > 0}
        _right_rows(answer, batch, size, ranks)


def _right_rows(answer, batch, size, ranks):
    before = {name: tensor.clone() for name, tensor in batch.items()}
    case, parts = f"{size} rows for {ranks} ranks", []
    for rank in range(ranks):
        try:
            parts.append(answer(batch, rank, ranks))
        except KeyError as error:
            raise Mistake(
                f"A batch with the keys {list(batch)} ends in KeyError: {error}. The keys may be "
                "any."
            ) from error
        except (IndexError, RuntimeError) as error:
            if rank < size:
                raise
            raise Mistake(
                f"{case}: rank {rank} has no rows, which ends in {type(error).__name__}. It is to "
                "get tensors of 0 rows."
            ) from error
        if batch.keys() != before.keys() or any(
            not torch.equal(batch[name], tensor) for name, tensor in before.items()
        ):
            raise Mistake("The batch that was passed in has changed; the other ranks need it.")
    for part in parts:
        if not isinstance(part, dict) or part.keys() != batch.keys():
            raise Mistake(f"Return a dict with the keys of the batch, {list(batch)}.")
        if not all(torch.is_tensor(tensor) for tensor in part.values()):
            raise Mistake("The values of the dict must be tensors.")
    name, whole = next(iter(batch.items()))
    for part in parts:
        shape = tuple(part[name].shape)
        if shape[1:] != whole.shape[1:]:
            raise Mistake(
                f"From a tensor {tuple(whole.shape)} a rank gets one of {shape}: divide the rows, "
                "and leave the other dimensions."
            )
    taken = [[int(row) // 10 for row in part[name].flatten(1)[:, 0]] for part in parts]
    rows = [row for own in taken for row in own]
    if ranks > 1 and taken[0] == list(range(size))[-1::ranks]:
        raise Mistake(f"{case}: rank 0 begins at the last row. Ranks are numbered from 0.")
    if len(rows) < size:
        raise Mistake(f"{case}: only {len(rows)} are taken. The rest would never be learned.")
    if len(rows) > len(set(rows)):
        raise Mistake(f"{case}: some are taken twice and weigh double.")
    for rank, own in enumerate(taken):
        if own != list(range(rank, size, ranks)):
            raise Mistake(f"{case}: rank {rank} takes the rows {own}, not every Nth.")
    for rank, part in enumerate(parts):
        for name, tensor in batch.items():
            if not torch.equal(part[name], tensor[taken[rank]]):
                raise Mistake(f"{case}: {name} is not that of the same rows.")


def rank_loss(answer):
    """Check a function (loss_sum, counts) -> loss, by the gradient of some ranks."""
    torch.manual_seed(0)
    weight = torch.randn(3, 4)
    for counts in ([2, 6], [1, 3, 4], [5, 0, 2, 1], [3]):
        total, ranks = sum(counts), len(counts)
        x = torch.randn(total, 4).split(counts)
        y = torch.randint(3, (total,)).split(counts)

        def gradient(x, y, make_loss):
            w = weight.clone().requires_grad_()
            loss = make_loss(cross_entropy(x @ w.T, y, reduction="sum"))
            if torch.is_tensor(loss) and loss.dim():
                raise Mistake(f"A loss is one number, not a tensor {tuple(loss.shape)}.")
            if not torch.is_tensor(loss) or not loss.requires_grad:
                raise Mistake("No gradient can pass: what you return is cut off from loss_sum.")
            loss.backward()
            return w.grad

        def watched(loss_sum, counts=counts):
            given, value = list(counts), loss_sum.item()
            loss = answer(loss_sum, given)
            if given != counts or loss_sum.item() != value:
                raise Mistake("loss_sum or counts is another one after the call.")
            return loss

        def averaged(make_loss, x=x, y=y, ranks=ranks):
            return sum(gradient(*own, make_loss) for own in zip(x, y, strict=True)) / ranks

        got, truth = averaged(watched), averaged(lambda s, n=ranks / total: s * n)
        if not torch.allclose(got, truth, atol=1e-6):
            each = iter(counts)
            means = averaged(lambda s, each=each: s / max(next(each), 1))
            _explain_gradient(got, truth, means, counts)


def _explain_gradient(got, truth, means, counts):
    case, total, ranks = f"Ranks with {counts} targets:", sum(counts), len(counts)

    def is_(other):
        return torch.allclose(got, other, rtol=1e-4, atol=1e-6)

    if is_(means):
        raise Mistake(
            f"{case} a token of a rank with few weighs more than one of a rank with many. That is "
            "a mean of means."
        )
    if is_(truth / ranks):
        raise Mistake(
            f"{case} the gradients are right but for a factor of 1/{ranks}: those of the ranks are "
            "averaged, not summed, and you did not make up for it."
        )
    if is_(truth * total / ranks):
        raise Mistake(f"{case} the loss is still a sum, so its size grows with the tokens.")
    if is_(truth * total):
        raise Mistake(f"{case} averaging is undone, and what remains is the sum over all tokens.")
    if is_(truth * total / ranks**2):
        raise Mistake(f"{case} you average over the ranks a second time.")
    if is_(truth * 2 / ranks):
        raise Mistake(f"{case} the factor fits two ranks only.")
    if is_(truth * sum(count > 0 for count in counts) / ranks):
        raise Mistake(f"{case} a rank without targets takes part in the average too.")
    if not got.any():
        raise Mistake(f"{case} the gradient is zero. Was something divided without a remainder?")
    if is_(-truth):
        raise Mistake(f"{case} the gradient points the other way.")
    ratio = (got / truth).mean().item()
    raise Mistake(
        f"{case} the gradient is not that of one process (on average {ratio:.2f} times it)."
    )


def _close(one, other):
    return abs(float(one) - float(other)) < 1e-3


def bytes_of_rank(answer):
    """Check a function (total, trainable, ranks, stage) -> bytes."""
    for total, trainable, ranks in ((1009, 97, 7), (1200, 1200, 4), (900, 90, 1)):
        for stage in (1, 0, 2, 3):
            got = answer(total, trainable, ranks, stage)
            case = f"{total} parameters, {trainable} trainable, {ranks} ranks, stage {stage}"
            truth = _held([4 * total, 4 * trainable, 8 * trainable], ranks, stage)
            if not _close(got, truth):
                _explain_held(float(got), case, total, trainable, ranks, stage)


def _held(sizes, ranks, stage, first=(3, 2, 1)):
    """Bytes of parts of these sizes, each divided from a stage on."""
    pairs = zip(sizes, first, strict=True)
    return sum(size / ranks if stage >= from_stage else size for size, from_stage in pairs)


def _explain_held(got, case, total, trainable, ranks, stage):
    sizes = [4 * total, 4 * trainable, 8 * trainable]
    p, g, m = sizes
    truth = _held(sizes, ranks, stage)
    known = {
        "frozen parameters have neither gradients nor moments.": [
            _held([4 * total, 4 * total, 8 * total], ranks, stage)
        ],
        "these are numbers, not bytes; a float32 number has four of them.": [truth / 4],
        "these are bits.": [truth * 8],
        "that is half of it. Everything is float32 here.": [truth / 2],
        "AdamW keeps two moments of each trainable parameter, and you count one.": [
            _held([p, g, 4 * trainable], ranks, stage)
        ],
        "mixed precision would need a float32 copy of the weights; here nothing is copied.": [
            _held([2 * total, 2 * trainable, 12 * trainable], ranks, stage),
            _held([p, g, 12 * trainable], ranks, stage),
        ],
        "the gradients are missing.": [_held([p, 0, m], ranks, stage)],
    }
    if stage == 0 and got < truth:
        known["plain data parallelism divides nothing."] = [got]
    if stage == 1:
        known["stage 1 divides the moments alone."] = [_held(sizes, ranks, 3)]
        known["the gradients are divided from stage 2 on."] = [_held(sizes, ranks, 2)]
    if stage == 2:
        known["the parameters are divided in stage 3 only."] = [_held(sizes, ranks, 3)]
        known["stage 2 still divides what stage 1 does."] = [p + g / ranks + m]
    if stage == 3:
        known["stage 3 divides the parameters too."] = [_held(sizes, ranks, 2)]
        known["the frozen parameters are divided as well, not the trainable ones alone."] = [
            4 * (total - trainable) + (g + g + m) / ranks
        ]
    known["the parts are divided in the wrong order of the stages."] = [
        _held(sizes, ranks, stage, first) for first in ((1, 2, 3), (2, 3, 1), (3, 1, 2), (1, 3, 2))
    ]
    known["the number of ranks is not always 4."] = [_held(sizes, 4, stage)]
    for message, values in known.items():
        if any(_close(got, value) for value in values):
            raise Mistake(f"{case}: {message}")
    if abs(got - truth) < 4:
        raise Mistake(f"{case}: your number {got} is rounded.")
    much = "many" if got > truth else "few"
    raise Mistake(f"{case}: {got:,.1f} bytes are too {much}.")


def bytes_sent(answer):
    """Check a function (total, trainable, ranks, kind) -> bytes."""
    for total, trainable in ((1009, 97), (1200, 1200)):
        for ranks in (7, 4, 2, 1):
            for kind in ("ddp", "fsdp"):
                case = f"{total} parameters, {trainable} trainable, {ranks} ranks, {kind}"
                got, part = answer(total, trainable, ranks, kind), (ranks - 1) / ranks
                truth = {"ddp": 8 * trainable, "fsdp": 8 * total + 4 * trainable}
                if not _close(got, part * truth[kind]):
                    _explain_sent(float(got), case, total, trainable, ranks, kind)


def _explain_sent(got, case, total, trainable, ranks, kind):
    part, t = (ranks - 1) / ranks, 4 * trainable
    wholes = {"ddp": 2 * t, "fsdp": 8 * total + t}
    whole = wholes[kind]
    known = {
        "a rank need not send its own share to itself.": whole,
        "that grows with every rank. Of n bytes a rank sends less than n in each half.": (
            whole * (ranks - 1)
        ),
        "that is the rank's own share; it sends what the others need.": whole / ranks,
        "these are numbers, not bytes; a float32 number has four of them.": part * whole / 4,
        "the two kinds are swapped.": part * wholes["fsdp" if kind == "ddp" else "ddp"],
    }
    if kind == "ddp":
        known["an all-reduce sends twice, to sum and to share."] = part * t
        known["frozen parameters have no gradient to be summed."] = part * 8 * total
    else:
        known[
            "you gather once, but after the forward pass each rank has given the others' shards "
            "back."
        ] = part * (4 * total + t)
        known["the frozen parameters are sharded too, so they travel."] = part * 3 * t
        known["frozen parameters have no gradient to be scattered."] = part * 12 * total
        known["gradients are scattered here, not all-reduced: each rank needs its shard alone."] = (
            part * (8 * total + 2 * t)
        )
        known["the gradients do not travel at all."] = part * 8 * total
    known["that is half of it. Everything is float32 here."] = part * whole / 2
    for message, value in known.items():
        if _close(got, value):
            raise Mistake(f"{case}: {message}")
    if abs(got - part * whole) < 12:
        raise Mistake(f"{case}: your number {got} is rounded.")
    much = "many" if got > part * whole else "few"
    raise Mistake(f"{case}: {got:,.1f} bytes are too {much}.")
