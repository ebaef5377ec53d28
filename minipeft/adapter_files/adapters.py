"""Bottleneck adapters in a folder. HF peft has none of this kind, and refuses it by its type."""

import torch

from minipeft.adapters import add_adapters, check_settings, places, width
from minipeft.refusals import refuse_other_shapes, require
from minipeft.technique.on_model import refuse_tuned, technique_of

READS = dict.fromkeys(["bottleneck", "placement", "activation", "stands_on"])  # all looked at below


def to_peft(model):
    """(adapter_config, {key: tensor}) of the adapters that were added last.

    Those that they stand on are not written: they have a folder of their own, if they were saved
    when they were trained. "stands_on" says how many there are.
    """
    config = model.adapter_configs[-1] | {"stands_on": len(model.adapter_configs) - 1}
    state = {
        f"{name}.{key}": adapter.get_parameter(key)
        for name, adapter, _ in places(model, config["placement"])
        for key in _shapes(1, 1)
    }
    return config, state


def _shapes(hidden, m):
    return {"down.weight": (m, hidden), "down.bias": (m,),
            "up.weight": (hidden, m), "up.bias": (hidden,)}  # fmt: skip


def from_peft(model, config, state):
    """Add the adapters of a folder to `model`, on top of those it has; all or nothing.

    Raises ValueError if they do not fit, or were trained on top of more adapters or fewer.
    """
    if technique_of(model) != "adapters":
        refuse_tuned(model)
    bottleneck, placement, activation = (
        config.get(key) for key in ("bottleneck", "placement", "activation")
    )
    check_settings(bottleneck, placement, activation)
    present = len(getattr(model, "adapter_configs", []))
    require(
        config.get("stands_on") == present,
        f"These adapters were trained on top of {config.get('stands_on')} other set(s) of "
        f"adapters, and this model has {present}; load those first, on the base model.",
    )
    expected = {
        f"{name}.{key}": shape
        for name, layer, _ in places(model, placement)
        for key, shape in _shapes(width(layer), bottleneck).items()
    }
    refuse_other_shapes(state, expected)
    add_adapters(model, bottleneck, placement, activation)
    with torch.no_grad():
        for key, tensor in state.items():
            model.get_parameter(key).copy_(tensor)
    return model
