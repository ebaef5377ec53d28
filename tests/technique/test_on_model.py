"""A technique is put on a model wholly or not at all."""

import copy

import peft
import pytest
import torch
from soft import METHODS as SOFT
from soft import traces
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from minipeft import add_adapters, add_lora, load_adapter, load_base, save_adapter, unload_lora
from minipeft.technique.on_model import adding, evaluating, freeze_base, heads

METHODS = SOFT | {"lora": add_lora, "adapters": add_adapters}
EACH = pytest.mark.parametrize("method", METHODS)


class Broken(torch.nn.Module):
    """A stand-in for a block that a trial cannot pass."""

    def forward(self, *args, **kwargs):
        raise RuntimeError("out of order")


def test_whatever_is_raised_inside_leaves_the_model_as_it_was():
    model, _ = load_base("tiny", device="cpu")
    model.train()
    model.model.norm.eval()
    next(model.parameters()).grad = torch.ones_like(next(model.parameters()))
    before = traces(model)
    with pytest.raises(KeyError), adding(model, "lora"):
        freeze_base(model)
        model.extra = torch.nn.Linear(2, 2)
        model.register_forward_pre_hook(print)
        model.lm_head = torch.nn.Identity()
        model.model.layers[0].mlp.down_proj.half()
        model.eval()
        raise KeyError("anything")
    assert traces(model) == before


@EACH
def test_a_model_that_fails_its_trial_is_left_alone(method):
    model, _ = load_base("tiny", device="cpu")
    model.model.layers[1].mlp = Broken()
    before = traces(model)
    with pytest.raises(ValueError):
        METHODS[method](model)
    assert traces(model) == before


@EACH
def test_a_model_of_hf_peft_is_refused_and_left_alone(method):
    theirs = peft.get_peft_model(load_base("tiny", device="cpu")[0], peft.LoraConfig(
        target_modules=["q_proj"], task_type="CAUSAL_LM"))  # fmt: skip
    for model in (theirs, theirs.base_model.model):
        before = traces(model)
        with pytest.raises(ValueError, match="adapter of HF peft already"):
            METHODS[method](model)
        assert traces(model) == before


@EACH
def test_adding_takes_no_random_numbers_but_its_own_start_and_keeps_the_modes(method):
    model, _ = load_base("tiny", device="cpu")
    model.train()
    model.model.layers[0].eval()
    METHODS[method](model)
    assert model.training and model.model.layers[1].training
    assert not model.model.layers[0].input_layernorm.training


@EACH
def test_a_tuned_model_is_not_saved_as_a_plain_one(method, tmp_path):
    model, _ = load_base("tiny", device="cpu")
    METHODS[method](model)
    for tuned in (model, copy.deepcopy(model)):
        with pytest.raises(ValueError, match=r"call save_adapter\(model, folder\)"):
            tuned.save_pretrained(tmp_path / "plain")
        assert not (tmp_path / "plain").exists()
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(load_base("tiny", device="cpu")[0], tmp_path / "adapter")
    with pytest.raises(ValueError, match="save_adapter"):
        again.save_pretrained(tmp_path / "plain")


def test_a_model_whose_lora_is_off_saves_as_ever(tmp_path):
    model = unload_lora(add_lora(load_base("tiny", device="cpu")[0]))
    model.save_pretrained(tmp_path)
    ids = torch.arange(20, 29)[None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def classifiers():
    sizes = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 80, "pad_token_id": 0, "num_labels": 3,
    }  # fmt: skip
    return {
        "score": LlamaForSequenceClassification(LlamaConfig(**sizes)),
        "classifier": BertForSequenceClassification(BertConfig(**sizes)),
    }


@pytest.mark.parametrize("head", ["score", "classifier"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_new_head_of_a_classifier_is_trained_in_float32(head, dtype):
    model = classifiers()[head].to(dtype)
    assert list(heads(model)) == [head]
    freeze_base(model)
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained} == {head}
    assert set(trained.values()) == {torch.float32}
    assert model(torch.arange(20, 29)[None]).logits.dtype == torch.float32


def test_a_language_model_has_no_head_of_that_kind():
    model, _ = load_base("tiny-qwen2", device="cpu")
    assert heads(model) == {} == heads(model.model)
    freeze_base(model)
    assert not any(p.requires_grad for p in model.parameters())


def test_evaluating_gives_each_module_its_own_mode_back():
    model, _ = load_base("tiny", device="cpu")
    model.train()
    model.model.norm.eval()
    with pytest.raises(RuntimeError), evaluating(model):
        assert not any(module.training for module in model.modules())
        raise RuntimeError
    assert model.training and not model.model.norm.training
