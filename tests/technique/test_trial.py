"""What virtual tokens promise is tried on adding: families that are right, and faults that are not.

Whole families stand in tests/families.csv. Here each question that `trial` asks of a model has a
model that answers it in another way than its configuration says.
"""

import functools
import inspect

import pytest
import torch
from soft import METHODS, N, close, trainables
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MptConfig,
    MptForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from minipeft import (
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    fold_p_tuning_v2,
    nearest_words,
)
from minipeft.technique.asked import cache_shape, positions_of
from minipeft.technique.kv_cache import filled_cache, key_value_shape
from minipeft.technique.words import trial_words
from minipeft.virtual_tokens import _overwrite

SIZES = {
    "vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
WIDE = SIZES | {"intermediate_size": 48}
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LONGER = [method for method in METHODS if method != "template"]


class Words:
    """A tokenizer that reads numbers."""

    all_special_ids, added_tokens_decoder = [0, 1, 2], {}

    def __call__(self, text, add_special_tokens=False):
        return {"input_ids": [int(word) for word in text.split()]}

    def __len__(self):
        return 80


def made(kind, config):
    torch.manual_seed(0)
    model = kind(config).double().eval()
    with torch.no_grad():  # large enough for attention to look somewhere
        for p in model.parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(torch.randn_like(p), alpha=0.1)
    return model


def llama(**options):
    return made(LlamaForCausalLM, LlamaConfig(**WIDE | {"num_key_value_heads": 2} | options))


def gemma():
    return made(GemmaForCausalLM, GemmaConfig(**WIDE, num_key_value_heads=2, head_dim=16))


def opt():
    return made(OPTForCausalLM, OPTConfig(**SIZES, ffn_dim=48, dropout=0.0, word_embed_proj_dim=16))


def roberta():
    other = {"is_decoder": True, "pad_token_id": 1, "bos_token_id": 0}
    return made(RobertaForCausalLM, RobertaConfig(**WIDE | CALM | other))


def bert():
    return made(BertForMaskedLM, BertConfig(**WIDE, **CALM))


FAMILIES = {  # first number of a position, and how many there are
    "llama": (llama, 0, None),
    "gemma": (gemma, 0, None),
    "opt": (opt, 0, 64),
    "roberta": (roberta, 2, 62),
    "bert": (bert, 0, 64),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_says_itself_how_it_counts_positions(name):
    make, first, limit = FAMILIES[name]
    model = make()
    assert positions_of(model, trial_words(model)[None]) == (first, limit)


@pytest.mark.parametrize("name", FAMILIES)
def test_text_in_front_is_the_text_whatever_the_module_makes_of_a_row(name):
    """Gemma scales its embeddings, OPT projects them, RoBERTa counts from 2, BERT looks ahead."""
    text, ids = torch.tensor([[11, 12, 13]]), torch.arange(20, 27)[None]
    plain = FAMILIES[name][0]()
    expected = plain(torch.cat([text, ids], 1)).logits[:, 3:]
    model = add_prompt_tuning(FAMILIES[name][0](), None, "text", "11 12 13", Words())
    assert close(model(ids).logits, expected, 1e-6)
    words = [best[0] for best in nearest_words(model, 1)]
    assert [token for token, cosine in words if cosine > 0.99] == [11, 12, 13]
    labels = ids.clone()
    if name == "bert":  # whose labels are not shifted
        by_hand = nn.functional.cross_entropy(expected.flatten(0, 1), labels.flatten())
    else:
        last = plain(torch.cat([text, ids], 1)).logits[:, 2:-1]
        by_hand = nn.functional.cross_entropy(last.flatten(0, 1), labels.flatten())
    assert close(model(ids, labels=labels).loss, by_hand, 1e-6)


@pytest.mark.parametrize("init", ["vocab", "random"])
def test_starts_are_as_large_as_what_enters_the_model(init):
    model = FAMILIES["gemma"][0]()
    table = model.get_input_embeddings()(torch.arange(80))
    vectors = add_prompt_tuning(model, 200, init, tokenizer=Words()).virtual_tokens()
    assert vectors.std().item() == pytest.approx(table.std().item(), rel=0.1)


def test_shapes_are_read_off_the_cache():
    model = llama(head_dim=4, num_key_value_heads=1)
    model.config.head_dim, model.config.num_key_value_heads = 8, 4  # a configuration that lies
    assert key_value_shape(model) == (2, 1, 4)
    assert add_prefix_tuning(model, 3).virtual_tokens.embedding.weight.shape == (3, 2 * 2 * 4)


def test_a_cache_of_unequal_layers_is_refused():
    model = llama()
    attention = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        setattr(attention, name, nn.Linear(32, 32, bias=False).double())
    attention.num_key_value_groups = 1
    with pytest.raises(ValueError, match="keys and values of its layers have different shapes"):
        cache_shape(model, trial_words(model)[None, :1])
    with pytest.raises(ValueError, match="LlamaForCausalLM cannot have virtual tokens of this"):
        add_prefix_tuning(model, N)


def answers(model, method, change):
    """The sentence with which a model is refused whose forward is changed."""
    plain = model.forward

    @functools.wraps(plain)
    def forward(*args, **kwargs):
        return change(plain, *args, **kwargs)

    forward.__signature__ = inspect.signature(plain)
    model.forward = forward
    with pytest.raises(ValueError) as refused:
        METHODS[method](model)
    assert not model._forward_pre_hooks and all(p.requires_grad for p in model.parameters())
    return str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_positions_of_another_meaning_are_found(method):
    def doubled(plain, *args, position_ids=None, **kwargs):
        positions = None if position_ids is None else 2 * position_ids
        return plain(*args, position_ids=positions, **kwargs)

    assert "counts its positions in a way of its own" in answers(llama(), method, doubled)


@pytest.mark.parametrize("method", ["prompt", "lstm", "mlp", "template", "hidden"])
def test_embeddings_that_the_model_changes_itself_are_found(method):
    def scaled(plain, *args, **kwargs):
        model = plain.__self__
        if kwargs.get("input_ids") is not None:
            kwargs["inputs_embeds"] = 3 * model.get_input_embeddings()(kwargs.pop("input_ids"))
        return plain(*args, **kwargs)

    assert "do not do what the words do" in answers(llama(), method, scaled)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_cannot_go_on_from_its_cache_is_found(method):
    """It could before: so the plain model goes on, and the tuned one does not."""

    def longer(plain, *args, past_key_values=None, **kwargs):
        if past_key_values is not None and 3 < past_key_values.get_seq_length() < 9:
            past_key_values = None
        return plain(*args, past_key_values=past_key_values, **kwargs)

    assert "going on from its cache would" in answers(llama(), method, longer)


@pytest.mark.parametrize("method", LONGER)
def test_padding_between_prompt_and_text_is_found(method):
    """MPT measures distances in columns and takes no positions."""
    config = MptConfig(d_model=32, n_heads=4, n_layers=2, vocab_size=80, max_seq_len=64)
    model = MptForCausalLM(config).eval()
    with pytest.raises(ValueError, match="MptForCausalLM .* padding on the left would change"):
        METHODS[method](model)


@pytest.mark.parametrize("method", ["prompt", "template"])
def test_a_model_that_looks_words_up_by_their_vectors_is_found(method):
    """Gemma 3n and 4 do: it goes well until the vectors are trained."""

    def by_vector(plain, *args, **kwargs):
        embeds, table = kwargs.get("inputs_embeds"), plain.__self__.get_input_embeddings().weight
        if embeds is not None and torch.cdist(embeds, table[None]).amin(-1).max() > 1e-9:
            raise RuntimeError("no such words")
        return plain(*args, **kwargs)

    assert "RuntimeError: no such words" in answers(llama(), method, by_vector)


@pytest.mark.parametrize("method", METHODS)
def test_a_window_under_another_name_is_found(method):
    config = GPTNeoConfig(
        vocab_size=80, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=64,
        attention_types=[[["global", "local"], 1]], window_size=8, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="GPTNeoForCausalLM .* longer than its window"):
        METHODS[method](GPTNeoForCausalLM(config).eval())


@pytest.mark.parametrize("method", LONGER)
def test_documents_packed_into_one_row_are_refused(method):
    model = llama()
    METHODS[method](model)
    ids = torch.arange(20, 31)[None]
    packed = torch.cat([torch.arange(6), torch.arange(5)])[None]
    with pytest.raises(ValueError, match="position_ids begin anew within a row"):
        model(ids, position_ids=packed, use_cache=False)
    one = torch.arange(11)[None]
    assert torch.equal(model(ids, position_ids=one).logits, model(ids).logits)


def test_each_layer_gets_its_vectors_on_its_own_device():
    """A model may be split over devices; the meta device stands for the second one."""
    model = add_prefix_tuning(llama(), N)
    model.model.layers[1].to("meta")
    cache = filled_cache(model, None, model.virtual_tokens(), 2)
    assert [layer.keys.device.type for layer in cache.layers] == ["cpu", "meta"]
    model = add_p_tuning_v2(llama(), N, "hidden")
    states = torch.empty(1, 9, 32, device="meta", dtype=torch.float64)
    (states,), _ = _overwrite(model, 1, None, (states,), {})
    assert states.device.type == "meta"


@pytest.mark.parametrize("name", ["llama", "gemma", "opt"])
def test_the_hidden_form_is_its_own_fold(name):
    model = add_p_tuning_v2(FAMILIES[name][0](), N, "hidden")
    with torch.no_grad():
        for p in trainables(model).values():
            p.add_(torch.randn_like(p))
    ids = torch.arange(20, 27)[None]
    expected = model(ids).logits
    assert close(fold_p_tuning_v2(model)(ids).logits, expected, 1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_an_lstm_learns_in_eval_mode_on_cuda():
    model = METHODS["lstm"](llama().to("cuda", torch.float32)).eval()
    ids = torch.arange(20, 29, device="cuda")[None]
    model(ids, labels=ids).loss.backward()
    assert all(p.grad.isfinite().all() for p in trainables(model).values())
