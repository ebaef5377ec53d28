"""What a method gains on a task against what it forgets, at every learning rate that was tried.

    python benchmarks/forgetting.py grades [--device NAME] [--out FOLDER]

Gain: points over the untrained model on the test rows. Forgotten: the rise of the loss on English
dialogues and on plain text. The question is that of Biderman et al. 2024, arXiv 2405.09673: does a
method that forgets less only learn less? So all rates are shown. Each point is one run, of the seed
that searched the rate. Writes results/grades-forgetting.png and .md, and prints the table. Tasks
that measure these losses: `grades` and `transfer`.
"""

from matplotlib import pyplot as plt

from minipeft.evidence import at_best_rate, runs_of
from minipeft.refusals import require
from report import FOLDER, command, lost, markdown, style_of

LOSSES = {  # {text: what its loss is called in the details}
    "English dialogues": ("dialogue_loss", "chat_loss"),
    "plain text": ("text_loss",),
}


def loss_of(run, text):
    """The loss of a run on a kind of text, or None."""
    return next((run[key] for key in LOSSES[text] if key in run), None)


def forgotten(task, device=None):
    """The runs of the seed that searched, with three keys more: best, gain, rises.

    best: is it the rate of the lowest validation loss? gain: points over the untrained model; None
    if the run was not judged. rises: {text: nats per token over the untrained model, or None}.
    Raises ValueError for a task that measures no loss on other texts.
    """
    runs = runs_of(FOLDER / "evidence.csv", task, device)
    untrained = next((run for run in runs if run["method"] == "zero-shot"), {})
    require(
        any(loss_of(untrained, text) is not None for text in LOSSES),
        f"No run of {task} tells the loss of the untrained model on other texts.",
    )
    points = []
    for method, chosen in at_best_rate([run for run in runs if run["steps"]]).items():
        own = [run for run in runs if run["method"] == method]
        first = min(run["seed"] for run in own)
        for run in sorted((r for r in own if r["seed"] == first), key=lambda run: run["lr"]):
            change = run["answers"].mean() - untrained["answers"].mean()
            both = {text: (loss_of(run, text), loss_of(untrained, text)) for text in LOSSES}
            points.append(run | {
                "best": run["lr"] == chosen[0]["lr"],
                "gain": 100 * change.item() if len(run["answers"]) else None,
                "rises": {t: None if None in two else two[0] - two[1] for t, two in both.items()},
            })  # fmt: skip
    require(points, f"No trained run of {task} is there yet.")
    return points


def draw(task, points):
    """Gain against rise for each text: a line joins the rates of a method, a number names it."""
    texts = [text for text in LOSSES if any(p["rises"][text] is not None for p in points)]
    figure, axes = plt.subplots(
        1, len(texts), figsize=(4 + 5 * len(texts), 6), layout="constrained", squeeze=False
    )
    methods = list(dict.fromkeys(point["method"] for point in points))
    for axis, text in zip(axes[0], texts, strict=True):
        for number, method in enumerate(methods, 1):
            own = [p for p in points if p["method"] == method and p["gain"] is not None]
            own = [p for p in own if p["rises"][text] is not None]
            color, marker = style_of(method)
            place = [p["rises"][text] for p in own], [p["gain"] for p in own]
            axis.plot(*place, f"{marker}-", color=color, ms=5, lw=0.8, label=f"{number} {method}")
            for p in own:
                if p["best"]:
                    axis.annotate(number, (p["rises"][text], p["gain"]), (4, 4),
                                  textcoords="offset points", weight="bold")  # fmt: skip
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set_xlabel(f"rise of the loss on {text} (nats per token)")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("gain over the untrained model (points)")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    figure.suptitle(
        f"{task}, {points[0]['device']}: one run at each rate; the number is at the best one",
        fontsize=11,
    )
    return figure


def table(points):
    """The same as Markdown."""
    rows = [["method", "rate", "best rate", "gain (points)",
             *(f"rise on {text} (nats per token)" for text in LOSSES)]]  # fmt: skip
    for p in points:
        gain = lost(p) if p["gain"] is None else f"{p['gain']:+.1f}"
        rises = ["-" if rise is None else f"{rise:+.3f}" for rise in p["rises"].values()]
        rows.append([p["method"], f"{p['lr']:g}", "yes" if p["best"] else "", gain, *rises])
    return markdown(rows)


def drawn(task, device=None):
    """(figure, table) of a task."""
    points = forgotten(task, device)
    return draw(task, points), table(points)


def main():
    command("Gain against forgetting, at every rate.", drawn, "-forgetting")


if __name__ == "__main__":
    main()
