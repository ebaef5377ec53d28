"""Checks of exercise 02: they name the mistake and stay silent about the solution."""

import copy

import torch
from tokenizers.processors import TemplateProcessing
from torch.nn.functional import cross_entropy

from checks import Mistake
from minipeft import load_base

PAIRS = [("Was it good?", " Yes, very"), ("Why?", " It was short"), ("Who is it for?", " You")]


def _with_bos(tokenizer):
    """A copy that puts a BOS in front of every text, and has another EOS."""
    other = copy.deepcopy(tokenizer)
    bos = other.bos_token
    other.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, other.bos_token_id)]
    )
    other.eos_token = "~"
    return other


def encode_pair(answer):
    """Check a function (tokenizer, prompt, answer) -> input_ids and labels."""
    _, tokenizer = load_base("tiny", device="cpu")
    for prompt, text in [*PAIRS, ("Good?\n\n", " Yes"), ("Good? ", "Yes \n")]:
        _right_row(answer, tokenizer, prompt, text)
    prompt, text = "Sentiment: ", "positive"  # " p" is one token
    ids = list(answer(tokenizer, prompt, text)["input_ids"])
    if ids[:-1] == tokenizer(prompt + text)["input_ids"]:
        raise Mistake(
            "Prompt and answer were tokenized as one text. A token may then cross the boundary, so "
            "that the prompt has other tokens than at inference."
        )
    _right_row(answer, tokenizer, prompt, text)
    other = _with_bos(tokenizer)
    prompt, text = PAIRS[0]
    ids = list(answer(other, prompt, text)["input_ids"])
    if ids[-1:] == [tokenizer.eos_token_id]:
        raise Mistake(
            f"This tokenizer has the eos id {other.eos_token_id}, and the row ends in {ids[-1]}."
        )
    if ids.count(other.bos_token_id) > 1:
        raise Mistake(
            "With a tokenizer that puts a beginning-of-sequence token in front of every text, the "
            "row has two of them: one in the middle."
        )
    if other.bos_token_id not in ids:
        raise Mistake(
            "The row has lost the beginning-of-sequence token with which this tokenizer begins "
            "every prompt."
        )
    _right_row(answer, other, prompt, text)


def _right_row(answer, tokenizer, prompt, text):
    eos, pair = tokenizer.eos_token_id, f"{prompt!r} and {text!r}"
    question = tokenizer(prompt)["input_ids"]
    reply = tokenizer(text, add_special_tokens=False)["input_ids"]
    row = answer(tokenizer, prompt, text)
    if not isinstance(row, dict) or {"input_ids", "labels"} - set(row):
        raise Mistake('Return a dict with the keys "input_ids" and "labels".')
    ids, labels = row["input_ids"], row["labels"]
    if not isinstance(ids, list) or not isinstance(labels, list):
        raise Mistake(
            f"input_ids and labels must be lists; you have a {type(ids).__name__} and a "
            f"{type(labels).__name__}."
        )
    if len(ids) != len(labels):
        raise Mistake(f"There are {len(ids)} input_ids but {len(labels)} labels.")
    if -100 in ids:
        raise Mistake("-100 stands among the input_ids too. Are both names the same list?")
    if ids == question + reply:
        raise Mistake("The row does not end in the end-of-sequence token: no model learns to stop.")
    if ids == question + reply + [eos, eos]:
        raise Mistake("The row ends in two end-of-sequence tokens.")
    if ids != question + reply + [eos]:
        found = tokenizer.decode([i for i in ids if i != eos], skip_special_tokens=True)
        if tokenizer(prompt.rstrip())["input_ids"] == ids[: -len(reply) - 1] != question:
            raise Mistake(
                f"For {prompt!r}: what the prompt ends in is lost, spaces or line breaks."
            )
        if found != prompt + text:
            raise Mistake(
                f"For {pair} the row reads {found!r}. Both texts are to stay as they are."
            )
        raise Mistake("input_ids are not the prompt's tokens, the answer's tokens and the eos.")
    n = len(question)
    if labels == ids:
        raise Mistake("The prompt has labels: the model would learn to write the question.")
    if labels == [-100] * len(ids):
        raise Mistake(f"For {pair} no token has a label. Do you count tokens or letters?")
    shifted = ids[1:] + [-100]
    if labels[n - 1 : -1] == shifted[n - 1 : -1] and labels[n - 1] != -100:
        raise Mistake(
            "The labels are shifted by hand. The model shifts them too, so each position would "
            "learn the token after the next."
        )
    if labels[:-1] == [-100] * (len(ids) - 1):
        raise Mistake("Only the last position has a label: the answer's words are masked too.")
    if labels[:n] in ([0] * n, [eos] * n, [tokenizer.pad_token_id] * n):
        raise Mistake(
            f"On the prompt stands the label {labels[0]}, a token that would be learned there."
        )
    if labels[: n - 1] == [-100] * (n - 1) and labels[n - 1] != -100:
        raise Mistake("The mask is one too short: the last token of the prompt has a label.")
    if labels[n] == -100:
        raise Mistake("The mask is one too long: the first token of the answer has no label.")
    if labels[-1] == -100:
        raise Mistake("The eos has no label, so nothing teaches the model to stop.")
    if labels != [-100] * n + reply + [eos]:
        raise Mistake(f"For {pair} the labels are {labels}, and the tokens {ids}.")


