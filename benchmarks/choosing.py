"""Every method of the course on one task: the numbers behind notebook 13.

    python benchmarks/choosing.py [--parts methods cost examples] [--methods LoRA] [--seeds 0 1 2]

The task is that of long_runs.py: SmolLM2 learns film reviews, 8 a step, and the label word is the
only target. Three parts:

  methods   Every method takes 60 steps out of 7,346 reviews, with each seed. It is then judged by
            its answers to 600 film reviews that it has not seen, and to texts of other kinds:
            sentences about products, editorials and tweets. `chat_loss` is the loss on English
            dialogues, in nats per token of the answer: has the model forgotten how to talk? Where
            two learning rates are given, both are tried with seed 0, and that of the lower loss on
            64 validation reviews is taken with the other seeds. Rows of the other rate stay in the
            file, not judged. "question" is zero-shot with the words that prompt tuning and
            prefix-tuning start from, typed before the review.
  cost      For each method: trainable parameters; bytes of the file that is kept; peak memory of a
            step of 8 x 64 tokens with AdamW (GiB, float32); and three ratios, medians of rounds in
            which two contenders take turns: a training step over one of LoRA; reading 32 reviews,
            and writing 32 tokens, over the bare model. Both are ready for use: LoRA is merged and
            P-tuning folded.
  examples  Some methods learn from 10, 100 or 3,000 reviews alone, again and again, at the rate
            that `methods` found best: 60 steps, or one pass through 3,000.

A run appends its row to benchmarks/results/choosing.csv when it is through, and is not repeated.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm
from transformers.utils import logging

from long_runs import HOLE, TEXT, prepare
from minipeft import (
    Batches,
    Collator,
    add_adapters,
    add_lora,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    classify,
    complete,
    count_parameters,
    encode,
    evaluate,
    fold_p_tuning,
    load_base,
    load_dialogues,
    load_reviews,
    merge_lora,
    pick_device,
    save_adapter,
    train,
)
from minipeft.freezing import only_head, only_last_blocks, only_norms
from minipeft.memory import measure
from minipeft.technique.on_model import technique_of
from this_machine import append_rows, rows_so_far, seconds, this_machine

RESULTS = Path(__file__).resolve().parent / "results" / "choosing.csv"
OTHERS = ("amazon", "editorials", "tweets")
COLUMNS = """date device threads torch transformers part method lr seed steps examples train_loss
valid_loss right total amazon amazon_total editorials editorials_total tweets tweets_total chat_loss
seconds answers amazon_answers editorials_answers tweets_answers trainable file_bytes peak_gib
step_ratio read_ratio write_ratio""".split()
STEPS, BATCH = 60, 8

# {method: (rates, what makes the model ready)}. Where there is one rate, it comes from the grids of
# long_runs.py and notebook 05, for the same task and number of steps.
METHODS = {
    "zero-shot": ((), lambda m: m),
    "question": ((), lambda m: add_prefix_tuning(m, 10, text=TEXT)),  # not trained: the text typed
    "LoRA": ((2e-3,), add_lora),
    "prompt tuning": ((1e-2, 3e-2), lambda m: add_prompt_tuning(m, 10, "text", TEXT)),
    "prefix-tuning": ((1e-2,), lambda m: add_prefix_tuning(m, 10, text=TEXT)),
    "P-tuning v2": ((1e-2,), add_p_tuning_v2),
    "P-tuning": ((5e-4, 1e-3), lambda m: add_p_tuning(m, 10, "mlp", None, HOLE)),
    "adapters": ((1e-3, 2e-3), lambda m: add_adapters(m, 16)),
    "norms": ((3e-3, 1e-2), only_norms),
    "head": ((3e-3,), lambda m: only_head(m, untie=True)),
    "all blocks": ((1e-4,), lambda m: only_last_blocks(m, 30)),
}
SWEPT = ("LoRA", "prefix-tuning", "all blocks")
EXAMPLES = (10, 100, 3000)


def prepared(method, seed=0):
    """(model ready to train, tokenizer, what makes its prompt out of a plain one)."""
    return prepare(METHODS[method][1], seed)


def judged(tokenizer, rows, fill):
    """Rows with prompts and answers as batches for `evaluate`."""
    rows = [encode(tokenizer, fill(row["prompt"]), row["answer"]) for row in rows]
    collate = Collator(tokenizer.pad_token_id)
    return list(Batches(rows, collate, 16, group_by_length=True, shuffle=False))


def answers(model, tokenizer, rows, fill):
    """One character for each row: 1 if the answer is right."""
    found = classify(model, tokenizer, [fill(prompt) for prompt in rows["prompt"]])
    return "".join("01"[int(r)] for r in found == torch.tensor(rows["label"]))


def run(method, lr, seed, examples, part, tests, others):
    """Train once. Returns a row of the file and what completes it with the answers."""
    model, tokenizer, fill = prepared(method, seed)
    reviews = load_reviews()
    chosen = reviews["train"]
    if examples:  # the first of a shuffle of its own for each seed
        chosen = chosen.shuffle(seed=seed).select(range(examples))
    steps = max(STEPS, examples // BATCH) if METHODS[method][0] else 0
    start, losses = time.monotonic(), []
    if steps:
        texts = [encode(tokenizer, fill(row["prompt"]), row["answer"]) for row in chosen]
        batches = Batches(
            texts,
            Collator(tokenizer.pad_token_id),
            min(BATCH, examples or BATCH),
            seed=seed,
            group_by_length=True,
        )
        losses = train(
            model, batches, max_steps=steps, lr=lr, warmup_steps=steps // 10, seed=seed
        ).train_loss
    row = {"part": part, "method": method, "lr": lr, "seed": seed, "steps": steps}
    row |= {"examples": examples or len(chosen), "seconds": f"{time.monotonic() - start:.0f}"}
    row["trainable"] = count_parameters(model)[0] if steps else 0
    if losses:
        row["train_loss"] = f"{statistics.mean(losses[-10:]):.4f}"
    validation = judged(tokenizer, reviews["validation"].select(range(64)), fill)
    row["valid_loss"] = f"{evaluate(model, validation):.4f}"

    def chat(prompt):
        return fill(f"{prompt}\nAnswer:")

    def answer():
        """The long part: only a run at the best rate is judged."""
        kinds = {"": reviews["test"]}
        if part == "methods":
            kinds |= {f"{kind}_": load_reviews(kind)["test"] for kind in OTHERS}
            row["chat_loss"] = (
                f"{evaluate(model, judged(tokenizer, load_dialogues('english')['test'], chat)):.4f}"
            )
        for kind, rows in kinds.items():
            rows = rows.select(range(min(others if kind else tests, len(rows))))
            got = answers(model, tokenizer, rows, fill)
            row[f"{kind}answers"] = got
            row[kind.rstrip("_") or "right"] = got.count("1")
            row[f"{kind}total"] = len(got)
        return row

    return row, answer


def ready(model):
    """What is trained as it is used: nothing is left that can be folded away."""
    if technique_of(model) == "lora":
        merge_lora(model)
    if technique_of(model) == "p_tuning":
        fold_p_tuning(model)
    return model.eval()


def medians(contenders, rounds):
    """Seconds of the first over seconds of the second function; the median of the rounds."""
    found = []
    for number in range(rounds + 1):
        taken = {}
        for who in (0, 1) if number % 2 else (1, 0):
            taken[who] = seconds(contenders[who], pick_device())
        found.append(taken[0] / taken[1])
    return f"{statistics.median(found[1:]):.3f}"  # the first round was the warm-up


def stepper(model, tokenizer, fill, rows):
    """A function that takes one training step on 8 reviews."""
    texts = [encode(tokenizer, fill(row["prompt"]), row["answer"]) for row in rows]
    batch = Collator(tokenizer.pad_token_id)(texts)
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-5)

    def step():
        model.train()
        optimizer.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()

    return step


def file_bytes(model):
    """What has to be kept: the adapter's file, or the trained tensors in one file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kept"
        if technique_of(model):
            save_adapter(model, path)
            return (path / "adapter_model.safetensors").stat().st_size
        kept = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
        save_file(kept, path)
        return path.stat().st_size


