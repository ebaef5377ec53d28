"""`train` against HF peft with `Trainer`, and against TRL's `SFTTrainer`, on the same rows.

    python benchmarks/train.py [--steps 8] [--batch 4] [--precision bfloat16] [--seconds 540]

Whole training runs take turns in one process, in an order that changes every round, so that a busy
machine is busy for all of them. What counts is the ratio within a round. LoRA r=8 on the query and
value projections, AdamW, a rate that falls to 0; no evaluation, no checkpoint, no log. Rows come in
the same order, in two shapes: only the last 16 of 128 tokens are targets, or all of them. What a
run does before its first step counts too. A GPU is soon through with 8 steps: take --steps 200.
On a CPU that others use, the ratio of the process's own CPU time is the surer one.

  minipeft   add_lora and train, which makes logits at the targets only
  Trainer    HF peft's LoRA and the Trainer of transformers
  TRL        the same LoRA and TRL's SFTTrainer, which makes logits in tiles, on CUDA at the targets
             only, and does not keep them; left out where trl is not installed (`pip install trl`)

Each run begins with a fresh copy of the model, and with the same numbers in A. So all of them must
find the same losses: that of the first step, to 1e-3 in float32, and the mean of the whole run, to
1e-2. Peak memory is that of a run of one step, counted as in step.py.

Each round is appended to results/train-cpu.csv or train-cuda.csv. Rounds that this device has with
all contenders and the same settings count toward --rounds. With --seconds no round is begun that
might not end in time, to judge by the longest so far. Exit status: 0 when nothing is left to do, 1
when the losses of the contenders differed, 3 when the time was up.
"""

import argparse
import copy
import importlib.util
import logging
import math
import os
import random
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import peft
import torch
import transformers
from datasets import Dataset

from minipeft import Batches, Collator, add_lora, load_base, pick_device, train
from step import interval, median, peak_bytes
from this_machine import InTime, append_rows, rows_so_far, seconds, this_machine

RESULTS = Path(__file__).resolve().parent / "results"
LR = 1e-4
COLUMNS = """base precision batch seq targets steps seed round contender seconds cpu_seconds
tokens_per_second peak_bytes first_loss mean_loss""".split()


def rows_of(count, seq, targets, vocab):
    """Rows of random tokens of which the last `targets` have a label."""
    ids = torch.randint(100, vocab, (count, seq)).tolist()
    ignored = [-100] * (seq - targets)
    return [
        {"input_ids": row, "attention_mask": [1] * seq, "labels": ignored + row[seq - targets :]}
        for row in ids
    ]


