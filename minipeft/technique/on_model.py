"""Add a technique to a model, completely or not at all.

    with adding(model, "lora"):
        freeze_base(model)
        ...                         # what the paper says

If the block raises an exception, for example because a check of the base model fails, all its
changes to modules, parameters, hooks and attributes are undone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from minipeft.freezing import at_least_float32, freeze
from minipeft.refusals import refuse_no_model, require
from minipeft.technique.record import Record, Snapshot


@contextmanager
def adding(model: nn.Module, name: str, again: bool = False) -> Iterator[None]:
    """Mark the model as tuned by technique `name`; undo the block if it raises an exception.

    again: may the model have the same technique already?
    Raises ValueError as `refuse_tuned` does.
    """
    if not (again and technique_of(model) == name):
        refuse_tuned(model)
    before = snapshot(model)
    try:
        yield
        record = getattr(model, "minipeft", None) or Record(name)
        vars(model).update(minipeft=record, save_pretrained=_refuse_to_save)
        record.add(before)
    except BaseException:
        restore(before)
        raise


def technique_of(model: nn.Module) -> str | None:
    """The name of the technique on a model, or None."""
    record = getattr(model, "minipeft", None)
    return record and record.technique


def refuse_tuned(model: nn.Module) -> None:
    """Raise ValueError for no model, or one that has a technique already, ours or HF peft's."""
    refuse_no_model(model)
    kind, present = type(model).__name__, technique_of(model)
    require(
        not present,
        f"This {kind} has {present} already; take it off with remove(model), or load the base "
        "model anew.",
    )
    require(
        not hasattr(model, "peft_config"),
        f"This {kind} has an adapter of HF peft already; load the base model anew, or take what "
        "its merge_and_unload() returns.",
    )


def snapshot(model: nn.Module) -> Snapshot:
    """References to everything that a technique may change. No tensor is copied."""
    parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
    modules = []
    for module in model.modules():
        attributes = dict(vars(module))
        containers = {
            k: v.copy() for k, v in attributes.items() if isinstance(v, dict | list | set)
        }
        modules.append((module, attributes, containers))
    return parameters, modules


def restore(before: Snapshot) -> None:
    """Put a model back into the state of a snapshot."""
    parameters, modules = before
    for module, attributes, containers in modules:
        vars(module).clear()
        vars(module).update(attributes)
        for name, copied in containers.items():  # in place, since hook handles refer to the dicts
            container = attributes[name]
            container.clear()
            container.extend(copied) if isinstance(container, list) else container.update(copied)
    for parameter, data, requires_grad, grad in parameters:
        parameter.data = data
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad


def unmark(model: nn.Module) -> None:
    """Undo the marks of `adding`, once the technique is off the model."""
    del model.minipeft, model.save_pretrained


def _refuse_to_save(*args, **kwargs):
    raise ValueError(
        "transformers would write this tuned model without what was learnt, or under names that it "
        "cannot read; call save_adapter(model, folder), or, for LoRA, merge_lora and unload_lora "
        'first. Under a Trainer, set save_strategy="no" and save_adapter at the end.'
    )


def language_model_head(model: nn.Module) -> nn.Module | None:
    """The output embeddings, or None for a classifier, a bare backbone or a plain nn.Module."""
    find = getattr(model, "get_output_embeddings", None)
    return find() if find else None


def heads(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} outside the backbone of a model without a language-model head.

    On a classifier that is the head, which is randomly initialized and has to be trained.
    """
    backbone = getattr(model, "base_model", model)
    if backbone is model or language_model_head(model) is not None:
        return {}
    return {
        name: module
        for name, module in model.named_children()
        if module is not backbone and any(True for _ in module.parameters())
    }


def freeze_base(model: nn.Module) -> None:
    """Freeze `model` except the head of a classifier, which trains in float32 or wider.

    Half-precision inputs of that head are cast to its dtype.
    """
    classifier = heads(model)  # before a technique adds modules of its own
    freeze(model)
    for head in classifier.values():
        dtype = at_least_float32(next(head.parameters()).dtype)
        head.requires_grad_(True).to(dtype)
        head.register_forward_pre_hook(_cast_to_head_dtype)


def _cast_to_head_dtype(head, args):
    first, *rest = args
    return (first.to(next(head.parameters()).dtype), *rest)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode for the block, then back into the mode it had."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def has_numbers(model: nn.Module) -> bool:
    """False for a model on the meta device or of fake tensors, which cannot compute anything."""
    first = next(chain(model.parameters(), model.buffers()))
    return not (first.is_meta or isinstance(first, torch._subclasses.fake_tensor.FakeTensor))
