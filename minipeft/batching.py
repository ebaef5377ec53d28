"""From prompts and answers to batches: encode, mask the labels, cut, pad, group by length."""

import random

import torch

IGNORED = -100  # what torch's cross_entropy skips by default, and so what every model skips


def _framed(tokenizer, text):
    """The ids of a text and the special tokens that this tokenizer puts before one, such as BOS.

    What it puts behind (some tokenizers append EOS) is left out: the answer is yet to come.
    """
    probe = tokenizer("a", add_special_tokens=False)["input_ids"]
    framed = tokenizer("a")["input_ids"]
    starts = range(len(framed) - len(probe) + 1)
    before = next((i for i in starts if framed[i : i + len(probe)] == probe), 0)
    return framed[:before], tokenizer(text, add_special_tokens=False)["input_ids"]


def encode(tokenizer, prompt, answer=None, max_length=None, add_eos=True):
    """Turn a prompt and its answer into token ids and labels.

    Both are tokenised apart and then joined. So the prompt's ids are the same with and without an
    answer, as they must be: at inference the model sees the prompt alone. The labels are not
    shifted, because the model does that itself. They are -100 over the whole prompt, and the
    answer's ids after it; its last label is EOS, which is how a model learns to stop.

    Longer than `max_length` tokens: first the beginning of the prompt is cut, since its end holds
    the cue for the answer (BOS and one prompt token stay); if that is not enough, the end of the
    answer. EOS always stays. An answer that was cut teaches the model to stop early, so look at
    `cut`. Without an answer (inference) there are no labels and no EOS.

    Returns a dict: input_ids and labels, two lists of one length, and cut, for example
    {"prompt": 12, "answer": 0}, the number of tokens left out of each.
    Raises ValueError for an empty answer, an empty prompt if the tokenizer adds no BOS, a
    tokenizer without EOS, and a `max_length` that has no room for prompt, answer and EOS.
    """
    if not isinstance(prompt, str) or not isinstance(answer, str | None):
        raise ValueError(f"Prompt and answer must be text; got {prompt!r:.40} and {answer!r:.40}.")
    before, text = _framed(tokenizer, prompt)
    if not before and not text:
        raise ValueError(
            "The prompt is empty and this tokenizer adds no BOS, so no position could predict the "
            "first token of the answer. Give a prompt, for example tokenizer.bos_token."
        )
    reply, end = [], []
    if answer is not None:
        reply = tokenizer(answer, add_special_tokens=False)["input_ids"]
        if not reply:
            raise ValueError(
                "The answer is empty: it would only teach the model to stop at once. Drop the "
                "row, or give tokenizer.eos_token as the answer if that is what you want."
            )
        if add_eos:
            if tokenizer.eos_token_id is None:
                raise ValueError(
                    "This tokenizer has no EOS token, so the model could not learn to stop. "
                    "Set tokenizer.eos_token, or pass add_eos=False."
                )
            end = [tokenizer.eos_token_id]
            reply = reply[:-1] if reply[-1:] == end else reply  # the text may bring its own EOS
    cut = {"prompt": 0, "answer": 0}
    if max_length is not None:
        least = len(before) + min(1, len(text)) + min(1, len(reply)) + len(end)
        if isinstance(max_length, bool | float) or max_length < least:
            raise ValueError(
                f"max_length={max_length} is too short: the smallest row of this tokenizer, with "
                f"a token each of prompt and answer and the special ones, has {least} tokens."
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


def position_ids_from_mask(attention_mask):
    """Number the real tokens of each row 0, 1, ... wherever the padding stands.

    attention_mask: (batch, seq), 1 for tokens, 0 for padding. Returns int64 (batch, seq). Padding
    gets the number of the token before it, or 0, so no position is beyond the model's table.
    """
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)  # (batch, seq)


