"""The diagrams: every method has a place, and every figure has its alternative text."""

import matplotlib.pyplot as plt
import pytest

from minipeft.figures import STYLES, show, stack, stack_diagram


@pytest.mark.parametrize("method", [None, *stack.PLACES])
def test_the_stack_is_drawn_with_each_method(method, shown_outputs):
    stack_diagram(method)
    ((data, metadata),) = shown_outputs
    assert data["image/png"].startswith(b"\x89PNG")
    alt = metadata["image/png"]["alt"]
    assert len(alt) > 60 and (method or "every method").lower() in alt.lower()
    assert not plt.get_fignums(), "a figure that stays open is drawn twice"


def test_two_methods_give_two_pictures(shown_outputs):
    for method in stack.PLACES:
        stack_diagram(method)
    assert len({data["image/png"] for data, _ in shown_outputs}) == len(stack.PLACES)


def test_places_and_styles_have_the_same_names():
    assert stack.PLACES.keys() == stack.TEXTS.keys()
    assert stack.PLACES.keys() <= STYLES.keys()


def test_an_unknown_method_is_named_and_the_known_ones_are_listed():
    with pytest.raises(ValueError, match="'lora'; the names are .*LoRA"):
        stack_diagram("lora")


def test_a_figure_without_a_text_is_refused():
    figure, _ = plt.subplots()
    with pytest.raises(ValueError, match="what the figure shows"):
        show(figure, alt="a plot")
    plt.close(figure)
