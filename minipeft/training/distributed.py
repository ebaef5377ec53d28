"""Data-parallel training on several processes (ranks), which `torchrun` starts.

    device = start()
    model = distribute(add_lora(load_base(device=device)[0]), "ddp")      # or "fsdp"
    train(model, batches, ...)                                       # as on one process
    save_adapter(model, "my_adapter")                                # on every rank
    finish()

Every rank is given the same batches and takes its own rows of each. The loss is divided by the
number of target tokens on all ranks, so loss and weights equal those of one process, up to
rounding. Each rank draws its own dropout masks.

"ddp"   every rank holds the whole model; gradients are all-reduced (Li et al. 2020, "PyTorch
        Distributed", section 3). This is done by hand after the backward pass, so the model needs
        no wrapper.
"fsdp"  parameters, gradients and optimizer state are sharded, and the parameters of a block are
        gathered only while it runs: ZeRO stage 3 (Rajbhandari et al. 2020, section 5), by torch's
        `fully_shard`.
"""

import gc
import os
import random
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from minipeft.freezing import blocks
from minipeft.refusals import require

KINDS = ("ddp", "fsdp")
LOST = ("connection", "timed out", "timeout", "broken pipe", "socket", "gloo", "nccl", "peer")
PATIENCE = timedelta(days=1)  # how long the ranks wait while the main process writes files
_patient: dist.ProcessGroup | None = None  # a group with that timeout; None before `start`


def start(timeout: float = 30, device: str | None = None) -> torch.device:
    """Initialize the process group of this `torchrun`. Returns the device of this rank.

    timeout: seconds after which a rank stops waiting for another one in a step. While the main
    process writes files, the others wait for up to a day.
    device: "cuda" (NCCL, one CUDA device per rank) or "cpu" (gloo). Default: "cuda" if this machine
    has a device for each of its ranks; NCCL does not let two ranks share one.
    Raises ValueError outside torchrun, and for "cuda" if there are not enough devices.
    """
    global _patient
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "This process was not started by torchrun; run it as "
            "`torchrun --nproc-per-node 2 script.py`."
        )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))  # on this machine
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"device={device!r} is none of 'cpu', 'cuda'; each rank takes its own.")
    if device == "cuda" and gpus < ranks:
        raise ValueError(
            f"{ranks} ranks of this machine cannot share {gpus} CUDA devices over NCCL; start as "
            'many ranks as there are devices, or pass device="cpu".'
        )
    if device is None and 0 < gpus < ranks and os.environ.get("LOCAL_RANK", "0") == "0":
        warnings.warn(
            f"{ranks} ranks of this machine cannot share {gpus} CUDA devices over NCCL, so they "
            "train on the CPU, over gloo.",
            stacklevel=2,
        )
    limit = timedelta(seconds=timeout)
    if device == "cpu" or gpus < ranks:
        place = torch.device("cpu")
        dist.init_process_group("gloo", timeout=limit)
    else:
        place = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(place)
        dist.init_process_group("nccl", timeout=limit, device_id=place)
    _patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    return place


def finish() -> None:
    """Wait for all ranks, then destroy the process group."""
    global _patient
    if dist.is_initialized():
        barrier()
        _patient = None
        gc.collect()  # a group that is still referenced would be freed later, and gloo would abort
        dist.destroy_process_group()


def world_size() -> int:
    """The number of ranks; 1 before `start`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main_process() -> bool:
    """Is this rank 0, which writes files and shows the progress bar?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait for all ranks, if need be for hours. A rank that dies is noticed at once."""
    if world_size() > 1:
        dist.barrier(group=_patient)


def broadcast(number: int) -> int:
    """The `number` of rank 0, on every rank."""
    if world_size() == 1:
        return number
    tensor = torch.tensor(number)
    dist.broadcast(tensor, src=0, group=_patient)
    return int(tensor)


@contextmanager
def rank_seed(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Give torch a random state of this rank's own in the block, for dropout masks.

    It depends on `seed`, `step` and rank alone, so a resumed run draws the same numbers. Outside
    the block all ranks draw the same, such as the order of the data. Does nothing for one process.
    """
    if world_size() == 1:
        yield
        return
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        own_seed = random.Random(f"{seed} {step} {dist.get_rank()}").getrandbits(63)
        torch.default_generator.manual_seed(own_seed)  # torch.manual_seed would seed every device
        if devices:
            torch.cuda.manual_seed(own_seed)  # the current device, which `start` has set
        yield


