"""LoRA's two paths through one linear layer, with the matrices drawn to scale."""

from matplotlib.patches import Rectangle

from minipeft.figures.boxes import arrow, blank
from minipeft.figures.palette import BLUE, GREY, ORANGE
from minipeft.figures.plots import show
from minipeft.refusals import refuse_size


def lora_paths(d_in: int, d_out: int, r: int) -> None:
    """Draw W0 (out, in) above, A (r, in) and B (out, r) below; both paths end in one sum.

    Raises ValueError for a size that is not a positive whole number.
    """
    for name, size in (("d_in", d_in), ("d_out", d_out), ("r", r)):
        refuse_size(name, size, "size of a matrix")
    unit = 3.4 / max(d_in, d_out)  # the longer side of W0 takes 3.4 units
    wide, high, thin = d_in * unit, d_out * unit, max(r * unit, 0.06)
    figure, axis = blank(16, 8)

    def matrix(x, y, width, height, color, text, below):
        """A filled rectangle with its lower left corner at (x, y)."""
        axis.add_patch(Rectangle((x, y), width, height, color=color, alpha=0.8, zorder=3))
        place, align = (y - 0.15, "top") if below else (y + height + 0.15, "bottom")
        axis.text(x + width / 2, place, text, ha="center", va=align, color=color, fontsize=10)

    top, low = 6.0, 1.9  # the heights of the two paths
    matrix(7 - wide / 2, top - high / 2, wide, high, GREY, "", False)
    axis.text(7, top, f"W0 ({d_out}, {d_in})\nfrozen", ha="center", va="center", color="white",
              fontsize=11, fontweight="bold", zorder=4)  # fmt: skip
    matrix(6 - wide / 2, low - thin / 2, wide, thin, BLUE, f"A ({r}, {d_in}), random", True)
    matrix(9.4, low - high / 2, thin, high, ORANGE, f"B ({d_out}, {r}), zero", False)
    axis.text(0.4, 4.0, f"x\n(…, {d_in})", fontsize=11, va="center")
    axis.text(13.6, 4.0, f"h\n(…, {d_out})", fontsize=11, va="center")
    axis.text(12.6, 4.0, "+", fontsize=16, ha="center", va="center",
              bbox={"boxstyle": "circle,pad=0.15", "fc": "white", "ec": "black"})  # fmt: skip
    arrow(axis, (2.1, 4.2), (7 - wide / 2 - 0.1, top))
    arrow(axis, (7 + wide / 2 + 0.1, top), (12.2, 4.3))
    arrow(axis, (2.1, 3.8), (6 - wide / 2 - 0.1, low))
    arrow(axis, (6 + wide / 2 + 0.1, low), (9.3, low), f"(…, {r})")
    arrow(axis, (9.5 + thin, low), (12.2, 3.7))
    axis.text(11.3, 2.5, "× α / r", fontsize=11)
    arrow(axis, (13.0, 4.0), (13.5, 4.0))
    show(
        figure,
        alt=f"Two paths from x to h. Above: the frozen matrix W0, {d_out} by {d_in}. Below: the "
        f"thin matrices A, {r} by {d_in}, and B, {d_out} by {r}, drawn to the same "
        "scale, times alpha over r. The two results are added.",
    )
