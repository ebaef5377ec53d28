"""The logits of a causal language model at its targets: the labels that are not -100."""

from collections.abc import Mapping

import torch
from torch import nn
from transformers.utils import ModelOutput

COMPILED = 32  # a compiled model makes the logits of a multiple of so many positions


def target_places(batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """(rows, columns), each (targets,): labels[rows, columns + 1] are the targets.

    Call it before the labels move to the GPU, where `nonzero` forces a synchronization.
    """
    return (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)


def logits_at_targets(
    model: nn.Module, batch: Mapping[str, torch.Tensor], **options: object
) -> tuple[ModelOutput, torch.Tensor, torch.Tensor]:
    """Return (model output, logits (targets, vocab), targets (targets,)).

    The logits are the largest tensor of a training step, so those before the first target are not
    computed. `options` go to the model.
    Raises ValueError for a label outside the vocabulary.
    """
    device = next(model.parameters()).device
    rows, columns = target_places(batch)
    labels = batch["labels"]  # (batch, seq)
    # On several ranks the shard of one may have no target.
    keep = labels.shape[1] - int(columns.min()) if len(columns) else 1
    if torch.is_grad_enabled() and model._compiled_call_impl is not None:
        # The first target of a batch decides how many logits are asked for, and every other number
        # is a new shape to compile. A few more do no harm, since they are counted from the end.
        keep = min(-(-keep // COMPILED) * COMPILED, labels.shape[1])
    first = labels.shape[1] - keep
    inputs = {name: send(tensor, device) for name, tensor in batch.items() if name != "labels"}
    kept = last_positions(keep, device)
    output = model(**inputs, use_cache=False, logits_to_keep=kept, **options)
    logits = output.logits[:, -keep:-1]  # (batch, keep - 1, vocab)
    targets = labels[rows, columns + 1]
    refuse_beyond(targets, logits.shape[-1])
    rows, columns, targets = (send(t, logits.device) for t in (rows, columns - first, targets))
    return output, logits[rows, columns], targets


def last_positions(count: int, device: torch.device) -> torch.Tensor:
    """`logits_to_keep` for the last positions, int64 (count,): -count to -1.

    The number alone would make the model take a slice. torch multiplies a slice by a frozen head
    row by row of the batch (`bmm`), and reads the head's weights from memory for each of them.
    What these indices pick lies together in memory and is multiplied at once.
    """
    return torch.arange(-count, 0, device=device)


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy the tensor to `device`; from the CPU to a GPU asynchronously, through pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def refuse_beyond(labels: torch.Tensor, count: int) -> None:
    """Raise ValueError for class numbers or token ids outside 0 to count - 1, except -100."""
    bad = labels[(labels != -100) & ((labels < 0) | (labels >= count))]
    if len(bad):
        raise ValueError(
            f"A label is {int(bad[0])}, but the model tells apart 0 to {count - 1}; "
            "-100 marks what is not a target."
        )
