"""The loop against plain torch, `transformers`' Trainer and schedule, and a run killed midway."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Qwen2Config,
    Trainer,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from minipeft.training import History, decay_groups, evaluate, learning_rate, loss_sum, train

WIDE = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 40}
CONFIGS = {
    "llama": LlamaConfig(**WIDE, intermediate_size=24, num_key_value_heads=2),
    "qwen2": Qwen2Config(**WIDE, intermediate_size=24, num_key_value_heads=2),
    "gpt2": GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=32),
    "bloom": BloomConfig(hidden_size=16, n_layer=2, n_head=4, vocab_size=40),
    "gpt_neox": GPTNeoXConfig(**WIDE, intermediate_size=24),
}


def build(name="llama", seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=torch.float32).eval()


def batch_of(lengths, seed, width=12):
    """Right-padded rows; the first three tokens and the padding are no targets."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 40, (len(lengths), width), generator=generator)
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def joined(batches):
    return {key: torch.cat([b[key] for b in batches]) for key in batches[0]}


BATCHES = [batch_of([12, 5], 0), batch_of([4, 7], 1), batch_of([9, 12], 2), batch_of([6, 4], 3)]


def run(model, batches=BATCHES, **options):
    return train(model, batches, **{"max_steps": 6, "lr": 1e-2, "progress": False, **options})


@pytest.mark.parametrize("name", CONFIGS)
def test_a_plain_loop_gives_the_same_losses_and_weights(name):
    hyper = {"warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5}
    model, plain = build(name), build(name).train()
    # GPT-2 and Bloom have dropout in their defaults; both sides draw it from the same seed.
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(decay_groups(plain, 0.1), lr=1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 6)
    losses = []
    for i in range(6):
        loss = plain(**BATCHES[i % 4]).loss  # the model's own shift and mean over targets
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    history = run(model, **hyper)
    assert history.train_loss == pytest.approx(losses, rel=1e-5)
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def test_trainer_of_transformers_agrees(tmp_path):
    rows = [{k: v[i] for k, v in b.items()} for b in BATCHES for i in range(2)]
    arguments = TrainingArguments(
        str(tmp_path), max_steps=4, learning_rate=1e-2, per_device_train_batch_size=2,
        gradient_accumulation_steps=2, warmup_steps=1, weight_decay=0.0, logging_steps=1,
        report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
        train_sampling_strategy="sequential", max_grad_norm=1.0, remove_unused_columns=False,
    )  # fmt: skip
    trainer = Trainer(build(), arguments, train_dataset=rows)
    trainer.train()
    logged = [x for x in trainer.state.log_history if "loss" in x]
    history = run(build(), max_steps=4, accumulation=2, warmup_steps=1)
    assert history.train_loss == pytest.approx([x["loss"] for x in logged], rel=1e-4)
    assert history.grad_norm == pytest.approx([float(x["grad_norm"]) for x in logged], rel=1e-3)


def test_accumulation_is_one_large_batch_with_unequal_lengths():
    small, large = build(), build()
    a = run(small, accumulation=4)
    b = run(large, [joined(BATCHES)])
    assert a.train_loss == pytest.approx(b.train_loss, rel=1e-6)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)


def test_evaluate_weighs_tokens_and_restores_the_mode():
    model = build().train()
    whole = build()(**joined(BATCHES)).loss.item()
    assert evaluate(model, BATCHES) == pytest.approx(whole, rel=1e-6)
    means = [build()(**b).loss.item() for b in BATCHES]
    assert abs(sum(means) / 4 - whole) > 1e-4  # the mean of batch means is another number
    assert model.training


