"""DoRA, embeddings and LoRA+ against HF peft; the norms that DoRA keeps."""

import copy
import math

import peft
import pytest
import torch
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
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from minipeft import (
    add_lora,
    count_parameters,
    load_adapter,
    load_base,
    lora_plus_groups,
    merge_lora,
    save_adapter,
    train,
    unmerge_lora,
)
from minipeft.lora import DoRALinear, LoRALinear, matrix
from minipeft.memory.estimate import estimate
from minipeft.memory.measure import measure
from minipeft.quantization import quantize_base


@EVERY
def test_dora_starts_as_the_base_to_the_bit_and_costs_one_number_a_row(name):
    for dtype in (torch.float32, torch.bfloat16):
        model, _ = load_base(name, device="cpu", dtype=dtype)
        batch = batch_of(0, 2, 6)
        expected = model(**batch).logits
        targets = LAYERS[name] + TABLES[name][:1]
        add_lora(model, r=4, targets=targets, dora=True, dropout=0.2)
        assert torch.equal(model(**batch).logits, expected)
        for layer in layers(model).values():
            assert layer.lora_magnitude.dtype == torch.float32
            norms = matrix(layer.base).float().norm(dim=1)
            assert close(layer.lora_magnitude, norms)
            layer.lora_magnitude.data *= 1.1
        assert not torch.equal(model(**batch).logits, expected)
    plain = count_parameters(add_lora(load_base(name, device="cpu")[0], r=4, targets=targets))[0]
    rows = sum(layer.lora_B.shape[0] for layer in layers(model).values())
    assert count_parameters(model)[0] == plain + rows


def test_a_row_of_zeros_has_no_direction_but_gives_no_nan():
    layer = DoRALinear(nn.Linear(4, 3), 2, 2)
    with torch.no_grad():
        layer.base.weight[1] = 0  # as the row of a padding token in a head
        layer.lora_magnitude.copy_(layer.norms())
    x = torch.randn(2, 5, 4)
    assert torch.equal(layer(x), layer.base(x))
    layer(x).sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters() if p.grad is not None)
    old = layer.base.weight.clone()
    layer.shift_weight(1)
    layer.shift_weight(-1)
    torch.testing.assert_close(layer.base.weight, old)


@EVERY
def test_dora_drops_what_hf_peft_drops(name):
    options = {"dora": True, "dropout": 0.5, "targets": LAYERS[name][:1]}
    model, _ = tuned(name, **options)
    other, pairs = as_peft(model, name, **options)
    batch = batch_of(2, 3, 7)
    assert close(model(**batch).logits, other(**batch).logits)
    drawn = []
    for one in (model, other):  # only these layers draw: the rest of the model stays in eval mode
        for module in one.modules():
            if isinstance(module, (LoRALinear, peft.tuners.lora.layer.LoraLayer)):
                module.train()
        torch.manual_seed(3)
        out = one(**batch)
        out.loss.backward()
        drawn.append(out.logits)
    assert close(*drawn)
    for ours, theirs in pairs.values():
        assert close(ours.grad, theirs.grad)
    assert not close(drawn[0], model.eval()(**batch).logits, 1e-3)


@EVERY
def test_dora_embeddings_and_heads_merge_and_come_back(name):
    merge_and_back(name, dora=True)
    merge_and_back(name, untied=True, targets=TABLES[name])
    merge_and_back(name, dora=True, untied=True, targets=LAYERS[name][:1] + TABLES[name])


def test_a_tied_embedding_changes_the_input_side_only_and_cannot_be_merged():
    model, _ = tuned("tiny-llama", targets="embed_tokens")
    plain, _ = base("tiny-llama")
    ids = batch_of(3, 2, 6)["input_ids"]
    table = plain.model.embed_tokens.weight
    assert model.lm_head.weight is model.model.embed_tokens.base.weight
    assert torch.equal(model.lm_head.weight, table)
    (layer,) = layers(model).values()
    assert layer.change().any(), "B is random, A was set"
    rows = table[ids] + layer.change().T[ids]  # (batch, seq, hidden)
    assert close(model(ids).logits, plain(inputs_embeds=rows).logits)
    before = model(ids).logits
    with pytest.raises(ValueError, match="model.embed_tokens is tied .* untie the head first"):
        merge_lora(model)
    assert torch.equal(model(ids).logits, before)
    model.lm_head.weight = nn.Parameter(table.detach().clone())
    assert close(merge_lora(model)(ids).logits, before)


