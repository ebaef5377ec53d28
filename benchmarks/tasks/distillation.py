"""Students cut out of a teacher: by which route, with which loss, at which temperature?

The teacher is SmolLM2 with LoRA, merged. A student is some of its blocks, and is trained with 16
rows a step under bfloat16 autocast: its last `trained` blocks and the final norm; the other blocks
stay as they are, and so does the embedding, which is also the head. A route is a list of cuts;
its steps are shared equally between them. In "first 15, then 8" with 5 trained blocks the second
cut removes exactly those that were trained; with 15 it does not. "First 15, untuned" is cut out of
SmolLM2 as it comes, not out of the teacher. Losses:

  labels              cross-entropy alone, as if there were no teacher
  labels+soft         alpha = 0.5, forward KL at temperature T
  labels+soft+hidden  the same, and the final hidden states that predict a target should equal the
                      teacher's
  soft+hidden         alpha = 0: the teacher alone; the labels only say where the targets are

Two tasks: `distillation` on the film reviews (600 to judge by), and `distil_addition` on 1,000 sums
of three digits, where the student has to write the answer. `stages` in the details are the state
after each cut and each training.

All students of a device have one teacher. On a GPU a second training would give a slightly
different one, so the first is kept, as an adapter, in results/teachers; `teacher` in the details
are the first digits of its checksum. `minipeft.evidence.runs_of` compares no students of two
teachers.
"""

import functools
import hashlib
import os
import shutil
import time
from pathlib import Path

import torch

from minipeft import (
    add_lora,
    classify,
    complete,
    count_parameters,
    distil_from,
    freeze,
    load_adapter,
    load_base,
    load_reviews,
    merge_lora,
    save_adapter,
    student_from_layers,
    unfreeze,
    unload_lora,
)
from minipeft.freezing import blocks
from minipeft.memory.shapes import ALL_LINEAR
from tasks.addition import load_sums
from tasks.training import Setting, first, fit, fresh, loss_on, marked
from this_machine import this_machine

BATCH, TESTS = 16, 600
TEACHERS = Path(__file__).resolve().parents[1] / "results" / "teachers"
ROUTES = {
    "first 15": [range(15)],
    "first 15, untuned": [range(15)],
    "every other 15": [range(0, 30, 2)],
    "first 8": [range(8)],
    "every fourth 8": [range(0, 30, 4)],
    "first 15, then 8": [range(15), range(8)],
    "every other 15, then 8": [range(0, 30, 2), range(0, 15, 2)],
}
ALL, RATES = "labels+soft+hidden", (1e-4, 3e-4, 1e-3)
# (route, blocks trained, loss, temperature, rates). Each has its own rate. The first runs in the
# file are all at 3e-4 and have no validation loss; the search makes them again, the newer counts.
REVIEWS = [
    ("first 15", 5, ALL, 2.0, RATES),
    ("every other 15", 15, ALL, 2.0, RATES),
    ("first 8", 5, ALL, 2.0, RATES),
    ("first 15, then 8", 5, ALL, 2.0, RATES),
    ("every other 15, then 8", 15, ALL, 2.0, RATES),
    ("every fourth 8", 8, ALL, 2.0, RATES),
    ("first 15", 15, ALL, 2.0, RATES),
    ("first 15", 5, "labels", 2.0, RATES),
    ("first 15", 5, "labels+soft", 2.0, RATES),
    ("every other 15", 5, ALL, 2.0, RATES),
    ("first 15, then 8", 15, ALL, 2.0, RATES),
    ("first 8", 8, ALL, 2.0, RATES),
    ("first 15, untuned", 5, "labels", 2.0, RATES),
    ("first 15", 5, "soft+hidden", 2.0, RATES),
]
ADDITION = [
    ("first 15", 15, "labels", 1.0, RATES),
    *(("first 15", 15, "labels+soft", t, RATES) for t in (1.0, 2.0, 4.0)),
    *(("first 15", 15, "soft", t, RATES) for t in (1.0, 2.0, 4.0)),
    ("every other 15", 15, "labels", 1.0, RATES),
    ("every other 15", 15, "labels+soft", 2.0, RATES),
]


def name_of(route, trained, loss, temperature, _):
    at = f", T={temperature:g}" if "soft" in loss and temperature != 2.0 else ""
    return f"{route}: {trained} trained, {loss}{at}"


LISTS = {
    "distillation": {name_of(*one): one for one in REVIEWS},
    "distil_addition": {name_of(*one): one for one in ADDITION},
}
STEPS = {"distillation": 200, "distil_addition": 600}
EXAMPLES = {"distillation": 0, "distil_addition": 1000}


def settings_of(task):
    """The settings of one of the two tasks, for the runner."""
    return [
        Setting(name, rates, STEPS[task], EXAMPLES[task])
        for name, (*_, rates) in LISTS[task].items()
    ]


