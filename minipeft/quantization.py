"""Fewer bits: 4-bit base weights (QLoRA) and 8-bit optimiser state.

Both are block-wise. A block of numbers is divided by its largest magnitude, and each quotient is
replaced by the index of the nearest entry of a fixed code book in [-1, 1]. One outlier thus spoils
its own block only. Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", section 2;
Dettmers et al. 2023, "QLoRA", section 3.
"""

import math

import torch
from torch import nn
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import freeze

BLOCK_8BIT = 256


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
    values = code.to(codes.device)[codes.int()] * absmax[:, None]  # (blocks, block_size)
    return values.flatten()[:count]


class NF4Linear(nn.Linear):
    """A frozen linear layer whose weight is kept in 4 bits: y = x W^T + b, W made anew at each use.

    With `double`, the absmax of the blocks are themselves kept in 8 bits, in blocks of 256 and
    around their mean (QLoRA, section 3, "Double Quantization"). A weight then takes
    4 + 8/64 + 32/(64 * 256) = 4.127 bits, without it 4 + 32/64 = 4.5.
    weight: (out, in), any floating type. bias: (out,) or None.
    """

    def __init__(self, weight, bias=None, block_size=64, double=True):
        nn.Module.__init__(self)
        self.out_features, self.in_features = weight.shape
        self.block_size, self.double, self.dtype = block_size, double, weight.dtype
        codes, absmax = quantize(weight.detach(), nf4_code().to(weight.device), block_size)
        codes = codes.flatten()
        self.register_buffer("codes", codes[::2] * 16 + codes[1::2])  # two codes a byte
        if double:
            self.register_buffer("mean", absmax.mean())
            codes, outer = quantize(absmax - self.mean, dynamic_code(signed=True), BLOCK_8BIT)
            self.register_buffer("absmax_codes", codes.flatten()[: len(absmax)].clone())
            absmax = outer
        self.register_buffer("absmax", absmax)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)

    @property
    def weight(self):
        """The weight that the codes stand for, (out, in); a new tensor at each call."""
        absmax = self.absmax  # (blocks,)
        if self.double:
            count = len(self.absmax_codes)
            codes = pad(self.absmax_codes, (0, -count % BLOCK_8BIT)).view(-1, BLOCK_8BIT)
            absmax = dequantize(codes, absmax, dynamic_code(signed=True), count) + self.mean
        code = nf4_code().to(self.codes.device)
        pairs = torch.cartesian_prod(code, code)  # (256, 2): what each byte stands for
        values = pairs[self.codes.int()].view(-1, self.block_size) * absmax[:, None]
        count = self.out_features * self.in_features
        return values.flatten()[:count].view(self.out_features, self.in_features).to(self.dtype)

    def forward(self, x):
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        return _Frozen.apply(x, self)  # (..., out)

    def on_paper(self, tape, x, out):
        """For `memory.estimate`: nothing is kept, the weight is made again going backward."""
        x = tape.cast(x, 2) if tape.autocast else x
        return tape.node("4-bit", [x], f"{x.shape.rsplit(' ', 1)[0]} {out}", x.width)


class _Frozen(torch.autograd.Function):
    """x W^T + b that keeps neither x (W is not trained) nor W (16 bits of it would undo the 4)."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return linear(x, layer.weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx, grad):
        return grad @ ctx.layer.weight.to(grad.dtype), None  # (..., in)


def quantize_base(model, block_size=64, double=True):
    """Freeze `model` and keep the linear layers of its decoder blocks in NF4. Returns the model.

    Embeddings, norms and the head stay as they are. LoRA goes on top with `add_lora`, but cannot be
    merged into 4 bits. Raises ValueError for an odd block size, and a model whose blocks hold no
    linear layer, or layers changed by a technique already.
    """
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size={block_size} must be even: two codes share a byte.")
    if hasattr(model, "minipeft_technique"):
        raise ValueError("Quantise the base first, and add the technique to what comes out.")
    head = model.get_output_embeddings()
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and module is not head
    ]
    if not found or any(isinstance(module, NF4Linear) for _, module in found):
        raise ValueError("This model has no linear layer left to quantise.")
    freeze(model)
    for name, layer in found:
        parent, _, last = name.rpartition(".")
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        small = NF4Linear(weight, layer.bias, block_size, double).train(layer.training)
        setattr(model.get_submodule(parent), last, small)
    return model


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with both moments kept in 8 bits, in blocks of 256:
    2 bytes and 1/32 a trainable instead of 8. The moments are float32 while they are updated.

    Parameters of fewer than 4,096 elements keep float32 moments: they cost little, and norms and
    biases are sensitive (8-bit Optimizers, section 2.3, says so of embeddings).
    """

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01):
        if not lr >= 0 or not eps > 0 or not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"lr={lr}, eps={eps} or betas={betas} is out of range.")
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure=None):
        """One update of every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def load_state_dict(self, state_dict):
        """As torch's, which casts all state to the type of the parameter; codes are bytes again."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for name in ("m", "v"):
                if f"{name}_absmax" in state:
                    state[name] = state[name].to(torch.uint8)

    def _update(self, p, group):
        state, (beta1, beta2) = self.state[p], group["betas"]
        state["step"] = state.get("step", 0) + 1
        m, v = (self._read(state, name, p) for name in ("m", "v"))
        m.lerp_(p.grad.float(), 1 - beta1)
        v.mul_(beta2).addcmul_(p.grad.float(), p.grad.float(), value=1 - beta2)
        self._write(state, "m", m)
        self._write(state, "v", v)
        v.sqrt_().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        p.addcdiv_(m.to(p.dtype), v.to(p.dtype), value=-group["lr"] / (1 - beta1 ** state["step"]))

    def _read(self, state, name, p):
        if name not in state:
            return torch.zeros_like(p, dtype=torch.float32)
        if f"{name}_absmax" not in state:
            return state[name]
        code = dynamic_code(signed=name == "m")
        return dequantize(state[name], state[f"{name}_absmax"], code, p.numel()).view(p.shape)

    def _write(self, state, name, moment):
        if moment.numel() < 4096:
            state[name] = moment.clone()
        else:
            code = dynamic_code(signed=name == "m")
            state[name], state[f"{name}_absmax"] = quantize(moment, code, BLOCK_8BIT)
