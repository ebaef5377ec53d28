"""What all methods with virtual tokens promise, each on five architectures."""

import copy
import warnings
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from soft import (
    IN_PEFT,
    METHODS,
    NAMES,
    N,
    as_peft,
    batch_of,
    close,
    trainables,
    tuned,
)
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainingArguments,
)

from minipeft import (
    Collator,
    add_lora,
    add_prefix_tuning,
    add_prompt_tuning,
    encode,
    load_adapter,
    load_base,
    position_ids_from_mask,
    save_adapter,
    train,
)
from minipeft.memory import estimate, measure
from minipeft.technique.kv_cache import key_value_shape, per_layer, table_of_cache

EVERY = pytest.mark.parametrize("name", NAMES)
EACH = pytest.mark.parametrize("method", METHODS)
quiet = pytest.mark.filterwarnings(
    "ignore:Position ids are not supported", "ignore:.is_gradient_checkpointing. is deprecated"
)


@quiet
@EVERY
@pytest.mark.parametrize("method", IN_PEFT)
@given(data=st.data())
@settings(max_examples=5, deadline=None, derandomize=True)
def test_logits_and_gradients_are_those_of_hf_peft(name, method, data):
    n = data.draw(st.integers(1, 6))
    model = tuned(name, method, n=n, seed=data.draw(st.integers(0, 9)))
    other, pairs = as_peft(model, name, method, n=n)
    rows, seq = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 8))
    batch = batch_of(data.draw(st.integers(0, 99)), rows, seq)
    ours, theirs = model(**batch), other(**batch)
    assert ours.logits.shape[:2] == batch["input_ids"].shape
    seq, real = batch["input_ids"].shape[1], batch["attention_mask"].bool()
    assert close(ours.logits[real], theirs.logits[:, -seq:][real])
    assert close(ours.loss, theirs.loss)
    ours.loss.backward()
    theirs.loss.backward()
    for mine, yours in pairs:
        assert close(mine.grad, yours.grad)
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@quiet
@EVERY
@pytest.mark.parametrize("method", IN_PEFT)
def test_generation_is_that_of_hf_peft_token_by_token(name, method):
    model = tuned(name, method, torch.float32)
    other, _ = as_peft(model, name, method, torch.float32)
    ids = torch.arange(20, 32).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}):
        options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None} | options
        torch.manual_seed(0)
        ours = model.generate(**batch, **options)
        torch.manual_seed(0)
        assert torch.equal(ours, other.generate(**batch, **options))


@EVERY
@EACH
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_batch_gives_what_its_rows_give_one_by_one(name, method, side):
    # float32: in float64 transformers' own Bloom gives NaN when it is padded on the left
    model = tuned(name, method, torch.float32)
    batch = batch_of(3, 4, 8, side, method)
    together = model(**batch, output_hidden_states=True)
    assert len({int(row.sum()) for row in batch["attention_mask"]}) > 1, "lengths must differ"
    assert together.hidden_states[-1].shape[1] == batch["input_ids"].shape[1]
    for i, mask in enumerate(batch["attention_mask"].bool()):
        alone = model(batch["input_ids"][i][mask][None])
        assert torch.allclose(together.logits[i][mask], alone.logits[0], atol=1e-5)


@EVERY
@EACH
def test_generation_in_left_padded_batches_is_that_of_each_row(name, method):
    model = tuned(name, method, torch.float32)
    batch = batch_of(5, 3, 7, "left", method)
    del batch["labels"]
    plain = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for options in ({}, {"use_cache": False}, {"num_beams": 3}):
        together = model.generate(**batch, **plain, **options)[:, -6:]
        for i, mask in enumerate(batch["attention_mask"].bool()):
            row = batch["input_ids"][i][mask][None]
            alone = model.generate(row, attention_mask=torch.ones_like(row), **plain, **options)
            assert torch.equal(alone[0, -6:], together[i])


