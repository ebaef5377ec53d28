"""Judge a model by the answers it gives: label words, and how sure a percentage is."""

import inspect
import itertools
import math
import operator
import sys

import torch
from torch import nn
from tqdm import tqdm

from minipeft.batching import Collator, encode
from minipeft.refusals import refuse_size, shown
from minipeft.technique.on_model import evaluating


def _list_of(prompts, model, who):
    """The prompts as a list; ValueError if it is none, or if `model` cannot continue them."""
    causal = isinstance(model, nn.Module) and callable(getattr(model, "generate", None))
    if not causal or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{who} asks a causal language model for its next token, and {type(model).__name__} is "
            "none; load one with load_base."
        )
    try:
        listed = None if isinstance(prompts, str | dict) else list(prompts)
    except TypeError:
        listed = None
    if listed is None or any(isinstance(prompt, dict) for prompt in listed):
        raise ValueError(f"{who} wants a list of prompts, not {shown(prompts)}; put them in [ ].")
    return listed


def _by_length(rows, size):
    """Numbers of rows of one length, at most `size` together, from the shortest to the longest."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for _, same in itertools.groupby(order, key=lambda i: len(rows[i])):
        same = list(same)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def _left_padded(tokenizer, prompts, device):
    """(input_ids, mask), each (batch, seq): all prompts end in the last column (claim 1)."""
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    batch = Collator(_pad(tokenizer) or 0, "left")(rows)
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def _pad(tokenizer):
    """What to pad with. It is masked, so the end token will do, as in `generate`."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None else tokenizer.eos_token_id


def _takes(model, name):
    """Has the forward of the model, inside of HF peft's wrapper, an argument of this name?"""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in inspect.signature(bare.forward).parameters


@torch.no_grad()
def classify(model, tokenizer, prompts, choices=(" negative", " positive"), batch_size=32):
    """Which of `choices` does the model find likeliest as the next token of each prompt?

    Prompts are those of `encode`: texts, or chats. Only the first token of a choice is compared, so
    the first tokens must differ. Prompts of one length share a batch, so nothing is padded, and
    each is read as it would be alone, however the model counts its positions.
    Returns an int64 tensor of shape (number of prompts,): the index of the winning choice.
    Raises ValueError if a prompt is empty, if two choices begin with the same token, and for a
    model that is no causal language model.
    """
    prompts = _list_of(prompts, model, "classify")
    refuse_size("batch_size", batch_size, "number of prompts")
    texts = isinstance(choices, list | tuple) and all(isinstance(c, str) for c in choices)
    if not texts or len(choices) < 2:
        raise ValueError(f"choices={shown(choices)} is no list of two texts or more.")
    rows = [encode(tokenizer, prompt)["input_ids"] for prompt in prompts]
    words = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
    if not all(words):
        raise ValueError(f"A choice is empty: {choices}.")
    first = [word[0] for word in words]
    if len(set(first)) < len(first):
        raise ValueError(
            f"The choices {choices} cannot be told apart by their first token: {first}. "
            "Choose words that begin differently."
        )
    device = next(model.parameters()).device
    options = {"use_cache": False, "logits_to_keep": 1}
    if _takes(model, "input_ids"):  # else it is wrapped, and passes them on
        options = {name: value for name, value in options.items() if _takes(model, name)}
    winners = torch.empty(len(rows), dtype=torch.int64)
    batches = list(_by_length(rows, batch_size))
    with evaluating(model):
        # The bar shows itself only where the answer takes more than two seconds.
        for numbers in tqdm(batches, file=sys.stdout, unit="batch", delay=2, leave=False):
            ids = torch.tensor([rows[i] for i in numbers], device=device)  # (batch, seq)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
            winners[numbers] = logits[:, -1, first].argmax(-1).cpu()
    return winners


@torch.no_grad()
def complete(model, tokenizer, prompts, max_new_tokens=20, **options):
    """Continue each prompt; greedy unless `options` (those of `generate`) say otherwise.

    Prompts are those of `encode`: texts, or chats. They are padded on the left (claim 1), and
    `generate` numbers their positions. To a model that counts them itself, such as Bloom or the
    decoder of BART, only prompts of one length are given together.
    Returns a list of strings: the new text only, without special tokens.
    Raises ValueError if a prompt is empty, and for a model that is no causal language model, or
    whose positions `generate` counts wrong.
    """
    prompts = _list_of(prompts, model, "complete")
    refuse_size("max_new_tokens", max_new_tokens, "number of tokens")
    if not prompts:
        return []
    rows = [encode(tokenizer, prompt)["input_ids"] for prompt in prompts]
    device, texts = next(model.parameters()).device, {}
    options = {"do_sample": False, "pad_token_id": _pad(tokenizer), **options}
    with evaluating(model):
        if _takes(model, "position_ids"):
            _refuse_other_positions(model, torch.tensor([min(rows, key=len)], device=device))
            together = [list(range(len(rows)))]
        else:
            together = _by_length(rows, len(rows))
        for numbers in together:
            ids, mask = _left_padded(tokenizer, [prompts[i] for i in numbers], device)
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options
            )
            out = getattr(out, "sequences", out)[:, ids.shape[1] :]  # (batch, new tokens)
            new = tokenizer.batch_decode(out, skip_special_tokens=True)
            each = len(new) // len(numbers)  # more than one with num_return_sequences
            texts |= {i: new[k * each : (k + 1) * each] for k, i in enumerate(numbers)}
    return [text for i in range(len(rows)) for text in texts[i]]


def _refuse_other_positions(model, ids):
    """`generate` numbers positions 0, 1, ...; RoBERTa counts from its padding token's id on."""
    mask, count = torch.ones_like(ids), torch.arange(ids.shape[1], device=ids.device)
    own = model(input_ids=ids, attention_mask=mask).logits[0, -1].float()
    given = model(input_ids=ids, attention_mask=mask, position_ids=count[None]).logits[0, -1]
    if (own - given.float()).norm() > 0.01 * own.norm():
        raise ValueError(
            f"{type(model).__name__} does not number its positions 0, 1, ..., as generate does, so "
            "its completions would be wrong; take its logits for one token after the other."
        )


def wilson_interval(correct, total, z=1.96):
    """The Wilson score interval of a share (Wilson 1927): 95 % sure for z = 1.96.

    `correct` of `total` answers were right. Returns (low, high), both in [0, 1].
    It stays inside [0, 1] and is honest for few rows, where p +- z * sqrt(p (1 - p) / n) is not.
    Raises ValueError for numbers that are no share, and a z that is not above 0.
    """
    try:
        correct, total = operator.index(correct), operator.index(total)
    except TypeError as error:
        raise ValueError(
            f"{shown(correct)} right answers out of {shown(total)}: both must be whole numbers."
        ) from error
    if not 0 <= correct <= total or not 0 < total < 2**53:
        raise ValueError(f"{correct} right answers out of {total} is not a share.")
    if not isinstance(z, int | float) or isinstance(z, bool) or not 0 < z < 1e6:
        raise ValueError(f"z={shown(z)} must be a number above 0; 1.96 is 95 % sure.")
    p = correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)
