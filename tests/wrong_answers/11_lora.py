"""Wrong answers to exercise 11: (check, source of the answer, part of the message expected)."""

from edits import edited

_PATH = """
def low_rank(x, lora_A, lora_B, scaling, dropout, training):
    z = drop(x, dropout, training).to(lora_A.dtype)
    z = linear(linear(z, lora_A), lora_B) * scaling
    return z.to(x.dtype)
"""

_LAYER = """
class LoRALayer(nn.Module):
    def __init__(self, base, r, alpha, dropout=0.0):
        super().__init__()
        self.base = base.requires_grad_(False)
        out_features, in_features = base.weight.shape
        device = base.weight.device
        start = torch.randn(r, in_features, device=device) / math.sqrt(in_features)
        self.lora_A = nn.Parameter(start)
        self.lora_B = nn.Parameter(torch.zeros(out_features, r, device=device))
        self.scaling = alpha / r
        self.dropout = dropout

    def forward(self, x):
        h = self.base(x)
        z = low_rank(x, self.lora_A, self.lora_B, self.scaling, self.dropout, self.training)
        return h + z
"""

_ADD = """
def add_lora(model, r, alpha, targets):
    found = [(n, m) for n, m in model.named_modules()
             if isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets]
    if set(targets) - {n.rpartition(".")[2] for n, _ in found}:
        raise ValueError("none")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, module in found:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, LoRALayer(module, r, alpha))
    return model
"""

_MERGE = """
def merge(layer):
    weight, bias = layer.base.weight, layer.base.bias
    out_features, in_features = weight.shape
    merged = nn.Linear(in_features, out_features, bias=bias is not None,
                       dtype=weight.dtype, device=weight.device)
    with torch.no_grad():
        merged.weight.copy_(weight + layer.scaling * layer.lora_B @ layer.lora_A)
        if bias is not None:
            merged.bias.copy_(bias)
    return merged
"""


def _path(*changes):
    return "low_rank", edited(_PATH, *changes)


def _layer(*changes):
    return "lora_layer", edited(_LAYER, *changes)


def _merge(*changes):
    return "merge", edited(_MERGE, *changes)


def _add(*changes):
    return "add_lora", edited(_ADD, *changes)


def _count(body):
    return "count", f"def count(shapes, r):\n    return {body}"


