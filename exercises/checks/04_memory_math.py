"""Checks of exercise 04: they name the mistake and stay silent about the solution."""

import torch
from torch import nn
from torch.nn.functional import silu

from checks import Mistake


def fixed_bytes(answer):
    """Check a function (trainable, frozen, half_base) -> bytes of three parts."""
    for trainable, frozen, half in (
        (1000, 0, False),
        (10, 990, False),
        (10, 990, True),
        (7, 0, True),
    ):
        parts = answer(trainable, frozen, half)
        wanted = {"parameters", "gradients", "optimizer"}
        if not isinstance(parts, dict) or set(parts) != wanted:
            raise Mistake(f"Return a dict with the keys {', '.join(sorted(wanted))}.")
        case = f"With {trainable} trainable and {frozen} frozen parameters"
        if not all(isinstance(size, int) for size in parts.values()):
            raise Mistake(f"{case}: bytes are whole numbers, but you return {parts}.")
        if half and parts["gradients"] == 2 * trainable:
            raise Mistake(f"{case}: half_base is about the frozen ones; gradients stay float32.")
        if half and parts["optimizer"] == 4 * trainable:
            raise Mistake(f"{case}: the moments are float32 even on a bfloat16 base.")
        if not half and parts["parameters"] == 4 * trainable + 2 * frozen and frozen:
            raise Mistake(f"{case}: the frozen ones have two bytes only with half_base.")
        if parts["parameters"] == 4 * trainable and frozen:
            raise Mistake(f"{case}: frozen parameters take up memory too.")
        if parts["optimizer"] == 12 * trainable:
            raise Mistake(f"{case}: the optimizer has two moments; the rest is counted elsewhere.")
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
            raise Mistake(f"{case}: the optimizer takes {parts['optimizer']} bytes; count again.")
        expected = 4 * trainable + (2 if half else 4) * frozen
        if half and parts["parameters"] == 2 * (trainable + frozen):
            raise Mistake(f"{case} on a bfloat16 base: the trainable ones stay in float32.")
        if half and frozen and parts["parameters"] == 4 * (trainable + frozen):
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
    if answer(lambda x: x * big[:4], [], [x]) != 3200:
        raise Mistake("A second call counts otherwise: something is kept from the first.")
    wide = torch.randn(4, 8, dtype=torch.float64, requires_grad=True)
    got = answer(lambda x: x.exp(), [], [wide])
    if got == 128:
        raise Mistake("exp keeps 32 float64 numbers: not every number has four bytes.")
    if got != 256:
        raise Mistake(f"exp keeps one float64 tensor of 256 bytes; you count {got}.")
    got = answer(lambda x: x + 1, [], [x])
    if got:
        raise Mistake(f"A sum keeps nothing, but you count {got} bytes.")
    got = answer(lambda x: x.exp().exp().exp(), [], [x])
    if got == 128:
        raise Mistake("Three tensors of one shape are kept, and you count one of them.")
    if got != 3 * 128:
        raise Mistake(f"Three exps in a row keep 384 bytes; you count {got}.")
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
    for sizes in ((3, 5, 8, 20), (1, 7, 12, 16), (2, 4, 9, 4)):
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
            if got in (truth // b, truth // s):
                raise Mistake(f"{case}, {state}: every token of every row keeps its own.")
            if 2 * got == truth:
                raise Mistake(f"{case}, {state}: float32 was asked for, not a 16-bit type.")
            if got == truth + 4 * (3 * h * i):
                raise Mistake(f"{case}, {state}: the weights are counted, which stand anyway.")
            if got == truth + 4 * b * s * h and not trained:
                raise Mistake(f"{case}, {state}: x itself is not kept if no weight needs it.")
            if got == truth + 4 * b * s * h * 2:
                raise Mistake(f"{case}, {state}: the output of down is not kept by the MLP.")
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
    before = x.clone()
    result = answer(x, code, 4)
    if not torch.equal(x, before):
        raise Mistake("x itself was changed: it belongs to the caller.")
    if not isinstance(result, tuple) or len(result) != 3:
        raise Mistake("Return three tensors: indices, absmax, restored.")
    indices, absmax, restored = result
    if not indices.dtype.is_floating_point and indices.shape == (3, 4):
        raise Mistake("indices must be one-dimensional like x, not one row per block.")
    if indices.dtype.is_floating_point:
        raise Mistake("The indices are whole numbers, but yours are floats. Are they the values?")
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
            "or another element got one that is not the nearest. A border lies halfway between "
            "two codes."
        )
    expected = code[nearest] * largest.repeat_interleave(4)
    if torch.allclose(restored, code[nearest]):
        raise Mistake("restored is still in units of its block; undo the division.")
    if not torch.allclose(restored, expected):
        raise Mistake(f"restored should be {expected.tolist()}, but is {restored.tolist()}.")
    other, small = torch.tensor([-1.0, 0.0, 0.3, 1.0]), torch.tensor([3e-6, -1e-6, -4e-6, 1e-6])
    if answer(x, other, 3)[1].shape != (4,):
        raise Mistake("With blocks of 3 the 12 numbers have 4 blocks: is a 4 written in your code?")
    found = answer(small, other, 2)
    if found[0].tolist() != [3, 1, 0, 2] or not torch.allclose(
        found[2], torch.tensor([3e-6, 0, -4e-6, 1.2e-6]), atol=0
    ):
        raise Mistake(f"Numbers near 1e-6 come back as {found[2].tolist()} with the code {other}.")
    zeros = answer(torch.zeros(4), code, 4)[2]
    if zeros.isnan().any():
        raise Mistake("A block of zeros gives NaN: its scale is zero, and you divide by it.")
    if zeros.abs().max() > 0:
        raise Mistake("A block of zeros does not come back as zeros.")
