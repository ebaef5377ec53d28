"""Bottleneck adapters against blocks written out by hand, and against AdapterHub's library."""

import copy
import json
import math
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from soft import METHODS, NAMES, batch_of, close, trainables
from torch import nn
from torch.nn.functional import cross_entropy, gelu, layer_norm, relu, silu
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainingArguments,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minipeft import (
    Collator,
    add_adapters,
    add_lora,
    count_parameters,
    encode,
    load_adapter,
    load_base,
    save_adapter,
    train,
)
from minipeft.adapters import Adapter
from minipeft.memory.estimate import estimate
from minipeft.memory.measure import measure
from minipeft.quantization import quantize_base

HUB = Path(__file__).parent / "fixtures" / "adapterhub"
ACTIVATIONS = {"gelu": gelu, "relu": relu, "silu": silu}
EVERY = pytest.mark.parametrize("name", NAMES)
PLACED = pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
WHERE = {  # within a block: after attention, after the feed-forward part
    "tiny-llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "tiny-qwen2": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "tiny-gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "tiny-bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "tiny-gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
}


def adapters_of(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, Adapter)}


def shake(model, seed=1):
    """Trainables as if they had been trained: nothing is near zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainables(model).values():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise.to(parameter.dtype), alpha=0.3)
    return model


def tuned(name, dtype=torch.float64, m=5, seed=1, **options):
    model, _ = load_base(name, device="cpu", dtype=dtype)
    torch.manual_seed(seed)
    return shake(add_adapters(model, m, **options), seed)


# ---- the arithmetic -----------------------------------------------------------------------------


@EVERY
@PLACED
def test_the_untrained_model_is_the_base_to_the_bit(name, placement):
    base, _ = load_base(name, device="cpu")
    batch = batch_of(0, 2, 6)
    expected = base(**batch).logits
    model = add_adapters(base, 4, placement)
    assert model is base and model.minipeft.technique == "adapters"
    out = model(**batch)
    assert torch.equal(out.logits, expected)
    out.loss.backward()
    for adapter in adapters_of(model).values():
        assert not adapter.down.weight.grad.any(), "a product with up, which is zero"
        assert adapter.up.weight.grad.any() and adapter.up.bias.grad.any()
    frozen = [p for p in model.parameters() if not p.requires_grad]
    assert frozen and all(p.grad is None for p in frozen)


@EVERY
@PLACED
def test_they_stand_after_the_output_projections_of_every_block(name, placement):
    model, _ = load_base(name, device="cpu")
    before = dict(model.named_modules())
    add_adapters(model, 4, placement)
    blocks, attention, feed_forward = WHERE[name]
    parts = [attention, feed_forward] if placement == "houlsby" else [feed_forward]
    expected = [f"{blocks}.{i}.{part}" for i in range(2) for part in parts]
    found = adapters_of(model)
    assert list(found) == expected
    for key, adapter in found.items():
        assert adapter.base is before[key], "the projection itself was left as it was"


@EVERY
@given(hidden=st.sampled_from([8, 24, 40]), m=st.integers(1, 70), layers=st.integers(1, 3))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_counted_by_formula(name, hidden, m, layers):
    config = copy.deepcopy(load_base(name, device="cpu")[0].config)
    config.hidden_size, config.num_hidden_layers = hidden, layers
    config.head_dim = hidden // 4
    config.layer_types = ["full_attention"] * layers
    for placement, count in (("houlsby", 2), ("pfeiffer", 1)):
        model = AutoModelForCausalLM.from_config(config)
        before = count_parameters(model)[1]
        add_adapters(model, m, placement)
        expected = count * layers * (2 * hidden * m + hidden + m)
        assert count_parameters(model) == (expected, before + expected)


def test_the_start_is_that_of_the_paper_but_for_up():
    torch.manual_seed(0)
    model = add_adapters(load_base("tiny-llama", device="cpu")[0], 300)
    for adapter in adapters_of(model).values():
        weight = adapter.down.weight
        assert weight.shape == (300, 32)
        # a normal distribution of deviation 0.01, cut at two: 0.01 * sqrt(1 - 4 phi(2) / erf(...))
        phi, mass = math.exp(-2) / math.sqrt(2 * math.pi), math.erf(math.sqrt(2))
        expected = 0.01 * math.sqrt(1 - 2 * 2 * phi / mass)
        assert weight.abs().max() <= 0.02
        assert weight.std().item() == pytest.approx(expected, rel=0.03)  # 4 standard errors
        assert abs(weight.mean().item()) < 4e-4
        inner = (weight.abs() < 0.01).float().mean().item()
        assert inner == pytest.approx(math.erf(math.sqrt(0.5)) / mass, abs=0.02)
        for zero in (adapter.down.bias, adapter.up.weight, adapter.up.bias):
            assert not zero.any()


def bottleneck(h, adapter, activation):
    """The formula of the module's docstring, in plain products."""
    p = {key: tensor.detach() for key, tensor in adapter.named_parameters() if "base" not in key}
    z = activation(h @ p["down.weight"].T + p["down.bias"])  # (batch, seq, m)
    return h + z @ p["up.weight"].T + p["up.bias"]


