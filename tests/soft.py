"""What the tests of the methods with virtual tokens share: their models, batches, and HF peft's."""

import peft
import torch

from minipeft import (
    Collator,
    add_p_tuning,
    add_p_tuning_v2,
    add_prefix_tuning,
    add_prompt_tuning,
    load_base,
)

NAMES = ["tiny-llama", "tiny-gpt2", "tiny-bloom", "tiny-qwen2", "tiny-gpt_neox"]
PLACEHOLDER = 7  # a byte that no batch below contains, for templates
N = 3

METHODS = {
    "prompt": lambda model, n=N: add_prompt_tuning(model, n),
    "lstm": lambda model, n=N: add_p_tuning(model, n, "lstm", 8),
    "mlp": lambda model, n=N: add_p_tuning(model, n, "mlp", 8),
    "template": lambda model, n=N: add_p_tuning(model, n, "mlp", 8, PLACEHOLDER),
    "prefix": lambda model, n=N: add_prefix_tuning(model, n),
    "projected": lambda model, n=N: add_prefix_tuning(model, n, True, 8),
    "key_value": lambda model, n=N: add_p_tuning_v2(model, n),
    "hidden": lambda model, n=N: add_p_tuning_v2(model, n, "hidden"),
}
IN_PEFT = ["prompt", "lstm", "mlp", "prefix", "projected", "key_value"]


def tuned(name, method, dtype=torch.float64, seed=1, n=N):
    """A tiny model with virtual tokens that are large enough to matter."""
    model, _ = load_base(name, device="cpu", dtype=dtype)
    torch.manual_seed(seed)
    METHODS[method](model, n)
    with torch.no_grad():  # tiny models have embeddings of deviation 0.02, which change little
        for parameter in trainables(model).values():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def trainables(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def batch_of(seed, rows, seq, side="right", method="", n=N):
    """A padded batch with labels; each row has a length of its own, and placeholders if asked."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(rows):
        length = int(torch.randint(2, seq + 1, (1,), generator=generator))
        ids = torch.randint(10, 250, (length,), generator=generator).tolist()
        labels = [-100, *ids[1:]]
        if method == "template":  # one in front, the others after the first token
            ids = [PLACEHOLDER, ids[0], *[PLACEHOLDER] * (n - 1), *ids[1:]]
            labels = [-100] * (n + 1) + labels[1:]
        parts.append({"input_ids": ids, "labels": labels})
    return Collator(0, padding_side=side)(parts)


def as_peft(model, name, method, dtype=torch.float64, n=N):
    """The model of HF peft with the same virtual tokens, and [(our parameter, theirs)]."""
    base, _ = load_base(name, device="cpu", dtype=dtype)
    task = {"task_type": "CAUSAL_LM", "num_virtual_tokens": n}
    config = {
        "prompt": lambda: peft.PromptTuningConfig(**task),
        "lstm": lambda: peft.PromptEncoderConfig(
            **task, encoder_reparameterization_type="LSTM", encoder_hidden_size=8
        ),
        "mlp": lambda: peft.PromptEncoderConfig(**task, encoder_hidden_size=8),
        "prefix": lambda: peft.PrefixTuningConfig(**task),
        "projected": lambda: peft.PrefixTuningConfig(
            **task, prefix_projection=True, encoder_hidden_size=8
        ),
        "key_value": lambda: peft.PrefixTuningConfig(**task),
    }[method]()
    other = peft.get_peft_model(base, config).eval().to(dtype)
    theirs = other.prompt_encoder["default"]
    names = {"weight": "embedding.weight", "lstm.": "lstm_head.", "mlp.": "mlp_head."}
    if method == "projected":
        names["mlp."] = "transform."
    pairs = []
    for key, ours in trainables(model).items():
        key = key.removeprefix("virtual_tokens.")
        for old, new in names.items():
            key = new + key.removeprefix(old) if key.startswith(old) else key
        parameter = theirs.get_parameter(key)
        parameter.data = ours.detach().clone()
        pairs.append((ours, parameter))
    assert sum(p.requires_grad for p in other.parameters()) == len(pairs)
    return other, pairs


def close(a, b, relative=1e-6):
    return (a - b).norm() <= relative * b.norm()


def traces(model):
    """All that a technique could leave on a model: modules, parameters, hooks, attributes."""
    found = {}
    for name, module in model.named_modules():
        attributes = vars(module)
        found[name] = (
            type(module),
            module.training,
            set(attributes),
            {k: len(v) for k, v in attributes.items() if isinstance(v, dict)},
        )
    parameters = {
        name: (id(p), p.data_ptr(), p.dtype, p.requires_grad, p.grad is None, p.sum().item())
        for name, p in model.named_parameters()
    }
    return found, parameters