def shorten(answer):
    """Check a function (row, max_length) -> the row without the beginning of its prompt."""
    one = {"input_ids": [5, 6, 7, 8, 9, 2], "labels": [-100, -100, -100, -100, 9, 2]}
    # A chat: 2 ends each turn, and the second question has no labels.
    chat = {"input_ids": [5, 6, 7, 2, 3, 4, 8, 2], "labels": [-100, -100, 7, 2, -100, -100, 8, 2]}
    short = {"input_ids": [4, 9], "labels": [-100, 9]}
    for row in (one, chat, short):
        ids, labels = row["input_ids"], row["labels"]
        first = [label == -100 for label in labels].index(False)
        for length in (100, *range(len(ids) + 1, 0, -1)):
            given = copy.deepcopy(row)
            too_many = max(0, len(ids) - length)
            room = too_many == 0 or too_many < first
            case = f"The row {row} with max_length={length}"
            try:
                got = answer(given, length)
            except ValueError as error:
                if not room:
                    continue
                raise Mistake(f"{case}: you raise a ValueError, but there is room.") from error
            if given != row:
                raise Mistake(f"The row that was passed in has changed: it is {given} now.")
            if not isinstance(got, dict) or {"input_ids", "labels"} - set(got):
                raise Mistake('Return a dict with "input_ids" and "labels".')
            wanted = {"input_ids": ids[too_many:], "labels": labels[too_many:]}
            got = {name: got[name] for name in wanted}
            if got == wanted and room:
                continue
            _explain_cut(got, wanted, row, length, first, case)


def _explain_cut(got, wanted, row, length, first, case):
    ids, labels = got["input_ids"], got["labels"]
    if len(ids) != len(labels):
        raise Mistake(f"{case}: {len(ids)} tokens are left, and {len(labels)} labels.")
    if len(ids) > length:
        raise Mistake(f"{case}: {len(ids)} tokens come back. Mind that ids[-0:] is the whole list.")
    if ids == row["input_ids"][:length] and len(ids) < len(row["input_ids"]):
        raise Mistake(f"{case}: its end was cut, where the answer and the eos stand.")
    if got == wanted:
        if -100 in row["labels"][first:]:
            raise Mistake(
                f"{case}: its targets stand in two turns, and the first of them is lost, or has "
                "lost the token in front of it. Raise a ValueError."
            )
        raise Mistake(
            f"{case}: the first target comes first in the row, where nothing predicts it; raise a "
            "ValueError."
        )
    if len(ids) < len(wanted["input_ids"]):
        more = len(wanted["input_ids"]) - len(ids)
        raise Mistake(f"{case}: you cut {more} more than necessary.")
    if ids == wanted["input_ids"]:
        raise Mistake(f"{case}: the labels {labels} are not those of the tokens {ids}.")
    raise Mistake(f"{case}: what is left is {got}; {first} tokens stand before the first target.")


