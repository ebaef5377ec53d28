"""What each method costs: a training step, reading, writing, memory, and the file that is kept.

    python benchmarks/cost.py [--methods 'LoRA, all linear, r=8' ...] [--seconds 540]

One row for each method of tasks/methods.py, and for two more that notebook 13 compares, in each
state it can be used in: as trained, merged (LoRA) or folded (virtual tokens that an encoder
writes); and students with half of the blocks.

  step_ratio    a training step of 8 x 64 tokens over one of LoRA on queries and values
  read_B        prefill of B prompts of 64 tokens, over the bare model's; read_ms_B in milliseconds
  write_B       32 new tokens for B prompts of 16 tokens, over the bare model's; write_ms_B
  peak_gib      the most memory of such a step, with AdamW in float32 (`memory.measure`)
  file_bytes    what has to be kept: the adapter's file, or the trained tensors in one file
  frozen        were all models frozen to read and write? "no" in the first rows, whose ratios are
                therefore not to be compared with the others

Ratios are medians of rounds in which both contenders take turns, in an order that changes: of
--rounds, or of fewer where two or more took 5 seconds. Their weights lie in memory that was
allocated in the same way: a model loaded from a file and one that was copied differ in speed by
several percent on a CPU. All are frozen to read and write: torch multiplies the last position
(`logits_to_keep=1`) by a frozen head row by row of the batch, and by a trainable one at once.

A method that results/cost.csv has from this device is not measured again. With --seconds none is
begun that might not end in time, to judge by the longest so far. Exit status: 0 when nothing is
left to do, 1 when methods failed, 3 when the time was up.
"""

import argparse
import copy
import math
import statistics
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.utils import logging

from minipeft import (
    add_lora,
    add_p_tuning,
    add_prompt_tuning,
    count_parameters,
    fold_p_tuning,
    fold_p_tuning_v2,
    fold_prefix_tuning,
    load_base,
    merge_lora,
    pick_device,
    save_adapter,
    student_from_layers,
)
from minipeft.memory import measure
from minipeft.technique.on_model import technique_of
from tasks.methods import METHODS
from tasks.training import fresh
from this_machine import InTime, append_rows, rows_so_far, seconds, this_machine

RESULTS = Path(__file__).resolve().parent / "results" / "cost.csv"
BATCHES = (1, 32, 256)
ENOUGH = 5.0  # seconds of two contenders that take turns
COLUMNS = """date device threads torch transformers method state frozen trainable file_bytes
peak_gib step_ratio""".split()
COLUMNS += [
    f"{kind}_{size}" for size in BATCHES for kind in ("read", "read_ms", "write", "write_ms")
]
FOLDS = {
    "p_tuning": fold_p_tuning,
    "prefix_tuning": fold_prefix_tuning,
    "p_tuning_v2": fold_p_tuning_v2,
}
ADD = {name: add for name, (_, add) in METHODS.items()} | {
    "prompt tuning, n=10": lambda model: add_prompt_tuning(model, 10),
    "P-tuning, n=10": lambda model: add_p_tuning(model, 10, "mlp"),
}
STUDENTS = {"student, first 15 blocks": range(15), "student, every other block": range(0, 30, 2)}


def states(method):
    """(state, model in that state), one after the other."""
    if method in STUDENTS:
        student = student_from_layers(load_base()[0], STUDENTS[method])
        yield "as trained", student  # every parameter, as when all of its blocks are trained
        return
    model, _ = fresh(ADD[method], 0)
    yield "as trained", model
    if technique_of(model) == "lora":
        yield "merged", merge_lora(model)
    elif technique_of(model) in FOLDS:
        try:
            FOLDS[technique_of(model)](model)
        except ValueError:  # there is nothing to fold
            return
        yield "folded", model


