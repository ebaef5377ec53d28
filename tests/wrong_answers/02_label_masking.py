"""Wrong answers to exercise 02: (check, source of the answer, part of the message expected)."""

_ENCODE = """
def encode_pair(tokenizer, prompt, answer, max_length):
    question = tokenizer(prompt)["input_ids"]
    reply = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
    question = question[max(0, len(question) + len(reply) - max_length) :]
    return {"input_ids": question + reply, "labels": [-100] * len(question) + reply}
"""
_COLLATE = """
import torch

def collate(rows, pad_token_id):
    width = max(len(row["input_ids"]) for row in rows)
    fill = lambda ids, filler: ids + [filler] * (width - len(ids))
    return {
        "input_ids": torch.tensor([fill(r["input_ids"], pad_token_id) for r in rows]),
        "attention_mask": torch.tensor([fill([1] * len(r["input_ids"]), 0) for r in rows]),
        "labels": torch.tensor([fill(r["labels"], -100) for r in rows]),
    }
"""
_LOSS = """
import torch
from torch.nn.functional import cross_entropy

def answer_loss(logits, labels):
    logits, labels = logits[:, :-1], labels[:, 1:]
    if not (labels != -100).any():
        raise ValueError("nothing to learn")
    return cross_entropy(logits.flatten(0, 1), labels.flatten())
"""


def _changed(source, old, new):
    assert old in source, old
    return source.replace(old, new)


def _encode(old, new):
    return ("encode_pair", _changed(_ENCODE, old, new))


def _collate(old, new):
    return ("collate", _changed(_COLLATE, old, new))


def _loss(old, new):
    return ("answer_loss", _changed(_LOSS, old, new))


KEEP = "question = question[max(0, len(question) + len(reply) - max_length) :]"
LABELS = "[-100] * len(question) + reply}"
SHIFT = "logits, labels = logits[:, :-1], labels[:, 1:]"
MEAN = "cross_entropy(logits.flatten(0, 1), labels.flatten())"
SUM = "cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction='sum')"

