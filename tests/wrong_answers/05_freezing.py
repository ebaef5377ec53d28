"""Wrong answers to exercise 05: (check, source of the answer, part of the message expected)."""

_ONLY = """
def train_only(model, *patterns):
    chosen = []
    for pattern in patterns:
        fitting = [m for name, m in model.named_modules() if fnmatchcase(name, pattern)]
        if not fitting:
            raise ValueError(pattern)
        chosen += fitting
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        parameter.grad = None
    for module in chosen:
        module.requires_grad_(True)
    return model
"""
_LAST = """
def train_last_blocks(model, k):
    number = model.config.num_hidden_layers
    if not 1 <= k <= number:
        raise ValueError(k)
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for block in list(stack)[-k:]:
        block.requires_grad_(True)
    return model
"""
_BIAS = """
def train_biases(model):
    biases = [p for name, p in model.named_parameters() if name.rpartition(".")[2] == "bias"]
    if not biases:
        raise ValueError("none")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in biases:
        parameter.requires_grad_(True)
    return model
"""
_COUNT = """
def count_by_part(model):
    counts, seen = {}, set()
    for name, child in model.named_children():
        new = [p for p in child.parameters() if id(p) not in seen]
        seen |= {id(p) for p in new}
        trainable = sum(p.numel() for p in new if p.requires_grad)
        counts[name] = (trainable, sum(p.numel() for p in new))
    return counts
"""
_OPTIMIZER = """
def make_optimizer(model, lr, weight_decay):
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("none")
    return torch.optim.AdamW(params, lr=lr, weight_decay=weight_decay)
"""


def _with(text, old, new):
    assert old in text, old
    return text.replace(old, new)


TEST = 'name.rpartition(".")[2] == "bias"'
STACK = "isinstance(m, nn.ModuleList) and len(m) == number"
RAISE = '    if not params:\n        raise ValueError("none")\n'

