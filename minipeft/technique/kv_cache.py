"""Keys and values of virtual tokens in the KV cache of a model."""

import inspect
from functools import partial

import torch
from transformers import DynamicCache, PreTrainedModel

from minipeft.freezing import blocks
from minipeft.technique.asked import cache_in, cache_shape
from minipeft.technique.on_model import evaluating
from minipeft.technique.words import place_of, refusing, trial_words

CACHE_NAMES = {"past_key_values", "layer_past", "cache"}  # of an attention's cache argument


def filled_cache(
    model: PreTrainedModel, cache: DynamicCache | None, keys_values: torch.Tensor, batch: int
) -> DynamicCache:
    """`cache`, or a new one, with the virtual keys and values added to each of `batch` rows.

    keys_values: (layers, 2, kv_heads, n, head_dim).
    """
    cache = DynamicCache() if cache is None else cache
    stack = blocks(model)
    for i, layer in enumerate(keys_values.to(model.dtype)):
        device = next(stack[i].parameters()).device  # a model may be split over several
        keys, values = (t.to(device).expand(batch, -1, -1, -1) for t in layer)
        DynamicCache.update(cache, keys, values, i)  # (batch, kv_heads, n, head_dim) each
    if model.training and torch.is_grad_enabled() and _uses_checkpointing(model):
        cache.__class__ = CheckpointedCache
    return cache


class CheckpointedCache(DynamicCache):
    """Marks a cache that holds only virtual tokens, under gradient checkpointing.

    Checkpointing runs a block twice, so a cache would get the keys and values of the text twice.
    Therefore transformers passes no cache to checkpointed blocks, and the prefix would be lost.
    The hooks of `survive_checkpointing` give each attention, at each run, a new cache that holds
    only the prefix.
    """


def _uses_checkpointing(model):
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def survive_checkpointing(model: PreTrainedModel) -> None:
    """Keep virtual keys and values under gradient checkpointing (see `CheckpointedCache`)."""
    for i, block in enumerate(blocks(model)):
        vars(block)["_can_checkpoint_with_cache"] = True  # or transformers warns
        for module in block.modules():
            names = CACHE_NAMES & set(inspect.signature(module.forward).parameters)
            if names and module is not block:
                hook = partial(_restore_prefix, model, i, names.pop())
                module.register_forward_pre_hook(hook, with_kwargs=True)


def _restore_prefix(model, layer, name, attention, args, kwargs):
    """Before the attention of a block that was given no cache: a cache with its prefix."""
    names = list(inspect.signature(attention.forward).parameters)
    kwargs = dict(zip(names, args, strict=False)) | kwargs
    given = kwargs.get(name)
    if given is not None and not isinstance(given, CheckpointedCache):
        return None
    # Computed from the parameters here, so that they are in the recomputed graph of the block.
    hidden = next(t for t in kwargs.values() if isinstance(t, torch.Tensor))
    keys_values = model.virtual_tokens(layer).to(hidden.device, model.dtype)
    batch = hidden.shape[0]
    cache = DynamicCache()
    DynamicCache.update(cache, *(t.expand(batch, -1, -1, -1) for t in keys_values), layer)
    return (), kwargs | {name: cache}


def key_value_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) of the KV cache, found by running one token.

    Grouped-query attention has fewer kv_heads than heads. Raises ValueError for a model without a
    cache of keys and values, or with layers of different shapes.
    """
    with refusing(model):
        return cache_shape(model, trial_words(model)[None, :1])


def per_layer(table: torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """View a table (n, layers * 2 * kv_heads * head_dim) as (layers, 2, kv_heads, n, head_dim).

    The order within a row is HF peft's: keys and values of layer 0, then those of layer 1, ...
    """
    layers, kv_heads, head_dim = shape
    return table.view(-1, layers, 2, kv_heads, head_dim).permute(1, 2, 3, 0, 4)


@torch.no_grad()
def table_of_cache(model: PreTrainedModel, input_ids: torch.Tensor, n: int) -> torch.Tensor:
    """Keys and values of the first n tokens of input_ids (1, seq), as a table for `per_layer`:
    (n, layers * 2 * kv_heads * head_dim)."""
    if input_ids.is_meta:  # there are no values to read
        layers, kv_heads, head_dim = key_value_shape(model)
        return torch.empty(n, layers * 2 * kv_heads * head_dim, **place_of(model))
    mask = torch.ones_like(input_ids)
    with evaluating(model):
        output = model(input_ids=input_ids, attention_mask=mask, use_cache=True)
    device = place_of(model)["device"]
    keys_values = [  # (2, kv_heads, n, head_dim) each
        torch.stack([layer.keys[0, :, :n], layer.values[0, :, :n]]).to(device)
        for layer in cache_in(output)[1].layers
    ]
    table = torch.stack(keys_values).permute(3, 0, 1, 2, 4).flatten(1)  # (n, layers * 2 * ...)
    return table.to(place_of(model)["dtype"])
