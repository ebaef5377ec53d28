"""The one training loop of the course: every technique and the full fine-tuning go through it."""

import itertools
import json
import math
import random
import sys
from dataclasses import asdict, dataclass, field

import numpy
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from minipeft.distributed import (
    leads,
    lost_a_rank,
    my_rows,
    ranks,
    sum_gradients,
    total,
    wait,
    whole,
)
from minipeft.resume import (
    copy_of,
    discard_all_but,
    fingerprint,
    load_tensors,
    newest,
    put_back,
    random_states,
    read_state,
    save_checkpoint,
    set_random_states,
    trainables,
)

AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class History:
    """What training did. The lists have one entry per optimiser step, the eval lists one per
    evaluation. Losses are in nats per target token; `grad_norm` is taken before clipping and is
    inf where float16 gradients overflowed and the step was skipped; `lr` has no unit."""

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
        return self.eval_step[self.eval_loss.index(min(self.eval_loss))]

    def to_json(self):
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text):
        return cls(**json.loads(text))

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


def count_targets(batch):
    """How many tokens of a batch are predicted. Label 0 of a row never is: nothing precedes it."""
    return int((batch["labels"][:, 1:] != -100).sum())


def loss_sum(model, batch):
    """Cross-entropy summed over the target tokens of a batch, in nats, computed in float32.

    The logits at position t predict the label at t + 1. Positions before the first target need no
    logits, and they are the largest tensor of the step, so only the last `keep` are asked for.
    """
    device = next(model.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items()}
    labels = batch.pop("labels")[:, 1:]  # (batch, seq - 1)
    if not (labels != -100).any():  # other ranks have the targets; this one adds nothing
        return model(**batch, use_cache=False, logits_to_keep=1).logits.sum() * 0.0
    first = int((labels != -100).any(0).nonzero()[0])
    keep = labels.shape[1] - first + 1
    logits = model(**batch, use_cache=False, logits_to_keep=keep).logits[:, -keep:-1]
    targets = labels[:, first:]  # (batch, keep - 1)
    counted = targets != -100
    logits = logits[counted]  # (targets, vocab)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, targets[counted], reduction="sum")


def _checked(batches):
    """Yield the batches; refuse one that has nothing to learn from."""
    for i, batch in enumerate(batches):
        if "labels" not in batch:
            raise ValueError(f"Batch {i} has no labels, only {sorted(batch)}.")
        if not count_targets(batch):
            raise ValueError(
                f"Batch {i} has no target token: every label after the first is -100, so there is "
                "nothing to predict. Were the answers empty or cut off?"
            )
        yield batch


@torch.no_grad()
def evaluate(model, batches):
    """Mean loss in nats per target token (not the mean of batch means: batches differ in length).

    Raises ValueError if there is no batch, or one without a target token.
    """
    was_training = model.training
    model.eval()
    try:
        loss, targets = 0.0, 0
        for batch in _checked(batches):
            loss += total(loss_sum(model, my_rows(batch)).item())
            targets += count_targets(batch)
    finally:
        model.train(was_training)
    if not targets:
        raise ValueError("There is no batch to evaluate on.")
    return loss / targets


def decay_groups(model, weight_decay):
    """Two AdamW groups, told apart by the type of module (claim 28), not by name.

    Decay pulls towards zero. It goes to the weight matrices of nn.Linear and Conv1D. It does not
    go to biases, to norms of any kind, to embeddings (nor to a head tied to them), nor to
    parameters that a technique registers by itself, such as LoRA's A and B or soft prompts.
    """
    matrices, tables = set(), set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            matrices.add(module.weight)
        elif isinstance(module, nn.Embedding):
            tables.add(module.weight)
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


def _endless(batches, place, states=None):
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
        for batch in _checked(iterator):
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


