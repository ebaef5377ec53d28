"""From prompts and answers to batches: encode, mask labels, truncate, pad, group by length."""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import NotRequired, TypedDict

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase

from minipeft.prompts import Prompt, framed
from minipeft.refusals import is_whole_number, refuse_flag, refuse_size, require, shown
from minipeft.row_checks import checked, of_whole_rows, refuse_padding

IGNORED = -100  # the default ignore_index of torch's cross_entropy


class EncodedRow(TypedDict):
    """What `encode` returns."""

    input_ids: list[int]
    labels: NotRequired[list[int]]  # as long as input_ids
    cut: dict[str, int]  # tokens cut off, for example {"prompt": 12, "answer": 0}


def encode(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    answer: str | None = None,
    max_length: int | None = None,
    add_eos: bool = True,
) -> EncodedRow:
    """Turn a prompt (a text, or the messages of a chat) and its answer into token ids and labels.

    Prompt and answer are tokenized separately and then joined, so the prompt has the ids that the
    model sees at inference, where there is no answer. Labels are -100 over the prompt and the
    answer's ids after it, ending in EOS, from which the model learns to stop. They are not shifted:
    the model does that itself. Without an answer there are no labels and no EOS.

    A row of more than `max_length` tokens loses the beginning of the prompt first, because the end
    holds the cue for the answer (BOS and one prompt token stay), and then the end of the answer.
    EOS always stays. A cut answer teaches the model to stop early, so check `cut`.

    Raises ValueError for an empty answer, an empty prompt if the tokenizer adds no BOS, a
    tokenizer without EOS, and a `max_length` too small for prompt, answer and EOS.
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
            reply = reply[:-1] if reply[-1:] == end else reply  # the text may already end in EOS
    cut = {"prompt": 0, "answer": 0}
    if max_length is not None:
        least = len(before) + min(1, len(text)) + min(1, len(reply)) + len(end)
        require(
            is_whole_number(max_length) and max_length >= least,
            f"max_length={shown(max_length)} is too short or no whole number: the smallest row "
            "of this tokenizer, with a token each of prompt and answer and the special ones, "
            f"has {least} tokens.",
        )
        room = max_length - len(before) - len(end)
        cut["prompt"] = max(0, min(len(text) + len(reply) - room, len(text) - 1))
        text = text[cut["prompt"] :]
        cut["answer"] = max(0, len(text) + len(reply) - room)
        reply = reply[: len(reply) - cut["answer"]]
    row: EncodedRow = {"input_ids": [*before, *text, *reply, *end], "cut": cut}
    if answer is not None:
        row["labels"] = [IGNORED] * (len(before) + len(text)) + [*reply, *end]
    return row


def position_ids_from_mask(attention_mask: torch.Tensor) -> torch.Tensor:
    """Number the real tokens of each row 0, 1, ..., on whichever side the padding is.

    attention_mask: (batch, seq), 1 for tokens, 0 for padding. Returns int64 (batch, seq). Padding
    gets the position of the token before it, or 0, so no position exceeds the model's table.
    Raises ValueError for anything else. The mask's values are checked on the CPU only, because on a
    GPU the check would force a synchronization.
    """
    mask = attention_mask
    valid = isinstance(mask, torch.Tensor) and mask.dim() > 0
    looked_at = type(mask) is torch.Tensor and not torch.compiler.is_compiling()
    if valid and looked_at and mask.device.type == "cpu":
        valid = bool(((mask == 0) | (mask == 1)).all())
    if not valid:
        raise ValueError(
            f"A mask is a tensor (batch, seq), 1 for tokens and 0 for padding; got {shown(mask)}."
        )
    return (mask.long().cumsum(-1) - 1).clamp(min=0)  # (batch, seq)


class Collator:
    """Pad encoded rows to the longest of them. For `DataLoader`, HF `Trainer` and `Batches`.

    Rows map input_ids and, optionally, labels and token_type_ids to lists or tensors; other keys
    are ignored. For a classifier, the labels of a row are one class number, or floating-point
    numbers (regression, multi-label). Padding is masked by position, not by id. So the pad token
    may be EOS: the real EOS keeps its label (notebook 02).

    Returns int64 tensors (batch, seq): input_ids, attention_mask (0 at padding), token_type_ids
    (0), labels (-100), and with position_ids=True position_ids that begin at 0. A classifier's
    labels are int64 (batch,), or float32 (batch,) or (batch, labels).
    A model with learned positions, such as GPT-2, needs position_ids when padded on the left
    (notebook 01). One that numbers positions differently, such as RoBERTa, must not get them.
    multiple_of: pad to a multiple of this length, so that batches come in few shapes; a compiled or
    recorded step needs that (`train`). The loss stays the same, since padding is masked.
    Raises ValueError if there is no pad token, and for rows that cannot be trained on.
    """

    def __init__(
        self,
        pad_token_id: int,
        padding_side: str = "right",
        position_ids: bool = False,
        multiple_of: int = 1,
    ) -> None:
        refuse_padding(pad_token_id, padding_side)
        refuse_flag("position_ids", position_ids)
        refuse_size("multiple_of", multiple_of, "length to pad to")
        self.pad_token_id, self.padding_side = pad_token_id, padding_side
        self.position_ids, self.multiple_of = position_ids, multiple_of

    def __call__(self, rows: Sequence[Mapping[str, object]]) -> dict[str, torch.Tensor]:
        fill = {"input_ids": self.pad_token_id, "attention_mask": 0, "token_type_ids": 0,
                "labels": IGNORED}  # fmt: skip
        tensors = checked(rows)
        longest = max(len(row["input_ids"]) for row in tensors)
        seq = -(-longest // self.multiple_of) * self.multiple_of
        batch = {}
        for name in tensors[0]:
            values = [row[name] for row in tensors]
            if name == "labels" and of_whole_rows(values):
                dtype = torch.float32 if any(v.is_floating_point() for v in values) else torch.int64
                batch[name] = torch.stack([v.to(dtype) for v in values])  # (batch,) or (batch, n)
                continue
            missing = [seq - len(v) for v in values]
            sides = [(n, 0) if self.padding_side == "left" else (0, n) for n in missing]
            padded = [pad(v, s, value=fill[name]) for v, s in zip(values, sides, strict=True)]
            batch[name] = torch.stack(padded)  # (batch, seq)
        if self.position_ids:
            batch["position_ids"] = position_ids_from_mask(batch["attention_mask"])
        return batch


class Batches:
    """An iterable over collated batches whose order is a pure function of (seed, epoch).

    rows: a list or a `datasets.Dataset` of encoded rows. An epoch visits each row once; the last
    batch may be smaller. Iterating again repeats the same order until `set_epoch` is called.
    group_by_length: shuffle the rows, sort them by length within windows of 50 batches, then
    shuffle the batches. Less is padded, and the order stays random. With shuffle=False, rows come
    in the order given, or with group_by_length from shortest to longest.
    Raises ValueError for rows or settings that give no batches.
    """

    def __init__(
        self,
        rows: Sequence[Mapping[str, object]],
        collate: Callable[[list[Mapping[str, object]]], dict[str, torch.Tensor]],
        batch_size: int,
        seed: int = 0,
        group_by_length: bool = False,
        shuffle: bool = True,
    ) -> None:
        sized = hasattr(rows, "__len__") and hasattr(rows, "__getitem__")
        if isinstance(rows, Mapping | str) or not sized:
            raise ValueError(
                f"Rows are a list of encoded rows, or one split of a data set; got {shown(rows)}."
            )
        require(
            is_whole_number(batch_size) and batch_size >= 1 and len(rows) > 0,
            f"{len(rows)} rows do not go into batches of {shown(batch_size)} rows.",
        )
        require(callable(collate), f"{shown(collate)} cannot collate rows; pass a Collator.")
        refuse_flag("group_by_length", group_by_length)
        refuse_flag("shuffle", shuffle)
        require(is_whole_number(seed), f"seed={shown(seed)} is not a whole number.")
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.seed, self.epoch, self.shuffle = seed, 0, shuffle
        self.lengths = _lengths(rows) if group_by_length else None

    def set_epoch(self, epoch: int) -> None:
        """Use the order of this epoch, an integer of at least 0."""
        valid = is_whole_number(epoch) and epoch >= 0
        require(valid, f"epoch={shown(epoch)} is not a whole number of at least 0.")
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def order(self) -> list[list[int]]:
        """The row indices of each batch of this epoch."""
        size, order = self.batch_size, list(range(len(self.rows)))
        rng = random.Random(f"{self.seed} {self.epoch}")
        if self.shuffle:
            rng.shuffle(order)
        if self.lengths:
            window = 50 * size if self.shuffle else len(order)
            for i in range(0, len(order), window):
                order[i : i + window] = sorted(order[i : i + window], key=self.lengths.__getitem__)
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        if self.shuffle and self.lengths:
            rng.shuffle(batches)
        return batches

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for indices in self.order():
            yield self.collate([self.rows[i] for i in indices])


def _lengths(rows):
    try:
        return [len(row["input_ids"]) for row in rows]
    except (TypeError, KeyError) as error:
        raise ValueError(
            "To be grouped by length every row needs input_ids; encode the rows first."
        ) from error


def padding_share(batches: Iterable[Mapping[str, torch.Tensor]]) -> float:
    """The fraction of positions that are padding. Raises ValueError for no batch or no mask."""
    try:
        masks = [batch["attention_mask"] for batch in batches]
        positions = sum(mask.numel() for mask in masks)
        require(positions, "There is no batch, so there is no share of padding.")
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{shown(batches)} are not batches; give what a Collator made, each with an "
            "attention_mask (batch, seq)."
        ) from error
    return 1 - sum(int(mask.sum()) for mask in masks) / positions
