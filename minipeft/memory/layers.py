"""The layers of minipeft and the blocks of transformers, in the operations of a `Graph`.

The blocks follow the forward methods of transformers 5 line by line. For a GPT-like block in
16 bits with dropout they give s b h (34 + 5 a s / h) bytes (Korthikanti et al. 2022, "Reducing
Activation Recomputation in Large Transformer Models", section 4.1).
"""

from functools import singledispatch
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from minipeft.adapters import Adapter
from minipeft.lora import LoRALinear
from minipeft.memory.graph import Graph
from minipeft.memory.nodes import OUTPUT, Value
from minipeft.memory.virtual_tokens import begin_block, fill_cache, in_front, with_prefix
from minipeft.quantization import NF4Linear

# ---- linear layers, and those of techniques that replace them -----------------------------------


def apply(graph: Graph, module: nn.Module, x: Value, out: str, name: str) -> Value:
    """Record `module(x)` under `name`. x: (..., in). out: the symbol of the output features.

    Raises ValueError for a module that has no rule in `forward`.
    """
    outer, graph.where = graph.where, f"{graph.where} {name}".strip()
    y = forward(module, graph, x, out)
    graph.where = outer
    return y


@singledispatch
def forward(module: nn.Module, graph: Graph, x: Value, out: str) -> Value:
    """Record the forward pass of a module, by its type. Returns the output, (..., out)."""
    raise ValueError(
        f"memory.estimate has no formula for the {type(module).__name__} at {graph.where}; "
        "memory.measure needs none."
    )


@forward.register(nn.Linear)
@forward.register(Conv1D)
def _(module, graph, x, out):
    return graph.linear(x, module.weight, out, module.bias, "input")


@forward.register
def _(module: NF4Linear, graph, x, out):
    return graph.linear_in_4_bits(x, module.weight_count, module.bias, out)


@forward.register
def _(module: LoRALinear, graph, x, out):
    h = apply(graph, module.base, x, out, "")
    x = graph.dropout(x, module.dropout)
    z = graph.cast(x, module.lora_A.dtype.itemsize)
    z = graph.scale(graph.linear(z, module.lora_A, str(len(module.lora_A)), name="lora_A input"))
    y = graph.linear(z, module.lora_B, out, name="lora_B input")
    y = graph.cast(graph.add(h, y), h.width)
    if module.lora_magnitude is None:
        return y
    m = module.lora_magnitude
    v = y if module.base.bias is None else graph.node("minus bias", [y], y.shape, y.width)
    if module.dropout:
        v = graph.add(v, graph.add(apply(graph, module.base, x, out, ""), h))
    v = graph.node("magnitude's input", [v], v.shape, max(v.width, m.dtype.itemsize), [v], [m])
    return graph.cast(graph.add(y, v), h.width)


@forward.register
def _(module: Adapter, graph, x, out):
    h = apply(graph, module.base, x, out, "")
    down, up = module.down, module.up
    z, m = graph.cast(h, down.weight.dtype.itemsize), str(down.out_features)
    z = graph.linear(z, down.weight, m, down.bias, name="down input")
    z = graph.activation(z, module.activation)
    z = graph.linear(z, up.weight, out, up.bias, name="up input")
    return graph.cast(graph.add(h, z), h.width)


# ---- embeddings and loss ------------------------------------------------------------------------


def embed(
    graph: Graph, module: nn.Embedding | LoRALinear, shape: str, require_grad: bool = False
) -> Value:
    """Rows of an embedding table. Saves the token ids, which are counted as inputs.

    require_grad: under checkpointing, transformers makes the embedded tokens require a gradient
    even if the table is frozen, and so they are saved.
    Raises ValueError for LoRA on embeddings.
    """
    if isinstance(module, LoRALinear):
        raise ValueError(
            "memory.estimate has no formula for LoRA on embeddings; memory.measure needs none."
        )
    table = module.get_parameter("weight")
    x = graph.node("embedding", [], shape, table.dtype.itemsize, weights=[table])
    if require_grad and graph.checkpointing and not x.grad:
        x.grad = True
        graph.nodes[-1].saved.append(x)
    return x


