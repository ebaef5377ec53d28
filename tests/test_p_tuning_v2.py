"""P-tuning v2: the two forms, the tie between them, the head. The rest: test_virtual_tokens."""

import peft
import pytest
import torch
from soft import NAMES, batch_of, close, trainables, tuned
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from minipeft import (
    add_p_tuning_v2,
    add_prefix_tuning,
    count_parameters,
    fold_p_tuning_v2,
    load_adapter,
    load_base,
    save_adapter,
    train,
)
from minipeft.technique.words import ordinary_tokens

EVERY = pytest.mark.parametrize("name", NAMES)


def classifier(name, dtype=torch.float64):
    config = load_base(name, device="cpu")[0].config
    config.num_labels = 3
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_config(config).to(dtype).eval()


def classified(seed=3):
    batch = batch_of(seed, 4, 7)
    return batch | {"labels": torch.tensor([0, 2, 1, 2])}


@EVERY
def test_counted_by_formula(name):
    kv = 16 if name in ("tiny-llama", "tiny-qwen2") else 32
    for form, expected in (("key_value", 5 * 2 * 2 * kv), ("hidden", 5 * 2 * 32)):
        model, _ = load_base(name, device="cpu")
        before = count_parameters(model)[1]
        assert count_parameters(add_p_tuning_v2(model, 5, form)) == (expected, before + expected)


@EVERY
def test_the_key_value_form_is_prefix_tuning(name):
    model = tuned(name, "key_value")
    other = add_prefix_tuning(load_base(name, device="cpu", dtype=torch.float64)[0], 3)
    other.virtual_tokens.embedding.weight.data.copy_(model.virtual_tokens.weight)
    batch = batch_of(2, 3, 6)
    assert torch.equal(model(**batch).logits, other(**batch).logits)


@EVERY
def test_both_forms_start_as_random_words_typed(name):
    """The words are drawn again here, from the seed; then the text begins with them."""
    n, batch = 4, batch_of(2, 3, 6)
    del batch["labels"]
    base, _ = load_base(name, device="cpu", dtype=torch.float64)
    words = ordinary_tokens(base)
    torch.manual_seed(5)
    words = words[torch.randint(len(words), (1, n))].expand(3, -1)
    typed = {"input_ids": words, "attention_mask": torch.ones_like(words)}
    typed = {key: torch.cat([value, batch[key]], 1) for key, value in typed.items()}
    expected = base(**typed).logits[:, n:]
    for form in ("key_value", "hidden"):
        model, _ = load_base(name, device="cpu", dtype=torch.float64)
        torch.manual_seed(5)
        add_p_tuning_v2(model, n, form)
        # A norm divides by its input's size, so that the scale of the states does not matter; but
        # for the epsilon in it, which the tiny states of an untrained model can feel.
        nearly = {"atol": 1e-6} if form == "key_value" else {"atol": 0.05 * expected.std().item()}
        real = batch["attention_mask"].bool()
        assert torch.allclose(model(**batch).logits[real], expected[real], rtol=0, **nearly)
    sizes = model.virtual_tokens.weight.square().mean(-1)  # (layers, n)
    assert torch.allclose(sizes, torch.ones_like(sizes))


@EVERY
def test_the_hidden_form_folds_into_keys_and_values(name):
    model = tuned(name, "hidden")
    batch = batch_of(2, 3, 6)
    expected = model(**batch).logits
    assert fold_p_tuning_v2(model) is model
    kv = 16 if name in ("tiny-llama", "tiny-qwen2") else 32
    assert model.virtual_tokens.weight.shape == (3, 2 * 2 * kv)
    assert close(model(**batch).logits, expected, 1e-12)
    plain = model(**batch, use_cache=False)
    plain.loss.backward()
    grad = model.virtual_tokens.weight.grad.clone()
    assert grad.any(), "keys and values train on"
    model.zero_grad()
    model.train().gradient_checkpointing_enable()
    model(**batch, use_cache=False).loss.backward()
    assert torch.allclose(model.virtual_tokens.weight.grad, grad, atol=1e-14)
    for other in (model, load_base(name, device="cpu")[0], tuned(name, "prefix")):
        with pytest.raises(ValueError, match="no hidden form of P-tuning v2"):
            fold_p_tuning_v2(other)


def test_keys_and_values_are_tied_through_norm_projection_and_position():
    """By hand on Llama: K = rotate(W_k norm(H)), V = W_v norm(H), at positions 0..n-1."""
    model = tuned("tiny-llama", "hidden")
    states, n, inner = model.virtual_tokens.weight.detach().clone(), 3, model.model
    fold_p_tuning_v2(model)
    positions = torch.arange(n)[None]
    for layer, block in enumerate(inner.layers):
        x = block.input_layernorm(states[layer][None])  # (1, n, hidden)
        keys = block.self_attn.k_proj(x).view(1, n, 2, 8).transpose(1, 2)
        values = block.self_attn.v_proj(x).view(1, n, 2, 8).transpose(1, 2)
        _, keys = apply_rotary_pos_emb(keys, keys, *inner.rotary_emb(x, positions))
        assert close(model.virtual_tokens()[layer, 0], keys[0], 1e-12)
        assert close(model.virtual_tokens()[layer, 1], values[0], 1e-12)


