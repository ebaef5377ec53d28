"""The random states that a training run draws from, as JSON keeps them."""

import random
from contextlib import contextmanager
from operator import attrgetter

import numpy
import torch


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
    if torch.cuda.is_initialized():  # otherwise nothing is drawn there, and it need not wake up
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
    """Put back what `random_states` returned; states of devices that are not here are left out."""
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
def unchanged_random_states():
    """What the block draws leaves no trace: afterwards all states are what they were."""
    before = random_states()
    yield
    set_random_states(before)
