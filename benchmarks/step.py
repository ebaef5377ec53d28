"""One training step: our methods against HF peft's, and against the bare frozen model.

    python benchmarks/step.py [--rounds 12] [--batch 4] [--seq 64] [--methods lora ...]

For each method the contenders take turns in one process, in an order that changes every round, so
that a busy machine is busy for all of them. What counts is the ratio within a round.

  minipeft   forward, backward, AdamW step of add_lora(r=8, q_proj and v_proj) and others
  peft       the same with HF peft
  bare       the frozen model's forward, and backward to the values of its first layer: less is not
             possible, since the gradient has to come down through every layer to reach A and B
  bare, masked
             the same with the causal mask as a tensor. Without one, attention with fewer key than
             query heads may have no fused kernel in float32. The faster form, and the one
             with less memory, counts as bare.

Peak memory counts every tensor that is alive. On a CPU it is followed operation by operation on the
storages that the step makes (weights, gradients and optimizer state that stay are not in it); on
CUDA it is the allocator's peak above what was there before the step.

The rows replace those of this device in results/step-cpu-4x64.csv, or the file of another shape or
kind of device.
"""

import argparse
import gc
import random
import weakref
from functools import partial
from pathlib import Path

import peft
import torch
from torch.utils._pytree import tree_leaves
from tqdm import tqdm

from minipeft import (
    add_lora,
    add_p_tuning,
    add_prefix_tuning,
    add_prompt_tuning,
    load_base,
    pick_device,
)
from minipeft.memory.measure import Tracker
from this_machine import replace_rows, seconds, this_machine

RESULTS = Path(__file__).resolve().parent / "results"


class PeakMemory(Tracker):
    """Counts only the storages made in the block: those of an operation's inputs exist already."""

    def __init__(self):
        super().__init__([], 0, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                forget = partial(self.forget, storage._cdata)
                self.alive.setdefault(storage._cdata, weakref.ref(storage, forget))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def forget(self, key, _):
        del self.alive[key]


def tuned_step(model, batch):
    """A function that takes one whole training step."""
    trainables = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainables, lr=1e-4)

    def step():
        optimizer.zero_grad(set_to_none=True)
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step


def bare_step(model, batch, masked=False):
    """Forward of the frozen model, and backward to the values of its first layer."""
    model.requires_grad_(False)
    values = model.model.layers[0].self_attn.v_proj
    values.register_forward_hook(lambda module, args, output: output.requires_grad_(True))
    if masked:
        rows, seq = batch["input_ids"].shape
        mask = torch.ones(seq, seq, dtype=torch.bool, device=batch["input_ids"].device).tril()
        batch = batch | {"attention_mask": mask.expand(rows, 1, seq, seq)}  # (batch, 1, seq, seq)

    def step():
        model(**batch, use_cache=False).loss.backward()

    return step


VIRTUAL = {"task_type": "CAUSAL_LM", "num_virtual_tokens": 10}
# {method: (ours, the configuration of HF peft)}; 10 virtual tokens. Key-value P-tuning v2
# is prefix-tuning, and HF peft has no hidden-state form.
METHODS = {
    "lora": (
        lambda model: add_lora(model, r=8, alpha=16),
        peft.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]),
    ),
    "prompt_tuning": (add_prompt_tuning, peft.PromptTuningConfig(**VIRTUAL)),
    "p_tuning_lstm": (
        add_p_tuning,
        peft.PromptEncoderConfig(**VIRTUAL, encoder_reparameterization_type="LSTM"),
    ),
    "p_tuning_mlp": (
        lambda model: add_p_tuning(model, encoder="mlp"),
        peft.PromptEncoderConfig(**VIRTUAL),
    ),
    "prefix_tuning": (add_prefix_tuning, peft.PrefixTuningConfig(**VIRTUAL)),
    "prefix_projection": (
        lambda model: add_prefix_tuning(model, projection=True),
        peft.PrefixTuningConfig(**VIRTUAL, prefix_projection=True),
    ),
}


def contenders(method, batch):
    """{name: step} on copies of the base model, with as many trainables in both libraries."""
    ours, config = METHODS[method]
    ours = ours(load_base()[0]).train()
    theirs = peft.get_peft_model(load_base()[0], config).train()
    trainable = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (ours, theirs)]
    assert trainable[0] == trainable[1], trainable
    return {
        "minipeft": tuned_step(ours, batch),
        "peft": tuned_step(theirs, batch),
        "bare": bare_step(load_base()[0].train(), batch),
        "bare, masked": bare_step(load_base()[0].train(), batch, masked=True),
    }


def peak_bytes(step, device):
    """Peak memory of one step, above what is there before and stays, in bytes."""
    if device.type == "cuda":
        gc.collect()  # what an earlier run left must not be freed during this one
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with PeakMemory() as memory:
        step()
    return memory.peak


def median(values):
    return torch.tensor(values, dtype=torch.float64).quantile(0.5).item()


def interval(values, rng, draws=2000):
    """A 95 % bootstrap interval of the median."""
    medians = sorted(median(rng.choices(values, k=len(values))) for _ in range(draws))
    return medians[int(0.025 * draws)], medians[int(0.975 * draws)]


def main():
    parser = argparse.ArgumentParser(description="Ratios of one training step.")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--batch", type=int, default=4, help="rows")
    parser.add_argument("--seq", type=int, default=64, help="tokens in a row")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    options = parser.parse_args()
    device, rng = pick_device(), random.Random(options.seed)
    torch.manual_seed(options.seed)
    ids = torch.randint(100, 40_000, (options.batch, options.seq), device=device)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    run = this_machine() | {
        "peft": peft.__version__,
        "batch": options.batch,
        "seq": options.seq,
        "seed": options.seed,
    }
    print(", ".join(f"{name} {value}" for name, value in run.items()), f"{options.rounds} rounds")
    rows, table = [], []
    for method in options.methods:
        steps = contenders(method, batch)
        for step in steps.values():  # warm up; the optimizer makes its state here
            step()
        peaks = {name: peak_bytes(step, device) for name, step in steps.items()}
        rounds = []
        for _ in tqdm(range(options.rounds), unit="round", desc=method):
            names = list(steps)
            rng.shuffle(names)
            rounds.append({name: seconds(steps[name], device) for name in names})
        rows += [
            run | {"method": method, "round": i, "contender": name, "seconds": f"{value:.4f}",
                   "peak_bytes": peaks[name]}
            for i, row in enumerate(rounds)
            for name, value in row.items()
        ]  # fmt: skip
        line = f"| {method} |"
        for name in ("peft", "bare"):
            forms = [who for who in steps if who.split(",")[0] == name]  # bare has two
            fastest = min(forms, key=lambda who: median([row[who] for row in rounds]))
            ratios = [row["minipeft"] / row[fastest] for row in rounds]
            low, high = interval(ratios, rng)
            line += f" {median(ratios):.2f} ({low:.2f} to {high:.2f}) |"
            line += f" {peaks['minipeft'] / min(peaks[who] for who in forms):.3f} |"
        table.append(line)
    print("\n| method | step time to HF peft | peak memory | step time to bare | peak memory |")
    print("|---|---|---|---|---|", *table, sep="\n")
    path = RESULTS / f"step-{device.type}-{options.batch}x{options.seq}.csv"
    replace_rows(path, list(rows[0]), rows)
    print(f"\nraw rounds: {path.relative_to(RESULTS.parents[1])}")


if __name__ == "__main__":
    main()
