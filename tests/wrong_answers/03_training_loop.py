"""Wrong answers to exercise 03: (check, source of the answer, part of the message expected)."""

_GROUPS = """
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

def split(model, decays, weight_decay):
    params = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in params if decays(n, p)], "weight_decay": weight_decay},
        {"params": [p for n, p in params if not decays(n, p)], "weight_decay": 0.0},
    ]
"""

_ACCUMULATE = """
import torch

def count(batch):
    return int((batch["labels"][:, 1:] != -100).sum())

def accumulate(model, batches):
    total = sum(count(b) for b in batches)
    out = 0.0
    for b in batches:
        loss = model(**b).loss * count(b) / total
        loss.backward()
        out += loss.item()
    return out

def clip(model, limit):
    return torch.nn.utils.clip_grad_norm_(model.parameters(), limit).item()
"""

WRONG = [
    (
        "decay_groups",
        _GROUPS
        + """
def decay_groups(model, weight_decay):
    folk = ["bias", "LayerNorm.weight"]
    return split(model, lambda n, p: not any(f in n for f in folk), weight_decay)
""",
        "belongs to a norm (LlamaRMSNorm)",
    ),
    (
        "decay_groups",
        _GROUPS
        + """
def decay_groups(model, weight_decay):
    spared = ["bias", "norm", "embed"]
    return split(model, lambda n, p: not any(f in n for f in spared), weight_decay)
""",
        "tiny-gpt2: transformer.h.0.ln_1.weight decays",
    ),
    (
        "decay_groups",
        _GROUPS
        + """
def decay_groups(model, weight_decay):
    return split(model, lambda n, p: p.dim() == 2, weight_decay)
""",
        "is an embedding table",
    ),
    (
        "decay_groups",
        _GROUPS
        + """
def decay_groups(model, weight_decay):
    kinds = (nn.Linear, Conv1D)
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    inside = {p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
    return split(model, lambda n, p: p in inside - tables, weight_decay)
""",
        "it is a bias",
    ),
    (
        "decay_groups",
        """
from torch import nn
from transformers.pytorch_utils import Conv1D

def decay_groups(model, weight_decay):
    decayed, spared = [], []
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding)]
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            matrix = isinstance(module, (nn.Linear, Conv1D)) and name == "weight"
            tied = any(p is table for table in tables)
            if p.requires_grad:
                (decayed if matrix and not tied else spared).append(p)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
""",
        "in the groups twice",
    ),
    (
        "decay_groups",
        """
from torch import nn
from transformers.pytorch_utils import Conv1D

def decay_groups(model, weight_decay):
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    decayed = [m.weight for m in linears if m.weight not in tables]
    norms = [m for m in model.modules() if type(m).__name__.endswith("Norm")]
    spared = [p for m in norms for p in m.parameters() if p.requires_grad] + list(tables)
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
""",
        "in neither group",
    ),
    (
        "decay_groups",
        _GROUPS
        + """
def decay_groups(model, weight_decay):
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    inside = {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
    return split(model, lambda n, p: p in inside - tables, weight_decay)
""",
        "matrix of a Conv1D",
    ),
    (
        "linear_schedule",
        """
def linear_schedule(step, warmup, total):
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / max(1, total - warmup)
""",
        "step 0 has the factor",
    ),
    (
        "linear_schedule",
        """
def linear_schedule(step, warmup, total):
    if step < warmup:
        return step / (warmup + 1)
    return (total - step) / max(1, total - warmup + 1)
""",
        "never reaches 1",
    ),
    (
        "linear_schedule",
        """
def linear_schedule(step, warmup, total):
    if step < warmup:
        return step // warmup
    return 0.0
""",
        "stays 0",
    ),
    (
        "linear_schedule",
        """
def linear_schedule(step, warmup, total):
    if step < warmup:
        return step / warmup
    return 1 - (step - warmup) / total
""",
        "the decay ends at",
    ),
    (
        "accumulated_backward",
        """
def accumulated_backward(model, batches):
    out = 0.0
    for batch in batches:
        loss = model(**batch).loss / len(batches)
        loss.backward()
        out += loss.item()
    return out
""",
        "mean of the batch means",
    ),
    (
        "accumulated_backward",
        """
def accumulated_backward(model, batches):
    out = 0.0
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        out += loss.item()
    return out
""",
        "not divided",
    ),
    (
        "accumulated_backward",
        """
def accumulated_backward(model, batches):
    targets = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
    tokens = sum(b["labels"].numel() for b in batches)
    out = 0.0
    for batch, n in zip(batches, targets):
        loss = model(**batch).loss * n / tokens
        loss.backward()
        out += loss.item()
    return out
""",
        "Padding or prompt tokens were counted",
    ),
    (
        "accumulated_backward",
        _ACCUMULATE
        + """
def accumulated_backward(model, batches):
    total = sum(count(b) for b in batches)
    out = 0.0
    for b in batches:
        model.zero_grad()
        loss = model(**b).loss * count(b) / total
        loss.backward()
        out += loss.item()
    return out
""",
        "Only the last batch",
    ),
    (
        "accumulated_backward",
        _ACCUMULATE
        + """
def accumulated_backward(model, batches):
    accumulate(model, batches)
    return sum(model(**b).loss.item() for b in batches) / len(batches)
""",
        "The gradient is right, but the loss",
    ),
    (
        "training_step",
        _ACCUMULATE
        + """
def training_step(model, optimizer, batches, max_grad_norm):
    loss = accumulate(model, batches)
    norm = clip(model, max_grad_norm)
    optimizer.step()
    return loss, norm
""",
        "zero_grad is missing",
    ),
    (
        "training_step",
        _ACCUMULATE
        + """
def training_step(model, optimizer, batches, max_grad_norm):
    optimizer.zero_grad()
    optimizer.step()
    loss = accumulate(model, batches)
    return loss, clip(model, max_grad_norm)
""",
        "the step came before backward",
    ),
    (
        "training_step",
        _ACCUMULATE
        + """
def training_step(model, optimizer, batches, max_grad_norm):
    optimizer.zero_grad()
    loss = accumulate(model, batches)
    optimizer.step()
    return loss, clip(model, max_grad_norm)
""",
        "unclipped gradient",
    ),
    (
        "training_step",
        _ACCUMULATE
        + """
def training_step(model, optimizer, batches, max_grad_norm):
    optimizer.zero_grad()
    loss = accumulate(model, batches)
    clip(model, max_grad_norm)
    norm = clip(model, max_grad_norm)
    optimizer.step()
    return loss, norm
""",
        "taken after clipping",
    ),
    (
        "training_step",
        _ACCUMULATE
        + """
def training_step(model, optimizer, batches, max_grad_norm):
    optimizer.zero_grad()
    total = sum(count(b) for b in batches)
    out = 0.0
    for b in batches:
        loss = model(**b).loss * count(b) / total
        loss.backward()
        norm = clip(model, max_grad_norm)
        out += loss.item()
    optimizer.step()
    return out, norm
""",
        "clipped or set to zero after each batch",
    ),
    (
        "decay_groups",
        _GROUPS
        + """
def decay_groups(model, weight_decay):
    spared = ["bias", "norm", "ln_", "wte", "wpe", "embed_tokens", "embed_in", "word_embed"]
    return split(model, lambda n, p: not any(f in n.lower() for f in spared), weight_decay)
""",
        "A model with other names",
    ),
    (
        "linear_schedule",
        """
def linear_schedule(step, warmup, total):
    if step <= warmup:
        return step / warmup
    return (total - step) / (total - warmup)
""",
        "ZeroDivisionError",
    ),
    (
        "accumulated_backward",
        """
def accumulated_backward(model, batches):
    counts = [int((b["labels"] != -100).sum()) for b in batches]
    out = 0.0
    for b, n in zip(batches, counts):
        loss = model(**b).loss * n / sum(counts)
        loss.backward()
        out += loss.item()
    return out
""",
        "whose first label is not -100",
    ),
    (
        "accumulated_backward",
        _ACCUMULATE
        + """
def accumulated_backward(model, batches):
    total = sum(count(b) for b in batches)
    loss = sum(model(**b).loss * count(b) / total for b in batches)
    loss.backward()
    return loss.item()
""",
        "backward ran 1 time(s)",
    ),
    (
        "training_step",
        _ACCUMULATE
        + """
def training_step(model, optimizer, batches, max_grad_norm):
    optimizer.zero_grad()
    total = sum(count(b) for b in batches)
    out = 0.0
    for b in batches:
        loss = model(**b).loss * count(b) / total
        loss.backward()
        norm = clip(model, max_grad_norm)
        optimizer.step()
        out += loss.item()
    return out, norm
""",
        "optimizer.step() ran 3 times",
    ),
    (
        "training_step",
        _ACCUMULATE
        + """
def training_step(model, optimizer, batches, max_grad_norm):
    optimizer.zero_grad()
    loss = accumulate(model, batches)
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    torch.nn.utils.clip_grad_value_(model.parameters(), max_grad_norm)
    optimizer.step()
    return loss, norm
""",
        "Each entry was clipped by itself",
    ),
]
