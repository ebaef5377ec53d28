"""load_base: five tiny architectures, the real model, folders, and every wrong name."""

import pytest
import torch

from minipeft import AssetError, budget, load_base, pick_device
from minipeft.models import TINY

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
