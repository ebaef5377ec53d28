"""Facts about a model that are found by running it, not read off its configuration: how it numbers
positions, the shape of its KV cache, the inputs of its blocks, its input embeddings."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.utils import ModelOutput

from minipeft.freezing import blocks
from minipeft.technique.on_model import evaluating, has_numbers

CACHES = ("past_key_values", "cache", "cache_params")  # names of the cache in transformers
LENGTHS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len")


def asked(model: PreTrainedModel, **inputs: object) -> ModelOutput:
    """The model's output; on the meta device, fake tensors that only tell the shapes."""
    if not next(model.parameters()).is_meta:
        return model(**inputs)
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = dict(model.named_parameters()) | dict(model.named_buffers())
        fakes = {name: torch.empty_like(t, device="cpu") for name, t in tensors.items()}
        inputs = {
            k: v.new_ones(v.shape, device="cpu") if isinstance(v, torch.Tensor) else v
            for k, v in inputs.items()
        }
        return functional_call(model, fakes, (), inputs)


def close(found: torch.Tensor, expected: torch.Tensor, effect: float = 0.0) -> bool:
    """Are two outputs equal up to rounding?

    effect: norm of the change that virtual tokens make; in half precision the tolerance grows with
    it. The tolerance for float64 is wide, because some models compute parts in float32.
    """
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-4}.get(found.dtype, 0.05)
    found, expected = found.double(), expected.double()
    allowed = tolerance * expected.norm() + (0.25 * effect if tolerance == 0.05 else 0)
    return bool((found - expected).norm() <= allowed)  # False for NaN


def output_of(model: PreTrainedModel, **inputs: object) -> torch.Tensor:
    """Logits, or the last hidden states of a model without a language-model head:
    (batch, seq, ...)."""
    if model.get_output_embeddings() is not None:
        return model(**inputs).logits
    return model(**inputs, output_hidden_states=True).hidden_states[-1]


def takes(model: nn.Module, name: str) -> bool:
    """Does the model's forward have an argument of this name?"""
    return name in inspect.signature(model.forward).parameters


def embedded(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Input embeddings of token ids, (..., hidden). The embedding module is called, because its
    output is not always a row of its weight."""
    return model.get_input_embeddings()(ids)


class _Lookups(TorchFunctionMode):
    """Records the (ids, number of rows) of every embedding lookup."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.nn.functional.embedding, torch.embedding):
            ids, table = args[:2] if func is nn.functional.embedding else args[1::-1]
            self.seen.append((ids, len(table)))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def positions_of(model: PreTrainedModel, ids: torch.Tensor) -> tuple[int | None, int | None]:
    """(first, limit): the position id of the first token, and how many positions there are.

    first is None for a model that takes no position_ids; limit is None without learned positions.
    ids: (1, seq), seq >= 3. Raises ValueError if consecutive tokens do not have consecutive
    position ids.
    """
    if not has_numbers(model):
        return (0 if takes(model, "position_ids") else None), None
    count = torch.arange(ids.shape[1], device=ids.device)  # (seq,)
    with evaluating(model), _Lookups() as lookups:
        plain = output_of(model, input_ids=ids)
    tables = [  # lookups of consecutive rows that are not the token ids
        (int(rows.flatten()[0]), size)
        for rows, size in lookups.seen
        if rows.numel() == len(count)
        and torch.equal(rows.flatten().diff(), torch.ones_like(count[1:]))
        and not torch.equal(rows.flatten(), ids.flatten())
    ]
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
def keeps_cache(model: PreTrainedModel, ids: torch.Tensor) -> bool:
    """Does the model return a cache of any kind? ids: (1, seq)."""
    with evaluating(model):
        return cache_in(asked(model, input_ids=ids, use_cache=True))[1] is not None


@torch.no_grad()
def cache_shape(model: PreTrainedModel, ids: torch.Tensor) -> tuple[int, int, int]:
    """(layers, kv_heads, head_dim) of the KV cache after one token. ids: (1, 1).

    Raises ValueError unless every block caches keys and values, all of one shape.
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
def states_of(model: PreTrainedModel, n: int, **inputs: object) -> torch.Tensor:
    """The inputs of all blocks at the first n positions: (layers, n, hidden)."""
    states = []

    def remember(block, args, kwargs):
        states.append(hidden_of(args, kwargs)[0, :n])  # (n, hidden)

    handles = [
        block.register_forward_pre_hook(remember, with_kwargs=True) for block in blocks(model)
    ]
    try:
        with evaluating(model):
            asked(model, **inputs)
    finally:
        for handle in handles:
            handle.remove()
    return torch.stack(states)


def hidden_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states among the arguments of a block: (batch, seq, hidden)."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: torch.Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a block with other hidden states."""
    return ((hidden, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": hidden})


def cache_in(values: Mapping[str, Any]) -> tuple[str | None, Any]:
    """(name, cache) of the cache among named inputs or outputs, or (None, None)."""
    return next(((k, values[k]) for k in CACHES if values.get(k) is not None), (None, None))


def is_full(layer: object) -> bool:
    """Does this cache layer hold keys and values, not for example a recurrent state?"""
    return isinstance(layer, DynamicLayer) and getattr(layer, "keys", None) is not None


def number_in(config: PreTrainedConfig, name: str) -> int | None:
    """An integer setting of the text model's configuration, or None."""
    value = getattr(config.get_text_config(), name, None)
    return value if isinstance(value, int) and not isinstance(value, bool) else None
