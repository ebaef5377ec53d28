"""The same training on several processes, the ranks, which `torchrun` starts.

    device = start()
    model = distribute(add_lora(load_base(device=device)[0]), "ddp")      # or "fsdp"
    train(model, batches, ...)                                       # as ever
    save_adapter(model, "my_adapter")                                # on every rank
    finish()

Every rank is given the same batches and takes its rows of each. The loss is divided by the target
tokens of all ranks, so that loss and weights are those of one process, to rounding. Each rank drops
out other units than the others.

"ddp"   each rank holds everything; the gradients are summed (Li et al. 2020, "PyTorch Distributed",
        section 3). Done by hand here, after the backward pass, so that the model stays a model of
        transformers without a wrapper.
"fsdp"  parameters, gradients and optimiser state are divided among the ranks, and a block is put
        together only while it works: ZeRO stage 3 (Rajbhandari et al. 2020, section 5), by torch's
        `fully_shard`.
"""

import gc
import os
import random
import warnings
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from minipeft.freezing import blocks

KINDS = ("ddp", "fsdp")
LOST = ("connection", "timed out", "timeout", "broken pipe", "socket", "gloo", "nccl", "peer")
PATIENCE = timedelta(days=1)  # how long the ranks wait for one of them that writes files
_patient = None  # their group for that; None where `start` was not called


def start(timeout=30, device=None):
    """Join the ranks of this `torchrun`. Returns the device of this rank.

    device: "cuda", a CUDA device for each rank, over NCCL; "cpu", over gloo. Default: "cuda" where
    this machine has one for each of its ranks. (NCCL lets no two ranks share a device.)
    timeout: a rank that waits for another one in a step gives up after so many seconds; while rank
    0 writes files the others wait for it as long as it lives.
    Raises ValueError outside torchrun, and for "cuda" where there are not enough devices.
    """
    global _patient
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "This process was not started by torchrun; run it as "
            "`torchrun --nproc-per-node 2 script.py`."
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device={device!r} is none of 'cpu', 'cuda'; each rank takes its own.")
    if device == "cuda" and found < here:
        raise ValueError(
            f"{here} ranks of this machine cannot share {found} CUDA devices over NCCL; start as "
            'many ranks as there are devices, or pass device="cpu".'
        )
    if device is None and 0 < found < here and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"{here} ranks of this machine cannot share {found} CUDA devices over NCCL, so they "
            "train on the CPU, over gloo.",
            stacklevel=2,
        )
    limit = timedelta(seconds=timeout)
    if device == "cpu" or found < here:
        place = torch.device("cpu")
        dist.init_process_group("gloo", timeout=limit)
    else:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", timeout=limit, device_id=place)
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return place


def finish():
    """Leave the ranks, all at the same time."""
    global _patient
    if dist.is_initialized():
        barrier()
        _patient = None
        gc.collect()  # what still holds a group would end it later, where gloo aborts the process
        dist.destroy_process_group()


def world_size():
    """How many processes train together; 1 where `start` was not called."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process():
    """Is this the rank that writes files and draws the progress bar?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier():
    """Wait until every rank is here, if need be for hours: a rank that died is noticed at once."""
    if world_size() > 1:
        dist.barrier(group=_patient)


def broadcast(number):
    """The whole number that rank 0 gives, on every rank."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.broadcast(numbers, src=0, group=_patient)
    return int(numbers)


@contextmanager
def rank_seed(seed, step, device):
    """In the block torch draws what no other rank draws, such as dropout masks.

    It draws from `seed`, `step` and the rank, so that a resumed run draws the same again. Outside
    of the block all ranks draw alike, such as the order of the data. One process draws on as ever.
    """
    if world_size() == 1:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        own = random.Random(f"{seed} {step} {dist.get_rank()}").getrandbits(63)
        torch.default_generator.manual_seed(own)  # torch.manual_seed would reseed every device
        if devices:
            torch.cuda.manual_seed(own)  # of this device, which `start` chose
        yield


def distribute(model, kind):
    """Make one model of the models of all ranks; that of rank 0 counts. Returns the model.

    Call it after the technique was added, and before `train`, which makes the optimiser.
    Raises ValueError for another kind, if `start` was not called, and for a model on a device that
    the ranks cannot talk from.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(KINDS)}.")
    if _patient is None:
        raise ValueError("Call minipeft.training.distributed.start() first.")
    place = next(model.parameters()).device.type
    if dist.get_backend() == "nccl" and place != "cuda":
        raise ValueError(
            f"The model is on {place}, but these ranks talk over NCCL, from CUDA devices. Load it "
            'onto the device that start() returns, or call start(device="cpu").'
        )
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, src=0)
    if kind == "fsdp":
        for block in blocks(model):
            fully_shard(block)
        # Embeddings, last norm and head: what is in no block. Torch would leave them put together
        # after a forward pass; divided again, `model.parameters()` are always the same tensors.
        fully_shard(model, reshard_after_forward=True)
    return model


def rows_of_rank(batch):
    """(rows, share): the rows rank, rank + n, rank + 2n ... of a batch for n ranks, and 1.

    A rank for which none is left takes the first row, since all ranks must run the same
    collectives, and 0, by which its loss is to be multiplied.
    """
    if world_size() == 1:
        return batch, 1
    rank = dist.get_rank()
    if len({len(tensor) for tensor in batch.values()}) > 1:
        shapes = {name: tuple(tensor.shape) for name, tensor in batch.items()}
        raise ValueError(f"A batch is divided by rows, but its tensors are {shapes}.")
    rows = {name: tensor[rank :: world_size()] for name, tensor in batch.items()}
    if all(map(len, rows.values())):
        return rows, 1
    return {name: tensor[:1] for name, tensor in batch.items()}, 0


def all_reduce(tensor):
    """The sum of a tensor over the ranks, the same on all of them."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def sum_gradients(params):
    """Sum the gradients over the ranks. Sharded ones were averaged by `fully_shard` already.

    A parameter may have no gradient on one rank, as where a layer was dropped at random there; one
    without on all ranks stays without. The ranks tell each other by gloo, so no GPU is waited for.
    """
    if world_size() == 1:
        return
    for p in params:
        if isinstance(p, DTensor) and p.grad is not None:
            p.grad.mul_(world_size())
    params = [p for p in params if not isinstance(p, DTensor)]
    there = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8)
    if params:
        dist.all_reduce(there, dist.ReduceOp.MAX, group=_patient)
    for p, anywhere in zip(params, there.tolist(), strict=True):
        if anywhere:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


def gather(tensor):
    """A tensor of which each rank has a part, put together on each; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor, like):
    """The inverse: divided as the tensor `like` is, on its device."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.dtype), like.device_mesh, like.placements)


def copy_of(tensors):
    """The same tensors on the CPU, sharing no memory with the model."""
    return {
        name: gather(t).detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()
    }


@torch.no_grad()
def put_back(tensors, targets):
    """Copy each saved tensor into the parameter or buffer of the same name."""
    for name, tensor in tensors.items():
        targets[name].copy_(shard(tensor, targets[name]))


@contextmanager
def lost_rank_explained():
    """In the block an error of a backend that says another rank died becomes a ConnectionError."""
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and any(word in str(error).lower() for word in LOST):
            raise ConnectionError(
                "Another rank ended or does not answer, so this one cannot go on. Start the same "
                "command again: with checkpoint_dir it resumes from the newest checkpoint."
            ) from error
        raise
