"""Measure what a training step holds in memory: by asking autograd and torch's allocations.

A configuration is measured on fake tensors, which have shapes but no numbers, so that models of
billions of parameters fit a laptop. A model is measured as it is, on its own device.
"""

import weakref
from contextlib import contextmanager, nullcontext

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PretrainedConfig

from minipeft.memory.cuda import bytes_of_others, rules_of_cuda, workspace
from minipeft.memory.estimate import PARTS, Memory
from minipeft.memory.settings import (
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


def saved_bytes(model, inputs):
    """Bytes that autograd saves in a forward pass of `model(**inputs)`, by saved-tensor hooks.

    Each storage counts once: a view, a transpose and a tensor that two operations save cost nothing
    more. Parameters, buffers and inputs do not count: they are in memory anyway.
    """
    known = {
        t.untyped_storage()._cdata
        for t in (*model.parameters(), *model.buffers(), *inputs.values())
    }
    saved = {}  # storages, not only their addresses, so that no address is given out twice

    def pack(t):
        storage = t.untyped_storage()
        if storage._cdata not in known:
            saved[storage._cdata] = storage
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(**inputs)
    del output
    return sum(storage.nbytes() for storage in saved.values())


class Tracker(TorchDispatchMode):
    """Counts the storages of all tensors that operations make, until they are freed.

    held, peak  bytes now, and at most, the `standing` tensors included
    wide        the largest sum of bytes of the logits and tensors like them: those of `count`
                elements whose last dimension is the vocabulary
    """

    def __init__(self, standing, count, vocab):
        super().__init__()
        self.alive = {s._cdata: weakref.ref(s) for s in map(torch.Tensor.untyped_storage, standing)}
        self.held = self.peak = storage_bytes(standing)
        self.count, self.vocab, self.wide_held, self.wide = count, vocab, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, torch.Tensor):
                self.born(t)
        return result

    def born(self, t):
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
    model,
    method=None,
    *,
    batch=1,
    seq=128,
    optimizer="adamw",
    precision="float32",
    attention="fused",
    checkpointing=False,
    dtype=torch.float32,
    device=None,
    tracker="own",
):
    """Run one training step and measure its memory. Returns a `Memory`.

    model    a transformers configuration of any architecture: the step runs on fake tensors. Or a
             model: the step runs on it, on its own device, and leaves it as it was (weights,
             gradients, checkpointing, modes, random numbers); nothing of `method` stays.
    device   of a configuration: "cpu" (default), or "cuda" for the numbers of a GPU, which need not
             be there: dropout masks of a byte, fused attention with dropout, the workspace of
             cuBLAS. Each optimizer needs the same on both.
    tracker  whose peak is the total: "own" for `Tracker`, or "torch" for torch's MemTracker, which
             finds the same bytes in several times the time, but cannot follow frozen parameters.
             For a model on CUDA the total is the allocator's peak, less what else the process has
             there.
    The other arguments, and the parts, are those of `estimate`. Activations are what is in memory
    between forward and backward pass and was not there before, without the logits and what the loss
    saves of them.
    Raises ValueError for a setting that is unknown or not that of the model, for a model that is no
    causal language model, and for torch's tracker on a frozen model.
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
    """Raise ValueError for a model that cannot be measured, and settings that are not its own."""
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
    """After the block the model is what it was before, and so are the random numbers."""
    before, config = snapshot(model), dict(vars(model.config))
    gpus = {p.device for p in model.parameters() if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(gpus):
            yield
    finally:
        restore(model, before)
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
    """One training step of a model, which is left in the state it then has. Returns a `Memory`."""
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
        mask[0, 0] = 0  # a padded batch; without padding the fused kernel may leave the mask out
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    model.train()
    if checkpointing and not any(getattr(m, "gradient_checkpointing", 0) for m in model.modules()):
        switch_checkpointing(model, True)
    model.zero_grad(set_to_none=True)
    update = _optimizer(optimizer, params)
    for p in params:  # a first step, so that the optimizer has its state
        p.grad = torch.zeros_like(p)
    update.step()
    update.zero_grad(set_to_none=True)
    weights = [*model.parameters(), *model.buffers()]
    states = [t for s in update.state.values() for t in s.values() if torch.is_tensor(t)]
    own = Tracker([*weights, *states, *inputs.values()], batch * seq * vocab, vocab)
    standing = own.held

    def positions(head, args):  # virtual tokens in front have logits too
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
        torch._foreach_zero_([p.grad for p in params])  # one that is not finite changes no weight
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