def cost(method, rounds):
    """Memory, file size, and the three ratios of one method: a row of the file."""
    rows = load_reviews()["train"].select(range(BATCH))
    prompts = load_reviews()["test"]["prompt"][:32]
    model, tokenizer, fill = prepared(method)
    row = {"part": "cost", "method": method}
    bare, _ = load_base()
    bare.eval()
    if method != "zero-shot":
        row |= {"trainable": count_parameters(model)[0], "file_bytes": file_bytes(model)}
        lora, plain, _ = prepared("LoRA")
        steps = [stepper(model, tokenizer, fill, rows), stepper(lora, plain, str, rows)]
        row["step_ratio"] = medians(steps, rounds)
        row["peak_gib"] = f"{peak(method) / 2**30:.3f}"
    ready(model)

    def use(work):
        return medians((lambda: work(model, fill), lambda: work(bare, str)), rounds)

    row["read_ratio"] = use(lambda m, fill: classify(m, tokenizer, [fill(p) for p in prompts]))
    row["write_ratio"] = use(
        lambda m, fill: complete(
            m, tokenizer, [fill(prompts[0])], max_new_tokens=32, min_new_tokens=32
        )
    )
    return row


def peak(method):
    """Bytes alive at the worst moment of a step: weights, gradients, optimiser, activations."""
    if method == "P-tuning":  # `measure` draws words at random, so there is no template to fill
        model = add_p_tuning(load_base()[0], 10, "mlp")
    else:
        model, *_ = prepared(method)
    return measure(model, batch=8, seq=64).total


