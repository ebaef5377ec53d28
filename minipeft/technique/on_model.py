"""Put a technique on a model: wholly, or not at all.

    with adding(model, "lora"):
        freeze_base(model)
        ...                         # what the paper says

A base that cannot keep what the technique promises is found out here, while it is added. Whatever
is raised inside, the model is afterwards what it was: modules, parameters, hooks, attributes.
"""

from contextlib import contextmanager
from itertools import chain

import torch

from minipeft.freezing import at_least_float32, freeze
from minipeft.refusals import require
from minipeft.technique.record import Record


@contextmanager
def adding(model, name, again=False):
    """Mark the model as tuned by technique `name` when the block ends well; else undo the block.

    again: may the same technique be on the model already?
    Raises ValueError as `refuse_tuned` does.
    """
    if not (again and technique_of(model) == name):
        refuse_tuned(model)
    before = snapshot(model)
    try:
        yield
        record = getattr(model, "minipeft", None) or Record(name)
        model.save_pretrained = _refuse_to_save
        record.add(before)
        model.minipeft = record
    except BaseException:
        restore(model, before)
        raise


def technique_of(model):
    """The name of the technique on a model, or None."""
    record = getattr(model, "minipeft", None)
    return record and record.technique


def refuse_tuned(model):
    """Raise ValueError for a model that has a technique already, ours or HF peft's."""
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


def snapshot(model):
    """References to all that a technique may change; no tensor is copied."""
    parameters = [(p, p.data, p.requires_grad, p.grad) for p in model.parameters()]
    modules = []
    for module in model.modules():
        attributes = dict(vars(module))
        inner = {k: v.copy() for k, v in attributes.items() if isinstance(v, dict | list | set)}
        modules.append((module, attributes, inner))
    return parameters, modules


def restore(model, before):
    parameters, modules = before
    for module, attributes, inner in modules:
        vars(module).clear()
        vars(module).update(attributes)
        for name, copied in inner.items():  # in place: handles of hooks hold on to their dicts
            container = attributes[name]
            container.clear()
            container.extend(copied) if isinstance(container, list) else container.update(copied)
    for parameter, data, requires_grad, grad in parameters:
        parameter.data = data
        parameter.requires_grad_(requires_grad)
        parameter.grad = grad


def unmark(model):
    """The technique is off: a plain model again."""
    del model.minipeft, model.save_pretrained


def _refuse_to_save(*args, **kwargs):
    raise ValueError(
        "transformers would write this tuned model without what was learnt, or under names that it "
        "cannot read; call save_adapter(model, folder), or, for LoRA, merge_lora and unload_lora "
        'first. Under a Trainer, set save_strategy="no" and save_adapter at the end.'
    )


def heads(model):
    """{name: module} of what stands outside the backbone of a model without a language-model head.

    On a classifier that is the head, which is new and random: it has to be trained.
    """
    backbone = getattr(model, "base_model", model)
    if backbone is model or model.get_output_embeddings() is not None:
        return {}
    return {
        name: module
        for name, module in model.named_children()
        if module is not backbone and any(True for _ in module.parameters())
    }


def freeze_base(model):
    """Freeze `model` but for the head of a classifier, which trains in float32 or wider.

    Half-precision states are widened as they enter that head. Returns the model.
    """
    outside = heads(model)  # before a technique adds modules of its own
    freeze(model)
    for head in outside.values():
        dtype = at_least_float32(next(head.parameters()).dtype)
        head.requires_grad_(True).to(dtype)
        head.register_forward_pre_hook(_as_wide_as_the_head)
    return model


def _as_wide_as_the_head(head, args):
    first, *rest = args
    return (first.to(next(head.parameters()).dtype), *rest)


@contextmanager
def evaluating(model):
    """In the block every module is in eval mode; afterwards each has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield model
    finally:
        for module, training in modes:
            module.training = training


def has_numbers(model):
    """False for a model on the meta device or of fake tensors, on which nothing can be tried."""
    first = next(chain(model.parameters(), model.buffers()))
    return not (first.is_meta or isinstance(first, torch._subclasses.fake_tensor.FakeTensor))
