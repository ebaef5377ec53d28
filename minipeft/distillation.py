"""Distillation: train a small student to match a large teacher (Hinton et al. 2015, section 2).

    loss = alpha * CE(label, q_1) + (1 - alpha) * T^2 * KL(p_T || q_T)    q_T = softmax(logits / T)

p is the teacher's distribution, q the student's. The KL term shrinks like 1/T^2, which the factor
T^2 undoes. The student may be built from layers of the teacher, may also match its hidden states,
and may be trained on answers that the teacher or the student itself generates.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from minipeft.freezing import blocks
from minipeft.refusals import is_number, refuse_no_model, shown
from minipeft.targets import logits_at_targets, refuse_beyond, send, target_places
from minipeft.technique.on_model import evaluating

DIVERGENCES = ("forward", "reverse")


def hard_and_soft(student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor,
                  temperature: float = 2.0, divergence: str = "forward",
                  ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (cross-entropy, T^2 * KL), each summed over the targets, in nats, float32 or wider.

    student, teacher: logits (targets, vocab). targets: (targets,).
    divergence: "forward" is KL(teacher || student), large where the teacher's probability is high
    and the student's low. "reverse" is KL(student || teacher), large where it is the other way
    round (Gu et al. 2023, section 2). Tokens whose logit is -inf in both contribute 0.
    Raises ValueError for logits of different shapes, a temperature not above 0, and an unknown
    divergence.
    """
    if student.shape != teacher.shape:
        raise ValueError(
            f"The student's logits are {tuple(student.shape)} and the teacher's "
            f"{tuple(teacher.shape)}: both must read the same rows with the same vocabulary."
        )
    _check(temperature, divergence)
    wide = torch.promote_types(student.dtype, torch.float32)
    student, teacher = student.to(wide), teacher.to(student.device, wide)
    hard = cross_entropy(student, targets, reduction="sum")
    log_p = (teacher / temperature).log_softmax(-1)  # (targets, vocab)
    log_q = (student / temperature).log_softmax(-1)
    first, second = (log_p, log_q) if divergence == "forward" else (log_q, log_p)
    probs = first.exp()  # (targets, vocab)
    log_ratio = torch.where(probs > 0, first - second, 0.0)  # 0 * (-inf) would be NaN
    return hard, temperature**2 * (probs * log_ratio).sum()


def _check(temperature, divergence, alpha=1.0):
    if not (is_number(alpha) and 0 <= alpha <= 1):
        raise ValueError(f"alpha={alpha} must be from 0 (teacher alone) to 1 (labels alone).")
    if not (is_number(temperature) and 0 < temperature < float("inf")):
        raise ValueError(f"temperature={temperature} must be a number above 0; 1 changes nothing.")
    if divergence not in DIVERGENCES:
        raise ValueError(f"divergence={divergence!r} is none of {', '.join(DIVERGENCES)}.")


