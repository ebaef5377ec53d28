"""QLoRA: what a base in 4 bits costs in time, and whether its memory is what `estimate` says.

    python benchmarks/qlora.py [--bases nf4 bfloat16] [--rounds 12] [--batch 4] [--seq 64 256]

Time: one training step of LoRA (r=8, q_proj and v_proj) on SmolLM2, whose base is kept in NF4, in
bfloat16 or in float32. They take turns in one process, in an order that changes every round; what
counts is the ratio within a round. A CPU without bfloat16 arithmetic takes minutes for such a step;
`--bases nf4` leaves it out.

Memory: the peak of `train` on each base, every token a target, against `memory.estimate`. On a CPU
every tensor is followed from its birth to its death; on CUDA it is the allocator's peak, less what
stood there before.

The rows replace those of this device in results/qlora-cpu.csv or qlora-cuda.csv.
"""

import argparse
import gc
import random
from pathlib import Path

import torch
from tqdm import tqdm

from minipeft import add_lora, load_base, pick_device, train
from minipeft.memory.estimate import estimate
from minipeft.memory.measure import Tracker
from minipeft.quantization import quantize_base
from step import interval, median, seconds, tuned_step
from this_machine import replace_rows, this_machine

RESULTS = Path(__file__).parent / "results"
BASES = {
    "nf4": quantize_base,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float32": lambda model: model,
}
COLUMNS = ["batch", "seq", "seed", "round", "base", "seconds", "train_peak", "estimate"]


def lora_on(base):
    """A function that puts LoRA on a model whose base it keeps as that name says."""
    return lambda model: add_lora(BASES[base](model), r=8, alpha=16)


def train_peak(model, batch):
    """Bytes that stand at the peak of `train`, with those of the model and the batch."""
    own = [*model.parameters(), *model.buffers(), *batch.values()]
    device, size = own[0].device, sum(tensor.nbytes for tensor in own)
    run = {"max_steps": 2, "lr": 1e-4, "progress": False}  # the first makes the optimizer's state
    model.zero_grad(set_to_none=True)  # of steps at another length
    if device.type == "cuda":
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        train(model, [batch], **run)
        return torch.cuda.max_memory_allocated() - before + size
    with Tracker(own, 0, 0) as tensors:
        train(model, [batch], **run)
    return tensors.peak


def main():
    parser = argparse.ArgumentParser(description="LoRA on a base in NF4, bfloat16 and float32.")
    against = [base for base in BASES if base != "float32"]
    parser.add_argument("--bases", nargs="*", default=against, choices=against)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--seq", type=int, nargs="*", default=[64, 256], help="tokens in a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device, rng, machine = pick_device(), random.Random(options.seed), this_machine()
    torch.manual_seed(options.seed)
    bases = [*options.bases, "float32"]
    models = {base: lora_on(base)(load_base()[0]).train() for base in bases}
    config, rows = models["float32"].config, []
    for seq in options.seq:
        setting = {"batch": options.batch, "seq": seq, "seed": options.seed}
        ids = torch.randint(100, 200, (options.batch, seq), device=device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["attention_mask"][0, 0] = 0  # `estimate` counts on padding; without, there is no mask
        peaks = {base: train_peak(model, batch) for base, model in models.items()}
        size = {"batch": options.batch, "seq": seq, "device": device.type}
        predicted = {base: estimate(config, lora_on(base), **size).total for base in bases}
        steps = {base: tuned_step(model, batch) for base, model in models.items()}
        for step in steps.values():  # warm up; the optimizer makes its state here
            step()
        rounds = []
        for _ in tqdm(range(options.rounds), unit="round", desc=f"{options.batch} x {seq}"):
            order = list(steps)
            rng.shuffle(order)
            rounds.append({base: seconds(steps[base], device) for base in order})
        for base in options.bases:
            ratios = [row[base] / row["float32"] for row in rounds]
            low, high = interval(ratios, rng)
            print(f"{options.batch} x {seq} tokens: a step on {base} takes {median(ratios):.2f} "
                  f"times one on float32 (95 % interval {low:.2f} to {high:.2f})")  # fmt: skip
        for base in bases:
            error = predicted[base] / peaks[base] - 1
            print(f"  {base}: peak of train {peaks[base] / 2**20:,.1f} MiB, predicted "
                  f"{predicted[base] / 2**20:,.1f} ({error:+.2%})")  # fmt: skip
        for i, row in enumerate(rounds):
            for base, value in row.items():
                measured = [i, base, f"{value:.4f}", peaks[base], predicted[base]]
                columns = zip(COLUMNS, [*setting.values(), *measured], strict=True)
                rows.append(machine | dict(columns))
    replace_rows(RESULTS / f"qlora-{device.type}.csv", [*machine, *COLUMNS], rows)


if __name__ == "__main__":
    main()
