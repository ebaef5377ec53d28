"""Checks of exercise 11: they name the mistake and stay silent about the solution."""

import contextlib
import copy

import torch
from torch import nn

from checks import Mistake, first_line
from minipeft import load_base

# (in, out, r, alpha, with a bias?): two layers that agree in nothing
LAYERS = ((6, 10, 4, 12, True), (9, 3, 2, 3, False))


def _close(a, b, atol=1e-4):
    return torch.allclose(a, b, rtol=1e-4, atol=atol)


def _first_line(error):
    return first_line(error).rstrip(".!")


def low_rank(answer):
    """Check a function (x, A, B, scaling, dropout, training) -> (batch, seq, out)."""
    for width, out, r, scaling in ((6, 10, 4, 2.0), (9, 3, 2, 0.75)):
        torch.manual_seed(0)
        x, a, b = torch.randn(2, 3, width), torch.randn(r, width), torch.randn(out, r)
        _value(answer, x, a, b, scaling)
        _path_gradients(answer, x, a, b, scaling)
    for p in (0.2, 0.6):
        _dropped(answer, p)
    _dropout_place(answer)
    _precision(answer)


def _value(answer, x, a, b, scaling):
    product = x @ a.T @ b.T
    try:
        got = answer(x, a, b, scaling, 0.0, False)
    except RuntimeError as error:
        raise Mistake(
            f"The shapes do not fit: {_first_line(error)}. The formula writes one token as a "
            "column; in x, the numbers of a token are the last dimension."
        ) from error
    if not isinstance(got, torch.Tensor):
        raise Mistake(f"The result is a {type(got).__name__}, not a tensor.")
    if got.shape != product.shape:
        raise Mistake(
            f"The result has the shape {tuple(got.shape)}; (batch, seq, out) is "
            f"{tuple(product.shape)} here."
        )
    if _close(got, scaling * product):
        in_training = answer(x, a, b, scaling, 0.0, True)
        if not in_training.any():
            raise Mistake(
                "With dropout=0.0 and training=True everything is dropped. dropout is the share "
                "that goes, not the share that stays."
            )
        if not _close(in_training, got):
            raise Mistake("With dropout=0.0, training=True still gives another result than False.")
        return
    for factor, what in (
        (1, "scaling is not used"),
        (2, "that was the scaling of the call before"),
        (scaling**2, "scaling is in it twice"),
        (1 / scaling, "it is divided by scaling"),
    ):
        if _close(got, factor * product):
            raise Mistake(f"With scaling={scaling} the result is {factor:.3g} B A x: {what}.")
    raise Mistake(f"With scaling={scaling} and without dropout, the result is not s B A x.")


def _path_gradients(answer, x, a, b, scaling):
    """Refuse a result from which some gradient does not flow back."""
    mine = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    true = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    got = answer(*mine, scaling, 0.0, True)
    if not got.requires_grad:
        raise Mistake("No gradient flows back from the result: it was computed under no_grad.")
    got.square().sum().backward()
    (scaling * true[0] @ true[1].T @ true[2].T).square().sum().backward()
    for name, one, other in zip(("x", "lora_A", "lora_B"), mine, true, strict=True):
        if one.grad is None or not torch.allclose(one.grad, other.grad, rtol=1e-3, atol=1e-2):
            raise Mistake(f"The gradient of {name} is missing or wrong. Was something detached?")