def collate(answer):
    """Check a function (rows, pad_token_id) -> a batch padded on the right; pad may be eos."""
    first = {"input_ids": [7, 8, 9, 2], "labels": [-100, -100, 9, 2]}
    second = {"input_ids": [5, 2], "labels": [-100, 2]}
    # A chat has an eos after each turn, and its second question has no labels.
    chat = {"input_ids": [7, 2, 8, 6, 2], "labels": [-100, 2, -100, 6, 2]}
    for rows, pad in (
        ([first, second], 2),  # pad = eos = 2
        ([second, chat, first], 2),
        ([second, second, chat], 9),
        ([first], 0),
    ):
        given = copy.deepcopy(rows)
        width = max(len(row["input_ids"]) for row in rows)
        try:
            batch = answer(given, pad)
        except ValueError as error:
            if "expected sequence of length" not in str(error):
                raise
            raise Mistake(
                f"For rows of {[len(row['labels']) for row in rows]} tokens your lists come out "
                "of unequal length. Where does your width come from?"
            ) from error
        if given != rows:
            raise Mistake("The rows that were passed in have changed: pad copies of their lists.")
        for name in ("input_ids", "attention_mask", "labels"):
            if name not in batch:
                raise Mistake(f"The batch has no {name}.")
            kind = getattr(batch[name], "dtype", type(batch[name]).__name__)
            if kind != torch.int64:
                raise Mistake(f"{name} is {kind}, not an int64 tensor.")
            if batch[name].shape != (len(rows), width):
                raise Mistake(
                    f"{name} has the shape {tuple(batch[name].shape)} instead of "
                    f"({len(rows)}, {width})."
                )
        _right_batch(rows, pad, {name: tensor.tolist() for name, tensor in batch.items()})


def _right_batch(rows, pad, batch):
    ids, mask, labels = (batch[name] for name in ("input_ids", "attention_mask", "labels"))
    wanted_ids = _padded([row["input_ids"] for row in rows], pad)
    wanted_mask = _padded([[1] * len(row["input_ids"]) for row in rows], 0)
    wanted_labels = _padded([row["labels"] for row in rows], -100)
    case = f"For the rows {[row['input_ids'] for row in rows]} and the pad token {pad},"
    if ids != wanted_ids:
        if ids == _padded([row["input_ids"] for row in rows], pad, left=True):
            raise Mistake("The padding is on the left; this task asks for the right.")
        if sorted(ids) == sorted(wanted_ids):
            raise Mistake(f"{case} the rows of the batch are in another order.")
        raise Mistake("input_ids are not the rows, filled up on the right with the pad token.")
    if mask != wanted_mask:
        if mask == _padded([[int(i != pad) for i in row["input_ids"]] for row in rows], 0):
            raise Mistake(
                "The mask hides the real eos: it looks for the pad id instead of the length."
            )
        if mask == [[1 - m for m in row] for row in wanted_mask]:
            raise Mistake("The attention mask is inverted: 1 means a real token.")
        if mask == _padded([[int(i != -100) for i in row["labels"]] for row in rows], 0):
            raise Mistake("The mask hides the prompts: not learned does not mean not seen.")
        if all(m == 1 for row in mask for m in row):
            raise Mistake("The attention mask is 1 everywhere: padding is read like a text.")
        if any(2 in row["input_ids"][:-1] for row in rows):
            raise Mistake(
                f"A chat has an eos after each turn, and the masks are {mask}: a row does not end "
                "at the first of them."
            )
        raise Mistake("The attention mask is not 1 on the real tokens and 0 on the padding.")
    if labels != wanted_labels:
        copied = _padded([row["input_ids"] for row in rows], -100)
        if labels == [[-100 if i == pad else i for i in row] for row in wanted_labels]:
            raise Mistake(
                "The label of the real eos is gone: where pad = eos, mask by position, not by id."
            )
        if labels in (copied, [[-100 if i == pad else i for i in row] for row in copied]):
            raise Mistake("The labels are made from the input_ids, so the prompts have labels too.")
        if labels == _padded([row["labels"] for row in rows], pad):
            raise Mistake(
                "The padding has labels: the model would learn to write padding after the end."
            )
        if labels == _padded([row["labels"] for row in rows], 0):
            raise Mistake(
                "The padding has the label 0, a token like any other; -100 is what is skipped."
            )
        raise Mistake(f"{case} the labels are {labels}, not those of the rows and then -100.")


