"""LoRA against HF peft, given the same A and B, on five architectures."""

import copy

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from low_rank import (
    EVERY,
    LAYERS,
    TABLES,
    as_peft,
    base,
    batch_of,
    close,
    layers,
    merge_and_back,
    tuned,
)
from torch import nn
from torch.nn.functional import embedding, linear
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    OPTConfig,
    RobertaConfig,
    RobertaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from minipeft import (
    Collator,
    add_lora,
    add_prompt_tuning,
    count_parameters,
    encode,
    load_adapter,
    load_base,
    save_adapter,
    train,
    unload_lora,
)
from minipeft import merge_lora as merge
from minipeft import unmerge_lora as unmerge
from minipeft.lora import LoRALinear, lora_layer


@EVERY
@given(data=st.data())
@settings(max_examples=8, deadline=None, derandomize=True)
def test_logits_and_gradients_are_those_of_hf_peft(name, data):
    options = {
        "r": data.draw(st.integers(1, 9)),
        "alpha": data.draw(st.integers(1, 40)),
        "scaling": data.draw(st.sampled_from(["alpha/r", "rslora"])),
        "dora": data.draw(st.booleans()),
        "untied": data.draw(st.booleans()),
    }
    names = LAYERS[name] + TABLES[name][: 1 + options["untied"]]
    options["targets"] = data.draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    model, _ = tuned(name, **options)
    other, pairs = as_peft(model, name, **options)
    sides = ["right", "left"]
    if name == "tiny-bloom":  # padded on the left, transformers' own Bloom gives NaN in float64
        sides.remove("left")
    side = data.draw(st.sampled_from(sides))
    batch = batch_of(data.draw(st.integers(0, 99)), 3, 7, side)
    ours, theirs = model(**batch), other(**batch)
    assert close(ours.logits, theirs.logits)
    ours.loss.backward()
    theirs.loss.backward()
    for ours, theirs in pairs.values():
        assert close(ours.grad, theirs.grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@EVERY
def test_the_untrained_model_is_the_base_to_the_bit(name):
    base, _ = load_base(name, device="cpu")
    batch = batch_of(0, 2, 6)
    expected = base(**batch).logits
    model = add_lora(base, r=4, targets=LAYERS[name])
    assert model is base
    out = model(**batch)
    assert torch.equal(out.logits, expected)
    out.loss.backward()
    for layer in layers(model).values():
        assert not layer.lora_A.grad.any(), "its gradient is a product with B, which is zero"
    assert any(layer.lora_B.grad.any() for layer in layers(model).values())


@EVERY
def test_counted_by_formula(name):
    model, _ = load_base(name, device="cpu")
    before = count_parameters(model)[1]
    shapes = [m.weight.shape for n, m in model.named_modules() if n.endswith(LAYERS[name][0])]
    add_lora(model, r=3, targets=LAYERS[name][0])
    expected = sum(3 * (rows + columns) for rows, columns in shapes)
    assert count_parameters(model) == (expected, before + expected)


@EVERY
def test_merging_is_exact_to_rounding_and_can_be_undone(name):
    merge_and_back(name)


@pytest.mark.parametrize("dora", [False, True])
@EVERY
def test_unloaded_it_is_the_plain_model_that_hf_peft_leaves(name, dora, tmp_path):
    model, _ = tuned(name, dora=dora)
    other, _ = as_peft(model, name, dora=dora)
    expected, batch = other.merge_and_unload().state_dict(), batch_of(1, 2, 6)
    apart = model(**batch).logits
    assert unload_lora(merge(model)) is model
    found = model.state_dict()
    assert list(found) == list(base(name)[0].state_dict()) == list(expected)
    assert all(close(found[key], expected[key]) for key in found)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert close(again(**batch).logits, apart)
    assert count_parameters(model)[0] == 0
    add_lora(model, targets=LAYERS[name][0])  # no trace of the first one is in the way


@EVERY
def test_unloaded_without_merging_it_is_the_base_to_the_bit(name):
    model, _ = tuned(name, targets=LAYERS[name][:1] + TABLES[name][:1])
    found, expected = unload_lora(model).state_dict(), base(name)[0].state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in found)


