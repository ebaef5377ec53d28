"""Right answers to exercise 10, written in another way: (check, source of the answer)."""

_FUNCTIONAL = """
import torch
import torch.nn.functional as F

class Adapter(torch.nn.Module):
    def __init__(self, hidden, bottleneck, activation=F.relu):
        super().__init__()
        self.f = activation
        self.up = torch.nn.Linear(bottleneck, hidden)
        self.down = torch.nn.Linear(hidden, bottleneck)
        self.down.weight.data.normal_(std=0.01)
        self.down.bias.data.zero_()
        for p in self.up.parameters():
            p.data.fill_(0)

    def forward(self, h):
        x = h.to(torch.float32)
        inner = self.f(F.linear(x, self.down.weight, self.down.bias))
        change = torch.einsum("...m,hm->...h", inner, self.up.weight) + self.up.bias
        return change.to(h.dtype) + h
"""

# Zero weights in front of a bias that is not zero would do as well: only the last layer must be 0.
_SEQUENTIAL = """
from torch import nn, no_grad

class Function(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)

class Adapter(nn.Module):
    def __init__(self, hidden, bottleneck, activation=nn.ReLU()):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(hidden, bottleneck), Function(activation), nn.Linear(bottleneck, hidden)
        )
        with no_grad():
            self.up.weight *= 0
            self.up.bias *= 0

    @property
    def down(self):
        return self.body[0]

    @property
    def up(self):
        return self.body[2]

    def forward(self, x):
        return (x.float() + self.body(x.float())).type_as(x)
"""

_COUNT = """
from torch import nn

def count(config, bottleneck, placement="houlsby"):
    match placement:
        case "houlsby":
            each = 2
        case "pfeiffer":
            each = 1
        case _:
            raise ValueError(placement)
    total = 0
    for _ in range(config.num_hidden_layers):
        for _ in range(each):
            down = nn.Linear(config.hidden_size, bottleneck, device="meta")
            up = nn.Linear(bottleneck, config.hidden_size, device="meta")
            for layer in (down, up):
                total += layer.weight.numel() + len(layer.bias)
    return total
"""

_PLACES = """
def places(model, names):
    endings = [tuple(name.split(".")) for name in names]
    used, found = set(), set()
    for dotted, _ in model.named_modules():
        parts = tuple(dotted.split("."))
        for ending in endings:
            if parts[len(parts) - len(ending):] == ending and len(parts) >= len(ending):
                used.add(ending)
                found.add(dotted)
    if used != set(endings):
        raise ValueError("a name fits nothing")
    return sorted(found, reverse=True)
"""

_WRAPPED = """
from torch import nn

class Behind(nn.Module):
    def __init__(self, projection, adapter):
        super().__init__()
        self.projection = projection
        self.adapter = adapter

    def forward(self, *args, **kwargs):
        return self.adapter(self.projection(*args, **kwargs))

def add_adapters(model, bottleneck, names):
    spots = places(model, names)
    device = next(model.parameters()).device
    model.requires_grad_(False)
    for spot in spots:
        *above, last = spot.split(".")
        parent = model.get_submodule(".".join(above))
        adapter = Adapter(model.config.hidden_size, bottleneck).to(device)
        setattr(parent, last, Behind(getattr(parent, last), adapter))
    return model
"""

_LISTED = """
from torch import nn

def add_adapters(model, bottleneck, names):
    modules = [model.get_submodule(name) for name in places(model, names)]
    for p in model.parameters():
        p.requires_grad = False
    width = model.config.hidden_size
    model.adapters = nn.ModuleList(Adapter(width, bottleneck) for _ in modules).to(model.device)

    def hook_of(adapter):
        def hook(module, args, output):
            return adapter(output)

        return hook

    for module, adapter in zip(modules, model.adapters):
        module.register_forward_hook(hook_of(adapter))
    return model
"""

_FORWARD = """
def add_adapters(model, bottleneck, names):
    modules = list(map(model.get_submodule, places(model, names)))
    freeze(model)
    for module in modules:
        module.behind = Adapter(model.config.hidden_size, bottleneck).to(module.weight.device)
        module.forward = lambda x, m=module, forward=module.forward: m.behind(forward(x))
    return model
"""

_AFFINE = """
def not_affine(f, x, y):
    zero, worst = f(x - x), 0.0
    for a, b, c, d in zip(f(x + y), f(x), f(y), zero):
        for left, right in zip(a.tolist(), (b + c - d).tolist()):
            worst = max(worst, abs(left - right))
    return worst
"""

_FORMULA = """
import torch
from torch import nn

def merge(linear, adapter):
    points = 3 * torch.randn(500, linear.in_features)
    others = torch.randn(500, linear.in_features)
    with torch.no_grad():
        outputs = adapter(linear(points))
        size = max(outputs.abs().max().item(), 1e-30)
        gap = not_affine(lambda z: adapter(linear(z)) / size, points, others)
        if gap > 3e-5:
            raise ValueError("not affine")
        U, D, W = adapter.up.weight, adapter.down.weight, linear.weight
        b = 0 * W[:, 0] if linear.bias is None else linear.bias
        merged = nn.Linear(linear.in_features, linear.out_features)
        merged.weight = nn.Parameter(W + U @ (D @ W))
        merged.bias = nn.Parameter(b + U @ (D @ b + adapter.down.bias) + adapter.up.bias)
    return merged
"""

_OWN = """
import torch

def prepare(model, bottleneck, lr):
    model.requires_grad_(False)
    parameters = []
    for block in model.model.layers:
        adapter = Adapter(model.config.hidden_size, bottleneck)
        block.mlp.add_module("adapter", adapter)
        block.mlp.register_forward_hook(lambda mlp, args, output: mlp.adapter(output))
        parameters.extend(adapter.parameters())
    return (model, torch.optim.AdamW(parameters, lr, weight_decay=0.01))
"""

_ALL_HELD = """
import torch

def prepare(model, bottleneck, lr):
    model = add_adapters(model, bottleneck, ("down_proj",))
    return model, torch.optim.AdamW(model.parameters(), lr=lr)
"""

RIGHT = [
    ("adapter", _FUNCTIONAL),
    ("adapter", _SEQUENTIAL),
    ("count", _COUNT),
    ("places", _PLACES),
    ("add_adapters", _WRAPPED),
    ("add_adapters", _LISTED),
    ("add_adapters", _FORWARD),
    ("not_affine", _AFFINE),
    ("merge", _FORMULA),
    ("prepare", _OWN),
    ("prepare", _ALL_HELD),
]
