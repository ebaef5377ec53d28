"""Judge a model by the answers it gives: label words, and how sure a percentage is."""

import inspect
import math
import sys

import torch
from tqdm import tqdm


def _left_padded(tokenizer, prompts, device):
    """Encode prompts so that all of them end in the last column (claim 1)."""
    rows = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    if not all(rows):
        raise ValueError("A prompt is empty, so there is no position that could predict anything.")
    width = max(map(len, rows))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    input_ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    return input_ids, torch.tensor(mask, device=device)  # each (batch, seq)


@torch.no_grad()
def classify(model, tokenizer, prompts, choices=(" negative", " positive"), batch_size=32):
    """Which of `choices` does the model find likeliest as the next token of each prompt?

    Only the first token of a choice is compared, so the first tokens must differ.
    Returns an int64 tensor of shape (number of prompts,): the index of the winning choice.
    Raises ValueError if a prompt is empty or two choices begin with the same token.
    """
    if isinstance(prompts, str):
        raise ValueError("classify wants a list of prompts, not one string; wrap it in [ ].")
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
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    was_training = model.training
    model.eval()
    try:
        winners = torch.empty(len(prompts), dtype=torch.int64)
        # Rows of like length share a batch, so that little is spent on padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        starts = range(0, len(order), batch_size)
        # The bar shows itself only where the answer takes more than two seconds.
        for start in tqdm(starts, file=sys.stdout, unit="batch", delay=2, leave=False):
            rows = order[start : start + batch_size]
            input_ids, mask = _left_padded(tokenizer, [prompts[i] for i in rows], device)
            inputs = {"input_ids": input_ids, "attention_mask": mask}
            if takes_positions:  # GPT-2 would count the padding otherwise (claim 1)
                inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
            logits = model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            winners[rows] = logits[:, first].argmax(-1).cpu()
    finally:
        model.train(was_training)
    return winners


@torch.no_grad()
def complete(model, tokenizer, prompts, max_new_tokens=20, **options):
    """Continue each prompt; greedy unless `options` (those of `generate`) say otherwise.

    Returns a list of strings: the new text only, without special tokens.
    Raises ValueError if a prompt is empty.
    """
    if isinstance(prompts, str):
        raise ValueError("complete wants a list of prompts, not one string; wrap it in [ ].")
    if not len(prompts):
        return []
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        input_ids, mask = _left_padded(tokenizer, prompts, device)
        options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id, **options}
        out = model.generate(
            input_ids=input_ids, attention_mask=mask, max_new_tokens=max_new_tokens, **options
        )
    finally:
        model.train(was_training)
    return tokenizer.batch_decode(out[:, input_ids.shape[1] :], skip_special_tokens=True)


def wilson_interval(correct, total, z=1.96):
    """The Wilson score interval of a share (Wilson 1927): 95 % sure for z = 1.96.

    `correct` of `total` answers were right. Returns (low, high), both in [0, 1].
    It stays inside [0, 1] and is honest for few rows, where p +- z * sqrt(p (1 - p) / n) is not.
    """
    if not 0 <= correct <= total or total == 0:
        raise ValueError(f"{correct} right answers out of {total} is not a share.")
    p = correct / total
    centre = (p + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / (1 + z * z / total)
    return max(0.0, centre - half), min(1.0, centre + half)
