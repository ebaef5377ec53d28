"""LoRA: learn a low-rank change of a frozen weight matrix (Hu et al. 2021, section 4.1).

    h = W0 x + scaling * B A x        W0: (out, in), A: (r, in), B: (out, r)

W0 is frozen. A starts random and B zero, so that the model is unchanged before the first step.
"""

import math

import torch
from torch import nn
from torch.nn.functional import dropout, linear
from transformers.pytorch_utils import Conv1D

from minipeft.freezing import at_least_float32, freeze, modules_named

PEFT_TYPE = "LORA"
SCALINGS = ("alpha/r", "rslora")


class LoRALinear(nn.Module):
    """A frozen nn.Linear or GPT-2 Conv1D with a trainable low-rank change beside it.

    base: the frozen layer, from (..., in) to (..., out). A fused query-key-value projection is one
    layer like any other, with out = 3 * hidden or so.
    """

    def __init__(self, base, r, alpha, dropout=0.0, scaling="alpha/r"):
        super().__init__()
        self.base = base
        weight = base.weight
        # nn.Linear keeps W as (out, in), Conv1D keeps its transpose.
        out_features, in_features = weight.shape if isinstance(base, nn.Linear) else weight.T.shape
        place = {"device": weight.device, "dtype": at_least_float32(weight.dtype)}
        self.lora_A = nn.Parameter(torch.empty(r, in_features, **place))  # (r, in)
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, **place))  # (out, r)
        # The paper draws A from a Gaussian without naming its width. This is what nn.Linear does,
        # and what the authors' code and HF peft took over: uniform in +-1/sqrt(in).
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        # alpha/r: Hu et al. 2021, section 4.1; alpha/sqrt(r): Kalajdzievski 2023, theorem 3.2.
        self.scaling = alpha / (r if scaling == "alpha/r" else math.sqrt(r))
        self.dropout = dropout
        self.merged = False
        self.train(base.training)  # a model in eval mode stays in it

    def forward(self, x):
        h = self.base(x)  # (batch, seq, out)
        if self.merged:
            return h
        # On a half-precision base the low-rank path stays in float32 and only its sum is rounded.
        z = dropout(x, self.dropout, self.training) if self.dropout else x
        z = linear(z.to(self.lora_A.dtype), self.lora_A) * self.scaling  # (batch, seq, r)
        if z.dtype != h.dtype or z.dtype != self.lora_B.dtype:
            return (h + linear(z, self.lora_B)).to(h.dtype)
        # The same sum in one call, which spares a tensor as large as h.
        return torch.addmm(h.flatten(0, -2), z.flatten(0, -2), self.lora_B.T).view(h.shape)

    def on_paper(self, tape, x, out):
        """The same forward in the operations of minipeft.tape, for `memory.estimate`."""
        h = tape.apply(self.base, x, out, "")
        z = tape.cast(tape.dropout(x, self.dropout), self.lora_A.dtype.itemsize)
        z = tape.scale(tape.linear(z, self.lora_A, str(len(self.lora_A)), name="lora_A input"))
        return tape.cast(
            tape.add(h, tape.linear(z, self.lora_B, out, name="lora_B input")), h.width
        )

    @torch.no_grad()
    def shift_weight(self, sign):
        """Add (sign=1) or subtract (sign=-1) scaling * B A to the base weight, rounding once."""
        change = self.lora_B @ self.lora_A * (sign * self.scaling)  # (out, in)
        weight = self.base.weight
        change = change if isinstance(self.base, nn.Linear) else change.T
        weight.copy_(weight.to(change.dtype) + change)


def _layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def add_lora(model, r=8, alpha=16, dropout=0.0, targets=("q_proj", "v_proj"), scaling="alpha/r"):
    """Freeze `model` and put LoRA on every linear layer that `targets` names. Returns the model.

    r         rank of the change: r * (in + out) trainables for each layer.
    alpha     numerator of the scaling: alpha/r, or alpha/sqrt(r) with scaling="rslora".
    dropout   probability, while training, of dropping an input of the low-rank path.
    targets   last names of the layers, such as ("q_proj", "v_proj"); "query_key_value" for Bloom
              and GPT-NeoX, "c_attn" for GPT-2. A dotted ending picks fewer: "0.attn.c_attn".
    The trainables are float32, also on a half-precision base (float64 on a float64 one).
    Raises ValueError for a name that no linear layer has, a layer whose weight is tied to another
    module, a number out of range, and a model that has LoRA already.
    """
    targets = (targets,) if isinstance(targets, str) else tuple(targets)
    _check(model, r, alpha, dropout, scaling)
    found = _targets(model, targets)
    freeze(model)
    for name, layer in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALinear(layer, r, alpha, dropout, scaling))
    model.minipeft_technique = "lora"
    model.lora_config = {
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": scaling == "rslora",
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
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r={r} is no rank; give a whole number from 1 on.")
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} must be above 0: it multiplies what LoRA learns.")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} is no probability below 1.")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r} is none of {', '.join(map(repr, SCALINGS))}.")


