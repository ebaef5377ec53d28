"""minipeft.batching against transformers' own collators, its models' losses, and arithmetic."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorForLanguageModeling,
    DataCollatorForSeq2Seq,
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from minipeft.assets.models import load_base
from minipeft.batching import Batches, Collator, encode, padding_share, position_ids_from_mask

TINY = ("tiny-llama", "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox")
_, TOKENIZER = load_base("tiny", device="cpu")
PAD, BOS, EOS = TOKENIZER.pad_token_id, TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
PAIRS = [("Is it good?", " yes"), ("A much longer question, is it?", " no, not at all"), ("b", "c")]
ROWS = [encode(TOKENIZER, prompt, answer) for prompt, answer in PAIRS]
WITH_BOS = copy.deepcopy(TOKENIZER)  # like Llama's, which puts BOS before what it is given
WITH_BOS.backend_tokenizer.post_processor = TemplateProcessing(
    single="<bos> $A", special_tokens=[("<bos>", BOS)]
)


def without_eos():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.eos_token = None
    return tokenizer


def ids(text):
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def trainer_ready(rows):
    return [{name: row[name] for name in ("input_ids", "labels")} for row in rows]


# ---- encode


def test_prompt_is_masked_and_eos_is_a_target():
    row = encode(TOKENIZER, "ab", " c")
    assert row["input_ids"] == [*ids("ab"), *ids(" c"), EOS]
    assert row["labels"] == [-100, -100, *ids(" c"), EOS]
    assert row["cut"] == {"prompt": 0, "answer": 0}
    assert encode(TOKENIZER, "ab", " c", add_eos=False)["input_ids"] == ids("ab c")


def test_inference_sees_the_same_prompt():
    row = encode(TOKENIZER, "ab")
    assert row["input_ids"] == ids("ab") and "labels" not in row
    assert encode(TOKENIZER, "abcd", max_length=3)["input_ids"] == ids("bcd")


def test_an_answer_that_brings_its_eos_gets_no_second():
    assert encode(TOKENIZER, "ab", "c<eos>") == encode(TOKENIZER, "ab", "c")
    assert encode(TOKENIZER, "ab", "<eos>")["labels"] == [-100, -100, EOS]


def test_the_beginning_of_the_prompt_goes_first_then_the_end_of_the_answer():
    row = encode(TOKENIZER, "abcdef", "uvw", max_length=6)
    assert row["input_ids"] == [*ids("efuvw"), EOS] and row["cut"] == {"prompt": 4, "answer": 0}
    row = encode(TOKENIZER, "abcdef", "uvw", max_length=4)
    assert row["input_ids"] == [*ids("fuv"), EOS] and row["cut"] == {"prompt": 5, "answer": 1}


@settings(deadline=None, max_examples=150, derandomize=True)
@given(
    prompt=st.text(min_size=1, max_size=30),
    answer=st.text(min_size=1, max_size=20),
    bos=st.booleans(),
    limit=st.integers(4, 40) | st.none(),
)
def test_what_holds_for_every_row(prompt, answer, bos, limit):
    tokenizer = WITH_BOS if bos else TOKENIZER
    row = encode(tokenizer, prompt, answer, max_length=limit)
    got, labels, cut = row["input_ids"], row["labels"], row["cut"]
    p, a = ids(prompt), ids(answer)
    assert len(got) == len(labels) == len(p) + len(a) + 1 + bos - sum(cut.values())
    assert limit is None or len(got) <= limit
    if sum(cut.values()):
        assert len(got) == limit, "no more is cut than needed"
    assert got[-1] == labels[-1] == EOS
    kept_p = p[cut["prompt"] :]
    kept_a = a[: len(a) - cut["answer"]]
    assert got == [BOS] * bos + kept_p + kept_a + [EOS], "nothing is shifted or lost"
    assert labels == [-100] * (bos + len(kept_p)) + kept_a + [EOS]
    assert kept_p and kept_a
    assert not cut["answer"] or len(kept_p) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answer": ""}, "answer is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": "", "answer": None}, "prompt is empty"),
        ({"prompt": None}, "None is not a prompt"),
        ({"answer": 3}, "must be text"),
        ({"max_length": 0}, "max_length=0 is too short"),
        ({"max_length": -5}, "max_length=-5 is too short"),
        ({"max_length": 2}, "has 3 tokens"),
        ({"max_length": 8.0}, "max_length=8.0"),
        ({"tokenizer": without_eos()}, "no EOS token"),
    ],
)
def test_encode_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        encode(**{"tokenizer": TOKENIZER, "prompt": "ab", "answer": "c", **arguments})


# ---- Collator


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("pad", [PAD, EOS])
@pytest.mark.parametrize("theirs", [DataCollatorForSeq2Seq, DataCollatorForTokenClassification])
def test_collator_agrees_with_transformers(theirs, side, pad):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.padding_side, tokenizer.pad_token_id = side, pad
    want = theirs(tokenizer)(copy.deepcopy(trainer_ready(ROWS)))
    got = Collator(pad, side)(ROWS)
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == torch.int64 and torch.equal(got[name], want[name]), name


def test_pad_equal_to_eos_keeps_the_real_eos_unlike_masking_by_id():
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.pad_token_id = EOS
    by_id = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    theirs = by_id([{"input_ids": row["input_ids"]} for row in ROWS])["labels"]
    ours = Collator(EOS)(ROWS)["labels"]
    assert (theirs == EOS).sum() == 0
    assert (ours == EOS).sum(1).tolist() == [1, 1, 1]


def test_collator_takes_tensors_and_ignores_other_keys():
    tensors = [
        {"input_ids": torch.tensor(r["input_ids"]), "labels": torch.tensor(r["labels"]), "x": "y"}
        for r in ROWS
    ]
    for name, value in Collator(PAD)(ROWS).items():
        assert torch.equal(Collator(PAD)(tensors)[name], value)
    prompts = Collator(PAD, "left", position_ids=True)([{"input_ids": [5]}, {"input_ids": [6, 7]}])
    assert set(prompts) == {"input_ids", "attention_mask", "position_ids"}
    assert prompts["input_ids"].tolist() == [[PAD, 5], [6, 7]]
    assert prompts["position_ids"].tolist() == [[0, 0], [0, 1]]


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_classifier_agree_with_transformers(side):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.padding_side = side
    for labels in ([2, 0, 1], [0.5, -1.0, 3.25], [[1.0, 0.0], [0.0, 0.0], [1.0, 1.0]]):
        rows = [
            {
                "input_ids": row["input_ids"],
                "labels": label,
                "token_type_ids": [1] * len(row["labels"]),
            }
            for row, label in zip(ROWS, labels, strict=True)
        ]
        want = DataCollatorWithPadding(tokenizer)(copy.deepcopy(rows))
        tensors = [row | {"labels": torch.tensor(row["labels"])} for row in rows]
        for form in (rows, tensors):
            got = Collator(PAD, side)(form)
            assert set(got) == set(want)
            for name in want:
                assert got[name].dtype == want[name].dtype, name
                assert torch.equal(got[name], want[name]), name
    mixed = Collator(PAD)([{"input_ids": [5], "labels": 1}, {"input_ids": [6], "labels": 0.5}])
    assert mixed["labels"].tolist() == [1.0, 0.5]
    batches = Batches([{"input_ids": [5], "labels": n} for n in range(3)], Collator(PAD), 2)
    assert sorted(n for batch in batches for n in batch["labels"].tolist()) == [0, 1, 2]


def test_a_classifier_takes_such_a_batch():
    config = load_base("tiny", device="cpu")[0].config
    config.num_labels = 3
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rows = [row | {"labels": i} for i, row in enumerate(ROWS)]
    together = model(**Collator(PAD)(rows)).loss
    alone = [model(**Collator(PAD)([row])).loss for row in rows]
    torch.testing.assert_close(together, torch.stack(alone).mean())


def test_position_ids():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [0, 0, 0, 0]])
    assert position_ids_from_mask(mask).tolist() == [[0, 0, 0, 1], [0, 1, 2, 2], [0, 0, 0, 0]]


def test_collator_refuses_a_missing_pad_token_and_a_third_side():
    with pytest.raises(ValueError, match="no pad token"):
        Collator(None)
    with pytest.raises(ValueError, match="neither"):
        Collator(0, "middle")


# ---- the loss on these batches


@pytest.mark.parametrize("name", TINY)
def test_loss_is_the_mean_over_unmasked_shifted_positions(name):
    model, _ = load_base(name, dtype=torch.float64, device="cpu")
    batch = Collator(PAD)(ROWS)
    out = model(**batch)
    log_probs = out.logits.double().log_softmax(-1)
    nats = [
        -log_probs[i, t, row["input_ids"][t + 1]]
        for i, row in enumerate(ROWS)
        for t in range(len(row["input_ids"]) - 1)
        if row["labels"][t + 1] != -100
    ]
    assert len(nats) == sum(len(ids(answer)) + 1 for _, answer in PAIRS)
    # transformers computes the loss itself in float32
    torch.testing.assert_close(out.loss.double(), torch.stack(nats).mean(), rtol=1e-6, atol=0)


def loss_and_gradients(name, collate):
    model, _ = load_base(name, device="cpu")
    loss = model(**collate(ROWS)).loss
    loss.backward()
    grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    return loss.item(), grads


@pytest.mark.parametrize("name", TINY)
def test_the_side_of_the_padding_changes_nothing_with_position_ids(name):
    positions = name != "tiny-bloom"  # ALiBi reads the mask itself and takes no position ids
    right_loss, right = loss_and_gradients(name, Collator(PAD, "right", positions))
    left_loss, left = loss_and_gradients(name, Collator(PAD, "left", positions))
    assert left_loss == pytest.approx(right_loss, abs=1e-5)
    torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_gpt2_without_position_ids_depends_on_the_side():
    right_loss, right = loss_and_gradients("tiny-gpt2", Collator(PAD, "right"))
    left_loss, left = loss_and_gradients("tiny-gpt2", Collator(PAD, "left"))
    assert abs(left_loss - right_loss) > 1e-4 and (left - right).abs().max() > 1e-3


def test_a_batch_without_a_target_is_nan_in_transformers():
    model, _ = load_base("tiny", device="cpu")
    loss = model(input_ids=torch.tensor([[5, 6]]), labels=torch.tensor([[-100, -100]])).loss
    assert torch.isnan(loss)


# ---- DataLoader, Trainer, Batches


def test_dataloader_with_workers():
    loader = DataLoader(ROWS, batch_size=2, collate_fn=Collator(PAD), num_workers=2)
    got = list(loader)
    assert [b["input_ids"].shape[0] for b in got] == [2, 1]
    assert torch.equal(got[0]["labels"], Collator(PAD)(ROWS[:2])["labels"])


def test_trainer_takes_the_collator(tmp_path):
    model, _ = load_base("tiny", device="cpu")
    want = model(**Collator(PAD)(ROWS)).loss.item()
    settings = TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=3, use_cpu=True, report_to=[],
        logging_steps=1, save_strategy="no", disable_tqdm=True, lr_scheduler_type="constant",
    )  # fmt: skip
    collate = Collator(PAD, position_ids=True)
    trainer = Trainer(model, settings, train_dataset=ROWS, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(want, abs=1e-3) and losses[1] < losses[0]


def numbered(lengths):
    return [{"input_ids": [i] * n, "labels": [i] * n} for i, n in enumerate(lengths, 3)]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=60),
    size=st.integers(1, 9),
    grouped=st.booleans(),
    shuffle=st.booleans(),
    epoch=st.integers(0, 5),
)
def test_every_row_once_per_epoch_in_an_order_of_seed_and_epoch(
    lengths, size, grouped, shuffle, epoch
):
    rows = numbered(lengths)
    make = lambda: Batches(rows, Collator(0), size, 7, grouped, shuffle)  # noqa: E731
    batches, again = make(), make()
    list(again)  # an epoch that another object has seen changes nothing
    for each in (batches, again):
        each.set_epoch(epoch)
    got = [batch["input_ids"][:, 0].tolist() for batch in batches]
    assert got == [batch["input_ids"][:, 0].tolist() for batch in again]
    assert sorted(sum(got, [])) == [row["input_ids"][0] for row in rows]
    assert len(got) == len(batches) and all(len(b) <= size for b in got)
    assert sum(len(b) < size for b in got) <= 1


def test_seed_and_epoch_both_matter_and_shuffle_off_keeps_the_order():
    rows = numbered([5] * 30)
    batches = Batches(rows, Collator(0), 4)
    first = batches.order()
    batches.set_epoch(1)
    assert batches.order() != first != Batches(rows, Collator(0), 4, seed=1).order()
    straight = Batches(rows, Collator(0), 4, shuffle=False).order()
    assert sum(straight, []) == list(range(30))


def test_grouping_by_length_lowers_padding():
    lengths = [2 + (37 * i) % 61 for i in range(400)]
    rows = numbered(lengths)
    plain = padding_share(Batches(rows, Collator(0), 8))
    grouped = Batches(rows, Collator(0), 8, group_by_length=True)
    assert padding_share(grouped) < 0.05 < 0.3 < plain
    first = [max(lengths[i] for i in batch) for batch in grouped.order()]
    assert first != sorted(first), "the batches are shuffled"
    tokens = sum(lengths)
    padded = sum(b["input_ids"].numel() for b in Batches(rows, Collator(0), 8))
    assert plain == pytest.approx(1 - tokens / padded)


@pytest.mark.parametrize("size", [0, -1, 2.0])
def test_batches_refuse_a_batch_size(size):
    with pytest.raises(ValueError, match="do not go into batches"):
        Batches(ROWS, Collator(0), size)
    with pytest.raises(ValueError, match="0 rows"):
        Batches([], Collator(0), 2)


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_are_padded_to_a_multiple_and_no_loss_changes(side):
    collate = Collator(PAD, side, position_ids=True, multiple_of=32)
    longest = max(len(row["input_ids"]) for row in ROWS)
    assert longest % 32 and collate(ROWS)["input_ids"].shape[1] == -(-longest // 32) * 32
    short = min(ROWS, key=lambda row: len(row["input_ids"]))  # 32 at the least
    assert len(short["input_ids"]) < 32 == collate([short])["labels"].shape[1]
    model, _ = load_base("tiny-gpt2", device="cpu")
    losses = [model(**c(ROWS)).loss for c in (collate, Collator(PAD, side, position_ids=True))]
    torch.testing.assert_close(*losses)
    with pytest.raises(ValueError, match="multiple_of=0 is not a length"):
        Collator(PAD, multiple_of=0)
