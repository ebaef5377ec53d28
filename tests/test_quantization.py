"""NF4 against the values of the papers, and against exact arithmetic."""

import copy
import math

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    MixtralConfig,
    OPTConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
)
from transformers.pytorch_utils import Conv1D

from minipeft import (
    add_lora,
    add_p_tuning_v2,
    count_parameters,
    load_adapter,
    load_base,
    merge_lora,
    quantization,
    save_adapter,
    unfreeze,
)
from minipeft.freezing import count_by_module, only_biases
from minipeft.memory.measure import Tracker, saved_bytes
from minipeft.quantization import (
    NF4Linear,
    dequantize,
    dynamic_code,
    nf4_code,
    quantize,
    quantize_base,
)
from minipeft.quantized_adamw import AdamW8bit

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
def test_forward_and_gradient_are_those_of_the_dequantized_weight(rows, columns, double, bias):
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
    assert error[0] < error[1] < 1.02 * error[0], "double quantization costs almost nothing"


def test_nothing_but_the_codes_is_kept_for_the_backward_pass():
    x = torch.randn(4, 64, requires_grad=True)
    layer = NF4Linear(torch.randn(96, 64))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        layer(x).sum().backward()
    assert kept == [] and x.grad.shape == x.shape


@EVERY
def test_a_quantized_base_takes_lora_saves_it_and_refuses_to_merge(name, tmp_path):
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
    with pytest.raises(ValueError, match="This base is quantized"):
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


def unchanged(model):
    """A function that tells whether the model is still what it is now."""
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    flags = [p.requires_grad for p in model.parameters()]

    def tell():
        now = model.state_dict()
        return (
            list(model.modules()) == modules
            and [p.requires_grad for p in model.parameters()] == flags
            and all(torch.equal(now[k].nan_to_num(), v.nan_to_num()) for k, v in state.items())
        )

    return tell


def with_nan(model):
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = math.nan
    return model


def with_integers(model):
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.to(torch.int8), requires_grad=False)
    return model


def marked_as_quantized(model):
    model.is_quantized = True  # as transformers does
    return model


@pytest.mark.parametrize(
    "prepare, options, message",
    [
        (None, {"block_size": 63}, "block_size=63 must be even"),
        (None, {"block_size": 0}, "block_size=0 is not a number of weights"),
        (None, {"block_size": 64.0}, "block_size=64.0 is not a number of weights"),
        (None, {"block_size": "64"}, "block_size='64' is not a number of weights"),
        (None, {"double": "no"}, "double='no' is neither True nor False"),
        (add_lora, {}, "Quantize the base first"),
        (lambda m: peft.get_peft_model(m, peft.LoraConfig()), {}, "Quantize the base first"),
        (quantize_base, {}, "no linear layer left"),
        (marked_as_quantized, {}, "transformers has quantized this model already"),
        (with_nan, {}, r"model.layers.1.mlp.up_proj.weight \(torch.float32\).*NaN or infinite"),
        (with_integers, {}, r"model.layers.0.mlp.up_proj.weight \(torch.int8\)"),
        (lambda m: m.get_input_embeddings(), {}, "no list of blocks"),
        (lambda m: None, {}, "None is not a model"),
    ],
)
def test_bad_input_is_refused_in_one_sentence(prepare, options, message):
    model, _ = load_base("tiny", device="cpu")
    model = model if prepare is None else prepare(model)
    same = unchanged(model) if model is not None else lambda: True
    with pytest.raises(ValueError, match=message):
        quantize_base(model, **options)
    assert same()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"block_size": 3}, "block_size=3 must be even"),
        ({"block_size": 0}, "block_size=0 is not a number of weights"),
        ({"block_size": 2.0}, "block_size=2.0 is not a number of weights"),
        ({"double": "no"}, "double='no' is neither True nor False"),
    ],
)
def test_a_layer_of_its_own_is_refused_as_a_model_is(options, message):
    with pytest.raises(ValueError, match=message):
        NF4Linear(torch.randn(4, 8), **options)


TINY = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "pad_token_id": 0}  # fmt: skip


