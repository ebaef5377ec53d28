"""Logits are made for targets only, and they are those of the whole batch."""

import pytest
import torch

from minipeft import load_base
from minipeft.targets import logits_at_targets, send, target_places

LABELS = torch.tensor([[-100, -100, 7, 8, -100], [9, -100, -100, -100, 5]])


def batch():
    ids = torch.arange(10).view(2, 5) + 20
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": LABELS}


def test_targets_are_found_row_by_row_and_the_first_label_is_none():
    rows, columns = target_places(batch())
    assert rows.tolist() == [0, 0, 1] and columns.tolist() == [1, 2, 3]


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-bloom"])
def test_the_logits_are_those_of_a_plain_forward(name):
    model, _ = load_base(name, device="cpu", dtype=torch.float64)
    inputs = {key: tensor for key, tensor in batch().items() if key != "labels"}
    with torch.no_grad():
        output, logits, targets = logits_at_targets(model, batch())
        plain = model(**inputs).logits
    assert targets.tolist() == [7, 8, 5]
    torch.testing.assert_close(logits, plain[[0, 0, 1], [1, 2, 3]])
    assert output.logits.shape[1] == 4  # the first position predicts no target


def test_a_batch_without_a_target_gives_empty_tensors():
    model, _ = load_base("tiny", device="cpu")
    empty = batch() | {"labels": torch.full_like(LABELS, -100)}
    _, logits, targets = logits_at_targets(model, empty)
    assert logits.shape[0] == targets.shape[0] == 0


@pytest.mark.parametrize("label", [-1, 10_000])
def test_a_label_beyond_the_vocabulary_is_refused(label):
    model, _ = load_base("tiny", device="cpu")
    labels = LABELS.clone()
    labels[0, 3] = label
    with pytest.raises(ValueError, match=f"A label is {label}, but the model tells apart 0 to"):
        logits_at_targets(model, batch() | {"labels": labels})


def test_on_the_cpu_a_tensor_stays_where_it_is():
    tensor = torch.ones(2)
    assert send(tensor, torch.device("cpu")) is tensor
