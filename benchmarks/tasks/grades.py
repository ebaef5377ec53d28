"""Five grades of film snippets: how good is each method, with its rate searched and five seeds?

The model reads a snippet and says one of five words. 9,103 rows to train on, 500 to choose the rate
by, 1,000 to judge by: `load_grades`. Floors: the untrained model, and always saying the commonest
word. `dialogue_loss` and `text_loss`, in nats per target token on English dialogues and on
sentences of newspaper editorials, tell what the model forgot meanwhile. The tasks:

  grades           every method of the course, 500 steps of 16
  grades_depth, grades_length, grades_starts, grades_bases
                   the lists of these names in methods.py, 500 steps
  grades_prompts   the starts of prompt tuning, 500 steps
  grades_examples  100 or 1,000 rows to learn from, for three methods
"""

from minipeft import load_grades
from minipeft.assets.datasets import GRADES
from tasks.methods import BASES, DEPTH, LENGTH, METHODS, STARTS, groups_of, prompt_starts
from tasks.training import (
    Setting,
    dialogues,
    fit,
    fresh,
    label_words,
    loss_on,
    plain_text,
)

BATCH, SEEDS = 16, (0, 1, 2, 3, 4, 5)  # the first chooses the rate, five judge
QUESTION = "Is this film terrible, bad, okay, good or great?"
COMPARED = ("prompt tuning, n=20", "LoRA, all linear, r=8", "all blocks")
LISTS = {
    "grades": METHODS,
    "grades_depth": DEPTH,
    "grades_length": LENGTH,
    "grades_starts": STARTS,
    "grades_bases": BASES,
    "grades_prompts": prompt_starts(QUESTION, GRADES),
    "grades_examples": {method: METHODS[method] for method in COMPARED},
}


def settings_of(task):
    """The settings of one of the tasks of this file, for the runner."""
    sizes = {100: 60, 1000: 200} if task == "grades_examples" else {0: 500}  # rows: steps
    return [
        Setting(method, rates, steps if rates else 0, size, SEEDS)
        for size, steps in sizes.items()
        for method, (rates, _) in LISTS[task].items()
    ]


def run(task, method, lr, seed, steps, examples):
    """Train and judge once. Returns {column: value}."""
    model, tokenizer = fresh(LISTS[task][method][1], seed)
    rows = load_grades()
    training = rows["train"]
    if examples:  # the first of a shuffle of its own for each seed
        training = training.shuffle(seed=seed).select(range(examples))
    groups = groups_of(method, model, lr)
    row = fit(model, tokenizer, training, lr=lr, seed=seed, steps=steps, batch=BATCH, groups=groups)
    row |= {"valid_loss": loss_on(model, tokenizer, rows["validation"])}
    row |= label_words(model, tokenizer, rows["test"], GRADES)
    row["details"] = {
        "dialogue_loss": float(loss_on(model, tokenizer, dialogues())),
        "text_loss": float(loss_on(model, tokenizer, plain_text())),
    }
    return row
