"""Adapters on disk: HF peft reads ours, we read theirs, and nothing is ever half there."""

import errno
import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import time

import peft
import pytest
import torch
from torch import nn

import minipeft
from minipeft import add_lora, checkpoints, load_adapter, load_base, save_adapter
from minipeft.lora import LoRALinear

TARGETS = {
    "tiny-llama": ["q_proj", "v_proj"],
    "tiny-gpt2": ["c_attn", "1.mlp.c_fc"],
    "tiny-bloom": ["query_key_value", "dense"],
    "tiny-qwen2": ["q_proj", "down_proj"],
    "tiny-gpt_neox": ["query_key_value"],
}
EVERY = pytest.mark.parametrize("name", TARGETS)
IDS = torch.arange(5, 17).reshape(2, 6)


def base(name="tiny-llama", dtype=torch.float64):
    return load_base(name, device="cpu", dtype=dtype)[0]


def tuned(name="tiny-llama", seed=0, **options):
    model = base(name)
    torch.manual_seed(seed)
    add_lora(model, **{"r": 3, "targets": TARGETS[name]} | options)
    for module in model.modules():
        if isinstance(module, LoRALinear):
            nn.init.normal_(module.lora_B, std=0.1)
    return model


def theirs(name, folder):
    """The adapter of a folder in HF peft, kept in float64."""
    options = {"autocast_adapter_dtype": False}
    return peft.PeftModel.from_pretrained(base(name), folder, **options).eval().double()


@EVERY
@pytest.mark.parametrize("scaling", ["alpha/r", "rslora"])
def test_hf_peft_reads_ours_and_so_do_we(name, scaling, tmp_path):
    model = tuned(name, scaling=scaling, alpha=7)
    folder = save_adapter(model, tmp_path / "adapter")
    assert sorted(p.name for p in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    expected = model(IDS).logits
    other = theirs(name, folder)
    assert (other(IDS).logits - expected).norm() < 1e-6 * expected.norm()
    again = load_adapter(base(name), folder)
    assert torch.equal(again(IDS).logits, expected)
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }


@EVERY
def test_we_read_what_hf_peft_wrote(name, tmp_path):
    config = peft.LoraConfig(
        r=5,
        lora_alpha=9,
        lora_dropout=0.1,
        use_rslora=True,
        target_modules=TARGETS[name],
        fan_in_fan_out=name == "tiny-gpt2",
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    other = peft.get_peft_model(base(name), config, autocast_adapter_dtype=False).eval()
    other = other.double()  # peft makes its matrices in float32
    other.save_pretrained(tmp_path)
    ours = load_adapter(base(name), tmp_path)
    expected = other(IDS).logits
    assert (ours(IDS).logits - expected).norm() < 1e-6 * expected.norm()
    assert (expected - base(name)(IDS).logits).norm() > 1e-3 * expected.norm()


def spoil(folder, **changes):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    "harm,message",
    [
        (lambda f: (f / "adapter_config.json").unlink(), "no adapter folder"),
        (lambda f: (f / "adapter_model.safetensors").unlink(), "the copy is incomplete"),
        (
            lambda f: (f / "adapter_model.safetensors").rename(f / "adapter_model.bin"),
            "is a pickle",
        ),
        (lambda f: (f / "adapter_config.json").write_text("{"), "damaged and cannot be read"),
        (lambda f: os.truncate(f / "adapter_model.safetensors", 900), "damaged and cannot be read"),
        (lambda f: spoil(f, peft_type="LOHA"), "of type LOHA; minipeft has LORA"),
        (lambda f: spoil(f, use_dora=True), "lora_magnitude_vector is missing"),
        (lambda f: spoil(f, ensure_weight_tying=True), "uses ensure_weight_tying"),
        (lambda f: spoil(f, modules_to_save=["lm_head"]), "uses modules_to_save"),
        (lambda f: spoil(f, rank_pattern={"q_proj": 9}), "uses rank_pattern"),
        (lambda f: spoil(f, bias="all"), "uses bias"),
        (lambda f: spoil(f, target_modules=".*proj"), "target_modules as a pattern"),
        (lambda f: spoil(f, r=4), r"does not fit this base model: .* is \(3, \d+\) in"),
        (lambda f: spoil(f, target_modules=["q_proj"]), "v_proj.* and nowhere in the model"),
        (lambda f: spoil(f, target_modules=["q_proj", "v_proj", "o_proj"]), "o_proj.* is missing"),
    ],
)
def test_a_bad_folder_is_refused_and_the_model_left_alone(harm, message, tmp_path):
    folder = save_adapter(tuned(), tmp_path / "adapter")
    harm(folder)
    model = base()
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=message):
        load_adapter(model, folder)
    assert model.state_dict().keys() == before
    assert all(p.requires_grad for p in model.parameters())