def attend(q, k, v):
    """Causal attention of (batch, heads, seq, d), as (batch, seq, heads * d)."""
    seq = q.shape[2]
    scores = q @ k.mT / q.shape[-1] ** 0.5
    seen = torch.ones(seq, seq).tril().bool()
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def llama_by_hand(model, ids, after):
    """The norms are called, since transformers computes them in float32; the rest is written."""
    core = model.model
    x = core.embed_tokens.weight[ids]  # (batch, seq, hidden)
    positions = torch.arange(ids.shape[1])[None]
    cos_sin = core.rotary_emb(x, positions)
    split = lambda x: x.unflatten(-1, (-1, 8)).transpose(1, 2)  # noqa: E731
    for i, layer in enumerate(core.layers):
        y = layer.input_layernorm(x)
        q, k, v = (split(y @ getattr(layer.self_attn, f"{n}_proj").weight.T) for n in "qkv")
        q, k = apply_rotary_pos_emb(q, k, *cos_sin)
        y = attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
        x = x + after(f"model.layers.{i}.self_attn.o_proj", y)
        y = layer.post_attention_layernorm(x)
        y = silu(y @ layer.mlp.gate_proj.weight.T) * (y @ layer.mlp.up_proj.weight.T)
        x = x + after(f"model.layers.{i}.mlp.down_proj", y)
    return core.norm(x) @ model.lm_head.weight.T


def gpt2_by_hand(model, ids, after):
    core = model.transformer
    x = core.wte.weight[ids] + core.wpe.weight[: ids.shape[1]]
    norm = lambda x, n: layer_norm(x, (32,), n.weight, n.bias, n.eps)  # noqa: E731
    for i, layer in enumerate(core.h):
        y = norm(x, layer.ln_1) @ layer.attn.c_attn.weight + layer.attn.c_attn.bias
        y = attend(*(t.unflatten(-1, (4, 8)).transpose(1, 2) for t in y.split(32, -1)))
        x = x + after(f"transformer.h.{i}.attn.c_proj", y)
        y = norm(x, layer.ln_2) @ layer.mlp.c_fc.weight + layer.mlp.c_fc.bias
        x = x + after(f"transformer.h.{i}.mlp.c_proj", gelu(y, approximate="tanh"))
    return norm(x, core.ln_f) @ model.lm_head.weight.T


@pytest.mark.parametrize("by_hand", [llama_by_hand, gpt2_by_hand], ids=["llama", "gpt2"])
@given(data=st.data())
@settings(max_examples=6, deadline=None, derandomize=True)
def test_logits_and_gradients_are_those_of_blocks_written_by_hand(by_hand, data):
    name = "tiny-llama" if by_hand is llama_by_hand else "tiny-gpt2"
    activation = data.draw(st.sampled_from(sorted(ACTIVATIONS)))
    options = {
        "m": data.draw(st.integers(1, 40)),
        "placement": data.draw(st.sampled_from(["houlsby", "pfeiffer"])),
        "activation": activation,
    }
    model = tuned(name, **options)
    state = dict(model.named_parameters())
    ids = batch_of(data.draw(st.integers(0, 99)), 2, 9)["input_ids"]

    def after(place, y):
        base = f"{place}.base" if f"{place}.base.weight" in state else place
        weight = state[f"{base}.weight"]  # (out, in), Conv1D (in, out)
        h = y @ (weight if name == "tiny-gpt2" else weight.T)
        h = h + state[f"{base}.bias"] if f"{base}.bias" in state else h
        if base == place:
            return h
        down = h @ state[f"{place}.down.weight"].T + state[f"{place}.down.bias"]
        up = ACTIVATIONS[activation](down) @ state[f"{place}.up.weight"].T
        return h + up + state[f"{place}.up.bias"]

    expected = by_hand(model, ids, after)
    found = model(ids).logits
    assert torch.allclose(found, expected, rtol=1e-10, atol=1e-10)
    direction = torch.randn_like(expected)
    names, parameters = zip(*trainables(model).items(), strict=True)
    ours = torch.autograd.grad((found * direction).sum(), parameters)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    for key, a, b in zip(names, ours, theirs, strict=True):
        assert b.any() or activation == "relu", "one number may well be below zero"
        assert close(a, b, 1e-10), key


