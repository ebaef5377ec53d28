"""LoRA: learn a low-rank change of a frozen weight matrix (Hu et al. 2021, section 4.1).

    h = W0 x + scaling * B A x        W0: (out, in), A: (r, in), B: (out, r)

W0 is frozen. A starts random and B zero, so that the model is unchanged before the first step.
An embedding is such a layer too: x is one-hot, in is the vocabulary, and A x a column of A.

DoRA (Liu et al. 2024, section 4) also learns the length m of each row of the sum V:

    h = m V x / |V|                   V = W0 + scaling * B A, m: (out,), started at |W0|
"""

import math
import re
from numbers import Real

import torch
from torch import nn
from torch.nn.functional import dropout, embedding, linear
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import (
    at_least_float32,
    modules_named,
    refuse_other_shapes,
    refuse_size,
)
from minipeft.technique.on_model import (
    adding,
    freeze_base,
    has_numbers,
    heads,
    refuse_tuned,
    unchanged,
    unmark,
)

PEFT_TYPE = "LORA"
SCALINGS = ("alpha/r", "rslora")
KINDS = (nn.Linear, Conv1D, nn.Embedding)


def matrix(layer):
    """W of a layer as (out, in), a view: Conv1D and nn.Embedding keep its transpose."""
    return layer.weight if isinstance(layer, nn.Linear) else layer.weight.T


def lengths(v):
    """The length of each row, (out,). One of zeros, as of a padding token, must not divide by 0."""
    return v.norm(dim=1).clamp(min=1e-8)


