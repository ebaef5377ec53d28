"""Wrong answers to exercise 10: (check, source of the answer, part of the message expected)."""

from edits import edited

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

_PLACES = """
def fits(name, ending):
    return name == ending or name.endswith("." + ending)

def places(model, names):
    found = [name for name, _ in model.named_modules() if any(fits(name, e) for e in names)]
    for ending in names:
        if not any(fits(name, ending) for name in found):
            raise ValueError(f"no {ending}.")
    return found
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

def add_adapters(model, bottleneck, names):
    found = places(model, names)
    for p in model.parameters():
        p.requires_grad_(False)
    for name in found:
        parent, _, last = name.rpartition(".")
        module = model.get_submodule(name)
        adapter = Adapter(model.config.hidden_size, bottleneck)
        adapter.to(module.weight.device)
        setattr(model.get_submodule(parent), last, Wrapped(module, adapter))
    return model
"""

_AFFINE = """
import torch

def not_affine(f, x, y):
    return (f(x + y) - f(x) - f(y) + f(torch.zeros_like(x))).abs().max().item()
"""

# By formula, where the solution probes the two with unit vectors.
_MERGE = """
import torch
from torch import nn

def merge(linear, adapter):
    x, y = torch.randn(2, 256, linear.in_features)
    if not_affine(lambda z: adapter(linear(z)), x, y) > 1e-4 * adapter(linear(x)).abs().max():
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
        return (x + self.up(torch.relu(self.down(x.float())))).to(x.dtype)

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


def _edit(source, *texts):
    return edited(source, *zip(texts[::2], texts[1::2], strict=True))


UP = "        nn.init.zeros_(self.up.weight)\n"
UP_BIAS = "        nn.init.zeros_(self.up.bias)\n"
FORWARD = "(x + self.up(z)).to(x.dtype)"
INNER = "self.activation(self.down(x.to(self.down.weight.dtype)))"
CHECKED = "    for ending in names:\n        if not any(fits(name, ending) for name in found):\n"
FITS = 'name == ending or name.endswith("." + ending)'
FOUND = "    found = places(model, names)\n"
ADAPTER = "adapter = Adapter(model.config.hidden_size, bottleneck)"
FREEZE = "    for p in model.parameters():\n        p.requires_grad_(False)\n"
FOR = "    for name in found:\n"
PUT = "setattr(model.get_submodule(parent), last, Wrapped(module, adapter))"
HOOK = "module.register_forward_hook(lambda m, a, out, adapter=adapter: adapter(out))"
RUN = "        return self.adapter(self.base(x))"
SIDES = "f(x + y) - f(x) - f(y) + f(torch.zeros_like(x))"
REFUSE = 'raise ValueError("no affine map")'
TOO_FAR = "not_affine(lambda z: adapter(linear(z)), x, y) > 1e-4 * adapter(linear(x)).abs().max()"
SIDE = "W + (W @ U @ D if len(W) == W.shape[1] else U @ D @ W)"
BIAS = "b + U @ (D @ b + d) + u"
B = "torch.zeros(len(W)) if linear.bias is None else linear.bias"
NEW = "nn.Linear(linear.in_features, linear.out_features)"
OWN = "own = block.own = Own(model.config.hidden_size, bottleneck)"
LOOP = "    for block in model.model.layers:\n"
TRAINED = "    trained = [p for p in model.parameters() if p.requires_grad]\n"
PLACE = "block.mlp.down_proj.register"
RELU = "torch.relu(self.down(x.float()))"

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
              "self.activation(self.up(z)) - self.activation(0 * x)"),
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
    ("adapter", _edit(_ADAPTER, INNER, INNER + ".detach()"), "No gradient arrives at down.weight"),
    ("adapter", _edit(_ADAPTER, "(x + self.up", "(x.detach() + self.up"), "is not complete"),
    ("adapter", _edit(_ADAPTER, "x.to(self.down.weight.dtype)", "x"),
     "On bfloat16 input the adapter fails"),
    ("adapter", _edit(_ADAPTER, ").to(x.dtype)", ")"), "Given bfloat16, the adapter returns"),
    ("adapter", _edit(_ADAPTER, "        z = self", "        self.to(x.dtype)\n        z = self"),
     "itself is no longer float32"),
    ("adapter", _edit(_ADAPTER, UP_BIAS, UP_BIAS + "        self.down.requires_grad_(False)\n"),
     "A part of the adapter is frozen"),
    # Zero in the first layer: the start of LoRA turned round.
    (
        "adapter",
        _edit(_ADAPTER, UP, UP.replace("up", "down") + UP_BIAS.replace("up", "down")),
        "the slope of a ReLU at zero",
    ),
    ("adapter", _edit(_ADAPTER, UP, UP + "        nn.init.constant_(self.down.weight, 0.01)\n"),
     "start alike"),
    (
        "adapter",
        _edit(_ADAPTER, UP, "        self.gate = nn.Parameter(torch.zeros(1))\n",
              "self.up(z)", "self.gate * self.up(z)"),
        "not in the formula: gate",
    ),
    (
        "adapter",
        _edit(_ADAPTER, "        z = self", "        if not self.up.weight.any():\n"
              "            return x\n        z = self"),
        "its weights took no part",
    ),
    (
        "adapter",
        _edit(_ADAPTER, "        z = ", "        D, U = self.down, self.up\n        z = ",
              INNER, "self.activation(x @ D.weight.T.to(x.dtype) + D.bias.to(x.dtype))",
              "self.up(z)", "z @ U.weight.T.to(x.dtype) + U.bias.to(x.dtype)"),
        "does not compute in float32",
    ),
    ("adapter", _edit(_ADAPTER, f"return {FORWARD}", "y = x + self.up(z)\n        return "
                      "y.bfloat16() if x.dtype == torch.bfloat16 else y"),
     "Given float16, the adapter returns"),
    ("adapter", _edit(_ADAPTER, "        z = ", "        batch, seq, hidden = x.shape\n"
                      "        z = "), "An input of shape (5,) fails"),
    (
        "adapter",
        _edit(_ADAPTER, "        self.activation = activation",
              "        self.both = nn.Sequential(self.down, activation, self.up)"),
        "is not a Module subclass",
    ),
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
    ("count", _edit(_COUNT, "* one", "* (one + 2 * hidden)"), "are not the numbers of parameters"),
    ("count", _edit(_COUNT, "config.hidden_size", 'config.to_dict()["hidden_size"]'),
     "On another architecture"),
    ("count", _edit(_COUNT, "config.hidden_size", "config.n_embd"), "a configuration of Llama"),
    ("count", _edit(_COUNT, "if placement not in places", "if not places"),
     "ends in a KeyError"),
    ("count", _edit(_COUNT, "places[placement]", "(2 if placement == 'houlsby' else 1)",
                    "if placement not in places", "if not places"),
     "placement 'everywhere' is counted"),
    ("count", _edit(_COUNT, "    places =", "    placement = placement.lower()\n    places ="),
     "placement 'Houlsby' is counted"),
    ("count", _edit(_COUNT, "not in places", "not in 'houlsby pfeiffer'", "places[placement]",
                    "(2 if placement in 'houlsby' else 1)"), "placement 'pfeif' is counted"),
    ("count", _edit(_COUNT, "* one", "* one / 1"), "counted in integers"),
    ("count", _edit(_COUNT, "config.hidden_size", "config.num_attention_heads * config.head_dim"),
     "The width of the heads together"),
    ("count", _edit(_COUNT, "hidden * bottleneck + hidden + bottleneck",
                    "hidden * 64 + hidden + 64"),
     "whatever is asked for"),
    ("count", _edit(_COUNT, "    one =", "    bottleneck = hidden // bottleneck\n    one ="),
     "by which the width shrinks"),
    ("count", _edit(_COUNT, "config.num_hidden_layers", "3"), "a model of GPT-2 comes out wrong"),
    ("count", _edit(_COUNT, '="houlsby"', '="pfeiffer"'), "Without a placement"),
    ("places", _edit(_PLACES, FITS, "name.endswith(ending)"), "lo_proj does not fit"),
    ("places", _edit(_PLACES, FITS, "ending in name"), "o_proj_old does not fit"),
    ("places", _edit(_PLACES, FITS, 'ending in name.split(".")'), "down_proj.lora does not fit"),
    ("places", _edit(_PLACES, FITS, 'name.split(".")[-1] == ending.split(".")[-1]'),
     "attn.c_proj does not fit"),
    ("places", _edit(_PLACES, FITS, 'name.split(".")[-1] == ending'), "an ending of two parts"),
    ("places", "import re\n" + _edit(_PLACES, FITS, "re.search(rf'(^|\\.){ending}$', name)"),
     "mlp_c_proj does not fit"),
    ("places", _edit(_PLACES, "name == ending or ", ""), "whole name is lm_head"),
    ("places", "from torch import nn\n" + _edit(
        _PLACES, "name, _ in model", "name, m in model", " if any(",
        " if isinstance(m, nn.Linear) and any("), "Which class are the projections of"),
    ("places", _edit(_PLACES, "name for name, _ in model.named_modules() if any(fits(name, e) for "
                     "e in names)", "n for e in names for n, _ in model.named_modules() if "
                     "fits(n, e)"), "is listed twice"),
    ("places", _edit(_PLACES, CHECKED + "    ", "    if not found:\n        ending = names\n"),
     "is passed over as long as another fits"),
    ("places", _edit(_PLACES, CHECKED, CHECKED.replace("in names", "in names[:1]")),
     "Only the first ending"),
    ("places", _edit(_PLACES, 'raise ValueError(f"no {ending}.")', "pass"), "nothing is said"),
    ("places", _edit(_PLACES, "return found", "return [model.get_submodule(n) for n in found]"),
     "there is a Linear among them"),
    ("places", _edit(_PLACES, "return found", "return found[:1]"),
     "layers.1.self_attn.o_proj is missing"),
    ("add_adapters", _edit(_ADD, "    return model\n", ""), "Return the model"),
    ("add_adapters", _edit(_ADD, "self.adapter(self.base(x))", "self.base(x)"), "No adapter runs"),
    ("add_adapters", _edit(_ADD, PUT, HOOK), "the model does not know them"),
    (
        "add_adapters",
        _edit(_ADD, f"        {ADAPTER}\n", "", FOR, f"    {ADAPTER}\n{FOR}"),
        "One adapter serves all four places",
    ),
    (
        "add_adapters",
        _edit(_ADD, f"        {ADAPTER}\n", "", FOR, f"    two = [Adapter("
              f"model.config.hidden_size, bottleneck) for _ in range(2)]\n{FOR}"
              "        adapter = two['mlp' in name]\n"),
        "some places share it",
    ),
    ("add_adapters", _edit(_ADD, FOR, "    for name in found[:3]:\n"),
     "3 adapters run in 2 blocks"),
    ("add_adapters", _edit(_ADD, PUT, "module.spare = Adapter(4, 4)\n        " + PUT),
     "they are not the 4 that run"),
    (
        "add_adapters",
        _edit(_ADD, "model.config.hidden_size", "module.in_features", PUT,
              "module.adapter = adapter\n        "
              "module.register_forward_pre_hook(lambda m, a: m.adapter(a[0]))"),
        "goes into its projection",
    ),
    (
        "add_adapters",
        _edit(_ADD, FOR,
              "    for layer in getattr(getattr(model, 'model', 0), 'layers', []):\n"
              "        for spot, last in ((layer.post_attention_layernorm, 0), (layer, 1)):\n"
              f"            spot.{ADAPTER}\n"
              "            if last:\n"
              "                spot.register_forward_hook(lambda m, a, out: m.adapter(out))\n"
              "            else:\n"
              "                spot.register_forward_pre_hook(lambda m, a: m.adapter(a[0]))\n"
              "    for name in []:\n"),
        "gets the sum with the residual",
    ),
    ("add_adapters", _edit(_ADD, RUN, "        x = self.base(x)\n"
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
        _edit(_ADD, RUN, "        x = self.base(x)\n        self.adapter(x)\n        return x"),
        "is thrown away",
    ),
    (
        "add_adapters",
        _edit(_ADD, RUN,
              "        x = self.base(x)\n        return x + 0.5 * (self.adapter(x) - x)"),
        "replaced by its adapter's",
    ),
    ("add_adapters", _edit(_ADD, "model.config.hidden_size", "getattr(module, 'in_features', 12)"),
     "The LlamaForCausalLM no longer runs"),
    ("add_adapters", _edit(_ADD, "model.config.hidden_size", "module.weight.shape[0]"),
     "The GPT2LMHeadModel no longer runs"),
    ("add_adapters", _edit(_ADD, "hidden_size, bottleneck", "hidden_size, bottleneck + 1"),
     "down has the shapes"),
    ("add_adapters", _edit(_ADD, "hidden_size, bottleneck", "hidden_size, 4"),
     "Asked for a bottleneck of 5"),
    ("add_adapters", _edit(_ADD, "hidden_size, bottleneck", "hidden_size, bottleneck, torch.tanh"),
     "another activation than a ReLU"),
    ("add_adapters", _edit(_ADD, "self.base(x))", "self.base(x).detach())"),
     "the gradient that reaches the adapters"),
    ("add_adapters", _edit(_ADD, "places(model, names)", "places(model, [names[0].split('.')[-1], *"
                           "names[1:]])"), "With mlp.c_proj alone, 6 adapters"),
    # A dictionary outside of the function outlives the call.
    (
        "add_adapters",
        "kept = {}\n" + _edit(_ADD, PUT, "module.adapter = kept[name] = adapter\n        "
                              "module.register_forward_hook(lambda m, a, out, name=name: "
                              "kept[name](out))"),
        "something outside the model keep them",
    ),
    ("add_adapters", _edit(_ADD, FOUND, "", FREEZE, FREEZE + FOUND), "is left frozen"),
    (
        "add_adapters",
        _edit(_ADD, FOUND, "    found = [n for e in names for n, _ in model.named_modules() if "
              "n.endswith('.' + e)]\n", "    return model",
              "    places(model, names) if type(model).__name__[0] == 'G' else 0\n    return model",
              "adapter.to(module.weight.device)", "adapter.to(module.weight.device)",
              "Wrapped(module, adapter))",
              "Wrapped(module, adapter))"),
        "comes too late",
    ),
    (
        "add_adapters",
        _edit(_ADD, FOUND, "    found = [n for n, _ in model.named_modules() if "
              "n.endswith(tuple('.' + e for e in names))]\n"),
        "and there is no ValueError",
    ),
    ("add_adapters", _edit(_ADD, "adapter.to(module.weight.device)", "adapter.to(module.weight)"),
     "In a bfloat16 model"),
    ("add_adapters", _edit(_ADD, FREEZE, FREEZE + "    model.float()\n"), "no longer bfloat16"),
    ("add_adapters", _edit(_ADD, "        adapter.to(module.weight.device)\n", ""),
     "On a GPU it would not run"),
    ("not_affine", _edit(_AFFINE, " + f(torch.zeros_like(x))", ""), "How often does the bias"),
    ("not_affine", _edit(_AFFINE, SIDES, "f(x + y) - f(x)"),
     "without a bias does not come out as zero"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", ".abs().mean()"), "is the mean of"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", "[0].abs().max()"), "the first row alone"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", ".square().max()"), "is the square of"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", ".max()"), "its sign must not count"),
    ("not_affine", _edit(_AFFINE, SIDES, "f(2 * x) - 2 * f(x) + f(torch.zeros_like(x))"),
     "and not"),
    ("not_affine", "def not_affine(f, x, y):\n    return 0.0", "taken for affine"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", ".abs().sum()"), "is the sum of"),
    ("not_affine", _edit(_AFFINE, ".abs().max()", ".norm()"), "is the norm of"),
    ("not_affine", _edit(_AFFINE, ".item()", ".item() / f(x + y).abs().max().item()"),
     "is divided by the size of f"),
    ("not_affine", _edit(_AFFINE, ".item()", ""), "is a Tensor, not a Python float"),
    ("not_affine", _edit(_AFFINE, "    return (f(x + y) - f(x) - f(y)",
                         "    apart = f(x) + f(y)\n    x += y\n    return (f(x) - apart"),
     "caller's x or y is changed"),
    ("not_affine", _edit(_AFFINE, "    return", "    x, y = torch.randn(2, 99, x.shape[1])\n"
                         "    return"), "Take the points that are given"),
    ("not_affine", _edit(_AFFINE, "torch.zeros_like(x)", "torch.zeros(6)"), "must match the size"),
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
    ("merge", _edit(_MERGE, BIAS, "U @ (D @ b + d) + u"), "The skip carries"),
    (
        "merge",
        _edit(_MERGE, NEW, NEW[:-1] + ", bias=False)", f"        merged.bias.copy_({BIAS})\n", ""),
        "has no bias, but",
    ),
    ("merge", _edit(_MERGE, "W + U @ D @ W", "W + 2 * U @ D @ W"), "what projection and adapter"),
    (
        "merge",
        _edit(_MERGE, f"merged = {NEW}",
              "merged = linear if linear.bias is not None else nn.Linear(5, 8)"),
        "changed the projection",
    ),
    ("merge", _edit(_MERGE, "    return merged", "        U.zero_()\n    return merged"),
     "changed the adapter"),
    ("merge", _edit(_MERGE, "return merged", "return nn.Sequential(linear, adapter)"),
     "Return a plain nn.Linear"),
    ("merge", _edit(_MERGE, TOO_FAR, "False and " + TOO_FAR), "With weights 1e-5 times"),
    (
        "merge",
        _edit(_MERGE, TOO_FAR, "adapter.activation is torch.relu and adapter.up.weight.any()"),
        "with GELU is merged",
    ),
    ("merge", _edit(_MERGE, TOO_FAR, "adapter.activation not in (torch.sin, nn.Identity) and "
                    + TOO_FAR), "with sine is merged"),
    ("merge", _edit(_MERGE, "> 1e-4", "> 0"), "rounding alone"),
    (
        "merge",
        _edit(_MERGE, TOO_FAR, "not isinstance(adapter.activation, nn.Identity)"),
        "so all is affine",
    ),
    ("merge", _edit(_MERGE, " * adapter(linear(x)).abs().max()", ""), "weights 10000 times"),
    ("merge", _edit(_MERGE, "adapter(linear(x)).abs().max()", "adapter(linear(x)).max()"),
     "outputs far below zero"),
    ("merge", _edit(_MERGE, "randn(2, 256, ", "randn(2, 1, "), "bends only beyond 5"),
    ("merge", _edit(_MERGE, "W + U @ D @ W", "adapter(linear(torch.eye(linear.in_features))).T"),
     "has the bias in it"),
    (
        "merge",
        _edit(_MERGE, NEW, "nn.Linear(linear.out_features, linear.in_features)",
              "merged.weight.copy_(W + U @ D @ W)", "merged.weight = nn.Parameter(W + U @ D @ W)",
              f"merged.bias.copy_({BIAS})", f"merged.bias = nn.Parameter({BIAS})"),
        "The merged layer goes from 8 to 5",
    ),
    # The function as it was found, and then with one mistake after another mended.
    ("prepare", _FOUND, "The adapters are torch.float16"),
    ("prepare", _edit(_PREPARE, f"        {OWN}\n", "        block.own = own\n", LOOP,
                      "    own = Own(model.config.hidden_size, bottleneck)\n" + LOOP),
     "One adapter serves all blocks"),
    ("prepare", _edit(_PREPARE, "return model, torch", "return torch"), "and an optimizer"),
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
     "2 blocks of width 32 should have"),
    ("prepare", _edit(_PREPARE, "model.config.hidden_size", "32"),
     "3 blocks of width 16 should have"),
    ("prepare", _edit(_PREPARE, "    model.requires_grad_(False)\n", ""), "The base would be"),
    ("prepare", _edit(_PREPARE, "    model.requires_grad_(False)\n", "", TRAINED,
                      TRAINED + "    model.requires_grad_(False)\n"), "nothing at all"),
    ("prepare", _edit(_PREPARE, TRAINED, "", "    model.requires_grad_(False)\n",
                      "    trained = list(model.parameters())\n    model.requires_grad_(False)\n"),
     "The optimizer holds no adapter"),
    ("prepare", _edit(_PREPARE, "if p.requires_grad", "if p.requires_grad and p.dim() == 2"),
     "but not all"),
    ("prepare", _edit(_PREPARE, "AdamW", "Adam"), "is Adam, not AdamW"),
    ("prepare", _edit(_PREPARE, ", lr=lr", ""), "learning rate that was asked for"),
    ("prepare", _edit(_PREPARE, "return (x + self.up", "return (self.up"), "a bare skip"),
    ("prepare", _edit(_PREPARE, UP, "", UP_BIAS, ""), "start as noise"),
    ("prepare", _edit(_PREPARE, ", own=own", ""), "has no say"),
    ("prepare", _edit(_PREPARE, PLACE, "block.register"), "the sum of the feed-forward network"),
    ("prepare", _edit(_PREPARE, PLACE, "block.self_attn.o_proj.register"), "after the attention"),
    ("prepare", _edit(_PREPARE, "torch.relu(", "torch.tanh("), "something else than it should"),
    ("prepare", _edit(_PREPARE, RELU, RELU + ".detach()"), "gradient of the adapters is not"),
    (
        "prepare",
        "kept = {}\n" + _edit(_PREPARE, "for block in model.model.layers",
                              "for i, block in enumerate(model.model.layers)",
                              OWN, OWN + "\n        kept[i] = own",
                              "own=own: own(output)", "i=i: kept[i](output)"),
        "Do the two share",
    ),
    ("prepare", _edit(_PREPARE, "x.float()", "x"), "A bfloat16 Llama does not run"),
    ("prepare", _edit(_PREPARE, "hidden_size, bottleneck)", "hidden_size, bottleneck)"
                      ".to(model.dtype)", "x.float()", "x"), "of a bfloat16 Llama are not float32"),
    ("prepare", _edit(_PREPARE, "model.requires_grad_", "model.float().requires_grad_"),
     "The base of a bfloat16 Llama"),
    # Decay and step alike leave a frozen copy alone.
    ("prepare", _edit(_PREPARE, "    return model, torch.optim.AdamW(trained, lr=lr)",
                      "    optimizer = torch.optim.AdamW(trained, lr=lr)\n"
                      "    optimizer.step = lambda: None\n    return model, optimizer"),
     "as it was"),
    ("places", _edit(_PLACES, "    return found", "    return set(found)"), "Return a list"),
]  # fmt: skip
