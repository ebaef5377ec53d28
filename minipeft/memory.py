"""What a training step holds in memory: predicted from the configuration alone, and measured.

    bytes = parameters + gradients + optimiser state + activations + logits + inputs + temporaries

`estimate` adds formulas, one for each operation (tape.py); `measure` asks torch. The parts do not
all stand at once: activations are given back while gradients come. So `total`, the peak, is less
than the sum of the parts; it falls on the loss, on the backward pass of a block, or on the
optimiser's step.
"""

import copy
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from minipeft.tape import BLOCKS, Tape
from minipeft.training import switch_checkpointing

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "inputs", "temporaries")
PRECISIONS = ("float32", "bfloat16")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass
class Memory:
    """Bytes of one training step.

    parts    the largest size that each part reaches, in bytes
    total    the peak: the most that stands at one moment, in bytes
    moment   where the peak falls: "loss", "backward pass" or "optimizer step"
    at_peak  the bytes of each part at that moment, which sum to `total`; empty if measured
    kept     rows (operation, shape, bytes) of what one block keeps; empty if measured
    """

    parts: dict
    total: int
    at_peak: dict
    moment: str
    kept: list

    def __str__(self):
        unit = next((u for u in ("GiB", "MiB", "KiB") if self.total >= UNITS[u]), "B")
        lines = [f"{'':14}{'largest':>12}{'at the peak':>14}   {unit}"]
        for name in PARTS:
            if self.parts[name] is not None:
                there = f"{self.at_peak[name] / UNITS[unit]:14.3f}" if self.at_peak else f"{'':14}"
                lines.append(f"{name:14}{self.parts[name] / UNITS[unit]:12.3f}{there}")
        lines.append(f"{'total':14}{'':12}{self.total / UNITS[unit]:14.3f}   at the {self.moment}")
        return "\n".join(lines)

    def block(self):
        """A table of what one block keeps, largest first, as text."""
        lines = [f"{'operation':44}{'shape':12}{'bytes':>14}"]
        for name, shape, size in sorted(self.kept, key=lambda row: -row[2]):
            lines.append(f"{name:44}{shape:12}{size:14,}")
        lines.append(f"{'one block':56}{sum(row[2] for row in self.kept):14,}")
        return "\n".join(lines)

    def plot(self, ax=None, label="", unit="GiB"):
        """Add one stacked bar, the parts at the peak, to a figure. Returns the axes."""
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure().add_subplot()
        colors = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#000000", "#BBBBBB")
        sizes, bottom = self.at_peak or self.parts, 0
        first = not ax.patches
        for name, color in zip(PARTS, colors, strict=True):
            size = (sizes[name] or 0) / UNITS[unit]
            ax.bar([label], [size], bottom=bottom, color=color, label=name if first else None)
            bottom += size
        ax.set_ylabel(f"memory ({unit})")
        return ax


# ---- prediction ---------------------------------------------------------------------------------