class LoRALinear(nn.Module):
    """A frozen nn.Linear, GPT-2 Conv1D or nn.Embedding with a trainable low-rank change beside it.

    base: the frozen layer, from (..., in), or token ids (...), to (..., out). A fused
    query-key-value projection is one layer like any other, with out = 3 * hidden or so.
    """

    def __init__(self, base, r, alpha, dropout=0.0, scaling="alpha/r", dora=False):
        super().__init__()
        self.base = base
        weight = matrix(base)
        out_features, in_features = weight.shape
        place = {"device": weight.device, "dtype": at_least_float32(weight.dtype)}
        self.lora_A = nn.Parameter(torch.zeros(r, in_features, **place))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, **place))  # (out, r)
        if isinstance(base, nn.Embedding):  # the roles turned, as in the authors' code and HF peft
            nn.init.normal_(self.lora_B)
        else:
            # The paper draws A from a Gaussian without naming its width. This is what nn.Linear
            # does, and what the authors' code and HF peft took over: uniform in +-1/sqrt(in).
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        # alpha/r: Hu et al. 2021, section 4.1; alpha/sqrt(r): Kalajdzievski 2023, theorem 3.2.
        self.scaling = alpha / (r if scaling == "alpha/r" else math.sqrt(r))
        self.dropout = 0.0 if isinstance(base, nn.Embedding) else dropout  # token ids do not drop
        self.merged = False
        self.kept = None  # the norms of DoRA, while nothing is learning
        self.lora_magnitude = nn.Parameter(self.norms()) if dora else None  # (out,)
        self.register_buffer("factor", None, persistent=False)  # what DoRA merged with
        self.train(base.training)  # a model in eval mode stays in it

    def forward(self, x):
        h = self.base(x)  # (batch, seq, out)
        if self.merged:
            return h
        x = dropout(x, self.dropout, self.training) if self.dropout else x
        # On a half-precision base the low-rank path stays in float32 and only its sum is rounded.
        if isinstance(self.base, nn.Embedding):
            z = embedding(x, self.lora_A.T, self.base.padding_idx)  # (batch, seq, r)
            z = z * (self.scaling * getattr(self.base, "embed_scale", 1.0))  # Gemma scales its own
        else:
            z = linear(x.to(self.lora_A.dtype), self.lora_A) * self.scaling  # (batch, seq, r)
        if z.dtype != h.dtype or z.dtype != self.lora_B.dtype:
            y = (h + linear(z, self.lora_B)).to(h.dtype)
        else:  # the same sum in one call, which spares a tensor as large as h
            rows = z.reshape(-1, z.shape[-1])  # (batch * seq, r)
            y = torch.addmm(h.reshape(-1, h.shape[-1]), rows, self.lora_B.T).view(h.shape)
        if self.lora_magnitude is None:
            return y
        bias = getattr(self.base, "bias", None)
        v = y if bias is None else y - bias  # V x
        if self.dropout and self.training:
            v = v + (self.base(x) - h)  # HF peft drops inputs of W0 too, where m / |V| is not 1
        return (y + (self.lora_magnitude / self.norms() - 1) * v).to(h.dtype)

    def change(self):
        return self.lora_B @ self.lora_A * self.scaling  # (out, in)

    def norms(self):
        """|V|: the length of each row of W0 + scaling B A, (out,). A constant in the backward pass,
        which spares memory (DoRA, section 4.3, equation 11).

        In eval mode and without gradients, as in `generate`, they are kept until a weight is
        written to, by whatever torch counts as writing (`.data` passes unseen).
        """
        tensors = [*self.base.parameters(), *self.base.buffers(), self.lora_A, self.lora_B]
        learning = self.training or torch.is_grad_enabled() or torch.compiler.is_compiling()
        if learning or not has_numbers(self) or any(t.is_inference() for t in tensors):
            self.kept = None
            return self._norms()
        state = [(t.data_ptr(), t._version) for t in tensors]
        if self.kept is None or self.kept[1] != state:
            held = [t.detach() for t in tensors]  # so that no address is given to another tensor
            self.kept = self._norms(), state, held
        return self.kept[0]

    @torch.no_grad()
    def _norms(self):
        return lengths(matrix(self.base) + self.change())

    def train(self, mode=True):
        self.kept = None
        return super().train(mode)

    def _apply(self, *args, **kwargs):  # .to(), .half() ...: nothing of the old is held
        self.kept = None
        return super()._apply(*args, **kwargs)

    @property
    def weight(self):
        """What a model that reads the weight itself has to read: W with the change in it, laid out
        as in `base`. A new tensor at each call, through which gradients flow."""
        if self.merged:
            return self.base.weight
        new = matrix(self.base) + self.change()
        if self.lora_magnitude is not None:
            new = new * (self.lora_magnitude / self.norms())[:, None]
        return (new if isinstance(self.base, nn.Linear) else new.T).to(self.base.weight.dtype)

    @property
    def bias(self):
        return getattr(self.base, "bias", None)

    @property
    def in_features(self):
        return self.base.in_features

    @property
    def out_features(self):
        return self.base.out_features

    def on_paper(self, tape, x, out):
        """The same forward in the operations of minipeft.memory.graph, for `memory.estimate`."""
        if isinstance(self.base, nn.Embedding):
            raise ValueError(
                "memory.estimate has no formula for LoRA on embeddings; memory.measure needs none."
            )
        h = tape.apply(self.base, x, out, "")
        x = tape.dropout(x, self.dropout)
        z = tape.cast(x, self.lora_A.dtype.itemsize)
        z = tape.scale(tape.linear(z, self.lora_A, str(len(self.lora_A)), name="lora_A input"))
        y = tape.linear(z, self.lora_B, out, name="lora_B input")
        y = tape.cast(tape.add(h, y), h.width)
        if self.lora_magnitude is None:
            return y
        m = self.lora_magnitude
        v = y if self.base.bias is None else tape.node("minus bias", [y], y.shape, y.width)
        if self.dropout:
            v = tape.add(v, tape.add(tape.apply(self.base, x, out, ""), h))
        v = tape.node("magnitude's input", [v], v.shape, max(v.width, m.dtype.itemsize), [v], [m])
        return tape.cast(tape.add(y, v), h.width)

    @torch.no_grad()
    def shift_weight(self, sign):
        """Put the change into the base weight (sign=1) or take it out (sign=-1), rounding once."""
        weight = matrix(self.base)
        if sign > 0:
            new = weight + self.change()
            if self.lora_magnitude is not None:
                self.factor = (self.lora_magnitude / lengths(new))[:, None]  # (out, 1)
                new *= self.factor
        else:
            new = (weight if self.factor is None else weight / self.factor) - self.change()
        weight.copy_(new)


