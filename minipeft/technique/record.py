"""What a technique has changed on a model, so that it can be taken off again.

A change is a place in the model and what belongs there otherwise. Exchanging the two takes the
technique off; exchanging them once more puts it back.
"""

from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from minipeft.refusals import require


class Absent:
    """Stands for an entry that is not there."""


@dataclass
class Entry:
    """An attribute of a module, or one key of an attribute that is a dict, such as `_modules`."""

    module: nn.Module
    name: str
    key: object  # of the dict; Absent for the attribute itself
    other: object

    def place(self):
        return id(self.module), self.name, self.key

    def exchange(self):
        entries, key = vars(self.module), self.name
        if self.key is not Absent:
            entries, key = entries[self.name], self.key
        here = entries.get(key, Absent)
        if self.other is Absent:
            entries.pop(key, None)
        else:
            entries[key] = self.other  # one that is there keeps its place in the order
        self.other = here


@dataclass
class Values:
    """The numbers of a parameter of the base that the technique trains, such as a head's."""

    parameter: nn.Parameter
    other: object  # a tensor

    def place(self):
        return id(self.parameter)

    def exchange(self):
        here = self.parameter.data
        self.parameter.data, self.other = self.other.to(here.device), here


@dataclass
class Record:
    """`model.minipeft`: the technique on a model, and what it has changed there."""

    technique: str
    changes: list = field(default_factory=list)  # of Entry and Values
    trainable: list = field(default_factory=list)  # (parameter, requires_grad before)

    def add(self, before):
        """Note what differs from a snapshot, unless it is noted already."""
        parameters, modules = before
        known = {change.place() for change in self.changes}
        new = []
        if not self.trainable:  # else the base is noted, and the rest is the technique's own
            self.trainable = [(p, requires_grad) for p, _, requires_grad, _ in parameters]
            new += [Values(p, d.clone()) for p, d, *_ in parameters if p.requires_grad]  # a head's
        for module, attributes, inner in modules:
            new += _entries(module, vars(module), attributes, Absent)
            for name, items in inner.items():
                if vars(module).get(name) is attributes[name] and isinstance(items, dict):
                    new += _entries(module, attributes[name], items, name)
        self.changes += [change for change in new if change.place() not in known]

    def exchange(self):
        for change in self.changes:
            change.exchange()


def _entries(module, now, before, name):
    """The entries of a dict that differ from what it held before. name: Absent for vars(module)."""
    found = []
    for key in now.keys() | before.keys():
        other = before.get(key, Absent)
        if now.get(key, Absent) is not other and key not in ("training", "minipeft"):
            place = (key, Absent) if name is Absent else (name, key)
            found.append(Entry(module, *place, other))
    return found


def record_of(model):
    """The Record of a tuned model. Raises ValueError for a model without a technique."""
    record = getattr(model, "minipeft", None)
    require(record, f"This {type(model).__name__} has no technique; add one first.")
    merged = any(getattr(module, "merged", False) for module in model.modules())
    require(
        not merged,
        "The changes are merged into the weights of the base; call unmerge_lora first, or "
        "unload_lora to keep them there.",
    )
    return record


def remove(model):
    """Take the technique off: the base as it was before `add_*`, bit for bit. Returns the model.

    What was trained is lost; save it before. Hooks, modules and attributes of the technique are
    gone, a trained head has its old weights, and what required grad before requires grad again.
    Raises ValueError for a model without a technique, and for merged LoRA.
    """
    record = record_of(model)
    record.exchange()
    for parameter, requires_grad in record.trainable:
        parameter.requires_grad_(requires_grad)
        parameter.grad = None
    del model.minipeft
    return model


@contextmanager
def disabled(model):
    """In the block the model answers as its base does; afterwards it is tuned as before.

        with disabled(model):
            before = model(**batch).logits

    Raises ValueError for a model without a technique, and for merged LoRA.
    """
    record = record_of(model)
    record.exchange()
    try:
        yield model
    finally:
        record.exchange()
