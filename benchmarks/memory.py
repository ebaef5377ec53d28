"""The memory of a training step: predicted, followed on fake tensors, and asked of the allocator.

    python benchmarks/memory.py [--cases 0 1 2] [--seconds 540]

Each case is a model with random weights of a known size, a method, and the shape of a batch.

  predicted         `memory.estimate(..., device="cuda")`: formulas, no GPU needed
  fake              `memory.measure(configuration, device="cuda")`: a step on fake tensors
  fake_accumulated  the same with two backward passes before the step: the second holds the new
                    gradient of the largest weight beside the sum so far
  allocated, allocated_accumulated
                    on a GPU: the allocator's peak of the same one or two passes and a step
  reserved, in_use  what the allocator then had from the driver, and what the whole device had in
                    use, with the CUDA context

All in bytes. Rows go to results/memory.csv; a case that is there from this device is not measured
again. With --seconds none is begun that might not end in time, to judge by the longest so far. Exit
status: 0 when nothing is left to do, 1 when cases failed, 3 when the time was up. The last three
cases are the table of the study notes: Bloom with a vocabulary of 46,145, one row of 256 tokens.
There gradients were accumulated over 8 batches; no pass after the second has a higher peak.
"""

import argparse
import gc
import math
from functools import partial
from pathlib import Path

import torch
from torch._subclasses import FakeTensorMode
from transformers import BloomConfig, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

from minipeft import (
    add_adapters,
    add_lora,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
)
from minipeft.freezing import only_head, only_last_blocks
from minipeft.memory import measure
from minipeft.memory.cuda import bytes_of_others, rules_of_cuda, workspace
from minipeft.memory.estimate import estimate
from minipeft.memory.measure import Tracker
from minipeft.memory.settings import build, prepare, storage_bytes
from this_machine import InTime, append_rows, rows_so_far, this_machine

RESULTS = Path(__file__).resolve().parent / "results" / "memory.csv"
COLUMNS = """date device threads torch transformers case model method batch seq options predicted
fake fake_accumulated allocated allocated_accumulated reserved in_use""".split()
SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
LLAMA_1B = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
)  # fmt: skip
QWEN = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
MODELS = {
    "smollm2": SMOLLM2,
    "qwen2.5-0.5b": QWEN,
    "gpt2": GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "gpt2 with dropout": GPT2Config(),
    "bloom-1b4-zh": BloomConfig(hidden_size=2048, n_layer=24, n_head=16, vocab_size=46145),
    "llama-3.2-1b": LLAMA_1B,
    "llama-2-7b": LlamaConfig(),
    "mistral, 8 layers": MistralConfig(num_hidden_layers=8),
}
TARGETS = {"gpt2": "c_attn", "gpt2 with dropout": "c_attn", "bloom-1b4-zh": "query_key_value"}
METHODS = {
    "full": None,
    "lora": add_lora,
    "adapters": add_adapters,
    "prompt": add_prompt_tuning,
    "p-tuning": add_p_tuning,
    "prefix": add_prefix_tuning,
    "prefix projected": partial(add_prefix_tuning, projection=True),
    "p-tuning v2 hidden": partial(add_p_tuning_v2, form="hidden"),
    "last 4 blocks": partial(only_last_blocks, k=4),
    "head": partial(only_head, untie=True),
}
HALF, AUTOCAST = {"dtype": torch.bfloat16}, {"precision": "bfloat16"}
SAVING, FOREACH = {"checkpointing": True}, {"optimizer": "adamw-foreach"}
CASES = [  # model, method, rows, tokens, options of `estimate`
    ("smollm2", "full", 8, 512, {}),
    ("smollm2", "lora", 8, 512, {}),
    ("smollm2", "lora", 8, 512, SAVING),
    ("smollm2", "lora", 8, 512, AUTOCAST),
    ("smollm2", "adapters", 8, 512, {}),
    ("qwen2.5-0.5b", "lora", 4, 512, {}),
    ("qwen2.5-0.5b", "full", 4, 512, AUTOCAST),
    ("gpt2", "full", 8, 512, {}),
    ("gpt2", "lora", 8, 512, {"attention": "eager"}),
    ("bloom-1b4-zh", "lora", 2, 512, {}),
    ("llama-3.2-1b", "lora", 4, 1024, AUTOCAST),
    ("llama-3.2-1b", "lora", 4, 1024, HALF),
    ("llama-3.2-1b", "full", 1, 1024, SAVING),
    ("llama-2-7b", "lora", 1, 2048, HALF),
    ("llama-2-7b", "lora", 4, 2048, HALF | SAVING),
    ("smollm2", "prompt", 8, 512, {}),
    ("smollm2", "p-tuning", 8, 512, {}),
    ("smollm2", "prefix", 8, 512, {}),
    ("smollm2", "prefix projected", 8, 512, {}),
    ("smollm2", "p-tuning v2 hidden", 8, 512, {}),
    ("smollm2", "last 4 blocks", 8, 512, {}),
    ("smollm2", "head", 8, 512, {}),
    ("smollm2", "full", 8, 512, FOREACH),
    ("gpt2 with dropout", "lora", 8, 512, {}),
    ("mistral, 8 layers", "lora", 2, 1024, HALF),
    ("smollm2", "lora", 1, 64, {}),
    ("bloom-1b4-zh", "full", 1, 256, FOREACH),
    ("bloom-1b4-zh", "prefix", 1, 256, FOREACH),
    ("bloom-1b4-zh", "prefix projected", 1, 256, FOREACH),
]