def _targets(model, targets):
    found = modules_named(model, targets, (nn.Linear, Conv1D))
    owners = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    for name, layer in found:
        if owners.count(id(layer.weight)) > 1:
            raise ValueError(
                f"The weight of {name} is tied to another module, which merging would change too; "
                "leave it out of the targets."
            )
    return found


def merge_lora(model):
    """Fold every low-rank change into its base weight: no extra work at inference. Returns model.

    Exact up to one rounding of the weight, so lossy on a half-precision base. A merged model cannot
    be trained: its A and B no longer require grad until `unmerge_lora`.
    Raises ValueError if there is no LoRA, it is merged already, or the base is quantised.
    """
    return _shift(model, merge=True)


def unmerge_lora(model):
    """Subtract the changes again: the base is back up to rounding. Returns the model.

    Raises ValueError if there is no LoRA, or it is not merged.
    """
    return _shift(model, merge=False)


def _shift(model, merge):
    layers = _layers(model).values()
    if not layers:
        raise ValueError("This model has no LoRA; call add_lora or load_adapter first.")
    if any(layer.merged == merge for layer in layers):
        raise ValueError(f"LoRA is {'already merged' if merge else 'not merged'} on this model.")
    if any("weight" not in dict(layer.base.named_parameters()) for layer in layers):
        raise ValueError(
            "This base is quantised: the sum would have to be rounded to 4 bits again. Load the "
            "adapter on the unquantised base and merge there."
        )
    for layer in layers:
        layer.shift_weight(1 if merge else -1)
        layer.merged = merge
        layer.lora_A.requires_grad_(not merge)
        layer.lora_B.requires_grad_(not merge)
    return model


# ---- the folder format of HF peft (checkpoints.py) ---------------------------------------------

# Settings of peft's LoraConfig that change the arithmetic and that this module does not have.
FOREIGN = ("use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform",
           "layer_replication", "lora_bias", "exclude_modules", "trainable_token_indices",
           "target_parameters", "use_qalora")  # fmt: skip


def to_peft(model):
    """(adapter_config, {key: tensor}) as HF peft writes them."""
    layers = _layers(model)
    transposed = any(isinstance(layer.base, Conv1D) for layer in layers.values())
    config = {"bias": "none", "fan_in_fan_out": transposed, "task_type": "CAUSAL_LM"}
    state = {
        f"base_model.model.{name}.lora_{ab}.weight": getattr(layer, f"lora_{ab}")
        for name, layer in layers.items()
        for ab in "AB"
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
    r, alpha = config["r"], config["lora_alpha"]
    _check(model, r, alpha, config.get("lora_dropout", 0.0), scaling)
    expected = {}
    for name, layer in _targets(model, targets):
        rows, columns = layer.weight.shape if isinstance(layer, nn.Linear) else layer.weight.T.shape
        expected[f"base_model.model.{name}.lora_A.weight"] = (r, columns)
        expected[f"base_model.model.{name}.lora_B.weight"] = (rows, r)
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    if found != expected:
        key = sorted(set(found.items()) ^ set(expected.items()))[0][0]
        raise ValueError(
            f"The adapter does not fit this base model: {key} is {found.get(key, 'missing')} in "
            f"the adapter, and {expected.get(key, 'nowhere')} in the model."
        )
    add_lora(model, r, alpha, config.get("lora_dropout", 0.0), targets, scaling)
    with torch.no_grad():
        for name, layer in _layers(model).items():
            layer.lora_A.copy_(state[f"base_model.model.{name}.lora_A.weight"])
            layer.lora_B.copy_(state[f"base_model.model.{name}.lora_B.weight"])
    return model
