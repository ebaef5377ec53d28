"""Shrinking SmolLM2 from 30 blocks to 15 and to 8, by several routes of the same length.

    python benchmarks/distil.py [--runs 99] [--seeds 0] [--teacher FOLDER]

The teacher is SmolLM2 with LoRA (r=8, 60 steps of 8 film reviews, as in notebook 11), merged. Each
student is cut out of it and trained with 16 reviews a step, under bfloat16 autocast. The last
`trained_blocks` blocks and the final norm are trained; the others rest, and so does the embedding,
which is the head too. A route is a list of cuts; its steps are shared out equally between them.
In "first 15, then 8" with 5 trained blocks, the second cut takes away just those that were trained;
with 15 it does not. "First 15, untuned" is cut out of SmolLM2 as it comes, not out of the teacher.
Losses:

  labels              cross-entropy alone, as if there were no teacher
  labels+soft         alpha = 0.5, T = 2, forward KL
  labels+soft+hidden  the same, and the final hidden states that predict a target are to be the
                      teacher's
  soft+hidden         alpha = 0: the teacher alone, of the labels only their places

After each cut and each training the student is judged on the same 600 test reviews as the teacher.
`read` and `write` are tokens a second, student over teacher, medians of rounds in which the two
take turns: 32 reviews read with one answer each, and 32 tokens written after one prompt.

A run appends its rows to benchmarks/results/distil.csv when it is through, and is not repeated.
"""

import argparse
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from transformers.utils import logging

from minipeft import (
    Batches,
    Collator,
    add_lora,
    classify,
    complete,
    count_parameters,
    distil_from,
    encode,
    freeze,
    load_adapter,
    load_base,
    load_reviews,
    merge_lora,
    pick_device,
    save_adapter,
    student_from_layers,
    train,
    unfreeze,
    unload_lora,
)
from minipeft.freezing import blocks
from this_machine import append_rows, rows_so_far, seconds, this_machine

RESULTS = Path(__file__).resolve().parent / "results" / "distil.csv"
COLUMNS = """date device threads torch transformers route trained_blocks loss lr seed steps step
layers parameters bytes train_loss right total as_teacher teacher_right read write seconds
answers""".split()
ROUTES = {
    "first 15": [range(15)],
    "first 15, untuned": [range(15)],
    "every other 15": [range(0, 30, 2)],
    "first 8": [range(8)],
    "every fourth 8": [range(0, 30, 4)],
    "first 15, then 8": [range(15), range(8)],
    "every other 15, then 8": [range(0, 30, 2), range(0, 15, 2)],
}
ALL = "labels+soft+hidden"
BATCH = 16
# (route, number of blocks at the end of a student that are trained, loss)
RUNS = [("first 15", 5, ALL), ("every other 15", 15, ALL), ("first 8", 5, ALL)]
RUNS += [("first 15, then 8", 5, ALL), ("every other 15, then 8", 15, ALL)]
RUNS += [("every fourth 8", 8, ALL), ("first 15", 15, ALL), ("first 15", 5, "labels")]
RUNS += [("first 15", 5, "labels+soft"), ("every other 15", 5, ALL)]
RUNS += [("first 15, then 8", 15, ALL), ("first 8", 8, ALL), ("first 15, untuned", 5, "labels")]
RUNS += [("first 15", 5, "soft+hidden")]


def loss_of(name, teacher, layers):
    """What `train` takes as its loss; nothing means the cross-entropy with the labels."""
    if name == "labels":
        return {}
    pairs = [(layers, len(blocks(teacher)))] if name.endswith("hidden") else ()
    alpha = 0.5 if name.startswith("labels") else 0.0
    return {"loss_sum": distil_from(teacher, alpha, 2.0, pairs=pairs)}


def make_teacher(encoded, folder):
    """SmolLM2 fine-tuned with LoRA, merged into a plain model. The adapter is kept in `folder`."""
    model, tokenizer = load_base()
    if folder and folder.exists():
        load_adapter(model, folder)
    else:
        torch.manual_seed(0)
        add_lora(model)
        collate = Collator(tokenizer.pad_token_id)
        batches = Batches(encoded, collate, 8, seed=0, group_by_length=True)
        train(model, batches, max_steps=60, lr=2e-3, warmup_steps=6)
        if folder:
            save_adapter(model, folder)
    merge_lora(model)
    return unload_lora(model).eval()


