"""Checks of exercise 02: they name the mistake and stay silent about the solution."""

import copy

import torch
from torch.nn.functional import cross_entropy

from checks import Mistake
from minipeft import load_base

PAIRS = [("Was it good?", " Yes, very"), ("Why?", " It was short"), ("Who is it for?", " You")]


def _ids(tokenizer, prompt, answer):
    return tokenizer(prompt)["input_ids"], tokenizer(answer)["input_ids"]


class _Peculiar:
    """A tokenizer that puts a BOS in front of every text, and joins a question mark and a space."""

    bos, joined = 1000, 1001

    def __init__(self, tokenizer):
        self.tokenizer, self.eos_token_id = tokenizer, tokenizer.eos_token_id
        self.pair = tokenizer("? ")["input_ids"]

    def __call__(self, text, add_special_tokens=True, **options):
        ids, out = self.tokenizer(text)["input_ids"], [self.bos] if add_special_tokens else []
        while ids:
            found = ids[:2] == self.pair
            out, ids = [*out, self.joined if found else ids[0]], ids[1 + found :]
        return {"input_ids": out, "attention_mask": [1] * len(out)}

    def encode(self, text, **options):
        return self(text, **options)["input_ids"]


def encode_pair(answer):
    """Check a function (tokenizer, prompt, answer, max_length) -> input_ids and labels."""
    _, tokenizer = load_base("tiny", device="cpu")
    eos = tokenizer.eos_token_id
    for prompt, text in PAIRS:
        row = answer(tokenizer, prompt, text, 64)
        if not isinstance(row, dict) or {"input_ids", "labels"} - set(row):
            raise Mistake('Return a dict with the keys "input_ids" and "labels".')
        ids, labels = list(row["input_ids"]), list(row["labels"])
        question, reply = _ids(tokenizer, prompt, text)
        if len(ids) != len(labels):
            raise Mistake(f"There are {len(ids)} input_ids but {len(labels)} labels.")
        if ids == question + reply:
            raise Mistake(
                "The row does not end in the end-of-sequence token: no model learns to stop."
            )
        if ids != question + reply + [eos]:
            raise Mistake("input_ids are not the prompt's tokens, the answer's tokens and the eos.")
        n = len(question)
        if labels == ids:
            raise Mistake("The prompt has labels: the model would learn to write the question.")
        shifted = ids[1:] + [-100]
        if labels[n - 1 : -1] == shifted[n - 1 : -1] and labels[n - 1] != -100:
            raise Mistake(
                "The labels are shifted by hand. The model shifts them too, so each position would "
                "learn the token after the next."
            )
        if labels[:-1] == [-100] * (len(ids) - 1):
            raise Mistake("Only the last position has a label: the answer's words are masked too.")
        if labels[: n - 1] == [-100] * (n - 1) and labels[n - 1] != -100:
            raise Mistake("The mask is one too short: the last token of the prompt has a label.")
        if labels[n] == -100:
            raise Mistake("The mask is one too long: the first token of the answer has no label.")
        if labels[-1] == -100:
            raise Mistake("The eos has no label, so nothing teaches the model to stop.")
        if labels != [-100] * n + reply + [eos]:
            raise Mistake("The labels are not -100 on the prompt and the token ids after it.")
    prompt, text = "A prompt that is long, with its cue at the end:", " Yes"
    question, reply = _ids(tokenizer, prompt, text)
    row = answer(tokenizer, prompt, text, 12)
    ids, labels = list(row["input_ids"]), list(row["labels"])
    if len(ids) > 12:
        raise Mistake(
            f"With max_length=12 the row has {len(ids)} tokens: prompt and answer together count."
        )
    if ids[-1] != eos or labels[-1] != eos:
        raise Mistake("Cutting a long row took the eos away: the model would learn never to stop.")
    if ids[: 11 - len(reply)] == question[: 11 - len(reply)]:
        raise Mistake("The end of the prompt was cut, where its cue stands; cut its beginning.")
    if ids != question[-(11 - len(reply)) :] + reply + [eos]:
        raise Mistake(
            "A long row should keep its whole answer, and as much of the prompt's end as fits."
        )
    if len(labels) != len(ids) or labels != [-100] * (11 - len(reply)) + reply + [eos]:
        raise Mistake("In a row that was cut, the labels no longer fit the input_ids.")
    row = answer(tokenizer, prompt, text, len(reply) + 1)
    if list(row["input_ids"]) != reply + [eos]:
        raise Mistake(
            f"Where answer and eos just fit, nothing of the prompt may be left, but the row has "
            f"{len(row['input_ids'])} tokens. Mind that ids[-0:] is the whole list."
        )
    question, reply = _ids(tokenizer, "Good?\n\n", text)
    if list(answer(tokenizer, "Good?\n\n", text, 64)["input_ids"]) != question + reply + [eos]:
        raise Mistake(
            "A prompt that ends in line breaks has lost them; the text is to stay as it is."
        )
    odd = _Peculiar(tokenizer)
    question, reply = odd("Was it good?"), odd(" Yes", add_special_tokens=False)
    ids = list(answer(odd, "Was it good?", " Yes", 64)["input_ids"])
    if ids[:-1] == odd("Was it good? Yes")["input_ids"]:
        raise Mistake(
            "Prompt and answer were tokenised as one text. A token may then cross the boundary, so "
            "that the prompt has other tokens than at inference."
        )
    if ids.count(odd.bos) > 1:
        raise Mistake(
            "With a tokenizer that puts a beginning-of-sequence token in front of every text, the "
            "row has two of them: one in the middle."
        )
    if ids != question["input_ids"] + reply["input_ids"] + [eos]:
        raise Mistake(
            "With a tokenizer that has a beginning-of-sequence token, the row is not that token, "
            "the prompt, the answer and the eos."
        )