def test_merging_twice_or_training_merged_is_refused():
    model, tokenizer = tuned("tiny-llama", torch.float32)
    with pytest.raises(ValueError, match="not merged"):
        unmerge(model)
    merge(model)
    with pytest.raises(ValueError, match="already merged"):
        merge(model)
    batch = Collator(0)([encode(tokenizer, "a", "b")])
    with pytest.raises(ValueError, match="Nothing is trainable"):
        train(model, [batch], max_steps=1, lr=1e-3, progress=False)
    unmerge(model)
    train(model, [batch], max_steps=1, lr=1e-3, progress=False)
    for call in (merge, unmerge, unload_lora):
        with pytest.raises(ValueError, match="has no LoRA"):
            call(load_base("tiny", device="cpu")[0])


def test_what_was_frozen_before_merging_is_frozen_after_it():
    model = add_lora(load_base("tiny-llama", device="cpu")[0])
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and "lora_A" not in name)
    before = [p.requires_grad for p in model.parameters()]
    merge(model)
    assert not any(p.requires_grad for p in model.parameters())
    unmerge(model)
    assert [p.requires_grad for p in model.parameters()] == before


@pytest.mark.parametrize(
    "options,message",
    [
        ({"targets": ("q_prj",)}, r"no layer named 'q_prj'; it has .*q_proj.*v_proj"),
        ({"targets": ()}, "by an empty list"),
        ({"targets": ""}, "targets=.* is not a list of names"),
        ({"targets": None}, "targets=None is not a list of names"),
        ({"targets": [1]}, r"targets=\[1\] is not a list of names"),
        ({"r": "4"}, "is not a rank"),
        ({"r": True}, "r=True is not a rank"),
        ({"r": None}, "r=None is not a rank"),
        ({"alpha": "16"}, "alpha='16' must be above 0"),
        ({"alpha": float("nan")}, "alpha=nan must be above 0"),
        ({"alpha": float("inf")}, "alpha=inf must be above 0"),
        ({"alpha": None}, "alpha=None must be above 0"),
        ({"dropout": -0.1}, "dropout=-0.1 is not a probability"),
        ({"dropout": None}, "dropout=None is not a probability"),
        ({"dropout": "0.1"}, "dropout='0.1' is not a probability"),
        ({"scaling": ["alpha/r"]}, "scaling=.* is none of"),
        ({"dora": "yes"}, "dora='yes' is neither True nor False"),
        ({"targets": ("q_proj", "proj")}, "no layer named 'proj'"),
        ({"r": 0}, "r=0 is not a rank"),
        ({"r": 2.0}, "r=2.0 is not a rank"),
        ({"alpha": 0}, "alpha=0 must be above 0"),
        ({"dropout": 1.0}, "dropout=1.0 is not a probability"),
        ({"scaling": "r/alpha"}, "scaling='r/alpha' is none of 'alpha/r', 'rslora'"),
        ({"targets": ("lm_head",)}, "weight of lm_head is tied"),
        ({"targets": ("embed_tokens", "lm_head")}, "weight of lm_head is tied"),
    ],
)
def test_bad_input_is_refused_and_the_model_left_alone(options, message):
    model, _ = load_base("tiny-llama", device="cpu")
    with pytest.raises(ValueError, match=message):
        add_lora(model, **options)
    assert not layers(model) and all(p.requires_grad for p in model.parameters())


def test_adding_lora_twice_is_refused():
    model, _ = tuned("tiny-llama")
    before = dict(model.named_parameters())
    with pytest.raises(ValueError, match="has lora already"):
        add_lora(model)
    assert all(p is before[name] for name, p in model.named_parameters())


def test_the_default_targets_are_refused_where_the_names_differ():
    with pytest.raises(ValueError, match="'q_proj' or 'v_proj'; it has c_attn, c_fc, c_proj"):
        add_lora(load_base("tiny-gpt2", device="cpu")[0])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_float32_trainables(dtype, dora):
    model, _ = tuned("tiny-llama", dtype, dora=dora)
    other, _ = as_peft(model, "tiny-llama", dtype, dora=dora)
    for layer in layers(model).values():
        assert all(p.dtype == torch.float32 for p in layer.parameters(recurse=False))
        assert layer.base.weight.dtype == dtype
    batch = batch_of(3, 2, 6)
    out = model(**batch)
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert all(layer.lora_B.grad.dtype == torch.float32 for layer in layers(model).values())
    theirs = other(**batch).logits.float()
    assert close(out.logits.float(), theirs, 0.02)  # two roundings of half precision