WRONG = [
    (*_encode(" + [tokenizer.eos_token_id]", ""), "does not end in the end-of-sequence"),
    (*_encode(LABELS, "question + reply}"), "The prompt has labels"),
    (*_encode(LABELS, "[-100] * (len(question) - 1) + reply + [-100]}"), "shifted by hand"),
    (
        *_encode(LABELS, "[-100] * (len(question + reply) - 1) + reply[-1:]}"),
        "words are masked too",
    ),
    (
        *_encode(LABELS, "[-100] * (len(question) - 1) + question[-1:] + reply}"),
        "one too short",
    ),
    (*_encode(LABELS, "[-100] * (len(question) + 1) + reply[1:]}"), "one too long"),
    (*_encode(LABELS, "[-100] * len(question) + reply[:-1] + [-100]}"), "The eos has no label"),
    (*_encode(LABELS, "[-100] * len(question) + reply[:-1]}"), "input_ids but"),
    (
        *_encode(KEEP, "question, reply = question[-max_length:], reply[:max_length]"),
        "together count",
    ),
    (
        "encode_pair",
        _changed(
            _changed(_ENCODE, KEEP, "pass"),
            'return {"input_ids": question + reply, "labels": [-100] * len(question) + reply}',
            'return {"input_ids": (question + reply)[:max_length], '
            '"labels": ([-100] * len(question) + reply)[:max_length]}',
        ),
        "took the eos away",
    ),
    (*_encode(KEEP, "question = question[: max_length - len(reply)]"), "cut its beginning"),
    (
        *_collate("ids + [filler] * (width - len(ids))", "[filler] * (width - len(ids)) + ids"),
        "padding is on the left",
    ),
    (
        *_collate(
            'fill([1] * len(r["input_ids"]), 0)',
            '[int(i != pad_token_id) for i in fill(r["input_ids"], pad_token_id)]',
        ),
        "hides the real eos",
    ),
    (
        *_collate('fill([1] * len(r["input_ids"]), 0)', 'fill([0] * len(r["input_ids"]), 1)'),
        "inverted",
    ),
    (
        *_collate(
            'fill(r["labels"], -100)',
            '[-100 if i == pad_token_id else i for i in fill(r["labels"], -100)]',
        ),
        "mask by position, not by id",
    ),
    (
        *_collate('fill(r["labels"], -100)', 'fill(r["labels"], pad_token_id)'),
        "learn to write padding",
    ),
    (*_collate('fill(r["labels"], -100)', 'fill(r["labels"], 0)'), "a token like any other"),
    (*_loss(SHIFT, "pass"), "Nothing is shifted"),
    (*_loss(SHIFT, "logits, labels = logits[:, 1:], labels[:, :-1]"), "the wrong way"),
    (*_loss(SHIFT, "logits, labels = logits[:, :-2], labels[:, 2:]"), "by two"),
    (*_loss(MEAN, SUM), "is a sum"),
    (*_loss(MEAN, SUM + " / labels.numel()"), "divided by all positions"),
    (
        *_loss(MEAN, "torch.stack([cross_entropy(a, b) for a, b in zip(logits, labels)]).mean()"),
        "mean of the rows' means",
    ),
    (*_loss("raise ValueError", "print"), "With no target token at all"),
    (
        "encode_pair",
        """
def encode_pair(tokenizer, prompt, answer, max_length):
    question = tokenizer(prompt)["input_ids"]
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    question = question[-(max_length - len(reply)) :]
    return {"input_ids": question + reply, "labels": [-100] * len(question) + reply}
""",
        "ids[-0:] is the whole list",
    ),
    (
        "encode_pair",
        """
def encode_pair(tokenizer, prompt, answer, max_length):
    question = tokenizer(prompt.strip())["input_ids"]
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    question = question[max(0, len(question) + len(reply) - max_length) :]
    return {"input_ids": question + reply, "labels": [-100] * len(question) + reply}
""",
        "ends in line breaks",
    ),
    (
        "encode_pair",
        """
def encode_pair(tokenizer, prompt, answer, max_length):
    ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    n = len(tokenizer(prompt)["input_ids"])
    cut = max(0, len(ids) - max_length)
    labels = [-100] * n + ids[n:]
    return {"input_ids": ids[cut:], "labels": labels[cut:]}
""",
        "tokenised as one text",
    ),
    (
        "encode_pair",
        """
def encode_pair(tokenizer, prompt, answer, max_length):
    question = tokenizer(prompt)["input_ids"]
    reply = tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]
    question = question[max(0, len(question) + len(reply) - max_length) :]
    return {"input_ids": question + reply, "labels": [-100] * len(question) + reply}
""",
        "has two of them",
    ),
    (
        "collate",
        """
import torch

def collate(rows, pad_token_id):
    width = max(len(row["input_ids"]) for row in rows)
    for row in rows:
        row["attention_mask"] = [1] * len(row["input_ids"])
        for name, filler in (("input_ids", pad_token_id), ("labels", -100), ("attention_mask", 0)):
            row[name] += [filler] * (width - len(row[name]))
    return {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
""",
        "have changed",
    ),
    (
        "collate",
        """
import torch

def collate(rows, pad_token_id):
    width = max(len(row["input_ids"]) for row in rows)
    fill = lambda ids, x: ids + [x] * (width - len(ids))
    ids = torch.tensor([fill(row["input_ids"], pad_token_id) for row in rows])
    labels = torch.tensor([fill(row["labels"], -100) for row in rows])
    before = (ids == pad_token_id).cumsum(1) - (ids == pad_token_id).long()
    return {"input_ids": ids, "attention_mask": (before == 0).long(), "labels": labels}
""",
        "has an eos after each turn",
    ),
    (
        "answer_loss",
        """
from torch.nn.functional import cross_entropy

def answer_loss(logits, labels):
    if not (labels != -100).any():
        raise ValueError("no target")
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
""",
        "label at position 0 alone",
    ),
]