def test_an_embedding_that_scales_its_rows(tmp_path):
    config = Gemma3TextConfig(
        vocab_size=60, hidden_size=16, intermediate_size=20, num_hidden_layers=1, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    ids = torch.arange(5, 15).reshape(2, 5)
    for dora in (False, True):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        settings = peft.LoraConfig(
            r=3, target_modules=["embed_tokens"], use_dora=dora, init_lora_weights=False
        )
        other = peft.get_peft_model(copy.deepcopy(model), settings, autocast_adapter_dtype=False)
        other = other.eval().double()
        add_lora(model, r=3, alpha=8, targets="embed_tokens", dora=dora)
        (layer,) = layers(model).values()
        theirs = other.base_model.model.model.embed_tokens
        layer.lora_A.data = theirs.lora_embedding_A["default"].data
        layer.lora_B.data = theirs.lora_embedding_B["default"].data
        if dora:
            layer.lora_magnitude.data = 2 * theirs.lora_magnitude_vector["default"].weight.data
            theirs.lora_magnitude_vector["default"].weight.data *= 2
        expected = other(ids).logits
        assert close(model(ids).logits, expected)
        torch.manual_seed(0)
        again = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
        load_adapter(again, save_adapter(model, tmp_path / str(dora)))
        assert close(again(ids).logits, expected)
        assert close(merge_lora(model)(ids).logits, expected)


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2"])
def test_dora_on_a_four_bit_base_is_dora_on_what_the_codes_stand_for(name):
    model, _ = load_base(name, device="cpu")
    quantize_base(model)
    rounded, _ = load_base(name, device="cpu")
    for key, module in model.named_modules():
        if hasattr(module, "codes"):
            twin = rounded.get_submodule(key)
            matrix(twin).data.copy_(module.weight)
    batch = batch_of(5, 2, 6)
    for one in (model, rounded):
        torch.manual_seed(0)
        add_lora(one, r=4, targets=LAYERS[name][:2], dora=True)
        for layer in layers(one).values():
            nn.init.normal_(layer.lora_B, std=0.1)
        one(**batch).loss.backward()
    assert close(model(**batch).logits, rounded(**batch).logits, 1e-5)
    for a, b in zip(layers(model).values(), layers(rounded).values(), strict=True):
        assert close(a.lora_A.grad, b.lora_A.grad, 1e-4)
        assert close(a.lora_magnitude.grad, b.lora_magnitude.grad, 1e-4)
    with pytest.raises(ValueError, match="This base is quantized"):
        merge_lora(model)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_the_memory_of_dora_is_predicted(dropout):
    from transformers import GPT2Config, LlamaConfig

    wide = {"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4}
    llama = LlamaConfig(**wide, num_hidden_layers=3, vocab_size=2000)
    for config, targets in ((llama, ["q_proj", "down_proj"]), (GPT2Config(n_layer=2), "c_proj")):
        for options in ({"seq": 256}, {"precision": "bfloat16", "checkpointing": True}):
            method = lambda m: add_lora(m, targets=targets, dropout=dropout, dora=True)  # noqa: E731, B023
            predicted, measured = (
                f(config, method, batch=2, **options) for f in (estimate, measure)
            )
            assert predicted.total == pytest.approx(measured.total, rel=0.002)
            for part in ("parameters", "gradients", "optimizer", "activations"):
                assert predicted.parts[part] == pytest.approx(measured.parts[part], rel=0.002)


def test_lora_plus_is_that_of_hf_peft():
    model, _ = tuned("tiny-llama", torch.float32)
    other, pairs = as_peft(model, "tiny-llama", torch.float32)
    theirs = create_loraplus_optimizer(
        other, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, betas=(0.9, 0.999)
    )
    slow, fast = lora_plus_groups(model, lr=1e-3, ratio=16)
    assert slow["params"] == [m.lora_A for m in layers(model).values()]
    assert fast["params"] == [m.lora_B for m in layers(model).values()]
    batch = batch_of(6, 2, 6)
    train(model, [batch], max_steps=1, lr=1e-3, groups=[slow, fast], max_grad_norm=None,
          progress=False)  # fmt: skip
    other(**batch).loss.backward()
    theirs.step()
    for ours, theirs in pairs.values():
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    one, _ = tuned("tiny-llama", torch.float32, targets=["q_proj", "embed_tokens"], dora=True)
    slow, fast = lora_plus_groups(one, lr=1e-3)
    assert len(fast["params"]) == 2 and len(slow["params"]) == 7
    for ratio in (0, -1, math.inf, math.nan, "16", None, True):
        with pytest.raises(ValueError, match=f"ratio={ratio!r} must be above 0"):
            lora_plus_groups(one, lr=1e-3, ratio=ratio)
    for lr in (-1e-3, math.inf, math.nan, "a", None, True):
        with pytest.raises(ValueError, match=f"lr={lr!r} must be a number of at least 0"):
            lora_plus_groups(one, lr=lr)
    with pytest.raises(ValueError, match="has no LoRA"):
        lora_plus_groups(base("tiny-llama")[0], lr=1e-3)


# ---- the norms of DoRA --------------------------------------------------------------------------


def counted(monkeypatch):
    """Counts how often |V| is computed."""
    calls = []
    real = DoRALinear._norms
    monkeypatch.setattr(DoRALinear, "_norms", lambda layer: calls.append(layer) or real(layer))
    return calls


def test_norms_are_computed_once_for_all_tokens_of_a_generation(monkeypatch):
    model, _ = tuned("tiny-llama", torch.float32, dora=True)
    calls = counted(monkeypatch)
    ids = torch.tensor([[5, 6, 7]])
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None}
    model.generate(ids, **options)
    model.generate(ids, **options, num_beams=3)
    assert len(calls) == len(layers(model)) == len(set(calls))
    model.train()
    for _ in range(3):
        model(ids)
    assert len(calls) == 4 * len(layers(model)), "anew in every step of training"


def write_in_place(model):
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B.mul_(3)


def one_step(model):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    optimizer.step()
    model.eval()


def step_by_raw_data(model):
    """As optimizers do that torch does not see: eval mode all the while, writing past autograd."""
    model(torch.tensor([[5, 6, 7]]), labels=torch.tensor([[5, 6, 7]])).loss.backward()
    for layer in layers(model).values():
        layer.lora_B.data.sub_(layer.lora_B.grad, alpha=0.5)


def new_data(model):
    for layer in layers(model).values():
        layer.lora_B.data = layer.lora_B.data * 2


def other_state(model, **options):
    model.load_state_dict({n: t * 1.5 for n, t in model.state_dict().items()}, **options)


def assign_twice(model):
    for _ in range(2):
        other_state(model, assign=True)


CHANGES = {
    "in place": write_in_place,
    "a step of training": one_step,
    "a step past autograd": step_by_raw_data,
    "new data": new_data,
    "load_state_dict": other_state,
    "load_state_dict, assigned": assign_twice,
    "merged and back": lambda m: (write_in_place(m), unmerge_lora(merge_lora(m))),
    "base weights": lambda m: [p.data.mul_(2) for p in m.train().parameters()] and m.eval(),
    "half and back": lambda m: m.half().float(),
    "double": lambda m: m.double(),
}


@pytest.mark.parametrize("what", CHANGES)
def test_norms_are_never_stale(what):
    model, _ = tuned("tiny-gpt2", torch.float32, dora=True)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        before = model(ids).logits.clone()
        twin = copy.deepcopy(model)  # with what was kept
        CHANGES[what](model) if what not in ("a step of training", "a step past autograd") else None
    if what in ("a step of training", "a step past autograd"):
        CHANGES[what](model)
    with torch.no_grad():
        found = model(ids).logits
        for layer in layers(model).values():
            layer.kept = None
        assert torch.equal(found, model(ids).logits)
        assert not torch.equal(found.float(), before)
        assert torch.equal(twin(ids).logits, before)
        write_in_place(twin)
        found = twin(ids).logits
        for layer in layers(twin).values():
            layer.kept = None
        assert torch.equal(found, twin(ids).logits) and not torch.equal(found, before)
