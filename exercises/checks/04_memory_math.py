"""Checks of exercise 04: they name the mistake and stay silent about the solution."""

import torch
from torch import nn
from torch.nn.functional import silu

from checks import Mistake


def fixed_bytes(answer):
    """Check a function (trainable, frozen, half_base) -> bytes of three parts."""
    for trainable, frozen, half in ((1000, 0, False), (10, 990, False), (10, 990, True)):
        parts = answer(trainable, frozen, half)
        wanted = {"parameters", "gradients", "optimizer"}
        if not isinstance(parts, dict) or set(parts) != wanted:
            raise Mistake(f"Return a dict with the keys {', '.join(sorted(wanted))}.")
        case = f"With {trainable} trained and {frozen} frozen parameters"
        if parts["gradients"] == 4 * (trainable + frozen) != 4 * trainable:
            raise Mistake(f"{case}: a frozen parameter has no gradient, not even one of zeros.")
        if parts["gradients"] != 4 * trainable:
            raise Mistake(
                f"{case}: the gradients take {parts['gradients']} bytes in your answer. They have "
                "the type of the parameter."
            )
        if parts["optimizer"] == 8 * (trainable + frozen) != 8 * trainable:
            raise Mistake(f"{case}: AdamW keeps moments only of what it trains.")
        if parts["optimizer"] == 4 * trainable:
            raise Mistake(f"{case}: AdamW keeps more than one moment of each parameter.")
        if parts["optimizer"] != 8 * trainable:
            raise Mistake(f"{case}: the optimiser takes {parts['optimizer']} bytes; count again.")
        expected = 4 * trainable + (2 if half else 4) * frozen
        if half and parts["parameters"] == 2 * (trainable + frozen):
            raise Mistake(f"{case} on a bfloat16 base: the trained ones stay in float32.")
        if half and parts["parameters"] == 4 * (trainable + frozen):
            raise Mistake(f"{case}: with half_base the frozen ones have two bytes, not four.")
        if parts["parameters"] != expected:
            raise Mistake(f"{case}: the parameters take {parts['parameters']} bytes; count again.")


def kept_bytes(answer):
    """Check a function (function, parameters, inputs) -> bytes."""
    x = torch.randn(4, 8, requires_grad=True)
    got = answer(lambda x: x.exp(), [], [x])
    if not isinstance(got, int):
        raise Mistake(f"Return one whole number of bytes, not {type(got).__name__}.")
    if got == 32:
        raise Mistake("exp keeps 4 x 8 float32 numbers: you count elements, not bytes.")
    if got == 0:
        raise Mistake("exp keeps its output, yet you count nothing. Is the hook active in time?")
    if got != 128:
        raise Mistake(f"exp keeps one tensor of 128 bytes; you count {got}.")
    y = torch.randn(4, 8, requires_grad=True)
    got = answer(lambda x, y: (x * y) + (x.view(8, 4) * y.view(8, 4)).view(4, 8), [], [x, y])
    if got == 4 * 128:
        raise Mistake(
            "Two products keep x and y, once as they are and once as views of the same memory. You "
            "count that memory twice."
        )
    if got != 2 * 128:
        raise Mistake(f"x and y take 256 bytes, and are all that is kept here; you count {got}.")
    big = torch.randn(100, 8)
    got = answer(lambda x: x * big[:4], [], [x])
    if got == 128:
        raise Mistake(
            "A saved slice of a larger tensor keeps the whole of it alive; you count the slice."
        )
    if got != 3200:
        raise Mistake(f"A slice of a tensor of 3,200 bytes is kept; you count {got}.")
    layer = nn.Linear(8, 16, bias=False)
    got = answer(layer, list(layer.parameters()), [x])
    if got == 128 + 512:
        raise Mistake("A linear layer saves its weight too, which stands anyway: do not count it.")
    if got != 128:
        raise Mistake(f"A trained linear layer keeps its input, 128 bytes; you count {got}.")


