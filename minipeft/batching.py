"""From prompts and answers to batches: encode, mask the labels, cut, pad, group by length."""

import random
from collections.abc import Mapping
from numbers import Integral

import torch
from torch.nn.functional import pad

from minipeft.prompts import framed
from minipeft.refusals import refuse_flag, require, shown
from minipeft.row_checks import checked, of_whole_rows

IGNORED = -100  # what torch's cross_entropy skips by default, and so what every model skips


def encode(tokenizer, prompt, answer=None, max_length=None, add_eos=True):
    """Turn a prompt and its answer into token ids and labels.

    The prompt is a text or the messages of a chat (see `framed`), the answer a text. Both are
    tokenised apart and then joined. So the prompt's ids are the same with and without an answer, as
    they must be: at inference the model sees the prompt alone. The labels are not shifted, because
    the model does that itself. They are -100 over the whole prompt, and the answer's ids after it;
    its last label is EOS, which is how a model learns to stop.

    Longer than `max_length` tokens: first the beginning of the prompt is cut, since its end holds
    the cue for the answer (BOS and one prompt token stay); if that is not enough, the end of the
    answer. EOS always stays. An answer that was cut teaches the model to stop early, so look at
    `cut`. Without an answer (inference) there are no labels and no EOS.

    Returns a dict: input_ids and labels, two lists of one length, and cut, for example
    {"prompt": 12, "answer": 0}, the number of tokens left out of each.
    Raises ValueError for an empty answer, an empty prompt if the tokenizer adds no BOS, a
    tokenizer without EOS, and a `max_length` that has no room for prompt, answer and EOS.
    """
    if not isinstance(answer, str | None):
        raise ValueError(f"An answer must be text, or None to have none; got {shown(answer)}.")
    refuse_flag("add_eos", add_eos)
    before, text = framed(tokenizer, prompt)
    require(
        before or text,
        "The prompt is empty and this tokenizer adds no BOS, so no position could predict the "
        "first token of the answer. Give a prompt, for example tokenizer.bos_token.",
    )
    reply, end = [], []
    if answer is not None:
        reply = tokenizer(answer, add_special_tokens=False)["input_ids"]
        require(
            reply,
            "The answer is empty: it would only teach the model to stop at once. Drop the "
            "row, or give tokenizer.eos_token as the answer if that is what you want.",
        )
        if add_eos:
            require(
                tokenizer.eos_token_id is not None,
                "This tokenizer has no EOS token, so the model could not learn to stop. "
                "Set tokenizer.eos_token, or pass add_eos=False.",
            )
            end = [tokenizer.eos_token_id]
            reply = reply[:-1] if reply[-1:] == end else reply  # the text may bring its own EOS
    cut = {"prompt": 0, "answer": 0}
    if max_length is not None:
        least = len(before) + min(1, len(text)) + min(1, len(reply)) + len(end)
        require(
            _is_whole_number(max_length) and max_length >= least,
            f"max_length={shown(max_length)} is too short or no whole number: the smallest row "
            "of this tokenizer, with a token each of prompt and answer and the special ones, "
            f"has {least} tokens.",
        )
        room = max_length - len(before) - len(end)
        cut["prompt"] = max(0, min(len(text) + len(reply) - room, len(text) - 1))
        text = text[cut["prompt"] :]
        cut["answer"] = max(0, len(text) + len(reply) - room)
        reply = reply[: len(reply) - cut["answer"]]
    prompt_ids = [*before, *text]
    row = {"input_ids": [*prompt_ids, *reply, *end], "cut": cut}
    if answer is not None:
        row["labels"] = [IGNORED] * len(prompt_ids) + [*reply, *end]
    return row


def _is_whole_number(value):
    return isinstance(value, Integral) and not isinstance(value, bool)


def position_ids_from_mask(attention_mask):
    """Number the real tokens of each row 0, 1, ... wherever the padding stands.

    attention_mask: (batch, seq), 1 for tokens, 0 for padding. Returns int64 (batch, seq). Padding
    gets the number of the token before it, or 0, so no position is beyond the model's table.
    Raises ValueError for what is no such mask (its values are looked at on the CPU only, because on
    a GPU the look would make the host wait).
    """
    mask = attention_mask
    fits = isinstance(mask, torch.Tensor) and mask.dim() > 0
    if fits and type(mask) is torch.Tensor and mask.device.type == "cpu":
        fits = bool(((mask == 0) | (mask == 1)).all())
    if not fits:
        raise ValueError(
            f"A mask is a tensor (batch, seq), 1 for tokens and 0 for padding; got {shown(mask)}."
        )
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # (batch, seq)


