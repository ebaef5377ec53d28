"""Right answers to exercise 04, written in other ways: (check, source of the answer)."""

RIGHT = [
    (
        "fixed_bytes",
        """
def fixed_bytes(trainable, frozen, half_base):
    base = torch.bfloat16 if half_base else torch.float32
    one = torch.float32.itemsize
    return dict(
        optimizer=2 * one * trainable,
        gradients=one * trainable,
        parameters=one * trainable + base.itemsize * frozen,
    )
""",
    ),
    (
        "kept_bytes",
        """
def kept_bytes(function, parameters, inputs):
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        result = function(*inputs)
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved}
    for p in parameters:
        sizes.pop(p.untyped_storage().data_ptr(), None)
    return sum(sizes.values())
""",
    ),
    (
        "mlp_bytes",
        """
def mlp_bytes(batch, seq, hidden, inner, trained):
    widths = [inner, inner, inner] + ([hidden, inner] if trained else [])
    return sum(4 * batch * seq * width for width in widths)
""",
    ),
    (
        "round_trip",
        """
def round_trip(x, code, block_size):
    indices, scales, back = [], [], []
    for block in x.split(block_size):
        scale = block.abs().max()
        unit = block / scale if scale > 0 else block
        nearest = (unit[:, None] - code[None]).abs().argmin(1)
        indices.append(nearest)
        scales.append(scale)
        back.append(code[nearest] * scale)
    return torch.cat(indices), torch.stack(scales), torch.cat(back)
""",
    ),
]