def _layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def _some_layers(model):
    if not _layers(model):
        raise ValueError("This model has no LoRA; call add_lora or load_adapter first.")
    return _layers(model)


def add_lora(
    model, r=8, alpha=16, dropout=0.0, targets=("q_proj", "v_proj"), scaling="alpha/r", dora=False
):
    """Freeze `model` and put LoRA on every layer that `targets` names. Returns the model.

    r         rank of the change: r * (in + out) trainables for each layer.
    alpha     numerator of the scaling: alpha/r, or alpha/sqrt(r) with scaling="rslora".
    dropout   probability, while training, of dropping an input of the low-rank path.
    targets   last names of the layers, such as ("q_proj", "v_proj"); "query_key_value" for Bloom
              and GPT-NeoX, "c_attn" for GPT-2. A dotted ending picks fewer: "0.attn.c_attn".
              Embeddings ("embed_tokens", "wte") and an untied "lm_head" may be named too.
    dora      also learn the length of each row of the sum: `out` trainables more for each layer.
    The trainables are float32, also on a half-precision base (float64 on a float64 one). The head
    of a classifier is new, so it is trained as a whole, and gets no LoRA.
    LoRA on an embedding that is tied to the head changes what goes in, not the head; therefore it
    cannot be merged. A tied head cannot be named.
    Raises ValueError for a name that no layer has, a tied head, a number out of range, a layer that
    computes something else than its kind does, and a model that has a technique already.
    """
    targets = (targets,) if isinstance(targets, str) else targets
    if not isinstance(targets, list | tuple | set) or not all(
        isinstance(name, str) and name for name in targets
    ):
        raise ValueError(f"targets={targets!r} is no list of names of layers.")
    _check(r, alpha, dropout, scaling, dora)
    config = {
        "r": r,
        "lora_alpha": alpha if isinstance(alpha, int) else float(alpha),  # as JSON has them
        "lora_dropout": float(dropout),
        "use_rslora": scaling == "rslora",
        "use_dora": dora,
        "target_modules": list(targets),
    }
    with adding(model, "lora"), unchanged(model):
        layers = [(name, layer, r, alpha) for name, layer in _targets(model, targets)]
        _put(model, layers, dropout, scaling, dora)
        model.lora_config = config
    return model


def _check(r, alpha, dropout, scaling, dora):
    refuse_size("r", r, "rank")
    if not _is_number(alpha) or not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha!r} must be above 0: it multiplies what LoRA learns.")
    if not _is_number(dropout) or not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout!r} is no probability below 1.")
    if scaling not in list(SCALINGS):
        raise ValueError(f"scaling={scaling!r} is none of {', '.join(map(repr, SCALINGS))}.")
    if not isinstance(dora, bool):
        raise ValueError(f"dora={dora!r} is neither True nor False.")


def _is_number(value):
    return isinstance(value, Real) and not isinstance(value, bool)


def _targets(model, targets):
    found = modules_named(model, list(targets), KINDS)
    outside = _without_heads(model, found)
    for target in targets:
        if not any(f".{name}".endswith(f".{target}") for name, _ in outside):
            raise ValueError(
                f"{target} is the head of {type(model).__name__}, which is trained as a whole; "
                "name layers before it."
            )
    return outside


def _without_heads(model, found):
    trained = heads(model)
    return [(name, layer) for name, layer in found if name.split(".")[0] not in trained]


