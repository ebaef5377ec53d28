"""The diagram of a batch padded on either side."""

import pytest

from minipeft.figures.padding import padding_diagram


def test_the_batch_is_drawn_with_both_sides(shown_outputs):
    padding_diagram()
    padding_diagram([["a"], ["b", "c"], ["d"]])
    one, other = (data for data, _ in shown_outputs)
    assert one["image/png"].startswith(b"\x89PNG") and one["image/png"] != other["image/png"]
    for data, size in ((one, "2 rows as one batch of 5"), (other, "3 rows as one batch of 2")):
        assert size in data["text/plain"] and "on the right and on the left" in data["text/plain"]


@pytest.mark.parametrize("rows", [[], [["a"]], [["a"], []], "ab", None])
def test_rows_that_are_no_batch_are_refused(rows):
    with pytest.raises(ValueError, match="two rows of tokens or more"):
        padding_diagram(rows)
