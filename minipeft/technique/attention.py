"""Keys and values of virtual tokens for a model without a KV cache, such as BERT or DistilBERT.

In transformers the configuration names the function that computes attention. Here each attention
module gets a copy of its configuration that names `attend`. It puts the virtual keys and values
before those of the text and calls the original function. The mask gets n more columns.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from minipeft.freezing import blocks
from minipeft.technique.on_model import evaluating

NAME = "minipeft"


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    virtual: torch.Tensor | list[torch.Tensor] | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """softmax(q [P_k; K]^T / sqrt(d)) [P_v; V], computed by the model's own attention function.

    query, key, value: (batch, heads, seq, head_dim). virtual: (2, heads, n, head_dim), or a list
    to which key and value are appended as (2, batch, heads, seq, head_dim).
    """
    if isinstance(virtual, list):
        virtual.append(torch.stack([key, value]))
    elif virtual is not None:
        keys, values = (t.to(key).expand(len(key), -1, -1, -1) for t in virtual)
        key = torch.cat([keys, key], 2)  # (batch, heads, n + seq, head_dim)
        value = torch.cat([values, value], 2)
        if attention_mask is not None:  # a float mask is added to the scores, others select keys
            seen = 0 if attention_mask.is_floating_point() else 1
            attention_mask = pad(attention_mask, (keys.shape[2], 0), value=seen)
    eager: Any = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    config: Any = module.plain_config
    original = ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation, eager)
    return original(module, query, key, value, attention_mask, *args, **kwargs)


AttentionInterface.register(NAME, attend)


def open_attentions(
    model: PreTrainedModel, virtual: Callable[[int], torch.Tensor | list[torch.Tensor]]
) -> list[RemovableHandle]:
    """Make the attention of every block take virtual keys and values, virtual(layer) at each call.

    Returns the handles of the hooks. Raises ValueError for a block without exactly one attention
    module whose function transformers lets the configuration name.
    """
    handles = []
    for i, block in enumerate(blocks(model)):
        found = [m for m in block.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
        if len(found) != 1:
            raise ValueError(f"block {i} has {len(found)} attentions that take keys and values")
        (attention,) = found
        config: Any = copy.copy(attention.config)
        config._attn_implementation = NAME
        attention.plain_config, attention.config = attention.config, config
        hook = partial(_add_virtual, virtual, i)
        handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _add_virtual(virtual, layer, attention, args, kwargs):
    return args, kwargs | {"virtual": virtual(layer)}


@torch.no_grad()
def table_of_attention(
    model: PreTrainedModel, input_ids: torch.Tensor
) -> tuple[torch.Tensor, tuple[int, int, int]]:
    """(table, shape): keys and values of a text (1, n), laid out as by `kv_cache.table_of_cache`.

    table: (n, layers * 2 * heads * head_dim). shape: (layers, heads, head_dim).
    Raises ValueError unless the keys and values of all blocks have one shape.
    """
    seen: list[torch.Tensor] = []  # (2, 1, heads, n, head_dim) each
    handles = open_attentions(model, lambda layer: seen)
    try:
        with evaluating(model):
            model(input_ids=input_ids)
    finally:
        for handle in handles:
            handle.remove()
        close_attentions(model)
    if len(seen) != len(blocks(model)) or len({t.shape for t in seen}) != 1:
        raise ValueError("its attentions do not have keys and values of one shape")
    _, _, heads, _, head_dim = seen[0].shape
    table = torch.stack([t[:, 0] for t in seen])  # (layers, 2, heads, n, head_dim)
    return table.permute(3, 0, 1, 2, 4).flatten(1), (len(seen), heads, head_dim)


def close_attentions(model: nn.Module) -> None:
    """Give each attention module its own configuration again."""
    for module in model.modules():
        if hasattr(module, "plain_config"):
            module.config = module.plain_config
            del module.plain_config


@torch.enable_grad()
def check_attentions(model: PreTrainedModel, words: torch.Tensor) -> None:
    """Raise ValueError unless the output of every block depends on its virtual keys and values.

    words: (1, seq).
    """
    weight = model.get_parameter("virtual_tokens.weight")  # (n, layers * 2 * heads * head_dim)
    layers = len(blocks(model))
    with evaluating(model):
        states = model(input_ids=words, output_hidden_states=True).hidden_states
        for layer in range(layers):
            loss = states[layer + 1].square().sum()  # states[0]: what enters the first block
            (gradient,) = torch.autograd.grad(loss, weight, retain_graph=True)
            if not gradient.unflatten(1, (layers, -1))[:, layer].any():
                raise ValueError(f"the attention of block {layer} does not see them")
