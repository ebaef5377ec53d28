"""Prefix-tuning: counts, layout, fold. What it shares is in test_virtual_tokens."""

import pytest
import torch
from soft import NAMES, batch_of, close, tuned
from transformers import BloomConfig, BloomForCausalLM, DynamicCache

from minipeft import add_prefix_tuning, count_parameters, fold_prefix_tuning, load_base

EVERY = pytest.mark.parametrize("name", NAMES)


def bloom_1b4_zh():
    """The architecture of Langboat/bloom-1b4-zh without a single number in it."""
    config = BloomConfig(vocab_size=46_145, hidden_size=2_048, n_layer=24, n_head=16)
    with torch.device("meta"):
        return BloomForCausalLM(config)


def test_the_counts_of_bloom_1b4_zh():
    """By hand: 10 * 24 * 2 * 2048, and 10 * 2048 + an MLP from 2048 to 2048 to 98304."""
    assert count_parameters(bloom_1b4_zh())[1] == 1_303_111_680
    plain = count_parameters(add_prefix_tuning(bloom_1b4_zh(), 10))
    assert plain == (983_040, 1_303_111_680 + 983_040) and 983_040 == 10 * 24 * 2 * 2048
    projected = count_parameters(add_prefix_tuning(bloom_1b4_zh(), 10, projection=True))
    mlp = (2048 * 2048 + 2048) + (2048 * 98_304 + 98_304)
    assert projected == (205_641_728, 1_303_111_680 + 205_641_728)
    assert 205_641_728 == 10 * 2048 + mlp


@EVERY
def test_counted_by_formula(name):
    model, _ = load_base(name, device="cpu")
    kv = 16 if name in ("tiny-llama", "tiny-qwen2") else 32  # two key-value heads of four, by 8
    assert count_parameters(add_prefix_tuning(model, 5))[0] == 5 * 2 * 2 * kv
    model, _ = load_base(name, device="cpu")
    add_prefix_tuning(model, 5, projection=True, encoder_hidden_size=6)
    mlp = (kv * 6 + 6) + (6 * 4 * kv + 4 * kv)
    assert count_parameters(model)[0] == 5 * kv + mlp
    model, _ = load_base(name, device="cpu")
    add_prefix_tuning(model, 5, projection=True)
    assert count_parameters(model)[0] == 5 * kv + (kv * kv + kv) + (kv * 4 * kv + 4 * kv)


@EVERY
@pytest.mark.parametrize("method", ["prefix", "projected"])
def test_the_prefix_is_a_cache_that_no_text_has_written(name, method):
    """By hand: the frozen model, a cache filled before the call, mask and positions from n on."""
    model, plain = tuned(name, method), load_base(name, device="cpu", dtype=torch.float64)[0]
    batch, n = batch_of(4, 3, 6), 3
    table = model.virtual_tokens.table().detach()  # (n, layers * 2 * kv_heads * head_dim)
    rows = table.view(n, 2, 2, -1, 8)  # (n, layers, keys or values, kv_heads, head_dim)
    cache = DynamicCache()
    for layer in range(2):
        keys, values = (rows[:, layer, i].transpose(0, 1).repeat(3, 1, 1, 1) for i in (0, 1))
        cache.update(keys, values, layer)  # (batch, kv_heads, n, head_dim) each
    mask = torch.cat([torch.ones(3, n, dtype=torch.int64), batch["attention_mask"]], 1)
    expected = plain(batch["input_ids"], attention_mask=mask, past_key_values=cache).logits
    real = batch["attention_mask"].bool()
    assert close(model(**batch).logits[real], expected[real])


@EVERY
def test_folding_changes_nothing_but_the_parameters(name):
    model = tuned(name, "projected")
    batch = batch_of(2, 3, 6)
    expected = model(**batch).logits
    base = count_parameters(model)[1] - count_parameters(model)[0]
    table = model.virtual_tokens.table().numel()
    assert fold_prefix_tuning(model) is model
    assert torch.equal(model(**batch).logits, expected)
    assert count_parameters(model) == (table, base + table)
    model.train().gradient_checkpointing_enable()
    model(**batch, use_cache=False).loss.backward()
    assert model.virtual_tokens.embedding.weight.grad.any(), "the table trains on"
    for other in (model, tuned(name, "prefix"), tuned(name, "hidden")):
        with pytest.raises(ValueError, match="no projected prefix on this model to fold"):
            fold_prefix_tuning(other)


@EVERY
@pytest.mark.parametrize("method", ["prefix", "projected"])
def test_a_layer_is_its_part_of_the_whole(name, method):
    virtual = tuned(name, method).virtual_tokens
    whole = virtual()  # (layers, 2, kv_heads, n, head_dim)
    for layer in range(2):
        assert torch.allclose(virtual(layer), whole[layer], rtol=1e-12)


def test_every_token_sees_the_prefix_and_the_prefix_sees_nothing():
    """Gradients tell who sees whom: the prefix reaches the first token, no token the prefix."""
    model = tuned("tiny-llama", "prefix")
    ids = torch.arange(20, 26)[None]
    (grad,) = torch.autograd.grad(
        model(ids).logits[0, 0].sum(), model.virtual_tokens.embedding.weight
    )
    assert (grad.abs().sum(-1) > 0).all(), "the first token sees all of it"
    first = model(ids, use_cache=True).past_key_values.layers[1].keys[:, :, :3]
    other = model(ids + 40, use_cache=True).past_key_values.layers[1].keys[:, :, :3]
    assert torch.equal(first, other), "whatever the text is, the prefix is the same"


def test_bad_input_is_refused_and_the_model_left_alone():
    model, _ = load_base("tiny", device="cpu")
    for options, message in (
        ({"projection": True, "text": "abc"}, "An MLP cannot be made to start at a text"),
        ({"encoder_hidden_size": 8}, "it needs projection=True"),
        (
            {"projection": True, "encoder_hidden_size": 2.5},
            "encoder_hidden_size=2.5 is not a width",
        ),
        ({"projection": True, "encoder_hidden_size": 0}, "encoder_hidden_size=0 is not a width"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens=None is not a length"),
    ):
        with pytest.raises(ValueError, match=message):
            add_prefix_tuning(model, **options)
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        add_prefix_tuning(model.model)


def test_a_prefix_starts_small():
    """At deviation 0.1; with peft's 1 the untrained prefix drowns the text."""
    torch.manual_seed(0)
    model = add_prefix_tuning(load_base("tiny-llama", device="cpu")[0], 400)
    table = model.virtual_tokens.embedding.weight  # 25,600 numbers: 0.1 to within 2 %
    assert abs(table.std() - 0.1) < 0.002 and abs(table.mean()) < 0.003
