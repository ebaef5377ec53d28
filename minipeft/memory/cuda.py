"""What a training step needs on CUDA and not on the CPU, also on a machine without a GPU."""

from contextlib import contextmanager

import torch
from torch import nn


def workspace():
    """Bytes that cuBLAS holds on CUDA from the first matrix product until the process ends.

    Each thread that multiplies has a workspace, and torch runs the forward pass in one thread and
    the backward pass in another. A workspace has 32 MiB from Hopper on, 8.1 MiB on older GPUs
    (torch's CUDA semantics, "cuBLAS workspaces", and CublasHandlePool.cpp). Without a GPU in sight,
    Hopper is assumed.
    """
    hopper = not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] >= 9
    return 2 * (32 * 2**20 if hopper else (2 * 4096 + 8 * 16) * 2**10)


@contextmanager
def rules_of_cuda():
    """In the block, operations on the CPU save what they would save on CUDA: dropout masks of a
    byte, and fused attention with dropout, which a CPU computes in single operations.

    For fake tensors, which say that they are on a CPU: without CUDA, torch takes no step on fake
    tensors on a GPU. The fused AdamW needs no rule, it is the same on both.
    """
    attention, dropout = nn.functional.scaled_dot_product_attention, torch._VF.dropout

    def native(x, p, training):  # saves a byte per element
        if training and 0 < p < 1:
            return torch.native_dropout(x, p, True)[0]
        return dropout(x, p, training)

    def fused(*args, **kwargs):  # saves no mask; a CPU would leave the fused kernel
        return attention(*args, **kwargs | {"dropout_p": 0.0})

    nn.functional.scaled_dot_product_attention, torch._VF.dropout = fused, native
    try:
        yield
    finally:
        nn.functional.scaled_dot_product_attention, torch._VF.dropout = attention, dropout


def bytes_of_others(device, standing):
    """Bytes on a GPU beside the `standing` ones of this step: other tensors of the process.

    cuBLAS gives its workspace back, so that the step allocates it as a first step does. The
    allocator's peak is reset.
    """
    torch.cuda.synchronize(device)
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device) - standing
