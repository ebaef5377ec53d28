"""Bottleneck adapters: small networks between the frozen layers of a block.

    h = f(x)                                   f: a frozen output projection, h: (..., hidden)
    y = h + up(activation(down(h)))            down: (m, hidden), up: (hidden, m), with biases

Houlsby et al. 2019 (section 2.1, figure 2) put one after attention and one after the feed-forward
part of each block, before the residual sum. Pfeiffer et al. 2021 (AdapterFusion) keep the second of
them only. Houlsby et al. start both matrices near zero. Here `down` starts as theirs and `up` at
zero, so that the model is unchanged to the bit before the first step. With both at zero neither
would ever move, since the gradient of each is a product with the other: only a bias would learn.
"""

import math

import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import at_least_float32, blocks
from minipeft.refusals import refuse_size, require
from minipeft.technique.layers import InPlace, replace_layer
from minipeft.technique.on_model import adding, freeze_base
from minipeft.technique.unchanged import unchanged

ACTIVATIONS = {"gelu": gelu, "relu": relu, "silu": silu}
PLACEMENTS = {"houlsby": ("attention", "feed-forward"), "pfeiffer": ("feed-forward",)}
# What the last layer of a part is called, whose output goes into the residual sum: as in Llama,
# GPT-2, Bloom, OPT, GPT-J, BERT and DistilBERT, and in whatever family takes over one of the names.
LAST = {
    "attention": ("o_proj", "c_proj", "dense", "out_proj", "out_lin"),
    "feed-forward": ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "output.dense",
                     "lin2", "Wo"),
}  # fmt: skip


class Adapter(InPlace):
    """What `base` gives, and a trainable correction of it: 2 * hidden * m + hidden + m parameters.

    base: the frozen layer, from (..., in) to (..., hidden), or another Adapter to stand on.
    place: {"device": ..., "dtype": ...} of the trainables.
    """

    def __init__(self, base, hidden, bottleneck, activation, place):
        super().__init__()
        self.base = base
        self.down = nn.Linear(hidden, bottleneck, **place)
        self.up = nn.Linear(bottleneck, hidden, **place)
        self.activation = activation
        # Normal with deviation 1e-2, cut off at two deviations, as the paper starts. Drawn from the
        # quantiles, since torch's trunc_normal_ draws until it fits, which a meta model cannot.
        edge = math.erf(math.sqrt(2))
        with torch.no_grad():
            self.down.weight.uniform_(-edge, edge).erfinv_().mul_(0.01 * math.sqrt(2))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.train(base.training)  # a model in eval mode stays in it

    @property
    def out_features(self):
        return self.up.out_features

    def forward(self, x):
        h = self.base(x)  # (batch, seq, hidden)
        # On a half-precision base the adapter stays in float32 and only the sum is rounded.
        z = ACTIVATIONS[self.activation](self.down(h.to(self.down.weight.dtype)))  # (b, seq, m)
        return (h + self.up(z)).to(h.dtype)


def add_adapters(model, bottleneck=64, placement="houlsby", activation="gelu"):
    """Freeze `model` and put adapters into every block. Returns the model.

    bottleneck  m, the width between down and up: 2 * hidden * m + hidden + m trainables for each
                adapter.
    placement   "houlsby": after the output projection of attention and after that of the
                feed-forward part, two a block. "pfeiffer": only the latter, one a block.
    activation  "gelu", "relu" or "silu".
    Dropout that the model has there, as GPT-2 and Bloom do, comes after the adapter.
    On a model that has adapters already, the new ones stand on the old ones, which are frozen with
    the base (MAD-X, Pfeiffer et al. 2020, section 3).
    The trainables are float32, also on a half-precision base (float64 on a float64 one). The head
    of a classifier is new, so it is trained too.
    Raises ValueError for a number below 1, an unknown word, a model with another technique, and one
    in whose blocks the output projections are not found, or are not called.
    """
    check_settings(bottleneck, placement, activation)
    config = {"bottleneck": bottleneck, "placement": placement, "activation": activation}
    with adding(model, "adapters", again=True), unchanged(model) as needed:
        found = places(model, placement)
        freeze_base(model)
        for name, layer, place in found:
            needed[name] = Adapter(layer, width(layer), bottleneck, activation, place)
            replace_layer(model, name, needed[name])
        model.adapter_configs = [*getattr(model, "adapter_configs", []), config]
    return model


def width(layer):
    """How wide the output of a projection is; Conv1D has its own name for it."""
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features


def check_settings(bottleneck, placement, activation):
    """Raise ValueError for a setting of `add_adapters` that it does not know."""
    refuse_size("bottleneck", bottleneck, "width")
    for name, value, known in (
        ("placement", placement, PLACEMENTS),
        ("activation", activation, ACTIVATIONS),
    ):
        known = list(known)
        require(value in known, f"{name}={value!r} is none of {', '.join(map(repr, known))}.")


def places(model, placement):
    """[(dotted name, layer, {"device", "dtype"} for trainables)], in the order of the blocks.

    The layer is an output projection, or the Adapter that stands in its place.
    """
    names, found = {module: name for name, module in model.named_modules()}, []
    for block in blocks(model):
        weight = next(block.parameters())
        place = {"device": weight.device, "dtype": at_least_float32(weight.dtype)}
        layers = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, (nn.Linear, Conv1D, Adapter))
        }
        for part in PLACEMENTS[placement]:
            fitting = [
                module
                for name, module in layers.items()
                if f".{name}".endswith(tuple(f".{last}" for last in LAST[part]))
                and ("att" in name) == (part == "attention")
            ]
            require(
                len(fitting) == 1,
                f"A block of {type(model).__name__} should have one output projection of its "
                f"{part} part, named {' or '.join(LAST[part])}, and has {len(fitting)}; its "
                f"layers are {', '.join(layers)}.",
            )
            found.append((names[fitting[0]], fitting[0], place))
    return found
