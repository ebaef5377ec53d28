"""The losses against torch and Hinton's limit; the student against a forward by hand; training."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div
from transformers import AutoModelForCausalLM

from minipeft import Batches, Collator, add_lora, count_parameters, encode, load_base, train
from minipeft.assets.models import TINY
from minipeft.distillation import (
    OnPolicy,
    distil_from,
    distillation_loss,
    hard_and_soft,
    hidden_loss,
    student_from_layers,
    written_by,
)
from minipeft.freezing import blocks
from minipeft.training.loss import loss_sum

PROMPTS = ["Good?", "Was it any good at all?", "Bad?"]
ANSWERS = [" Yes", " No, it was not", " No"]


def logits_and_labels(dtype=torch.float32, vocab=11, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 2, 6, vocab, generator=generator, dtype=dtype) * 3
    labels = torch.randint(0, vocab, (2, 6), generator=generator)
    labels[0, :3] = labels[1, :1] = labels[1, 3:] = -100
    return student, teacher, labels


def four_layers(name="tiny-llama", **options):
    """A random model of four blocks whose weights are large enough for blocks to matter."""
    base, tokenizer = load_base(name, device="cpu")
    config = base.config
    config.num_hidden_layers = 4
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * 4
    for key, value in options.items():
        setattr(config, key, value)
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    model.generation_config = base.generation_config
    return model, tokenizer


def rows(tokenizer):
    return [encode(tokenizer, p, a) for p, a in zip(PROMPTS, ANSWERS, strict=True)]


# ---- the loss of logits


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_parts_are_those_of_torch(temperature, divergence):
    student, teacher, labels = logits_and_labels()
    counted = labels[:, 1:] != -100
    q, p = (z[:, :-1][counted] / temperature for z in (student, teacher))
    if divergence == "reverse":
        p, q = q, p
    soft = temperature**2 * kl_div(q.log_softmax(-1), p.softmax(-1), reduction="batchmean")
    hard = cross_entropy(student[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss, *parts = distillation_loss(student, teacher, labels, 0.3, temperature, divergence)
    torch.testing.assert_close(parts, [hard, soft])
    torch.testing.assert_close(loss, 0.3 * hard + 0.7 * soft)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_the_gradient_is_that_of_finite_differences(divergence):
    student, teacher, labels = logits_and_labels(torch.float64)

    def of(student):
        return distillation_loss(student, teacher, labels, 0.4, 3.0, divergence)[0]

    assert torch.autograd.gradcheck(of, [student.requires_grad_()])
    teacher.requires_grad_()  # the teacher is fixed, even if nobody said no_grad
    of(student).backward()
    assert teacher.grad is None


def test_only_targets_count_and_each_counts_once():
    student, teacher, labels = logits_and_labels()
    whole = distillation_loss(student, teacher, labels)
    counted = labels[:, 1:] != -100
    shifted = torch.nn.functional.pad(counted, (0, 1))  # position t predicts t + 1
    noise = torch.randn(student.shape) * 100 * ~shifted[..., None]
    assert distillation_loss(student + noise, teacher - noise, labels) == whole
    one_by_one = [
        distillation_loss(*(x[i : i + 1] for x in (student, teacher, labels))) for i in (0, 1)
    ]
    numbers = counted.sum(-1).tolist()
    assert numbers == [3, 2]
    for k in range(3):
        mean = sum(n * row[k] for n, row in zip(numbers, one_by_one, strict=True)) / sum(numbers)
        torch.testing.assert_close(mean, whole[k])


def test_t_squared_keeps_the_gradient_and_the_limit_matches_logits():
    torch.manual_seed(0)
    n = 50
    z, v = torch.randn(2, 1, n, dtype=torch.float64)  # student, teacher
    targets = torch.tensor([0])

    def gradient(temperature, divergence="forward"):
        x = z.clone().requires_grad_()
        hard_and_soft(x, v, targets, temperature, divergence)[1].backward()
        return x.grad

    norms = [gradient(t).norm().item() for t in (1, 4, 16, 64)]
    plain = [norm / t**2 for norm, t in zip(norms, (1, 4, 16, 64), strict=True)]
    assert max(norms) < 2.0 * min(norms)
    assert plain[0] > 1000 * plain[-1]
    # Hinton et al. 2015, section 2.1: at high T, dC/dz = (z - v) / (N T^2), both zero-meaned.
    limit = ((z - z.mean()) - (v - v.mean())) / n
    torch.testing.assert_close(gradient(1e4), limit, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(gradient(1e4, "reverse"), limit, rtol=1e-3, atol=1e-6)


def test_the_two_divergences_want_different_students():
    teacher = torch.tensor([[0.48, 0.04, 0.48]]).log()
    covers, keeps = (
        torch.tensor([[0.34, 0.32, 0.34]]).log(),
        torch.tensor([[0.94, 0.04, 0.02]]).log(),
    )
    target = torch.tensor([0])
    soft = {
        (name, way): hard_and_soft(q, teacher, target, 1.0, way)[1].item()
        for name, q in (("covers", covers), ("keeps", keeps))
        for way in ("forward", "reverse")
    }
    assert soft["covers", "forward"] < soft["keeps", "forward"]
    assert soft["keeps", "reverse"] != pytest.approx(soft["keeps", "forward"], rel=0.1)
    p, q = [0.48, 0.04, 0.48], [0.94, 0.04, 0.02]
    assert soft["keeps", "reverse"] == pytest.approx(
        sum(b * math.log(b / a) for a, b in zip(p, q, strict=True)), rel=1e-5
    )


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_minus_infinity_and_large_logits_stay_finite(divergence):
    student, teacher, labels = logits_and_labels()
    barred = next(i for i in range(11) if not labels.eq(i).any())
    for z in (student, teacher):
        z[..., barred] = -math.inf
    student = (student * 1e4).requires_grad_()
    loss, hard, soft = distillation_loss(student, teacher * 1e4, labels, 0.5, 2.0, divergence)
    loss.backward()
    assert torch.isfinite(torch.stack([loss, hard, soft])).all()
    assert torch.isfinite(student.grad).all()
    # The barred token counts nothing: the rest of the vocabulary alone gives the same.
    rest = [i for i in range(11) if i != barred]
    p, q = ((z / 2.0)[:, :-1][labels[:, 1:] != -100][:, rest] for z in (teacher * 1e4, student))
    p, q = (p, q) if divergence == "forward" else (q, p)
    expected = 4 * kl_div(
        q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    torch.testing.assert_close(soft, expected)


def test_one_sided_infinity_is_infinite_where_it_should_be():
    teacher = torch.tensor([[0.0, -math.inf]])
    student, target = torch.zeros(1, 2), torch.tensor([0])
    assert hard_and_soft(student, teacher, target, 1.0)[1].item() == pytest.approx(math.log(2))
    assert hard_and_soft(student, teacher, target, 1.0, "reverse")[1].item() == math.inf
    # A part of weight 0 is left out, also when it is infinite.
    student = torch.tensor([[[-math.inf, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[-100, 0]])
    assert distillation_loss(student, torch.zeros(1, 2, 2), labels, 0.0, 1.0, "reverse")[
        0
    ].isfinite()


def test_half_precision_is_computed_in_float32():
    student, teacher, labels = logits_and_labels()
    wanted = distillation_loss(student.bfloat16().float(), teacher.bfloat16().float(), labels)
    found = distillation_loss(student.bfloat16(), teacher.bfloat16(), labels)
    assert found == wanted and found[0].dtype == torch.float32


def test_bad_losses_are_refused():
    student, teacher, labels = logits_and_labels()
    cases = [
        ((student, teacher[..., :10], labels), "same vocabulary"),
        ((student, teacher[:1], labels), "same rows"),
        ((student, teacher, labels[:, 1:]), "without cutting or shifting"),
        ((student, teacher, labels, 1.5), "alpha=1.5"),
        ((student, teacher, labels, -0.1), "alpha=-0.1"),
        ((student, teacher, labels, math.nan), "alpha=nan"),
        ((student, teacher, labels, 0.5, 0.0), "temperature=0.0"),
        ((student, teacher, labels, 0.5, -2.0), "temperature=-2.0"),
        ((student, teacher, labels, 0.5, math.inf), "temperature=inf"),
        ((student, teacher, labels, 0.5, 2.0, "both"), "none of forward, reverse"),
        ((student, teacher, torch.full_like(labels, -100)), "no target"),
        ((student, teacher, labels.clamp(max=-1)), "A label is -1, .* 0 to 10"),
        ((student, teacher, labels + 11 * (labels >= 0)), "A label is 1., .* 0 to 10"),
        ((student, teacher, labels, "0.5"), "alpha=0.5 must be from 0"),
        ((student, teacher, labels, 0.5, "2"), "temperature=2 must be a number"),
    ]
    for arguments, words in cases:
        with pytest.raises(ValueError, match=words):
            distillation_loss(*arguments)
    model, tokenizer = load_base("tiny", device="cpu")
    for options, words in [
        ({"alpha": 2}, "alpha=2 must be from 0"),
        ({"temperature": 0}, "temperature=0 must be a number above 0"),
        ({"divergence": "both"}, "divergence='both' is none of forward, reverse"),
    ]:  # at the call, not when the first loss is computed
        with pytest.raises(ValueError, match=words):
            distil_from(model.train(), **options)
        assert model.training
    for call in (distil_from, lambda pair: written_by(pair, {})):
        with pytest.raises(ValueError, match="is not a model; give an nn.Module, the first of the"):
            call((model, tokenizer))


# ---- hidden states


def test_hidden_loss_is_relative_at_each_position():
    torch.manual_seed(0)
    states = [torch.randn(2, 5, 8) for _ in range(4)]
    assert hidden_loss(states, states, [(1, 1), (3, 3)]).eq(0).all()
    zeros = [torch.zeros_like(s) for s in states]
    torch.testing.assert_close(hidden_loss(zeros, states, [(1, 3)]), torch.ones(2, 5))
    ours = [s + 0.1 * torch.randn_like(s) for s in states]
    found = hidden_loss(ours, states, [(1, 3), (0, 2)])
    tenfold = [10 * s for s in ours], [10 * s for s in states]
    torch.testing.assert_close(hidden_loss(*tenfold, [(1, 3), (0, 2)]), found)
    by_hand = [
        ((ours[s][1, 2] - states[t][1, 2]) ** 2).sum() / (states[t][1, 2] ** 2).sum()
        for s, t in [(1, 3), (0, 2)]
    ]
    torch.testing.assert_close(found[1, 2], sum(by_hand) / 2)
    half = [s.bfloat16() for s in states]
    assert hidden_loss(half, half, [(0, 1)]).dtype == torch.float32


def test_hidden_loss_refuses_and_projects():
    states, narrow = [torch.ones(1, 3, 8)] * 3, [torch.ones(1, 3, 4)] * 3
    two = "must be a list of .student index, teacher index."
    for pairs, words in [
        ([], "0 to 2"), ([(0, 3)], "teacher"), ([(-1, 0)], "student"),
        ([0], two), ((1, 2), two), ([(0, 1, 2)], two), ([(1, 1), (2,)], two),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            hidden_loss(states, states, pairs)
    with pytest.raises(ValueError, match="give a projection"):
        hidden_loss(narrow, states, [(1, 1)])
    projection = torch.nn.Linear(4, 8)
    hidden_loss(narrow, states, [(1, 1)], projection).sum().backward()
    assert projection.weight.grad.ne(0).any()


@pytest.mark.parametrize("name", TINY)
def test_the_last_state_needs_nothing_but_the_head(name):
    model, tokenizer = four_layers(name)
    ids = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 5
    torch.testing.assert_close(model.get_output_embeddings()(out.hidden_states[-1]), out.logits)


# ---- a student out of the teacher's blocks


@pytest.mark.parametrize("name", TINY)
def test_a_student_with_all_blocks_is_the_teacher(name):
    teacher, tokenizer = four_layers(name)
    before = torch.get_rng_state()
    student = student_from_layers(teacher, range(4))
    assert torch.equal(torch.get_rng_state(), before)
    ids = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    assert torch.equal(student(ids).logits, teacher(ids).logits)
    assert not {p.data_ptr() for p in student.parameters()} & {
        p.data_ptr() for p in teacher.parameters()
    }
    assert not student.training and all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("keep", [[0, 1], [0, 2], [1, 3]])
def test_a_student_is_the_teacher_without_the_other_blocks(name, keep, tmp_path):
    teacher, tokenizer = four_layers(name)
    student = student_from_layers(teacher, keep)
    each = count_parameters(blocks(teacher)[0])[1]
    total = count_parameters(teacher)[1]
    assert count_parameters(student)[1] == total - 2 * each
    assert sum(p.nbytes for p in student.parameters()) == 4 * (total - 2 * each)
    head = student.get_output_embeddings().weight
    tied = student.get_input_embeddings().weight is head
    assert tied == (teacher.get_input_embeddings().weight is teacher.get_output_embeddings().weight)
    numbers = [m.layer_idx for m in student.modules() if hasattr(m, "layer_idx")]
    assert set(numbers) == {0, 1}

    # The same by hand: the teacher itself, with its other blocks left out of the list.
    ids = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    logits = student(ids).logits
    stack = blocks(teacher)
    path = next(key for key, module in teacher.named_modules() if module is stack)
    parent, _, last = path.rpartition(".")
    setattr(teacher.get_submodule(parent), last, torch.nn.ModuleList([stack[i] for i in keep]))
    owner = teacher.get_submodule(parent).config
    owner.num_hidden_layers = 2
    assert torch.equal(teacher(ids, use_cache=False).logits, logits)

    student.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(again) is type(student) and torch.equal(again(ids).logits, logits)
    assert again.config.num_hidden_layers == len(blocks(again)) == 2


@pytest.mark.parametrize("name", TINY)
def test_a_student_generates_with_its_cache(name):
    teacher, tokenizer = four_layers(name)
    student = student_from_layers(teacher, [1, 3])
    ids = torch.tensor([tokenizer(PROMPTS[1])["input_ids"]])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with_cache, without = (student.generate(ids, use_cache=on, **options) for on in (True, False))
    assert torch.equal(with_cache, without) and with_cache.shape[1] == ids.shape[1] + 8
    greedy = ids
    for _ in range(8):
        greedy = torch.cat([greedy, student(greedy).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy, with_cache)


def test_lists_by_layer_are_cut_and_others_are_not():
    teacher, tokenizer = four_layers("tiny-qwen2", sliding_window=3, use_sliding_window=True)
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]
    config = teacher.config
    config.layer_types, config.eos_token_id = kinds, [1, 2, 3, 4]
    teacher = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    student = student_from_layers(teacher, [0, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention"]
    assert student.config.eos_token_id == [1, 2, 3, 4] and teacher.config.layer_types == kinds
    assert [b.self_attn.sliding_window for b in student.model.layers] == [None, 3]


def test_bad_cuts_are_refused():
    teacher, _ = four_layers()
    for keep in ([], [0, 4], [-1, 0], [2, 1], [1, 1], range(5), "01", [0.5]):
        with pytest.raises(ValueError, match="increasing numbers of blocks from 0 to 3"):
            student_from_layers(teacher, keep)
    with pytest.raises(ValueError, match="not a plain LlamaForCausalLM"):
        student_from_layers(add_lora(teacher), [0, 1])
    divided, _ = four_layers("tiny-gpt2", scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(ValueError, match="cannot move"):
        student_from_layers(divided, [0, 1])


def test_dtype_and_mode_are_the_teachers():
    teacher = four_layers()[0].to(torch.float64).train()
    student = student_from_layers(teacher, [0, 1])
    assert {p.dtype for p in student.parameters()} == {torch.float64} and student.training


# ---- the hook of the one loop


def test_alpha_one_is_the_loss_of_the_loop(tiny):
    model, tokenizer = tiny
    teacher, _ = four_layers()
    for side in ("left", "right"):
        batch = Collator(tokenizer.pad_token_id, side)(rows(tokenizer))
        mine = distil_from(teacher, alpha=1.0)(model, batch)
        torch.testing.assert_close(mine, loss_sum(model, batch), rtol=1e-6, atol=0)
    batch["labels"] = torch.full_like(batch["labels"], -100)  # a rank without rows
    nothing = distil_from(teacher, pairs=[(2, 4)])(model, batch)
    nothing.backward()
    assert nothing.item() == 0 and all(p.grad.eq(0).all() for p in model.parameters())


@pytest.mark.parametrize("pairs", [(), [(1, 2), (2, 4)]])
@pytest.mark.parametrize("name", TINY)
def test_the_closure_is_the_loss_of_the_full_logits_on_either_side(name, pairs):
    teacher, tokenizer = four_layers(name)
    student = student_from_layers(teacher, [0, 2])
    options = {"alpha": 0.3, "temperature": 3.0, "divergence": "reverse"}
    both = []
    for side in ("left", "right"):
        batch = Collator(tokenizer.pad_token_id, side, position_ids=name != "tiny-bloom")(
            rows(tokenizer)
        )
        found = distil_from(teacher, pairs=pairs, hidden_weight=2.0, **options)(student, batch)
        inputs = {k: v for k, v in batch.items() if k != "labels"}
        ours, theirs = (m(**inputs, output_hidden_states=True) for m in (student, teacher))
        targets = (batch["labels"][:, 1:] != -100).sum(-1)
        loss = distillation_loss(ours.logits, theirs.logits, batch["labels"], **options)[0]
        expected = loss * targets.sum()
        if pairs:
            everywhere = hidden_loss(ours.hidden_states, theirs.hidden_states, pairs)
            predicting = torch.nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1))
            expected = expected + 2.0 * everywhere[predicting].sum()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        both.append(found)
    torch.testing.assert_close(*both, rtol=1e-4, atol=1e-5)
    single = [Collator(tokenizer.pad_token_id)([row]) for row in rows(tokenizer)]
    one_by_one = sum(
        distil_from(teacher, pairs=pairs, hidden_weight=2.0, **options)(student, b) for b in single
    )
    torch.testing.assert_close(one_by_one, both[0], rtol=1e-4, atol=1e-5)


def test_the_teacher_rests():
    teacher, tokenizer = four_layers("tiny-gpt2", attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    student = student_from_layers(teacher.train(), range(4)).eval()
    batch = Collator(tokenizer.pad_token_id)(rows(tokenizer))
    loss = distil_from(teacher, alpha=0.0)(student, batch)
    assert loss.abs().item() < 1e-5 and not teacher.training  # no dropout in the teacher
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    assert any(p.grad is not None for p in student.parameters())


def test_a_student_learns_its_teacher_and_accumulation_is_one_batch():
    teacher, tokenizer = four_layers()
    each = [Collator(tokenizer.pad_token_id)([row]) for row in rows(tokenizer)]
    whole = [Collator(tokenizer.pad_token_id)(rows(tokenizer))]
    loss = distil_from(teacher, alpha=0.0, pairs=[(2, 4)])
    start = student_from_layers(teacher, [0, 1])
    options = {"max_steps": 30, "lr": 1e-2, "loss_sum": loss, "progress": False}
    one = train(student_from_layers(teacher, [0, 1]), whole, **options)
    three = train(start, each, accumulation=3, **options)
    assert three.train_loss == pytest.approx(one.train_loss, rel=1e-2)
    assert three.train_loss[:3] == pytest.approx(one.train_loss[:3], rel=1e-4)
    assert one.train_loss[-1] < 0.2 * one.train_loss[0]


def test_checkpointing_and_half_precision_work_with_a_teacher():
    teacher, tokenizer = four_layers()
    batch = Collator(tokenizer.pad_token_id)(rows(tokenizer))
    loss = distil_from(teacher, pairs=[(2, 4)])
    options = {"max_steps": 4, "lr": 1e-2, "loss_sum": loss, "progress": False}
    plain, saving, half = (
        train(student_from_layers(teacher, [0, 1]), [batch], **options, **more)
        for more in ({}, {"gradient_checkpointing": True}, {"precision": "bfloat16"})
    )
    assert saving.train_loss == pytest.approx(plain.train_loss, rel=1e-5)
    assert half.train_loss == pytest.approx(plain.train_loss, rel=0.1)
    assert half.train_loss != plain.train_loss


def test_a_projection_is_trained_with_the_student(tiny):
    student, tokenizer = tiny
    teacher, _ = four_layers(hidden_size=48, num_attention_heads=4)
    student.projection = torch.nn.Linear(32, 48)
    before = student.projection.weight.clone()
    loss = distil_from(teacher, pairs=[(2, 4)], projection=student.projection)
    batch = Collator(tokenizer.pad_token_id)(rows(tokenizer))
    losses = train(
        student, [batch], max_steps=20, lr=1e-2, loss_sum=loss, progress=False
    ).train_loss
    assert losses[-1] < losses[0] and not torch.equal(before, student.projection.weight)


# ---- answers of the teacher, and of the student


@pytest.mark.parametrize("name", TINY)
def test_written_answers_are_those_of_each_prompt_alone(name):
    model, tokenizer = four_layers(name)
    collate = Collator(tokenizer.pad_token_id, "left")
    prompts = [encode(tokenizer, p) for p in PROMPTS]
    model.train()
    found = written_by(model, collate(prompts), 6, do_sample=False)
    assert model.training
    model.eval()
    for row, prompt in zip(found, prompts, strict=True):
        ids = torch.tensor([prompt["input_ids"]])
        alone = model.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist()
        assert row["input_ids"] == alone
        n = len(prompt["input_ids"])
        assert row["labels"] == [-100] * n + alone[n:]


def test_what_fills_a_row_that_was_stopped_is_no_answer():
    model, tokenizer = four_layers()
    batch = Collator(tokenizer.pad_token_id, "left")([encode(tokenizer, p) for p in PROMPTS])
    free = [row["labels"][-6:] for row in written_by(model, batch, 6, do_sample=False)]
    stop = tokenizer.decode(free[0][:1])  # ends the first row at once, and not the others
    found = written_by(model, batch, 6, do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    answers = [[label for label in row["labels"] if label != -100] for row in found]
    assert answers[0] == free[0][:1] and max(map(len, answers)) > 1


@pytest.mark.parametrize("as_dict", [False, True])
def test_several_answers_to_a_prompt_stand_one_after_another(as_dict):
    model, tokenizer = four_layers()
    prompts = [encode(tokenizer, p) for p in PROMPTS]
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": 3, "num_return_sequences": 2,
               "eos_token_id": None, "pad_token_id": 0}  # fmt: skip
    batch = Collator(tokenizer.pad_token_id, "left")(prompts)
    found = written_by(model, batch, **options, return_dict_in_generate=as_dict)
    alone = [model.generate(torch.tensor([p["input_ids"]]), **options).tolist() for p in prompts]
    assert [row["input_ids"] for row in found] == [row for rows in alone for row in rows]
    for row, prompt in zip(found, [p for p in prompts for _ in range(2)], strict=True):
        n = len(prompt["input_ids"])
        assert row["labels"] == [-100] * n + row["input_ids"][n:]


def test_a_model_whose_answers_were_refused_is_in_its_mode_again():
    model, tokenizer = four_layers()
    model.train()
    with pytest.raises(ValueError, match="max_new_tokens"):
        written_by(model, Collator(0, "left")([encode(tokenizer, "a")]), 0)
    assert all(module.training for module in model.modules())


def test_an_answer_ends_behind_its_end_token_and_only_there():
    model, tokenizer = four_layers()
    prompts = Collator(tokenizer.pad_token_id, "left")([encode(tokenizer, p) for p in PROMPTS])
    free = written_by(model, prompts, 6, do_sample=False, eos_token_id=None, pad_token_id=0)
    second = free[0]["input_ids"][-5]  # the second token of the first answer
    found = written_by(model, prompts, 6, do_sample=False, eos_token_id=second, pad_token_id=second)
    for row, long in zip(found, free, strict=True):
        answer = [t for t in long["labels"] if t != -100]
        stop = answer.index(second) + 1 if second in answer else 6
        assert [t for t in row["labels"] if t != -100] == answer[:stop]
    assert len(found[0]["labels"]) < len(free[0]["labels"])
    several = written_by(model, prompts, 6, do_sample=False, eos_token_id=[second], pad_token_id=0)
    assert several == found


def test_the_student_learns_on_what_it_writes():
    teacher, tokenizer = four_layers()
    student = student_from_layers(teacher, [0, 2])
    pad = tokenizer.pad_token_id
    prompts = Batches([encode(tokenizer, p) for p in PROMPTS], Collator(pad, "left"), 2)
    options = {"max_new_tokens": 5, "do_sample": True}
    own = OnPolicy(student, prompts, Collator(pad), **options)
    torch.manual_seed(0)
    first, again = list(own), list(own)
    assert len(first) == 2 and not torch.equal(first[0]["input_ids"], again[0]["input_ids"])
    fixed = Collator(pad)(written_by(student, Collator(pad, "left")(
        [encode(tokenizer, p) for p in PROMPTS]), do_sample=False, max_new_tokens=5))  # fmt: skip
    judge = distil_from(teacher, alpha=0.0, divergence="reverse")
    before = judge(student, fixed).item()
    train(student, own, max_steps=30, lr=3e-3, loss_sum=judge, progress=False)
    assert judge(student, fixed).item() < 0.7 * before
    own.set_epoch(1)
    assert prompts.epoch == 1
