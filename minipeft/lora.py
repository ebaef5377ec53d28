"""LoRA: train a low-rank update of a frozen weight matrix (Hu et al. 2021, section 4.1).

    h = W0 x + (alpha / r) B A x        W0: (out, in), A: (r, in), B: (out, r)        equation 3

W0 is frozen. A is initialized randomly and B to zero, so the model is unchanged before the first
step. After training, the update can be merged into W0; then inference costs nothing extra.
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout, linear

from minipeft.freezing import at_least_float32
from minipeft.lora_variants import DoRA, OneHot, rslora_scaling
from minipeft.refusals import Model
from minipeft.technique.layers import (
    InPlace,
    add_product,
    check_settings,
    list_of_names,
    matrix,
    put_lora,
    shift_weights,
    take_lora_off,
    target_layers,
)
from minipeft.technique.on_model import adding
from minipeft.technique.unchanged import unchanged


class LoRALinear(InPlace):
    """A frozen nn.Linear, or GPT-2's Conv1D, with a trainable low-rank update."""

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.base = base
        weight = matrix(base)
        out_features, in_features = weight.shape
        device, dtype = weight.device, at_least_float32(weight.dtype)
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=dtype))
        self.register_parameter("lora_magnitude", None)  # only DoRA has it
        self.reset_parameters()
        self.scaling = alpha / r
        self.dropout = dropout
        self.merged = False
        self.train(base.training)

    def reset_parameters(self) -> None:
        # The paper draws A from a Gaussian but gives no standard deviation. The authors' code and
        # HF peft initialize A like nn.Linear: uniform in +-1/sqrt(in).
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base(x)  # W0 x: (batch, seq, out)
        if self.merged:
            return h
        x = dropout(x, self.dropout, self.training) if self.dropout else x  # (batch, seq, in)
        return add_product(h, self.down(x), self.lora_B)  # (batch, seq, out)

    def down(self, x: torch.Tensor) -> torch.Tensor:
        """scaling * A x, in float32 or wider even on a half-precision base, outside autocast."""
        return linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling  # (batch, seq, r)

    def change(self) -> torch.Tensor:
        return self.lora_B @ self.lora_A * self.scaling  # (out, in)

    def new_matrix(self) -> torch.Tensor:
        return matrix(self.base) + self.change()  # (out, in)

    @torch.no_grad()
    def shift_weight(self, sign: int) -> None:
        """Add the update to W0 (sign=1) or subtract it (sign=-1), rounding once."""
        weight = matrix(self.base)
        weight.copy_(weight + sign * self.change())

    @property
    def weight(self) -> torch.Tensor:
        """The new weight in the base layer's layout, computed at each access, with gradients."""
        if self.merged:
            return self.base.weight
        new = self.new_matrix()
        return (new if isinstance(self.base, nn.Linear) else new.T).to(self.base.weight.dtype)


class DoRALinear(DoRA, LoRALinear):
    """A linear layer with a low-rank update and a trainable magnitude for each row."""


class LoRAEmbedding(OneHot, LoRALinear):
    """An nn.Embedding with a low-rank update."""


class DoRAEmbedding(DoRA, OneHot, LoRALinear):
    """An nn.Embedding with a low-rank update and a trainable magnitude for each column."""


def lora_layer(base: nn.Module, r: int, alpha: float, dropout: float = 0.0,
               scaling: str = "alpha/r", dora: bool = False) -> LoRALinear:  # fmt: skip
    """Build the LoRALinear, or its DoRA or embedding variant, that replaces `base`."""
    on_linear, on_table = (DoRALinear, DoRAEmbedding) if dora else (LoRALinear, LoRAEmbedding)
    layer = (on_table if isinstance(base, nn.Embedding) else on_linear)(base, r, alpha, dropout)
    if scaling == "rslora":
        layer.scaling = rslora_scaling(alpha, r)
    return layer


def add_lora(model: Model, r: int = 8, alpha: float = 16, dropout: float = 0.0,
             targets: str | list[str] | tuple[str, ...] = ("q_proj", "v_proj"),
             scaling: str = "alpha/r", dora: bool = False) -> Model:  # fmt: skip
    """Freeze `model` and add LoRA to every layer that `targets` names. Returns the model.

    r         rank of the update: r * (in + out) trainable parameters per layer.
    alpha     numerator of the scaling: alpha/r, or alpha/sqrt(r) with scaling="rslora".
    dropout   dropout probability at the input of the low-rank path; not on embeddings.
    targets   last components of layer names: "query_key_value" for Bloom and GPT-NeoX, "c_attn" for
              GPT-2. A longer suffix, "0.attn.c_attn", matches only the layers whose name ends in
              it. Embeddings ("embed_tokens", "wte") and an untied "lm_head" are allowed.
    dora      also train the magnitude of each row of the new weight: `out` parameters per layer.
    Trainable parameters are float32 even on a half-precision base (float64 on a float64 base).
    The head of a classifier is newly initialized, so it is trained in full and gets no LoRA. If the
    embedding is tied to the head, LoRA affects only the embedding lookup, and cannot be merged.
    Raises ValueError for a name that matches no layer, a tied head, a number out of range, a layer
    that does more than multiply by its weight, and a model that already has a technique.
    """
    targets = list_of_names(targets)
    check_settings(r, alpha, dropout, scaling, dora)
    settings: dict[str, Any] = dict(r=r, alpha=alpha, dropout=dropout, scaling=scaling, dora=dora)
    with adding(model, "lora"), unchanged(model):
        layers = target_layers(model, targets)
        put_lora(model, layers, lambda name, layer: lora_layer(layer, **settings))
        vars(model)["lora_config"] = settings | {"targets": targets}
    return model


def merge_lora(model: Model) -> Model:
    """Merge every update into its base weight, so inference costs nothing extra. Returns the model.

    Exact up to one rounding of the weight, so lossy on a half-precision base. Call `unmerge_lora`
    before further training. Raises ValueError without LoRA, if it is already merged, for a
    quantized base, and for an embedding with LoRA that is tied to the head.
    """
    return shift_weights(model, merge=True)


def unmerge_lora(model: Model) -> Model:
    """Undo `merge_lora`, up to rounding. Returns the model. Raises ValueError if not merged."""
    return shift_weights(model, merge=False)


def unload_lora(model: Model) -> Model:
    """Put the base layers back, for `save_pretrained` or another technique. Returns the model.

    Merged updates stay in the weights; unmerged ones are discarded. What is frozen stays frozen.
    Raises ValueError if there is no LoRA.
    """
    return take_lora_off(model)
