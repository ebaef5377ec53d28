"""AdamW, its parameter groups and schedule, and steps that skip non-finite gradients."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import trainable_parameters
from minipeft.training.distributed import gather


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two AdamW groups, with and without weight decay, by type of module, not by name.

    Only the weight matrices of nn.Linear and Conv1D decay. Biases, norms, embeddings (and a head
    tied to them) do not, nor do parameters that a technique registers on a module of its own, such
    as LoRA's A and B or soft prompts.
    """
    matrices, tables = set(), set()
    for module in model.modules():
        # Not `module.weight`: a 4-bit layer has no such parameter, and dequantizes at each access.
        weight = {module._parameters.get("weight")} - {None}
        if isinstance(module, (nn.Linear, Conv1D)):
            matrices |= weight
        elif isinstance(module, nn.Embedding):
            tables |= weight
    params = list(trainable_parameters(model).values())
    decayed = [p for p in params if p in matrices - tables]
    others = [p for p in params if p not in matrices - tables]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def parameter_groups(
    model: nn.Module, groups: Iterable[dict[str, Any]] | None, lr: float, weight_decay: float
) -> list[dict[str, Any]]:
    """`groups`, or `decay_groups` for None, each with a peak learning rate and a weight decay.

    Raises ValueError for groups of another form.
    """
    groups = decay_groups(model, weight_decay) if groups is None else groups
    defaults = {"lr": lr, "weight_decay": weight_decay}
    try:
        return [defaults | group | {"params": list(group["params"])} for group in groups]
    except (KeyError, TypeError) as error:
        raise ValueError(
            '`groups` is not a list of dicts that each hold a list of parameters as "params"; give '
            "what torch.optim takes, or leave it out."
        ) from error


def learning_rate(step: int, lr: float, warmup_steps: int, max_steps: int) -> float:
    """The rate of step 0, 1, ...: linear from 0 to `lr` in the warm-up, then down to 0."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    return lr * (max_steps - step) / max(1, max_steps - warmup_steps)


def adamw(groups: list[dict[str, Any]], lr: float) -> torch.optim.AdamW:
    """AdamW, with torch's fused kernel where the device has one.

    The fused kernel skips the step if its tensor `found_inf` is 1, so the host need not know.
    """
    # The kernel computes wrong results on parameters that are not contiguous.
    if all(p.is_contiguous() for group in groups for p in group["params"]):
        try:
            return torch.optim.AdamW([dict(group) for group in groups], lr=lr, fused=True)
        except RuntimeError:  # a device without that kernel
            pass
    return torch.optim.AdamW([dict(group) for group in groups], lr=lr, fused=False)


class Stepper:
    """Clips the gradients and takes the optimizer step, unless loss or gradients are not finite.

    This is decided on the device, so that the host does not wait for it. From the first non-finite
    step on, all steps are skipped. If float16 gradients overflow, only that step is, and the loss
    scale is halved.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        params: list[nn.Parameter],
        device: torch.device,
        scale: bool,
        max_grad_norm: float | None,
    ) -> None:
        self.optimizer, self.params = optimizer, params
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale)
        self.limit = math.inf if max_grad_norm is None else max_grad_norm
        self.one = torch.ones((), device=device)
        self.halted = torch.zeros((), dtype=torch.bool, device=device)

    def backward(self, loss: torch.Tensor) -> None:
        self.scaler.scale(loss).backward()

    def step(self, loss: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(gradient norm before clipping, was the step skipped?), two scalars on the device."""
        scaler, optimizer = self.scaler, self.optimizer
        scaler.unscale_(optimizer)
        norm = gather(nn.utils.clip_grad_norm_(self.params, self.limit)).to(self.one.device)
        overflowed = ~norm.isfinite()
        skipped = overflowed & (scaler.scale(self.one) > 1)
        self.halted = self.halted | ~loss.isfinite() | (overflowed & ~skipped)
        if optimizer.defaults["fused"]:
            optimizer.found_inf = (self.halted | skipped).float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not (self.halted | skipped):
            optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm, skipped