def loss_of(name, temperature, teacher, layers):
    """What `train` takes as its loss; nothing means the cross-entropy with the labels."""
    if name == "labels":
        return {}
    pairs = [(layers, len(blocks(teacher)))] if name.endswith("hidden") else ()
    alpha = 0.5 if name.startswith("labels") else 0.0
    return {"loss_sum": distil_from(teacher, alpha, temperature, pairs=pairs)}


@functools.cache
def splits_of(task):
    """{split: rows} of a task; `test` is what is judged."""
    if task == "distil_addition":
        return load_sums()
    reviews = load_reviews()
    return dict(reviews) | {"test": first(reviews["test"], TESTS)}


def train_teacher(task):
    """SmolLM2 fine-tuned with LoRA."""
    summing = task == "distil_addition"
    add = (lambda m: add_lora(m, 8, 16, targets=ALL_LINEAR)) if summing else add_lora
    model, tokenizer = fresh(add, 0)
    how = {"lr": 1e-3, "steps": 600, "batch": 16} if summing else {"lr": 2e-3, "steps": 60}
    fit(model, tokenizer, splits_of(task)["train"], seed=0, **how)
    return model


def adapter_of(task):
    """The folder with the adapter of the teacher of this device; it is trained if there is none.

    Workers that train one at the same time all take the one that is there first.
    """
    folder = TEACHERS / f"{task}-{this_machine()['device']}".replace(" ", "-")
    if not folder.exists():
        own = folder.with_name(f".{folder.name}-{os.getpid()}")
        save_adapter(train_teacher(task), own)
        try:
            os.rename(own, folder)  # fails if another worker's is there by now
        except OSError:
            shutil.rmtree(own)
    return folder


@functools.cache
def teacher_of(task):
    """(the teacher, a plain model; its tokenizer, its answers, its checksum)"""
    folder = adapter_of(task)
    model, tokenizer = load_base()
    merge_lora(load_adapter(model, folder))
    teacher = unload_lora(model).eval()
    checksum = hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()[:12]
    return teacher, tokenizer, answers(task, teacher, tokenizer), checksum


def answers(task, model, tokenizer):
    """What a model answers to each test row: (rows,) of classes, or a list of texts."""
    rows = splits_of(task)["test"]
    if task == "distillation":
        return classify(model, tokenizer, rows["prompt"]).tolist()
    prompts = [row["prompt"] for row in rows]
    written = complete(model, tokenizer, prompts, max_new_tokens=8, batch_size=500)
    return [text.strip() for text in written]


def wanted(task):
    """The right answers, in the same form."""
    rows = splits_of(task)["test"]
    return rows["label"] if task == "distillation" else [row["answer"].strip() for row in rows]


def run(task, method, lr, seed, steps, examples):
    """Cut and train by one route. Returns {column: value}."""
    teacher, tokenizer, by_teacher, checksum = teacher_of(task)
    begin = time.monotonic()  # the teacher is there now, for the next run too
    route, last, loss, temperature, _ = LISTS[task][method]
    splits, right_ones = splits_of(task), wanted(task)
    training = splits["train"]
    if examples:
        training = training[:examples]
    model = load_base()[0] if route.endswith("untuned") else teacher
    torch.manual_seed(seed)
    row, stages, done = {}, [], 0
    for keep in ROUTES[route]:
        model = student_from_layers(model, keep)
        stages.append(judge(task, model, tokenizer, done, by_teacher, right_ones)[1])
        lowest = max(0, len(keep) - last)  # the first block that is trained
        names = (f"model.layers.{i}" for i in range(lowest, len(keep)))
        unfreeze(freeze(model), *names, "model.norm")
        # Not the teacher's order, and a new one for each stage.
        row = fit(model, tokenizer, training, lr=lr, seed=1000 * seed + done + 1,
                  steps=steps // len(ROUTES[route]), batch=BATCH, precision="bfloat16",
                  **loss_of(loss, temperature, teacher, len(keep)))  # fmt: skip
        done += steps // len(ROUTES[route])
        columns, stage = judge(task, model, tokenizer, done, by_teacher, right_ones)
        stages.append(stage)
    row |= {"valid_loss": loss_on(model, tokenizer, splits["validation"])} | columns
    taught = sum(a == b for a, b in zip(by_teacher, right_ones, strict=True))
    row["details"] = {"teacher": checksum, "teacher_right": taught, "stages": stages}
    row["details"] |= {"whole_seconds": round(time.monotonic() - begin, 1)}
    return row


def judge(task, model, tokenizer, step, by_teacher, right_ones):
    """(the columns of `marked`, the state of a student after a cut or a training)"""
    found = answers(task, model, tokenizer)
    columns = marked([a == b for a, b in zip(found, right_ones, strict=True)])
    stage = {
        "step": step,
        "layers": len(blocks(model)),
        "parameters": count_parameters(model)[1],
        "bytes": sum(p.nbytes for p in model.parameters()),
        "right": columns["right"],
        "as_teacher": sum(a == b for a, b in zip(found, by_teacher, strict=True)),
    }
    return columns, stage