def distillation_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor,
                      labels: torch.Tensor, alpha: float = 0.5, temperature: float = 2.0,
                      divergence: str = "forward",
                      ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (loss, hard, soft), means over the targets: loss = alpha * hard + (1 - alpha) * soft.

    Logits: (batch, seq, vocab). labels: (batch, seq), not shifted, -100 is ignored. `soft` includes
    the factor T^2. The teacher's logits get no gradient.
    Raises ValueError as `hard_and_soft` does, for an alpha outside [0, 1], labels of another shape
    or outside the vocabulary, and a batch without targets.
    """
    _check(temperature, divergence, alpha)
    if student_logits.shape[:-1] != labels.shape:
        raise ValueError(
            f"Labels {tuple(labels.shape)} do not fit logits {tuple(student_logits.shape)}; give "
            "(batch, seq) and (batch, seq, vocab), without cutting or shifting either."
        )
    mask = labels[:, 1:] != -100  # (batch, seq - 1): the logits at t predict the label at t + 1
    if not mask.any():
        raise ValueError("There is no target: every label after the first is -100.")
    teacher_logits = teacher_logits.detach()
    if teacher_logits.shape == student_logits.shape:  # else hard_and_soft raises
        teacher_logits = teacher_logits[:, :-1][mask]  # (targets, vocab)
        student_logits = student_logits[:, :-1][mask]
    targets = labels[:, 1:][mask]  # (targets,)
    refuse_beyond(targets, student_logits.shape[-1])
    sums = hard_and_soft(student_logits, teacher_logits, targets, temperature, divergence)
    hard, soft = (s / mask.sum() for s in sums)
    return _mix(alpha, hard, soft), hard, soft


def _mix(alpha, hard, soft):
    """A term of weight 0 is left out, because it may be infinite."""
    return sum(weight * term for weight, term in ((alpha, hard), (1 - alpha, soft)) if weight)


def hidden_loss(student_states: Sequence[torch.Tensor], teacher_states: Sequence[torch.Tensor],
                pairs: Sequence[tuple[int, int]], projection: nn.Module | None = None,
                ) -> torch.Tensor:  # fmt: skip
    """|student - teacher|^2 / |teacher|^2 at each position, (...,), averaged over `pairs`.

    pairs: (student index, teacher index). States: `hidden_states` of transformers, or some of their
    positions, (..., hidden). Index 0 is the embedding, k the output of block k; the last one has
    also been through the final norm.
    projection: a trainable module from the student's width to the teacher's, if they differ.
    Raises ValueError for no pairs, an index out of range, and states of different shapes.
    """
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"pairs={shown(pairs)} must be a list of (student index, teacher index).")
    for states, side, who in ((student_states, 0, "student"), (teacher_states, 1, "teacher")):
        if not pairs or any(not 0 <= pair[side] < len(states) for pair in pairs):
            raise ValueError(
                f"pairs={list(pairs)} does not name states of the {who}, which has 0 to "
                f"{len(states) - 1}."
            )
    total: Any = 0.0
    for ours, theirs in ((student_states[s], teacher_states[t]) for s, t in pairs):
        ours = ours if projection is None else projection(ours)
        if ours.shape != theirs.shape:
            raise ValueError(
                f"The student's states are {tuple(ours.shape)} and the teacher's "
                f"{tuple(theirs.shape)}; where widths differ, give a projection."
            )
        wide = torch.promote_types(ours.dtype, torch.float32)
        ours, theirs = ours.to(wide), theirs.to(ours.device, wide)
        norm = theirs.square().sum(-1).clamp(min=1e-12)  # (...,)
        total = total + (ours - theirs).square().sum(-1) / norm
    return total / len(pairs)


def distil_from(teacher: PreTrainedModel, alpha: float = 0.5, temperature: float = 2.0,
                divergence: str = "forward", pairs: Sequence[tuple[int, int]] = (),
                hidden_weight: float = 1.0, projection: nn.Module | None = None,
                ) -> Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]:  # fmt: skip
    """Return a `loss_sum` for `minipeft.train`: a function of (student, batch).

    The teacher is put into eval mode and gets no gradient. With `pairs`, hidden_weight times
    `hidden_loss` is added at the positions that predict a target. The projection is trained if it
    is a submodule of the student. Raises ValueError as the losses do.
    """
    _check(temperature, divergence, alpha)
    refuse_no_model(teacher)
    teacher.eval()

    def loss_sum(student, batch):
        options = {"output_hidden_states": True} if pairs else {}
        output, logits, targets = logits_at_targets(student, batch, **options)
        with torch.no_grad():
            teacher_output, teacher_logits, _ = logits_at_targets(teacher, batch, **options)
        loss = _mix(alpha, *hard_and_soft(logits, teacher_logits, targets, temperature, divergence))
        if pairs:
            places = target_places(batch)  # (rows, columns) of the positions that predict a target
            states = (
                [h[tuple(send(i, h.device) for i in places)] for h in each.hidden_states]
                for each in (output, teacher_output)
            )
            loss = loss + hidden_weight * hidden_loss(*states, pairs, projection).sum()
        return loss

    settings = alpha, temperature, divergence, tuple(pairs), hidden_weight
    loss_sum.__qualname__ = f"distil_from{settings}"  # by which checkpoints compare losses
    return loss_sum


def student_from_layers(teacher: PreTrainedModel, keep: Iterable[int]) -> PreTrainedModel:
    """A new model of the teacher's class with copies of its blocks `keep` and of everything else.

    keep: increasing indices of blocks, such as range(15) or range(0, 30, 2). The layers are
    renumbered for the KV cache, and per-layer lists in the config are shortened. All parameters
    require grad. The memory is that of the teacher without the other blocks.
    Raises ValueError for indices out of range or order, and for a teacher with a technique or 4-bit
    weights.
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
    with torch.random.fork_rng(devices=[]):  # keep the caller's random state
        student = type(teacher)._from_config(config, dtype=teacher.dtype)
    path = next(name for name, module in teacher.named_modules() if module is stack)
    state = dict(teacher.state_dict())
    for name in [name for name in state if name.startswith(f"{path}.")]:
        index, _, rest = name.removeprefix(f"{path}.").partition(".")
        value = state.pop(name)
        if int(index) in keep:
            state[f"{path}.{keep.index(int(index))}.{rest}"] = value
    foreign = sorted(state.keys() ^ student.state_dict().keys())
    if foreign:
        raise ValueError(
            f"The teacher is not a plain {type(teacher).__name__}: see {foreign[0]}. Merge what a "
            "technique added and put the plain layers back, or load the teacher unquantized."
        )
    student.load_state_dict(state)
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(teacher.device).train(teacher.training)


