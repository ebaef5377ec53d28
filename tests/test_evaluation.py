"""Label words, completion and the Wilson interval against independent answers."""

import copy

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    MptConfig,
    OPTConfig,
    RobertaConfig,
    RwkvConfig,
    XGLMConfig,
)

from minipeft import classify, complete, encode, load_base, wilson_interval
from minipeft.assets.models import TINY

PROMPTS = ["a", "Review: fine\nSentiment:", "一个长一点的例子 with more bytes", "xyz", "q" * 90]


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_classify_batched_equals_one_by_one(name, batch_size):
    model, tokenizer = load_base(name, device="cpu", seed=3)
    first = [tokenizer(word)["input_ids"][0] for word in (" negative", " positive")]
    truth = []
    for prompt in PROMPTS:
        with torch.no_grad():
            logits = model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]
        truth.append(int(logits[first[1]] > logits[first[0]]))
    assert classify(model, tokenizer, PROMPTS, batch_size=batch_size).tolist() == truth


def test_classify_leaves_the_training_mode_alone(tiny):
    model, tokenizer = tiny
    classify(model.train(), tokenizer, PROMPTS)
    assert model.training
    classify(model.eval(), tokenizer, PROMPTS)
    assert not model.training


def test_classify_refuses_what_it_cannot_answer(tiny):
    with pytest.raises(ValueError, match="cannot be told apart"):
        classify(*tiny, ["x"], choices=("good", "great"))
    with pytest.raises(ValueError, match="prompt is empty"):
        classify(*tiny, ["x", ""])
    with pytest.raises(ValueError, match="choice is empty"):
        classify(*tiny, ["x"], choices=("a", ""))
    with pytest.raises(ValueError, match="list of prompts"):
        classify(*tiny, "one string")
    assert classify(*tiny, []).tolist() == []


SIZES = {"vocab_size": 261, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BERT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 160}  # fmt: skip
BART = {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48,
        "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48,
        "max_position_embeddings": 160, "forced_eos_token_id": None}  # fmt: skip
OWN_POSITIONS = {  # models that count their positions in a way of their own, or have none
    "opt": OPTConfig(**SIZES, hidden_size=32, ffn_dim=48, num_hidden_layers=2,
                     num_attention_heads=4, word_embed_proj_dim=32, max_position_embeddings=160),
    "roberta": RobertaConfig(**SIZES, **BERT, is_decoder=True),
    "bart": BartConfig(**SIZES, **BART),
    "mpt": MptConfig(vocab_size=261, d_model=32, n_layers=2, n_heads=4, max_seq_len=160),
    "xglm": XGLMConfig(**SIZES, d_model=32, ffn_dim=48, num_layers=2, attention_heads=4),
    "rwkv": RwkvConfig(vocab_size=261, hidden_size=32, num_hidden_layers=2, context_length=160),
}  # fmt: skip


