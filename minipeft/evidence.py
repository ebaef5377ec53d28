"""Read the stored training runs, and say what they show: intervals over seeds and test rows.

A score from a few seeds and a few hundred test rows varies for two reasons: another seed would
train another model, and other rows would be other questions. An interval over the rows alone
ignores the spread of the seeds, one over the seeds alone that of the rows. `compare` counts both.
"""

import csv
import json
import math
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

from minipeft.refusals import require, shown


def runs_of(path: str | Path, task: str, device: str | None = None) -> list[dict]:
    """The runs of one task in a file of benchmarks/evidence.py, by seed: a list of dicts.

    Numbers are numbers; `answers` is a float tensor (rows,) of 1 for right and 0 for wrong;
    `curve` is {step: training loss}; what stands in `details` becomes a key of its own.
    device: the device whose runs are wanted. Default: the one with the most runs of this task.
    Runs of different devices are never mixed, nor are students of different teachers
    (benchmarks/tasks/distillation.py): only those of the teacher with most runs are returned,
    with a warning. Runs that name no teacher, the first ones, are returned as well; `at_best_rate`
    refuses a mixture. Of a run made twice, the newer counts. A run that diverged has no answers.
    Raises ValueError if there is no such run.
    """
    with open(path, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["task"] == task]
    if device is None and rows:
        device = Counter(row["device"] for row in rows).most_common(1)[0][0]
    key = ("method", "lr", "seed", "steps", "examples")
    newest = {tuple(row[name] for name in key): row for row in rows if row["device"] == device}
    rows = [_parsed(row) for row in newest.values()]
    where = f" on {shown(device)}" if device else ""
    require(rows, f"There are no runs of {shown(task)}{where} in {path}.")
    teachers = Counter(row["teacher"] for row in rows if "teacher" in row).most_common()
    if len(teachers) > 1:
        others = sum(count for _, count in teachers[1:])
        warnings.warn(
            f"{others} runs of {task} had another teacher and are left out; delete their rows to "
            "have them made again.",
            stacklevel=2,
        )
        rows = [row for row in rows if row.get("teacher") == teachers[0][0]]
    return sorted(rows, key=lambda row: row["seed"])  # workers end in any order


def _parsed(row):
    details = json.loads(row.pop("details") or "{}")
    for name in ("threads", "seed", "steps", "examples", "batch", "trainable", "right", "total"):
        row[name] = int(row[name]) if row[name] else None
    for name in ("lr", "seconds", "train_loss", "valid_loss"):
        row[name] = float(row[name]) if row[name] else None
    pairs = (pair.split(":") for pair in row["curve"].split())
    row["curve"] = {int(step): float(loss) for step, loss in pairs}
    row["answers"] = torch.tensor([float(a) for a in row["answers"]])  # (rows,)
    return row | details


def at_best_rate(runs: list[dict], fresh: bool = False) -> dict[str, list[dict]]:
    """{method: its runs at the learning rate it would be used with, in the order of their seeds}.

    That is the rate of the lowest validation loss among the runs of the lowest seed. A method all
    of whose runs have one rate needs no validation loss.
    fresh: leave out the seed that chose between rates, since the choice favors it.
    Raises ValueError for runs of several numbers of examples or several teachers, and for an
    unknown rate.
    """
    sizes = sorted({run["examples"] for run in runs})
    require(len(sizes) < 2, f"These runs have {sizes} examples; give those of one number.")
    teachers = sorted({str(run.get("teacher")) for run in runs})
    require(len(teachers) < 2, f"These runs have the teachers {teachers}; give those of one.")
    methods: dict[str, list[dict]] = {}
    for run in runs:
        methods.setdefault(run["method"], []).append(run)
    best = {}
    for method, own in methods.items():
        first = min(run["seed"] for run in own)
        tried = [r for r in own if r["seed"] == first and r["valid_loss"] is not None]
        searched = len({run["lr"] for run in own}) > 1
        if not searched:
            tried = own
        require(tried, f"No run of {method} has a validation loss, so its rate is unknown.")
        lr = min(tried, key=lambda run: _or_infinite(run["valid_loss"]))["lr"]
        at_lr = sorted((r for r in own if r["lr"] == lr), key=lambda run: run["seed"])
        later = [run for run in at_lr if run["seed"] != first]
        best[method] = later if fresh and searched and later else at_lr
    return best


def _or_infinite(loss):
    return math.inf if loss is None or math.isnan(loss) else loss


