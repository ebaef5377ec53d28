"""Adding two numbers of three digits: exact answers, written token by token.

"347 + 586 =" is to be continued by " 933" and the end of the text; a single wrong digit makes the
answer wrong. 20,000 sums to train on, 500 to choose the rate by and 500 to judge by, all different;
the rates are searched as for `grades`.
"""

import random

import torch

from minipeft import complete
from tasks.methods import METHODS, groups_of
from tasks.training import Setting, fit, fresh, loss_on, marked

STEPS, BATCH = 600, 16
SEEDS = (0, 1, 2, 3, 4, 5)  # the first chooses the rate, five judge
SIZES = {"train": 20_000, "validation": 500, "test": 500}
SETTINGS = [
    Setting(method, rates, STEPS if rates else 0, seeds=SEEDS)
    for method, (rates, _) in METHODS.items()
]


def load_sums():
    """{split: rows with a prompt and an answer}; no pair of numbers comes twice, in any order."""
    pairs = [(a, b) for a in range(100, 1000) for b in range(a, 1000)]
    chosen = iter(random.Random(0).sample(pairs, sum(SIZES.values())))
    turn, splits = random.Random(1), {}
    for name, size in SIZES.items():
        numbers = [next(chosen) for _ in range(size)]
        numbers = [pair if turn.random() < 0.5 else pair[::-1] for pair in numbers]
        splits[name] = [{"prompt": f"{a} + {b} =", "answer": f" {a + b}"} for a, b in numbers]
    return splits


def run(method, lr, seed, steps, examples):
    """Train and judge once. Returns {column: value}."""
    model, tokenizer = fresh(METHODS[method][1], seed)
    rows = load_sums()
    training = rows["train"][: examples or None]
    groups = groups_of(method, model, lr)
    row = fit(model, tokenizer, training, lr=lr, seed=seed, steps=steps, batch=BATCH, groups=groups)
    row |= {"valid_loss": loss_on(model, tokenizer, rows["validation"])}
    prompts = [one["prompt"] for one in rows["test"]]
    written = complete(model, tokenizer, prompts, max_new_tokens=8, batch_size=500)
    wanted = [one["answer"].strip() for one in rows["test"]]
    right = [text.strip() == answer for text, answer in zip(written, wanted, strict=True)]
    return row | marked(torch.tensor(right))
