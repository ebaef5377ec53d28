"""Wrong answers to exercise 04: (check, source of the answer, part of the message expected)."""


def _fixed(parameters, gradients, optimizer):
    return f"""
def fixed_bytes(trainable, frozen, half_base):
    both = trainable + frozen
    return {{"parameters": {parameters}, "gradients": {gradients}, "optimizer": {optimizer}}}
"""


def _kept(rule, size="t.untyped_storage().nbytes()", key="t.untyped_storage().data_ptr()"):
    return f"""
import torch

def kept_bytes(function, parameters, inputs):
    known = {{p.data_ptr() for p in parameters}}
    seen, total = set(), 0

    def pack(t):
        nonlocal total
        if {rule}:
            total += {size}
        seen.add({key})
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*inputs)
    return total
"""


def _mlp(formula):
    return f"""
def mlp_bytes(batch, seq, hidden, inner, trained):
    tokens = batch * seq
    return {formula}
"""


def _round(absmax="blocks.abs().amax(1)", borders="(code[:-1] + code[1:]) / 2", clamp=True,
           restored="code[indices] * absmax[:, None]"):  # fmt: skip
    return f"""
import torch

def round_trip(x, code, block_size):
    blocks = x.view(-1, block_size)
    absmax = {absmax}
    scaled = blocks / absmax{".clamp(min=1e-30)" if clamp else ""}[:, None]
    indices = torch.bucketize(scaled, {borders})
    restored = {restored}
    return indices.flatten(), absmax, restored.flatten()
"""


POINTER = "t.untyped_storage().data_ptr()"
WRONG = [
    ("fixed_bytes", _fixed("4 * both", "4 * both", "8 * trainable"), "has no gradient"),
    ("fixed_bytes", _fixed("4 * both", "4 * trainable", "8 * both"), "only of what it trains"),
    ("fixed_bytes", _fixed("4 * both", "4 * trainable", "4 * trainable"), "more than one moment"),
    (
        "fixed_bytes",
        _fixed("(2 if half_base else 4) * both", "4 * trainable", "8 * trainable"),
        "stay in float32",
    ),
    ("fixed_bytes", _fixed("4 * both", "4 * trainable", "8 * trainable"), "two bytes, not four"),
    ("kept_bytes", _kept("t.data_ptr() not in known", "t.numel()"), "elements, not bytes"),
    ("kept_bytes", _kept("t.data_ptr() not in known"), "count that memory twice"),
    (
        "kept_bytes",
        _kept(f"{POINTER} not in seen | known", "t.nbytes"),
        "keeps the whole of it alive",
    ),
    ("kept_bytes", _kept(f"{POINTER} not in seen"), "which stands anyway"),
    (
        "mlp_bytes",
        _mlp("3 * tokens * inner + trained * tokens * (hidden + inner)"),
        "a float32 number has four bytes",
    ),
    ("mlp_bytes", _mlp("4 * tokens * (4 * inner + hidden)"), "the other way round"),
    ("mlp_bytes", _mlp("4 * tokens * 2 * inner"), "the product keeps both factors"),
    (
        "mlp_bytes",
        _mlp("4 * tokens * (3 * inner + trained * (2 * hidden + inner))"),
        "read the same x",
    ),
    ("mlp_bytes", _mlp("4 * tokens * (3 * inner + trained * hidden)"), "inner size is missing"),
    ("round_trip", _round("blocks.abs().max().view(1)"), "one scale for the whole"),
    ("round_trip", _round("blocks.amax(1)"), "not the largest magnitude"),
    ("round_trip", _round(borders="code[1:]"), "not the nearest"),
    ("round_trip", _round(restored="code[indices]"), "undo the division"),
    (
        "round_trip",
        _round(clamp=False, restored="(scaled + (code[indices] - scaled)) * absmax[:, None]"),
        "gives NaN",
    ),  # noqa: E501
    # Found by solving the tasks afresh.
    (
        "fixed_bytes",
        _fixed(
            "4 * trainable + (2 if half_base else 4) * frozen",
            "(2 if half_base else 4) * trainable",
            "8 * trainable",
        ),
        "gradients stay float32",
    ),
    (
        "fixed_bytes",
        _fixed(
            "4 * trainable + (2 if half_base else 4) * frozen",
            "4 * trainable",
            "(4 if half_base else 8) * trainable",
        ),
        "moments are float32 even",
    ),
    (
        "fixed_bytes",
        _fixed("4 * trainable + 2 * frozen", "4 * trainable", "8 * trainable"),
        "only with half_base",
    ),
    ("fixed_bytes", _fixed("4 * trainable", "4 * trainable", "8 * trainable"), "take up memory"),
    ("fixed_bytes", _fixed("4 * both", "4 * trainable", "12 * trainable"), "counted elsewhere"),
    ("fixed_bytes", _fixed("4 * both / 1", "4 * trainable", "8 * trainable"), "whole numbers"),
    (
        "kept_bytes",
        _kept(f"{POINTER} not in seen | known", "4 * len(t.untyped_storage()) // t.element_size()"),
        "not every number has four bytes",
    ),
    ("kept_bytes", _kept("tuple(t.shape) not in seen", key="tuple(t.shape)"), "of one shape"),
    (
        "kept_bytes",
        """
import torch

def kept_bytes(function, parameters, inputs):
    result, sizes = function(*inputs), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, id):
        result.sum()
    return sum(sizes)
""",
        "Is the hook active in time?",
    ),
    (
        "kept_bytes",
        _kept(f"{POINTER} not in seen | known", "torch.tensor(t.untyped_storage().nbytes())"),
        "one whole number of bytes",
    ),
    ("mlp_bytes", _mlp("4 * seq * (3 * inner + trained * (hidden + inner))"), "every row"),
    ("mlp_bytes", _mlp("2 * tokens * (3 * inner + trained * (hidden + inner))"), "a 16-bit type"),
    (
        "mlp_bytes",
        _mlp("4 * tokens * (3 * inner + trained * (hidden + inner)) + 12 * hidden * inner"),
        "weights are counted",
    ),
    ("mlp_bytes", _mlp("4 * tokens * (3 * inner + hidden + trained * inner)"), "x itself"),
    (
        "mlp_bytes",
        _mlp("4 * tokens * (3 * inner + 2 * hidden + trained * (hidden + inner))"),
        "the output of down",
    ),
    ("round_trip", _round().replace("indices.flatten()", "indices"), "one row per block"),
    ("round_trip", _round().replace("indices.flatten()", "code[indices].flatten()"), "floats"),
    ("round_trip", _round().replace("block_size)\n    absmax", "4)\n    absmax"), "is a 4 written"),
    ("round_trip", _round().replace("1e-30", "1e-5"), "near 1e-6"),
    (
        "round_trip",
        _round().replace("blocks / absmax", "blocks.div_(9).mul_(9.5) / absmax"),
        "belongs to the caller",
    ),
]
