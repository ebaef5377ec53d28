"""Save and load what was trained, in the folder format of HF peft: JSON and safetensors.

A technique is a module of minipeft with PEFT_TYPE, READS, to_peft and from_peft; `add_*` leaves the
name of its module on the model, as `minipeft_technique`. What is trained beside it (a head, norms)
goes into the same folder as whole modules, which HF peft calls modules_to_save.
"""

import hashlib
import importlib
import json
import os
from collections import Counter
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minipeft.adapter_files.atomic import MARK, behind_link, flush, whole_folder
from minipeft.technique.on_model import heads
from minipeft.training.distributed import leads, wait, whole

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
TECHNIQUES = {  # the module that reads a folder of this type
    "LORA": "lora",
    "MINIPEFT_ADAPTERS": "adapters",
    "PROMPT_TUNING": "prompt_tuning",
    "P_TUNING": "p_tuning",
    "P_TUNING_TEMPLATE": "p_tuning",
    "MINIPEFT_PROMPT_TUNING": "prompt_tuning",  # with trained embeddings, which peft would pass by
    "MINIPEFT_P_TUNING": "p_tuning",
    "PREFIX_TUNING": "prefix_tuning",  # on a model that does not generate, p_tuning_v2
}
GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
TASKS = {  # by the end of the name of a model's class
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# The heads that HF peft takes for trained in a folder of this task, named in the folder or not.
PEFT_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}
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
    name = getattr(model, "minipeft_technique", None)
    if name is None:
        raise ValueError("There is no adapter on this model; add one before you save it.")
    technique = importlib.import_module(f"minipeft.{name}")
    try:
        target = behind_link(folder)
    except NotADirectoryError as error:
        raise ValueError(str(error)) from error
    if target.exists() and not _config_of(target, _token(target)):
        if any(MARK not in path.name for path in target.iterdir()):
            raise ValueError(f"{folder} holds something else than an adapter; name a new folder.")
    config, state = technique.to_peft(model)
    base = getattr(getattr(model, "config", None), "_name_or_path", "") or None
    config = {"peft_type": technique.PEFT_TYPE, "base_model_name_or_path": base} | config
    config |= _task(model)
    names, modules = _trained_beside(model, state, config["task_type"])
    config["modules_to_save"] = names or None
    kind = f"MINIPEFT_{config['peft_type']}"
    if kind in TECHNIQUES and model.get_input_embeddings() in modules.values():
        config["peft_type"] = kind
    for key, module in modules.items():
        inner = module.state_dict(keep_vars=True).items()
        state |= {f"{_prefix(name)}{key}.{k}": tensor for k, tensor in inner}
    state = {k: whole(t).detach().to("cpu", copy=True).contiguous() for k, t in state.items()}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    wait()  # until every rank has looked at the folder
    if leads():  # of several ranks, which all put the tensors together
        if target.exists():
            _write(target, text, state)
        else:
            with whole_folder(target) as scratch:
                _write(scratch, text, state)
    wait()
    return Path(folder)


def load_adapter(model, folder):
    """Put the adapter of `folder`, by minipeft or HF peft, on its base model; returns the model.

    The adapter is trainable and the base frozen, as after `add_*`; so are the modules that were
    trained beside it. The folder is only read. Raises ValueError, and leaves the model as it was,
    if the folder holds no adapter, a damaged one, one of a kind or with a setting that minipeft
    does not have, or one for another base model.
    """
    config, state = _read(Path(folder))
    kind = config.get("peft_type")
    if kind not in list(TECHNIQUES):
        known = ", ".join(sorted(TECHNIQUES))
        raise ValueError(f"The adapter is of type {kind}; minipeft has {known}.")
    name = TECHNIQUES[kind]
    if name == "prefix_tuning" and _task(model)["task_type"] not in GENERATING:
        name = "p_tuning_v2"
    technique = importlib.import_module(f"minipeft.{name}")
    _refuse_foreign(config, technique.READS)
    beside = _take_modules(model, config, state, _prefix(name))
    for key, tensor in state.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{key} of the adapter is {tensor.dtype}, not a floating-point type.")
    technique.from_peft(model, config, state)
    with torch.no_grad():
        for key, tensors in beside.items():
            module = model.get_submodule(key).requires_grad_(True)
            for inner, own in module.state_dict(keep_vars=True).items():
                own.copy_(tensors[inner])
    return model