def hub_model(name, case, report):
    """(our model with the weights of the fixture, its tensors) in float64."""
    tensors = load_file(HUB / f"{name}.safetensors")
    config = AutoConfig.for_model(name, **report["models"][name]["config"])
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double().eval()
    named = dict(model.named_parameters())
    base = {key.removeprefix("base."): t for key, t in tensors.items() if key.startswith("base.")}
    if name == "gpt_neox":  # transformers 5 has given its head the name that the others have
        base["lm_head.weight"] = base.pop("embed_out.weight")
    assert base.keys() == named.keys(), "both versions of transformers name the weights alike"
    with torch.no_grad():
        for key, weight in base.items():
            named[key].copy_(weight)
        ours = report["models"][name]["cases"][case]["minipeft"]
        options = ours or {"placement": "pfeiffer", "activation": "relu"}
        add_adapters(model, report["bottleneck"], **options)
        found = trainables(model)
        weights = {
            key.removeprefix(f"{case}.weight."): t
            for key, t in tensors.items()
            if key.startswith(f"{case}.weight.")
        }
        assert weights.keys() == found.keys(), "both libraries add the same matrices"
        for key, weight in weights.items():
            found[key].copy_(weight)
    return model, tensors


def hub_step(model, tensors):
    """Logits, and the gradients of the mean cross-entropy."""
    ids, mask = tensors["input_ids"], tensors["attention_mask"]
    logits = model(ids, attention_mask=mask).logits
    targets = torch.where(mask[:, 1:].bool(), ids[:, 1:], -100)
    cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
    return logits.detach()


REPORT = json.loads((HUB / "cases.json").read_text(encoding="utf-8"))
EQUAL = [
    (name, case)
    for name, model in REPORT["models"].items()
    for case, details in model["cases"].items()
    if details["minipeft"]
]


@pytest.mark.parametrize("name, case", EQUAL)
def test_logits_and_gradients_are_those_of_adapterhub(name, case):
    model, tensors = hub_model(name, case, REPORT)
    logits = hub_step(model, tensors)
    assert close(logits.float(), tensors[f"{case}.logits"], 1e-6)
    for key, parameter in trainables(model).items():
        expected = tensors[f"{case}.grad.{key}"]
        assert expected.any() and close(parameter.grad.float(), expected, 1e-6), key


def test_adapterhub_has_every_architecture_in_both_placements():
    assert {name for name, _ in EQUAL} == {name.removeprefix("tiny-") for name in NAMES}
    assert len(EQUAL) == 2 * len(NAMES)
    for details in (REPORT["models"][name]["cases"] for name, _ in EQUAL):
        assert details["double_seq_bn"]["changes"] == {}, "Houlsby's placement as it comes"
        assert details["seq_bn_changed"]["changes"] == {"original_ln_before": False}


def test_adapterhubs_pfeiffer_reads_the_residual_sum():
    """seq_bn as it comes: y = h + up(relu(down(h + residual))), not down(h)."""
    model, tensors = hub_model("llama", "seq_bn", REPORT)
    assert not close(hub_step(model, tensors).float(), tensors["seq_bn.logits"], 1e-2)
    model.zero_grad()
    residual = {}

    def forward(adapter, x):
        h = adapter.base(x)
        return h + adapter.up(relu(adapter.down(h + residual["x"])))

    for layer in model.model.layers:
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda module, args: residual.update(x=args[0])
        )
        layer.mlp.down_proj.forward = partial(forward, layer.mlp.down_proj)
    assert close(hub_step(model, tensors).float(), tensors["seq_bn.logits"], 1e-6)
    for key, parameter in trainables(model).items():
        assert close(parameter.grad.float(), tensors[f"seq_bn.grad.{key}"], 1e-6), key