def answers_of(runs: list[dict]) -> torch.Tensor:
    """The answers of some runs, one row for each: (seeds, rows).

    Raises ValueError if a run has no answers, as one that diverged, or has other test rows.
    """
    sizes = [len(run["answers"]) for run in runs]
    require(
        sizes and min(sizes) == max(sizes) > 0,
        f"These runs have {sizes} answers; leave out those that diverged or were judged otherwise.",
    )
    return torch.stack([run["answers"] for run in runs])


class Comparison(NamedTuple):
    """A mean, the ends of its interval, and the p value of a mean of zero."""

    mean: float
    low: float
    high: float
    p: float


def compare(
    ours: torch.Tensor, theirs: torch.Tensor | float = 0.0, level: float = 0.95
) -> Comparison:
    """How much better are our answers than theirs, counting seeds and test rows together?

    ours: scores (seeds, rows), two seeds and two rows at least. theirs: (seeds, rows), paired seed
    by seed and row by row; or (1, rows) for a model that is not trained; or a number. Three seeds
    are better: in a simulation (benchmarks/interval_coverage.py) a 95 % interval from two held the
    truth in 89 to 98 % of the cases, from three or more in 93 to 98 %. With x the
    difference of a seed and a row, a two-way model without replication
    x[s, r] = mean + a[s] + b[r] + e[s, r] gives the variance of the mean as
    (MS_seeds + MS_rows - MS_rest) / (seeds * rows), and Satterthwaite (1946) the degrees of freedom
    of its t distribution. Where the model would make it smaller than the seeds or the rows alone
    do, the larger of these counts. Scores that never vary leave room for as many other rows as
    could have been missed: -ln(1 - level) of them, the rule of three at 95 %.
    Raises ValueError for other shapes.
    """
    from scipy.stats import t as student

    require(
        ours.dim() == 2 and min(ours.shape) >= 2,
        f"compare wants scores (seeds, rows), two of each at least; got {tuple(ours.shape)}.",
    )
    seeds, rows = ours.shape
    other = torch.as_tensor(theirs)
    require(
        other.dim() == 0 or other.shape in ((1, rows), (seeds, rows)),
        f"theirs must be a number, (1, {rows}) or {(seeds, rows)}; got {tuple(other.shape)}.",
    )
    x = ours.double() - other.double()  # (seeds, rows)
    mean = x.mean()
    by_seed, by_row = x.mean(1, keepdim=True), x.mean(0, keepdim=True)  # (seeds, 1), (1, rows)
    free = (seeds - 1, rows - 1, (seeds - 1) * (rows - 1))
    squares = (
        rows * (by_seed - mean).square().sum(),
        seeds * (by_row - mean).square().sum(),
        (x - by_seed - by_row + mean).square().sum(),
    )
    ms = [(square / df).item() for square, df in zip(squares, free, strict=True)]
    total = max(ms[0] + ms[1] - ms[2], ms[0], ms[1])
    if total == 0:  # no variation at all
        room = -math.log(1 - level) / rows
        return Comparison(mean.item(), mean.item() - room, mean.item() + room, float(mean == 0))
    variance = sum(m**2 / df for m, df in zip(ms, free, strict=True))
    freedom = total**2 / variance
    error = math.sqrt(total / (seeds * rows))
    half = student.ppf(0.5 + level / 2, freedom) * error
    p = 2 * student.sf(abs(mean.item()) / error, freedom)
    low, high = mean.item() - half, mean.item() + half
    return Comparison(mean.item(), float(low), float(high), float(p))


def groups(answers: dict[str, torch.Tensor], level: float = 0.95) -> list[list[str]]:
    """Methods that cannot be told apart, as groups, the best first; a method may be in several.

    answers: {method: (seeds, rows)}, the same seeds and rows for all. Every pair is compared, and
    Holm's method (1979) keeps the chance of one wrong difference among all pairs below 1 - level.
    A group is as many neighbors in the order of the means as have no difference among them.
    """
    order = sorted(answers, key=lambda name: -answers[name].mean().item())
    pairs = [(a, b) for i, a in enumerate(order) for b in order[i + 1 :]]
    found = sorted((compare(answers[a], answers[b]).p, a, b) for a, b in pairs)
    differ = set()
    for rank, (p, a, b) in enumerate(found):
        if p > (1 - level) / (len(found) - rank):
            break
        differ.add((a, b))
    made: list[list[str]] = []
    for start in range(len(order)):
        end = start
        while end < len(order) and not any((a, order[end]) in differ for a in order[start:end]):
            end += 1
        group = order[start:end]
        if not made or group[-1] not in made[-1]:  # not just the end of the group before
            made.append(group)
    return made
