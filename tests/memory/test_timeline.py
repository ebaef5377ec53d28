"""Timeline: its parts add up to what `measure` finds, on fake tensors and on real ones."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM, LlamaConfig

from minipeft import add_lora
from minipeft.memory import estimate, measure
from minipeft.memory.timeline import PARTS_OVER_TIME, Timeline

CONFIG = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, vocab_size=500, tie_word_embeddings=True,
)  # fmt: skip
BATCH, SEQ = 2, 24


def follow(method=None, device="cpu", checkpointing=False):
    """Two steps of AdamW: (model, optimizer, timeline)."""
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(CONFIG).train()
    model = model if method is None else method(model)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, fused=True)
    ids = torch.zeros(BATCH, SEQ, dtype=torch.int64, device=device)
    mask = torch.ones_like(ids)
    mask[0, 0] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}
    with Timeline(model, optimizer, inputs) as time:
        for _ in range(2):
            time.begin("forward")
            loss = model(**inputs, use_cache=False).loss
            time.begin("backward")
            loss.backward()
            del loss  # its graph would keep the embedded tokens until the next loss
            time.begin("optimizer")
            optimizer.step()
            optimizer.zero_grad()
    return model, optimizer, time


@pytest.mark.parametrize("method", [None, add_lora])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_parts_are_those_that_measure_finds(method, checkpointing):
    with FakeTensorMode():
        _, _, time = follow(method, checkpointing=checkpointing)
    parts, total = time.parts(), sum(time.parts().values())
    measured = measure(CONFIG, method, batch=BATCH, seq=SEQ, checkpointing=checkpointing)
    assert total.max() == time.peak == pytest.approx(measured.total, rel=1e-3)
    for name in ("parameters", "gradients", "optimizer", "activations", "logits", "inputs"):
        assert parts[name].max() == pytest.approx(measured.parts[name], rel=2e-3), name
    assert tuple(parts) == PARTS_OVER_TIME and all(v.min() >= 0 for v in parts.values())


def test_at_the_peak_the_parts_are_the_predicted_ones():
    with FakeTensorMode():
        _, _, time = follow()
    parts, predicted = time.parts(), estimate(CONFIG, batch=BATCH, seq=SEQ)
    at = int(sum(parts.values()).argmax())
    for name, size in predicted.at_peak.items():
        assert parts[name][at] == pytest.approx(size, abs=0.002 * predicted.total), name
    assert [name for name, _ in time.phases] == ["forward", "backward", "optimizer"] * 2
    first = time.phases[3][1]
    assert not parts["optimizer"][: time.phases[2][1]].any(), "the first step creates the state"
    assert parts["optimizer"][first:].min() == parts["optimizer"].max()
    assert parts["gradients"][first] == 0, "zero_grad frees the gradients"


def test_real_tensors_take_the_same_bytes_and_the_hooks_go():
    with FakeTensorMode():
        _, _, fake = follow()
    model, _, real = follow()
    assert real.peak == pytest.approx(fake.peak, rel=1e-3) and not real.allocated
    for name, values in fake.parts().items():
        assert np.abs(values.max() - real.parts()[name].max()) <= 0.002 * fake.peak, name
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_the_allocator_is_read_after_every_operation():
    _, _, time = follow(device="cuda")
    assert len(time.allocated) == time.now
    assert max(time.allocated) >= time.peak
    fixed = estimate(CONFIG, batch=BATCH, seq=SEQ, device="cuda").parts["workspace"]
    assert max(time.allocated) == pytest.approx(time.peak + fixed, rel=0.05)
