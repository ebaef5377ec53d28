"""memory.measure: the same numbers on fake and on real tensors, and nothing is left behind."""

import pytest
import torch
from memory_cases import asked_of_the_h100, of_the_h100
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    T5Config,
)

from minipeft import add_lora, freeze, load_base, unfreeze
from minipeft.freezing import only_head
from minipeft.memory import estimate, measure, saved_bytes
from minipeft.memory.cuda import bytes_of_others, workspace


def test_a_configuration_is_measured_by_the_rules_of_cuda_without_a_gpu():
    row = next(r for r in of_the_h100() if (r["model"], r["method"]) == ("llama-3.2-1b", "full"))
    config, method, options = asked_of_the_h100(row)
    measured = measure(config, method, **options)
    assert measured.total / 2**30 == pytest.approx(float(row["allocated_gib"]), rel=0.01)
    assert measured.moment == "optimizer step" and measured.parts["workspace"] == workspace()
    assert "workspace" in str(measured)
    fused = estimate(config, method, **options | {"optimizer": "adamw"})  # as train takes it
    assert measured.total - fused.total > 2.5 * 2**30
    assert "workspace" not in measure(GPT2Config(n_layer=1), seq=8).parts
    torch.manual_seed(0)
    dropped = nn.functional.dropout(torch.ones(1000), 0.5)
    assert 400 < dropped.count_nonzero() < 600, "torch has its own rules again"


@pytest.mark.parametrize("at", [2, 3, 8, 10, 12])
def test_without_a_gpu_measure_and_estimate_give_its_numbers(at):
    """The peaks of an H100: LoRA with checkpointing and with autocast, eager attention, a prefix,
    and a base in 16 bits."""
    row = of_the_h100()[at]
    config, method, options = asked_of_the_h100(row)
    measured, predicted = (f(config, method, **options) for f in (measure, estimate))
    assert measured.total == pytest.approx(predicted.total, rel=0.0005)
    assert measured.total / 2**30 == pytest.approx(float(row["allocated_gib"]), rel=0.01)
    assert measured.parts["workspace"] == predicted.parts["workspace"] == workspace()


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-foreach", "adamw8bit", "sgd"])
def test_the_optimizers_need_on_cuda_what_they_need_on_the_cpu(optimizer):
    """So a step that peaks there differs by the workspace alone, and by dropout masks of a byte."""
    config, totals = GPT2Config(n_layer=1, n_embd=256, n_head=4), {}
    for device in ("cpu", "cuda"):
        memory = measure(config, batch=1, seq=4, optimizer=optimizer, device=device)
        totals[device] = memory.total - memory.parts.get("workspace", 0)
    assert totals["cuda"] == pytest.approx(totals["cpu"], rel=1e-3)


def state_of(model):
    """All that a measurement could change, as values."""
    modules = list(model.modules())
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in model.parameters()],
        [(m, m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in modules],
        [getattr(module, "gradient_checkpointing", None) for module in modules],
        model.config.to_dict(),
        torch.get_rng_state(),
    )


def assert_same(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=0, atol=0, equal_nan=True)
    for (trains, grad), (trains_too, other) in zip(a[1], b[1], strict=True):
        assert trains == trains_too and (grad is None) == (other is None)
        assert grad is None or torch.equal(grad, other)
    assert a[2:5] == b[2:5] and torch.equal(a[5], b[5])


@pytest.mark.parametrize("on", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "adamw-foreach", "adamw8bit", "sgd"])
def test_a_model_is_left_as_it_was(on, checkpointing, optimizer):
    model, _ = load_base("tiny-gpt2", device="cpu")
    model.transformer.h[0].train()  # modes that differ
    model.transformer.wte.requires_grad_(False)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    if on:
        model.gradient_checkpointing_enable()
    before = state_of(model)
    options = {"batch": 2, "seq": 16, "checkpointing": checkpointing, "optimizer": optimizer}
    first = measure(model, **options)
    assert_same(before, state_of(model))
    assert measure(model, **options).total == first.total
    assert measure(model, lambda m: only_head(m, untie=True), **options).total > 0
    assert_same(before, state_of(model))
    assert model.is_gradient_checkpointing == on


def test_a_model_is_left_as_it_was_also_when_the_step_fails():
    model, _ = load_base("tiny", device="cpu")
    model.gradient_checkpointing_enable()
    model.lm_head.weight.grad = torch.ones_like(model.lm_head.weight)
    before = state_of(model)

    def fails(model):
        add_lora(model)
        model.model.norm.register_forward_hook(lambda *_: 1 / 0)
        return model

    with pytest.raises(ZeroDivisionError):
        measure(model, fails, seq=8)
    assert_same(before, state_of(model))
    assert not hasattr(model, "minipeft")
    with pytest.raises(ValueError, match="it must return the model"):
        measure(model, lambda m: None, seq=8)
    with pytest.raises(ValueError, match="MemTracker puts a hook"):
        measure(model, add_lora, seq=8, tracker="torch")
    assert_same(before, state_of(model))