WRONG = [
    (
        "train_only",
        _with(_ONLY, "requires_grad_(False)", "requires_grad_(True)"),
        "nothing was frozen",
    ),
    (
        "train_only",
        _with(_ONLY, "model.named_modules()", "model.named_parameters()").replace(
            "raise ValueError(pattern)", "continue"
        ),
        "unfroze nothing",
    ),
    (
        "train_only",
        _with(_ONLY, "fnmatchcase(name, pattern)", 'pattern.strip("*") in name'),
        "not a piece of it",
    ),
    ("train_only", _with(_ONLY, "        parameter.grad = None\n", ""), "still carries"),
    (
        "train_only",
        _with(
            _ONLY,
            "    for parameter in model.parameters():\n        parameter.requires_grad_(False)\n",
            "    fresh = all(p.requires_grad for p in model.parameters())\n"
            "    for parameter in model.parameters():\n"
            "        parameter.requires_grad_(parameter.requires_grad and not fresh)\n",
        ),
        "only the first call",
    ),
    (
        "train_only",
        _with(
            _ONLY,
            "module.requires_grad_(True)",
            "for p in module.parameters(recurse=False):\n            p.requires_grad_(True)",
        ),
        "a module with modules inside",
    ),
    ("train_only", _with(_ONLY, "chosen += fitting", "chosen = fitting"), "With two patterns"),
    (
        "train_only",
        _with(_ONLY, "raise ValueError(pattern)", "continue"),
        "passed over",
    ),
    (
        "train_only",
        _with(
            _ONLY, "        if not fitting:\n            raise ValueError(pattern)\n", ""
        ).replace(
            "    for parameter in",
            "    if not chosen:\n        raise ValueError\n    for parameter in",
        ),
        "each pattern by itself",
    ),
    ("train_only", _with(_ONLY, "    return model\n", ""), "changed in place"),
    (
        "train_last_blocks",
        """
def train_last_blocks(model, k):
    model.requires_grad_(False)
    for p in list(model.parameters())[-k:]:
        p.requires_grad_(True)
    return model
""",
        "A block is a module, not a tensor",
    ),
    (
        "train_last_blocks",
        """
def train_last_blocks(model, k):
    model.requires_grad_(False)
    model.model.layers[-k:].requires_grad_(True)
    return model
""",
        "only some architectures use",
    ),
    ("train_last_blocks", _with(_LAST, "[-k:]", "[:k]"), "that is the first block"),
    ("train_last_blocks", _with(_LAST, "[-k:]", "[-k - 1 :]"), "first block of two is trainable"),
    ("train_last_blocks", _with(_LAST, "[-k:]", "[-1:]"), "with k=2 not both blocks"),
    (
        "train_last_blocks",
        _with(
            _LAST,
            "    return model",
            "    for name, m in model.named_modules():\n"
            "        if name.count('.') == 1 and ('norm' in name or 'ln_f' in name):\n"
            "            m.requires_grad_(True)\n"
            "    return model",
        ),
        "stands in no block",
    ),
    ("train_last_blocks", _with(_LAST, STACK, "isinstance(m, nn.ModuleList)"), "the wrong one"),
    (
        "train_last_blocks",
        _with(
            _LAST,
            f"next(m for m in model.modules() if {STACK})",
            f"[m for m in model.modules() if {STACK}][-1]",
        ),
        "A list inside of a block",
    ),
    ("train_last_blocks", _with(_LAST, "1 <= k <= number", "k >= 1"), "no last three"),
    ("train_last_blocks", _with(_LAST, "1 <= k <= number", "k <= number"), "blocks[-0:]"),
    (
        "train_biases",
        _with(_BIAS, TEST, '"bias" in name'),
        "a module called bias_net",
    ),
    (
        "train_biases",
        _with(_BIAS, TEST, '"bias" in name or "norm" in name'),
        "and it is no bias",
    ),
    (
        "train_biases",
        _with(
            _BIAS,
            f"[p for name, p in model.named_parameters() if {TEST}]",
            "[m.bias for m in model.modules() if type(m).__name__ in ('Linear', 'Conv1D') "
            "and m.bias is not None]",
        ),
        "Norms have biases too",
    ),
    (
        "train_biases",
        _with(
            _BIAS,
            f"[p for name, p in model.named_parameters() if {TEST}]",
            "[m.bias for m in model.modules() if isinstance(m, (nn.Linear, nn.LayerNorm)) "
            "and m.bias is not None]",
        ),
        "differs from model to model",
    ),
    (
        "train_biases",
        _with(_BIAS, '        raise ValueError("none")', "        return model"),
        "a run would train nothing",
    ),
    (
        "train_biases",
        _with(_BIAS, "    biases =", "    model.requires_grad_(False)\n    biases ="),
        "Look first",
    ),
    (
        "count_by_part",
        _with(_COUNT, "        seen |= {id(p) for p in new}\n", ""),
        "Which tensor has two names",
    ),
    (
        "count_by_part",
        _with(_COUNT, "sum(p.numel() for p in new))", "len(new))"),
        "the number of tensors",
    ),
    (
        "count_by_part",
        _with(
            _COUNT,
            "(trainable, sum(p.numel() for p in new))",
            "(sum(p.numel() for p in new), trainable)",
        ),
        "the wrong way round",
    ),
    (
        "count_by_part",
        _with(_COUNT, "model.named_children()", "reversed(list(model.named_children()))"),
        "one key for each child",
    ),
    (
        "count_by_part",
        _with(
            _COUNT,
            "sum(p.numel() for p in new))",
            "sum(p.numel() for p in new if not p.requires_grad))",
        ),
        "counts where it comes first",
    ),
    (
        "count_by_part",
        _with(
            _COUNT,
            "sum(p.numel() for p in new if p.requires_grad)",
            "sum(p.requires_grad for p in new)",
        ),
        "of them are trainable, not",
    ),
    (
        "make_optimizer",
        _with(_OPTIMIZER, " if p.requires_grad]", "]"),
        "which is frozen",
    ),
    ("make_optimizer", _with(_OPTIMIZER, "AdamW(", "Adam("), "Return a torch.optim.AdamW"),
    ("make_optimizer", _with(_OPTIMIZER, "lr=lr, ", ""), "The learning rate is"),
    ("make_optimizer", _with(_OPTIMIZER, ", weight_decay=weight_decay", ""), "The decay is"),
    (
        "make_optimizer",
        _with(_OPTIMIZER, "p.requires_grad]", "p.requires_grad and p.dim() > 1]"),
        "of the 9 trainable tensors",
    ),
    (
        "make_optimizer",
        _with(
            _OPTIMIZER,
            "for p in model.parameters()",
            "for _, p in model.named_parameters(remove_duplicate=False)",
        ),
        "A tied head is one tensor",
    ),
    (
        "make_optimizer",
        _with(_OPTIMIZER, RAISE, "").replace("AdamW(params", 'AdamW([{"params": params}]'),
        "do nothing for hours",
    ),
]
