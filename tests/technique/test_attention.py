"""P-tuning v2 on encoders, which keep no cache: against HF peft, and against attention by hand."""

import copy
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soft import close
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    MPNetConfig,
    RobertaConfig,
)

from minipeft import add_p_tuning_v2, load_adapter, save_adapter

SIZES = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
         "num_attention_heads": 4, "max_position_embeddings": 40, "num_labels": 3}  # fmt: skip
CALM = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
CONFIGS = {
    "bert": lambda: BertConfig(**SIZES, **CALM, pad_token_id=0),
    "roberta": lambda: RobertaConfig(**SIZES, **CALM, pad_token_id=1),
    "electra": lambda: ElectraConfig(**SIZES, **CALM, embedding_size=16, pad_token_id=0),
    "distilbert": lambda: DistilBertConfig(
        vocab_size=80, dim=32, hidden_dim=48, n_layers=3, n_heads=4, max_position_embeddings=40,
        dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0, num_labels=3, pad_token_id=0),
    "modernbert": lambda: ModernBertConfig(
        **SIZES, pad_token_id=0, local_attention=4, cls_token_id=1, sep_token_id=2),
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", CONFIGS)
N = 3


def plain(name, dtype=torch.float64, kernel="sdpa"):
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(
        CONFIGS[name](), dtype=dtype, attn_implementation=kernel
    )
    with torch.no_grad():  # large enough for attention to look somewhere
        for p in model.parameters():
            p.mul_(4) if p.dim() > 1 else p.add_(torch.randn_like(p), alpha=0.1)
    return model.eval()


def tuned(name, n=N, **options):
    model = add_p_tuning_v2(plain(name, **options), n)
    with torch.no_grad():
        weight = model.virtual_tokens.weight
        weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    return model


def batch_of(model, lengths=(7, 4, 2)):
    ids = torch.randint(
        5, 80, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(2)
    )
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return {
        "input_ids": ids.masked_fill(~mask, model.config.pad_token_id),
        "attention_mask": mask.long(),
        "labels": torch.arange(len(lengths)) % 3,
    }


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("name", ["bert", "roberta", "electra"])
@given(n=st.integers(1, 5), lengths=st.lists(st.integers(1, 8), min_size=1, max_size=4))
@settings(max_examples=5, deadline=None, derandomize=True)
def test_logits_and_gradients_are_those_of_hf_peft(name, n, lengths):
    model = tuned(name, n)
    other = peft.get_peft_model(
        plain(name), peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=n)
    ).eval()
    other.double()
    table = other.prompt_encoder["default"].embedding.weight
    table.data = model.virtual_tokens.weight.detach().clone()
    batch = batch_of(model, lengths)
    ours, theirs = model(**batch), other(**batch)
    assert close(ours.logits, theirs.logits, 1e-9) and close(ours.loss, theirs.loss, 1e-9)
    ours.loss.backward(), theirs.loss.backward()
    assert close(model.virtual_tokens.weight.grad, table.grad, 1e-9)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_attention_of_distilbert_by_hand(kernel):
    """HF peft refuses DistilBERT. So its first block is computed here, from the definition."""
    model = tuned("distilbert", kernel=kernel)
    batch = batch_of(model)
    seen = {}
    attention = model.distilbert.transformer.layer[0].attention
    attention.register_forward_pre_hook(lambda m, a, k: seen.update(x=(a or k.values())),
                                        with_kwargs=True)  # fmt: skip
    attention.register_forward_hook(lambda m, a, o: seen.update(y=o[0]))
    model(**batch)
    x = next(iter(seen["x"]))  # (batch, seq, hidden)
    heads = lambda t: t.unflatten(-1, (4, 8)).transpose(1, 2)  # noqa: E731
    q, k, v = (heads(f(x)) for f in (attention.q_lin, attention.k_lin, attention.v_lin))
    keys, values = model.virtual_tokens(0)  # (heads, n, head_dim) each
    k, v = (torch.cat([p.expand(len(x), -1, -1, -1), t], 2) for p, t in ((keys, k), (values, v)))
    scores = q @ k.mT / 8**0.5  # (batch, heads, seq, n + seq)
    hidden = torch.cat([torch.zeros(len(x), N), 1 - batch["attention_mask"]], 1).bool()
    weights = scores.masked_fill(hidden[:, None, None], -torch.inf).softmax(-1)
    expected = attention.out_lin((weights @ v).transpose(1, 2).flatten(2))
    assert close(seen["y"], expected, 1e-9)


