"""Freezing by module, and counting."""

import pytest
import torch

from minipeft import count_parameters, freeze, load_base, unfreeze
from minipeft.freezing import at_least_float32, modules_named

NAMES = ["tiny-llama", "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox"]
EVERY = pytest.mark.parametrize("name", NAMES)


@EVERY
def test_every_tensor_is_counted_once(name):
    model, _ = load_base(name, device="cpu")
    storages = {
        t.data_ptr(): t.numel() for t in model.state_dict().values() if t.is_floating_point()
    }
    parameters = {p.data_ptr() for p in model.parameters()}
    expected = sum(n for pointer, n in storages.items() if pointer in parameters)
    assert count_parameters(model) == (expected, expected)
    assert count_parameters(freeze(model)) == (0, expected)


def test_a_tied_head_counts_once():
    model, _ = load_base("tiny-gpt2", device="cpu")
    c = model.config
    h = c.n_embd
    block = 2 * 2 * h + (h * 3 * h + 3 * h) + (h * h + h) + (h * 4 * h + 4 * h) + (4 * h * h + h)
    expected = c.vocab_size * h + c.n_positions * h + c.n_layer * block + 2 * h
    assert count_parameters(model)[1] == expected


@EVERY
def test_a_frozen_parameter_has_no_gradient_at_all(name):
    model, _ = load_base(name, device="cpu")
    ids = torch.arange(4, 10)[None]
    model(ids, labels=ids).loss.backward()
    assert freeze(model) is model
    assert all(p.grad is None for p in model.parameters()), "an old gradient would still be applied"
    last = [n for n, _ in model.named_modules() if n.endswith(".1")][0]
    unfreeze(model, last)
    model(ids, labels=ids).loss.backward()
    for key, p in model.named_parameters():
        inside = key.startswith(f"{last}.")
        assert p.requires_grad == inside and (p.grad is not None) == inside


def test_patterns():
    model, _ = load_base("tiny-llama", device="cpu")
    freeze(model)
    unfreeze(model, "*norm")
    on = {name for name, p in model.named_parameters() if p.requires_grad}
    assert on == {name for name, _ in model.named_parameters() if "norm" in name}
    unfreeze(freeze(model), "model.layers.0.mlp", "model.layers.1.self_attn.q_proj")
    assert sum(p.requires_grad for p in model.parameters()) == 3 + 1
    unfreeze(model)
    assert all(p.requires_grad for p in model.parameters())
    freeze(model)
    unfreeze(model, "lm_head")  # tied: the embedding is the same tensor
    assert model.get_input_embeddings().weight.requires_grad


def test_a_pattern_that_matches_nothing_is_refused_with_its_neighbours():
    model, _ = load_base("tiny-llama", device="cpu")
    freeze(model)
    with pytest.raises(ValueError, match=r"named 'model.layer.0'; near it are .*model\.layers\.0"):
        unfreeze(model, "model.layer.0")
    with pytest.raises(ValueError, match="No module with parameters is named 'model.rotary_emb'"):
        unfreeze(model, "model.rotary_emb")
    with pytest.raises(ValueError):
        unfreeze(model, "lm_head", "no_such_module")
    assert count_parameters(model)[0] == 0, "a refused call must not unfreeze half of it"


def test_endings_match_whole_components():
    model, _ = load_base("tiny-llama", device="cpu")
    linear = (torch.nn.Linear,)
    found = [name for name, _ in modules_named(model, ["q_proj", "1.self_attn.v_proj"], linear)]
    assert found == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)] + [
        "model.layers.1.self_attn.v_proj"
    ]
    with pytest.raises(ValueError, match="no linear layer named 'proj'"):
        modules_named(model, ["proj"], linear)


def test_trainables_are_float32_or_wider():
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [at_least_float32(kind) for kind in kinds] == [torch.float32] * 3 + [torch.float64]
