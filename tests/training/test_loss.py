"""What a batch predicts: each kind of model against the loss of transformers itself."""

import pytest
import torch
import transformers as hf
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from minipeft import add_lora, evaluate, load_base, train
from minipeft.freezing import trainable_parameters
from minipeft.training.loss import KINDS, count_targets, kind_of, loss_sum

BERT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 40, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0,
}  # fmt: skip
LLAMA = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "vocab_size": 40, "pad_token_id": 0,
}  # fmt: skip
SMALL_T5 = hf.T5Config(
    d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40, dropout_rate=0.0,
    decoder_start_token_id=0,
)  # fmt: skip
SMALL_BART = hf.BartConfig(
    d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, vocab_size=40,
    decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, dropout=0.0,
)  # fmt: skip


def rows_of(count, seed=0, width=8):
    """Padded rows of unequal length."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 40, (count, width), generator=generator)
    lengths = torch.randint(4, width + 1, (count, 1), generator=generator)
    mask = (torch.arange(width) < lengths).long()
    return {"input_ids": ids * mask, "attention_mask": mask}, generator


def classes(count, seed, generator, rows):
    labels = torch.randint(0, 3, (count,), generator=generator)
    labels[0] = -100 if seed else labels[0]
    return {"labels": labels}


def tokens(high):
    def labels(count, seed, generator, rows):
        found = torch.randint(0, high, rows["input_ids"].shape, generator=generator)
        drop = torch.rand(found.shape, generator=generator) < 0.2 + 0.4 * seed
        return {"labels": found.masked_fill(drop | (rows["attention_mask"] == 0), -100)}

    return labels


def numbers(*shape):
    def labels(count, seed, generator, rows):
        return {"labels": torch.randn(count, *shape, generator=generator)}

    return labels


def several(count, seed, generator, rows):
    return {"labels": torch.randint(0, 2, (count, 3), generator=generator).float()}


def spans(count, seed, generator, rows):
    start = torch.randint(0, 3, (count,), generator=generator)
    return {"start_positions": start, "end_positions": start + 1}


MODELS = {  # {name: (what makes it, its labels)}
    "bert classes": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3)),
        classes,
    ),
    "llama classes": (
        lambda: hf.LlamaForSequenceClassification(hf.LlamaConfig(**LLAMA, num_labels=3)),
        classes,
    ),
    "bert regression": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=1)),
        numbers(),
    ),
    "bert two numbers": (
        lambda: hf.BertForSequenceClassification(
            hf.BertConfig(**BERT, num_labels=2, problem_type="regression")
        ),
        numbers(2),
    ),
    "bert several labels": (
        lambda: hf.BertForSequenceClassification(hf.BertConfig(**BERT, num_labels=3)),
        several,
    ),
    "bert tags": (
        lambda: hf.BertForTokenClassification(hf.BertConfig(**BERT, num_labels=3)),
        tokens(3),
    ),
    "bert masked": (lambda: hf.BertForMaskedLM(hf.BertConfig(**BERT)), tokens(40)),
    "roberta spans": (
        lambda: hf.RobertaForQuestionAnswering(
            hf.RobertaConfig(**BERT, max_position_embeddings=20)
        ),
        spans,
    ),
    "t5": (lambda: hf.T5ForConditionalGeneration(SMALL_T5), tokens(40)),
    "bart": (lambda: hf.BartForConditionalGeneration(SMALL_BART), tokens(40)),
    "llama": (lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)), tokens(40)),
}


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def batch_for(name, count=3, seed=0):
    rows, generator = rows_of(count, seed)
    return rows | MODELS[name][1](count, seed, generator, rows)


def by_hand(model, batches):
    """(loss summed, number of targets) out of the logits, by torch alone."""
    loss, count = 0.0, 0
    for batch in batches:
        out = model(**batch)
        labels = batch.get("labels")
        if labels is None:
            for logits, key in (
                (out.start_logits, "start_positions"), (out.end_logits, "end_positions"),
            ):  # fmt: skip
                loss = loss + cross_entropy(logits, batch[key], reduction="sum").item() / 2
            count += len(batch["input_ids"])
            continue
        if labels.is_floating_point():
            of = mse_loss if getattr(model.config, "problem_type", None) == "regression" else None
            of = of or binary_cross_entropy_with_logits
            loss += of(out.logits.view_as(labels), labels, reduction="sum").item()
            count += labels.numel()
            continue
        logits = out.logits
        if isinstance(model, hf.LlamaForCausalLM):
            logits, labels = logits[:, :-1], labels[:, 1:]
        logits = logits.reshape(-1, logits.shape[-1])
        loss += cross_entropy(logits, labels.flatten(), reduction="sum").item()
        count += int((labels != -100).sum())
    return loss, count


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_is_the_models_own_loss_over_all_targets(name):
    model, batches = build(name), [batch_for(name, 3), batch_for(name, 2, seed=1)]
    one = evaluate(model, batches[:1])
    assert one == pytest.approx(model(**batches[0]).loss.item(), rel=1e-5)  # by transformers alone
    loss, count = by_hand(model, batches)
    assert count == sum(count_targets(batch, model) for batch in batches)
    assert evaluate(model, batches) == pytest.approx(loss / count, rel=1e-5)


def joined(batches):
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


@pytest.mark.parametrize("name", MODELS)
def test_accumulation_is_one_large_batch(name):
    batches = [batch_for(name, 3), batch_for(name, 2, seed=1), batch_for(name, 1)]
    options = {"max_steps": 3, "lr": 1e-2, "progress": False}
    small, large = build(name), build(name)
    a = train(small, batches, accumulation=3, **options)
    b = train(large, [joined(batches)], **options)
    assert a.train_loss == pytest.approx(b.train_loss, rel=1e-4)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-3)
    assert a.train_loss[-1] < a.train_loss[0]


@pytest.mark.parametrize("name", ["bert classes", "bert tags", "bert masked", "t5", "llama"])
def test_a_batch_without_a_target_adds_nothing(name):
    """So it is with the rows that one of several ranks takes, if the others have the targets."""
    model, batch = build(name), batch_for(name)
    batch["labels"] = torch.full_like(batch["labels"], -100)
    loss = loss_sum(model, batch)
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert loss.item() == 0 and grads and not any(g.any() for g in grads)


def test_a_loss_of_ones_own_trains_a_classifier():
    model, other = build("bert classes"), build("bert classes")
    batches = [batch_for("bert classes", 3), batch_for("bert classes", 2)]
    options = {"max_steps": 4, "lr": 1e-2, "progress": False}
    mine = train(model, batches, loss_sum=lambda m, b: m(**b).loss * len(b["labels"]), **options)
    theirs = train(other, batches, **options)
    assert mine.train_loss == pytest.approx(theirs.train_loss, rel=1e-5)


def test_kinds_of_models():
    for name, kind in [
        ("LlamaForCausalLM", "causal language model"),
        ("GPT2LMHeadModel", "causal language model"),
        ("BertLMHeadModel", "causal language model"),
        ("ReformerModelWithLMHead", "causal language model"),
        ("XLMWithLMHeadModel", "masked language model"),
        ("DistilBertForMaskedLM", "masked language model"),
        ("DebertaV2ForTokenClassification", "token classification"),
        ("BartForSequenceClassification", "sequence classification"),
        ("MarianMTModel", "sequence to sequence"),
        ("XLNetLMHeadModel", None),  # permutations of the words
        ("BertForPreTraining", None),
        ("BertForNextSentencePrediction", None),
        ("BertModel", None),
        ("ViTForImageClassification", None),
    ]:
        model_class = getattr(hf, name)
        with torch.device("meta"):
            model = model_class.__new__(model_class)
        model.config = model_class.config_class()
        assert kind_of(model) == kind, name
        assert kind is None or kind in KINDS
    with torch.device("meta"):  # a decoder that takes images too
        model = hf.Gemma3ForConditionalGeneration.__new__(hf.Gemma3ForConditionalGeneration)
    model.config = hf.Gemma3Config()
    assert kind_of(model) == "causal language model"


def test_peft_is_seen_through():
    import peft

    model = build("bert classes")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"])
    wrapped = peft.get_peft_model(model, config).eval()
    batch = batch_for("bert classes")
    batch["token_type_ids"] = torch.zeros_like(batch["input_ids"])
    assert kind_of(wrapped) == "sequence classification"
    assert evaluate(wrapped, [batch]) == pytest.approx(wrapped(**batch).loss.item(), rel=1e-6)


BAD = [
    ("llama", {"token_type_ids": torch.zeros(3, 8)}, "token_type_ids, which LlamaForCausalLM does"),
    ("llama", {"labels": torch.tensor([0, 1, 2])}, r"labels \(3,\) of torch.int64; LlamaForCaus"),
    ("llama", {"labels": torch.ones(3, 7).long()}, r"labels \(3, 7\)"),
    ("llama", {"labels": torch.zeros(3, 8)}, "of torch.float32"),
    ("llama", {"labels": torch.ones(3, 8).int()}, r"of torch.int32; .* int64 \(batch, seq\)"),
    ("bert classes", {"labels": torch.tensor([0, 1, 2]).int()}, "wants class numbers, int64"),
    ("llama", {"labels": torch.full((3, 8), 40)}, "A label is 40, but the model tells apart 0"),
    ("llama", {"labels": torch.full((3, 8), -1)}, "A label is -1"),
    ("bert masked", {"labels": torch.full((3, 8), -100)}, "no target token: every label is -100"),
    ("bert tags", {"labels": torch.full((3, 8), 3)}, "A label is 3, but the model tells apart 0"),
    ("bert classes", {"labels": torch.tensor([0, 1, 3])}, "A label is 3"),
    ("bert classes", {"labels": torch.tensor([0.0, 1.0, 2.0])}, r"wants numbers, float32 \(batch"),
    ("bert classes", {"labels": torch.zeros(3, 8).long()}, r"wants class numbers, int64"),
    ("bert classes", {"labels": torch.full((3,), -100)}, "every label is -100"),
    ("bert regression", {"labels": torch.tensor([0, 1, 2])}, r"\(regression\) wants numbers"),
    ("bert two numbers", {"labels": torch.zeros(3)}, r"wants numbers, float32 \(batch, 2\)"),
    ("roberta spans", {"start_positions": torch.tensor([0, 1, 8])}, "positions go from 0 to 7"),
    ("roberta spans", {"end_positions": torch.tensor([0, -100, 1])}, "positions go from 0 to 7"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "wrong", "words"), BAD)
def test_what_does_not_fit_gets_one_sentence(name, wrong, words):
    model, batch = build(name), batch_for(name) | wrong
    before = {n: p.detach().clone() for n, p in trainable_parameters(model).items()}
    problem = getattr(model.config, "problem_type", None)
    for call in (
        lambda: evaluate(model, [batch]),
        lambda: train(model, [batch], max_steps=1, lr=1e-2, progress=False),
    ):
        with pytest.raises(ValueError, match=words):
            call()
    assert all(torch.equal(p, before[n]) for n, p in trainable_parameters(model).items())
    assert getattr(model.config, "problem_type", None) == problem


def test_a_model_without_a_known_loss_is_refused_by_name():
    model = hf.BertForPreTraining(hf.BertConfig(**BERT))
    batch = batch_for("bert masked") | {"next_sentence_label": torch.tensor([0, 1, 0])}
    options = {"max_steps": 1, "lr": 1e-2, "progress": False}
    own = {"loss_sum": lambda m, b: m(**b).loss * count_targets(b, m)}
    for call in (
        lambda: evaluate(model, [batch]),
        lambda: train(model, [batch], **options),
        lambda: train(model, [batch], eval_batches=[batch], **own, **options),
    ):
        with pytest.raises(ValueError, match="BertForPreTraining has no loss that is known here"):
            call()
    want = model.eval()(**batch).loss.item()
    assert train(model.train(False), [batch], **own, **options).train_loss == [
        pytest.approx(want, rel=1e-6)
    ]
    with pytest.raises(ValueError, match="Batch 0 has no start_positions, only"):
        evaluate(build("roberta spans"), [batch_for("bert masked")])


def test_lora_on_a_classifier_learns_its_rows():
    torch.manual_seed(0)
    model = add_lora(build("bert classes"), targets=("query", "value"))
    model.classifier.requires_grad_(True)
    batch = batch_for("bert classes", 6)
    history = train(model, [batch], max_steps=40, lr=3e-2, progress=False)
    assert history.train_loss[-1] < 0.5 * history.train_loss[0]


def test_a_batch_without_targets_is_refused_in_one_sentence():
    model, _ = load_base("tiny", device="cpu")
    ids = torch.arange(10)[None]
    batch = {"input_ids": ids, "labels": torch.full_like(ids, -100)}
    with pytest.raises(ValueError) as refused:
        evaluate(model, [batch])
    assert str(refused.value) == (
        "Batch 0 has no target token: every label after the first is -100, so there is nothing to "
        "predict. Were the answers empty or cut off?"
    )
