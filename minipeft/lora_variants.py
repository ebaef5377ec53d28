"""Variants of LoRA: another scaling, a length for each row, embeddings, a faster B.

    rsLoRA   h = W0 x + (alpha / sqrt(r)) B A x       Kalajdzievski 2023, theorem 3.2
    DoRA     h = m V x / |V|                          Liu et al. 2024, section 4, equation 5
             V = W0 + scaling B A, m: (out,)          |V|: the length of each row of V, (out,)
    LoRA+    B learns `ratio` times as fast as A      Hayou et al. 2024, section 4

DoRA and OneHot are laid over LoRALinear: `class DoRALinear(DoRA, LoRALinear)` in lora.py.
"""

import math

import torch
from torch import nn
from torch.nn.functional import dropout, embedding

from minipeft.refusals import require
from minipeft.technique.layers import add_product, lora_layers, matrix
from minipeft.technique.on_model import has_numbers


def rslora_scaling(alpha, r):
    """Keeps the size of the change as r grows, where alpha / r lets it shrink."""
    return alpha / math.sqrt(r)


class OneHot:
    """LoRA on an embedding: its input is one-hot, in is the vocabulary, and A x a column of A."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__(base, r, alpha, dropout=0.0)  # there is nothing in a token id to drop

    def reset_parameters(self):
        nn.init.normal_(self.lora_B)  # A is zero: the roles turned, as in the authors' code

    def down(self, ids):
        """scaling A x: (batch, seq, r). ids: (batch, seq)."""
        z = embedding(ids, self.lora_A.T, self.base.padding_idx)  # (batch, seq, r)
        return z * (self.scaling * getattr(self.base, "embed_scale", 1.0))  # Gemma scales its own


class DoRA:
    """LoRA in which the length m of each row of V = W0 + scaling B A is learnt as well."""

    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__(base, r, alpha, dropout)
        self.lora_magnitude = nn.Parameter(self._norms())  # m: (out,), started at |W0|
        self.register_buffer("factor", None, persistent=False)  # what W0 was merged with

    def forward(self, x):
        h = self.base(x)  # W0 x and the bias: (batch, seq, out)
        if self.merged:
            return h
        x = dropout(x, self.dropout, self.training) if self.dropout else x  # (batch, seq, in)
        y = add_product(h, self.down(x), self.lora_B)  # V x and the bias: (batch, seq, out)
        v = y if self.bias is None else y - self.bias  # V x
        if self.dropout and self.training:
            v = v + (self.base(x) - h)  # HF peft drops inputs of W0 too, where m / |V| is not 1
        return (y + (self.lora_magnitude / self.norms() - 1) * v).to(h.dtype)

    def new_matrix(self):
        """m V / |V|: (out, in)."""
        return super().new_matrix() * (self.lora_magnitude / self.norms())[:, None]

    @torch.no_grad()
    def shift_weight(self, sign):
        """Replace W0 by m V / |V| (sign=1), or put it back (sign=-1), rounding once."""
        weight = matrix(self.base)
        if sign > 0:
            new = weight + self.change()
            self.factor = (self.lora_magnitude / lengths(new))[:, None]  # (out, 1)
            weight.copy_(new * self.factor)
        else:
            weight.copy_(weight / self.factor - self.change())

    def norms(self):
        """|V|: (out,). A constant in the backward pass, which spares memory (section 4.3,
        equation 11).

        In eval mode and without gradients, as in `generate`, they are kept until a weight is
        written to, by whatever torch counts as writing (`.data` passes unseen).
        """
        tensors = [*self.base.parameters(), *self.base.buffers(), self.lora_A, self.lora_B]
        learning = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if learning or not has_numbers(self) or any(t.is_inference() for t in tensors):
            self.kept = None
            return self._norms()
        state = [(t.data_ptr(), t._version) for t in tensors]
        if self.kept is None or self.kept[1] != state:
            held = [t.detach() for t in tensors]  # so that no address is given to another tensor
            self.kept = self._norms(), state, held
        return self.kept[0]

    @torch.no_grad()
    def _norms(self):
        return lengths(matrix(self.base) + self.change())

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # .to(), .half() ...: nothing of the old is held
        self.kept = None
        return super()._apply(*args, **kwargs)


def lengths(v):
    """The length of each row, (out,). One of zeros, as of a padding token, must not divide by 0."""
    return v.norm(dim=1).clamp(min=1e-8)


def lora_plus_groups(model, lr, ratio=16):
    """LoRA+ (Hayou et al. 2024, section 4): B learns `ratio` times as fast as all else.

        train(model, batches, lr=lr, groups=lora_plus_groups(model, lr), ...)

    Returns parameter groups for `train` or any torch optimiser, without weight decay. The argument
    for a faster B is that the input of A is wide, which no one-hot input of an embedding is: there
    A and B both learn at `lr`. Raises ValueError if there is no LoRA, or for a ratio not above 0.
    """
    require(ratio > 0, f"ratio={ratio} must be above 0: it multiplies the learning rate of B.")
    layers = lora_layers(model).values()
    fast = [layer.lora_B for layer in layers if not isinstance(layer.base, nn.Embedding)]
    slow = [p for p in model.parameters() if p.requires_grad and all(p is not b for b in fast)]
    return [
        {"params": slow, "lr": lr, "weight_decay": 0.0},
        {"params": fast, "lr": lr * ratio, "weight_decay": 0.0},
    ]