def test_schedule_is_that_of_transformers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.3)
    schedule = get_linear_schedule_with_warmup(optimizer, 4, 11)
    for step in range(11):
        assert learning_rate(step, 0.3, 4, 11) == pytest.approx(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()


DECAYED = {
    "llama": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
    "qwen2": "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj lm_head",
    "gpt2": "c_attn c_proj c_fc",
    "bloom": "query_key_value dense dense_h_to_4h dense_4h_to_h",
    "gpt_neox": "query_key_value dense dense_h_to_4h dense_4h_to_h lm_head",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_decay_groups(name):
    model = build(name)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for p in decay_groups(model, 0.1)[0]["params"]}
    wanted = {f"{last}.weight" for last in DECAYED[name].split()}
    assert decayed == {n for n in names.values() if ".".join(n.split(".")[-2:]) in wanted}
    by_name = {n for n in names.values() if "bias" not in n and "LayerNorm.weight" not in n}
    norms = {n for n in names.values() if "norm" in n.lower() or ".ln_" in n}
    assert any(n.endswith("weight") and n in by_name for n in norms) and not decayed & norms


def freeze_all_but_last_projection(model):
    model.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.requires_grad_(True)
    return model


def test_checkpointing_changes_nothing_but_memory_above_a_frozen_base():
    plain, saving = (freeze_all_but_last_projection(build()) for _ in range(2))
    saving.config.use_cache = True
    a, b = run(plain), run(saving, gradient_checkpointing=True)
    assert a == b and min(a.grad_norm) > 0
    assert saving.config.use_cache and not any(
        getattr(m, "gradient_checkpointing", False) for m in saving.modules()
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_follows_float32(precision):
    model = build()
    a, b = run(build()), run(model, precision=precision)
    assert a.train_loss != b.train_loss
    assert a.train_loss == pytest.approx(b.train_loss, rel=1e-2)
    assert a.grad_norm == pytest.approx(b.grad_norm, rel=5e-2)  # so the loss scale is undone
    assert all(p.dtype == torch.float32 for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_float16_scaling_on_cuda():
    a, b = run(build()), run(build().cuda(), precision="float16")
    assert a.train_loss == pytest.approx(b.train_loss, rel=2e-2)


def test_the_best_weights_are_left_in_the_model():
    model = build()
    history = run(model, eval_batches=[batch_of([12, 9], 9)], eval_every=1, max_steps=20, lr=0.1)
    assert history.best_step < 20 and len(history.eval_loss) == 20
    assert evaluate(model, [batch_of([12, 9], 9)]) == min(history.eval_loss)


def test_history_goes_through_json_and_draws():
    history = run(build(), eval_batches=BATCHES, eval_every=3)
    assert History.from_json(history.to_json()) == history
    ax = history.plot()
    assert ax.get_xlabel() == "optimiser step" and "nats" in ax.get_ylabel()


def test_bad_input_gets_one_sentence(tmp_path):
    frozen, half, broken = build().requires_grad_(False), build().bfloat16(), build()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    empty = {**BATCHES[0], "labels": torch.full((2, 12), -100)}
    for model, options, error, words in [
        (build(), {"max_steps": 0}, ValueError, "max_steps=0"),
        (build(), {"warmup_steps": 9}, ValueError, "warmup_steps is larger"),
        (build(), {"precision": "int8"}, ValueError, "none of float32"),
        (build(), {"batches": []}, ValueError, "no batch in epoch 0"),
        (build(), {"batches": iter(BATCHES)}, ValueError, "only once"),
        (build(), {"batches": [empty]}, ValueError, "no target token"),
        (frozen, {}, ValueError, "Nothing is trainable"),
        (half, {}, ValueError, "embed_tokens.weight is trainable but torch.bfloat16"),
        (broken, {}, FloatingPointError, "Step 1: the loss is nan"),
    ]:
        with pytest.raises(error, match=words):
            run(model, **options)
    run(build(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="had lr=0.01, this call has lr=0.5"):
        run(build(), checkpoint_dir=tmp_path, lr=0.5)
    with pytest.raises(ValueError, match="model fingerprint"):
        run(build("gpt2"), checkpoint_dir=tmp_path)


def doubled(model, batch):
    return 2 * loss_sum(model, batch)


def test_another_loss_is_summed_divided_and_resumed_like_the_default(tmp_path):
    options = {"accumulation": 2, "max_grad_norm": None, "eval_batches": BATCHES[:1]}
    plain, other = run(build(), max_steps=1, **options), run(build(), loss_sum=doubled, **options)
    assert other.train_loss[0] == pytest.approx(2 * plain.train_loss[0], rel=1e-6)
    assert other.grad_norm[0] == pytest.approx(2 * plain.grad_norm[0], rel=1e-5)
    model = build()
    history = run(model, loss_sum=doubled, **options)
    assert history.eval_loss[-1] == evaluate(model, BATCHES[:1])  # still the cross-entropy

    calls = []

    def failing(model, batch):
        calls.append(batch)
        if len(calls) == 9:  # in step 5 of 6
            raise KeyboardInterrupt
        return doubled(model, batch)

    failing.__qualname__ = doubled.__qualname__
    again, options = build(), options | {"checkpoint_dir": tmp_path, "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(again, loss_sum=failing, **options)
    assert run(again, loss_sum=doubled, **options) == history
    for p, q in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="had loss_sum=doubled, this call has loss_sum=loss_sum"):
        run(build(), **options)


KILLED = """
import sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
from minipeft.training import train, trainables
torch.manual_seed(5)
config = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=32)  # dropout 0.1
model = GPT2LMHeadModel(config)
rows = torch.randint(0, 40, (13, 9))
rows = [dict(input_ids=r, labels=r, attention_mask=torch.ones_like(r)) for r in rows]
loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
h = train(model, loader, max_steps=60, lr=1e-2, accumulation=2, eval_batches=loader, eval_every=7,
          checkpoint_dir=sys.argv[1], save_every=1, progress=False)
weights = float(sum(p.double().abs().sum() for p in trainables(model).values()))
print(h.to_json() + "|" + repr(weights))
"""


def test_kill_9_and_resume_is_bit_identical(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", KILLED]
    options = {"env": environment, "stdout": subprocess.PIPE, "text": True}
    straight = subprocess.run([*command, str(tmp_path / "a")], check=True, **options).stdout
    chance, kills = random.Random(0), 0
    folder = tmp_path / "b"
    for goal in (3, 20, 41):
        process = subprocess.Popen([*command, str(folder)], **options)
        while process.poll() is None:
            if any(int(f.name[5:]) >= goal for f in folder.glob("step-*")):
                break
            time.sleep(0.002)
        time.sleep(chance.random() * 0.03)  # anywhere in a step or a write
        kills += process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert kills == 3
    assert subprocess.run([*command, str(folder)], check=True, **options).stdout == straight
    assert [f.name for f in folder.iterdir()] == ["step-000060"]
    assert len(json.loads(straight.split("|")[0])["train_loss"]) == 60


def groups_of(model):
    """Attention at 5e-3 with decay, all else at the default rate of the call."""
    named = dict(model.named_parameters())
    fast = [p for n, p in named.items() if "self_attn" in n]
    slow = [p for n, p in named.items() if "self_attn" not in n]
    return [
        {"params": iter(slow), "weight_decay": 0.0},
        {"params": fast, "lr": 5e-3, "weight_decay": 0.1},
    ]


def test_groups_have_rates_of_their_own_under_the_same_schedule(tmp_path):
    model, plain = build(), build().train()
    history = run(model, groups=groups_of(model), warmup_steps=2, max_grad_norm=None)
    assert history.lr == [learning_rate(i, 1e-2, 2, 6) for i in range(6)]
    optimizer = torch.optim.AdamW(groups_of(plain), lr=1e-2)
    schedule = get_linear_schedule_with_warmup(optimizer, 2, 6)
    for i in range(6):
        plain(**BATCHES[i % 4]).loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    other = build()
    run(other, warmup_steps=2, max_grad_norm=None)
    assert not torch.allclose(other.lm_head.weight, model.lm_head.weight, atol=1e-4)


def test_a_run_with_groups_resumes_and_refuses_other_groups(tmp_path, monkeypatch):
    straight = build()
    expected = run(straight, groups=groups_of(straight))
    model, again = build(), build()
    import minipeft.training as training

    real, steps = training.save_checkpoint, []

    def stop(*args):
        real(*args)
        steps.append(args[1])
        if len(steps) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(training, "save_checkpoint", stop)
    options = {"checkpoint_dir": tmp_path, "save_every": 1}
    with pytest.raises(KeyboardInterrupt):
        run(model, groups=groups_of(model), **options)
    with pytest.raises(ValueError, match="had groups=.*this call has groups=None"):
        run(build(), **options)
    assert run(again, groups=groups_of(again), **options) == expected
    assert all(map(torch.equal, again.parameters(), straight.parameters()))
    with pytest.raises(ValueError, match="embed_tokens.weight is trainable, but `groups`"):
        run(build(), groups=groups_of(build()))
    with pytest.raises(ValueError, match="not hold it exactly once"):
        run(again, groups=groups_of(again) + groups_of(again))
