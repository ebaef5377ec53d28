"""The memory at the peak of several training steps, as bars."""

from collections.abc import Mapping

import matplotlib.pyplot as plt

from minipeft.figures.memory_timeline import COLORS, GIB
from minipeft.figures.plots import show
from minipeft.refusals import require


def memory_bars(rows: Mapping[str, Mapping[str, int]], title: str) -> None:
    """Draw one horizontal bar per row, from the top, stacked by part, with the total beside it.

    rows: {label: {part: bytes}}, such as `Memory.at_peak`. Raises ValueError without rows.
    """
    require(rows, "There is no row to draw.")
    figure, axis = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.4), layout="constrained")
    longest = max(sum(parts.values()) for parts in rows.values()) / GIB
    for place, (label, parts) in enumerate(rows.items()):
        left = 0.0
        for name, size in parts.items():
            axis.barh(label, size / GIB, left=left, color=COLORS[name], edgecolor="white",
                      height=0.7)  # fmt: skip
            if size / GIB > 0.12 * longest and place == 0:
                axis.text(left + size / GIB / 2, place, name, ha="center", va="center",
                          fontsize=8, color="white")  # fmt: skip
            left += size / GIB
        axis.text(left + 0.01 * longest, place, f"{left:.2f}", va="center", fontsize=8)
    drawn = {
        name for parts in rows.values() for name in parts if parts[name] > 0.01 * longest * GIB
    }
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLORS[n]) for n in COLORS if n in drawn]
    axis.legend(handles, [n for n in COLORS if n in drawn], fontsize=8, loc="lower right")
    axis.invert_yaxis()
    axis.set(xlabel="in use at the peak (GiB)", xlim=(0, 1.1 * longest), title=title)
    axis.spines[["top", "right"]].set_visible(False)
    sizes = ", ".join(f"{k} {sum(parts.values()) / GIB:.2f}" for k, parts in rows.items())
    show(figure, alt=f"{title}. Bars stacked by part; totals in GiB: {sizes}.")
