"""Right answers to exercise 05, written in other ways: (check, source of the answer)."""

RIGHT = [
    (
        "train_only",
        """
import re

def train_only(model, *patterns):
    keep = set()
    for pattern in patterns:
        rule = re.compile(".*".join(re.escape(part) for part in pattern.split("*")))
        hits = [name for name, _ in model.named_modules() if rule.fullmatch(name)]
        if len(hits) == 0:
            raise ValueError("nothing fits " + pattern)
        for name in hits:
            keep.update(model.get_submodule(name).parameters())
    model.zero_grad(set_to_none=True)
    for p in model.parameters():
        p.requires_grad = p in keep
    return model
""",
    ),
    (
        "train_only",
        """
def train_only(model, *patterns):
    everything = list(model.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern + ".*") for name, _ in everything):
            raise ValueError(pattern)
    for _, p in everything:
        p.requires_grad = False
    for name, p in everything:
        if any(fnmatchcase(name, pattern + ".*") for pattern in patterns):
            p.requires_grad = True
    for _, p in everything:
        if not p.requires_grad:
            p.grad = None
    return model
""",
    ),
    (
        "train_last_blocks",
        """
def train_last_blocks(model, k):
    if hasattr(model, "transformer"):
        blocks = model.transformer.h
    elif hasattr(model, "gpt_neox"):
        blocks = model.gpt_neox.layers
    else:
        blocks = model.model.layers
    if k < 1 or k > len(blocks):
        raise ValueError(f"1 to {len(blocks)} blocks")
    model.requires_grad_(False)
    model.zero_grad()
    blocks[len(blocks) - k :].requires_grad_()
    return model
""",
    ),
    (
        "train_last_blocks",
        """
def train_last_blocks(model, k):
    n = model.config.num_hidden_layers
    if k not in range(1, n + 1):
        raise ValueError(k)
    found = [(name.count("."), name) for name, module in model.named_modules()
             if type(module) is nn.ModuleList and len(module) == n]
    path = min(found)[1]
    prefixes = tuple(f"{path}.{i}." for i in range(n - k, n))
    for name, p in model.named_parameters():
        p.requires_grad_(name.startswith(prefixes))
        p.grad = None
    return model
""",
    ),
    (
        "train_biases",
        """
def train_biases(model):
    if not any(("." + name).endswith(".bias") for name, _ in model.named_parameters()):
        raise ValueError("no bias")
    for name, p in model.named_parameters():
        p.grad = None
        p.requires_grad = ("." + name).endswith(".bias")
    return model
""",
    ),
    (
        "train_biases",
        """
def train_biases(model):
    owners = [m for m in model.modules() if isinstance(getattr(m, "bias", None), nn.Parameter)]
    if not owners:
        raise ValueError("no bias")
    model.requires_grad_(False).zero_grad()
    for m in owners:
        m.bias.requires_grad = True
    return model
""",
    ),
    (
        "count_by_part",
        """
def count_by_part(model):
    owner = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        owner.setdefault(p, name.split(".")[0])
    result = {}
    for part, _ in model.named_children():
        own = [p for p, first in owner.items() if first == part]
        on = [p for p in own if p.requires_grad]
        result[part] = (sum(map(torch.numel, on)), sum(map(torch.numel, own)))
    return result
""",
    ),
    (
        "make_optimizer",
        """
def make_optimizer(model, lr, weight_decay):
    groups = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups.append({"params": [p], "weight_decay": weight_decay})
    if len(groups) == 0:
        raise ValueError("unfreeze something first")
    return torch.optim.AdamW(groups, lr=lr)
""",
    ),
]
