"""Bottleneck adapters in an adapter folder. HF peft has none, and rejects their peft_type."""

from typing import Any

import torch
from transformers import PreTrainedModel

from minipeft.adapter_files.pair import Config, State
from minipeft.adapters import add_adapters, check_settings, places, width
from minipeft.refusals import refuse_other_shapes, require
from minipeft.technique.on_model import refuse_tuned, technique_of

READS = dict.fromkeys(["bottleneck", "placement", "activation", "stands_on"])  # all checked below


def to_peft(model: PreTrainedModel) -> tuple[Config, State]:
    """(adapter_config, {key: tensor}) of the adapters that were added last.

    The adapters below them are not written, only their number, as "stands_on". Each set has a
    folder of its own, if it was saved after its training.
    """
    configs: Any = model.adapter_configs
    config = configs[-1] | {"stands_on": len(configs) - 1}
    state: State = {
        f"{name}.{key}": adapter.get_parameter(key)
        for name, adapter, _ in places(model, config["placement"])
        for key in _shapes(1, 1)
    }
    return config, state


def _shapes(hidden, m):
    return {"down.weight": (m, hidden), "down.bias": (m,),
            "up.weight": (hidden, m), "up.bias": (hidden,)}  # fmt: skip


def from_peft(model: PreTrainedModel, config: Config, state: State) -> PreTrainedModel:
    """Add the adapters of a folder to `model`, on top of those it has. Returns the model.

    Raises ValueError, and leaves the model unchanged, if they do not fit the model or were trained
    on top of more or fewer adapters.
    """
    if technique_of(model) != "adapters":
        refuse_tuned(model)
    settings: Config = {key: config.get(key) for key in ("bottleneck", "placement", "activation")}
    check_settings(**settings)
    present = len(getattr(model, "adapter_configs", []))
    require(
        config.get("stands_on") == present,
        f"These adapters were trained on top of {config.get('stands_on')} other set(s) of "
        f"adapters, and this model has {present}; load those first, on the base model.",
    )
    expected = {
        f"{name}.{key}": shape
        for name, layer, _ in places(model, settings["placement"])
        for key, shape in _shapes(width(layer), settings["bottleneck"]).items()
    }
    refuse_other_shapes(state, expected)
    add_adapters(model, **settings)
    with torch.no_grad():
        for key, tensor in state.items():
            model.get_parameter(key).copy_(tensor)
    return model
