"""One chart and one table of a task: how good every method is, what it trains and what it costs.

    python benchmarks/report.py grades [--device NAME] [--out FOLDER]

Writes results/grades.png and results/grades.md from the stored runs (evidence.csv, cost.csv).
Each method stands at its best rate, with a 95 % interval that counts seeds and test rows
(`minipeft.evidence.compare`); the seed that chose the rate is left out. Methods that share a bar at
the right cannot be told apart (`groups`); a method with fewer than two seeds has no interval and is
in no group.
"""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from minipeft.evidence import answers_of, at_best_rate, compare, groups, runs_of
from this_machine import all_rows

FOLDER = Path(__file__).resolve().parent / "results"
PLACES = {  # beginning of a method's name: (where it acts, can it be merged); "-" if not listed
    "prompt tuning": ("input vectors", "no"),
    "P-tuning v2, hidden": ("hidden states of every layer", "no"),
    "P-tuning v2": ("keys and values of every layer", "no"),
    "P-tuning": ("input vectors, by an encoder", "no"),
    "prefix-tuning": ("keys and values of every layer", "no"),
    "adapters": ("after attention and feed-forward", "no"),
    "LoRA, all linear": ("weights of all linear layers", "yes"),
    "LoRA+, all linear": ("weights of all linear layers", "yes"),
    "rsLoRA, all linear": ("weights of all linear layers", "yes"),
    "DoRA, all linear": ("weights of all linear layers", "yes"),
    "LoRA": ("weights of queries and values", "yes"),
    "biases": ("biases of all linear layers", "is the model"),
    "norms": ("weights of the norms", "is the model"),
    "head": ("output weights", "is the model"),
    "last": ("weights of the last blocks", "is the model"),
    "all blocks": ("weights of all blocks", "is the model"),
    "zero-shot": ("nothing", "is the model"),
    "question": ("nothing", "is the model"),
}
COLOURS = {  # of a family; markers beside them, so that colour is never alone
    "input vectors": ("#0072B2", "o"),
    "keys": ("#009E73", "s"),
    "after": ("#AA4499", "^"),
    "nothing": ("#7F7F7F", "X"),
    "": ("#D55E00", "D"),
}


def place_of(method):
    """(where a method acts, whether it can be merged) for the table."""
    found = [place for start, place in PLACES.items() if method.startswith(start)]
    return found[0] if found else ("-", "-")


def style_of(method):
    """(colour, marker) of the family of a method."""
    place = place_of(method)[0]
    return next(style for start, style in COLOURS.items() if place.startswith(start))


def scores(task, device=None):
    """({method: its runs at the best rate}, {method: (seeds, rows)} of those with several seeds)"""
    best = at_best_rate(runs_of(FOLDER / "evidence.csv", task, device), fresh=True)
    return best, {name: answers_of(runs) for name, runs in best.items() if len(runs) > 1}


def groups_of(judged):
    """The groups, from as many seeds as every method has."""
    seeds = min(map(len, judged.values()), default=0)
    return groups({name: answers[:seeds] for name, answers in judged.items()})


def draw(task, best, judged, made):
    """The chart: one line for each method, best first; bars join the groups."""
    order = sorted(best, key=lambda name: answers_of(best[name]).mean().item())
    figure, axis = plt.subplots(figsize=(10, 1.6 + 0.36 * len(order)), layout="constrained")
    for y, name in enumerate(order):
        colour, marker = style_of(name)
        for run in best[name]:
            axis.plot(100 * run["answers"].mean(), y, ".", color=colour, alpha=0.5, ms=5)
        mean = answers_of(best[name]).mean().item()
        half = compare(judged[name]).high - mean if name in judged else 0.0
        axis.errorbar(100 * mean, y, xerr=100 * half, fmt=marker, color=colour, capsize=4, ms=7)
    right = axis.get_xlim()[1]
    width = right - axis.get_xlim()[0]
    for number, group in enumerate(made):
        ys = [order.index(name) for name in group]
        x = right + width * (0.02 + 0.02 * number)
        axis.plot([x, x], [min(ys) - 0.3, max(ys) + 0.3], color="black", linewidth=3)
    labels = [f"{name} ({best[name][0]['trainable'] or 0:,})" for name in order]
    axis.set_yticks(range(len(order)), labels)
    axis.set_xlabel("right of the test rows (%); a small point for each seed")
    run = best[order[0]][0]
    axis.set_title(f"{task}, {run['device']}: a bar joins what cannot be told apart", fontsize=11)
    axis.grid(axis="x", alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def table(best, judged, costs):
    """The same as Markdown, with the costs of each method."""
    columns = ["method", "where it acts", "trainable parameters", "rate", "step over LoRA's",
               "peak (GiB)", "write, batch 1 (ms)", "can be merged",
               "right (%), 95 % interval"]  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in sorted(best, key=lambda name: -answers_of(best[name]).mean().item()):
        place, merged = place_of(name)
        mean = 100 * answers_of(best[name]).mean().item()
        text = f"{mean:.1f}, one run"
        if name in judged:
            found = compare(judged[name])
            text = f"{mean:.1f} ({100 * found.low:.1f} to {100 * found.high:.1f})"
        cost = costs.get(name, {})
        lines.append("| " + " | ".join([
            name, place, f"{best[name][0]['trainable'] or 0:,}", f"{best[name][0]['lr']:g}",
            *(cost.get(key) or "-" for key in ("step_ratio", "peak_gib", "write_ms_1")),
            merged, text,
        ]) + " |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description="A chart and a table of one task.")
    parser.add_argument("task")
    parser.add_argument("--device", help="default: the one with the most runs")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    best, judged = scores(options.task, options.device)
    device = next(iter(best.values()))[0]["device"]
    costs = {
        row["method"]: row
        for row in all_rows(FOLDER / "cost.csv")
        if row["device"] == device and row["state"] == "as trained"
    }
    figure = draw(options.task, best, judged, groups_of(judged))
    figure.savefig(options.out / f"{options.task}.png", dpi=150)
    (options.out / f"{options.task}.md").write_text(table(best, judged, costs), encoding="utf-8")
    print(f"{options.out / options.task}.png and .md")


if __name__ == "__main__":
    main()
