"""A model of English learns to answer in Chinese.

SmolLM2 takes 60 steps of 8 rows out of 450 Chinese dialogues and 192 instructions of our own, mixed
(data/README.md); only answers are targets. It is judged by the loss on answers that were held out,
in nats per character, the end of the text included: 51 dialogues and 22 instructions. Characters,
because a token of this tokenizer is less than a Chinese character; `own_losses` and
`dialogue_losses` are the nats of each single row, so that any interval can be computed again.
`samples` are greedy answers to some held-out prompts.
"""

from datasets import concatenate_datasets

from minipeft import (
    Collator,
    add_lora,
    add_prefix_tuning,
    complete,
    encode,
    evaluate,
    load_dialogues,
    load_instructions,
)
from minipeft.freezing import only_last_blocks
from minipeft.memory.shapes import ALL_LINEAR
from tasks.training import Setting, fit, fresh

STEPS, SAMPLES = 60, 8
METHODS = {
    "zero-shot": ((), lambda m: m),
    "LoRA": ((2e-3,), add_lora),
    "LoRA, seven": ((1e-3,), lambda m: add_lora(m, targets=ALL_LINEAR)),
    "prefix-tuning": ((1e-2,), lambda m: add_prefix_tuning(m, 10, text="请用中文回答。")),
    "all blocks": ((1e-4,), lambda m: only_last_blocks(m, 30)),
}
SETTINGS = [Setting(m, rates, STEPS if rates else 0) for m, (rates, _) in METHODS.items()]


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


def run(method, lr, seed, steps, examples):
    """Train and judge once. Returns {column: value}."""
    model, tokenizer = fresh(METHODS[method][1], seed)
    mixed = concatenate_datasets(list(rows_of("train").values()))
    row = fit(model, tokenizer, mixed, lr=lr, seed=seed, steps=steps, max_length=192)
    row["details"] = {"samples": []}
    for source, rows in rows_of("test").items():
        losses = nats(model, tokenizer, rows)
        row["details"][f"{source}_chars"] = sum(map(len, rows["answer"]))
        row["details"][f"{source}_losses"] = [round(loss, 2) for loss in losses]
        shown = rows.select(range(min(SAMPLES, len(rows))))
        written = complete(model, tokenizer, shown["prompt"], max_new_tokens=60)
        for one, answer in zip(shown, written, strict=True):
            sample = {"source": source, "prompt": one["prompt"], "reference": one["answer"]}
            row["details"]["samples"].append(sample | {"answer": answer.strip()})
    return row