def _padded(lists, filler, left=False):
    extra = [[filler] * (max(map(len, lists)) - len(each)) for each in lists]
    pairs = zip(lists, extra, strict=True)
    return [more + each if left else each + more for each, more in pairs]


def answer_loss(answer):
    """Check a function (logits, labels) -> mean loss over the target tokens."""
    torch.manual_seed(0)
    none = -100
    for labels in (
        [[none, none, 3, 4, 2], [none, 6, 2, none, none]],
        [[none, 1, 0, none], [none, none, none, 0], [none, 2, none, none]],  # 0 is a token
        [[none, none, none], [none, 5, 4]],  # a row without a target
        [[3, 1, 2], [4, none, 5]],  # first labels, which nothing predicts
    ):
        labels = torch.tensor(labels)
        logits = torch.randn(*labels.shape, 11, dtype=torch.float64, requires_grad=True)
        before = logits.detach().clone(), labels.clone()
        try:
            loss = answer(logits, labels)
        except ValueError as error:
            if (labels[0] == none).all():
                raise Mistake(
                    "One of two rows has no target, and you raise a ValueError. The other row has "
                    "targets."
                ) from error
            raise
        if not torch.is_tensor(loss) or loss.dim():
            kind = tuple(loss.shape) if torch.is_tensor(loss) else type(loss).__name__
            raise Mistake(f"Return one number, as a tensor without dimensions, not {kind}.")
        if not (torch.equal(logits, before[0]) and torch.equal(labels, before[1])):
            raise Mistake("The logits or labels that were passed in have changed.")
        _explain_loss(loss.detach().double(), logits.detach(), labels)
        if not loss.requires_grad:
            raise Mistake("The number is right, but no gradient passes through it.")
    nowhere, first = torch.full((2, 5), -100), torch.full((2, 5), -100)
    first[0, 0] = 3
    logits = torch.randn(2, 5, 11, dtype=torch.float64)
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
            f"{told} the loss is {float(loss)}; raise a ValueError instead of returning a number "
            "that means nothing."
        )


def _mean(logits, labels, **options):
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), **options)


def _explain_loss(loss, logits, labels):
    before, after, n = logits[:, :-1], labels[:, 1:], int((labels[:, 1:] != -100).sum())
    right = _mean(before, after)
    if torch.allclose(loss, right, rtol=1e-5):
        return
    known = {
        "Nothing is shifted: position t is compared with its own token, already read.": [
            _mean(logits, labels)
        ],
        "The shift goes the wrong way: position t predicts token t - 1.": [
            _mean(logits[:, 1:], labels[:, :-1])
        ],
        "The shift is by two: position t predicts token t + 2.": [
            _mean(logits[:, :-2], labels[:, 2:])
        ],
        "The loss is a sum over the target tokens; the mean is asked for.": [right * n],
        "The sum is divided by all positions, also those without a target.": [
            right * n / labels.numel(), right * n / after.numel()
        ],
        "The sum is divided by the number of rows; divide by that of target tokens.": [
            right * n / len(labels)
        ],
        "This is a mean of the rows' means; every target token should weigh alike.": [
            torch.stack([_mean(before[i : i + 1], after[i : i + 1]) for i in range(len(labels))])
            .nanmean()
        ],
        "cross_entropy takes logits, and got probabilities: the softmax is taken twice.": [
            _mean(before.softmax(-1), after)
        ],
        "Positions without a target count as if token 0 were wanted there.": [
            _mean(before, after.clamp(min=0))
        ],
        "Token 0 is skipped, but it is a token like any other.": [
            _mean(before, after.masked_fill(after == 0, -100))
        ],
        "This is the exponential of the mean, a perplexity.": [right.exp()],
        "Only the first row is looked at.": [_mean(before[:1], after[:1])],
        "The loss is negative: its sign is wrong.": [-right],
        "The last position of a row is asked for the first token of the next row.": [
            cross_entropy(logits.flatten(0, 1)[:-1], labels.flatten()[1:])
        ],
    }  # fmt: skip
    for message, values in known.items():
        if any(torch.allclose(loss, value, rtol=1e-5) for value in values):
            raise Mistake(message)
    raise Mistake(f"Not the mean cross-entropy of the targets: {loss:.3f} instead of {right:.3f}.")
