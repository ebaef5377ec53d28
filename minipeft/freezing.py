"""Freeze the base model, unfreeze parts of it, and count parameters.

A frozen parameter has requires_grad=False. Its gradient is None, not zero, and gradients still flow
through it to earlier layers. Each `only_...` freezes the whole model and then unfreezes one kind of
parameter.
"""

import difflib
from fnmatch import fnmatchcase

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from minipeft.refusals import Model, refuse_flag, refuse_no_model, require, shown


def freeze(model: Model) -> Model:
    """Set requires_grad=False on every parameter. Returns the model."""
    refuse_no_model(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    return model


def unfreeze(model: Model, *module_patterns: str) -> Model:
    """Set requires_grad=True on the parameters of every module that a pattern matches.

    A pattern is a dotted module name, in which * matches anything: "model.layers.29", "*norm*",
    "lm_head". Without a pattern, everything is unfrozen. A tied weight is one tensor, so unfreezing
    the head also unfreezes the embedding that shares it. Returns the model.
    Raises ValueError for a pattern that matches no module with parameters, or quantized weights.
    """
    refuse_no_model(model)
    names = [n for n, m in model.named_modules() if any(True for _ in m.parameters())]
    matched: set[str] = set()
    for pattern in module_patterns or ("*",):
        require(
            isinstance(pattern, str) and pattern,
            f"{shown(pattern)} is not a pattern; give names of modules one by one, as strings.",
        )
        matches = {name for name in names if fnmatchcase(name, pattern)}
        if not matches:
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3)
            raise ValueError(
                f"No module with parameters is named {pattern!r}"
                + (f"; near it are {', '.join(near)}." if near else ".")
            )
        matched |= matches
    modules = [model.get_submodule(name) for name in sorted(matched)]
    _refuse_quantized(model, *modules)
    for module in modules:
        module.requires_grad_(True)
    return model


def _refuse_quantized(model, *modules):
    """Raise ValueError if one of `modules` holds quantized weights: they would not be trained."""
    submodules = {m for module in modules for m in module.modules()}
    for name, module in model.named_modules():
        own = module.parameters(recurse=False)
        if module in submodules and (
            getattr(module, "is_quantized", False) or any(not p.is_floating_point() for p in own)
        ):
            raise ValueError(
                f"{name} is quantized, and codes cannot be trained; put a technique such as LoRA "
                "on top, or name modules without such weights."
            )


def blocks(model: nn.Module) -> nn.ModuleList:
    """The nn.ModuleList of the transformer blocks of a Hugging Face decoder or classifier.

    It is found by its length, config.num_hidden_layers, because its name varies: "model.layers" in
    Llama, "transformer.h" in GPT-2 and Bloom. In a multimodal model these are the blocks of the
    text model. Lists inside the blocks, such as experts, and far smaller lists are skipped.
    Raises ValueError if there is no such list, or more than one: an encoder's and a decoder's, or
    separate lists of attention and feed-forward layers.
    """
    refuse_no_model(model)
    name = type(model).__name__
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has two stacks of blocks, an encoder's and a decoder's.")
    text = config.get_text_config(decoder=True) if isinstance(config, PreTrainedConfig) else config
    number, known = getattr(text, "num_hidden_layers", None), (type(config), type(text))
    # The decoder of BART on its own still has the config of the encoder-decoder.
    numbers = {number, *(getattr(text, f"{n}decoder_layers", number) for n in ("", "num_"))}
    skipped: set[nn.Module] = set()  # inside a list of the right length, or not in the text model
    found: list[nn.ModuleList] = []
    for module in model.modules():
        if module in skipped:
            continue
        own = getattr(module, "config", None)
        if isinstance(own, PreTrainedConfig) and not isinstance(own, known):
            skipped |= set(module.modules())
        elif isinstance(module, nn.ModuleList) and len(module) in numbers:
            skipped |= set(module.modules())
            found.append(module)
    require(
        found,
        f"{name} has no list of blocks: no nn.ModuleList in it is as long as "
        f"config.num_hidden_layers, which is {number}.",
    )
    sizes = [sum(t.numel() for t in (*m.parameters(), *m.buffers())) for m in found]
    require(
        sum(sizes) - max(sizes) <= max(sizes) / 10,
        f"{name} has {len(found)} lists as long as config.num_hidden_layers, which is "
        f"{number}: its blocks are not in one of them.",
    )
    return found[sizes.index(max(sizes))]


