"""load_base: five tiny architectures, the real model, folders, and every wrong name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from minipeft import AssetError, budget, load_base, pick_device
from minipeft.assets.models import TINY

CLASSES = {
    "tiny-llama": "LlamaForCausalLM",
    "tiny-gpt2": "GPT2LMHeadModel",
    "tiny-bloom": "BloomForCausalLM",
    "tiny-qwen2": "Qwen2ForCausalLM",
    "tiny-gpt_neox": "GPTNeoXForCausalLM",
}


@pytest.mark.parametrize("name", TINY)
def test_tiny_models(name):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    model, tokenizer = load_base(name, device="cpu", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert type(model).__name__ == CLASSES[name] and not model.training
    assert model.config.num_hidden_layers == 2 and model.dtype == torch.float32
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    again, other = (load_base(name, device="cpu", seed=s)[0].state_dict() for s in (1, 2))
    state = model.state_dict()
    assert all(torch.equal(state[key], again[key]) for key in state)
    assert any(not torch.equal(state[key], other[key]) for key in state)
    encoded = tokenizer("some text", return_tensors="pt")
    with torch.no_grad():  # no dropout: two passes in training mode agree
        a, b = (model.train()(**encoded).logits for _ in range(2))
    assert torch.equal(a, b) and a.shape[-1] == len(tokenizer)


@pytest.mark.parametrize("name", TINY)
def test_tiny_weights_are_those_of_the_seed_and_of_nothing_else(name, monkeypatch):
    """As transformers draws them after torch.manual_seed, whatever the caller has set; and the
    generators of no GPU are seeded."""
    model, _ = load_base(name, device="cpu", seed=4)
    torch.manual_seed(4)
    expected = AutoModelForCausalLM.from_config(model.config).state_dict()
    seeded = []
    for module in (torch.cuda, torch.mps, torch.xpu):
        for function in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(module, function, seeded.append, raising=False)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            again, _ = load_base(name, device="cpu", seed=4)
    finally:
        torch.set_default_dtype(torch.float32)
    found = again.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected) and not seeded


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_tiny_models_leave_the_random_state_of_the_gpu_alone():
    torch.cuda.manual_seed(9)
    before = torch.cuda.get_rng_state()
    load_base("tiny")
    assert torch.equal(torch.cuda.get_rng_state(), before)


def test_tiny_is_tiny_llama_with_grouped_queries(tiny):
    model, _ = tiny
    config = model.config
    assert type(model).__name__ == "LlamaForCausalLM"
    assert config.num_key_value_heads < config.num_attention_heads


def test_byte_tokenizer(tiny):
    _, tokenizer = tiny
    text = " \tnaïve 你好 🙂\n  x <y>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(ids) == len(text.encode())
    special = {tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
    assert len(special) == 3 and None not in special and not special & set(ids)
    prompt = tokenizer("Sentiment:")["input_ids"]
    firsts = set()
    for answer in (" positive", " negative"):
        own = tokenizer(answer)["input_ids"]
        assert tokenizer("Sentiment:" + answer)["input_ids"] == prompt + own
        firsts.add(own[0])
    assert len(firsts) == 2


def test_a_saved_folder_loads_with_equal_logits(tmp_path, tiny):
    model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, same = load_base(tmp_path, device="cpu")
    encoded = same("abc", return_tensors="pt")
    assert torch.equal(model(**encoded).logits, loaded(**encoded).logits)
    assert load_base(str(tmp_path), device="cpu", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_tokenizer_without_pad_pads_with_eos(tmp_path, tiny):
    model, tokenizer = tiny
    tokenizer.pad_token = None
    model.config.pad_token_id = model.generation_config.pad_token_id = None
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_base(tmp_path, device="cpu")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    tokenizer.eos_token = tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(AssetError, match="neither a pad nor an end token"):
        load_base(tmp_path, device="cpu")


def _message(name):
    with pytest.raises(AssetError) as caught:
        load_base(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_no_model(tmp_path, capfd):
    assert "no config.json" in _message(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert "holds no causal language model" in _message(tmp_path)
    assert "no folder" in _message("/nowhere/at/all")
    assert "no folder" in _message("")
    assert "tiny-llama" in _message("tiny-lama") and "spelling" in _message("tiny-lama")
    assert "hub" in _message("some-owner/some-model")
    assert capfd.readouterr() == ("", "")


def test_a_pickled_model_is_refused(tmp_path, tiny):
    model, tokenizer = tiny
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert "holds no causal language model" in _message(tmp_path)


def _saved(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _change(folder, **settings):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | settings))


SMALL = {"vocab_size": 261, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 64}  # fmt: skip


def test_code_in_a_folder_is_neither_run_nor_asked_for(tmp_path, tiny, monkeypatch):
    folder = _saved(tmp_path / "model", *tiny)
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    _change(folder, model_type="mine", auto_map=auto_map)
    trace, asked = tmp_path / "trace", []
    (folder / "mine.py").write_text(f"open({str(trace)!r}, 'w')\nclass Config: pass\n")
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    assert "contains custom code" in _message(folder)
    assert not trace.exists() and not asked


def test_a_model_that_lacks_or_has_more_than_its_file_is_refused(tmp_path, tiny):
    """transformers fills in random numbers, or leaves weights out, and goes on."""
    model, tokenizer = tiny
    folder = _saved(tmp_path / "layers", model, tokenizer)
    _change(folder, num_hidden_layers=3)
    assert "lacks model.layers.2.input_layernorm.weight and 8 more" in _message(folder)
    _change(folder, num_hidden_layers=1)
    assert "has model.layers.1.input_layernorm.weight and 8 more" in _message(folder)
    _change(folder, num_hidden_layers=2, hidden_size=16)
    assert "holds no causal language model" in _message(folder)
    model.config.tie_word_embeddings = False
    folder = _saved(tmp_path / "backbone", model.model, tokenizer)
    assert "lacks lm_head.weight" in _message(folder)
    classifier = LlamaForSequenceClassification(load_base("tiny", device="cpu")[0].config)
    folder = _saved(tmp_path / "classifier", classifier, tokenizer)
    assert "has score.weight, which LlamaForCausalLM would leave out" in _message(folder)


def test_what_is_no_causal_language_model_is_refused(tmp_path, tiny):
    tokenizer = tiny[1]
    bert = _saved(tmp_path / "bert", BertForMaskedLM(BertConfig(**SMALL)), tokenizer)
    assert "in BertLMHeadModel a token sees those after it" in _message(bert)
    sizes = {"d_model": 8, "vocab_size": 261}
    t5 = T5ForConditionalGeneration(T5Config(**sizes, d_kv=4, d_ff=8, num_layers=2, num_heads=2))
    assert "holds no causal" in _message(_saved(tmp_path / "t5", t5, tokenizer))
    layers = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 8, "decoder_ffn_dim": 8,
              "encoder_attention_heads": 2, "decoder_attention_heads": 2}  # fmt: skip
    bart = BartForConditionalGeneration(BartConfig(**sizes, **layers))
    assert "BartForCausalLM would" in _message(_saved(tmp_path / "bart", bart, tokenizer))


def test_damaged_weights_are_refused(tmp_path, tiny):
    folder = _saved(tmp_path, *tiny)
    file = folder / "model.safetensors"
    whole = load_file(file)
    broken = {key: tensor.clone() for key, tensor in whole.items()}
    broken["model.norm.weight"][3] = float("nan")
    save_file(broken, file, {"format": "pt"})
    assert "not finite" in _message(folder)
    save_file(whole, file, {"format": "pt"})
    file.write_bytes(file.read_bytes()[:-100])
    assert "holds no causal language model" in _message(folder)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tiny):
    model, tokenizer = tiny
    model.resize_token_embeddings(100)
    assert "has 261 tokens, and LlamaForCausalLM knows 100" in _message(
        _saved(tmp_path, model, tokenizer)
    )


def test_budget_and_device(monkeypatch):
    monkeypatch.delenv("MINIPEFT_BUDGET", raising=False)
    assert budget() == ("quick" if pick_device().type == "cpu" else "full")
    for word in ("quick", "full"):
        monkeypatch.setenv("MINIPEFT_BUDGET", word)
        assert budget() == word
    monkeypatch.setenv("MINIPEFT_BUDGET", "fast")
    with pytest.raises(ValueError, match="quick or full"):
        budget()


def test_the_base_model(base, capfd):
    model, tokenizer = base
    assert model.num_parameters() == 134_515_008
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer("Hi")["input_ids"][0] != tokenizer.bos_token_id
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    encoded = tokenizer("The capital of France is", return_tensors="pt")
    out = model.generate(**encoded, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(out[0])
    assert capfd.readouterr() == ("", "")  # not a warning, not a progress bar
