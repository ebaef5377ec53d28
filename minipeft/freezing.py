"""Decide what is trained: freeze the base, unfreeze parts of it by module, count.

A frozen parameter has requires_grad=False. It gets no gradient at all (None, not zero), while
gradients still flow through it to what lies before it (claim 13). Each `only_...` freezes the
whole model and then unfreezes one kind of part.
"""

import difflib
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import PreTrainedConfig

from minipeft.refusals import refuse_flag, refuse_no_model, require, shown


def freeze(model):
    """Set requires_grad=False on every parameter. Returns the model."""
    refuse_no_model(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return model


def unfreeze(model, *module_patterns):
    """Set requires_grad=True on the parameters of every module that a pattern matches.

    A pattern is a dotted module name, in which * stands for anything: "model.layers.29",
    "*norm*", "lm_head". With no pattern, everything is unfrozen. A tied weight is one tensor, so
    unfreezing the head also unfreezes the embedding that shares it. Returns the model.
    Raises ValueError for a pattern that matches no module with parameters, and for one that
    matches quantised weights, which cannot be trained.
    """
    refuse_no_model(model)
    names = [
        name for name, module in model.named_modules() if any(True for _ in module.parameters())
    ]
    matched = set()
    for pattern in module_patterns or ("*",):
        require(
            isinstance(pattern, str) and pattern,
            f"{shown(pattern)} is no pattern; give names of modules one by one, as texts.",
        )
        fitting = {name for name in names if fnmatchcase(name, pattern)}
        if not fitting:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"No module with parameters is named {pattern!r}"
                + (f"; near it are {', '.join(near)}." if near else ".")
            )
        matched |= fitting
    modules = [model.get_submodule(name) for name in sorted(matched)]
    _refuse_quantised(model, *modules)
    for module in modules:
        module.requires_grad_(True)
    return model


def _refuse_quantised(model, *modules):
    """Raise ValueError if one of `modules` holds weights of few bits: only the rest would train."""
    inside = {m for module in modules for m in module.modules()}
    for name, module in model.named_modules():
        own = module.parameters(recurse=False)
        if module in inside and (
            getattr(module, "is_quantized", False) or any(not p.is_floating_point() for p in own)
        ):
            raise ValueError(
                f"{name} is quantised, and codes cannot be trained; put a technique such as LoRA "
                "on top, or name modules without such weights."
            )


def blocks(model):
    """The nn.ModuleList of the transformer blocks of a Hugging Face decoder or classifier.

    It is found by its length, config.num_hidden_layers, not by a name: "model.layers" in Llama,
    "transformer.h" in GPT-2 and Bloom. A model that also reads images has the blocks of its text.
    Lists inside of the blocks, such as experts, and far smaller ones beside them do not count.
    Raises ValueError if there is no such list, or more than one: of an encoder and a decoder, or of
    attentions apart from feed-forward layers.
    """
    refuse_no_model(model)
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has two stacks of blocks, an encoder's and a decoder's.")
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    number, known = getattr(text, "num_hidden_layers", None), (type(config), type(text))
    # The decoder of BART, taken alone, still has a configuration for both.
    numbers = {number, *(getattr(text, f"{n}decoder_layers", number) for n in ("", "num_"))}
    passed = set()  # modules inside of a list that fits, or of a part that reads no text
    fitting = []
    for module in model.modules():
        if module in passed:
            continue
        own = getattr(module, "config", None)
        elsewhere = isinstance(own, PreTrainedConfig) and not isinstance(own, known)
        if elsewhere or (isinstance(module, nn.ModuleList) and len(module) in numbers):
            passed |= set(module.modules())
            fitting += [] if elsewhere else [module]
    require(
        fitting,
        f"{name} has no list of blocks: no nn.ModuleList in it is as long as "
        f"config.num_hidden_layers, which is {number}.",
    )
    sizes = [sum(t.numel() for t in (*m.parameters(), *m.buffers())) for m in fitting]
    require(
        sum(sizes) - max(sizes) <= max(sizes) / 10,
        f"{name} has {len(fitting)} lists as long as config.num_hidden_layers, which is "
        f"{number}: its blocks are not in one of them.",
    )
    return fitting[sizes.index(max(sizes))]