def test_dropout_acts_in_training_only_and_spares_the_frozen_path():
    model, _ = tuned("tiny-llama", dropout=0.5)
    plain, _ = tuned("tiny-llama")
    batch = batch_of(4, 2, 6)
    assert torch.equal(model(**batch).logits, plain(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits, model(**batch).logits)
    for layer in layers(model).values():
        nn.init.zeros_(layer.lora_B)
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    layer = LoRALinear(nn.Linear(4, 4, bias=False), 2, 2, dropout=0.5)
    with torch.no_grad():
        layer.base.weight.zero_()
        layer.lora_A.copy_(torch.eye(4)[:2])
        layer.lora_B.copy_(torch.eye(4)[:, :2])
    torch.manual_seed(0)
    kept = layer(torch.ones(1, 20_000, 4))[..., :2]
    assert set(kept.unique().tolist()) == {0.0, 2.0}, "what is kept is scaled by 1 / (1 - p)"
    assert abs(kept.mean().item() - 1) < 0.03  # six standard errors are 0.03


@EVERY
def test_generation_is_that_of_hf_peft_token_by_token(name):
    # float32: in float64 transformers' own Bloom gives NaN when it is padded on the left
    model, _ = tuned(name, torch.float32, targets=LAYERS[name][:1])
    other, _ = as_peft(model, name, torch.float32, targets=LAYERS[name][:1])
    batch = {k: v for k, v in batch_of(5, 3, 6, "left").items() if k != "labels"}
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}):
        options = {"max_new_tokens": 6, "do_sample": False} | options
        torch.manual_seed(0)
        ours = model.generate(**batch, **options)
        torch.manual_seed(0)
        assert torch.equal(ours, other.generate(**batch, **options))


@EVERY
def test_gradient_checkpointing_gives_the_same_gradients(name):
    found = []
    for checkpointing in (False, True):
        model, _ = tuned(name)
        model.train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(**batch_of(6, 2, 6), use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(*found, strict=True))
    assert all(grad.any() for grad in found[0])


def test_trainer_train_and_the_usual_methods(tmp_path):
    model, tokenizer = tuned("tiny-llama", torch.float32)
    twin = copy.deepcopy(model)
    rows = [encode(tokenizer, "Was it good?", answer) for answer in (" Yes", " No")]
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    Trainer(model, arguments, Collator(tokenizer.pad_token_id), rows).train()
    moved = [p for p in model.parameters() if p.requires_grad]
    kept = [p for p in twin.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(moved, kept, strict=True))
    still = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(still, frozen, strict=True))
    twin.load_state_dict(model.state_dict())
    batch = batch_of(7, 2, 5)
    assert torch.equal(twin.eval()(**batch).logits, model.eval()(**batch).logits)
    assert model.to(torch.float64)(**batch).logits.dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_cuda():
    model, _ = tuned("tiny-llama", torch.float32)
    batch = batch_of(8, 2, 6)
    expected = model(**batch).logits
    found = model.to("cuda")(**{k: v.to("cuda") for k, v in batch.items()}).logits.cpu()
    assert close(found, expected, 1e-4)


@EVERY
@pytest.mark.parametrize("dora", [False, True])
def test_every_kind_is_saved_and_read_by_both_libraries(name, dora, tmp_path):
    options = {"untied": True, "dora": dora, "targets": [LAYERS[name][0], *TABLES[name]]}
    model, _ = tuned(name, **options)
    folder = save_adapter(model, tmp_path / "ours")
    batch = batch_of(9, 2, 6)
    expected = model(**batch).logits
    double = {"autocast_adapter_dtype": False}
    theirs = peft.PeftModel.from_pretrained(base(name, untied=True)[0], folder, **double)
    assert close(theirs.eval().double()(**batch).logits, expected)
    other, _ = as_peft(model, name, **options)
    other.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    for place in (folder, tmp_path / "theirs"):
        again = load_adapter(base(name, untied=True)[0], place)
        assert close(again(**batch).logits, expected, 1e-12)
    tied, _ = base(name)
    if tied.get_output_embeddings().weight is tied.get_input_embeddings().weight:
        with pytest.raises(ValueError, match="weight of lm_head is tied"):
            load_adapter(tied, folder)
    changed, _ = base(name, untied=True)
    changed.get_input_embeddings().weight.data *= 2
    with pytest.raises(ValueError, match="another base model: .*base_layer.weight differs"):
        load_adapter(changed, tmp_path / "theirs")
    assert not layers(changed)


