"""Label words, completion and the Wilson interval against independent answers."""

import pytest
import torch

from minipeft import classify, complete, load_base, wilson_interval
from minipeft.models import TINY

PROMPTS = ["a", "Review: fine\nSentiment:", "一个长一点的例子 with more bytes", "xyz", "q" * 90]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_classify_batched_equals_one_by_one(name, batch_size):
    model, tokenizer = load_base(name, device="cpu", seed=3)
    first = [tokenizer(word)["input_ids"][0] for word in (" negative", " positive")]
    truth = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        truth.append(int(logits[first[1]] > logits[first[0]]))
    assert classify(model, tokenizer, PROMPTS, batch_size=batch_size).tolist() == truth


def test_classify_leaves_the_training_mode_alone(tiny):
    model, tokenizer = tiny
    classify(model.train(), tokenizer, PROMPTS)
    assert model.training
    classify(model.eval(), tokenizer, PROMPTS)
    assert not model.training


def test_classify_refuses_what_it_cannot_answer(tiny):
    with pytest.raises(ValueError, match="cannot be told apart"):
        classify(*tiny, ["x"], choices=("good", "great"))
    with pytest.raises(ValueError, match="prompt is empty"):
        classify(*tiny, ["x", ""])
    with pytest.raises(ValueError, match="choice is empty"):
        classify(*tiny, ["x"], choices=("a", ""))
    with pytest.raises(ValueError, match="list of prompts"):
        classify(*tiny, "one string")
    assert classify(*tiny, []).tolist() == []


@pytest.mark.parametrize("name", TINY)
def test_complete_batched_equals_one_by_one(name):
    model, tokenizer = load_base(name, device="cpu", seed=1)
    truth = []
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**encoded, max_new_tokens=8, do_sample=False)
        new = out[0, encoded["input_ids"].shape[1] :]
        truth.append(tokenizer.decode(new, skip_special_tokens=True))
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=8) == truth


def test_complete_without_prompts(tiny):
    assert complete(*tiny, []) == []
    with pytest.raises(ValueError, match="prompt is empty"):
        complete(*tiny, [""])


def test_wilson_interval_by_its_definition():
    """Its ends are the shares p with |p_hat - p| = z sqrt(p (1 - p) / n)."""
    for correct, total in [(78, 100), (1, 7), (299, 300)]:
        for end in wilson_interval(correct, total):
            distance = abs(correct / total - end)
            assert distance == pytest.approx(1.96 * (end * (1 - end) / total) ** 0.5, rel=1e-9)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0
    for bad in [(1, 0), (-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match="is not a share"):
            wilson_interval(*bad)
