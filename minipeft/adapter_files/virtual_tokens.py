"""Soft prompts and prefixes in the folder format of HF peft: always one table of vectors.

Encoders and projections are written folded: the vectors that they make, and not their weights.
"""

from minipeft import p_tuning, p_tuning_v2, prefix_tuning, prompt_tuning
from minipeft.refusals import require
from minipeft.technique.kv_cache import key_value_shape
from minipeft.technique.words import place_of, width_of
from minipeft.virtual_tokens import attach, refuse

# What of peft's configurations is understood (see folder.py); each method adds its own below.
UNDERSTOOD = {
    "num_virtual_tokens": None,
    "token_dim": None,
    "num_attention_heads": None,
    "num_layers": None,
    "num_transformer_submodules": (1,),
}


def peft_config(model, width, shape=None):
    """What the adapter_config of every method with virtual tokens holds.

    width: of the vectors that enter the model. shape: (layers, kv_heads, head_dim) of a prefix.
    """
    settings = model.config.get_text_config()
    layers = getattr(settings, "num_hidden_layers", 1)
    heads = getattr(settings, "num_attention_heads", 1)
    if shape is not None:
        layers, heads, width = shape[0], shape[1], shape[1] * shape[2]
    return {
        "num_virtual_tokens": model.virtual_tokens.num_virtual_tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": heads,
        "num_layers": layers,
    }


def refuse_other_sizes(config, **sizes):
    """Raise ValueError if an adapter_config gives another size than the model has."""
    for key, size in sizes.items():
        require(
            config.get(key) in (None, size),
            f"The adapter does not fit this base model: {key} is {config.get(key)!r} in the "
            f"adapter, and {size} in the model.",
        )


def table_of_vectors(model, config, state):
    """The vectors of an adapter that enter the model: (n, hidden)."""
    width = width_of(model)
    refuse_other_sizes(config, token_dim=width)
    return table_of_state(state, (config["num_virtual_tokens"], width))


def table_of_prefix(config, state, shape):
    """The keys and values of an adapter for a cache of (layers, kv_heads, head_dim)."""
    layers, kv_heads, head_dim = shape
    width = kv_heads * head_dim
    refuse_other_sizes(config, num_layers=layers, num_attention_heads=kv_heads, token_dim=width)
    return table_of_state(state, (config["num_virtual_tokens"], layers * 2 * width))


def table_of_state(state, wanted):
    """The one table of an adapter; ValueError if its shape is not `wanted`, or it has company."""
    table = state.get("prompt_embeddings")
    found = {key: tuple(tensor.shape) for key, tensor in state.items()}
    require(
        found == {"prompt_embeddings": wanted},
        "The adapter does not fit this base model: it should hold prompt_embeddings of the "
        f"shape {wanted}, and holds {found}.",
    )
    return table


# ---- prompt tuning ------------------------------------------------------------------------------

# How the vectors started, which they tell no more.
PROMPT_TUNING_READS = UNDERSTOOD | dict.fromkeys([
    "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
])  # fmt: skip


def prompt_tuning_to_peft(model):
    """(adapter_config, {key: tensor}) as HF peft writes them."""
    vectors = model.virtual_tokens()  # (n, hidden)
    config = peft_config(model, vectors.shape[1]) | {"prompt_tuning_init": "RANDOM"}
    return config, {"prompt_embeddings": vectors}


def prompt_tuning_from_peft(model, config, state):
    """Add the soft prompt of an adapter to `model`. Raises ValueError if it does not fit."""
    refuse(model, config.get("num_virtual_tokens"))
    vectors = table_of_vectors(model, config, state).to(**place_of(model), copy=True)
    return attach(model, prompt_tuning.SoftPrompt(vectors), "prompt_tuning")


# ---- P-tuning -----------------------------------------------------------------------------------

TEMPLATE = "P_TUNING_TEMPLATE"  # HF peft has no templates, so no such type
# The encoder, which a folder no longer holds, and a template.
P_TUNING_READS = UNDERSTOOD | dict.fromkeys([
    "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
    "encoder_dropout", "placeholder_id",
])  # fmt: skip


def p_tuning_to_peft(model):
    """(adapter_config, {key: tensor}) as HF peft writes them: the folded vectors, no encoder."""
    written = model.virtual_tokens
    vectors = written()  # (n, hidden)
    config = peft_config(model, vectors.shape[1])
    config["encoder_reparameterization_type"] = (written.encoder or "mlp").upper()
    config["encoder_hidden_size"] = written.width or vectors.shape[1]
    if written.place == "template":
        config |= {"peft_type": TEMPLATE, "placeholder_id": written.placeholder_id}
    return config, {"prompt_embeddings": vectors}


def p_tuning_from_peft(model, config, state):
    """Add the vectors of an adapter, folded, to `model`. Raises ValueError if they do not fit."""
    refuse(model, config.get("num_virtual_tokens"))
    hole = config.get("placeholder_id")
    require(
        type(hole) is (int if config["peft_type"] == TEMPLATE else type(None)),
        f"placeholder_id={hole!r} does not go with {config['peft_type']}.",
    )
    vectors = table_of_vectors(model, config, state)
    return p_tuning.attach_encoder(model, p_tuning.table_of(model, vectors, hole))


# ---- prefix-tuning and P-tuning v2 --------------------------------------------------------------

# The MLP, which a folder no longer holds, and the start.
PREFIX_READS = UNDERSTOOD | dict.fromkeys(
    ["encoder_hidden_size", "prefix_projection", "init_weights"]
)


def prefix_tuning_to_peft(model):
    """(adapter_config, {key: tensor}) as HF peft writes them: the folded table, no MLP."""
    config = peft_config(model, None, model.virtual_tokens.shape) | {"prefix_projection": False}
    return config, {"prompt_embeddings": model.virtual_tokens.table()}


def prefix_tuning_from_peft(model, config, state):
    """Add the prefix of an adapter to `model`. Raises ValueError if it does not fit."""
    refuse(model, config.get("num_virtual_tokens"))
    table = table_of_prefix(config, state, key_value_shape(model))
    return attach(model, prefix_tuning.prefix_of(model, table), "prefix_tuning")


def p_tuning_v2_to_peft(model):
    """(adapter_config, {key: tensor}) as HF peft writes them: a prefix.

    Without a head the folder is that of prefix-tuning, and loads as such.
    """
    virtual = model.virtual_tokens
    shape = key_value_shape(model) if virtual.place == "hidden" else virtual.shape
    config = peft_config(model, None, shape) | {"prefix_projection": False}
    return config, {"prompt_embeddings": p_tuning_v2.table_of(model)}


def p_tuning_v2_from_peft(model, config, state):
    """Add the keys and values of an adapter. Raises ValueError if they do not fit."""
    refuse(model, config.get("num_virtual_tokens"), head="any")
    _, shape, place = p_tuning_v2.key_values_of(model)
    table = table_of_prefix(config, state, shape).to(**place_of(model), copy=True)
    return attach(model, p_tuning_v2.KeyValues(table, shape, place), "p_tuning_v2")
