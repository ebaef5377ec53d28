"""A frozen base in 4 bits: NormalFloat4 and double quantisation (Dettmers et al. 2023, "QLoRA",
section 3).

Quantisation is block-wise (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization",
section 2). A block of numbers is divided by its largest magnitude, and each quotient is replaced by
the index of the nearest entry of a fixed code book in [-1, 1]. One outlier thus spoils its own
block only. quantized_adamw.py does the same to the moments of AdamW.
"""

import math
from functools import cache

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import blocks, freeze
from minipeft.refusals import refuse_size, require
from minipeft.technique.on_model import has_numbers, technique_of

BLOCK_8BIT = 256
LINEAR = (nn.Linear, Conv1D)


def nf4_code():
    """The 16 values of NormalFloat4, ascending: quantiles of the normal distribution, so that each
    code is used about equally often on weights that are normal (QLoRA, section 3 and appendix E).

    Zero is one of them, hence 8 values from above and 7 from below. The outermost quantile, that of
    probability 1, would be infinite; the mean of the two sides' half steps is cut off instead.
    """
    last = 1 - (1 / 32 + 1 / 30) / 2
    quantile = lambda p: math.sqrt(2) * torch.erfinv(2 * p - 1)  # noqa: E731
    # On the CPU by name, also under torch.device("meta"), which transformers' patches of linspace
    # can make half of the calls forget.
    wide = {"dtype": torch.float64, "device": "cpu"}
    above = quantile(torch.linspace(0.5, last, 9, **wide))  # begins with the zero
    below = quantile(torch.linspace(0.5, last, 8, **wide))[1:]
    code = torch.cat([-below.flip(0), above])
    return (code / code.max()).float()  # (16,)


def dynamic_code(signed):
    """The 256 values of dynamic tree quantisation, ascending (8-bit Optimizers, section 1.3).

    A byte spends a run of zero bits on the power of ten, and what is left on the digits: seven
    decades, with 1, 2, 4 ... 64 steps each from the smallest up (twice as many without a sign).
    """
    wide = {"dtype": torch.float64, "device": "cpu"}  # as above
    values = [torch.tensor([0.0, 1.0], **wide)]
    for exponent in range(7):
        steps = 2**exponent * (1 if signed else 2)
        edges = torch.linspace(0.1, 1, steps + 1, **wide)
        decade = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (exponent - 6)
        values += [decade, -decade] if signed else [decade]
    return torch.cat(values).sort().values.float()  # (256,)


def nf4_pairs():
    """The two float32 values that each byte stands for, as one integer of 8 bytes, (256,): one
    look-up then copies both."""
    code = nf4_code()
    return torch.cartesian_prod(code, code).view(torch.int64).flatten()


def table(make, like, *args):
    """make(*args) on the device of the tensor `like`, made once for each device: a table that came
    from the host at every use would make a GPU wait."""
    if isinstance(like, FakeTensor):  # such a tensor ends with the mode that made it
        return make(*args).to(like.device)
    return _made_once(make, like.device, *args)


@cache
def _made_once(make, device, *args):
    with torch.inference_mode(False):
        return make(*args).to(device)


def quantize(x, code, block_size):
    """Nearest code of every element, block by block. x: any shape, taken flat and filled up to
    whole blocks with zeros. Returns codes, uint8 (blocks, block_size), and absmax, float32
    (blocks,). Takes 8 bytes an element while it works."""
    x = pad(x.flatten().float(), (0, -x.numel() % block_size)).view(-1, block_size)
    absmax = x.abs().amax(1)  # (blocks,)
    x = x / absmax.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    middles = (code[:-1] + code[1:]) / 2
    return torch.bucketize(x, middles.to(x.device), out_int32=True).to(torch.uint8), absmax


