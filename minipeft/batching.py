"""From prompt and answer to a padded batch whose labels say what is to be learnt.

`encode` makes one row, `Collator` pads rows to a batch, `Batches` goes through a data set.
"""

import random
import warnings

import torch

IGNORE = -100  # the label that torch's cross-entropy, and so every model of transformers, skips


def encode(tokenizer, prompt, answer, max_length=None, add_eos=True):
    """Return one training row: input_ids, labels and cut, the first two of one length.

    Prompt and answer are tokenised apart and joined, because at inference the model gets the prompt
    alone: so the boundary falls where it will fall then. Labels are -100 on the prompt, the token
    ids on the answer and on the end-of-sequence token. They are not shifted; the model does that.

    A row longer than `max_length` loses tokens from the left of its prompt first, so that the words
    next to the answer stay; when the prompt is down to one token, from the right of the answer,
    never its end token. `cut` says how many tokens went: {"prompt": n, "answer": m}; cutting an
    answer also warns.

    Raises ValueError if the tokenizer has no end token, the answer is empty or white space, prompt
    and answer leave no token to predict, or max_length is too short for prompt, answer and end.
    """
    if add_eos and tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no eos token; set tokenizer.eos_token or add_eos=False."
        )
    if not answer.strip():
        raise ValueError(f"The answer to {prompt[:40]!r} is empty: there is nothing to learn.")
    end = [tokenizer.eos_token_id] if add_eos else []
    prompt_ids = _without_end(tokenizer, tokenizer(prompt)["input_ids"])
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not prompt_ids:
        # The first token of a row is never predicted, so an answer with no prompt needs a start.
        if tokenizer.bos_token_id is None:
            raise ValueError(
                "The prompt is empty and the tokenizer has no bos token to stand in for it, so the "
                "first token of the answer could not be learnt; give a prompt."
            )
        prompt_ids = [tokenizer.bos_token_id]
    cut = {"prompt": 0, "answer": 0}
    if max_length is not None:
        if max_length < 2 + len(end):
            raise ValueError(
                f"max_length={max_length} has no room for one token of the prompt, one of the "
                f"answer{' and the end token' if end else ''}; take {2 + len(end)} or more."
            )
        excess = len(prompt_ids) + len(answer_ids) + len(end) - max_length
        cut["prompt"] = max(0, min(excess, len(prompt_ids) - 1))
        cut["answer"] = max(0, excess - cut["prompt"])
        prompt_ids = prompt_ids[cut["prompt"] :]
        answer_ids = answer_ids[: len(answer_ids) - cut["answer"]]
        if cut["answer"]:
            warnings.warn(
                f"max_length={max_length} cut {cut['answer']} tokens off the answer to "
                f"{prompt[:40]!r}: the model would learn to stop early.",
                stacklevel=2,
            )
    target = answer_ids + end
    return {
        "input_ids": prompt_ids + target,
        "labels": [IGNORE] * len(prompt_ids) + target,
        "cut": cut,
    }


def _without_end(tokenizer, ids):
    """Some tokenizers append their eos to all they encode; a prompt must not end in it."""
    appended = tokenizer("")["input_ids"][-1:] == [tokenizer.eos_token_id]
    return ids[:-1] if appended and ids[-1:] == [tokenizer.eos_token_id] else ids


