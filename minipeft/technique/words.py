"""The words of a base: virtual tokens start from them, and are held against them in a trial."""

from contextlib import contextmanager

import torch

from minipeft.freezing import at_least_float32
from minipeft.technique.asked import embedded
from minipeft.technique.trial import LENGTH, N


@contextmanager
def refusing(model):
    """Turn whatever goes wrong in a trial into one sentence about this model."""
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


def trial_words(model):
    """N + LENGTH ordinary tokens, different ones as far as there are: int64."""
    words = ordinary_tokens(model)
    steps = torch.linspace(0, len(words) - 1, N + LENGTH, device=words.device)
    return words[steps.long()]


def place_of(model):
    """{"device": ..., "dtype": ...} for new trainables: float32, or float64 on a float64 base."""
    weight = model.get_input_embeddings().weight
    return {"device": weight.device, "dtype": at_least_float32(weight.dtype)}


def width_of(model):
    """The width of the vectors that enter the model."""
    return vectors_of(model, trial_words(model)[:1]).shape[1]


@torch.no_grad()
def vectors_of(model, ids):
    """The vectors that enter the model for token ids (n,), as new trainables: (n, hidden)."""
    return embedded(model, ids).to(**place_of(model), copy=True)


def vocabulary_of(model):
    """The vectors of all tokens, as they enter the model: (vocab, hidden), in float32 or wider."""
    table = model.get_input_embeddings().weight
    return vectors_of(model, torch.arange(len(table), device=table.device))


def token_ids(model, text, tokenizer, n=None):
    """The ids of `text` without special tokens: (n,), cut or repeated to n if n is given.

    Raises ValueError if there is no tokenizer, or no token.
    """
    tokenizer = tokenizer or getattr(model, "minipeft_tokenizer", None)
    if tokenizer is None:
        raise ValueError("There is no tokenizer for the text; pass tokenizer=.")
    ids = tokenizer(text or "", add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError('To start from text, give some: text="Is this review positive?".')
    if n is not None:
        ids = (ids * -(-n // len(ids)))[:n]
    return torch.tensor(ids, device=place_of(model)["device"])


def ordinary_tokens(model, tokenizer=None):
    """The ids of the vocabulary that are no special tokens: an int64 tensor (ids,).

    The first rows of a table are often special tokens, and some tables have rows for no token.
    """
    tokenizer = tokenizer or getattr(model, "minipeft_tokenizer", None)
    table = model.get_input_embeddings().weight
    config, special = model.config, set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        value = getattr(config, name, None)
        special |= set(value if isinstance(value, list) else [value])
    size = len(table)
    if tokenizer is not None:
        special |= set(tokenizer.all_special_ids)
        special |= {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
        size = min(size, len(tokenizer))
    return torch.tensor([i for i in range(size) if i not in special], device=table.device)