@torch.no_grad()
def written_by(model: PreTrainedModel, prompts: Mapping[str, torch.Tensor],
               max_new_tokens: int = 20, **options: Any,
               ) -> list[dict[str, list[int]]]:  # fmt: skip
    """Generate answers to a batch of prompts. Returns rows to train on, with the answers as labels.

    prompts: input_ids and attention_mask (batch, seq), left-padded. `options` go to `generate`,
    such as num_return_sequences=2. The rows have input_ids and labels, unpadded, for a Collator. An
    answer cut off at max_new_tokens has no EOS.
    With the teacher this is sequence-level distillation (Kim and Rush 2016, section 3.2).
    """
    refuse_no_model(model)
    prompts = {k: prompts[k].to(model.device) for k in ("input_ids", "attention_mask")}
    with evaluating(model):
        out: Any = model.generate(**prompts, max_new_tokens=max_new_tokens, **options)  # type: ignore[operator]
    out = getattr(out, "sequences", out)  # (batch * answers to each prompt, seq)
    masks = prompts["attention_mask"].repeat_interleave(len(out) // len(prompts["input_ids"]), 0)
    ends = options.get("eos_token_id", model.generation_config.eos_token_id)
    ends = ends if isinstance(ends, list) else [ends]
    fill = options.get("pad_token_id", model.generation_config.pad_token_id)
    width, rows = prompts["input_ids"].shape[1], []
    for ids, mask in zip(out, masks, strict=True):
        prompt, answer = ids[:width][mask == 1].tolist(), ids[width:].tolist()
        while fill not in ends and answer[-1:] == [fill]:  # what fills a row that has ended
            answer.pop()
        stop = next((i + 1 for i, token in enumerate(answer) if token in ends), len(answer))
        ids, labels = prompt + answer[:stop], [-100] * len(prompt) + answer[:stop]
        rows.append({"input_ids": ids, "labels": labels})
    return rows


class OnPolicy:
    """Batches with answers that the student generates, new ones in every epoch.

    Train on them with `distil_from(teacher, alpha=0)`: the student then matches the teacher on its
    own outputs (Agarwal et al. 2023, section 3). No gradient flows through the sampling.
    batches: left-padded prompts without answers. collate: pads rows. options: see `written_by`.
    """

    def __init__(self, student: PreTrainedModel, batches: Iterable[dict[str, torch.Tensor]],
                 collate: Callable[[list[dict[str, list[int]]]], dict[str, torch.Tensor]],
                 **options: Any) -> None:  # fmt: skip
        self.student, self.batches, self.collate, self.options = student, batches, collate, options

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.batches, "set_epoch"):
            self.batches.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for prompts in self.batches:
            yield self.collate(written_by(self.student, prompts, **self.options))