def dequantize(codes, absmax, code, count):
    """The first `count` numbers that the codes stand for, float32 (count,)."""
    values = code.to(codes.device).index_select(0, codes.flatten().int()).view_as(codes)
    return values.mul_(absmax[:, None]).flatten()[:count]


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is kept in 4 bits: y = x W^T + b, W made anew at each use.

    With `double`, the absmax of the blocks are themselves kept in 8 bits, in blocks of 256 and
    around their mean (QLoRA, section 3, "Double Quantization"). A weight then takes
    4 + 8/64 + 32/(64 * 256) = 4.127 bits, without it 4 + 32/64 = 4.5.
    weight: (out, in), of a floating type, kept as `dtype`. bias: (out,) or None.
    """

    is_quantized = True

    def __init__(self, weight, bias=None, block_size=64, double=True):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.block_size, self.double_quant, self.dtype = block_size, double, weight.dtype
        codes, absmax = quantize(weight.detach(), table(nf4_code, weight), block_size)
        codes = codes.flatten()
        self.register_buffer("codes", codes[::2] * 16 + codes[1::2])  # two codes a byte
        if double:
            self.register_buffer("mean", absmax.mean())
            code, count = table(dynamic_code, weight, True), len(absmax)
            codes, absmax = quantize(absmax - self.mean, code, BLOCK_8BIT)
            self.register_buffer("absmax_codes", codes.flatten()[:count].clone())  # (blocks,)
        self.register_buffer("absmax", absmax)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)

    @property
    def weight(self):
        """The weight that the codes stand for, (out, in); a new tensor at each call."""
        return self._weight(self.dtype)

    @property
    def weight_count(self):
        """How many weights the codes stand for."""
        return self.out_features * self.in_features

    def _weight(self, dtype):
        """W (out, in) in `dtype`; takes 6 bytes a weight while it works."""
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

    def forward(self, x):
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _Frozen.apply(x, self.bias, self)  # (..., out)

    def _apply(self, fn, recurse=True):
        """What .to(), .half() or .cuda() do to each tensor. A new type is the type of the weight;
        the numbers that it is made from stay as exact as they are."""
        own = list(self.buffers())
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype

        def moved(t):
            new = fn(t)
            kept = new.dtype != t.dtype and any(t is buffer for buffer in own)
            return t.to(new.device) if kept else new

        return super()._apply(moved, recurse)

    def extra_repr(self):
        bits = f"NF4, block_size={self.block_size}, double={self.double_quant}, dtype={self.dtype}"
        return f"{super().extra_repr()}, {bits}"


class _Frozen(torch.autograd.Function):
    """x W^T + b that keeps neither x (W is not trained) nor W (16 bits of it would undo the 4)."""

    @staticmethod
    def forward(ctx, x, bias, layer):
        ctx.layer, ctx.bias_dtype = layer, None if bias is None else bias.dtype
        return linear(x, layer._weight(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx, grad):
        for_x, for_bias, _ = ctx.needs_input_grad
        dx = grad @ ctx.layer._weight(grad.dtype) if for_x else None  # (..., in)
        # W is frozen, but a bias may be trained, as BitFit does
        db = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype) if for_bias else None
        return dx, db, None


def quantize_base(model, block_size=64, double=True):
    """Freeze `model` and keep the linear layers of its blocks in NF4. Returns the model.

    Whatever stands outside the blocks stays as it is: embeddings and their projections, a pooler,
    the head of a language model or classifier; so do the norms. print(model) shows which layers are
    NF4Linear. LoRA goes on top with `add_lora`, but cannot be merged into 4 bits.
    Raises ValueError for an odd block size, for a model without a list of blocks, for one that is
    quantised or changed by a technique already, for weights that are no finite numbers, and for
    blocks whose weights are mostly not in linear layers, as those of fused experts (mixtures of
    experts in transformers 5): they would stay as large as they are.
    """
    refuse_size("block_size", block_size, "number of weights")
    require(block_size % 2 == 0, f"block_size={block_size} must be even: two codes share a byte.")
    require(isinstance(double, bool), f"double={double!r} must be True or False.")
    if technique_of(model) or hasattr(model, "peft_config"):
        raise ValueError("Quantise the base first, and add the technique to what comes out.")
    if getattr(model, "is_quantized", False):
        raise ValueError("transformers has quantised this model already; load it in full.")
    stack = blocks(model)
    _refuse_weights(model, stack)
    freeze(model)
    small = {}  # {id of a layer: its NF4Linear}; one that several blocks share stays shared
    for parent in list(stack.modules()):
        for name, layer in list(parent._modules.items()):
            if isinstance(layer, LINEAR):
                if id(layer) not in small:
                    weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
                    small[id(layer)] = NF4Linear(weight, layer.bias, block_size, double)
                setattr(parent, name, small[id(layer)].train(layer.training))
    return model


def _refuse_weights(model, stack):
    """Raise ValueError, before anything is changed, for blocks that cannot be kept in NF4."""
    layers = [module for module in stack.modules() if isinstance(module, LINEAR)]
    if not layers or any(isinstance(layer, NF4Linear) for layer in layers):
        raise ValueError("This model has no linear layer left to quantise.")
    names = {p: name for name, p in model.named_parameters()}
    linear = {layer.weight for layer in layers}
    other = {p for p in stack.parameters() if p.ndim > 1} - linear
    stays = sum(p.numel() for p in other)
    share = stays / (stays + sum(p.numel() for p in linear))
    if share > 0.1:  # convolutions and routers are some 2 % at most
        largest = names[max((p for p in names if p in other), key=torch.numel)]
        raise ValueError(
            f"{share:.0%} of the weights in the blocks of this {type(model).__name__} would stay "
            f"as large as they are, {largest} for one: quantize_base keeps nn.Linear and Conv1D in "
            "NF4, but not parameters of other modules, such as fused experts."
        )
    real = has_numbers(model)
    for weight in (layer.weight for layer in layers):
        if not weight.is_floating_point() or (real and not weight.isfinite().all()):
            raise ValueError(
                f"{names.get(weight, 'A weight')} ({weight.dtype}) cannot be kept in NF4: it is "
                "no floating-point number, or NaN or infinite in places."
            )
