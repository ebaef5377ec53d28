"""What test_distributed.py runs under torchrun, or alone: train a tiny model, report as JSON.

python ranks.py ALONE FOLDER
torchrun --nproc-per-node 2 ranks.py ddp,fsdp FOLDER
... ranks.py KIND FOLDER --crash STEP     rank 1 is killed when it begins that step
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from minipeft import Collator, add_lora, encode, load_base, save_adapter, train
from minipeft.distributed import finish, leads, ranks, share, start, whole

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
        share(model, kind)
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
    weights = {n: whole(p).detach().clone() for n, p in model.named_parameters()}
    name = f"{kind}-{method}"
    if method == "lora":
        save_adapter(model, folder / f"{name}-adapter")
    report = vars(history) | {"held": held(model), "ranks": ranks()}
    if leads():
        # A tied head is one parameter, so no two names share memory here.
        save_file(weights, folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text(json.dumps(report))


def main(kinds, folder, *options):
    folder = Path(folder)
    torch.set_num_threads(1)
    if kinds != "ALONE":
        start(timeout=20)
    if options:
        run(kinds, "lora", folder, folder / "checkpoints", int(options[1]) or None)
    else:
        for kind in kinds.split(","):
            for method in ("full", "lora"):
                run(kind, method, folder)
    finish()


if __name__ == "__main__":
    main(*sys.argv[1:])
