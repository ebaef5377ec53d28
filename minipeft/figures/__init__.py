"""What the notebooks' figures share: one palette, one style for each method, the same diagrams.

Needs matplotlib, which comes with `pip install "minipeft[course]"`.
"""

from minipeft.figures.boxes import arrow, blank, box
from minipeft.figures.palette import BLACK, BLUE, GOLD, GREEN, GREY, ORANGE, PURPLE, STYLES, style
from minipeft.figures.plots import bars, intervals, lines, show
from minipeft.figures.stack import stack_diagram

__all__ = [
    "BLACK",
    "BLUE",
    "GOLD",
    "GREEN",
    "GREY",
    "ORANGE",
    "PURPLE",
    "STYLES",
    "arrow",
    "bars",
    "blank",
    "box",
    "intervals",
    "lines",
    "show",
    "stack_diagram",
    "style",
]
