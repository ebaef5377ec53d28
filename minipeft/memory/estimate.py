"""What a training step holds in memory: predicted from the configuration alone, and measured.

    bytes = parameters + gradients + optimiser state + activations + logits + inputs + temporaries
            + on CUDA, the workspace of cuBLAS

`estimate` adds formulas, one for each operation (tape.py); `measure` asks torch. The parts do not
all stand at once: activations are given back while gradients come. So `total`, the peak, is less
than the sum of the parts; it falls on the loss, on the backward pass of a block, or on the
optimiser's step.
"""

import copy
import re
import weakref
from collections import Counter
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, PretrainedConfig

from minipeft.memory.graph import BLOCKS, Tape
from minipeft.technique.on_model import restore, snapshot
from minipeft.training.loop import adamw, switch_checkpointing
from minipeft.training.loss import CAUSAL, kind_of

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "inputs", "temporaries")
PRECISIONS = ("float32", "bfloat16")
OPTIMIZERS = ("adamw", "adamw-foreach", "adamw8bit", "sgd")
OTHERS = re.compile("Classification|QuestionAnswering|MaskedLM|MultipleChoice|NextSentence")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass
class Memory:
    """Bytes of one training step.

    parts    the largest size that each part reaches, in bytes; None if it is not measured by itself
    total    the peak: the most that stands at one moment, in bytes
    moment   where the peak falls: "forward pass" (with 4-bit weights only), "loss", "backward pass"
             or "optimizer step"
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
        for name in self.parts:
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
        colors = ("#4477AA", "#EE6677", "#228833", "#CCBB44", "#66CCEE", "#000000", "#BBBBBB",
                  "#AA3377")  # fmt: skip
        sizes, bottom = self.at_peak or self.parts, 0
        first = not ax.patches
        for name, color in zip(sizes, colors, strict=False):
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

    config         a transformers configuration (Llama, Qwen2, Mistral, GPT-2, Bloom), of which a
                   causal language model is made
    method         a function that prepares the model: lambda model: add_lora(model, r=8); None
                   trains every parameter
    batch, seq     rows and tokens a row, all of them targets, some of them padding
    optimizer      "adamw" (two moments, each as large as the trainables; the fused kernel, as in
                   `train`), "adamw-foreach" (torch's default on CUDA: one more copy of all
                   trainables while it updates them), "adamw8bit", or "sgd" (no state)
    precision      "float32", or "bfloat16" for autocast, the weights staying as they are
    attention      "fused" or "eager"
    checkpointing  keep only the input of each block, and compute the block anew going backward
    dtype          of the base weights
    device         "cpu" or "cuda": dropout masks, attention with dropout and the workspace differ

    Sources: Rajbhandari et al. 2020 (ZeRO), section 3.1, for parameters, gradients and optimiser;
    Korthikanti et al. 2022, section 4, for activations; tape.py, operation by operation.
    Raises ValueError for an architecture, layer or setting that has no formula here.
    """
    _check(method, batch, seq, optimizer, precision, attention, checkpointing, dtype, device)
    if not isinstance(config, PretrainedConfig):
        raise ValueError(
            "memory.estimate takes a configuration of transformers, such as model.config; it was "
            f"given a {type(config).__name__}."
        )
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
    largest = max(p.numel() for p in trainables)
    # AdamW keeps two moments, of the type of the parameter. In 8 bits: whole blocks of 256, a
    # float32 for each, but float32 below 4,096 elements (quantization.py).
    small = lambda n: 2 * -(-n // 256) * (256 + 4) if n >= 4096 else 8 * n  # noqa: E731
    moments_of_all = sum(2 * p.nbytes for p in trainables)
    state = {
        "adamw": moments_of_all,
        "adamw-foreach": moments_of_all,
        "adamw8bit": sum(small(p.numel()) for p in trainables),
        "sgd": 0,
    }
    fixed = {
        "parameters": _storages([*model.parameters(), *model.buffers()]),
        "optimizer": state[optimizer],
        # Token ids, mask and labels, in int64.
        "inputs": 3 * 8 * batch * seq,
    }
    if device == "cuda":
        fixed["workspace"] = workspace()
    largest_parts, moments = _backward(tape, starts, checkpointing)
    moments["forward pass"] = _forward(tape, starts, checkpointing)
    # foreach: sqrt(v) of all parameters at once. In 8 bits, one parameter at a time: both moments
    # in float32, and 10 bytes an element to quantise the second.
    work = {"adamw-foreach": moments_of_all // 2, "adamw8bit": 18 * largest}
    moments["optimizer step"] = Counter(
        gradients=largest_parts["gradients"], temporaries=work.get(optimizer, 0)
    )
    moment = max(moments, key=lambda name: moments[name].total())
    at_peak = Counter(fixed) + moments[moment]
    parts = {name: max(m[name] for m in moments.values()) for name in PARTS} | fixed
    parts |= largest_parts
    names = [name for name in (*PARTS, "workspace") if name in parts]
    return Memory(
        {name: parts[name] for name in names},
        at_peak.total(),
        {name: at_peak[name] for name in names},
        moment,
        _block_rows(tape, starts),
    )


def workspace():
    """Bytes that cuBLAS gets on CUDA, from the first matrix product on, for as long as the process
    lives: a workspace for each thread that multiplies, and torch goes forward in one thread and
    backward in another. 32 MiB each from Hopper on, 8.1 MiB on older GPUs (torch's CUDA semantics,
    "cuBLAS workspaces", and CublasHandlePool.cpp); without a GPU in sight, Hopper is assumed."""
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    return 2 * (32 * 2**20 if hopper else (2 * 4096 + 8 * 16) * 2**10)


def _check(
    method, batch, seq, optimizer, precision, attention, checkpointing, dtype, device, tracker="own"
):
    if method is not None and not callable(method):
        raise ValueError(f"method={method!r} must be a function that takes and returns a model.")
    for name, value in {"batch": batch, "seq": seq}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 on.")
    for name, value, known in (
        ("optimizer", optimizer, OPTIMIZERS),
        ("precision", precision, PRECISIONS),
        ("attention", attention, ("fused", "eager")),
        ("device", device, ("cpu", "cuda")),
        ("tracker", tracker, ("own", "torch")),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r} is none of {', '.join(known)}.")
    if not isinstance(checkpointing, bool):
        raise ValueError(f"checkpointing={checkpointing!r} must be True or False.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating-point type, as torch.float32.")


def _build(config, method, dtype, attention):
    """The causal language model, on whatever device is current, prepared for training."""
    kernel = {"fused": "sdpa", "eager": "eager"}[attention]
    if config.model_type == "bloom":
        kernel = "eager"  # transformers has no fused attention for ALiBi
    other = [name for name in config.architectures or [] if OTHERS.search(name)]
    if other or type(config) not in AutoModelForCausalLM._model_mapping:
        _refuse_kind(other[0] if other else f"a model of type {config.model_type!r}")
    config = copy.deepcopy(config)  # a method may write into it; the caller's stays as it is
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
    model.config.use_cache = False
    return _prepared(model.train(), method)


def _refuse_kind(what):
    raise ValueError(
        f"The memory is predicted and measured of causal language models; {what} is none."
    )


def _prepared(model, method):
    model = model if method is None else method(model)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`method` returned a {type(model).__name__}; it must return the model it prepared."
        )
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


def _forward(tape, starts, checkpointing):
    """What stands at most while a weight is made from 4 bits, in bytes by part: going forward, or
    when a block is computed anew. Without such weights the loss or the backward pass has more."""
    uses = {x.storage: i for i, node in enumerate(tape.nodes) for x in node.inputs}  # the last ones
    begins = dict(starts)
    kept, live, held, peak = set(tape.held), set(), 0, Counter()
    for i, node in enumerate(tape.nodes):
        if begins.get(i):
            # Python's variables: the embedded tokens, the input of the block, and that of its MLP
            named, held = {starts[0][1].storage, begins[i].storage}, tape.bytes(begins[i])
            if checkpointing:
                kept = set(tape.held) | {v.storage for begin, v in starts if begin <= i}
                end = _last_needed(tape, min(begin for begin in begins if begin > i))
                held = 2 * held + tape.bytes(tape.nodes[end].output)
        if node.dequantised and not (checkpointing and i > end):
            now = Counter(activations=sum(map(tape.bytes, kept)))
            now["temporaries"] = sum(map(tape.bytes, (live | named) - kept))
            now["temporaries"] += held + tape.work(node, node.output)
            peak = max(peak, now, key=Counter.total)
        kept |= {value.storage for value in node.kept}
        live = {v for v in live | {node.output.storage} if uses.get(v, 0) > i}
    return peak


def _last_needed(tape, end):
    """The last operation, in a block that ends before `end`, whose gradient asks for what it kept.
    Checkpointing computes a block anew from its input to there, when the gradient has come down to
    there."""
    end -= 1
    while tape.nodes[end].dequantised or not tape.nodes[end].fresh:  # these keep nothing
        end -= 1
    return end


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

    ends = {_last_needed(tape, end): (begin, end) for begin, end in blocks}
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
            work = tape.work(node, node.inputs[0]) if node.inputs and node.inputs[0].grad else 0
            now["temporaries"] += work
            look(i)
            now["temporaries"] -= work
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
    device=None,
    tracker="own",
):
    """Run one training step and measure its memory. Returns a `Memory`, with the parts of
    `estimate` and its arguments.

    model   a transformers configuration of any architecture: the step runs on fake tensors, which
            have shapes but no numbers, so that 7B parameters fit a laptop. Or a model, as it is,
            on its own device. It is left as it was: weights, gradients, checkpointing that was on,
            modes, random numbers; of `method` nothing stays.
    device  of a configuration: "cpu" (default), or "cuda", whose rules the fake tensors then follow
            where they differ: dropout masks of a byte, fused attention with dropout, the workspace
            of cuBLAS. No GPU is needed.
    tracker whose peak is the total: "own" (above), or "torch" for torch's MemTracker, which finds
            the same bytes in several times the time, but cannot follow frozen parameters. Of a
            model on CUDA the allocator's peak is taken, less what else the process has there.
    Activations are what stands between the forward and the backward pass and did not stand before,
    without the logits and what the loss keeps of them.
    Raises ValueError for a setting that is unknown or not that of the model, for a model that is no
    causal language model, and for torch's tracker on a frozen model.
    """
    _check(method, batch, seq, optimizer, precision, attention, checkpointing, dtype,
           device or "cpu", tracker)  # fmt: skip
    options = (batch, seq, optimizer, precision, checkpointing, tracker)
    if isinstance(model, PretrainedConfig):
        rules = _rules_of_cuda() if device == "cuda" else nullcontext()
        with FakeTensorMode(), rules:
            memory = _step(_build(model, method, dtype, attention), *options)
        if device == "cuda":
            memory.parts["workspace"] = workspace()
            memory.total += workspace()
        return memory
    _refuse_model(model, attention, dtype, device)
    with _left_as_it_was(model):
        return _step(_prepared(model, method), *options)


