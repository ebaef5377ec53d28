"""The film reviews of the notebooks, 600 of them to judge by: curves, other texts, few examples.

SmolLM2 takes 8 reviews a step; the targets are the label word and the end of the text. The tasks:

  reviews    each method at the settings of its notebook, with the training curve
  transfer   nine methods, judged by other kinds of text too: sentences about products, editorials,
             tweets; and by the loss on English dialogues (`chat_loss`) and on plain text, in nats
             per token: what has the model forgotten? "question" is the untrained model with the
             words that prompt tuning and prefix-tuning start from, typed before the review. The
             first runs in the file have no `text_loss`.
  examples   three methods learn from 10, 100 or 3,000 reviews, 60 steps or one pass through 3,000.
             Each seed draws its own; the rates are those of `reviews`.
  depth, length, starts, bases
             the lists of these names in methods.py; the rate is searched for each entry
  prompts    the starts of prompt tuning
"""

from minipeft import (
    add_adapters,
    add_lora,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    load_reviews,
)
from minipeft.freezing import only_head, only_last_blocks, only_norms
from tasks.methods import BASES, DEPTH, LENGTH, STARTS, prompt_starts
from tasks.training import (
    Setting,
    dialogues,
    first,
    fit,
    fresh,
    label_words,
    loss_on,
    plain_text,
)

TEXT = "Is this film review positive or negative?"
HOLE, HOLE_ID = "<v>", 49152  # the first id beyond SmolLM2's vocabulary: a placeholder
OTHERS = ("amazon", "editorials", "tweets")
TESTS, OTHER_TESTS, VALIDATION = 600, 160, 64


def in_template(prompt):
    """The prompt with 3 virtual tokens before the review, 4 after it, 3 before the answer."""
    review, cue = prompt.rsplit("\n", 1)
    return f"{HOLE * 3}{review}{HOLE * 4}\n{cue}{HOLE * 3}"


def untrained(model):
    """The base model as it is."""
    return model


# {task: {method: (rates, steps, what makes the model ready)}}. `reviews` holds the settings of the
# notebooks: one rate each, chosen by hand among two or three, so it compares no methods fairly. For
# that there is `grades`. Those of P-tuning come from encoder_or_table.py.
METHODS = {
    "reviews": {
        "zero-shot": ((), 0, untrained),
        "prompt tuning n=10 text": (
            (1e-2,), 150, lambda m: add_prompt_tuning(m, 10, "text", TEXT)),
        "prefix-tuning n=10 text": ((1e-2,), 60, lambda m: add_prefix_tuning(m, 10, text=TEXT)),
        "prefix-tuning n=10 projection": ((1e-3,), 60, lambda m: add_prefix_tuning(m, 10, True)),
        "prefix-tuning n=10": ((3e-2,), 60, add_prefix_tuning),
        "P-tuning n=10 mlp template": (
            (5e-4,), 120, lambda m: add_p_tuning(m, 10, "mlp", None, HOLE_ID)),
        "P-tuning n=10 mlp": ((1e-3,), 60, lambda m: add_p_tuning(m, 10, "mlp")),
        "P-tuning n=10 lstm": ((1e-2,), 60, add_p_tuning),
        "P-tuning n=10 lstm, slow": ((5e-4,), 150, add_p_tuning),
        "P-tuning v2 key_value n=10": ((1e-2,), 60, add_p_tuning_v2),
        "P-tuning v2 hidden n=10": ((1e-2,), 60, lambda m: add_p_tuning_v2(m, 10, "hidden")),
        "LoRA r=8": ((2e-3,), 60, add_lora),
        "adapters m=16": ((1e-3,), 60, lambda m: add_adapters(m, 16)),
        "head": ((3e-3,), 60, lambda m: only_head(m, untie=True)),
        **{
            f"last {k} blocks": ((1e-4,), 60, lambda m, k=k: only_last_blocks(m, k))
            for k in (1, 4, 16, 30)
        },
    },
    "transfer": {
        "zero-shot": ((), 0, untrained),
        "question": ((), 0, lambda m: add_prefix_tuning(m, 10, text=TEXT)),
        "LoRA": ((5e-4, 1e-3, 2e-3), 60, add_lora),
        "prompt tuning": ((1e-2, 3e-2), 60, lambda m: add_prompt_tuning(m, 10, "text", TEXT)),
        "prefix-tuning": ((1e-2,), 60, lambda m: add_prefix_tuning(m, 10, text=TEXT)),
        "P-tuning v2": ((1e-2,), 60, add_p_tuning_v2),
        "P-tuning": ((5e-4, 1e-3), 60, lambda m: add_p_tuning(m, 10, "mlp", None, HOLE_ID)),
        "adapters": ((1e-3, 2e-3), 60, lambda m: add_adapters(m, 16)),
        "norms": ((3e-3, 1e-2), 60, only_norms),
        "head": ((3e-3,), 60, lambda m: only_head(m, untie=True)),
        "all blocks": ((3e-5, 1e-4, 3e-4), 60, lambda m: only_last_blocks(m, 30)),
    },
}  # fmt: skip
for _task, _methods in {
    "depth": DEPTH,
    "length": LENGTH,
    "starts": STARTS,
    "bases": BASES,
    "prompts": prompt_starts(TEXT, (" negative", " positive")),
}.items():
    METHODS[_task] = {name: (rates, 60, add) for name, (rates, add) in _methods.items()}
METHODS["examples"] = {
    name: (rates, 60, METHODS["transfer"][name][2])
    for name, rates in (("LoRA", (2e-3,)), ("prefix-tuning", (1e-2,)), ("all blocks", (1e-4,)))
}


def settings_of(task):
    """The settings of one of the tasks of this file, for the runner."""
    sizes = (10, 100, 3000) if task == "examples" else (0,)
    return [
        Setting(method, rates, max(steps, size // 8), size)
        for size in sizes
        for method, (rates, steps, _) in METHODS[task].items()
    ]


def run(task, method, lr, seed, steps, examples):
    """Train and judge once. Returns {column: value}."""
    model, tokenizer = fresh(METHODS[task][method][2], seed)
    template = getattr(getattr(model, "virtual_tokens", None), "placeholder_id", None) == HOLE_ID
    if template:
        tokenizer.add_tokens([HOLE], special_tokens=True)

    def filled(rows):
        """Rows with their prompts as this model wants them."""
        return rows.map(lambda r: {"prompt": in_template(r["prompt"])}) if template else rows

    splits = {name: filled(rows) for name, rows in load_reviews().items()}
    training = splits["train"]
    if examples:  # the first of a shuffle of its own for each seed
        training = training.shuffle(seed=seed).select(range(examples))
    row = fit(model, tokenizer, training, lr=lr, seed=seed, steps=steps)
    validation = splits["validation"].select(range(VALIDATION))
    row |= {"valid_loss": loss_on(model, tokenizer, validation)}
    row |= label_words(model, tokenizer, first(splits["test"], TESTS))
    if task == "transfer":
        start = HOLE * 10 if template else ""  # plain text asks nothing that could be framed
        plain = [one | {"prompt": start + one["prompt"]} for one in plain_text()]
        row["details"] = {
            "chat_loss": float(loss_on(model, tokenizer, filled(dialogues()))),
            "text_loss": float(loss_on(model, tokenizer, plain)),
        }
        for kind in OTHERS:
            rows = filled(first(load_reviews(kind)["test"], OTHER_TESTS))
            row["details"][kind] = label_words(model, tokenizer, rows)["answers"]
    return row
