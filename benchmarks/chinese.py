"""A model of English learns to answer in Chinese: the numbers behind a section of notebook 13.

    python benchmarks/chinese.py [--methods LoRA] [--seeds 0 1 2]

SmolLM2 takes 60 steps of 8 rows out of 450 Chinese dialogues and 192 instructions of our own, mixed
(data/README.md); only answers are targets. It is judged by the loss on answers that were held out,
in nats per character, the end of the text included: 51 dialogues and 22 instructions. Characters,
because a token of this tokenizer is less than a Chinese character; `own_losses` and
`dialogue_losses` are the nats of each single row, so that any interval can be computed again.
Greedy answers to some held-out prompts are kept in results/chinese-samples.jsonl.

A run appends its row to benchmarks/results/chinese.csv when it is through, and is not repeated.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from datasets import concatenate_datasets
from transformers.utils import logging

from minipeft import (
    Batches,
    Collator,
    add_lora,
    add_prefix_tuning,
    complete,
    count_parameters,
    encode,
    evaluate,
    load_base,
    load_dialogues,
    load_instructions,
    train,
)
from minipeft.freezing import only_last_blocks
from this_machine import append_rows, rows_so_far, this_machine

RESULTS = Path(__file__).resolve().parent / "results" / "chinese.csv"
COLUMNS = """date device threads torch transformers method lr seed steps trainable train_loss
seconds own_rows own_chars own_loss_per_char dialogue_rows dialogue_chars dialogue_loss_per_char
own_losses dialogue_losses""".split()
SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
STEPS, BATCH, SAMPLES = 60, 8, 8

# {method: (rate, what makes the model ready)}
METHODS = {
    "zero-shot": (0.0, lambda m: m),
    "LoRA": (2e-3, add_lora),
    "LoRA, seven": (1e-3, lambda m: add_lora(m, targets=SEVEN)),
    "prefix-tuning": (1e-2, lambda m: add_prefix_tuning(m, 10, text="请用中文回答。")),
    "all blocks": (1e-4, lambda m: only_last_blocks(m, 30)),
}


def rows_of(split):
    """{source: rows with prompt and answer}; a dialogue gets the cue of the instructions."""
    talk = load_dialogues("chinese")[split].map(lambda r: {"prompt": f"{r['prompt']}\n回答："})
    columns = ["prompt", "answer"]
    own = load_instructions("chinese")[split]
    return {"own": own.select_columns(columns), "dialogue": talk.select_columns(columns)}


def nats(model, tokenizer, rows):
    """The loss of each answer, summed over its tokens and its end."""
    collate, found = Collator(tokenizer.pad_token_id), []
    for row in rows:
        batch = collate([encode(tokenizer, row["prompt"], row["answer"])])
        found.append(evaluate(model, [batch]) * int((batch["labels"] != -100).sum()))
    return found


def run(method, seed):
    """Train and judge once. Returns (row of the file, samples)."""
    lr, add = METHODS[method]
    model, tokenizer = load_base()
    torch.manual_seed(seed)
    add(model)
    steps = STEPS if lr else 0
    row = {"method": method, "lr": lr, "seed": seed, "steps": steps}
    row["trainable"] = count_parameters(model)[0] if steps else 0
    start = time.monotonic()
    if steps:
        mixed = concatenate_datasets(list(rows_of("train").values()))
        texts = [encode(tokenizer, one["prompt"], one["answer"], max_length=192) for one in mixed]
        collate = Collator(tokenizer.pad_token_id)
        batches = Batches(texts, collate, BATCH, seed=seed, group_by_length=True)
        losses = train(
            model, batches, max_steps=steps, lr=lr, warmup_steps=steps // 10, seed=seed
        ).train_loss
        row["train_loss"] = f"{sum(losses[-10:]) / 10:.4f}"
    row["seconds"] = f"{time.monotonic() - start:.0f}"
    samples = []
    for source, rows in rows_of("test").items():
        losses, chars = nats(model, tokenizer, rows), sum(map(len, rows["answer"]))
        row |= {f"{source}_rows": len(rows), f"{source}_chars": chars}
        row[f"{source}_loss_per_char"] = f"{sum(losses) / chars:.4f}"
        row[f"{source}_losses"] = " ".join(f"{loss:.2f}" for loss in losses)
        shown = rows.select(range(SAMPLES))
        for one, answer in zip(
            shown, complete(model, tokenizer, shown["prompt"], max_new_tokens=60), strict=True
        ):
            what = {"method": method, "seed": seed, "source": source, "prompt": one["prompt"]}
            samples.append(what | {"reference": one["answer"], "answer": answer.strip()})
    return row, samples


def main():
    parser = argparse.ArgumentParser(description="Teach SmolLM2 to answer in Chinese.")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    common = this_machine()
    done = {(row["method"], int(row["seed"])) for row in rows_so_far(options.out)}
    for seed in options.seeds:
        for method in options.methods:
            if (method, seed) in done or (method == "zero-shot" and seed != 0):
                continue
            row, samples = run(method, seed)
            append_rows(options.out, COLUMNS, [common | row])
            with open(
                options.out.with_name("chinese-samples.jsonl"), "a", encoding="utf-8"
            ) as file:
                for sample in samples:
                    where = {"device": common["device"]}
                    file.write(json.dumps(where | sample, ensure_ascii=False) + "\n")
            print(
                f"{method}, seed {seed}: {row['own_loss_per_char']} nats per character on our own"
            )


if __name__ == "__main__":
    main()