CALL = "z = low_rank(x, self.lora_A, self.lora_B, self.scaling, self.dropout, self.training)"
DROP = "drop(x, dropout, training)"
A = "torch.randn(r, in_features, device=device) / math.sqrt(in_features)"
B = "torch.zeros(out_features, r, device=device)"
FOUND = 'isinstance(m, nn.Linear) and n.rpartition(".")[2] in targets'
MISSING = 'set(targets) - {n.rpartition(".")[2] for n, _ in found}'
FREEZE = """    for parameter in model.parameters():
        parameter.requires_grad_(False)
"""
WRONG = [
    # The path
    (*_path((" * scaling", "")), "scaling is not used"),
    (*_path((" * scaling", " * scaling * scaling")), "scaling is in it twice"),
    (*_path((" * scaling", " / scaling")), "it is divided by scaling"),
    (*_path((" * scaling", " * 2.0")), "scaling of the call before"),
    (*_path(("linear(linear(z, lora_A), lora_B)", "lora_B @ lora_A @ z")), "do not fit"),
    (*_path(("return z.to(x.dtype)", "return z.mT.to(x.dtype)")), "The result has the shape"),
    (*_path(("return z.to(x.dtype)", "return z.detach().numpy()")), "not a tensor"),
    (*_path(("linear(z, lora_A), ", "torch.relu(linear(z, lora_A)), ")), "is not s B A x"),
    (*_path(("linear(z, lora_A)", "linear(z, lora_A.data)")), "gradient of lora_A"),
    (*_path((DROP, "drop(x.detach(), dropout, training)")), "gradient of x is missing"),
    (
        "low_rank",
        """
@torch.no_grad()
def low_rank(x, lora_A, lora_B, scaling, dropout, training):
    z = drop(x, dropout, training).to(lora_A.dtype)
    return (z @ lora_A.T @ lora_B.T * scaling).to(x.dtype)
""",
        "computed under no_grad",
    ),
    (*_path((DROP, "drop(x, dropout)")), "training=False, entries"),
    (*_path((DROP, "drop(x, 1 - dropout, training)")), "the share that goes"),
    (*_path((DROP, "drop(x, 0.5, training)")), "still gives another result"),
    (*_path((DROP, "drop(x, dropout / 2, training)")), "% of the entries are dropped"),
    (*_path((DROP, "x")), "nothing is dropped"),
    (*_path((DROP, "drop(x, dropout, training, inplace=True)")), "changed in place"),
    (
        *_path((DROP, "(x * (torch.rand_like(x) >= dropout) if training else x)")),
        "the entries that stay are multiplied by 1 instead",
    ),
    (
        *_path((DROP, "(x * drop(torch.ones_like(x[..., :1]), dropout, training))")),
        "whole tokens are dropped",
    ),
    (
        *_path((DROP, "(x * drop(torch.ones_like(x[:, :1]), dropout, training))")),
        "loses the same entries",
    ),
    (
        *_path(("    z = drop", "    torch.manual_seed(0)\n    z = drop")),
        "a second call drops the same",
    ),
    (
        *_path(
            (DROP, "x"),
            ("linear(z, lora_A), ", "drop(linear(z, lora_A), dropout, training), "),
        ),
        "what comes out of A",
    ),
    (*_path((".to(lora_A.dtype)", "")), "Which dtype do the products have"),
    (*_path(("z.to(x.dtype)", "z")), "It should have the dtype"),
    (
        *_path(
            (".to(lora_A.dtype)", ""),
            ("z, lora_A)", "z, lora_A.to(x.dtype))"),
            ("lora_B)", "lora_B.to(x.dtype))"),
        ),
        "less exact",
    ),
    (*_path((".to(lora_A.dtype)", ".float()")), "Is a dtype written down"),
    (
        *_path(
            (".to(lora_A.dtype)", ".float()"),
            ("z, lora_A)", "z, lora_A.float())"),
            (", lora_B)", ", lora_B.float())"),
        ),
        "the precision of float32",
    ),
    (
        *_path((DROP, "(x * (torch.rand(x.shape) >= dropout) / (1 - dropout) if training else x)")),
        "Was a tensor made without `device`",
    ),
    # The layer
    (*_layer(("alpha / r", "1.0")), "alpha and r are not used"),
    (*_layer(("alpha / r", "1 / r")), ": alpha is not used"),
    (*_layer(("alpha / r", "r / alpha")), "that is r/alpha"),
    (*_layer(("alpha / r", "alpha")), "that is alpha alone"),
    (*_layer(("alpha / r", "alpha / r**0.5")), "which is rsLoRA"),
    (*_layer(("alpha / r", "alpha - r")), "and not by 3"),
    (*_layer(("alpha / r", "alpha // r")), "cut to an integer"),
    (*_layer(("alpha / r", "3.0")), "that was right for r=4 and alpha=12"),
    (*_layer(("return h + z", "return h + z * self.scaling")), "alpha / r is in it twice"),
    (*_layer((B, "torch.randn(out_features, r)")), "Which of the two matrices"),
    (*_layer((A, "torch.zeros(r, in_features)")), "both start at zero"),
    (*_layer((A, "torch.empty(r, in_features)")), "uninitialized memory"),
    (*_layer((A, "torch.ones(r, in_features)")), "starts with rank 1."),
    (*_layer((A, "torch.eye(r, in_features) * (torch.arange(r) > 0)[:, None]")), "with rank 3."),
    (*_layer(("base.requires_grad_(False)", "base")), "base.bias, base.weight can"),
    (
        *_layer(
            ("base.requires_grad_(False)", "base"),
            (
                "        self.scaling",
                "        base.weight.requires_grad_(False)\n        self.scaling",
            ),
        ),
        "not frozen: base.bias can",
    ),
    (
        *_layer(
            ("        self.dropout", "        self.requires_grad_(False)\n        self.dropout")
        ),
        "frozen along with the base",
    ),
    (
        *_layer(("alpha / r", "nn.Parameter(torch.tensor(alpha / r))")),
        "scaling is trainable too",
    ),
    (
        *_layer(
            (
                "base.requires_grad_(False)",
                "nn.Linear(base.in_features, base.out_features, base.bias is not None)",
            ),
            (
                "        self.scaling",
                "        self.base.load_state_dict(base.state_dict())\n"
                "        self.base.requires_grad_(False)\n        self.scaling",
            ),
        ),
        "another module than the one",
    ),
    (*_layer((f"nn.Parameter({B})", B)), "lora_B is a Tensor"),
    (
        *_layer(("nn.Parameter(start)", "nn.Linear(in_features, r, bias=False)")),
        "lora_A is a Linear",
    ),
    (
        *_layer(
            ("torch.randn(r, in_features, device=device)", "torch.randn(in_features, r)"),
            ("self.lora_A, self", "self.lora_A.T, self"),
        ),
        "lora_A has the shape (6, 4)",
    ),
    (*_layer(("x, self.lora_A", "x, self.lora_A.detach()")), "No gradient arrives"),
    (
        *_layer(("h = self.base(x)", "with torch.no_grad():\n            h = self.base(x)")),
        "goes on to x lacks a part",
    ),
    (*_layer(("self.training)", "True)")), "dropout is for training only"),
    (*_layer(("self.dropout, self", "0.0, self")), "training mode are equal"),
    (*_layer(("dropout=0.0", "dropout=0.1")), "without a fourth argument"),
    (
        *_layer(
            (
                "h = self.base(x)",
                "x = drop(x, self.dropout, self.training)\n        h = self.base(x)",
            ),
            ("self.dropout, self.training)\n        return", "0.0, False)\n        return"),
        ),
        "also hits the frozen path",
    ),
    (
        *_layer(
            (
                "h = self.base(x)",
                "h = self.base(x)\n        p = self.dropout if self.training else 0.0",
            ),
            ("return h + z", "return h + z * (1 - p)"),
        ),
        "another mean than without",
    ),
    (
        *_layer(
            ("nn.Parameter(start)", "nn.Parameter(start.to(base.weight.dtype))"),
            ("self.lora_A, self.lora_B", "self.lora_A.float(), self.lora_B.float()"),
        ),
        "small updates would round away",
    ),
    (
        *_layer(("base.requires_grad_(False)", "base.float().requires_grad_(False)")),
        "twice the memory",
    ),
    (*_layer(("return h + z", "return h.float() + z")), "no longer bfloat16"),
    (
        *_layer(
            (
                CALL,
                "z = drop(x, self.dropout, self.training)\n"
                "        z = z @ self.lora_A.T @ self.lora_B.T * self.scaling",
            )
        ),
        "Cast x for A",
    ),
    (*_layer((A, "torch.randn(r, in_features)")), "lora_A is on the CPU"),
    (
        *_layer(
            (
                "        self.dropout",
                "        self.change = self.lora_B @ self.lora_A\n        self.dropout",
            ),
            (
                CALL,
                "z = linear(x, self.change) * self.scaling",
            ),
        ),
        "computed once and kept",
    ),
    (
        *_layer(
            (
                "        h = self.base(x)",
                "        with torch.no_grad():\n"
                "            self.base.weight += self.scaling * self.lora_B @ self.lora_A\n"
                "        return self.base(x)",
            )
        ),
        "writes into the frozen weight",
    ),
    (
        *_layer(("return h + z", "x.mul_(1.5)\n        return h + z")),
        "changes the x that it was given",
    ),
    # The merge
    (*_merge(("layer.scaling * ", "")), "forgets the scaling"),
    (*_merge((" + layer.scaling * layer.lora_B @ layer.lora_A", "")), "is the base layer"),
    (*_merge(("layer.lora_B @ layer.lora_A", "layer.lora_A @ layer.lora_B")), "raises an error"),
    (*_merge(("layer.scaling *", "layer.scaling**3 *")), "does not give the output"),
    (*_merge(("layer.scaling *", "layer.scaling**2 *")), "in the merged weight twice"),
    (*_merge(("layer.scaling *", "3 *")), "The scaling is 3, as for"),
    (*_merge(("weight + layer", "weight - layer")), "The change is subtracted"),
    (*_merge(("weight + layer", "layer")), "the change alone"),
    (*_merge(("            merged.bias.copy_(bias)", "            pass")), "got lost"),
    (*_merge(("bias=bias is not None", "bias=True")), "and the merged one has"),
    (
        "merge",
        """
def merge(layer):
    out_features, in_features = layer.base.weight.shape
    merged = nn.Linear(in_features, out_features)
    with torch.no_grad():
        merged.weight.copy_(layer.base.weight + layer.scaling * layer.lora_B @ layer.lora_A)
        merged.bias.copy_(layer.base.bias)
    return merged
""",
        "Merging a layer without a bias",
    ),
    (
        *_merge(("            merged.bias.copy_(bias)", "            merged.bias = bias")),
        "not a copy",
    ),
    (
        "merge",
        """
def merge(layer):
    with torch.no_grad():
        layer.base.weight += layer.scaling * layer.lora_B @ layer.lora_A
    return layer.base
""",
        "in it twice",
    ),
    (
        *_merge(("    return merged", "    layer.lora_B.data.zero_()\n    return merged")),
        "Merging changed lora_B",
    ),
    (*_merge(("    weight, bias", "    layer.eval()\n    weight, bias")), "left the layer in eval"),
    (*_merge(("with torch.no_grad()", "if True")), "while gradients are recorded"),
    (*_merge(("return merged", "return layer")), "Return a plain nn.Linear"),
    (
        *_merge(
            (
                "weight + layer.scaling * layer.lora_B @ layer.lora_A",
                "(layer(torch.eye(in_features, dtype=weight.dtype, device=weight.device)[None])"
                "[0] - (0 if bias is None else bias)).T",
            )
        ),
        "is dropout active meanwhile",
    ),
    (*_merge(("dtype=weight.dtype, ", "")), "the merged weight is torch.float32"),
    (*_merge((", device=weight.device", "")), "and the merged layer is on the CPU"),
    # Into a model
    (
        *_add(
            (FOUND, "isinstance(m, nn.Linear) and any(t in n for t in targets)"),
            (MISSING, "not found"),
        ),
        "not a piece of it",
    ),
    (
        *_add(
            (FOUND, "isinstance(m, nn.Linear) and n.endswith(tuple(targets))"),
            (MISSING, "not found"),
        ),
        "my_q_proj got",
    ),
    (*_add(("parameter.requires_grad_(False)", "pass")), "still requires grad"),
    (*_add(("    return model\n", "")), "Return the model"),
    (*_add(('raise ValueError("none")', "pass")), "A target that no layer has"),
    (*_add((MISSING, "not found")), "v_prj, next to a target"),
    (*_add(("isinstance(m, nn.Linear) and ", "")), "table is an Embedding"),
    (*_add(("for name, module in found:", "for name, module in found[:1]:")), "both q_proj"),
    (*_add((FREEZE, ""), ("    return model", f"{FREEZE}    return model")), "What comes first"),
    (
        *_add(("setattr(model.get_submodule(parent), last, ", "setattr(model, name, ")),
        "dot included",
    ),
    (*_add(("module, r, alpha)", "module, alpha, r)")), "rows."),
    (*_add(("module, r, alpha)", "module, r, 2 * r)")), "is not multiplied by alpha/r"),
    (*_add(("module, r, alpha)", "module, r, alpha, 0.1)")), "Nobody asked for dropout"),
    (
        *_add(
            (
                "LoRALayer(module, r",
                "LoRALayer(nn.Linear(module.in_features, module.out_features), r",
            )
        ),
        "another than the one that stood there",
    ),
    (
        "add_lora",
        """
def add_lora(model, r, alpha, targets):
    model.requires_grad_(False)
    for name, module in model.named_children():
        if isinstance(module, nn.Linear) and name in targets:
            setattr(model, name, LoRALayer(module, r, alpha))
    return model
""",
        "no layer of the model has LoRA",
    ),
    (
        "add_lora",
        """
def add_lora(model, r, alpha, targets):
    model.requires_grad_(False)
    for target in targets:
        found = [n for n, m in model.named_modules()
                 if isinstance(m, nn.Linear) and n.split(".")[-1] == target]
        if not found:
            raise ValueError(f"no {target}")
        for name in found:
            parent, _, last = name.rpartition(".")
            parent = model.get_submodule(parent)
            setattr(parent, last, LoRALayer(getattr(parent, last), r, alpha))
    return model
""",
        "frozen already",
    ),
    (
        "add_lora",
        """
def add_lora(model, r, alpha, targets):
    for target in targets:
        found = [n for n, m in model.named_modules()
                 if isinstance(m, nn.Linear) and n.split(".")[-1] == target]
        if not found:
            raise ValueError(f"no {target}")
        for name in found:
            parent, _, last = name.rpartition(".")
            parent = model.get_submodule(parent)
            setattr(parent, last, LoRALayer(getattr(parent, last), r, alpha))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return model
""",
        "comes too late",
    ),
    (
        *_add(
            (
                '    if set(targets) - {n.rpartition(".")[2] for n, _ in found}:\n'
                '        raise ValueError("none")\n',
                '    assert not set(targets) - {n.rpartition(".")[2] for n, _ in found}\n',
            )
        ),
        "ends in AssertionError",
    ),
    (
        *_add(('parent, _, last = name.rpartition(".")', 'parent, last = name.rsplit(".", 1)')),
        "whose name has no dot",
    ),
    # The count
    (*_count("sum(a * b for a, b in shapes)"), "themselves"),
    (*_count("sum(2 * r * a for a, b in shapes)"), "not all square"),
    (*_count("sum(r * a for a, b in shapes)"), "Only one of"),
    (*_count("r * sum(shapes[0])"), "is not the number of entries"),
    (*_count("sum(a + b for a, b in shapes)"), "would be right for r=1"),
    (*_count("460_800"), "which was SmolLM2's"),
    (*_count("sum(r * a * b for a, b in shapes)"), "r times the weights"),
    (*_count("sum(r * (a + b) for a, b in shapes) / 134_515_008"), "is a fraction"),
    (*_count("sum(r * (a + b) for a, b in set(shapes))"), "counts layers of one shape only once"),
    (*_count("sum(r * (a + b) + b for a, b in shapes)"), "has biases in it"),
    (
        *_merge(("    weight, bias", "    layer.requires_grad_(False)\n    weight, bias")),
        "changed which parameters",
    ),
    (
        "add_lora",
        """
def add_lora(model, r, alpha, targets):
    names = {n.split(".")[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    if not set(targets) <= names:
        raise ValueError("none")
    model.requires_grad_(False)
    for parent in [model, *model.children()]:
        for name, child in parent.named_children():
            if name in targets and isinstance(child, nn.Linear):
                setattr(parent, name, LoRALayer(child, r, alpha))
    return model
""",
        "lie three levels deep",
    ),
]
