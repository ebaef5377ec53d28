"""Bottleneck adapters as the library `adapters` (AdapterHub) computes them, on tiny random models.

Run it by `nox -s adapterhub`: the library needs an older transformers than minipeft, and so an
environment of its own. For each architecture it writes FOLDER/<name>.safetensors with

    input_ids, attention_mask         (rows, seq), padded on the right
    base.<parameter>                  the frozen model, in bfloat16; all weights are rounded to it
    <case>.weight.<adapter parameter> the adapters, in bfloat16, none of them zero
    <case>.logits                     (rows, seq, vocab), computed in float64, stored in float32
    <case>.grad.<adapter parameter>   of the mean cross-entropy, likewise

and cases.json, which says what each case is. Adapters are named as minipeft names them.
"""

import json
import platform
import sys
from pathlib import Path

import adapters
import torch
import transformers
from adapters import AdapterModelInterface, DoubleSeqBnConfig, SeqBnConfig
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM

BOTTLENECK, VOCAB = 2, 40  # the reduction factor of the library, 16, makes 2 of 32
GQA = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 32,
}  # fmt: skip
CONFIGS = {
    "llama": GQA | {"tie_word_embeddings": True},
    "qwen2": GQA | {"tie_word_embeddings": False},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "n_inner": 40,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0,
              "attention_dropout": 0.0},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "max_position_embeddings": 32},
}  # fmt: skip
# Where minipeft's adapters stand, within a block.
PLACES = {
    "llama": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "qwen2": ("model.layers", "self_attn.o_proj", "mlp.down_proj"),
    "gpt2": ("transformer.h", "attn.c_proj", "mlp.c_proj"),
    "bloom": ("transformer.h", "self_attention.dense", "mlp.dense_4h_to_h"),
    "gpt_neox": ("gpt_neox.layers", "attention.dense", "mlp.dense_4h_to_h"),
}
# The library has Llama, GPT-2 and Qwen2. Of the other two it has to be told what is where.
INTERFACES = {
    "bloom": AdapterModelInterface(
        adapter_methods=["bottleneck"], model_embeddings="word_embeddings", model_layers="h",
        layer_self_attn="self_attention", layer_cross_attn=None, attn_qkv_proj="query_key_value",
        attn_o_proj="dense", layer_intermediate_proj="mlp.dense_h_to_4h",
        layer_output_proj="mlp.dense_4h_to_h"),
    "gpt_neox": AdapterModelInterface(
        adapter_methods=["bottleneck"], model_embeddings="embed_in", model_layers="layers",
        layer_self_attn="attention", layer_cross_attn=None, attn_qkv_proj="query_key_value",
        attn_o_proj="dense", layer_intermediate_proj="mlp.dense_h_to_4h",
        layer_output_proj="mlp.dense_4h_to_h"),
}  # fmt: skip
# {case: (configuration of the library, its changes, minipeft's options or None)}
CASES = {
    "double_seq_bn": (DoubleSeqBnConfig, {}, {"placement": "houlsby", "activation": "silu"}),
    "seq_bn_changed": (
        SeqBnConfig,
        {"original_ln_before": False},
        {"placement": "pfeiffer", "activation": "relu"},
    ),
    "seq_bn": (SeqBnConfig, {}, None),  # its adapter reads the sum with the residual
}


def cases(name):
    return {case: CASES[case] for case in CASES if case != "seq_bn" or name == "llama"}


def rounded(model, generator, within, std):
    """Draw all parameters whose name holds `within`, in bfloat16, norms around 1. Returns them."""
    drawn = {}
    for name, parameter in sorted(model.named_parameters()):
        if within in name:
            is_norm = name.endswith("weight") and parameter.dim() == 1
            noise = torch.randn(parameter.shape, generator=generator) * std
            drawn[name] = (noise + float(is_norm)).bfloat16()
            parameter.data.copy_(drawn[name])
    return drawn


def run(name, case, seed):
    """Tensors of one case, of the base and of the inputs."""
    config_class, changes, _ = cases(name)[case]
    config = AutoConfig.for_model(name, vocab_size=VOCAB, **CONFIGS[name])
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double().eval()
    generator = torch.Generator().manual_seed(seed)  # the same base for each case
    base = rounded(model, generator, "", std=0.3)
    ids = torch.randint(1, VOCAB, (2, 6), generator=generator)  # (rows, seq)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    before = model(input_ids=ids, attention_mask=mask).logits.detach()
    adapters.init(model, interface=INTERFACES.get(name))
    model.add_adapter("a", config=config_class(**changes))
    model.train_adapter("a")
    model.double().eval()
    found = rounded(model, generator, ".adapters.a.", std=0.5)
    logits = model(input_ids=ids, attention_mask=mask).logits
    targets = torch.where(mask[:, 1:].bool(), ids[:, 1:], -100)
    cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten()).backward()
    blocks, attention, feed_forward = PLACES[name]
    tensors = {"input_ids": ids, "attention_mask": mask}
    tensors |= {f"base.{key}": weight for key, weight in base.items()}  # tied weights once
    tensors[f"{case}.logits"] = logits.detach().float()
    for key, weight in found.items():
        layer = key.split(f"{blocks}.")[1].split(".")[0]
        place = attention if "attention_adapters" in key else feed_forward
        part = "down" if "adapter_down" in key else "up"
        ours = f"{blocks}.{layer}.{place}.{part}.{key.rsplit('.', 1)[1]}"
        tensors[f"{case}.weight.{ours}"] = weight
        tensors[f"{case}.grad.{ours}"] = model.get_parameter(key).grad.float()
    change = ((logits - before).norm() / before.norm()).item()
    print(f"{name:9} {case:22} {len(found):2} tensors, logits change by {change:.2f} of their norm")
    assert change > 0.05, "these adapters do too little to compare anything"
    return tensors


def main(folder):
    folder.mkdir(parents=True, exist_ok=True)
    report = {
        "command": "nox -s adapterhub",
        "versions": {
            "adapters": adapters.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__.split("+")[0],
            "python": platform.python_version(),
        },
        "bottleneck": BOTTLENECK,
        "models": {},
    }
    for seed, name in enumerate(CONFIGS):
        tensors = {}
        for case in cases(name):
            tensors |= run(name, case, seed)
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, folder / f"{name}.safetensors")
        report["models"][name] = {
            "config": CONFIGS[name] | {"vocab_size": VOCAB},
            "built_in": name not in INTERFACES,
            "cases": {
                case: {"library": config.__name__, "changes": changes, "minipeft": ours}
                for case, (config, changes, ours) in cases(name).items()
            },
        }
    (folder / "cases.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
