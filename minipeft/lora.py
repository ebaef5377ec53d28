"""LoRA: learn a low-rank change of a frozen weight matrix (Hu et al. 2021, section 4.1).

    h = W0 x + scaling * B A x        W0: (out, in), A: (r, in), B: (out, r)

W0 is frozen. A starts random and B zero, so that the model is unchanged before the first step.
An embedding is such a layer too: x is one-hot, in is the vocabulary, and A x a column of A.

DoRA (Liu et al. 2024, section 4) also learns the length m of each row of the sum V:

    h = m V x / |V|                   V = W0 + scaling * B A, m: (out,), started at |W0|
"""

import math

import torch
from torch import nn
from torch.nn.functional import dropout, embedding, linear
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import (
    at_least_float32,
    freeze,
    modules_named,
    refuse_other_shapes,
    refuse_size,
)

PEFT_TYPE = "LORA"
SCALINGS = ("alpha/r", "rslora")


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
            y = torch.addmm(h.flatten(0, -2), z.flatten(0, -2), self.lora_B.T).view(h.shape)
        if self.lora_magnitude is None:
            return y
        bias = getattr(self.base, "bias", None)
        v = y if bias is None else y - bias  # V x
        if self.dropout and self.training:
            v = v + (self.base(x) - h)  # HF peft drops inputs of W0 too, where m / |V| is not 1
        return (y + (self.lora_magnitude / self.norms() - 1) * v).to(h.dtype)

    def change(self):
        return self.lora_B @ self.lora_A * self.scaling  # (out, in)

    @torch.no_grad()
    def norms(self):
        """|V|: the length of each row of W0 + scaling B A, (out,). A constant in the backward pass,
        which spares memory (DoRA, section 4.3, equation 11)."""
        return lengths(matrix(self.base) + self.change())

    def on_paper(self, tape, x, out):
        """The same forward in the operations of minipeft.tape, for `memory.estimate`."""
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
    The trainables are float32, also on a half-precision base (float64 on a float64 one).
    LoRA on an embedding that is tied to the head changes what goes in, not the head; therefore it
    cannot be merged. A tied head cannot be named.
    Raises ValueError for a name that no layer has, a tied head, a number out of range, and a model
    that has LoRA already.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    _check(model, r, alpha, dropout, scaling)
    found = _targets(model, targets)
    freeze(model)
    for name, layer in found:
        parent, _, last = name.rpartition(".")
        layer = LoRALinear(layer, r, alpha, dropout, scaling, dora)
        setattr(model.get_submodule(parent), last, layer)
    model.minipeft_technique = "lora"
    model.lora_config = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": scaling == "rslora",
        "use_dora": bool(dora),
        "target_modules": list(targets),
    }
    return model


def _check(model, r, alpha, dropout, scaling):
    if _layers(model):
        raise ValueError("This model has LoRA already; load the base model anew.")
    if getattr(model, "minipeft_technique", None):
        raise ValueError(
            f"This model has {model.minipeft_technique} already, which LoRA would freeze; load the "
            "base model anew."
        )
    refuse_size("r", r, "rank")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be above 0: it multiplies what LoRA learns.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is no probability below 1.")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r} is none of {', '.join(map(repr, SCALINGS))}.")


def _targets(model, targets):
    found = modules_named(model, targets, (nn.Linear, Conv1D, nn.Embedding))
    for name, layer in found:
        if not isinstance(layer, nn.Embedding):
            _refuse_tied(model, name, layer, "leave it out of the targets")
    return found


def _refuse_tied(model, name, layer, remedy):
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    if owners.count(id(layer.weight)) > 1:
        raise ValueError(
            f"The weight of {name} is tied to another module, which merging would change too; "
            f"{remedy}."
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
    del model.minipeft_technique, model.lora_config
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

# Settings of peft's LoraConfig that change the arithmetic and that this module does not have.
FOREIGN = ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
           "layer_replication", "lora_bias", "exclude_modules", "trainable_token_indices",
           "target_parameters", "use_qalora", "ensure_weight_tying")  # fmt: skip


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
    config = {"bias": "none", "fan_in_fan_out": transposed, "task_type": "CAUSAL_LM"}
    state = {
        key: getattr(layer, own)
        for name, layer in layers.items()
        for own, key in _keys(name, layer.base, model.lora_config["use_dora"]).items()
    }
    return config | model.lora_config, state


def from_peft(model, config, state):
    """Add the LoRA of an adapter_config and its tensors to `model`; all or nothing.

    Raises ValueError if the adapter needs what this module does not have, or was made for another
    base model.
    """
    foreign = [name for name in FOREIGN if config.get(name)]
    foreign += ["bias"] if config.get("bias", "none") != "none" else []
    targets = config["target_modules"]
    if isinstance(targets, str):
        foreign.append("target_modules as a pattern")
    if foreign:
        raise ValueError(f"This adapter uses {', '.join(foreign)}, which minipeft does not have.")
    scaling = "rslora" if config.get("use_rslora") else "alpha/r"
    r, alpha, dora = config["r"], config["lora_alpha"], bool(config.get("use_dora"))
    _check(model, r, alpha, config.get("lora_dropout", 0.0), scaling)
    expected, state = {}, dict(state)
    for name, layer in _targets(model, targets):
        rows, columns = matrix(layer).shape
        shapes = {"lora_A": (r, columns), "lora_B": (rows, r), "lora_magnitude": (rows,)}
        expected |= {key: shapes[own] for own, key in _keys(name, layer, dora).items()}
        # Of an embedding or a head peft writes the frozen weight as well.
        key = f"base_model.model.{name}.base_layer.weight"
        if key in state:
            theirs, ours = state.pop(key), layer.weight
            if theirs.shape != ours.shape or not torch.allclose(theirs.to(ours), ours, rtol=0.01):
                raise ValueError(f"The adapter was made for another base model: {key} differs.")
    refuse_other_shapes(state, expected)
    add_lora(model, r, alpha, config.get("lora_dropout", 0.0), targets, scaling, dora)
    with torch.no_grad():
        for name, layer in _layers(model).items():
            for own, key in _keys(name, layer.base, dora).items():
                getattr(layer, own).copy_(state[key])
    return model