def test_dropout_of_the_model_comes_after_the_adapter():
    """What GPT-2 drops is what the adapter gave, its correction included."""
    model = tuned("tiny-gpt2")
    block = model.transformer.h[0]
    block.mlp.dropout.p = 0.5
    seen = {}
    block.mlp.c_proj.register_forward_hook(lambda m, args, out: seen.update(adapter=out))
    block.mlp.dropout.register_forward_hook(lambda m, args, out: seen.update(read=args[0], out=out))
    model.train()(torch.arange(20, 30)[None])
    assert seen["read"] is seen["adapter"]
    kept = seen["out"] != 0
    assert 0.2 < kept.double().mean() < 0.8
    assert torch.allclose(seen["out"][kept], 2 * seen["adapter"][kept])


# ---- padding, generation, checkpointing, precision, memory ---------------------------------------


@EVERY
@given(
    seed=st.integers(0, 99),
    side=st.sampled_from(["left", "right"]),
    placement=st.sampled_from(["houlsby", "pfeiffer"]),
)
@settings(max_examples=5, deadline=None, derandomize=True)
@example(seed=3, side="left", placement="houlsby")
def test_a_padded_batch_gives_what_each_row_gives_alone(name, seed, side, placement):
    # float32 for Bloom: in float64 transformers' own gives NaN when it is padded on the left
    dtype = torch.float32 if name == "tiny-bloom" else torch.float64
    model = tuned(name, dtype, placement=placement)
    batch = batch_of(seed, 3, 7, side)
    mask = batch["attention_mask"].bool()
    options = {} if name == "tiny-bloom" else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], **options).logits
    for i in range(3):
        alone = model(batch["input_ids"][i][mask[i]][None]).logits[0]
        assert close(logits[i][mask[i]], alone, 1e-5 if dtype == torch.float32 else 1e-10)


@EVERY
@PLACED
def test_generation_with_a_cache_is_generation_without(name, placement):
    base, _ = load_base(name, device="cpu")
    with torch.no_grad():  # weights of deviation 0.02 would hardly tell one text from another
        for parameter in base.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model = shake(add_adapters(copy.deepcopy(base), 5, placement))
    batch = {k: v for k, v in batch_of(5, 3, 6, "left").items() if k != "labels"}
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with_cache = model.generate(**batch, **options)
    assert torch.equal(with_cache, model.generate(**batch, **options, use_cache=False))
    assert not torch.equal(with_cache, base.generate(**batch, **options))
    row, length = batch["input_ids"][:1, -int(batch["attention_mask"][0].sum()) :], 0
    for _ in range(6):  # by hand, one row, the likeliest token
        row = torch.cat([row, model(row).logits[:, -1:].argmax(-1)], 1)
        length += 1
    assert torch.equal(with_cache[0, -length:], row[0, -length:])
    beams = model.generate(**batch, **options, num_beams=3)
    assert torch.equal(beams, model.generate(**batch, **options, num_beams=3, use_cache=False))


@EVERY
@PLACED
def test_gradient_checkpointing_gives_the_same_gradients(name, placement):
    found, calls = [], []
    for checkpointing in (False, True):
        model = tuned(name, placement=placement)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        first = next(iter(adapters_of(model).values()))
        runs = []
        first.register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        model(**batch_of(6, 2, 6), use_cache=False).loss.backward()
        found.append([p.grad for p in trainables(model).values()])
        calls.append(len(runs))
    assert calls == [1, 2], "the block was computed anew"
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*found, strict=True))
    assert all(grad.any() for grad in found[0])


