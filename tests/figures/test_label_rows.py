"""The diagram of a row and its labels."""

import pytest

from minipeft.figures.label_rows import label_rows


def test_the_text_says_which_positions_are_trained(shown_outputs):
    label_rows()
    label_rows("abcd", prompt=1)
    ten, four = (data["text/plain"] for data, _ in shown_outputs)
    assert "8 of them the prompt" in ten and "first 8 are -100" in ten
    assert ten.endswith("at positions 7, 8.")
    assert four.endswith("at positions 0, 1, 2.")  # the first token is never predicted


@pytest.mark.parametrize("prompt", [0, 10, -1])
def test_rows_without_prompt_or_answer_are_refused(prompt):
    with pytest.raises(ValueError, match="leave at least one token for it and one for the answer"):
        label_rows(prompt=prompt)