def embed_text(graph: Graph, model: PreTrainedModel, module: nn.Embedding | LoRALinear) -> Value:
    """The embedded text, behind the vectors of virtual tokens if there are any: (b s h)."""
    fill_cache(graph, model)
    if "w" in graph.dims:
        return in_front(graph, model, embed(graph, module, "b w h", require_grad=True))
    return embed(graph, module, "b s h", require_grad=True)


def loss(graph: Graph, x: Value, head: nn.Module) -> Value:
    """The head and the cross-entropy, which saves its log-softmax in float32: (b s V)."""
    if "l" in graph.dims:  # of the virtual tokens, only the last one gets logits
        x = graph.copy(graph.view(x, "b l h", fresh=True), "b l h")
    logits = apply(graph, head, x, "V", "head")
    wide = graph.cast(logits, 4)
    log_probs = graph.node("log-probabilities", [wide], logits.shape, 4, [OUTPUT])
    if not graph.checkpointing and graph.cache:
        graph.held = [*graph.cache, x, logits, wide]
    return graph.node("loss", [log_probs], "1", 4, [log_probs])


# ---- decoder blocks -----------------------------------------------------------------------------


def llama(graph: Graph, model: PreTrainedModel, config: PretrainedConfig) -> Value:
    """Llama, Qwen2, Mistral: RMSNorm, rotary positions, grouped-query attention, gated MLP."""
    core = model.model
    x = embed_text(graph, model, core.embed_tokens)
    cos, sin = (Value(f"{positions(graph)} d", x.width, False) for _ in range(2))
    graph.shared += [cos, sin, mask(graph, x.width)]
    for i, layer in enumerate(core.layers):
        x = begin_block(graph, model, i, x)
        attention, mlp = layer.self_attn, layer.mlp
        y = graph.rms_norm(x, layer.input_layernorm, "norm 1")
        q = apply(graph, attention.q_proj, y, "a d", "q_proj")
        k = apply(graph, attention.k_proj, y, "k d", "k_proj")
        v = apply(graph, attention.v_proj, y, "k d", "v_proj")
        q, k = rotate(graph, q, cos, sin), rotate(graph, k, cos, sin)
        k, v = with_prefix(graph, model, i, k, v)
        if config.num_key_value_heads != config.num_attention_heads:
            k, v = graph.copy(k, f"b a {graph.seen} d"), graph.copy(v, f"b a {graph.seen} d")
        y = graph.attention(q, k, v, config.attention_dropout)
        x = graph.add(x, apply(graph, attention.o_proj, y, "h", "o_proj"))
        y = graph.rms_norm(x, layer.post_attention_layernorm, "norm 2")
        gate = apply(graph, mlp.gate_proj, y, "i", "gate_proj")
        gate = graph.activation(gate, config.hidden_act)
        y = graph.mul(gate, apply(graph, mlp.up_proj, y, "i", "up_proj"), "gate and up")
        x = graph.add(x, apply(graph, mlp.down_proj, y, "h", "down_proj"))
        graph.end_block()
    return loss(graph, graph.rms_norm(x, core.norm, "last norm"), model.lm_head)


def gpt2(graph: Graph, model: PreTrainedModel, config: PretrainedConfig) -> Value:
    """GPT-2: LayerNorm, learned positions, one layer for q, k and v, dropout."""
    core: Any = model.transformer
    x = embed_text(graph, model, core.wte)
    x = graph.add(x, embed(graph, core.wpe, f"{positions(graph)} h"))
    x = graph.dropout(x, config.embd_pdrop)
    graph.shared = [mask(graph, x.width)]  # under checkpointing, GPT-2's blocks get no cache
    for i, layer in enumerate(core.h):
        x = begin_block(graph, model, i, x)
        y = graph.layer_norm(x, layer.ln_1, "norm 1")
        qkv = apply(graph, layer.attn.c_attn, y, "3 h", "c_attn")
        q, k, v = heads(graph, model, i, qkv, config.attn_pdrop)
        y = graph.attention(q, k, v, config.attn_pdrop, upcast=False)
        y = apply(graph, layer.attn.c_proj, y, "h", "attention c_proj")
        x = graph.add(graph.dropout(y, config.resid_pdrop), x)
        y = graph.layer_norm(x, layer.ln_2, "norm 2")
        y = apply(graph, layer.mlp.c_fc, y, "i", "c_fc")
        y = graph.activation(y, config.activation_function)
        y = apply(graph, layer.mlp.c_proj, y, "h", "MLP c_proj")
        x = graph.add(x, graph.dropout(y, config.resid_pdrop))
        graph.end_block()
    return loss(graph, graph.layer_norm(x, core.ln_f, "last norm"), model.lm_head)


