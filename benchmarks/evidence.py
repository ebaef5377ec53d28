"""The runs behind what the course says: each method trained for each task, one row for every run.

    python benchmarks/evidence.py --list                   the tasks, and what can be run next
    python benchmarks/evidence.py --tasks grades --workers 10 --seconds 580

A task (benchmarks/tasks) says what is trained and how it is judged. For each of its settings the
learning rate is searched with the first seed: all rates of the setting, and further ones, three
times as large or small, while the best one is at an end of those tried. Best is the lowest
validation loss. The other seeds then run at that rate. A single rate is not searched.

Each run appends one row to benchmarks/results/evidence.csv when it is through, with the date, the
device and the versions. A run that is in the file, from the same device, is not repeated, so the
script can be stopped and started at any time; two at once on one file would do the same work twice.
--workers processes share the device. With --seconds no run begins that might not end in time, to
judge by the longest run so far (`may_take`). Exit status: 0 when nothing is left to do, 1 when runs
failed, 3 when the time was up.
"""

import argparse
import json
import math
import multiprocessing
import os
import threading
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
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
    search = len(rates) > 1
    of_seed = {seed: {} for seed in seeds}  # {seed: {rate: row}}
    for row in rows:
        run = run_of(row)
        if search and not row["valid_loss"]:  # one of the first rows; the search makes it again
            continue
        if run[:2] + run[4:] == (task, method, steps, examples) and run.seed in of_seed:
            of_seed[run.seed][run.lr] = row
    runs = [Run(task, method, lr, seeds[0], steps, examples) for lr in rates]
    if not rates:  # nothing is trained, so one run is enough
        runs = [Run(task, method, 0.0, seeds[0], steps, examples)]
        return [run for run in runs if run.lr not in of_seed[run.seed]]
    tried = of_seed[seeds[0]]
    first = [run for run in runs if run.lr not in tried]
    if first:
        return first
    best = rates[0]
    if search:
        best = min(tried, key=lambda lr: valid_loss(tried[lr]))
        if len(tried) < MOST_RATES and best in (min(tried), max(tried)):
            lr = further(best, up=best == max(tried))
            return [Run(task, method, lr, seeds[0], steps, examples)]
    return [Run(task, method, best, s, steps, examples) for s in seeds if best not in of_seed[s]]


def further(lr, up):
    """The next rate of 1e-3, 3e-3, 1e-2, 3e-2, ... that is larger or smaller."""
    grid = [float(f"{digit}e{power}") for power in range(-9, 4) for digit in (1, 3)]
    return min(r for r in grid if r > lr) if up else max(r for r in grid if r < lr)


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


def may_take(run, finished, running):
    """Seconds to expect of a run: those of the longest one before, more if it has more steps.

    finished: (training run, seconds). While none is of this task, all of them count, and running:
    the seconds that other runs have taken by now. 0 if there is nothing.
    """
    own = [(other, seconds) for other, seconds in finished if other.task == run.task]
    longest = [seconds * max(1, run.steps / other.steps) for other, seconds in own or finished]
    return max(longest + ([] if own else running), default=0.0)


def seconds_of(row):
    """How long the run of a row took: from loading the model to judging it, if that is known."""
    whole = json.loads(row["details"] or "{}").get("whole_seconds")
    return float(whole or row.get("seconds") or 0)


def threads_of(workers):
    """The part of the cores that each of some processes gets."""
    return max(1, torch.get_num_threads() // workers)


def begin_worker(threads, parent):
    """Give a process its part of the cores, and end it when the runner is gone."""
    torch.set_num_threads(threads)

    def watch():
        while os.getppid() == parent:
            time.sleep(2)
        os._exit(1)  # a killed runner cannot tell its workers; they would hold the device

    threading.Thread(target=watch, daemon=True).start()


def make(run):
    """Train and judge: a row of the file. Runs in a process of its own.

    `seconds` of a row are those of the training, `whole_seconds` in its details those of the run,
    unless the task says what a run takes without what is done once.
    """
    from transformers.utils import logging

    from tasks import TASKS

    logging.set_verbosity_error()
    start = time.monotonic()
    try:
        row = TASKS[run.task][1](*run[1:])
    except FloatingPointError as error:  # it diverged: a result, and never the best rate
        row = {"valid_loss": "inf", "details": {"diverged": str(error)}}
    details = {"whole_seconds": round(time.monotonic() - start, 1)} | row.get("details", {})
    row["details"] = json.dumps(details, ensure_ascii=False)
    return this_machine() | run._asdict() | row


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
    known = {setting.method for task in tasks for setting in TASKS[task][0]}
    for method in options.methods or ():
        if method not in known:
            parser.error(f"there is no method {method!r} in {', '.join(tasks)}")
    wanted = options.methods, options.seeds
    if options.list:
        rows = rows_so_far(options.out)
        for task in tasks:
            made = sum(row["task"] == task for row in rows)
            print(f"{task:18} {made:4} runs made, {len(plan([task], rows, *wanted)):4} can be next")
        return
    begin, failed = time.monotonic(), set()
    threads = threads_of(options.workers)
    finished = [  # with as many threads each, so about as many at once
        (run_of(row), seconds_of(row))
        for row in rows_so_far(options.out)
        if run_of(row).steps and row["threads"] == str(threads)
    ]
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    start = (begin_worker, (threads, os.getpid()))
    with ProcessPoolExecutor(options.workers, context, *start) as pool:
        running = {}  # {future: (run, when it began)}
        while True:
            now = time.monotonic()
            left = options.seconds - (now - begin)
            busy = {*(run for run, _ in running.values()), *failed}
            todo = [r for r in plan(tasks, rows_so_far(options.out), *wanted) if r not in busy]
            so_far = [now - since for _, since in running.values()]
            needs = {run: 1.2 * may_take(run, finished, so_far) for run in todo}
            fits = [run for run in todo if left > needs[run]]
            for run in fits[: options.workers - len(running)]:
                running[pool.submit(make, run)] = run, now
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run, _ = running.pop(future)
                try:
                    row = future.result()
                except BrokenProcessPool:
                    raise SystemExit(
                        f"A worker died during {run}; start again with fewer."
                    ) from None
                except Exception as error:  # the other runs go on; this one is told about
                    failed.add(run)
                    print(f"{run}: {type(error).__name__}: {error}", flush=True)
                    continue
                append_rows(options.out, COLUMNS, [row])
                took = seconds_of(row)
                if run.steps:
                    finished.append((run, took))
                print(*run, f"-> {row.get('right', '-')} right, validation loss "
                      f"{row.get('valid_loss', '-')}, {took:.0f} s", flush=True)  # fmt: skip
    if failed:
        raise SystemExit(f"{len(failed)} runs failed")
    if todo:
        print(f"The time is up; next is {todo[0]}, which may take {needs[todo[0]]:.0f} s.")
    raise SystemExit(3 if todo else 0)


if __name__ == "__main__":
    main()