@EVERY
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_float32_adapters_one_rounding(name, dtype):
    model = tuned(name, dtype)
    for adapter in adapters_of(model).values():
        assert {p.dtype for p in (*adapter.down.parameters(), *adapter.up.parameters())} == {
            torch.float32
        }
        assert adapter.base.weight.dtype == dtype
        x = torch.randn(2, 3, adapter.base.weight.numel() // 32).to(dtype)
        h = adapter.base(x)
        exact = bottleneck(h.double(), copy.deepcopy(adapter).double(), gelu)
        got = adapter(x)
        assert got.dtype == dtype
        spacing = torch.finfo(dtype).eps * exact.abs()
        assert ((got.double() - exact).abs() <= 0.51 * spacing + 1e-6).all()
    out = model(**batch_of(3, 2, 6))
    assert out.logits.dtype == dtype and out.logits.isfinite().all()
    out.loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.any() for p in trainables(model).values())


@EVERY
def test_on_four_bit_weights(name, tmp_path):
    model = quantize_base(load_base(name, device="cpu")[0])
    fresh = copy.deepcopy(model)
    ids = torch.randint(5, 200, (2, 12))
    expected = model(ids).logits
    add_adapters(model, 4)
    assert torch.equal(model(ids).logits, expected)
    shake(model)
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.any() for p in trainables(model).values())
    load_adapter(fresh, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(fresh(ids).logits, model(ids).logits)
    assert not close(expected, model(ids).logits, 0.01)


@EVERY
@PLACED
def test_memory_is_measured_alike_on_fake_and_on_real_tensors(name, placement):
    config, options = load_base(name, device="cpu")[0].config, {"batch": 2, "seq": 32}
    method = partial(add_adapters, bottleneck=4, placement=placement)
    fake = measure(config, method, **options)
    real = measure(load_base(name, device="cpu")[0], method, **options)
    assert (fake.total, fake.parts) == (real.total, real.parts)
    count = (2 if placement == "houlsby" else 1) * 2 * (2 * 32 * 4 + 32 + 4)
    assert fake.parts["gradients"] == 4 * count and fake.parts["optimizer"] >= 8 * count


@pytest.mark.parametrize(
    "config, options",
    [
        (LlamaConfig(num_hidden_layers=2), {}),
        (LlamaConfig(num_hidden_layers=2), {"precision": "bfloat16"}),
        (GPT2Config(n_layer=2), {"dtype": torch.bfloat16}),
        (GPT2Config(n_layer=2), {"checkpointing": True}),
        (BloomConfig(n_layer=2, hidden_size=256), {"attention": "eager"}),
    ],
)
@PLACED
def test_memory_is_predicted(config, options, placement):
    for activation in ("gelu", "silu"):
        method = partial(add_adapters, placement=placement, activation=activation)
        options = {"batch": 2, "seq": 128} | options
        predicted, measured = (f(config, method, **options) for f in (estimate, measure))
        assert predicted.total == pytest.approx(measured.total, rel=0.005)
        for part in ("gradients", "activations"):
            assert predicted.parts[part] == pytest.approx(measured.parts[part], rel=0.005)
    with pytest.raises(ValueError, match="no formula for the activation 'relu'"):
        estimate(config, lambda model: add_adapters(model, 4, placement, "relu"), **options)


def test_one_formula_by_hand_for_a_llama_block():
    """An adapter keeps what down and up read and what gelu read: hidden + 2 m numbers a token."""
    config, b, s, m = LlamaConfig(num_hidden_layers=3, hidden_size=512), 2, 96, 24
    config.num_attention_heads = config.num_key_value_heads = 8
    kept = {}
    for placement in ("houlsby", "pfeiffer"):
        method = partial(add_adapters, bottleneck=m, placement=placement)
        kept[placement] = sum(size for *_, size in estimate(config, method, batch=b, seq=s).kept)
    assert kept["houlsby"] - kept["pfeiffer"] == 4 * b * s * (512 + 2 * m)


# ---- one on another, with other methods, in files -----------------------------------------------


@EVERY
def test_a_second_one_stands_on_the_first(name):
    model = tuned(name, m=5, placement="houlsby")
    batch = batch_of(2, 2, 6)
    first = {key: p.clone() for key, p in trainables(model).items()}
    expected = model(**batch).logits
    add_adapters(model, 3, "pfeiffer", "silu")
    assert torch.equal(model(**batch).logits, expected), "the new one starts at nothing"
    assert count_parameters(model)[0] == 2 * (2 * 32 * 3 + 32 + 3)
    shake(model, 2)
    model(**batch).loss.backward()
    assert all(p.grad.any() for p in trainables(model).values())
    frozen = {key: p for key, p in model.named_parameters() if not p.requires_grad}
    kept = [p for p in frozen.values() if any(torch.equal(p, old) for old in first.values())]
    assert len(kept) == len(first) and all(p.grad is None for p in frozen.values())
    blocks, attention, feed_forward = WHERE[name]
    outer = model.get_submodule(f"{blocks}.1.{feed_forward}")
    assert isinstance(outer.base, Adapter) and not isinstance(outer.base.base, Adapter)
    assert not isinstance(model.get_submodule(f"{blocks}.1.{attention}").base, Adapter)
    x = torch.randn(2, 3, outer.base.base.weight.numel() // 32, dtype=torch.float64)
    h = bottleneck(outer.base.base(x), outer.base, gelu)
    assert close(outer(x), bottleneck(h, outer, silu), 1e-12)


@EVERY
@PLACED
def test_saving_and_loading_gives_the_same_logits(name, placement, tmp_path):
    model = tuned(name, placement=placement, activation="relu")
    folder = save_adapter(model, tmp_path / "adapter")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["peft_type"] == "MINIPEFT_ADAPTERS" and config["stands_on"] == 0
    fresh = load_adapter(load_base(name, device="cpu", dtype=torch.float64)[0], folder)
    batch = batch_of(1, 2, 6)
    assert torch.equal(fresh(**batch).logits, model(**batch).logits)
    assert trainables(fresh).keys() == trainables(model).keys()
    stored = load_file(folder / "adapter_model.safetensors")
    assert stored.keys() == trainables(model).keys(), "nothing of the base is in the file"


def test_a_stack_is_saved_in_one_folder_each_and_a_lower_one_can_be_exchanged(tmp_path):
    model, ids = tuned("tiny-llama"), torch.arange(20, 28)[None]
    save_adapter(model, tmp_path / "first")
    shake(add_adapters(model, 3, "pfeiffer"), 2)
    save_adapter(model, tmp_path / "task")
    save_adapter(tuned("tiny-llama", seed=7, m=9), tmp_path / "other")
    fresh = lambda: load_base("tiny-llama", device="cpu", dtype=torch.float64)[0]  # noqa: E731
    again = load_adapter(load_adapter(fresh(), tmp_path / "first"), tmp_path / "task")
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert trainables(again).keys() == trainables(model).keys()
    exchanged = load_adapter(load_adapter(fresh(), tmp_path / "other"), tmp_path / "task")
    assert not close(exchanged(ids).logits, model(ids).logits, 1e-3)
    with pytest.raises(
        ValueError, match="on top of 1 other set.s. of adapters, and this model has 0"
    ):
        load_adapter(fresh(), tmp_path / "task")
    with pytest.raises(
        ValueError, match="on top of 0 other set.s. of adapters, and this model has 1"
    ):
        load_adapter(tuned("tiny-llama"), tmp_path / "other")


def spoil(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("tiny-llama", {"bottleneck": 4}, r"does not fit this base model: .*down.* is \(5,"),
        ("tiny-llama", {"placement": "pfeiffer"}, "o_proj.* and nowhere in the model"),
        ("tiny-llama", {"bottleneck": None}, "bottleneck=None is not a width"),
        ("tiny-llama", {"activation": "tanh"}, "activation='tanh' is none of"),
        ("tiny-llama", {"placement": []}, r"placement=\[\] is none of"),
        ("tiny-gpt2", {}, "does not fit this base model: model.layers.* nowhere in the model"),
    ],
)
def test_a_folder_that_does_not_fit_is_refused_and_the_model_left_alone(
    name, changes, message, tmp_path
):
    folder = save_adapter(tuned("tiny-llama"), tmp_path / "adapter")
    spoil(folder, **changes)
    model, _ = load_base(name, device="cpu")
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert model.state_dict().keys() == before and not hasattr(model, "minipeft")
    assert all(p.requires_grad for p in model.parameters())


def test_hf_peft_refuses_the_folder_by_name(tmp_path):
    folder = save_adapter(tuned("tiny-llama", torch.float32), tmp_path / "adapter")
    base, _ = load_base("tiny-llama", device="cpu")
    with pytest.raises((ValueError, KeyError), match="MINIPEFT_ADAPTERS"):
        peft.PeftModel.from_pretrained(base, str(folder))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"bottleneck": 0}, "bottleneck=0 is not a width"),
        ({"bottleneck": 2.0}, "bottleneck=2.0 is not a width"),
        ({"bottleneck": True}, "bottleneck=True is not a width"),
        ({"placement": "Houlsby"}, "placement='Houlsby' is none of 'houlsby', 'pfeiffer'"),
        ({"activation": "swish"}, "activation='swish' is none of 'gelu', 'relu', 'silu'"),
    ],
)
def test_bad_input_is_refused_and_the_model_left_alone(options, message):
    model, _ = load_base("tiny-llama", device="cpu")
    with pytest.raises(ValueError, match=message):
        add_adapters(model, **options)
    assert not adapters_of(model) and all(p.requires_grad for p in model.parameters())


