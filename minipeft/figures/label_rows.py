"""One training row: its input, its labels, and which position is trained to predict which token."""

from collections.abc import Sequence

from minipeft.figures.boxes import arrow, blank, box
from minipeft.figures.palette import BLUE, GREY
from minipeft.figures.plots import show
from minipeft.refusals import require, shown

TOKENS = ("Review", ":", "A", "gem", ".", "Sent", "iment", ":", "positive", "<eos>")
WIDTH = 2.0


def label_rows(tokens: Sequence[str] = TOKENS, prompt: int = 8) -> None:
    """Draw the input row, the label row, and an arrow from each position to its target.

    prompt: how many of the tokens are the prompt; their labels are -100.
    Raises ValueError unless there is a prompt and an answer.
    """
    require(
        1 <= prompt < len(tokens),
        f"Of {len(tokens)} tokens, prompt={shown(prompt)} cannot be the prompt; leave at least one "
        "token for it and one for the answer.",
    )
    figure, axis = blank(len(tokens) * WIDTH + 2.6, 5.3)
    for y, name in ((3.4, "input"), (2.2, "predicts"), (0.9, "label")):
        axis.text(2.3, y + (0.42 if y != 2.2 else 0), name, ha="right", va="center", fontsize=9)
    trained = []
    for t, token in enumerate(tokens):
        x, target = 2.6 + t * WIDTH, t >= prompt
        color = BLUE if target else GREY
        box(axis, x + 0.08, 3.4, WIDTH - 0.16, 0.85, token, size=8, color=GREY)
        box(axis, x + 0.08, 0.9, WIDTH - 0.16, 0.85, token if target else "-100", size=8,
            color=color, filled=target, dashed=not target)  # fmt: skip
        axis.text(x + WIDTH / 2, 0.5, str(t), ha="center", va="center", fontsize=8, color=GREY)
        if t:  # position t - 1 predicts token t; nothing predicts the first
            arrow(axis, (x - WIDTH / 2, 3.4), (x + WIDTH / 2, 1.75), color=color,
                  dashed=not target)  # fmt: skip
            trained += [t - 1] if target else []
    for start, end, name in ((0, prompt, "prompt"), (prompt, len(tokens), "answer")):
        left, right = 2.6 + start * WIDTH + 0.1, 2.6 + end * WIDTH - 0.1
        axis.plot([left, right], [4.5, 4.5], color=GREY)
        axis.text((left + right) / 2, 4.65, name, ha="center", va="bottom", fontsize=9)
    axis.text(2.3, 0.5, "position", ha="right", va="center", fontsize=8, color=GREY)
    show(
        figure,
        alt=f"Diagram: a row of {len(tokens)} tokens, {prompt} of them the prompt, above its "
        f"labels, of which the first {prompt} are -100. An arrow leads from each position to the "
        f"label one place later. Trained are the predictions made at positions "
        f"{', '.join(map(str, trained))}.",
    )
