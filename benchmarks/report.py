"""One chart and one table of a task: how good every method is, what it trains and what it costs.

    python benchmarks/report.py grades [--device NAME] [--out FOLDER]

Writes results/grades.png and results/grades.md from the stored runs (evidence.csv, cost.csv), and
prints the table. Each method stands at its best rate, with a 95 % interval that counts seeds and
test rows (`minipeft.evidence.compare`); the seed that chose the rate is left out. Methods that
share a bar at the right cannot be told apart (`groups`); a method with fewer than two seeds has no
interval and is in no group. A task without right and wrong answers is judged by a loss. Runs that
diverged are counted in the table and left out of the mean.
"""

import argparse
import math
from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot as plt

from minipeft.evidence import at_best_rate, compare, groups, runs_of
from minipeft.refusals import require
from tasks import LABELED, TASKS
from this_machine import all_rows

FOLDER = Path(__file__).resolve().parent / "results"
PLACES = {  # beginning of a method's name: (where it acts, can it be merged); "-" if not listed
    "prompt tuning": ("input vectors", "no"),
    "P-tuning v2, hidden": ("hidden states of every layer", "no"),
    "P-tuning v2 hidden": ("hidden states of every layer", "no"),
    "P-tuning v2": ("keys and values of every layer", "no"),
    "P-tuning": ("input vectors, by an encoder", "no"),
    "prefix-tuning": ("keys and values of every layer", "no"),
    "adapters": ("after attention and feed-forward", "no"),
    "LoRA, all linear": ("weights of all linear layers", "yes"),
    "LoRA+, all linear": ("weights of all linear layers", "yes"),
    "rsLoRA, all linear": ("weights of all linear layers", "yes"),
    "DoRA, all linear": ("weights of all linear layers", "yes"),
    "LoRA, seven": ("weights of all linear layers", "yes"),
    "LoRA": ("weights of queries and values", "yes"),
    "biases": ("biases of all linear layers", "is the model"),
    "norms": ("weights of the norms", "is the model"),
    "head": ("output weights", "is the model"),
    "last": ("weights of the last blocks", "is the model"),
    "all blocks": ("weights of all blocks", "is the model"),
    "zero-shot": ("nothing", "is the model"),
    "question": ("nothing", "is the model"),
}
COLORS = {  # of a family; markers beside them, so that color is never alone
    "input vectors": ("#0072B2", "o"),
    "keys": ("#009E73", "s"),
    "hidden states": ("#009E73", "s"),
    "after": ("#AA4499", "^"),
    "nothing": ("#7F7F7F", "X"),
    "": ("#D55E00", "D"),
}


def place_of(method):
    """(where a method acts, whether it can be merged) for the table."""
    found = [place for start, place in PLACES.items() if method.startswith(start)]
    return found[0] if found else ("-", "-")


def style_of(method):
    """(color, marker) of the family of a method."""
    place = place_of(method)[0]
    return next(style for start, style in COLORS.items() if place.startswith(start))


RIGHT = "right of the test rows (%)"
BY_CHARACTER = "loss on the test answers (nats per character)"
BY_TOKEN = "validation loss (nats per token)"
FLOOR = "always the commonest answer"


def results_of(task, device=None):
    """{name: its runs at the best rate}; the name tells the number of examples if it varies."""
    runs = runs_of(FOLDER / "evidence.csv", task, device)
    runs = [run for run in runs if "teacher" in run] or runs  # the first students name none
    fixed = {s.method: s.rates for s in TASKS[task][0] if len(s.rates) == 1}  # not searched
    runs = [run for run in runs if run["lr"] in fixed.get(run["method"], (run["lr"],))]
    varies = len({run["examples"] for run in runs if run["steps"]}) > 1
    best = {}
    for size in sorted({run["examples"] for run in runs}):
        at_size = at_best_rate([run for run in runs if run["examples"] == size], fresh=True)
        for method, own in at_size.items():
            best[f"{method}, {size:,} examples" if varies and size else method] = own
    return best


