"""The same training on several processes, the ranks, which `torchrun` starts.

    device = start()
    model = share(add_lora(load_base(device=device)[0]), "ddp")      # or "fsdp"
    train(model, batches, ...)                                       # as ever
    save_adapter(model, "my_adapter")                                # on every rank
    finish()

Every rank is given the same batches and takes its rows of each. The loss is divided by the target
tokens of all ranks, so that loss and weights are those of one process, to rounding.

"ddp"   each rank holds everything; the gradients are summed (Li et al. 2020, "PyTorch Distributed",
        section 3). Done by hand here, after the backward pass, so that the model stays a model of
        transformers without a wrapper.
"fsdp"  parameters, gradients and optimiser state are divided among the ranks, and a block is put
        together only while it works: ZeRO stage 3 (Rajbhandari et al. 2020, section 5), by torch's
        `fully_shard`.
"""

import gc
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

KINDS = ("ddp", "fsdp")
LOST = ("connection", "timed out", "timeout", "broken pipe", "socket", "gloo", "nccl", "peer")


def start(timeout=30):
    """Join the ranks of this `torchrun`. Returns the device of this rank: its CUDA device over
    NCCL, else the CPU over gloo. A rank that waits longer than `timeout` seconds for another one
    gives up. Raises ValueError outside torchrun."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        raise ValueError(
            "This process was not started by torchrun; run it as "
            "`torchrun --nproc-per-node 2 script.py`."
        )
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return device


def finish():
    """Leave the ranks, all at the same time."""
    if dist.is_initialized():
        gc.collect()  # what still holds the group would end it later, where gloo aborts the process
        dist.barrier()
        dist.destroy_process_group()


def ranks():
    """How many processes train together; 1 where `start` was not called."""
    return dist.get_world_size() if dist.is_initialized() else 1


def leads():
    """Is this the rank that writes files and draws the progress bar?"""
    return not dist.is_initialized() or dist.get_rank() == 0


def wait():
    """Wait until every rank is here."""
    if ranks() > 1:
        dist.barrier()


def share(model, kind):
    """Make one model of the models of all ranks; that of rank 0 counts. Returns the model.

    Call it after the technique was added, and before `train`, which makes the optimiser.
    Raises ValueError for another kind, or if `start` was not called.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(KINDS)}.")
    if not dist.is_initialized():
        raise ValueError("Call minipeft.distributed.start() first.")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            dist.broadcast(tensor, src=0)
    if kind == "fsdp":
        for block in _blocks(model):
            fully_shard(block)
        # Embeddings, last norm and head: what is in no block. Torch would leave them put together
        # after a forward pass; divided again, `model.parameters()` are always the same tensors.
        fully_shard(model, reshard_after_forward=True)
    return model


def _blocks(model):
    """The decoder blocks: the elements of the model's one list of layers."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len, default=[])


def my_rows(batch):
    """The rows rank, rank + n, rank + 2n ... of a batch for n ranks. A rank for which none is left
    takes the first row without labels, since all ranks must run the same collectives."""
    if ranks() == 1:
        return batch
    rank = dist.get_rank()
    rows = {name: tensor[rank :: ranks()] for name, tensor in batch.items()}
    if not len(rows["labels"]):
        rows = {name: tensor[:1] for name, tensor in batch.items()}
        rows["labels"] = torch.full_like(rows["labels"], -100)
    return rows


def total(number):
    """The sum of a number over the ranks, the same on all of them."""
    if ranks() == 1:
        return number
    cuda = dist.get_backend() == "nccl"
    numbers = torch.tensor(number, dtype=torch.float64, device="cuda" if cuda else "cpu")
    dist.all_reduce(numbers)
    return numbers.item()


@torch.no_grad()
def sum_gradients(params):
    """Sum the gradients over the ranks. Sharded ones were averaged by `fully_shard` already."""
    if ranks() == 1:
        return
    for p in params:
        if isinstance(p, DTensor):
            p.grad.mul_(ranks())
        elif p.grad is not None:
            dist.all_reduce(p.grad)


def whole(tensor):
    """A tensor of which each rank has a part, put together on each; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor, like):
    """The inverse: divided as the tensor `like` is, on its device."""
    tensor = tensor.to(like.device)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.dtype), like.device_mesh, like.placements)


def lost_a_rank(error):
    """Does a backend say by this error that another rank died or does not answer?"""
    return ranks() > 1 and any(word in str(error).lower() for word in LOST)
