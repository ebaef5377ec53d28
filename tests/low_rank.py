"""What the tests of LoRA and its variants share: tiny models, and the same models of HF peft."""

import peft
import pytest
import torch
from torch import nn

from minipeft import Collator, add_lora, load_base, merge_lora, unmerge_lora
from minipeft.lora import LoRALinear, matrix

LAYERS = {
    "tiny-llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj"],
    "tiny-gpt2": ["c_attn", "c_proj", "c_fc", "0.attn.c_attn"],
    "tiny-bloom": ["query_key_value", "dense", "dense_h_to_4h"],
    "tiny-qwen2": ["q_proj", "v_proj", "up_proj", "1.mlp.down_proj"],
    "tiny-gpt_neox": ["query_key_value", "dense", "dense_4h_to_h"],
}
TABLES = {  # input embedding and head
    "tiny-llama": ["embed_tokens", "lm_head"],
    "tiny-gpt2": ["wte", "lm_head"],
    "tiny-bloom": ["word_embeddings", "lm_head"],
    "tiny-qwen2": ["embed_tokens", "lm_head"],
    "tiny-gpt_neox": ["embed_in", "lm_head"],
}
EVERY = pytest.mark.parametrize("name", LAYERS)


def layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, LoRALinear)}


def base(name, dtype=torch.float64, untied=False):
    """A tiny model with biases that are not zero, and a head of its own if it is to be untied."""
    model, tokenizer = load_base(name, device="cpu", dtype=dtype)
    for key, p in model.named_parameters():
        if key.endswith("bias"):
            p.data += 0.1 * torch.arange(len(p)).sin().to(dtype)
    if untied:
        head = model.get_output_embeddings()
        head.weight = nn.Parameter(head.weight.detach() * 0.9)
        model.config.tie_word_embeddings = False
    return model, tokenizer


def tuned(name, dtype=torch.float64, untied=False, **options):
    """A tiny model with LoRA that changes something, as if it had been trained."""
    model, tokenizer = base(name, dtype, untied)
    torch.manual_seed(1)
    add_lora(model, **{"r": 4, "targets": LAYERS[name][:2]} | options)
    for layer in layers(model).values():
        table = isinstance(layer.base, nn.Embedding)
        nn.init.normal_(layer.lora_A if table else layer.lora_B, std=0.1)
        if layer.lora_magnitude is not None:
            layer.lora_magnitude.data *= torch.rand_like(layer.lora_magnitude) + 0.5
    return model, tokenizer


def as_peft(
    model, name, dtype=torch.float64, alpha=16, dropout=0.0, r=4, targets=None, scaling="",
    dora=False, untied=False,
):  # fmt: skip
    """The model of HF peft with the same configuration, and the same trainables."""
    config = peft.LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets or LAYERS[name][:2],
        use_rslora=scaling == "rslora",
        use_dora=dora,
        fan_in_fan_out=name == "tiny-gpt2",
        task_type="CAUSAL_LM",
    )
    other = peft.get_peft_model(base(name, dtype, untied)[0], config, autocast_adapter_dtype=False)
    other.eval()
    pairs = {}
    for key, layer in layers(model).items():
        theirs = other.get_submodule(f"base_model.model.{key}")
        for own, mine in layer.named_parameters(recurse=False):
            if own == "lora_magnitude":
                weight = theirs.lora_magnitude_vector["default"].weight
            elif isinstance(layer.base, nn.Embedding):
                weight = getattr(theirs, own.replace("lora_", "lora_embedding_"))["default"]
            else:
                weight = getattr(theirs, own)["default"].weight
            assert weight.shape == mine.shape
            weight.data = mine.detach().clone()
            pairs[f"{key}.{own}"] = (mine, weight)
    count = sum(p.requires_grad for p in other.parameters())
    assert count == len(pairs), "both libraries change the same layers"
    return other, pairs


def batch_of(seed, rows, seq, side="right"):
    """A padded batch with labels; each row has a length of its own."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for _ in range(rows):
        n = int(torch.randint(2, seq + 1, (1,), generator=generator))
        ids = torch.randint(3, 250, (n,), generator=generator).tolist()
        parts.append({"input_ids": ids, "labels": [-100, *ids[1:]]})
    return Collator(0, padding_side=side)(parts)


def close(a, b, relative=1e-6):
    return (a - b).norm() <= relative * b.norm()


def merge_and_back(name, dora=False, **options):
    model, _ = tuned(name, dora=dora, **options)
    batch = batch_of(1, 2, 6)
    apart = model(**batch).logits
    weights = [layer.base.weight.clone() for layer in layers(model).values()]
    assert merge_lora(model) is model
    assert not any(p.requires_grad for p in model.parameters())
    assert close(model(**batch).logits, apart, 1e-6)
    for layer, weight in zip(layers(model).values(), weights, strict=True):
        change = layer.scaling * layer.lora_B @ layer.lora_A
        if dora:  # each row is as long as the magnitude says
            assert close(matrix(layer.base).norm(dim=1), layer.lora_magnitude.abs(), 1e-12)
            continue
        change = change if isinstance(layer.base, nn.Linear) else change.T
        assert close(layer.base.weight - weight, change, 1e-12)
    unmerge_lora(model)
    for layer, weight in zip(layers(model).values(), weights, strict=True):
        assert close(layer.base.weight, weight, 1e-14)
    assert close(model(**batch).logits, apart, 1e-6)
    plain, _ = base(name, untied=options.get("untied", False))
    assert not close(plain(**batch).logits, apart, 1e-3), "LoRA must have done something"