def measure_of(best):
    """What the runs are judged by: right answers if there are any, else a loss."""
    runs = [run for own in best.values() for run in own]
    if any(len(run["answers"]) for run in runs):
        return RIGHT
    return BY_CHARACTER if any("own_losses" in run for run in runs) else BY_TOKEN


def score_of(run, measure):
    """The scores of the test rows, (rows,), more is better; (1,) of a validation loss.

    1 for right and 0 for wrong, or a negative loss. Their mean is that of the run. A run that
    diverged has none: (0,).
    """
    if measure == RIGHT:
        return run["answers"]
    if measure == BY_CHARACTER and "own_losses" in run:
        losses = torch.tensor(run["own_losses"] + run["dialogue_losses"])
        return -losses * len(losses) / (run["own_chars"] + run["dialogue_chars"])
    if measure == BY_TOKEN and math.isfinite(run["valid_loss"] or math.inf):
        return torch.tensor([-run["valid_loss"]])
    return torch.empty(0)


def scores_of(best, measure):
    """{name: {seed: scores}}, without the runs that diverged."""
    scores = {name: {run["seed"]: score_of(run, measure) for run in best[name]} for name in best}
    return {name: {s: x for s, x in own.items() if len(x)} for name, own in scores.items()}


def mean_of(own):
    """The mean of {seed: scores}; minus infinity if all runs diverged."""
    return torch.stack(list(own.values())).mean().item() if own else -math.inf


def has_interval(own):
    """Whether there are the two seeds and two test rows that an interval takes."""
    return len(own) > 1 and min(map(len, own.values())) > 1


def ends_of(own, measure):
    """The ends of the 95 % interval, in percent or as a loss, cut where no score can be."""
    low, high = compare(torch.stack(list(own.values())))[1:3]
    if measure == RIGHT:
        return max(0.0, 100 * low), min(100.0, 100 * high)
    return max(0.0, -high), -low


def groups_of(scores):
    """The groups, from the seeds that all methods with an interval share."""
    judged = {name: own for name, own in scores.items() if has_interval(own)}
    shared = set.intersection(*map(set, judged.values())) if judged else set()
    if len(shared) < 2:
        return []
    return groups({n: torch.stack([own[s] for s in sorted(shared)]) for n, own in judged.items()})


def floor_of(task, scores):
    """The score of always giving the commonest answer to the test rows; None without labels."""
    if task not in LABELED:
        return None
    rows = max(len(score) for own in scores.values() for score in own.values())
    labels = list(LABELED[task]()["test"]["label"])[:rows]
    return Counter(labels).most_common(1)[0][1] / rows