def settled(model):
    """The model frozen, with all weights in memory of their own, allocated alike for all."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model.requires_grad_(False).eval()


def compare(contenders, rounds):
    """(seconds of the first over seconds of the second function, seconds of the first): medians.

    Of `rounds` rounds, or of fewer if they took ENOUGH; each contender begins half of them.
    """
    ratios, times, spent, device = [], [], 0.0, pick_device()
    for number in range(rounds + 1):
        if number > 2 and number % 2 and spent > ENOUGH:
            break
        taken = {}
        for who in (0, 1) if number % 2 else (1, 0):
            taken[who] = seconds(contenders[who], device)
        ratios.append(taken[0] / taken[1])
        times.append(taken[0])
        spent += sum(taken.values()) if number else 0.0
    return statistics.median(ratios[1:]), statistics.median(times[1:])  # the first warmed up


def stepper(model, ids):
    """A function that takes one training step on ids (batch, seq)."""
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5)

    def step():
        model.train()
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step


@torch.no_grad()
def read(model, ids):
    """The next token's logits for each row of ids (batch, seq)."""
    model(ids, attention_mask=torch.ones_like(ids), use_cache=True, logits_to_keep=1)


@torch.no_grad()
def write(model, ids, tokens=32):
    """`tokens` new tokens after each row of ids (batch, seq), greedily."""
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens,
                   min_new_tokens=tokens, do_sample=False, pad_token_id=0)  # fmt: skip


def file_bytes(model):
    """What has to be kept: the adapter's file, or the trained tensors in one file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept"
        if technique_of(model):
            save_adapter(model, path)
            return (path / "adapter_model.safetensors").stat().st_size
        kept = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        save_file(kept, path)
        return path.stat().st_size


def rows_of(method, batches, rounds):
    """Measure one method in all its states: rows of the file."""
    device = pick_device()

    def ids(batch, seq):
        draw = torch.Generator().manual_seed(0)
        return torch.randint(100, words, (batch, seq), generator=draw).to(device)  # (batch, seq)

    bare = settled(load_base()[0])
    words = bare.config.vocab_size
    kept = {}
    for state, model in states(method):
        if state == "as trained" and method != "zero-shot":  # later it is frozen
            kept = {"trainable": count_parameters(model)[0], "file_bytes": file_bytes(model)}
        row = {"method": method, "state": state, "frozen": "yes"} | kept
        if state == "as trained" and method != "zero-shot":
            row["peak_gib"] = f"{measure(copy.deepcopy(model), batch=8, seq=64).total / 2**30:.3f}"
            lora, _ = fresh(add_lora, 0)
            pair = [stepper(copy.deepcopy(m), ids(8, 64)) for m in (model, lora)]
            row["step_ratio"] = f"{compare(pair, rounds)[0]:.3f}"
        settled(model)
        for size in batches:
            for kind, work, seq in (("read", read, 64), ("write", write, 16)):
                rows = ids(size, seq)
                pair = [lambda m=m, w=work, r=rows: w(m, r) for m in (model, bare)]
                ratio, taken = compare(pair, rounds)
                row |= {
                    f"{kind}_{size}": f"{ratio:.3f}",
                    f"{kind}_ms_{size}": f"{1000 * taken:.1f}",
                }
        yield row


def main():
    parser = argparse.ArgumentParser(description="Measure what each method costs.")
    parser.add_argument("--methods", nargs="*", default=[*ADD, *STUDENTS])
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES, choices=BATCHES)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end within this time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    in_time = InTime(options.seconds)
    logging.set_verbosity_error()
    common = this_machine()
    asked = [f"{kind}_{size}" for size in options.batches for kind in ("read", "write")]
    stored = [row for row in rows_so_far(options.out) if row["frozen"] == "yes"]
    done = {row["method"] for row in stored if all(row[name] for name in asked)}
    left, failed = [method for method in options.methods if method not in done], []
    for method in in_time(list(left)):
        left.remove(method)
        try:
            rows = list(rows_of(method, options.batches, options.rounds))
        except (RuntimeError, ValueError) as error:  # the others still count
            failed.append(f"{method}: {error}")
            continue
        append_rows(options.out, COLUMNS, [common | row for row in rows])
        for row in rows:
            print(*row.values(), flush=True)
    if failed:
        raise SystemExit("these failed and have no row:\n" + "\n".join(failed))
    if left:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
