"""The memory that a training step needs on CUDA but not on the CPU, known without a GPU too."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def workspace() -> int:
    """Bytes that cuBLAS holds on CUDA from the first matrix product until the process ends.

    Each thread that multiplies has a workspace, and torch runs the forward pass in one thread and
    the backward pass in another. A workspace takes 32 MiB from Hopper on and 8.1 MiB on older GPUs
    (torch's CUDA semantics, "cuBLAS workspaces", and CublasHandlePool.cpp). Without a GPU, Hopper
    is assumed.
    """
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    return 2 * (32 * 2**20 if hopper else (2 * 4096 + 8 * 16) * 2**10)


@contextmanager
def rules_of_cuda() -> Iterator[None]:
    """In the block, CPU operations save what they would save on CUDA: dropout masks of one byte per
    element, and fused attention also with dropout, which on a CPU runs as single operations.

    For fake tensors on the CPU: without CUDA, torch cannot run a step on fake CUDA tensors. The
    fused AdamW is the same on both.
    """
    attention, dropout = nn.functional.scaled_dot_product_attention, torch._VF.dropout

    def native(x, p, training):  # saves one byte per element
        if training and 0 < p < 1:
            return torch.native_dropout(x, p, True)[0]
        return dropout(x, p, training)

    def fused(*args, **kwargs):  # saves no mask; with dropout, a CPU would not use the fused kernel
        return attention(*args, **kwargs | {"dropout_p": 0.0})

    nn.functional.scaled_dot_product_attention, torch._VF.dropout = fused, native
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention, torch._VF.dropout = attention, dropout


def bytes_of_others(device: torch.device, standing: int) -> int:
    """Bytes that the process has allocated on a GPU besides the `standing` bytes of this step.

    Frees the workspace of cuBLAS, so that the step allocates it as a first step does, and resets
    the allocator's peak.
    """
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) - standing
