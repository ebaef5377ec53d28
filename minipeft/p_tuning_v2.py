"""P-tuning v2: virtual tokens of their own for every layer (Liu et al. 2022, section 3.2).

Two descriptions of it are around, and both are here (claim 19):

  "key_value"  keys and values for every layer, which is what the published code trains
  "hidden"     hidden states for every layer, H_l: (n, hidden), which the frozen layer itself makes
               into keys and values: K = rotate(W_k norm(H_l)), V = W_v norm(H_l)

So the hidden form is the key-value form with K and V tied together. `fold_p_tuning_v2` reads them
off. On a model for classification its head is trained too, as the paper does (section 3.3).
"""

import torch
from torch import nn

from minipeft.technique.asked import keeps_cache, states_of
from minipeft.technique.attention import table_of_attention
from minipeft.technique.kv_cache import (
    key_value_shape,
    per_layer,
    survive_checkpointing,
    table_of_cache,
)
from minipeft.technique.on_model import adding
from minipeft.technique.words import ordinary_tokens, place_of, refusing, trial_words
from minipeft.virtual_tokens import attach, refuse

FORMS = ("key_value", "hidden")


class KeyValues(nn.Module):
    """weight: (n, layers * 2 * kv_heads * head_dim), the keys and values of n virtual tokens."""

    def __init__(self, table, shape, place="cache"):
        super().__init__()
        self.num_virtual_tokens, self.shape, self.place = len(table), shape, place
        self.weight = nn.Parameter(table)

    def forward(self, layer=slice(None)):
        return per_layer(self.weight, self.shape)[layer]  # (layers, 2, kv_heads, n, head_dim)


class HiddenStates(nn.Module):
    """weight: (layers, n, hidden), what stands on the first n positions as each layer begins."""

    place = "hidden"

    def __init__(self, weight):
        super().__init__()
        self.num_virtual_tokens = weight.shape[1]
        self.weight = nn.Parameter(weight)

    def forward(self, layer):
        return self.weight[layer]  # (n, hidden)


def add_p_tuning_v2(model, num_virtual_tokens=10, form="key_value"):
    """Freeze `model` and add n virtual tokens to each of its layers. Returns the model.

    form  "key_value": n * layers * 2 * kv_heads * head_dim trainables;
          "hidden": n * layers * hidden.
    Both start at what the frozen model computes for n random words, so they start as one function;
    the hidden states are scaled to a mean square of 1, which the norm of a block undoes anyway.
    An encoder such as BERT or DistilBERT, which keeps no cache, is given its keys and values by
    another way (prefix_attention.py). A classifier keeps its head trainable (float32, as all
    trainables); the hidden form is refused there, since its head would find virtual tokens where it
    looks for the first or the last token. A language model has no such head: all of it is frozen.
    Raises ValueError for an unknown form, a length below 1, and a model that has a technique
    already or cannot keep what the method promises, such as one with a sliding window.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is none of {', '.join(map(repr, FORMS))}.")
    refuse(model, num_virtual_tokens, head="any")
    if form == "hidden" and model.get_output_embeddings() is None:
        raise ValueError(
            f"The head of {type(model).__name__} looks for the first or last token of a row, where "
            'the hidden form would put virtual ones; take form="key_value".'
        )
    words = ordinary_tokens(model)
    words = words[torch.randint(len(words), (1, num_virtual_tokens)).to(words.device)]
    if form == "key_value":
        virtual_tokens = KeyValues(*key_values_of(model, words))
    else:
        with refusing(model):
            key_value_shape(model)  # folded, and in a folder, this form is keys and values
            virtual_tokens = HiddenStates(_states_of(model, words))
    return attach(model, virtual_tokens, "p_tuning_v2")


@torch.no_grad()
def _states_of(model, input_ids):
    """What enters each block for a text (1, n), at a mean square of 1: (layers, n, hidden)."""
    mask, n = torch.ones_like(input_ids), input_ids.shape[1]
    states = states_of(model, n, input_ids=input_ids, attention_mask=mask)
    if input_ids.is_meta:  # a model without numbers has none to start from
        return torch.empty(states.shape, **place_of(model))
    states = states.to(**place_of(model))
    return states / states.square().mean(-1, keepdim=True).sqrt()


def key_values_of(model, words=None):
    """(table, shape, place) of what the frozen model computes for words (1, n), by default one.

    table: (n, layers * 2 * kv_heads * head_dim). shape: (layers, kv_heads, head_dim). place: the
    "cache", or "attention" for a model that keeps none.
    """
    words = trial_words(model)[None, :1] if words is None else words
    with refusing(model):
        if keeps_cache(model, words):
            shape = key_value_shape(model)
            return table_of_cache(model, words, words.shape[1]), shape, "cache"
        table, shape = table_of_attention(model, words)
        return table.to(**place_of(model)), shape, "attention"


@torch.no_grad()
def fold_p_tuning_v2(model):
    """Turn the hidden form into the key-value form. Returns the model.

    The keys and values are those that the frozen layers leave in the cache for the n positions.
    The outputs stay the same up to rounding. What is trained from here on are keys and values.
    Raises ValueError if the model does not have the hidden form.
    """
    if not isinstance(getattr(model, "virtual_tokens", None), HiddenStates):
        raise ValueError("There is no hidden form of P-tuning v2 on this model to fold.")
    table = table_of(model)
    with adding(model, "p_tuning_v2", again=True):
        model.virtual_tokens = KeyValues(table, key_value_shape(model)).train(model.training)
        survive_checkpointing(model)
    return model


def table_of(model):
    """The keys and values of either form: (n, layers * 2 * kv_heads * head_dim)."""
    virtual = model.virtual_tokens
    if virtual.place != "hidden":
        return virtual.weight
    one = torch.zeros(1, 1, dtype=torch.int64, device=virtual.weight.device)  # any text will do
    return table_of_cache(model, one, virtual.num_virtual_tokens)
