"""Decide what is trained: freeze the base, unfreeze parts of it by module, count.

A frozen parameter has requires_grad=False. It gets no gradient at all (None, not zero), while
gradients still flow through it to what lies before it (claim 13). Each `only_...` freezes the
whole model and then unfreezes one kind of part.
"""

import difflib
from fnmatch import fnmatchcase

import torch
from torch import nn


def freeze(model):
    """Set requires_grad=False on every parameter. Returns the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return model


def unfreeze(model, *module_patterns):
    """Set requires_grad=True on the parameters of every module that a pattern matches.

    A pattern is a dotted module name, in which * stands for anything: "model.layers.29",
    "*norm*", "lm_head". With no pattern, everything is unfrozen. A tied weight is one tensor, so
    unfreezing the head also unfreezes the embedding that shares it. Returns the model.
    Raises ValueError for a pattern that matches no module with parameters.
    """
    names = [
        name for name, module in model.named_modules() if any(True for _ in module.parameters())
    ]
    matched = set()
    for pattern in module_patterns or ("*",):
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"No module with parameters is named {pattern!r}"
                + (f"; near it are {', '.join(near)}." if near else ".")
            )
        matched |= fitting
    for name in matched:
        model.get_submodule(name).requires_grad_(True)
    return model


def blocks(model):
    """The nn.ModuleList of the transformer blocks of a Hugging Face decoder or classifier.

    It is found by its length, config.num_hidden_layers, not by a name: "model.layers" in Llama,
    "transformer.h" in GPT-2 and Bloom. Of several that fit, such as experts, the largest is taken.
    Raises ValueError if there is none, or if encoder and decoder both have one.
    """
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has two stacks of blocks, an encoder's and a decoder's.")
    number = getattr(config, "num_hidden_layers", None)
    fitting = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number]
    if not fitting:
        raise ValueError(
            f"{name} has no list of blocks: no nn.ModuleList in it is as long as "
            f"config.num_hidden_layers, which is {number}."
        )
    return max(fitting, key=lambda m: count_parameters(m)[1])


def only_last_blocks(model, k):
    """Train the last k transformer blocks and nothing else. Returns the model.

    The final norm and the head stay frozen: neither is part of a block, and both would add the
    same to every k. `unfreeze` adds them where they are wanted.
    Raises ValueError for a k that is not a whole number from 1 to the number of blocks.
    """
    stack = blocks(model)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(stack):
        raise ValueError(f"k={k!r} is not a whole number of blocks from 1 to {len(stack)}.")
    freeze(model)
    stack[-k:].requires_grad_(True)
    return model


def only_head(model, untie=False):
    """Train what stands outside model.base_model: the head of a language model or classifier.

    A tied head is the embedding, so both are trained, and the gradient has to come down through
    every block to reach it. `untie` gives the head a copy of its own first, which costs as much
    memory as the embedding, and ends the way back at the head.
    Raises ValueError for a bare backbone, which has no head.
    """
    heads = [child for child in model.children() if child is not model.base_model]
    if model.base_model is model or not any(True for h in heads for _ in h.parameters()):
        raise ValueError(f"{type(model).__name__} has no head: it is the backbone alone.")
    freeze(model)
    shared = {id(p) for p in model.base_model.parameters()}
    for module in (m for head in heads for m in head.modules()):
        for name, p in module.named_parameters(recurse=False):
            if untie and id(p) in shared:
                setattr(module, name, nn.Parameter(p.detach().clone()))
                model.config.tie_word_embeddings = False  # or tie_weights() would undo it
            getattr(module, name).requires_grad_(True)
    return model


def only_norms(model):
    """Train the weights, and biases if any, of all LayerNorms and RMSNorms. Returns the model.

    A norm is told by its type; its name is ln_1, norm, layernorm ...
    Raises ValueError for a model without norms that have parameters.
    """
    params = [
        p
        for module in model.modules()
        if isinstance(module, nn.LayerNorm) or type(module).__name__.endswith("Norm")
        for p in module.parameters(recurse=False)
    ]
    return _only(model, params, "norm with parameters")


def only_biases(model):
    """Train all biases, those of norms included (BitFit, Ben Zaken et al. 2022, section 3).

    Returns the model. Raises ValueError for a model without biases, as Llama is.
    """
    params = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return _only(model, params, "bias")


def _only(model, params, what):
    if not params:
        raise ValueError(f"{type(model).__name__} has no {what}, so nothing would be trained.")
    freeze(model)
    for p in params:
        p.requires_grad_(True)
    return model


def count_parameters(model):
    """Return (trainable, total): numbers of scalars, a tied weight counted once."""
    total = sum(p.numel() for p in model.parameters())  # parameters() gives each tensor once
    return sum(p.numel() for p in model.parameters() if p.requires_grad), total


def count_by_module(model):
    """{part: (trainable, total)}: the list of blocks, and whatever stands beside it.

    Parts are named as the model names them. A tied weight counts where it comes first, so a tied
    head has (0, 0) and the sums are those of `count_parameters`.
    """
    stack = blocks(model)
    path = next(name for name, module in model.named_modules() if module is stack)
    counts, seen = {}, set()
    for name, p in model.named_parameters(remove_duplicate=False):
        part = name  # from there up, as long as the next step would not reach the blocks
        while "." in part and not path.startswith(f"{part.rpartition('.')[0]}."):
            part = part.rpartition(".")[0]
        new = id(p) not in seen
        seen.add(id(p))
        trainable, total = counts.get(part, (0, 0))
        counts[part] = (trainable + new * p.requires_grad * p.numel(), total + new * p.numel())
    return counts


def at_least_float32(dtype):
    """The type that trainables get on a base of `dtype`: small updates vanish below float32."""
    return torch.promote_types(dtype, torch.float32)


def refuse_size(name, value, what):
    """Raise ValueError unless `value` is a whole number from 1 on."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value} is no {what}; give a whole number from 1 on.")


def refuse_other_shapes(state, expected):
    """Raise ValueError unless the tensors of an adapter have the shapes that the model expects.

    state: {key: tensor}. expected: {key: shape}.
    """
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found != expected:
        key = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ValueError(
            f"The adapter does not fit this base model: {key} is {found.get(key, 'missing')} in "
            f"the adapter, and {expected.get(key, 'nowhere')} in the model."
        )


def modules_named(model, endings, kinds):
    """[(dotted name, module)] of the modules of `kinds` whose name ends in one of `endings`.

    An ending is one or more whole components: "q_proj", or "0.self_attn.q_proj". (HF peft reads
    its target_modules the same way.) Raises ValueError if an ending fits none of them.
    """
    found = [(n, m) for n, m in model.named_modules() if isinstance(m, kinds)]
    missing = [e for e in endings if not any(f".{name}".endswith(f".{e}") for name, _ in found)]
    if missing or not endings:
        present = sorted({name.rpartition(".")[2] for name, _ in found})
        raise ValueError(
            f"{type(model).__name__} has no layer named "
            f"{' or '.join(map(repr, missing)) or 'by an empty list'}; it has {', '.join(present)}."
        )
    return [(n, m) for n, m in found if any(f".{n}".endswith(f".{e}") for e in endings)]
