"""Freezing by module, and counting."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    Gemma3Config,
    GPTNeoConfig,
    MambaConfig,
    ModernBertDecoderConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLMConfig,
)

from minipeft import count_parameters, freeze, load_base, unfreeze
from minipeft.freezing import (
    at_least_float32,
    blocks,
    count_by_module,
    modules_named,
    only_biases,
    only_head,
    only_last_blocks,
    only_norms,
)
from minipeft.quantization import quantize_base

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


def test_a_pattern_that_matches_nothing_is_refused_with_its_neighbors():
    model, _ = load_base("tiny-llama", device="cpu")
    freeze(model)
    with pytest.raises(ValueError, match=r"named 'model.layer.0'; near it are .*model\.layers\.0"):
        unfreeze(model, "model.layer.0")
    with pytest.raises(ValueError, match="No module with parameters is named 'model.rotary_emb'"):
        unfreeze(model, "model.rotary_emb")
    with pytest.raises(ValueError):
        unfreeze(model, "lm_head", "no_such_module")
    assert count_parameters(model)[0] == 0, "a refused call must not unfreeze half of it"


@pytest.mark.parametrize("pattern", ["", None, 3, True, ["model.layers.0"], 1.5, b"lm_head"])
def test_what_is_no_pattern_is_refused(pattern):
    model, _ = load_base("tiny-llama", device="cpu")
    freeze(model)
    with pytest.raises(ValueError, match="is not a pattern; give names"):
        unfreeze(model, "lm_head", pattern)
    assert count_parameters(model)[0] == 0, "an empty name is that of the whole model"


def test_quantized_weights_are_not_left_out_in_silence():
    model, _ = load_base("tiny-gpt2", device="cpu")
    quantize_base(model)
    for call in (
        lambda: unfreeze(model),
        lambda: unfreeze(model, "transformer.wte", "transformer.h.1"),
        lambda: only_last_blocks(model, 1),
    ):
        with pytest.raises(ValueError, match=r"h\.\d.* is quantized, and codes cannot be trained"):
            call()
        assert not trainables(model)
    unfreeze(model, "*ln_1")
    assert len(trainables(model)) == 4
    assert len(trainables(only_norms(model))) == 10
    foreign = torch.nn.Linear(4, 4)
    foreign.weight = torch.nn.Parameter(foreign.weight.detach().byte(), requires_grad=False)
    with pytest.raises(ValueError, match="is quantized"):
        unfreeze(torch.nn.Sequential(foreign))


def test_endings_match_whole_components():
    model, _ = load_base("tiny-llama", device="cpu")
    linear = (torch.nn.Linear,)
    found = [name for name, _ in modules_named(model, ["q_proj", "1.self_attn.v_proj"], linear)]
    assert found == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)] + [
        "model.layers.1.self_attn.v_proj"
    ]
    with pytest.raises(ValueError, match="no layer named 'proj'"):
        modules_named(model, ["proj"], linear)


def test_trainables_are_float32_or_wider():
    kinds = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    assert [at_least_float32(kind) for kind in kinds] == [torch.float32] * 3 + [torch.float64]


WHERE = {  # where each architecture keeps its blocks, and the class of one
    "tiny-llama": ("model.layers", "LlamaDecoderLayer"),
    "tiny-gpt2": ("transformer.h", "GPT2Block"),
    "tiny-bloom": ("transformer.h", "BloomBlock"),
    "tiny-qwen2": ("model.layers", "Qwen2DecoderLayer"),
    "tiny-gpt_neox": ("gpt_neox.layers", "GPTNeoXLayer"),
}


@EVERY
def test_blocks_are_found_in_every_architecture(name):
    model, _ = load_base(name, device="cpu")
    path, kind = WHERE[name]
    assert blocks(model) is model.get_submodule(path)
    assert [type(block).__name__ for block in blocks(model)] == [kind] * 2
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    assert blocks(classifier) is classifier.get_submodule(path)


SIZES = {
    "vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
ODD = {  # configurations that name their layers in another way, and where the blocks are
    "two parts": (
        Gemma3Config(
            text_config={**SIZES, "num_key_value_heads": 2, "head_dim": 8},
            vision_config={"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                           "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
            mm_tokens_per_image=4,
        ),
        "model.language_model.layers",
    ),
    "num_layers": (
        GPTNeoConfig(vocab_size=40, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48,
                     attention_types=[[["global", "local"], 1]]),
        "transformer.h",
    ),
    "a decoder of two stacks": (
        BartConfig(vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=2,
                   encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
                   decoder_ffn_dim=16),
        "model.decoder.layers",
    ),
    "no attention": (
        MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=2),
        "backbone.layers",
    ),
    "a head named decoder": (ModernBertDecoderConfig(**SIZES), "model.layers"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_blocks_are_found_whatever_the_configuration_calls_them(name):
    config, path = ODD[name]
    model = AutoModelForCausalLM.from_config(config)
    assert blocks(model) is model.get_submodule(path) and len(blocks(model)) == 2
    inside = {n for n, _ in model.named_parameters() if n.startswith(f"{path}.1.")}
    assert trainables(only_last_blocks(model, 1)) == inside


def test_blocks_of_a_single_layer_are_not_taken_for_their_experts():
    model, _ = load_base("tiny-llama", device="cpu")
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    model.model.layers[0].mlp.experts = torch.nn.ModuleList([torch.nn.Linear(200, 200)])
    assert blocks(model) is model.model.layers


def test_blocks_in_several_lists_are_refused():
    """XLM keeps attentions and feed-forward layers apart, so that there are no blocks."""
    xlm = AutoModelForCausalLM.from_config(
        XLMConfig(vocab_size=40, emb_dim=16, n_layers=2, n_heads=2)
    )
    with pytest.raises(ValueError, match="4 lists as long as .* not in one of them"):
        blocks(xlm)
    with pytest.raises(ValueError, match="4 lists as long as"):
        only_last_blocks(xlm, 1)
    assert all(p.requires_grad for p in xlm.parameters())


def test_the_largest_list_is_taken_and_a_model_without_blocks_is_refused():
    model, _ = load_base("tiny-llama", device="cpu")
    model.aside = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    model.model.layers[0].experts = torch.nn.ModuleList([torch.nn.Linear(2, 2)] * 2)
    assert blocks(model) is model.model.layers
    model.config.num_hidden_layers = 3
    with pytest.raises(ValueError, match="LlamaForCausalLM has no list of blocks.* which is 3"):
        blocks(model)
    with pytest.raises(ValueError, match="Linear has no list of blocks.* which is None"):
        blocks(torch.nn.Linear(2, 2))
    both = T5ForConditionalGeneration(
        T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2, vocab_size=8)
    )
    with pytest.raises(ValueError, match="T5ForConditionalGeneration has two stacks"):
        blocks(both)


H, INNER, KV, V = 32, 64, 16, 261  # hidden, inner and key-value width of the tiny ones; vocabulary
# Entries of one block, by arithmetic: [all, those of norms, those of biases]
FOUR = 4 * H * H + 4 * H * H + 3 * H + H + 4 * H + H + H * 3 * H + H * H  # GPT-2 and Bloom
SMALL = 2 * INNER * H + INNER + H + 3 * H + H + H * 3 * H + H * H  # GPT-NeoX
GATED = 2 * H * H + 2 * KV * H + 3 * INNER * H  # Llama and Qwen2
BLOCK = {
    "tiny-llama": (GATED + 2 * H, 2 * H, 0),
    "tiny-gpt2": (FOUR + 4 * H, 4 * H, 3 * H + H + 4 * H + H + 2 * H),
    "tiny-bloom": (FOUR + 4 * H, 4 * H, 3 * H + H + 4 * H + H + 2 * H),
    "tiny-qwen2": (GATED + H + 2 * KV + 2 * H, 2 * H, H + 2 * KV),
    "tiny-gpt_neox": (SMALL + 4 * H, 4 * H, 3 * H + H + INNER + H + 2 * H),
}
OUTSIDE = {  # of norms and of biases that stand outside the blocks
    "tiny-llama": (H, 0),
    "tiny-gpt2": (2 * H, H),
    "tiny-bloom": (4 * H, 2 * H),  # one norm after the embedding, one after the blocks
    "tiny-qwen2": (H, 0),
    "tiny-gpt_neox": (2 * H, H),
}
TIED = {"tiny-llama", "tiny-gpt2", "tiny-bloom"}


def step(model):
    """One forward and backward pass. Returns the names of the parameters that have a gradient."""
    ids = torch.arange(4, 10)[None]
    model(ids, labels=ids).loss.backward()
    return {name for name, p in model.named_parameters() if p.grad is not None}


def trainables(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


@EVERY
def test_the_last_k_blocks_by_count_and_by_gradient(name):
    for k in (1, 2):
        model, _ = load_base(name, device="cpu")
        step(model)  # an old gradient must not survive
        assert only_last_blocks(model, k) is model
        assert count_parameters(model)[0] == k * BLOCK[name][0]
        path = WHERE[name][0]
        inside = {n for n, _ in model.named_parameters() if n.startswith(f"{path}.")}
        inside = {n for n in inside if int(n[len(path) + 1]) >= 2 - k}
        assert trainables(model) == inside == step(model)


@pytest.mark.parametrize("k", [0, 3, -1, 1.0, True, "1", None])
def test_a_number_of_blocks_that_cannot_be_is_refused(k):
    model, _ = load_base("tiny-llama", device="cpu")
    with pytest.raises(ValueError, match="is not a whole number of blocks from 1 to 2"):
        only_last_blocks(model, k)
    assert trainables(model) == {name for name, _ in model.named_parameters()}, "half done"


@EVERY
def test_norms_by_count(name):
    model, _ = load_base(name, device="cpu")
    assert only_norms(model) is model
    assert count_parameters(model)[0] == 2 * BLOCK[name][1] + OUTSIDE[name][0]
    assert trainables(model) == step(model)
    # Only the weights of norms start at one, in all of these models.
    tensors = dict(model.named_parameters())
    norms = {n.rpartition(".")[0] for n, p in tensors.items() if p.eq(1).all()}
    assert trainables(model) == {n for n in tensors if n.rpartition(".")[0] in norms}


def test_norms_are_told_by_type():
    class OddRMSNorm(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(3))

    class Renamed(torch.nn.LayerNorm):
        pass

    class PreNorm(torch.nn.Module):  # a norm and what follows it
        def __init__(self):
            super().__init__()
            self.inner, self.after = torch.nn.LayerNorm(3), torch.nn.Linear(3, 3)

    wrapped = only_norms(torch.nn.Sequential(PreNorm()))
    assert trainables(wrapped) == {"0.inner.weight", "0.inner.bias"}
    model = torch.nn.ModuleDict(
        {"a": OddRMSNorm(), "b": Renamed(3), "norm": torch.nn.Linear(3, 3, bias=False)}
    )
    assert trainables(only_norms(model)) == {"a.scale", "b.weight", "b.bias"}
    gated = type("RMSNormGated", (OddRMSNorm,), {})  # as in state-space models
    assert trainables(only_norms(torch.nn.Sequential(gated()))) == {"0.scale"}
    bare = torch.nn.Sequential(torch.nn.LayerNorm(3, elementwise_affine=False))
    for empty in (torch.nn.Linear(2, 2), bare):
        with pytest.raises(ValueError, match="has no norm with parameters, so nothing would be"):
            only_norms(empty)


@EVERY
def test_biases_by_count(name):
    model, _ = load_base(name, device="cpu")
    if name == "tiny-llama":
        with pytest.raises(ValueError, match="LlamaForCausalLM has no bias, so nothing would be"):
            only_biases(model)
        assert len(trainables(model)) == len(list(model.parameters())), "half done"
        return
    assert only_biases(model) is model
    assert count_parameters(model)[0] == 2 * BLOCK[name][2] + OUTSIDE[name][1]
    assert trainables(model) == step(model)
    parts = {n.rpartition(".")[0].rpartition(".")[2] for n in trainables(model)}
    if name == "tiny-qwen2":
        assert parts == {"q_proj", "k_proj", "v_proj"}


@EVERY
def test_the_head_is_the_embedding_where_they_are_tied(name):
    model, _ = load_base(name, device="cpu")
    assert only_head(model) is model
    assert count_parameters(model)[0] == V * H
    head, table = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert (head is table) == (name in TIED) == table.requires_grad
    assert trainables(model) == step(model) and len(trainables(model)) == 1


@EVERY
def test_an_untied_head_leaves_the_embedding_alone(name, tmp_path):
    model, _ = load_base(name, device="cpu")
    ids = torch.arange(4, 10)[None]
    before, total = model(ids).logits.detach(), count_parameters(model)[1]
    head = model.get_output_embeddings().weight
    only_head(model, untie=True)
    assert torch.equal(model(ids).logits, before)
    assert (model.lm_head.weight is head) == (name not in TIED), "nothing to copy"
    assert count_parameters(model) == (V * H, total + (V * H if name in TIED else 0))
    assert trainables(model) == step(model) == {"lm_head.weight"}
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    moved = model(ids).logits
    assert not torch.equal(model.get_input_embeddings().weight, model.lm_head.weight)
    model.tie_weights()  # as resizing the vocabulary does
    assert torch.equal(model(ids).logits, moved) and not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, moved), "saved and loaded, it must not be tied again"


@EVERY
def test_the_head_of_a_classifier_and_of_a_bare_backbone(name):
    model, _ = load_base(name, device="cpu")
    classifier = AutoModelForSequenceClassification.from_config(model.config)
    assert trainables(only_head(classifier)) == {"score.weight"}
    assert count_parameters(classifier)[0] == classifier.num_labels * H
    for headless in (model.base_model, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="has no head: it is the backbone alone"):
            only_head(headless)


@EVERY
def test_counts_by_module(name):
    model, _ = load_base(name, device="cpu")
    counts = count_by_module(only_last_blocks(model, 1))
    assert counts[WHERE[name][0]] == (BLOCK[name][0], 2 * BLOCK[name][0])
    assert counts["lm_head"] == (0, 0 if name in TIED else V * H)
    outside = sum(n for part, (_, n) in counts.items() if "norm" in part or "ln_f" in part)
    assert outside == OUTSIDE[name][0]
    for i in (0, 1):
        assert sum(count[i] for count in counts.values()) == count_parameters(model)[i]
    for part in counts:
        model.get_submodule(part)  # named as the model names them
    unfreeze(freeze(model), "lm_head")
    assert sum(count[0] for count in count_by_module(model).values()) == V * H
    model.extra = torch.nn.Parameter(torch.zeros(7))
    assert count_by_module(model)["extra"] == (7, 7)


def test_frozen_blocks_below_are_not_walked_through_and_those_above_are():
    model, _ = load_base("tiny-llama", device="cpu")
    ids = torch.arange(4, 10)[None]
    model(ids, labels=ids).loss.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    seen = {}
    for i, block in enumerate(blocks(model)):
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out.requires_grad}))
    only_last_blocks(model, 1)
    step(model)
    assert seen == {0: False, 1: True}
    unfreeze(freeze(model), "model.layers.0")
    step(model)
    assert seen == {0: True, 1: True}
    for name, p in model.named_parameters():
        if p.requires_grad:  # through frozen blocks comes the same gradient
            assert torch.equal(p.grad, whole[name])
