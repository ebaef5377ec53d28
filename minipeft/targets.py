"""The logits of a causal language model at its targets: the labels that are not -100."""


def target_places(batch):
    """(rows, columns), each (targets,): labels[rows, columns + 1] are the targets.

    Looked up where the labels are, before they travel: on a GPU it would make the host wait.
    """
    return (batch["labels"][:, 1:] != -100).nonzero(as_tuple=True)


def logits_at_targets(model, batch, **options):
    """(output, logits (targets, vocab), targets (targets,)) of a causal language model.

    Positions before the first target need no logits, and they are the largest tensor of the step,
    so only the last `keep` are asked for. Raises ValueError for a label beyond the vocabulary.
    """
    device = next(model.parameters()).device
    rows, columns = target_places(batch)
    labels = batch["labels"]  # (batch, seq)
    first = int(columns.min()) if len(columns) else labels.shape[1] - 1  # none: other ranks have
    keep = labels.shape[1] - first
    inputs = {name: send(tensor, device) for name, tensor in batch.items() if name != "labels"}
    output = model(**inputs, use_cache=False, logits_to_keep=keep, **options)
    logits = output.logits[:, -keep:-1]  # (batch, keep - 1, vocab)
    targets = labels[rows, columns + 1]
    refuse_beyond(targets, logits.shape[-1])
    rows, columns, targets = (send(t, logits.device) for t in (rows, columns - first, targets))
    return output, logits[rows, columns], targets


def send(tensor, device):
    """The tensor on `device`. Out of pinned memory a copy to a GPU runs while the host goes on."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.contiguous().pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def refuse_beyond(labels, count):
    """Raise ValueError for class numbers or token ids outside 0 to count - 1."""
    bad = labels[(labels != -100) & ((labels < 0) | (labels >= count))]
    if len(bad):
        raise ValueError(
            f"A label is {int(bad[0])}, but the model tells apart 0 to {count - 1}; "
            "-100 marks what is no target."
        )
