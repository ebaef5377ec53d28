"""NF4 and 8-bit moments against the values of the papers, and against exact arithmetic."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import linear

from minipeft import add_lora, load_adapter, load_base, merge_lora, save_adapter
from minipeft.memory import saved_bytes
from minipeft.quantization import (
    AdamW8bit,
    NF4Linear,
    dequantize,
    dynamic_code,
    nf4_code,
    quantize,
    quantize_base,
)

# QLoRA, appendix E, as printed there.
PAPER = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
]  # fmt: skip
TARGETS = {
    "tiny-llama": ("q_proj", "v_proj"), "tiny-qwen2": ("q_proj", "v_proj"),
    "tiny-gpt2": "c_attn", "tiny-bloom": "query_key_value", "tiny-gpt_neox": "query_key_value",
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", TARGETS)


def test_the_derived_nf4_code_is_the_one_the_paper_prints():
    torch.testing.assert_close(nf4_code(), torch.tensor(PAPER), atol=1e-6, rtol=0)
    assert nf4_code()[7] == 0


def test_the_dynamic_codes_have_seven_decades_and_both_ends():
    for signed in (True, False):
        code = dynamic_code(signed)
        assert len(code) == len(code.unique()) == 256
        assert code[-1] == 1 and 0 in code and bool((code.diff() > 0).all())
    signed, unsigned = dynamic_code(True), dynamic_code(False)
    assert signed[0] == pytest.approx(-0.9929688)  # the middle of the last of 64 steps to 1
    assert unsigned[0] == 0 and unsigned[1] == pytest.approx(0.325e-6)
    # Relative steps are fine in the top decade and coarse below: 64 and 128 steps of 0.9.
    assert signed[-2] - signed[-3] == pytest.approx(0.9 / 64, rel=1e-3)
    assert unsigned[-2] - unsigned[-3] == pytest.approx(0.9 / 128, rel=1e-3)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.sampled_from([2, 16, 64]), st.integers(0, 99))
def test_every_element_becomes_its_nearest_code(count, block_size, seed):
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    x[0] = 0
    code = nf4_code()
    codes, absmax = quantize(x, code, block_size)
    back = dequantize(codes, absmax, code, count)
    for i in range(count):
        block = x[i // block_size * block_size :][:block_size]
        nearest = (code * block.abs().max() - x[i]).abs().min()
        assert (back[i] - x[i]).abs().item() == pytest.approx(nearest.item(), abs=1e-6)
    assert back[0] == 0, "an exact zero stays one"
    assert quantize(torch.zeros(5), code, 4)[1].tolist() == [0, 0]


def test_an_outlier_spoils_its_own_block_only():
    x = torch.randn(128, generator=torch.Generator().manual_seed(0))
    spoilt = x.clone()
    spoilt[3] = 1000
    error = lambda y: (dequantize(*quantize(y, nf4_code(), 64), nf4_code(), 128) - y).abs()  # noqa: E731
    assert torch.equal(error(spoilt)[64:], error(x)[64:])
    assert error(spoilt)[:64].mean() > 4 * error(x)[:64].mean()


@settings(max_examples=15, deadline=None, derandomize=True)
@given(st.integers(1, 70), st.integers(1, 70), st.booleans(), st.booleans())
def test_forward_and_gradient_are_those_of_the_dequantised_weight(rows, columns, double, bias):
    torch.manual_seed(rows * 100 + columns)
    weight = torch.randn(rows, columns, dtype=torch.float64)
    bias = torch.randn(rows, dtype=torch.float64) if bias else None
    layer = NF4Linear(weight, bias, double=double)
    assert layer.weight.shape == weight.shape
    x = torch.randn(2, 3, columns, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, linear(x, layer.weight, bias))
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(linear(x, layer.weight, bias).square().sum(), x)
    torch.testing.assert_close(grad, expected)
    assert torch.autograd.gradcheck(layer, x)


def test_bits_per_weight_are_those_of_the_paper():
    weight = torch.randn(512, 512)
    count = weight.numel()
    bits = lambda layer: 8 * sum(b.nbytes for b in layer.buffers()) / count  # noqa: E731
    assert bits(NF4Linear(weight, double=False)) == 4 + 32 / 64
    double = 4 + 8 / 64 + 32 / (64 * 256)
    assert bits(NF4Linear(weight)) == pytest.approx(double, abs=40 / count)  # and one mean
    assert double == pytest.approx(4.127, abs=1e-3)
    error = [(NF4Linear(weight, double=d).weight - weight).std() for d in (False, True)]
    assert error[0] < error[1] < 1.02 * error[0], "double quantisation costs almost nothing"


def test_nothing_but_the_codes_is_kept_for_the_backward_pass():
    x = torch.randn(4, 64, requires_grad=True)
    layer = NF4Linear(torch.randn(96, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert kept == [] and x.grad.shape == x.shape


@EVERY
def test_a_quantised_base_takes_lora_saves_it_and_refuses_to_merge(name, tmp_path):
    model, _ = load_base(name, device="cpu")
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    plain = model(ids).logits
    embedding = copy.deepcopy(model.get_input_embeddings().weight)
    quantize_base(model)
    assert torch.equal(model.get_input_embeddings().weight, embedding)
    assert not isinstance(model.get_output_embeddings(), NF4Linear)
    assert not any(p.requires_grad for p in model.parameters())
    small = model(ids).logits
    assert 0 < (small - plain).std() < 0.3 * plain.std()
    base = copy.deepcopy(model)
    add_lora(model, r=4, targets=TARGETS[name])
    assert torch.equal(model(ids).logits, small), "B is zero"
    model(ids, labels=ids).loss.backward()
    trainables = [p for p in model.parameters() if p.requires_grad]
    assert trainables and all(p.grad is not None for p in trainables)
    with torch.no_grad():
        for p in trainables:
            p.add_(0.1)
    changed = model(ids).logits
    assert not torch.allclose(changed, small)
    save_adapter(model, tmp_path / "adapter")
    load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(base(ids).logits, changed)
    with pytest.raises(ValueError, match="This base is quantised"):
        merge_lora(model)
    torch.testing.assert_close(model(ids).logits, changed)


@EVERY
def test_fewer_activations_than_bytes_saved_and_checkpointing_gives_the_same_gradient(name):
    model, _ = load_base(name, device="cpu")
    add_lora(quantize_base(model), r=4, targets=TARGETS[name])
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    model.config.attn_pdrop = model.config.resid_pdrop = 0.0
    ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_four_bit_layers_keep_their_place_under_autocast_and_in_half_precision():
    model, _ = load_base("tiny", device="cpu", dtype=torch.bfloat16)
    add_lora(quantize_base(model))
    ids = torch.randint(5, 200, (2, 12))
    assert model(ids).logits.dtype == torch.bfloat16
    model, _ = load_base("tiny", device="cpu")
    add_lora(quantize_base(model)).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


def test_saved_tensors_of_a_four_bit_model_are_no_more_than_of_the_plain_one():
    sizes = []
    for prepare in (lambda m: m, quantize_base):
        model = add_lora(prepare(load_base("tiny", device="cpu")[0])).train()
        ids = torch.zeros(2, 30, dtype=torch.int64)
        sizes.append(saved_bytes(model, {"input_ids": ids, "labels": ids.clone()}))
    assert sizes[0] == sizes[1]


def regression(optimizer, steps=60, width=128, **options):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 64))
    x, y = torch.randn(256, 32), torch.randn(256, 64)
    update = optimizer(net.parameters(), lr=1e-2, weight_decay=0.1, **options)
    losses = []
    for _ in range(steps):
        loss = (net(x) - y).square().mean()
        losses.append(loss.item())
        update.zero_grad()
        loss.backward()
        update.step()
    return losses, net, update


def test_eight_bit_adamw_is_adamw_for_small_parameters():
    exact, a, _ = regression(torch.optim.AdamW, width=8)
    small, b, _ = regression(AdamW8bit, width=8)
    assert small == pytest.approx(exact, rel=1e-5)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-5, rtol=1e-4)


def test_eight_bit_adamw_learns_like_adamw_with_a_quarter_of_the_state():
    exact, _, full = regression(torch.optim.AdamW)
    small, net, eight = regression(AdamW8bit)
    assert small != exact
    assert small[-1] == pytest.approx(exact[-1], rel=0.05) and small[-1] < 0.7 * small[0]
    weight = net[2].weight  # 64 x 128 = 8,192 elements
    state = eight.state[weight]
    size = sum(t.nbytes for t in state.values() if torch.is_tensor(t))
    assert size == 2 * 8192 + 2 * 4 * 8192 // 256
    assert (
        size < sum(t.nbytes for t in full.state[full.param_groups[0]["params"][2]].values()) / 3.8
    )


def test_eight_bit_state_survives_a_state_dict():
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(100, 100))
    one, grads = AdamW8bit([p], lr=0.1), torch.randn(4, 100, 100)
    for g in grads[:2]:
        p.grad = g.clone()
        one.step()
    q = nn.Parameter(p.detach().clone())
    two = AdamW8bit([q], lr=0.1)
    two.load_state_dict(copy.deepcopy(one.state_dict()))
    assert two.state[q]["m"].dtype == two.state[q]["v"].dtype == torch.uint8
    for g in grads[2:]:
        p.grad, q.grad = g.clone(), g.clone()
        one.step()
        two.step()
    assert torch.equal(p, q)


def test_bad_input_is_refused_in_one_sentence():
    model = lambda: load_base("tiny", device="cpu")[0]  # noqa: E731
    with pytest.raises(ValueError, match="block_size=63 must be even"):
        quantize_base(model(), block_size=63)
    with pytest.raises(ValueError, match="Quantise the base first"):
        quantize_base(add_lora(model()))
    with pytest.raises(ValueError, match="no linear layer left"):
        quantize_base(quantize_base(model()))
    with pytest.raises(ValueError, match="out of range"):
        AdamW8bit([nn.Parameter(torch.zeros(1))], betas=(0.9, math.inf))


def test_the_codes_hold_numbers_also_where_new_tensors_are_meta(monkeypatch):
    """transformers patches torch.linspace while it makes a model, and torch remembers the first
    functions that it saw; then linspace and tensor disagree about the device."""
    expected = nf4_code(), dynamic_code(signed=True)
    original = torch.linspace
    for patched in (
        original,
        lambda *args, **kwargs: original(*args, **{"device": "cpu"} | kwargs),
    ):
        monkeypatch.setattr(torch, "linspace", patched)
        with torch.device("meta"):
            codes = nf4_code(), dynamic_code(signed=True)
        assert all(torch.equal(a, b) for a, b in zip(codes, expected, strict=True))