def test_an_architecture_without_the_projections_is_refused_by_name():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
    experts = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=2, num_key_value_heads=2))
    twice = AutoModelForCausalLM.from_config(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=100, add_cross_attention=True)
    )
    for model, message in (
        (experts, "A block of MixtralForCausalLM should have one .* feed-forward .* has 0"),
        (twice, "A block of GPT2LMHeadModel should have one .* attention part.* has 2"),
    ):
        with pytest.raises(ValueError, match=message):
            add_adapters(model, 4)
        assert not adapters_of(model) and all(p.requires_grad for p in model.parameters())


def test_on_bert_the_papers_own_model_they_stand_before_each_residual_sum():
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4, "vocab_size": 100}  # fmt: skip
    model = shake(add_adapters(BertForMaskedLM(BertConfig(**sizes)).eval(), 4))
    places = ("attention.output.dense", "output.dense")
    assert list(adapters_of(model)) == [
        f"bert.encoder.layer.{i}.{place}" for i in range(2) for place in places
    ]
    part, seen = model.bert.encoder.layer[0].output, {}
    part.register_forward_hook(lambda m, args, out: seen.update(args=args, out=out))
    model(torch.arange(20, 28)[None])
    h, x = seen["args"]  # (batch, seq, intermediate), (batch, seq, hidden)
    expected = part.LayerNorm(bottleneck(part.dense.base(h), part.dense, gelu) + x)
    assert close(seen["out"], expected, 1e-5)


