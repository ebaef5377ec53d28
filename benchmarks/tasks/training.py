"""What all tasks share: settings, one training run, and the answers of a trained model."""

import statistics
import time
from typing import NamedTuple

import torch

from minipeft import (
    Batches,
    Collator,
    classify,
    count_parameters,
    encode,
    evaluate,
    load_base,
    load_dialogues,
    load_reviews,
    train,
)

SEEDS = (0, 1, 2)


class Setting(NamedTuple):
    """One way to train for a task: what is tried, and with which seeds.

    The rate is searched with the first seed; the other seeds take the one of the lowest validation
    loss. A single rate was chosen elsewhere, and none means that nothing is trained.
    """

    method: str
    rates: tuple = ()
    steps: int = 0
    examples: int = 0  # training rows; 0 is all of them
    seeds: tuple = SEEDS


def fresh(add, seed):
    """(the base model that `add` made ready to train, its tokenizer)"""
    model, tokenizer = load_base()
    torch.manual_seed(seed)
    add(model)
    return model, tokenizer


def fit(
    model, tokenizer, rows, *, lr, seed, steps, batch=8, warmup=None, every=10, evaluations=None,
    max_length=None, **options,
):  # fmt: skip
    """Train on rows with a prompt and an answer. Returns {column: value} of the run.

    The rate rises over a tenth of the steps. `curve` holds the mean training loss of each `every`
    steps, as "10:2.31 20:0.94". evaluations: a dict that gets {step: evaluation loss}. options:
    those of `train`.
    """
    trainable = count_parameters(model)[0]
    if not steps:
        return {"batch": 0, "trainable": 0}
    encoded = [encode(tokenizer, r["prompt"], r["answer"], max_length=max_length) for r in rows]
    collate = Collator(tokenizer.pad_token_id)
    batches = Batches(encoded, collate, min(batch, len(rows)), seed=seed, group_by_length=True)
    warmup = steps // 10 if warmup is None else warmup
    start = time.monotonic()
    history = train(model, batches, max_steps=steps, lr=lr, warmup_steps=warmup, seed=seed,
                    progress=False, **options)  # fmt: skip
    losses = history.train_loss
    if evaluations is not None:
        evaluations |= zip(history.eval_step, history.eval_loss, strict=True)
    ends = range(every, steps + 1, every)
    return {
        "batch": batches.batch_size,
        "trainable": trainable,
        "seconds": f"{time.monotonic() - start:.1f}",
        "train_loss": f"{statistics.mean(losses[-10:]):.4f}",
        "curve": " ".join(f"{e}:{statistics.mean(losses[e - every : e]):.4f}" for e in ends),
    }


def first(rows, count):
    """The first rows of a split, or all of them if there are fewer."""
    return rows.select(range(min(count, len(rows))))


def batches_of(tokenizer, rows, size=32):
    """Rows with a prompt and an answer as batches for `evaluate`."""
    encoded = [encode(tokenizer, row["prompt"], row["answer"]) for row in rows]
    collate = Collator(tokenizer.pad_token_id)
    return list(Batches(encoded, collate, size, group_by_length=True, shuffle=False))


def loss_on(model, tokenizer, rows):
    """The mean loss on the answers, in nats per target token, as text for the file."""
    return f"{evaluate(model, batches_of(tokenizer, rows)):.4f}"


def dialogues():
    """English dialogues as rows with a prompt and an answer: can the model still talk?"""
    return load_dialogues()["test"].map(lambda r: {"prompt": f"{r['prompt']}\nAnswer:"})


def plain_text():
    """Sentences of editorials: the first word as the prompt, the rest as the answer."""
    rows = []
    for text in load_reviews("editorials", 0.0)["test"]["text"]:
        first, space, rest = text.partition(" ")
        rows += [{"prompt": first, "answer": space + rest}] if rest else []
    return rows


def marked(right):
    """{column: value} of the answers of a run: one character for each row, 1 where it was right."""
    answers = "".join("01"[int(one)] for one in right)
    return {"answers": answers, "right": answers.count("1"), "total": len(answers)}


def label_words(model, tokenizer, rows, choices=(" negative", " positive")):
    """The columns of `marked` where the answer is the likeliest of some words."""
    found = classify(model, tokenizer, list(rows["prompt"]), choices)
    return marked(found == torch.tensor(rows["label"]))
