"""LoRA and DoRA in the folder format of HF peft."""

import re
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.adapter_files.pair import Config, State
from minipeft.lora import lora_layer
from minipeft.refusals import Model, refuse_other_shapes, require
from minipeft.technique.layers import (
    KINDS,
    check_settings,
    lora_layers,
    matrix,
    put_lora,
    without_heads,
)
from minipeft.technique.on_model import adding, refuse_tuned
from minipeft.technique.unchanged import unchanged

# The known settings of peft's LoraConfig. A tuple lists the values that lora.py can compute. None:
# this module checks the value itself, or it only concerns initialization or training.
READS = dict.fromkeys([
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "megatron_core", "runtime_config",
]) | {
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change the base weights; MiCA does not train B.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
# With these, some of the target_modules have no LoRA; the tensors show which ones have.
NARROWING = ("exclude_modules", "layers_to_transform")
PATTERNS = ("rank_pattern", "alpha_pattern")  # another rank or alpha for some layers


def _keys(name, base, dora):
    """{name of the parameter: its name in HF peft's file}"""
    template = "lora_embedding_{}" if isinstance(base, nn.Embedding) else "lora_{}.weight"
    keys = {f"lora_{letter}": template.format(letter) for letter in "AB"}
    keys |= {"lora_magnitude": "lora_magnitude_vector"} if dora else {}
    return {own: f"base_model.model.{name}.{key}" for own, key in keys.items()}


def to_peft(model: nn.Module) -> tuple[Config, State]:
    """(adapter_config, {key: tensor}) as HF peft writes them."""
    layers = lora_layers(model)
    settings: Any = model.lora_config
    alpha = settings["alpha"]
    config = {
        "r": settings["r"],
        "lora_alpha": alpha if isinstance(alpha, int) else float(alpha),  # not a NumPy number
        "lora_dropout": float(settings["dropout"]),
        "use_rslora": settings["scaling"] == "rslora",
        "use_dora": settings["dora"],
        "target_modules": settings["targets"],
        "bias": "none",
        "fan_in_fan_out": any(isinstance(layer.base, Conv1D) for layer in layers.values()),
    } | {key: settings[key] for key in PATTERNS if key in settings}
    state = {
        key: getattr(layer, own)
        for name, layer in layers.items()
        for own, key in _keys(name, layer.base, settings["dora"]).items()
    }
    return config, state


def from_peft(model: Model, config: Config, state: State) -> Model:
    """Add the LoRA of an adapter_config and its tensors to `model`. Returns the model.

    Raises ValueError, and leaves the model unchanged, if they do not fit the model or a setting is
    of the wrong type.
    """
    refuse_tuned(model)
    settings = _settings(config)
    state = _without_base(model, {_canonical(key): tensor for key, tensor in state.items()})
    layers = _target_layers(model, config, state)
    settings_of: dict[str, dict[str, Any]] = {}
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in layers:
        r = _by_pattern(config, "rank_pattern", name, settings["r"])
        alpha = _by_pattern(config, "alpha_pattern", name, settings["alpha"])
        settings_of[name] = settings | {"r": r, "alpha": alpha}
        check_settings(**settings_of[name])
        rows, columns = matrix(layer).shape
        shapes = {"lora_A": (r, columns), "lora_B": (rows, r), "lora_magnitude": (rows,)}
        keys = _keys(name, layer, settings["dora"])
        expected |= {key: shapes[own] for own, key in keys.items()}
    refuse_other_shapes(state, expected)
    with adding(model, "lora"), unchanged(model):
        put_lora(model, layers, lambda name, layer: lora_layer(layer, **settings_of[name]))
        patterns = {key: config[key] for key in PATTERNS if config.get(key)}
        targets = {"targets": _targets(config, layers)}
        vars(model)["lora_config"] = settings | targets | patterns
    with torch.no_grad():
        for name, layer in lora_layers(model).items():
            for own, key in _keys(name, layer.base, settings["dora"]).items():
                getattr(layer, own).copy_(state[key])
    return model


def _settings(config):
    """The arguments of `add_lora` for an adapter_config; missing settings have peft's defaults.

    Raises ValueError for a setting of the wrong type or out of range.
    """
    rslora = config.get("use_rslora") or False
    require(isinstance(rslora, bool), f"use_rslora={rslora!r} is neither true nor false.")
    settings = {
        "r": config.get("r", 8),
        "alpha": config.get("lora_alpha", 8),
        "dropout": config.get("lora_dropout", 0.0),
        "scaling": "rslora" if rslora else "alpha/r",
        "dora": config.get("use_dora") or False,
    }
    check_settings(**settings)
    return settings


def _targets(config, layers):
    """target_modules, or the full names of the layers if no list of endings selects just them."""
    if isinstance(config["target_modules"], str) or _given(config, *NARROWING):
        return [name for name, _ in layers]
    return config["target_modules"]


def _canonical(key):
    """A key without the adapter's name "default", which some tools leave in."""
    key = re.sub(r"\.(lora_\w+)\.default(?=\.|$)", r".\1", key)
    return key.removesuffix(".weight") if "lora_magnitude_vector" in key else key


def _without_base(model, state):
    """The state without frozen weights, which peft may write for an embedding or a head.

    Raises ValueError if they differ from the model's.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    adapter_weights = {}
    for key, tensor in state.items():
        own = parameters.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if own is None:
            adapter_weights[key] = tensor
            continue
        require(
            tensor.shape == own.shape and torch.allclose(tensor.to(own), own, rtol=0.01, atol=1e-7),
            f"The adapter was made for another base model: {key} differs.",
        )
    return adapter_weights


def _given(config, *keys):
    return any(config.get(key) not in (None, [], "") for key in keys)


def _all_linear(config):
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _target_layers(model, config, state):
    """[(name, layer)] of the layers that the adapter is for. As in peft, target_modules may name
    layers that this model does not have. Raises ValueError if it has none of them."""
    targets = config.get("target_modules")
    names = [targets] if isinstance(targets, str) else targets
    require(
        isinstance(names, list) and all(isinstance(name, str) and name for name in names),
        f"target_modules={targets!r} is neither a pattern nor a list of names.",
    )
    present = [(name, m) for name, m in model.named_modules() if isinstance(m, KINDS)]
    found = [(name, m) for name, m in present if _all_linear(config) or _fits(targets, name)]
    found = without_heads(model, found)
    if _all_linear(config) or _given(config, *NARROWING, "modules_to_save"):
        found = [(name, m) for name, m in found if _keys(name, m, False)["lora_A"] in state]
    kinds = sorted({name.rpartition(".")[2] for name, _ in present})
    require(
        found,
        f"{type(model).__name__} has no layer named {targets!r} that the adapter is for; it has "
        f"{', '.join(kinds)}.",
    )
    return found


def _fits(pattern, name):
    """Does the name match a regular expression, or end in one of a list of endings?"""
    if not isinstance(pattern, str):
        return any(f".{name}".endswith(f".{ending}") for ending in pattern)
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} of the adapter is not a pattern ({error}).") from error


def _by_pattern(config, key, name, default):
    """The value of the first pattern in rank_pattern or alpha_pattern that matches the name."""
    patterns = config.get(key) or {}
    require(
        isinstance(patterns, dict), f"{key}={patterns!r} is not a mapping from patterns to numbers."
    )
    return next((v for p, v in patterns.items() if _fits(rf"(.*\.)?({p})", name)), default)