def best_rate(method, rows):
    """The rate with the lowest validation loss with seed 0."""
    mine = [
        row for row in rows if (row["part"], row["method"], row["seed"]) == ("methods", method, "0")
    ]
    return float(min(mine, key=lambda row: float(row["valid_loss"]))["lr"])


def main():
    parser = argparse.ArgumentParser(description="Compare every method of the course.")
    parser.add_argument("--parts", nargs="*", default=["methods", "cost", "examples"])
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--examples", nargs="*", type=int, default=EXAMPLES)
    parser.add_argument("--tests", type=int, default=600, help="film reviews, at most")
    parser.add_argument("--other-tests", type=int, default=160, help="texts of each other kind")
    parser.add_argument("--rounds", type=int, default=7, help="of the ratios")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    logging.set_verbosity_error()
    common, tests = this_machine(), (options.tests, options.other_tests)

    def done(part, **wanted):
        return any(
            row["part"] == part and all(row[k] == str(v) for k, v in wanted.items())
            for row in rows_so_far(options.out)
        )

    def keep(row):
        append_rows(options.out, COLUMNS, [common | row])
        shown = [row.get(k) for k in ("part", "method", "lr", "seed", "examples", "right")]
        tqdm.write(" ".join(str(value) for value in shown if value is not None))

    for seed in options.seeds if "methods" in options.parts else ():
        for method in options.methods:
            if not METHODS[method][0]:
                if not done("methods", method=method):
                    keep(run(method, 0.0, 0, 0, "methods", *tests)[1]())
            elif seed == 0:
                if not done("methods", method=method, seed=0):
                    tried = [run(method, lr, 0, 0, "methods", *tests) for lr in METHODS[method][0]]
                    tried.sort(key=lambda one: float(one[0]["valid_loss"]))
                    tried[0][1]()
                    for row, _ in tried:
                        keep(row)
            elif not done("methods", method=method, seed=seed):
                lr = best_rate(method, rows_so_far(options.out))
                keep(run(method, lr, seed, 0, "methods", *tests)[1]())
    for method in options.methods if "cost" in options.parts else ():
        if method != "question" and not done("cost", method=method):  # it costs what a prefix does
            keep(cost(method, options.rounds))
    for seed in options.seeds if "examples" in options.parts else ():
        for number in options.examples:
            for method in [one for one in SWEPT if one in options.methods]:
                if not done("examples", method=method, seed=seed, examples=number):
                    lr = best_rate(method, rows_so_far(options.out))
                    keep(run(method, lr, seed, number, "examples", *tests)[1]())


if __name__ == "__main__":
    main()
