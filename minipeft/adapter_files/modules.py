"""Whole modules that were trained beside a technique: a head, norms. HF peft's modules_to_save."""

from collections import Counter

import torch

from minipeft.refusals import require
from minipeft.technique.on_model import heads, technique_of

GENERATING = ("CAUSAL_LM", "SEQ_2_SEQ_LM")
TASKS = {  # by the end of the name of a model's class
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}
# The heads that HF peft takes for trained in a folder of this task, named in the folder or not.
PEFT_HEADS = {
    "SEQ_CLS": ["classifier", "score"],
    "TOKEN_CLS": ["classifier", "score"],
    "QUESTION_ANS": ["qa_outputs"],
}


def task_of(model):
    """What tells HF peft which kind of model the adapter is for."""
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
    """{name: module} of what `names` stand for in modules_to_save: each ending fits, as in peft."""
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


def trained_beside(model, state, task):
    """(names for modules_to_save, {name: module}) of all that is trained and not in `state`.

    A head is saved as a whole, and so is a normalisation that keeps statistics, which change while
    its parameters are frozen. Raises ValueError for what has no place in an adapter folder.
    """
    own = {id(tensor) for tensor in state.values()}
    layers = [  # those that a technique stands on
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
    modules = _modules(model, [*names, *PEFT_HEADS.get(task, [])])
    for key in modules:
        require(
            not any(layer.startswith(f"{key}.") for layer in layers),
            f"{key} is trained as a whole, with {technique_of(model)} inside it, for which an "
            "adapter folder has no place; freeze one of the two before saving.",
        )
    return sorted(key for key in names if key in modules), modules


def take_modules(model, config, state, prefix):
    """Take the modules_to_save out of `state`: {name of the module: {key: tensor}}.

    Raises ValueError if they do not fit the model.
    """
    names = config.get("modules_to_save") or []
    require(
        isinstance(names, list) and all(isinstance(name, str) and name for name in names),
        f"modules_to_save={names!r} is no list of names.",
    )
    taken, tensors_of = {}, {}
    task = config.get("task_type")
    known = PEFT_HEADS.get(task, []) if isinstance(task, str) else []
    for key, module in _modules(model, [*names, *known]).items():
        taken[key] = {}
        for inner, own in module.state_dict(keep_vars=True).items():
            tensor = _fitting(f"{prefix}{key}.{inner}", own, state)
            taken[key][inner] = tensor
            tensors_of.setdefault(id(own), []).append(tensor)
    _refuse_untied(model, tensors_of)
    return taken


def _fitting(key, own, state):
    """Take the tensor that is to be copied into `own` out of `state`."""
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
    """Raise ValueError if the adapter has different numbers for what is one tensor in the model.

    tensors_of: {id of a parameter: [the tensors that are to be copied into it]}.
    """
    names_of = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    for key, own in model.named_parameters():
        given = tensors_of.get(id(own), [])
        if len(given) < names_of[id(own)]:  # what is not in the adapter stays as it is
            given = [own, *(tensor.to(own) for tensor in given)]
        require(
            all(torch.equal(given[0], other) for other in given[1:]),
            f"{key} is tied to another module in this model, and not in the adapter, which "
            "has other numbers for one of them; untie the model first.",
        )
