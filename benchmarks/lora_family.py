"""Why a low rank is enough: random subspaces, ranks, targets, variants, and the full update.

    python benchmarks/lora_family.py [--runs 99] [--steps 48]

SmolLM2 learns the film reviews of notebook 11: 48 steps of 8 reviews out of 1,000, judged by the
loss on 64 validation reviews and by its answers to the first 300 test reviews. Kinds of runs:

  full      every parameter
  subspace  the weights of all linear layers of the blocks move together along d random directions
            (Aghajanyan et al. 2020, section 3): W = W0 + P theta, theta: (d,). Row i of P has one
            entry, a random sign in a random column, so that P is never a matrix of D x d numbers:
            the columns of P are orthogonal, and D gathered numbers are all it costs.
  rank      LoRA on queries and values, alpha = 2 r
  targets   LoRA with r = 8 elsewhere
  variant   DoRA, rsLoRA, LoRA+ with two ratios, with r = 8 on queries and values

First each rate of a grid, with seed 0; then each setting at its best rate, the one of the lowest
validation loss, with seeds 1 and 2. One row for every run goes to results/lora-family.csv. `losses`
are those of the single steps; `spectrum` the singular values of the change of one weight (the query
projection of block 15), as shares of the root of the sum of their squares. Runs that are in it
already are not made again; delete the file to begin anew.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import parametrize
from transformers.utils import logging

from minipeft import (
    Batches,
    Collator,
    add_lora,
    classify,
    count_parameters,
    encode,
    evaluate,
    freeze,
    load_base,
    load_reviews,
    lora_plus_groups,
    merge_lora,
    train,
)
from this_machine import append_rows, rows_so_far, this_machine

RESULT = Path(__file__).parent / "results" / "lora-family.csv"
PROBE = "model.layers.15.self_attn.q_proj"
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SEEDS = (0, 1, 2)


class Subspace(nn.Module):
    """W0 -> W0 + P theta for one weight. theta: (d,), shared by all of them."""

    def __init__(self, theta, index):
        super().__init__()
        self.theta, self.index = theta, index  # (d,), int32 (out * in,)

    def forward(self, weight):
        both = torch.cat([self.theta, -self.theta])  # (2 d,): a column and its sign in one index
        return weight + both.index_select(0, self.index).view_as(weight)


def add_subspace(model, d, seed):
    """Freeze the model; let the linear layers of its blocks move along d random directions."""
    freeze(model)
    theta = nn.Parameter(torch.zeros(d, device=model.device))
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in SEVEN:
            index = torch.randint(
                2 * d, (module.weight.numel(),), generator=generator, dtype=torch.int32
            )
            change = Subspace(theta, index.to(model.device))
            parametrize.register_parametrization(module, "weight", change)
    return model


def lora(**options):
    return lambda model, seed: add_lora(model, **options)


SUBSPACE_RATES = dict.fromkeys((10, 100, 1000, 10_000), (1e-4, 3e-4, 1e-3, 3e-3))
SUBSPACE_RATES[100_000] = (1e-4, 3e-4, 1e-3)
RANK_RATES = dict.fromkeys((1, 2, 8, 32, 128), (2e-3,))
RANK_RATES |= {8: (1e-3, 2e-3, 4e-3), 128: (5e-4, 2e-3)}
# {(kind, setting): (rates, ratio of LoRA+ or None, what makes the model ready)}
RUNS = {
    ("full", ""): ((2e-5, 5e-5), None, lambda model, seed: model),
    **{
        ("subspace", f"d={d}"): (rates, None, lambda m, s, d=d: add_subspace(m, d, s))
        for d, rates in SUBSPACE_RATES.items()
    },
    **{
        ("rank", f"r={r}"): (rates, None, lora(r=r, alpha=2 * r)) for r, rates in RANK_RATES.items()
    },
    ("targets", "q_proj"): ((2e-3,), None, lora(targets="q_proj")),
    ("targets", "v_proj"): ((2e-3,), None, lora(targets="v_proj")),
    ("targets", "all seven"): ((1e-3, 2e-3), None, lora(targets=SEVEN)),
    ("targets", "embed_tokens"): ((2e-3,), None, lora(targets="embed_tokens")),
    ("variant", "dora"): ((1e-3, 2e-3, 4e-3), None, lora(dora=True)),
    ("variant", "rslora"): ((7e-4, 2e-3), None, lora(scaling="rslora")),
    ("variant", "lora+ 4"): ((1e-3, 2e-3), 4, lora()),
    ("variant", "lora+ 16"): ((2.5e-4, 5e-4), 16, lora()),
}


def run(kind, setting, lr, seed, steps):
    """Train once. Returns {column: value}."""
    _, ratio, add = RUNS[kind, setting]
    model, tokenizer = load_base()
    before = model.get_submodule(PROBE).weight.detach().clone()  # (out, in)
    torch.manual_seed(seed)
    add(model, seed)
    reviews, collate = load_reviews(), Collator(tokenizer.pad_token_id)

    def encoded(rows):
        return [encode(tokenizer, row["prompt"], row["answer"]) for row in rows]

    training = encoded(reviews["train"].select(range(1000)))
    judged = encoded(reviews["validation"].select(range(64)))
    judged = list(Batches(judged, collate, 16, group_by_length=True, shuffle=False))
    test = reviews["test"].select(range(300))
    trainable, start = count_parameters(model)[0], time.monotonic()
    history = train(
        model,
        Batches(training, collate, 8, seed=seed, group_by_length=True),
        max_steps=steps,
        lr=lr,
        warmup_steps=min(5, steps),
        groups=lora_plus_groups(model, lr, ratio) if ratio else None,
        seed=seed,
    )
    seconds = time.monotonic() - start
    valid = evaluate(model, judged)
    right = classify(model, tokenizer, test["prompt"]) == torch.tensor(test["label"])
    if hasattr(model, "lora_config") and setting != "embed_tokens":
        merge_lora(model)  # the tied table cannot be merged, and is not the probe
    probe = model.get_submodule(PROBE)
    change = getattr(probe, "base", probe).weight.detach() - before
    values = torch.linalg.svdvals(change.double())
    values = values / values.norm().clamp(min=1e-30)
    return {
        "trainable": trainable,
        "valid_loss": f"{valid:.4f}",
        "right": int(right.sum()),
        "total": len(test),
        "seconds": f"{seconds:.0f}",
        "losses": " ".join(f"{loss:.4f}" for loss in history.train_loss),
        "answers": "".join("01"[int(r)] for r in right),
        "change_norm": f"{change.norm():.4f}",
        "spectrum": " ".join(f"{value:.2e}" for value in values),
    }


def best_rate(kind, setting, rows):
    """The rate of the grid whose validation loss is lowest with seed 0."""
    mine = [r for r in rows if (r["kind"], r["setting"], r["seed"]) == (kind, setting, "0")]
    return float(min(mine, key=lambda row: float(row["valid_loss"]))["lr"])


def todo(rows, steps):
    """The next run that is missing, as (kind, setting, lr, seed), or None."""
    rows = [row for row in rows if row["steps"] == str(steps)]
    done = {(r["kind"], r["setting"], float(r["lr"]), int(r["seed"])) for r in rows}
    wanted = [(*which, lr, 0) for which, (rates, *_) in RUNS.items() for lr in rates]
    if set(wanted) <= done:
        best = {which: best_rate(*which, rows) for which in RUNS}
        wanted += [(*which, lr, seed) for seed in SEEDS[1:] for which, lr in best.items()]
    return next((one for one in wanted if one not in done), None)


def main():
    parser = argparse.ArgumentParser(description="Subspaces, ranks, targets and variants of LoRA.")
    parser.add_argument("--runs", type=int, default=99, help="stop after so many runs")
    parser.add_argument("--steps", type=int, default=48, help="optimiser steps of a run")
    options = parser.parse_args()
    logging.set_verbosity_error()
    where = this_machine()
    for _ in range(options.runs):
        one = todo(rows_so_far(RESULT), options.steps)
        if one is None:
            break
        kind, setting, lr, seed = one
        print(f"{kind} {setting}, lr {lr:g}, seed {seed}")
        made = where | {"kind": kind, "setting": setting, "lr": lr, "seed": seed}
        made |= {"steps": options.steps} | run(*one, options.steps)
        append_rows(RESULT, list(made), [made])
        print(f"   validation loss {made['valid_loss']}, {made['right']} of {made['total']} right")


if __name__ == "__main__":
    main()
