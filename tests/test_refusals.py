"""The sentences of refusals, and that what is fine passes."""

from pathlib import Path

import pytest
import torch
from torch import nn

from minipeft.refusals import (
    refuse_flag,
    refuse_no_model,
    refuse_no_path,
    refuse_other_shapes,
    refuse_size,
    require,
    shown,
)


def test_require_raises_the_message_where_the_condition_is_false_or_empty():
    for holds in (True, 1, [0], "a", torch.tensor(True)):
        assert require(holds, "no") is None
    for fails in (False, 0, [], "", None, torch.tensor(False)):
        with pytest.raises(ValueError, match="^no$"):
            require(fails, "no")


def test_a_value_is_shown_on_one_line_and_cut():
    assert shown(1.5) == "1.5" and shown("a\nb") == "'a\\nb'"
    assert shown(nn.Sequential(nn.Tanh())) == "Sequential( (0): Tanh() )"
    assert len(shown(list(range(99)))) == 60


def test_flags_and_sizes():
    refuse_flag("double", False)
    refuse_size("r", 1, "rank")
    for value in (0, 1, None, "yes"):
        with pytest.raises(ValueError, match=f"^double={value!r} is neither True nor False.$"):
            refuse_flag("double", value)
    for value in (0, -1, 1.0, True, None, "1"):
        said = f"^r={value!r} is not a rank; give a whole number of at least 1"
        with pytest.raises(ValueError, match=said):
            refuse_size("r", value, "rank")


def test_what_is_no_model():
    refuse_no_model(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="^'gpt2' is not a model; give an nn.Module"):
        refuse_no_model("gpt2")


def test_what_is_no_path():
    refuse_no_path("folder", "runs")
    refuse_no_path("folder", Path("runs"))
    for value in (5, None, ["runs"], b"runs"):
        with pytest.raises(ValueError) as error:
            refuse_no_path("folder", value)
        assert str(error.value) == f"folder={value!r} is not a path; give a string or a Path."


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"a": torch.zeros(3, 2)}, r"a is \(3, 2\) in the adapter, and \(2, 3\) in the model"),
        ({}, "a is missing in the adapter"),
        ({"a": torch.zeros(2, 3), "b": torch.zeros(1)}, "b is .* in the adapter, and nowhere in"),
    ],
)
def test_an_adapter_of_other_shapes(state, message):
    refuse_other_shapes({"a": torch.zeros(2, 3)}, {"a": (2, 3)})
    with pytest.raises(ValueError, match=message):
        refuse_other_shapes(state, {"a": (2, 3)})