# ---- in the place of a layer: what a model may ask of it ----------------------------------------


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inputs_of_any_shape_give_what_their_rows_give(dora, dropout, dtype):
    torch.manual_seed(0)
    for base_layer in (nn.Linear(4, 6), Conv1D(6, 4), nn.Embedding(9, 6)):
        layer = lora_layer(base_layer.to(dtype), 2, 3, dropout, dora=dora).eval()
        with torch.no_grad():
            layer.lora_A.normal_()
            layer.lora_B.normal_()
        table = isinstance(base_layer, nn.Embedding)
        x = torch.arange(6) if table else torch.randn(6, 4).to(dtype)
        expected = torch.stack([layer(row[None])[0] for row in x])  # (6, out)
        assert torch.allclose(layer(x), expected, atol=1e-5, rtol=0.02)
        for shape in ((2, 3), (1, 2, 3), (6, 1)):
            found = layer(x.view(*shape, *x.shape[1:]))
            assert found.shape == (*shape, 6)
            assert torch.allclose(found.view(6, 6), expected, atol=1e-5, rtol=0.02)
        assert layer(x[0]).shape == (6,)
        assert torch.allclose(layer(x[0]), expected[0], atol=1e-5, rtol=0.02)
        assert layer(x[:0]).shape == (0, 6)
        assert layer(x.view(2, 3, *x.shape[1:])[:, :0]).shape == (2, 0, 6)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D, nn.Embedding])
def test_the_weight_that_a_model_reads_is_the_one_that_the_layer_applies(kind, dora):
    torch.manual_seed(0)
    base_layer = kind(6, 4).double() if kind is Conv1D else kind(4, 6).double()
    layer = lora_layer(base_layer, 2, 3, dora=dora)
    with torch.no_grad():
        layer.lora_A.normal_()
        layer.lora_B.normal_()
    x = torch.arange(4) if kind is nn.Embedding else torch.randn(5, 4).double()
    outputs = (
        layer(x),
        {
            nn.Linear: lambda: linear(x, layer.weight, layer.bias),
            Conv1D: lambda: linear(x, layer.weight.T, layer.bias),
            nn.Embedding: lambda: embedding(x, layer.weight),
        }[kind](),
    )
    torch.testing.assert_close(*outputs)
    trainables = [p for n, p in layer.named_parameters() if not n.startswith("base.")]
    grads = [torch.autograd.grad(out.sin().sum(), trainables) for out in outputs]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert layer.weight.shape == base_layer.weight.shape
    assert layer.bias is getattr(base_layer, "bias", None)
    if kind is nn.Linear:
        assert (layer.in_features, layer.out_features) == (4, 6)
    else:
        assert not hasattr(layer, "in_features")
    model = nn.Sequential(layer)
    model.lora_config = {}
    if not dora or kind is not nn.Embedding:
        before = layer.weight.clone()
        merge(model)
        assert layer.weight is base_layer.weight
        torch.testing.assert_close(layer.weight.data, before.data)


def readers():
    """Models that read the weights of their layers themselves, or ask for their types."""
    sizes = {"vocab_size": 90, "hidden_size": 32}
    bloom = BloomConfig(**sizes, n_layer=2, n_head=4, pretraining_tp=2, slow_but_exact=True)
    mamba = MambaConfig(**sizes, num_hidden_layers=2, state_size=4)
    t5 = T5Config(vocab_size=90, d_model=32, d_ff=48, num_layers=2, num_heads=4, d_kv=8)
    return {
        "bloom": (bloom, AutoModelForCausalLM, ["dense", "dense_4h_to_h"]),
        "mamba": (mamba, AutoModelForCausalLM, ["in_proj", "x_proj", "dt_proj", "out_proj"]),
        "t5": (t5, T5ForConditionalGeneration, ["wo", "q"]),
    }


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("name", ["bloom", "mamba", "t5"])
def test_a_model_that_reads_a_weight_itself_reads_the_change_too(name, dora):
    config, kind, targets = readers()[name]
    torch.manual_seed(0)
    model = kind.from_config(config) if kind is AutoModelForCausalLM else kind(config)
    model = add_lora(model.double().eval(), r=2, targets=targets, dora=dora)
    with torch.no_grad():
        for layer in layers(model).values():
            nn.init.normal_(layer.lora_B, std=0.3)
    ids = torch.randint(5, 90, (2, 6))
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    apart = model(**inputs).logits
    apart.sin().sum().backward()
    assert all(layer.lora_A.grad.any() for layer in layers(model).values())
    start = copy.deepcopy(model)
    unload_lora(start)
    assert not close(start(**inputs).logits, apart, 1e-3)
    assert close(merge(model)(**inputs).logits, apart), "merged, it is a plain model"


