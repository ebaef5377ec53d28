"""The runs that are too long for a notebook: loss and accuracy, method by method.

    python benchmarks/long_runs.py [--methods prompt_tuning ...] [--seeds 0 1 2]

SmolLM2 learns the film reviews as in notebook 11 (8 reviews a step, the label word is the only
target), and is judged at the end by its answers to the same test reviews: `right` of `total`, and
each answer, 1 or 0, in `answers`. A run appends its rows to benchmarks/results/long-runs.csv when
it is through: one for every ten steps, with their mean training loss. A run that is there is
not repeated. The notebooks draw their curves from that file.
"""

import argparse
import time
from pathlib import Path

import torch

from encoder_or_table import in_template
from minipeft import (
    Batches,
    Collator,
    add_adapters,
    add_lora,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    classify,
    count_parameters,
    encode,
    load_base,
    load_reviews,
    train,
)
from minipeft.freezing import only_head, only_last_blocks
from this_machine import append_rows, rows_so_far, this_machine

RESULTS = Path(__file__).resolve().parent / "results" / "long-runs.csv"
COLUMNS = """date device threads torch transformers method setting lr seed step examples
train_loss right total trainable seconds answers""".split()
TEXT = "Is this film review positive or negative?"
HOLE = 49152  # the first id beyond SmolLM2's vocabulary: the placeholder of encoder_or_table.py

# (method, setting, learning rate, steps, what makes the model ready). The rates are the best of
# two or three tried for 40 steps with seed 0. Those of P-tuning come from encoder_or_table.py,
# those of freezing were chosen on validation reviews (notebook 05).
RUNS = [
    ("prompt_tuning", "n=10 text", 1e-2, 150, lambda m: add_prompt_tuning(m, 10, "text", TEXT)),
    ("prefix_tuning", "n=10 text", 1e-2, 60, lambda m: add_prefix_tuning(m, 10, text=TEXT)),
    ("p_tuning", "n=10 mlp template", 5e-4, 120, lambda m: add_p_tuning(m, 10, "mlp", None, HOLE)),
    ("p_tuning", "n=10 mlp", 1e-3, 60, lambda m: add_p_tuning(m, 10, "mlp")),
    ("p_tuning", "n=10 lstm", 1e-2, 60, add_p_tuning),
    ("p_tuning", "n=10 lstm", 5e-4, 150, add_p_tuning),
    ("p_tuning_v2", "key_value n=10", 1e-2, 60, add_p_tuning_v2),
    ("p_tuning_v2", "hidden n=10", 1e-2, 60, lambda m: add_p_tuning_v2(m, 10, "hidden")),
    ("prefix_tuning", "n=10 projection", 1e-3, 60, lambda m: add_prefix_tuning(m, 10, True)),
    ("prefix_tuning", "n=10", 3e-2, 60, add_prefix_tuning),
    ("prefix_tuning", "n=1 text", 1e-2, 60, lambda m: add_prefix_tuning(m, 1, text=TEXT)),
    ("prefix_tuning", "n=128 text", 1e-2, 60, lambda m: add_prefix_tuning(m, 128, text=TEXT)),
    ("lora", "r=8", 2e-3, 60, add_lora),
    ("adapters", "houlsby m=16", 1e-3, 60, lambda m: add_adapters(m, 16)),
    ("freezing", "head alone", 3e-3, 60, lambda m: only_head(m, untie=True)),
    ("freezing", "last 1 block", 1e-4, 60, lambda m: only_last_blocks(m, 1)),
    ("freezing", "last 4 blocks", 1e-4, 60, lambda m: only_last_blocks(m, 4)),
    ("freezing", "last 16 blocks", 1e-4, 60, lambda m: only_last_blocks(m, 16)),
    ("freezing", "all 30 blocks", 1e-4, 60, lambda m: only_last_blocks(m, 30)),
]


def prepare(add, seed):
    """(model that `add` made ready to train, tokenizer, what makes its prompt of a plain one)."""
    model, tokenizer = load_base()
    torch.manual_seed(seed)
    add(model)
    if getattr(getattr(model, "virtual_tokens", None), "placeholder_id", None) != HOLE:
        return model, tokenizer, str  # the prompt as it is
    tokenizer.add_tokens(["<v>"], special_tokens=True)
    return model, tokenizer, in_template


def run(method, setting, lr, add, seed, steps, tests):
    """One training run: a list of dicts, one for every ten steps and, judged, one for the end."""
    model, tokenizer, fill = prepare(add, seed)
    reviews = load_reviews()
    test = reviews["test"].select(range(min(tests, len(reviews["test"]))))
    what = {"method": method, "setting": setting, "lr": lr, "seed": seed}
    what["trainable"] = count_parameters(model)[0]
    rows, start = [], time.monotonic()
    if steps:
        texts = [encode(tokenizer, fill(row["prompt"]), row["answer"]) for row in reviews["train"]]
        collate = Collator(tokenizer.pad_token_id)
        batches = Batches(texts, collate, 8, seed=seed, group_by_length=True)
        losses = train(
            model, batches, max_steps=steps, lr=lr, warmup_steps=steps // 10, seed=seed
        ).train_loss
        for end in range(10, steps + 1, 10):
            mean = sum(losses[end - 10 : end]) / 10
            rows.append(what | {"step": end, "examples": 8 * end, "train_loss": f"{mean:.4f}"})
    seconds = time.monotonic() - start
    right = classify(model, tokenizer, [fill(p) for p in test["prompt"]]) == torch.tensor(
        test["label"]
    )
    rows = rows or [what | {"step": 0, "examples": 0}]
    rows[-1] |= {
        "right": int(right.sum()),
        "total": len(test),
        "seconds": f"{seconds:.0f}",
        "answers": "".join("01"[int(r)] for r in right),
    }
    return rows


def zero_shot(model):
    """The base model as it is; `add` for the row that all others are compared with."""
    return model


def main():
    parser = argparse.ArgumentParser(description="Train every method on the film reviews.")
    parser.add_argument("--methods", nargs="*", help="such as prompt_tuning or 'lora r=8'")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of the number in the table")
    parser.add_argument("--tests", type=int, default=600, help="test reviews")
    parser.add_argument("--lr", type=float, help="instead of the learning rate of the table")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    common = this_machine()
    done = {
        (row["method"], row["setting"], float(row["lr"]), int(row["seed"]), int(row["step"]))
        for row in rows_so_far(options.out)
        if row["right"]
    }
    wanted = [("zero_shot", "", 0.0, zero_shot, 0, 0)]
    for seed in options.seeds:
        for method, setting, lr, steps, add in RUNS:
            lr, steps = options.lr or lr, options.steps or steps
            if not options.methods or {method, f"{method} {setting}"} & set(options.methods):
                wanted.append((method, setting, lr, add, seed, steps))
    for method, setting, lr, add, seed, steps in wanted:
        if (method, setting, lr, seed, steps) in done:
            continue
        rows = run(method, setting, lr, add, seed, steps, options.tests)
        append_rows(options.out, COLUMNS, [common | row for row in rows])
        last = rows[-1]
        print(method, setting, f"seed {seed}, step {steps}: {last['right']} of {last['total']}")


if __name__ == "__main__":
    main()
