"""Other right answers to exercise 11: (check, source of the answer)."""

RIGHT = [
    (
        "low_rank",
        """
def low_rank(x, lora_A, lora_B, scaling, dropout, training):
    kind = x.dtype
    x = x.to(lora_A.dtype)
    if training and dropout > 0:
        stays = torch.rand_like(x) >= dropout
        x = x * stays / (1 - dropout)
    change = torch.einsum("bsi,ri,or->bso", x, lora_A, lora_B)
    return (scaling * change).to(kind)
""",
    ),
    (
        "low_rank",
        """
def low_rank(x, lora_A, lora_B, scaling, dropout, training):
    out = []
    for row in nn.Dropout(dropout).train(training)(x).type_as(lora_A):
        out.append((scaling * lora_B @ (lora_A @ row.T)).T)
    return torch.stack(out).type_as(x)
""",
    ),
    (
        "lora_layer",
        """
class LoRALayer(nn.Module):
    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.base = base
        for p in base.parameters():
            p.requires_grad = False
        where = dict(device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Parameter(torch.empty(r, base.in_features, **where))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, r, **where))
        nn.init.kaiming_uniform_(self.lora_A, a=5**0.5)
        nn.init.zeros_(self.lora_B)
        self.r, self.alpha = r, alpha
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        h = self.base(x)
        z = self.drop(x).float() @ self.lora_A.T @ self.lora_B.T
        return (h.float() + self.alpha * z / self.r).to(h.dtype)
""",
    ),
    (
        "lora_layer",
        """
class LoRALayer(nn.Module):  # A starts at zero and B random: the text leaves that open
    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.base, self.p, self.factor = base.requires_grad_(False), dropout, alpha / r
        out_features, in_features = base.weight.shape
        a = torch.zeros(r, in_features, device=base.weight.device)
        b = 0.02 * torch.randn(out_features, r, device=base.weight.device)
        self.register_parameter("lora_A", nn.Parameter(a))
        self.register_parameter("lora_B", nn.Parameter(b))

    def forward(self, x):
        p = self.p if self.training else 0.0
        return self.base(x) + low_rank(x, self.lora_A, self.lora_B, self.factor, p, True)
""",
    ),
    (
        "merge",
        """
import copy

def merge(layer):
    merged = copy.deepcopy(layer.base)
    change = (layer.scaling * torch.mm(layer.lora_B, layer.lora_A)).detach()
    merged.weight.data = (merged.weight.data.float() + change).to(merged.weight.dtype)
    return merged
""",
    ),
    (
        "merge",
        """
@torch.no_grad()
def merge(layer):  # one column of the weight after another, read from the layer's output
    base, training = layer.base, layer.training
    layer.eval()
    where = dict(device=base.weight.device, dtype=base.weight.dtype)
    merged = nn.Linear(base.in_features, base.out_features, base.bias is not None, **where)
    ones = torch.eye(base.in_features, **where)[None]
    change = low_rank(ones, layer.lora_A, layer.lora_B, layer.scaling, 0.0, False)[0]
    merged.weight.copy_(base.weight + change.T)
    if base.bias is not None:
        merged.bias.copy_(base.bias)
    layer.train(training)
    return merged
""",
    ),
    (
        "add_lora",
        """
def add_lora(model, r, alpha, targets):
    names = [n.split(".") for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    for target in targets:
        if all(name[-1] != target for name in names):
            raise ValueError(target)
    for p in model.parameters():
        p.requires_grad = False

    def walk(parent):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name in targets:
                setattr(parent, name, LoRALayer(child, r, alpha, dropout=0.0))
            else:
                walk(child)

    walk(model)
    return model
""",
    ),
    (
        "add_lora",
        """
def add_lora(model, r, alpha, targets):
    wanted, seen = set(targets), set()
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Linear and name in wanted:
                seen.add(name)
    if seen != wanted:
        raise ValueError("these are nowhere: " + str(wanted - seen))
    for name, layer in list(model.named_modules()):
        if name.split(".")[-1] in seen and isinstance(layer, nn.Linear):
            parent = model
            for part in name.split(".")[:-1]:
                parent = getattr(parent, part)
            parent._modules[name.split(".")[-1]] = LoRALayer(layer, r, alpha)
    for name, p in model.named_parameters():
        p.requires_grad = name.endswith((".lora_A", ".lora_B"))
    return model
""",
    ),
    (
        "count",
        """
def count(shapes, r):
    total = 0
    for shape in shapes:
        a, b = torch.empty(r, shape[0]), torch.empty(shape[1], r)
        total += a.numel() + b.numel()
    return total
""",
    ),
]