@EVERY
def test_the_vocabulary_is_resized_beside_lora_and_refused_under_it(name):
    model, _ = tuned(name)
    ids = batch_of(3, 2, 6)["input_ids"]
    before = model(ids).logits
    model.resize_token_embeddings(before.shape[-1] + 7, mean_resizing=False)
    model.tie_weights()
    after = model(ids).logits
    assert after.shape[-1] == before.shape[-1] + 7
    assert close(after[..., : before.shape[-1]], before, 1e-12)
    assert len(layers(model)) == sum(isinstance(m, LoRALinear) for m in model.modules()) > 0

    for target, untied in ((TABLES[name][0], False), ("lm_head", True)):
        model, _ = tuned(name, targets=[target], untied=untied)
        before = model(ids).logits
        for call in (lambda m: m.resize_token_embeddings(300), lambda m: m.tie_weights()):
            with pytest.raises(ValueError, match="with LoRA on it cannot be resized or tied"):
                call(model)
        assert torch.equal(model(ids).logits, before) and layers(model)
        unload_lora(model).resize_token_embeddings(300, mean_resizing=False)
        assert model(ids).logits.shape[-1] == 300


@EVERY
@pytest.mark.parametrize("dora", [False, True])
def test_a_tuned_model_cannot_be_saved_as_a_plain_one(name, dora, tmp_path):
    model, _ = tuned(name, torch.float32, dora=dora)
    folder = save_adapter(model, tmp_path / "adapter")
    loaded = load_adapter(base(name, torch.float32)[0], folder)
    merged, twin = merge(copy.deepcopy(model)), copy.deepcopy(loaded)
    for one in (model, loaded, twin, merged):
        with pytest.raises(
            ValueError, match="call save_adapter.* or, for LoRA, merge_lora and unl"
        ):
            one.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    ids = batch_of(3, 2, 6)["input_ids"]
    expected = model(ids).logits
    unload_lora(merged).save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()
    assert close(again(ids).logits, expected, 1e-5)
    copy.deepcopy(merged).save_pretrained(tmp_path / "copy")


# ---- tried once, when it is added ---------------------------------------------------------------


class Router(nn.Linear):
    """A class of its own: its output is no W x + b."""

    def forward(self, x):
        return super().forward(x).softmax(-1)


class Pair(nn.Linear):
    def forward(self, x):
        return super().forward(x), None


class Doubling(nn.Embedding):
    def forward(self, ids):
        return 2 * super().forward(ids)


class Jealous(LlamaForCausalLM):
    """Does something else as soon as a layer is not a plain one."""

    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        if type(self.model.layers[0].self_attn.q_proj) is not nn.Linear:
            out.logits = out.logits * 1.01
        return out


def llama(kind=LlamaForCausalLM):
    torch.manual_seed(0)
    return kind(LlamaConfig(vocab_size=90, hidden_size=32, intermediate_size=48, bos_token_id=45,
                            num_hidden_layers=2, num_attention_heads=4)).eval()  # fmt: skip


def picture(model):
    return (
        {n: (id(p), p.sum().item(), p.requires_grad) for n, p in model.named_parameters()},
        {n: (type(m), m.training, set(vars(m))) for n, m in model.named_modules()},
    )


def replaced(model, name, kind, *args):
    parent, _, last = name.rpartition(".")
    old = model.get_submodule(name)
    new = kind(*(args or old.weight.T.shape), **({} if isinstance(old, nn.Embedding) else
                                                 {"bias": False}))  # fmt: skip
    new.weight = old.weight
    setattr(model.get_submodule(parent), last, new)
    return model