def _put(model, layers, dropout, scaling, dora):
    """Freeze the model and put LoRA on layers [(name, layer, r, alpha)]."""
    for name, layer, _, _ in layers:
        if not isinstance(layer, nn.Embedding):
            _refuse_tied(model, name, layer, "leave it out of the targets")
        _refuse_other_arithmetic(name, layer)
    freeze_base(model)
    for name, layer, r, alpha in layers:
        parent, _, last = name.rpartition(".")
        layer = LoRALinear(layer, r, alpha, dropout, scaling, dora)
        setattr(model.get_submodule(parent), last, layer)
    if any(m is _head(model) or isinstance(m.base, nn.Embedding) for m in _layers(model).values()):
        model.resize_token_embeddings = model.tie_weights = _refuse_to_resize


def _head(model):
    return getattr(model, "get_output_embeddings", bool)() or None


def _refuse_to_resize(*args, **kwargs):
    raise ValueError(
        "An embedding or head with LoRA on it cannot be resized or tied; do that before add_lora, "
        "or after unload_lora."
    )


def _refuse_tied(model, name, layer, remedy):
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    if owners.count(id(layer.weight)) > 1:
        raise ValueError(
            f"The weight of {name} is tied to another module, which merging would change too; "
            f"{remedy}."
        )


@torch.no_grad()
def _refuse_other_arithmetic(name, layer):
    """Raise ValueError for a layer of a class of its own that computes something else than W says,
    such as a router that normalises its output."""
    weight, rescales = layer.weight, getattr(layer, "max_norm", None)  # it writes to its weight
    if (type(layer) in KINDS and not rescales) or not has_numbers(layer):
        return
    if isinstance(layer, nn.Embedding):
        x = torch.arange(min(2, len(weight)), device=weight.device)  # (ids,)
        expected = weight[x] * getattr(layer, "embed_scale", 1.0)  # (ids, hidden)
    else:
        x = torch.linspace(-1, 1, matrix(layer).shape[1], device=weight.device)[None]  # (1, in)
        x = x.to(weight.dtype)
        expected = linear(x, matrix(layer), getattr(layer, "bias", None))  # (1, out)
    try:
        error = (layer(x) - expected).abs().max() if not rescales else math.inf
        same = error <= torch.finfo(weight.dtype).eps ** 0.5 * expected.abs().max().clamp(min=1e-8)
    except Exception:  # other arguments, or a tuple
        same = False
    if not same:
        raise ValueError(
            f"{name} is a {type(layer).__name__}, which computes something else than its weight "
            "says; leave it out of the targets."
        )


def merge_lora(model):
    """Fold every low-rank change into its base weight: no extra work at inference. Returns model.

    Exact up to one rounding of the weight, so lossy on a half-precision base. A merged model cannot
    be trained: its A and B no longer require grad until `unmerge_lora`.
    Raises ValueError if there is no LoRA, it is merged already, the base is quantised, or an
    embedding with LoRA is tied to the head.
    """
    return _shift(model, merge=True)


def unmerge_lora(model):
    """Subtract the changes again: the base is back up to rounding. Returns the model.

    Raises ValueError if there is no LoRA, or it is not merged.
    """
    return _shift(model, merge=False)


def unload_lora(model):
    """Take LoRA off: a plain model again, for `save_pretrained` or another technique. Returns it.

    Its weights are those of now: with the changes if they are merged, else those of the base. What
    was frozen stays frozen. Raises ValueError if there is no LoRA.
    """
    for name, layer in _some_layers(model).items():
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer.base)
    unmark(model)
    del model.lora_config
    if "resize_token_embeddings" in vars(model):
        del model.resize_token_embeddings, model.tie_weights
    return model


def _shift(model, merge):
    layers = _some_layers(model).values()
    if any(layer.merged == merge for layer in layers):
        raise ValueError(f"LoRA is {'already merged' if merge else 'not merged'} on this model.")
    if any("weight" not in dict(layer.base.named_parameters()) for layer in layers):
        raise ValueError(
            "This base is quantised: the sum would have to be rounded to 4 bits again. Load the "
            "adapter on the unquantised base and merge there."
        )
    for name, layer in _layers(model).items():
        _refuse_tied(model, name, layer.base, "keep the adapter beside it, or untie the head first")
    for layer in layers:
        layer.shift_weight(1 if merge else -1)
        layer.merged = merge
        for p in layer.parameters(recurse=False):
            p.requires_grad_(not merge)
    return model