def collate(answer):
    """Check a function (rows, pad_token_id) -> a batch padded on the right; pad may be eos."""
    rows = [
        {"input_ids": [7, 8, 9, 2], "labels": [-100, -100, 9, 2]},
        {"input_ids": [5, 2], "labels": [-100, 2]},
    ]
    before = copy.deepcopy(rows)
    batch = answer(rows, 2)  # pad = eos = 2
    if rows != before:
        raise Mistake("The rows that were passed in have changed: pad copies of their lists.")
    for name in ("input_ids", "attention_mask", "labels"):
        if name not in batch:
            raise Mistake(f"The batch has no {name}.")
        if not torch.is_tensor(batch[name]) or batch[name].dtype != torch.int64:
            raise Mistake(f"{name} is not an int64 tensor.")
        if tuple(batch[name].shape) != (2, 4):
            raise Mistake(f"{name} has the shape {tuple(batch[name].shape)} instead of (2, 4).")
    if batch["input_ids"].tolist() == [[7, 8, 9, 2], [2, 2, 5, 2]]:
        raise Mistake("The padding is on the left; this task asks for the right.")
    if batch["input_ids"].tolist() != [[7, 8, 9, 2], [5, 2, 2, 2]]:
        raise Mistake("input_ids are not the rows, filled up on the right with the pad token.")
    mask, labels = batch["attention_mask"].tolist(), batch["labels"].tolist()
    if mask == [[1, 1, 1, 0], [1, 0, 0, 0]]:
        raise Mistake("The mask hides the real eos: it looks for the pad id instead of the length.")
    if mask == [[0, 0, 0, 0], [0, 0, 1, 1]]:
        raise Mistake("The attention mask is inverted: 1 means a real token.")
    if mask != [[1, 1, 1, 1], [1, 1, 0, 0]]:
        raise Mistake("The attention mask is not 1 on the real tokens and 0 on the padding.")
    if labels[0] == [-100, -100, 9, -100]:
        raise Mistake(
            "The label of the real eos is gone: where pad = eos, mask by position, not by id."
        )
    if labels[1] == [-100, 2, 2, 2]:
        raise Mistake(
            "The padding has labels: the model would learn to write padding after the end."
        )
    if labels[1] == [-100, 2, 0, 0]:
        raise Mistake(
            "The padding has the label 0, a token like any other; -100 is what is skipped."
        )
    if labels != [[-100, -100, 9, 2], [-100, 2, -100, -100]]:
        raise Mistake("The labels are not those of the rows, with -100 on the padding.")
    chat = {"input_ids": [7, 2, 8, 2], "labels": [-100, 2, -100, 2]}  # two turns, each with an eos
    mask = answer([chat, rows[1]], 2)["attention_mask"].tolist()
    if mask != [[1, 1, 1, 1], [1, 1, 0, 0]]:
        raise Mistake(
            f"A chat has an eos after each turn, and its mask is {mask[0]}: the row does not end "
            "at the first of them."
        )


def answer_loss(answer):
    """Check a function (logits, labels) -> mean loss over the target tokens."""
    torch.manual_seed(0)
    logits = torch.randn(2, 5, 11, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 3, 4, 2], [-100, 6, 2, -100, -100]])
    loss = answer(logits, labels)
    if not torch.is_tensor(loss) or loss.dim():
        raise Mistake("Return one number, as a tensor without dimensions.")

    def mean(logits, labels):
        return cross_entropy(logits.reshape(-1, 11), labels.reshape(-1), ignore_index=-100)

    def is_(other):
        return torch.allclose(loss, other)

    right = mean(logits[:, :-1], labels[:, 1:])
    if is_(mean(logits, labels)):
        raise Mistake(
            "Nothing is shifted: position t is compared with its own token, already read."
        )
    if is_(mean(logits[:, 1:], labels[:, :-1])):
        raise Mistake("The shift goes the wrong way: position t predicts token t - 1.")
    if is_(mean(logits[:, :-2], labels[:, 2:])):
        raise Mistake("The shift is by two: position t predicts token t + 2.")
    if is_(right * 5):
        raise Mistake("The loss is a sum over the target tokens; the mean is asked for.")
    if is_(right * 5 / 8) or is_(right * 5 / 10):
        raise Mistake("The sum is divided by all positions, also those without a target.")
    if is_(torch.stack([mean(logits[i, :-1], labels[i, 1:]) for i in range(2)]).mean()):
        raise Mistake("This is a mean of the rows' means; every target token should weigh alike.")
    if not is_(right):
        raise Mistake("That is not the mean cross-entropy of the target tokens.")
    nowhere, first = torch.full((2, 5), -100), torch.full((2, 5), -100)
    first[0, 0] = 3
    for labels, told in (
        (nowhere, "With no target token at all"),
        (
            first,
            "With a label at position 0 alone, which no position precedes and so none predicts,",
        ),
    ):
        try:
            loss = answer(logits, labels)
        except ValueError:
            continue
        raise Mistake(
            f"{told} the loss is {loss.item()}; raise a ValueError instead of returning a number "
            "that spoils the weights."
        )
