"""The loss of a batch, summed over its targets, and the number of targets, by kind of model.

A causal language model predicts the label at t + 1 from position t; its loss is computed here, in
float32. Other models of transformers compute their own loss, a mean. It is multiplied by the number
of targets, so that unequal batches and ranks add up to one large batch.

kind of model                targets                        unit of the mean
causal language model        labels after the first         nats per token
masked language model, sequence to sequence, token classification
                             labels                         nats per token
sequence classification      rows                           nats per row
  several labels a row       every label of every row       nats per label
  regression                 every number of every row      squared error per number
question answering           rows                           nats per row, mean of start and end

A label of -100 is ignored, except in regression and with several labels a row, where all count.
"""

import functools
import inspect
import re
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.utils import TransformersKwargs

from minipeft.targets import logits_at_targets, refuse_beyond, send

LossSum = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]  # (model, batch) -> scalar

CAUSAL = "causal language model"
KINDS = {  # {kind: pattern in the names of its classes}
    "sequence classification": "ForSequenceClassification",
    "token classification": "ForTokenClassification",
    "question answering": "ForQuestionAnswering",
    "masked language model": "ForMaskedLM|WithLMHeadModel",
    CAUSAL: "ForCausalLM|(?<!XLNet)LMHeadModel|ModelWithLMHead|GenerationDecoder",
    "sequence to sequence": "ForConditionalGeneration|MTModel|EncoderDecoderModel",
}
POSITIONS = ("start_positions", "end_positions")


def kind_of(model: nn.Module) -> str | None:
    """A key of KINDS, or None for a model of transformers of any other kind."""
    bare = _bare(model)
    kind = _kind_by_name(bare.__class__)
    if kind == "sequence to sequence" and not bare.config.is_encoder_decoder:
        return CAUSAL  # a decoder that also takes images
    if kind is None and not isinstance(bare, PreTrainedModel):
        return CAUSAL  # a custom module
    return kind


@functools.cache
def _kind_by_name(model_class):
    names = " ".join(c.__name__ for c in model_class.__mro__)
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, names)), None)


def _bare(model):
    """The model of transformers inside HF peft's wrapper, if there is one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def count_targets(batch: dict[str, torch.Tensor], model: nn.Module | None = None) -> int:
    """The number of targets of a batch for `model`, by default a causal language model.

    There the first label of a row is never a target, since no position precedes it.
    """
    kind = CAUSAL if model is None else kind_of(model)
    if kind == "question answering":
        return len(batch[POSITIONS[0]])
    labels = batch["labels"]
    if labels.is_floating_point():
        return labels.numel()
    return int(((labels[:, 1:] if kind == CAUSAL else labels) != -100).sum())


def loss_sum(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The loss summed over the targets of a batch, a scalar in the unit of the table above."""
    if kind_of(model) == CAUSAL:
        _, logits, targets = logits_at_targets(model, batch)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, targets, reduction="sum")
    count, device = count_targets(batch, model), next(model.parameters()).device
    options = {"use_cache": False} if "use_cache" in _parameters(_bare(model).__class__) else {}
    output = model(**{name: send(tensor, device) for name, tensor in batch.items()}, **options)
    if not count:  # other ranks have some; this one adds nothing
        return output.logits.sum() * 0.0
    return output.loss.to(torch.promote_types(output.loss.dtype, torch.float32)) * count


def zero(device: torch.device) -> torch.Tensor:
    """A scalar 0 to add to, in the widest floating-point type of the device."""
    dtype = torch.float32 if device.type == "mps" else torch.float64
    return torch.zeros((), dtype=dtype, device=device)


@functools.cache
def _parameters(model_class):
    """The parameter names of a class's forward; empty if `input_ids` is not among them."""
    parameters = inspect.signature(model_class.forward).parameters
    if "input_ids" not in parameters:
        return frozenset()
    kwargs = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    return frozenset(parameters) | (set(TransformersKwargs.__annotations__) if kwargs else set())


def refuse_kind(model: nn.Module) -> None:
    """Raise ValueError for a model whose loss is not known."""
    if kind_of(model) is None:
        raise ValueError(
            f"{type(model).__name__} has no loss that is known here; these have: "
            f"{', '.join(KINDS)}. Give train a loss_sum of your own, and no eval_batches."
        )


def refuse_batch(batch: dict[str, torch.Tensor], number: int, model: nn.Module) -> None:
    """Raise ValueError unless `loss_sum` can take batch `number` of a run with this model."""
    refuse_kind(model)
    refuse_no_targets(batch, number, model)
    kind, name, bare = kind_of(model), type(model).__name__, _bare(model)
    accepted = _parameters(bare.__class__)
    foreign = sorted(batch.keys() - accepted)
    if foreign and accepted:
        raise ValueError(
            f"Batch {number} has {foreign[0]}, which {name} does not take and would ignore. "
            "Leave it out of the batches."
        )
    if kind == "question answering":
        width = batch["input_ids"].shape[1]
        for key in POSITIONS:
            if not ((batch[key] >= 0) & (batch[key] < width)).all():
                raise ValueError(
                    f"Batch {number} has {key} {batch[key].tolist()}, but positions go from 0 to "
                    f"{width - 1}. Drop the rows whose answer was cut off."
                )
    elif kind == "sequence classification":
        _refuse_row_labels(batch["labels"], number, model)
    elif kind == "token classification":
        refuse_beyond(batch["labels"], bare.config.num_labels)


def refuse_no_targets(batch: dict[str, torch.Tensor], number: int, model: nn.Module) -> None:
    """Raise ValueError for a batch without targets, or with labels of another shape or type."""
    kind = kind_of(model)
    for key in POSITIONS if kind == "question answering" else ("labels",):
        if key not in batch:
            raise ValueError(f"Batch {number} has no {key}, only {sorted(batch)}.")
    if kind in (CAUSAL, "masked language model", "token classification"):
        labels, ids = batch["labels"], batch.get("input_ids", batch["labels"])
        if labels.dim() != 2 or labels.shape != ids.shape or labels.dtype != torch.int64:
            raise ValueError(
                f"Batch {number} has labels {tuple(labels.shape)} of {labels.dtype}; "
                f"{type(model).__name__}, a {kind}, wants token ids like input_ids, int64 (batch, "
                "seq)."
            )
    if not count_targets(batch, model):
        where = "every label after the first" if kind == CAUSAL else "every label"
        raise ValueError(
            f"Batch {number} has no target token: {where} is -100, so there is nothing to "
            "predict. Were the answers empty or cut off?"
        )


def _refuse_row_labels(labels, number, model):
    """Raise ValueError unless the labels fit the loss that transformers will choose."""
    count, problem = model.config.num_labels, model.config.problem_type
    if problem is None:  # the rule of transformers
        several = "multi_label" if labels.is_floating_point() else "single_label"
        problem = "regression" if count == 1 else f"{several}_classification"
    if problem == "single_label_classification":
        fits = labels.dim() == 1 and labels.dtype == torch.int64
        wanted = "class numbers, int64 (batch,)"
    elif problem == "regression" and count == 1:
        fits = labels.is_floating_point() and labels.shape in ((len(labels),), (len(labels), 1))
        wanted = "numbers, float32 (batch,)"
    else:
        fits = labels.is_floating_point() and labels.shape == (len(labels), count)
        wanted = f"numbers, float32 (batch, {count})"
    if not fits:
        raise ValueError(
            f"Batch {number} has labels {tuple(labels.shape)} of {labels.dtype}; "
            f"{type(model).__name__} with {count} labels ({problem}) wants {wanted}."
        )
    if problem == "single_label_classification":
        refuse_beyond(labels, count)
