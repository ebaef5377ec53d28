"""Where the time of a training step goes: arithmetic, launches, waiting. And what compiling brings.

    python benchmarks/waits.py [--shapes 4x64 16x512] [--precisions float32 bfloat16] [--mixed]

LoRA r=8 on the query and value projections, AdamW, every token a target. The runs are those that a
user starts: `train`, and HF peft under `Trainer`. A watch that is called when a step begins lets a
run warm up, then takes the time of three blocks of steps, then profiles some more steps. In each of
--rounds rounds the contenders take turns in another order; what counts is the ratio in a round.

  train                   minipeft's loop; its AdamW is torch's fused kernel
  train, AdamW not fused  the same with one kernel per operation, over all parameters at once
  train, compile          the same with compile=True
  train, CUDA graphs      the same with compile="reduce-overhead"; on CUDA only
  Trainer                 HF peft and the Trainer of transformers, fused AdamW

--mixed draws lengths from half of `seq` to `seq`; then the compiled runs pad to multiples of 32,
and `train, compile, no buckets` does not. What warming up took, compilation included, is in
`warm_seconds`.

Each run appends its row to results/waits.csv. One that is there from this device is left out, so
the command can be repeated until nothing is missing. What a call that was cut off, or a run that
failed, left of a round is made up for by the next call; then the round spans two processes. No
round and no run is begun that might not end within --seconds, to judge by the longest so far. Exit
status: 0 when nothing is left to do, 1 when runs failed, 3 when the time was up.

Columns of a profiled step: operators, ATen operators that call no other; casts, copies to another
type; reads, numbers that the host read from a tensor; launches, calls that start work on the GPU;
kernels and kernel_seconds, the work itself; idle_seconds, when the GPU had none, and idle_in, the
part of the step in which the host then was; host_... the host's time in each part; wait_seconds,
the host's time in calls that wait for the GPU. The last columns stay empty without a GPU.
"""

import argparse
import copy
import itertools
import logging
import math
import os
import random
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from unittest import mock

import peft
import torch
import transformers
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile, record_function
from train import lora_of_peft, refuse_unequal, same_start, settings_of_theirs

from minipeft import Collator, add_lora, load_base, pick_device, train
from minipeft.training import loop
from minipeft.training.loss import loss_sum
from this_machine import InTime, append_rows, rows_so_far, this_machine

PATH = Path(__file__).resolve().parent / "results" / "waits.csv"
BLOCKS, MIXED, BUCKET, LR = 3, 6, 32, 1e-4
PARTS = ("forward", "backward", "optimizer", "rest")
KEY = ["base", "batch", "seq", "lengths", "precision", "round"]
COLUMNS = [
    *KEY, "contender", "seconds", "seconds_low", "seconds_high", "warm_seconds", "mean_loss",
    "operators", "casts", "reads", *(f"host_{part}" for part in PARTS), "launches", "kernels",
    "kernel_seconds", "idle_seconds", "idle_in", "wait_seconds",
]  # fmt: skip


class Watch:
    """Called when a step begins: lets the run warm up, then times it, then profiles it."""

    def __init__(self, device, period, block):
        self.device, self.warm, self.block = device, 3 * period, block
        self.profiled = max(2, period)
        self.steps = self.warm + BLOCKS * block + self.profiled + 1
        self.step, self.times, self.profiler = 0, [], None

    def now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def __call__(self):
        timed = self.step - self.warm
        if self.step == 0:
            self.begin = self.now()
        if timed >= 0 and timed % self.block == 0 and len(self.times) <= BLOCKS:
            self.times.append(self.now())
        if timed == BLOCKS * self.block:
            kinds = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
            self.profiler = profile(activities=kinds[: 1 + (self.device.type == "cuda")])
            self.profiler.start()
            self.profile_begin = self.now()
        if timed == BLOCKS * self.block + self.profiled:
            self.profile_seconds = self.now() - self.profile_begin
            self.profiler.stop()
        self.step += 1

    def seconds(self):
        """Seconds per step of each block."""
        return [(b - a) / self.block for a, b in itertools.pairwise(self.times)]


