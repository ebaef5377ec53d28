"""Bad input to what is not a technique: one sentence that names it, and everything as it was.

A row of a table is a function, a call that works, and for each argument what it must not be. The
techniques and folders are in test_bad_techniques.py.
"""

import copy
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from soft import traces

from minipeft import (
    AssetError,
    Batches,
    Collator,
    History,
    budget,
    classify,
    complete,
    count_parameters,
    encode,
    evaluate,
    freeze,
    load_base,
    load_dialogues,
    load_instructions,
    load_reviews,
    padding_share,
    position_ids_from_mask,
    unfreeze,
    wilson_interval,
)
from minipeft.freezing import blocks, only_biases, only_head, only_last_blocks, only_norms

FEW = settings(max_examples=12, deadline=None, derandomize=True,
               suppress_health_check=list(HealthCheck))  # fmt: skip
MODEL, TOKENIZER = load_base("tiny", device="cpu")
ROWS = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8, 9], "labels": [8, 9]}]
MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])

ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**31, 2**63, 2**64, -(2**63), 10**400]),
    st.floats(),
    st.text(max_size=4),
    st.binary(max_size=2),
    st.lists(st.integers(-2, 9) | st.none(), max_size=3),
    st.dictionaries(st.sampled_from(["input_ids", "role", "a"]), st.integers(), max_size=1),
    st.sampled_from([torch.tensor(1.5), torch.zeros(0), torch.ones(2, 2), object(), int, {1, 2}]),
)


def whole(low, high=math.inf):
    """Anything but whole numbers in a range."""
    return ANYTHING.filter(lambda v: type(v) is not int or not low <= v <= high)


def but(*kinds):
    """Anything but values of these types."""
    return ANYTHING.filter(lambda v: not isinstance(v, kinds))


def words(*good):
    return ANYTHING.filter(lambda v: not (isinstance(v, str) and v in good))


NO_FLAG, NO_TEXT = but(bool), but(str)
NO_BATCHES = ANYTHING.filter(lambda v: not isinstance(v, torch.Tensor))
# Of a mask: other types, numbers that are no 0 or 1, and no axis
MASKS = but(torch.Tensor) | st.sampled_from(
    [torch.tensor([[0.0, -1e9]]), torch.tensor([[1, 2]]), torch.tensor([[1, -1]]), torch.tensor(1)]
)
# Of a row of ids: other shapes and types, ids that are none, and nothing at all
IDS = st.one_of(
    ANYTHING.filter(lambda v: not _ids(v)),
    st.sampled_from([[], [[5, 6]], [5, -1], [5.0, 6.0], ["5"], [True], [5, [6]], [None],
                     torch.tensor([[5]]), torch.tensor([1.5])]),
)  # fmt: skip
# Of the labels of a row: neither ids as many as input_ids, nor a label of the row
LABELS = st.sampled_from(
    [[6], [6, 7, 8, 9], [-100] * 3, [6, -1, 7], [[6, 7, 8]], ["a", "b", "c"], [True] * 3, "abc",
     True, -1, -100, float("nan"), float("inf"), [0.5, float("nan")], [[0.5]], {}, object(), 1j]
)  # fmt: skip


def _ids(value):
    return isinstance(value, list) and value and all(type(i) is int and i >= 0 for i in value)


def collated(input_ids=(5, 6, 7), labels=None, attention_mask=None):
    """A batch of one row."""
    row = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
    return Collator(0)([row])


def kept(history="{}"):
    return History.from_json(history)