@EVERY
@EACH
def test_a_used_cache_goes_on_where_the_text_ended(name, method):
    model = tuned(name, method)
    ids = batch_of(8, 1, 9, method=method)["input_ids"]
    whole = model(ids).logits
    with torch.no_grad():  # a cache with a graph cannot be copied
        first = model(ids[:, :-2], use_cache=True)
    mask = torch.ones_like(ids)
    for options in ({}, {"attention_mask": mask}):
        cache = copy.deepcopy(first.past_key_values)
        rest = model(ids[:, -2:], past_key_values=cache, **options).logits
        assert close(rest, whole[:, -2:])
    if method != "template":  # which has its virtual tokens in the text
        with pytest.raises(ValueError, match="give the new tokens only"):
            model(ids, past_key_values=first.past_key_values, attention_mask=mask)
        embeds = model.get_input_embeddings()(ids[:, -2:])
        with pytest.raises(ValueError, match="give input_ids, not inputs_embeds"):
            model(inputs_embeds=embeds, past_key_values=first.past_key_values)


def count(calls, *_):
    calls.append(1)


@EVERY
@EACH
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name, method, reentrant):
    found = []
    for checkpointing in (False, True):
        model = tuned(name, method).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        calls = []
        norm = [m for n, m in model.named_modules() if n.endswith(("1.input_layernorm", "1.ln_1"))]
        norm[0].register_forward_hook(partial(count, calls))
        model(**batch_of(6, 2, 6, method=method), use_cache=False).loss.backward()
        assert len(calls) == 1 + checkpointing, "the blocks must really run again"
        found.append([p.grad for p in trainables(model).values()])
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-14) for a, b in zip(*found, strict=True))
    assert all(grad.any() for grad in found[0])


@pytest.mark.parametrize("method", ["prefix", "projected", "key_value"])
def test_generate_while_checkpointing_is_switched_on(method):
    """In training mode, that is, where transformers 5.23 lets a model without prefix see nothing
    but the last token."""
    model = tuned("tiny-llama", method, torch.float32)
    batch = batch_of(5, 2, 6, "left", method)
    del batch["labels"]
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    expected = model.generate(**batch, **options)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(**batch, **options), expected)


@pytest.mark.parametrize("method", METHODS)
def test_trainer_train_deepcopy_and_state_dict(method, tmp_path):
    model = tuned("tiny-llama", method, torch.float32)
    twin = copy.deepcopy(model)
    batch = batch_of(7, 2, 5, method=method)
    rows = [
        {"input_ids": row[mask].tolist(), "labels": labels[mask].tolist()}
        for row, labels, mask in zip(
            batch["input_ids"], batch["labels"], batch["attention_mask"].bool(), strict=True
        )
    ]
    frozen = [p.clone() for p in model.parameters() if not p.requires_grad]
    arguments = TrainingArguments(
        tmp_path, max_steps=3, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        learning_rate=1e-2, remove_unused_columns=False, logging_strategy="no",
        eval_strategy="steps", eval_steps=2,
    )  # fmt: skip
    Trainer(model, arguments, Collator(0), rows, rows).train()
    for ours, theirs in zip(trainables(model).values(), trainables(twin).values(), strict=True):
        assert not torch.equal(ours, theirs), "it moved, and its copy did not"
    still = [p for p in model.parameters() if not p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(still, frozen, strict=True))
    twin.load_state_dict(model.state_dict())
    model.eval(), twin.eval()
    assert torch.equal(twin(**batch).logits, model(**batch).logits)
    with torch.no_grad():
        model.virtual_tokens.requires_grad_(False)
        for parameter in model.virtual_tokens.parameters():
            parameter.zero_()
    assert not torch.equal(twin(**batch).logits, model(**batch).logits), "the copy has its own"
    losses = train(twin, [batch], max_steps=15, lr=1e-2, progress=False).train_loss
    assert losses[-1] < losses[0]
    train(twin, [batch], max_steps=1, lr=1e-2, precision="bfloat16", progress=False)
    train(twin, [batch], max_steps=1, lr=1e-2, gradient_checkpointing=True, progress=False)
    assert twin.to(torch.float64)(**batch).logits.dtype == torch.float64


