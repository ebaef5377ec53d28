"""Keys and values of virtual tokens for a model without a cache, such as BERT or DistilBERT.

transformers lets a configuration name the function that computes attention. Here each attention
gets a copy of its configuration that names `attend`, which puts the virtual keys and values before
those of the text, and then calls the function that the model had. A mask grows by n columns.
"""

import copy
import sys
from functools import partial

import torch
from torch.nn.functional import pad
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from minipeft.freezing import blocks
from minipeft.technique.on_model import evaluating

NAME = "minipeft"


def attend(module, query, key, value, attention_mask, *args, virtual=None, **kwargs):
    """softmax(q [P_k; K]^T / sqrt(d)) [P_v; V], as the model's own attention function computes it.

    query, key, value: (batch, heads, seq, head_dim). virtual: (2, heads, n, head_dim), or a list,
    which is given key and value instead.
    """
    if isinstance(virtual, list):
        virtual.append(torch.stack([key, value]))
    elif virtual is not None:
        keys, values = (t.to(key).expand(len(key), -1, -1, -1) for t in virtual)
        key, value = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        if attention_mask is not None:  # 0 is added to scores; others say which keys are seen
            seen = 0 if attention_mask.is_floating_point() else 1
            attention_mask = pad(attention_mask, (keys.shape[2], 0), value=seen)
    eager = vars(sys.modules[type(module).__module__]).get("eager_attention_forward")
    plain = ALL_ATTENTION_FUNCTIONS.get_interface(module.plain_config._attn_implementation, eager)
    return plain(module, query, key, value, attention_mask, *args, **kwargs)


AttentionInterface.register(NAME, attend)


def open_attentions(model, virtual):
    """Let every attention take keys and values: `virtual(layer)` is asked for them at each call.

    Returns the handles of the hooks. Raises ValueError if a block has not one attention that
    transformers computes by a function of that kind.
    """
    handles = []
    for i, block in enumerate(blocks(model)):
        found = [m for m in block.modules() if hasattr(m, "is_causal") and hasattr(m, "config")]
        if len(found) != 1:
            raise ValueError(f"block {i} has {len(found)} attentions that take keys and values")
        (attention,) = found
        attention.plain_config = attention.config
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation = NAME
        hook = partial(_hand_over, virtual, i)
        handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
    return handles


def _hand_over(virtual, layer, attention, args, kwargs):
    return args, kwargs | {"virtual": virtual(layer)}


@torch.no_grad()
def table_of_attention(model, input_ids):
    """(table, shape): the keys and values of a text (1, n), as `virtual_tokens.table_of_cache`
    gives them, (n, layers * 2 * heads * head_dim), and (layers, heads, head_dim)."""
    seen = []
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


def close_attentions(model):
    """Give each attention its own configuration again."""
    for module in model.modules():
        if hasattr(module, "plain_config"):
            module.config = module.plain_config
            del module.plain_config


@torch.enable_grad()
def check_attentions(model, words):
    """Does each layer's part of the virtual tokens change what the model gives? And does padding
    change nothing? words: (1, seq). Raises ValueError if not."""
    keys_values = list(model.virtual_tokens.parameters())
    with evaluating(model):
        output = model(input_ids=words, output_hidden_states=True)
        states = torch.stack(output.hidden_states)  # (layers + 1, 1, seq, hidden)
        for layer in range(len(blocks(model))):
            gradient = torch.autograd.grad(
                states[layer + 1].square().sum(),
                keys_values,
                retain_graph=True,
            )
            shape = model.virtual_tokens.shape
            mine = gradient[0].unflatten(1, (shape[0], -1))[:, layer]
            if not mine.any():
                raise ValueError(f"the attention of block {layer} does not see them")