def test_an_adapter_of_another_base_is_refused(tmp_path):
    folder = save_adapter(tuned(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="no layer named 'q_proj'"):
        load_adapter(base("tiny-bloom"), folder)
    with pytest.raises(ValueError, match="has LoRA already"):
        load_adapter(tuned(), folder)
    with pytest.raises(ValueError, match="no adapter on this model"):
        save_adapter(base(), tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_saving_again_replaces_the_adapter_and_spares_what_lies_beside_it(tmp_path):
    folder = save_adapter(tuned(seed=0), tmp_path / "adapter")
    (folder / "README.md").write_text("mine")
    (folder / "notes").mkdir()
    (folder / "notes" / "a.txt").write_text("also mine")
    second = tuned(seed=1)
    save_adapter(second, folder)
    assert torch.equal(load_adapter(base(), folder)(IDS).logits, second(IDS).logits)
    assert (folder / "README.md").read_text() == "mine"
    assert (folder / "notes" / "a.txt").read_text() == "also mine"
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    with pytest.raises(ValueError, match="holds something else than an adapter"):
        save_adapter(second, tmp_path / "photos")
    assert [p.name for p in (tmp_path / "photos").iterdir()] == ["cat.jpg"]


def test_a_full_disk_leaves_the_old_adapter(tmp_path, monkeypatch):
    first = tuned(seed=0)
    folder = save_adapter(first, tmp_path / "adapter")

    def full(state, path, **_):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_adapter(tuned(seed=1), folder)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]
    assert torch.equal(load_adapter(base(), folder)(IDS).logits, first(IDS).logits)


SAVER = """
import sys, torch
from minipeft import add_lora, load_base, save_adapter
model = load_base("tiny", device="cpu", dtype=torch.float64)[0]
torch.manual_seed(0)
add_lora(model, r=3)
print("ready", flush=True)
while True:
    save_adapter(model, sys.argv[1])
"""


def test_kill_9_amid_saving_leaves_a_whole_adapter(tmp_path):
    folder = tmp_path / "adapter"
    save_adapter(tuned(), folder)
    for i in range(3):
        command = [sys.executable, "-c", SAVER, str(folder)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.05 + 0.013 * i)
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        load_adapter(base(), folder)  # raises if anything is missing or torn


@pytest.mark.parametrize("task", ["CAUSAL_LM", "SEQ_CLS"])
@pytest.mark.parametrize(
    "kind", ["LORA", "PROMPT_TUNING", "P_TUNING", "P_TUNING_TEMPLATE", "PREFIX_TUNING"]
)
def test_each_folder_is_for_one_technique(kind, task):
    readers = []
    for module in pkgutil.iter_modules(minipeft.__path__):
        technique = importlib.import_module(f"minipeft.{module.name}")
        own = getattr(technique, "PEFT_TYPE", None)
        reads = getattr(technique, "reads", lambda config, own=own: config["peft_type"] == own)
        readers += [module.name] * bool(reads({"peft_type": kind, "task_type": task}))
    assert len(readers) == 1
