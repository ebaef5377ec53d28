"""The runs behind what the course says: each method trained for each task, one row for every run.

    python benchmarks/evidence.py --list                   what there is, and how much is missing
    python benchmarks/evidence.py --tasks grades --workers 10 --seconds 580

A task (benchmarks/tasks) says what is trained and how it is judged. For each of its settings the
learning rate is searched with the first seed: all rates of the setting, and further ones, three
times as large or small, while the best one is at an end of those tried. Best is the lowest
validation loss. The other seeds then run at that rate.

Each run appends one row to benchmarks/results/evidence.csv when it is through, with the date, the
device and the versions. A run that is in the file, from the same device, is not repeated, so the
script can be stopped and started at any time. --workers processes share the device. With --seconds
no run begins that might not end in time, to judge by the longest one so far.
"""

import argparse
import json
import math
import multiprocessing
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch

from this_machine import append_rows, rows_so_far, this_machine

RESULTS = Path(__file__).resolve().parent / "results" / "evidence.csv"
COLUMNS = """date device threads torch transformers task method lr seed steps examples batch
trainable seconds train_loss valid_loss right total answers curve details""".split()
MOST_RATES = 9  # of one setting; a method that still improves there is not helped by more


class Run(NamedTuple):
    """One training run. A row of the file has the same columns."""

    task: str
    method: str
    lr: float
    seed: int
    steps: int
    examples: int


def run_of(row):
    """The Run that a row of the file holds."""
    return Run(row["task"], row["method"], float(row["lr"]), int(row["seed"]), int(row["steps"]),
               int(row["examples"]))  # fmt: skip


def valid_loss(row):
    """The validation loss of a row; infinite where the run diverged."""
    loss = float(row["valid_loss"] or "inf")
    return math.inf if math.isnan(loss) else loss


def missing(task, setting, rows):
    """The runs of a setting that can be made now, and are not among the rows of this device."""
    method, rates, steps, examples, seeds = setting
    of_seed = {seed: {} for seed in seeds}  # {seed: {rate: row}}
    for row in rows:
        run = run_of(row)
        if run[:2] + run[4:] == (task, method, steps, examples) and run.seed in of_seed:
            of_seed[run.seed][run.lr] = row
    runs = [Run(task, method, lr, seeds[0], steps, examples) for lr in rates]
    if not rates:  # nothing is trained, so one run is enough
        runs = [Run(task, method, 0.0, seeds[0], steps, examples)]
        return [run for run in runs if run.lr not in of_seed[run.seed]]
    tried = of_seed[seeds[0]]
    search = len(rates) > 1
    first = [r for r in runs if r.lr not in tried or (search and not tried[r.lr]["valid_loss"])]
    if first:
        return first
    best = rates[0]
    if search:
        tried = {lr: row for lr, row in tried.items() if row["valid_loss"]}
        best = min(tried, key=lambda lr: valid_loss(tried[lr]))
        if len(tried) < MOST_RATES and best in (min(tried), max(tried)):
            lr = further(best, up=best == max(tried))
            return [Run(task, method, lr, seeds[0], steps, examples)]
    return [Run(task, method, best, s, steps, examples) for s in seeds if best not in of_seed[s]]


def further(lr, up):
    """The next rate, about three times as large or small: 1e-3, 3e-3, 1e-2, ..."""
    return float(f"{lr * (3.16 if up else 1 / 3.16):.0e}")


def plan(tasks, rows, methods=None, seeds=None):
    """All runs that can be made now, task by task."""
    from tasks import TASKS

    return [
        run
        for task in tasks
        for setting in TASKS[task][0]
        if not methods or setting.method in methods
        for run in missing(task, setting, rows)
        if seeds is None or run.seed in seeds
    ]


def share_cores(workers):
    """Give each process its part of the cores; more threads than cores wait for each other."""
    torch.set_num_threads(max(1, torch.get_num_threads() // workers))


def make(run):
    """Train and judge: a row of the file. Runs in a process of its own."""
    from transformers.utils import logging

    from tasks import TASKS

    logging.set_verbosity_error()
    start = time.monotonic()
    row = TASKS[run.task][1](*run[1:])
    row["details"] = json.dumps(row.get("details", {}), ensure_ascii=False)
    return this_machine() | run._asdict() | row, time.monotonic() - start


def main():
    parser = argparse.ArgumentParser(description="Make the runs that are missing.")
    parser.add_argument("--tasks", nargs="*", help="all of them, if none is named")
    parser.add_argument("--methods", nargs="*", help="such as 'LoRA, all linear, r=8'")
    parser.add_argument("--seeds", nargs="*", type=int)
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--seconds", type=float, default=math.inf, help="end within this time")
    parser.add_argument("--list", action="store_true", help="count the runs, and make none")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    from tasks import TASKS

    tasks = options.tasks or list(TASKS)
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        parser.error(f"there is no task {unknown[0]}; choose from {', '.join(TASKS)}")
    wanted = options.methods, options.seeds
    if options.list:
        rows = rows_so_far(options.out)
        for task in tasks:
            made = sum(row["task"] == task for row in rows)
            print(f"{task:18} {made:4} runs made, {len(plan([task], rows, *wanted)):4} can be next")
        return
    begin, longest, failed = time.monotonic(), 0.0, set()
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    with ProcessPoolExecutor(options.workers, context, share_cores, (options.workers,)) as pool:
        running = {}
        while True:
            left = options.seconds - (time.monotonic() - begin)
            busy = {*running.values(), *failed}
            todo = [r for r in plan(tasks, rows_so_far(options.out), *wanted) if r not in busy]
            for run in todo[: options.workers - len(running)]:
                if left > longest * 1.1:
                    running[pool.submit(make, run)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                try:
                    row, took = future.result()
                except Exception as error:  # the other runs go on; this one is told about
                    failed.add(run)
                    print(f"{run}: {type(error).__name__}: {error}", flush=True)
                    continue
                longest = max(longest, took)
                append_rows(options.out, COLUMNS, [row])
                print(*run, f"-> {row.get('right', '-')} right, validation loss "
                      f"{row.get('valid_loss', '-')}, {took:.0f} s", flush=True)  # fmt: skip
    raise SystemExit(f"{len(failed)} runs failed" if failed else 0)


if __name__ == "__main__":
    main()
