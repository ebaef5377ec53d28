"""What a model is asked by trying, instead of being guessed from its configuration: its positions,
the shape of its cache, the states of its blocks, the vectors that enter it."""

import inspect

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicLayer

from minipeft.freezing import blocks
from minipeft.technique.on_model import evaluating, has_numbers

CACHES = ("past_key_values", "cache", "cache_params")  # of the same thing in transformers
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def asked(model, **inputs):
    """The model's output. One on the meta device cannot run: then fake tensors tell the shapes."""
    if not next(model.parameters()).is_meta:
        return model(**inputs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        fakes = {name: torch.empty_like(t, device="cpu") for name, t in tensors.items()}
        inputs = {k: v.new_ones(v.shape, device="cpu") if torch.is_tensor(v) else v
                  for k, v in inputs.items()}  # fmt: skip
        return functional_call(model, fakes, (), inputs)


def close(found, expected, effect=0.0):
    """Are two outputs equal to rounding? In half precision an error is judged by `effect`, the size
    of what the virtual tokens change. A float64 model may compute parts in float32."""
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(found.dtype, 0.05)
    found, expected = found.double(), expected.double()
    allowed = tolerance * expected.norm() + (0.25 * effect if tolerance == 0.05 else 0)
    return bool((found - expected).norm() <= allowed)  # False for NaN


def output_of(model, **inputs):
    """What a model gives for each position: logits, or the last states of one without a
    language-model head, (batch, seq, ...)."""
    if model.get_output_embeddings() is not None:
        return model(**inputs).logits
    return model(**inputs, output_hidden_states=True).hidden_states[-1]


def takes(model, name):
    """Has the model's forward an argument of this name?"""
    return name in inspect.signature(model.forward).parameters


def embedded(model, ids):
    """The vectors that enter the model for token ids, (..., hidden): what the module gives, which
    is not always a row of its weight."""
    return model.get_input_embeddings()(ids)


class _Lookups(TorchFunctionMode):
    """Remembers which rows of which table are looked up."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.nn.functional.embedding, torch.embedding):
            ids, table = args[:2] if func is nn.functional.embedding else args[1::-1]
            self.seen.append((ids, len(table)))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def positions_of(model, ids):
    """(first, limit): the number that this model gives to the first position, and how many it has.

    first is None for a model that takes no position_ids; limit is None if no table ends.
    ids: (1, 3 or more). Raises ValueError if the model does not count by ones.
    """
    if not has_numbers(model):
        return (0 if takes(model, "position_ids") else None), None
    count = torch.arange(ids.shape[1], device=ids.device)
    with evaluating(model), _Lookups() as lookups:
        plain = output_of(model, input_ids=ids)
    tables = [
        (int(rows.flatten()[0]), size)
        for rows, size in lookups.seen
        if rows.numel() == len(count) and torch.equal(rows.flatten().diff(), count[1:] * 0 + 1)
        and not torch.equal(rows.flatten(), ids.flatten())
    ]  # fmt: skip
    limit = min((size - first for first, size in tables), default=None)
    if not takes(model, "position_ids"):
        return None, limit
    with evaluating(model):
        for first in (0, *(first for first, _ in tables)):
            try:
                given = output_of(model, input_ids=ids, position_ids=(first + count)[None])
            except (IndexError, RuntimeError):
                continue
            if close(given, plain):
                return first, limit
    raise ValueError("it counts its positions in a way of its own")


@torch.no_grad()
def keeps_cache(model, ids):
    """Does the model hand out a cache of any kind?"""
    with evaluating(model):
        return cache_in(asked(model, input_ids=ids, use_cache=True))[1] is not None


@torch.no_grad()
def cache_shape(model, ids):
    """(layers, kv_heads, head_dim) of the cache that one token leaves. ids: (1, 1).

    Raises ValueError if there is no cache of keys and values of one shape for every block.
    """
    with evaluating(model):
        output = asked(model, input_ids=ids, use_cache=True)
    layers = getattr(cache_in(output)[1], "layers", [])
    if not layers or not all(map(is_full, layers)):
        raise ValueError("not each of its layers keeps keys and values in a cache")
    shapes = {(layer.keys.shape, layer.values.shape) for layer in layers}
    (keys, values), *others = shapes
    if others or keys != values:
        raise ValueError("the keys and values of its layers have different shapes")
    if len(layers) != len(blocks(model)):
        raise ValueError(f"it has {len(blocks(model))} blocks and a cache of {len(layers)} layers")
    return len(layers), keys[1], keys[3]


@torch.no_grad()
def states_of(model, n, **inputs):
    """What enters each block at the first n positions: (layers, n, hidden)."""
    states, handles = [], []

    def remember(block, args, kwargs):
        states.append(hidden_of(args, kwargs)[0, :n])

    for block in blocks(model):
        handles.append(block.register_forward_pre_hook(remember, with_kwargs=True))
    try:
        with evaluating(model):
            asked(model, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(states)


def hidden_of(args, kwargs):
    """The hidden states among the arguments of a block: (batch, seq, hidden)."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(args, kwargs, hidden):
    """The arguments of a block with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def cache_in(values):
    """(name, cache) of the one cache among named inputs or outputs, or (None, None)."""
    return next(((k, values[k]) for k in CACHES if values.get(k) is not None), (None, None))


def is_full(layer):
    return isinstance(layer, DynamicLayer) and getattr(layer, "keys", None) is not None


def number_in(config, name):
    value = getattr(config.get_text_config(), name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