def only_last_blocks(model: Model, k: int) -> Model:
    """Train the last k transformer blocks and nothing else. Returns the model.

    The final norm and the head stay frozen; use `unfreeze` to train them too.
    Raises ValueError for a k that is not an integer from 1 to the number of blocks.
    """
    stack = blocks(model)
    if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= len(stack):
        raise ValueError(f"k={shown(k)} is not a whole number of blocks from 1 to {len(stack)}.")
    _refuse_quantized(model, stack[-k:])
    freeze(model)
    stack[-k:].requires_grad_(True)
    return model


def only_head(model: PreTrainedModel, untie: bool = False) -> PreTrainedModel:
    """Train the parameters outside model.base_model: the head of a language model or classifier.

    A tied head shares its weight with the embedding, so both are trained, and the backward pass has
    to run through every block. `untie` first gives the head its own copy, which takes as much
    memory as the embedding; then the backward pass stops at the head. Returns the model.
    Raises ValueError for a bare backbone and for a quantized head.
    """
    refuse_no_model(model)
    backbone = getattr(model, "base_model", model)
    heads = [child for child in model.children() if child is not backbone]
    if backbone is model or not any(True for h in heads for _ in h.parameters()):
        raise ValueError(f"{type(model).__name__} has no head: it is the backbone alone.")
    refuse_flag("untie", untie)
    _refuse_quantized(model, *heads)
    freeze(model)
    shared = {id(p) for p in backbone.parameters()}
    for module in (m for head in heads for m in head.modules()):
        for name, p in module.named_parameters(recurse=False):
            if untie and id(p) in shared:
                setattr(module, name, nn.Parameter(p.detach().clone()))
                model.config.tie_word_embeddings = False  # or tie_weights() would undo it
            getattr(module, name).requires_grad_(True)
    return model


def only_norms(model: Model) -> Model:
    """Train the weights, and biases if any, of all LayerNorms and RMSNorms. Returns the model.

    Norms are found by class (LayerNorm, LlamaRMSNorm, RMSNormGated ...), because their attribute
    names vary (ln_1, norm, layernorm ...). All their parameters are vectors.
    Raises ValueError for a model without norms that have parameters.
    """
    refuse_no_model(model)
    params = []
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        named = isinstance(module, nn.LayerNorm) or "Norm" in type(module).__name__
        params += own if named and all(p.dim() == 1 for p in own) else []
    return _only(model, params, "norm with parameters")


def only_biases(model: Model) -> Model:
    """Train all biases, including those of norms (BitFit, Ben Zaken et al. 2022, section 3).

    Returns the model. Raises ValueError for a model without biases, such as Llama.
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


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of the trainable parameters; a tied parameter appears once."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Return (trainable, total) numbers of scalars.

    A tied weight counts once. A 4-bit layer counts the weights that its codes stand for.
    """
    refuse_no_model(model)
    sizes = {key: (trainable * count, count) for _, key, count, trainable in _counted(model)}
    return sum(n for n, _ in sizes.values()), sum(n for _, n in sizes.values())


def _counted(model):
    """[(name, key, number of scalars, trainable?)] of the parameters and of 4-bit weights, which
    are not parameters. A tied weight is listed under each of its names with the same key."""
    parameters = model.named_parameters(remove_duplicate=False)
    layers = model.named_modules(remove_duplicate=False)
    return [(name, id(p), p.numel(), p.requires_grad) for name, p in parameters] + [
        (f"{name}.weight", id(layer), layer.weight_count, False)
        for name, layer in layers
        if hasattr(layer, "weight_count")
    ]


def count_by_module(model: nn.Module) -> dict[str, tuple[int, int]]:
    """{dotted name: (trainable, total)} of the list of blocks and of each module outside it.

    A tied weight counts where it first appears, so a tied head has (0, 0), and the sums are those
    of `count_parameters`.
    """
    stack = blocks(model)
    path = next(name for name, module in model.named_modules() if module is stack)
    counts: dict[str, tuple[int, int]] = {}
    seen = set()
    for name, key, count, requires_grad in _counted(model):
        # Go up to the largest module that does not contain the blocks.
        while "." in name and not path.startswith(f"{name.rpartition('.')[0]}."):
            name = name.rpartition(".")[0]
        count *= key not in seen
        seen.add(key)
        trainable, total = counts.get(name, (0, 0))
        counts[name] = (trainable + requires_grad * count, total + count)
    return counts


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """float32, or `dtype` if wider, for trainable parameters. Narrower ones lose small updates."""
    return torch.promote_types(dtype, torch.float32)


def modules_named(
    model: nn.Module, endings: list[str], kinds: tuple[type[nn.Module], ...]
) -> list[tuple[str, nn.Module]]:
    """[(dotted name, module)] of the modules of class `kinds` whose name ends in one of `endings`.

    An ending is one or more whole components, "q_proj" or "0.self_attn.q_proj", as in the
    target_modules of HF peft. Raises ValueError if an ending matches no module.
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
