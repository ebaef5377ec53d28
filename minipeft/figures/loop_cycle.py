"""The training loop as a cycle: what one step does, in order, and what each part prevents."""

from typing import NamedTuple

from matplotlib.axes import Axes

from minipeft.figures.boxes import arrow, blank, box
from minipeft.figures.palette import BLACK, BLUE, GREEN, GREY, ORANGE
from minipeft.figures.plots import show
from minipeft.refusals import require, shown

WIDTH, HEIGHT, TALL = 22.0, 9.6, 1.3  # of the drawing, and of a box
TOP, BOTTOM, BELOW = 6.6, 3.3, 0.5  # where the rows of boxes stand


class Part(NamedTuple):
    """A box of the cycle, what it prevents, and whether every loop has it."""

    x: float
    y: float
    width: float
    text: str
    prevents: str
    always: bool = True


PARTS = {  # in the order of one step; the ten-line loop has those that are always there
    "batch": Part(0.5, TOP, 3.6, "batch", ""),
    "forward": Part(5.6, TOP, 3.2, "forward", ""),
    "loss": Part(10.3, TOP, 4.6, "loss / all targets", "short answers weigh more"),
    "backward": Part(16.4, TOP, 3.6, "backward", ""),
    "clip": Part(16.4, BOTTOM, 3.6, "clip", "a bad batch sets it back"),
    "step": Part(10.8, BOTTOM, 3.6, "step", ""),
    "zero_grad": Part(5.6, BOTTOM, 3.2, "zero_grad", "old gradients pile up"),
    "evaluate": Part(0.5, BOTTOM, 3.6, "evaluate,\nkeep the best", "overfitting", False),
    "schedule": Part(10.3, BELOW, 4.6, "warm-up, then decay", "first steps too long", False),
    "decay groups": Part(16.1, BELOW, 4.2, "decay groups", "norms shrink", False),
    "checkpoint": Part(0.5, BELOW, 3.6, "checkpoint", "a lost run", False),
}
CYCLE = ["batch", "forward", "loss", "backward", "clip", "step", "zero_grad", "evaluate"]


def loop_cycle(highlight: str | None = None) -> None:
    """Draw the loop. Solid boxes are in every loop, dashed ones are added; below: what for.

    highlight: a part of PARTS to draw filled. Raises ValueError for another name.
    """
    require(
        highlight is None or highlight in PARTS,
        f"No part of the loop is called {shown(highlight)}; the names are {', '.join(PARTS)}.",
    )
    figure, axis = blank(WIDTH, HEIGHT)
    for name, part in PARTS.items():
        color = BLUE if part.always else GREEN
        box(axis, part.x, part.y, part.width, TALL, part.text, color=color,
            filled=name == highlight, dashed=not part.always, size=9)  # fmt: skip
        if part.prevents:
            axis.text(part.x + part.width / 2, part.y - 0.12, f"without it: {part.prevents}",
                      ha="center", va="top", fontsize=8, color=GREY)  # fmt: skip
    _arrows(axis)
    order = ", ".join(PARTS[name].text.replace("\n", " ") for name in CYCLE)
    what = "; ".join(f"{name}, without it {p.prevents}" for name, p in PARTS.items() if p.prevents)
    lit = f" Highlighted: {highlight}." if highlight else ""
    alt = (
        f"The training loop as a cycle: {order}, and the next batch. Accumulation goes from "
        f"backward to the next batch. What parts are for: {what}.{lit}"
    )
    show(figure, alt=alt)


def _arrows(axis: Axes) -> None:
    """One step around the cycle, the detour of accumulation, and what goes into a step."""
    for first, second in zip(CYCLE, CYCLE[1:] + CYCLE[:1], strict=True):
        a, b = PARTS[first], PARTS[second]
        onward, middle = a.x < b.x, TALL / 2
        if a.y == b.y:
            start = (a.x + a.width if onward else a.x, a.y + middle)
            arrow(axis, start, (b.x if onward else b.x + b.width, b.y + middle))
        else:
            up = b.y > a.y
            x = a.x + a.width / 2
            arrow(axis, (x, a.y + TALL if up else a.y), (x, b.y if up else b.y + TALL))
    left, right = (PARTS[name].x + PARTS[name].width / 2 for name in ("batch", "backward"))
    top, above = TOP + TALL, TOP + TALL + 0.9
    axis.plot([right, right, left], [top, above, above], color=ORANGE, linestyle="--")
    arrow(axis, (left, above), (left, top), color=ORANGE, dashed=True)
    axis.text((left + right) / 2, above + 0.1, "accumulation: the next small batch, no step yet",
              ha="center", va="bottom", fontsize=9, color=ORANGE)  # fmt: skip
    step, under = PARTS["step"], BELOW + TALL
    x = step.x + step.width / 2
    axis.plot([x, x], [under, BOTTOM], color=GREEN, linestyle="--", linewidth=1.2, zorder=1)
    arrow(axis, (x, BOTTOM - 0.3), (x, BOTTOM), color=GREEN)
    groups = PARTS["decay groups"]
    arrow(axis, (groups.x, under - 0.2), (step.x + step.width - 0.3, BOTTOM), color=GREEN,
          dashed=True)  # fmt: skip
    save = PARTS["checkpoint"]
    middle = save.x + save.width / 2
    arrow(axis, (middle - 1.65, BOTTOM), (middle - 1.65, under), color=GREEN, dashed=True)
    axis.text(11, HEIGHT - 0.05, "One step of training", ha="center", va="top", fontsize=11,
              color=BLACK)  # fmt: skip
