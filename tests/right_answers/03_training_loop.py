"""Right answers to exercise 03, written in other ways: (check, source of the answer)."""

RIGHT = [
    (
        "decay_groups",
        """
def decay_groups(model, weight_decay):
    decayed, spared, seen = [], [], set()
    tables = [id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)]
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            if id(p) in seen or not p.requires_grad:
                continue
            seen.add(id(p))
            matrix = name == "weight" and isinstance(module, (nn.Linear, Conv1D))
            (decayed if matrix and id(p) not in tables else spared).append(p)
    return (
        {"weight_decay": weight_decay, "params": decayed},
        {"weight_decay": 0, "params": spared},
    )
""",
    ),
    (
        "linear_schedule",
        """
def linear_schedule(step, warmup, total):
    up = step / warmup if warmup else 1.0
    return max(0.0, min(up, (total - step) / (total - warmup)))
""",
    ),
    (
        "linear_schedule",
        """
def linear_schedule(step, warmup, total):
    if step <= warmup and warmup > 0:
        return torch.tensor(step / warmup)
    return 1 - (step - warmup) / (total - warmup)
""",
    ),
    (
        "accumulated_backward",
        """
def accumulated_backward(model, batches):
    total = 0
    for b in batches:
        total += b["labels"][:, 1:].ne(-100).sum().item()
    losses = []
    for b in batches:
        logits = model(b["input_ids"], attention_mask=b["attention_mask"]).logits
        part = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), b["labels"][:, 1:].flatten(), reduction="sum"
        ) / total
        part.backward()
        losses.append(float(part))
    return sum(losses)
""",
    ),
    (
        "accumulated_backward",
        """
def accumulated_backward(model, batches):
    model.zero_grad()
    summed = total = 0
    for b in batches:
        n = (b["labels"][:, 1:] != -100).sum()
        loss = model(**b).loss * n
        loss.backward()
        summed, total = summed + loss.item(), total + n.item()
    for p in model.parameters():
        if p.grad is not None:
            p.grad.div_(total)
    return summed / total
""",
    ),
    (
        "training_step",
        """
def training_step(model, optimizer, batches, max_grad_norm):
    for p in model.parameters():
        p.grad = None
    loss = accumulated_backward(model, batches)
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = float(torch.cat([g.flatten() for g in grads]).norm())
    if norm > max_grad_norm:
        for g in grads:
            g.mul_(max_grad_norm / norm)
    optimizer.step()
    optimizer.zero_grad()
    return [loss, norm]
""",
    ),
]
