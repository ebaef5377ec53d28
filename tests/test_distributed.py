"""Two ranks over gloo do what one process does; a lost rank is named; shards add up."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minipeft import add_lora, count_parameters, load_adapter, load_base
from minipeft.distributed import finish, leads, my_rows, ranks, share, start, total

SCRIPT = Path(__file__).parent / "scripts" / "ranks.py"
QUIET = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}


def torchrun(*arguments, timeout=180):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPT), *map(str, arguments)]
    environment = os.environ | QUIET
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(kind, method): (report, weights)} of one process, and of two ranks both ways."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = [sys.executable, str(SCRIPT), "ALONE", str(folder)]
    subprocess.run(alone, env=os.environ | QUIET, check=True, timeout=180)
    done = torchrun("ddp,fsdp", folder)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {}
    for path in folder.glob("*.json"):
        kind, method = path.stem.split("-")
        weights = load_file(path.with_suffix(".safetensors"))
        found[kind, method] = json.loads(path.read_text()), weights
    return folder, found


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_ranks_learn_what_one_process_learns(results, kind, method):
    _, found = results
    (alone, weights), (two, theirs) = found["ALONE", method], found[kind, method]
    assert (alone["ranks"], two["ranks"]) == (1, 2)
    for key in ("train_loss", "grad_norm", "eval_loss", "lr"):
        assert two[key] == pytest.approx(alone[key], rel=2e-5), key
    assert two["eval_step"] == alone["eval_step"] == [2, 4, 6]
    assert weights.keys() == theirs.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(theirs[name], weight, atol=2e-4, rtol=1e-3, msg=name)
    assert alone["train_loss"][-1] < alone["train_loss"][0]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_bytes_of_a_rank_are_those_of_zero(results, method):
    """Rajbhandari et al. 2020, section 5: ZeRO-3 divides parameters, gradients and moments by the
    number of ranks; plain data parallelism none of them."""
    _, found = results
    model, _ = load_base("tiny", device="cpu")
    model = add_lora(model, r=4) if method == "lora" else model
    trainable, everything = count_parameters(model)
    if method == "full":
        trainable = everything
    expected = [4 * everything, 4 * trainable, 8 * trainable]
    assert found["ALONE", method][0]["held"] == expected
    assert found["ddp", method][0]["held"] == expected
    # Rank 0 takes the larger half of an odd number of rows (the vocabulary is odd).
    half = lambda params: sum(-(-len(p) // 2) * p[0].numel() * 4 for p in params)  # noqa: E731
    trained = half([p for p in model.parameters() if p.requires_grad])
    divided = [half(model.parameters()), trained, 2 * trained]
    assert found["fsdp", method][0]["held"] == divided
    assert all(a == pytest.approx(b / 2, rel=2e-3) for a, b in zip(divided, expected, strict=True))


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_shared_adapter_is_saved_as_one_file_that_one_process_loads(results, kind):
    folder, found = results
    _, weights = found[kind, "lora"]
    model, _ = load_base("tiny", device="cpu")
    load_adapter(model, folder / f"{kind}-lora-adapter")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name]), name
    files = sorted(p.name for p in (folder / f"{kind}-lora-adapter").iterdir())
    assert files == ["adapter_config.json", "adapter_model.safetensors"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_rank_ends_the_others_and_the_run_resumes(results, kind, tmp_path):
    _, found = results
    begin = time.monotonic()
    # Without torchrun's agent, which would end the survivor before it can say anything.
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), kind, str(tmp_path), "--crash", "8"],
            env=os.environ | QUIET | {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank),
                                      "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    _, words = processes[0].communicate(timeout=60)
    _, _ = processes[1].communicate(timeout=60)
    assert time.monotonic() - begin < 60
    assert processes[1].returncode == -9 and processes[0].returncode == 1
    last = words.strip().splitlines()[-1]
    assert "ConnectionError: Another rank ended or does not answer, so this one" in last, words
    (newest,) = (tmp_path / "checkpoints").glob("step-*")
    assert 1 <= int(newest.name[5:]) < 6
    done = torchrun(kind, tmp_path, "--crash", 0)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / f"{kind}-lora.json").read_text())
    whole, weights = found[kind, "lora"]
    assert report["train_loss"] == whole["train_loss"], "bit-identical to the run without a crash"
    for name, weight in load_file(tmp_path / f"{kind}-lora.safetensors").items():
        assert torch.equal(weight, weights[name]), name


def test_one_process_needs_none_of_it():
    batch = {"labels": torch.zeros(3, 2)}
    assert ranks() == 1 and leads() and my_rows(batch) is batch and total(2.5) == 2.5
    finish()


def test_bad_input_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="not started by torchrun; run it as `torchrun"):
        start()
    model, _ = load_base("tiny", device="cpu")
    with pytest.raises(ValueError, match="kind='zero' is none of ddp, fsdp"):
        share(model, "zero")
    with pytest.raises(ValueError, match=r"Call minipeft.distributed.start\(\) first"):
        share(model, "ddp")
