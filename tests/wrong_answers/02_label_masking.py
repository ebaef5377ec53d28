"""Wrong answers to exercise 02: (check, source of the answer, part of the message expected)."""

from edits import edited

_ENCODE = """
def encode_pair(tokenizer, prompt, answer):
    question = tokenizer(prompt)["input_ids"]
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": question + reply, "labels": [-100] * len(question) + reply}
"""
_SHORTEN = """
def shorten(row, max_length):
    ids, labels = row["input_ids"], row["labels"]
    too_many = max(0, len(ids) - max_length)
    first = [label == -100 for label in labels].index(False)
    if too_many >= first:
        raise ValueError("no room")
    return {"input_ids": ids[too_many:], "labels": labels[too_many:]}
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


def _encode(old, new):
    return ("encode_pair", edited(_ENCODE, (old, new)))


def _shorten(old, new):
    return ("shorten", edited(_SHORTEN, (old, new)))


def _collate(old, new):
    return ("collate", edited(_COLLATE, (old, new)))


def _loss(old, new):
    return ("answer_loss", edited(_LOSS, (old, new)))


LABELS = "[-100] * len(question) + reply}"
SHIFT = "logits, labels = logits[:, :-1], labels[:, 1:]"
MEAN = "cross_entropy(logits.flatten(0, 1), labels.flatten())"
REPLY = 'reply = tokenizer(answer, add_special_tokens=False)["input_ids"]'
BOTH = "[tokenizer.eos_token_id]\n    return {"
ROW = '{"input_ids": question + reply, "labels": [-100] * len(question) + reply}'
MASK = 'fill([1] * len(r["input_ids"]), 0)'
CHECK = """    if too_many >= first:
        raise ValueError("no room")
"""
PIECES = 'ids[too_many:], "labels": labels[too_many:]}'
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
    # The row
    (*_encode("tokenizer(prompt)", "tokenizer(prompt.strip())"), "spaces or line breaks"),
    (*_encode(REPLY, REPLY.replace("answer", "answer.strip()", 1)), "the row reads"),
    (*_encode(REPLY, REPLY.replace(", add_special_tokens=False", "")), "has two of them"),
    (
        *_encode("tokenizer(prompt)", "tokenizer(prompt, add_special_tokens=False)"),
        "has lost the beginning-of-sequence",
    ),
    (*_encode("[tokenizer.eos_token_id]", "[2]"), "This tokenizer has the eos id"),
    (*_encode("[tokenizer.eos_token_id]", "[tokenizer.eos_token_id] * 2"), "two end-of-sequence"),
    (*_encode("[-100] * len(question)", "[0] * len(question)"), "the label 0, a token"),
    (  # one list under two names
        "encode_pair",
        """
def encode_pair(tokenizer, prompt, answer):
    ids = tokenizer(prompt)["input_ids"]
    n = len(ids)
    ids += tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    labels = ids
    labels[:n] = [-100] * n
    return {"input_ids": ids, "labels": labels}
""",
        "the same list",
    ),
    (  # the length of the text, not of its tokens
        "encode_pair",
        """
def encode_pair(tokenizer, prompt, answer):
    question = tokenizer(prompt)["input_ids"]
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = question + reply
    return {"input_ids": ids, "labels": [-100 if i < len(prompt + answer) + 1 else token
                                         for i, token in enumerate(ids)]}
""",
        "tokens or letters",
    ),
    (
        "encode_pair",
        """
import torch

