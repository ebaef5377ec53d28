"""Save and load adapters in the folder format of HF peft: JSON and safetensors.

Modules that are trained in addition to the adapter (a head, norms) are saved as a whole in the same
folder.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minipeft.adapter_files import adapters, lora
from minipeft.adapter_files import virtual_tokens as virtual
from minipeft.adapter_files.atomic import MARK, behind_link, whole_folder
from minipeft.adapter_files.modules import GENERATING, take_modules, task_of, trained_beside
from minipeft.adapter_files.pair import Config, State, holds_pair, read_pair, write_pair
from minipeft.refusals import Model, refuse_no_model, refuse_no_path, require
from minipeft.technique.on_model import technique_of
from minipeft.training.distributed import barrier, gather, is_main_process

# technique: (peft_type, function that makes config and tensors of it)
WRITERS: dict[str, tuple[str, Callable[..., tuple[Config, State]]]] = {
    "lora": ("LORA", lora.to_peft),
    "adapters": ("MINIPEFT_ADAPTERS", adapters.to_peft),
    "prompt_tuning": ("PROMPT_TUNING", virtual.prompt_tuning_to_peft),
    "p_tuning": ("P_TUNING", virtual.p_tuning_to_peft),
    "prefix_tuning": ("PREFIX_TUNING", virtual.prefix_tuning_to_peft),
    "p_tuning_v2": ("PREFIX_TUNING", virtual.p_tuning_v2_to_peft),
}
# peft_type: (function that adds it to a model, known settings, HF peft's prefix of module names)
READERS: dict[str, tuple[Callable[..., nn.Module], Mapping[str, tuple | None], str]] = {
    "LORA": (lora.from_peft, lora.READS, "base_model.model."),
    "MINIPEFT_ADAPTERS": (adapters.from_peft, adapters.READS, ""),
    "PROMPT_TUNING": (virtual.prompt_tuning_from_peft, virtual.PROMPT_TUNING_READS, "base_model."),
    "P_TUNING": (virtual.p_tuning_from_peft, virtual.P_TUNING_READS, "base_model."),
    "PREFIX_TUNING": (virtual.prefix_tuning_from_peft, virtual.PREFIX_READS, "base_model."),
}
READERS |= {
    virtual.TEMPLATE: READERS["P_TUNING"],
    # With trained input embeddings, which HF peft would ignore.
    "MINIPEFT_PROMPT_TUNING": READERS["PROMPT_TUNING"],
    "MINIPEFT_P_TUNING": READERS["P_TUNING"],
}
# Keys of every adapter_config that do not affect the computation. Each technique adds its READS.
ABOUT = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
         "revision", "inference_mode", "modules_to_save")  # fmt: skip


def save_adapter(model: nn.Module, folder: str | Path) -> Path:
    """Write adapter_config.json and adapter_model.safetensors, which HF peft reads. Returns folder.

    All trainable parameters are written, but not the frozen base: the tensors of the technique, and
    every other module with a trainable parameter, as a whole. An older adapter in `folder` is
    replaced atomically; other files there are not changed. For a link, its target is written.
    Raises ValueError if the model has no adapter, `folder` holds something else, or a parameter is
    trainable that the format cannot hold.
    """
    refuse_no_model(model)
    refuse_no_path("folder", folder)
    technique = technique_of(model) or ""
    require(technique, "There is no adapter on this model; add one before you save it.")
    target = _free_folder(folder)
    config, state = _contents(model, *WRITERS[technique])
    state = {k: gather(t).detach().to("cpu", copy=True).contiguous() for k, t in state.items()}
    barrier()  # until every rank has checked the folder
    if is_main_process():
        if target.exists():
            write_pair(target, config, state)
        else:
            with whole_folder(target) as scratch:
                write_pair(scratch, config, state)
    barrier()
    return Path(folder)


def _free_folder(folder):
    """The path with links resolved. Raises ValueError if it holds anything but an adapter."""
    try:
        target = behind_link(folder)
    except NotADirectoryError as error:
        raise ValueError(str(error)) from error
    if target.exists() and not holds_pair(target):
        require(
            all(MARK in path.name for path in target.iterdir()),
            f"{folder} holds something else than an adapter; name a new folder.",
        )
    return target


def _contents(model, peft_type, to_peft):
    """(adapter_config, {key: tensor}) of the technique and of the other trained modules."""
    config, state = to_peft(model)
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    config = {"peft_type": peft_type, "base_model_name_or_path": base} | config | task_of(model)
    names, modules = trained_beside(model, state, config["task_type"])
    config["modules_to_save"] = names or None
    kind = f"MINIPEFT_{config['peft_type']}"
    if kind in READERS and model.get_input_embeddings() in modules.values():
        config["peft_type"] = kind
    prefix = READERS[peft_type][-1]
    for key, module in modules.items():
        tensors = module.state_dict(keep_vars=True).items()
        state |= {f"{prefix}{key}.{k}": tensor for k, tensor in tensors}
    return config, state


def load_adapter(model: Model, folder: str | Path) -> Model:
    """Add the adapter of `folder`, by minipeft or HF peft, to its base model. Returns the model.

    The base is frozen, as after `add_*`. The adapter is trainable, and so are the other modules in
    the folder. Raises ValueError, and leaves the model unchanged, if the folder holds no adapter, a
    damaged one, one of a kind or with a setting that minipeft does not have, or one for another
    base model.
    """
    refuse_no_model(model)
    refuse_no_path("folder", folder)
    config, state = read_pair(Path(folder))
    kind: Any = config.get("peft_type")
    require(
        kind in list(READERS),
        f"The adapter is of type {kind}; minipeft has {', '.join(sorted(READERS))}.",
    )
    from_peft, reads, prefix = READERS[kind]
    if kind == "PREFIX_TUNING" and task_of(model)["task_type"] not in GENERATING:
        from_peft = virtual.p_tuning_v2_from_peft
    _refuse_foreign(config, reads)
    modules = take_modules(model, config, state, prefix)
    for key, tensor in state.items():
        require(
            tensor.is_floating_point(),
            f"{key} of the adapter is {tensor.dtype}, not a floating-point type.",
        )
    from_peft(model, config, state)
    with torch.no_grad():
        for key, tensors in modules.items():
            module = model.get_submodule(key).requires_grad_(True)
            for name, own in module.state_dict(keep_vars=True).items():
                own.copy_(tensors[name])
    return model


def _refuse_foreign(config, reads):
    """Raise ValueError for a setting that minipeft does not know and that is not off.

    reads: {key: known values, or None if the technique checks the value itself}.
    """
    foreign = []
    for key, value in config.items():
        off = value is None or value == 0 or value in ("", [], {})
        if key in ABOUT or off or (key in reads and reads[key] is None):
            continue
        if not any(value is known or value == known for known in reads.get(key, ())):
            foreign.append(f"{key}={value!r}"[:80])
    require(not foreign, f"This adapter uses {', '.join(foreign)}, which minipeft does not have.")
