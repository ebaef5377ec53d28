"""The diagram of distillation: both models, both losses, one gradient."""

import pytest

from minipeft.figures import teacher_student


def test_it_is_drawn_and_its_text_says_where_the_gradient_goes(shown_outputs):
    teacher_student.teacher_student(30, 15)
    ((data, metadata),) = shown_outputs
    assert data["image/png"].startswith(b"\x89PNG")
    alt = metadata["image/png"]["alt"]
    assert "frozen teacher of 30 blocks" in alt and "student of 15 blocks" in alt
    assert "gradient reaches the student only" in alt


def test_the_drawing_names_what_the_formula_names(monkeypatch):
    texts = []
    monkeypatch.setattr(teacher_student, "show", lambda figure, alt: texts.append(figure))
    teacher_student.teacher_student(6, 2)
    drawn = [text.get_text() for text in texts[0].axes[0].texts]
    for said in ("teacher\n6 blocks", "student\n2 blocks", "softmax(v / T)", "softmax(z / T)",
                 "softmax(z)", "soft loss\nT² KL", "× α", "× (1 − α)"):  # fmt: skip
        assert said in drawn


@pytest.mark.parametrize("blocks", [(0, 1), (4, 0), (4, 1.5), (4, -1)])
def test_a_number_of_blocks_that_is_none_is_refused(blocks):
    with pytest.raises(ValueError, match="number of blocks"):
        teacher_student.teacher_student(*blocks)


def test_a_student_larger_than_its_teacher_is_refused():
    with pytest.raises(ValueError, match="larger than its teacher"):
        teacher_student.teacher_student(2, 3)
