"""One drawing of a transformer, on which every method of the course has its place."""

from typing import Any

from matplotlib.axes import Axes

from minipeft.figures.boxes import arrow, blank, box
from minipeft.figures.palette import BLACK, GREY, STYLES
from minipeft.figures.plots import show
from minipeft.refusals import require, shown

TEXTS = {
    "freezing": "only some layers are trained, here the last block, the last norm and the head",
    "prompt tuning": "trained vectors stand in front of the embedded text",
    "P-tuning": "a small encoder computes the vectors in front of the embedded text",
    "prefix-tuning": "trained keys and values stand in front of those of the text, in every block",
    "P-tuning v2": "trained keys and values in every block, or hidden states that make them",
    "adapters": "a small network after attention and after the MLP, in every block",
    "LoRA": "a low-rank product beside the query and value projections, in every block",
}
PLACES = {  # x, y, width, height, text
    "prompt tuning": [(0.5, 2.1, 2.2, 1.0, "virtual\ntokens")],
    "P-tuning": [(0.5, 0.5, 2.2, 0.9, "LSTM or MLP")],
    "prefix-tuning": [(8.4, 0.5, 2.4, 1.1, "prefix:\nkeys, values")],
    "P-tuning v2": [(4.0, 0.5, 2.5, 1.1, "virtual\nhidden states")],
    "adapters": [(12.2, 3.6, 0.8, 1.8, "adapter"), (17.0, 3.6, 0.8, 1.8, "adapter")],
    "LoRA": [(6.0, 6.8, 1.7, 0.7, "A    B"), (6.0, 1.9, 1.7, 0.7, "A    B")],
    "freezing": [],
}
ALSO = {"P-tuning": ["prompt tuning"], "P-tuning v2": ["prefix-tuning"]}  # the same place


def stack_diagram(highlight: str | None = None) -> None:
    """Draw the stack, with one method's place in its color and the other places dashed.

    highlight: a method of the course, "LoRA" for example; None marks all of them.
    Raises ValueError for another name.
    """
    require(
        highlight is None or highlight in PLACES,
        f"No method is called {shown(highlight)}; the names are {', '.join(PLACES)}.",
    )
    figure, axis = blank(22, 9)
    _frozen(axis, trained=highlight == "freezing")
    marked = set(PLACES) if highlight is None else {highlight, *ALSO.get(highlight, [])}
    for method, places in PLACES.items():
        for place in places:
            on = method in marked
            color = STYLES[highlight if on and highlight else method][0] if on else GREY
            rotation = 90 if place[-1] == "adapter" else 0
            box(axis, *place, color=color, filled=on, dashed=not on, size=8, rotation=rotation)
    _into_the_stream(axis)
    what = TEXTS[highlight] if highlight else "the place of every method of the course"
    title = f"{highlight[0].upper()}{highlight[1:]}: {what}" if highlight else what.capitalize()
    axis.text(11, 8.95, title, ha="center", va="top", fontsize=10)
    show(figure, alt=f"Diagram of a transformer, from the tokens to the logits. {title}.")


def _frozen(axis: Axes, trained: bool) -> None:
    """What the base model has: the stream, one block, the head."""
    box(axis, 3.4, 0.2, 15.2, 8.0, color=GREY)
    name = "last block, trained" if trained else "one block of many, frozen"
    axis.text(18.3, 0.4, name, ha="right", fontsize=9, color=GREY, zorder=4)
    kinds: dict[str, Any] = {"color": BLACK, "filled": True} if trained else {}
    box(axis, 0.5, 4.0, 2.2, 1.0, "embedding", size=8)
    box(axis, 4.2, 3.9, 1.1, 1.2, "norm", size=8, **kinds)
    for y, name in ((5.8, "query"), (4.1, "key"), (2.9, "value")):
        box(axis, 6.0, y, 1.7, 0.8, name, size=8, **kinds)
    box(axis, 8.7, 2.9, 1.8, 3.7, "attention\n\nsoftmax\nover keys", size=8)
    box(axis, 10.9, 3.9, 0.9, 1.2, "out", size=8, **kinds)
    box(axis, 14.2, 3.9, 1.1, 1.2, "norm", size=8, **kinds)
    box(axis, 15.6, 3.9, 1.1, 1.2, "MLP", size=8, **kinds)
    box(axis, 19.0, 3.9, 1.1, 1.2, "norm", size=8, **kinds)
    box(axis, 20.4, 3.9, 1.1, 1.2, "head", size=8, **kinds)
    for start, end in ((2.7, 4.2), (10.5, 10.9), (11.8, 13.3), (13.9, 14.2), (15.3, 15.6),
                       (16.7, 18.0), (18.4, 19.0), (20.1, 20.4), (21.5, 22.0)):  # fmt: skip
        arrow(axis, (start, 4.5), (end, 4.5))
    for y in (6.2, 4.5, 3.3):
        arrow(axis, (5.3, 4.5), (6.0, y))
        arrow(axis, (7.7, y), (8.7, y))
    for start, x in ((3.7, 13.6), (13.75, 18.2)):  # the residual stream goes around
        axis.plot([start, start, x, x], [4.5, 7.8, 7.8, 4.8], color=GREY, linewidth=1.2, zorder=4)
        axis.text(x, 4.5, "+", ha="center", va="center", fontsize=12,
                  bbox={"boxstyle": "circle,pad=0.1", "fc": "white", "ec": BLACK})  # fmt: skip
    axis.text(0.5, 5.2, "tokens", fontsize=8)
    axis.text(22.0, 5.2, "logits", fontsize=8, ha="right")


def _into_the_stream(axis: Axes) -> None:
    """Thin arrows from each place to where it acts."""
    for start, end in (((1.6, 1.4), (1.6, 2.1)), ((2.7, 2.6), (3.2, 4.4)), ((9.6, 1.6), (9.6, 2.9)),
                       ((4.6, 1.6), (3.9, 4.4)), ((7.7, 7.1), (8.2, 6.3)),
                       ((7.7, 2.3), (8.2, 3.2)), ((5.3, 4.6), (6.0, 7.0)),
                       ((5.3, 4.4), (6.0, 2.3))):  # fmt: skip
        arrow(axis, start, end, color=GREY, dashed=True)