def test_gradients_that_are_not_finite_change_no_weight():
    model, _ = load_base("tiny", device="cpu")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    before = state_of(model)
    for optimizer in ("adamw", "adamw-foreach", "adamw8bit", "sgd"):
        measure(model, seq=8, optimizer=optimizer)
        assert_same(before, state_of(model))


def test_the_allocators_peak_is_taken_without_what_else_there_is(monkeypatch):
    """A GPU that holds 1 GiB of something else and 100 bytes of this model, and gives back 64 MiB
    of workspaces when asked to."""
    calls, allocated = [], [2**30 + 100 + 2**26]

    def clear():
        calls.append("clear")
        allocated[0] -= 2**26

    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: calls.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: allocated[0])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: calls.append("reset"))
    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", clear, raising=False)
    assert bytes_of_others(torch.device("cuda"), 100) == 2**30
    assert calls == ["synchronize", "clear", "reset"]


def test_torchs_own_tracker_finds_the_same_peak():
    for config, options in (
        (GPT2Config(), {"batch": 8, "seq": 200}),  # the peak is at the loss
        (GPT2Config(n_layer=3), {"batch": 1, "seq": 64, "optimizer": "sgd"}),  # at the embedding
        (LlamaConfig(num_hidden_layers=3), {"batch": 1, "seq": 50}),  # at the optimizer's step
        (BloomConfig(n_layer=3), {"batch": 8, "seq": 300, "checkpointing": True}),
    ):
        own, theirs = (measure(config, **options, tracker=t) for t in ("own", "torch"))
        assert own.total == pytest.approx(theirs.total, rel=1e-6)
    with pytest.raises(ValueError, match="MemTracker puts a hook"):
        measure(GPT2Config(n_layer=1), lambda m: unfreeze(freeze(m), "lm_head"), tracker="torch")


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-bloom", "tiny-gpt_neox"])
def test_a_real_model_keeps_what_the_saved_tensor_hooks_see(name):
    model, _ = load_base(name, device="cpu")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ids = torch.zeros(3, 40, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone(), "use_cache": False}
    measured = measure(model, batch=3, seq=40)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    model.train()
    log_probs = 3 * 40 * model.config.vocab_size * 4
    del inputs["use_cache"]
    model.config.use_cache = False
    hooks = saved_bytes(model, inputs) - log_probs
    # The loss keeps its shifted labels (8 bytes a token) and two scalars.
    assert abs(hooks - measured.parts["activations"]) <= 3 * 40 * 8 + 16
    fake = measure(model.config, batch=3, seq=40)
    assert fake.parts["activations"] == pytest.approx(measured.parts["activations"], rel=1e-3)
    assert fake.total == pytest.approx(measured.total, rel=1e-3)


def test_what_is_no_causal_language_model_is_refused_by_name():
    classifier = LlamaConfig(architectures=["LlamaForSequenceClassification"])
    for config, name in (
        (classifier, "LlamaForSequenceClassification"),
        (BertConfig(architectures=["BertForMaskedLM"]), "BertForMaskedLM"),
        (T5Config(), "a model of type 't5'"),
    ):
        with pytest.raises(ValueError, match=f"causal language models; {name} is none"):
            measure(config)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is none"):
        estimate(classifier)
    model, _ = load_base("tiny", device="cpu")
    small = AutoModelForSequenceClassification.from_config(model.config)
    with pytest.raises(ValueError, match="LlamaForSequenceClassification is none"):
        measure(small)
    for function, what in ((estimate, model), (estimate, "llama"), (measure, nn.Linear(2, 2))):
        with pytest.raises(ValueError, match=f"was given a {type(what).__name__}"):
            function(what)
    with pytest.raises(ValueError, match="attention='eager', but this model was loaded with"):
        measure(model, attention="eager")
    with pytest.raises(ValueError, match="dtype=torch.bfloat16, but this model was loaded in"):
        measure(model, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="device='cuda', but this model is on 'cpu'"):
        measure(model, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the allocator's peak needs CUDA")
def test_the_allocators_peak_on_cuda():
    model, _ = load_base("tiny-llama", device="cuda")
    measured = measure(model, batch=4, seq=128)
    assert measured.total >= sum(measured.parts[name] for name in ("parameters", "optimizer"))
    other = torch.ones(2**28, device="cuda")  # 1 GiB of something else
    assert measure(model, batch=4, seq=128).total == pytest.approx(measured.total, rel=0.001)
    del other
    predicted = estimate(model.config, batch=4, seq=128, device="cuda")
    assert predicted.total == pytest.approx(measured.total, rel=0.05)


def test_the_callers_configuration_stays_as_it_is():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=101, tie_word_embeddings=True,
    )  # fmt: skip
    before = config.to_dict()
    untied = measure(config, lambda m: only_head(m, untie=True), batch=1, seq=8)
    assert estimate(config, batch=1, seq=8).total > 0 and config.to_dict() == before
    tied = measure(config, only_head, batch=1, seq=8)
    assert untied.parts["parameters"] - tied.parts["parameters"] == 4 * 101 * 32