def _truth(batch, seq, hidden, inner, trained):
    gate, up = nn.Linear(hidden, inner, bias=False), nn.Linear(hidden, inner, bias=False)
    down = nn.Linear(inner, hidden, bias=False)
    weights = [layer.weight.requires_grad_(trained) for layer in (gate, up, down)]
    known = {w.data_ptr() for w in weights}
    saved = {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in known:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    x = torch.randn(batch, seq, hidden, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        _ = down(silu(gate(x)) * up(x))
    return sum(saved.values())


def mlp_bytes(answer):
    """Check a function (batch, seq, hidden, inner, trained) -> bytes, against torch."""
    for sizes in ((2, 3, 8, 20), (1, 7, 12, 16)):
        b, s, h, i = sizes
        case = f"batch {b}, seq {s}, hidden {h}, inner {i}"
        for trained in (False, True):
            truth, got = _truth(*sizes, trained), answer(*sizes, trained)
            state = "trained" if trained else "frozen"
            if got == truth:
                continue
            if 4 * got == truth:
                raise Mistake(f"{case}: you count numbers; a float32 number has four bytes.")
            if got == _truth(*sizes, not trained):
                raise Mistake(
                    f"{case}, {state}: that is what is kept with the weights the other way round. "
                    "A linear layer needs its input only for the gradient of its weight."
                )
            if trained and got == truth + 4 * b * s * h:
                raise Mistake(f"{case}: gate and up read the same x, which is kept once.")
            if trained and got == truth - 4 * b * s * i:
                raise Mistake(f"{case}, {state}: one of the tensors of inner size is missing.")
            if not trained and got == truth - 4 * b * s * i:
                raise Mistake(
                    f"{case}, {state}: silu keeps its input, and the product keeps both factors."
                )
            raise Mistake(f"{case}, {state}: torch keeps {truth} bytes, your formula says {got}.")


def round_trip(answer):
    """Check a function (x, code, block_size) -> (indices, absmax, restored)."""
    code = torch.tensor([-1.0, -0.5, -0.1, 0.0, 0.2, 0.6, 1.0])
    x = torch.tensor([0.05, -0.2, 0.11, 0.19, 8.0, 1.0, -3.0, 5.1, -6.0, 1.0, 2.0, -2.5])
    result = answer(x, code, 4)
    if not isinstance(result, tuple) or len(result) != 3:
        raise Mistake("Return three tensors: indices, absmax, restored.")
    indices, absmax, restored = result
    if absmax.numel() == 1:
        raise Mistake("There is one scale for the whole of x: an outlier spoils every block.")
    if absmax.shape != (3,):
        raise Mistake(f"x has 3 blocks of 4, but absmax has the shape {tuple(absmax.shape)}.")
    if torch.allclose(absmax, x.view(3, 4).amax(1)):
        raise Mistake(
            "The scale of the last block is 2, yet it holds -6: the largest is not the largest "
            "magnitude."
        )
    largest = torch.tensor([0.2, 8.0, 6.0])
    if not torch.allclose(absmax, largest):
        raise Mistake(f"absmax should be {largest.tolist()}, but is {absmax.tolist()}.")
    if indices.shape != x.shape or restored.shape != x.shape:
        raise Mistake("indices and restored must be as long as x.")
    nearest = (x.view(3, 4, 1) / largest[:, None, None] - code).abs().argmin(-1).flatten()
    if not torch.equal(indices.long(), nearest):
        raise Mistake(
            f"x / scale = {x[0] / 0.2:.2f} got the code {code[indices[0].long().clamp(0, 6)]:.1f}, "
            "or another element got one that is not the nearest. A border lies half way between "
            "two codes."
        )
    expected = code[nearest] * largest.repeat_interleave(4)
    if torch.allclose(restored, code[nearest]):
        raise Mistake("restored is still in units of its block; undo the division.")
    if not torch.allclose(restored, expected):
        raise Mistake(f"restored should be {expected.tolist()}, but is {restored.tolist()}.")
    zeros = answer(torch.zeros(4), code, 4)[2]
    if zeros.isnan().any():
        raise Mistake("A block of zeros gives NaN: its scale is zero, and you divide by it.")
    if zeros.abs().max() > 0:
        raise Mistake("A block of zeros does not come back as zeros.")
