"""The one training loop of the course: every technique and the full fine-tuning go through it."""

import itertools
import json
import math
import random
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from numbers import Integral, Real

import numpy
import torch
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import refuse_no_model, shown
from minipeft.training.distributed import (
    leads,
    lost_a_rank,
    my_rows,
    own_noise,
    ranks,
    sum_gradients,
    total,
    wait,
    whole,
)
from minipeft.training.loss import (
    count_targets,
    loss_sum,
    refuse_batch,
    refuse_kind,
    refuse_no_targets,
)
from minipeft.training.resume import (
    begin_anew,
    copy_of,
    damaged,
    fingerprint,
    load_tensors,
    newest,
    put_back,
    random_states,
    read_state,
    refuse_names_in_the_way,
    save_checkpoint,
    set_random_states,
    trainables,
)

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
READ_EVERY = 10  # steps: to read a loss, the host waits until a GPU has done all that was begun
DEFAULT_LOSS = loss_sum


@dataclass
class History:
    """What training did. The lists have one entry per optimiser step, the eval lists one per
    evaluation. Losses are means over the targets: nats per target token of a language model, nats
    per row of a classifier, and so on (the table in losses.py). `grad_norm` is taken before
    clipping and is inf where float16 gradients overflowed and the step was skipped; `lr` has no
    unit."""

    train_loss: list = field(default_factory=list)
    lr: list = field(default_factory=list)
    grad_norm: list = field(default_factory=list)
    eval_step: list = field(default_factory=list)
    eval_loss: list = field(default_factory=list)

    @property
    def best_step(self):
        """The number of steps after which the evaluation loss was lowest, or None."""
        if not self.eval_loss:
            return None
        lowest = min(self.eval_loss, key=lambda loss: math.inf if math.isnan(loss) else loss)
        return self.eval_step[self.eval_loss.index(lowest)]

    def to_json(self):
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text):
        """The History of which `to_json` made this text. Raises ValueError for another text."""
        try:
            history = cls(**json.loads(text))
            columns = asdict(history).values()
            if not all(isinstance(v, int | float) for column in columns for v in column):
                raise ValueError("not everything in it is a number")
            if len(history.eval_step) != len(history.eval_loss):
                raise ValueError("eval_step and eval_loss are not as long as each other")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{shown(text)} is no history in JSON: {error}.") from error
        return history

    def plot(self, ax=None):
        """Draw both losses over the steps. Returns the axes."""
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure().add_subplot()
        steps = range(1, len(self.train_loss) + 1)
        ax.plot(steps, self.train_loss, color="#0072B2", linewidth=1, label="training")
        if self.eval_loss:
            ax.plot(self.eval_step, self.eval_loss, "o-", color="#D55E00", label="evaluation")
        ax.set_xlabel("optimiser step")
        ax.set_ylabel("loss (nats per target token)")
        ax.legend()
        return ax


def _checked(batches, model, refuse=refuse_batch):
    """Yield the batches; refuse one that has nothing to learn from, or not for this model."""
    try:
        batches = enumerate(batches)
    except TypeError as error:
        raise ValueError(f"{shown(batches)} are no batches; pass a list of them.") from error
    for i, batch in batches:
        if not isinstance(batch, Mapping) or not all(map(torch.is_tensor, batch.values())):
            raise ValueError(f"Batch {i} is {shown(batch)}, no dict of tensors; use a Collator.")
        refuse(batch, i, model)
        yield batch


def _zero(device):
    """A sum to begin with, on the device and as exact as the device can."""
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros((), dtype=wide, device=device)


@torch.no_grad()
def evaluate(model, batches):
    """Mean loss per target, in nats per token for a causal language model; other models take their
    own loss (the table in losses.py). Not the mean of batch means: batches differ in length.

    Raises ValueError if there is no batch, for one without a target or that does not fit the
    model, and for a model whose loss is not known.
    """
    refuse_no_model(model)
    was_training = model.training
    model.eval()
    try:
        loss, targets = _zero(next(model.parameters()).device), 0
        for batch in _checked(batches, model):
            rows, share = my_rows(batch)
            loss = loss + loss_sum(model, rows).to(loss.device) * share
            targets += count_targets(batch, model)
    finally:
        model.train(was_training)
    if not targets:
        raise ValueError("There is no batch to evaluate on.")
    return total(loss).item() / targets


