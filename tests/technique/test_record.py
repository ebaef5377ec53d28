"""A technique comes off again: the base bit for bit, and nothing of the technique left on it."""

import copy

import pytest
import torch
from soft import METHODS as SOFT
from soft import traces
from transformers import BertConfig, BertForSequenceClassification

from minipeft import (
    add_adapters,
    add_lora,
    add_p_tuning_v2,
    disabled,
    fold_p_tuning_v2,
    load_base,
    merge_lora,
    remove,
    save_adapter,
    train,
    unload_lora,
)

BLOOM = {"targets": "query_key_value"}
METHODS = SOFT | {
    "lora": lambda model: add_lora(model, targets=targets(model)),
    "dora": lambda model: add_lora(model, targets=targets(model), dora=True),
    "embedding": lambda model: add_lora(model, targets=embedding(model)),
    "adapters": lambda model: add_adapters(model, 4),
    "folded": lambda model: fold_p_tuning_v2(add_p_tuning_v2(model, 3, "hidden")),
}
IDS = torch.randint(8, 90, (2, 9), generator=torch.Generator().manual_seed(0))
IDS[:, 1:4] = 7  # the placeholder of a template


def targets(model):
    return {"llama": ("q_proj", "v_proj"), "gpt2": "c_attn"}.get(
        model.config.model_type, "query_key_value"
    )


def embedding(model):
    return {"llama": "embed_tokens", "gpt2": "wte"}.get(model.config.model_type, "word_embeddings")


def tuned(name, method):
    """A base, what it answers, its traces, and the same model with a method as if trained."""
    model, _ = load_base(name, device="cpu")
    base, before = model(IDS).logits, traces(model)
    METHODS[method](model)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p), alpha=0.5)
    assert not torch.equal(model(IDS).logits, base)
    return model, base, before


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-gpt2", "tiny-bloom"])
@pytest.mark.parametrize("method", METHODS)
def test_removed_it_is_the_base_and_takes_another_technique(name, method):
    model, base, before = tuned(name, method)
    assert remove(model) is model
    assert torch.equal(model(IDS).logits, base) and traces(model) == before
    METHODS["lora"](model)
    assert torch.equal(model(IDS).logits, base)


@pytest.mark.parametrize("method", METHODS)
def test_disabled_it_answers_as_the_base_and_then_as_tuned(method):
    model, base, _ = tuned("tiny-llama", method)
    after, during = model(IDS).logits, traces(model)
    with pytest.raises(KeyError), disabled(model) as same:
        assert same is model and torch.equal(model(IDS).logits, base)
        raise KeyError("anything")
    assert torch.equal(model(IDS).logits, after)
    assert traces(model) == during


def test_disabled_twice_is_disabled_once_and_the_mode_reaches_the_technique():
    model, base, _ = tuned("tiny-llama", "lora")
    after = model(IDS).logits
    with disabled(model):
        with disabled(model):
            assert torch.equal(model(IDS).logits, base)
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, after)
    model.train()
    with disabled(model):
        model.eval()
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("method", METHODS)
def test_a_copy_comes_off_alone(method):
    model, base, _ = tuned("tiny-llama", method)
    after, twin = model(IDS).logits, copy.deepcopy(model)
    with disabled(twin):
        assert torch.equal(twin(IDS).logits, base) and torch.equal(model(IDS).logits, after)
    assert torch.equal(twin(IDS).logits, after)
    remove(twin)
    assert torch.equal(twin(IDS).logits, base) and torch.equal(model(IDS).logits, after)


def test_what_a_user_does_after_adding_stays():
    model, _ = load_base("tiny", device="cpu")
    model.train().requires_grad_(False)
    model.lm_head.requires_grad_(True)
    add_lora(model)
    model.eval()
    calls = []
    model.model.norm.register_forward_hook(lambda *args: calls.append(1))
    model.note = "mine"
    remove(model)
    model(IDS)
    assert calls == [1] and model.note == "mine" and not model.training
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == {"model.embed_tokens.weight"}  # tied to the head


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("add", [add_p_tuning_v2, lambda m: add_lora(m, targets=["query"])])
def test_a_trained_head_has_its_old_weights_again(add, dtype):
    config = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=3,
                        intermediate_size=48, vocab_size=96)  # fmt: skip
    model = BertForSequenceClassification(config).to(dtype).eval()
    base, before = model(IDS).logits, traces(model)
    add(model)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    train(model, [batch | {"labels": torch.tensor([0, 2])}], max_steps=3, lr=0.1, progress=False)
    after = model.eval()(IDS).logits
    with disabled(model):
        assert torch.equal(model(IDS).logits, base)
    assert torch.equal(model(IDS).logits, after) and not torch.equal(after, base)
    remove(model)
    assert torch.equal(model(IDS).logits, base) and traces(model)[0] == before[0]


def test_merged_or_without_a_technique_it_is_refused(tmp_path):
    model, _ = load_base("tiny", device="cpu")
    with pytest.raises(ValueError, match="This LlamaForCausalLM has no technique; add one first"):
        remove(model)
    add_lora(model)
    merge_lora(model)
    for take_off in (remove, lambda model: disabled(model).__enter__()):
        with pytest.raises(ValueError, match="call unmerge_lora first, or unload_lora to keep"):
            take_off(model)
    unload_lora(model)
    with pytest.raises(ValueError, match="has no technique"):
        remove(model)
    add_lora(model)
    remove(model)
    with pytest.raises(ValueError, match="no adapter on this model"):
        save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "base")