def encode_pair(tokenizer, prompt, answer):
    question = tokenizer(prompt)["input_ids"]
    reply = tokenizer(answer, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    labels = torch.tensor(question + reply)
    labels[: len(question)] = -100
    return {"input_ids": question + reply, "labels": labels}
""",
        "you have a list and a Tensor",
    ),
    (
        "encode_pair",
        """
def encode_pair(tokenizer, prompt, answer):
    ids = tokenizer(prompt + answer)["input_ids"] + [tokenizer.eos_token_id]
    n = len(tokenizer(prompt)["input_ids"])
    return {"input_ids": ids, "labels": [-100] * n + ids[n:]}
""",
        "tokenized as one text",
    ),
    # The cut
    (*_shorten(PIECES, 'ids[:max_length], "labels": labels[:max_length]}'), "its end was cut"),
    (*_shorten(PIECES, 'ids[too_many:], "labels": labels}'), "and 6 labels"),
    (
        *_shorten(PIECES, 'ids[too_many:], "labels": labels[: len(ids) - too_many]}'),
        "max_length=5: the labels",
    ),
    (*_shorten(CHECK, ""), "nothing predicts it"),
    (
        *_shorten("too_many >= first:", "sum(i != -100 for i in labels) + 1 > max_length:"),
        "stand in two turns",
    ),
    (*_shorten("too_many >= first:", "too_many >= first - 1:"), "but there is room"),
    (
        "shorten",
        """
def shorten(row, max_length):
    n = [label == -100 for label in row["labels"]].index(False)
    prompt, reply = row["input_ids"][:n], row["input_ids"][n:]
    if len(reply) >= max_length + n:
        raise ValueError("no room")
    prompt = prompt[-max(0, max_length - len(reply)):]
    return {"input_ids": prompt + reply, "labels": [-100] * len(prompt) + row["labels"][n:]}
""",
        "ids[-0:] is the whole list",
    ),
    (
        "shorten",
        """
def shorten(row, max_length):
    if row["labels"][1 - max_length :].count(-100) == 0:
        raise ValueError("no room")
    while len(row["input_ids"]) > max_length:
        del row["input_ids"][0], row["labels"][0]
    return row
""",
        "it is {'input_ids'",
    ),
    (*_shorten("len(ids) - max_length)", "len(ids) - max_length + 1)"), "more than necessary"),
    (  # a row is taken for a question and one answer
        "shorten",
        """
def shorten(row, max_length):
    n = [label == -100 for label in row["labels"]].index(False)
    cut = max(0, len(row["input_ids"]) - max_length)
    if cut >= n:
        raise ValueError("no room")
    ids = row["input_ids"][cut:]
    return {"input_ids": ids, "labels": [-100] * (n - cut) + ids[n - cut :]}
""",
        "max_length=100: the labels",
    ),
    # The batch
    (
        *_collate('max(len(row["input_ids"]) for row in rows)', 'len(rows[0]["input_ids"])'),
        "Where does your width come from",
    ),
    (
        *_collate(MASK, 'fill([int(i != -100) for i in r["labels"]], 0)'),
        "not learned does not mean",
    ),
    (*_collate(MASK, "[1] * width"), "is 1 everywhere"),
    (*_collate(MASK, MASK.replace("[1]", "[True]").replace("0)", "False)")), "torch.bool"),
    (*_collate('fill(r["labels"], -100)', 'fill(r["input_ids"], -100)'), "made from the input_ids"),
    (
        *_collate(
            "    width =", '    rows = sorted(rows, key=lambda r: len(r["labels"]))\n    width ='
        ),
        "in another order",
    ),
    (
        "collate",
        """
import torch
from torch.nn.utils.rnn import pad_sequence

def collate(rows, pad_token_id):
    def padded(lists, filler):
        return pad_sequence([torch.tensor(each) for each in lists], padding_value=filler)
    return {
        "input_ids": padded([r["input_ids"] for r in rows], pad_token_id),
        "attention_mask": padded([[1] * len(r["input_ids"]) for r in rows], 0),
        "labels": padded([r["labels"] for r in rows], -100),
    }
""",
        "shape (4, 2) instead",
    ),
    # The loss
    (*_loss(MEAN, MEAN + ".detach()"), "no gradient passes"),
    (*_loss(MEAN, MEAN + ".item()"), "not float"),
    (*_loss(MEAN, MEAN.replace("logits.", "logits.softmax(-1).", 1)), "the softmax is taken twice"),
    (
        *_loss(MEAN, MEAN.replace("labels.flatten()", "labels.clamp(min=0).flatten()")),
        "as if token 0",
    ),
    (
        *_loss(
            MEAN,
            "(cross_entropy(logits.flatten(0, 1), labels.clamp(min=0).flatten(), reduction='none')"
            " * (labels > 0).flatten()).sum() / (labels > 0).sum()",
        ),
        "Token 0 is skipped",
    ),
    (*_loss(MEAN, MEAN + ".exp()"), "a perplexity"),
    (*_loss(MEAN, "cross_entropy(logits[0], labels[0])"), "Only the first row"),
    (*_loss(MEAN, SUM + " / len(labels)"), "by the number of rows"),
    (
        *_loss("not (labels != -100).any()", "not (labels != -100).any(1).all()"),
        "The other row has targets",
    ),
    (
        *_loss(
            SHIFT,
            "logits = logits[:, :-1]\n    labels[:, :-1] = labels[:, 1:].clone()\n"
            "    labels = labels[:, :-1]",
        ),
        "passed in have changed",
    ),
    (
        "answer_loss",
        """
from torch.nn.functional import cross_entropy

def answer_loss(logits, labels):
    if (labels[:, 1:] == -100).all():
        raise ValueError("none")
    return cross_entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:])
""",
        "first token of the next row",
    ),
]
