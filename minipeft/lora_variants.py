"""Variants of LoRA: another scaling, a trainable magnitude per row, embeddings, a faster B.

    rsLoRA   h = W0 x + (alpha / sqrt(r)) B A x       Kalajdzievski 2023, theorem 3.2
    DoRA     h = m V x / |V|                          Liu et al. 2024, section 4, equation 5
             V = W0 + scaling B A, m: (out,)          |V|: the length of each row of V, (out,)
    LoRA+    B learns `ratio` times as fast as A      Hayou et al. 2024, section 4

DoRA and OneHot are mixins for LoRALinear: `class DoRALinear(DoRA, LoRALinear)` in lora.py.
"""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import nn
from torch.nn.functional import dropout, embedding

from minipeft.refusals import is_number, require
from minipeft.technique.layers import InPlace, add_product, lora_layers, matrix
from minipeft.technique.on_model import has_numbers


def rslora_scaling(alpha: float, r: int) -> float:
    """alpha / sqrt(r). With alpha / r the update would shrink as r grows."""
    return alpha / math.sqrt(r)


class OneHot(InPlace):
    """LoRA on an embedding: x is one-hot, `in` is the vocabulary size, A x is a column of A."""

    lora_A: nn.Parameter  # (r, in); LoRALinear sets these three
    lora_B: nn.Parameter
    scaling: float

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(base, r, alpha, dropout=0.0)  # dropout does not apply to token ids

    def reset_parameters(self) -> None:
        nn.init.normal_(self.lora_B)  # here A starts at zero, as in the authors' code

    def down(self, ids: torch.Tensor) -> torch.Tensor:
        """scaling * A x: (batch, seq, r). ids: (batch, seq)."""
        z = embedding(ids, self.lora_A.T, self.base.padding_idx)  # (batch, seq, r)
        return z * (self.scaling * getattr(self.base, "embed_scale", 1.0))  # Gemma has a scale


class DoRA(InPlace):
    """LoRA that also trains m, the length of each row of the new weight m V / |V|."""

    lora_A: nn.Parameter  # (r, in); LoRALinear has these six
    lora_B: nn.Parameter
    dropout: float
    merged: bool
    down: Callable[[torch.Tensor], torch.Tensor]
    change: Callable[[], torch.Tensor]
    factor: torch.Tensor  # DoRA's own: m / |V| at the time of merging, (out, 1)
    kept: tuple[torch.Tensor, object, object] | None  # cached by `norms`

    def __init__(self, base: nn.Module, r: int, alpha: float, dropout: float = 0.0) -> None:
        super().__init__(base, r, alpha, dropout)
        self.lora_magnitude = nn.Parameter(self._norms())  # m: (out,), initialized to |W0|
        self.register_buffer("factor", None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.base(x)  # W0 x and the bias: (batch, seq, out)
        if self.merged:
            return h
        x = dropout(x, self.dropout, self.training) if self.dropout else x  # (batch, seq, in)
        y = add_product(h, self.down(x), self.lora_B)  # V x and the bias: (batch, seq, out)
        v = y if self.bias is None else y - self.bias  # V x
        if self.dropout and self.training:
            v = v + (self.base(x) - h)  # as in HF peft, dropout also applies to W0 x here
        return (y + (self.lora_magnitude / self.norms() - 1) * v).to(h.dtype)

    def new_matrix(self) -> torch.Tensor:
        """m V / |V|: (out, in)."""
        v = matrix(self.base) + self.change()
        return v * (self.lora_magnitude / self.norms())[:, None]

    @torch.no_grad()
    def shift_weight(self, sign: int) -> None:
        """Replace W0 by m V / |V| (sign=1) or restore it (sign=-1), rounding once."""
        weight = matrix(self.base)
        if sign > 0:
            new = weight + self.change()
            self.factor = (self.lora_magnitude / lengths(new))[:, None]  # (out, 1)
            weight.copy_(new * self.factor)
        else:
            weight.copy_(weight / self.factor - self.change())

    def norms(self) -> torch.Tensor:
        """|V|: (out,), a constant in the backward pass to save memory (section 4.3, equation 11).

        In eval mode without gradients, as in `generate`, it is cached until a weight is modified in
        place. (Modifying `.data` does not change a tensor's version, so that goes unnoticed.)
        """
        tensors = [*self.base.parameters(), *self.base.buffers(), self.lora_A, self.lora_B]
        uncached = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if uncached or not has_numbers(self) or any(t.is_inference() for t in tensors):
            self.kept = None
            return self._norms()
        state = [(t.data_ptr(), t._version) for t in tensors]
        if self.kept is None or self.kept[1] != state:
            alive = [t.detach() for t in tensors]  # so that their addresses are not reused
            self.kept = self._norms(), state, alive
        return self.kept[0]

    @torch.no_grad()
    def _norms(self):
        return lengths(matrix(self.base) + self.change())

    def train(self, mode: bool = True) -> Self:
        self.kept = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # .to(), .half() ...: free the cached tensors
        self.kept = None
        return super()._apply(*args, **kwargs)


def lengths(v: torch.Tensor) -> torch.Tensor:
    """The norm of each row, (out,). Clamped, because the row of a padding token may be zero."""
    return v.norm(dim=1).clamp(min=1e-8)


def lora_plus_groups(model: nn.Module, lr: float, ratio: float = 16) -> list[dict[str, Any]]:
    """LoRA+ (Hayou et al. 2024, section 4): B gets `ratio` times the learning rate of the rest.

        train(model, batches, lr=lr, groups=lora_plus_groups(model, lr), ...)

    Returns parameter groups for `train` or any torch optimizer, without weight decay. The paper's
    argument assumes that the input of A is wide, which does not hold for the one-hot input of an
    embedding: there A and B both get `lr`.
    Raises ValueError if there is no LoRA, or for an lr below 0 or a ratio not above 0.
    """
    require(is_number(lr) and 0 <= lr < math.inf, f"lr={lr!r} must be a number of at least 0.")
    require(
        is_number(ratio) and 0 < ratio < math.inf,
        f"ratio={ratio!r} must be above 0: it multiplies the learning rate of B.",
    )
    layers = lora_layers(model).values()
    fast = [layer.lora_B for layer in layers if not isinstance(layer.base, nn.Embedding)]
    slow = [p for p in model.parameters() if p.requires_grad and all(p is not b for b in fast)]
    return [
        {"params": slow, "lr": lr, "weight_decay": 0.0},
        {"params": fast, "lr": lr * ratio, "weight_decay": 0.0},
    ]
