"""Find, check and replace the layers that LoRA is put on."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import modules_named
from minipeft.refusals import (
    Model,
    is_number,
    refuse_flag,
    refuse_no_model,
    refuse_size,
    require,
)
from minipeft.technique.on_model import (
    freeze_base,
    has_numbers,
    heads,
    language_model_head,
    unmark,
)

SCALINGS = ("alpha/r", "rslora")
KINDS = (nn.Linear, Conv1D, nn.Embedding)


def matrix(layer: nn.Module) -> torch.Tensor:
    """The weight of a layer as (out, in). A view: Conv1D and nn.Embedding store its transpose."""
    weight: Any = layer.weight
    return weight if isinstance(layer, nn.Linear) else weight.T


def add_product(h: torch.Tensor, z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """h + z weight^T in the dtype of h. h: (..., out), z: (..., r), weight: (out, r)."""
    if not h.dtype == z.dtype == weight.dtype:  # on a half-precision base only the sum is rounded
        return (h + linear(z, weight)).to(h.dtype)
    rows = z.reshape(-1, z.shape[-1])  # (batch * seq, r)
    # Fused: the product, a tensor as large as h, is not stored.
    return torch.addmm(h.reshape(-1, h.shape[-1]), rows, weight.T).view(h.shape)


class InPlace(nn.Module):
    """Replaces the layer `base`, and has the attributes of a layer that model code reads."""

    base: Any  # one of KINDS, a layer with quantized weights, or another InPlace

    @property
    def weight(self) -> torch.Tensor:
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        return getattr(self.base, "bias", None)

    @property
    def in_features(self) -> int:
        return self.base.in_features

    @property
    def out_features(self) -> int:
        return self.base.out_features


def replace_layer(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Replace the layer with this dotted name by `layer`."""
    parent, _, last = name.rpartition(".")
    setattr(model.get_submodule(parent), last, layer)


# ---- LoRA on a model ----------------------------------------------------------------------------


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """{dotted name: LoRALinear or a variant of it}. Raises ValueError if there is none."""
    refuse_no_model(model)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(getattr(module, "lora_B", None), torch.Tensor)
    }
    require(layers, "This model has no LoRA; call add_lora or load_adapter first.")
    return layers


def put_lora(
    model: nn.Module,
    layers: list[tuple[str, nn.Module]],
    new_layer: Callable[[str, nn.Module], nn.Module],
) -> None:
    """Freeze the model and replace each of [(name, layer)] by new_layer(name, layer).

    Raises ValueError for a tied layer that is not an embedding, and for one whose forward is not
    that of its kind. An embedding or head with LoRA can no longer be resized or tied.
    """
    for name, layer in layers:
        if not isinstance(layer, nn.Embedding):
            _refuse_tied(model, name, layer, "leave it out of the targets")
        _refuse_other_arithmetic(name, layer)
    freeze_base(model)
    for name, layer in layers:
        replace_layer(model, name, new_layer(name, layer))
    head = language_model_head(model)
    added = lora_layers(model).values()
    if any(layer is head or isinstance(layer.base, nn.Embedding) for layer in added):
        vars(model).update(resize_token_embeddings=_refuse_to_resize, tie_weights=_refuse_to_resize)


def shift_weights(model: Model, merge: bool) -> Model:
    """Add every low-rank change to its base weight (merge=False: subtract it). Returns the model.

    Raises ValueError if that is done already, the base is quantized, or a weight is tied.
    """
    layers = lora_layers(model)
    require(
        all(layer.merged != merge for layer in layers.values()),
        f"LoRA is {'already merged' if merge else 'not merged'} on this model.",
    )
    require(
        all("weight" in dict(layer.base.named_parameters()) for layer in layers.values()),
        "This base is quantized: the sum would have to be rounded to 4 bits again. Load the "
        "adapter on the unquantized base and merge there.",
    )
    for name, layer in layers.items():
        _refuse_tied(model, name, layer.base, "keep the adapter beside it, or untie the head first")
    for layer in layers.values():
        layer.shift_weight(1 if merge else -1)
        layer.merged = merge
        own = list(layer.parameters(recurse=False))
        if merge:
            layer.trainable = [p.requires_grad for p in own]
        for p, trainable in zip(own, layer.trainable, strict=True):
            p.requires_grad_(trainable and not merge)
    return model


def take_lora_off(model: Model) -> Model:
    """Put every base layer back into its place. Returns the model."""
    for name, layer in lora_layers(model).items():
        replace_layer(model, name, layer.base)
    if "resize_token_embeddings" in vars(model):
        del model.resize_token_embeddings, model.tie_weights
    del model.lora_config
    unmark(model)
    return model


# ---- find layers by name ------------------------------------------------------------------------


def target_layers(model: nn.Module, targets: list[str]) -> list[tuple[str, nn.Module]]:
    """[(name, layer)] of the layers whose dotted name ends in one of `targets`.

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


def without_heads(
    model: nn.Module, found: Iterable[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module]]:
    """[(name, layer)] without those in the head of a classifier, which is trained as a whole."""
    trained = heads(model)
    return [(name, layer) for name, layer in found if name.split(".")[0] not in trained]


# ---- check settings and layers ------------------------------------------------------------------


def list_of_names(targets: str | Iterable[str]) -> list[str]:
    """`targets`, or a single target, as a list. Raises ValueError for anything but names."""
    names = (targets,) if isinstance(targets, str) else targets
    require(
        isinstance(names, list | tuple | set)
        and all(isinstance(name, str) and name for name in names),
        f"targets={names!r} is not a list of names of layers.",
    )
    return list(names)


def check_settings(r: int, alpha: float, dropout: float, scaling: str, dora: bool) -> None:
    """Raise ValueError for a setting of LoRA of the wrong type or out of range."""
    refuse_size("r", r, "rank")
    require(
        is_number(alpha) and 0 < alpha < math.inf,
        f"alpha={alpha!r} must be above 0: it multiplies what LoRA learns.",
    )
    require(
        is_number(dropout) and 0 <= dropout < 1,
        f"dropout={dropout!r} is not a probability below 1.",
    )
    require(
        scaling in list(SCALINGS),
        f"scaling={scaling!r} is none of {', '.join(map(repr, SCALINGS))}.",
    )
    refuse_flag("dora", dora)


def _refuse_tied(model, name, layer, remedy):
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    require(
        owners.count(id(layer.weight)) <= 1,
        f"The weight of {name} is tied to another module, which merging would change too; "
        f"{remedy}.",
    )


@torch.no_grad()
def _refuse_other_arithmetic(name, layer):
    """Raise ValueError for a layer whose output is not that of its weight, such as a subclass of
    nn.Linear that normalizes its output, or an embedding that rescales its weight (max_norm)."""
    weight, rescales = layer.weight, getattr(layer, "max_norm", None)
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
    except Exception:  # its forward takes other arguments or returns a tuple
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