@EVERY
def test_the_states_of_one_layer_do_not_reach_the_next(name):
    """What a block makes of the virtual positions is thrown away: only keys and values count."""
    model = tuned(name, "hidden")
    seen = []
    last = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    last[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
    model(torch.arange(20, 26)[None])
    assert seen[0].shape[1] == 3 + 6, "the sequence grows once, not in every layer"
    assert torch.equal(seen[0][0, :3], model.virtual_tokens.weight[1])


@EVERY
def test_a_classifier_trains_prefix_and_head_as_in_hf_peft(name):
    model = add_p_tuning_v2(classifier(name), 3)
    assert set(trainables(model)) == {"virtual_tokens.weight", "score.weight"}
    config = peft.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)
    other = peft.get_peft_model(classifier(name), config).eval().double()
    theirs = other.prompt_encoder["default"].embedding.weight
    theirs.data = model.virtual_tokens.weight.detach().clone()
    head = other.base_model.score.modules_to_save["default"].weight
    batch = classified()
    ours, yours = model(**batch), other(**batch)
    assert ours.logits.shape == (4, 3)
    assert close(ours.logits, yours.logits) and close(ours.loss, yours.loss)
    ours.loss.backward(), yours.loss.backward()
    assert close(model.virtual_tokens.weight.grad, theirs.grad)
    assert close(model.score.weight.grad, head.grad)
    for i, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(batch["input_ids"][i][mask][None]).logits
        assert torch.allclose(alone[0], ours.logits[i], atol=1e-10)


@EVERY
def test_a_classifier_is_saved_with_its_head(name, tmp_path):
    model = add_p_tuning_v2(classifier(name, torch.float32), 3)
    torch.nn.init.normal_(model.score.weight)
    batch = classified()
    expected = model(**batch).logits
    folder = save_adapter(model, tmp_path / "adapter")
    again = load_adapter(classifier(name, torch.float32), folder)
    assert torch.allclose(again(**batch).logits, expected, atol=1e-6)
    assert set(trainables(again)) == {"virtual_tokens.weight", "score.weight"}
    other = peft.PeftModel.from_pretrained(classifier(name, torch.float32), folder).eval()
    assert close(other(**batch).logits, expected, 1e-5)
    other.save_pretrained(tmp_path / "theirs")
    back = load_adapter(classifier(name, torch.float32), tmp_path / "theirs")
    assert torch.allclose(back(**batch).logits, expected, atol=1e-6)
    wider = classifier(name, torch.float32)
    wider.score = torch.nn.Linear(32, 5, bias=False)
    with pytest.raises(ValueError, match="does not fit this base model: .*score.weight is"):
        load_adapter(wider, folder)
    assert not hasattr(wider, "virtual_tokens")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trainer_trains_a_classifier(dtype, tmp_path):
    model = add_p_tuning_v2(classifier("tiny-llama", dtype), 3)
    assert model.score.weight.dtype == model.virtual_tokens.weight.dtype == torch.float32
    before = model.score.weight.detach().clone()
    rows = [{"input_ids": [20 + i, 21], "labels": i % 3} for i in range(6)]

    def collate(rows):
        return {k: torch.tensor([row[k] for row in rows]) for k in ("input_ids", "labels")}

    arguments = TrainingArguments(
        tmp_path, max_steps=60, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        learning_rate=5e-2, logging_strategy="no", gradient_checkpointing=True,
    )  # fmt: skip
    first = model(**collate(rows)).loss.item()
    Trainer(model, arguments, collate, rows).train()
    assert not torch.equal(model.score.weight, before)
    assert model.eval()(**collate(rows)).loss.item() < 0.8 * first


def test_bad_input_is_refused_and_the_model_left_alone():
    model, _ = load_base("tiny", device="cpu")
    with pytest.raises(ValueError, match="form='keys' is none of 'key_value', 'hidden'"):
        add_p_tuning_v2(model, form="keys")
    assert all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="looks for the first or last token"):
        add_p_tuning_v2(classifier("tiny-llama"), form="hidden")
    for other in ("hidden", "key_value"):
        causal = tuned("tiny-llama", other, torch.float32)
        batch = batch_of(7, 2, 5)
        losses = train(causal, [batch], max_steps=10, lr=1e-2, progress=False).train_loss
        assert losses[-1] < losses[0]
