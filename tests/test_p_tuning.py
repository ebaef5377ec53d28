"""P-tuning: the encoder, its fold, the template. What it shares is in test_virtual_tokens."""

import pytest
import torch
from soft import NAMES, PLACEHOLDER, batch_of, close, tuned
from torch import nn

from minipeft import add_p_tuning, count_parameters, fold_p_tuning, load_adapter, load_base
from minipeft import save_adapter as save

EVERY = pytest.mark.parametrize("name", NAMES)
H, W, N = 32, 8, 3


@EVERY
@pytest.mark.parametrize("method", ["lstm", "mlp", "template"])
def test_folding_changes_nothing_but_the_parameters(name, method):
    model = tuned(name, method)
    batch = batch_of(2, 3, 6, method=method)
    expected = model(**batch).logits
    base = count_parameters(model)[1] - count_parameters(model)[0]
    assert fold_p_tuning(model) is model
    assert torch.equal(model(**batch).logits, expected)
    assert count_parameters(model) == (N * H, base + N * H)
    model(**batch).loss.backward()
    assert model.virtual_tokens.embedding.weight.grad.any(), "the table trains on"
    with pytest.raises(ValueError, match="no encoder of P-tuning on this model to fold"):
        fold_p_tuning(model)
    with pytest.raises(ValueError, match="no encoder of P-tuning on this model to fold"):
        fold_p_tuning(load_base(name, device="cpu")[0])


def lstm_by_hand(lstm, x, layer, backward):
    """One direction of one layer, gate by gate (Hochreiter and Schmidhuber 1997, with forget)."""
    end = f"l{layer}" + ("_reverse" if backward else "")
    w_ih, w_hh = getattr(lstm, f"weight_ih_{end}"), getattr(lstm, f"weight_hh_{end}")
    bias = getattr(lstm, f"bias_ih_{end}") + getattr(lstm, f"bias_hh_{end}")
    h = c = torch.zeros(w_hh.shape[1], dtype=x.dtype)
    out = []
    for token in x.flip(0) if backward else x:
        i, f, g, o = (w_ih @ token + w_hh @ h + bias).chunk(4)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        h = o.sigmoid() * c.tanh()
        out.append(h)
    return torch.stack(out[::-1] if backward else out)


def test_the_lstm_reads_both_ways_and_ties_the_tokens_together():
    written = tuned("tiny-llama", "lstm").virtual_tokens
    x = written.embedding.weight
    for layer in (0, 1):
        both = [lstm_by_hand(written.lstm, x, layer, back) for back in (False, True)]
        x = torch.cat(both, -1)  # (n, 2 * width)
    first, second = written.mlp[0], written.mlp[2]
    expected = second(first(x).clamp(min=0))
    assert close(written(), expected, 1e-12)
    for i in range(N):
        (grad,) = torch.autograd.grad(written()[i].sum(), written.embedding.weight)
        assert (grad.abs().sum(-1) > 0).all(), "every vector depends on every embedding"


def test_the_mlp_leaves_each_token_alone():
    written = tuned("tiny-llama", "mlp").virtual_tokens
    for i in range(N):
        (grad,) = torch.autograd.grad(written()[i].sum(), written.embedding.weight)
        moved = (grad.abs().sum(-1) > 0).tolist()
        assert moved == [j == i for j in range(N)]


def test_counted_by_formula():
    for options, expected in (
        ({"encoder": "mlp", "encoder_hidden_size": W}, (H * W + W) + (W * W + W) + (W * H + H)),
        (
            {"encoder": "lstm", "encoder_hidden_size": W},
            2 * 4 * (W * H + W * W + 2 * W) + 2 * 4 * (W * 2 * W + W * W + 2 * W)
            + (2 * W * 2 * W + 2 * W) + (2 * W * H + H),
        ),
        ({"encoder": "mlp"}, 3 * (H * H + H)),
    ):  # fmt: skip
        model, _ = load_base("tiny", device="cpu")
        add_p_tuning(model, N, **options)
        assert count_parameters(model)[0] == N * H + expected


