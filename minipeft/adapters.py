"""Bottleneck adapters: small trainable networks inside the frozen blocks.

    h = f(x)                                   f: a frozen output projection, h: (..., hidden)
    y = h + up(activation(down(h)))            down: (m, hidden), up: (hidden, m), with biases

Houlsby et al. 2019 (section 2.1, figure 2) put one after the attention and one after the
feed-forward part of each block, before the residual sum. Pfeiffer et al. 2021 (AdapterFusion) keep
only the second one. Houlsby et al. also train the norms, which stay frozen here, and initialize
both matrices near zero. Here `down` is initialized as theirs and `up` to zero, so the model is
unchanged, bit for bit, before the first step. If both were zero, both gradients would be zero too,
because each is a product with the other matrix.
"""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import gelu, relu, silu
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import at_least_float32, blocks
from minipeft.refusals import refuse_size, require
from minipeft.technique.layers import InPlace, replace_layer
from minipeft.technique.on_model import adding, freeze_base
from minipeft.technique.unchanged import unchanged
from minipeft.technique.words import Place

ACTIVATIONS: dict[str, Callable] = {"gelu": gelu, "relu": relu, "silu": silu}
PLACEMENTS = {"houlsby": ("attention", "feed-forward"), "pfeiffer": ("feed-forward",)}
# Names of the last layer of each part, whose output is added to the residual stream: in Llama,
# GPT-2, Bloom, OPT, GPT-J, BERT, DistilBERT and all families that use one of these names.
LAST = {
    "attention": ("o_proj", "c_proj", "dense", "out_proj", "out_lin"),
    "feed-forward": ("down_proj", "c_proj", "dense_4h_to_h", "fc2", "fc_out", "output.dense",
                     "lin2", "Wo"),
}  # fmt: skip


class Adapter(InPlace):
    """A layer with an adapter after it: 2 * hidden * m + hidden + m trainable parameters.

    base: the frozen layer, from (..., in) to (..., hidden), or another Adapter.
    """

    def __init__(
        self, base: nn.Module, hidden: int, bottleneck: int, activation: str, factory_kwargs: Place
    ) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(hidden, bottleneck, **factory_kwargs)
        self.up = nn.Linear(bottleneck, hidden, **factory_kwargs)
        self.activation = activation
        # As in the paper (section 3.6): normal, std 1e-2, truncated at two standard deviations. The
        # quantile function is used because trunc_normal_ resamples, which fails on the meta device.
        edge = math.erf(math.sqrt(2))
        with torch.no_grad():
            self.down.weight.uniform_(-edge, edge).erfinv_().mul_(0.01 * math.sqrt(2))
        for zero in (self.down.bias, self.up.weight, self.up.bias):
            nn.init.zeros_(zero)
        self.train(base.training)

    @property
    def out_features(self) -> int:
        return self.up.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base(x)  # (batch, seq, hidden)
        # On a half-precision base, outside autocast, only the sum is rounded.
        z = ACTIVATIONS[self.activation](self.down(h.to(self.down.weight.dtype)))  # (b, seq, m)
        return (h + self.up(z)).to(h.dtype)


Layer = nn.Linear | Conv1D | Adapter


def add_adapters(
    model: PreTrainedModel,
    bottleneck: int = 64,
    placement: str = "houlsby",
    activation: str = "gelu",
) -> PreTrainedModel:
    """Freeze `model` and put adapters into every block. Returns the model.

    bottleneck  m, the width between down and up: 2 * hidden * m + hidden + m trainable parameters
                per adapter.
    placement   "houlsby": after the output projections of attention and of the feed-forward part,
                two per block. "pfeiffer": only the latter, one per block.
    activation  "gelu", "relu" or "silu".
    The model's dropout at this point, as in GPT-2 and Bloom, comes after the adapter.
    If the model already has adapters, new ones are stacked on them, and the old ones are frozen
    with the base (MAD-X, Pfeiffer et al. 2020, section 3).
    Trainable parameters are float32 even on a half-precision base (float64 on a float64 base). The
    head of a classifier is newly initialized, so it is trained too.
    Raises ValueError for a number below 1, an unknown placement or activation, a model with another
    technique, and one in whose blocks the output projections are not found or not called.
    """
    check_settings(bottleneck, placement, activation)
    config = {"bottleneck": bottleneck, "placement": placement, "activation": activation}
    with adding(model, "adapters", again=True), unchanged(model) as needed:
        found = places(model, placement)
        freeze_base(model)
        for name, layer, place in found:
            needed[name] = Adapter(layer, width(layer), bottleneck, activation, place)
            replace_layer(model, name, needed[name])
        vars(model)["adapter_configs"] = [*getattr(model, "adapter_configs", []), config]
    return model


def width(layer: Layer) -> int:
    """The output width of a projection."""
    return layer.nf if isinstance(layer, Conv1D) else layer.out_features


def check_settings(bottleneck: int, placement: str, activation: str) -> None:
    """Raise ValueError for an invalid setting of `add_adapters`."""
    refuse_size("bottleneck", bottleneck, "width")
    for name, value, known in (
        ("placement", placement, list(PLACEMENTS)),
        ("activation", activation, list(ACTIVATIONS)),
    ):
        require(value in known, f"{name}={value!r} is none of {', '.join(map(repr, known))}.")


def places(model: nn.Module, placement: str) -> list[tuple[str, Layer, Place]]:
    """[(dotted name, layer, device and dtype of its adapter)], in the order of the blocks.

    The layer is an output projection, or the Adapter that has replaced it.
    """
    names: dict[nn.Module, str] = {module: name for name, module in model.named_modules()}
    found = []
    for block in blocks(model):
        weight = next(block.parameters())
        place: Place = {"device": weight.device, "dtype": at_least_float32(weight.dtype)}
        layers = {
            name: module
            for name, module in block.named_modules()
            if isinstance(module, (nn.Linear, Conv1D, Adapter))
        }
        for part in PLACEMENTS[placement]:
            matches = [
                module
                for name, module in layers.items()
                if f".{name}".endswith(tuple(f".{last}" for last in LAST[part]))
                and ("att" in name) == (part == "attention")
            ]
            require(
                len(matches) == 1,
                f"A block of {type(model).__name__} should have one output projection of its "
                f"{part} part, named {' or '.join(LAST[part])}, and has {len(matches)}; its "
                f"layers are {', '.join(layers)}.",
            )
            found.append((names[matches[0]], matches[0], place))
    return found