# ---- two files, written and read as one ----------------------------------------------------------
#
# The tensors carry a token, and their config is adapter_config.json or, while that is not there,
# the hidden file that has the token in its name. So the one rename that brings new tensors brings
# their config too, and whoever reads at any moment, or after a kill, finds a pair that belongs
# together. HF peft, which knows no tokens, may find no config in between, but never a wrong one.


def _hidden(folder, name, token):
    return folder / f".{name}{MARK}{token}"


def _token(folder):
    """The token of the tensors in a folder, or "" if they have none, or cannot be read."""
    if not (folder / TENSORS).is_file():
        return ""
    try:
        with safe_open(folder / TENSORS, "pt") as file:
            return (file.metadata() or {}).get("minipeft", "")
    except (FileNotFoundError, SafetensorError):
        return ""


def _config_of(folder, token):
    """The path of the config that belongs to the tensors with this token, or None."""
    paths = folder / CONFIG, _hidden(folder, CONFIG, token)
    return next((path for path in paths if path.is_file()), None)


def _write(folder, text, state):
    """Put both files into a folder that is there, and touch no other."""
    old = _token(folder)
    token = hashlib.sha256(f"{old}\n{text}".encode()).hexdigest()[:16]
    config, tensors = folder / CONFIG, folder / TENSORS
    new_config, new_tensors = _hidden(folder, CONFIG, token), _hidden(folder, TENSORS, token)
    kept = _hidden(folder, CONFIG, old)  # the old config, as long as the old tensors are there
    try:
        new_config.write_text(text, encoding="utf-8")
        save_file(state, new_tensors, metadata={"format": "pt", "minipeft": token})
        new_tensors.chmod(new_config.stat().st_mode)  # save_file leaves it to its owner alone
        flush(new_config)
        flush(new_tensors)
        if config.exists():
            os.replace(config, kept)
        os.replace(new_tensors, tensors)
        os.replace(new_config, config)
    except BaseException:
        if _token(folder) == old:  # the old pair is the valid one
            if kept.exists() and not config.exists():
                os.replace(kept, config)
            new_config.unlink(missing_ok=True)
            new_tensors.unlink(missing_ok=True)
        raise
    for name in (CONFIG, TENSORS):
        for left in folder.glob(f".{name}{MARK}*"):  # also of a writer that was killed
            left.unlink()


def _read(folder):
    """(adapter_config, {key: tensor}) of a folder: a pair that was written together."""
    try:
        for _ in range(100):  # once, unless somebody is writing
            token = _token(folder)
            path = _config_of(folder, token)
            if path is None or not (folder / TENSORS).is_file():
                continue
            try:
                text = path.read_text(encoding="utf-8")
                state = load_file(folder / TENSORS)
            except FileNotFoundError:
                continue
            if _token(folder) == token:
                return _settings(json.loads(text)), _finite(state)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(
            f"The adapter in {folder} is damaged and cannot be read ({error})."
        ) from error
    if path is None:
        raise ValueError(f"{folder} is no adapter folder: it has no {CONFIG}.")
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


def _settings(config):
    if not isinstance(config, dict):
        raise ValueError(f"its {CONFIG} holds {json.dumps(config)[:40]}, not settings by name")
    return config


def _finite(state):
    for key, tensor in state.items():
        if tensor.is_floating_point() and not tensor.float().isfinite().all():
            raise ValueError(f"{key} holds NaN or infinity")
    return state


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
    if foreign:
        raise ValueError(f"This adapter uses {', '.join(foreign)}, which minipeft does not have.")


# ---- modules that were trained beside the technique ----------------------------------------------


def _prefix(name):
    """What precedes the name of a module of the base model in the keys of HF peft."""
    return {"lora": "base_model.model.", "adapters": ""}.get(name, "base_model.")