BAD = [  # (function, arguments with which it works, {argument: what it must not be})
    (
        encode,
        {"tokenizer": TOKENIZER, "prompt": "ab", "answer": "c", "max_length": 5, "add_eos": True},
        {
            "tokenizer": ANYTHING.filter(lambda v: not callable(v)),
            "prompt": NO_TEXT | st.just(""),
            "answer": but(str, type(None)) | st.just(""),
            "max_length": whole(3).filter(lambda v: v is not None),
            "add_eos": NO_FLAG,
        },
    ),
    (
        Collator,
        {"pad_token_id": 0, "padding_side": "left", "position_ids": True},
        {"pad_token_id": whole(0), "padding_side": words("left", "right"), "position_ids": NO_FLAG},
    ),
    (Collator(0), {"rows": ROWS}, {"rows": ANYTHING | st.sampled_from([[], [{}], [ROWS], ["ab"]])}),
    (
        collated,
        {"labels": [5, 6, 7]},
        {
            "input_ids": IDS,
            "labels": LABELS,
            "attention_mask": st.sampled_from([[1, 0, 1], [0], torch.zeros(3).long(), "a", 1.5]),
        },
    ),
    (
        Batches,
        {"rows": ROWS, "collate": Collator(0), "batch_size": 2, "seed": 0,
         "group_by_length": True, "shuffle": True},
        {
            "rows": ANYTHING.filter(lambda v: not isinstance(v, torch.Tensor)),
            "collate": ANYTHING.filter(lambda v: not callable(v)),
            "batch_size": whole(1),
            "seed": whole(-math.inf),
            "group_by_length": NO_FLAG,
            "shuffle": NO_FLAG,
        },
    ),
    (Batches(ROWS, Collator(0), 2).set_epoch, {"epoch": 0}, {"epoch": whole(0)}),
    (padding_share, {"batches": [{"attention_mask": MASK}]}, {"batches": ANYTHING}),
    (position_ids_from_mask, {"attention_mask": MASK}, {"attention_mask": MASKS}),
    (
        classify,
        {"model": MODEL, "tokenizer": TOKENIZER, "prompts": ["ab"], "choices": ["a", "b"],
         "batch_size": 2},
        {
            "model": ANYTHING | st.just(torch.nn.Linear(2, 2)),
            "tokenizer": ANYTHING.filter(lambda v: not callable(v)),
            "prompts": ANYTHING.filter(lambda v: v not in ([],)) | st.sampled_from([[""], [None]]),
            "choices": ANYTHING
            | st.sampled_from([["a"], "ab", ["a", ""], ["a", None], ["a", "ab"]]),
            "batch_size": whole(1),
        },
    ),
    (
        complete,
        {"model": MODEL, "tokenizer": TOKENIZER, "prompts": ["ab"], "max_new_tokens": 1},
        {
            "model": ANYTHING | st.just(torch.nn.Linear(2, 2)),
            "tokenizer": ANYTHING.filter(lambda v: not callable(v)),
            "prompts": ANYTHING.filter(lambda v: v not in ([],)) | st.sampled_from([[""], [None]]),
            "max_new_tokens": whole(1),
            "batch_size": whole(1),
        },
    ),
    (
        wilson_interval,
        {"correct": 1, "total": 3, "z": 2.0},
        {
            "correct": ANYTHING.filter(lambda v: type(v) not in (int, bool) or not 0 <= v <= 3),
            "total": ANYTHING.filter(lambda v: type(v) not in (int, bool) or not 1 <= v < 2**53),
            "z": ANYTHING.filter(lambda v: type(v) not in (int, float) or not 0 < v < 1e6),
        },
    ),
    (freeze, {"model": MODEL}, {"model": ANYTHING}),
    (unfreeze, {"model": MODEL}, {"model": ANYTHING}),
    (lambda pattern: unfreeze(MODEL, "*norm*", pattern), {"pattern": "lm_head"},
     {"pattern": ANYTHING | st.just("model.layer.0")}),
    (blocks, {"model": MODEL}, {"model": ANYTHING | st.just(torch.nn.Linear(2, 2))}),
    (only_last_blocks, {"model": MODEL, "k": 1}, {"model": ANYTHING, "k": whole(1, 2)}),
    (only_head, {"model": MODEL, "untie": False}, {"model": ANYTHING, "untie": NO_FLAG}),
    (only_norms, {"model": MODEL}, {"model": ANYTHING | st.just(torch.nn.Linear(2, 2))}),
    (only_biases, {"model": torch.nn.Linear(2, 2)}, {"model": ANYTHING | st.just(MODEL)}),
    (count_parameters, {"model": MODEL}, {"model": ANYTHING}),
    (
        load_base,
        {"name": "tiny", "device": "cpu", "dtype": torch.float32, "seed": 0},
        {
            "name": NO_TEXT
            | st.sampled_from(["", " ", "tiny ", "../..", "a/b/c", "\0", "x" * 5000]),
            "device": ANYTHING.filter(lambda v: v is not None)
            | st.sampled_from(["", "gpu", "cpu:x", -1, ["cpu"]]),
            "dtype": ANYTHING | st.sampled_from(["float32", torch.int8, torch.complex64]),
            "seed": whole(0, 2**64 - 1),
        },
    ),
    (load_dialogues, {"language": "english"}, {"language": words("english", "chinese")}),
    (load_instructions, {"language": "english"}, {"language": words("english", "chinese")}),
    (
        load_reviews,
        {"source": "movies", "min_rating": 1},
        {
            "source": words("movies", "amazon", "editorials", "tweets"),
            "min_rating": ANYTHING.filter(lambda v: type(v) not in (int, float) or not 0 <= v <= 3),
        },
    ),
    (evaluate, {"model": MODEL, "batches": [Collator(0)(ROWS)]},
     {"model": ANYTHING, "batches": ANYTHING}),
    (kept, {"history": '{"lr": [1.0]}'}, {"history": ANYTHING | st.sampled_from(
        ["[]", "3", "{", '{"lr": 1.0}', '{"rate": []}', '{"lr": ["a"]}', '{"eval_loss": [1.0]}'])}),
]  # fmt: skip
CALLS = [(function, good) for function, good, _ in BAD]
ARGUMENTS = [(f, good, name, bad) for f, good, arguments in BAD for name, bad in arguments.items()]


