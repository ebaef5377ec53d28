"""Configurations, steps that an H100 has measured, and how near a prediction must come."""

import csv
from pathlib import Path

import pytest
import torch
from transformers import BloomConfig, GPT2Config, LlamaConfig, Qwen2Config

from minipeft import add_adapters, add_lora, add_prefix_tuning
from minipeft.memory import PARTS

SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, vocab_size=49152, tie_word_embeddings=True,
)  # fmt: skip
QWEN = Qwen2Config(
    hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
    num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip
BLOOM = BloomConfig(hidden_size=1024, n_layer=24, n_head=16, vocab_size=250880)
BLOOM_ZH = BloomConfig(hidden_size=2048, n_layer=24, n_head=16, vocab_size=46145)
LLAMA_1B = LlamaConfig(
    hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
    num_key_value_heads=8, head_dim=64, vocab_size=128256, tie_word_embeddings=True,
)  # fmt: skip
WITHOUT_DROPOUT = GPT2Config(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)


def assert_close(predicted, measured, margin=0.02):
    """The total and each part; a part under 0.1 % of the total may be off by as much as that."""
    for name in PARTS:
        if measured.parts[name] is not None:
            slack = max(margin * measured.parts[name], 0.001 * measured.total)
            assert abs(predicted.parts[name] - measured.parts[name]) <= slack, (
                name,
                predicted.parts,
                measured.parts,
            )
    assert predicted.total == pytest.approx(measured.total, rel=margin), str(predicted)
    assert sum(predicted.at_peak.values()) == predicted.total


def of_the_h100():
    path = Path(__file__).parents[1] / "fixtures" / "h100-memory.csv"
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def asked_of_the_h100(row):
    """(configuration, method, options) of a row that was measured on an H100."""
    config = {
        "smollm2": SMOLLM2, "qwen2.5-0.5b": QWEN, "gpt2": WITHOUT_DROPOUT, "bloom-1b4-zh": BLOOM_ZH,
        "llama-3.2-1b": LLAMA_1B, "llama-2-7b": LlamaConfig(),
    }  # fmt: skip
    targets = {"gpt2": "c_attn", "bloom-1b4-zh": "query_key_value"}
    targets = targets.get(row["model"], ("q_proj", "v_proj"))
    method = {
        "full": None,
        "lora": lambda model: add_lora(model, targets=targets),
        "adapters": add_adapters,
        "prefix": add_prefix_tuning,
    }[row["method"]]
    options = {name: row[name] for name in ("precision", "attention", "optimizer")}
    options |= {"batch": int(row["batch"]), "seq": int(row["seq"]), "device": "cuda"}
    options |= {"checkpointing": row["checkpointing"] == "True"}
    return config[row["model"]], method, options | {"dtype": getattr(torch, row["dtype"])}