def only_last_blocks(model, k):
    """Train the last k transformer blocks and nothing else. Returns the model.

    The final norm and the head stay frozen: neither is part of a block, and both would add the
    same to every k. `unfreeze` adds them where they are wanted.
    Raises ValueError for a k that is not a whole number from 1 to the number of blocks.
    """
    stack = blocks(model)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(stack):
        raise ValueError(f"k={shown(k)} is not a whole number of blocks from 1 to {len(stack)}.")
    _refuse_quantised(model, stack[-k:])
    freeze(model)
    stack[-k:].requires_grad_(True)
    return model


def only_head(model, untie=False):
    """Train what stands outside model.base_model: the head of a language model or classifier.

    A tied head is the embedding, so both are trained, and the gradient has to come down through
    every block to reach it. `untie` gives the head a copy of its own first, which costs as much
    memory as the embedding, and ends the way back at the head.
    Raises ValueError for a bare backbone, which has no head, and for a quantised head.
    """
    refuse_no_model(model)
    backbone = getattr(model, "base_model", model)
    heads = [child for child in model.children() if child is not backbone]
    if backbone is model or not any(True for h in heads for _ in h.parameters()):
        raise ValueError(f"{type(model).__name__} has no head: it is the backbone alone.")
    refuse_flag("untie", untie)
    _refuse_quantised(model, *heads)
    freeze(model)
    shared = {id(p) for p in backbone.parameters()}
    for module in (m for head in heads for m in head.modules()):
        for name, p in module.named_parameters(recurse=False):
            if untie and id(p) in shared:
                setattr(module, name, nn.Parameter(p.detach().clone()))
                model.config.tie_word_embeddings = False  # or tie_weights() would undo it
            getattr(module, name).requires_grad_(True)
    return model


def only_norms(model):
    """Train the weights, and biases if any, of all LayerNorms and RMSNorms. Returns the model.

    A norm is told by its type, LayerNorm, LlamaRMSNorm, RMSNormGated ..., and holds vectors only;
    its name is ln_1, norm, layernorm ...
    Raises ValueError for a model without norms that have parameters.
    """
    refuse_no_model(model)
    params = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        named = isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__
        params += own if named and all(p.dim() == 1 for p in own) else []
    return _only(model, params, "norm with parameters")


def only_biases(model):
    """Train all biases, those of norms included (BitFit, Ben Zaken et al. 2022, section 3).

    Returns the model. Raises ValueError for a model without biases, as Llama is.
    """
    refuse_no_model(model)
    params = [p for name, p in model.named_parameters() if name.endswith("bias")]
    return _only(model, params, "bias")


def _only(model, params, what):
    require(params, f"{type(model).__name__} has no {what}, so nothing would be trained.")
    freeze(model)
    for p in params:
        p.requires_grad_(True)
    return model


def trainable_parameters(model):
    """{name: parameter} of what requires grad; a tied parameter appears once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model):
    """Return (trainable, total): numbers of scalars, a tied weight counted once, and a quantised
    one as the number of weights it stands for."""
    refuse_no_model(model)
    sizes = {owner: (trainable * count, count) for _, owner, count, trainable in _counted(model)}
    return sum(trained for trained, _ in sizes.values()), sum(count for _, count in sizes.values())


def _counted(model):
    """[(name, owner, number of scalars, trainable?)] of the parameters, by all their names, and of
    the weights that 4-bit layers stand for, which are no parameters."""
    parameters = model.named_parameters(remove_duplicate=False)
    layers = model.named_modules(remove_duplicate=False)
    return [(name, id(p), p.numel(), p.requires_grad) for name, p in parameters] + [
        (f"{name}.weight", id(layer), layer.weight_count, False)
        for name, layer in layers
        if hasattr(layer, "weight_count")
    ]


def count_by_module(model):
    """{part: (trainable, total)}: the list of blocks, and whatever stands beside it.

    Parts are named as the model names them. A tied weight counts where it comes first, so a tied
    head has (0, 0) and the sums are those of `count_parameters`.
    """
    stack = blocks(model)
    path = next(name for name, module in model.named_modules() if module is stack)
    counts, seen = {}, set()
    for name, owner, count, trained in _counted(model):
        part = name  # from there up, as long as the next step would not reach the blocks
        while "." in part and not path.startswith(f"{part.rpartition('.')[0]}."):
            part = part.rpartition(".")[0]
        count *= owner not in seen
        seen.add(owner)
        trainable, total = counts.get(part, (0, 0))
        counts[part] = (trainable + trained * count, total + count)
    return counts


def at_least_float32(dtype):
    """The type that trainables get on a base of `dtype`: small updates vanish below float32."""
    return torch.promote_types(dtype, torch.float32)


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
