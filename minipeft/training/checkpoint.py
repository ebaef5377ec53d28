"""Checkpoints of a training run: safetensors and JSON only, each folder written atomically.

A folder `step-000123` holds everything that the next step depends on:
model.safetensors       the trainable parameters, and the persistent buffers except the constant
                        codes of a 4-bit base
optimizer.safetensors   AdamW's two moments and step count for each trainable parameter
best.safetensors        the trainable parameters of the step with the lowest evaluation loss; absent
                        if that is this step
state.json              settings, history, position in the data, random states, loss scale

A folder is removed only if it holds such files and nothing else.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from minipeft.adapter_files.atomic import MARK, discard, whole_folder
from minipeft.freezing import trainable_parameters
from minipeft.quantization import NF4Linear
from minipeft.training.distributed import barrier, broadcast, copy_of, is_main_process, put_back
from minipeft.training.history import plain

NEEDED = {"model.safetensors", "optimizer.safetensors", "state.json"}
FILES = NEEDED | {"best.safetensors"}
STATE = {"settings", "history", "place", "random", "scaler"}


def codes_of(model: nn.Module) -> set[int]:
    """The ids of the buffers that hold the weights of a 4-bit base."""
    return {id(b) for m in model.modules() if isinstance(m, NF4Linear) for b in m.buffers()}


def _model_tensors(model):
    """{name: tensor} of all that training can change, such as batch norm's running statistics."""
    state, codes = model.state_dict(keep_vars=True), codes_of(model)
    buffers = {n: b for n, b in model.named_buffers() if n in state and id(b) not in codes}
    return trainable_parameters(model) | buffers


def _number(path):
    """The step in a folder name such as step-000123, or None for another name."""
    match = re.fullmatch(r"step-(\d{6,})", path.name)
    return int(match[1]) if match else None


def _state(folder):
    """(content of state.json, what is wrong with it or None)."""
    try:
        state = json.loads((folder / "state.json").read_bytes())
    except (OSError, ValueError) as error:
        return None, f"state.json cannot be read ({error})"
    if not isinstance(state, dict) or not all(isinstance(state.get(key), dict) for key in STATE):
        return state, f"state.json is not an object with {', '.join(sorted(STATE))}"
    return state, None


def _checkpoints(root):
    """{step: folder} of the checkpoints in `root`, damaged ones included."""
    found = {}
    for path in Path(root).glob("step-*"):
        if _number(path) is None or path.is_symlink() or not path.is_dir():
            continue
        if NEEDED <= {file.name for file in path.iterdir()}:
            state, _ = _state(path)
            if not isinstance(state, dict) or STATE & state.keys():  # another's
                found[_number(path)] = path
    return found


def _is_ours(folder):
    """Does the folder hold a checkpoint and nothing else?"""
    return {file.name for file in folder.iterdir()} <= FILES and _state(folder)[1] is None


def newest(root: str | Path) -> Path | None:
    """The checkpoint folder of the highest step in `root`, or None. Rank 0 decides for all ranks.

    Raises ValueError on a rank that does not see the folder.
    """
    found = _checkpoints(root) if is_main_process() else {}
    step = broadcast(max(found, default=-1))
    folder = Path(root) / f"step-{step:06d}"
    if step >= 0 and not folder.is_dir():
        raise ValueError(f"Rank 0 goes on from {folder}; this rank needs to see the same folder.")
    return None if step < 0 else folder


def refuse_names_in_the_way(root: str | Path, saved: Callable[[int], bool]) -> None:
    """Raise ValueError if a path that a future checkpoint needs already exists.

    saved: tells for a step number whether that step gets a checkpoint.
    """
    root = Path(root)
    if root.exists() and not root.is_dir():
        raise ValueError(f"checkpoint_dir={root} is a file; give a folder, which may be new.")
    for path in root.glob("step-*"):
        step = _number(path)
        if step is not None and saved(step):
            raise ValueError(
                f"{path} is not a checkpoint of this run and would be in its way. Move it, or "
                "take another checkpoint_dir."
            )


def begin_anew(root: str | Path) -> None:
    """Remove all checkpoints in `root`. Raises ValueError if one is damaged or holds more."""
    for folder in _checkpoints(root).values():
        if not _is_ours(folder):
            raise ValueError(
                f"{folder} is damaged or holds more than a checkpoint, so it is not removed. Move "
                "it away, or take another checkpoint_dir."
            )
    discard_all_but(None, root)


