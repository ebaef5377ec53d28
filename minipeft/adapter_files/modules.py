"""Modules trained in addition to a technique (a head, norms): HF peft's modules_to_save."""

from collections import Counter

import torch
from torch import nn

from minipeft.adapter_files.pair import Config, State
from minipeft.refusals import require
from minipeft.technique.on_model import heads, technique_of

GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
TASKS = {  # by the ending of the name of the model's class
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# The heads that HF peft saves and loads for a task, also if modules_to_save does not name them.
PEFT_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def task_of(model: nn.Module) -> Config:
    """The entries of adapter_config that tell HF peft the kind of model: task_type and, without
    one, auto_mapping."""
    classes = [cls.__name__ for cls in type(model).__mro__]
    for ending, task in TASKS.items():
        if any(name.endswith(ending) for name in classes):
            return {"task_type": task}
    if getattr(model, "can_generate", bool)():
        seq2seq = getattr(model.config, "is_encoder_decoder", False)
        return {"task_type": GENERATING[seq2seq]}
    if getattr(model, "base_model", model) is model:
        return {"task_type": "FEATURE_EXTRACTION"}
    kind = {"base_model_class": classes[0], "parent_library": type(model).__module__}
    return {"task_type": None, "auto_mapping": kind}  # a masked language model, for example


def _modules(model, names):
    """{dotted name: module} for modules_to_save, which holds endings of names, as in HF peft."""
    found = {
        key: module
        for key, module in model.named_modules(remove_duplicate=False)
        if any(key.endswith(name) for name in names)
    }
    return {
        key: module
        for key, module in found.items()
        if not any(key.startswith(f"{outer}.") for outer in found)
    }


def trained_beside(
    model: nn.Module, state: State, task: str | None
) -> tuple[list[str], dict[str, nn.Module]]:
    """(names for modules_to_save, {name: module}) of the modules that are trained and not in state.

    A head is saved as a whole. So is a norm with running statistics, which change even while its
    parameters are frozen. Raises ValueError for a trainable parameter that the format cannot hold.
    """
    own = {id(tensor) for tensor in state.values()}
    layers = [  # those that the technique has replaced
        key
        for key, module in model.named_modules()
        if hasattr(module, "base") and any(id(p) in own for p in module.parameters())
    ]
    names = {name for name in heads(model) if name != "virtual_tokens"}
    for key, module in model.named_modules(remove_duplicate=False):
        if getattr(module, "running_mean", None) is not None:
            names.add(key)
    for key, p in model.named_parameters(remove_duplicate=False):
        if not p.requires_grad or id(p) in own or key.startswith("virtual_tokens."):
            continue
        names.add(key.rpartition(".")[0])
        require(
            "." in key and not any(key.startswith(f"{layer}.") for layer in layers),
            f"{key} is trainable too, for which an adapter folder has no place; freeze it before "
            "saving.",
        )
    modules = _modules(model, [*names, *PEFT_HEADS.get(task or "", [])])
    for key in modules:
        require(
            not any(layer.startswith(f"{key}.") for layer in layers),
            f"{key} is trained as a whole, with {technique_of(model)} inside it, for which an "
            "adapter folder has no place; freeze one of the two before saving.",
        )
    return sorted(key for key in names if key in modules), modules


def take_modules(model: nn.Module, config: Config, state: State, prefix: str) -> dict[str, State]:
    """Remove the modules_to_save from `state` and return them: {name of the module: {key: tensor}}.

    Raises ValueError if they do not fit the model.
    """
    names = config.get("modules_to_save") or []
    require(
        isinstance(names, list) and all(isinstance(name, str) and name for name in names),
        f"modules_to_save={names!r} is not a list of names.",
    )
    taken: dict[str, State] = {}
    tensors_of: dict[int, list[torch.Tensor]] = {}  # by the id of the model's own tensor
    task = config.get("task_type")
    known = PEFT_HEADS.get(task, []) if isinstance(task, str) else []
    for key, module in _modules(model, [*names, *known]).items():
        taken[key] = {}
        for name, own in module.state_dict(keep_vars=True).items():
            tensor = _take(f"{prefix}{key}.{name}", own, state)
            taken[key][name] = tensor
            tensors_of.setdefault(id(own), []).append(tensor)
    _refuse_untied(model, tensors_of)
    return taken


def _take(key, own, state):
    """Remove the tensor that is to be copied into `own` from `state` and return it."""
    tensor = state.pop(key, None)
    require(
        tensor is not None and tensor.shape == own.shape,
        f"The adapter does not fit this base model: {key} is "
        f"{'missing' if tensor is None else tuple(tensor.shape)} in the adapter, and "
        f"{tuple(own.shape)} in the model.",
    )
    require(
        tensor.is_floating_point() == own.is_floating_point(),
        f"{key} of the adapter is {tensor.dtype}, not {own.dtype}.",
    )
    return tensor


def _refuse_untied(model, tensors_of):
    """Raise ValueError if the adapter has different values for what is one tensor in the model.

    tensors_of: {id of a parameter: [the tensors that are to be copied into it]}.
    """
    names_of = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for key, own in model.named_parameters():
        given = tensors_of.get(id(own), [])
        if len(given) < names_of[id(own)]:  # the model keeps the value that the adapter lacks
            given = [own, *(tensor.to(own) for tensor in given)]
        require(
            all(torch.equal(given[0], other) for other in given[1:]),
            f"{key} is tied to another module in this model, and not in the adapter, which "
            "has other numbers for one of them; untie the model first.",
        )
