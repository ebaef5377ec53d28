"""Two rows of unequal length as a batch, padded on the right and on the left."""

from collections.abc import Sequence

from matplotlib.axes import Axes

from minipeft.figures.boxes import arrow, blank, box
from minipeft.figures.palette import BLUE, GREY, ORANGE
from minipeft.figures.plots import show
from minipeft.refusals import require, shown

ROWS = (("A", "gem"), ("Not", "my", "kind", "of", "film"))
WIDTH, HEIGHT = 1.45, 2.7  # of a column, and of a row with its mask and positions


def padding_diagram(rows: Sequence[Sequence[str]] = ROWS) -> None:
    """Draw a batch twice, padded right and left, with attention mask and position ids.

    rows: the tokens of each row, as texts. Raises ValueError unless there are two rows or more,
    none of them empty.
    """
    lists = isinstance(rows, list | tuple) and all(isinstance(r, list | tuple) for r in rows)
    require(
        lists and len(rows) >= 2 and all(rows),
        f"A batch is drawn from two rows of tokens or more, none empty; got {shown(rows)}.",
    )
    seq = max(map(len, rows))
    panel = seq * WIDTH + 2.4  # room for the arrow that leads out of the batch
    height = len(rows) * HEIGHT + 1.1
    figure, axis = blank(2 * panel + 1.9, height)
    for number, side in enumerate(("right", "left")):
        x = 1.9 + number * panel
        axis.text(x + seq * WIDTH / 2, height - 0.1, f"padded on the {side}", ha="center",
                  va="top", fontsize=10, fontweight="bold")  # fmt: skip
        for place, tokens in enumerate(rows):
            y = height - 1.9 - place * HEIGHT
            if number == 0:
                for below, name in ((0.4, "tokens"), (-0.5, "mask"), (-1.1, "positions")):
                    axis.text(1.7, y + below, name, ha="right", va="center", fontsize=8)
            _row(axis, x, y, tokens, seq, side)
    show(
        figure,
        alt=f"Diagram: {len(rows)} rows as one batch of {seq} columns, padded on the right and on "
        "the left. The mask is 1 at tokens and 0 at padding. Position ids count the tokens from "
        "0 on either side. Generation continues after the last column, which in the batch padded "
        "on the right is padding for the shorter rows.",
    )


def _row(axis: Axes, x: float, y: float, tokens: Sequence[str], seq: int, side: str) -> None:
    """One row from (x, y): a box for each column, with its mask and position id below."""
    missing = seq - len(tokens)
    start = missing if side == "left" else 0
    for column in range(seq):
        real = start <= column < start + len(tokens)
        text = tokens[column - start] if real else "pad"
        color = BLUE if real else GREY
        left = x + column * WIDTH
        box(axis, left + 0.05, y, WIDTH - 0.1, 0.85, text, color, filled=real, dashed=not real,
            size=8)  # fmt: skip
        position = min(max(column - start, 0), len(tokens) - 1)
        for below, number in ((-0.5, int(real)), (-1.1, position)):
            axis.text(left + WIDTH / 2, y + below, str(number), ha="center", va="center",
                      fontsize=9, color=color)  # fmt: skip
    end, padded = x + seq * WIDTH, missing and side == "right"
    arrow(axis, (end + 0.05, y + 0.42), (end + 0.75, y + 0.42), color=ORANGE if padded else BLUE)
    says = "follows\npadding" if padded else "next\ntoken"
    axis.text(end + 0.85, y + 0.42, says, va="center", fontsize=8,
              color=ORANGE if padded else BLUE)  # fmt: skip
