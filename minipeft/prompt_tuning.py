"""Prompt tuning: learn n vectors in front of the embedded text (Lester et al. 2021, section 2).

    [P; E(x)]        P: (n, hidden), trained        E(x): (seq, hidden), frozen

P is a piece of prompt that no word need have written. The base model stays as it is, to the bit.
"""

import torch
from torch import nn

from minipeft.technique.words import ordinary_tokens, token_ids, vectors_of, vocabulary_of
from minipeft.virtual_tokens import attach, refuse

INITS = ("text", "vocab", "random")


class SoftPrompt(nn.Module):
    """The trained vectors, weight: (num_virtual_tokens, hidden)."""

    place = "front"

    def __init__(self, weight):
        super().__init__()
        self.num_virtual_tokens = len(weight)
        self.weight = nn.Parameter(weight)

    def forward(self):
        return self.weight  # (n, hidden)


def add_prompt_tuning(model, num_virtual_tokens=10, init="vocab", text=None, tokenizer=None):
    """Freeze `model` and put trainable vectors in front of every input. Returns the model.

    num_virtual_tokens  n: n * hidden trainables. None, with init="text": one for each token.
    init                how they start (Lester et al. 2021, section 3.2):
                        "text"    the embeddings of `text`, cut or repeated to n tokens. Untrained,
                                  the model does what it does with the text typed in front.
                        "vocab"   the embeddings of n random tokens, special ones left out.
                        "random"  normal, with the mean and deviation of the embedding table.
    tokenizer           for `text`, and to know special tokens; that of `load_base` by default.
    The vectors are float32, also on a half-precision base (float64 on a float64 one).
    Raises ValueError for an unknown init, a length below 1, text that is missing or empty, and a
    model that has a technique already or no language-model head.
    """
    if init not in INITS:
        raise ValueError(f"init={init!r} is none of {', '.join(map(repr, INITS))}.")
    if text is not None and init != "text":
        raise ValueError(f'text is given, but init={init!r} has no use for it; take init="text".')
    if num_virtual_tokens is None and init == "text":
        num_virtual_tokens = len(token_ids(model, text, tokenizer))
    refuse(model, num_virtual_tokens)
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
def nearest_words(model, k=5):
    """For each virtual token the k tokens whose embeddings point most nearly the same way.

    Returns a list of n lists of (token id, cosine similarity from -1 to 1), the nearest first.
    Raises ValueError if the model has no vectors in front of its embeddings.
    """
    if getattr(getattr(model, "virtual_tokens", None), "place", None) != "front":
        raise ValueError("This model has no virtual tokens among its embeddings.")
    table = vocabulary_of(model).float()  # (vocab, hidden)
    vectors = model.virtual_tokens().float()  # (n, hidden)
    cosines = nn.functional.normalize(vectors, dim=-1) @ nn.functional.normalize(table, dim=-1).T
    best = cosines.topk(k, dim=-1)  # (n, k)
    return [
        list(zip(ids, values, strict=True))
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
