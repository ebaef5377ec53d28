"""Checkpoints of a training run: safetensors and JSON only, each folder written whole.

A folder `step-000123` holds everything that the next step depends on:
model.safetensors       the trainable parameters, and the buffers of the model's state dict
optimizer.safetensors   AdamW's two running means and step count of each trainable
best.safetensors        the trainables of the lowest evaluation loss, unless that is this very step
state.json              settings, history, place in the data, random states, loss scale
"""

import json
import os
import random
import shutil
import zlib
from operator import attrgetter
from pathlib import Path

import numpy
import torch
from safetensors.torch import load_file, save_file

from minipeft.distributed import leads, part_of, wait, whole
from minipeft.files import whole_folder


def trainables(model):
    """{name: parameter} of what is trained; a tied parameter appears once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def copy_of(tensors):
    """The same tensors on the CPU, sharing no memory with the model."""
    return {
        name: whole(t).detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()
    }


@torch.no_grad()
def put_back(tensors, targets):
    """Copy each saved tensor into the parameter or buffer of the same name."""
    for name, tensor in tensors.items():
        targets[name].copy_(part_of(tensor, targets[name]))


def fingerprint(model):
    """A number that changes with the names, shapes and roles of parameters, or the frozen base."""
    crc = 0
    for name, p in model.named_parameters():
        crc = zlib.crc32(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}".encode(), crc)
        if not p.requires_grad:
            start = whole(p).detach().flatten()[:64].cpu()  # enough to tell two bases apart
            crc = zlib.crc32(start.view(torch.uint8).numpy().tobytes(), crc)
    return crc


def _generators(batches):
    """Generators of its own that a DataLoader or its sampler draws the order from."""
    for path in ("generator", "sampler.generator", "batch_sampler.sampler.generator"):
        try:
            generator = attrgetter(path)(batches)
        except AttributeError:
            continue
        if isinstance(generator, torch.Generator):
            yield path, generator


def random_states(batches=None):
    """Every random state that training may draw from, in a form that JSON keeps exactly."""
    kind, keys, *rest = numpy.random.get_state()
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda:{i}"] = state
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    tensors |= {path: generator.get_state() for path, generator in _generators(batches)}
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "tensors": {name: state.numpy().tobytes().hex() for name, state in tensors.items()},
    }


def set_random_states(states, batches=None):
    """Put back what `random_states` returned."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    generators = dict(_generators(batches))
    for name, text in states["tensors"].items():
        state = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        if name == "torch":
            torch.set_rng_state(state)
        elif name.startswith("cuda:"):
            torch.cuda.set_rng_state(state, name)
        elif name == "mps":
            torch.mps.set_rng_state(state)
        elif name in generators:
            generators[name].set_state(state)


def _model_tensors(model):
    kept = model.state_dict(keep_vars=True)
    return trainables(model) | {n: b for n, b in model.named_buffers() if n in kept}


def _discard(folder):
    """Remove a folder; if killed halfway, no half of it is left under its name."""
    hidden = folder.with_name(f".{folder.name}-discarded")
    os.rename(folder, hidden)
    shutil.rmtree(hidden)


def newest(root):
    """The checkpoint folder of the highest step below `root`, or None."""
    return max(Path(root).glob("step-*"), default=None, key=lambda path: path.name)


def discard_all_but(kept, root):
    """Remove the other checkpoints below `root`, and scratch that a killed run left behind."""
    for folder in Path(root).glob("step-*"):
        if folder != kept:
            _discard(folder)
    for scratch in Path(root).glob(".step-*"):
        shutil.rmtree(scratch)


def save_checkpoint(root, step, model, optimizer, state, best=None):
    """Write `root/step-<step>` whole, then remove the older ones."""
    folder = Path(root) / f"step-{step:06d}"
    names = {id(p): name for name, p in trainables(model).items()}
    moments = {
        f"{key}.{names[id(p)]}": tensor
        for p, values in optimizer.state.items()
        for key, tensor in values.items()
    }
    tensors, moments = copy_of(_model_tensors(model)), copy_of(moments)  # on every rank
    if leads():
        with whole_folder(folder) as scratch:
            save_file(tensors, scratch / "model.safetensors")
            save_file(moments, scratch / "optimizer.safetensors")
            if best is not None:
                save_file(best, scratch / "best.safetensors")
            (scratch / "state.json").write_text(json.dumps(state))
        discard_all_but(folder, root)
    wait()


def read_state(folder):
    """The JSON part of a checkpoint."""
    return json.loads((folder / "state.json").read_text())


def load_tensors(folder, model, optimizer):
    """Put model and optimiser back into the state of `folder`; return the best trainables."""
    put_back(load_file(folder / "model.safetensors"), _model_tensors(model))
    params = trainables(model)
    for name, tensor in load_file(folder / "optimizer.safetensors").items():
        key, name = name.split(".", 1)
        place = tensor if key == "step" else part_of(tensor, params[name])
        optimizer.state[params[name]][key] = place
    best = folder / "best.safetensors"
    return load_file(best) if best.exists() else copy_of(params)
