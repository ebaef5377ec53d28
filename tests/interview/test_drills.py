"""Drills: the same in both languages, graded within 10 %, and right by another way of computing."""

import math
import re
from collections import Counter

import pytest
import torch
from scipy import stats
from transformers import (
    AutoModelForCausalLM,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)  # fmt: skip

from minipeft import (
    add_adapters,
    add_lora,
    add_prefix_tuning,
    add_prompt_tuning,
    count_parameters,
)  # fmt: skip
from minipeft.interview.drills import KINDS, draw
from minipeft.interview.estimates import estimate_gib
from minipeft.memory.shapes import ALL_LINEAR, shape_of

EACH = pytest.mark.parametrize("kind", KINDS)


def numbers(text):
    return [float(each.replace(",", "")) for each in re.findall(r"\d+(?:,\d{3})*(?:\.\d+)?", text)]


@EACH
def test_a_drill_is_the_same_in_both_languages_and_for_the_same_seed(kind):
    for seed in range(1 if kind.endswith("_step") else 8):
        drill = draw(seed, kind)
        assert drill == draw(seed, kind)
        for texts in (drill.question, drill.steps):
            assert Counter(numbers(texts["en"])) == Counter(numbers(texts["zh"]))
            assert not re.search("[\u4e00-\u9fff]", texts["en"])
        assert re.search("[\u4e00-\u9fff]", drill.question["zh"])
        assert math.isfinite(drill.answer) and drill.answer > 0
        close = [
            n for n in numbers(drill.steps["en"]) if abs(n - drill.answer) <= 0.02 * drill.answer
        ]
        assert close, "the steps lead to the answer"


def test_there_are_many_kinds_and_seeds_differ():
    assert len(KINDS) >= 25
    assert len({draw(seed).question["en"] for seed in range(20)}) > 15


def test_grading_allows_ten_percent_and_refuses_words():
    drill = draw(0, "logits")
    assert drill.right(drill.answer * 1.09) and drill.right(f"{drill.answer * 0.91:,}")
    assert not drill.right(drill.answer * 1.11) and not drill.right(-drill.answer)
    for text in ("a lot", "12,5", "nan", ""):
        with pytest.raises(ValueError, match="is not a number"):
            drill.right(text)
    with pytest.raises(ValueError, match="no drill 'poetry'"):
        draw(0, "poetry")


def model(name):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(shape_of(name))


NAME = re.compile(r"SmolLM2 135M|TinyLlama 1.1B|Llama 2 \d+B|Llama 3 8B")


@pytest.mark.parametrize(
    "kind,number,add",
    [
        ("lora_parameters", r"r = (\d+)", lambda base, r: add_lora(base, r)),
        ("lora_everywhere", r"r = (\d+)", lambda base, r: add_lora(base, r, targets=ALL_LINEAR)),
        ("prefix_parameters", r"of (\d+) virtual", add_prefix_tuning),
        ("prompt_parameters", r"of (\d+) virtual", add_prompt_tuning),
        ("adapter_parameters", r"bottleneck (\d+)", add_adapters),
    ],
)
def test_counts_are_those_of_real_modules(kind, number, add):
    for seed in range(4):
        drill = draw(seed, kind)
        shape = NAME.search(drill.question["en"])[0]
        tuned = add(model(shape), int(re.search(number, drill.question["en"])[1]))
        unit = 1 if kind == "prompt_parameters" else 1e6
        assert drill.answer == pytest.approx(count_parameters(tuned)[0] / unit)


def test_parameters_of_a_model():
    for seed in range(5):
        drill = draw(seed, "model_parameters")
        shape = NAME.search(drill.steps["en"])[0]
        assert drill.answer == pytest.approx(count_parameters(model(shape))[1] / 1e6)


def test_the_memory_of_a_step_is_that_of_estimate():
    drill = draw(1, "checkpointed_step")
    found = re.search(r"(\d) x ([\d,]+) tokens", drill.question["en"])
    answer = estimate_gib(
        NAME.search(drill.question["en"])[0], "lora", r=16, targets="all", dtype="bfloat16",
        batch=int(found[1]), seq=int(found[2].replace(",", "")), checkpointing=True,
        nf4="NF4" in drill.question["en"],
    )  # fmt: skip
    assert drill.right(answer) and drill.answer == pytest.approx(answer)


