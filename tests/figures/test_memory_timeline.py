"""The pictures of a step's memory: they say the peak, and refuse what cannot be drawn."""

import numpy as np
import pytest

from minipeft.figures.memory_bars import memory_bars
from minipeft.figures.memory_timeline import _at_the_same_place, memory_timeline

GIB = 2**30
PARTS = {
    "parameters": [GIB] * 6,
    "activations": [0, GIB, 2 * GIB, GIB, 0, 0],
    "logits": [0, 0, 3 * GIB, 0, 0, 0],
}
PHASES = [("forward", 0), ("backward", 2), ("forward", 5)]


def alts(outputs):
    """The alternative texts that `show` hands to the notebook."""
    return [metadata["image/png"]["alt"] for _, metadata in outputs]


@pytest.mark.parametrize("measured", [None, ([GIB] * 12, [(n, 2 * at) for n, at in PHASES])])
def test_the_text_says_where_the_peak_is(shown_outputs, measured):
    memory_timeline(PARTS, PHASES, "A step", measured=measured)
    assert alts(shown_outputs) == [
        "A step. Memory over 3 phases, stacked by part. It peaks at 6.000 GiB in backward number "
        "1, where the largest part is logits with 3.000 GiB."
    ]


def test_measured_operations_are_drawn_in_their_phases():
    own = [("forward", 0), ("backward", 6), ("forward", 8)]
    places = _at_the_same_place(([0] * 9, own), PHASES, 6)
    assert np.allclose(places[[0, 3, 6, 7, 8]], [0, 1, 2, 3.5, 5])


@pytest.mark.parametrize(
    "parts, phases, told",
    [
        ({"weights": [1]}, PHASES, "'weights'; parameters"),
        ({"logits": [1, 2], "inputs": [1]}, PHASES, "one length; they have"),
        ({"logits": [1, 2]}, [], "at least one phase"),
    ],
)
def test_what_cannot_be_drawn_is_refused(parts, phases, told):
    with pytest.raises(ValueError, match=told):
        memory_timeline(parts, phases, "A step")


def test_bars_say_their_totals_and_need_a_row(shown_outputs):
    memory_bars({"full": {"parameters": GIB, "logits": GIB}, "LoRA": {"parameters": GIB}}, "Peaks")
    assert alts(shown_outputs) == [
        "Peaks. Bars stacked by part; totals in GiB: full 2.00, LoRA 1.00."
    ]
    with pytest.raises(ValueError, match="no row"):
        memory_bars({}, "Peaks")
