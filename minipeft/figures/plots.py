"""Plots that several notebooks need, and `show`, which gives a figure its alternative text."""

from collections.abc import Mapping, Sequence
from io import BytesIO

import matplotlib.pyplot as plt
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minipeft.figures.palette import BLUE, GREY, STYLES
from minipeft.refusals import require

Interval = tuple[float, float, float]  # value, low, high


def show(figure: Figure, alt: str) -> None:
    """Display a figure in a notebook, with a text for those who cannot see it, and close it.

    alt: what the figure shows, in one or two sentences: not "a line chart", but what a reader
    would take from it. Raises ValueError without a text.
    """
    require(len(alt.strip()) >= 20, "Say in `alt` what the figure shows, in a sentence or two.")
    file = BytesIO()
    figure.savefig(file, format="png", dpi=100, bbox_inches="tight")
    plt.close(figure)
    data = {"image/png": file.getvalue(), "text/plain": alt}
    display(data, raw=True, metadata={"image/png": {"alt": alt}})


def lines(axis: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    """Plot {name: (x, y)}; the name of a method brings its own color, marker and line."""
    others = iter(["-", "--", "-.", ":"] * len(curves))
    for name, (x, y) in curves.items():
        color, marker, line = STYLES.get(name, (BLUE, "", next(others)))
        many = len(x) > 20
        axis.plot(x, y, line, color=color, marker="" if many else marker, label=name)
    axis.legend(fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def intervals(axis: Axes, rows: Mapping[str, Interval], unit: str, zero: float | None = None,
              colors: Mapping[str, str] | None = None) -> None:  # fmt: skip
    """One line per row, from the top: a point with its interval and the value beside it.

    rows: {label: (value, low, high)}; zero: where to draw a line of reference.
    """
    for place, (label, (value, low, high)) in enumerate(rows.items()):
        color, marker, _ = STYLES.get(label, ((colors or {}).get(label, BLUE), "o", "-"))
        axis.errorbar(value, -place, xerr=[[value - low], [high - value]], color=color,
                      marker=marker, capsize=3)  # fmt: skip
        axis.text(high, -place, f"  {value:.3g}", va="center", fontsize=8)
    if zero is not None:
        axis.axvline(zero, color=GREY, linestyle=":")
    axis.set_yticks([-place for place in range(len(rows))], list(rows), fontsize=9)
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    axis.set_xlabel(unit)
    axis.spines[["top", "right"]].set_visible(False)


def bars(axis: Axes, rows: Mapping[str, float], unit: str,
         colors: Mapping[str, str] | None = None) -> None:  # fmt: skip
    """Horizontal bars from the top, each with its value beside it. rows: {label: value}."""
    longest = max(rows.values())
    for place, (label, value) in enumerate(rows.items()):
        color = STYLES.get(label, ((colors or {}).get(label, BLUE),))[0]
        axis.barh(-place, value, color=color, height=0.65)
        axis.text(value + 0.01 * longest, -place, f"{value:,.4g}", va="center", fontsize=8)
    axis.set_yticks([-place for place in range(len(rows))], list(rows), fontsize=9)
    axis.set_xlim(0, 1.18 * longest)
    axis.set_xlabel(unit)
    axis.spines[["top", "right"]].set_visible(False)
