"""Save and restore the states of the random number generators that training draws from."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

import numpy
import torch


def _generators(batches):
    """The generators that a DataLoader or its samplers own: pairs (attribute path, generator)."""
    for path in ("generator", "sampler.generator", "batch_sampler.sampler.generator"):
        try:
            generator = attrgetter(path)(batches)
        except AttributeError:
            continue
        if isinstance(generator, torch.Generator):
            yield path, generator


def random_states(batches: object = None) -> dict[str, Any]:
    """The states of all generators that training may draw from, also of those that `batches` owns.

    JSON keeps them exactly.
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # otherwise nothing was drawn there; do not initialize it
        for i, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda:{i}"] = state
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    tensors |= {path: generator.get_state() for path, generator in _generators(batches)}
    return {
        "python": random.getstate(),
        "numpy": [x.tolist() if hasattr(x, "tolist") else x for x in numpy.random.get_state()],
        "tensors": {name: state.numpy().tobytes().hex() for name, state in tensors.items()},
    }


def set_random_states(states: dict[str, Any], batches: object = None) -> None:
    """Restore what `random_states` returned. States of devices that do not exist are ignored."""
    version, keys, gauss = states["python"]
    random.setstate((version, tuple(keys), gauss))
    numpy.random.set_state(tuple(states["numpy"]))
    generators = dict(_generators(batches))
    gpus = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    for name, text in states["tensors"].items():
        state = torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
        if name == "torch":
            torch.set_rng_state(state)
        elif name.startswith("cuda:"):
            if int(name[5:]) < gpus:
                torch.cuda.set_rng_state(state, name)
        elif name == "mps":
            if torch.backends.mps.is_available():
                torch.mps.set_rng_state(state)
        elif name in generators:
            generators[name].set_state(state)


@contextmanager
def unchanged_random_states() -> Iterator[None]:
    """Restore all random states after the block."""
    before = random_states()
    yield
    set_random_states(before)
