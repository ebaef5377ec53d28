"""A frozen base in 4 bits: NormalFloat4 and double quantization (Dettmers et al. 2023, "QLoRA",
section 3).

Quantization is block-wise (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
section 2). Each block of numbers is divided by its largest magnitude, absmax, and each quotient is
replaced by the index of the nearest value of a fixed code in [-1, 1]. So an outlier only affects
its own block. quantized_adamw.py quantizes the moments of AdamW in the same way.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import blocks, freeze
from minipeft.refusals import Model, refuse_flag, refuse_size, require
from minipeft.technique.layers import matrix
from minipeft.technique.on_model import has_numbers, technique_of

BLOCK_8BIT = 256
LINEAR = (nn.Linear, Conv1D)
# The device is explicit because transformers patches linspace to ignore torch.device("meta").
CPU_FLOAT64: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def nf4_code() -> torch.Tensor:
    """The 16 values of NormalFloat4, ascending: quantiles of the normal distribution, so that each
    code is used about equally often on normal weights (QLoRA, section 3 and appendix E).

    There are 7 negative values, zero and 8 positive ones. The quantile of probability 1 would be
    infinite, so the last probability is 1 minus the mean of the half steps of the two sides.
    """
    last = 1 - (1 / 32 + 1 / 30) / 2
    quantile = lambda p: math.sqrt(2) * torch.erfinv(2 * p - 1)  # noqa: E731
    above = quantile(torch.linspace(0.5, last, 9, **CPU_FLOAT64))  # begins with zero
    below = quantile(torch.linspace(0.5, last, 8, **CPU_FLOAT64))[1:]
    code = torch.cat([-below.flip(0), above])
    return (code / code.max()).float()  # (16,)


def dynamic_code(signed: bool) -> torch.Tensor:
    """The 256 values of dynamic tree quantization, ascending (8-bit Optimizers, section 1.3).

    A run of zero bits in the byte gives the power of ten, and the remaining bits the digits: seven
    decades, with 1, 2, 4 ... 64 steps from the smallest up (twice as many without a sign).
    """
    values = [torch.tensor([0.0, 1.0], **CPU_FLOAT64)]
    for exponent in range(7):
        steps = 2**exponent * (1 if signed else 2)
        edges = torch.linspace(0.1, 1, steps + 1, **CPU_FLOAT64)
        decade = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [decade, -decade] if signed else [decade]
    return torch.cat(values).sort().values.float()  # (256,)


def nf4_pairs() -> torch.Tensor:
    """The two float32 values of each byte, viewed as one int64 for a single lookup: (256,)."""
    code = nf4_code()
    return torch.cartesian_prod(code, code).view(torch.int64).flatten()


def table(make: Callable[..., torch.Tensor], like: torch.Tensor, *args: object) -> torch.Tensor:
    """make(*args) on the device of `like`, cached for each device: a copy from the host at every
    use would synchronize the GPU."""
    if isinstance(like, FakeTensor):  # not cached, because it is invalid outside its FakeTensorMode
        return make(*args).to(like.device)
    return _made_once(make, like.device, *args)


@cache
def _made_once(make, device, *args):
    with torch.inference_mode(False):
        return make(*args).to(device)


def quantize(
    x: torch.Tensor, code: torch.Tensor, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize x, of any shape, flattened and padded with zeros to whole blocks.

    Returns codes, uint8 (blocks, block_size), and absmax, float32 (blocks,). Takes 8 bytes of
    temporary memory per element.
    """
    x = pad(x.flatten().float(), (0, -x.numel() % block_size)).view(-1, block_size)
    absmax = x.abs().amax(1)  # (blocks,)
    x = x / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    middles = (code[:-1] + code[1:]) / 2
    return torch.bucketize(x, middles.to(x.device), out_int32=True).to(torch.uint8), absmax


def dequantize(
    codes: torch.Tensor, absmax: torch.Tensor, code: torch.Tensor, count: int
) -> torch.Tensor:
    """The first `count` dequantized numbers, float32 (count,)."""
    values = code.to(codes.device).index_select(0, codes.flatten().int()).view_as(codes)
    return values.mul_(absmax[:, None]).flatten()[:count]