def _dropped(answer, p):
    """Look at the entries themselves: with two identity matrices, drop(x) is the result."""
    torch.manual_seed(0)
    x, eye = torch.ones(4, 250, 8), torch.eye(8)
    given, case = x.clone(), f"With dropout={p} in training mode"
    got = answer(x, eye, eye, 1.0, p, True)
    if not torch.equal(x, given):
        raise Mistake(f"{case}, the caller's x was changed in place. The frozen path reads it too.")
    zero = got == 0
    share = zero.float().mean().item()
    if share == 0:
        raise Mistake(f"{case}, no entry becomes zero: nothing is dropped.")
    if (zero == zero[:, :, :1]).all():
        raise Mistake(f"{case}, whole tokens are dropped instead of single entries.")
    if (zero == zero[:, :1]).all():
        raise Mistake(f"{case}, every token of a row loses the same entries.")
    if abs(share - p) > 0.05:
        raise Mistake(f"{case}, {100 * share:.0f} % of the entries are dropped.")
    if not _close(got[~zero], torch.tensor(1 / (1 - p))):
        raise Mistake(
            f"{case}, the entries that stay are multiplied by {got[~zero].mean():.3g} instead of "
            f"{1 / (1 - p):.3g}. Otherwise the output is larger in eval mode than in training."
        )
    if torch.equal(zero, answer(x, eye, eye, 1.0, p, True) == 0):
        raise Mistake(f"{case}, a second call drops the same entries as the first.")
    if not torch.equal(answer(x, eye, eye, 1.0, p, False), x):
        raise Mistake(f"With dropout={p} and training=False, entries are still dropped.")


def _dropout_place(answer):
    """With all rows of A alike, what comes out of A is r times one number."""
    torch.manual_seed(0)
    x, a = torch.randn(2, 3, 6), torch.randn(1, 6).expand(4, 6)
    z = answer(x, a, torch.eye(4), 1.0, 0.5, True)
    if not _close(z, z[..., :1].expand_as(z)):
        raise Mistake("Dropout hits what comes out of A; it belongs to x, before A.")


def _precision(answer):
    torch.manual_seed(0)
    x, a, b = torch.randn(2, 3, 64), torch.randn(8, 64), torch.randn(5, 8)
    half = x.bfloat16()
    try:
        got = answer(half, a, b, 0.5, 0.0, True)
    except RuntimeError as error:
        raise Mistake(
            f"With x in bfloat16 and A and B in float32 it fails: {_first_line(error)}. Which "
            "dtype do the products have, and what is cast to it?"
        ) from error
    if got.dtype != torch.bfloat16:
        raise Mistake(
            f"With x in bfloat16 the result is {got.dtype}. It should have the dtype of x."
        )
    exact = (0.5 * half.float() @ a.T @ b.T).bfloat16()
    if not torch.allclose(got.float(), exact.float(), rtol=2**-7, atol=1e-3):
        raise Mistake(
            "With x in bfloat16 the result is less exact than it could be. The products belong in "
            "the dtype of A; only their result is rounded."
        )
    x, a, b = x.double(), a.double(), b.double()
    try:
        got = answer(x, a, b, 0.5, 0.0, True)
    except RuntimeError as error:
        raise Mistake(
            f"With everything in float64 it fails: {_first_line(error)}. Is a dtype written down "
            "that should be that of A?"
        ) from error
    if not torch.allclose(got, 0.5 * x @ a.T @ b.T, rtol=1e-9):
        raise Mistake("With everything in float64 the result has the precision of float32.")
    try:
        answer(x.to("meta"), a.to("meta"), b.to("meta"), 0.5, 0.5, True)
    except RuntimeError as error:
        if "on the expected device" not in str(error):
            return  # meta tensors have no numbers to look at; a GPU's have
        raise Mistake(
            f"With all tensors on another device than the CPU it fails: {_first_line(error)}. Here "
            "`meta` stands in for a GPU. Was a tensor made without `device`?"
        ) from error


def _layer(answer, width, out, r, alpha, bias, *dropout, dtype=torch.float32):
    """A layer of the learner's class, and a copy of its base."""
    torch.manual_seed(0)
    base = nn.Linear(width, out, bias=bias, dtype=dtype)
    return answer(base, r, alpha, *dropout), copy.deepcopy(base)


def _fill(layer):
    """Random numbers in A and B, whichever of them starts at zero."""
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()


def _product(x, layer):
    """B A x"""
    return x @ layer.lora_A.detach().T @ layer.lora_B.detach().T