def distribute(model: nn.Module, kind: str) -> nn.Module:
    """Copy rank 0's parameters and buffers to all ranks; for "fsdp" shard them. Returns the model.

    Call it after adding the technique, and before `train`, which creates the optimizer.
    Raises ValueError for another kind, before `start`, and for a model on a device that the backend
    does not support.
    """
    require(kind in KINDS, f"kind={kind!r} is none of {', '.join(KINDS)}.")
    require(_patient is not None, "Call minipeft.training.distributed.start() first.")
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
        # Without a mesh torch takes the GPU of the machine, also for a model on the CPU.
        mesh = init_device_mesh(place, (world_size(),))
        for block in blocks(model):
            fully_shard(block, mesh=mesh)
        # The rest: embeddings, last norm and head. By default torch leaves the root unsharded after
        # the forward pass; resharded, `model.parameters()` are always the same tensors.
        fully_shard(model, mesh=mesh, reshard_after_forward=True)
    return model


def rows_of_rank(batch: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], int]:
    """(rows, weight): rows rank, rank + n, rank + 2n, ... of a batch, for n ranks, and 1.

    A rank without rows gets the first row, because all ranks must run the same collectives, and
    weight 0, by which its loss is multiplied.
    Raises ValueError if the tensors differ in their number of rows.
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


def all_reduce(tensor: torch.Tensor) -> torch.Tensor:
    """Sum `tensor` over the ranks, in place. Returns it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def sum_gradients(params: Iterable[nn.Parameter]) -> None:
    """Sum the gradients over the ranks. `fully_shard` has already averaged the sharded ones.

    A parameter may lack a gradient on some ranks, for example under layer drop; one that has none
    on any rank keeps none. Which ones is exchanged over gloo, so that the host waits for no GPU.
    """
    if world_size() == 1:
        return
    unsharded = []
    for p in params:
        if not isinstance(p, DTensor):
            unsharded.append(p)
        elif p.grad is not None:
            p.grad.mul_(world_size())
    has_grad = torch.tensor([p.grad is not None for p in unsharded], dtype=torch.uint8)
    if unsharded:
        dist.all_reduce(has_grad, dist.ReduceOp.MAX, group=_patient)
    for p, on_some_rank in zip(unsharded, has_grad.tolist(), strict=True):
        if on_some_rank:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)


def gather(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor of a sharded one, on every rank; another tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse of `gather`: sharded like the tensor `like`, and on its device."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.dtype), like.device_mesh, like.placements)


def copy_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Full copies of the tensors on the CPU, sharing no memory with the model."""
    return {
        name: gather(t).detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()
    }


@torch.no_grad()
def put_back(tensors: dict[str, torch.Tensor], targets: Mapping[str, torch.Tensor]) -> None:
    """Copy each saved tensor into the parameter or buffer of the same name."""
    for name, tensor in tensors.items():
        targets[name].copy_(shard(tensor, targets[name]))


@contextmanager
def lost_rank_explained() -> Iterator[None]:
    """Raise ConnectionError in place of a backend's error that another rank was lost."""
    try:
        yield
    except RuntimeError as error:
        if world_size() > 1 and any(word in str(error).lower() for word in LOST):
            raise ConnectionError(
                "Another rank ended or does not answer, so this one cannot go on. Start the same "
                "command again: with checkpoint_dir it resumes from the newest checkpoint."
            ) from error
        raise
