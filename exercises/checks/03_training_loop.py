"""Checks of exercise 03: they name the mistake and stay silent about the solution."""

import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from checks import Mistake
from minipeft import load_base

ARCHITECTURES = ("tiny-llama", "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox")


class _Renamed(nn.Module):
    """Layers whose names say nothing true of their type."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.linear = nn.LayerNorm(4)
        self.norm = nn.Linear(4, 4)
        self.embedding_bias = nn.Linear(4, 4)


def decay_groups(answer):
    """Check a function (model, weight_decay) -> two AdamW groups, on five architectures."""
    models = {name: load_base(name, device="cpu")[0] for name in ARCHITECTURES}
    for name, model in {**models, "A model with other names": _Renamed()}.items():
        frozen = next(p for n, p in model.named_parameters() if n.endswith("bias") or "norm" in n)
        frozen.requires_grad_(False)
        groups = answer(model, 0.1)
        if not isinstance(groups, (list, tuple)) or len(groups) != 2:
            raise Mistake("Return a list of two groups: the decayed one, then the spared one.")
        for group in groups:
            if not isinstance(group, dict) or {"params", "weight_decay"} - set(group):
                raise Mistake('A group is a dict with the keys "params" and "weight_decay".')
        decayed, spared = ([id(p) for p in list(group["params"])] for group in groups)
        if groups[0]["weight_decay"] != 0.1 or groups[1]["weight_decay"] != 0.0:
            raise Mistake(
                "The first group must have the weight decay that was passed, the second 0.0, but "
                f"they have {groups[0]['weight_decay']} and {groups[1]['weight_decay']}."
            )
        names = {id(p): n for n, p in model.named_parameters()}
        both = decayed + spared
        twice = [names[i] for i in names if both.count(i) > 1]
        if twice:
            raise Mistake(
                f"{name}: {twice[0]} is in the groups twice. A head that is tied to the embedding "
                "is one parameter under two names; the optimiser would refuse it or move it twice."
            )
        if id(frozen) in both:
            raise Mistake(f"{name}: {names[id(frozen)]} is frozen but stands in a group.")
        owners = [
            (module, part, f"{module_name}.{part}")
            for module_name, module in model.named_modules()
            for part, parameter in module.named_parameters(recurse=False)
            if id(parameter) in decayed
        ]
        for module, _, full in owners:
            if type(module).__name__.endswith("Norm"):
                raise Mistake(
                    f"{name}: {full} decays, but it belongs to a norm ({type(module).__name__}). "
                    "Names differ from model to model; ask for the type of the module."
                )
        for _, part, full in owners:
            if part == "bias":
                raise Mistake(f"{name}: {full} decays, but it is a bias.")
        for module, _, full in owners:
            if isinstance(module, nn.Embedding):
                raise Mistake(
                    f"{name}: {full} decays, but it is an embedding table (or a head tied to "
                    "one). The task exempts it; having two dimensions is not enough."
                )
        missing = [n for i, n in names.items() if i not in both and i != id(frozen)]
        if missing:
            raise Mistake(f"{name}: {missing[0]} is trainable but in neither group.")
        tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        for module_name, module in model.named_modules():
            if isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in tables:
                if id(module.weight) in spared:
                    raise Mistake(
                        f"{name}: {module_name}.weight is spared, but it is the matrix of a "
                        f"{type(module).__name__} and should decay."
                    )


def linear_schedule(answer):
    """Check a function (step, warmup, total) -> factor of the learning rate in [0, 1]."""
    for warmup, total in ((4, 12), (1, 5), (0, 6), (3, 4)):
        factors = [answer(step, warmup, total) for step in range(total + 1)]
        told = f"With warmup={warmup} and total={total}, "
        if any(not 0 <= factor <= 1 + 1e-9 for factor in factors):
            raise Mistake(f"{told}a factor is outside of 0 to 1: {factors}.")
        if warmup and not any(factors):
            raise Mistake(f"{told}the factor stays 0: nothing would ever be learnt.")
        if warmup and factors[0] != 0:
            raise Mistake(
                f"{told}step 0 has the factor {factors[0]:.3f}. It should be 0: the warm-up is off "
                "by one."
            )
        if not math.isclose(max(factors), 1):
            raise Mistake(
                f"{told}the factor never reaches 1; its peak is {max(factors):.3f}. The warm-up or "
                "the decay is off by one."
            )
        if not math.isclose(factors[warmup], 1):
            peak = factors.index(max(factors))
            raise Mistake(
                f"{told}the peak comes at step {peak}. It should come at step {warmup}: the "
                "warm-up is off by one."
            )
        if not math.isclose(factors[total], 0, abs_tol=1e-12):
            raise Mistake(
                f"{told}the decay ends at {factors[total]:.3f}, not at 0. It spans the steps "
                "after the warm-up, not all steps."
            )
        expected = [step / warmup for step in range(warmup)]
        if any(not math.isclose(a, b) for a, b in zip(factors, expected, strict=False)):
            raise Mistake(f"{told}the warm-up is no straight line: {factors[:warmup]}.")
        down = [(total - step) / (total - warmup) for step in range(warmup, total)]
        if any(not math.isclose(a, b) for a, b in zip(factors[warmup:total], down, strict=True)):
            raise Mistake(f"{told}the decay is no straight line: {factors[warmup:]}.")


def _batches(seed=0, prompts=(5, 6, 4)):
    """One-row batches with 2, 3 and 12 targets, and the same rows as one batch."""
    generator = torch.Generator().manual_seed(seed)
    width, rows = 16, []
    for prompt, targets in zip(prompts, (2, 3, 12), strict=True):
        length = prompt + targets
        ids = torch.zeros(1, width, dtype=torch.int64)
        ids[0, :length] = torch.randint(97, 123, (length,), generator=generator)
        labels = torch.full((1, width), -100)
        labels[0, prompt:length] = ids[0, prompt:length]
        mask = (torch.arange(width) < length).long()[None]
        rows.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    large = {key: torch.cat([row[key] for row in rows]) for key in rows[0]}
    return rows, large


def _model():
    model, _ = load_base("tiny-llama", device="cpu", dtype=torch.float64)
    return model.eval()


def _vector(parameters, grad=True):
    tensors = [p.grad if grad else p.detach() for p in parameters]
    if any(tensor is None for tensor in tensors):
        return None
    return torch.cat([tensor.flatten() for tensor in tensors]).clone()


def _gradient(model, weighted):
    """Gradient of a sum of losses, each with its weight, from zero."""
    model.zero_grad()
    for batch, weight in weighted:
        (model(**batch).loss * weight).backward()
    gradient = _vector(model.parameters())
    model.zero_grad(set_to_none=True)
    return gradient


def _same(a, b):
    """Equal up to rounding: norms and rotary angles are float32 even in a float64 model."""
    return bool((a - b).norm() <= 1e-4 * b.norm())


def accumulated_backward(answer):
    """Check a function (model, batches) -> loss, which leaves the gradient of one large batch."""
    model = _model()
    rows, large = _batches()
    counts = [2, 3, 12]
    truth = _gradient(model, [(large, 1.0)])
    true_loss = model(**large).loss.item()
    passes, weight = [], model.model.layers[0].mlp.up_proj.weight
    hook = weight.register_post_accumulate_grad_hook(passes.append)
    loss = answer(model, rows)
    hook.remove()
    found = _vector(model.parameters())
    if found is None:
        raise Mistake("No parameter has a gradient: did you call backward?")
    if not _same(found, truth):
        known = {
            "This is the mean of the batch means: tokens in batches with few targets weigh more. "
            "Divide by the number of target tokens in all batches.": [1 / 3] * 3,
            "The gradients of the batch means are added up but not divided: the result grows with "
            "the number of batches.": [1.0] * 3,
            "The summed losses are not divided by the number of target tokens.": counts,
            "Only the last batch is in the gradient: it was set to zero between the batches, or "
            "backward ran once at the end.": [0, 0, 12 / 17],
            "Padding or prompt tokens were counted: the divisor must be the number of labels that "
            "are not -100.": None,
        }
        for message, weights in known.items():
            if weights is None:
                ratio = (found @ truth / (truth @ truth)).item()
                if _same(found, ratio * truth):
                    raise Mistake(f"{message} Your gradient is {ratio:.3f} times the right one.")
                attended = [int(row["attention_mask"].sum()) for row in rows]
                weights = [n / sum(attended) for n in attended]
            if _same(found, _gradient(model, zip(rows, weights, strict=True))):
                raise Mistake(message)
        if _same(found, _gradient(model, [(rows[-1], 1.0)])):
            raise Mistake(list(known)[3])
        raise Mistake("The gradient is not that of one large batch of the same rows.")
    if len(passes) != len(rows):
        raise Mistake(
            f"The gradient is right, but backward ran {len(passes)} time(s) for {len(rows)} "
            "batches: the activations of several are in memory at once. Call it for each batch."
        )
    # One row now has no prompt, so its first label is a target that nothing predicts.
    model.zero_grad(set_to_none=True)
    rows_2, large_2 = _batches(prompts=(5, 0, 4))
    truth_2 = _gradient(model, [(large_2, 1.0)])
    answer(model, rows_2)
    if not _same(_vector(model.parameters()), truth_2):
        raise Mistake(
            "A row whose first label is not -100 is weighed wrongly. No position precedes that "
            "label, so the model never predicts it: do not count it."
        )
    if not isinstance(loss, float):
        raise Mistake(
            f"Return the loss as a Python float, not {type(loss).__name__}: a tensor would keep "
            "the graph alive."
        )
    if not math.isclose(loss, true_loss, rel_tol=1e-6):
        raise Mistake(
            f"The gradient is right, but the loss returned is {loss:.4f}; the mean over all "
            f"target tokens is {true_loss:.4f}."
        )


def training_step(answer):
    """Check a function (model, optimizer, batches, max_grad_norm) -> (loss, gradient norm)."""
    rows, large = _batches()
    lr, limit = 0.5, 0.25
    model = _model()
    start = _vector(model.parameters(), grad=False)
    truth = _gradient(model, [(large, 1.0)])
    true_norm = truth.norm().item()
    clipped = truth * min(1.0, limit / true_norm)

    def ran(stale):
        """Move of the weights, and what was returned, with a left-over gradient of `stale`."""
        model = _model()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        if stale:
            for parameter in model.parameters():
                parameter.grad = torch.full_like(parameter, stale)
        step, steps = optimizer.step, []
        optimizer.step = lambda *args: (steps.append(1), step(*args))[1]
        returned = answer(model, optimizer, rows, limit)
        if len(steps) > 1:
            raise Mistake(
                f"optimizer.step() ran {len(steps)} times. It belongs after the loop: one step on "
                "the gradient of all batches."
            )
        return (start - _vector(model.parameters(), grad=False)) / lr, returned

    move, returned = ran(0.0)
    if not move.any():
        raise Mistake(
            "The weights did not move: the step came before backward, the gradient was set to "
            "zero before the step, or there was no step."
        )
    if not _same(move, clipped):
        if _same(move, truth):
            raise Mistake(
                "The weights moved by the unclipped gradient: clip after backward and before the "
                "step."
            )
        means = _gradient(model, [(row, 1 / 3) for row in rows])
        if _same(move, means * min(1.0, limit / means.norm().item())):
            raise Mistake("This is the mean of the batch means; divide by all target tokens.")
        if _same(move, truth.clamp(-limit, limit)):
            raise Mistake(
                "Each entry was clipped by itself, which turns the gradient into another "
                "direction. Clip the norm of the whole gradient."
            )
        direction = torch.nn.functional.cosine_similarity(move, truth, dim=0)
        if direction > 1 - 1e-9:
            raise Mistake(
                f"The step has the right direction but the length {move.norm():.3f} instead of "
                f"{clipped.norm():.3f}. Clip by the norm of the whole gradient, once."
            )
        raise Mistake(
            "The step is not that of one large batch. Was the gradient clipped or set to zero "
            "after each batch rather than once?"
        )
    stale_move, _ = ran(1.0)
    if not _same(stale_move, clipped):
        raise Mistake(
            "A gradient left over from before got into the step: zero_grad is missing, or comes "
            "too late."
        )
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise Mistake("Return two numbers: the loss and the gradient norm.")
    loss, norm = (float(value) for value in returned)
    if math.isclose(norm, clipped.norm().item(), rel_tol=1e-4):
        raise Mistake(
            "The norm returned was taken after clipping, where it is always the limit. Return the "
            "norm before: it shows trouble."
        )
    if not math.isclose(norm, true_norm, rel_tol=1e-4):
        raise Mistake(f"The gradient norm is {true_norm:.4f}, but {norm:.4f} was returned.")
    if not math.isclose(loss, model(**large).loss.item(), rel_tol=1e-6):
        raise Mistake("The loss returned is not the mean over all target tokens before the step.")