@EVERY
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_a_batch_gives_what_its_rows_give_one_by_one(name, kernel):
    model = tuned(name, kernel=kernel)
    batch = batch_of(model)
    together = model(**batch).logits
    for i, mask in enumerate(batch["attention_mask"].bool()):
        row = batch["input_ids"][i][mask][None]
        assert close(model(row).logits[0], together[i], 1e-6)
        assert close(model(row, attention_mask=torch.ones_like(row)).logits[0], together[i], 1e-6)


@EVERY
def test_every_layer_learns_and_so_does_the_head(name):
    model = tuned(name).train()
    model(**batch_of(model)).loss.backward()
    per_layer = model.virtual_tokens.weight.grad.unflatten(1, (3, -1)).abs().sum((0, 2))
    assert (per_layer > 0).all()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "virtual_tokens.weight" in trained and len(trained) > 1
    assert not any(n.startswith(model.base_model_prefix) for n in trained)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)


@EVERY
def test_gradient_checkpointing_gives_the_same_gradients(name):
    found = []
    for checkpointing in (False, True):
        model = tuned(name).train()
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model(**batch_of(model)).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(*found, strict=True))


@EVERY
def test_saved_and_loaded_here(name, tmp_path):
    model = tuned(name, dtype=torch.float32)
    batch = batch_of(model)
    expected = model(**batch).logits
    folder = save_adapter(model, tmp_path / "adapter")
    again = load_adapter(plain(name, torch.float32), folder)
    assert torch.allclose(again(**batch).logits, expected, atol=1e-6)
    ours, theirs = ({n for n, p in m.named_parameters() if p.requires_grad} for m in (model, again))
    assert ours == theirs


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")
@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_hf_peft_reads_the_folder(name, tmp_path):
    model = tuned(name, dtype=torch.float32)
    with torch.no_grad():
        model.classifier.requires_grad_(True)
        next(model.classifier.parameters()).add_(1)
    batch = batch_of(model)
    folder = save_adapter(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated")
        other = peft.PeftModel.from_pretrained(plain(name, torch.float32), folder).eval()
    assert close(other(**batch).logits, model(**batch).logits, 1e-5)


@EVERY
def test_a_copy_has_its_own_and_the_attention_may_change(name):
    model = tuned(name)
    batch = batch_of(model)
    expected = model(**batch).logits
    twin = copy.deepcopy(model)
    with torch.no_grad():
        model.virtual_tokens.weight.zero_()
    assert torch.equal(twin(**batch).logits, expected)
    assert not torch.equal(model(**batch).logits, expected)
    twin.set_attn_implementation("eager")
    assert close(twin(**batch).logits, expected, 1e-6)


def test_positions_have_an_end():
    model = tuned("roberta")  # 40 rows, of which its numbers begin at 2
    assert model(torch.full((1, 35), 9)).logits.isfinite().all()
    with pytest.raises(ValueError, match="3 virtual and 36 real tokens are more than the 38"):
        model(torch.full((1, 36), 9))


def test_a_masked_language_model_has_no_head_to_train():
    torch.manual_seed(0)
    model = add_p_tuning_v2(BertForMaskedLM(CONFIGS["bert"]()).eval(), N)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["virtual_tokens.weight"]
    batch = batch_of(model)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    assert model(**batch | {"labels": labels}).loss.isfinite()


@pytest.mark.parametrize(
    "config",
    [
        DebertaV2Config(**SIZES, **CALM, relative_attention=True, pad_token_id=0),
        MPNetConfig(**SIZES, **CALM, pad_token_id=1),
    ],
)
def test_attention_of_another_kind_is_refused_by_name(config):
    model = AutoModelForSequenceClassification.from_config(config).eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=f"{type(model).__name__} cannot have virtual tokens"):
        add_p_tuning_v2(model, N)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not any(hasattr(module, "plain_config") for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@EVERY
def test_what_is_trained_on_a_half_precision_base_is_float32(name, tmp_path):
    model = add_p_tuning_v2(plain(name, torch.bfloat16), N)
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(plain(name, torch.bfloat16), tmp_path / "adapter")
    for one in (model, again):
        assert {p.dtype for p in one.parameters() if p.requires_grad} == {torch.float32}
        assert one(**batch_of(one)).loss.isfinite()
