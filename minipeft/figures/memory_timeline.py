"""The memory of training steps, drawn over time and part by part."""

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from minipeft.figures.palette import BLACK, BLUE, GOLD, GREEN, GREY, ORANGE, PURPLE
from minipeft.figures.plots import show
from minipeft.refusals import require, shown

GIB = 2**30
COLORS = {
    "parameters": GREY, "inputs": BLACK, "optimizer": GOLD, "gradients": GREEN,
    "activations": BLUE, "logits": PURPLE, "temporaries": ORANGE, "workspace": BLACK,
}  # fmt: skip


Phases = Sequence[tuple[str, int]]


def memory_timeline(
    parts: Mapping[str, Sequence[int]], phases: Phases, title: str,
    measured: tuple[Sequence[int], Phases] | None = None,
) -> None:  # fmt: skip
    """Draw the bytes in use after each operation, stacked by part, with the peak marked.

    An operation is drawn wider if it allocates more, or the moment of the loss could not be seen.
    parts:    {part: bytes after each operation}, lists of one length, such as `Timeline.parts()`
    phases:   [(name, number of its first operation)], such as `Timeline.phases`
    measured: what an allocator counted after each operation of the same phases, drawn as a line
    Raises ValueError for a part without a color, lists of different lengths, and no phases.
    """
    for name in parts:
        require(name in COLORS, f"No part is called {shown(name)}; {', '.join(COLORS)} are known.")
    lengths = {name: len(values) for name, values in parts.items()}
    require(len(set(lengths.values())) == 1, f"The parts need one length; they have {lengths}.")
    require(phases, "Name at least one phase, such as [('forward', 0)].")
    areas = {name: np.asarray(values) / GIB for name, values in parts.items()}
    total = np.sum(list(areas.values()), axis=0)  # (operations,)
    widths = np.diff(total, prepend=total[0]).clip(0)
    widths = 1 / len(total) + widths / max(widths.sum(), 1e-9)
    x = np.cumsum(widths) - widths  # where each operation begins, (operations,)
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    top, bottom = 1.2 * total.max(), np.zeros_like(total)
    for name, area in areas.items():
        inside = _label(axis, x, name, area, bottom, top)
        label = None if inside or area.max() < 0.01 * top else name
        axis.fill_between(x, bottom, bottom + area, step="post", linewidth=0.3, label=label,
                          facecolor=COLORS[name], edgecolor="white")  # fmt: skip
        bottom = bottom + area
    _name_phases(axis, x, phases, top)
    if measured:
        places = _at_the_same_place(measured, phases, len(total))
        axis.plot(np.interp(places, np.arange(len(x)), x), np.asarray(measured[0]) / GIB,
                  color=BLACK, linewidth=0.9, label="the allocator",
                  drawstyle="steps-post")  # fmt: skip
    peak = int(total.argmax())
    axis.plot(x[peak], total[peak], "o", color=BLACK, markersize=5)
    axis.annotate(f"peak {total[peak]:.3f} GiB", (x[peak], total[peak]), (-7, 1), ha="right",
                  textcoords="offset points", fontsize=9)  # fmt: skip
    axis.set(xlabel="operations in order, wider where they allocate more", ylabel="in use (GiB)",
             title=title, xlim=(x[0], x[-1]), ylim=(0, top), xticks=[])  # fmt: skip
    axis.spines[["top", "right"]].set_visible(False)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(0, 0.93))
    so_far = [name for name, first in phases if first <= peak]
    largest = max(areas, key=lambda name: areas[name][peak])
    show(figure, alt=f"{title}. Memory over {len(phases)} phases, stacked by part. It peaks at "
         f"{total[peak]:.3f} GiB in {so_far[-1]} number {so_far.count(so_far[-1])}, where the "
         f"largest part is {largest} with {areas[largest][peak]:.3f} GiB.")  # fmt: skip


def _label(axis: Axes, x: np.ndarray, name: str, area: np.ndarray, bottom: np.ndarray,
           top: float) -> bool:  # fmt: skip
    """Write the name of a part into its area, where that is thick for longest. Is there room?"""
    thick = np.flatnonzero(area > 0.6 * area.max())
    runs = np.split(thick, np.flatnonzero(np.diff(thick) > 1) + 1)
    left, right = max(((x[r[0]], x[r[-1]]) for r in runs if len(r)), key=lambda e: e[1] - e[0],
                      default=(0, 0))  # fmt: skip
    if area.max() < 0.1 * top or right - left < 0.1 * x[-1]:
        return False
    at = min(int(np.searchsorted(x, (left + right) / 2)), len(x) - 1)
    axis.text((left + right) / 2, bottom[at] + area[at] / 2, name, ha="center", va="center",
              color="white", fontsize=9)  # fmt: skip
    return True


def _name_phases(axis: Axes, x: np.ndarray, phases: Phases, top: float) -> None:
    """Draw a line where each phase begins, and write its name above."""
    edges = [x[min(first, len(x) - 1)] for _, first in phases] + [x[-1]]
    for (name, _), left, right in zip(phases, edges[:-1], edges[1:], strict=True):
        axis.axvline(left, color=BLACK, linestyle=":", linewidth=0.8)
        axis.text((left + right) / 2, 0.985 * top, name, ha="center", va="top", fontsize=8,
                  rotation=90 if right - left < 0.09 * x[-1] else 0)  # fmt: skip


def _at_the_same_place(
    measured: tuple[Sequence[int], Phases], phases: Phases, length: int
) -> np.ndarray:
    """For each measured operation the operation of `phases` as far into the same phase."""
    values, own = measured
    ends = [
        [first for _, first in each] + [n] for each, n in ((own, len(values)), (phases, length))
    ]
    return np.interp(np.arange(len(values)), np.array(ends[0]), np.array(ends[1]))