def lora_layer(answer):
    """Check a class (base, r, alpha, dropout) -> a module with base, lora_A, lora_B."""
    for setting in LAYERS:
        _parts(answer, *setting)
        _start(answer, *setting)
        _change(answer, *setting)
        _layer_gradients(answer, *setting)
        _modes(answer, *setting)
    _half(answer)
    _on_a_device(answer)


def _parts(answer, width, out, r, alpha, bias):
    base = nn.Linear(width, out, bias=bias)
    layer = answer(base, r, alpha, 0.0)
    for name in ("base", "lora_A", "lora_B"):
        if not hasattr(layer, name):
            raise Mistake(f"The layer has no attribute {name}.")
    if layer.base is not base:
        raise Mistake("layer.base is another module than the one that was passed in.")
    for name, shape in (("lora_A", (r, width)), ("lora_B", (out, r))):
        matrix = getattr(layer, name)
        if not isinstance(matrix, nn.Parameter):
            raise Mistake(
                f"{name} is a {type(matrix).__name__}. The task asks for the matrix itself, an "
                "nn.Parameter: no optimizer would find a plain tensor, and the merge would have to "
                "know about an nn.Linear."
            )
        if tuple(matrix.shape) != shape:
            raise Mistake(
                f"{name} has the shape {tuple(matrix.shape)}; for r={r} and a layer from {width} "
                f"to {out} features it must be {shape}."
            )
    trainable = {name for name, p in layer.named_parameters() if p.requires_grad}
    base_too = sorted(name for name in trainable if name.startswith("base."))
    if base_too:
        raise Mistake(f"The base layer is not frozen: {', '.join(base_too)} can still be trained.")
    for name in ("lora_A", "lora_B"):
        if name not in trainable:
            raise Mistake(f"{name} does not require grad: it was frozen along with the base.")
    if len(trainable) > 2:
        extra = sorted(trainable - {"lora_A", "lora_B"})
        raise Mistake(f"{extra[0]} is trainable too. A and B should be the only ones.")


def _start(answer, width, out, r, alpha, bias):
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.empty then gives NaN, not what lies in memory
    try:
        layer, base = _layer(answer, width, out, r, alpha, bias, 0.0)
    finally:
        torch.use_deterministic_algorithms(before)
    if layer.lora_A.isnan().any() or layer.lora_B.isnan().any():
        raise Mistake("A or B starts as uninitialized memory: torch.empty fills nothing in.")
    if not layer.lora_A.any() and not layer.lora_B.any():
        raise Mistake(
            "A and B both start at zero. Each one's gradient is a product with the other, so "
            "neither ever gets one: this layer cannot learn."
        )
    x = torch.randn(2, 3, width)
    if not torch.equal(layer(x.clone()), base(x)):
        raise Mistake(
            "Before any training the output already differs from that of the base layer. Which of "
            "the two matrices starts at zero?"
        )
    name, start = ("A", layer.lora_A) if layer.lora_A.any() else ("B", layer.lora_B)
    rank = int(torch.linalg.matrix_rank(start.detach()))
    if rank < min(start.shape):
        raise Mistake(
            f"{name} starts with rank {rank}. What starts alike, or at zero, gets gradients that "
            f"are alike, or zero, forever: with r={r}, the change stays at rank {rank}."
        )


