"""The loop against plain torch, `transformers`' Trainer and schedule, and a run killed midway."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import traceback
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
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

from minipeft import Collator, add_lora, distil_from, load_base
from minipeft.quantization import NF4Linear, quantize_base
from minipeft.training.history import History
from minipeft.training.loop import READ_EVERY, evaluate, train
from minipeft.training.loss import loss_sum
from minipeft.training.optimizer import decay_groups, learning_rate

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


def test_each_module_keeps_its_own_mode():
    model = build()
    model.model.layers[0].train()
    modes = [module.training for module in model.modules()]
    for call in (lambda: evaluate(model, BATCHES), lambda: run(model, eval_batches=BATCHES)):
        call()
        assert [module.training for module in model.modules()] == modes


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


def test_numbers_of_numpy_are_numbers(tmp_path):
    options = {"seed": np.int64(3), "max_steps": np.int64(2), "lr": np.float32(1e-2)}
    history = run(build(), checkpoint_dir=tmp_path / "run", **options)
    assert History.from_json(history.to_json()) == history
    assert run(build(), checkpoint_dir=tmp_path / "run", **options) == history  # resumed
    assert history == run(build(), seed=3, max_steps=2, lr=options["lr"].item())


def test_history_goes_through_json_and_draws():
    history = run(build(), eval_batches=BATCHES, eval_every=3)
    assert History.from_json(history.to_json()) == history
    ax = history.plot()
    assert ax.get_xlabel() == "optimizer step" and "mean over targets" in ax.get_ylabel()


def test_bad_input_gets_one_sentence(tmp_path):
    frozen, half, broken = build().requires_grad_(False), build().bfloat16(), build()
    with torch.no_grad():
        broken.lm_head.weight.fill_(float("nan"))
    empty = {**BATCHES[0], "labels": torch.full((2, 12), -100)}
    for model, options, error, words in [
        (build(), {"max_steps": 0}, ValueError, "max_steps=0"),
        (build(), {"warmup_steps": 9}, ValueError, "warmup_steps=9 must be below max_steps=6"),
        (build(), {"warmup_steps": 6}, ValueError, "warmup_steps=6 must be below max_steps=6"),
        (build(), {"gradient_checkpointing": "no"}, ValueError, "gradient_checkpointing='no' is n"),
        (build(), {"resume": 0}, ValueError, "resume=0 is neither True nor False"),
        (build(), {"progress": "no"}, ValueError, "progress='no' is neither True nor False"),
        (build(), {"checkpoint_dir": 5}, ValueError, "checkpoint_dir=5 is not a path"),
        (build(), {"loss_sum": "mse"}, ValueError, "loss_sum='mse' is not a function"),
        (build(), {"groups": 3}, ValueError, "`groups` is not a list of dicts"),
        (build(), {"groups": [{"lr": 1.0}]}, ValueError, "`groups` is not a list of dicts"),
        (build(), {"groups": [{"params": 3}]}, ValueError, "`groups` is not a list of dicts"),
        (
            build(),
            {"groups": list(build().parameters())},
            ValueError,
            "`groups` is not a list of dicts",
        ),
        (build(), {"max_steps": True}, ValueError, "max_steps=True"),
        (build(), {"max_steps": None}, ValueError, "max_steps=None"),
        (build(), {"accumulation": 2.0}, ValueError, "accumulation=2.0"),
        (build(), {"save_every": 0}, ValueError, "save_every=0"),
        (build(), {"lr": -1e-3}, ValueError, "lr=-0.001 must be"),
        (build(), {"lr": math.inf}, ValueError, "lr=inf must be"),
        (build(), {"lr": "1e-3"}, ValueError, "lr='1e-3' must be"),
        (build(), {"weight_decay": math.nan}, ValueError, "weight_decay=nan must be"),
        (build(), {"max_grad_norm": -1.0}, ValueError, "max_grad_norm=-1.0 must be above 0"),
        (build(), {"max_grad_norm": 0}, ValueError, "max_grad_norm=0 must be above 0"),
        (build(), {"seed": -1}, ValueError, "seed=-1 must be"),
        (build(), {"seed": 0.5}, ValueError, "seed=0.5 must be"),
        (build(), {"eval_batches": iter(BATCHES)}, ValueError, "`eval_batches` must be iterable"),
        (build(), {"batches": 3}, ValueError, "`batches` must be iterable more than once"),
        (build(), {"batches": [3]}, ValueError, "Batch 0 is 3, no dict of tensors"),
        (build(), {"batches": [{"labels": [1, 2]}]}, ValueError, "no dict of tensors"),
        (build(), {"precision": "int8"}, ValueError, "none of float32"),
        (build(), {"precision": ["float16"]}, ValueError, "none of float32"),
        (build(), {"batches": []}, ValueError, "no batch in epoch 0"),
        (build(), {"batches": iter(BATCHES)}, ValueError, "iterable more than once"),
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


def test_the_longest_warm_up_reaches_the_rate_in_the_last_step():
    history = run(build(), warmup_steps=5)
    assert history.lr == pytest.approx([0, 2e-3, 4e-3, 6e-3, 8e-3, 1e-2])


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
from minipeft.freezing import trainable_parameters
from minipeft.training.loop import train
torch.manual_seed(5)
config = GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=40, n_positions=32)  # dropout 0.1
model = GPT2LMHeadModel(config)
rows = torch.randint(0, 40, (13, 9))
rows = [dict(input_ids=r, labels=r, attention_mask=torch.ones_like(r)) for r in rows]
loader = torch.utils.data.DataLoader(rows, batch_size=2, shuffle=True)
h = train(model, loader, max_steps=60, lr=1e-2, accumulation=2, eval_batches=loader, eval_every=7,
          checkpoint_dir=sys.argv[1], save_every=1, progress=False)
weights = float(sum(p.double().abs().sum() for p in trainable_parameters(model).values()))
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
    import minipeft.training.resume as training

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


# ---- numbers that are not finite, decided where the losses are


def spoilt(at, how):
    """A loss that is spoilt in step `at`, and the list of its calls."""
    calls = []

    def loss(model, batch):
        calls.append(len(calls) + 1)
        good = loss_sum(model, batch)
        return how(good) if calls[-1] == at else good

    return loss, calls


SPOIL = {
    "nan": lambda loss: loss * math.nan,
    "inf": lambda loss: loss * math.inf,
    "inf, but with a good gradient": lambda loss: loss + math.inf,
}


@pytest.mark.parametrize("steps", [5, 2 * READ_EVERY + 4])
@pytest.mark.parametrize("how", SPOIL)
def test_a_bad_step_is_named_and_leaves_no_trace(how, steps):
    at = steps - 2
    options = {"max_steps": 40 if steps > READ_EVERY else 6, "weight_decay": 0.1}
    model, clean = build(), build()

    def stop(loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # the weights of the steps before, and nothing else
        run(clean, loss_sum=spoilt(at, stop)[0], **options)
    loss, calls = spoilt(at, SPOIL[how])
    with pytest.raises(FloatingPointError, match=f"Step {at}: the loss is (nan|inf)"):
        run(model, loss_sum=loss, **options)
    for p, q in zip(model.parameters(), clean.parameters(), strict=True):
        assert torch.equal(p, q)
    assert at <= calls[-1] < at + READ_EVERY


def test_a_bad_step_is_never_written_or_evaluated(tmp_path):
    loss, calls = spoilt(5, SPOIL["nan"])
    options = {"checkpoint_dir": tmp_path, "save_every": 3, "eval_every": 5, "max_steps": 20}
    with pytest.raises(FloatingPointError, match="Step 5"):
        run(build(), loss_sum=loss, eval_batches=BATCHES, **options)
    assert [f.name for f in tmp_path.iterdir()] == ["step-000003"] and calls[-1] == 5


def test_float16_skips_what_torchs_own_loop_skips():
    def large(model, batch):  # overflows until the scale has come down
        return 3000 * loss_sum(model, batch)

    model, plain = build(), build().train()
    history = run(model, precision="float16", loss_sum=large, max_steps=12)
    optimizer = torch.optim.AdamW(decay_groups(plain, 0.0), lr=1e-2)
    scaler, skipped = torch.amp.GradScaler("cpu"), []
    for step in range(12):
        batch = BATCHES[step % 4]
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2 * (12 - step) / 12
        with torch.autocast("cpu", dtype=torch.float16):
            loss = 3000 * loss_sum(plain, batch) / (batch["labels"][:, 1:] != -100).sum()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        skipped.append(not norm.isfinite())
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert 1 < sum(skipped) < 12
    assert [math.isinf(norm) for norm in history.grad_norm] == skipped
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("how", SPOIL)
def test_without_the_one_kernel_all_is_the_same(how, tmp_path):
    """A parameter whose elements do not lie in a row; the kernel goes by addresses."""

    def turned():
        model = build()
        weight = model.lm_head.weight
        weight.data = weight.data.T.contiguous().T
        return model

    a, b = build(), turned()
    assert run(a).train_loss == pytest.approx(run(b).train_loss, rel=1e-5)
    torch.testing.assert_close(a.lm_head.weight, b.lm_head.weight, rtol=1e-4, atol=1e-6)
    clean, model = turned(), turned()
    with pytest.raises(ZeroDivisionError):
        run(clean, loss_sum=spoilt(3, lambda loss: 1 / 0)[0])
    with pytest.raises(FloatingPointError, match="Step 3"):
        run(model, loss_sum=spoilt(3, SPOIL[how])[0])
    assert all(map(torch.equal, model.parameters(), clean.parameters()))


def test_a_parameter_laid_out_otherwise_resumes_bit_for_bit(tmp_path):
    def turned():
        model = build()
        model.lm_head.weight.data = model.lm_head.weight.data.T.contiguous().T
        return model

    straight, again = turned(), turned()
    options = {"save_every": 2, "checkpoint_dir": tmp_path}
    expected = run(straight)
    with pytest.raises(ZeroDivisionError):
        run(turned(), loss_sum=named(spoilt(4, lambda loss: 1 / 0)[0]), **options)
    assert run(again, **options) == expected
    assert all(map(torch.equal, again.parameters(), straight.parameters()))


def named(loss):
    """The same function to a checkpoint as the default."""
    loss.__qualname__ = loss_sum.__qualname__
    return loss


# ---- what makes a GPU wait


class Host(torch.Tensor):
    """A tensor of the data, and whatever is worked out from it, until it travels to the model."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        out = super().__torch_function__(func, types, args, kwargs or {})
        return out.as_subclass(torch.Tensor) if func is torch.Tensor.to else out


