"""P-tuning v2: separate virtual tokens for every layer (Liu et al. 2022, section 3.2).

It is described in two ways, and both are implemented here:

  "key_value"  keys and values for every layer, which is what the published code trains
  "hidden"     hidden states H_l for every layer, (n, hidden), from which the frozen layer computes
               keys and values: K = rotate(W_k norm(H_l)), V = W_v norm(H_l)

So the hidden form is the key-value form with K and V tied together, and `fold_p_tuning_v2` turns it
into that form. On a classifier the head is trained too, as in the paper (section 3.3).
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from minipeft.refusals import refuse_no_model
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
from minipeft.virtual_tokens import VirtualTokens, attach, refuse

FORMS = ("key_value", "hidden")


class KeyValues(VirtualTokens):
    """Keys and values of n virtual tokens, weight: (n, layers * 2 * kv_heads * head_dim)."""

    def __init__(
        self, table: torch.Tensor, shape: tuple[int, int, int], place: str = "cache"
    ) -> None:
        super().__init__()
        self.num_virtual_tokens, self.shape, self.place = len(table), shape, place
        self.weight = nn.Parameter(table)

    def forward(self, layer: int | slice = slice(None)) -> torch.Tensor:
        return per_layer(self.weight, self.shape)[layer]  # (layers, 2, kv_heads, n, head_dim)


class HiddenStates(VirtualTokens):
    """Inputs of each layer at the first n positions, weight: (layers, n, hidden)."""

    place = "hidden"

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.num_virtual_tokens = weight.shape[1]
        self.weight = nn.Parameter(weight)

    def forward(self, layer: int) -> torch.Tensor:
        return self.weight[layer]  # (n, hidden)


def add_p_tuning_v2(
    model: PreTrainedModel, num_virtual_tokens: int = 10, form: str = "key_value"
) -> PreTrainedModel:
    """Freeze `model` and add n virtual tokens to each of its layers. Returns the model.

    form  "key_value": n * layers * 2 * kv_heads * head_dim trainable parameters;
          "hidden": n * layers * hidden.
    Both forms start from what the frozen model computes for n random tokens, so they start as the
    same function. (Hidden states are scaled to mean square 1, which the norm of a block undoes;
    without a norm before attention, as in OLMo-2, the forms start apart.)
    An encoder without a KV cache, such as BERT, gets its keys and values in each attention module
    (technique/attention.py). Trainable parameters, with the head of a classifier, are float32 even
    on a half-precision base (float64 on a float64 base).
    Raises ValueError for an unknown form, a length below 1, a model that already has a technique or
    is unsuitable, such as one with a sliding window, and for the hidden form on a classifier, whose
    head would read a virtual token instead of the first or last one.
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
        return attach(model, KeyValues(*key_values_of(model, words)), "p_tuning_v2")
    with refusing(model):
        key_value_shape(model)  # raises now if `fold_p_tuning_v2` or `save_adapter` would later
        virtual_tokens = HiddenStates(_states_of(model, words))
    return attach(model, virtual_tokens, "p_tuning_v2")


@torch.no_grad()
def _states_of(model, input_ids):
    """The inputs of the blocks for a text (1, n), scaled to mean square 1: (layers, n, hidden)."""
    mask, n = torch.ones_like(input_ids), input_ids.shape[1]
    states = states_of(model, n, input_ids=input_ids, attention_mask=mask)
    if input_ids.is_meta:  # there are no values to read
        return torch.empty(states.shape, **place_of(model))
    states = states.to(**place_of(model))
    return states / states.square().mean(-1, keepdim=True).sqrt()


def key_values_of(
    model: PreTrainedModel, words: torch.Tensor | None = None
) -> tuple[torch.Tensor, tuple[int, int, int], str]:
    """(table, shape, place) of the keys and values of token ids (1, n), by default of one token.

    table: (n, layers * 2 * kv_heads * head_dim). shape: (layers, kv_heads, head_dim). place:
    "cache", or "attention" for a model without a KV cache.
    """
    words = trial_words(model)[None, :1] if words is None else words
    with refusing(model):
        if keeps_cache(model, words):
            shape = key_value_shape(model)
            return table_of_cache(model, words, words.shape[1]), shape, "cache"
        table, shape = table_of_attention(model, words)
        return table.to(**place_of(model)), shape, "attention"


@torch.no_grad()
def fold_p_tuning_v2(model: PreTrainedModel) -> PreTrainedModel:
    """Turn the hidden form into the key-value form. Returns the model.

    The frozen layers compute the keys and values from the hidden states once; from then on they
    are the trainable parameters. The outputs of the model stay the same up to rounding.
    Raises ValueError if the model does not have the hidden form.
    """
    refuse_no_model(model)
    if not isinstance(getattr(model, "virtual_tokens", None), HiddenStates):
        raise ValueError("There is no hidden form of P-tuning v2 on this model to fold.")
    table = table_of(model)
    with adding(model, "p_tuning_v2", again=True):
        model.virtual_tokens = KeyValues(table, key_value_shape(model)).train(model.training)
        survive_checkpointing(model)
    return model


def table_of(model: PreTrainedModel) -> torch.Tensor:
    """The keys and values of either form: (n, layers * 2 * kv_heads * head_dim)."""
    virtual: Any = model.virtual_tokens
    if virtual.place != "hidden":
        return virtual.weight
    token = torch.zeros(1, 1, dtype=torch.int64, device=virtual.weight.device)  # any token will do
    return table_of_cache(model, token, virtual.num_virtual_tokens)
