"""Which method to take, as questions from the top down; each answer ends in a method's color."""

from minipeft.figures.boxes import arrow, blank, box
from minipeft.figures.palette import BLACK, GREY, STYLES
from minipeft.figures.plots import show
from minipeft.refusals import require, shown

# (question, the answer that leaves the trunk, what is taken then, its method)
STEPS = [
    ("Does the base know the\nlanguage and the domain?", "no", "another base", "zero-shot"),
    ("Must the model itself\nbecome smaller or faster?", "yes", "distillation", "distillation"),
    ("Do all tasks have to share\none base in one batch?", "yes",
     "LoRA beside the base,\nor a prefix", "prefix-tuning"),
    ("Is there memory for all weights,\nand a copy for each task?", "yes",
     "full fine-tuning\nand LoRA: measure both", "full fine-tuning"),
]  # fmt: skip
LAST = ("LoRA on all linear layers", "LoRA")
UNSURE = "In any case: the untrained base as a floor, three seeds, a searched rate."


def decision_tree(highlight: str | None = None) -> None:
    """Draw the questions of notebook 13, and where each answer leads.

    highlight: the method whose end is filled; None fills all ends. Raises ValueError for a method
    that no end stands for.
    """
    ends = [*(step[3] for step in STEPS), LAST[1]]
    require(
        highlight is None or highlight in ends,
        f"No end of the tree is {shown(highlight)}; the ends are {', '.join(ends)}.",
    )
    figure, axis = blank(18, 15.2)

    def end(x, y, text, method):
        """A box in the color of a method."""
        filled = highlight in (None, method)
        color = STYLES[method][0] if filled else GREY
        box(axis, x, y, 6.6, 1.5, text, color=color, filled=filled, dashed=not filled, size=10)

    for i, (question, leaves, text, method) in enumerate(STEPS):
        y = 13.2 - 2.8 * i
        box(axis, 0.5, y, 7.6, 1.7, question, color=BLACK, size=10)
        end(10.9, y + 0.1, text, method)
        arrow(axis, (8.1, y + 0.85), (10.9, y + 0.85), leaves)
        arrow(axis, (4.3, y), (4.3, y - 1.1))
        axis.text(4.6, y - 0.55, "no" if leaves == "yes" else "yes", va="center", fontsize=8)
    end(1.0, 2.1, LAST[0].replace(" on ", " on\n"), LAST[1])
    axis.text(9, 0.8, UNSURE, ha="center", fontsize=10, style="italic")
    show(figure, alt=_in_words())


def _in_words() -> str:
    """The tree for those who cannot see it."""
    steps = [
        f"{question} If {leaves}: {text}.".replace("\n", " ") for question, leaves, text, _ in STEPS
    ]
    return f"Decision tree, read from the top. {' '.join(steps)} Otherwise: {LAST[0]}. {UNSURE}"