def estimate(
    config,
    method=None,
    *,
    batch=1,
    seq=128,
    optimizer="adamw",
    precision="float32",
    attention="fused",
    checkpointing=False,
    dtype=torch.float32,
    device="cpu",
):
    """Predict the memory of one training step. Nothing is allocated. Returns a `Memory`.

    config         a transformers configuration (Llama, Qwen2, Mistral, GPT-2, Bloom)
    method         a function that prepares the model: lambda model: add_lora(model, r=8); None
                   trains every parameter
    batch, seq     rows and tokens a row, all of them targets, some of them padding
    optimizer      "adamw" (8 bytes a trainable: two float32 moments), "adamw8bit", or "sgd" (none)
    precision      "float32", or "bfloat16" for autocast, the weights staying as they are
    attention      "fused" or "eager"
    checkpointing  keep only the input of each block, and compute the block anew going backward
    dtype          of the base weights
    device         "cpu" or "cuda": dropout masks and the optimiser's temporaries differ

    Sources: Rajbhandari et al. 2020 (ZeRO), section 3.1, for parameters, gradients and optimiser;
    Korthikanti et al. 2022, section 4, for activations; tape.py, operation by operation.
    Raises ValueError for an architecture, layer or setting that has no formula here.
    """
    _check(batch, seq, optimizer, precision, attention)
    if config.model_type not in BLOCKS:
        raise ValueError(
            f"memory.estimate has no formulas for {config.model_type!r}, only for "
            f"{', '.join(BLOCKS)}; memory.measure needs none."
        )
    with torch.device("meta"):
        model = _build(config, method, dtype, attention)
    if model._forward_pre_hooks:
        raise ValueError(
            "memory.estimate has no formulas for a method that changes the input of the model, as "
            "virtual tokens do; memory.measure needs none."
        )
    heads = config.num_attention_heads
    dims = {
        "b": batch,
        "s": seq,
        "h": config.hidden_size,
        "a": heads,
        "k": getattr(config, "num_key_value_heads", heads),
        "d": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "i": getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size,
        "V": config.vocab_size,
    }
    tape = Tape(dims, precision == "bfloat16", attention == "fused", checkpointing, device)
    starts = []  # (index of a block's first node, the block's input)
    BLOCKS[config.model_type](tape, model, config, lambda x: starts.append((len(tape.nodes), x)))

    trainables = [p for p in model.parameters() if p.requires_grad]
    count = sum(p.numel() for p in trainables)
    largest = max(p.numel() for p in trainables)
    # AdamW keeps two moments, of the type of the parameter. In 8 bits: whole blocks of 256, a
    # float32 for each, but float32 below 4,096 elements (quantization.py).
    small = lambda n: 2 * -(-n // 256) * (256 + 4) if n >= 4096 else 8 * n  # noqa: E731
    state = {
        "adamw": sum(2 * p.nbytes for p in trainables),
        "adamw8bit": sum(small(p.numel()) for p in trainables),
        "sgd": 0,
    }
    fixed = {
        "parameters": _storages([*model.parameters(), *model.buffers()]),
        "optimizer": state[optimizer],
        # Token ids, mask and labels, in int64.
        "inputs": 3 * 8 * batch * seq,
    }
    largest_parts, moments = _backward(tape, starts, checkpointing)
    # One parameter at a time: sqrt(v) and its quotient; on CUDA torch does all at once. In 8 bits:
    # both moments in float32, and 10 bytes an element to quantise the second.
    work = {"adamw": 4 * count if device == "cuda" else 8 * largest, "adamw8bit": 18 * largest}
    moments["optimizer step"] = Counter(
        gradients=largest_parts["gradients"], temporaries=work.get(optimizer, 0)
    )
    moment = max(moments, key=lambda name: moments[name].total())
    at_peak = Counter(fixed) + moments[moment]
    parts = {name: max(m[name] for m in moments.values()) for name in PARTS} | fixed
    parts |= largest_parts
    return Memory(
        {name: parts[name] for name in PARTS},
        at_peak.total(),
        {name: at_peak[name] for name in PARTS},
        moment,
        _block_rows(tape, starts),
    )


def _check(batch, seq, optimizer, precision, attention):
    for name, value in {"batch": batch, "seq": seq}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 on.")
    for name, value, known in (
        ("optimizer", optimizer, ("adamw", "adamw8bit", "sgd")),
        ("precision", precision, PRECISIONS),
        ("attention", attention, ("fused", "eager")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is none of {', '.join(known)}.")


def _build(config, method, dtype, attention):
    """The model, on whatever device is current, prepared for training."""
    kernel = {"fused": "sdpa", "eager": "eager"}[attention]
    if config.model_type == "bloom":
        kernel = "eager"  # transformers has no fused attention for ALiBi
    config = copy.deepcopy(config)  # a method may write into it; the caller's stays as it is
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
    model.config.use_cache = False
    model.train()
    if method is not None:
        model = method(model)
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing is trainable: `method` has frozen every parameter.")
    return model


def _storages(tensors):
    """Bytes of the memory behind tensors, views and tied weights counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


def _kept(nodes):
    """{storage: how many nodes keep it}"""
    return Counter(value.storage for node in nodes for value in node.kept)


def _is_logits(value):
    return "V" in value.storage.shape.split()


def _block_rows(tape, starts):
    """What the second block keeps (the first may lack gradients), each tensor once."""
    at = min(1, len(starts) - 2)
    rows, seen = [], set()
    for node in tape.nodes[starts[at][0] : starts[at + 1][0]]:
        for value in node.kept:
            if value.storage not in seen:
                seen.add(value.storage)
                rows.append((node.name, value.storage.shape, tape.bytes(value)))
    return rows


def _backward(tape, starts, checkpointing):
    """Walk the tape backward, giving back what was kept and adding gradients.

    Returns the largest size of each part, and for the loss and for the rest of the backward pass
    the composition at its peak, in bytes."""
    bounds = [index for index, _ in starts]
    blocks = list(zip(bounds, bounds[1:], strict=False)) if checkpointing else []
    inside = {i for begin, end in blocks for i in range(begin, end)}
    refs = _kept(node for i, node in enumerate(tape.nodes) if i not in inside)
    if checkpointing:
        refs += Counter(value.storage for _, value in starts[:-1])
        refs += Counter(tape.held)
    now = Counter()
    for value in refs:
        now["logits" if _is_logits(value) else "activations"] += tape.bytes(value)
    largest = {"activations": now["activations"], "logits": 0, "gradients": 0}
    anew = set()  # what a recomputed block keeps counts as temporary
    peaks = {"loss": Counter(now), "backward pass": Counter()}
    flowing, had_gradient = {}, set()  # value -> [bytes, users, part] of its gradient

    def part_of(value):
        if value in anew:
            return "temporaries"
        return "logits" if _is_logits(value) else "activations"

    def release(value):
        refs[value] -= 1
        if not refs[value]:
            now[part_of(value)] -= tape.bytes(value)

    def drop(buffer):
        buffer[1] -= 1
        if not buffer[1]:
            now[buffer[2]] -= buffer[0]

    def look(i):
        moment = "loss" if i >= bounds[-1] else "backward pass"
        if now.total() > peaks[moment].total():
            peaks[moment] = Counter(now)
        largest["logits"] = max(largest["logits"], now["logits"])

    ends = {end - 1: (begin, end) for begin, end in blocks}
    begins = {begin: value for begin, value in starts[:-1]} if checkpointing else {}
    last = len(tape.nodes) - 1
    flowing[tape.nodes[last].output] = [0, 1, "temporaries"]
    for i in range(last, -1, -1):
        node = tape.nodes[i]
        if i in ends:  # the block is computed anew: what it keeps is back
            for value, uses in _kept(tape.nodes[slice(*ends[i])]).items():
                if not refs[value]:
                    anew.add(value)
                    now["temporaries"] += tape.bytes(value)
                refs[value] += uses
        buffer = flowing.pop(node.output, None)
        if buffer:
            for x in node.inputs:
                if not x.grad:
                    continue
                part = "logits" if _is_logits(x) else "temporaries"
                if node.fresh:
                    mine = [tape.count(x.shape) * x.width, 1, part]
                    now[part] += mine[0]
                else:
                    mine = buffer
                    buffer[1] += 1
                if x in flowing:  # two gradients are summed, in place if nobody else reads it
                    other = flowing[x]
                    look(i)
                    drop(mine)
                    if other[1] > 1:
                        other[1] -= 1
                        flowing[x] = [other[0], 1, other[2]]
                        now[other[2]] += other[0]
                else:
                    flowing[x] = mine
            for weight in node.weights:
                size = weight.numel() * weight.dtype.itemsize
                tied = weight in had_gradient  # a second gradient, and the sum of both
                now["temporaries" if tied else "gradients"] += 2 * size if tied else size
            look(i)
            for weight in node.weights:
                if weight in had_gradient:
                    now["temporaries"] -= 2 * weight.numel() * weight.dtype.itemsize
                had_gradient.add(weight)
            drop(buffer)
        for value in node.kept:
            release(value.storage)
        if i in begins:
            release(begins[i].storage)
    largest["gradients"] = now["gradients"]
    return largest, peaks


# ---- measurement --------------------------------------------------------------------------------


def saved_bytes(model, inputs):
    """Bytes that autograd saves in a forward pass of `model(**inputs)`, by saved-tensor hooks.

    Each storage once: a view, a transpose and a tensor that two operations keep cost nothing more.
    Parameters and inputs are not counted: they stand anyway.
    """
    standing = [*model.parameters(), *model.buffers(), *inputs.values()]
    known = {t.untyped_storage()._cdata for t in standing}
    saved = {}

    def pack(t):
        if t.untyped_storage()._cdata not in known:
            saved[t.untyped_storage()._cdata] = (
                t.untyped_storage()
            )  # held, so no address comes twice
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(**inputs)
    del output
    return sum(storage.nbytes() for storage in saved.values())


class Tracker(TorchDispatchMode):
    """Counts the memory behind every tensor that an operation makes, from its birth to its death.

    held, peak   bytes now, and at most; begin with what stood already
    wide         the largest sum of the tensors of the loss: those of `count` elements whose last
                 dimension is the vocabulary, in bytes
    """

    def __init__(self, standing, count, vocab):
        super().__init__()
        self.alive = {s._cdata: weakref.ref(s) for s in map(torch.Tensor.untyped_storage, standing)}
        self.held = self.peak = _storages(standing)
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
    tracker="own",
):
    """Run one training step and measure its memory. Returns a `Memory`, with the parts of
    `estimate` and its arguments.

    model   a transformers configuration of any architecture: the step runs on fake tensors, which
            have shapes but no numbers, so that 7B parameters fit a laptop. Or a model, as it is,
            on its own device: its weights are not changed.
    tracker whose peak is the total: "own" (above), or "torch" for torch's MemTracker, which finds
            the same bytes in several times the time, but cannot follow frozen parameters. On CUDA
            the allocator's peak is taken.
    Activations are what stands between the forward and the backward pass and did not stand before,
    without the logits and what the loss keeps of them.
    Raises ValueError for a setting that is unknown, and for torch's tracker on a frozen model.
    """
    _check(batch, seq, optimizer, precision, attention)
    if tracker not in ("own", "torch"):
        raise ValueError(f"tracker={tracker!r} is none of own, torch.")
    fake = isinstance(model, PretrainedConfig)
    with FakeTensorMode() if fake else nullcontext():
        if fake:
            model = _build(model, method, dtype, attention)
        elif method is not None:
            model = method(model)
        return _step(model, batch, seq, optimizer, precision, checkpointing, tracker)


def _optimizer(name, params):
    if name == "adamw8bit":
        from minipeft.quantization import AdamW8bit

        return AdamW8bit(params, lr=0.0)
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    return make(params, lr=0.0, weight_decay=0.0)


def _step(model, batch, seq, optimizer, precision, checkpointing, tracker):
    params = [p for p in model.parameters() if p.requires_grad]
    device, vocab = params[0].device, model.config.vocab_size
    ids = torch.zeros(batch, seq, dtype=torch.int64, device=device)  # (batch, seq)
    mask = torch.ones_like(ids)
    if seq > 1:
        mask[0, 0] = 0  # a padded batch; without padding the fused kernel may leave the mask out
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    was_training = model.training
    model.train()
    if checkpointing:
        switch_checkpointing(model, True)
    update = _optimizer(optimizer, params)
    for p in params:  # a first step, so that the optimiser has its state
        p.grad = torch.zeros_like(p)
    update.step()
    update.zero_grad(set_to_none=True)
    weights = [*model.parameters(), *model.buffers()]
    states = [t for s in update.state.values() for t in s.values() if torch.is_tensor(t)]
    if tracker == "torch" and len(params) < len(list(model.parameters())):
        raise ValueError(
            "torch's MemTracker puts a hook on the gradient of every parameter, which a frozen one "
            'does not have; use tracker="own" for this model.'
        )
    own = Tracker([*weights, *states, *inputs.values()], batch * seq * vocab, vocab)
    standing = own.held

    def positions(head, args):  # virtual tokens in front have logits too
        own.count = args[0].numel() // args[0].shape[-1] * vocab

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(positions) if head is not None else None
    theirs = MemTracker() if tracker == "torch" else nullcontext()
    if tracker == "torch":
        theirs.track_external(model, update, *inputs.values())
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    try:
        with theirs, own:
            with half:
                loss = model(**inputs, use_cache=False).loss
            activations = own.held - own.wide_held - standing
            loss.backward()
            before = own.peak
            gradients = _storages([p.grad for p in params])
            update.step()
    finally:
        if handle is not None:
            handle.remove()
        if checkpointing:
            switch_checkpointing(model, False)
        model.train(was_training)
        update.zero_grad(set_to_none=True)
    total = own.peak
    if tracker == "torch":
        total = sum(sizes["Total"] for sizes in theirs.get_tracker_snapshot("peak").values())
    if device.type == "cuda":
        total = torch.cuda.max_memory_allocated()
    parts = dict.fromkeys(PARTS) | {
        "parameters": _storages(weights),
        "gradients": gradients,
        "optimizer": _storages(states),
        "activations": activations,
        "logits": own.wide,
        "inputs": _storages(inputs.values()),
    }
    moment = "optimizer step" if own.peak > before else "loss or backward pass"
    return Memory(parts, total, {}, moment, [])
