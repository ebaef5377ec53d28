"""What `estimate` and `measure` share: the settings of a training step, and building its model."""

import copy
import re
from collections.abc import Callable, Iterable
from typing import NoReturn

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from minipeft.refusals import refuse_flag, require

Method = Callable[[PreTrainedModel], PreTrainedModel]  # such as lambda model: add_lora(model, r=8)
CHOICES = {
    "optimizer": ("adamw", "adamw-foreach", "adamw8bit", "sgd"),
    "precision": ("float32", "bfloat16"),
    "attention": ("fused", "eager"),
    "device": ("cpu", "cuda"),
    "tracker": ("own", "torch"),
}
OTHERS = re.compile("Classification|QuestionAnswering|MaskedLM|MultipleChoice|NextSentence")


def check_settings(
    method: Method | None,
    batch: int,
    seq: int,
    checkpointing: bool,
    dtype: torch.dtype,
    **chosen: str,
) -> None:
    """Raise ValueError for an invalid setting. chosen: by name, one of `CHOICES`."""
    if method is not None and not callable(method):
        raise ValueError(f"method={method!r} must be a function that takes and returns a model.")
    for name, number in {"batch": batch, "seq": seq}.items():
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise ValueError(f"{name}={number!r} must be a whole number of at least 1.")
    for name, value in chosen.items():
        known = CHOICES[name]
        require(value in known, f"{name}={value!r} is none of {', '.join(known)}.")
    refuse_flag("checkpointing", checkpointing)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype={dtype!r} must be a floating-point type, as torch.float32.")


def build(
    config: PretrainedConfig, method: Method | None, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """The causal language model of a configuration, on the current device, prepared by `method`.

    Raises ValueError for a configuration of another kind of model.
    """
    kernel = {"fused": "sdpa", "eager": "eager"}[attention]
    if config.model_type == "bloom":
        kernel = "eager"  # transformers has no fused attention for ALiBi
    other = [name for name in config.architectures or [] if OTHERS.search(name)]
    if other or type(config) not in AutoModelForCausalLM._model_mapping:
        refuse_kind(other[0] if other else f"a model of type {config.model_type!r}")
    config = copy.deepcopy(config)  # `method` may change it; the caller's must not change
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=kernel)
    model.config.use_cache = False
    return prepare(model.train(), method)


def build_without_numbers(
    config: PretrainedConfig, method: Method | None, dtype: torch.dtype, attention: str
) -> PreTrainedModel:
    """`build` on the meta device, without allocating memory."""
    with torch.device("meta"):
        return build(config, method, dtype, attention)


def refuse_kind(what: str) -> NoReturn:
    """Raise ValueError for `what`, which names a model that is not a causal language model."""
    raise ValueError(
        f"The memory is predicted and measured of causal language models; {what} is none."
    )


def prepare(model: PreTrainedModel, method: Method | None) -> PreTrainedModel:
    """Apply `method`. Raises ValueError if it returns no model, or one without trainables."""
    model = model if method is None else method(model)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"`method` returned a {type(model).__name__}; it must return the model it prepared."
        )
    require(
        any(p.requires_grad for p in model.parameters()),
        "Nothing is trainable: `method` has frozen every parameter.",
    )
    return model


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of the tensors' storages. Views and tied weights share one, which counts once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
