"""Wrong answers to exercise 10: (check, source of the answer, part of the message expected)."""

_ADAPTER = """
import torch
from torch import nn

class Adapter(nn.Module):
    def __init__(self, hidden, bottleneck, activation=torch.relu):
        super().__init__()
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation = activation

    def forward(self, x):
        z = self.activation(self.down(x.to(self.down.weight.dtype)))
        return (x + self.up(z)).to(x.dtype)
"""

_COUNT = """
def count(config, bottleneck, placement="houlsby"):
    places = {"houlsby": 2, "pfeiffer": 1}
    if placement not in places:
        raise ValueError("neither")
    hidden = config.hidden_size
    one = 2 * hidden * bottleneck + hidden + bottleneck
    return places[placement] * config.num_hidden_layers * one
"""

# A module around the projection, where the solution has a hook.
_ADD = """
import torch
from torch import nn

class Wrapped(nn.Module):
    def __init__(self, base, adapter):
        super().__init__()
        self.base, self.adapter = base, adapter

    def forward(self, x):
        return self.adapter(self.base(x))

def fits(name, ending):
    return f".{name}".endswith(f".{ending}")

def add_adapters(model, bottleneck, names):
    modules = list(model.named_modules())
    for ending in names:
        if not any(fits(name, ending) for name, _ in modules):
            raise ValueError(f"no {ending}")
    for p in model.parameters():
        p.requires_grad_(False)
    for name, module in modules:
        if any(fits(name, ending) for ending in names):
            parent, _, last = name.rpartition(".")
            adapter = Adapter(model.config.hidden_size, bottleneck)
            setattr(model.get_submodule(parent), last, Wrapped(module, adapter))
    return model
"""

_AFFINE = """
import torch

def not_affine(f, x, y):
    with torch.no_grad():
        return (f(x + y) - f(x) - f(y) + f(torch.zeros_like(x))).abs().max().item()
"""

# By formula, where the solution probes the two with unit vectors.
_MERGE = """
import torch
from torch import nn

def merge(linear, adapter):
    x, y = torch.randn(2, 256, linear.in_features)
    if not_affine(lambda z: adapter(linear(z)), x, y) > 1e-3:
        raise ValueError("no affine map")
    U, D, W = adapter.up.weight, adapter.down.weight, linear.weight
    b = torch.zeros(len(W)) if linear.bias is None else linear.bias
    d, u = adapter.down.bias, adapter.up.bias
    merged = nn.Linear(linear.in_features, linear.out_features)
    with torch.no_grad():
        merged.weight.copy_(W + U @ D @ W)
        merged.bias.copy_(b + U @ (D @ b + d) + u)
    return merged
"""

_PREPARE = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, hidden, bottleneck):
        super().__init__()
        self.down = nn.Linear(hidden, bottleneck)
        self.up = nn.Linear(bottleneck, hidden)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x):
        return x + self.up(torch.relu(self.down(x)))

def prepare(model, bottleneck, lr):
    model.requires_grad_(False)
    for block in model.model.layers:
        own = block.own = Own(model.config.hidden_size, bottleneck)
        block.mlp.down_proj.register_forward_hook(lambda module, args, output, own=own: own(output))
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=lr)
"""

_FOUND = """
def prepare(model, bottleneck, lr):
    return found(model, bottleneck, lr)
