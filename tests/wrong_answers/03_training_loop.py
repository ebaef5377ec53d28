"""Wrong answers to exercise 03: (check, source of the answer, part of the message expected)."""

from edits import edited

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


def _weighted(weight, before, call):
    return f"""{_ACCUMULATE}
def accumulated_backward(model, batches):
    {before}
    out = 0.0
    for b in batches:
        loss = model({call}).loss * ({weight})
        loss.backward()
        out += loss.item()
    return out
"""


_BACKWARD = _weighted("count(b) / total", "total = sum(count(b) for b in batches)", "**b")


def _step(*lines):
    head = "\ndef training_step(model, optimizer, batches, max_grad_norm):\n"
    body = ["optimizer.zero_grad()", *lines, "return loss, norm"]
    return head + "".join(f"    {line}\n" for line in body)


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
        "tiny-gpt2: transformer.h.0.ln_2.weight decays",
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
    decayed = [m.weight for m in linears if m.weight not in tables and m.weight.requires_grad]
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
        edited(
            _BACKWARD, ("        loss = model", "        model.zero_grad()\n        loss = model")
        ),
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
        "projection.weight decays",
    ),
    (
        "linear_schedule",
        """
def linear_schedule(step, warmup, total):
    if step <= warmup:
        return step / warmup
    return (total - step) / (total - warmup)
""",
        "not even step 0",
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
    # Found by solving the tasks afresh.
    *[
        ("decay_groups", _GROUPS + "\ndef decay_groups(model, weight_decay):\n" + body, told)
        for body, told in [
            (
                """
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    linears = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))]
    decayed = {m.weight for m in linears} - tables
    rest = [p for p in model.parameters() if p.requires_grad and p not in decayed]
    return [{"params": [p for p in model.parameters() if p in decayed],
             "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
""",
                "is frozen but stands in the decayed group",
            ),
            (
                """
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    return split(model, lambda n, p: p.dim() == 2 and p not in tables, weight_decay)
""",
                "belongs to no linear layer",
            ),
            (
                """
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    inside = {m.weight for m in model.modules() if type(m) in (nn.Linear, Conv1D)}
    return split(model, lambda n, p: p in inside - tables, weight_decay)
""",
                "matrix of a _OwnLinear",
            ),
            (
                """
    inside = {m.weight for n, m in model.named_modules()
              if isinstance(m, (nn.Linear, Conv1D)) and n != "lm_head"}
    return split(model, lambda n, p: p in inside, weight_decay)
""",
                "This head is not tied",
            ),
            (
                """
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    inside = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))} - tables
    return split(model, lambda n, p: p in inside, 0.1)
""",
                "with 0.05 they have 0.1",
            ),
            (
                """
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    inside = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))} - tables
    return split(model, lambda n, p: p in inside, weight_decay)[::-1]
""",
                "wrong order",
            ),
            (
                """
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    inside = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))} - tables
    groups = split(model, lambda n, p: p in inside, weight_decay)
    return [group | {"params": set(group["params"])} for group in groups]
""",
                "A set has no order",
            ),
            (
                """
    tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    inside = {m.weight for m in model.modules() if isinstance(m, (nn.Linear, Conv1D))} - tables
    groups = split(model, lambda n, p: p in inside, weight_decay)
    return [group | {"params": [p.detach() for p in group["params"]]} for group in groups]
""",
                "not a parameter of the model",
            ),
        ]
    ],
    *[
        (
            "linear_schedule",
            "import math\n\ndef linear_schedule(step, warmup, total):\n" + body,
            told,
        )
        for body, told in [
            (
                "    return step / warmup if step < warmup else 1.0\n",
                "it never falls",
            ),
            (
                """
    if step < warmup:
        return step / warmup
    return (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2
""",
                "the decay is not a straight line",
            ),
            (
                "    return min(1, step / max(1, warmup)) * (1 - step / total)\n",
                "the decay must begin there",
            ),
            ("    return 1 - step / total\n", "already has the full rate"),
            (
                "    return min(step / max(1, warmup), (total - step) / (total - warmup))\n",
                "although there is no warm-up",
            ),
            (
                """
    if step < warmup:
        return step / warmup
    return (total - 1 - step) / (total - 1 - warmup)
""",
                "one step too early",
            ),
            (
                """
    if step < warmup:
        return (step / warmup) ** 2
    return (total - step) / (total - warmup)
""",
                "the warm-up is not a straight line",
            ),
            (
                """
    now = getattr(linear_schedule_state, "now", 0)
    linear_schedule_state.now = (now + 1) % (total + 1)
    return now / warmup if now < warmup else (total - now) / (total - warmup)

def linear_schedule_state():
    pass
""",
                "how often it was called",
            ),
        ]
    ],
    *[
        ("accumulated_backward", _weighted(weight, before, call), told)
        for weight, before, call, told in [
            ("len(b['labels']) / 6", "", "**b", "as it has rows"),
            (
                "b['attention_mask'].sum() / sum(c['attention_mask'].sum() for c in batches)",
                "",
                "**b",
                "in its attention mask",
            ),
            (
                "int((b['labels'][0, 1:] != -100).sum())"
                " / sum(int((c['labels'][0, 1:] != -100).sum()) for c in batches)",
                "",
                "**b",
                "in the first row",
            ),
            (
                "int((b['labels'][:, :-1] != -100).sum())"
                " / sum(int((c['labels'][:, :-1] != -100).sum()) for c in batches)",
                "",
                "**b",
                "The last label of a row",
            ),
            (
                "count(b) / sum(map(count, batches[: [c is b for c in batches].index(True) + 1]))",
                "",
                "**b",
                "divisor grows",
            ),
            (
                "count(b) / sum(count(c) for c in batches)",
                "",
                "input_ids=b['input_ids'], labels=b['labels']",
                "the attention mask?",
            ),
            (
                "int((b['labels'][:, 1:] > 0).sum())"
                " / sum(int((c['labels'][:, 1:] > 0).sum()) for c in batches)",
                "",
                "**b",
                "A target with the id 0",
            ),
            (
                "count(b) / sum(count(c) for c in batches)",
                "model.eval()",
                "**b",
                "is now in eval mode",
            ),
            (
                "count(b) / sum(count(c) for c in batches)",
                "[c['labels'].__setitem__((slice(None), 0), 5) for c in batches]",
                "**b",
                "batches were changed",
            ),
            (
                "count(b) / sum(count(c) for c in batches)",
                "",
                "input_ids=b['input_ids'][:, :-1], attention_mask=b['attention_mask'][:, :-1], "
                "labels=b['labels'][:, 1:]",
                "shifted twice",
            ),
            ("count(b) / 24", "", "**b", "four others are not"),
        ]
    ],
    (
        "accumulated_backward",
        edited(_BACKWARD, ("out += loss.item()\n    return", "out += loss\n    return")),
        "as a Python float",
    ),
    (
        "accumulated_backward",
        _ACCUMULATE
        + """
def accumulated_backward(model, batches):
    total = sum(count(b) for b in batches)
    out = 0.0
    for b in batches:
        loss = model(**b).loss * count(b)
        loss.backward()
        out += loss.item()
    for p in model.parameters():
        p.grad = p.grad / total
    return out / total
""",
        "A frozen parameter has no gradient",
    ),
    *[
        ("training_step", _ACCUMULATE + _step(*lines), told)
        for lines, told in [
            (
                (
                    "loss = accumulate(model, batches)",
                    "[nn.utils.clip_grad_norm_(p, max_grad_norm) for p in model.parameters()]",
                    "norm = 1.0",
                    "optimizer.step()",
                ),
                "Each parameter was clipped by itself",
            ),
            (
                (
                    "loss = accumulate(model, batches)",
                    "norm = clip(model, float('inf'))",
                    "for p in model.parameters():",
                    "    p.grad *= max_grad_norm / norm",
                    "optimizer.step()",
                ),
                "clipping only shortens",
            ),
            (
                (
                    "loss = accumulate(model, batches)",
                    "norm = clip(model, 1.0)",
                    "for p in model.parameters():",
                    "    p.data -= optimizer.param_groups[0]['lr'] * p.grad",
                ),
                "who moved them",
            ),
            (
                (
                    "loss = accumulate(model, batches)",
                    "norm = clip(model, max_grad_norm)",
                    "optimizer.step()",
                    "loss, norm = norm, loss",
                ),
                "The loss comes first",
            ),
            (
                (
                    "accumulate(model, batches)",
                    "norm = clip(model, max_grad_norm)",
                    "optimizer.step()",
                    "loss = accumulate(model, batches)",
                ),
                "that after the step",
            ),
            (
                (
                    "loss = torch.tensor(accumulate(model, batches))",
                    "norm = clip(model, max_grad_norm)",
                    "optimizer.step()",
                ),
                "Return two Python floats",
            ),
            (
                (
                    "loss = accumulate(model, batches)",
                    "norm = clip(model, 0.01)",
                    "optimizer.step()",
                ),
                "to the limit that is passed",
            ),
            (
                (
                    "loss = 0.0",
                    "for b in batches:",
                    "    part = model(**b).loss / len(batches)",
                    "    part.backward()",
                    "    loss += part.item()",
                    "norm = clip(model, max_grad_norm)",
                    "optimizer.step()",
                ),
                "the mean of the batch means; divide",
            ),
        ]
    ],
]