def _own_positions(name):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(OWN_POSITIONS[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.dim() > 1 else 1)
    return model.eval()


@torch.no_grad()
def _next_logits(model, ids):
    return model(input_ids=torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("name", OWN_POSITIONS)
def test_no_position_is_invented_for_a_model(name, tiny):
    """Batched, each prompt is answered as alone, by the model's plain forward without a cache."""
    model, tokenizer = _own_positions(name), tiny[1]
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    choices = [chr(c) for c in range(ord("A"), ord("Z"))]
    firsts = [tokenizer(choice)["input_ids"][0] for choice in choices]
    truth = [int(_next_logits(model, row)[firsts].argmax()) for row in rows]
    assert len(set(truth)) > 1
    assert classify(model, tokenizer, PROMPTS, choices).tolist() == truth
    if name == "roberta":  # transformers' generate begins at 0, even with one prompt
        with pytest.raises(ValueError, match="does not number its positions 0, 1"):
            complete(model, tokenizer, PROMPTS[:1])
        return
    if name == "rwkv":  # transformers' own cache is not exact here
        alone = [complete(model, tokenizer, [prompt], max_new_tokens=4)[0] for prompt in PROMPTS]
        assert complete(model, tokenizer, PROMPTS, max_new_tokens=4) == alone
        return
    model.generation_config.eos_token_id = None
    new = complete(model, tokenizer, PROMPTS, max_new_tokens=4)
    for row, text in zip(rows, new, strict=True):
        for _ in range(4):
            row.append(int(_next_logits(model, row).argmax()))
        assert text == tokenizer.decode(row[-4:], skip_special_tokens=True)


def _framed(form):
    tokenizer = load_base("tiny", device="cpu")[1]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=form, special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer.chat_template = (
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    )
    return tokenizer


@pytest.mark.parametrize("form", ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>"])
def test_training_and_answering_see_the_same_prompt(form, tiny):
    model, tokenizer = tiny[0], _framed(form)
    chat = [{"role": "user", "content": "hi"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False)
    prompts = ["Question: x?", "abc", rendered, chat]
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True
    )
    for prompt in prompts:
        trained = encode(tokenizer, prompt, " yes")
        prompt_ids = [i for i, label in zip(trained["input_ids"], trained["labels"], strict=True)
                      if label == -100]  # fmt: skip
        assert trained["input_ids"] == prompt_ids + tokenizer(" yes", add_special_tokens=False)[
            "input_ids"
        ] + [2]
        for answer in (classify, complete):
            answer(model, tokenizer, [prompt])
            assert seen[0].tolist() == [prompt_ids], answer.__name__
            seen.clear()
    assert encode(tokenizer, rendered)["input_ids"].count(1) == 1


def test_a_tokenizer_without_a_pad_token_and_a_model_in_part_in_training_mode(tiny):
    model, tokenizer = tiny
    expected = complete(model, tokenizer, PROMPTS, max_new_tokens=4)
    tokenizer.pad_token = None
    model.train()
    model.lm_head.eval()
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=4) == expected
    assert model.training and not model.lm_head.training
    out = {"return_dict_in_generate": True, "output_scores": True}
    assert complete(model, tokenizer, PROMPTS, max_new_tokens=4, **out) == expected
    torch.manual_seed(0)
    many = complete(model, tokenizer, ["a", "bc"], 4, do_sample=True, num_return_sequences=3)
    assert len(many) == 6


def test_what_is_no_causal_language_model_is_refused(tiny):
    tokenizer = tiny[1]
    classifier = AutoModelForSequenceClassification.from_config(tiny[0].config)
    both = BartForConditionalGeneration(OWN_POSITIONS["bart"])
    for model in (classifier, both, torch.nn.Linear(2, 2)):
        for answer in (classify, complete):
            with pytest.raises(ValueError, match=f"and {type(model).__name__} is none"):
                answer(model, tokenizer, ["a"])


@pytest.mark.parametrize("name", TINY)
def test_complete_batched_equals_one_by_one(name):
    model, tokenizer = load_base(name, device="cpu", seed=1)
    truth = []
    for prompt in PROMPTS:
        encoded = tokenizer(prompt, return_tensors="pt")
        out = model.generate(**encoded, max_new_tokens=8, do_sample=False)
        new = out[0, encoded["input_ids"].shape[1] :]
        truth.append(tokenizer.decode(new, skip_special_tokens=True))
    seen = []
    model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    for size in (2, len(PROMPTS), 32):
        assert complete(model, tokenizer, PROMPTS, 8, size) == truth
        most = 1 if name == "tiny-bloom" else min(size, len(PROMPTS))  # no two are equally long
        assert max(seen) == most
        seen.clear()


def test_complete_without_prompts(tiny):
    assert complete(*tiny, []) == []
    with pytest.raises(ValueError, match="prompt is empty"):
        complete(*tiny, [""])


def test_wilson_interval_by_its_definition():
    """Its ends are the shares p with |p_hat - p| = z sqrt(p (1 - p) / n)."""
    for correct, total in [(78, 100), (1, 7), (299, 300)]:
        for end in wilson_interval(correct, total):
            distance = abs(correct / total - end)
            assert distance == pytest.approx(1.96 * (end * (1 - end) / total) ** 0.5, rel=1e-9)
    assert wilson_interval(0, 10)[0] == 0.0 and wilson_interval(10, 10)[1] == 1.0
    for bad in [(1, 0), (-1, 5), (6, 5)]:
        with pytest.raises(ValueError, match="is not a share"):
            wilson_interval(*bad)