def decay_groups(model, weight_decay):
    """Two AdamW groups, told apart by the type of module (claim 28), not by name.

    Decay pulls towards zero. It goes to the weight matrices of nn.Linear and Conv1D. It does not
    go to biases, to norms of any kind, to embeddings (nor to a head tied to them), nor to
    parameters that a technique registers by itself, such as LoRA's A and B or soft prompts.
    """
    matrices, tables = set(), set()
    for module in model.modules():
        # Not `module.weight`: in a 4-bit layer that is no parameter, but made anew at each look.
        weight = {module._parameters.get("weight")} - {None}
        if isinstance(module, (nn.Linear, Conv1D)):
            matrices |= weight
        elif isinstance(module, nn.Embedding):
            tables |= weight
    params = list(trainables(model).values())
    decayed = [p for p in params if p in matrices - tables]
    others = [p for p in params if p not in matrices - tables]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def learning_rate(step, lr, warmup_steps, max_steps):
    """Rate of step 0, 1, ...: up from 0 in a line over the warm-up, then down to 0 at max_steps."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    return lr * (max_steps - step) / max(1, max_steps - warmup_steps)


def _endless(batches, place, check, states=None):
    """Yield batches epoch after epoch. `place` always tells where the next one stands.

    When resuming, `states` are the random states of the checkpoint: the epoch is begun again from
    the states it began with, which draws the same order, and what was seen is skipped.
    """
    while True:
        for owner in (
            batches,
            getattr(batches, "sampler", 0),
            getattr(batches, "batch_sampler", 0),
        ):
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


def switch_checkpointing(model, on):
    """Switch gradient checkpointing. `transformers` renamed its two methods within version 5.

    The re-entrant form of torch lets no gradient through a block whose inputs do not require grad,
    which is so above a frozen embedding (claim 27). The other form has no such condition.
    """
    verb = "enable" if on else "disable"
    method = getattr(model, f"activation_checkpointing_{verb}", None)
    method = method or getattr(model, f"gradient_checkpointing_{verb}")
    method({"use_reentrant": False}) if on else method()


def _is_number(value, least, kind):
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value < math.inf


def _refuse_bad_input(
    model, batches, eval_batches, device, precision, whole_numbers, groups, max_grad_norm, seed
):
    """Raise ValueError, with what to do, for input that cannot train."""
    for name, value in whole_numbers.items():
        if value is None and name in ("eval_every", "save_every"):
            continue
        if not _is_number(value, int(name != "warmup_steps"), Integral):
            raise ValueError(f"{name}={value!r} is not a number of steps or batches.")
    for name, value in ((name, g[name]) for g in groups for name in ("lr", "weight_decay")):
        if not _is_number(value, 0, Real):
            raise ValueError(f"{name}={value!r} must be a number from 0 on.")
    if max_grad_norm is not None and not (_is_number(max_grad_norm, 0, Real) and max_grad_norm):
        raise ValueError(f"max_grad_norm={max_grad_norm!r} must be above 0, or None for no limit.")
    if not _is_number(seed, 0, Integral) or seed >= 2**32:
        raise ValueError(f"seed={seed!r} must be a whole number from 0 to 2**32 - 1.")
    if whole_numbers["warmup_steps"] > whole_numbers["max_steps"]:
        raise ValueError("warmup_steps is larger than max_steps: the rate would never reach lr.")
    if precision not in AUTOCAST:
        raise ValueError(f"precision={precision!r} is none of {', '.join(AUTOCAST)}.")
    if precision == "float16" and any(p.dtype == torch.bfloat16 for p in model.parameters()):
        raise ValueError(
            "precision='float16' does not go with weights in bfloat16; take precision='bfloat16'."
        )
    if precision == "float16" and ranks() > 1:
        raise ValueError("Loss scaling is not tried on several ranks; take bfloat16 or float32.")
    if precision == "float16" and device.type not in ("cpu", "cuda"):
        raise ValueError(f"Loss scaling is not tried on {device.type}; take bfloat16 or float32.")
    for name, given in (("batches", batches), ("eval_batches", eval_batches)):
        if given is None and name == "eval_batches":
            continue
        if not hasattr(given, "__iter__") or iter(given) is given:
            raise ValueError(
                f"`{name}` can be gone through only once, or not at all, but is begun anew again "
                "and again. Pass a list, a DataLoader or minipeft's Batches."
            )
    if not trainables(model):
        raise ValueError(
            "Nothing is trainable: every parameter has requires_grad=False. "
            "Add a technique, or unfreeze some modules."
        )
    grouped = [id(p) for group in groups for p in group["params"]]
    for name, p in trainables(model).items():
        if grouped.count(id(p)) != 1:
            raise ValueError(f"{name} is trainable, but `groups` does not hold it exactly once.")
        if p.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} is trainable but {p.dtype}: small updates would round away (claim 29). "
                "Make trainables float32, for example with model.float(), and get the speed of "
                'half precision from precision="bfloat16".'
            )


def _resume_folder(checkpoint_dir, resume, settings, saves):
    """The checkpoint to go on from, or None. Refuses one that another call made."""
    if not resume:
        wait()
        if leads():
            begin_anew(checkpoint_dir)
        wait()
    folder = newest(checkpoint_dir)
    begin, last = int(folder.name[5:]) if folder else 0, settings["max_steps"]
    refuse_names_in_the_way(checkpoint_dir, lambda step: begin < step <= last and saves(step))
    if folder:
        saved = read_state(folder)["settings"]
        for name, value in settings.items():
            if saved.get(name) != value:
                raise ValueError(
                    f"The run in {checkpoint_dir} had {name}={saved.get(name)}, this call has "
                    f"{name}={value}. Repeat the call as it was, take another checkpoint_dir, or "
                    "begin anew with resume=False, which deletes the old checkpoints."
                )
    return folder


def _resume(folder, model, optimizer, scaler, batches):
    """Go back to a checkpoint. Returns (history, place in the data, random states, best weights).

    Raises ValueError, with the model as it was, for a damaged one.
    """
    state = read_state(folder)
    try:
        history, place, states = History(**state["history"]), state["place"], state["random"]
        steps, evaluations = int(folder.name[5:]), len(history.eval_step)
        lengths = [len(values) for values in vars(history).values()]
        if lengths != [steps] * 3 + [evaluations] * 2 or place["epoch"] < 0 or place["index"] < 0:
            raise ValueError(f"its lists have {lengths} entries after {steps} steps")
        scaler.load_state_dict(state["scaler"])
        for drawn in (place["epoch_start"], states):
            set_random_states(drawn, batches)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as e:
        raise damaged(folder, f"state.json does not hold what it should ({e})") from e
    apart = history.best_step not in (None, steps)
    return history, place, states, load_tensors(folder, model, optimizer, apart)


def adamw(groups, lr):
    """AdamW in torch's one kernel for all parameters, where there is one. It can be told on the
    device to leave everything as it is, by its attribute `found_inf`."""
    if all(p.is_contiguous() for group in groups for p in group["params"]):  # else it misreads
        try:
            return torch.optim.AdamW([dict(group) for group in groups], lr=lr, fused=True)
        except RuntimeError:  # a device without that kernel
            pass
    return torch.optim.AdamW([dict(group) for group in groups], lr=lr, fused=False)


def train(
    model,
    batches,
    *,
    max_steps,
    lr,
    loss_sum=loss_sum,
    warmup_steps=0,
    weight_decay=0.0,
    groups=None,
    accumulation=1,
    max_grad_norm=1.0,
    precision="float32",
    gradient_checkpointing=False,
    eval_batches=None,
    eval_every=None,
    checkpoint_dir=None,
    save_every=None,
    resume=True,
    seed=0,
    progress=True,
):
    """Train what requires grad, in place, for `max_steps` optimiser steps. Returns a `History`.

    batches: an iterable that can be begun again (list, DataLoader, Batches) of dicts of int64
    tensors (batch, seq): input_ids, attention_mask, labels (not shifted; -100 is no target). A
    classifier and other models of transformers take the labels of their own loss (losses.py).
    One step takes `accumulation` batches and divides the loss by the targets in all of them,
    so that it equals one step on one large batch. AdamW (Loshchilov and Hutter 2019, section 3),
    beta 0.9 and 0.999, eps 1e-8; `lr` rises linearly over `warmup_steps`, then falls to 0.
    groups: parameter groups as torch.optim takes them, for rates or decays of their own; they
    follow the same rise and fall. Default: `decay_groups`. History.lr is of the first group.
    loss_sum: what is made small, a function (model, batch) that returns the loss summed over the
    targets. Default: the cross-entropy, or the model's own loss where it is no causal language
    model; evaluation takes that in any case.
    max_grad_norm: gradients are scaled down to this norm at most; None clips nothing.
    precision: of the forward pass, by autocast; float16 also scales the loss. Without instructions
    for it, as on many CPUs, half precision is far slower than float32.
    gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
    eval_batches: evaluated every `eval_every` steps and at the end. The model is left with the
    weights of the lowest evaluation loss; without eval_batches with the last ones.
    checkpoint_dir: keeps the newest checkpoint, written every `save_every` steps (default: a tenth
    of the run) and at the end. The same call, with the model built as before, goes on from it.
    seed: for Python, NumPy and torch, set at the start.

    Under torchrun the same call trains on all ranks (distributed.py): `batches` are the same on
    each, which takes its rows; rank 0 writes the checkpoints.

    Raises ValueError for input that cannot train or a damaged checkpoint, FloatingPointError when
    loss or gradients are no longer finite, ConnectionError when another rank is lost. A GPU is
    asked for the losses every 10 steps only; a loss that is not finite still changes no weight,
    nor does any step after it.
    """
    device = next(model.parameters()).device
    whole_numbers = {
        "max_steps": max_steps,
        "warmup_steps": warmup_steps,
        "accumulation": accumulation,
        "eval_every": eval_every,
        "save_every": save_every,
    }
    defaults = {"lr": lr, "weight_decay": weight_decay}
    own = decay_groups(model, weight_decay) if groups is None else groups
    own = [defaults | group | {"params": list(group["params"])} for group in own]
    _refuse_bad_input(
        model, batches, eval_batches, device, precision, whole_numbers, own, max_grad_norm, seed
    )
    if eval_batches is not None:
        refuse_kind(model)
    params = list(trainables(model).values())
    optimizer = adamw(own, lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    half = {"dtype": AUTOCAST[precision], "enabled": precision != "float32"}
    save_every = save_every or math.ceil(max_steps / 10)
    history, place, best, states = History(), {"epoch": 0, "index": 0}, None, None
    folder = None

    def evaluates(done):
        last_or_due = done == max_steps or done % (eval_every or done + 1) == 0
        return eval_batches is not None and last_or_due

    def saves(done):
        return checkpoint_dir is not None and (done == max_steps or done % save_every == 0)

    if checkpoint_dir is not None:
        settings = {
            "max_steps": max_steps,
            "lr": lr,
            "warmup_steps": warmup_steps,
            "weight_decay": weight_decay,
            "groups": groups and [[g["lr"], g["weight_decay"], len(g["params"])] for g in own],
            "accumulation": accumulation,
            "max_grad_norm": max_grad_norm,
            "precision": precision,
            "gradient_checkpointing": gradient_checkpointing,
            "eval_every": eval_every,
            "seed": seed,
            "loss_sum": getattr(loss_sum, "__qualname__", type(loss_sum).__name__),
            "model fingerprint": fingerprint(model),
        }
        folder = _resume_folder(checkpoint_dir, resume, settings, saves)
    if folder:
        history, place, states, best = _resume(folder, model, optimizer, scaler, batches)
    else:
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
    refuse = refuse_batch if loss_sum is DEFAULT_LOSS else refuse_no_targets
    check = partial(_checked, model=model, refuse=refuse)
    stream = _endless(batches, place, check, states)
    begin = len(history.train_loss)
    was_training = model.training
    checkpointing_before = any(getattr(m, "gradient_checkpointing", 0) for m in model.modules())
    if gradient_checkpointing and not checkpointing_before:
        switch_checkpointing(model, True)
    bar = tqdm(
        total=max_steps,
        initial=begin,
        file=sys.stdout,
        disable=not (progress and leads()),
        unit="step",
    )
    # What the device finds out is read every few steps; until then it decides alone.
    found = []  # for each step that was not read: loss, gradient norm, was it skipped?
    one, halted = torch.ones((), device=device), torch.zeros((), dtype=torch.bool, device=device)
    limit = math.inf if max_grad_norm is None else max_grad_norm

    def read():
        """Move what the device found into the history."""
        for loss, norm, skipped in torch.stack(found).tolist():  # here the host waits
            if not math.isfinite(loss) or not (math.isfinite(norm) or skipped):
                raise FloatingPointError(
                    f"Step {len(history.train_loss) + 1}: the loss is {loss} and the gradient norm "
                    f"{norm}. Usual reasons: lr={lr} is too high, warm-up is missing, the weights "
                    f"already hold NaN, or {precision} overflowed. The weights are those of the "
                    "step before."
                )
            history.train_loss.append(loss)
            history.grad_norm.append(math.inf if skipped else norm)
        found.clear()
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)

    try:
        model.train()
        optimizer.zero_grad(set_to_none=True)  # whatever the caller left behind
        for step in range(begin, max_steps):
            for group, mine in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = learning_rate(step, mine["lr"], warmup_steps, max_steps)
            parts = list(itertools.islice(stream, accumulation))
            targets = sum(count_targets(batch, model) for batch in parts)
            loss = _zero(device)
            with own_noise(seed, step, device):
                for batch in parts:
                    rows, share = my_rows(batch)
                    with torch.autocast(device.type, **half):
                        part = loss_sum(model, rows) * share / targets
                    scaler.scale(part).backward()
                    loss = loss + part.detach().to(device)
            loss = total(loss)
            sum_gradients(params)
            scaler.unscale_(optimizer)
            norm = whole(torch.nn.utils.clip_grad_norm_(params, limit)).to(device)
            overflowed = ~norm.isfinite()
            skipped = overflowed & (scaler.scale(one) > 1)
            halted = halted | ~loss.isfinite() | (overflowed & ~skipped)
            if optimizer.defaults["fused"]:
                optimizer.found_inf = (halted | skipped).float()
                optimizer.step()
            elif not (halted | skipped):
                optimizer.step()
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            found.append(torch.stack([loss, norm.to(loss), skipped.to(loss)]))
            history.lr.append(optimizer.param_groups[0]["lr"])
            done = step + 1
            if len(found) == READ_EVERY or done == max_steps or evaluates(done) or saves(done):
                read()
            if evaluates(done):
                noise = random_states()
                with torch.autocast(device.type, **half):
                    history.eval_loss.append(evaluate(model, eval_batches))
                set_random_states(noise)  # evaluation leaves no trace in the training
                history.eval_step.append(done)
                if history.best_step == done:
                    best = copy_of(trainables(model))
            if saves(done):
                state = {
                    "settings": settings,
                    "history": vars(history),
                    "place": place,
                    "random": random_states(batches),
                    "scaler": scaler.state_dict(),
                }
                kept = None if history.best_step in (None, done) else best
                save_checkpoint(checkpoint_dir, done, model, optimizer, state, kept)
            bar.update()
        if history.best_step not in (None, max_steps):
            put_back(best, trainables(model))
    except RuntimeError as error:
        if lost_a_rank(error):
            raise ConnectionError(
                "Another rank ended or does not answer, so this one cannot go on. Start the same "
                "command again: with checkpoint_dir it resumes from the newest checkpoint."
            ) from error
        raise
    finally:
        bar.close()
        optimizer.zero_grad(set_to_none=True)
        if gradient_checkpointing and not checkpointing_before:
            switch_checkpointing(model, False)
        model.train(was_training)
    return history
