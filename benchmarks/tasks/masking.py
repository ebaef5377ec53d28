"""Does it matter which tokens of the prompt get a loss?

LoRA (rank 8) on 1,000 film reviews, 24 steps of 8, with three ways to label a row:

  prompt masked   only the answer and the end of the text are targets
  off by one      the last token of the prompt is a target too: [-100] * (prompt - 1)
  nothing masked  every token is a target

All are judged alike: the loss on the answers of 64 validation reviews, the label word of 200 test
reviews, and `stops`: of the first 40 of these, how many get a label word and then the end token.
"""

import statistics
import time

from minipeft import (
    Batches,
    Collator,
    add_lora,
    count_parameters,
    encode,
    load_reviews,
    train,
)
from tasks.training import Setting, first, fresh, label_words, loss_on

STEPS, EXAMPLES, TESTS, WRITTEN = 24, 1000, 200, 40
MASKED = {  # number of labels of -100, of a prompt of n tokens
    "prompt masked": lambda n: n,
    "off by one": lambda n: n - 1,
    "nothing masked": lambda n: 0,
}
SETTINGS = [Setting("zero-shot")] + [
    Setting(way, (1e-3, 3e-3, 1e-2), STEPS, EXAMPLES) for way in MASKED
]


def labeled(tokenizer, row, way):
    """The encoded row with as many labels of -100 as this way wants."""
    encoded = encode(tokenizer, row["prompt"], row["answer"])
    masked = MASKED[way](encoded["labels"].count(-100))
    return encoded | {"labels": [-100] * masked + encoded["input_ids"][masked:]}


def stops(model, tokenizer, prompts):
    """How many prompts are answered by one label word and then the end token."""
    words = tokenizer([" negative", " positive"], add_special_tokens=False)["input_ids"]
    ends = [word + [tokenizer.eos_token_id] for word in words]
    batch = Collator(tokenizer.pad_token_id, "left")([encode(tokenizer, p) for p in prompts])
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    out = model.generate(**batch, max_new_tokens=2, do_sample=False)
    return sum(new in ends for new in out[:, batch["input_ids"].shape[1] :].tolist())


def run(way, lr, seed, steps, examples):
    """Train and judge once. Returns {column: value}."""
    model, tokenizer = fresh(add_lora if steps else lambda m: m, seed)
    reviews = load_reviews()
    row = {"batch": 0, "trainable": 0}
    if steps:
        rows = [labeled(tokenizer, r, way) for r in first(reviews["train"], examples)]
        batches = Batches(rows, Collator(tokenizer.pad_token_id), 8, seed=seed)
        start = time.monotonic()
        history = train(model, batches, max_steps=steps, lr=lr, warmup_steps=steps // 10,
                        seed=seed, progress=False)  # fmt: skip
        row = {
            "batch": 8,
            "trainable": count_parameters(model)[0],
            "seconds": f"{time.monotonic() - start:.1f}",
            "train_loss": f"{statistics.mean(history.train_loss[-10:]):.4f}",
        }
    tests = first(reviews["test"], TESTS)
    row |= {"valid_loss": loss_on(model, tokenizer, first(reviews["validation"], 64))}
    row |= label_words(model, tokenizer, tests)
    return row | {"details": {"stops": stops(model, tokenizer, tests["prompt"][:WRITTEN])}}