class NF4Linear(nn.Linear):
    """A frozen linear layer with a 4-bit weight: y = x W^T + b, W dequantized at each use.

    With `double`, each absmax minus their mean is quantized to 8 bits, in blocks of 256 (QLoRA,
    section 3, "Double Quantization", has 8-bit floats; here it is the dynamic code). A weight then
    takes 4 + 8/64 + 32/(64 * 256) = 4.127 bits, otherwise 4 + 32/64 = 4.5.
    weight: (out, in), floating-point; it is dequantized to the same dtype. bias: (out,) or None.
    """

    is_quantized = True

    def __init__(
        self,
        weight: torch.Tensor,
        bias: torch.Tensor | None = None,
        block_size: int = 64,
        double: bool = True,
    ) -> None:
        nn.Module.__init__(self)
        refuse_size("block_size", block_size, "number of weights")
        even = block_size % 2 == 0
        require(even, f"block_size={block_size} must be even: two codes share a byte.")
        refuse_flag("double", double)
        self.out_features, self.in_features = weight.shape
        self.block_size, self.double_quant, self.dtype = block_size, double, weight.dtype
        codes, absmax = quantize(weight.detach(), table(nf4_code, weight), block_size)
        codes = codes.flatten()
        self.register_buffer("codes", codes[::2] * 16 + codes[1::2])  # two codes per byte
        if double:
            mean, count = absmax.mean(), len(absmax)
            self.register_buffer("mean", mean)
            code = table(dynamic_code, weight, True)
            codes, absmax = quantize(absmax - mean, code, BLOCK_8BIT)
            self.register_buffer("absmax_codes", codes.flatten()[:count].clone())  # (blocks,)
        self.register_buffer("absmax", absmax)
        frozen = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        self.register_parameter("bias", frozen)

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """The weight, (out, in), dequantized at each access."""
        return self._weight(self.dtype)

    @property
    def weight_count(self) -> int:
        """The number of weights that the codes stand for."""
        return self.out_features * self.in_features

    def _weight(self, dtype):
        """W (out, in) in `dtype`. Takes 6 bytes of temporary memory per weight."""
        absmax = self.absmax  # (blocks,)
        if self.double_quant:
            code = table(dynamic_code, self.codes, True)
            codes = pad(self.absmax_codes, (0, -len(self.absmax_codes) % BLOCK_8BIT))
            factors = code.index_select(0, codes.int()).view(-1, BLOCK_8BIT)
            absmax = torch.addcmul(self.mean, factors, absmax[:, None]).flatten()
        pairs = table(nf4_pairs, self.codes).index_select(0, self.codes.int())
        values = pairs.view(torch.float32).view(-1, self.block_size)
        values.mul_(absmax[: len(values), None])
        weight = values.flatten()[: self.weight_count].view(self.out_features, self.in_features)
        return weight.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _Frozen.apply(x, self.bias, self)  # (..., out)

    def _apply(self, fn, recurse=True):
        """Called by .to(), .half(), .cuda() ... A new dtype is that of the dequantized weight; the
        buffers change their device only."""
        own = list(self.buffers())
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype

        def moved(t):
            new = fn(t)
            kept = new.dtype != t.dtype and any(t is buffer for buffer in own)
            return t.to(new.device) if kept else new

        return super()._apply(moved, recurse)

    def extra_repr(self) -> str:
        bits = f"NF4, block_size={self.block_size}, double={self.double_quant}, dtype={self.dtype}"
        return f"{super().extra_repr()}, {bits}"


class _Frozen(torch.autograd.Function):
    """x W^T + b without saved tensors: x is not needed, and W is dequantized again for backward."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        return linear(x, layer._weight(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        for_x, for_bias, _ = ctx.needs_input_grad
        dx = grad @ ctx.layer._weight(grad.dtype) if for_x else None  # (..., in)
        # W is frozen, but the bias may be trained, as in BitFit.
        db = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if for_bias else None
        return dx, db, None


def quantize_base(model: Model, block_size: int = 64, double: bool = True) -> Model:
    """Freeze `model` and quantize the linear layers of its blocks to NF4. Returns the model.

    Norms and everything outside the blocks keep their dtype: embeddings and their projections, a
    pooler, the head. print(model) shows which layers are NF4Linear. Add LoRA with `add_lora`; it
    cannot be merged into 4-bit weights.
    Raises ValueError for an odd block size, a model without a list of blocks, one that is already
    quantized or has a technique, weights that are not finite, and blocks with more than 10 % of
    their weights outside linear layers, such as fused experts (mixtures of experts in
    transformers 5), which would not be quantized.
    """
    if technique_of(model) or hasattr(model, "peft_config"):
        raise ValueError("Quantize the base first, and add the technique to what comes out.")
    if getattr(model, "is_quantized", False):
        raise ValueError("transformers has quantized this model already; load it in full.")
    stack = blocks(model)
    _refuse_weights(model, stack)
    quantized: dict[int, NF4Linear] = {}  # by id(layer), so that shared layers stay shared
    for parent in list(stack.modules()):
        for name, layer in list(parent._modules.items()):
            if isinstance(layer, LINEAR):
                if id(layer) not in quantized:
                    new = NF4Linear(matrix(layer), layer.bias, block_size, double)
                    quantized[id(layer)] = new
                setattr(parent, name, quantized[id(layer)].train(layer.training))
    return freeze(model)


def _refuse_weights(model, stack):
    """Raise ValueError for blocks that cannot be quantized. Nothing has been changed yet."""
    layers = [module for module in stack.modules() if isinstance(module, LINEAR)]
    if not layers or any(isinstance(layer, NF4Linear) for layer in layers):
        raise ValueError("This model has no linear layer left to quantize.")
    names = {p: name for name, p in model.named_parameters()}
    linear = {layer.weight for layer in layers}
    other = {p for p in stack.parameters() if p.ndim > 1} - linear
    count = sum(p.numel() for p in other)
    share = count / (count + sum(p.numel() for p in linear))
    if share > 0.1:  # convolutions and routers are about 2 % at most
        largest = names[max((p for p in names if p in other), key=torch.numel)]
        raise ValueError(
            f"{share:.0%} of the weights in the blocks of this {type(model).__name__} would stay "
            f"as large as they are, {largest} for one: quantize_base keeps nn.Linear and Conv1D in "
            "NF4, but not parameters of other modules, such as fused experts."
        )
    check_values = has_numbers(model)
    for weight in (layer.weight for layer in layers):
        if not weight.is_floating_point() or (check_values and not weight.isfinite().all()):
            raise ValueError(
                f"{names.get(weight, 'A weight')} ({weight.dtype}) cannot be kept in NF4: it is "
                "not floating-point, or NaN or infinite in places."
            )