class Collator:
    """Pad encoded rows to the longest of them. For `DataLoader`, HF `Trainer` and `Batches`.

    Labels are padded with -100 by position. Nothing looks at the ids, so a pad token that equals
    EOS does no harm: the real EOS keeps its label (claim 2). Keys other than input_ids and labels
    are ignored. Values may be lists or tensors. Rows without labels give a batch without labels.

    Returns int64 tensors (batch, seq): input_ids, attention_mask, labels, and position_ids if
    asked for, which a left-padded model with learned positions needs (claim 1).
    Raises ValueError if there is no pad token, and for rows that cannot be trained on.
    """

    def __init__(self, pad_token_id, padding_side="right", position_ids=False):
        if pad_token_id is None:
            raise ValueError(
                "There is no pad token. Pass tokenizer.eos_token_id: padding is masked by "
                "position here, so the real EOS stays a target."
            )
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side={padding_side!r} is neither 'left' nor 'right'.")
        self.pad_token_id = pad_token_id
        self.padding_side = padding_side
        self.position_ids = position_ids

    def __call__(self, rows):
        columns = {"input_ids": self.pad_token_id, "attention_mask": 0, "labels": IGNORED}
        labelled = [row.get("labels") is not None for row in rows]
        if not rows or any(labelled) != all(labelled):
            raise ValueError("A batch needs rows, and labels in all of them or in none.")
        filled = [self._checked(i, row, labelled[i]) for i, row in enumerate(rows)]
        width = max(len(row["input_ids"]) for row in filled)
        batch = {}
        for name in filled[0]:
            padded = []
            for row in filled:
                padding = [columns[name]] * (width - len(row[name]))
                left = self.padding_side == "left"
                padded.append(padding + row[name] if left else row[name] + padding)
            batch[name] = torch.tensor(padded, dtype=torch.int64)  # (batch, seq)
        if self.position_ids:
            batch["position_ids"] = position_ids_from_mask(batch["attention_mask"])
        return batch

    @staticmethod
    def _checked(i, row, labelled):
        """The row as lists, with its mask; refuses what would train wrong in silence."""
        ids = torch.as_tensor(row["input_ids"]).tolist()
        if not ids or 0 in torch.as_tensor(row.get("attention_mask", [1])).tolist():
            raise ValueError(
                f"Row {i} of the batch is empty or holds padding already. Give unpadded rows: "
                "the collator pads them, and a row of nothing but padding has no meaning."
            )
        checked = {"input_ids": ids, "attention_mask": [1] * len(ids)}
        if labelled:
            checked["labels"] = torch.as_tensor(row["labels"]).tolist()
            if len(checked["labels"]) != len(ids):
                raise ValueError(
                    f"Row {i} of the batch has {len(ids)} input_ids but "
                    f"{len(checked['labels'])} labels; they must be of one length."
                )
            if set(checked["labels"][1:]) <= {IGNORED}:
                raise ValueError(
                    f"Row {i} of the batch has no target: every label after the first is -100, so "
                    "a loss would be 0/0 = NaN. Was the answer empty or cut off?"
                )
        return checked


class Batches:
    """Collated batches, as often as you like. The order is a pure function of (seed, epoch).

    rows: a list or a `datasets.Dataset` of encoded rows. Each comes once per epoch; the last batch
    may be smaller. Every pass repeats the order of its epoch until `set_epoch` names another.
    group_by_length: shuffle, sort by length within windows of 50 batches, then shuffle the
    batches. Rows of like length meet, so less is padded, and the order stays random. Without
    `shuffle` the rows come in the order given, or, grouped, from the shortest to the longest.
    """

    def __init__(self, rows, collate, batch_size, seed=0, group_by_length=False, shuffle=True):
        if isinstance(batch_size, bool | float) or batch_size < 1 or len(rows) == 0:
            raise ValueError(f"{len(rows)} rows do not go into batches of {batch_size} rows.")
        self.rows, self.collate, self.batch_size = rows, collate, batch_size
        self.seed, self.epoch, self.shuffle = seed, 0, shuffle
        self.lengths = [len(row["input_ids"]) for row in rows] if group_by_length else None

    def set_epoch(self, epoch):
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


def padding_share(batches):
    """The share of positions, from 0 to 1, that are padding: computed, then thrown away."""
    masks = [batch["attention_mask"] for batch in batches]
    return 1 - sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)