@EVERY
@EACH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_float32_trainables(name, method, dtype):
    model, _ = load_base(name, device="cpu", dtype=dtype)
    torch.manual_seed(1)
    METHODS[method](model)
    assert {p.dtype for p in trainables(model).values()} == {torch.float32}
    wide, _ = load_base(name, device="cpu", dtype=torch.float32)
    METHODS[method](wide)
    wide.load_state_dict(model.state_dict())
    batch = batch_of(3, 2, 6, method=method)
    out = model(**batch)
    assert out.logits.dtype == dtype
    assert close(out.logits.float(), wide(**batch).logits, 0.05)
    out.loss.backward()
    assert all(p.grad.isfinite().all() for p in trainables(model).values())


@quiet
@EVERY
@EACH
def test_saved_and_loaded_here_and_by_hf_peft(name, method, tmp_path):
    import peft

    model = tuned(name, method, torch.float32)
    batch = batch_of(2, 3, 6, method=method)
    expected = model(**batch).logits
    folder = save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json", "adapter_model.safetensors",
    ]  # fmt: skip
    again = load_adapter(load_base(name, device="cpu")[0], folder)
    assert torch.allclose(again(**batch).logits, expected, atol=1e-6)
    assert trainables(again) and not again.training
    for parameter in trainables(again).values():
        assert parameter.dtype == torch.float32
    if method == "template":  # HF peft would put the vectors in front: it must not read this
        with pytest.raises((KeyError, ValueError)):
            peft.PeftModel.from_pretrained(load_base(name, device="cpu")[0], folder)
        return
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # HF peft knows every setting that it finds there
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing. is deprecated")
        other = peft.PeftModel.from_pretrained(load_base(name, device="cpu")[0], folder).eval()
    seq, real = batch["input_ids"].shape[1], batch["attention_mask"].bool()
    assert close(other(**batch).logits[:, -seq:][real], expected[real], 1e-5)
    if method in IN_PEFT:  # what HF peft wrote, and what it writes of ours, comes back the same
        theirs, _ = as_peft(model, name, method, torch.float32)
        theirs.save_pretrained(tmp_path / "theirs")
        back = load_adapter(load_base(name, device="cpu")[0], tmp_path / "theirs")
        assert torch.allclose(back(**batch).logits, expected, atol=1e-5)


@EACH
def test_an_adapter_of_another_base_is_refused_and_the_model_left_alone(method, tmp_path):
    folder = save_adapter(tuned("tiny-llama", method, torch.float32), tmp_path / "adapter")
    small = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            num_key_value_heads=1, vocab_size=261, pad_token_id=0,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match="does not fit this base model"):
        load_adapter(small, folder)
    assert all(p.requires_grad for p in small.parameters())
    assert not hasattr(small, "virtual_tokens")


@EACH
def test_one_technique_on_a_model(method):
    model = tuned("tiny-llama", method)
    for again in METHODS.values():
        with pytest.raises(ValueError, match="already; take it off with remove"):
            again(model)
    with pytest.raises(ValueError, match="already; take it off with remove"):
        add_lora(model)
    with pytest.raises(ValueError, match="LlamaForCausalLM has lora already"):
        METHODS[method](add_lora(load_base("tiny", device="cpu")[0]))


@EACH
@pytest.mark.parametrize("n", [0, -1, 2.0, True])
def test_a_length_that_is_none(method, n):
    model, _ = load_base("tiny", device="cpu")
    with pytest.raises(ValueError, match=f"num_virtual_tokens={n} is not a length"):
        METHODS[method](model, n)
    assert all(p.requires_grad for p in model.parameters())


@EACH
def test_a_static_cache_is_refused(method):
    model = tuned("tiny-llama", method, torch.float32)
    batch = batch_of(5, 1, 6, method=method)
    del batch["labels"]
    with pytest.raises(ValueError, match="static cache has no room"):
        model.generate(**batch, max_new_tokens=4, cache_implementation="static")


