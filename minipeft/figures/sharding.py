"""What every rank holds and sends under DDP and under the three stages of ZeRO."""

from typing import NamedTuple

from matplotlib.axes import Axes

from minipeft.figures.boxes import arrow, blank, box
from minipeft.figures.palette import BLACK, BLUE, GREEN, GREY, ORANGE
from minipeft.figures.plots import show
from minipeft.refusals import require, shown

PARTS = {"parameters": BLUE, "gradients": ORANGE, "optimizer state": GREEN}


class Stage(NamedTuple):
    """Which parts are sharded, and which collectives one step runs."""

    sharded: tuple[str, ...]
    sent: str


STAGES = {  # the collectives are those of Rajbhandari et al. 2020, section 7
    "DDP": Stage((), "all-reduce: gradients"),
    "ZeRO-1": Stage(("optimizer state",), "reduce-scatter: gradients\nall-gather: new parameters"),
    "ZeRO-2": Stage(
        ("gradients", "optimizer state"), "reduce-scatter: gradients\nall-gather: parameters, once"
    ),
    "ZeRO-3, FSDP": Stage(tuple(PARTS), "reduce-scatter: gradients\nall-gather: parameters, twice"),
}
WIDTH, CELL, BAR = 22.0, 1.9, 0.62  # of the drawing, of a part's column, of its bar
COLUMNS = (3.4, 15.0)  # where the two ranks begin


def sharding_diagram(highlight: str | None = None) -> None:
    """Draw two ranks under each strategy: a full bar is held whole, half a bar is a shard.

    highlight: a strategy of STAGES, which the others stand back from; None draws all alike.
    Raises ValueError for another name.
    """
    require(
        highlight is None or highlight in STAGES,
        f"No strategy is called {shown(highlight)}; the names are {', '.join(STAGES)}.",
    )
    height = 2.5 * len(STAGES) + 1.2
    figure, axis = blank(WIDTH, height, scale=0.45)
    _heads(axis, height)
    for row, (name, stage) in enumerate(STAGES.items()):
        y = height - 3.4 - 2.5 * row
        on = highlight in (None, name)
        axis.text(0.2, y + 0.85, name, va="center", fontsize=10, color=BLACK if on else GREY,
                  fontweight="bold" if on else "normal")  # fmt: skip
        for rank, x in enumerate(COLUMNS):
            _rank(axis, x, y, stage.sharded, rank, on)
        _between(axis, y, stage.sent, on)
    what = " ".join(
        f"{name}: {_words(stage.sharded)}; {stage.sent.replace(chr(10), ', ')}."
        for name, stage in STAGES.items()
    )
    show(figure, alt=f"What each of two ranks holds, and what a step sends. {what}")


def _words(sharded: tuple[str, ...]) -> str:
    whole = [part for part in PARTS if part not in sharded]
    return ", ".join([f"{part} sharded" for part in sharded] + [f"{part} whole" for part in whole])


def _heads(axis: Axes, height: float) -> None:
    """The names of the ranks and of the three parts."""
    for rank, x in enumerate(COLUMNS):
        axis.text(x + 1.5 * CELL, height - 0.35, f"rank {rank} holds", ha="center", va="center",
                  fontsize=10)  # fmt: skip
        for i, (part, color) in enumerate(PARTS.items()):
            axis.text(x + (i + 0.5) * CELL, height - 1.05, part.replace("optimizer ", "optim. "),
                      ha="center", va="center", fontsize=8, color=color)  # fmt: skip
    middle = (COLUMNS[0] + 3 * CELL + COLUMNS[1]) / 2
    axis.text(middle, height - 0.35, "a step sends", ha="center", va="center", fontsize=10)


def _rank(axis: Axes, x: float, y: float, sharded: tuple[str, ...], rank: int, on: bool) -> None:
    """One rank: three bars, whole or half, in a frame."""
    box(axis, x, y, 3 * CELL, 1.7, dashed=not on)
    for i, (part, color) in enumerate(PARTS.items()):
        left, bottom, tall = x + (i + (1 - BAR) / 2) * CELL, y + 0.2, 1.3
        axis.bar(left, tall, BAR * CELL, bottom, align="edge", fill=False, zorder=4,
                 edgecolor=color if on else GREY, linestyle=":", linewidth=1)  # fmt: skip
        if part in sharded:  # rank 0 has the upper half, rank 1 the lower one
            bottom, tall = bottom + (0.65 if rank == 0 else 0), 0.65
        axis.bar(left, tall, BAR * CELL, bottom, align="edge", zorder=5,
                 color=color if on else GREY, alpha=1 if on else 0.35)  # fmt: skip


def _between(axis: Axes, y: float, sent: str, on: bool) -> None:
    """The collectives of a step: one arrow to and fro for each."""
    left, right = COLUMNS[0] + 3 * CELL + 0.15, COLUMNS[1] - 0.15
    color = BLACK if on else GREY
    names = sent.split("\n")
    for i, name in enumerate(names):
        level = y + 0.85 + 0.45 * (len(names) - 1) - 0.95 * i - 0.15
        arrow(axis, (left, level), (right, level), name, color=color)
        arrow(axis, (right, level), (left, level), color=color)