class Watched:
    """Batches that call the watch when one is asked for, which is when a step of `train` begins."""

    def __init__(self, batches, watch):
        self.batches, self.watch = batches, watch

    def __iter__(self):
        for batch in self.batches:
            self.watch()
            yield batch


def noted(function, part):
    """The same function; the profiler shows when it ran as `part`."""

    def noting(*args, **kwargs):
        with record_function(part):
            return function(*args, **kwargs)

    return noting


# ---- what the profiler saw ---------------------------------------------------------------------


def joined(intervals):
    """Intervals (begin, end) sorted, and those that overlap made one."""
    out = []
    for begin, end in sorted(intervals):
        if out and begin <= out[-1][1]:
            out[-1] = (out[-1][0], max(end, out[-1][1]))
        else:
            out.append((begin, end))
    return out


def gaps(intervals):
    """What lies between the first and the last of the intervals and is in none of them."""
    whole = joined(intervals)
    return [(a[1], b[0]) for a, b in itertools.pairwise(whole)]


def overlap(one, other):
    """How long two lists of intervals overlap, each list without overlaps of its own."""
    total, j = 0, 0
    for begin, end in one:
        while j < len(other) and other[j][1] <= begin:
            j += 1
        k = j
        while k < len(other) and other[k][0] < end:
            total += min(end, other[k][1]) - max(begin, other[k][0])
            k += 1
    return total


def parts_of(events):
    """{part: joined intervals of the host in it}; torch itself notes the optimizer's step."""
    named = {part: [] for part in PARTS[:3]}
    for event in events:
        part = "optimizer" if event.name.startswith("Optimizer.step#") else event.name
        if part in named:
            named[part].append((event.time_range.start, event.time_range.end))
    return {part: joined(found) for part, found in named.items()}


def figures(watch):
    """The columns of a profiled step; times in seconds, everything divided by the steps."""
    events, steps = watch.profiler.events(), watch.profiled
    host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    device = [e for e in events if e.device_type != torch.autograd.DeviceType.CPU]
    device = [e for e in device if not e.is_user_annotation]  # our parts are shown there again
    aten = [e for e in host if e.name.startswith("aten::")]
    leaves = [e for e in aten if not any(c.name.startswith("aten::") for c in e.cpu_children)]
    parts = parts_of(host)
    spent = {part: sum(b - a for a, b in found) / 1e6 for part, found in parts.items()}
    spent["rest"] = watch.profile_seconds - sum(spent.values())
    row = {
        "operators": len(leaves) / steps,
        "casts": sum(e.name == "aten::_to_copy" for e in aten) / steps,
        "reads": sum(e.name == "aten::_local_scalar_dense" for e in aten) / steps,
    }
    row |= {f"host_{part}": f"{seconds / steps:.6f}" for part, seconds in spent.items()}
    if watch.device.type == "cuda":
        busy = joined((e.time_range.start, e.time_range.end) for e in device)
        idle = gaps(busy)
        where = {part: overlap(idle, found) for part, found in parts.items()}
        where["rest"] = sum(b - a for a, b in idle) - sum(where.values())
        arithmetic = sum(b - a for a, b in busy) / 1e6
        starts = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cudaMemcpyAsync", "cudaMemsetAsync")
        waits = [e for e in host if "Synchronize" in e.name]
        row |= {
            "launches": sum(e.name.startswith(starts) for e in host) / steps,
            "kernels": len(device) / steps,
            "kernel_seconds": f"{arithmetic / steps:.6f}",
            "idle_seconds": f"{(watch.profile_seconds - arithmetic) / steps:.6f}",
            "idle_in": max(where, key=where.get),
            "wait_seconds": f"{sum(e.time_range.elapsed_us() for e in waits) / 1e6 / steps:.6f}",
        }
    return row


# ---- the runs ----------------------------------------------------------------------------------


