"""P-tuning's encoders against the plain tables they start as, and in front against in a template.

    python benchmarks/encoder_or_table.py [--runs 99]

Five ways to train 10 virtual tokens on the same batches of reviews:

  lstm, mlp   the encoder, in front of the text
  lstm_table, mlp_table
              the vectors that this encoder gives before any step, as a plain table: it begins as
              the same function, and only the parametrisation differs
  template    the MLP encoder at the same start, with the tokens spread over a template

First each learning rate of a grid, with seed 0. Then each at its own best rate with seeds 1 and 2,
and the template at the MLP encoder's rate with all three. The seed draws the encoder and the order
of the reviews. The best rate has the lowest loss on 64 validation reviews after the last step.

One row for each step goes to results/encoder-or-table.csv; step 0 is before training. Runs that are
in it already are not made again, so the script may be stopped and started at will; delete the file
to begin anew.
"""

import argparse
import csv
from pathlib import Path

import torch
from transformers.utils import logging

from minipeft import (
    Batches,
    Collator,
    encode,
    evaluate,
    load_base,
    load_reviews,
    train,
)
from minipeft.p_tuning import add_p_tuning, fold_p_tuning
from this_machine import rows_so_far, this_machine

RESULT = Path(__file__).parent / "results" / "encoder-or-table.csv"
GRID = {
    "lstm": (0.0003, 0.001, 0.003, 0.01, 0.03),
    "lstm_table": (0.01, 0.03, 0.1, 0.3, 1.0),
    "mlp": (0.0003, 0.001, 0.003),
    "mlp_table": (0.01, 0.03, 0.1),
}
SEEDS, STEPS, EVERY, TOKENS = (0, 1, 2), 32, 16, 10
HOLE = "<v>"


def in_template(prompt):
    """The prompt with 3 virtual tokens before the review, 4 behind it, 3 before the answer."""
    review, cue = prompt.rsplit("\n", 1)
    return f"{HOLE * 3}{review}{HOLE * 4}\n{cue}{HOLE * 3}"


def run(form, lr, seed):
    """Train once. Yields (step, loss of its batch, validation loss where it was taken)."""
    model, tokenizer = load_base()
    tokenizer.add_tokens([HOLE], special_tokens=True)
    place = tokenizer.convert_tokens_to_ids(HOLE) if form == "template" else None
    torch.manual_seed(seed)
    kind = "lstm" if form.startswith("lstm") else "mlp"
    add_p_tuning(model, TOKENS, kind, placeholder_id=place)
    if form.endswith("table"):
        fold_p_tuning(model)
    reviews, collate = load_reviews(), Collator(tokenizer.pad_token_id)

    def encoded(rows):
        prompts = map(in_template, rows["prompt"]) if place else rows["prompt"]
        return [encode(tokenizer, p, a) for p, a in zip(prompts, rows["answer"], strict=True)]

    training = encoded(reviews["train"].select(range(1000)))
    judged = encoded(reviews["validation"].select(range(64)))
    judged = list(Batches(judged, collate, 16, group_by_length=True, shuffle=False))
    yield 0, "", evaluate(model, judged)
    history = train(
        model,
        Batches(training, collate, 8, seed=seed, group_by_length=True),
        max_steps=STEPS,
        lr=lr,
        warmup_steps=4,
        eval_batches=judged,
        eval_every=EVERY,
        seed=seed,
    )
    valid = dict(zip(history.eval_step, history.eval_loss, strict=True))
    for step, loss in enumerate(history.train_loss, 1):
        yield step, loss, valid.get(step, "")


def best_rate(form, rows):
    """The rate of the grid whose last validation loss is lowest with seed 0."""
    last = [r for r in rows if (r["form"], r["seed"], r["step"]) == (form, "0", str(STEPS))]
    return float(min(last, key=lambda row: float(row["valid_loss"]))["lr"])


def todo(rows):
    """The next run that is missing, as (form, lr, seed), or None."""
    done = {(row["form"], float(row["lr"]), int(row["seed"])) for row in rows}
    wanted = [(form, lr, 0) for form, rates in GRID.items() for lr in rates]
    if set(wanted) <= done:
        best = {form: best_rate(form, rows) for form in GRID}
        best["template"] = best["mlp"]
        for group in (("template", "mlp", "mlp_table"), ("lstm", "lstm_table")):
            wanted += [(form, best[form], seed) for seed in SEEDS for form in group]
    return next((one for one in wanted if one not in done), None)


def main():
    parser = argparse.ArgumentParser(description="Encoder or table, in front or in a template.")
    parser.add_argument("--runs", type=int, default=99, help="stop after so many runs")
    options = parser.parse_args()
    logging.set_verbosity_error()
    where = this_machine()
    columns = [*where, "form", "lr", "seed", "step", "train_loss", "valid_loss"]
    RESULT.parent.mkdir(exist_ok=True)
    for _ in range(options.runs):
        one = todo(rows_so_far(RESULT))
        if one is None:
            break
        form, lr, seed = one
        print(f"{form}, lr {lr:g}, seed {seed}")
        made = [[*where.values(), *one, step, *losses] for step, *losses in run(*one)]
        new = not RESULT.exists()
        with open(RESULT, "a", newline="") as file:  # only whole runs are written
            writer = csv.writer(file)
            writer.writerows(([columns] if new else []) + made)
        print(f"   loss on the validation reviews {made[0][-1]:.4f} -> {made[-1][-1]:.4f}")


if __name__ == "__main__":
    main()