def ratios(student, teacher, tokenizer, prompts, rounds):
    """Tokens a second of the student over those of the teacher: reading, writing (medians)."""

    def read(model):
        classify(model, tokenizer, prompts)

    def write(model):
        complete(model, tokenizer, prompts[:1], max_new_tokens=32, min_new_tokens=32)

    medians, device = [], pick_device()
    for work in (read, write):
        found = []
        for _ in range(rounds + 1):
            taken = [seconds(partial(work, model), device) for model in (teacher, student)]
            found.append(taken[0] / taken[1])
        medians.append(statistics.median(found[1:]))  # the first round was the warm-up
    return medians


def run(route, last, loss, lr, seed, steps, teacher, tokenizer, encoded, test, rounds):
    """One route: a list of dicts, one row after each cut, and one after each training."""
    labels, by_teacher = torch.tensor(test["label"]), classify(teacher, tokenizer, test["prompt"])
    rows, trained = [], 0
    model = load_base()[0] if route.endswith("untuned") else teacher
    what = {
        "route": route,
        "trained_blocks": last,
        "loss": loss,
        "lr": lr,
        "seed": seed,
        "steps": steps,
    }
    what |= {"total": len(test), "teacher_right": int((by_teacher == labels).sum())}
    collate = Collator(tokenizer.pad_token_id)

    def judge():
        answers = classify(model, tokenizer, test["prompt"])
        right = answers == labels
        rows.append(
            what
            | {
                "step": trained,
                "layers": len(blocks(model)),
                "parameters": count_parameters(model)[1],
                "bytes": sum(p.nbytes for p in model.parameters()),
                "right": int(right.sum()),
                "as_teacher": int((answers == by_teacher).sum()),
                "answers": "".join("01"[int(r)] for r in right),
            }
        )
        print(f"{route}, {loss}, step {trained}: {int(right.sum())} of {len(test)} right, ", end="")
        print(f"the teacher {what['teacher_right']}", flush=True)

    for keep in ROUTES[route]:
        model = student_from_layers(model, keep)
        judge()
        start, part = time.monotonic(), steps // len(ROUTES[route])
        first = max(0, len(keep) - last)
        unfreeze(
            freeze(model), *(f"model.layers.{i}" for i in range(first, len(keep))), "model.norm"
        )
        losses = train(
            model,
            # not the teacher's order, and a new one for each stage
            Batches(encoded, collate, BATCH, seed=1000 * seed + trained + 1, group_by_length=True),
            max_steps=part,
            lr=lr,
            warmup_steps=part // 10,
            precision="bfloat16",
            seed=seed,
            **loss_of(loss, teacher, len(keep)),
        ).train_loss
        trained += part
        took = time.monotonic() - start
        judge()
        rows[-1]["train_loss"] = f"{statistics.mean(losses[-20:]):.4f}"
        rows[-1]["seconds"] = f"{took:.0f}"
        read, write = ratios(model, teacher, tokenizer, test["prompt"][:32], rounds)
        rows[-1] |= {"read": f"{read:.3f}", "write": f"{write:.3f}"}
    return rows


def done_so_far(path):
    return {
        (
            row["route"],
            int(row["trained_blocks"]),
            row["loss"],
            float(row["lr"]),
            int(row["seed"]),
            int(row["steps"]),
        )
        for row in rows_so_far(path)
    }


def main():
    parser = argparse.ArgumentParser(description="Shrink SmolLM2 by several routes.")
    parser.add_argument("--runs", type=int, default=99, help="stop after so many runs")
    parser.add_argument("--routes", nargs="*", help="such as 'first 15'")
    parser.add_argument("--losses", nargs="*", help="such as labels+soft")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=200, help="of a whole route")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--tests", type=int, default=600, help="test reviews")
    parser.add_argument("--rounds", type=int, default=7, help="of the two ratios")
    parser.add_argument("--teacher", type=Path, help="folder of its adapter, made if missing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    common, done = this_machine(), done_so_far(options.out)
    wanted = [
        (route, last, loss, options.lr, seed, options.steps)
        for seed in options.seeds
        for route, last, loss in RUNS
        if (not options.routes or route in options.routes)
        and (not options.losses or loss in options.losses)
    ]
    wanted = [one for one in wanted if one not in done][: options.runs]
    if not wanted:
        return
    reviews, (_, tokenizer) = load_reviews(), load_base("smollm2")
    test = reviews["test"].select(range(min(options.tests, len(reviews["test"]))))
    encoded = [encode(tokenizer, row["prompt"], row["answer"]) for row in reviews["train"]]
    teacher = make_teacher(encoded, options.teacher)
    for one in wanted:
        rows = run(*one, teacher, tokenizer, encoded, test, options.rounds)
        append_rows(options.out, COLUMNS, [common | row for row in rows])
        print(f"reads {rows[-1]['read']}, writes {rows[-1]['write']} times as fast as its teacher")


if __name__ == "__main__":
    main()
