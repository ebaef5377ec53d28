"""Write and read two files, a config and its tensors, as one.

The metadata of the tensors hold a token. Their config is adapter_config.json or, if that is
missing, the hidden file with the token in its name. So one rename replaces the tensors together
with their config, and a reader finds a matching pair at any moment, also after a writer was killed.
HF peft, which ignores the token, may find no config for a moment, but never a wrong one.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from minipeft.adapter_files.atomic import MARK, flush
from minipeft.refusals import require

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
Config = dict[str, Any]
State = dict[str, torch.Tensor]


def holds_pair(folder: Path) -> bool:
    """Is there an adapter config in the folder, ours or HF peft's?"""
    return _config_of(folder, _token(folder)) is not None


def _hidden(folder, name, token):
    return folder / f".{name}{MARK}{token}"


def _token(folder):
    """The token of the tensors in a folder, or "" if they have none or cannot be read."""
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


def write_pair(folder: Path, config: Config, state: State) -> None:
    """Write both files into an existing folder. Its other files are not changed."""
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    old = _token(folder)
    token = hashlib.sha256(f"{old}\n{text}".encode()).hexdigest()[:16]
    config_path, tensors_path = folder / CONFIG, folder / TENSORS
    new_config, new_tensors = _hidden(folder, CONFIG, token), _hidden(folder, TENSORS, token)
    old_config = _hidden(folder, CONFIG, old)  # until the tensors are replaced
    try:
        new_config.write_text(text, encoding="utf-8")
        save_file(state, new_tensors, metadata={"format": "pt", "minipeft": token})
        new_tensors.chmod(new_config.stat().st_mode)  # save_file gives only its owner access
        flush(new_config)
        flush(new_tensors)
        if config_path.exists():
            os.replace(config_path, old_config)
        os.replace(new_tensors, tensors_path)
        os.replace(new_config, config_path)
    except BaseException:
        if _token(folder) == old:  # the old pair is the valid one
            if old_config.exists() and not config_path.exists():
                os.replace(old_config, config_path)
            new_config.unlink(missing_ok=True)
            new_tensors.unlink(missing_ok=True)
        raise
    for name in (CONFIG, TENSORS):
        for hidden in folder.glob(f".{name}{MARK}*"):  # also those of a writer that was killed
            hidden.unlink()


def read_pair(folder: Path) -> tuple[Config, State]:
    """(config, {key: tensor}) of a folder, as they were written together.

    Raises ValueError if one of the two is missing or damaged.
    """
    try:
        for _ in range(100):  # more than one pass only while another process writes
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
    require(path is not None, f"{folder} is not an adapter folder: it has no {CONFIG}.")
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
        finite = not tensor.is_floating_point() or tensor.float().isfinite().all()
        require(finite, f"{key} holds NaN or infinity")
    return state