def lora_plus_groups(model, lr, ratio=16):
    """LoRA+ (Hayou et al. 2024, section 4): B learns `ratio` times as fast as all else.

        train(model, batches, lr=lr, groups=lora_plus_groups(model, lr), ...)

    Returns parameter groups for `train` or any torch optimiser, without weight decay. The argument
    for a faster B is that the input of A is wide, which no one-hot input of an embedding is: there
    A and B both learn at `lr`. Raises ValueError if there is no LoRA, or for a ratio not above 0.
    """
    if not ratio > 0:
        raise ValueError(f"ratio={ratio} must be above 0: it multiplies the learning rate of B.")
    layers = _some_layers(model).values()
    fast = [layer.lora_B for layer in layers if not isinstance(layer.base, nn.Embedding)]
    slow = [p for p in model.parameters() if p.requires_grad and all(p is not b for b in fast)]
    return [
        {"params": slow, "lr": lr, "weight_decay": 0.0},
        {"params": fast, "lr": lr * ratio, "weight_decay": 0.0},
    ]


# ---- the folder format of HF peft (checkpoints.py) ---------------------------------------------

# What of peft's LoraConfig is understood: None where this module looks itself, or where the value
# only concerns the start or the run; else the values with which the arithmetic is the one above.
READS = dict.fromkeys([
    "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern",
    "fan_in_fan_out", "loftq_config", "eva_config", "corda_config", "lora_ga_config",
    "qalora_group_size", "megatron_core", "runtime_config",
]) | {
    "bias": ("none",),
    # PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA have changed the base; MiCA does not train B.
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}  # fmt: skip
# With these some layers of a fitting name have no LoRA; the tensors tell which have.
NARROWING = ("exclude_modules", "layers_to_transform")


def _keys(name, base, dora):
    """{name of the parameter: its name in HF peft's file}"""
    form = "lora_embedding_{}" if isinstance(base, nn.Embedding) else "lora_{}.weight"
    keys = {f"lora_{letter}": form.format(letter) for letter in "AB"}
    keys |= {"lora_magnitude": "lora_magnitude_vector"} if dora else {}
    return {own: f"base_model.model.{name}.{key}" for own, key in keys.items()}


def to_peft(model):
    """(adapter_config, {key: tensor}) as HF peft writes them."""
    layers = _layers(model)
    transposed = any(isinstance(layer.base, Conv1D) for layer in layers.values())
    config = {"bias": "none", "fan_in_fan_out": transposed}
    state = {
        key: getattr(layer, own)
        for name, layer in layers.items()
        for own, key in _keys(name, layer.base, model.lora_config["use_dora"]).items()
    }
    return config | model.lora_config, state


def from_peft(model, config, state):
    """Add the LoRA of an adapter_config and its tensors to `model`; all or nothing.

    Raises ValueError if they do not fit the model, or a setting is of the wrong type.
    """
    refuse_tuned(model)
    defaults = {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}  # peft's
    config = defaults | config
    config |= {key: config.get(key) or False for key in ("use_rslora", "use_dora")}
    if not isinstance(config["use_rslora"], bool):
        raise ValueError(f"use_rslora={config['use_rslora']!r} is neither true nor false.")
    scaling, dora = "rslora" if config["use_rslora"] else "alpha/r", config["use_dora"]
    _check(*(config[key] for key in defaults), scaling, dora)
    state = _without_base(model, {_plain(key): tensor for key, tensor in state.items()})
    layers, expected = [], {}
    for name, layer in _chosen(model, config, state):
        r = _by_pattern(config, "rank_pattern", name, config["r"])
        alpha = _by_pattern(config, "alpha_pattern", name, config["lora_alpha"])
        _check(r, alpha, config["lora_dropout"], scaling, dora)
        rows, columns = matrix(layer).shape
        shapes = {"lora_A": (r, columns), "lora_B": (rows, r), "lora_magnitude": (rows,)}
        expected |= {key: shapes[own] for own, key in _keys(name, layer, dora).items()}
        layers.append((name, layer, r, alpha))
    refuse_other_shapes(state, expected)
    with adding(model, "lora"), unchanged(model):
        _put(model, layers, config["lora_dropout"], scaling, dora)
        model.lora_config = _kept_settings(config, layers)
    with torch.no_grad():
        for name, layer in _layers(model).items():
            for own, key in _keys(name, layer.base, dora).items():
                getattr(layer, own).copy_(state[key])
    return model