@contextmanager
def _rules_of_cuda():
    """What CUDA does otherwise than a CPU, for tensors that say they are on a CPU: torch without
    CUDA takes no step on fake tensors that say they are on a GPU."""
    attention, dropout = nn.functional.scaled_dot_product_attention, torch._VF.dropout

    def native(x, p, training):  # keeps a byte an element
        if training and 0 < p < 1:
            return torch.native_dropout(x, p, True)[0]
        return dropout(x, p, training)

    def fused(*args, **kwargs):  # no mask is kept; a CPU would leave the fused kernel
        return attention(*args, **kwargs | {"dropout_p": 0.0})

    nn.functional.scaled_dot_product_attention, torch._VF.dropout = fused, native
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention, torch._VF.dropout = attention, dropout


def _refuse_model(model, attention, dtype, device):
    """Raise ValueError for what is no model to be measured, and settings that are not its own."""
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise ValueError(
            "memory.measure takes a configuration or a model of transformers; it was given a "
            f"{type(model).__name__}."
        )
    if kind_of(model) != CAUSAL:
        _refuse_kind(type(model).__name__)
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
    from minipeft.quantization import AdamW8bit

    return AdamW8bit(params, lr=0.0)


def _others(device, standing):
    """Bytes on a GPU that are not among the `standing` ones of this step, as other tensors of the
    process. cuBLAS gives its workspace back, to take it in the step as the first one does; the
    allocator's peak begins anew."""
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) - standing


def _step(model, batch, seq, optimizer, precision, checkpointing, tracker):
    """One training step of a model, which is left in whatever state it then is."""
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
    for p in params:  # a first step, so that the optimiser has its state
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
        others = _others(device, standing)
    half = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
    with theirs, own:
        with half:
            loss = model(**inputs, use_cache=False).loss
        activations = own.held - own.wide_held - standing
        loss.backward()
        before = own.peak
        gradients = _storages([p.grad for p in params])
        torch._foreach_zero_([p.grad for p in params])  # one that is not finite changes no weight
        update.step()
    total = own.peak
    if tracker == "torch":
        total = sum(sizes["Total"] for sizes in theirs.get_tracker_snapshot("peak").values())
    if device.type == "cuda":
        total = torch.cuda.max_memory_allocated(device) - others
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