"""


def _edit(source, *pairs):
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        assert old in source, old
        source = source.replace(old, new)
    return source


UP = "        nn.init.zeros_(self.up.weight)\n"
UP_BIAS = "        nn.init.zeros_(self.up.bias)\n"
FORWARD = "(x + self.up(z)).to(x.dtype)"
ADAPTER = "adapter = Adapter(model.config.hidden_size, bottleneck)"
FREEZE = "    for p in model.parameters():\n        p.requires_grad_(False)\n"
FITS = 'f".{name}".endswith(f".{ending}")'
MISSING = 'raise ValueError(f"no {ending}")'
REFUSE = 'raise ValueError("no affine map")'
SIDE = "W + (W @ U @ D if len(W) == W.shape[1] else U @ D @ W)"
BIAS = "b + U @ (D @ b + d) + u"
B = "torch.zeros(len(W)) if linear.bias is None else linear.bias"
OWN = "own = block.own = Own(model.config.hidden_size, bottleneck)"
LOOP = "    for block in model.model.layers:\n"
TRAINED = "    trained = [p for p in model.parameters() if p.requires_grad]\n"
PLACE = "block.mlp.down_proj.register"

WRONG = [
    ("adapter", _edit(_ADAPTER, "x + self.up(z)", "self.up(z)"), "returns zeros"),
    ("adapter", _edit(_ADAPTER, UP, "", UP_BIAS, ""), "both projections start at random"),
    ("adapter", _edit(_ADAPTER, UP_BIAS, ""), "adds a constant"),
    (
        "adapter",
        _edit(_ADAPTER, UP, UP + UP.replace("up", "down") + UP_BIAS.replace("up", "down")),
        "Both projections start at zero",
    ),
    ("adapter", _edit(_ADAPTER, "nn.Linear(bottleneck, hidden)",
                      "nn.Linear(hidden, bottleneck)"), "up.weight has the shape (4, 6)"),
    ("adapter", _edit(_ADAPTER, "(hidden, bottleneck)\n        self.up",
                      "(hidden, bottleneck, bias=False)\n        self.up"), "down has no bias"),
    ("adapter", _edit(_ADAPTER, "self.down = nn.Linear(hidden, bottleneck)",
                      "self.down = nn.Linear(hidden, bottleneck).half()"), "is torch.float16"),
    ("adapter", _edit(_ADAPTER, "self.down = ", "self.first = ", "self.down", "self.first"),
     "no nn.Linear called down"),
    ("adapter", _edit(_ADAPTER, "z = self.activation(", "z = ("), "two linear maps are still one"),
    (
        "adapter",
        _edit(_ADAPTER, "z = self.activation(", "z = (", "self.up(z)",
              "self.activation(self.up(z))"),
        "after the second projection",
    ),
    (
        "adapter",
        _edit(_ADAPTER, FORWARD, "self.activation(x + self.up(z)).to(x.dtype)"),
        "also hits what is skipped",
    ),
    ("adapter", _edit(_ADAPTER, "z = self.activation(", "z = torch.relu("), "still uses a ReLU"),
    ("adapter", _edit(_ADAPTER, "x + self.up(z)", "2 * x + self.up(z)"), "not give back exactly"),
    ("adapter", _edit(_ADAPTER, f"return {FORWARD}", "x += self.up(z)\n        return x"),
     "writes into"),
    ("adapter", _edit(_ADAPTER, "x + self.up(z)", "x + 0.5 * self.up(z)"), "is not x + U f("),
    ("adapter", _edit(_ADAPTER, "self.activation(self.down(x.to(self.down.weight.dtype)))",
                      "self.activation(self.down(x.to(self.down.weight.dtype))).detach()"),
     "No gradient arrives at down.weight"),
    ("adapter", _edit(_ADAPTER, "(x + self.up", "(x.detach() + self.up"), "is not complete"),
    ("adapter", _edit(_ADAPTER, "x.to(self.down.weight.dtype)", "x"), "On bfloat16 input"),
    ("adapter", _edit(_ADAPTER, ").to(x.dtype)", ")"), "and float32 comes out"),
    ("adapter", _edit(_ADAPTER, "        z = self", "        self.to(x.dtype)\n        z = self"),
     "itself is no longer float32"),
    ("adapter", _edit(_ADAPTER, UP_BIAS, UP_BIAS + "        self.down.requires_grad_(False)\n"),
     "A part of the adapter is frozen"),
    ("count", _edit(_COUNT, " + hidden + bottleneck", ""), "biases are left out"),
    ("count", _edit(_COUNT, "+ hidden + bottleneck", "+ 2 * hidden"), "differ in length"),
    ("count", _edit(_COUNT, "2 * hidden * b", "hidden * b"), "Only one of the two projections"),
    ("count", _edit(_COUNT, "config.num_hidden_layers * ", ""), "one block alone"),
    (
        "count",
        _edit(_COUNT, "    return places[placement] * config.num_hidden_layers * one",
              "    wide = 2 * config.intermediate_size * bottleneck + config.intermediate_size\n"
              "    wide += bottleneck\n"
              "    return config.num_hidden_layers * (one * (places[placement] - 1) + wide)"),
        "as wide as its middle",
    ),
    ("count", _edit(_COUNT, '"pfeiffer": 1', '"pfeiffer": 2'), "the same count"),
    ("count", _edit(_COUNT, '"houlsby": 2, "pfeiffer": 1', '"houlsby": 1, "pfeiffer": 2'),
     "taken for each other"),
    ("count", _edit(_COUNT, "* one", "* (one + 2 * hidden)"), "are not the numbers of entries"),
    ("count", _edit(_COUNT, "config.hidden_size", 'config.to_dict()["hidden_size"]'),
     "On another architecture"),
    ("count", _edit(_COUNT, "config.hidden_size", "config.n_embd"), "a configuration of Llama"),
    ("count", _edit(_COUNT, "if placement not in places", "if not places"),
     "ends in a KeyError"),
    ("count", _edit(_COUNT, "places[placement]", "(2 if placement == 'houlsby' else 1)",
                    "if placement not in places", "if not places"),
     "counted all the same"),
    ("add_adapters", _edit(_ADD, "    return model\n", ""), "Return the model"),
    ("add_adapters", _edit(_ADD, "self.adapter(self.base(x))", "self.base(x)"), "No adapter runs"),
    (
        "add_adapters",
        _edit(_ADD, "setattr(model.get_submodule(parent), last, Wrapped(module, adapter))",
              "module.register_forward_hook(lambda m, args, output, adapter=adapter: "
              "adapter(output))"),
        "the model does not know them",
    ),
    (
        "add_adapters",
        _edit(_ADD, f"            {ADAPTER}\n", "", "    for name, module in modules:",
              f"    {ADAPTER}\n    for name, module in modules:"),
        "One adapter serves all four places",
    ),
    # The lambda looks its adapter up when it runs, and then the loop is over.
    (
        "add_adapters",
        _edit(_ADD, "    for name, module in modules:",
              "    for block in range(2):\n"
              "      for name, module in [m for m in modules if f'.{block}.' in m[0]]:",
              "setattr(model.get_submodule(parent), last, Wrapped(module, adapter))",
              "module.adapter, both = adapter, globals().setdefault('both', {})\n"
              "            both[id(model), block] = adapter\n"
              "            module.register_forward_hook(lambda m, a, out, key=(id(model), block):"
              " both[key](out))"),
        "some places share it",
    ),
    ("add_adapters", _edit(_ADD, FITS, "ending in name"), "and neither is meant"),
    (
        "add_adapters",
        _edit(_ADD, "    for name, module in modules:", "    for name, module in modules[:14]:"),
        "adapters run in 2 blocks with o_proj",
    ),
    (
        "add_adapters",
        _edit(_ADD, "self.adapter(self.base(x))",
              "self.base(x) + (self.adapter(x) - x) if x.shape[-1] == 32 else "
              "self.adapter(self.base(x))"),
        "goes into its projection",
    ),
    (
        "add_adapters",
        _edit(_ADD, "    for name, module in modules:",
              "    for layer in getattr(getattr(model, 'model', 0), 'layers', []):\n"
              "        for spot, names_ in ((layer.post_attention_layernorm, 0), (layer, 1)):\n"
              f"            spot.{ADAPTER}\n"
              "            if names_:\n"
              "                spot.register_forward_hook(lambda m, a, out: m.adapter(out))\n"
              "            else:\n"
              "                spot.register_forward_pre_hook(lambda m, a: m.adapter(a[0]))\n"
              "    for name, module in []:"),
        "gets the sum with the residual",
    ),
    ("add_adapters", _edit(_ADD, "        return self.adapter(self.base(x))",
                           "        x = self.base(x)\n"
                           "        return x + (self.adapter(2 * x) - 2 * x)"),
     "do not get what o_proj"),
    ("add_adapters", _edit(_ADD, FREEZE, ""), "The base is not frozen"),
    ("add_adapters", _edit(_ADD, FREEZE, "", "    return model", FREEZE + "    return model"),
     "frozen along with the base"),
    (
        "add_adapters",
        _edit(_ADD, "self.adapter(self.base(x))", "self.base(x) + self.adapter(self.base(x))"),
        "logits are no longer those of the base",
    ),
    (
        "add_adapters",
        _edit(_ADD, "        return self.adapter(self.base(x))",
              "        x = self.base(x)\n        self.adapter(x)\n        return x"),
        "is thrown away",
    ),
    (
        "add_adapters",
        _edit(_ADD, "        return self.adapter(self.base(x))",
              "        x = self.base(x)\n        return x + 0.5 * (self.adapter(x) - x)"),
        "replaced by its adapter's",
    ),
    (
        "add_adapters",
        _edit(_ADD, "model.config.hidden_size", "getattr(module, 'in_features', 32)"),
        "no longer runs",
    ),
    ("add_adapters", _edit(_ADD, MISSING, "pass"), "passed over as long as another fits"),
    (
        "add_adapters",
        _edit(_ADD, MISSING, "pass", "    for p in model.parameters()",
              "    if not all(any(fits(n, e) for n, _ in modules) for e in names):\n"
              "        return model\n    for p in model.parameters()"),
        "nothing is said",
    ),
    (
        "add_adapters",
        _edit(_ADD, MISSING, "pass", "    return model",
              "    for ending in names:\n"
              "        if not any(fits(name, ending) for name, _ in modules):\n"
              f"            {MISSING}\n    return model"),
        "comes too late",
    ),
    (
        "add_adapters",
        _edit(_ADD, "list(model.named_modules())",
              "[(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]"),
        "Which class are they of",
    ),
    (
        "add_adapters",
        _edit(_ADD, "model.config.hidden_size", "module.weight.shape[0]"),
        "A GPT-2 with adapters does not run",
    ),
    (
        "add_adapters",
        _edit(_ADD, FITS, 'name.rpartition(".")[2] == ending.rpartition(".")[2]'),
        "With mlp.c_proj alone, 4",
    ),
    (
        "add_adapters",
        _edit(_ADD, FITS, 'name.rpartition(".")[2] == ending'),
        "A name of two parts",
    ),
    (
        "add_adapters",
        _edit(_ADD, "bottleneck)\n            set", "bottleneck).to(module.weight.dtype)\n"
              "            set"),
        "In a bfloat16 model",
    ),
    ("not_affine", _edit(_AFFINE, " + f(torch.zeros_like(x))", ""), "How often does the bias"),
    ("not_affine", _edit(_AFFINE, "f(x + y) - f(x) - f(y) + f(torch.zeros_like(x))",
                         "f(x + y) - f(x)"), "without a bias does not come out as zero"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", ".abs().mean()"), "is the mean of"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", "[0].abs().max()"), "the first row alone"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", ".square().max()"), "is the square of"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", ".max()"), "its sign must not count"),
    ("not_affine", _edit(_AFFINE, "f(x + y) - f(x) - f(y) + f(torch.zeros_like(x))",
                         "f(2 * x) - 2 * f(x) + f(torch.zeros_like(x))"), "and not"),
    ("not_affine", "def not_affine(f, x, y):\n    return 0.0", "taken for affine"),
    ("merge", _edit(_MERGE, "W + U @ D @ W", "W"), "is the old one"),
    ("merge", _edit(_MERGE, "W + U @ D @ W", "U @ D @ W"), "lost the skip"),
    ("merge", _edit(_MERGE, "W + U @ D @ W", SIDE),
     "as if it saw the input"),
    ("merge", _edit(_MERGE, "W + U @ D @ W", "W + W @ U @ D"), "mat1 and mat2 shapes"),
    ("merge", _edit(_MERGE, B, "linear.bias"), "For a projection without bias"),
    ("merge", _edit(_MERGE, BIAS, "b"), "that of the projection alone"),
    ("merge", _edit(_MERGE, BIAS, "b + U @ D @ b + u"), "bias in the middle"),
    ("merge", _edit(_MERGE, BIAS, "b + U @ (D @ b + d)"), "The last bias"),
    ("merge", _edit(_MERGE, BIAS, "b + U @ d + u"), "goes through the adapter as well"),
    ("merge", _edit(_MERGE, BIAS, "U @ d + u"), "What became of"),
    (
        "merge",
        _edit(_MERGE, "nn.Linear(linear.in_features, linear.out_features)",
              "nn.Linear(linear.in_features, linear.out_features, bias=False)",
              f"        merged.bias.copy_({BIAS})\n", ""),
        "has no bias, but",
    ),
    ("merge", _edit(_MERGE, "W + U @ D @ W", "W + 2 * U @ D @ W"), "what projection and adapter"),
    (
        "merge",
        _edit(_MERGE, "merged = nn.Linear(linear.in_features, linear.out_features)",
              "merged = linear if linear.bias is not None else nn.Linear(5, 8)"),
        "changed the projection",
    ),
    ("merge", _edit(_MERGE, "    return merged", "        U.zero_()\n    return merged"),
     "changed the adapter"),
    ("merge", _edit(_MERGE, "return merged", "return nn.Sequential(linear, adapter)"),
     "Return a plain nn.Linear"),
    ("merge", _edit(_MERGE, REFUSE, "pass"), "with ReLU is merged"),
    (
        "merge",
        _edit(_MERGE, "not_affine(lambda z: adapter(linear(z)), x, y) > 1e-3",
              "adapter.activation is torch.relu and adapter.up.weight.any()"),
        "with GELU is merged",
    ),
    ("merge", _edit(_MERGE, "> 1e-3", "> 0"), "rounding alone"),
    (
        "merge",
        _edit(_MERGE, "not_affine(lambda z: adapter(linear(z)), x, y) > 1e-3",
              "not isinstance(adapter.activation, nn.Identity)"),
        "so all is affine",
    ),
    # The function as it was found, and then with one mistake after another mended.
    ("prepare", _FOUND, "The adapters are torch.float16"),
    ("prepare", _edit(_PREPARE, f"        {OWN}\n", "        block.own = own\n", LOOP,
                      "    own = Own(model.config.hidden_size, bottleneck)\n" + LOOP),
     "One adapter serves both"),
    ("prepare", _edit(_PREPARE, "return model, torch", "return torch"), "and an optimiser"),
    (
        "prepare",
        _edit(_PREPARE, "own = block.own =", "own =", TRAINED, "",
              LOOP, "    trained = []\n" + LOOP,
              "        block.mlp", "        trained += own.parameters()\n        block.mlp"),
        "no new parameters",
    ),
    (
        "prepare",
        _edit(_PREPARE, "        block.mlp",
              "        first = block.first = Own(model.config.hidden_size, bottleneck)\n"
              "        block.self_attn.o_proj.register_forward_hook("
              "lambda m, a, out, first=first: first(out))\n        block.mlp"),
        "two adapters in each block",
    ),
    ("prepare", _edit(_PREPARE, "hidden_size, bottleneck)", "hidden_size, bottleneck + 1)"),
     "should have 584 numbers"),
    ("prepare", _edit(_PREPARE, "    model.requires_grad_(False)\n", ""), "The base would be"),
    ("prepare", _edit(_PREPARE, "    model.requires_grad_(False)\n", "", TRAINED,
                      TRAINED + "    model.requires_grad_(False)\n"), "nothing at all"),
    ("prepare", _edit(_PREPARE, TRAINED, "", "    model.requires_grad_(False)\n",
                      "    trained = list(model.parameters())\n    model.requires_grad_(False)\n"),
     "The optimiser holds no adapter"),
    ("prepare", _edit(_PREPARE, "if p.requires_grad", "if p.requires_grad and p.dim() == 2"),
     "but not all"),
    ("prepare", _edit(_PREPARE, ", lr=lr", ""), "learning rate that was asked for"),
    ("prepare", _edit(_PREPARE, "return x + self.up", "return self.up"), "a bare skip"),
    ("prepare", _edit(_PREPARE, UP, "", UP_BIAS, ""), "start as noise"),
    ("prepare", _edit(_PREPARE, ", own=own", ""), "has no say"),
    ("prepare", _edit(_PREPARE, PLACE, "block.register"), "the sum of the feed-forward network"),
    ("prepare", _edit(_PREPARE, PLACE, "block.self_attn.o_proj.register"), "behind the attention"),
    ("prepare", _edit(_PREPARE, "torch.relu(", "torch.tanh("), "something else than it should"),
    ("prepare", _edit(_PREPARE, "self.down(x))", "self.down(x)).detach()"), "as it was"),
]  # fmt: skip
