"""Save and load what was trained, in the folder format of HF peft: JSON and safetensors.

A technique is a module of minipeft with PEFT_TYPE, to_peft and from_peft; this file knows none of
them by name. `add_*` leaves the name of its module on the model, as `minipeft_technique`.
"""

import importlib
import json
import pkgutil
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

import minipeft
from minipeft.distributed import leads, wait, whole
from minipeft.files import recover_folder, whole_folder

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def save_adapter(model, folder):
    """Write adapter_config.json and adapter_model.safetensors, which HF peft reads. Returns folder.

    Only the trainables are written, not the base model. An older adapter in `folder` is replaced
    as a whole, at one moment; other files beside it stay. Raises ValueError if the model has no
    adapter, or if `folder` is in use for something else.
    """
    folder = Path(folder)
    name = getattr(model, "minipeft_technique", None)
    if name is None:
        raise ValueError("There is no adapter on this model; add one before you save it.")
    technique = importlib.import_module(f"minipeft.{name}")
    recover_folder(folder)
    others = []
    if folder.exists():
        if not folder.is_dir() or (any(folder.iterdir()) and not (folder / CONFIG).exists()):
            raise ValueError(f"{folder} holds something else than an adapter; name a new folder.")
        others = [path for path in folder.iterdir() if path.name not in (CONFIG, TENSORS)]
    config, state = technique.to_peft(model)
    base = getattr(model.config, "_name_or_path", "") or None
    config = {"peft_type": technique.PEFT_TYPE, "base_model_name_or_path": base} | config
    state = {k: whole(t).detach().to("cpu", copy=True).contiguous() for k, t in state.items()}
    if leads():  # of several ranks, which all put the tensors together
        with whole_folder(folder) as scratch:
            for path in others:
                copy = shutil.copytree if path.is_dir() else shutil.copy2
                copy(path, scratch / path.name)
            save_file(state, scratch / TENSORS, metadata={"format": "pt"})
            (scratch / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    wait()
    return folder


def load_adapter(model, folder):
    """Put the adapter of `folder`, by minipeft or HF peft, on its base model; returns the model.

    The adapter is trainable and the base frozen, as after `add_*`. Raises ValueError, and leaves
    the model as it was, if the folder holds no adapter, a damaged one, one of a kind that minipeft
    does not have, or one for another base model.
    """
    folder = Path(folder)
    recover_folder(folder)
    if not (folder / CONFIG).is_file():
        raise ValueError(f"{folder} is no adapter folder: it has no {CONFIG}.")
    if not (folder / TENSORS).is_file():
        pickled = (folder / "adapter_model.bin").exists()
        raise ValueError(
            f"{folder} has no {TENSORS}"
            + (
                "; its adapter_model.bin is a pickle, which can run code when it is read. Save it "
                "again with safetensors."
                if pickled
                else "; the copy is incomplete."
            )
        )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / TENSORS)
    except (ValueError, SafetensorError) as error:
        raise ValueError(
            f"The adapter in {folder} is damaged and cannot be read ({error})."
        ) from error
    techniques = []
    for module in pkgutil.iter_modules(minipeft.__path__):
        technique = importlib.import_module(f"minipeft.{module.name}")
        if hasattr(technique, "PEFT_TYPE"):
            techniques.append(technique)
            # Two techniques may share a type; then `reads` tells which of them this folder is for.
            reads = getattr(technique, "reads", None)
            if reads(config) if reads else config.get("peft_type") == technique.PEFT_TYPE:
                return technique.from_peft(model, config, state)
    known = sorted({technique.PEFT_TYPE for technique in techniques})
    raise ValueError(
        f"The adapter is of type {config.get('peft_type')}; minipeft has {', '.join(known)}."
    )
