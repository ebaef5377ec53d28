"""Prompt tuning: train n vectors in front of the embedded text (Lester et al. 2021, section 2).

    [P; E(x)]        P: (n, hidden), trained        E(x): (seq, hidden), frozen

The vectors P need not be embeddings of words. The base model itself is not changed.
"""

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from minipeft.refusals import refuse_no_model, refuse_size, require
from minipeft.technique.words import ordinary_tokens, token_ids, vectors_of, vocabulary_of
from minipeft.virtual_tokens import VirtualTokens, attach, refuse

INITS = ("text", "vocab", "random")


class SoftPrompt(VirtualTokens):
    """The trainable vectors, weight: (n, hidden)."""

    place = "front"

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.num_virtual_tokens = len(weight)
        self.weight = nn.Parameter(weight)

    def forward(self) -> torch.Tensor:
        return self.weight  # (n, hidden)


def add_prompt_tuning(
    model: PreTrainedModel,
    num_virtual_tokens: int | None = 10,
    init: str = "vocab",
    text: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> PreTrainedModel:
    """Freeze `model` and put trainable vectors in front of every input. Returns the model.

    num_virtual_tokens  n, for n * hidden trainable parameters. None, with init="text": the number
                        of tokens of the text.
    init                initial vectors (Lester et al. 2021, section 3.2):
                        "text"    the embeddings of `text`, truncated or repeated to n tokens.
                                  Before training, this equals typing the text in front.
                        "vocab"   the embeddings of n random tokens, except special tokens
                                  (the paper: of the 5,000 most common).
                        "random"  normal, with the mean and standard deviation of the embedding
                                  table (the paper: uniform in +-0.5).
    tokenizer           encodes `text` and says which tokens are special; default: `load_base`'s.
    The vectors are float32 even on a half-precision base (float64 on a float64 base).
    Raises ValueError for an unknown init, a length below 1, missing or empty text, and a model that
    already has a technique or has no language-model head.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} is none of {', '.join(map(repr, INITS))}.")
    if text is not None and init != "text":
        raise ValueError(f'text is given, but init={init!r} has no use for it; take init="text".')
    if num_virtual_tokens is None and init == "text":
        num_virtual_tokens = len(token_ids(model, text, tokenizer))
    refuse(model, num_virtual_tokens)
    assert num_virtual_tokens is not None  # checked by `refuse`
    if init == "random":
        vocabulary = vocabulary_of(model)  # (vocab, hidden)
        std, mean = torch.std_mean(vocabulary)
        weight = torch.randn_like(vocabulary[:1].expand(num_virtual_tokens, -1)) * std + mean
    else:
        if init == "text":
            ids = token_ids(model, text, tokenizer, num_virtual_tokens)  # (n,)
        else:
            words = ordinary_tokens(model, tokenizer)
            ids = words[torch.randint(len(words), (num_virtual_tokens,)).to(words.device)]
        weight = vectors_of(model, ids)  # (n, hidden)
    return attach(model, SoftPrompt(weight), "prompt_tuning")


@torch.no_grad()
def nearest_words(model: PreTrainedModel, k: int = 5) -> list[list[tuple[int, float]]]:
    """For each virtual token, the k tokens whose embeddings have the highest cosine similarity.

    Returns n lists of (token id, cosine similarity), most similar first.
    Raises ValueError if the model has no virtual tokens in front of its input embeddings, and for a
    k below 1 or above the size of the vocabulary.
    """
    refuse_no_model(model)
    refuse_size("k", k, "number of words")
    virtual = getattr(model, "virtual_tokens", None)
    if not isinstance(virtual, VirtualTokens) or virtual.place != "front":
        raise ValueError("This model has no virtual tokens among its embeddings.")
    table = vocabulary_of(model).float()  # (vocab, hidden)
    require(k <= len(table), f"k={k} is more than the {len(table)} words of the vocabulary.")
    vectors = virtual().float()  # (n, hidden)
    cosines = nn.functional.normalize(vectors, dim=-1) @ nn.functional.normalize(table, dim=-1).T
    best = cosines.topk(k, dim=-1)  # (n, k)
    return [
        list(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