def draw(task, best, scores, measure, floor):
    """The chart: one line for each method, best first; bars join the groups."""
    factor = 100 if measure == RIGHT else -1
    order = sorted(filter(scores.get, best), key=lambda name: mean_of(scores[name]))
    figure, axis = plt.subplots(figsize=(10, 1.6 + 0.36 * len(order)), layout="constrained")
    for y, name in enumerate(order):
        color, marker = style_of(name)
        for score in scores[name].values():
            axis.plot(factor * score.mean(), y, ".", color=color, alpha=0.5, ms=5)
        mean, ends = factor * mean_of(scores[name]), [[0.0], [0.0]]
        if has_interval(scores[name]):
            low, high = ends_of(scores[name], measure)
            ends = [[mean - low], [high - mean]]
        axis.errorbar(mean, y, xerr=ends, fmt=marker, color=color, capsize=4, ms=7)
    if floor is not None:
        axis.axvline(100 * floor, linestyle=":", color="black", label=FLOOR)
        axis.legend(loc="lower right", fontsize=8)
    right = axis.get_xlim()[1]
    width = right - axis.get_xlim()[0]
    bars = groups_of(scores)
    for number, group in enumerate(bars):
        ys = [order.index(name) for name in group]
        x = right + width * (0.02 + 0.02 * number)
        axis.plot([x, x], [min(ys) - 0.3, max(ys) + 0.3], color="black", linewidth=3)
    axis.set_yticks(range(len(order)), [f"{name} ({trainable(best[name])})" for name in order])
    axis.set_xlabel(f"{measure}; a small point for each seed")
    device = best[order[0]][0]["device"]
    meaning = "a bar joins what cannot be told apart" if bars else "too few runs to compare"
    axis.set_title(f"{task}, {device}: {meaning}", fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def trainable(runs):
    """The number of trainable parameters; "-" if no run tells it, as one that diverged."""
    found = [run["trainable"] for run in runs if run["trainable"] is not None]
    return f"{found[0]:,}" if found else "-"


def lost(run):
    """Why a run has no score."""
    return "diverged" if "diverged" in run else "not judged"


def in_words(runs, own, measure):
    """The score of a method with its interval, or with the number of its runs."""
    factor, digits = (100, 1) if measure == RIGHT else (-1, 3)
    words = []
    if own:
        spread = ", one run" if len(own) == 1 else f", {len(own)} runs"
        if has_interval(own):
            spread = " ({:.{n}f} to {:.{n}f})".format(*ends_of(own, measure), n=digits)
        words = [f"{factor * mean_of(own):.{digits}f}{spread}"]
    without = Counter(lost(run) for run in runs if run["seed"] not in own)
    return "; ".join(words + [f"{n} of {len(runs)} {why}" for why, n in without.items()])


def table(best, scores, measure, floor, costs):
    """The same as Markdown, with the costs of each method; no column without an entry."""
    lines = []
    for name, runs in best.items():
        cost = costs.get(runs[0]["method"], {})
        place, merged = place_of(name)
        costs_of_it = [cost.get(key) or "-" for key in ("step_ratio", "peak_gib", "write_ms_1")]
        lines.append((mean_of(scores[name]), [
            name, place, trainable(runs), f"{runs[0]['lr']:g}", *costs_of_it, merged,
            in_words(runs, scores[name], measure),
        ]))  # fmt: skip
    if floor is not None:
        lines.append((floor, [FLOOR, *["-"] * 7, f"{100 * floor:.1f}"]))
    lines = [line for _, line in sorted(lines, key=lambda pair: -pair[0])]
    measure += ", 95 % interval" if any(map(has_interval, scores.values())) else ""
    head = ["method", "where it acts", "trainable parameters", "rate", "step over LoRA's",
            "peak (GiB)", "write, batch 1 (ms)", "can be merged",
            measure]  # fmt: skip
    kept = [i for i in range(len(head)) if any(line[i] != "-" for line in lines)]
    return markdown([[line[i] for i in kept] for line in (head, *lines)])


def markdown(rows):
    """Lists of texts, the first of them the head, as a table."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def report(task, device=None):
    """(figure, table) of a task."""
    best = results_of(task, device)
    measure = measure_of(best)
    scores = scores_of(best, measure)
    require(any(scores.values()), f"The runs of {task} have neither answers nor losses.")
    floor = floor_of(task, scores)
    device = next(iter(best.values()))[0]["device"]
    costs = {
        row["method"]: row
        for row in all_rows(FOLDER / "cost.csv")
        if row["device"] == device and row["state"] == "as trained"
    }
    figure = draw(task, best, scores, measure, floor)
    return figure, table(best, scores, measure, floor, costs)


def command(description, make, ending=""):
    """A script that writes the figure and the table of make(task, device), and prints the table."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("task")
    parser.add_argument("--device", help="default: the one with the most runs")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    try:
        figure, text = make(options.task, options.device)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    path = options.out / f"{options.task}{ending}"
    figure.savefig(f"{path}.png", dpi=150)
    Path(f"{path}.md").write_text(text, encoding="utf-8")
    print(f"{text}\n{path}.png and .md")


def main():
    command("A chart and a table of one task.", report)


if __name__ == "__main__":
    main()