def bloom(graph: Graph, model: PreTrainedModel, config: PretrainedConfig) -> Value:
    """Bloom: LayerNorm (also on the embeddings), ALiBi, one layer for q, k and v; never fused."""
    core: Any = model.transformer
    graph.fused = False
    embeds = embed_text(graph, model, core.word_embeddings)
    alibi = Value(f"b a {graph.seen}", embeds.width, False)  # added to the scores of each head
    graph.shared += [mask(graph, embeds.width), alibi]
    x = graph.layer_norm(embeds, core.word_embeddings_layernorm, "embedding norm")
    for i, layer in enumerate(core.h):
        below, x = x, begin_block(graph, model, i, x)
        attention, mlp = layer.self_attention, layer.mlp
        normed = graph.layer_norm(x, layer.input_layernorm, "norm 1")
        residual = normed if config.apply_residual_connection_post_layernorm else x
        qkv = apply(graph, attention.query_key_value, normed, "3 h", "query_key_value")
        q, k, v = heads(graph, model, i, qkv, config.attention_dropout)
        context = graph.attention(q, k, v, config.attention_dropout)
        y = apply(graph, attention.dense, context, "h", "dense")
        x = graph.add(graph.dropout(y, config.hidden_dropout), residual)
        # The Python variables that are alive when attention returns
        graph.nodes[-1].held = [embeds, below, normed, qkv, context, y, x]
        graph.nodes[-1].held += scores(graph, embeds.width, i)
        y = graph.layer_norm(x, layer.post_attention_layernorm, "norm 2")
        residual = y if config.apply_residual_connection_post_layernorm else x
        y = apply(graph, mlp.dense_h_to_4h, y, "i", "dense_h_to_4h")
        y = apply(graph, mlp.dense_4h_to_h, graph.activation(y, "bloom"), "h", "dense_4h_to_h")
        x = graph.add(graph.dropout(y, config.hidden_dropout), residual)
        graph.end_block()
    return loss(graph, graph.layer_norm(x, core.ln_f, "last norm"), model.lm_head)


def positions(graph: Graph) -> str:
    """The shape of the positions: shared by all rows, or one per row with virtual tokens."""
    return "b s" if "n" in graph.dims else "s"


def mask(graph: Graph, width: int) -> Value:
    """The attention mask: bool for the fused kernel, otherwise numbers to add to the scores."""
    return Value(f"b s {graph.seen}", 1 if graph.fused else width, False)


def scores(graph: Graph, width: int, block: int) -> list[Value]:
    """The scores that Bloom's Python variables keep alive: before and after the mask is added, and
    under checkpointing also the attention weights of the block before."""
    shape, product = f"b a s {graph.seen}", 2 if graph.autocast else width
    widths = [product, width] + [width] * (graph.checkpointing and block > 0)
    return [Value(shape, each, False) for each in widths]


def rotate(graph: Graph, x: Value, cos: Value, sin: Value) -> Value:
    """x cos + rotate_half(x) sin (Su et al. 2021, "RoFormer", equation 34)."""
    turned = graph.copy(x, x.shape)
    return graph.add(graph.mul(x, cos, "cos"), graph.mul(turned, sin, "sin"))


def heads(graph: Graph, model: PreTrainedModel, i: int, qkv: Value, dropout: float) -> list[Value]:
    """Split (b s 3h) into q, k and v, (b a s d) each. The batched product needs copies grouped
    by head; for one row, views suffice."""
    q, k, v = (graph.view(qkv, "b a s d") for _ in range(3))
    one_row = graph.dims["b"] == 1
    if "t" in graph.dims:  # the cache has copied k and v
        k, v = with_prefix(graph, model, i, k, v)
        views = one_row or graph.in_one_kernel(dropout)
        return [q if views else graph.copy(q, "b a s d"), k, v]
    return [q, k, v] if one_row else [graph.copy(x, "b a s d") for x in (q, k, v)]


BLOCKS = {"llama": llama, "qwen2": llama, "mistral": llama, "gpt2": gpt2, "bloom": bloom}
