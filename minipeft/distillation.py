"""Distillation: a small student learns what a large teacher says (Hinton et al. 2015, section 2).

    loss = alpha * CE(label, q_1) + (1 - alpha) * T^2 * KL(p_T || q_T)    q_T = softmax(logits / T)

p is the teacher, q the student. The soft part falls like 1/T^2; the factor T^2 undoes that. The
student may be cut out of the teacher, be led by its hidden states, and learn from its answers, or
from answers of its own that the teacher judges.
"""

import copy

import torch
from torch.nn.functional import cross_entropy

from minipeft.freezing import blocks
from minipeft.targets import logits_at_targets, send, target_places

DIVERGENCES = ("forward", "reverse")


def hard_and_soft(student, teacher, targets, temperature=2.0, divergence="forward"):
    """(cross-entropy, T^2 * KL), each summed over the targets, in nats, in float32 or wider.

    student, teacher: logits (targets, vocab) that predict `targets` (targets,).
    divergence: "forward" is KL(teacher || student): the student must cover all that the teacher
    finds likely. "reverse" is KL(student || teacher): it must keep to what the teacher finds likely
    (Gu et al. 2023, section 2). Tokens whose logit is -inf in both count nothing.
    Raises ValueError for logits of different shapes, a temperature not above 0, or another name.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's logits are {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}: both must read the same rows with the same vocabulary."
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature={temperature} must be a number above 0; 1 changes nothing.")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is none of {', '.join(DIVERGENCES)}.")
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(student.device, wide)
    hard = cross_entropy(student, targets, reduction="sum")
    log_p = (teacher / temperature).log_softmax(-1)  # (targets, vocab)
    log_q = (student / temperature).log_softmax(-1)
    first, second = (log_p, log_q) if divergence == "forward" else (log_q, log_p)
    share = first.exp()
    gap = torch.where(share > 0, first - second, 0.0)  # 0 * (-inf) would be NaN
    return hard, temperature**2 * (share * gap).sum()


def distillation_loss(
    student_logits, teacher_logits, labels, alpha=0.5, temperature=2.0, divergence="forward"
):
    """(loss, hard, soft) per target token: loss = alpha * hard + (1 - alpha) * soft.

    Logits are (batch, seq, vocab); labels (batch, seq) are not shifted, and -100 is no target.
    `soft` holds its factor T^2. No gradient goes into the teacher's logits.
    Raises ValueError as `hard_and_soft` does, for an alpha outside [0, 1], labels of another shape,
    and for a batch without a target.
    """
    _check_alpha(alpha)
    if student_logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Labels {tuple(labels.shape)} do not fit logits {tuple(student_logits.shape)}; give "
            "(batch, seq) and (batch, seq, vocab), without cutting or shifting either."
        )
    counted = labels[:, 1:] != -100  # (batch, seq - 1): the logits at t predict the label at t + 1
    if not counted.any():
        raise ValueError("There is no target: every label after the first is -100.")
    teacher_logits = teacher_logits.detach()
    if teacher_logits.shape == student_logits.shape:
        teacher_logits = teacher_logits[:, :-1][counted]
        student_logits = student_logits[:, :-1][counted]
    parts = hard_and_soft(
        student_logits, teacher_logits, labels[:, 1:][counted], temperature, divergence
    )
    hard, soft = (part / counted.sum() for part in parts)
    return _mix(alpha, hard, soft), hard, soft


def _check_alpha(alpha):
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is no share; 0 is the teacher alone, 1 the labels alone.")


def _mix(alpha, hard, soft):
    """A part of weight 0 is left out, so that an infinite one does no harm."""
    return sum(weight * part for weight, part in ((alpha, hard), (1 - alpha, soft)) if weight)


def hidden_loss(student_states, teacher_states, pairs, projection=None):
    """How far hidden states are apart, relative to the teacher's: 0 is equal. Returns (...,).

    |student - teacher|^2 / |teacher|^2 at each position, averaged over `pairs` of (student index,
    teacher index). States are `hidden_states` of transformers, or the same positions taken out of
    each, (..., hidden): 0 is the embedding, k what leaves block k, and the last one has been
    through the final norm, so that the head alone is missing.
    projection: a trainable module from the student's width to the teacher's, if they differ.
    Raises ValueError for no pairs, an index that is not there, and shapes that differ.
    """
    for states, side, who in ((student_states, 0, "student"), (teacher_states, 1, "teacher")):
        if not pairs or any(not 0 <= pair[side] < len(states) for pair in pairs):
            raise ValueError(
                f"pairs={list(pairs)} does not name states of the {who}, which has 0 to "
                f"{len(states) - 1}."
            )
    total = 0.0
    for ours, theirs in ((student_states[s], teacher_states[t]) for s, t in pairs):
        ours = ours if projection is None else projection(ours)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"The student's states are {tuple(ours.shape)} and the teacher's "
                f"{tuple(theirs.shape)}; where widths differ, give a projection."
            )
        wide = torch.promote_types(ours.dtype, torch.float32)
        ours, theirs = ours.to(wide), theirs.to(ours.device, wide)
        size = theirs.square().sum(-1).clamp(min=1e-12)  # (...,)
        total = total + (ours - theirs).square().sum(-1) / size
    return total / len(pairs)


def distil_from(teacher, alpha=0.5, temperature=2.0, divergence="forward", pairs=(),
                hidden_weight=1.0, projection=None):  # fmt: skip
    """The `loss_sum` that makes `minipeft.train` a distillation: a function (student, batch).

    The teacher is put in eval mode and gets no gradient. With `pairs`, hidden_weight times the
    `hidden_loss` at the positions that predict a target is added. A projection is trained if it is
    a submodule of the student. Raises ValueError as the losses do.
    """
    _check_alpha(alpha)
    teacher.eval()

    def loss_sum(student, batch):
        options = {"output_hidden_states": True} if pairs else {}
        output, logits, targets = logits_at_targets(student, batch, **options)
        with torch.no_grad():
            theirs, wanted, _ = logits_at_targets(teacher, batch, **options)
        loss = _mix(alpha, *hard_and_soft(logits, wanted, targets, temperature, divergence))
        if pairs:
            at = target_places(batch)  # rows and columns of the positions that predict a target
            states = (
                [state[tuple(send(i, state.device) for i in at)] for state in one.hidden_states]
                for one in (output, theirs)
            )
            loss = loss + hidden_weight * hidden_loss(*states, pairs, projection).sum()
        return loss

    settings = alpha, temperature, divergence, tuple(pairs), hidden_weight
    loss_sum.__qualname__ = f"distil_from{settings}"  # a checkpoint tells two such losses apart
    return loss_sum


def student_from_layers(teacher, keep):
    """A new model of the teacher's class with copies of its blocks `keep` and of all the rest.

    keep: increasing block numbers, such as range(15) or range(0, 30, 2). Attention layers are
    numbered anew for the cache, and lists with an entry for each layer in the config are cut. All
    parameters require grad. Bytes: the teacher's, less those of the blocks left out.
    Raises ValueError for numbers that are not there or out of order, and for a teacher that is not
    a plain model of its class, because of a technique or 4-bit weights.
    """
    stack, keep = blocks(teacher), list(keep)
    if not keep or keep != sorted(set(keep)) or not set(keep) <= set(range(len(stack))):
        raise ValueError(
            f"keep={keep} must be increasing numbers of blocks from 0 to {len(stack) - 1}."
        )
    config = copy.deepcopy(teacher.config)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise ValueError("Attention is divided by the number of its layer: blocks cannot move.")
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == len(stack):
            setattr(config, name, [value[i] for i in keep])
    config.num_hidden_layers = len(keep)
    with torch.random.fork_rng(devices=[]):  # the caller's random state stays as it was
        student = type(teacher)._from_config(config, dtype=teacher.dtype)
    path = next(name for name, module in teacher.named_modules() if module is stack)
    state = dict(teacher.state_dict())
    for name in [name for name in state if name.startswith(f"{path}.")]:
        number, _, rest = name.removeprefix(f"{path}.").partition(".")
        value = state.pop(name)
        if int(number) in keep:
            state[f"{path}.{keep.index(int(number))}.{rest}"] = value
    foreign = sorted(state.keys() ^ student.state_dict().keys())
    if foreign:
        raise ValueError(
            f"The teacher is not a plain {type(teacher).__name__}: see {foreign[0]}. Merge what a "
            "technique added and put the plain layers back, or load the teacher unquantised."
        )
    student.load_state_dict(state)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device).train(teacher.training)


@torch.no_grad()
def written_by(model, prompts, max_new_tokens=20, **options):
    """Let `model` answer a batch of prompts; the answers, as rows to train on, are the targets.

    prompts: input_ids and attention_mask (batch, seq), padded on the left. `options` go to
    `generate`, for example do_sample=True. Returns a list of {"input_ids", "labels"}, unpadded, for
    a Collator. An answer that was cut at max_new_tokens has no end token.
    Of the teacher's answers: sequence-level distillation (Kim and Rush 2016, section 3.2).
    """
    was_training = model.training
    prompts = {k: prompts[k].to(model.device) for k in ("input_ids", "attention_mask")}
    out = model.eval().generate(**prompts, max_new_tokens=max_new_tokens, **options)
    model.train(was_training)
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    width, rows = prompts["input_ids"].shape[1], []
    for ids, mask in zip(out, prompts["attention_mask"], strict=True):
        prompt, answer = ids[:width][mask == 1].tolist(), ids[width:].tolist()
        stop = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
        ids, labels = prompt + answer[:stop], [-100] * len(prompt) + answer[:stop]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


class OnPolicy:
    """Batches that the student writes itself, at every pass anew, for `minipeft.train`.

    The teacher judges them through `distil_from(teacher, alpha=0)`: the student is mended where its
    own words lead it (Agarwal et al. 2023, section 3). No gradient goes through the sampling.
    batches: prompts without answers, padded on the left; collate: pads what was written.
    """

    def __init__(self, student, batches, collate, **options):
        self.student, self.batches, self.collate, self.options = student, batches, collate, options

    def set_epoch(self, epoch):
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self):
        for prompts in self.batches:
            yield self.collate(written_by(self.student, prompts, **self.options))
