"""Checks of exercise 03: they name the mistake and stay silent about the solution."""

import math

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from checks import Mistake
from minipeft import load_base

ARCHITECTURES = ("tiny-llama", "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox")


class _OwnLinear(nn.Linear):
    """A linear layer of a class of its own."""


class _Renamed(nn.Module):
    """Layers whose names say nothing true of their type, and a matrix without a layer."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.linear = nn.LayerNorm(4)
        self.projection = nn.LayerNorm(4)
        self.norm = nn.Linear(4, 4)
        self.embedding_bias = nn.Linear(4, 4)
        self.layernorm = Conv1D(4, 4)
        self.wte = _OwnLinear(4, 4)
        self.vectors = nn.Parameter(torch.zeros(3, 4))
        self.last = nn.Linear(4, 5)
        self.last.weight = self.words.weight


def decay_groups(answer):
    """Check a function (model, weight_decay) -> two AdamW groups, on six models."""
    models = {name: load_base(name, device="cpu")[0] for name in ARCHITECTURES}
    models["A model with other names"] = _Renamed()
    for number, (name, model) in enumerate(models.items(), start=1):
        frozen = _freeze_some(model)
        decay = 0.1 / number
        decayed, spared = _checked_groups(answer(model, decay), decay)
        names = {id(p): n for n, p in model.named_parameters()}
        both = decayed + spared
        if {id(p) for p in model.parameters() if not p.requires_grad} != frozen:
            raise Mistake(f"{name}: afterward other parameters are frozen than before.")
        if set(both) - set(names):
            raise Mistake(
                f"{name}: a group holds a tensor that is not a parameter of the model. AdamW would "
                "move that copy, and the model would stay what it is."
            )
        twice = [names[i] for i in names if both.count(i) > 1]
        if twice:
            raise Mistake(
                f"{name}: {twice[0]} is in the groups twice. A head that is tied to the embedding "
                "is one parameter under two names; the optimizer would refuse it or move it twice."
            )
        for group, kind in ((spared, "spared"), (decayed, "decayed")):
            wrong = [names[i] for i in names if i in frozen and i in group]
            if wrong:
                raise Mistake(f"{name}: {wrong[0]} is frozen but stands in the {kind} group.")
        _look_at_decayed(name, model, decayed)
        missing = [n for i, n in names.items() if i not in both and i not in frozen]
        if missing:
            raise Mistake(f"{name}: {missing[0]} is trainable but in neither group.")
        _look_at_spared(name, model, spared)


def _freeze_some(model):
    """Freeze one matrix and one vector of the model. Returns their ids."""
    linears = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    vector = next(p for p in model.parameters() if p.dim() == 1)
    for parameter in (linears[0], vector):
        parameter.requires_grad_(False)
    return {id(linears[0]), id(vector)}


def _checked_groups(groups, decay):
    """Ids of the parameters in each of the two groups."""
    if not isinstance(groups, (list, tuple)) or len(groups) != 2:
        raise Mistake("Return a list of two groups: the decayed one, then the spared one.")
    for group in groups:
        if not isinstance(group, dict) or {"params", "weight_decay"} - set(group):
            raise Mistake('A group is a dict with the keys "params" and "weight_decay".')
        if not isinstance(group["params"], (list, tuple)):
            raise Mistake(
                f'"params" is a {type(group["params"]).__name__}; make it a list. A set has no '
                "order, which a checkpoint needs, and a generator is empty after one look."
            )
        if not all(isinstance(p, torch.Tensor) for p in group["params"]):
            raise Mistake(f'"params" holds {type(group["params"][0]).__name__}s, not parameters.')
    given = [group["weight_decay"] for group in groups]
    if given == [0.0, decay]:
        raise Mistake("The groups are in the wrong order: the decayed one comes first.")
    if given != [decay, 0.0]:
        raise Mistake(
            "The first group must have the weight decay that was passed, the second 0.0, but "
            f"with {decay:g} they have {given[0]} and {given[1]}."
        )
    return [[id(p) for p in group["params"]] for group in groups]


def _look_at_decayed(name, model, decayed):
    owners = [
        (module, part, f"{module_name}.{part}".lstrip("."))
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
        if not isinstance(module, (nn.Linear, Conv1D)):
            raise Mistake(
                f"{name}: {full} decays, but it belongs to no linear layer. A matrix that stands "
                "in a model by itself, such as a soft prompt, is spared."
            )


def _look_at_spared(name, model, spared):
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    for module_name, module in model.named_modules():
        matrix = isinstance(module, (nn.Linear, Conv1D)) and id(module.weight) not in tables
        if matrix and id(module.weight) in spared:
            untied = module is getattr(model, "lm_head", None)
            raise Mistake(
                f"{name}: {module_name}.weight is spared, but it is the matrix of a "
                f"{type(module).__name__} and should decay."
                + (" This head is not tied to the embedding." if untied else "")
            )


def linear_schedule(answer):
    """Check a function (step, warmup, total) -> factor of the learning rate in [0, 1]."""
    cases = [(warmup, total) for total in range(2, 14) for warmup in range(total)]
    for warmup, total in ((4, 12), (1, 5), (0, 6), (3, 4), *cases):
        told = f"With warmup={warmup} and total={total}, "
        factors = _factors(answer, warmup, total, told)
        _begins_right(factors, warmup, told)
        _peaks_right(factors, warmup, total, told)
        if not math.isclose(factors[total], 0, abs_tol=1e-6):
            raise Mistake(
                f"{told}the decay ends at {factors[total]:.3f}, not at 0. It spans the steps "
                "after the warm-up, not all steps."
            )
        up = [step / warmup for step in range(warmup)]
        down = [(total - step) / (total - warmup) for step in range(warmup, total)]
        if not _close(factors[:warmup], up):
            raise Mistake(f"{told}the warm-up is not a straight line: {_short(factors[:warmup])}.")
        if not _close(factors[warmup:total], down):
            raise Mistake(f"{told}the decay is not a straight line: {_short(factors[warmup:])}.")


def _close(found, expected):
    return all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(found, expected, strict=True))


def _short(factors):
    return ", ".join(f"{factor:.4g}" for factor in factors)


def _factors(answer, warmup, total, told):
    """The factors of step 0 to total. Asked twice, in two orders."""
    try:
        factors = [float(answer(step, warmup, total)) for step in range(total + 1)]
        again = [float(answer(step, warmup, total)) for step in range(total, -1, -1)]
    except ZeroDivisionError:
        if warmup == 0:
            raise Mistake(
                f"{told}your function divides by zero: no step is in the warm-up, not even step 0."
            ) from None
        raise Mistake(
            f"{told}your function divides by zero: the decay has {total - warmup} step to fall in."
        ) from None
    if again[::-1] != factors:
        raise Mistake(
            "The same step gets another factor the second time. The function must depend on its "
            "arguments alone, not on how often it was called."
        )
    return factors


def _begins_right(factors, warmup, told):
    if math.isclose(factors[-2], 0, abs_tol=1e-6) and factors[-1] < 0:
        raise Mistake(f"{told}the decay reaches 0 at step {len(factors) - 2}, one step too early.")
    if any(not -1e-6 <= factor <= 1 + 1e-6 for factor in factors):
        raise Mistake(f"{told}a factor is outside of 0 to 1: {_short(factors)}.")
    if not any(factors):
        raise Mistake(f"{told}the factor stays 0: nothing would ever be learned.")
    if not warmup and math.isclose(factors[0], 0, abs_tol=1e-6):
        raise Mistake(f"{told}step 0 has the rate 0, although there is no warm-up.")
    if warmup and math.isclose(factors[0], 1):
        raise Mistake(f"{told}there is no warm-up: the first step already has the full rate.")
    if warmup and factors[0] != 0:
        raise Mistake(
            f"{told}step 0 has the factor {factors[0]:.3f}. It should be 0: the warm-up is off "
            "by one."
        )


def _peaks_right(factors, warmup, total, told):
    top = factors[warmup]
    if warmup and math.isclose(top, 1 - warmup / total, rel_tol=1e-5):
        raise Mistake(
            f"{told}the factor is only {top:.3f} after the warm-up: the decay must begin there, "
            "not at step 0."
        )
    if total - warmup > 1 and all(math.isclose(factor, 1) for factor in factors[warmup:]):
        raise Mistake(f"{told}the factor stays at 1 after the warm-up: it never falls.")
    if not math.isclose(max(factors), 1, rel_tol=1e-5):
        raise Mistake(
            f"{told}the factor never reaches 1; its peak is {max(factors):.3f}. The warm-up or "
            "the decay is off by one."
        )
    if not math.isclose(top, 1, rel_tol=1e-5):
        peak = factors.index(max(factors))
        raise Mistake(
            f"{told}the peak comes at step {peak}. It should come at step {warmup}: the "
            "warm-up is off by one."
        )


# The rows of three batches, each row as (length of the prompt, number of targets).
ROWS = (((5, 2), (6, 3)), ((4, 12),), ((3, 1), (2, 4), (7, 2)))
COUNTS = (5, 12, 7)
TOTAL = sum(COUNTS)
SHORTER = 50  # how far the gradient of task 4 is clipped
WIDTH = 16


def _batch(rows, generator, left=False):
    """A padded batch; with `left`, the padding comes first."""
    ids = torch.zeros(len(rows), WIDTH, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, targets) in enumerate(rows):
        start = WIDTH - prompt - targets if left else 0
        place = slice(start, start + prompt + targets)
        ids[i, place] = torch.randint(97, 123, (prompt + targets,), generator=generator)
        labels[i, place][prompt:] = ids[i, place][prompt:]
        mask[i, place] = 1
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def _batches(rows=ROWS, seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    return [_batch(each, generator, **options) for each in rows]


def _joined(batches):
    return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}


def _model():
    model, _ = load_base("tiny-llama", device="cpu", dtype=torch.float64)
    return model.train()


def _vector(parameters, grad=True):
    """Gradients or values of the trainable parameters as one vector; None if a gradient misses."""
    tensors = [p.grad if grad else p.detach() for p in parameters if p.requires_grad]
    if any(tensor is None for tensor in tensors):
        return None
    return torch.cat([tensor.flatten() for tensor in tensors]).clone()


def _gradient(model, batches, weights=(1.0,)):
    """Gradient of a sum of losses, each with its weight, from zero."""
    model.zero_grad()
    for batch, weight in zip(batches, weights, strict=True):
        (model(**batch).loss * weight).backward()
    gradient = _vector(model.parameters())
    model.zero_grad()
    return gradient


def _same(a, b):
    """Equal up to rounding: norms and rotary angles are float32 even in a float64 model."""
    return bool((a - b).norm() <= 1e-4 * b.norm())


def _weights_of_mistakes():
    """{message: the weight that the mean loss of each batch wrongly gets}"""
    attended = [sum(map(sum, rows)) for rows in ROWS]
    so_far = [sum(COUNTS[: i + 1]) for i in range(len(COUNTS))]
    return {
        "This is the mean of the batch means: tokens in batches with few targets weigh more. "
        "Divide by the number of target tokens in all batches.": [1 / 3] * 3,
        "The gradients of the batch means are added up but not divided: the result grows with "
        "the number of batches.": [1.0] * 3,
        "The summed losses are not divided by the number of target tokens.": COUNTS,
        "Only the last batch is in the gradient: it was set to zero between the batches, or "
        "backward ran once at the end.": [0, 0, COUNTS[-1] / TOTAL],
        "Only the last batch is in the gradient, and unweighted.": [0, 0, 1.0],
        "Each batch weighs as much as it has rows. Rows differ in their number of targets.": [
            len(rows) / 6 for rows in ROWS
        ],
        "Each batch weighs as much as it has tokens in its attention mask, prompts included. Only "
        "targets count.": [n / sum(attended) for n in attended],
        "Only the targets in the first row of each batch are counted.": [
            rows[0][1] / sum(rows[0][1] for rows in ROWS) for rows in ROWS
        ],
        "The last label of a row is not counted, although the position before it predicts it. It "
        "is the first one that nothing predicts.": [5 / 23, 11 / 23, 7 / 23],
        "The divisor grows from batch to batch. Count the targets of all batches before the first "
        "backward.": [n / so_far[i] for i, n in enumerate(COUNTS)],
    }


def _explain_gradient(found, truth, model, batches):
    """Raise the Mistake that leads to this gradient of the plain batches."""
    for message, weights in _weights_of_mistakes().items():
        if _same(found, _gradient(model, batches, weights)):
            raise Mistake(message)
    ratio = (found @ truth / (truth @ truth)).item()
    if _same(found, ratio * truth):
        raise Mistake(
            "Padding or prompt tokens were counted: the divisor must be the number of labels that "
            f"are not -100. Your gradient is {ratio:.3f} times the right one."
        )
    shifted = [
        {key: t[:, 1:] if key == "labels" else t[:, :-1] for key, t in batch.items()}
        for batch in batches
    ]
    for total in (TOTAL, TOTAL - len(ROWS)):
        if _same(found, _gradient(model, shifted, [n / total for n in COUNTS])):
            raise Mistake("The labels are shifted twice: the model shifts them itself.")
    raise Mistake("The gradient is not that of one large batch of the same rows.")


def accumulated_backward(answer):
    """Check a function (model, batches) -> loss, which leaves the gradient of one large batch."""
    model, batches = _model(), _batches()
    truth = _gradient(model, [_joined(batches)])
    with torch.no_grad():
        true_loss = model(**_joined(batches)).loss.item()
    passes, weight = [], model.model.layers[0].mlp.up_proj.weight
    hook = weight.register_post_accumulate_grad_hook(passes.append)
    loss = answer(model, batches)
    hook.remove()
    found = _vector(model.parameters())
    if not all(
        torch.equal(a[k], b[k]) for a, b in zip(batches, _batches(), strict=True) for k in a
    ):
        raise Mistake("The caller's batches were changed. They are needed again in the next epoch.")
    if not model.training:
        raise Mistake(
            "The model came in training mode and is now in eval mode: dropout would be off for "
            "the rest of the training."
        )
    if found is None:
        raise Mistake(
            "No parameter has a gradient: call backward on a loss that still has its graph."
        )
    if not _same(found, truth):
        _explain_gradient(found, truth, model, batches)
    if len(passes) != len(batches):
        raise Mistake(
            f"The gradient is right, but backward ran {len(passes)} time(s) for {len(batches)} "
            "batches: the activations of several are in memory at once. Call it for each batch."
        )
    _other_batches(answer)
    if not isinstance(loss, float):
        raise Mistake(
            f"Return the loss as a Python float, not {type(loss).__name__}: a tensor would keep "
            "the graph alive."
        )
    if not math.isclose(loss, true_loss, rel_tol=1e-5):
        raise Mistake(
            f"The gradient is right, but the loss returned is {loss:.4f}; the mean over all "
            f"target tokens is {true_loss:.4f}."
        )


def _other_batches(answer):
    """Batches and models of which only a part of the answers takes care."""
    without_prompt = _batches((((5, 2), (0, 3)), ((4, 12),)))
    left = _batches(left=True)
    zero = _batches()
    for key in ("input_ids", "labels"):
        zero[1][key][0, 7:9] = 0
    cases = [
        (
            _batches((*ROWS[1:], ROWS[0], ROWS[0]), seed=1),
            "Three batches are right, but four others are not: does a number of the first hide in "
            "your code?",
        ),
        (
            without_prompt,
            "A row whose first label is not -100 is weighed wrongly. No position precedes that "
            "label, so the model never predicts it: do not count it.",
        ),
        (
            left,
            "With the padding on the left the gradient is wrong: does the model get the attention "
            "mask?",
        ),
        (zero, "A target with the id 0 is not counted. Only -100 marks what is not a target."),
    ]
    for batches, message in cases:
        model = _model()
        truth = _gradient(model, [_joined(batches)])
        answer(model, batches)
        found = _vector(model.parameters())
        if found is None or not _same(found, truth):
            raise Mistake(message)
    model = _model()
    model.model.embed_tokens.requires_grad_(False)
    truth = _gradient(model, [_joined(_batches())])
    try:
        answer(model, _batches())
    except (TypeError, AttributeError) as error:
        raise Mistake(
            f"With a frozen embedding it stops: {error}. A frozen parameter has no gradient."
        ) from error
    found = _vector(model.parameters())
    if found is None or not _same(found, truth):
        raise Mistake("With a frozen embedding the gradient is wrong.")


def training_step(answer):
    """Check a function (model, optimizer, batches, max_grad_norm) -> (loss, gradient norm)."""
    model, batches = _model(), _batches()
    truth = _gradient(model, [_joined(batches)])
    true_norm = truth.norm().item()
    move, returned, after = _stepped(answer, true_norm / SHORTER)
    if not _same(move, truth / SHORTER):
        _explain_move(move, truth, true_norm / SHORTER)
    if not _same(_stepped(answer, true_norm / SHORTER, stale=1.0)[0], truth / SHORTER):
        raise Mistake(
            "A gradient left over from before got into the step: zero_grad is missing, or comes "
            "too late."
        )
    if not _same(_stepped(answer, 3 * true_norm)[0], truth):
        raise Mistake(
            f"A gradient of norm {true_norm:.3f} should stay as it is under a limit of "
            f"{3 * true_norm:.3f}: clipping only shortens."
        )
    _look_at_returned(returned, true_norm, model(**_joined(batches)).loss.item(), after)


def _stepped(answer, limit, stale=0.0, lr=0.5):
    """(Move of the weights in units of lr, what was returned, loss after the step)."""
    model, batches = _model(), _batches()
    start = _vector(model.parameters(), grad=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if stale:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, stale)
    step, steps = optimizer.step, []
    optimizer.step = lambda *args: (steps.append(1), step(*args))[1]
    returned = answer(model, optimizer, batches, limit)
    if len(steps) > 1:
        raise Mistake(
            f"optimizer.step() ran {len(steps)} times. It belongs after the loop: one step on "
            "the gradient of all batches."
        )
    move = (start - _vector(model.parameters(), grad=False)) / lr
    if not steps:
        raise Mistake(
            "The optimizer that was passed in took no step."
            + (" The weights moved all the same: who moved them?" if move.any() else "")
        )
    with torch.no_grad():
        return move, returned, model(**_joined(batches)).loss.item()


def _explain_move(move, truth, limit):
    """Raise the Mistake that leads to this step, of a gradient that had to be clipped."""
    model, batches = _model(), _batches()

    def clipped(gradient):
        return gradient * min(1.0, limit / gradient.norm().item())

    sizes = [p.numel() for p in model.parameters()]
    known = {
        "The weights moved by the unclipped gradient: clip after backward and before the "
        "step.": truth,
        "This is the mean of the batch means; divide by all target tokens.": clipped(
            _gradient(model, batches, [1 / 3] * 3)
        ),
        "Each entry was clipped by itself, which turns the gradient into another direction. Clip "
        "the norm of the whole gradient.": truth.clamp(-limit, limit),
        "Each parameter was clipped by itself, which turns the gradient into another direction. "
        "There is one norm, that of all parameters together.": torch.cat(
            [clipped(part) for part in truth.split(sizes)]
        ),
    }
    if not move.any():
        raise Mistake(
            "The weights did not move: the step came before backward, or the gradient was set to "
            "zero before the step."
        )
    for message, wrong in known.items():
        if _same(move, wrong):
            raise Mistake(message)
    if torch.cosine_similarity(move, truth, dim=0) > 1 - 1e-9:
        raise Mistake(
            f"The step has the right direction but the length {move.norm():.3f} instead of "
            f"{limit:.3f}. Clip once, to the limit that is passed, by the usual norm."
        )
    raise Mistake(
        "The step is not that of one large batch. Was the gradient clipped or set to zero "
        "after each batch rather than once?"
    )


def _look_at_returned(returned, true_norm, true_loss, loss_after):
    if not isinstance(returned, (tuple, list)) or len(returned) != 2:
        raise Mistake("Return two numbers: the loss and the gradient norm.")
    loss, norm = (float(value) for value in returned)

    def close(a, b):
        return math.isclose(a, b, rel_tol=1e-4)

    if close(loss, true_norm) and close(norm, true_loss):
        raise Mistake("The loss comes first, then the norm.")
    if close(norm, true_norm / SHORTER):
        raise Mistake(
            "The norm returned was taken after clipping, where it is always the limit. Return the "
            "norm before: it shows trouble."
        )
    if not close(norm, true_norm):
        raise Mistake(f"The gradient norm is {true_norm:.4f}, but {norm:.4f} was returned.")
    if close(loss, loss_after):
        raise Mistake("The loss returned is that after the step. Return the one of the gradient.")
    if not close(loss, true_loss):
        raise Mistake(f"The loss is {true_loss:.4f} over all targets, but {loss:.4f} was returned.")
    kinds = [type(value).__name__ for value in returned if not isinstance(value, float)]
    if kinds:
        raise Mistake(f"Return two Python floats, not a {kinds[0]} on the model's device.")
