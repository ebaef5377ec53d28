"""Prompt tuning: starts, counts, neighbors. What it shares is in test_virtual_tokens."""

import pytest
import torch
from soft import NAMES

from minipeft import add_prompt_tuning, count_parameters, load_base, nearest_words
from minipeft.technique.words import ordinary_tokens

EVERY = pytest.mark.parametrize("name", NAMES)


@EVERY
def test_counted_by_formula(name):
    model, _ = load_base(name, device="cpu")
    before = count_parameters(model)[1]
    assert count_parameters(add_prompt_tuning(model, 7)) == (7 * 32, before + 7 * 32)


@EVERY
def test_a_vocabulary_start_is_made_of_ordinary_words(name):
    model, tokenizer = load_base(name, device="cpu")
    table = model.get_input_embeddings().weight.detach()
    assert set(ordinary_tokens(model).tolist()) == set(range(3, 261)), "pad, bos, eos are 0, 1, 2"
    torch.manual_seed(0)
    add_prompt_tuning(model, 400)
    rows = [(table == vector).all(-1).nonzero().item() for vector in model.virtual_tokens.weight]
    assert min(rows) >= 3 and len(set(rows)) > 100
    assert sorted(rows) != rows, "random rows, not the first ones"
    model.virtual_tokens.weight.data.zero_()
    assert table.any(), "the start is a copy; the table of the base stays as it is"


def test_a_vocabulary_start_without_a_tokenizer_or_with_spare_rows():
    model, tokenizer = load_base("tiny", device="cpu")
    model.resize_token_embeddings(300)
    assert max(ordinary_tokens(model).tolist()) == 260
    del model.minipeft_tokenizer
    ordinary = set(ordinary_tokens(model).tolist())
    assert not ordinary & {0, 1, 2}, "bos, eos and pad are known from the config"
    assert max(ordinary_tokens(model, tokenizer).tolist()) == 260


def test_special_tokens_of_the_course_model_stay_out():
    model, tokenizer = load_base(device="cpu")
    ordinary = set(ordinary_tokens(model).tolist())
    special = {i for i in range(len(tokenizer)) if tokenizer.decode([i], skip_special_tokens=True)
               == "" and tokenizer.decode([i]) != ""}  # fmt: skip
    assert len(special) == 17 and special == set(range(17)), "its first seventeen rows"
    assert not ordinary & special and len(ordinary) == len(tokenizer) - 17


def test_a_text_start_is_cut_or_repeated():
    for n, expected in ((2, "ab"), (3, "abc"), (8, "abcabcab"), (None, "abc")):
        model, tokenizer = load_base("tiny", device="cpu")
        table = model.get_input_embeddings().weight.detach().clone()
        add_prompt_tuning(model, n, "text", "abc")
        ids = tokenizer(expected)["input_ids"]
        assert torch.equal(model.virtual_tokens.weight, table[ids])


def test_a_random_start_has_the_spread_of_the_table():
    model, _ = load_base("tiny-gpt2", device="cpu")
    table = model.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    add_prompt_tuning(model, 400, "random")
    weight = model.virtual_tokens.weight
    assert abs(weight.std() / table.std() - 1) < 0.05  # 12,800 numbers: 8 standard errors
    assert abs(weight.mean() - table.mean()) < 0.05 * table.std()
    torch.manual_seed(0)
    again = add_prompt_tuning(load_base("tiny-gpt2", device="cpu")[0], 400, "random")
    assert torch.equal(again.virtual_tokens.weight, weight)


def test_nearest_words_finds_the_words_it_started_from():
    model, tokenizer = load_base("tiny", device="cpu")
    add_prompt_tuning(model, None, "text", "hello")
    near = nearest_words(model, k=3)
    assert [row[0][0] for row in near] == tokenizer("hello")["input_ids"]
    assert all(abs(row[0][1] - 1) < 1e-5 for row in near)
    table = model.get_input_embeddings().weight
    vector = model.virtual_tokens.weight[1]
    for token, cosine in near[1]:
        expected = torch.cosine_similarity(vector, table[token], dim=0)
        assert abs(cosine - expected.item()) < 1e-5
    cosines = [cosine for _, cosine in near[1]]
    assert cosines == sorted(cosines, reverse=True)
    every = [sorted(token for token, _ in row) for row in nearest_words(model, k=len(table))]
    assert every == [list(range(len(table)))] * len(near)
    for k in (-1, 0, 2.5, True, None, "3"):
        with pytest.raises(ValueError, match=f"k={k!r} is not a number of words"):
            nearest_words(model, k)
    with pytest.raises(ValueError, match=f"k=262 is more than the {len(table)} words of the"):
        nearest_words(model, len(table) + 1)
    with pytest.raises(ValueError, match="no virtual tokens among its embeddings"):
        nearest_words(load_base("tiny", device="cpu")[0])


def test_bad_input_is_refused_and_the_model_left_alone():
    model, _ = load_base("tiny", device="cpu")
    for options, message in (
        ({"init": "words"}, "init='words' is none of 'text', 'vocab', 'random'"),
        ({"text": "abc"}, "init='vocab' has no use for it"),
        ({"init": "text"}, "To start from text, give some"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens=None is not a length"),
    ):
        with pytest.raises(ValueError, match=message):
            add_prompt_tuning(model, **options)
    assert all(p.requires_grad for p in model.parameters())
    assert not hasattr(model, "virtual_tokens")
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        add_prompt_tuning(model.model)
