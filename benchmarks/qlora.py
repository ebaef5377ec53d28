"""QLoRA: what a base in 4 bits costs in time, and whether its memory is what `estimate` says.

    python benchmarks/qlora.py [--rounds 12] [--batch 4] [--seq 64 256]

Time: one training step of LoRA (r=8, q_proj and v_proj) on SmolLM2, whose base is kept in NF4 or in
float32. Both take turns in one process, in an order that changes every round; what counts is the
ratio within a round.

Memory: the peak of `train` on both bases, every token a target, against `memory.estimate`. On a CPU
every tensor is followed from its birth to its death; on CUDA it is the allocator's peak.
"""

import argparse
import random

import torch
from step import ROOT, interval, median, seconds, tuned_step
from tqdm import tqdm

from minipeft import add_lora, load_base, pick_device, train
from minipeft.memory import Tracker, estimate
from minipeft.quantization import quantize_base
from this_machine import append_rows, this_machine

BASES = {"nf4": quantize_base, "float32": lambda model: model}
COLUMNS = ["batch", "seq", "seed", "round", "base", "seconds", "train_peak", "estimate"]
PATH = ROOT / "benchmarks" / "results"


def tuned(base):
    """SmolLM2 with LoRA on a base of this name."""
    return add_lora(BASES[base](load_base()[0]), r=8, alpha=16)


def train_peak(model, batch):
    """Bytes that stand at the peak of `train`, those of the model and the batch included."""
    own = [*model.parameters(), *model.buffers(), *batch.values()]
    run = {"max_steps": 2, "lr": 1e-4, "progress": False}  # the first makes the optimiser's state
    if own[0].device.type == "cuda":
        torch._C._cuda_clearCublasWorkspaces()
        others = torch.cuda.memory_allocated() - sum(t.nbytes for t in set(own))
        torch.cuda.reset_peak_memory_stats()
        train(model, [batch], **run)
        return torch.cuda.max_memory_allocated() - others
    with Tracker(own, 0, 0) as memory:
        train(model, [batch], **run)
    return memory.peak


def main():
    parser = argparse.ArgumentParser(description="LoRA on a base in NF4 against one in float32.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--seq", type=int, nargs="*", default=[64, 256], help="tokens in a row")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device, rng, machine = pick_device(), random.Random(options.seed), this_machine()
    torch.manual_seed(options.seed)
    models = {base: tuned(base).train() for base in BASES}
    config = models["float32"].config
    for seq in options.seq:
        ids = torch.randint(100, 40_000, (options.batch, seq), device=device)
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        batch["attention_mask"][0, 0] = 0  # as `estimate` assumes; without padding there is no mask
        rounds, memory = [], {}
        for base, model in models.items():
            method = lambda m, base=base: add_lora(BASES[base](m), r=8, alpha=16)  # noqa: E731
            predicted = estimate(
                config, method, batch=options.batch, seq=seq, device=device.type
            ).total
            memory[base] = train_peak(model, batch), predicted
        steps = {base: tuned_step(model, batch) for base, model in models.items()}
        for step in steps.values():  # warm up; the optimiser makes its state here
            step()
        for _ in tqdm(range(options.rounds), unit="round", desc=f"{options.batch} x {seq}"):
            names = list(steps)
            rng.shuffle(names)
            rounds.append({base: seconds(steps[base], device) for base in names})
        rows = [
            machine
            | {"batch": options.batch, "seq": seq, "seed": options.seed, "round": i, "base": base}
            | {"seconds": f"{value:.4f}"}
            | dict(zip(("train_peak", "estimate"), memory[base], strict=True))
            for i, row in enumerate(rounds)
            for base, value in row.items()
        ]
        append_rows(PATH / f"qlora-{device.type}.csv", [*machine, *COLUMNS], rows)
        ratios = [row["nf4"] / row["float32"] for row in rounds]
        low, high = interval(ratios, rng)
        print(f"{options.batch} x {seq}: a step on NF4 takes {median(ratios):.2f} times that on "
              f"float32 (95 % interval {low:.2f} to {high:.2f})")  # fmt: skip
        for base, (measured, predicted) in memory.items():
            print(f"  {base}: train {measured / 2**20:,.1f} MiB, estimate {predicted / 2**20:,.1f} "
                  f"({predicted / measured - 1:+.2%})")  # fmt: skip


if __name__ == "__main__":
    main()
