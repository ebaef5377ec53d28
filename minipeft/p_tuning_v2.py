"""P-tuning v2: virtual tokens of their own for every layer (Liu et al. 2022, section 3.2).

Two descriptions of it are around, and both are here (claim 19):

  "key_value"  keys and values for every layer, which is what the published code trains
  "hidden"     hidden states for every layer, H_l: (n, hidden), which the frozen layer itself makes
               into keys and values: K = rotate(W_k norm(H_l)), V = W_v norm(H_l)

So the hidden form is the key-value form with K and V tied together. `fold_p_tuning_v2` reads them
off. On a model for classification its head is trained too, as the paper does (section 3.3).
"""

from functools import partial

import torch
from torch import nn
from transformers import Cache

from minipeft.freezing import blocks
from minipeft.virtual_tokens import (
    attach,
    key_value_shape,
    ordinary_tokens,
    peft_config,
    per_layer,
    place_of,
    refuse,
    survive_checkpointing,
    table_of_cache,
    table_of_state,
)

PEFT_TYPE = "PREFIX_TUNING"  # HF peft reads both forms, folded, as prefix-tuning
FORMS = ("key_value", "hidden")


class KeyValues(nn.Module):
    """weight: (n, layers * 2 * kv_heads * head_dim), the keys and values of n virtual tokens."""

    place = "cache"

    def __init__(self, table, shape):
        super().__init__()
        self.num_virtual_tokens, self.shape = len(table), shape
        self.weight = nn.Parameter(table)

    def forward(self, layer=slice(None)):
        return per_layer(self.weight, self.shape)[layer]  # (layers, 2, kv_heads, n, head_dim)


class HiddenStates(nn.Module):
    """weight: (layers, n, hidden), what stands on the first n positions as each layer begins."""

    place = "front"

    def __init__(self, weight):
        super().__init__()
        self.num_virtual_tokens = weight.shape[1]
        self.weight = nn.Parameter(weight)

    def forward(self):
        return self.weight[0]  # holds the place at the embeddings; the first block overwrites it


def _overwrite(model, layer, block, args, kwargs):
    """Before block `layer`: its states take the place of what came out of the block below."""
    given = [*args, *kwargs.values()]
    cache = next((value for value in given if isinstance(value, Cache)), None)
    folded = model.virtual_tokens.place == "cache"
    if folded or (cache is not None and cache.get_seq_length(layer)):
        return None  # these positions are in the cache
    hidden = args[0]  # (batch, n + seq, hidden)
    states = model.virtual_tokens.weight[layer].to(hidden.dtype)  # (n, hidden)
    states = states.expand(len(hidden), -1, -1)
    return (torch.cat([states, hidden[:, states.shape[1] :]], 1), *args[1:]), kwargs


def add_p_tuning_v2(model, num_virtual_tokens=10, form="key_value"):
    """Freeze `model` and add n virtual tokens to each of its layers. Returns the model.

    form  "key_value": n * layers * 2 * kv_heads * head_dim trainables;
          "hidden": n * layers * hidden.
    Both start at what the frozen model computes for n random words, so they start as one function;
    the hidden states are scaled to a mean square of 1, which the norm of a block undoes anyway.
    A model for sequence classification keeps its head trainable (float32, as all trainables); the
    hidden form is refused there, since such a model looks for the last token in input_ids, which
    the hidden form replaces by embeddings. A causal model has no such head: all of it is frozen.
    Raises ValueError for an unknown form, a length below 1, and a model that has a technique
    already or layers without full attention.
    """
    if form not in FORMS:
        raise ValueError(f"form={form!r} is none of {', '.join(map(repr, FORMS))}.")
    causal = model.get_output_embeddings() is not None
    refuse(model, num_virtual_tokens, head="any")
    if form == "hidden" and not causal:
        raise ValueError(
            f"{type(model).__name__} finds the last token of a row in input_ids, which the hidden "
            'form replaces by embeddings; take form="key_value".'
        )
    words = ordinary_tokens(model)
    words = words[torch.randint(len(words), (1, num_virtual_tokens)).to(words.device)]
    if form == "key_value":
        return _attach_key_values(model, table_of_cache(model, words, num_virtual_tokens))
    attach(model, HiddenStates(_states_of(model, words)), "p_tuning_v2")
    for i, block in enumerate(blocks(model)):
        block.register_forward_pre_hook(partial(_overwrite, model, i), with_kwargs=True)
    return model


