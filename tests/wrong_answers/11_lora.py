"""Wrong answers to exercise 11: (check, source of the answer, part of the message expected)."""

_LAYER = """
import math
import torch
from torch import nn
from torch.nn.functional import dropout as drop, linear

class LoRALayer(nn.Module):
    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        out_features, in_features = base.weight.shape
        self.lora_A = nn.Parameter(torch.randn(r, in_features) / math.sqrt(in_features))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r))
        self.scaling = alpha / r
        self.dropout = dropout

    def forward(self, x):
        h = self.base(x)
        z = drop(x, self.dropout, self.training).to(self.lora_A.dtype)
        z = linear(linear(z, self.lora_A), self.lora_B) * self.scaling
        return (h + z).to(h.dtype)
"""


def _layer(old, new):
    assert old in _LAYER, old
    return _LAYER.replace(old, new)


_ADD = """
def add_lora(model, r, alpha, targets):
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    found = [(n, m) for n, m in model.named_modules()
             if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]
    if not found:
        raise ValueError("none")
    for name, module in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALayer(module, r, alpha))
    return model
"""


def _add(old, new):
    assert old in _ADD, old
    return _ADD.replace(old, new)


_MERGE = """
def merge(layer):
    out_features, in_features = layer.base.weight.shape
    merged = nn.Linear(in_features, out_features)
    with torch.no_grad():
        merged.weight.copy_(layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A)
        merged.bias.copy_(layer.base.bias)
    return merged
"""


def _merge(old, new):
    assert old in _MERGE, old
    return _MERGE.replace(old, new)


ZEROS = "torch.zeros(out_features, r)"
RANDOM = "torch.randn(r, in_features) / math.sqrt(in_features)"

WRONG = [
    ("lora_layer", _layer("alpha / r", "1.0"), "alpha is not used"),
    ("lora_layer", _layer("alpha / r", "r / alpha"), "it is r/alpha"),
    ("lora_layer", _layer("alpha / r", "alpha"), "it is alpha alone"),
    ("lora_layer", _layer("alpha / r", "alpha / r**0.5"), "that is something else"),
    ("lora_layer", _layer(ZEROS, "torch.randn(out_features, r)"), "Which of the two matrices"),
    ("lora_layer", _layer(RANDOM, "torch.zeros(r, in_features)"), "both start at zero"),
    ("lora_layer", _layer("base.requires_grad_(False)", "base"), "is not frozen"),
    ("lora_layer", _layer(f"nn.Parameter({ZEROS})", ZEROS), "lora_B is a Tensor"),
    (
        "lora_layer",
        _layer(RANDOM, "torch.randn(in_features, r)").replace(
            "z, self.lora_A)", "z, self.lora_A.T)"
        ),
        "lora_A has the shape (6, 4)",
    ),
    ("lora_layer", _layer("self.lora_A)", "self.lora_A.detach())"), "No gradient arrives"),
    ("lora_layer", _layer(", self.training)", ", True)"), "dropout is for training only"),
    ("lora_layer", _layer("drop(x, self.dropout, self.training)", "x"), "nothing is dropped"),
    (
        "lora_layer",
        _layer("h = self.base(x)", "x = drop(x, self.dropout, self.training); h = self.base(x)"),
        "also hits the frozen path",
    ),
    (
        "lora_layer",
        _layer(f"nn.Parameter({ZEROS})", f"nn.Parameter({ZEROS}.to(base.weight.dtype))").replace(
            "self.lora_B)", "self.lora_B.float())"
        ),
        "small updates would round away",
    ),
    ("lora_layer", _layer("(h + z).to(h.dtype)", "h + z"), "no longer bfloat16"),
    ("merge", _merge("layer.scaling * ", ""), "forgets the scaling"),
    ("merge", _merge(" + layer.scaling * layer.lora_B @ layer.lora_A", ""), "is the base layer"),
    (
        "merge",
        _merge("layer.lora_B @ layer.lora_A", "layer.lora_A @ layer.lora_B"),
        "raises an error",
    ),
    ("merge", _merge("layer.scaling *", "layer.scaling**2 *"), "does not give the output"),
    ("merge", _merge("        merged.bias.copy_(layer.base.bias)\n", ""), "bias of the base layer"),
    (
        "merge",
        """
def merge(layer):
    with torch.no_grad():
        layer.base.weight += layer.scaling * layer.lora_B @ layer.lora_A
    return layer.base
""",
        "in it twice",
    ),
    ("merge", _merge("return merged", "return layer"), "Return a plain nn.Linear"),
    (
        "add_lora",
        _add('n.rpartition(".")[2] in targets', "any(t in n for t in targets)"),
        "not a piece of it",
    ),
    ("add_lora", _add("parameter.requires_grad_(False)", "pass"), "still requires grad"),
    ("add_lora", _add("    return model\n", ""), "Return the model"),
    ("add_lora", _add('raise ValueError("none")', "return model"), "passed over in silence"),
    (
        "add_lora",
        _add("for name, module in found:", "for name, module in found[:1]:"),
        "both q_proj",
    ),
    ("count", "def count(shapes, r):\n    return sum(a * b for a, b in shapes)", "themselves"),
    (
        "count",
        "def count(shapes, r):\n    return sum(2 * r * a for a, b in shapes)",
        "not all square",
    ),
    ("count", "def count(shapes, r):\n    return sum(r * a for a, b in shapes)", "Only one of"),
    ("count", "def count(shapes, r):\n    return r * sum(shapes[0])", "of 60 layers"),
    (
        "lora_layer",
        _layer("h = self.base(x)", "with torch.no_grad():\n            h = self.base(x)"),
        "goes on to x lacks a part",
    ),
    ("lora_layer", _layer("alpha / r", "alpha // r"), "cut to an integer"),
    (
        "lora_layer",
        _layer(
            "z = drop(x, self.dropout, self.training).to(self.lora_A.dtype)",
            "z = x.to(self.lora_A.dtype)",
        ).replace(
            "linear(linear(z, self.lora_A), self.lora_B)",
            "linear(drop(linear(z, self.lora_A), self.dropout, self.training), self.lora_B)",
        ),
        "what comes out of A",
    ),
    (
        "lora_layer",
        _layer(
            "torch.randn(r, in_features) / math.sqrt(in_features)", "torch.ones(r, in_features)"
        ),
        "the change has rank 1",
    ),
    (
        "lora_layer",
        _layer(
            "self.lora_A = nn.Parameter(torch.randn(r, in_features) / math.sqrt(in_features))",
            "self.lora_A = nn.Linear(in_features, r, bias=False)",
        ),
        "lora_A is a Linear",
    ),
    ("lora_layer", _layer(".to(self.lora_A.dtype)", ""), "Cast x for A"),
    (
        "add_lora",
        _add('n.rpartition(".")[2] in targets', "n.endswith(tuple(targets))"),
        "my_q_proj got",
    ),
]
