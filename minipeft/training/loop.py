"""The one training loop of the course: every technique and full fine-tuning go through it."""

import itertools
import math
import sys
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
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
from minipeft.training.history import History, Results
from minipeft.training.loss import (
    LossSum,
    count_targets,
    loss_sum,
    refuse_batch,
    refuse_no_targets,
    zero,
)
from minipeft.training.modes import compiled, in_mode, training
from minipeft.training.optimizer import Stepper, adamw, learning_rate, parameter_groups
from minipeft.training.random_states import unchanged_random_states
from minipeft.training.resume import begin_or_resume

READ_EVERY = 10  # steps between reads of the loss; each makes the host wait for the GPU
DEFAULT_LOSS = loss_sum


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[dict[str, torch.Tensor]]) -> float:
    """Mean loss per target, in nats per token for a causal language model; other models use their
    own loss (the table in loss.py). Every target weighs the same, in long and short batches.

    Raises ValueError if there is no batch, for a batch without targets or that does not fit the
    model, and for a model whose loss is not known.
    """
    refuse_no_model(model)
    with in_mode(model, False):
        loss, targets = zero(next(model.parameters()).device), 0
        for batch in checked(batches, model):
            rows, weight = rows_of_rank(batch)
            loss = loss + loss_sum(model, rows).to(loss.device) * weight
            targets += count_targets(batch, model)
    require(targets, "There is no batch to evaluate on.")
    return all_reduce(loss).item() / targets


def train(
    model: nn.Module,
    batches: Iterable[dict[str, torch.Tensor]],
    *,
    max_steps: int,
    lr: float,
    loss_sum: LossSum = loss_sum,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    groups: Iterable[dict[str, Any]] | None = None,
    accumulation: int = 1,
    max_grad_norm: float | None = 1.0,
    precision: str = "float32",
    gradient_checkpointing: bool = False,
    compile: bool | str = False,
    eval_batches: Iterable[dict[str, torch.Tensor]] | None = None,
    eval_every: int | None = None,
    checkpoint_dir: str | Path | None = None,
    save_every: int | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> History:
    """Train the trainable parameters in place for `max_steps` optimizer steps.

    batches: an iterable that can be repeated (list, DataLoader, Batches) of dicts of int64 tensors
    (batch, seq): input_ids, attention_mask, labels (not shifted; -100 is ignored). For classifiers
    and other models of transformers, labels are what the model's own loss expects (loss.py).
    One step accumulates `accumulation` batches and divides the loss by all targets in them, so that
    it equals one step on one large batch. AdamW (Loshchilov and Hutter 2019, section 2),
    beta 0.9 and 0.999, eps 1e-8; `lr` rises linearly over `warmup_steps`, then falls linearly to 0.
    groups: parameter groups as torch.optim takes them, each with an optional lr and weight_decay;
    all follow the same schedule. Default: `decay_groups`. History.lr records the first group's.
    loss_sum: the function (model, batch) to minimize, which returns the loss summed over the
    targets. Default: cross-entropy for a causal language model, the model's own loss for others.
    Evaluation always uses the default.
    max_grad_norm: gradients are clipped to this norm; None for no clipping.
    precision: "float32", or "bfloat16" or "float16" for an autocast forward pass; float16 also
    scales the loss. On many CPUs, half precision is far slower than float32.
    gradient_checkpointing: recompute activations in the backward pass instead of keeping them.
    compile: run training steps through `torch.compile`, or with "reduce-overhead" also record and
    replay CUDA graphs. Losses equal those of False up to rounding, and the model itself stays as it
    is. Compiling takes minutes with a large model, and again at a second batch length; each length
    records its own graph, so pad with Collator(multiple_of=32).
    eval_batches: evaluated every `eval_every` steps and at the end. The model keeps the weights of
    the lowest evaluation loss; without eval_batches, the last weights.
    checkpoint_dir: keeps the newest checkpoint, written every `save_every` steps (default: a tenth
    of the run) and at the end. To resume, build the model as before and repeat the call; with
    resume=False all checkpoints in the folder are removed first.
    seed: for Python, NumPy and torch, set at the start.

    Under torchrun the same call trains on all ranks (distributed.py). Pass the same `batches` on
    each; every rank takes its own rows, and the main process writes the checkpoints.

    Raises ValueError for invalid input or a damaged checkpoint, FloatingPointError if the loss or
    gradients are not finite, ConnectionError if another rank is lost. The loss is read every 10
    steps, so the second may come late, but no weight changes from the step it names on.
    """
    call = dict(locals())
    refuse_no_model(model)
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
    modes = training(model, gradient_checkpointing), compiled(model, compile)
    with bar, modes[0], modes[1], lost_rank_explained():
        for step in range(len(history.lr), max_steps):
            for group, ours in zip(optimizer.param_groups, groups, strict=True):
                group["lr"] = learning_rate(step, ours["lr"], warmup_steps, max_steps)
            history.lr.append(optimizer.param_groups[0]["lr"])
            micro_batches = list(itertools.islice(stream, accumulation))
            targets = sum(count_targets(batch, model) for batch in micro_batches)
            loss = zero(device)
            with rank_seed(seed, step, device):
                for batch in micro_batches:
                    rows, weight = rows_of_rank(batch)
                    with autocast():
                        micro_loss = loss_sum(model, rows) * weight / targets
                    stepper.backward(micro_loss)
                    loss = loss + micro_loss.detach().to(device)
            loss = all_reduce(loss)
            sum_gradients(params)
            norm, skipped = stepper.step(loss)
            results.append(loss, norm, skipped)
            done = step + 1
            if done in read_at:
                results.read()
                bar.set_postfix(loss=f"{history.train_loss[-1]:.3f}", refresh=False)
            if eval_batches is not None and done in eval_at:
                with unchanged_random_states(), autocast():
                    history.eval_loss.append(evaluate(model, eval_batches))
                history.eval_step.append(done)
                run.keep_best(model, done)
            if checkpoint_dir is not None and done in save_at:
                run.save(checkpoint_dir, model, batches, stepper)
            bar.update()
        run.restore_best(model)
    return history


def due(every: int, max_steps: int) -> set[int]:
    """The steps, counted from 1, that are a multiple of `every`, and the last one."""
    return {*range(every, max_steps, every), max_steps}


def bar_of(max_steps: int, history: History, progress: bool) -> tqdm:
    """The progress bar, shown by the main process only."""
    return tqdm(
        total=max_steps,
        initial=len(history.train_loss),
        file=sys.stdout,
        disable=not (progress and is_main_process()),
        unit="step",
    )