def rows_of(batch, seq, mixed, vocab, seed):
    """Rows of random tokens, all of them targets: one batch, or MIXED batches of many lengths."""
    torch.manual_seed(seed)
    count = batch * (MIXED if mixed else 1)
    lengths = torch.randint(seq // 2, seq + 1, (count,)).tolist() if mixed else [seq] * count
    ids = [torch.randint(100, vocab, (length,)).tolist() for length in lengths]
    return [{"input_ids": row, "labels": row} for row in ids]


def by_train(model, rows, collate, watch, options, compile=False, fused=True):
    model = same_start(add_lora(model, r=8, alpha=16), options["seed"])
    size = options["batch"]
    batches = [collate(rows[i : i + size]) for i in range(0, len(rows), size)]
    stream = Watched(list(itertools.islice(itertools.cycle(batches), watch.steps)), watch)
    settings = {name: options[name] for name in ("precision", "seed")}

    def plain(groups, lr):
        return torch.optim.AdamW([dict(group) for group in groups], lr=lr, fused=False)

    adamw = loop.adamw if fused else plain
    with mock.patch.object(loop, "adamw", adamw):
        history = train(
            model, stream, max_steps=watch.steps, lr=LR, loss_sum=noted(loss_sum, "forward"),
            compile=compile, progress=False, **settings,
        )  # fmt: skip
    return statistics.mean(history.train_loss)


def by_trainer(model, rows, collate, watch, options):
    class Noted(transformers.Trainer):
        compute_loss = noted(transformers.Trainer.compute_loss, "forward")

    class Begins(transformers.TrainerCallback):
        def on_step_begin(self, *_, **__):
            watch()

    every = list(itertools.islice(itertools.cycle(rows), watch.steps * options["batch"]))
    with tempfile.TemporaryDirectory() as folder:
        settings = settings_of_theirs(watch.steps, argparse.Namespace(**options), folder)
        settings["per_device_train_batch_size"] = options["batch"]
        trainer = Noted(
            lora_of_peft(model, options["seed"]),
            transformers.TrainingArguments(**settings),
            data_collator=collate,
            train_dataset=Dataset.from_list(every),
            callbacks=[Begins()],
        )
        trainer.remove_callback(transformers.PrinterCallback)
        return trainer.train().training_loss


def contenders(device, mixed):
    """{name: (function, its options, the length to pad to a multiple of)}."""
    compiled = BUCKET if mixed else 1
    found = {
        "train": (by_train, {}, 1),
        "train, AdamW not fused": (by_train, {"fused": False}, 1),
        "train, compile": (by_train, {"compile": True}, compiled),
        "train, compile, no buckets": (by_train, {"compile": True}, 1),
        "train, CUDA graphs": (by_train, {"compile": "reduce-overhead"}, compiled),
        "Trainer": (by_trainer, {}, 1),
    }
    if not mixed:
        del found["train, compile, no buckets"]
    if device.type != "cuda":
        del found["train, CUDA graphs"]
    return found


def measure(name, contender, base, tokenizer, rows, block, options, device):
    """One row of the file, machine and setting apart."""
    run, how, multiple = contender
    period = len(rows) // options["batch"]
    watch = Watch(device, period, -(-block // period) * period)
    collate = Collator(tokenizer.pad_token_id, multiple_of=multiple)
    with mock.patch.object(torch.Tensor, "backward", noted(torch.Tensor.backward, "backward")):
        loss = run(copy.deepcopy(base), rows, collate, watch, options, **how)
    seconds = watch.seconds()
    return {
        "contender": name,
        "seconds": f"{statistics.median(seconds):.6f}",
        "seconds_low": f"{min(seconds):.6f}",
        "seconds_high": f"{max(seconds):.6f}",
        "warm_seconds": f"{watch.times[0] - watch.begin:.2f}",
        "mean_loss": f"{loss:.6f}",
    } | figures(watch)


def losses_of(key, path):
    """{contender: mean loss} of the runs of one round that a file has from this device."""
    rows = [row for row in rows_so_far(path) if tuple(row[name] for name in KEY) == key]
    return {row["contender"]: float(row["mean_loss"]) for row in rows}


def table(rows):
    """Print the contenders side by side, medians over the rounds; rows as the file has them."""

    def middle(mine, name):
        found = [float(row[name]) for row in mine if row[name]]
        return statistics.median(found) if found else float("nan")

    theirs = {row["round"]: float(row["seconds"]) for row in rows if row["contender"] == "Trainer"}
    heads = "contender, ms a step, to Trainer, operators, casts, launches, kernels ms, idle ms"
    print(f"| {heads.replace(', ', ' | ')} |", "|---" * 8 + "|", sep="\n")
    for name in dict.fromkeys(row["contender"] for row in rows):
        mine = [row for row in rows if row["contender"] == name]
        ratios = [float(r["seconds"]) / theirs[r["round"]] for r in mine if r["round"] in theirs]
        ratio = f"{statistics.median(ratios):.2f}" if ratios else "-"
        counts = [f"{middle(mine, n):.0f}" for n in ("operators", "casts", "launches")]
        times = [1e3 * middle(mine, n) for n in ("seconds", "kernel_seconds", "idle_seconds")]
        words = [name, f"{times[0]:.1f}", ratio, *counts, f"{times[1]:.1f}", f"{times[2]:.1f}"]
        print(f"| {' | '.join(words)} |")


def shape(text):
    batch, seq = text.split("x")
    return int(batch), int(seq)


def main():
    device = pick_device()
    parser = argparse.ArgumentParser(description="Where the time of a training step goes.")
    parser.add_argument("--shapes", nargs="*", type=shape, default=[(4, 64), (16, 512)])
    parser.add_argument("--precisions", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mixed", action="store_true", help="lengths from half of seq to seq")
    parser.add_argument("--block", type=int, default=20 if device.type == "cuda" else 2)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end within this time")
    parser.add_argument("--base", default="smollm2", help="for load_base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    whole_rounds, runs = InTime(options.seconds), InTime(options.seconds)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    machine = this_machine() | {"peft": peft.__version__}
    print(", ".join(f"{name} {value}" for name, value in machine.items()))
    base, tokenizer = load_base(options.base, device=device)
    lengths = "mixed" if options.mixed else "equal"
    everyone = contenders(device, options.mixed)
    settings = list(itertools.product(options.shapes, options.precisions))
    rounds = {}  # {key: the contenders that it lacks}
    for number, ((batch, seq), precision) in itertools.product(range(options.rounds), settings):
        key = (options.base, str(batch), str(seq), lengths, precision, str(number))
        if left := [name for name in everyone if name not in losses_of(key, options.out)]:
            rounds[key] = left
            random.Random(f"{options.seed} {number}").shuffle(left)
    failed = []
    for key, left in whole_rounds(rounds.items()):
        batch, seq, precision = int(key[1]), int(key[2]), key[4]
        where = f"{batch} x {seq}, {precision}, round {key[5]}"
        setting = {"batch": batch, "precision": precision, "seed": options.seed}
        rows = rows_of(batch, seq, options.mixed, base.config.vocab_size, options.seed)
        for name in runs(list(left)):
            left.remove(name)
            print(f"{where}: {name}", flush=True)
            try:
                args = (base, tokenizer, rows, options.block, setting, device)
                row = measure(name, everyone[name], *args)
                losses = losses_of(key, options.out) | {name: float(row["mean_loss"])}
                refuse_unequal(losses, 1e-2, "mean loss of the run", precision)
            except (RuntimeError, ValueError, AssertionError) as error:  # the others still count
                failed.append(f"{where}, {name}: {error}")
                continue
            head = machine | dict(zip(KEY, key, strict=True))
            append_rows(options.out, [*machine, *COLUMNS], [head | row])
    stored = [row for row in rows_so_far(options.out) if row["lengths"] == lengths]
    for (batch, seq), precision in settings:
        key = (options.base, str(batch), str(seq), lengths, precision)
        if mine := [row for row in stored if tuple(row[name] for name in KEY[:5]) == key]:
            print(f"\n{batch} x {seq}, {precision}, lengths {lengths}")
            table(mine)
    if failed:
        raise SystemExit("these failed and have no row:\n" + "\n".join(failed))
    if any(rounds.values()):
        raise SystemExit(3)


if __name__ == "__main__":
    main()