@torch.no_grad()
def _states_of(model, input_ids):
    """What enters each block for a text (1, n), at a mean square of 1: (layers, n, hidden)."""
    if input_ids.is_meta:  # a model without numbers has none to start from
        shape = len(blocks(model)), input_ids.shape[1], model.config.hidden_size
        return torch.empty(shape, **place_of(model))
    was_training = model.training
    mask = torch.ones_like(input_ids)
    inputs = {"input_ids": input_ids, "attention_mask": mask, "output_hidden_states": True}
    states = model.eval()(**inputs).hidden_states[:-1]  # layers times (1, n, hidden)
    model.train(was_training)
    states = torch.cat(states).to(place_of(model)["dtype"])
    return states / states.square().mean(-1, keepdim=True).sqrt()


def _attach_key_values(model, table):
    """Attach the table, and free the head of a model for classification again."""
    attach(model, KeyValues(table, key_value_shape(model)), "p_tuning_v2")
    for head in _heads(model).values():
        head.requires_grad_(True).to(place_of(model)["dtype"])
        head.register_forward_pre_hook(_as_wide_as_the_head)
    return model


def _heads(model):
    """{name: module} of what stands behind the transformer in a model for classification."""
    if model.get_output_embeddings() is not None:
        return {}
    outside = {model.base_model_prefix, "virtual_tokens"}
    return {name: m for name, m in model.named_children() if name not in outside}


def _as_wide_as_the_head(head, args):
    return (args[0].to(next(head.parameters()).dtype),)


@torch.no_grad()
def fold_p_tuning_v2(model):
    """Turn the hidden form into the key-value form. Returns the model.

    The keys and values are those that the frozen layers leave in the cache for the n positions.
    The outputs stay the same up to rounding. What is trained from here on are keys and values.
    Raises ValueError if the model does not have the hidden form.
    """
    if not isinstance(getattr(model, "virtual_tokens", None), HiddenStates):
        raise ValueError("There is no hidden form of P-tuning v2 on this model to fold.")
    table = _table(model)
    model.virtual_tokens = KeyValues(table, key_value_shape(model)).train(model.training)
    survive_checkpointing(model)
    return model


def _table(model):
    """The keys and values of either form: (n, layers * 2 * kv_heads * head_dim)."""
    virtual = model.virtual_tokens
    if virtual.place == "cache":
        return virtual.weight
    one = torch.zeros(1, 1, dtype=torch.int64, device=virtual.weight.device)  # any text will do
    return table_of_cache(model, one, virtual.num_virtual_tokens)


# ---- the folder format of HF peft (checkpoints.py) ---------------------------------------------


def reads(config):
    return config.get("peft_type") == PEFT_TYPE and config.get("task_type") == "SEQ_CLS"


def to_peft(model):
    """(adapter_config, {key: tensor}) as HF peft writes them: a prefix, and the head if there is.

    Without a head the folder is that of prefix-tuning, and loads as such.
    """
    _, kv_heads, head_dim = key_value_shape(model)
    config = peft_config(model, model.virtual_tokens, kv_heads, kv_heads * head_dim)
    config["prefix_projection"] = False
    state = {"prompt_embeddings": _table(model)}
    heads = _heads(model)
    if heads:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": sorted(heads)}
        state |= {f"base_model.{key}": value for key, value in _head_parameters(model).items()}
    return config, state


def _head_parameters(model):
    return {
        f"{name}.{key}": value
        for name, head in _heads(model).items()
        for key, value in head.named_parameters()
    }


def from_peft(model, config, state):
    """Add keys and values and the head of an adapter. Raises ValueError if they do not fit."""
    n = config["num_virtual_tokens"]
    refuse(model, n, head="any")
    layers, kv_heads, head_dim = key_value_shape(model)
    head = {key: value for key, value in state.items() if key != "prompt_embeddings"}
    rest = {key: value for key, value in state.items() if key == "prompt_embeddings"}
    table = table_of_state(rest, (n, layers * 2 * kv_heads * head_dim))
    found = {key: tuple(value.shape) for key, value in head.items()}
    wanted = {f"base_model.{k}": tuple(v.shape) for k, v in _head_parameters(model).items()}
    if found != wanted:
        raise ValueError(
            f"The adapter does not fit this base model: its head is {found}, not {wanted}."
        )
    _attach_key_values(model, table.to(**place_of(model), copy=True))
    with torch.no_grad():
        for key, value in _head_parameters(model).items():
            value.copy_(head[f"base_model.{key}"])
    return model
