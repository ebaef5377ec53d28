"""Save and load what was trained, in the folder format of HF peft: JSON and safetensors.

`add_*` leaves the name of its technique on the model, as `model.minipeft`. What is trained
beside it (a head, norms) goes into the same folder as whole modules.
"""

from pathlib import Path

import torch

from minipeft.adapter_files import adapters, lora
from minipeft.adapter_files import virtual_tokens as virtual
from minipeft.adapter_files.atomic import MARK, behind_link, whole_folder
from minipeft.adapter_files.modules import GENERATING, take_modules, task_of, trained_beside
from minipeft.adapter_files.pair import holds_pair, read_pair, write_pair
from minipeft.refusals import require
from minipeft.technique.on_model import technique_of
from minipeft.training.distributed import barrier, gather, is_main_process

# technique: (peft_type, what writes it, what HF peft puts in front of names of the base's modules)
WRITERS = {
    "lora": ("LORA", lora.to_peft, "base_model.model."),
    "adapters": ("MINIPEFT_ADAPTERS", adapters.to_peft, ""),
    "prompt_tuning": ("PROMPT_TUNING", virtual.prompt_tuning_to_peft, "base_model."),
    "p_tuning": ("P_TUNING", virtual.p_tuning_to_peft, "base_model."),
    "prefix_tuning": ("PREFIX_TUNING", virtual.prefix_tuning_to_peft, "base_model."),
    "p_tuning_v2": ("PREFIX_TUNING", virtual.p_tuning_v2_to_peft, "base_model."),
}
# peft_type: (what reads it, the settings that are understood, the same prefix of names)
READERS = {
    "LORA": (lora.from_peft, lora.READS, "base_model.model."),
    "MINIPEFT_ADAPTERS": (adapters.from_peft, adapters.READS, ""),
    "PROMPT_TUNING":
        (virtual.prompt_tuning_from_peft, virtual.PROMPT_TUNING_READS, "base_model."),
    "P_TUNING": (virtual.p_tuning_from_peft, virtual.P_TUNING_READS, "base_model."),
    virtual.TEMPLATE: (virtual.p_tuning_from_peft, virtual.P_TUNING_READS, "base_model."),
    # With trained embeddings, which peft would pass by.
    "MINIPEFT_PROMPT_TUNING":
        (virtual.prompt_tuning_from_peft, virtual.PROMPT_TUNING_READS, "base_model."),
    "MINIPEFT_P_TUNING": (virtual.p_tuning_from_peft, virtual.P_TUNING_READS, "base_model."),
    "PREFIX_TUNING": (virtual.prefix_tuning_from_peft, virtual.PREFIX_READS, "base_model."),
}  # fmt: skip
# Keys of every adapter_config that change no number. Each technique adds its own, as READS.
ABOUT = ("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path",
         "revision", "inference_mode", "modules_to_save")  # fmt: skip


def save_adapter(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, which HF peft reads. Returns folder.

    Whatever is trainable is written, not the frozen base: the technique's own tensors, and beside
    them each module with something trainable in it. An older adapter in `folder` is replaced at one
    moment; other files beside it are left alone. A link to a folder stays, and is written through.
    Raises ValueError if the model has no adapter, `folder` is in use for something else, or
    something is trainable that has no place in such a folder.
    """
    technique = technique_of(model)
    require(technique is not None, "There is no adapter on this model; add one before you save it.")
    target = _free_folder(folder)
    config, state = _contents(model, *WRITERS[technique])
    state = {k: gather(t).detach().to("cpu", copy=True).contiguous() for k, t in state.items()}
    barrier()  # until every rank has looked at the folder
    if is_main_process():
        if target.exists():
            write_pair(target, config, state)
        else:
            with whole_folder(target) as scratch:
                write_pair(scratch, config, state)
    barrier()
    return Path(folder)


def _free_folder(folder):
    """The path behind a link. Raises ValueError if what is there is no adapter."""
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


def _contents(model, peft_type, to_peft, prefix):
    """(adapter_config, {key: tensor}) of the technique and the modules that are trained beside."""
    config, state = to_peft(model)
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    config = {"peft_type": peft_type, "base_model_name_or_path": base} | config | task_of(model)
    names, modules = trained_beside(model, state, config["task_type"])
    config["modules_to_save"] = names or None
    kind = f"MINIPEFT_{config['peft_type']}"
    if kind in READERS and model.get_input_embeddings() in modules.values():
        config["peft_type"] = kind
    for key, module in modules.items():
        inner = module.state_dict(keep_vars=True).items()
        state |= {f"{prefix}{key}.{k}": tensor for k, tensor in inner}
    return config, state


def load_adapter(model, folder):
    """Put the adapter of `folder`, by minipeft or HF peft, on its base model; returns the model.

    The adapter is trainable and the base frozen, as after `add_*`; so are the modules that were
    trained beside it. The folder is only read. Raises ValueError, and leaves the model as it was,
    if the folder holds no adapter, a damaged one, one of a kind or with a setting that minipeft
    does not have, or one for another base model.
    """
    config, state = read_pair(Path(folder))
    kind = config.get("peft_type")
    require(
        kind in list(READERS),
        f"The adapter is of type {kind}; minipeft has {', '.join(sorted(READERS))}.",
    )
    from_peft, reads, prefix = READERS[kind]
    if kind == "PREFIX_TUNING" and task_of(model)["task_type"] not in GENERATING:
        from_peft = virtual.p_tuning_v2_from_peft
    _refuse_foreign(config, reads)
    beside = take_modules(model, config, state, prefix)
    for key, tensor in state.items():
        require(
            tensor.is_floating_point(),
            f"{key} of the adapter is {tensor.dtype}, not a floating-point type.",
        )
    from_peft(model, config, state)
    with torch.no_grad():
        for key, tensors in beside.items():
            module = model.get_submodule(key).requires_grad_(True)
            for inner, own in module.state_dict(keep_vars=True).items():
                own.copy_(tensors[inner])
    return model


def _refuse_foreign(config, reads):
    """Raise ValueError for a setting that is neither understood nor off.

    reads: {key: the values that are understood, or None where the technique looks itself}.
    """
    foreign = []
    for key, value in config.items():
        off = value is None or value == 0 or value in ("", [], {})
        if key in ABOUT or off or (key in reads and reads[key] is None):
            continue
        if not any(value is known or value == known for known in reads.get(key, ())):
            foreign.append(f"{key}={value!r}"[:80])
    require(not foreign, f"This adapter uses {', '.join(foreign)}, which minipeft does not have.")