def _change(answer, width, out, r, alpha, bias):
    layer, base = _layer(answer, width, out, r, alpha, bias)
    layer.eval()
    x = torch.randn(2, 3, width)
    given, weight = x.clone(), layer.base.weight.clone()
    layer(x)
    _fill(layer)
    change = layer(x) - base(x)
    if not torch.equal(x, given):
        raise Mistake("A call changes the x that it was given, in place.")
    if not torch.equal(layer.base.weight, weight):
        raise Mistake("A call writes into the frozen weight: each further call would add to it.")
    if not change.any():
        raise Mistake(
            "A and B were changed, and the output is still that of the base layer. Is B A computed "
            "once and kept, as in `__init__` or at the first call?"
        )
    product = _product(x, layer)
    ratio = (change / product).median().item()
    if not _close(change, product * ratio):
        raise Mistake("The change of the output is not a multiple of B A x.")
    if abs(ratio - alpha / r) < 1e-3:
        return
    hints = {
        1: "alpha and r are not used",
        r / alpha: "that is r/alpha",
        alpha: "that is alpha alone",
        1 / r: "alpha is not used",
        alpha / r**0.5: "that is alpha divided by the root of r, which is rsLoRA",
        (alpha / r) ** 2: "alpha / r is in it twice",
    }
    if (width, out) == LAYERS[1][:2]:
        hints[alpha // r] = "alpha / r is cut to an integer"
        hints[3] = "that was right for r=4 and alpha=12"
    hint = next((text for value, text in hints.items() if abs(ratio - value) < 1e-3), "")
    raise Mistake(
        f"With r={r} and alpha={alpha}, B A x is multiplied by {ratio:.3g}"
        + (f": {hint}." if hint else f", and not by {alpha / r:.3g}.")
    )


def _layer_gradients(answer, width, out, r, alpha, bias):
    layer, _ = _layer(answer, width, out, r, alpha, bias, 0.0)
    _fill(layer)
    x = torch.randn(2, 3, width, requires_grad=True)
    layer(x).sum().backward()
    if layer.lora_A.grad is None or layer.lora_B.grad is None:
        raise Mistake("No gradient arrives at lora_A or lora_B. Was something detached?")
    whole = layer.base.weight + alpha / r * layer.lora_B @ layer.lora_A
    if x.grad is None or not _close(x.grad, whole.sum(0).expand_as(x)):
        raise Mistake(
            "The gradient that goes on to x lacks a part. The base is frozen by requires_grad; "
            "under no_grad or detach, the layers below it would not learn from it."
        )


def _modes(answer, width, out, r, alpha, bias):
    x = torch.randn(2, 30, width)
    plain, base = _layer(answer, width, out, r, alpha, bias)
    _fill(plain)
    if not _close(plain.train()(x), base(x) + alpha / r * _product(x, plain)):
        raise Mistake("Made without a fourth argument, the layer drops entries in training mode.")
    layer, base = _layer(answer, width, out, r, alpha, bias, 0.5)
    _fill(layer)
    layer.eval()
    if not torch.equal(layer(x), layer(x)):
        raise Mistake("With dropout, two calls in eval mode differ: dropout is for training only.")
    layer.train()
    if torch.equal(layer(x), layer(x)):
        raise Mistake("With dropout=0.5, two calls in training mode are equal: nothing is dropped.")
    with torch.no_grad():
        layer.lora_B.zero_()
    if not torch.equal(layer(x), base(x)):
        raise Mistake("Dropout also hits the frozen path; it belongs to the low-rank path alone.")
    with torch.no_grad():  # the low-rank path now gives alpha times the mean of drop(x)
        layer.lora_A.fill_(1.0 / width)
        layer.lora_B.fill_(1.0)
    gone = (layer(torch.ones_like(x)) - base(torch.ones_like(x))).mean() / alpha
    if abs(gone - 1) > 0.25:
        raise Mistake("With dropout=0.5, the low-rank path has another mean than without.")


def _half(answer):
    width, out, r, alpha, bias = LAYERS[0]
    layer, _ = _layer(answer, width, out, r, alpha, bias, dtype=torch.bfloat16)
    if layer.lora_A.dtype != torch.float32 or layer.lora_B.dtype != torch.float32:
        raise Mistake(
            "On a bfloat16 base, lora_A or lora_B is not float32: small updates would round away."
        )
    if layer.base.weight.dtype != torch.bfloat16:
        raise Mistake("The base came in bfloat16 and is float32 now: twice the memory.")
    x = torch.randn(2, 3, width).bfloat16()
    try:
        half = layer(x)
    except RuntimeError as error:
        raise Mistake(
            f"On a bfloat16 base forward fails: {_first_line(error)}. Cast x for A, and the sum "
            "back."
        ) from error
    if half.dtype != torch.bfloat16:
        raise Mistake(
            "On a bfloat16 base the output is no longer bfloat16; the next layer needs it."
        )


def _on_a_device(answer):
    width, out, r, alpha, _ = LAYERS[0]
    layer = answer(nn.Linear(width, out, device="meta"), r, alpha, 0.0)
    for name in ("lora_A", "lora_B"):
        if getattr(layer, name).device.type != "meta":
            raise Mistake(
                f"{name} is on the CPU although base is on another device (here `meta`, which "
                "stands in for a GPU). There, the first call would fail."
            )


def merge(answer, layer_class):
    """Check a function (layer) -> a plain nn.Linear that does the same; also takes task 2."""
    for setting in LAYERS:
        _merged(answer, layer_class, *setting)
    width, out, r, alpha, bias = LAYERS[0]
    layer, _ = _layer(layer_class, width, out, r, alpha, bias, dtype=torch.bfloat16)
    merged = answer(layer)
    if merged.weight.dtype != torch.bfloat16:
        raise Mistake(f"The base is bfloat16, and the merged weight is {merged.weight.dtype}.")
    meta = None
    with contextlib.suppress(RuntimeError):  # such as "Cannot copy out of meta tensor"
        meta = answer(layer_class(nn.Linear(width, out, device="meta"), r, alpha, 0.0))
    if meta is None or meta.weight.device.type != "meta":
        raise Mistake(
            "The base is on another device than the CPU (here `meta`, which stands in for a GPU), "
            "and the merged layer is on the CPU."
        )


def _merged(answer, layer_class, width, out, r, alpha, bias):
    layer, base = _layer(layer_class, width, out, r, alpha, bias, 0.5)
    _fill(layer)
    before = copy.deepcopy(layer.state_dict())
    trainable = [p.requires_grad for p in layer.parameters()]
    x = torch.randn(2, 3, width)
    try:
        merged = answer(layer)
    except RuntimeError as error:
        if "leaf" in str(error):
            raise Mistake("A parameter is written to while gradients are recorded.") from error
        raise Mistake(
            f"Merging raises an error: {_first_line(error)}. Look at the shapes of B and A."
        ) from error
    except (TypeError, AttributeError) as error:
        if bias:
            raise
        raise Mistake(
            f"Merging a layer without a bias fails: {_first_line(error)}. A Llama's projections "
            "have none."
        ) from error
    if type(merged) is not nn.Linear:
        raise Mistake(f"Return a plain nn.Linear; this is a {type(merged).__name__}.")
    after = layer.state_dict()
    if not torch.equal(after["base.weight"], before["base.weight"]):
        raise Mistake(
            "Merging changed the weight of the base layer itself. Merge once more, and the change "
            "would be in it twice."
        )
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    if changed:
        raise Mistake(f"Merging changed {changed[0]}; the layer is to stay as it was.")
    if [p.requires_grad for p in layer.parameters()] != trainable:
        raise Mistake("Merging changed which parameters of the layer require grad.")
    if not layer.training:
        raise Mistake("Merging left the layer in eval mode; it was in training mode before.")
    old = {p.data_ptr() for p in layer.parameters()}
    shared = [name for name, p in merged.named_parameters() if p.data_ptr() in old]
    if shared:
        raise Mistake(f"The {shared[0]} of the new layer is the tensor of the old one, not a copy.")
    if not bias and merged.bias is not None:
        raise Mistake("The base layer has no bias, and the merged one has.")
    if bias and (merged.bias is None or not torch.equal(merged.bias, base.bias)):
        raise Mistake("The bias of the base layer got lost.")
    if not _close(answer(layer)(x), merged(x)):
        raise Mistake(
            "Two merges of one layer differ. If you take the weight from the layer's output: is "
            "dropout active meanwhile?"
        )
    if _close(merged.weight, alpha / r * layer.lora_B @ layer.lora_A):
        raise Mistake("The merged layer has the change alone; W0 is not in it.")
    _merged_value(merged(x), base(x), _product(x, layer), alpha / r)


def _merged_value(got, plain, product, scaling):
    if _close(got, plain + scaling * product, 1e-5):
        return
    for factor, what in (
        (0, "The merged layer is the base layer: the change is not in it."),
        (1, "The merged layer forgets the scaling: it adds B A as it is."),
        (-scaling, "The change is subtracted from the weight."),
        (3, "The scaling is 3, as for r=4 and alpha=12, in a layer with other numbers."),
        (scaling**2, "The scaling is in the merged weight twice."),
    ):
        if _close(got, plain + factor * product):
            raise Mistake(what)
    raise Mistake("The merged layer does not give the output of the unmerged one in eval mode.")


class _Names(nn.Module):
    """A block in which one name begins with another, and one ends with it."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.q_proj_extra = nn.Linear(4, 6), nn.Linear(4, 4)
        self.my_q_proj, self.table = nn.Linear(4, 4), nn.Embedding(7, 4)


def _blocks():
    return nn.ModuleDict({"first": _Names(), "second": _Names()})


def add_lora(answer, layer_class):
    """Check a function (model, r, alpha, targets) -> the model, given the class of task 2."""
    model = _blocks()
    old = dict(model.named_modules())
    result = answer(model, 2, 5, ("q_proj",))
    if result is not model:
        raise Mistake("Return the model that was passed in, changed in place.")
    _wrapped(model, layer_class)
    for name in ("first.q_proj", "second.q_proj"):
        _inside(name, model.get_submodule(name), old[name], 2, 5)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    frozen = sorted(n for n in trainable if "lora_" not in n)
    if frozen:
        raise Mistake(f"{frozen[0]} still requires grad: only A and B should be trained.")
    if len(trainable) != 4:
        raise Mistake(
            f"{len(trainable)} tensors are trainable instead of two A and two B. What comes first, "
            "freezing or wrapping?"
        )
    _missing_targets(answer, layer_class)
    _at_the_top(answer, layer_class)
    _llama(answer)


def _wrapped(model, layer_class):
    """Refuse any other choice than the two q_proj."""
    dotted = [name for name in model._modules if "." in name]
    if dotted:
        raise Mistake(
            f"The model now has a child with the name {dotted[0]!r}, dot included, and the old "
            "layer still runs. setattr takes the parent and the last part of the name."
        )
    wrapped = [name for name, module in model.named_modules() if isinstance(module, layer_class)]
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
    if any(".base" in name for name in wrapped):
        raise Mistake(f"{wrapped[-1]}: a layer inside a LoRA layer was wrapped again.")
    if not wrapped:
        raise Mistake("With targets=('q_proj',), no layer of the model has LoRA afterward.")
    if wrapped != ["first.q_proj", "second.q_proj"]:
        raise Mistake(
            f"With targets=('q_proj',), these got LoRA: {wrapped}. It should be both q_proj."
        )


def _inside(name, layer, old, r, alpha):
    if layer.base is not old:
        raise Mistake(f"{name}: the layer inside is another than the one that stood there.")
    if layer.lora_A.shape[0] != r:
        raise Mistake(f"{name}: r={r} and alpha={alpha} give A {layer.lora_A.shape[0]} rows.")
    _fill(layer)
    x = torch.randn(2, 30, 4)
    if not _close(layer.eval()(x), old(x) + alpha / r * _product(x, layer)):
        raise Mistake(f"{name}: with r={r} and alpha={alpha}, B A x is not multiplied by alpha/r.")
    if not _close(layer.train()(x), layer.eval()(x)):
        raise Mistake(f"{name}: in training mode it drops entries. Nobody asked for dropout.")


def _missing_targets(answer, layer_class):
    for targets, what in (
        (("no_such_layer",), "A target that no layer has is passed over in silence"),
        (("q_proj", "v_prj"), "v_prj, next to a target that exists, is passed over in silence"),
        (("table",), "table is an Embedding and not a linear layer, and nothing is said"),
    ):
        model = _blocks()
        try:
            answer(model, 2, 4, targets)
        except ValueError:
            pass
        except (KeyError, AttributeError, StopIteration, AssertionError) as error:
            raise Mistake(f"A target that is missing ends in {type(error).__name__}.") from error
        else:
            raise Mistake(f"{what}; raise a ValueError.")
        if any(isinstance(module, layer_class) for module in model.modules()):
            raise Mistake(
                f"With targets={targets} the ValueError comes too late: some layers have LoRA "
                "already."
            )
        if not all(p.requires_grad for p in model.parameters()):
            raise Mistake("The ValueError comes when the model has been frozen already.")


def _at_the_top(answer, layer_class):
    """Two targets that are children of the model itself."""
    model = _Names()
    try:
        answer(model, 2, 4, ["my_q_proj", "q_proj_extra"])
    except (ValueError, KeyError, AttributeError) as error:
        raise Mistake(
            "A layer right below the model, whose name has no dot, fails with "
            f"{type(error).__name__}: {_first_line(error)}."
        ) from error
    wrapped = [name for name, module in model.named_modules() if isinstance(module, layer_class)]
    if sorted(wrapped) != ["my_q_proj", "q_proj_extra"]:
        raise Mistake(
            f"In a model whose own children are the targets, these got LoRA: {wrapped}. It should "
            "be both targets."
        )


def _llama(answer):
    llama, _ = load_base("tiny-llama", device="cpu")
    ids = torch.arange(5, 13).reshape(2, 4)
    before = llama(ids).logits
    old = [m for name, m in llama.named_modules() if name.endswith(("q_proj", "v_proj"))]
    wanted = sum(4 * sum(module.weight.shape) for module in old)
    answer(llama, 4, 8, ("q_proj", "v_proj"))
    if not torch.equal(llama(ids).logits, before):
        raise Mistake("A tiny Llama gives other logits with untrained LoRA than without.")
    number = sum(p.numel() for p in llama.parameters() if p.requires_grad)
    if number != wanted:
        raise Mistake(
            "A tiny Llama with LoRA on q_proj and v_proj, which lie three levels deep, has "
            f"{number} trainable parameters instead of {wanted}."
        )


def count(answer):
    """Check a function (shapes, r) -> number of trainables, shapes being (in, out) pairs."""
    for shapes, r in (([(576, 576), (576, 192)] * 30, 8), ([(5, 3), (40, 7), (2, 90)], 3)):
        a, b = sum(r * one for one, _ in shapes), sum(r * other for _, other in shapes)
        case = f"{len(shapes)} layers, the first {shapes[0]}, with r={r}"
        got = answer(shapes, r)
        if got == a + b:
            continue
        if got == sum(one * other for one, other in shapes):
            raise Mistake("That is the size of the weights themselves, which are frozen.")
        if got in (2 * a, 2 * b):
            raise Mistake(
                "The layers are not all square: B has as many rows as the layer has outputs."
            )
        if got in (a, b):
            raise Mistake("Only one of A and B is counted.")
        if got == (a + b) // r:
            raise Mistake(f"{case}: {got} would be right for r=1.")
        if 0 < got < 1:
            raise Mistake(f"{case}: {got:.3g} is a fraction. The number itself is asked for.")
        if got == 460_800:
            raise Mistake(f"{case}: the answer is still {got}, which was SmolLM2's.")
        if got == sum(r * one * other for one, other in shapes):
            raise Mistake(f"{case}: {got} is r times the weights, more than the model itself.")
        if got == sum(r * (one + other) for one, other in set(shapes)):
            raise Mistake(f"{case}: {got} counts layers of one shape only once.")
        if got == a + b + sum(other for _, other in shapes):
            raise Mistake(f"{case}: {got} has biases in it. LoRA adds none.")
        raise Mistake(f"{case}: {got} is not the number of entries of all A and B.")