def discard_all_but(kept: Path | None, root: str | Path) -> None:
    """Remove the other checkpoints in `root`, and temporary folders of killed runs."""
    for folder in _checkpoints(root).values():
        if folder != kept and _is_ours(folder):
            discard(folder, folder)
    for scratch in Path(root).glob(f".step-*{MARK}*"):
        if scratch.is_dir() and not scratch.is_symlink():
            shutil.rmtree(scratch)


def save_checkpoint(
    root: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    best: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write `root/step-<step>` atomically, then remove the older checkpoints."""
    folder = Path(root) / f"step-{step:06d}"
    names = {id(p): name for name, p in trainable_parameters(model).items()}
    moments = {
        f"{key}.{names[id(p)]}": tensor
        for p, values in optimizer.state.items()
        for key, tensor in values.items()
    }
    tensors, moments = copy_of(_model_tensors(model)), copy_of(moments)  # on every rank
    if is_main_process():
        refuse_names_in_the_way(root, lambda number: number == step)
        with whole_folder(folder) as scratch:
            save_file(tensors, scratch / "model.safetensors")
            save_file(moments, scratch / "optimizer.safetensors")
            if best is not None:
                save_file(best, scratch / "best.safetensors")
            (scratch / "state.json").write_text(json.dumps(state, default=plain))
        discard_all_but(folder, root)
    barrier()


def damaged(folder: Path, why: str) -> ValueError:
    """The error to raise for a checkpoint that a run cannot resume from."""
    return ValueError(
        f"The checkpoint {folder} is damaged, or not one of this package: {why}. Move it away to "
        "begin anew."
    )


def read_state(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's state.json. Raises ValueError if it is damaged."""
    state, wrong = _state(folder)
    if wrong:
        raise damaged(folder, wrong)
    return state


def _load(folder, name):
    try:
        return load_file(folder / name)
    except (OSError, SafetensorError, ValueError) as error:
        raise damaged(folder, f"{name} cannot be read ({error})") from error


def _refuse_others(folder, name, found, expected):
    """Raise ValueError for other keys, shapes or dtypes than expected in a file, and for NaN."""
    for key in sorted(found.keys() ^ expected.keys()):
        wrong = "is missing from" if key in expected else "is not expected in"
        raise damaged(folder, f"{key} {wrong} {name}")
    for key, tensor in found.items():
        saved, wanted = ((t.dtype, tuple(t.shape)) for t in (tensor, expected[key]))
        if saved != wanted:
            raise damaged(folder, f"{key} in {name} is {saved}, but the model's is {wanted}")
        if tensor.isnan().any():
            raise damaged(folder, f"{key} in {name} holds NaN")


def load_tensors(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, best_is_apart: bool
) -> dict[str, torch.Tensor]:
    """Load the state in `folder` into model and optimizer; return the best trainable parameters.

    best_is_apart: are the best parameters in best.safetensors, not those of this step?
    Raises ValueError if a file is damaged; the model is then unchanged.
    """
    params, targets = trainable_parameters(model), _model_tensors(model)
    tensors = _load(folder, "model.safetensors")
    _refuse_others(folder, "model.safetensors", tensors, targets)
    moments = _load(folder, "optimizer.safetensors")
    trained = [name for name in params if f"step.{name}" in moments]  # the others had no gradient
    expected: dict[str, torch.Tensor] = {f"step.{n}": torch.tensor(0.0) for n in trained}
    expected |= {f"{key}.{n}": params[n] for n in trained for key in ("exp_avg", "exp_avg_sq")}
    _refuse_others(folder, "optimizer.safetensors", moments, expected)
    best = None
    if best_is_apart:
        best = _load(folder, "best.safetensors")
        _refuse_others(folder, "best.safetensors", best, params)
    put_back(tensors, targets)
    for key, tensor in moments.items():
        key, name = key.split(".", 1)
        p = params[name]
        if key == "step":  # the fused kernel needs it on the parameter's device
            optimizer.state[p][key] = tensor.to(p.device) if optimizer.defaults["fused"] else tensor
        else:
            optimizer.state[p][key] = torch.zeros_like(p)  # keeps its strides
            put_back({name: tensor}, {name: optimizer.state[p][key]})
    return copy_of(params) if best is None else best
