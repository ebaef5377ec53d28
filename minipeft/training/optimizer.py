"""AdamW, its parameter groups, its learning rate, and a step that bad gradients cannot take."""

import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import trainable_parameters
from minipeft.training.distributed import gather


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
    params = list(trainable_parameters(model).values())
    decayed = [p for p in params if p in matrices - tables]
    others = [p for p in params if p not in matrices - tables]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def parameter_groups(model, groups, lr, weight_decay):
    """The groups of a run, each with its peak rate and its decay. None: those of `decay_groups`."""
    groups = decay_groups(model, weight_decay) if groups is None else groups
    defaults = {"lr": lr, "weight_decay": weight_decay}
    return [defaults | group | {"params": list(group["params"])} for group in groups]


def learning_rate(step, lr, warmup_steps, max_steps):
    """Rate of step 0, 1, ...: linear up from 0 over the warm-up, then linear down to 0."""
    if step < warmup_steps:
        return lr * step / warmup_steps
    return lr * (max_steps - step) / max(1, max_steps - warmup_steps)


def adamw(groups, lr):
    """AdamW, by torch's one fused kernel for all parameters where there is one.

    The fused kernel leaves everything as it is when the tensor `found_inf` says so, which a GPU
    can find out by itself.
    """
    if all(p.is_contiguous() for group in groups for p in group["params"]):  # else it misreads
        try:
            return torch.optim.AdamW([dict(group) for group in groups], lr=lr, fused=True)
        except RuntimeError:  # a device without that kernel
            pass
    return torch.optim.AdamW([dict(group) for group in groups], lr=lr, fused=False)


class Stepper:
    """Clips the gradients and takes the step, unless loss or gradients are not finite.

    The device decides, so that the host need not wait for it: from the first bad step on every step
    is left out. A step whose float16 gradients overflowed is only skipped, and the scale halved.
    """

    def __init__(self, optimizer, params, device, scale, max_grad_norm):
        self.optimizer, self.params = optimizer, params
        self.scaler = torch.amp.GradScaler(device.type, enabled=scale)
        self.limit = math.inf if max_grad_norm is None else max_grad_norm
        self.one = torch.ones((), device=device)
        self.halted = torch.zeros((), dtype=torch.bool, device=device)

    def backward(self, loss):
        self.scaler.scale(loss).backward()

    def step(self, loss):
        """(gradient norm before clipping, was the step skipped?), two tensors on the device."""
        scaler, optimizer = self.scaler, self.optimizer
        scaler.unscale_(optimizer)
        norm = gather(nn.utils.clip_grad_norm_(self.params, self.limit)).to(self.one.device)
        overflowed = ~norm.isfinite()
        skipped = overflowed & (scaler.scale(self.one) > 1)
        self.halted = self.halted | ~loss.isfinite() | (overflowed & ~skipped)
        if optimizer.defaults["fused"]:
            optimizer.found_inf = (self.halted | skipped).float()
            optimizer.step()
        elif not (self.halted | skipped):
            optimizer.step()
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return norm, skipped
