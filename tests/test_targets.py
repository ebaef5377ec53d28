"""Logits are made for targets only, and they are those of the whole batch."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minipeft import classify, complete, load_base
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


class Products(TorchDispatchMode):
    """Counts the matrix products in its block that have one column for each word."""

    def __init__(self, vocab):
        super().__init__()
        self.vocab, self.found = vocab, Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default):
            self.found[func.overloadpacket.__name__] += out.shape[-1] == self.vocab
        return out


@pytest.mark.parametrize("frozen", [True, False])
def test_the_head_is_multiplied_once_and_not_row_by_row(frozen):
    model, tokenizer = load_base("tiny-llama", device="cpu")
    model.lm_head.requires_grad_(not frozen)
    with Products(model.config.vocab_size) as asked_for_a_slice:
        model(input_ids=batch()["input_ids"], logits_to_keep=4)
    assert asked_for_a_slice.found["bmm"] == frozen
    with Products(model.config.vocab_size) as ours:
        logits_at_targets(model, batch())
        classify(model, tokenizer, ["good", "fine"], choices=("a", "b"))
        complete(model, tokenizer, ["good", "fine"], max_new_tokens=1)
    assert ours.found["bmm"] == 0 and ours.found["mm"] == 2 + 3  # complete looks at positions first
