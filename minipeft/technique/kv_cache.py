"""Keys and values of virtual tokens in the KV cache of a model."""

import inspect
from functools import partial

import torch
from transformers import DynamicCache

from minipeft.freezing import blocks
from minipeft.technique.asked import cache_in, cache_shape
from minipeft.technique.on_model import evaluating
from minipeft.technique.words import place_of, refusing, trial_words

CACHE_NAMES = {"past_key_values", "layer_past", "cache"}  # of the same thing in transformers


def filled_cache(model, cache, keys_values, batch):
    """A cache of the virtual keys and values (layers, 2, kv_heads, n, head_dim) for each row."""
    cache = DynamicCache() if cache is None else cache
    stack = blocks(model)
    for i, both in enumerate(keys_values.to(model.dtype)):
        device = next(stack[i].parameters()).device  # a model may be split over several
        keys, values = (t.to(device).expand(batch, -1, -1, -1) for t in both)
        DynamicCache.update(cache, keys, values, i)  # (batch, kv_heads, n, head_dim) each
    if model.training and torch.is_grad_enabled() and _checkpoints(model):
        cache.__class__ = CheckpointedCache
    return cache


class CheckpointedCache(DynamicCache):
    """Says that under gradient checkpointing each attention is to have a cache of its own.

    Checkpointing runs a block twice, and a cache that it wrote to the first time would hold the
    text twice. So transformers takes the cache away from its blocks, prefix and all.
    `survive_checkpointing` gives each attention, each time, a new one that holds only the prefix.
    """


def _checkpoints(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def survive_checkpointing(model):
    """Let every attention fetch its own keys and values where its block has lost the cache."""
    for i, block in enumerate(blocks(model)):
        block._can_checkpoint_with_cache = True  # else transformers warns that it takes it away
        for module in block.modules():
            names = CACHE_NAMES & set(inspect.signature(module.forward).parameters)
            if names and module is not block:
                hook = partial(_fetch_again, model, i, names.pop())
                module.register_forward_pre_hook(hook, with_kwargs=True)


def _fetch_again(model, layer, name, attention, args, kwargs):
    names = list(inspect.signature(attention.forward).parameters)
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    given = kwargs.get(name)
    if given is not None and not isinstance(given, CheckpointedCache):
        return None
    # From the parameters anew, so that the recomputed block has them in its own piece of graph.
    hidden = next(t for t in kwargs.values() if isinstance(t, torch.Tensor))
    keys_values = model.virtual_tokens(layer).to(hidden.device, model.dtype)
    batch = hidden.shape[0]
    cache = DynamicCache()
    DynamicCache.update(cache, *(t.expand(batch, -1, -1, -1) for t in keys_values), layer)
    return (), kwargs | {name: cache}


def key_value_shape(model):
    """(layers, kv_heads, head_dim) of the cache, read off the cache that one token leaves.

    Grouped-query attention has fewer kv_heads than heads. Raises ValueError for a model that keeps
    no keys and values, or not of one shape.
    """
    with refusing(model):
        return cache_shape(model, trial_words(model)[None, :1])


def per_layer(table, shape):
    """A table (n, layers * 2 * kv_heads * head_dim) as (layers, 2, kv_heads, n, head_dim).

    The order within a row is HF peft's: keys and values of layer 0, then those of layer 1, ...
    """
    layers, kv_heads, head_dim = shape
    return table.view(-1, layers, 2, kv_heads, head_dim).permute(1, 2, 3, 0, 4)


@torch.no_grad()
def table_of_cache(model, input_ids, n):
    """The first n positions of the cache that `input_ids` (1, seq) leave: (n, layers * 2 * kv)."""
    if input_ids.is_meta:  # a model without numbers has none to read
        layers, kv_heads, head_dim = key_value_shape(model)
        return torch.empty(n, layers * 2 * kv_heads * head_dim, **place_of(model))
    mask = torch.ones_like(input_ids)
    with evaluating(model):
        output = model(input_ids=input_ids, attention_mask=mask, use_cache=True)
    layers = cache_in(output)[1].layers
    device = place_of(model)["device"]
    both = [torch.stack([x.keys[0, :, :n], x.values[0, :, :n]]).to(device) for x in layers]
    table = torch.stack(both).permute(3, 0, 1, 2, 4).flatten(1)  # (n, layers * 2 * kv)
    return table.to(place_of(model)["dtype"])