def _kept_settings(config, layers):
    """What `to_peft` will write of them. Layers that no list of endings picks are named in full."""
    own = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "target_modules")
    kept = {key: config[key] for key in own}
    kept |= {key: config[key] for key in ("rank_pattern", "alpha_pattern") if config.get(key)}
    if isinstance(kept["target_modules"], str) or _given(config, *NARROWING):
        kept["target_modules"] = [name for name, *_ in layers]
    return kept


def _plain(key):
    """A key of peft without the name of its adapter, which some tools leave in."""
    key = re.sub(r"\.(lora_\w+)\.default(?=\.|$)", r".\1", key)
    return key.removesuffix(".weight") if "lora_magnitude_vector" in key else key


def _without_base(model, state):
    """Of an embedding or a head peft may write the frozen weight as well: it must be ours."""
    parameters, rest = dict(model.named_parameters(remove_duplicate=False)), {}
    for key, theirs in state.items():
        ours = parameters.get(key.removeprefix("base_model.model.").replace(".base_layer.", "."))
        if ours is None:
            rest[key] = theirs
        elif theirs.shape != ours.shape or not torch.allclose(
            theirs.to(ours), ours, rtol=0.01, atol=1e-7
        ):
            raise ValueError(f"The adapter was made for another base model: {key} differs.")
    return rest


def _given(config, *keys):
    return any(config.get(key) not in (None, [], "") for key in keys)


def _every(config):
    targets = config.get("target_modules")
    return isinstance(targets, str) and targets.lower() == "all-linear"


def _chosen(model, config, state):
    """[(name, layer)] of the layers that the adapter is for. As in peft, target_modules may name
    layers that this model does not have."""
    targets = config.get("target_modules")
    names = [targets] if isinstance(targets, str) else targets
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"target_modules={targets!r} is neither a pattern nor a list of names.")
    present = [(name, m) for name, m in model.named_modules() if isinstance(m, KINDS)]
    found = [(name, m) for name, m in present if _every(config) or _fits(targets, name)]
    found = _without_heads(model, found)
    if _every(config) or _given(config, *NARROWING, "modules_to_save"):
        found = [(name, m) for name, m in found if _keys(name, m, False)["lora_A"] in state]
    if not found:
        kinds = sorted({name.rpartition(".")[2] for name, _ in present})
        raise ValueError(
            f"{type(model).__name__} has no layer named {targets!r} that the adapter is for; it "
            f"has {', '.join(kinds)}."
        )
    return found


def _fits(pattern, name):
    """Does a name match a regular expression, or end in one of a list of endings?"""
    if not isinstance(pattern, str):
        return any(f".{name}".endswith(f".{ending}") for ending in pattern)
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} of the adapter is no pattern ({error}).") from error


def _by_pattern(config, key, name, default):
    """What rank_pattern or alpha_pattern says of a layer: the value of the first that fits."""
    patterns = config.get(key) or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"{key}={patterns!r} is no mapping from patterns to numbers.")
    return next((v for p, v in patterns.items() if _fits(rf"(.*\.)?({p})", name)), default)
