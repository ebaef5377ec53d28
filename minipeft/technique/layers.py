"""Layers that LoRA goes on: found by name, tried, exchanged. What the paper takes for granted."""

import math
from numbers import Real

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import modules_named
from minipeft.refusals import refuse_flag, refuse_size, require
from minipeft.technique.on_model import freeze_base, has_numbers, heads, unmark

SCALINGS = ("alpha/r", "rslora")
KINDS = (nn.Linear, Conv1D, nn.Embedding)


def matrix(layer):
    """The weight of a layer as (out, in). A view: Conv1D and nn.Embedding keep its transpose."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


def add_product(h, z, weight):
    """h + z weight^T in the dtype of h. h: (..., out), z: (..., r), weight: (out, r)."""
    if not h.dtype == z.dtype == weight.dtype:  # on a half-precision base only the sum is rounded
        return (h + linear(z, weight)).to(h.dtype)
    rows = z.reshape(-1, z.shape[-1])  # (batch * seq, r)
    # Fused, which spares a tensor as large as h.
    return torch.addmm(h.reshape(-1, h.shape[-1]), rows, weight.T).view(h.shape)


class InPlace(nn.Module):
    """Takes the place of the layer `base`, and says what a model may ask of the layer there."""

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return getattr(self.base, "bias", None)

    @property
    def in_features(self):
        return self.base.in_features

    @property
    def out_features(self):
        return self.base.out_features


def replace_layer(model, name, layer):
    """Put `layer` in the place of the one with this dotted name."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


# ---- LoRA on a model ----------------------------------------------------------------------------


def lora_layers(model):
    """{name: layer} of the layers of `model` that have a low-rank change beside them.

    Raises ValueError if there is none.
    """
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_B", None), torch.Tensor)
    }
    require(layers, "This model has no LoRA; call add_lora or load_adapter first.")
    return layers


def put_lora(model, layers, new_layer):
    """Freeze the model and replace each of [(name, layer)] by new_layer(name, layer)."""
    for name, layer in layers:
        if not isinstance(layer, nn.Embedding):
            _refuse_tied(model, name, layer, "leave it out of the targets")
        _refuse_other_arithmetic(name, layer)
    freeze_base(model)
    for name, layer in layers:
        replace_layer(model, name, new_layer(name, layer))
    head = getattr(model, "get_output_embeddings", bool)() or None
    placed = lora_layers(model).values()
    if any(layer is head or isinstance(layer.base, nn.Embedding) for layer in placed):
        model.resize_token_embeddings = model.tie_weights = _refuse_to_resize


def shift_weights(model, merge):
    """Merge every change into its base weight (merge=False: subtract it). Returns the model."""
    layers = lora_layers(model)
    require(
        all(layer.merged != merge for layer in layers.values()),
        f"LoRA is {'already merged' if merge else 'not merged'} on this model.",
    )
    require(
        all("weight" in dict(layer.base.named_parameters()) for layer in layers.values()),
        "This base is quantised: the sum would have to be rounded to 4 bits again. Load the "
        "adapter on the unquantised base and merge there.",
    )
    for name, layer in layers.items():
        _refuse_tied(model, name, layer.base, "keep the adapter beside it, or untie the head first")
    for layer in layers.values():
        layer.shift_weight(1 if merge else -1)
        layer.merged = merge
        for p in layer.parameters(recurse=False):
            p.requires_grad_(not merge)
    return model


def take_lora_off(model):
    """Put every base layer back into its place. Returns the model."""
    for name, layer in lora_layers(model).items():
        replace_layer(model, name, layer.base)
    if "resize_token_embeddings" in vars(model):
        del model.resize_token_embeddings, model.tie_weights
    del model.lora_config
    unmark(model)
    return model


# ---- which layers are named ---------------------------------------------------------------------


def target_layers(model, targets):
    """[(name, layer)] of the layers that `targets` names, one or more endings of dotted names.

    Raises ValueError for an ending that no layer has, or only the head of a classifier.
    """
    found = without_heads(model, modules_named(model, targets, KINDS))
    for target in targets:
        require(
            any(f".{name}".endswith(f".{target}") for name, _ in found),
            f"{target} is the head of {type(model).__name__}, which is trained as a whole; "
            "name layers before it.",
        )
    return found


def without_heads(model, found):
    """[(name, layer)] without those in the head of a classifier, which is trained as a whole."""
    trained = heads(model)
    return [(name, layer) for name, layer in found if name.split(".")[0] not in trained]


# ---- what is refused ----------------------------------------------------------------------------


def list_of_names(targets):
    """`targets`, or the one target, as a list. Raises ValueError for anything but names."""
    names = (targets,) if isinstance(targets, str) else targets
    require(
        isinstance(names, list | tuple | set)
        and all(isinstance(name, str) and name for name in names),
        f"targets={names!r} is no list of names of layers.",
    )
    return list(names)


def check_settings(r, alpha, dropout, scaling, dora):
    """Raise ValueError for a setting of LoRA that is out of range."""
    refuse_size("r", r, "rank")
    require(
        _is_number(alpha) and 0 < alpha < math.inf,
        f"alpha={alpha!r} must be above 0: it multiplies what LoRA learns.",
    )
    require(
        _is_number(dropout) and 0 <= dropout < 1,
        f"dropout={dropout!r} is no probability below 1.",
    )
    require(
        scaling in list(SCALINGS),
        f"scaling={scaling!r} is none of {', '.join(map(repr, SCALINGS))}.",
    )
    refuse_flag("dora", dora)


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool)


def _refuse_tied(model, name, layer, remedy):
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    require(
        owners.count(id(layer.weight)) <= 1,
        f"The weight of {name} is tied to another module, which merging would change too; "
        f"{remedy}.",
    )


@torch.no_grad()
def _refuse_other_arithmetic(name, layer):
    """Raise ValueError for a layer of a class of its own that computes something else than W says,
    such as a router that normalises its output."""
    weight, rescales = layer.weight, getattr(layer, "max_norm", None)  # it writes to its weight
    if (type(layer) in KINDS and not rescales) or not has_numbers(layer):
        return
    if isinstance(layer, nn.Embedding):
        x = torch.arange(min(2, len(weight)), device=weight.device)  # (ids,)
        expected = weight[x] * getattr(layer, "embed_scale", 1.0)  # (ids, hidden)
    else:
        x = torch.linspace(-1, 1, matrix(layer).shape[1], device=weight.device)[None]  # (1, in)
        x = x.to(weight.dtype)
        expected = linear(x, matrix(layer), getattr(layer, "bias", None))  # (1, out)
    try:
        error = (layer(x) - expected).abs().max() if not rescales else math.inf
        same = error <= torch.finfo(weight.dtype).eps ** 0.5 * expected.abs().max().clamp(min=1e-8)
    except Exception:  # other arguments, or a tuple
        same = False
    require(
        same,
        f"{name} is a {type(layer).__name__}, which computes something else than its weight "
        "says; leave it out of the targets.",
    )


def _refuse_to_resize(*args, **kwargs):
    raise ValueError(
        "An embedding or head with LoRA on it cannot be resized or tied; do that before add_lora, "
        "or after unload_lora."
    )