def _refuse_bad_input(model, batches, device, precision, whole_numbers, groups):
    """Raise ValueError, with what to do, for input that cannot train."""
    for name, value in whole_numbers.items():
        if value is not None and (isinstance(value, float) or value < (name != "warmup_steps")):
            raise ValueError(f"{name}={value} is not a number of steps or batches.")
    if whole_numbers["warmup_steps"] > whole_numbers["max_steps"]:
        raise ValueError("warmup_steps is larger than max_steps: the rate would never reach lr.")
    if precision not in AUTOCAST:
        raise ValueError(f"precision={precision!r} is none of {', '.join(AUTOCAST)}.")
    if precision == "float16" and ranks() > 1:
        raise ValueError("Loss scaling is not tried on several ranks; take bfloat16 or float32.")
    if precision == "float16" and device.type not in ("cpu", "cuda"):
        raise ValueError(f"Loss scaling is not tried on {device.type}; take bfloat16 or float32.")
    if iter(batches) is batches:
        raise ValueError(
            "`batches` can be gone through only once, but every epoch begins it anew. "
            "Pass a list, a DataLoader or minipeft's Batches."
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


def _resume_folder(checkpoint_dir, resume, settings):
    """The checkpoint to go on from, or None. Refuses one that another call made."""
    folder = newest(checkpoint_dir)
    if not resume:
        wait()
        if leads():
            discard_all_but(None, checkpoint_dir)
        wait()
        return None
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
    tensors (batch, seq): input_ids, attention_mask, labels (not shifted; -100 is no target).
    One step takes `accumulation` batches and divides the loss by the target tokens in all of them,
    so that it equals one step on one large batch. AdamW (Loshchilov and Hutter 2019, section 3),
    beta 0.9 and 0.999, eps 1e-8; `lr` rises linearly over `warmup_steps`, then falls to 0.
    groups: parameter groups as torch.optim takes them, for rates or decays of their own; they
    follow the same rise and fall. Default: `decay_groups`. History.lr is of the first group.
    loss_sum: what is made small, a function (model, batch) that returns the loss summed over the
    target tokens, in nats. Default: the cross-entropy, which evaluation takes in any case.
    max_grad_norm: gradients are scaled down to this norm at most; None clips nothing.
    precision: of the forward pass, by autocast; float16 also scales the loss.
    gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
    eval_batches: evaluated every `eval_every` steps and at the end. The model is left with the
    weights of the lowest evaluation loss; without eval_batches with the last ones.
    checkpoint_dir: keeps the newest checkpoint, written every `save_every` steps (default: a tenth
    of the run) and at the end. The same call, with the model built as before, goes on from it.
    seed: for Python, NumPy and torch, set at the start.

    Under torchrun the same call trains on all ranks (distributed.py): `batches` are the same on
    each, which takes its rows; rank 0 writes the checkpoints.

    Raises ValueError for input that cannot train, FloatingPointError when loss or gradients are
    no longer finite, ConnectionError when another rank is lost.
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
    _refuse_bad_input(model, batches, device, precision, whole_numbers, own)
    params = list(trainables(model).values())
    optimizer = torch.optim.AdamW([dict(group) for group in own], lr=lr)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    half = {"dtype": AUTOCAST[precision], "enabled": precision != "float32"}
    save_every = save_every or math.ceil(max_steps / 10)
    history, place, best, states = History(), {"epoch": 0, "index": 0}, None, None
    folder = None
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
        folder = _resume_folder(checkpoint_dir, resume, settings)
    if folder:
        state = read_state(folder)
        history, place, states = History(**state["history"]), state["place"], state["random"]
        scaler.load_state_dict(state["scaler"])
        best = load_tensors(folder, model, optimizer)
    else:
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
    stream = _endless(batches, place, states)
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
    try:
        model.train()
        optimizer.zero_grad(set_to_none=True)  # whatever the caller left behind
        for step in range(begin, max_steps):
            for group, mine in zip(optimizer.param_groups, own, strict=True):
                group["lr"] = learning_rate(step, mine["lr"], warmup_steps, max_steps)
            parts = list(itertools.islice(stream, accumulation))
            targets = sum(map(count_targets, parts))
            loss = 0.0
            for batch in parts:
                with torch.autocast(device.type, **half):
                    part = loss_sum(model, my_rows(batch)) / targets
                scaler.scale(part).backward()
                loss += part.item()
            loss = total(loss)
            sum_gradients(params)
            scaler.unscale_(optimizer)
            limit = math.inf if max_grad_norm is None else max_grad_norm
            norm = whole(torch.nn.utils.clip_grad_norm_(params, limit)).item()
            skipped = scaler.is_enabled() and not math.isfinite(norm) and scaler.get_scale() > 1
            if not math.isfinite(loss) or not (math.isfinite(norm) or skipped):
                raise FloatingPointError(
                    f"Step {step + 1}: the loss is {loss} and the gradient norm {norm}. Usual "
                    f"reasons: lr={lr} is too high, warm-up is missing, the weights already hold "
                    f"NaN, or {precision} overflowed. The weights are those of the step before."
                )
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            history.train_loss.append(loss)
            history.lr.append(optimizer.param_groups[0]["lr"])
            history.grad_norm.append(math.inf if skipped else norm)
            done = step + 1
            if eval_batches is not None and (
                done == max_steps or done % (eval_every or done + 1) == 0
            ):
                noise = random_states()
                with torch.autocast(device.type, **half):
                    history.eval_loss.append(evaluate(model, eval_batches))
                set_random_states(noise)  # evaluation leaves no trace in the training
                history.eval_step.append(done)
                if history.best_step == done:
                    best = copy_of(trainables(model))
            if checkpoint_dir is not None and (done == max_steps or done % save_every == 0):
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
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
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
