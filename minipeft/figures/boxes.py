"""Boxes and arrows, of which the diagrams are made."""

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from minipeft.figures.palette import BLACK, GREY


def blank(width: float, height: float, scale: float = 0.5) -> tuple[Figure, Axes]:
    """An empty drawing of `width` x `height` units, without axes. scale: inches per unit."""
    figure, axis = plt.subplots(figsize=(width * scale, height * scale))
    figure.subplots_adjust(left=0, right=1, bottom=0, top=1)
    axis.set(xlim=(0, width), ylim=(0, height), aspect="equal")
    axis.axis("off")
    return figure, axis


def box(axis: Axes, x: float, y: float, width: float, height: float, text: str = "",
        color: str = GREY, filled: bool = False, dashed: bool = False,
        size: float = 9, rotation: float = 0) -> None:  # fmt: skip
    """A rounded box with its lower left corner at (x, y): an outline, or filled with white text."""
    patch = FancyBboxPatch(
        (x, y), width, height, boxstyle="round,pad=0,rounding_size=0.12", edgecolor=color,
        facecolor=color if filled else "white", linestyle="--" if dashed else "-", linewidth=1.4,
        zorder=3,
    )  # fmt: skip
    axis.add_patch(patch)
    ink = "white" if filled else (BLACK if color == GREY and not dashed else color)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", color=ink,
              fontsize=size, fontweight="bold" if filled else "normal", rotation=rotation,
              zorder=4)  # fmt: skip


def arrow(axis: Axes, start: tuple[float, float], end: tuple[float, float], text: str = "",
          color: str = BLACK, dashed: bool = False) -> None:  # fmt: skip
    """An arrow from one point to another, with a text at its middle."""
    properties = dict(arrowstyle="-|>", color=color, linestyle="--" if dashed else "-",
                      linewidth=1.2, shrinkA=0, shrinkB=0)  # fmt: skip
    axis.annotate("", end, start, arrowprops=properties)
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.1)
        axis.text(*middle, text, ha="center", va="bottom", color=color, fontsize=8)