def method_of(model, name):
    """The function that prepares a model, or None for full fine-tuning."""
    if name == "lora":
        return partial(add_lora, targets=TARGETS.get(model, ("q_proj", "v_proj")))
    return METHODS[name]


def accumulated(model, batch, seq):
    """The peak of two backward passes and a step: what a GPU's allocator says, or a tracker's."""
    params = [p for p in model.parameters() if p.requires_grad]
    device = params[0].device
    model.train()
    update = torch.optim.AdamW(params, foreach=True)
    for p in params:  # a first step creates the optimizer's state
        p.grad = torch.zeros_like(p)
    update.step()
    update.zero_grad()
    ids = torch.zeros(batch, seq, dtype=torch.int64, device=device)  # (batch, seq)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0  # a padded batch, as `measure` takes
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    states = [t for state in update.state.values() for t in state.values()]
    standing = [*model.parameters(), *model.buffers(), *states, *inputs.values()]
    if device.type == "cuda":
        others = bytes_of_others(device, storage_bytes(t for t in standing if t.is_cuda))
    with Tracker(standing, 0, 0) as tensors:
        for _ in range(2):
            model(**inputs, use_cache=False).loss.backward()
        update.step()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) - others
    return tensors.peak


def predicted(config, method, options):
    """What needs no GPU: {column: bytes}."""
    row = {
        "predicted": estimate(config, method, device="cuda", **options).total,
        "fake": measure(config, method, device="cuda", **options).total,
    }
    if options.get("optimizer") == "adamw-foreach":
        with FakeTensorMode(), rules_of_cuda():
            model = build(config, method, torch.float32, "fused")
            peak = accumulated(model, options["batch"], options["seq"])
        row["fake_accumulated"] = peak + workspace()
    return row


def free():
    """Give what no tensor needs back to the driver."""
    gc.collect()
    torch.cuda.empty_cache()


def allocated(config, method, options):
    """Run the step on the GPU: {column: bytes}."""
    free()
    dtype, attention = options.get("dtype", torch.float32), options.get("attention", "fused")
    with torch.device("cuda"):
        model = build(config, None, dtype, attention)
    rest = {name: value for name, value in options.items() if name != "dtype"}
    row = {"allocated": measure(model, method, **rest).total}
    if options.get("optimizer") == "adamw-foreach":
        free()
        model = prepare(model, method)
        row["allocated_accumulated"] = accumulated(model, options["batch"], options["seq"])
    unused, size = torch.cuda.mem_get_info()
    return row | {"reserved": torch.cuda.memory_reserved(), "in_use": size - unused}


def main():
    parser = argparse.ArgumentParser(description="Predicted memory beside the allocator's peak.")
    parser.add_argument("--cases", nargs="*", type=int, default=range(len(CASES)))
    parser.add_argument("--seconds", type=float, default=math.inf, help="end within this time")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    in_time = InTime(options.seconds)
    common, done = this_machine(), {int(row["case"]) for row in rows_so_far(options.out)}
    left, failed = [case for case in options.cases if case not in done], []
    for case in in_time(list(left)):
        left.remove(case)
        name, kind, batch, seq, extra = CASES[case]
        config, method = MODELS[name], method_of(name, kind)
        asked = {"batch": batch, "seq": seq, **extra}
        row = {"case": case, "model": name, "method": kind, "batch": batch, "seq": seq}
        row["options"] = " ".join(f"{key}={value}" for key, value in extra.items())
        try:
            sizes = predicted(config, method, asked)
            if torch.cuda.is_available():
                sizes |= allocated(config, method, asked)
        except (RuntimeError, ValueError) as error:  # the others still count
            failed.append(f"case {case}, {name}, {kind}: {error}")
            continue
        append_rows(options.out, COLUMNS, [common | row | sizes])
        text = ", ".join(f"{k} {v / 1e9:.3f} GB ({v / 2**30:.3f} GiB)" for k, v in sizes.items())
        print(f"{case:2} {name}, {kind}, {batch} x {seq} {row['options']}: {text}", flush=True)
    if failed:
        raise SystemExit("these failed and have no row:\n" + "\n".join(failed))
    if left:
        raise SystemExit(3)


if __name__ == "__main__":
    main()
