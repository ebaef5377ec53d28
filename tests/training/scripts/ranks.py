"""What test_distributed.py runs under torchrun, or alone: train a tiny model, report as JSON.

python ranks.py ALONE FOLDER                              one process
torchrun --nproc-per-node 2 ranks.py ALL FOLDER        both kinds, and `apart`
... ranks.py KIND FOLDER --crash STEP     rank 1 is killed when it begins that step
"""

import json
import os
import shutil
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from unittest import mock

import torch
from safetensors.torch import save_file
from torch.distributed import distributed_c10d as c10d

from minipeft import Collator, add_lora, encode, load_base, save_adapter, train
from minipeft.training.distributed import (
    barrier,
    distribute,
    finish,
    gather,
    is_main_process,
    start,
    sum_gradients,
    world_size,
)
from minipeft.training.loss import loss_sum

PAIRS = [
    ("One", " two three"),
    ("Four", " five"),
    ("A long question?", " no"),
    ("Why", " so it is"),
]
PAIRS += [("Nine", " ten eleven twelve"), ("B", " c"), ("Left", " over")]


def batches(tokenizer):
    """Three batches of 3, 3 and 1 rows: the last leaves nothing to the second rank."""
    collate = Collator(tokenizer.pad_token_id)
    rows = [encode(tokenizer, *pair) for pair in PAIRS]
    return [collate(rows[i : i + 3]) for i in range(0, 7, 3)]


class Crashing(list):
    """A list of batches in which rank 1 dies as it comes to batch `at`."""

    at, seen = None, 0

    def __iter__(self):
        for batch in super().__iter__():
            Crashing.seen += 1
            if self.at is not None and Crashing.seen == self.at and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def held(model, optimizer_class=torch.optim.AdamW):
    """Bytes that this rank holds, of parameters, gradients and AdamW's moments, after one step."""
    local = lambda t: t.to_local() if hasattr(t, "to_local") else t  # noqa: E731
    params = [p for p in model.parameters() if p.requires_grad]
    update = optimizer_class(params, lr=0.0)
    ids = torch.zeros(2, 8, dtype=torch.int64)
    model(input_ids=ids, labels=ids).loss.backward()
    update.step()
    states = update.state.values()
    moments = sum(local(s[k]).nbytes for s in states for k in ("exp_avg", "exp_avg_sq"))
    sizes = [sum(local(p).nbytes for p in model.parameters())]
    sizes += [sum(local(p.grad).nbytes for p in params), moments]
    update.zero_grad()
    return sizes


def run(kind, method, folder, checkpoint_dir=None, crash=None):
    torch.manual_seed(0)
    model, tokenizer = load_base("tiny", device="cpu", seed=int(os.environ.get("RANK", 0)))
    if method == "lora":
        add_lora(model, r=4)
    if kind != "ALONE":
        distribute(model, kind)
    rows = Crashing(batches(tokenizer))
    rows.at = crash
    history = train(
        model,
        rows,
        max_steps=6,
        lr=1e-2,
        accumulation=2,
        max_grad_norm=0.5,
        weight_decay=0.1,
        eval_batches=list(rows),
        eval_every=2,
        checkpoint_dir=checkpoint_dir,
        save_every=1,
        progress=False,
    )
    weights = {n: gather(p).detach().clone() for n, p in model.named_parameters()}
    name = f"{kind}-{method}"
    if method == "lora":
        save_adapter(model, folder / f"{name}-adapter")
    report = vars(history) | {"held": held(model), "ranks": world_size()}
    if is_main_process():
        # A tied head is one parameter, so no two names share memory here.
        save_file(weights, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(report))


def on_one_gpu(**options):
    """Call `start` as on a machine with one GPU. Returns the device, and whether it warned."""
    one = mock.patch("torch.cuda.device_count", lambda: 1)
    with mock.patch("torch.cuda.is_available", lambda: True), one:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            device = start(**options)
    return str(device), any("cannot share 1 CUDA devices" in str(w.message) for w in told)


def drawn(folder, at=None, **options):
    """Train with dropout, and note the rows that came and what this rank drew beside each loss.

    at: the call of the loss that breaks off. Returns (rows, draws, history, weights).
    """
    model, tokenizer = load_base("tiny", device="cpu")
    torch.manual_seed(0)
    add_lora(model, r=4, dropout=0.5)
    distribute(model, "ddp")
    rows, draws, pad = [], [], Collator(tokenizer.pad_token_id)

    def collate(some):
        rows.append([len(row["input_ids"]) for row in some])
        return pad(some)

    def noting(model, batch):
        if len(draws) == at:
            raise KeyboardInterrupt
        state = torch.get_rng_state()
        draws.append(torch.rand(1).item())
        torch.set_rng_state(state)
        return loss_sum(model, batch)

    noting.__qualname__ = "noting"
    data = [encode(tokenizer, *pair) for pair in PAIRS]
    loader = torch.utils.data.DataLoader(data, batch_size=3, shuffle=True, collate_fn=collate)
    options = {"max_steps": 6, "lr": 1e-2, "save_every": 2, "progress": False} | options
    history = None
    try:
        history = train(model, loader, loss_sum=noting, checkpoint_dir=folder, **options)
    except KeyboardInterrupt:
        pass
    weights = [p.sum().item() for p in model.parameters() if p.requires_grad]
    return rows, draws, history and vars(history), weights


def apart(folder, started):
    """What each rank draws, writes and waits for, as a JSON of its own."""
    rank, report = int(os.environ["RANK"]), {"start": started}
    one, other, none = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    one.grad = torch.ones(2) * (rank + 1)
    other.grad = torch.ones(2) if rank else None
    sum_gradients([other, none, one])
    report["grads"] = [one.grad.tolist(), other.grad.tolist(), none.grad]
    report["straight"] = drawn(folder / "straight")
    report["broken"] = drawn(folder / "resumed", at=4)
    report["resumed"] = drawn(folder / "resumed")
    # A foreign folder, and scratch of a killed run, which one rank alone may touch.
    if is_main_process():
        shutil.copytree(
            folder / "resumed" / "step-000006", folder / "resumed" / ".step-3-minipeft-"
        )
    barrier()
    nobody = mock.Mock(side_effect=AssertionError("rank 1 touched the files"))
    names = (
        []
        if is_main_process()
        else ["os.rename", "os.mkdir", "os.rmdir", "os.unlink", "shutil.rmtree"]
    )
    patches = [mock.patch(name, nobody) for name in names]
    for patch in patches:
        patch.start()
    report["anew"] = drawn(folder / "resumed", resume=False)
    for patch in patches:
        patch.stop()
    c10d._set_pg_timeout(timedelta(seconds=2), c10d.GroupMember.WORLD)  # of a step
    if is_main_process():
        time.sleep(3)  # rank 0 writes for longer than that
    barrier()
    report["files"] = sorted(path.name for path in (folder / "resumed").iterdir())
    (folder / f"rank-{rank}.json").write_text(json.dumps(report))


def main(kind, folder, *options):
    folder = Path(folder)
    torch.set_num_threads(1)
    if options:
        start(timeout=20, device="cpu")
        run(kind, "lora", folder, folder / "checkpoints", int(options[1]) or None)
    elif kind == "ALONE":
        for method in ("full", "lora"):
            run(kind, method, folder)
    else:
        started = on_one_gpu(timeout=20)
        for shared in ("ddp", "fsdp"):
            for method in ("full", "lora"):
                run(shared, method, folder)
        apart(folder, started)
    finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
