"""Checks of exercise 11: they name the mistake and stay silent about the solution."""

import copy

import torch
from torch import nn

from checks import Mistake
from minipeft import load_base


def _layer(answer, r=4, alpha=8, dropout=0.0, dtype=torch.float32, width=(6, 10)):
    torch.manual_seed(0)
    base = nn.Linear(*width, dtype=dtype)
    return answer(base, r, alpha, dropout).eval(), copy.deepcopy(base)


def _fill(layer):
    """Random numbers in A and B, whichever of them starts at zero."""
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()


def lora_layer(answer):
    """Check a class (base, r, alpha, dropout) -> a module with base, lora_A, lora_B."""
    layer, base = _layer(answer)
    for name in ("base", "lora_A", "lora_B"):
        if not hasattr(layer, name):
            raise Mistake(f"The layer has no attribute {name}.")
    for name, shape in (("lora_A", (4, 6)), ("lora_B", (10, 4))):
        matrix = getattr(layer, name)
        if not isinstance(matrix, nn.Parameter):
            raise Mistake(
                f"{name} is a {type(matrix).__name__}. The task asks for the matrix itself, an "
                "nn.Parameter: a plain tensor would be found by no optimiser, and of an nn.Linear "
                "the merge would have to know."
            )
        if tuple(matrix.shape) != shape:
            raise Mistake(
                f"{name} has the shape {tuple(matrix.shape)}; for r=4 and a layer from 6 to 10 "
                f"features it must be {shape}."
            )
    if layer.base.weight.requires_grad or layer.base.bias.requires_grad:
        raise Mistake("The base layer is not frozen: its weight or its bias still requires grad.")
    x = torch.randn(2, 3, 6)
    if not layer.lora_A.any() and not layer.lora_B.any():
        raise Mistake(
            "A and B both start at zero. Each one's gradient is a product with the other, so "
            "neither ever gets one: this layer cannot learn."
        )
    if len(layer.lora_A.unique(dim=0)) == 1 and layer.lora_A.any():
        raise Mistake(
            "All rows of A start alike, so they get the same gradient for ever: whatever r is, the "
            "change has rank 1."
        )
    if not torch.equal(layer(x), base(x)):
        raise Mistake(
            "Before any training the output already differs from that of the base layer. Which of "
            "the two matrices starts at zero?"
        )
    _fill(layer)
    change = layer(x) - base(x)
    product = x @ layer.lora_A.T @ layer.lora_B.T
    ratio = (change / product).median().item()
    if not torch.allclose(change, product * ratio, atol=1e-4):
        raise Mistake("The change of the output is not a multiple of B A x.")
    if abs(ratio - 2) > 1e-3:
        hint = {1.0: "alpha is not used", 0.5: "it is r/alpha", 8.0: "it is alpha alone"}
        hint = hint.get(round(ratio, 3), "that is something else")
        raise Mistake(f"With r=4 and alpha=8, B A x is multiplied by {ratio:.3g}: {hint}.")
    odd, base_of_odd = _layer(answer, alpha=6)
    _fill(odd)
    product = 1.5 * x @ odd.lora_A.T @ odd.lora_B.T
    if not torch.allclose(odd(x) - base_of_odd(x), product, atol=1e-4):
        raise Mistake("With r=4 and alpha=6 the factor is not 1.5. Is alpha / r cut to an integer?")
    x.requires_grad_(True)
    layer(x).sum().backward()
    if layer.lora_A.grad is None or layer.lora_B.grad is None:
        raise Mistake("No gradient arrives at lora_A or lora_B. Was something detached?")
    whole = layer.base.weight + 2 * layer.lora_B @ layer.lora_A
    if not torch.allclose(x.grad, whole.sum(0).expand_as(x), atol=1e-4):
        raise Mistake(
            "The gradient that goes on to x lacks a part. The base is frozen by requires_grad; "
            "under no_grad or detach, the layers below it would not learn from it."
        )
    x = x.detach()
    layer, base = _layer(answer, dropout=0.5)
    _fill(layer)
    if not torch.equal(layer(x), layer(x)):
        raise Mistake("With dropout, two calls in eval mode differ: dropout is for training only.")
    layer.train()
    if torch.equal(layer(x), layer(x)):
        raise Mistake("With dropout=0.5, two calls in training mode are equal: nothing is dropped.")
    with torch.no_grad():
        layer.lora_B.zero_()
    if not torch.equal(layer(x), base(x)):
        raise Mistake("Dropout also hits the frozen path; it belongs to the low-rank path alone.")
    with torch.no_grad():  # with all rows of A alike, what comes out of A is r times one number
        layer.lora_A.copy_(layer.lora_A[:1].expand(4, -1))
        layer.lora_B.copy_(torch.eye(10)[:, :4])
    z = (layer(x) - base(x))[..., :4]
    if not torch.allclose(z, z[..., :1].expand_as(z), atol=1e-5):
        raise Mistake("Dropout hits what comes out of A; it belongs to x, before A.")
    layer, base = _layer(answer, dtype=torch.bfloat16)
    if layer.lora_A.dtype != torch.float32 or layer.lora_B.dtype != torch.float32:
        raise Mistake(
            "On a bfloat16 base, lora_A or lora_B is not float32: small updates would round away."
        )
    try:
        half = layer(x.bfloat16())
    except RuntimeError as error:
        raise Mistake(
            f"On a bfloat16 base forward fails: {str(error).splitlines()[0]}. Cast x for A, and "
            "the sum back."
        ) from error
    if half.dtype != torch.bfloat16:
        raise Mistake(
            "On a bfloat16 base the output is no longer bfloat16; the next layer needs it."
        )


