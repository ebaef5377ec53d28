"""Why a low rank is enough: random subspaces, ranks, targets, variants, and the full update.

SmolLM2 learns the film reviews: 48 steps of 8 reviews out of 1,000, judged by the loss on 64
validation reviews and by its answers to the first 300 test reviews. Kinds of runs:

  full      every parameter
  subspace  the weights of all linear layers of the blocks move together along d random directions
            (Aghajanyan et al. 2020, section 3): W = W0 + P theta, theta: (d,). Row i of P has one
            entry, a random sign in a random column, so that P is never a matrix of D x d numbers:
            the columns of P are orthogonal, and D gathered numbers are all it costs.
  rank      LoRA on queries and values, alpha = 2 r
  targets   LoRA with r = 8 elsewhere
  variant   DoRA, rsLoRA, LoRA+ with two ratios, with r = 8 on queries and values

`spectrum` in the details: the singular values of the change of one weight (the query projection of
block 15), as shares of the root of the sum of their squares.
"""

import torch
from torch import nn
from torch.nn.utils import parametrize

from minipeft import add_lora, freeze, load_reviews, lora_plus_groups, merge_lora
from minipeft.memory.shapes import ALL_LINEAR
from tasks.training import Setting, fit, fresh, label_words, loss_on

PROBE = "model.layers.15.self_attn.q_proj"
STEPS, EXAMPLES = 48, 1000


class Subspace(nn.Module):
    """W0 -> W0 + P theta for one weight. theta: (d,), shared by all of them."""

    def __init__(self, theta, index):
        super().__init__()
        self.theta, self.index = theta, index  # (d,), int32 (out * in,)

    def forward(self, weight):
        both = torch.cat([self.theta, -self.theta])  # (2 d,): a column and its sign in one index
        return weight + both.index_select(0, self.index).view_as(weight)


def add_subspace(model, d, seed):
    """Freeze the model; let the linear layers of its blocks move along d random directions."""
    freeze(model)
    theta = nn.Parameter(torch.zeros(d, device=model.device))
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] in ALL_LINEAR:
            index = torch.randint(
                2 * d, (module.weight.numel(),), generator=generator, dtype=torch.int32
            )
            change = Subspace(theta, index.to(model.device))
            parametrize.register_parametrization(module, "weight", change)
    return model


def lora(**options):
    return lambda model, seed: add_lora(model, **options)


RATES = (1e-3, 2e-3, 4e-3)
# {method: (rates, ratio of LoRA+ or None, what makes the model ready)}
METHODS = {
    "full": ((1e-5, 2e-5, 5e-5), None, lambda model, seed: model),
    **{
        f"subspace d={d}": ((3e-4, 1e-3, 3e-3), None, lambda m, s, d=d: add_subspace(m, d, s))
        for d in (10, 100, 1000, 10_000, 100_000)
    },
    **{f"rank r={r}": (RATES, None, lora(r=r, alpha=2 * r)) for r in (1, 2, 8, 32)},
    "rank r=128": ((2.5e-4, 5e-4, 1e-3), None, lora(r=128, alpha=256)),
    "targets q_proj": (RATES, None, lora(targets="q_proj")),
    "targets v_proj": (RATES, None, lora(targets="v_proj")),
    "targets all seven": ((5e-4, 1e-3, 2e-3), None, lora(targets=ALL_LINEAR)),
    "targets embed_tokens": (RATES, None, lora(targets="embed_tokens")),
    "variant dora": (RATES, None, lora(dora=True)),
    "variant rslora": ((3.5e-4, 7e-4, 2e-3), None, lora(scaling="rslora")),
    "variant lora+ 4": ((5e-4, 1e-3, 2e-3), 4, lora()),
    "variant lora+ 16": ((2.5e-4, 5e-4, 1e-3), 16, lora()),
}
SETTINGS = [Setting(method, rates, STEPS, EXAMPLES) for method, (rates, *_) in METHODS.items()]


def run(method, lr, seed, steps, examples):
    """Train and judge once. Returns {column: value}."""
    _, ratio, add = METHODS[method]
    before = []  # the probe as it was

    def ready(model):
        before.append(model.get_submodule(PROBE).weight.detach().clone())  # (out, in)
        return add(model, seed)

    model, tokenizer = fresh(ready, seed)
    rows = load_reviews()
    row = fit(model, tokenizer, rows["train"].select(range(examples)), lr=lr, seed=seed,
              steps=steps, warmup=min(5, steps - 1), every=1,
              groups=lora_plus_groups(model, lr, ratio) if ratio else None)  # fmt: skip
    row |= {"valid_loss": loss_on(model, tokenizer, rows["validation"].select(range(64)))}
    row |= label_words(model, tokenizer, rows["test"].select(range(300)))
    if hasattr(model, "lora_config") and method != "targets embed_tokens":
        merge_lora(model)  # the tied table cannot be merged, and is not the probe
    probe = model.get_submodule(PROBE)
    change = getattr(probe, "base", probe).weight.detach() - before[0]
    values = torch.linalg.svdvals(change.double())
    values = values / values.norm().clamp(min=1e-30)
    row["details"] = {
        "change_norm": round(change.norm().item(), 4),
        "spectrum": [float(f"{value:.2e}") for value in values],
    }
    return row
