"""Start a run, or resume it from its newest checkpoint exactly where it stopped."""

import random
import zlib
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import nn

from minipeft.freezing import trainable_parameters
from minipeft.training.checkpoint import (
    begin_anew,
    codes_of,
    damaged,
    load_tensors,
    newest,
    read_state,
    refuse_names_in_the_way,
    save_checkpoint,
)
from minipeft.training.distributed import barrier, copy_of, gather, is_main_process, put_back
from minipeft.training.history import History
from minipeft.training.optimizer import Stepper
from minipeft.training.random_states import random_states, set_random_states

SETTINGS = (  # arguments of `train` that must be the same when a run is resumed
    "max_steps", "lr", "warmup_steps", "weight_decay", "accumulation", "max_grad_norm", "precision",
    "gradient_checkpointing", "eval_every", "seed",
)  # fmt: skip


@dataclass
class Progress:
    """The state of a run, without its model and optimizer.

    place: {"epoch": ..., "index": ...} of the next batch. states: the random states to resume with.
    best: {name: tensor} of the lowest evaluation loss, on the CPU.
    """

    settings: dict[str, Any]
    history: History = field(default_factory=History)
    place: dict[str, Any] = field(default_factory=lambda: {"epoch": 0, "index": 0})
    states: dict[str, Any] | None = None
    best: dict[str, torch.Tensor] = field(default_factory=dict)

    def keep_best(self, model: nn.Module, done: int) -> None:
        """After the evaluation at step `done`: copy the trainable parameters if it is the best."""
        if self.history.best_step == done:
            self.best = copy_of(trainable_parameters(model))

    def restore_best(self, model: nn.Module) -> None:
        """At the end: load the parameters of the best evaluation, unless it was the last step's."""
        if self.history.best_step not in (None, len(self.history.train_loss)):
            put_back(self.best, trainable_parameters(model))

    def save(self, root: str | Path, model: nn.Module, batches: object, stepper: Stepper) -> None:
        """Write a checkpoint of this step in place of the previous one."""
        done = len(self.history.train_loss)
        state = {
            "settings": self.settings,
            "history": vars(self.history),
            "place": self.place,
            "random": random_states(batches),
            "scaler": stepper.scaler.state_dict(),
        }
        best = None if self.history.best_step in (None, done) else self.best
        save_checkpoint(root, done, model, stepper.optimizer, state, best)


def begin_or_resume(
    call: dict[str, Any],
    groups: list[dict[str, Any]],
    model: nn.Module,
    batches: object,
    stepper: Stepper,
    save_at: Collection[int],
) -> Progress:
    """Load the newest checkpoint, or set the seed for a new run. Returns its Progress.

    call: the arguments of `train` by name. save_at: the steps after which checkpoints are written.
    Raises ValueError if the checkpoint is damaged or comes from another call.
    """
    settings, folder = {}, None
    if call["checkpoint_dir"] is not None:
        given = [[g["lr"], g["weight_decay"], len(g["params"])] for g in groups]
        loss_sum = call["loss_sum"]
        settings = {name: call[name] for name in SETTINGS} | {
            "groups": call["groups"] and given,
            "loss_sum": getattr(loss_sum, "__qualname__", type(loss_sum).__name__),
            "model fingerprint": fingerprint(model),
        }
        folder = _newest(call["checkpoint_dir"], call["resume"], settings, save_at)
    if folder:
        return _resumed(folder, settings, model, batches, stepper)
    random.seed(int(call["seed"]))  # it refuses NumPy's integers
    numpy.random.seed(call["seed"])
    torch.manual_seed(call["seed"])
    return Progress(settings)


def fingerprint(model: nn.Module) -> int:
    """A checksum of the names, shapes, dtypes and requires_grad of the parameters, and of the first
    numbers of each frozen one."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters())
    tensors |= {name: b for name, b in model.named_buffers() if id(b) in codes_of(model)}
    crc = 0
    for name, p in tensors.items():
        crc = zlib.crc32(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}".encode(), crc)
        if not p.requires_grad:
            start = gather(p).detach().flatten()[:64].cpu()  # enough to tell two bases apart
            crc = zlib.crc32(start.view(torch.uint8).numpy().tobytes(), crc)
    return crc


def _newest(root, resume, settings, save_at):
    """The checkpoint to resume from, or None. Raises ValueError for one of another call."""
    if not resume:
        barrier()
        if is_main_process():
            begin_anew(root)
        barrier()
    folder = newest(root)
    begin, last = int(folder.name[5:]) if folder else 0, settings["max_steps"]
    refuse_names_in_the_way(root, lambda step: begin < step <= last and step in save_at)
    if folder:
        saved = read_state(folder)["settings"]
        for name, value in settings.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"The run in {root} had {name}={saved.get(name)}, this call has "
                    f"{name}={value}. Repeat the call as it was, take another checkpoint_dir, or "
                    "begin anew with resume=False, which deletes the old checkpoints."
                )
    return folder


def _resumed(folder, settings, model, batches, stepper):
    """Load a checkpoint. Raises ValueError for a damaged one; the model is then unchanged."""
    state = read_state(folder)
    try:
        history, place, states = History(**state["history"]), state["place"], state["random"]
        steps, evaluations = int(folder.name[5:]), len(history.eval_step)
        lengths = [len(values) for values in vars(history).values()]
        if lengths != [steps] * 3 + [evaluations] * 2 or place["epoch"] < 0 or place["index"] < 0:
            raise ValueError(f"its lists have {lengths} entries after {steps} steps")
        stepper.scaler.load_state_dict(state["scaler"])
        for random_state in (place["epoch_start"], states):
            set_random_states(random_state, batches)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise damaged(folder, f"state.json does not hold what it should ({e})") from e
    apart = history.best_step not in (None, steps)
    best = load_tensors(folder, model, stepper.optimizer, apart)
    return Progress(settings, history, place, states, best)
