"""LoRA: learn a low-rank change of a frozen weight matrix (Hu et al. 2021, section 4.1).

    h = W0 x + (alpha / r) B A x        W0: (out, in), A: (r, in), B: (out, r)        equation 3

W0 is frozen. A starts random and B at zero, so the model is unchanged before the first step. Once
trained, W0 + (alpha / r) B A can take the place of W0: no extra work at inference.
"""

import torch
from torch import nn
from torch.nn.functional import dropout, linear

from minipeft.freezing import at_least_float32
from minipeft.lora_variants import DoRA, OneHot, rslora_scaling
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
    """A frozen layer, nn.Linear or GPT-2's Conv1D, with a trainable low-rank change beside it."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.base = base
        weight = matrix(base)
        out_features, in_features = weight.shape
        place = {"device": weight.device, "dtype": at_least_float32(weight.dtype)}
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, **place))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, **place))  # (out, r)
        self.lora_magnitude = None  # (out,), of DoRA alone
        self.reset_parameters()
        self.scaling = alpha / r
        self.dropout = dropout
        self.merged = False
        self.train(base.training)  # a model in eval mode stays in it

    def reset_parameters(self):
        # The paper draws A from a Gaussian of a width it does not name. The authors' code and
        # HF peft do what nn.Linear does: uniform in +-1/sqrt(in).
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)

    def forward(self, x):
        h = self.base(x)  # W0 x: (batch, seq, out)
        if self.merged:
            return h
        x = dropout(x, self.dropout, self.training) if self.dropout else x  # (batch, seq, in)
        return add_product(h, self.down(x), self.lora_B)  # (batch, seq, out)

    def down(self, x):
        """A x, scaled, in float32 also on a half-precision base."""
        return linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling  # (batch, seq, r)

    def change(self):
        return self.lora_B @ self.lora_A * self.scaling  # (out, in)

    def new_matrix(self):
        return matrix(self.base) + self.change()  # (out, in)

    @torch.no_grad()
    def shift_weight(self, sign):
        """Add the change to W0 (sign=1), or subtract it again (sign=-1), rounding once."""
        weight = matrix(self.base)
        weight.copy_(weight + sign * self.change())

    @property
    def weight(self):
        """For a model that reads the weight itself: a new tensor at each call, with gradients."""
        if self.merged:
            return self.base.weight
        new = self.new_matrix()
        return (new if isinstance(self.base, nn.Linear) else new.T).to(self.base.weight.dtype)


class DoRALinear(DoRA, LoRALinear):
    """A linear layer whose rows have trainable lengths, too."""


class LoRAEmbedding(OneHot, LoRALinear):
    """An nn.Embedding with a low-rank change beside it."""


class DoRAEmbedding(DoRA, OneHot, LoRALinear):
    """An nn.Embedding whose columns have trainable lengths, too."""


def lora_layer(base, r, alpha, dropout=0.0, scaling="alpha/r", dora=False):
    """What takes the place of the layer `base`: LoRALinear, or a variant of it."""
    on_linear, on_table = (DoRALinear, DoRAEmbedding) if dora else (LoRALinear, LoRAEmbedding)
    layer = (on_table if isinstance(base, nn.Embedding) else on_linear)(base, r, alpha, dropout)
    if scaling == "rslora":
        layer.scaling = rslora_scaling(alpha, r)
    return layer


def add_lora(
    model, r=8, alpha=16, dropout=0.0, targets=("q_proj", "v_proj"), scaling="alpha/r", dora=False
):
    """Freeze `model` and put LoRA on every layer that `targets` names. Returns the model.

    r         rank of the change: r * (in + out) trainable parameters for each layer.
    alpha     numerator of the scaling: alpha/r, or alpha/sqrt(r) with scaling="rslora".
    dropout   probability, while training, of dropping an input of the low-rank path.
    targets   last names of the layers, such as ("q_proj", "v_proj"); "query_key_value" for Bloom
              and GPT-NeoX, "c_attn" for GPT-2. A dotted ending picks fewer: "0.attn.c_attn".
              Embeddings ("embed_tokens", "wte") and an untied "lm_head" may be named too.
    dora      also learn the length of each row of the sum: `out` more parameters for each layer.
    Trainable parameters are float32, also on a half-precision base (float64 on a float64 one).
    The head of a classifier is new, so it is trained as a whole, and gets no LoRA. On an embedding
    tied to the head, LoRA changes the input side only and cannot be merged; a tied head is refused.
    Raises ValueError for a name that no layer has, a tied head, a number out of range, a layer that
    computes something else than its kind does, and a model that has a technique already.
    """
    targets = list_of_names(targets)
    check_settings(r, alpha, dropout, scaling, dora)
    settings = {"r": r, "alpha": alpha, "dropout": dropout, "scaling": scaling, "dora": dora}
    with adding(model, "lora"), unchanged(model):
        layers = target_layers(model, targets)
        put_lora(model, layers, lambda name, layer: lora_layer(layer, **settings))
        model.lora_config = settings | {"targets": targets}
    return model


def merge_lora(model):
    """Fold every low-rank change into its base weight: no extra work at inference. Returns model.

    Exact up to one rounding of the weight, so lossy on a half-precision base. A merged model cannot
    be trained before `unmerge_lora`. Raises ValueError if there is no LoRA, it is merged already,
    the base is quantised, or an embedding with LoRA is tied to the head.
    """
    return shift_weights(model, merge=True)


def unmerge_lora(model):
    """Subtract the changes again: the base is back up to rounding. Returns the model.

    Raises ValueError if there is no LoRA, or it is not merged.
    """
    return shift_weights(model, merge=False)


def unload_lora(model):
    """Take LoRA off: a plain model again, for `save_pretrained` or another technique. Returns it.

    Merged changes stay in its weights, others are lost. What was frozen stays frozen.
    Raises ValueError if there is no LoRA.
    """
    return take_lora_off(model)