def test_other_techniques_and_adapters_refuse_each_other():
    with pytest.raises(ValueError, match="has lora already; take it off with remove"):
        add_adapters(add_lora(load_base("tiny", device="cpu")[0]))
    with pytest.raises(ValueError, match="has prefix_tuning already"):
        add_adapters(METHODS["prefix"](load_base("tiny", device="cpu")[0]))
    for add in (add_lora, METHODS["prompt"]):
        with pytest.raises(ValueError, match="has adapters already; take it off"):
            add(tuned("tiny-llama"))
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    theirs = peft.get_peft_model(load_base("tiny", device="cpu")[0], config)
    with pytest.raises(ValueError, match="has an adapter of HF peft already"):
        add_adapters(theirs)


def test_loading_on_another_technique_is_refused(tmp_path):
    folder = save_adapter(tuned("tiny-llama"), tmp_path / "adapter")
    model = add_lora(load_base("tiny-llama", device="cpu")[0])
    with pytest.raises(ValueError, match="has lora already"):
        load_adapter(model, folder)


@EVERY
def test_a_tuned_model_cannot_be_saved_as_a_plain_one(name, tmp_path):
    model = tuned(name)
    folder = save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(load_base(name, device="cpu", dtype=torch.float64)[0], folder)
    for one in (model, loaded, copy.deepcopy(model), add_adapters(copy.deepcopy(model), 2)):
        with pytest.raises(ValueError, match="call save_adapter"):
            one.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


@EVERY
def test_the_vocabulary_is_resized_beside_adapters(name):
    model, ids = tuned(name), torch.arange(20, 28)[None]
    before = model(ids).logits
    model.resize_token_embeddings(before.shape[-1] + 7, mean_resizing=False)
    model.tie_weights()
    assert close(model(ids).logits[..., : before.shape[-1]], before, 1e-12)


