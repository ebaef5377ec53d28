"""What `estimate` and `measure` share: the settings of a training step, and the model for it."""

import copy
import re

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from minipeft.refusals import require

CHOICES = {
    "optimizer": ("adamw", "adamw-foreach", "adamw8bit", "sgd"),
    "precision": ("float32", "bfloat16"),
    "attention": ("fused", "eager"),
    "device": ("cpu", "cuda"),
    "tracker": ("own", "torch"),
}
OTHERS = re.compile("Classification|QuestionAnswering|MaskedLM|MultipleChoice|NextSentence")


def check_settings(method, batch, seq, checkpointing, dtype, **chosen):
    """Raise ValueError, in one sentence, for a setting that is unknown. chosen: one of `CHOICES`
    for each name."""
    if method is not None and not callable(method):
        raise ValueError(f"method={method!r} must be a function that takes and returns a model.")
    for name, value in {"batch": batch, "seq": seq}.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number from 1 on.")
    for name, value in chosen.items():
        known = CHOICES[name]
        require(value in known, f"{name}={value!r} is none of {', '.join(known)}.")
    if not isinstance(checkpointing, bool):
        raise ValueError(f"checkpointing={checkpointing!r} must be True or False.")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating-point type, as torch.float32.")


def build(config, method, dtype, attention):
    """The causal language model of a configuration, on whatever device is current, prepared for
    training by `method`."""
    kernel = {"fused": "sdpa", "eager": "eager"}[attention]
    if config.model_type == "bloom":
        kernel = "eager"  # transformers has no fused attention for ALiBi
    other = [name for name in config.architectures or [] if OTHERS.search(name)]
    if other or type(config) not in AutoModelForCausalLM._model_mapping:
        refuse_kind(other[0] if other else f"a model of type {config.model_type!r}")
    config = copy.deepcopy(config)  # a method may write into it; the caller's stays as it is
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
    model.config.use_cache = False
    return prepare(model.train(), method)


def build_without_numbers(*args):
    """`build` with nothing allocated: on the meta device or, if the method computes something that
    has no meta form (as folding P-tuning does), on fake tensors, which takes longer."""
    try:
        with torch.device("meta"):
            return build(*args)
    except RuntimeError:
        with FakeTensorMode():
            return build(*args)


def refuse_kind(what):
    raise ValueError(
        f"The memory is predicted and measured of causal language models; {what} is none."
    )


def prepare(model, method):
    """What `method` makes of the model. Raises ValueError if it is no model or does not train."""
    model = model if method is None else method(model)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`method` returned a {type(model).__name__}; it must return the model it prepared."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("Nothing is trainable: `method` has frozen every parameter.")
    return model


def storage_bytes(tensors):
    """Bytes of the memory behind tensors; views and tied weights are counted once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
