"""What a technique has changed on a model, so that the change can be undone.

Each change is a place in the model and the value that is not there now. Swapping the current value
with the stored one takes the technique off; swapping them again puts it back.
"""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from minipeft.refusals import Model, refuse_no_model, require

# (parameter, data, requires_grad, grad) of all parameters, and (module, attributes, copies of those
# attributes that are containers) of all modules
Snapshot = tuple[
    list[tuple[nn.Parameter, torch.Tensor, bool, torch.Tensor | None]],
    list[tuple[nn.Module, dict[str, Any], dict[str, Any]]],
]


class Absent:
    """Stands for a missing attribute or key."""


@dataclass
class Entry:
    """An attribute of a module, or one key of an attribute that is a dict, such as `_modules`."""

    module: nn.Module
    name: str
    key: Any  # of the dict; Absent for the attribute itself
    stored: object

    def place(self) -> Hashable:
        """Identifies what is changed, for comparison with other changes."""
        return id(self.module), self.name, self.key

    def exchange(self) -> None:
        """Swap the current value with the stored one."""
        entries, key = vars(self.module), self.name
        if self.key is not Absent:
            entries, key = entries[self.name], self.key
        current = entries.get(key, Absent)
        if self.stored is Absent:
            entries.pop(key, None)
        else:
            entries[key] = self.stored  # a key that is there keeps its place in the order
        self.stored = current


@dataclass
class Values:
    """The values of a base parameter that the technique trains, such as the head's."""

    parameter: nn.Parameter
    stored: torch.Tensor

    def place(self) -> Hashable:
        """As `Entry.place`."""
        return id(self.parameter)

    def exchange(self) -> None:
        """As `Entry.exchange`."""
        current = self.parameter.data
        self.parameter.data, self.stored = self.stored.to(current.device), current


@dataclass
class Record:
    """`model.minipeft`: the technique on a model, and its changes to the model."""

    technique: str
    changes: list[Entry | Values] = field(default_factory=list)
    trainable: list[tuple[nn.Parameter, bool]] = field(default_factory=list)  # before `add_*`
    is_off: bool = False  # inside `disabled`

    def add(self, before: Snapshot) -> None:
        """Record every difference from a snapshot that is not recorded yet."""
        parameters, modules = before
        known = {change.place() for change in self.changes}
        new: list[Entry | Values] = []
        if not self.trainable:  # the first time; later parameters belong to the technique
            self.trainable = [(p, requires_grad) for p, _, requires_grad, _ in parameters]
            new += [Values(p, data.clone()) for p, data, *_ in parameters if p.requires_grad]
        for module, attributes, containers in modules:
            new += _changed(module, vars(module), attributes, Absent)
            for name, items in containers.items():
                if vars(module).get(name) is attributes[name] and isinstance(items, dict):
                    new += _changed(module, attributes[name], items, name)
        self.changes += [change for change in new if change.place() not in known]

    def exchange(self) -> None:
        """Swap all current values with the stored ones."""
        for change in self.changes:
            change.exchange()


def _changed(module, now, before, name):
    """An Entry for each difference between two dicts: the attributes of a module (name is Absent),
    or its attribute `name`."""
    found = []
    for key in now.keys() | before.keys():
        stored = before.get(key, Absent)
        if now.get(key, Absent) is not stored and key not in ("training", "minipeft"):
            place = (key, Absent) if name is Absent else (name, key)
            found.append(Entry(module, *place, stored))
    return found


def record_of(model: nn.Module) -> Record:
    """The Record of a tuned model.

    Raises ValueError for a model without a technique, and for merged LoRA.
    """
    refuse_no_model(model)
    record: Any = getattr(model, "minipeft", None)
    require(record, f"This {type(model).__name__} has no technique; add one first.")
    merged = any(getattr(module, "merged", False) for module in model.modules())
    require(
        not merged,
        "The changes are merged into the weights of the base; call unmerge_lora first, or "
        "unload_lora to keep them there.",
    )
    return record


def remove(model: Model) -> Model:
    """Take the technique off: the base as it was before `add_*`, bit for bit. Returns the model.

    The trained weights are lost; save them before. The technique's hooks, modules and attributes
    are removed, a trained head gets its old weights back, and every parameter its old
    requires_grad. Raises ValueError for a model without a technique, and for merged LoRA.
    """
    record = record_of(model)
    record.exchange()
    for parameter, requires_grad in record.trainable:
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
    del model.minipeft
    return model


@contextmanager
def disabled(model: Model) -> Iterator[Model]:
    """Switch the technique off for the block: the model computes what its base computes.

        with disabled(model):
            before = model(**batch).logits

    Inside another such block it changes nothing. `model.train()` and `model.eval()` in the block
    count for the technique too. Raises ValueError for a model without a technique, and for merged
    LoRA.
    """
    record, training = record_of(model), model.training
    if record.is_off:
        yield model
        return
    record.exchange()
    record.is_off = True
    try:
        yield model
    finally:
        record.exchange()
        record.is_off = False
        if model.training != training:  # the technique's modules were not there to be told
            model.train(model.training)