def windowed(layers):
    """A Qwen2 whose upper two of `layers` see four tokens back."""
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=261, use_sliding_window=True, sliding_window=4,
        max_window_layers=layers - 2,
    )  # fmt: skip
    return Qwen2ForCausalLM(config).eval()


def declared_elsewhere():
    config = MistralConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=261, sliding_window=4,
    )  # fmt: skip
    return MistralForCausalLM(config).eval()


@EACH
def test_a_window_that_hides_virtual_tokens_is_found_on_adding(method):
    """It is tried, not read: Mistral and Phi-3 declare theirs elsewhere than in layer_types."""
    for model in (windowed(3), declared_elsewhere()):
        before = {name: p.clone() for name, p in model.state_dict().items()}
        with pytest.raises(ValueError, match="ForCausalLM .* longer than its window"):
            METHODS[method](model)
        assert model.state_dict().keys() == before.keys() and not model._forward_pre_hooks
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", [m for m in METHODS if m != "template"])
def test_learned_positions_have_an_end(method):
    model = tuned("tiny-gpt2", method, torch.float32)
    fits = torch.full((1, 512 - N), 20)
    assert model(fits).logits.isfinite().all()
    with pytest.raises(ValueError, match="3 virtual and 510 real tokens are more than the 512"):
        model(torch.full((1, 510), 20))


@EACH
def test_positions_of_the_caller_are_those_of_the_text(method):
    model = tuned("tiny-gpt2", method)
    batch = batch_of(3, 3, 7, "left", method)
    del batch["labels"]
    positions = position_ids_from_mask(batch["attention_mask"])
    real = batch["attention_mask"].bool()
    ours = model(**batch, position_ids=positions).logits
    assert torch.allclose(ours[real], model(**batch).logits[real])
    ids = batch["input_ids"][:1, -int(real[0].sum()) :]
    by_position = model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits
    assert torch.allclose(by_position, model(ids).logits)


@EACH
def test_masks_and_outputs_of_other_forms(method):
    model = tuned("tiny-llama", method)
    batch = batch_of(3, 2, 7, method=method)
    labels = batch.pop("labels")
    expected = model(**batch).logits
    for dtype in (torch.bool, torch.float32, torch.int32):
        mask = batch["attention_mask"].to(dtype)
        found = model(batch["input_ids"], mask).logits  # by position
        assert torch.allclose(found, expected)
    kept = model(**batch, logits_to_keep=2).logits
    assert torch.allclose(kept, expected[:, -2:])
    assert model(**batch, use_cache=False).past_key_values is None
    if method == "template":
        return
    with pytest.raises(ValueError, match="return_dict=True"):
        model(**batch, return_dict=False)
    with pytest.raises(ValueError, match="The mask has 4 dimensions"):
        model(batch["input_ids"], torch.ones(2, 1, 7, 7))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    again = model(inputs_embeds=embeds, attention_mask=batch["attention_mask"], labels=labels)
    assert torch.allclose(again.logits, expected)


def test_labels_of_virtual_positions_are_no_targets():
    model = tuned("tiny-llama", "prompt")
    batch = batch_of(3, 2, 7)
    out = model(**batch)
    shifted = out.logits[:, :-1].flatten(0, 1)
    by_hand = torch.nn.functional.cross_entropy(shifted, batch["labels"][:, 1:].flatten())
    assert close(out.loss, by_hand)


@EVERY
def test_the_table_of_a_cache_is_the_cache(name):
    model, _ = load_base(name, device="cpu", dtype=torch.float64)
    ids = torch.arange(20, 26)[None]
    shape = key_value_shape(model)
    assert shape == (2, 2 if name in ("tiny-llama", "tiny-qwen2") else 4, 8)
    table = table_of_cache(model, ids, 4)
    assert table.shape == (4, 2 * 2 * shape[1] * shape[2])
    cache = model(ids[:, :4], use_cache=True).past_key_values
    for layer, (keys, values) in enumerate(per_layer(table, shape)):
        assert torch.allclose(keys, cache.layers[layer].keys[0])
        assert torch.allclose(values, cache.layers[layer].values[0])