def test_schedules_are_those_of_transformers():
    def factor(schedule, step):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        return schedule(optimizer).lr_lambdas[0](step)

    for seed in range(6):
        text = draw(seed, "linear_rate")
        warmup, total, step = (
            int(re.search(pattern, text.question["en"])[1])
            for pattern in (r"over (\d+) steps", r"0 at step (\d+)", r"rate at step (\d+)")
        )
        peak = float(re.search(r"steps to ([\d.e-]+),", text.question["en"])[1])
        linear = lambda o: get_linear_schedule_with_warmup(o, warmup, total)  # noqa: B023, E731
        assert text.answer == pytest.approx(1e6 * peak * factor(linear, step))
        text = draw(seed, "cosine_rate")
        peak = float(re.search(r"from ([\d.e-]+) at", text.question["en"])[1])
        total, step = (int(re.search(pattern, text.question["en"])[1])
                       for pattern in (r"0 at step (\d+)", r"rate at step (\d+)"))  # fmt: skip
        cosine = lambda o: get_cosine_schedule_with_warmup(o, 0, total)  # noqa: B023, E731
        assert text.answer == pytest.approx(1e6 * peak * factor(cosine, step))


def test_intervals_are_those_of_scipy():
    drill = draw(2, "three_seeds")
    scores = numbers(drill.question["en"].partition(" score ")[2])[:3]
    low, high = stats.t.interval(0.95, 2, loc=0, scale=stats.sem(scores))
    assert drill.answer == pytest.approx((high - low) / 2, rel=1e-3)
    drill = draw(2, "half_width")
    right, rows = numbers(drill.question["en"])[:2]
    low, high = stats.binomtest(int(right * rows / 100), int(rows)).proportion_ci(method="wilson")
    assert drill.right(50 * (high - low))
    drill = draw(2, "rows_needed")
    right, points = (float(re.search(pattern, drill.question["en"])[1])
                     for pattern in (r"near (\d+) %", r"as (\d+) point"))  # fmt: skip
    spread = math.sqrt(right / 100 * (1 - right / 100) / drill.answer)
    assert stats.norm.ppf(0.975) * spread == pytest.approx(points / 100, rel=1e-3)


def test_tensors_have_the_bytes_that_are_asked_for():
    drill = draw(3, "logits")
    vocab, _, batch, seq = numbers(drill.question["en"].partition("vocabulary")[2])[:4]
    size = torch.empty(int(batch), int(seq), int(vocab), device="meta").nbytes
    assert drill.answer == pytest.approx(size / 2**30)
    drill = draw(3, "padded_share")
    lengths = numbers(drill.question["en"])
    rows = torch.nn.utils.rnn.pad_sequence([torch.ones(int(n)) for n in lengths], batch_first=True)
    assert drill.answer == pytest.approx(100 * (rows == 0).float().mean().item(), rel=1e-5)


def test_a_ring_sends_what_the_drill_says():
    """Each rank sends one chunk in each of 2(N - 1) rounds; the chunks are added up here."""
    drill = draw(5, "all_reduce")
    billions, ranks, size = numbers(drill.question["en"])[:3]
    rounds = [round_ for phase in ("reduce", "gather") for round_ in range(int(ranks) - 1)]
    assert drill.answer == pytest.approx(sum(billions * size / ranks for _ in rounds))


def test_token_weights_are_those_of_autograd():
    drill = draw(4, "token_weight")
    short, long = (int(n) for n in numbers(drill.question["en"])[:2])
    losses = [torch.zeros(n, requires_grad=True) for n in (short, long)]
    sum(each.mean() / 2 for each in losses).backward()
    assert drill.answer == pytest.approx((losses[0].grad[0] / losses[1].grad[0]).item())
    drill = draw(4, "perplexity")
    first, one, second, two = numbers(drill.question["en"])[:4]
    assert drill.right(math.exp((first * one + second * two) / (first + second)))
