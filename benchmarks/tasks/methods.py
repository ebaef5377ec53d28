"""The methods that the tasks compare: {name: (learning rates to begin with, how it is added)}.

The runner tries more rates while the best one stands at an end of those it has.

  METHODS  every method of the course, at several sizes
  DEPTH    the last k blocks
  LENGTH   prefixes of 1 to 128 virtual tokens
  STARTS   a prefix trained with its projection, or folded before the first step: the same start,
           and only the parametrization differs
  BASES    LoRA on the weights as loaded, in bfloat16 and in NF4 (QLoRA)
  prompt_starts  the starts of prompt tuning, for a text and the label words of a task

LoRA's alpha is 16 here and does not change with r (Hu et al. 2022, section 4.1; Kalajdzievski
2023): its scaling alpha/r is 16, 2 and 1/4 for r = 1, 8 and 64; rsLoRA's, alpha/sqrt(r), 2 for 64.
"""

import torch
from torch import nn

from minipeft import (
    add_adapters,
    add_lora,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    fold_prefix_tuning,
    lora_plus_groups,
)
from minipeft.freezing import only_biases, only_head, only_last_blocks, only_norms
from minipeft.memory.shapes import ALL_LINEAR
from minipeft.quantization import quantize_base


def biases(model):
    """BitFit on a model without biases: each linear layer of the blocks gets one, of zeros."""
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            zeros = module.weight.new_zeros(module.out_features)
            module.bias = nn.Parameter(zeros)  # (out,)
    return only_biases(model)


def folded(model):
    """The table that a projected prefix starts as, without the projection."""
    return fold_prefix_tuning(add_prefix_tuning(model, 10, True))


def lora(model):
    return add_lora(model, 8, 16, targets=ALL_LINEAR)


LOW, MIDDLE, HIGH = (1e-4, 3e-4, 1e-3), (3e-4, 1e-3, 3e-3), (1e-2, 3e-2, 1e-1)
METHODS = {
    "zero-shot": ((), lambda model: model),
    "prompt tuning, n=20": (HIGH, lambda m: add_prompt_tuning(m, 20)),
    "prompt tuning, n=100": ((3e-3, 1e-2, 3e-2), lambda m: add_prompt_tuning(m, 100)),
    "P-tuning, n=20": (MIDDLE, lambda m: add_p_tuning(m, 20, "mlp")),
    "prefix-tuning, n=10": (HIGH, lambda m: add_prefix_tuning(m, 10)),
    "prefix-tuning, n=100": ((3e-3, 1e-2, 3e-2), lambda m: add_prefix_tuning(m, 100)),
    "P-tuning v2, key-value, n=10": (HIGH, lambda m: add_p_tuning_v2(m, 10)),
    "P-tuning v2, hidden, n=10": ((3e-3, 1e-2, 3e-2), lambda m: add_p_tuning_v2(m, 10, "hidden")),
    "adapters, m=16": (MIDDLE, lambda m: add_adapters(m, 16)),
    "LoRA, q and v, r=8": ((1e-3, 3e-3, 1e-2), add_lora),
    "LoRA, all linear, r=1, alpha=16": (MIDDLE, lambda m: add_lora(m, 1, 16, targets=ALL_LINEAR)),
    "LoRA, all linear, r=8": (MIDDLE, lora),
    "LoRA, all linear, r=64, alpha=16": (
        MIDDLE, lambda m: add_lora(m, 64, 16, targets=ALL_LINEAR),
    ),
    "rsLoRA, all linear, r=64, alpha=16": (
        LOW, lambda m: add_lora(m, 64, 16, targets=ALL_LINEAR, scaling="rslora"),
    ),
    "LoRA+, all linear, r=8": (LOW, lora),
    "DoRA, all linear, r=8": (MIDDLE, lambda m: add_lora(m, 8, 16, targets=ALL_LINEAR, dora=True)),
    "biases (added)": ((1e-3, 3e-3, 1e-2), biases),
    "norms": ((1e-3, 3e-3, 1e-2), only_norms),
    "head": (MIDDLE, lambda m: only_head(m, untie=True)),
    "last block": ((1e-4, 3e-4, 1e-3), lambda m: only_last_blocks(m, 1)),
    "last 4 blocks": ((1e-4, 3e-4, 1e-3), lambda m: only_last_blocks(m, 4)),
    "last 16 blocks": ((3e-5, 1e-4, 3e-4), lambda m: only_last_blocks(m, 16)),
    "all blocks": ((3e-5, 1e-4, 3e-4), lambda m: only_last_blocks(m, 30)),
}  # fmt: skip
DEPTH = {
    f"last {k} blocks": (LOW if k < 16 else (3e-5, 1e-4, 3e-4),
                         lambda m, k=k: only_last_blocks(m, k))
    for k in (1, 2, 4, 8, 16, 30)
}  # fmt: skip
LENGTH = {
    f"prefix-tuning, n={n}": (HIGH, lambda m, n=n: add_prefix_tuning(m, n))
    for n in (1, 2, 4, 8, 16, 32, 64, 128)
}
STARTS = {
    "projection": (MIDDLE, lambda m: add_prefix_tuning(m, 10, True)),
    "its start as a table": (HIGH, folded),
}
BASES = {
    "float32": (MIDDLE, lora),
    "bfloat16": (MIDDLE, lambda m: lora(m.to(torch.bfloat16))),
    "NF4": (MIDDLE, lambda m: lora(quantize_base(m))),
}


def prompt_starts(text, words):
    """{start: as above} of 20 trained vectors (Lester et al. 2021, section 3.2).

    words: the label words of the task; they and the text are repeated or cut to 20 tokens.
    """
    starts = {"random": ("random",), "vocabulary": ("vocab",),
              "class labels": ("text", "".join(words)), "text": ("text", text)}  # fmt: skip
    return {
        f"start: {name}": (HIGH, lambda m, start=start: add_prompt_tuning(m, 20, *start))
        for name, start in starts.items()
    }


B_OVER_A = 16  # learning rate of B over that of A in LoRA+ (Hayou et al. 2024, section 5)


def groups_of(method, model, lr):
    """The parameter groups of a method, for `train`: those of LoRA+, and None for all others."""
    return lora_plus_groups(model, lr, B_OVER_A) if method.startswith("LoRA+") else None