@EVERY
def test_a_template_of_words_is_the_text_itself(name):
    """With the embeddings of words as vectors, a template is the sentence with these words."""
    plain, tokenizer = load_base(name, device="cpu")
    model = add_p_tuning(load_base(name, device="cpu")[0], 4, "mlp", W, placeholder_id=9_999)
    fold_p_tuning(model)
    words = tokenizer("here")["input_ids"]
    table = model.get_input_embeddings().weight
    model.virtual_tokens.embedding.weight.data.copy_(table[words])
    pattern = "?? the film? was?"
    rows = [tokenizer(pattern)["input_ids"]] * 2
    template = torch.tensor(rows)
    holes = template == tokenizer("?")["input_ids"][0]
    text = template.masked_scatter(holes, torch.tensor(words * 2))
    assert tokenizer.decode(text[0]) == "he the filmr wase"
    template = template.masked_fill(holes, 9_999)  # beyond the vocabulary
    labels = template.masked_fill(template == 9_999, -100)
    ours, theirs = model(template, labels=labels), plain(text, labels=labels)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-6)
    assert torch.allclose(ours.loss, theirs.loss)
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    mask = torch.ones_like(text)
    ours = model.generate(template, attention_mask=mask, **options)[:, -5:]
    assert torch.equal(ours, plain.generate(text, attention_mask=mask, **options)[:, -5:])


def test_a_template_gets_its_gradient_from_each_row():
    model = fold_p_tuning(tuned("tiny-llama", "template"))
    batch = batch_of(2, 3, 6, method="template")
    weight = model.virtual_tokens.embedding.weight
    whole = torch.autograd.grad(model(**batch).logits.sum(), weight)[0]
    parts = [
        torch.autograd.grad(
            model(**{k: v[i : i + 1] for k, v in batch.items()}).logits.sum(), weight
        )
        for i in range(3)
    ]
    assert close(sum(part[0] for part in parts), whole)


def test_rows_that_do_not_fit_the_template_are_refused():
    model = tuned("tiny-llama", "template")
    good = batch_of(2, 2, 6, method="template")
    ids = good["input_ids"].clone()
    ids[1][ids[1] == PLACEHOLDER] = 20
    with pytest.raises(ValueError, match=r"placeholder 7 3 times.*have it \[3, 0\] times"):
        model(ids, attention_mask=good["attention_mask"])
    with pytest.raises(ValueError, match="A placeholder is a label"):
        model(good["input_ids"], labels=good["input_ids"])
    with pytest.raises(ValueError, match="give input_ids"):
        model(inputs_embeds=torch.zeros(1, 5, H, dtype=torch.float64))
    cache = model(good["input_ids"], use_cache=True).past_key_values
    model(torch.tensor([[PLACEHOLDER], [20]]), past_key_values=cache)  # may have been generated
    with pytest.raises(ValueError, match="A template cannot go on from a cache; give the whole"):
        model(good["input_ids"], past_key_values=cache)


def test_a_template_is_saved_as_one(tmp_path):
    model = tuned("tiny-llama", "template", torch.float32)
    again = load_adapter(load_base("tiny", device="cpu")[0], save(model, tmp_path / "a"))
    assert again.virtual_tokens.placeholder_id == PLACEHOLDER
    with pytest.raises(ValueError, match="needs the placeholder"):
        again(torch.tensor([[20, 21]]))


def test_bad_input_is_refused_and_the_model_left_alone():
    model, _ = load_base("tiny", device="cpu")
    for options, message in (
        ({"encoder": "gru"}, "encoder='gru' is none of 'lstm', 'mlp'"),
        ({"encoder_hidden_size": 0}, "encoder_hidden_size=0 is not a width"),
        ({"encoder_hidden_size": 2.5}, "encoder_hidden_size=2.5 is not a width"),
    ):
        with pytest.raises(ValueError, match=message):
            add_p_tuning(model, **options)
    assert all(p.requires_grad for p in model.parameters()) and isinstance(model, nn.Module)
    with pytest.raises(ValueError, match="LlamaModel has no language-model head"):
        add_p_tuning(model.model)