class Waits(TorchDispatchMode):
    """Notes where a number of a tensor beside the model decides what the host does next."""

    calls = ("_local_scalar_dense", "nonzero", "masked_select", "::equal", "unique")

    def __init__(self):
        super().__init__()
        self.where = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, first = func.name(), args[0] if args else None
        waits = any(call in name for call in self.calls)
        if name.startswith(("aten::index.", "aten::index_put", "aten::_index_put")):
            waits = any(i is not None and not i.is_floating_point() and i.dtype in (torch.bool,
                        torch.uint8) for i in args[1])  # fmt: skip
        if waits and not isinstance(first, Host):
            frames = [f.filename for f in traceback.extract_stack()]
            self.where.append(next(f for f in frames[::-1] if "/torch/" not in f and f != __file__))
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Counts the losses that are copied to the host: on a CPU no operation shows that."""

    readers = (torch.Tensor.tolist, torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.numpy)

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.readers and not isinstance(args[0], Host):
            self.count += args[0].dtype != torch.uint8  # those are states of generators
        return func(*args, **(kwargs or {}))


def counted(model, **options):
    rows = [{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
            {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}]  # fmt: skip
    batch = {name: t.as_subclass(Host) for name, t in Collator(0)(rows).items()}
    with Reads() as reads, Waits() as waits:
        history = train(model, [batch, batch], lr=1e-2, progress=False, **options)
    assert len(history.train_loss) == options["max_steps"]
    return reads.count, waits.where


def test_a_step_waits_for_nothing_but_one_read_of_ten_losses():
    model = add_lora(load_base("tiny-bloom", device="cpu")[0], targets="query_key_value")
    assert counted(model, max_steps=25, accumulation=2, precision="bfloat16") == (3, [])
    teacher, _ = load_base("tiny-bloom", device="cpu")
    loss = distil_from(teacher, pairs=[(1, 2)])
    assert counted(model, max_steps=25, loss_sum=loss) == (3, [])
    reads, waits = counted(add_lora(build()), max_steps=20)
    # transformers looks at the mask by itself, in the models that take a fused attention
    assert reads == 2 and {Path(file).name for file in waits} <= {"masking_utils.py"}


def test_the_counters_would_see_a_wait():
    def waiting(model, batch):
        labels = batch["labels"].to("cpu")  # what travels is looked at there
        loss = loss_sum(model, batch)
        loss.item()
        return loss * bool((labels != -100).any())

    model, _ = load_base("tiny-bloom", device="cpu")
    reads, waits = counted(model, max_steps=10, loss_sum=waiting)
    assert reads == 11 and len(waits) == 20


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_waits_for_nothing_on_cuda():
    """torch itself tells of a call that waits. Those inside of transformers are not ours."""
    model = add_lora(load_base("tiny-bloom", device="cuda")[0], targets="query_key_value")
    batch = Collator(0)([{"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}] * 2)
    calls = []

    def watched(model, batch):
        calls.append(0)
        if len(calls) == 2:  # the first step makes what stays
            torch.cuda.set_sync_debug_mode("warn")
        if len(calls) == READ_EVERY:
            torch.cuda.set_sync_debug_mode("default")
        return loss_sum(model, batch)

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            train(model, [batch], max_steps=READ_EVERY, lr=1e-2, loss_sum=watched, progress=False)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    files = [w.filename for w in told if "called a synchronizing" in str(w.message)]
    assert len(calls) == READ_EVERY and all("/transformers/" in file for file in files), files


# ---- a base in 4 bits


def test_decay_groups_make_no_weight_of_a_4_bit_base(monkeypatch):
    model = add_lora(quantize_base(build()))
    model.lm_head.requires_grad_(True)

    def made(self):
        raise AssertionError("a 4-bit weight was made anew")

    monkeypatch.setattr(NF4Linear, "weight", property(made))
    decayed, others = decay_groups(model, 0.1)
    assert decayed["params"] == [model.lm_head.weight]
    assert len(others["params"]) == 8  # A and B of q_proj and v_proj in two blocks


def test_two_kinds_of_half_precision_do_not_mix():
    model = add_lora(load_base("tiny", device="cpu", dtype=torch.bfloat16)[0])
    batch = Collator(0)([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}])
    with pytest.raises(ValueError, match="float16' does not go with weights in bfloat16"):
        train(model, [batch], max_steps=1, lr=1e-3, precision="float16", progress=False)
    train(model, [batch], max_steps=1, lr=1e-3, precision="bfloat16", progress=False)
