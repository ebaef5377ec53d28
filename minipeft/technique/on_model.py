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


@contextmanager
def adding(model, name, again=False):
    """Mark the model as tuned by technique `name` when the block ends well; else undo the block.

    again: may the same technique be on the model already?
    Raises ValueError as `refuse_tuned` does.
    """
    if not (again and getattr(model, "minipeft_technique", None) == name):
        refuse_tuned(model)
    before = snapshot(model)
    try:
        yield
        mark(model, name)
    except BaseException:
        restore(model, before)
        raise


def refuse_tuned(model):
    """Raise ValueError for a model that has a technique already, ours or HF peft's."""
    present = getattr(model, "minipeft_technique", None)
    if present:
        raise ValueError(
            f"This {type(model).__name__} has {present} already; load the base model anew."
        )
    if hasattr(model, "peft_config"):
        raise ValueError(
            f"This {type(model).__name__} has an adapter of HF peft already; load the base model "
            "anew, or take what its merge_and_unload() returns."
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


def mark(model, name):
    """Note on the model which technique it has; it can no longer be saved as a plain model."""
    model.minipeft_technique = name
    model.save_pretrained = _refuse_to_save


def unmark(model):
    """The technique is off: a plain model again."""
    del model.minipeft_technique, model.save_pretrained


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


@contextmanager
def unchanged(model):
    """Raise ValueError unless two ordinary tokens get the same answer after the block as before.

    Yields a dict, for {name: layer} of layers that the model has to call for it.
    What cannot be tried is let pass: a model without numbers, or one that takes more than tokens.
    """
    before = _answer(model, plain=True)
    needed, called = {}, set()
    yield needed
    if before is None:
        return
    handles = [
        layer.register_forward_hook(lambda layer, args, output: called.add(layer))
        for layer in needed.values()
    ]
    try:
        after = _answer(model)
    except Exception as error:
        raise ValueError(
            f"{type(model).__name__} cannot work with it ({type(error).__name__}: {error}); take "
            "other layers, or another base model."
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name, layer in needed.items() if layer not in called]
    if missing:
        raise ValueError(
            f"{type(model).__name__} does not call {missing[0]}, so nothing that stands there has "
            "an effect; take another base model."
        )
    before, after = before.double(), after.double()
    largest = before.nan_to_num(0, 0, 0).abs().max()
    allowed = torch.finfo(model.dtype).eps ** 0.5 * largest
    if not torch.allclose(after, before, rtol=0, atol=allowed.item(), equal_nan=True):
        raise ValueError(
            f"It would change what {type(model).__name__} answers before anything is trained; take "
            "other layers, or another base model."
        )


@torch.no_grad()
def _answer(model, plain=False):
    """The first output for two ordinary tokens, or None. No mode or random state is changed."""
    table = _table(model)  # (vocab, hidden)
    if table is None or not has_numbers(model):
        return None
    special = set()
    for name, value in model.config.get_text_config().to_dict().items():
        if name.endswith(("token_id", "token_index")):
            special |= set(value if isinstance(value, list) else [value])
    ordinary = [i % len(table) for i in range(len(table) // 2, len(table) // 2 + len(special) + 2)]
    ids = [i for i in ordinary if i not in special][:2]
    ids = torch.tensor([ids], device=table.device)  # (1, 2)
    cuda = [table.device] if table.is_cuda else []
    try:
        with evaluating(model), torch.random.fork_rng(cuda):
            output = model(input_ids=ids)
    except Exception as error:
        if not plain:
            raise
        if model.get_output_embeddings() is None:  # a head may ask for more
            return None
        raise ValueError(
            f"{type(model).__name__} does not answer two ordinary tokens "
            f"({type(error).__name__}: {error}), so nothing can be added to it."
        ) from error
    values = output.values() if isinstance(output, dict) else output
    return next(value for value in values if isinstance(value, torch.Tensor))


def _table(model):
    """The embedding table of a model to which input_ids alone can be given; else None."""
    if getattr(model, "main_input_name", None) != "input_ids" or not hasattr(model, "config"):
        return None
    if getattr(model.config, "is_encoder_decoder", False):
        return None
    try:
        return getattr(model.get_input_embeddings(), "weight", None)
    except NotImplementedError:  # transformers does not find it
        return None