def same_start(model, seed):
    """Draw every A of LoRA from `seed`. B is zero in both libraries."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def of_minipeft(model, tokenizer, rows, steps, options, folder):
    """A function that trains with minipeft and returns the mean loss of the steps."""
    model = same_start(add_lora(model, r=8, alpha=16), options.seed)
    collate = Collator(tokenizer.pad_token_id)
    batches = Batches(rows, collate, options.batch, shuffle=False)
    settings = {"lr": LR, "precision": options.precision, "seed": options.seed, "progress": False}

    def work():
        losses = train(model, batches, max_steps=steps, **settings).train_loss
        return sum(losses) / len(losses)

    return work


def settings_of_theirs(steps, options, folder):
    """The arguments of `train`, in the words of transformers; what costs time for nothing is off.

    TRL would recompute activations, and compute in bfloat16, unless it is told not to.
    """
    return {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": LR,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": False,
        "bf16": options.precision == "bfloat16",
        "use_cpu": pick_device().type == "cpu",
        "seed": options.seed,
        "logging_strategy": "no",
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def lora_of_peft(model, seed):
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model.config.use_cache = False
    return same_start(peft.get_peft_model(model, config), seed)


def run_of(trainer):
    """A function that trains with a trainer of theirs and returns the mean loss of the steps."""
    trainer.remove_callback(transformers.PrinterCallback)
    return lambda: trainer.train().training_loss


def of_trainer(model, tokenizer, rows, steps, options, folder):
    settings = settings_of_theirs(steps, options, folder)
    return run_of(
        transformers.Trainer(
            lora_of_peft(model, options.seed),
            transformers.TrainingArguments(**settings),
            data_collator=transformers.default_data_collator,
            train_dataset=Dataset.from_list(rows),
        )
    )


def of_trl(model, tokenizer, rows, steps, options, folder):
    from trl import SFTConfig, SFTTrainer

    settings = settings_of_theirs(steps, options, folder)
    ready = {"skip_prepare_dataset": True}  # the rows have ids and labels
    return run_of(
        SFTTrainer(
            lora_of_peft(model, options.seed),
            SFTConfig(**settings, max_length=None, dataset_kwargs=ready),
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
        )
    )


def contenders():
    """{name: its function}. TRL is among them where it is installed."""
    found = {"minipeft": of_minipeft, "Trainer": of_trainer, "TRL": of_trl}
    if importlib.util.find_spec("trl") is None:
        print("trl is not installed, so SFTTrainer is left out.")
        del found["TRL"]
    return found


def refuse_unequal(losses, most, what, precision):
    """Print the losses of the contenders, and raise AssertionError if they differ by `most`."""
    print(f"{what}: " + ", ".join(f"{name} {loss:.5f}" for name, loss in losses.items()))
    gap = max(losses.values()) - min(losses.values())
    assert precision != "float32" or gap < most, f"{what}: the losses differ by {gap}."


def times(work, device):
    """(wall time, time of this process on its CPUs) of a function, in seconds."""
    begin = time.process_time()
    wall = seconds(work, device)
    return wall, time.process_time() - begin


def rounds_of(makers, base, tokenizer, targets, options, device):
    """Measure all contenders on one shape of data, in one round after the other, without end.

    Yields {contender: {column: value}}.
    """
    torch.manual_seed(options.seed)
    count = options.steps * options.batch
    rows = rows_of(count, options.seq, targets, base.config.vocab_size)
    result, peaks = {}, {}

    with tempfile.TemporaryDirectory() as folder:

        def ready(name, steps):
            """A function that trains a fresh copy and stores the mean loss of its steps."""
            work = makers[name](copy.deepcopy(base), tokenizer, rows, steps, options, folder)
            return lambda: result.update({name: work()})

        for name in makers:
            ready(name, 1)()  # warm up
            peaks[name] = peak_bytes(ready(name, 1), device)
        first = dict(result)
        refuse_unequal(first, 1e-3, "loss of the first step", options.precision)
        order, rng = list(makers), random.Random()  # a run seeds that of the module
        while True:
            rng.shuffle(order)
            taken = {name: times(ready(name, options.steps), device) for name in order}
            refuse_unequal(result, 1e-2, "mean loss of the run", options.precision)
            yield {
                name: {
                    "seconds": f"{wall:.4f}",
                    "cpu_seconds": f"{cpu:.4f}",
                    "tokens_per_second": f"{count * options.seq / wall:.1f}",
                    "peak_bytes": peaks[name],
                    "first_loss": f"{first[name]:.6f}",
                    "mean_loss": f"{result[name]:.6f}",
                }
                for name, (wall, cpu) in taken.items()
            }


def stored_rounds(path, setting):
    """{number of the round: {contender: row}} that a file has from this device and setting."""
    rounds = {}
    for row in rows_so_far(path):
        if all(row[name] == str(value) for name, value in setting.items()):
            rounds.setdefault(int(row["round"]), {})[row["contender"]] = row
    return rounds


def lines_of(whole, targets, seq, names):
    """The lines of the table for one shape of data. whole: rounds with all contenders."""

    def column(name, key):
        return [float(of[name][key]) for of in whole]

    for other in [name for name in names if name != "minipeft"]:
        cells = [f"{targets} of {seq}", other]
        for clock in ("seconds", "cpu_seconds"):
            pairs = zip(column(other, clock), column("minipeft", clock), strict=True)
            ratios = [theirs / ours for theirs, ours in pairs]
            low, high = interval(ratios, random.Random(0))
            cells.append(f"{median(ratios):.2f} ({low:.2f} to {high:.2f})")
        both = ("minipeft", other)
        speeds = [f"{median(column(name, 'tokens_per_second')):,.0f}" for name in both]
        peaks = [median(column(name, "peak_bytes")) for name in both]
        cells += [" and ".join(speeds), f"{peaks[0] / peaks[1]:.3f}"]
        cells.append(" and ".join(f"{peak / 2**20:,.1f}" for peak in peaks))
        yield f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description="Ratios of whole training runs.")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seq", type=int, default=128, help="tokens in a row")
    parser.add_argument("--targets", type=int, default=16, help="in the first of the two shapes")
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--base", default="smollm2", help="for load_base")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=math.inf, help="end within this time")
    options = parser.parse_args()
    in_time = InTime(options.seconds)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    device, makers = pick_device(), contenders()
    trl = version("trl") if "TRL" in makers else ""
    machine = this_machine() | {"peft": peft.__version__, "trl": trl}
    print(", ".join(f"{name} {value}" for name, value in machine.items() if value))
    base, tokenizer = load_base(options.base, device=device)
    path = RESULTS / f"train-{device.type}.csv"
    same = {
        name: getattr(options, name)
        for name in ("base", "precision", "batch", "seq", "steps", "seed")
    }
    shapes = (options.targets, options.seq)

    def whole(targets):
        """The rounds on one shape of data that have all contenders."""
        found = stored_rounds(path, same | {"targets": targets}).values()
        return [of for of in found if makers.keys() <= of.keys()]

    left = [n for n in shapes for _ in range(options.rounds - len(whole(n)))]
    measured = {n: rounds_of(makers, base, tokenizer, n, options, device) for n in shapes}
    for targets in in_time(list(left)):
        left.remove(targets)
        setting = same | {"targets": targets}
        found, numbers = next(measured[targets]), stored_rounds(path, setting)
        setting["round"] = max(numbers, default=-1) + 1
        print(f"{targets} of {options.seq}, round {setting['round']}", flush=True)
        rows = [machine | setting | {"contender": name} | row for name, row in found.items()]
        append_rows(path, [*machine, *COLUMNS], rows)
    heads = ["targets", "against", "times its speed", "by CPU time", "tokens per second"]
    print(f"\n| {' | '.join(heads)} | of its peak | MiB |", "|---" * 7 + "|", sep="\n")
    for targets in shapes:
        if rounds := whole(targets):
            print(*lines_of(rounds, targets, options.seq, makers), sep="\n")
    print(f"\nraw rounds: {path.relative_to(RESULTS.parents[1])}")
    if left:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