@pytest.mark.parametrize(
    "make, target, message",
    [
        (lambda: replaced(llama(), "model.layers.0.mlp.up_proj", Router), "up_proj",
         "up_proj is a Router, which computes something else"),
        (lambda: replaced(llama(), "model.embed_tokens", Doubling, 90, 32), "embed_tokens",
         "embed_tokens is a Doubling, which computes something else"),
        (lambda: replaced(llama(), "model.embed_tokens", nn.Embedding, 90, 32, None, 1.0),
         "embed_tokens", "embed_tokens is a Embedding, which computes something else"),
        (lambda: llama(Jealous), "q_proj", "It would change what Jealous answers before anything"),
        (lambda: AutoModelForCausalLM.from_config(OPTConfig(
            vocab_size=90, hidden_size=32, ffn_dim=48, num_hidden_layers=2, word_embed_proj_dim=32,
            num_attention_heads=4)).eval(), "embed_positions", "OPTLearnedPositionalEmbedding"),
    ],
)  # fmt: skip
def test_a_layer_or_model_that_cannot_carry_it_is_refused_by_name(make, target, message):
    model = make()
    model.model.train()  # mixed modes, to be left as they are
    before = picture(model)
    with pytest.raises(ValueError, match=message):
        add_lora(model, r=2, targets=target)
    assert picture(model) == before


def test_a_layer_of_its_own_class_that_does_what_its_kind_does_is_taken():
    class Named(nn.Linear):
        pass

    for dtype in (torch.float32, torch.bfloat16):
        model = replaced(llama(), "model.layers.0.mlp.up_proj", Named).to(dtype)
        add_lora(model, r=2, targets="up_proj")
        assert len(layers(model)) == 2


def drawing():
    """A model may draw numbers in eval mode too."""
    torch.rand(1)


@pytest.mark.parametrize("dora", [False, True])
def test_the_trial_leaves_no_trace(dora):
    model, twin = llama(), llama()
    model.model.layers[0].train()
    modes = [m.training for m in model.modules()]
    names = [n for n, _ in model.named_modules()]
    hooks = []
    model.register_forward_hook(lambda *_: hooks.append(torch.is_grad_enabled()) or drawing())
    torch.manual_seed(3)
    add_lora(model, r=2, dora=dora)
    after = torch.rand(4)
    assert hooks == [False, False], "one forward before, one after"
    assert [m.training for n, m in model.named_modules() if n in names] == modes
    torch.manual_seed(3)
    for name, layer in layers(model).items():  # the same draws as without a trial
        made = lora_layer(twin.get_submodule(name), 2, 16, dora=dora)
        assert torch.equal(made.lora_A, layer.lora_A)
    assert torch.equal(torch.rand(4), after)
    assert all(p.grad is None for p in model.parameters())


def test_models_that_two_tokens_do_not_suit_are_not_tried():
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    from transformers import BertForMultipleChoice, ViTConfig, ViTForImageClassification

    choice = BertForMultipleChoice(BertConfig(**sizes)).eval()
    assert layers(add_lora(choice, r=2, targets="query"))
    del sizes["vocab_size"]
    image = ViTForImageClassification(ViTConfig(**sizes, image_size=16, patch_size=8)).eval()
    targets = "q_proj" if any("q_proj" in n for n, _ in image.named_modules()) else "query"
    assert layers(add_lora(image, r=2, targets=targets))
    assert image(torch.randn(1, 3, 16, 16)).logits.shape[0] == 1
    plain = add_lora(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), targets="0")
    assert isinstance(plain[0], LoRALinear) and plain(torch.randn(3)).shape == (2,)
    with torch.device("meta"):
        meta = llama()
    assert layers(add_lora(meta, r=2))


def test_a_head_is_trained_as_a_whole_and_gets_no_lora():
    sizes = {"vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    bert = BertForSequenceClassification(BertConfig(**sizes)).eval()
    before = picture(bert)
    with pytest.raises(ValueError, match="classifier is the head of BertForSequenceClassification"):
        add_lora(bert, r=2, targets=["query", "classifier"])
    assert picture(bert) == before
    roberta = add_lora(
        RobertaForSequenceClassification(RobertaConfig(**sizes)).eval(), r=2, targets="dense"
    )
    assert layers(roberta) and not any("classifier" in name for name in layers(roberta))
    assert all(p.requires_grad for p in roberta.classifier.parameters())


def test_two_methods_and_hf_peft_refuse_each_other():
    with pytest.raises(ValueError, match="has prompt_tuning already"):
        add_lora(add_prompt_tuning(llama(), 3))
    config = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="has an adapter of HF peft already"):
        add_lora(peft.get_peft_model(llama(), config))