@pytest.mark.parametrize(
    "make, blocks, outside",
    [
        (lambda: AutoModelForSequenceClassification.from_config(LlamaConfig(**TINY)),
         "model.layers.", {"score"}),
        (lambda: AutoModelForSequenceClassification.from_config(BertConfig(**TINY)),
         "bert.encoder.layer.", {"bert.pooler.dense", "classifier"}),
        (lambda: AutoModelForQuestionAnswering.from_config(BertConfig(**TINY)),
         "bert.encoder.layer.", {"qa_outputs"}),
        (lambda: AutoModelForCausalLM.from_config(
            OPTConfig(**TINY | {"pad_token_id": 1}, ffn_dim=48, word_embed_proj_dim=16)),
         "model.decoder.layers.",
         {"lm_head", "model.decoder.project_in", "model.decoder.project_out"}),
        (lambda: load_base("tiny-gpt2", device="cpu")[0], "transformer.h.", {"lm_head"}),
    ],
)  # fmt: skip
def test_what_stands_outside_the_blocks_is_not_quantized(make, blocks, outside):
    model = make()
    layers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    kept = {n: model.get_submodule(n).weight.detach().clone() for n in outside}
    before = count_parameters(model)[1], {k: v[1] for k, v in count_by_module(model).items()}
    assert quantize_base(model) is model
    small = {n for n, m in model.named_modules() if isinstance(m, NF4Linear)}
    assert small == layers - outside and all(name.startswith(blocks) for name in small)
    assert all(torch.equal(model.get_submodule(n).weight, w) for n, w in kept.items())
    after = count_parameters(model)[1], {k: v[1] for k, v in count_by_module(model).items()}
    assert before == after and count_parameters(model)[0] == 0
    assert "NF4, block_size=64, double=True, dtype=torch.float32" in str(model)
    assert "NF4" not in "".join(str(model.get_submodule(name)) for name in outside)


@pytest.mark.parametrize("config", [LlamaConfig(**TINY), BertConfig(**TINY)])
@pytest.mark.parametrize(
    "add",
    [
        add_lora,
        lambda m: add_p_tuning_v2(m, 3),
        lambda m: unfreeze(m, "score" if hasattr(m, "score") else "classifier"),
    ],
)
def test_the_head_of_a_classifier_on_4_bits_is_trained(config, add):
    model = quantize_base(AutoModelForSequenceClassification.from_config(config))
    if add is add_lora and config.model_type == "bert":
        add_lora(model, targets=("query", "value"))
    else:
        add(model)
    head = model.score if hasattr(model, "score") else model.classifier
    ids = torch.randint(5, 80, (2, 6), generator=torch.Generator().manual_seed(0))
    model(ids, attention_mask=torch.ones_like(ids), labels=torch.tensor([0, 1])).loss.backward()
    assert head.weight.requires_grad and head.weight.grad.count_nonzero() > 0


MOE = MixtralConfig(**TINY, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2)
XLNET = XLNetConfig(vocab_size=80, d_model=32, n_layer=2, n_head=4, d_inner=48)


@pytest.mark.parametrize(
    "model, message",
    [
        (lambda: AutoModelForCausalLM.from_config(MOE),
         r"8\d% of .* MixtralForCausalLM .* model.layers.0.mlp.experts.gate_up_proj for one"),
        (lambda: AutoModelForCausalLM.from_config(XLNET),
         r"6\d% of .* transformer.layer.0.rel_attn.q for one"),
        (lambda: T5ForConditionalGeneration(T5Config(vocab_size=80, d_model=32, d_kv=8, d_ff=48,
                                                     num_layers=2, num_heads=4)),
         "two stacks of blocks"),
    ],
)  # fmt: skip
def test_weights_that_would_stay_as_large_as_they_are_are_refused_by_name(model, message):
    model = model()
    same = unchanged(model)
    with pytest.raises(ValueError, match=message):
        quantize_base(model)
    assert same()


