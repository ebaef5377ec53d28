"""Rows that would train wrong in silence are refused, and the others come out as tensors."""

import pytest
import torch

from minipeft import Collator
from minipeft.row_checks import checked, of_whole_rows


def test_lists_and_tensors_come_out_as_the_same_tensors():
    lists = {"input_ids": [5, 6], "labels": [-100, 6], "token_type_ids": [0, 1], "text": "ab"}
    tensors = {name: torch.tensor(v) for name, v in lists.items() if name != "text"}
    for row in (lists, tensors):
        (new,) = checked([row])
        assert set(new) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
        for name, value in tensors.items():
            assert new[name].dtype == torch.int64 and torch.equal(new[name], value)
        assert new["attention_mask"].tolist() == [1, 1]
    assert set(lists) == {"input_ids", "labels", "token_type_ids", "text"}, "the row is as it was"


def test_token_type_ids_that_some_rows_lack_are_refused():
    rows = [{"input_ids": [5], "token_type_ids": [0]}, {"input_ids": [6]}]
    with pytest.raises(ValueError, match="rows with token_type_ids in all of them or in none"):
        checked(rows)


def test_labels_of_whole_rows_are_told_from_labels_of_tokens():
    tokens, classes = [torch.tensor([1, 2])], [torch.tensor(1), torch.tensor(0)]
    numbers, several = [torch.tensor(0.5)], [torch.tensor([1.0, 0.0])]
    assert [of_whole_rows(v) for v in (tokens, classes, numbers, several)] == [False] + [True] * 3
    assert not of_whole_rows([classes[0], tokens[0]])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "needs rows"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], "all of them or in none"),
        ([{"input_ids": []}], "Row 0 of the batch is empty"),
        ([{"input_ids": [1, 0], "attention_mask": [1, 0]}], "holds padding already"),
        ([{"input_ids": [1, 0], "attention_mask": [0, 0]}], "nothing but padding"),
        ([{"input_ids": [1, 2], "labels": [2]}], "2 input_ids but 1 labels"),
        ([{"input_ids": [1, 2], "labels": [-100, -100]}], "no target"),
        ([{"input_ids": [1, 2], "labels": [1, -100]}], "no target"),
        (
            [{"input_ids": [1], "labels": 1}, {"input_ids": [1, 2], "labels": [1, 2]}],
            r"labels \(\)",
        ),
        ([{"input_ids": [1], "labels": -1}], "a class is a whole number of at least 0"),
        ([{"input_ids": [1], "labels": -100}], "a class is a whole number of at least 0"),
        ([{"input_ids": [1], "labels": float("nan")}], "finite numbers"),
        ([{"input_ids": [1], "labels": True}], "labels True; give whole numbers"),
        ([{"input_ids": [1], "labels": "1"}], "labels '1'; give whole numbers"),
        (
            [{"input_ids": [1], "labels": [0.5]}, {"input_ids": [1], "labels": 0.5}],
            "as many in each",
        ),
        ([{"input_ids": [1, 2], "labels": [5, -7]}], "-7 among its labels"),
        ([{"input_ids": [1, -2]}], "-2 among its input_ids"),
        ([{"input_ids": [1.5, 2.0]}], "of torch.float32; give one list of whole numbers"),
        ([{"input_ids": [[1, 2]]}], r"\(1, 2\) of torch.int64; give one list"),
        ([{"input_ids": [1, 2], "token_type_ids": [0]}], "2 input_ids but 1 token_type_ids"),
        ([{"input_ids": None}], "input_ids None; give whole numbers"),
        ([{"prompt": "a"}], "without input_ids; encode it"),
    ],
)
@pytest.mark.parametrize("check", [checked, Collator(0)])
def test_rows_that_cannot_be_trained_on_are_refused(check, rows, message):
    with pytest.raises(ValueError, match=message):
        check(rows)