def position_ids_from_mask(attention_mask):
    """0, 1, 2, ... over the real tokens of each row, wherever the padding stands; 0 on padding.

    attention_mask: (batch, seq), 1 on real tokens. Returns int64 (batch, seq).
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)


class Collator:
    """Pad rows of `encode` to one length and stack them; for DataLoader, Trainer and `Batches`.

    Padding is known by its position, never by its id: where pad and eos are the same token, the
    eos at the end of an answer keeps its label (claim 2).

    pad_token_id  what fills up input_ids. Raises ValueError if it is None.
    padding_side  "right" or "left".
    position_ids  also return position ids that count real tokens only. GPT-2 needs them when it is
                  padded on the left; Bloom takes none (its ALiBi reads the mask).
    Calling it returns int64 tensors, each (batch, seq): input_ids, attention_mask, labels unless
    the rows have none, and position_ids if asked for.
    """

    def __init__(self, pad_token_id, padding_side="right", position_ids=False):
        if pad_token_id is None:
            raise ValueError(
                "pad_token_id is None: this tokenizer has no pad token. "
                "Use tokenizer.eos_token_id; padding is masked by position, so the real eos stays."
            )
        if padding_side not in ("right", "left"):
            raise ValueError(f"padding_side={padding_side!r} is neither 'right' nor 'left'.")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.position_ids = position_ids

    def __call__(self, rows):
        rows = [{k: [int(i) for i in row[k]] for k in ("input_ids", "labels") if k in row}
                for row in rows]  # fmt: skip
        labelled = "labels" in rows[0]
        for i, row in enumerate(rows):
            if not row["input_ids"]:
                raise ValueError(f"Row {i} of the batch is empty: it would be nothing but padding.")
            if ("labels" in row) != labelled:
                raise ValueError("Some rows of the batch have labels and some have none.")
            if labelled and len(row["labels"]) != len(row["input_ids"]):
                raise ValueError(
                    f"Row {i} of the batch has {len(row['input_ids'])} input_ids but "
                    f"{len(row['labels'])} labels; there must be one label for each token."
                )
            if labelled and all(label == IGNORE for label in row["labels"][1:]):
                raise ValueError(
                    f"Row {i} of the batch has no token to learn: each label after the first is "
                    "-100 (the first is never predicted). Was the answer cut off or masked?"
                )
        width = max(len(row["input_ids"]) for row in rows)
        batch = {
            "input_ids": self._padded([row["input_ids"] for row in rows], width, self.pad_token_id),
            "attention_mask": self._padded([[1] * len(row["input_ids"]) for row in rows], width, 0),
        }
        if labelled:
            batch["labels"] = self._padded([row["labels"] for row in rows], width, IGNORE)
        if self.position_ids:
            batch["position_ids"] = position_ids_from_mask(batch["attention_mask"])
        return batch

    def _padded(self, lists, width, filler):
        if self.padding_side == "right":
            lists = [ids + [filler] * (width - len(ids)) for ids in lists]
        else:
            lists = [[filler] * (width - len(ids)) + ids for ids in lists]
        return torch.tensor(lists)  # (batch, seq)


class Batches:
    """Go through `rows` in collated batches, as often as you like.

    The order is a pure function of (seed, epoch): `set_epoch` is all that an exact resume needs.
    group_by_length  sort by length inside chunks of 50 batches, so that rows of like length meet
                     and little is padded; which rows meet, and the order of batches, stay random.
    Raises ValueError for no rows or a batch_size below 1.
    """

    def __init__(self, rows, collate, batch_size, seed=0, group_by_length=False, shuffle=True):
        if not len(rows) or batch_size < 1:
            raise ValueError(f"{len(rows)} rows in batches of {batch_size}: there is no batch.")
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.seed, self.group_by_length, self.shuffle = seed, group_by_length, shuffle
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return -(-len(self.rows) // self.batch_size)

    def order(self):
        """The row numbers of each batch of this epoch, a list of lists."""
        rng = random.Random(f"{self.seed}:{self.epoch}")
        numbers = list(range(len(self.rows)))
        if self.shuffle:
            rng.shuffle(numbers)
        if self.group_by_length:
            chunk = 50 * self.batch_size
            chunks = [numbers[i : i + chunk] for i in range(0, len(numbers), chunk)]
            lengths = [len(row["input_ids"]) for row in self.rows]
            numbers = [n for part in chunks for n in sorted(part, key=lengths.__getitem__)]
        size = self.batch_size
        batches = [numbers[i : i + size] for i in range(0, len(numbers), size)]
        if self.group_by_length and self.shuffle:
            rng.shuffle(batches)
        return batches

    def __iter__(self):
        for numbers in self.order():
            yield self.collate([self.rows[n] for n in numbers])


def padded_share(lengths_of_batches):
    """The share of a padded batch's positions that are padding, over all batches, from 0 to 1.

    lengths_of_batches: for each batch the lengths of its rows, in tokens.
    """
    positions = sum(max(lengths) * len(lengths) for lengths in lengths_of_batches)
    return 1 - sum(map(sum, lengths_of_batches)) / positions
