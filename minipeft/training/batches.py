"""The batches of a run, checked, epoch after epoch, from any place on."""

from collections.abc import Mapping

import torch

from minipeft.refusals import shown
from minipeft.training.loss import refuse_batch
from minipeft.training.random_states import random_states, set_random_states


def checked(batches, model, refuse=refuse_batch):
    """Yield the batches. Raises ValueError for one that has no target or does not fit the model."""
    try:
        batches = enumerate(batches)
    except TypeError as error:
        raise ValueError(f"{shown(batches)} are no batches; pass a list of them.") from error
    for i, batch in batches:
        if not isinstance(batch, Mapping) or not all(map(torch.is_tensor, batch.values())):
            raise ValueError(f"Batch {i} is {shown(batch)}, no dict of tensors; use a Collator.")
        refuse(batch, i, model)
        yield batch


def epochs(batches, place, check, states=None):
    """Yield batches epoch after epoch. `place` always tells where the next one stands.

    When resuming, `states` are the random states of the checkpoint: the epoch is begun again from
    the states it began with, which draws the same order, and what was seen is skipped.
    """
    while True:
        samplers = (getattr(batches, name, None) for name in ("sampler", "batch_sampler"))
        for owner in (batches, *samplers):
            if hasattr(owner, "set_epoch"):
                owner.set_epoch(place["epoch"])
        if states:
            set_random_states(place["epoch_start"], batches)
        place["epoch_start"] = random_states(batches)
        iterator = iter(batches)
        for _ in range(place["index"]):
            next(iterator, None)
        if states:
            set_random_states(states, batches)
            states = None
        for batch in check(iterator):
            place["index"] += 1
            yield batch
        if not place["index"]:
            raise ValueError(f"`batches` gave no batch in epoch {place['epoch']}.")
        place["epoch"] += 1
        place["index"] = 0