def _name(value):
    return getattr(value, "__name__", type(value).__name__) if callable(value) else None


@pytest.fixture
def model():
    """MODEL, put back after the test; `freeze` and the like may change its flags."""
    before = [(p, p.requires_grad) for p in MODEL.parameters()]
    yield MODEL
    for p, flag in before:
        p.requires_grad_(flag)


@pytest.mark.parametrize("function, good", CALLS, ids=_name)
def test_the_call_works(model, function, good):
    function(**good)


@pytest.mark.parametrize("function, good, name, bad", ARGUMENTS, ids=_name)
@given(data=st.data())
@FEW
def test_an_argument_that_is_none(function, good, name, bad, data):
    value = data.draw(bad)
    arguments = good | {name: value}
    before = repr(arguments), traces(MODEL)
    with pytest.raises((ValueError, AssetError)) as refused:
        function(**arguments)
    text = str(refused.value)
    assert "\n" not in text and 20 < len(text) < 700 and text[-1] in ".?", text
    assert (repr(arguments), traces(MODEL)) == before


def test_the_budget_of_the_environment(monkeypatch):
    for value in ("", "quick", "full"):
        monkeypatch.setenv("MINIPEFT_BUDGET", value)
        assert budget() in ("quick", "full")
    for value in (" ", "0", "Quick", "quick,full"):
        monkeypatch.setenv("MINIPEFT_BUDGET", value)
        with pytest.raises(ValueError, match="must be quick or full"):
            budget()


@given(
    rows=st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=6), min_size=1, max_size=4),
    kind=st.sampled_from(["none", "tokens", "classes", "numbers", "several"]),
    side=st.sampled_from(["left", "right"]),
)
@FEW
def test_shapes_and_types_of_every_good_batch(rows, kind, side):
    """Whatever is not refused has one shape and one type, and the rows are not changed."""
    labels = {
        "tokens": lambda ids: [-100, *ids],
        "classes": len,
        "numbers": lambda ids: len(ids) / 2,
        "several": lambda ids: [0.0, 1.0, float(len(ids))],
    }
    given_rows = [{"input_ids": [7, *ids]} for ids in rows]
    if kind != "none":
        for row, ids in zip(given_rows, rows, strict=True):
            row["labels"] = labels[kind](ids)
    before = copy.deepcopy(given_rows)
    batch = Collator(3, side, position_ids=True)(given_rows)
    assert given_rows == before
    shape = (len(rows), 1 + max(map(len, rows)))
    expected = {name: (shape, torch.int64)
                for name in ("input_ids", "attention_mask", "position_ids")}  # fmt: skip
    expected |= {
        "none": {},
        "tokens": {"labels": (shape, torch.int64)},
        "classes": {"labels": (shape[:1], torch.int64)},
        "numbers": {"labels": (shape[:1], torch.float32)},
        "several": {"labels": ((len(rows), 3), torch.float32)},
    }[kind]
    assert {name: (tuple(t.shape), t.dtype) for name, t in batch.items()} == expected
    for i, row in enumerate(given_rows):
        assert batch["input_ids"][i][batch["attention_mask"][i] == 1].tolist() == row["input_ids"]
