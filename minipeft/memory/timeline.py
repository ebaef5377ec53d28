"""The memory of training steps over time: which tensors are in use after each operation."""

import weakref
from collections.abc import Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from minipeft.memory.cuda import bytes_of_others
from minipeft.memory.measure import Tracker

PARTS_OVER_TIME = (
    "parameters", "inputs", "optimizer", "gradients", "activations", "logits", "temporaries",
)  # fmt: skip


class Timeline(Tracker):
    """Follows the operations of training steps, on fake tensors or on real ones.

        with Timeline(model, optimizer, inputs) as time:
            time.begin("forward")
            loss = model(**inputs).loss
            time.begin("backward")
            loss.backward()
            time.begin("optimizer")
            optimizer.step()

    The names of the phases are free, except that "forward" says which tensors are activations.

    peak       the most bytes in use, model and inputs included
    phases     [(name, number of its first operation)]
    allocated  on CUDA: the allocator's bytes after each operation, less those of other tensors of
               the process; otherwise empty
    """

    def __init__(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        inputs: Mapping[str, torch.Tensor],
    ) -> None:
        self.model, self.optimizer = model, optimizer
        standing = {
            "parameters": [*model.parameters(), *model.buffers()],
            "inputs": list(inputs.values()),
            "optimizer": self._states(),
            "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        }
        ids, vocab = inputs["input_ids"], model.config.vocab_size
        every = [t for tensors in standing.values() for t in tensors]
        super().__init__(every, ids.numel() * vocab, vocab)
        self.now = 0  # the number of operations so far
        self.phases: list[tuple[str, int]] = []
        self.allocated: list[int] = []
        self.births: list[tuple[int, int]] = []  # (operation, bytes) of each storage
        self.deaths: list[int | None] = []
        self.kinds: list[str | None] = []
        self.numbers: dict[int, int] = {}  # {address of a storage in use: its number}
        self.refs: list[weakref.ref] = []
        for name, tensors in standing.items():
            for t in tensors:
                self._add(t, name)
        self.device = ids.device
        real = self.device.type == "cuda" and type(ids) is torch.Tensor
        self.others = bytes_of_others(self.device, self.held) if real else None

    def __enter__(self):
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.hooks = [p.register_post_accumulate_grad_hook(self._is_gradient) for p in trained]
        return super().__enter__()

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for hook in self.hooks:
            hook.remove()
        for t in self._states():
            self._add(t, "optimizer")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.others is not None:
            self.allocated.append(torch.cuda.memory_allocated(self.device) - self.others)
        self.now += 1
        return result

    def begin(self, phase: str) -> None:
        """Begin a phase, which ends the one before."""
        self.phases.append((phase, self.now))

    def born(self, t: torch.Tensor) -> None:
        """Count the storage of a result, unless it is known."""
        wide = self.wide_held
        super().born(t)
        self._add(t, "logits" if self.wide_held > wide else None)

    def parts(self) -> dict[str, np.ndarray]:
        """{part: bytes in use after each operation, (operations,)}.

        Activations are what a forward pass leaves for the backward pass; other tensors that are
        none of the named parts are temporaries.
        """
        changes = {name: np.zeros(self.now + 1, dtype=np.int64) for name in PARTS_OVER_TIME}
        ends = [first for _, first in self.phases[1:]] + [self.now]
        forward = [(b, e) for (n, b), e in zip(self.phases, ends, strict=True) if n == "forward"]
        for (birth, size), death, kind in zip(self.births, self.deaths, self.kinds, strict=True):
            if kind is None:
                stays = any(b <= birth < e and (death or self.now + 1) > e for b, e in forward)
                kind = "activations" if stays else "temporaries"
            changes[kind][birth] += size
            if death is not None:
                changes[kind][death] -= size
        return {name: change.cumsum()[: self.now] for name, change in changes.items()}

    def _states(self):
        """The tensors of the optimizer's state."""
        states = self.optimizer.state.values()
        return [t for state in states for t in state.values() if torch.is_tensor(t)]

    def _is_gradient(self, p):
        self._add(p.grad, "gradients")

    def _add(self, t, kind):
        """Note the birth of a tensor's storage, or only its kind if it is known already."""
        storage = t.untyped_storage()
        number = self.numbers.get(storage._cdata)
        if number is not None:
            self.kinds[number] = kind or self.kinds[number]
            return
        number = self.numbers[storage._cdata] = len(self.births)

        def dies(_, key=storage._cdata):
            self.deaths[number] = self.now
            self.numbers.pop(key)

        self.births.append((self.now, storage.nbytes()))
        self.deaths.append(None)
        self.kinds.append(kind)
        self.refs.append(weakref.ref(storage, dies))