@EVERY
def test_a_prompt_in_front_and_in_the_cache_are_the_text_itself(name):
    """Typed, as embeddings, as keys and values: one function, padded on either side too."""
    text, words = "Is it good?", batch_of(4, 3, 6)["input_ids"]
    plain, tokenizer = load_base(name, device="cpu")
    typed = torch.tensor([tokenizer(text)["input_ids"]] * 3)
    expected = plain(torch.cat([typed, words], 1)).logits[:, typed.shape[1] :]
    for add in (
        lambda m: add_prompt_tuning(m, None, "text", text),
        lambda m: add_prefix_tuning(m, None, text=text),
    ):
        model = add(load_base(name, device="cpu")[0])
        assert model.virtual_tokens.num_virtual_tokens == len(text)  # a token per byte
        assert torch.allclose(model(words).logits, expected, atol=1e-5)
        padding = torch.zeros(3, 2, dtype=torch.int64)
        mask = torch.cat([padding, torch.ones_like(words)], 1)
        left = model(torch.cat([padding, words], 1), attention_mask=mask).logits[:, 2:]
        assert torch.allclose(left, expected, atol=1e-5)
        ours = model.generate(words, attention_mask=torch.ones_like(words), max_new_tokens=5,
                              do_sample=False, eos_token_id=None)  # fmt: skip
        both = torch.cat([typed, words], 1)
        theirs = plain.generate(both, attention_mask=torch.ones_like(both), max_new_tokens=5,
                                do_sample=False, eos_token_id=None)  # fmt: skip
        assert torch.equal(ours[:, -5:], theirs[:, -5:])


def test_text_needs_words_and_a_tokenizer():
    for add in (
        lambda m, t: add_prompt_tuning(m, 3, "text", t),
        lambda m, t: add_prefix_tuning(m, 3, text=t),
    ):
        with pytest.raises(ValueError, match="To start from text, give some"):
            add(load_base("tiny", device="cpu")[0], "")
        model, tokenizer = load_base("tiny", device="cpu")
        del model.minipeft_tokenizer
        with pytest.raises(ValueError, match="pass tokenizer="):
            add(model, "abc")
    add_prompt_tuning(model, 3, "text", "abc", tokenizer)
    row = encode(tokenizer, "a", "b")
    assert model(torch.tensor([row["input_ids"]])).logits.isfinite().all()


@EVERY
@pytest.mark.parametrize("method", sorted(METHODS.keys() - {"template", "lstm"}))
def test_memory_is_predicted_and_measured_alike_on_fake_and_on_real_tensors(name, method):
    config = load_base(name, device="cpu")[0].config
    options = {"batch": 2, "seq": 32}
    fake = measure(config, METHODS[method], **options)
    real = measure(load_base(name, device="cpu")[0], METHODS[method], **options)
    assert (fake.total, fake.parts) == (real.total, real.parts)
    assert fake.parts["logits"] >= 4 * 2 * 32 * 261, "the logits are not taken for activations"
    if name != "tiny-gpt_neox":  # of which there are no formulas
        predicted = estimate(config, METHODS[method], **options)
        assert predicted.total == pytest.approx(fake.total, rel=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@EACH
def test_on_cuda(method):
    model = tuned("tiny-llama", method, torch.float32)
    batch = batch_of(8, 2, 6, method=method)
    expected = model(**batch).logits
    found = model.to("cuda")(**{k: v.to("cuda") for k, v in batch.items()}).logits.cpu()
    assert close(found, expected, 1e-4)


@pytest.mark.parametrize("method", ["prompt", "mlp", "prefix", "key_value", "hidden"])
def test_logits_can_be_asked_for_at_places_of_the_text(method):
    model, ids = tuned("tiny-llama", method), torch.arange(10, 18)[None]
    places = torch.tensor([2, -1, 6])
    assert close(model(ids, logits_to_keep=places).logits, model(ids).logits[:, places])