def exact_bloom():
    """Bloom as it is set up to be exact: it reads these weights itself, and calls no layer."""
    config = BloomConfig(vocab_size=90, hidden_size=32, n_layer=2, n_head=4, pretraining_tp=2,
                         slow_but_exact=True)  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_model_that_does_not_call_the_layer_is_refused_by_name():
    model = exact_bloom()
    before = model(torch.arange(20, 28)[None]).logits
    names = [name for name, _ in model.named_modules()]
    for placement in ("houlsby", "pfeiffer"):
        with pytest.raises(ValueError, match=r"BloomForCausalLM does not call transformer.h.0"):
            add_adapters(model, 4, placement)
        assert [name for name, _ in model.named_modules()] == names
        assert all(p.requires_grad for p in model.parameters())
        assert not hasattr(model, "adapter_configs")
        assert torch.equal(model(torch.arange(20, 28)[None]).logits, before)


def test_what_a_model_asks_of_the_layer_that_stood_there():
    model = tuned("tiny-llama", m=3)
    outer = add_adapters(model, 2, "pfeiffer").model.layers[0].mlp.down_proj
    linear = outer.base.base
    assert outer.weight is linear.weight and outer.bias is linear.bias is None
    assert (outer.in_features, outer.out_features) == (linear.in_features, linear.out_features)


def test_the_width_is_that_of_the_layer_not_of_the_configuration(tmp_path):
    model, _ = load_base("tiny-llama", device="cpu")
    model.config.hidden_size = 12345
    shake(add_adapters(model, 3))
    ids = torch.arange(20, 28)[None]
    fresh, _ = load_base("tiny-llama", device="cpu")
    fresh.config.hidden_size = 12345
    again = load_adapter(fresh, save_adapter(model, tmp_path / "adapter"))
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_trial_leaves_no_trace():
    model, _ = load_base("tiny-llama", device="cpu")
    model.model.layers[0].train()
    names = [n for n, _ in model.named_modules()]
    modes = [m.training for m in model.modules()]
    model.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    runs = []
    torch.manual_seed(3)
    add_adapters(model, 4)
    after = torch.rand(4)
    assert runs == [False, False], "one forward before, one after"
    assert [m.training for n, m in model.named_modules() if n in names] == modes
    assert not any(a._forward_hooks for a in adapters_of(model).values())
    torch.manual_seed(3)
    for adapter in adapters_of(model).values():  # the same draws as without a trial
        place = {"device": "cpu", "dtype": torch.float32}
        made = Adapter(adapter.base, 32, 4, "gelu", place)
        assert torch.equal(made.down.weight, adapter.down.weight)
    assert torch.equal(torch.rand(4), after)


def test_trainer_train_and_the_usual_methods(tmp_path):
    model, tokenizer = load_base("tiny-llama", device="cpu")
    shake(add_adapters(model, 4))
    twin = copy.deepcopy(model)
    rows = [encode(tokenizer, "Was it good?", answer) for answer in (" Yes", " No")]
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, Collator(tokenizer.pad_token_id), rows).train()
    moved, kept = trainables(model), trainables(twin)
    assert all(not torch.equal(moved[key], kept[key]) for key in moved)
    still = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(still, frozen, strict=True))
    twin.load_state_dict(model.state_dict())
    batch = batch_of(7, 2, 5)
    assert torch.equal(twin.eval()(**batch).logits, model.eval()(**batch).logits)
    assert model.to(torch.float64)(**batch).logits.dtype == torch.float64
    losses = train(twin, [batch], max_steps=20, lr=1e-2, progress=False).train_loss
    assert losses[-1] < losses[0] - 0.1


def test_nothing_of_a_deep_copy_is_shared():
    model = tuned("tiny-llama")
    twin = copy.deepcopy(model)
    nn.init.zeros_(next(iter(trainables(twin).values())))
    add_adapters(twin, 2)
    assert all(p.any() for p in trainables(model).values())
    assert len(model.adapter_configs) == 1 and len(twin.adapter_configs) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda():
    model = tuned("tiny-llama", torch.float32)
    batch = batch_of(8, 2, 6)
    expected = model(**batch).logits
    found = model.to("cuda")(**{k: v.to("cuda") for k, v in batch.items()}).logits.cpu()
    assert close(found, expected, 1e-4)
