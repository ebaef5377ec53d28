"""Measure the memory of a training step, by saved-tensor hooks and by following allocations.

A configuration is measured on fake tensors, which have shapes but no numbers, so models of billions
of parameters can be measured on a laptop. A model is measured on its own device.
"""

import weakref
from collections.abc import Iterable, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig, PreTrainedModel

from minipeft.memory.cuda import bytes_of_others, rules_of_cuda, workspace
from minipeft.memory.estimate import PARTS, Memory
from minipeft.memory.settings import (
    Method,
    build,
    check_settings,
    prepare,
    refuse_kind,
    storage_bytes,
)
from minipeft.quantized_adamw import AdamW8bit
from minipeft.technique.on_model import restore, snapshot
from minipeft.training.loss import CAUSAL, kind_of
from minipeft.training.modes import switch_checkpointing
from minipeft.training.optimizer import adamw


def saved_bytes(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> int:
    """Bytes that autograd saves in a forward pass of `model(**inputs)`, by saved-tensor hooks.

    Each storage counts once, even if it is saved twice or through a view. Parameters, buffers and
    inputs do not count, since they are in memory anyway.
    """
    known = {
        t.untyped_storage()._cdata
        for t in (*model.parameters(), *model.buffers(), *inputs.values())
    }
    saved = {}  # {address: storage}; holding the storage keeps its address from being reused

    def pack(t: torch.Tensor) -> torch.Tensor:
        storage = t.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(**inputs)
    del output
    return sum(storage.nbytes() for storage in saved.values())


class Tracker(TorchDispatchMode):
    """Counts the storages of all tensors that operations create, until they are freed.

    held, peak  bytes now and at the peak, including the `standing` tensors that exist already
    wide        the largest total of the logits and tensors of their shape: `count` elements, with
                the vocabulary `vocab` as last dimension
    """

    def __init__(self, standing: Iterable[torch.Tensor], count: int, vocab: int) -> None:
        super().__init__()
        standing = list(standing)
        self.alive = {s._cdata: weakref.ref(s) for s in map(torch.Tensor.untyped_storage, standing)}
        self.held = self.peak = storage_bytes(standing)
        self.count, self.vocab, self.wide_held, self.wide = count, vocab, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.born(t)
        return result

    def born(self, t: torch.Tensor) -> None:
        """Count the storage of a result, unless it is known."""
        storage = t.untyped_storage()
        if storage._cdata in self.alive:  # a view, or a result written in place
            return
        size = storage.nbytes()
        wide = size if t.numel() == self.count and t.shape[-1] == self.vocab else 0

        def dies(_, key=storage._cdata):
            del self.alive[key]
            self.held -= size
            self.wide_held -= wide

        self.alive[storage._cdata] = weakref.ref(storage, dies)
        self.held += size
        self.wide_held += wide
        self.peak = max(self.peak, self.held)
        self.wide = max(self.wide, self.wide_held)


def measure(
    model: PretrainedConfig | PreTrainedModel,
    method: Method | None = None,
    *,
    batch: int = 1,
    seq: int = 128,
    optimizer: str = "adamw",
    precision: str = "float32",
    attention: str = "fused",
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    tracker: str = "own",
) -> Memory:
    """Run one training step and measure its memory.

    model    a transformers configuration of any architecture: the step runs on fake tensors. Or a
             model: the step runs on its device, and then everything is restored (weights,
             gradients, checkpointing, modes, random states); `method` is undone.
    device   for a configuration: "cpu" (default), or "cuda" for the bytes on a GPU, without
             needing one: dropout masks of one byte per element, fused attention with dropout, the
             workspace of cuBLAS. Optimizers need the same on both.
    tracker  gives the total: "own" for `Tracker`, or "torch" for torch's MemTracker, which finds
             the same bytes, takes several times as long, and cannot follow frozen parameters.
             For a model on CUDA the total is the allocator's peak, less the other tensors of the
             process.
    The other arguments, and the parts, are those of `estimate`. Activations are the bytes that the
    forward pass leaves in memory, without the logits and what the loss saves of them.
    Raises ValueError for an invalid setting or one that contradicts the model, for a model that is
    no causal language model, and for torch's tracker on a model with frozen parameters.
    """
    check_settings(
        method, batch, seq, checkpointing, dtype, optimizer=optimizer, precision=precision,
        attention=attention, device=device or "cpu", tracker=tracker,
    )  # fmt: skip
    options = (batch, seq, optimizer, precision, checkpointing, tracker)
    if isinstance(model, PretrainedConfig):
        rules = rules_of_cuda() if device == "cuda" else nullcontext()
        with FakeTensorMode(), rules:
            memory = _step(build(model, method, dtype, attention), *options)
        if device == "cuda":
            memory.parts["workspace"] = workspace()
            memory.total += workspace()
        return memory
    _refuse_model(model, attention, dtype, device)
    with _left_as_it_was(model):
        return _step(prepare(model, method), *options)


def _refuse_model(model, attention, dtype, device):
    """Raise ValueError for a model that cannot be measured, and settings that contradict it."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(
            "memory.measure takes a configuration or a model of transformers; it was given a "
            f"{type(model).__name__}."
        )
    if kind_of(model) != CAUSAL:
        refuse_kind(type(model).__name__)
    kernel, first = model.config._attn_implementation, next(model.parameters())
    if attention == "eager" != kernel:
        raise ValueError(f"attention='eager', but this model was loaded with {kernel!r}.")
    if dtype not in (torch.float32, first.dtype):
        raise ValueError(f"dtype={dtype}, but this model was loaded in {first.dtype}.")
    if device not in (None, first.device.type):
        raise ValueError(f"device={device!r}, but this model is on {first.device.type!r}.")


@contextmanager
def _left_as_it_was(model):
    """Restore the model and the random states after the block."""
    before, config = snapshot(model), dict(vars(model.config))
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        restore(before)
        vars(model.config).clear()
        vars(model.config).update(config)


def _optimizer(name, params):
    if name == "adamw":
        return adamw([{"params": params}], lr=0.0)
    if name == "adamw-foreach":
        return torch.optim.AdamW(params, lr=0.0, foreach=True)
    if name == "sgd":
        return torch.optim.SGD(params, lr=0.0)
    return AdamW8bit(params, lr=0.0)


def _step(model, batch, seq, optimizer, precision, checkpointing, tracker):
    """Run one training step, which changes the model. Returns a `Memory`."""
    params = [p for p in model.parameters() if p.requires_grad]
    device, vocab = params[0].device, model.config.vocab_size
    if tracker == "torch" and len(params) < len(list(model.parameters())):
        raise ValueError(
            "torch's MemTracker puts a hook on the gradient of every parameter, which a frozen one "
            'does not have; use tracker="own" for this model.'
        )
    ids = torch.zeros(batch, seq, dtype=torch.int64, device=device)  # (batch, seq)
    mask = torch.ones_like(ids)
    if seq > 1:
        mask[0, 0] = 0  # a padded batch; without padding, fused attention may need no mask
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    model.train()
    if checkpointing and not any(getattr(m, "gradient_checkpointing", 0) for m in model.modules()):
        switch_checkpointing(model, True)
    model.zero_grad(set_to_none=True)
    update = _optimizer(optimizer, params)
    for p in params:  # a first step, which creates the optimizer's state
        p.grad = torch.zeros_like(p)
    update.step()
    update.zero_grad(set_to_none=True)
    weights = [*model.parameters(), *model.buffers()]
    states = [t for s in update.state.values() for t in s.values() if torch.is_tensor(t)]
    own = Tracker([*weights, *states, *inputs.values()], batch * seq * vocab, vocab)
    standing = own.held

    def positions(head, args):  # virtual tokens in front can have logits too
        own.count = args[0].numel() // args[0].shape[-1] * vocab

    head = model.get_output_embeddings()
    if head is not None:
        head.register_forward_pre_hook(positions)
    theirs = MemTracker() if tracker == "torch" else nullcontext()
    if tracker == "torch":
        theirs.track_external(model, update, *inputs.values())
    if device.type == "cuda":
        others = bytes_of_others(device, standing)
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with theirs, own:
        with half:
            loss = model(**inputs, use_cache=False).loss
        activations = own.held - own.wide_held - standing
        loss.backward()
        before = own.peak
        gradients = storage_bytes([p.grad for p in params])
        torch._foreach_zero_([p.grad for p in params])  # or non-finite ones would change weights
        update.step()
    total = own.peak
    if tracker == "torch":
        total = sum(sizes["Total"] for sizes in theirs.get_tracker_snapshot("peak").values())
    if device.type == "cuda":
        total = torch.cuda.max_memory_allocated(device) - others
    parts = dict.fromkeys(PARTS) | {
        "parameters": storage_bytes(weights),
        "gradients": gradients,
        "optimizer": storage_bytes(states),
        "activations": activations,
        "logits": own.wide,
        "inputs": storage_bytes(inputs.values()),
    }
    moment = "optimizer step" if own.peak > before else "loss or backward pass"
    return Memory(parts, total, {}, moment, [])
