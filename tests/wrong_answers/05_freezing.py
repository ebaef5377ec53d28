"""Wrong answers to exercise 05: (check, source of the answer, part of the message expected)."""

from edits import edited

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
        parameter.grad = None
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
        parameter.grad = None
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
    return edited(text, (old, new))


TEST = 'name.rpartition(".")[2] == "bias"'
STACK = "isinstance(m, nn.ModuleList) and len(m) == number"
RAISE = '    if not params:\n        raise ValueError("none")\n'

COPY = "    model = __import__('copy').deepcopy(model)\n"

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
            "    if patterns and not chosen:\n        raise ValueError\n    for parameter in",
        ),
        "each pattern by itself",
    ),
    ("train_only", _with(_ONLY, "    return model\n", ""), "changed in place"),
    (
        "train_last_blocks",
        """
def train_last_blocks(model, k):
    for p in model.parameters():
        p.requires_grad, p.grad = False, None
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
    model.requires_grad_(False).zero_grad()
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
        "a module called relative_attention_bias",
    ),
    (
        "train_biases",
        _with(_BIAS, TEST, '"bias" in name or "norm" in name'),
        "and it is not a bias",
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
        "comes too late",
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
        "leaves the trainable parameters out",
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
    # Task 1
    (
        "train_only",
        _with(_ONLY, "module.requires_grad_(True)", "module.requires_grad = True"),
        "got a new attribute",
    ),
    ("train_only", _with(_ONLY, "return model", "return model.eval()"), "Freezing is not a mode"),
    (
        "train_only",
        _with(_ONLY, "parameter.grad = None", "parameter.grad.zero_()"),
        "That is not the same as none",
    ),
    ("train_only", _with(_ONLY, "    chosen = []\n", COPY + "    chosen = []\n"), "A copy"),
    (
        "train_only",
        _with(
            _ONLY,
            "fnmatchcase(name, pattern)",
            "__import__('re').fullmatch(pattern.replace('*', '.*'), name)",
        ),
        "the dot of a pattern is a dot",
    ),
    (
        "train_only",
        _with(
            _ONLY,
            "fnmatchcase(name, pattern)",
            "name.count('.') == pattern.count('.') and fnmatchcase(name, pattern)",
        ),
        "dots included",
    ),
    (
        "train_only",
        _with(
            _ONLY,
            "fnmatchcase(name, pattern)",
            "name.startswith(pattern.rstrip('*')) or fnmatchcase(name, pattern)",
        ),
        "whose name only begins so",
    ),
    (
        "train_only",
        _with(
            _ONLY,
            "fnmatchcase(name, pattern)",
            "(name.endswith(pattern[1:]) if pattern[:1] == '*' else name == pattern)",
        ),
        "may stand anywhere",
    ),
    (
        "train_only",
        """
def train_only(model, *patterns):
    keep = set()
    for pattern in patterns:
        fitting = [n for n, m in model.named_modules() if fnmatchcase(n, pattern)]
        if not fitting:
            raise ValueError(pattern)
        keep |= {id(p) for n in fitting for p in model.get_submodule(n).parameters()}
    for p in model.parameters():
        if id(p) not in keep:
            p.requires_grad, p.grad = False, None
    return model
""",
        "had frozen stays frozen",
    ),
    (
        "train_only",
        """
def train_only(model, *patterns):
    names = [n for n, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(n, pattern + ".*") for n in names):
            raise ValueError(pattern)
    for n, p in model.named_parameters():
        p.requires_grad = any(fnmatchcase(n, pattern + ".*") for pattern in patterns)
        p.grad = None
    return model
""",
        "does not reach a tied head",
    ),
    (
        "train_only",
        """
def train_only(model, *patterns):
    for p in model.parameters():
        p.requires_grad, p.grad = False, None
    for pattern in patterns:
        found = False
        for name, module in model.named_modules():
            if fnmatchcase(name, pattern):
                module.requires_grad_(True)
                found = True
        if not found:
            raise ValueError(pattern)
    return model
""",
        "comes too late",
    ),
    (
        "train_only",
        _with(
            _ONLY,
            "    for parameter in",
            "    if not chosen:\n        raise ValueError('nothing')\n    for parameter in",
        ),
        "Without any pattern",
    ),
    # Task 2
    (
        "train_last_blocks",
        _with(_LAST, "        parameter.grad = None\n", ""),
        "still carries",
    ),
    (
        "train_last_blocks",
        _with(_LAST, "parameter.requires_grad_(False)", "pass"),
        "the rest was not frozen",
    ),
    (
        "train_last_blocks",
        """
def train_last_blocks(model, k):
    number = model.config.num_hidden_layers
    if not 1 <= k <= number:
        raise ValueError(k)
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    keep = {id(p) for block in list(stack)[-k:] for p in block.parameters()}
    for p in model.parameters():
        if id(p) not in keep:
            p.requires_grad, p.grad = False, None
    return model
""",
        "only freezes cannot undo",
    ),
    (
        "train_last_blocks",
        _with(_LAST, "list(stack)[-k:]", "list(stack)[2 - k :]"),
        "Of 5 blocks, numbered",
    ),
    (
        "train_last_blocks",
        """
def train_last_blocks(model, k):
    number = model.config.num_hidden_layers
    if not 1 <= k <= number:
        raise ValueError(k)
    for name, p in model.named_parameters():
        numbers = [part for part in name.split(".") if part.isdigit()]
        p.requires_grad = bool(numbers) and numbers[0] >= str(number - k)
        p.grad = None
    return model
""",
        "Of 11 blocks, numbered",
    ),
    (
        "train_last_blocks",
        _with(_LAST, "not 1 <= k <= number", "not 1 <= k <= 2"),
        "is refused on a model of 5 blocks",
    ),
    (
        "train_last_blocks",
        """
def train_last_blocks(model, k):
    number = model.config.num_hidden_layers
    for p in model.parameters():
        p.requires_grad_(False)
        p.grad = None
    if not 1 <= k <= number:
        raise ValueError(k)
    stack = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    for block in list(stack)[-k:]:
        block.requires_grad_(True)
    return model
""",
        "comes too late",
    ),
    (
        "train_last_blocks",
        _with(_LAST, "1 <= k <= number", "(k <= number and k)"),
        "all blocks but the first",
    ),
    (
        "train_last_blocks",
        _with(_LAST, "block.requires_grad_(True)", "block.requires_grad = True"),
        "got a new attribute",
    ),
    # Task 3
    (
        "train_biases",
        _with(_BIAS, TEST, "p.dim() == 1"),
        "every vector is trainable",
    ),
    ("train_biases", _with(_BIAS, TEST, 'name.endswith("bias")'), "called position_bias"),
    ("train_biases", _with(_BIAS, TEST, 'name.endswith(".bias")'), "whose name has no dot"),
    (
        "train_biases",
        """
def train_biases(model):
    found = False
    for name, p in model.named_parameters():
        if name.split(".")[-1] == "bias":
            found = True
        elif found:
            p.requires_grad, p.grad = False, None
    if not found:
        raise ValueError("none")
    for name, p in model.named_parameters():
        if name.split(".")[-1] != "bias":
            p.requires_grad, p.grad = False, None
    return model
""",
        "the biases stay frozen",
    ),
    (
        "train_biases",
        _with(_BIAS, "parameter.requires_grad_(False)", "pass"),
        "nothing was frozen",
    ),
    ("train_biases", _with(_BIAS, "        parameter.grad = None\n", ""), "still carries"),
    (
        "train_biases",
        _with(_BIAS, "if not biases:", "if hasattr(model, 'config') and not biases:"),
        "plain nn.Linear",
    ),
    # Task 4
    (
        "count_by_part",
        """
def count_by_part(model):
    counts = {}
    for name, p in model.named_parameters():
        part = name.partition(".")[0]
        on, total = counts.get(part, (0, 0))
        counts[part] = on + p.numel() * p.requires_grad, total + p.numel()
    return counts
""",
        "lm_head is missing",
    ),
    (
        "count_by_part",
        _with(_COUNT, "model):", "model, seen=set()):").replace(
            "counts, seen = {}, set()", "counts = {}"
        ),
        "kept between calls",
    ),
    (
        "count_by_part",
        _with(_COUNT, "child.parameters()", "child.parameters(recurse=False)"),
        "but modules that do",
    ),
    (
        "count_by_part",
        """
def count_by_part(model):
    counts, seen = {}, []
    for name, child in model.named_children():
        new = []
        for p in child.parameters():
            if not any(p.shape == q.shape and torch.equal(p, q) for q in seen):
                new.append(p)
                seen.append(p)
        on = sum(p.numel() for p in new if p.requires_grad)
        counts[name] = (on, sum(p.numel() for p in new))
    return counts
""",
        "even the same values",
    ),
    (
        "count_by_part",
        """
def count_by_part(model):
    counts, seen = {}, set()
    for name, child in reversed(list(model.named_children())):
        new = [p for p in child.parameters() if id(p) not in seen]
        seen |= {id(p) for p in new}
        counts[name] = (sum(p.numel() for p in new if p.requires_grad),
                        sum(p.numel() for p in new))
    return dict(reversed(counts.items()))
""",
        "the embedding is missing",
    ),
    (
        "count_by_part",
        """
def count_by_part(model):
    counts = {}
    for name, child in model.named_children():
        if name == "lm_head" and model.config.tie_word_embeddings:
            counts[name] = (0, 0)
        else:
            on = sum(p.numel() for p in child.parameters() if p.requires_grad)
            counts[name] = (on, sum(p.numel() for p in child.parameters()))
    return counts
""",
        "without a configuration",
    ),
    (
        "count_by_part",
        _COUNT.replace("id(p)", "p.data_ptr()"),
        "have the address 0",
    ),
    # Task 5
    (
        "make_optimizer",
        _with(_OPTIMIZER, "lr=lr, weight_decay=weight_decay", "lr=1e-2, weight_decay=0.1"),
        "do not follow what is passed",
    ),
    (
        "make_optimizer",
        _with(_OPTIMIZER, "weight_decay=weight_decay", "weight_decay=weight_decay or 0.01"),
        "No decay was asked for",
    ),
    (
        "make_optimizer",
        _with(_OPTIMIZER, "if p.requires_grad]", "if p.grad is not None]")
        .replace("AdamW(params", 'AdamW([{"params": params}]')
        .replace(RAISE, ""),
        "Before the first backward pass",
    ),
    (
        "make_optimizer",
        _with(
            _OPTIMIZER,
            "AdamW(params, lr=lr, weight_decay=weight_decay)",
            "AdamW([{'params': [p for p in params if p.dim() > 1]}, {'params': [p for p in params "
            "if p.dim() < 2], 'weight_decay': 0.0}], lr=lr, weight_decay=weight_decay)",
        ),
        "There are groups with the decays",
    ),
    (
        "make_optimizer",
        _with(_OPTIMIZER, "[p for p in", "[nn.Parameter(p.detach().clone()) for p in"),
        "The optimizer holds copies",
    ),
    (
        "make_optimizer",
        _with(
            _OPTIMIZER,
            "model.parameters() if p.requires_grad",
            "model.requires_grad_().parameters()",
        ),
        "changed what is trainable",
    ),
    (
        "make_optimizer",
        _with(
            _OPTIMIZER, "model.parameters() if", "list(model.modules())[-1].parameters() if"
        ).replace(
            "list(model.modules())[-1]",
            "(model.model.layers[1] if hasattr(model, 'model') else model[-1] "
            "if hasattr(model, 'append') else model)",
        ),
        "The first and the last of three layers",
    ),
]
