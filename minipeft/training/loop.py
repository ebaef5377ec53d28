"""The one training loop of the course: every technique and full fine-tuning go through it."""

import itertools
import math
import sys
from functools import partial

import torch
from tqdm import tqdm

from minipeft.freezing import trainable_parameters
from minipeft.refusals import refuse_no_model, require
from minipeft.training.batches import checked, epochs
from minipeft.training.checks import AUTOCAST, refuse_bad_input
from minipeft.training.distributed import (
    all_reduce,
    is_main_process,
    lost_rank_explained,
    rank_seed,
    rows_of_rank,
    sum_gradients,
)
from minipeft.training.history import Results
from minipeft.training.loss import (
    count_targets,
    loss_sum,
    refuse_batch,
    refuse_no_targets,
    zero,
)
from minipeft.training.modes import training
from minipeft.training.optimizer import Stepper, adamw, learning_rate, parameter_groups
from minipeft.training.random_states import unchanged_random_states
from minipeft.training.resume import begin_or_resume

READ_EVERY = 10  # steps between two reads of the loss, each of which makes the host wait for a GPU
DEFAULT_LOSS = loss_sum


@torch.no_grad()
def evaluate(model, batches):
    """Mean loss per target, in nats per token for a causal language model; other models take their
    own loss (the table in loss.py). Not the mean of batch means: batches differ in length.

    Raises ValueError if there is no batch, for one without a target or that does not fit the
    model, and for a model whose loss is not known.
    """
    refuse_no_model(model)
    was_training = model.training
    model.eval()
    try:
        loss, targets = zero(next(model.parameters()).device), 0
        for batch in checked(batches, model):
            rows, weight = rows_of_rank(batch)
            loss = loss + loss_sum(model, rows).to(loss.device) * weight
            targets += count_targets(batch, model)
    finally:
        model.train(was_training)
    require(targets, "There is no batch to evaluate on.")
    return all_reduce(loss).item() / targets


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
    classifier and other models of transformers take the labels of their own loss (loss.py).
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
    call = dict(locals())
    groups = parameter_groups(model, groups, lr, weight_decay)
    refuse_bad_input(model, batches, call, groups)
    device, params = next(model.parameters()).device, list(trainable_parameters(model).values())
    optimizer = adamw(groups, lr)
    stepper = Stepper(optimizer, params, device, precision == "float16", max_grad_norm)
    half = AUTOCAST[precision]
    autocast = partial(torch.autocast, device.type, half, enabled=half is not None)
    eval_at = due(eval_every or max_steps, max_steps) if eval_batches is not None else set()
    save_every = save_every or math.ceil(max_steps / 10)
    save_at = due(save_every, max_steps) if checkpoint_dir is not None else set()
    read_at = due(READ_EVERY, max_steps) | eval_at | save_at
    run = begin_or_resume(call, groups, model, batches, stepper, save_at)
    history, results = run.history, Results(run.history, call)
    refuse = refuse_batch if loss_sum is DEFAULT_LOSS else refuse_no_targets
    stream = epochs(batches, run.place, partial(checked, model=model, refuse=refuse), run.states)
    bar = bar_of(max_steps, history, progress)
    with bar, training(model, gradient_checkpointing), lost_rank_explained():
        for step in range(len(history.lr), max_steps):
            for group, ours in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = learning_rate(step, ours["lr"], warmup_steps, max_steps)
            history.lr.append(optimizer.param_groups[0]["lr"])
            parts = list(itertools.islice(stream, accumulation))
            targets = sum(count_targets(batch, model) for batch in parts)
            loss = zero(device)
            with rank_seed(seed, step, device):
                for batch in parts:
                    rows, weight = rows_of_rank(batch)
                    with autocast():
                        part = loss_sum(model, rows) * weight / targets
                    stepper.backward(part)
                    loss = loss + part.detach().to(device)
            loss = all_reduce(loss)
            sum_gradients(params)
            norm, skipped = stepper.step(loss)
            results.append(loss, norm, skipped)
            done = step + 1
            if done in read_at:
                results.read()
                bar.set_postfix(loss=f"{history.train_loss[-1]:.3f}", refresh=False)
            if done in eval_at:
                with unchanged_random_states(), autocast():
                    history.eval_loss.append(evaluate(model, eval_batches))
                history.eval_step.append(done)
                run.keep_best(model, done)
            if done in save_at:
                run.save(checkpoint_dir, model, batches, stepper)
            bar.update()
        run.restore_best(model)
    return history


def due(every, max_steps):
    """The numbers of steps after which something is due: each multiple of `every`, and the last."""
    return {*range(every, max_steps, every), max_steps}


def bar_of(max_steps, history, progress):
    """The progress bar, drawn by the main process only."""
    shown = progress and is_main_process()
    return tqdm(
        total=max_steps,
        initial=len(history.train_loss),
        file=sys.stdout,
        disable=not shown,
        unit="step",
    )
