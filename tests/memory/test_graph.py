"""Each operation of the graph against the tensors that autograd saves for the same operation."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention, silu
from transformers.activations import NewGELUActivation
from transformers.models.bloom.modeling_bloom import BloomGelu
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from minipeft.memory import layers
from minipeft.memory.graph import Graph, Value

DIMS = {"b": 2, "s": 6, "h": 8, "a": 4, "d": 2, "i": 12}


def real(function, *inputs, known=()):
    """Bytes that autograd saves, each storage once, without the storages of `known`."""
    saved, skip = {}, {t.data_ptr() for t in known}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in skip:
            saved[storage.data_ptr()] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        result = function(*inputs)
    assert result is not None
    return sum(storage.nbytes() for storage in saved.values())


def paper(play, grad=True, shape="b s h", **options):
    """Bytes that the graph saves, each storage once."""
    graph = Graph(DIMS, **options)
    play(graph, Value(shape, 4, grad))
    return sum({v.storage: graph.bytes(v) for node in graph.nodes for v in node.saved}.values())


def hidden(grad=True):
    return torch.randn(2, 6, 8, requires_grad=grad)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_a_linear_layer_keeps_its_input_if_it_is_trained(kind, trained, grad, autocast):
    layer = nn.Linear(8, 12, bias=False) if kind is nn.Linear else Conv1D(12, 8)
    layer.requires_grad_(trained)
    x = hidden(grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        measured = real(layer, x, known=[layer.weight])
    predicted = paper(lambda g, x: layers.apply(g, layer, x, "i", "layer"), grad, autocast=autocast)
    assert predicted == measured
    assert (predicted > 0) == (trained or (grad and autocast))


OPERATIONS = {
    "silu": (lambda g, x: g.activation(x, "silu"), silu),
    "gelu": (lambda g, x: g.activation(x, "gelu"), nn.functional.gelu),
    "gelu_new": (lambda g, x: g.activation(x, "gelu_new"), NewGELUActivation()),
    "bloom": (lambda g, x: g.activation(x, "bloom"), BloomGelu()),
    "product": (lambda g, x: g.mul(x, g.scale(x)), lambda x: x * (2 * x)),
    "sum": (lambda g, x: g.add(x, g.scale(x)), lambda x: x + 2 * x),
    "dropout": (lambda g, x: g.dropout(x, 0.5), lambda x: nn.functional.dropout(x, 0.5)),
    "no dropout": (lambda g, x: g.dropout(x, 0.0), lambda x: nn.functional.dropout(x, 0.0)),
    "cast": (lambda g, x: g.cast(x, 2), lambda x: x.bfloat16()),
    "constant": (lambda g, x: g.mul(x, Value("s h", 4, False)), lambda x: x * torch.ones(6, 8)),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("grad", [True, False])
def test_elementwise_operations(name, grad):
    play, function = OPERATIONS[name]
    assert paper(play, grad) == real(function, hidden(grad))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_norms(trained, grad):
    for norm, play in ((nn.LayerNorm(8), Graph.layer_norm), (LlamaRMSNorm(8), Graph.rms_norm)):
        norm.requires_grad_(trained)
        measured = real(norm, hidden(grad), known=norm.parameters())
        assert paper(lambda g, x: play(g, x, norm, "norm"), grad) == measured  # noqa: B023


def test_attention_eager_and_fused():
    q, k, v = (torch.randn(2, 4, 6, 2, requires_grad=True) for _ in range(3))
    mask = torch.zeros(2, 1, 6, 6)

    def eager(q, k, v):
        weights = (q @ k.transpose(2, 3) * 0.5 + mask).softmax(-1)
        return (weights @ v).transpose(1, 2).contiguous()

    def fused(q, k, v):
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)

    def play(graph, _):
        return graph.attention(*(Value("b a s d", 4, True) for _ in range(3)))

    assert paper(play, fused=False) == real(eager, q, k, v) == 4 * (3 * 96 + 2 * 4 * 36)
    assert paper(play, fused=True) == real(fused, q, k, v)


def test_a_dropout_mask_has_one_byte_an_element_on_cuda():
    on = lambda device: paper(lambda g, x: g.dropout(x, 0.1), device=device)  # noqa: E731
    assert on("cuda") * 4 == on("cpu") == 4 * 2 * 6 * 8
