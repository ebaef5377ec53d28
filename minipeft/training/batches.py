"""The batches of a training run: checked, and repeated epoch after epoch from any position."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from minipeft.refusals import require, shown
from minipeft.training.loss import refuse_batch
from minipeft.training.random_states import random_states, set_random_states


def checked(
    batches: Iterable[dict[str, torch.Tensor]],
    model: nn.Module,
    refuse: Callable[[dict[str, torch.Tensor], int, nn.Module], None] = refuse_batch,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the batches. Raises ValueError for one without targets or that does not fit `model`."""
    try:
        numbered = enumerate(batches)
    except TypeError as error:
        raise ValueError(f"{shown(batches)} are not batches; pass a list of them.") from error
    for i, batch in numbered:
        if not isinstance(batch, Mapping) or not all(map(torch.is_tensor, batch.values())):
            raise ValueError(f"Batch {i} is {shown(batch)}, no dict of tensors; use a Collator.")
        refuse(batch, i, model)
        yield batch


def epochs(
    batches: Iterable[dict[str, torch.Tensor]],
    place: dict[str, Any],
    check: Callable[[Iterable[dict[str, torch.Tensor]]], Iterable[dict[str, torch.Tensor]]],
    states: dict[str, Any] | None = None,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches epoch after epoch, and keep `place` at the position of the next one.

    states: on resuming, the random states of the checkpoint. The epoch restarts from the states it
    began with, so that its order is the same, and the batches already used are skipped.
    """
    while True:
        samplers: list[Any] = [getattr(batches, n, None) for n in ("sampler", "batch_sampler")]
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
        require(place["index"], f"`batches` gave no batch in epoch {place['epoch']}.")
        place["epoch"] += 1
        place["index"] = 0
