"""The decision tree: it draws, its words name every end, and wrong names are refused."""

import matplotlib.pyplot as plt
import pytest

from minipeft.figures import STYLES
from minipeft.figures.decision_tree import LAST, STEPS, decision_tree


@pytest.mark.parametrize("method", [None, *(step[3] for step in STEPS), LAST[1]])
def test_the_tree_is_drawn_and_told(method, shown_outputs):
    decision_tree(method)
    ((data, metadata),) = shown_outputs
    assert data["image/png"].startswith(b"\x89PNG")
    alt = metadata["image/png"]["alt"]
    for question, leaves, text, _ in STEPS:
        assert f"{question} If {leaves}: {text}.".replace("\n", " ") in alt
    assert LAST[0] in alt
    assert not plt.get_fignums(), "a figure that stays open is drawn twice"


def test_each_end_has_the_style_of_its_method_and_can_be_marked_alone(shown_outputs):
    ends = [*(step[3] for step in STEPS), LAST[1]]
    assert len(set(ends)) == len(ends) and set(ends) <= STYLES.keys()
    for method in (None, *ends):
        decision_tree(method)
    assert len({data["image/png"] for data, _ in shown_outputs}) == len(ends) + 1


def test_an_unknown_end_is_named_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match="'lora'; the ends are .*LoRA"):
        decision_tree("lora")
