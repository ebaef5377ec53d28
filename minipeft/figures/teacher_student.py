"""Distillation drawn: one input, two models, two losses, and a gradient for one of the models."""

from minipeft.figures.boxes import arrow, blank, box
from minipeft.figures.palette import BLACK, BLUE, GREY, ORANGE
from minipeft.figures.plots import show
from minipeft.refusals import refuse_size, require


def teacher_student(teacher_blocks: int, student_blocks: int) -> None:
    """Draw the way from the input to the loss, and the way of the gradient back to the student.

    Raises ValueError for numbers of blocks that are not positive and whole, and for a student with
    more blocks than its teacher.
    """
    for name, size in (("teacher_blocks", teacher_blocks), ("student_blocks", student_blocks)):
        refuse_size(name, size, "number of blocks")
    require(
        student_blocks <= teacher_blocks,
        f"A student of {student_blocks} blocks is larger than its teacher of {teacher_blocks}.",
    )
    figure, axis = blank(18, 8.4)
    box(axis, 0.2, 4.2, 1.7, 1.3, "the same\ninput", color=BLACK)
    box(axis, 2.9, 6.2, 3.1, 1.4, f"teacher\n{teacher_blocks} blocks", filled=True)
    box(axis, 2.9, 2.6, 3.1, 1.4, f"student\n{student_blocks} blocks", ORANGE, filled=True)
    axis.text(4.45, 7.8, "frozen, no gradient", ha="center", va="bottom", fontsize=9, color=GREY)
    arrow(axis, (1.9, 5.2), (2.8, 6.6))
    arrow(axis, (1.9, 4.5), (2.8, 3.5))

    box(axis, 7.0, 6.4, 1.7, 1.0, "logits v")
    box(axis, 7.0, 2.8, 1.7, 1.0, "logits z", ORANGE)
    box(axis, 9.7, 6.4, 2.7, 1.0, "softmax(v / T)")
    box(axis, 9.7, 3.9, 2.7, 1.0, "softmax(z / T)", ORANGE)
    box(axis, 9.7, 1.9, 2.7, 1.0, "softmax(z)", ORANGE)
    box(axis, 9.7, 0.3, 2.7, 1.0, "label", BLACK)
    for start, end in (
        ((6.0, 6.9), (6.9, 6.9)),
        ((6.0, 3.3), (6.9, 3.3)),
        ((8.7, 6.9), (9.6, 6.9)),
        ((8.7, 3.5), (9.6, 4.3)),
        ((8.7, 3.1), (9.6, 2.5)),
        ((12.4, 6.7), (13.2, 6.0)),
        ((12.4, 4.5), (13.2, 5.2)),
        ((12.4, 2.3), (13.2, 1.9)),
        ((12.4, 0.8), (13.2, 1.3)),
    ):
        arrow(axis, start, end)

    box(axis, 13.3, 5.0, 2.5, 1.2, "soft loss\nT² KL", BLUE, filled=True)
    box(axis, 13.3, 1.0, 2.5, 1.2, "hard loss\ncross-entropy", BLUE, filled=True)
    box(axis, 16.4, 3.0, 1.5, 1.2, "loss", BLACK, filled=True)
    arrow(axis, (15.2, 4.9), (16.6, 4.3))
    arrow(axis, (15.2, 2.3), (16.6, 2.9))
    axis.text(16.1, 4.75, "× (1 − α)", fontsize=9)
    axis.text(16.1, 2.25, "× α", fontsize=9)
    axis.plot([17.4, 17.4, 4.4], [2.9, -0.2, -0.2], "--", color=ORANGE, linewidth=1.6)
    arrow(axis, (4.4, -0.25), (4.4, 2.5), color=ORANGE, dashed=True)
    axis.text(4.7, 0.6, "the gradient reaches\nthe student only", color=ORANGE, fontsize=9)
    axis.set_ylim(-0.5, 8.4)
    show(
        figure,
        alt=f"The same input goes into a frozen teacher of {teacher_blocks} blocks and a student "
        f"of {student_blocks} blocks. Both logits, divided by T and put through a softmax, meet in "
        "the soft loss, T squared times KL. The student's softmax without T meets the label in the "
        "hard loss. The loss is alpha times hard plus 1 minus alpha times soft, and its gradient "
        "reaches the student only.",
    )