def test_a_layer_that_two_blocks_share_is_still_shared():
    model, _ = load_base("tiny", device="cpu")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    model.model.layers[1].self_attn.q_proj = model.model.layers[0].self_attn.q_proj
    before, ids = count_parameters(model)[1], torch.randint(5, 200, (1, 6))
    quantize_base(model)
    first, second = model.model.layers[:2]
    assert first.mlp is second.mlp and isinstance(second.mlp.up_proj, NF4Linear)
    assert first.self_attn.q_proj is second.self_attn.q_proj
    assert not any(type(m) is nn.Linear for m in model.model.layers.modules())
    assert count_parameters(model)[1] == before and model(ids).logits.isfinite().all()


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("shape", [(48, 64), (7, 5), (1, 1)])
def test_the_weight_is_what_the_paper_says_its_bytes_are(double, shape):
    torch.manual_seed(0)
    layer = NF4Linear(torch.randn(shape), double=double)
    codes = [nibble for byte in layer.codes.tolist() for nibble in (byte // 16, byte % 16)]
    absmax = layer.absmax
    if double:
        steps = dynamic_code(signed=True)[layer.absmax_codes.long()]
        assert len(steps) == math.ceil(math.prod(shape) / 64) <= 256  # so they are one block
        absmax = steps * absmax + layer.mean
    expected = [PAPER[code] * absmax[i // 64].item() for i, code in enumerate(codes)]
    expected = torch.tensor(expected)[: math.prod(shape)].view(shape)
    torch.testing.assert_close(layer.weight, expected, atol=1e-6, rtol=1e-5)
    names = {"codes", "absmax"} | ({"mean", "absmax_codes"} if double else set())
    assert set(layer.state_dict()) == names


class Calls(TorchDispatchMode):
    """The names of all operations, and of those that read a tensor of another device."""

    def __init__(self, device):
        super().__init__()
        self.device, self.names, self.foreign = torch.device(device), [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        self.foreign += [str(func)] * any(t.device.type != self.device.type for t in tensors)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("device", ["cpu", "meta"])  # meta stands for any device but the host
def test_a_step_makes_no_table_and_copies_none_from_the_host(device):
    layer = NF4Linear(torch.randn(64, 96), torch.randn(64)).to(device)
    x = torch.randn(2, 96, device=device, requires_grad=True)
    p = nn.Parameter(torch.randn(100, 100, device=device))
    p.grad = torch.randn_like(p)
    update = AdamW8bit([p])

    def step(layer):
        layer(x).sum().backward()
        update.step()

    step(layer)  # whatever is made once is made here
    with torch.no_grad():
        forward = Calls(device)
        with forward:
            layer(x)
    assert len(forward.names) <= 22, forward.names
    for other in (layer, copy.deepcopy(layer), copy.deepcopy(layer).to(torch.bfloat16).float()):
        with Calls(device) as calls:
            step(other)
        assert not calls.foreign
        made = ("linspace", "erfinv", "sort", "cartesian", "lift_fresh", "local_scalar")
        assert not [name for name in calls.names if any(word in name for word in made)]


def test_making_a_weight_takes_six_bytes_a_weight():
    layer = NF4Linear(torch.randn(512, 640))
    layer.weight  # noqa: B018
    for dtype, size in ((torch.float32, 4), (torch.bfloat16, 2)):
        layer.to(dtype)
        with Tracker(layer.buffers(), 0, 0) as peak:
            before = peak.held
            weight = layer.weight
            assert peak.held - before == size * 512 * 640 == weight.nbytes
        assert peak.peak - before <= 6.2 * 512 * 640


def test_fake_tensors_leave_no_table_behind():
    quantization._made_once.cache_clear()
    weight = torch.randn(32, 64)
    with FakeTensorMode():
        fake = NF4Linear(torch.empty(32, 64))
        assert fake(torch.empty(2, 64)).shape == (2, 32)
    with torch.device("meta"):
        assert NF4Linear(torch.empty(32, 64))(torch.empty(2, 64)).is_meta
    with torch.inference_mode():
        NF4Linear(weight).weight  # noqa: B018
    layer = NF4Linear(weight)
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand(2, 64))
    assert (layer.weight - weight).abs().max() < 0.6


@pytest.mark.parametrize("move", [
    lambda m: m.to(torch.bfloat16), lambda m: m.bfloat16(), lambda m: m.half(),
    lambda m: m.double(),
    lambda m: m.to(torch.float16), lambda m: m.type(torch.float16), lambda m: m.to("cpu"),
    lambda m: m.half().float(),
])  # fmt: skip
@pytest.mark.parametrize("double", [True, False])
def test_a_cast_casts_the_weight_and_not_what_it_is_made_from(move, double):
    torch.manual_seed(0)
    layer = NF4Linear(torch.randn(70, 96), torch.randn(70), double=double)
    before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    weight = layer.weight
    move(layer)
    for name, buffer in layer.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
    assert layer.bias.dtype == layer.dtype and not layer.bias.requires_grad
    assert torch.equal(layer.weight, weight.to(layer.dtype))
    x = torch.randn(2, 96, dtype=layer.dtype)
    assert layer(x).dtype == layer.dtype
    assert layer.to("meta").weight.is_meta


def test_a_whole_model_can_be_cast_after_it_was_quantized():
    model, _ = load_base("tiny", device="cpu")
    quantize_base(model)
    weights = [m.weight for m in model.modules() if isinstance(m, NF4Linear)]
    model.to(torch.bfloat16)
    cast = [m.weight for m in model.modules() if isinstance(m, NF4Linear)]
    assert all(torch.equal(w.to(torch.bfloat16), c) for w, c in zip(weights, cast, strict=True))
    assert model(torch.randint(5, 200, (1, 6))).logits.dtype == torch.bfloat16


def test_biases_of_4_bit_layers_can_be_trained():
    """BitFit on a quantized base: their gradients are those of the dequantized layers."""
    torch.manual_seed(0)
    weight, bias = torch.randn(6, 8, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    layer = NF4Linear(weight, bias)
    layer.bias.requires_grad_(True)
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    plain = bias.clone().requires_grad_(True)
    expected = torch.autograd.grad(linear(x, layer.weight, plain).square().sum(), (x, plain))
    found = torch.autograd.grad(layer(x).square().sum(), (x, layer.bias))
    torch.testing.assert_close(found, expected)
    (alone,) = torch.autograd.grad(layer(x.detach()).square().sum(), layer.bias)
    torch.testing.assert_close(alone, expected[1])
    assert torch.autograd.gradcheck(layer, x)
    model = only_biases(quantize_base(load_base("tiny-gpt2", device="cpu")[0]))
    ids = torch.randint(5, 200, (2, 6))
    model(ids, labels=ids).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained and all(p.grad.count_nonzero() > 0 for p in trained)


def test_a_meta_model_is_quantized_without_a_look_at_its_numbers():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY))
    total = count_parameters(model)[1]
    assert count_parameters(quantize_base(model))[1] == total


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
