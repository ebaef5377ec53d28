"""Tokens of the base model, which virtual tokens start from and are compared with."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypedDict

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minipeft.freezing import at_least_float32
from minipeft.technique.asked import embedded
from minipeft.technique.trial import LENGTH, N


class Place(TypedDict):
    """Where new trainable parameters are created."""

    device: torch.device
    dtype: torch.dtype


@contextmanager
def refusing(model: PreTrainedModel) -> Iterator[None]:
    """Turn any exception of a trial into a ValueError of one sentence about this model."""
    try:
        yield
    except Exception as error:
        begin = f"{type(model).__name__} cannot have virtual tokens of this kind: "
        if str(error).startswith(begin):
            raise
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else ""
        if not isinstance(error, ValueError):
            reason = f"a trial ended in {type(error).__name__}: {reason}"
        raise ValueError(f"{begin}{reason}. Take LoRA, or another base model.") from error


def trial_words(model: PreTrainedModel) -> torch.Tensor:
    """Ordinary tokens spread over the vocabulary: int64 (N + LENGTH,)."""
    words = ordinary_tokens(model)
    steps = torch.linspace(0, len(words) - 1, N + LENGTH, device=words.device)
    return words[steps.long()]


def place_of(model: PreTrainedModel) -> Place:
    """Device and dtype of new trainable parameters: float32, or float64 on a float64 base."""
    weight = _embedding_table(model)
    return {"device": weight.device, "dtype": at_least_float32(weight.dtype)}


def width_of(model: PreTrainedModel) -> int:
    """The width of the input embeddings."""
    return vectors_of(model, trial_words(model)[:1]).shape[1]


@torch.no_grad()
def vectors_of(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """A copy of the input embeddings of token ids (n,), in float32 or wider: (n, hidden)."""
    return embedded(model, ids).to(**place_of(model), copy=True)


def vocabulary_of(model: PreTrainedModel) -> torch.Tensor:
    """A copy of the input embeddings of all tokens, in float32 or wider: (vocab, hidden)."""
    table = _embedding_table(model)
    return vectors_of(model, torch.arange(len(table), device=table.device))


def token_ids(
    model: PreTrainedModel,
    text: str | None,
    tokenizer: PreTrainedTokenizerBase | None,
    n: int | None = None,
) -> torch.Tensor:
    """The ids of `text` without special tokens: int64 (n,), cut or repeated to n if n is given.

    Raises ValueError if there is no tokenizer, no text, or no token in it.
    """
    tokenizer = tokenizer or getattr(model, "minipeft_tokenizer", None)
    if tokenizer is None:
        raise ValueError("There is no tokenizer for the text; pass tokenizer=.")
    is_text = isinstance(text, str)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if is_text else []
    if not ids:
        raise ValueError('To start from text, give some: text="Is this review positive?".')
    if n is not None:
        ids = (ids * -(-n // len(ids)))[:n]
    return torch.tensor(ids, device=place_of(model)["device"])


def ordinary_tokens(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> torch.Tensor:
    """The ids of all tokens that are not special: int64 (ids,).

    The first rows of an embedding table are often special tokens, and some tables have more rows
    than there are tokens.
    """
    tokenizer = tokenizer or getattr(model, "minipeft_tokenizer", None)
    table = _embedding_table(model)
    special = set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(model.config, name, None)
        special |= set(value if isinstance(value, list) else [value])
    size = len(table)
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        size = min(size, len(tokenizer))
    return torch.tensor([i for i in range(size) if i not in special], device=table.device)


def _embedding_table(model):
    return model.get_input_embeddings().weight  # (vocab, hidden)
