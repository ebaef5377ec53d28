"""Evaluate a model: classify by label words, complete prompts, confidence intervals."""

import inspect
import itertools
import math
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minipeft.batching import Collator, encode
from minipeft.prompts import Prompt
from minipeft.refusals import refuse_size, require, shown
from minipeft.targets import last_positions
from minipeft.technique.on_model import evaluating


def _list_of(prompts, model, who):
    """The prompts as a list. Raises ValueError unless `model` is a causal language model."""
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
    """Batches of indices of rows of equal length, at most `size` each, shortest rows first."""
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    for _, same in itertools.groupby(order, key=lambda i: len(rows[i])):
        same = list(same)
        yield from (same[i : i + size] for i in range(0, len(same), size))


def _left_padded(tokenizer, prompts, device):
    """(input_ids, attention_mask), each (batch, seq), padded on the left (notebook 01)."""
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    batch = Collator(_pad(tokenizer) or 0, "left")(rows)
    return batch["input_ids"].to(device), batch["attention_mask"].to(device)


def _pad(tokenizer):
    """The id to pad with; padding is masked, so EOS will do, as in `generate`."""
    pad = tokenizer.pad_token_id
    return pad if pad is not None else tokenizer.eos_token_id


def _takes(model, name):
    """Does the model's forward have an argument of this name?"""
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model  # HF peft wraps it
    return name in inspect.signature(bare.forward).parameters


@torch.no_grad()
def classify(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    choices: Sequence[str] = (" negative", " positive"),
    batch_size: int = 32,
) -> torch.Tensor:
    """Find the most probable of `choices` as the next token of each prompt.

    Prompts are texts or chats, as in `encode`. Only the first tokens of the choices are compared,
    so they must differ. A batch holds prompts of equal length, so nothing is padded and the result
    does not depend on how the model numbers positions.
    Returns the indices of the winning choices, int64 (number of prompts,).
    Raises ValueError if a prompt is empty, if two choices begin with the same token, and unless
    `model` is a causal language model.
    """
    prompt_list = _list_of(prompts, model, "classify")
    refuse_size("batch_size", batch_size, "number of prompts")
    texts = isinstance(choices, list | tuple) and all(isinstance(c, str) for c in choices)
    require(
        texts and len(choices) >= 2,
        f"choices={shown(choices)} is not a list of two texts or more.",
    )
    rows = [encode(tokenizer, prompt)["input_ids"] for prompt in prompt_list]
    words = [tokenizer(choice, add_special_tokens=False)["input_ids"] for choice in choices]
    require(all(words), f"A choice is empty: {choices}.")
    first = [word[0] for word in words]
    require(
        len(set(first)) == len(first),
        f"The choices {choices} cannot be told apart by their first token: {first}. "
        "Choose words that begin differently.",
    )
    device = next(model.parameters()).device
    options = {"use_cache": False, "logits_to_keep": last_positions(1, device)}
    if _takes(model, "input_ids"):  # otherwise a wrapper with **kwargs, which passes them on
        options = {name: value for name, value in options.items() if _takes(model, name)}
    winners = torch.empty(len(rows), dtype=torch.int64)
    batches = list(_by_length(rows, batch_size))
    with evaluating(model):
        # The progress bar appears after two seconds.
        for indices in tqdm(batches, file=sys.stdout, unit="batch", delay=2, leave=False):
            ids = torch.tensor([rows[i] for i in indices], device=device)  # (batch, seq)
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), **options).logits
            winners[indices] = logits[:, -1, first].argmax(-1).cpu()
    return winners


@torch.no_grad()
def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Iterable[Prompt],
    max_new_tokens: int = 20,
    batch_size: int = 32,
    **options: Any,
) -> list[str]:
    """Continue each prompt, without sampling unless `options` (of `generate`) ask for it.

    Prompts are texts or chats, as in `encode`. A batch is padded on the left (notebook 01), with
    position_ids from `generate`. If the model does not take position_ids, such as Bloom, a batch
    holds only prompts of equal length.
    Returns the new text of each, without special tokens.
    Raises ValueError if a prompt is empty, and for a model that is not a causal language model or
    does not number its positions as `generate` does.
    """
    prompt_list = _list_of(prompts, model, "complete")
    refuse_size("max_new_tokens", max_new_tokens, "number of tokens")
    refuse_size("batch_size", batch_size, "number of prompts")
    if not prompt_list:
        return []
    rows = [encode(tokenizer, prompt)["input_ids"] for prompt in prompt_list]
    device = next(model.parameters()).device
    texts: dict[int, list[str]] = {}
    generate: Any = model.generate
    options = {"do_sample": False, "pad_token_id": _pad(tokenizer), **options}
    if _takes(model, "logits_to_keep"):
        options.setdefault("logits_to_keep", last_positions(1, device))
    with evaluating(model):
        if _takes(model, "position_ids"):
            _refuse_other_positions(model, torch.tensor([min(rows, key=len)], device=device))
            every = range(len(rows))
            batches = [every[i : i + batch_size] for i in every[::batch_size]]
        else:
            batches = list(_by_length(rows, batch_size))
        for indices in batches:
            ids, mask = _left_padded(tokenizer, [prompt_list[i] for i in indices], device)
            out = generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options
            )
            out = getattr(out, "sequences", out)[:, ids.shape[1] :]  # (batch, new tokens)
            new = tokenizer.batch_decode(out, skip_special_tokens=True)
            each = len(new) // len(indices)  # more than one with num_return_sequences
            texts |= {i: new[k * each : (k + 1) * each] for k, i in enumerate(indices)}
    return [text for i in range(len(rows)) for text in texts[i]]


def _refuse_other_positions(model, ids):
    """Raise ValueError unless positions 0, 1, ..., as `generate` gives, are the model's own.

    RoBERTa, for one, starts after the id of its padding token.
    """
    mask, count = torch.ones_like(ids), torch.arange(ids.shape[1], device=ids.device)
    own = model(input_ids=ids, attention_mask=mask).logits[0, -1].float()
    given = model(input_ids=ids, attention_mask=mask, position_ids=count[None]).logits[0, -1]
    if (own - given.float()).norm() > 0.01 * own.norm():
        raise ValueError(
            f"{type(model).__name__} does not number its positions 0, 1, ..., as generate does, so "
            "its completions would be wrong; take its logits for one token after the other."
        )


def wilson_interval(correct: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a proportion (Wilson 1927), at 95 % confidence for z = 1.96.

    `correct` of `total` answers are right. Returns (low, high), within [0, 1]. For few answers its
    coverage is close to the nominal one, unlike that of p +- z * sqrt(p (1 - p) / n).
    Raises ValueError unless 0 <= correct <= total and total > 0, and for a z not above 0.
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
        raise ValueError(f"z={shown(z)} must be a number above 0; 1.96 is for 95 % confidence.")
    p = correct / total
    center = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, center - half), min(1.0, center + half)
