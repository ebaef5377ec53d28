"""The diagram of a row and its labels."""

import pytest

from minipeft.figures.label_rows import label_rows


def test_the_text_says_which_positions_are_trained(shown_outputs):
    label_rows()
    label_rows(masked=7)
    label_rows("abcd", prompt=1, masked=0)
    right, off_by_one, unmasked = (data["text/plain"] for data, _ in shown_outputs)
    assert "8 of them the prompt" in right and right.endswith("at positions 7, 8.")
    assert "first 7 are -100" in off_by_one and off_by_one.endswith("at positions 6, 7, 8.")
    assert unmasked.endswith("at positions 0, 1, 2.")  # the first token is never predicted


@pytest.mark.parametrize(
    "arguments", [{"prompt": 0}, {"prompt": 10}, {"masked": 11}, {"masked": -1}]
)
def test_rows_without_prompt_or_answer_are_refused(arguments):
    with pytest.raises(ValueError, match="both need a prompt and an answer"):
        label_rows(**arguments)
