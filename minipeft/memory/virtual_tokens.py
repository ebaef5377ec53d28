"""The effect of virtual tokens in the operations of a `Graph` (see minipeft/virtual_tokens.py).

In front of the text, or in each block, they lengthen the sequence from w to s = n + w. In the cache
they leave its length as it is, and attention sees t = n + s positions.
"""

from functools import singledispatch
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from minipeft.memory.graph import Graph
from minipeft.memory.nodes import OUTPUT, Value
from minipeft.p_tuning import PromptEncoder
from minipeft.p_tuning_v2 import HiddenStates, KeyValues
from minipeft.prefix_tuning import Prefix
from minipeft.prompt_tuning import SoftPrompt


def lengths(model: PreTrainedModel, seq: int) -> dict[str, int]:
    """{symbol: number} of the lengths in a graph, for a text of `seq` tokens.

    Raises ValueError for a template, whose placeholders are in the text.
    """
    virtual = getattr(model, "virtual_tokens", None)
    if virtual is None:
        return {"s": seq}
    n = virtual.num_virtual_tokens
    if virtual.place in ("front", "hidden"):
        return {"n": n, "w": seq, "s": n + seq, "l": seq + 1}
    if virtual.place == "cache":
        return {"n": n, "s": seq, "t": n + seq}
    raise ValueError(
        f"memory.estimate has no formulas for virtual tokens in the place {virtual.place!r}, only "
        "for those in front of the text, in each block, and in the cache."
    )


# ---- the vectors --------------------------------------------------------------------------------


@singledispatch
def vectors(virtual: nn.Module, graph: Graph, layer: int | None = None) -> Value:
    """Record how the vectors are computed: (n h), or keys and values as rows of a table,
    (n L 2 k d) for all L layers, (n 2 k d) for one."""
    raise ValueError(
        f"memory.estimate has no formula for the {type(virtual).__name__} of virtual tokens; "
        "memory.measure needs none."
    )


@vectors.register(SoftPrompt)
@vectors.register(HiddenStates)
def _(virtual, graph, layer=None):
    return graph.parameter(virtual.weight, "n h")


@vectors.register
def _(virtual: KeyValues, graph, layer=None):
    return graph.parameter(virtual.weight, _row_shape(virtual, layer))


@vectors.register
def _(virtual: Prefix, graph, layer=None):
    shape = _row_shape(virtual, layer)
    if not virtual.mlp:
        return graph.parameter(virtual.embedding.weight, shape)
    first, _, last = virtual.mlp
    x = graph.parameter(virtual.embedding.weight, f"n {first.in_features}")
    x = graph.linear(x, first.weight, str(first.out_features), first.bias, "prefix embedding")
    x = graph.node("tanh output", [x], x.shape, x.width, [OUTPUT])
    # A slice of the weight, of all rows or of one layer's; its gradient is another tensor
    rows = shape.removeprefix("n ")
    weight = graph.parameter(last.weight, f"{rows} {last.in_features}")
    x = graph.matmul(x, weight, shape, "prefix MLP")
    graph.nodes[-1].weights.append(last.bias)
    return x


@vectors.register
def _(virtual: PromptEncoder, graph, layer=None):
    x = graph.parameter(virtual.embedding.weight, "n h")
    if not virtual.encoder:
        return x
    autocast, graph.autocast = graph.autocast, False
    if virtual.encoder == "lstm":
        x = lstm(graph, x, virtual.lstm)
    *hidden, last = virtual.mlp
    for linear in hidden[::2]:
        x = graph.linear(x, linear.weight, str(linear.out_features), linear.bias, "encoder MLP")
        x = graph.node("relu output", [x], x.shape, x.width, [OUTPUT])
    x = graph.linear(x, last.weight, "h", last.bias, "encoder MLP")
    graph.autocast = autocast
    return x


def lstm(graph: Graph, x: Value, module: nn.LSTM) -> Value:
    """A bidirectional LSTM over a sequence x: (n, 2 width). Each layer saves its input and, per
    direction, the outputs and the first and last states. (On a real CPU, oneDNN adds a workspace
    that fake tensors do not show.)"""
    width = module.hidden_size
    for layer in range(module.num_layers):
        weights = [p for name, p in module.named_parameters() if f"_l{layer}" in name]
        saved = [x, Value(f"2 n {width}", 4, False), Value(f"2 4 {width}", 4, False)]
        x = graph.node("LSTM", [x], f"n {2 * width}", x.width, saved, weights)
    return x


def _row_shape(virtual, layer):
    """The shape of the table of keys and values, of all layers or of one."""
    return "n 2 k d" if layer is not None else f"n {virtual.shape[0]} 2 k d"


# ---- their places -------------------------------------------------------------------------------


def in_front(graph: Graph, model: PreTrainedModel, text: Value) -> Value:
    """Concatenate the vectors and the embedded text (b w h): (b s h)."""
    virtual: Any = model.virtual_tokens
    if virtual.place == "hidden":  # zeros, which the first block replaces
        return graph.cat([graph.node("zeros", [], "b n h", text.width), text], "b s h")
    x = graph.cast(vectors(virtual, graph), text.width)
    return graph.cat([graph.view(x, "b n h", fresh=True), text], "b s h")


def begin_block(graph: Graph, model: PreTrainedModel, layer: int, x: Value) -> Value:
    """Begin a block with the input x (b s h); P-tuning v2 replaces its first n positions.
    Returns the input of the block."""
    virtual = getattr(model, "virtual_tokens", None)
    if virtual is not None and virtual.place == "hidden":
        states = graph.cast(vectors(virtual, graph, layer), x.width)
        rest = graph.view(x, "b w h", fresh=True)
        x = graph.cat([graph.view(states, "b n h", fresh=True), rest], "b s h")
    graph.begin_block(x)
    return x


def fill_cache(graph: Graph, model: PreTrainedModel) -> None:
    """Copy the keys and values of all layers into a cache, for each row of the batch."""
    virtual = getattr(model, "virtual_tokens", None)
    if virtual is None or virtual.place != "cache":
        return
    table = graph.cast(vectors(virtual, graph), model.dtype.itemsize)
    rows = [graph.view(table, "k n d") for _ in range(2 * virtual.shape[0])]
    graph.nodes[-1].fresh = True  # the gradients of all rows are stacked into a new tensor
    graph.cache = [graph.copy(row, "b k n d") for row in rows]
    if graph.checkpointing:  # the blocks are passed this cache, though attention reads another
        graph.shared += graph.cache


def with_prefix(
    graph: Graph, model: PreTrainedModel, layer: int, k: Value, v: Value
) -> list[Value]:
    """The keys and values (b k s d) of a layer behind those of its prefix: (b k t d)."""
    virtual = getattr(model, "virtual_tokens", None)
    if virtual is None or virtual.place != "cache":
        return [k, v]
    if graph.checkpointing:  # each attention recomputes its prefix, so that a block can run twice
        row = graph.cast(vectors(virtual, graph, layer), model.dtype.itemsize)
        prefix = [graph.copy(graph.view(row, "k n d"), "b k n d") for _ in range(2)]
        return [graph.cat(pair, "b k t d") for pair in zip(prefix, (k, v), strict=True)]
    mine = slice(2 * layer, 2 * layer + 2)
    pairs = zip(graph.cache[mine], (k, v), strict=True)
    graph.cache[mine] = [graph.cat(pair, "b k t d") for pair in pairs]
    return graph.cache[mine]
