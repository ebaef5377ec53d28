"""Shapes of models that are often named, as configurations for `estimate`."""

from transformers import LlamaConfig, PretrainedConfig

from minipeft.refusals import require, shown

# The linear layers of a block, as these models name them.
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_LINEAR = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


def shape_of(name: str) -> PretrainedConfig:
    """The configuration of "SmolLM2 135M", "TinyLlama 1.1B", "Llama 2 7B", "Llama 2 13B",
    "Llama 3 8B" or "Llama 2 70B".

    Sizes are those of the models' published configurations. Raises ValueError for another name.
    """
    known = {
        "SmolLM2 135M": (576, 30, 9, 3, 1536, 49152, True),
        "TinyLlama 1.1B": (2048, 22, 32, 4, 5632, 32000, False),
        "Llama 2 7B": (4096, 32, 32, 32, 11008, 32000, False),
        "Llama 2 13B": (5120, 40, 40, 40, 13824, 32000, False),
        "Llama 3 8B": (4096, 32, 32, 8, 14336, 128256, False),
        "Llama 2 70B": (8192, 80, 64, 8, 28672, 32000, False),
    }
    require(name in known, f"The shape of {shown(name)} is not known here, but {shown([*known])}.")
    hidden, layers, heads, kv_heads, inner, vocab, tied = known[name]
    return LlamaConfig(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=inner, vocab_size=vocab,
        tie_word_embeddings=tied,
    )  # fmt: skip
