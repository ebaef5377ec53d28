"""Soft prompts and prefixes in the folder format of HF peft: always one table of vectors.

Encoders and projections are written folded: their output vectors, not their weights.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from minipeft import p_tuning, p_tuning_v2, prefix_tuning, prompt_tuning
from minipeft.adapter_files.pair import Config, State
from minipeft.refusals import require
from minipeft.technique.kv_cache import key_value_shape
from minipeft.technique.words import place_of, width_of
from minipeft.virtual_tokens import attach, refuse

# The known settings of peft's configurations (see folder.py); each method adds its own below.
UNDERSTOOD: dict[str, tuple | None] = {
    "num_virtual_tokens": None,
    "token_dim": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": (1,),
}


def peft_config(
    model: PreTrainedModel, width: int | None, shape: tuple[int, int, int] | None = None
) -> Config:
    """The part of adapter_config that all methods with virtual tokens share.

    width: of the input embeddings, for a soft prompt. shape: (layers, kv_heads, head_dim), for a
    prefix.
    """
    virtual: Any = model.virtual_tokens
    settings = model.config.get_text_config()
    layers = getattr(settings, "num_hidden_layers", 1)
    heads = getattr(settings, "num_attention_heads", 1)
    if shape is not None:
        layers, heads, width = shape[0], shape[1], shape[1] * shape[2]
    return {
        "num_virtual_tokens": virtual.num_virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": layers,
    }


def refuse_other_sizes(config: Config, **sizes: int) -> None:
    """Raise ValueError if an adapter_config gives another size than the model has."""
    for key, size in sizes.items():
        require(
            config.get(key) in (None, size),
            f"The adapter does not fit this base model: {key} is {config.get(key)!r} in the "
            f"adapter, and {size} in the model.",
        )


def table_of_vectors(model: PreTrainedModel, config: Config, state: State) -> torch.Tensor:
    """The virtual input embeddings of an adapter: (n, hidden)."""
    width = width_of(model)
    refuse_other_sizes(config, token_dim=width)
    return table_of_state(state, (config["num_virtual_tokens"], width))


def table_of_prefix(config: Config, state: State, shape: tuple[int, int, int]) -> torch.Tensor:
    """The virtual keys and values of an adapter: (n, layers * 2 * kv_heads * head_dim).

    shape: (layers, kv_heads, head_dim).
    """
    layers, kv_heads, head_dim = shape
    width = kv_heads * head_dim
    refuse_other_sizes(config, num_layers=layers, num_attention_heads=kv_heads, token_dim=width)
    return table_of_state(state, (config["num_virtual_tokens"], layers * 2 * width))


def table_of_state(state: State, shape: tuple[int, int]) -> torch.Tensor:
    """The only tensor of an adapter. Raises ValueError if its shape or name is another."""
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    require(
        found == {"prompt_embeddings": shape},
        "The adapter does not fit this base model: it should hold prompt_embeddings of the "
        f"shape {shape}, and holds {found}.",
    )
    return state["prompt_embeddings"]


# ---- prompt tuning ------------------------------------------------------------------------------

# The settings of the initialization, which do not matter after training.
PROMPT_TUNING_READS = UNDERSTOOD | dict.fromkeys([
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
])  # fmt: skip


def prompt_tuning_to_peft(model: PreTrainedModel) -> tuple[Config, State]:
    """(adapter_config, {key: tensor}) as HF peft writes them."""
    virtual: Any = model.virtual_tokens
    vectors = virtual()  # (n, hidden)
    config = peft_config(model, vectors.shape[1]) | {"prompt_tuning_init": "RANDOM"}
    return config, {"prompt_embeddings": vectors}


def prompt_tuning_from_peft(
    model: PreTrainedModel, config: Config, state: State
) -> PreTrainedModel:
    """Add the soft prompt of an adapter to `model`. Raises ValueError if it does not fit."""
    refuse(model, config.get("num_virtual_tokens"))
    vectors = table_of_vectors(model, config, state).to(**place_of(model), copy=True)
    return attach(model, prompt_tuning.SoftPrompt(vectors), "prompt_tuning")


# ---- P-tuning -----------------------------------------------------------------------------------

TEMPLATE = "P_TUNING_TEMPLATE"  # a type of our own, since HF peft has no templates
# The settings of the encoder, which is not written, and of a template.
P_TUNING_READS = UNDERSTOOD | dict.fromkeys([
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
    "encoder_dropout", "placeholder_id",
])  # fmt: skip


def p_tuning_to_peft(model: PreTrainedModel) -> tuple[Config, State]:
    """(adapter_config, {key: tensor}) as HF peft writes them: the folded vectors, no encoder."""
    virtual: Any = model.virtual_tokens
    vectors = virtual()  # (n, hidden)
    config = peft_config(model, vectors.shape[1])
    config["encoder_reparameterization_type"] = (virtual.encoder or "mlp").upper()
    config["encoder_hidden_size"] = virtual.width or vectors.shape[1]
    if virtual.place == "template":
        config |= {"peft_type": TEMPLATE, "placeholder_id": virtual.placeholder_id}
    return config, {"prompt_embeddings": vectors}


def p_tuning_from_peft(model: PreTrainedModel, config: Config, state: State) -> PreTrainedModel:
    """Add the folded vectors of an adapter to `model`. Raises ValueError if they do not fit."""
    refuse(model, config.get("num_virtual_tokens"))
    placeholder_id = config.get("placeholder_id")
    require(
        type(placeholder_id) is (int if config["peft_type"] == TEMPLATE else type(None)),
        f"placeholder_id={placeholder_id!r} does not go with {config['peft_type']}.",
    )
    vectors = table_of_vectors(model, config, state)
    return p_tuning.attach_encoder(model, p_tuning.table_of(model, vectors, placeholder_id))


# ---- prefix-tuning and P-tuning v2 --------------------------------------------------------------

# The settings of the MLP, which is not written, and of the initialization.
PREFIX_READS = UNDERSTOOD | dict.fromkeys(
    ["encoder_hidden_size", "prefix_projection", "init_weights"]
)


def prefix_tuning_to_peft(model: PreTrainedModel) -> tuple[Config, State]:
    """(adapter_config, {key: tensor}) as HF peft writes them: the folded table, no MLP."""
    virtual: Any = model.virtual_tokens
    config = peft_config(model, None, virtual.shape) | {"prefix_projection": False}
    return config, {"prompt_embeddings": virtual.table()}


def prefix_tuning_from_peft(
    model: PreTrainedModel, config: Config, state: State
) -> PreTrainedModel:
    """Add the prefix of an adapter to `model`. Raises ValueError if it does not fit."""
    refuse(model, config.get("num_virtual_tokens"))
    table = table_of_prefix(config, state, key_value_shape(model))
    return attach(model, prefix_tuning.prefix_of(model, table), "prefix_tuning")


def p_tuning_v2_to_peft(model: PreTrainedModel) -> tuple[Config, State]:
    """(adapter_config, {key: tensor}) as HF peft writes them: those of a prefix.

    For a language model the folder is that of prefix-tuning, and is loaded as prefix-tuning.
    """
    virtual: Any = model.virtual_tokens
    shape = key_value_shape(model) if virtual.place == "hidden" else virtual.shape
    config = peft_config(model, None, shape) | {"prefix_projection": False}
    return config, {"prompt_embeddings": p_tuning_v2.table_of(model)}


def p_tuning_v2_from_peft(model: PreTrainedModel, config: Config, state: State) -> PreTrainedModel:
    """Add the keys and values of an adapter. Raises ValueError if they do not fit."""
    refuse(model, config.get("num_virtual_tokens"), head="any")
    _, shape, place = p_tuning_v2.key_values_of(model)
    table = table_of_prefix(config, state, shape).to(**place_of(model), copy=True)
    return attach(model, p_tuning_v2.KeyValues(table, shape, place), "p_tuning_v2")