def merge(answer, layer_class):
    """Check a function (layer) -> a plain nn.Linear that does the same; also takes task 1."""
    layer, base = _layer(layer_class)
    _fill(layer)
    weight = layer.base.weight.clone()
    x = torch.randn(2, 3, 6)
    expected = layer(x)
    try:
        merged = answer(layer)
    except RuntimeError as error:
        raise Mistake(
            f"Merging raises an error: {error}. Look at the shapes of B and A."
        ) from error
    if type(merged) is not nn.Linear:
        raise Mistake(f"Return a plain nn.Linear; this is a {type(merged).__name__}.")
    if not torch.equal(layer.base.weight, weight):
        raise Mistake(
            "Merging changed the weight of the base layer itself. Merge once more, and the change "
            "would be in it twice."
        )
    if merged.bias is None or not torch.equal(merged.bias, base.bias):
        raise Mistake("The bias of the base layer got lost.")
    got = merged(x)
    if torch.allclose(got, base(x)):
        raise Mistake("The merged layer is the base layer: the change is not in it.")
    if not torch.allclose(got, expected, atol=1e-5):
        product = x @ layer.lora_A.T @ layer.lora_B.T
        if torch.allclose(got, base(x) + product, atol=1e-5):
            raise Mistake("The merged layer forgets the scaling: it adds B A as it is.")
        raise Mistake("The merged layer does not give the output of the unmerged one.")


class _Names(nn.Module):
    """A block in which one name begins with another, and one ends with it."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.q_proj_extra = nn.Linear(4, 4), nn.Linear(4, 4)
        self.my_q_proj, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)


def add_lora(answer, layer_class):
    """Check a function (model, r, alpha, targets) -> the model, given the class of task 1."""
    model = nn.ModuleDict({"first": _Names(), "second": _Names()})
    result = answer(model, 2, 4, ("q_proj",))
    if result is not model:
        raise Mistake("Return the model that was passed in, changed in place.")
    wrapped = [name for name, m in model.named_modules() if isinstance(m, layer_class)]
    if any("extra" in name for name in wrapped):
        raise Mistake(
            "q_proj_extra got LoRA although only q_proj was asked for. Compare the whole last part "
            "of the name, not a piece of it."
        )
    if any("my_" in name for name in wrapped):
        raise Mistake(
            "my_q_proj got LoRA although only q_proj was asked for. Its name ends in q_proj, but "
            "the last part of it is another."
        )
    if any(name.count("base") for name in wrapped):
        raise Mistake(f"{wrapped[-1]}: a layer inside a LoRA layer was wrapped again.")
    if wrapped != ["first.q_proj", "second.q_proj"]:
        raise Mistake(
            f"With targets=('q_proj',), these got LoRA: {wrapped}. It should be both q_proj."
        )
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n for n in trainable if "lora_" not in n}
    if frozen:
        raise Mistake(f"{sorted(frozen)[0]} still requires grad: only A and B are to be trained.")
    if len(trainable) != 4:
        raise Mistake(f"{len(trainable)} tensors are trainable instead of two A and two B.")
    try:
        answer(nn.ModuleDict({"first": _Names()}), 2, 4, ("no_such_layer",))
    except ValueError:
        pass
    else:
        raise Mistake("A target that no layer has is passed over in silence; raise a ValueError.")
    llama, _ = load_base("tiny-llama", device="cpu")
    ids = torch.arange(5, 13).reshape(2, 4)
    before = llama(ids).logits
    answer(llama, 4, 8, ("q_proj", "v_proj"))
    if not torch.equal(llama(ids).logits, before):
        raise Mistake("A tiny Llama gives other logits with untrained LoRA than without.")


def count(answer):
    """Check a function (shapes, r) -> number of trainables, shapes being (in, out) pairs."""
    shapes = [(576, 576), (576, 192)] * 30
    got = answer(shapes, 8)
    if got == sum(a * b for a, b in shapes):
        raise Mistake("That is the size of the weights themselves, which are frozen.")
    if got == sum(8 * a * 2 for a, _ in shapes):
        raise Mistake("The layers are not all square: B has as many rows as the layer has outputs.")
    if got == sum(8 * a for a, _ in shapes) or got == sum(8 * b for _, b in shapes):
        raise Mistake("Only one of A and B is counted.")
    if got != sum(8 * (a + b) for a, b in shapes):
        raise Mistake(f"{got} is not the number of entries of A and B of 60 layers with r=8.")