class Collator:
    """Pad encoded rows to the longest of them. For `DataLoader`, HF `Trainer` and `Batches`.

    Labels are padded with -100 by position. Nothing looks at the ids, so a pad token that equals
    EOS does no harm: the real EOS keeps its label (claim 2). Values may be lists or tensors. Rows
    without labels give a batch without labels. For a classifier of whole rows, each row has one
    class number, or numbers for a regression or several labels. token_type_ids, where all rows
    have them, are padded with 0; other keys are ignored.

    Returns int64 tensors (batch, seq): input_ids, attention_mask, labels, and position_ids if
    asked for. Labels of whole rows are int64 (batch,), or float32 (batch,) or (batch, labels).
    position_ids begin at 0. A left-padded model with learned positions, such as GPT-2, needs them
    (claim 1). A model that counts in a way of its own, as RoBERTa does from the id of its padding
    token on, must not get them.
    Raises ValueError if there is no pad token, and for rows that cannot be trained on.
    """

    def __init__(self, pad_token_id, padding_side="right", position_ids=False):
        require(
            pad_token_id is not None,
            "There is no pad token. Pass tokenizer.eos_token_id: padding is masked by "
            "position here, so the real EOS stays a target.",
        )
        require(
            _is_whole_number(pad_token_id) and pad_token_id >= 0,
            f"pad_token_id={shown(pad_token_id)} is no token id; pass a whole number.",
        )
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={shown(padding_side)} is neither 'left' nor 'right'.")
        refuse_flag("position_ids", position_ids)
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.position_ids = position_ids

    def __call__(self, rows):
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "token_type_ids": 0,
                "labels": IGNORED}  # fmt: skip
        rows = checked(rows)
        width = max(len(row["input_ids"]) for row in rows)
        batch = {}
        for name in rows[0]:
            values = [row[name] for row in rows]
            if name == "labels" and of_whole_rows(values):
                dtype = torch.float32 if any(v.is_floating_point() for v in values) else torch.int64
                batch[name] = torch.stack([v.to(dtype) for v in values])  # (batch,) or (batch, n)
                continue
            room = [(width - len(v), 0) if self.padding_side == "left" else (0, width - len(v))
                    for v in values]  # fmt: skip
            padded = [pad(v, r, value=fill[name]) for v, r in zip(values, room, strict=True)]
            batch[name] = torch.stack(padded)  # (batch, seq)
        if self.position_ids:
            batch["position_ids"] = position_ids_from_mask(batch["attention_mask"])
        return batch


class Batches:
    """Collated batches, as often as you like. The order is a pure function of (seed, epoch).

    rows: a list or a `datasets.Dataset` of encoded rows. Each comes once per epoch; the last batch
    may be smaller. Every pass repeats the order of its epoch until `set_epoch` names another.
    group_by_length: shuffle, sort by length within windows of 50 batches, then shuffle the
    batches. Rows of like length meet, so less is padded, and the order stays random. Without
    `shuffle` the rows come in the order given, or, grouped, from the shortest to the longest.
    Raises ValueError for what cannot be put in batches.
    """

    def __init__(self, rows, collate, batch_size, seed=0, group_by_length=False, shuffle=True):
        if isinstance(rows, Mapping | str) or not all(
            hasattr(rows, name) for name in ("__len__", "__getitem__")
        ):
            raise ValueError(
                f"Rows are a list of encoded rows, or one split of a data set; got {shown(rows)}."
            )
        require(
            _is_whole_number(batch_size) and batch_size >= 1 and len(rows) > 0,
            f"{len(rows)} rows do not go into batches of {shown(batch_size)} rows.",
        )
        require(callable(collate), f"{shown(collate)} cannot collate rows; pass a Collator.")
        refuse_flag("group_by_length", group_by_length)
        refuse_flag("shuffle", shuffle)
        require(_is_whole_number(seed), f"seed={shown(seed)} is no whole number.")
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.seed, self.epoch, self.shuffle = seed, 0, shuffle
        self.lengths = _lengths(rows) if group_by_length else None

    def set_epoch(self, epoch):
        """From now on the order is that of `epoch`, a whole number from 0 on."""
        if not _is_whole_number(epoch) or epoch < 0:
            raise ValueError(f"epoch={shown(epoch)} is no whole number from 0 on.")
        self.epoch = epoch

    def __len__(self):
        return -(-len(self.rows) // self.batch_size)

    def order(self):
        """The row numbers of each batch of this epoch: a list of lists."""
        size, order = self.batch_size, list(range(len(self.rows)))
        rng = random.Random(f"{self.seed} {self.epoch}")
        if self.shuffle:
            rng.shuffle(order)
        if self.lengths:
            window = 50 * size if self.shuffle else len(order)
            starts = range(0, len(order), window)
            windows = [sorted(order[i : i + window], key=self.lengths.__getitem__) for i in starts]
            order = [i for window in windows for i in window]
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        if self.shuffle and self.lengths:
            rng.shuffle(batches)
        return batches

    def __iter__(self):
        for numbers in self.order():
            yield self.collate([self.rows[i] for i in numbers])


def _lengths(rows):
    """The number of tokens of each row."""
    try:
        return [len(row["input_ids"]) for row in rows]
    except (TypeError, KeyError) as error:
        raise ValueError(
            "To be grouped by length every row needs input_ids; encode the rows first."
        ) from error


def padding_share(batches):
    """The share of positions, from 0 to 1, that are padding: computed, then thrown away.

    Raises ValueError where there is no batch, or one without a mask.
    """
    try:
        masks = [batch["attention_mask"] for batch in batches]
        if not sum(mask.numel() for mask in masks):
            raise ValueError("There is no batch, so there is no share of padding.")
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{shown(batches)} are no batches; give what a Collator made, each with an "
            "attention_mask (batch, seq)."
        ) from error
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