def _task(model):
    """What tells HF peft which kind of model the adapter is for."""
    classes = [cls.__name__ for cls in type(model).__mro__]
    for ending, task in TASKS.items():
        if any(name.endswith(ending) for name in classes):
            return {"task_type": task}
    if getattr(model, "can_generate", bool)():
        seq2seq = getattr(model.config, "is_encoder_decoder", False)
        return {"task_type": GENERATING[seq2seq]}
    if getattr(model, "base_model", model) is model:
        return {"task_type": "FEATURE_EXTRACTION"}
    kind = {"base_model_class": classes[0], "parent_library": type(model).__module__}
    return {"task_type": None, "auto_mapping": kind}  # a masked language model, for example


def _modules(model, names):
    """{name: module} of what `names` stand for in modules_to_save: each ending fits, as in peft."""
    found = {
        key: module
        for key, module in model.named_modules(remove_duplicate=False)
        if any(key.endswith(name) for name in names)
    }
    return {
        key: module
        for key, module in found.items()
        if not any(key.startswith(f"{outer}.") for outer in found)
    }


def _trained_beside(model, state, task):
    """(names for modules_to_save, {name: module}) of all that is trained and not in `state`.

    A head is saved as a whole, and so is a normalisation that keeps statistics, which change while
    its parameters are frozen.
    """
    own = {id(tensor) for tensor in state.values()}
    layers = [  # those that a technique stands on
        key
        for key, module in model.named_modules()
        if hasattr(module, "base") and any(id(p) in own for p in module.parameters())
    ]
    names = {name for name in heads(model) if name != "virtual_tokens"}
    for key, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "running_mean", None) is not None:
            names.add(key)
    for key, p in model.named_parameters(remove_duplicate=False):
        if not p.requires_grad or id(p) in own or key.startswith("virtual_tokens."):
            continue
        names.add(key.rpartition(".")[0])
        if "." not in key or any(key.startswith(f"{layer}.") for layer in layers):
            raise ValueError(
                f"{key} is trainable too, for which an adapter folder has no place; freeze it "
                "before saving."
            )
    modules = _modules(model, [*names, *PEFT_HEADS.get(task, [])])
    for key in modules:
        if any(layer.startswith(f"{key}.") for layer in layers):
            raise ValueError(
                f"{key} is trained as a whole, with {model.minipeft_technique} inside it, for "
                "which an adapter folder has no place; freeze one of the two before saving."
            )
    return sorted(key for key in names if key in modules), modules


def _take_modules(model, config, state, prefix):
    """Take the modules_to_save out of `state`: {name of the module: {key: tensor}}.

    Raises ValueError if they do not fit the model.
    """
    names = config.get("modules_to_save") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"modules_to_save={names!r} is no list of names.")
    taken, tensors_of = {}, {}
    task = config.get("task_type")
    known = PEFT_HEADS.get(task, []) if isinstance(task, str) else []
    for key, module in _modules(model, [*names, *known]).items():
        taken[key] = {}
        for inner, own in module.state_dict(keep_vars=True).items():
            full = f"{prefix}{key}.{inner}"
            tensor = state.pop(full, None)
            if tensor is None or tensor.shape != own.shape:
                raise ValueError(
                    f"The adapter does not fit this base model: {full} is "
                    f"{'missing' if tensor is None else tuple(tensor.shape)} in the adapter, and "
                    f"{tuple(own.shape)} in the model."
                )
            if tensor.is_floating_point() != own.is_floating_point():
                raise ValueError(f"{full} of the adapter is {tensor.dtype}, not {own.dtype}.")
            taken[key][inner] = tensor
            tensors_of.setdefault(id(own), []).append(tensor)
    names_of = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for key, own in model.named_parameters():
        given = tensors_of.get(id(own), [])
        if len(given) < names_of[id(own)]:  # what is not in the adapter stays as it is
            given = [own, *(tensor.to(own) for tensor in given)]
        if not all(torch.equal(given[0], other) for other in given[1:]):
            raise ValueError(
                f"{key} is tied to another module in this model, and not in the adapter, which "
                "has other numbers for one of them; untie the model first."
            )
    return taken
