"""Two ranks over gloo do what one process does; a lost rank is named; shards add up."""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from minipeft import add_lora, count_parameters, load_adapter, load_base
from minipeft.training.checkpoint import newest
from minipeft.training.distributed import (
    all_reduce,
    distribute,
    finish,
    is_main_process,
    rows_of_rank,
    start,
    world_size,
)

SCRIPT = Path(__file__).parent / "scripts" / "ranks.py"
QUIET = {"OMP_NUM_THREADS": "1", "TORCHELASTIC_ERROR_FILE": ""}


def torchrun(*arguments, timeout=180):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPT), *map(str, arguments)]
    environment = os.environ | QUIET
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)


def words_of(done):
    """What the ranks themselves wrote; behind it comes a long account of torchrun's."""
    return done.stderr.partition("torch/distributed/run.py")[0][-5000:]


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """{(kind, method): (report, weights)} of one process, and of two ranks both ways."""
    folder = tmp_path_factory.mktemp("ranks")
    alone = [sys.executable, str(SCRIPT), "ALONE", str(folder)]
    subprocess.run(alone, env=os.environ | QUIET, check=True, timeout=180)
    done = torchrun("ALL", folder)
    assert done.returncode == 0, words_of(done)
    found = {}
    for path in folder.glob("*-*.json"):
        if path.stem.startswith("rank-"):
            continue
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
    _, words = processes[0].communicate(timeout=150)
    _, _ = processes[1].communicate(timeout=150)
    assert processes[1].returncode == -9 and processes[0].returncode == 1, words
    last = words.strip().splitlines()[-1]
    assert "ConnectionError: Another rank ended or does not answer, so this one" in last, words
    (newest,) = (tmp_path / "checkpoints").glob("step-*")
    assert 1 <= int(newest.name[5:]) < 6
    done = torchrun(kind, tmp_path, "--crash", 0)
    assert done.returncode == 0, words_of(done)
    report = json.loads((tmp_path / f"{kind}-lora.json").read_text())
    whole, weights = found[kind, "lora"]
    assert report["train_loss"] == whole["train_loss"], "bit-identical to the run without a crash"
    for name, weight in load_file(tmp_path / f"{kind}-lora.safetensors").items():
        assert torch.equal(weight, weights[name]), name


@pytest.fixture(scope="module")
def apart(results):
    """What each of two ranks reports of its own draws and files."""
    return [json.loads((results[0] / f"rank-{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_on_one_gpu_fall_back_to_the_cpu_and_say_so(apart):
    assert [report["start"] for report in apart] == [["cpu", True], ["cpu", False]]


def test_ranks_drop_differently_but_see_the_same_data(apart):
    rows, draws = zip(*(report["straight"][:2] for report in apart), strict=True)
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert len(draws[0]) == len(draws[1]) == 6
    assert len({*draws[0], *draws[1]}) == 12  # neither another rank's nor an earlier step's
    histories = [report["straight"][2] for report in apart]
    assert histories[0] == histories[1] and apart[0]["straight"][3] == apart[1]["straight"][3]


def test_each_rank_goes_on_with_its_own_draws(apart):
    for report in apart:
        rows, draws, history, weights = report["straight"]
        assert report["broken"][:3] == [rows[:5], draws[:4], None]
        again = report["resumed"]
        assert again[1:] == [draws[4:], history, weights], "bit-identical"
        assert again[0][-2:] == rows[-2:]


def test_one_rank_alone_touches_the_files(apart):
    for report in apart:
        assert report["anew"] == report["straight"]
        assert report["files"] == ["step-000006"]


def test_a_gradient_that_one_rank_lacks_is_summed_and_none_stays_none(apart):
    for report in apart:
        assert report["grads"] == [[3.0, 3.0], [1.0, 1.0], None]


def started(monkeypatch, gpus, local_rank=1, **options):
    """(device, arguments of the process groups) of `start` with two ranks on a machine."""
    made = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: made.append(str(device)))
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: made.append((a, k)))
    monkeypatch.setattr(dist, "new_group", lambda **k: made.append(k))
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_RANK", str(local_rank))
    device = start(**options)
    monkeypatch.setattr("minipeft.training.distributed._patient", None)
    return str(device), made


def test_start_takes_a_gpu_for_each_rank_or_none(monkeypatch):
    device, (chosen, (backend, options), patient) = started(monkeypatch, 2)
    assert device == chosen == "cuda:1" and backend == ("nccl",)
    assert options == {"timeout": timedelta(seconds=30), "device_id": torch.device("cuda", 1)}
    assert patient["backend"] == "gloo" and patient["timeout"] > timedelta(hours=1)
    for gpus, more in ((0, {}), (1, {}), (1, {"device": "cpu"}), (2, {"device": "cpu"})):
        device, ((backend, _), _) = started(monkeypatch, gpus, **more)
        assert (device, backend) == ("cpu", ("gloo",))
    with pytest.warns(UserWarning, match="2 ranks of this machine cannot share 1 CUDA devices"):
        started(monkeypatch, 1, local_rank=0)
    for gpus in (0, 1):
        with pytest.raises(ValueError, match=f"cannot share {gpus} CUDA devices over NCCL; start"):
            started(monkeypatch, gpus, device="cuda")
    with pytest.raises(ValueError, match="device='cuda:0' is none of 'cpu', 'cuda'"):
        started(monkeypatch, 2, device="cuda:0")


def test_a_model_on_the_cpu_is_not_shared_over_nccl(monkeypatch):
    monkeypatch.setattr("minipeft.training.distributed._patient", object())
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    with pytest.raises(ValueError, match="The model is on cpu, but these ranks talk over NCCL"):
        distribute(load_base("tiny", device="cpu")[0], "ddp")


def test_one_process_needs_none_of_it():
    batch, number = {"labels": torch.zeros(3, 2)}, torch.tensor(2.5)
    assert (
        world_size() == 1
        and is_main_process()
        and rows_of_rank(batch) == (batch, 1)
        and all_reduce(number) == 2.5
    )
    finish()


def test_rows_are_shared_out(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    batch = {"input_ids": torch.arange(6).view(3, 2), "labels": torch.tensor([7, 8, 9])}
    rows, share_ = rows_of_rank(batch)
    assert share_ == 1 and rows["labels"].tolist() == [8] and rows["input_ids"].tolist() == [[2, 3]]
    one = {name: tensor[:1] for name, tensor in batch.items()}
    rows, share_ = rows_of_rank(one)  # none is left: the first, which counts nothing
    assert share_ == 0 and rows["labels"].tolist() == [7]
    with pytest.raises(ValueError, match="A batch is divided by rows, but its tensors are"):
        rows_of_rank(batch | {"labels": torch.zeros(2)})


def test_a_rank_that_does_not_see_the_checkpoint_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("minipeft.training.checkpoint.broadcast", lambda number: 6)
    with pytest.raises(ValueError, match="Rank 0 goes on from .*step-000006; this rank needs to"):
        newest(tmp_path)


def test_bad_input_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="not started by torchrun; run it as `torchrun"):
        start()
    model, _ = load_base("tiny", device="cpu")
    with pytest.raises(ValueError, match="kind='zero' is none of ddp, fsdp"):
        distribute(model, "zero")
    with pytest.raises(ValueError, match=r"Call minipeft.training.distributed.start\(\) first"):
        distribute(model, "ddp")
