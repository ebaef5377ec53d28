"""A training step on paper: which operation keeps which tensor for its backward pass.

Every formula of `memory.estimate` stands here as one operation of a `Tape`. The rule behind all of
them is the derivative: to send a gradient to one factor of a product, the other factor is needed.

    y = x W        dx needs W, dW needs x: x is kept only if W is trained
    y = a * b      da needs b, db needs a
    y = softmax(x) dx needs y
    y = x + c      needs nothing

A tensor is written down by the symbols of its shape, so that a kept tensor is a readable formula:
b batch, s sequence, h hidden, a heads, k key-value heads, d head size, i inner size of the MLP,
V vocabulary. The blocks follow the forward functions of transformers 5 line by line. For a
GPT-like block at 16 bit with dropout they give s b h (34 + 5 a s / h) bytes (Korthikanti et al.
2022, "Reducing Activation Recomputation in Large Transformer Models", section 4.1).
"""

from dataclasses import dataclass, field

from torch import nn
from transformers.pytorch_utils import Conv1D


@dataclass(eq=False)
class Value:
    """A tensor that is not there: symbols of its shape, bytes an element, does it need a gradient.
    `storage` is the value whose memory it shares (a view), or itself."""

    shape: str
    width: int
    grad: bool
    storage: "Value" = None

    def __post_init__(self):
        self.storage = self.storage or self


@dataclass(eq=False)
class Node:
    """One operation: what it reads, what it made, what it keeps. `fresh`: are gradients of the
    inputs new memory (a product), or the gradient of the output handed on (a sum, a view)?"""

    name: str
    inputs: list
    output: Value
    kept: list
    weights: list = field(default_factory=list)  # parameters that get a gradient here
    fresh: bool = True
    dequantised: int = 0  # numbers of a weight that is made anew from 4 bits each time


class Tape:
    """Plays a forward pass on paper and remembers it as a list of nodes.

    dims: the number for each symbol. autocast: are matrix products done in 16 bit (width 2)?
    fused: attention as one kernel that keeps no scores. device: a dropout mask has one byte an
    element on CUDA, on the CPU as many as the tensor.
    """

    def __init__(self, dims, autocast=False, fused=True, checkpointing=False, device="cpu"):
        self.dims, self.autocast, self.fused = dims, autocast, fused
        self.checkpointing, self.device = checkpointing, device
        self.nodes, self.where = [], ""
        self.held = []  # made once, handed to every block: under checkpointing it stands throughout

    def count(self, shape):
        """Number of elements of a shape such as "b s h" or "b s 3 h"."""
        n = 1
        for symbol in shape.split():
            n *= self.dims[symbol] if symbol in self.dims else int(symbol)
        return n

    def bytes(self, value):
        """Bytes of the memory that a value stands in."""
        return self.count(value.storage.shape) * value.storage.width

    def work(self, node, product):
        """Bytes in use while a weight is made from 4 bits and multiplied, 0 for other nodes: codes
        as int32 beside float32, then the type of the product beside float32; last, the weight
        beside the product."""
        n, width = node.dequantised, node.output.width
        return max(n * (6 if width == 4 else 4 + width),
                   n * width + self.count(product.shape) * product.width) if n else 0  # fmt: skip

    def node(self, name, inputs, shape, width, kept=(), weights=(), fresh=True):
        """Write one operation down. Returns its output."""
        weights = [w for w in weights if w is not None and w.requires_grad]
        grad = any(x.grad for x in inputs) or bool(weights)
        output = Value(shape, width, grad)
        kept = [output if x is OUTPUT else x for x in kept] if grad else []
        name = f"{self.where}: {name}" if self.where else name
        self.nodes.append(Node(name, inputs, output, kept, weights, fresh))
        return output

    # ---- the operations ------------------------------------------------------------------------

    def view(self, x, shape):
        """Another shape on the same memory."""
        y = self.node("view", [x], shape, x.width, fresh=False)
        y.storage = x.storage
        return y

    def copy(self, x, shape):
        """The same numbers in another order: a transpose made contiguous, repeated heads."""
        return self.node("copy", [x], shape, x.width)

    def cast(self, x, width):
        """To another precision. Keeps nothing, but is a new tensor."""
        return x if x.width == width else self.node("cast", [x], x.shape, width)

    def add(self, x, y):
        return self.node("add", [x, y], x.shape, max(x.width, y.width), fresh=False)

    def scale(self, x):
        """Times a number."""
        return self.node("scale", [x], x.shape, x.width)

    def mul(self, x, y, name="product"):
        kept = [x] * y.grad + [y] * x.grad
        return self.node(name, [x, y], x.shape, max(x.width, y.width), kept)

    def matmul(self, x, y, shape, name):
        if self.autocast:
            x, y = self.cast(x, 2), self.cast(y, 2)
        return self.node(name, [x, y], shape, x.width, [x] * y.grad + [y] * x.grad)

    def linear(self, x, weight, out, bias=None, name="linear"):
        """y = x W: keeps x if W is trained; under autocast also the 16-bit copy of W if x needs a
        gradient. `out` is the symbol of the output features."""
        width = weight.dtype.itemsize
        kept = []
        if self.autocast:
            x = self.cast(x, 2)
            if width != 2 and x.grad:
                kept.append(Value(str(weight.numel()), 2, False))
            width = 2
        kept += [x] * weight.requires_grad
        shape = f"{x.shape.rsplit(' ', 1)[0]} {out}"
        return self.node(name, [x], shape, width, kept, [weight, bias])

    def linear_in_4_bits(self, x, layer, out):
        """y = x W with W made anew from its codes, going forward and backward: keeps nothing."""
        if self.autocast:
            x = self.cast(x, 2)
        shape = f"{x.shape.rsplit(' ', 1)[0]} {out}"
        y = self.node("4-bit", [x], shape, x.width, weights=[layer.bias])
        self.nodes[-1].dequantised = layer.weight_count
        return y

    def apply(self, module, x, out, name):
        """A linear layer, or what a technique put in its place: that says itself what it does, in
        the operations of the tape, by a method `on_paper(tape, x, out)`."""
        outer, self.where = self.where, f"{self.where} {name}".strip()
        if hasattr(module, "on_paper"):
            y = module.on_paper(self, x, out)
        elif isinstance(module, (nn.Linear, Conv1D)):
            y = self.linear(x, module.weight, out, module.bias, "input")
        else:
            raise ValueError(
                f"memory.estimate has no formula for the {type(module).__name__} at {self.where}; "
                "memory.measure needs none."
            )
        self.where = outer
        return y

    def dropout(self, x, p):
        """Keeps which elements it dropped: one byte each on CUDA, a factor each on the CPU."""
        if not p:
            return x
        mask = Value(x.shape, 1 if self.device == "cuda" else x.width, False)
        return self.node("dropout mask", [x], x.shape, x.width, [mask])

    def layer_norm(self, x, module, name):
        """One kernel: keeps its input, and mean and 1/deviation of each position in float32."""
        rows = x.shape.rsplit(" ", 1)[0]
        kept = [x, Value(rows, 4, False), Value(rows, 4, False)]
        return self.node(f"{name} input", [x], x.shape, x.width, kept,
                         [module.weight, module.bias])  # fmt: skip

    def rms_norm(self, x, module, name):
        """x / rms(x) * weight, in single operations as transformers writes it, in float32."""
        width, rows = x.width, x.shape.rsplit(" ", 1)[0]
        x = self.cast(x, 4)
        squares = self.node(f"{name} input", [x], x.shape, 4, [x])
        mean = self.node("mean", [squares], rows, 4)
        rms = self.node(f"{name} 1/rms", [mean], rows, 4, [OUTPUT])
        x = self.cast(self.mul(x, rms, f"{name} input"), width)
        width = max(width, module.weight.dtype.itemsize)
        kept = [x] * module.weight.requires_grad
        return self.node(f"{name} normed", [x], x.shape, width, kept, [module.weight])

    def activation(self, x, kind):
        """silu, gelu and Bloom's own keep their input; gelu_new is written out in eight operations
        and keeps four tensors: x, tanh(...), 0.5 x and 1 + tanh(...)."""
        if kind == "gelu_new":
            cube = self.node("gelu_new x", [x], x.shape, x.width, [x])
            inner = self.scale(self.add(x, self.scale(cube)))
            tanh = self.node("gelu_new tanh", [inner], x.shape, x.width, [OUTPUT])
            # 1 + tanh is a new tensor, unlike the gradient that passes through it
            shifted = self.node("shift", [tanh], x.shape, x.width, fresh=False)
            return self.mul(self.scale(x), shifted, "gelu_new factors")
        if kind not in ("silu", "gelu", "gelu_pytorch_tanh", "bloom"):
            raise ValueError(f"memory.estimate has no formula for the activation {kind!r}.")
        return self.node(f"{kind} input", [x], x.shape, x.width, [x])

    def attention(self, q, k, v, dropout=0.0, upcast=True):
        """softmax(q k^T) v for q (b a s d), k and v (b a s d). Returns (b s h).

        Eager: the weights of all pairs, (b a s s), are kept as they leave the softmax, in float32
        with `upcast` or under autocast (and once more in 16 bit), and as they leave the dropout.
        Fused (Dao et al. 2022,
        "FlashAttention", section 3): q, k, v, the output and one number a row are kept instead, and
        on the CPU the mask as numbers.
        On the CPU the fused kernel has no dropout; torch falls back to single operations.
        """
        if self.fused and not (dropout and self.device == "cpu"):
            if self.autocast:
                q, k, v = (self.cast(x, 2) for x in (q, k, v))
            rows, mask = Value("b a s", 4, False), Value("b s s", q.width, False)
            y = self.node("fused attention", [q, k, v], "b s h", q.width,
                          [mask, q, k, v, rows, OUTPUT])  # fmt: skip
            return self.view(y, "b s h")
        autocast, width = self.autocast, v.width
        if self.fused:  # the fallback takes float32, scales q and k first, and knows no autocast
            q, k, v = self.scale(self.cast(q, 4)), self.scale(self.cast(k, 4)), self.cast(v, 4)
            self.autocast = False
        scores = self.scale(self.matmul(q, k, "b a s s", "queries and keys"))
        scores = self.cast(scores, 4 if upcast or autocast else v.width)
        probs = self.node("softmax output", [scores], "b a s s", scores.width, [OUTPUT])
        probs = self.dropout(self.cast(probs, v.width), dropout)
        y = self.matmul(probs, v, "b a s d", "weights and values")
        self.autocast = autocast
        return self.copy(self.cast(y, width), "b s h")

    def loss(self, x, head):
        """The head and the cross-entropy, whose log-softmax is kept in float32: (b s V)."""
        logits = self.apply(head, x, "V", "head")
        log_probs = self.node("log-probabilities", [self.cast(logits, 4)], "b s V", 4, [OUTPUT])
        return self.node("loss", [log_probs], "1", 4, [log_probs])


OUTPUT = Value("", 0, False)  # stands for "my own output" in a list of kept values


# ---- decoder blocks, as in transformers ---------------------------------------------------------


def llama(tape, model, config, checkpoint):
    """Llama, Qwen2, Mistral: RMSNorm, rotary positions, grouped-query attention, gated MLP."""
    core = model.model
    x = embed(tape, core.embed_tokens, "b s h")
    cos, sin = Value("s d", x.width, False), Value("s d", x.width, False)
    tape.held = [cos, sin, Value("b s s", 1 if tape.fused else x.width, False)]  # and the mask
    for layer in core.layers:
        checkpoint(x)
        attention, mlp = layer.self_attn, layer.mlp
        y = tape.rms_norm(x, layer.input_layernorm, "norm 1")
        q = tape.apply(attention.q_proj, y, "a d", "q_proj")
        k = tape.apply(attention.k_proj, y, "k d", "k_proj")
        v = tape.apply(attention.v_proj, y, "k d", "v_proj")
        q, k = rotate(tape, q, cos, sin), rotate(tape, k, cos, sin)
        if config.num_key_value_heads != config.num_attention_heads:
            k, v = tape.copy(k, "b a s d"), tape.copy(v, "b a s d")
        y = tape.attention(q, k, v, config.attention_dropout)
        x = tape.add(x, tape.apply(attention.o_proj, y, "h", "o_proj"))
        y = tape.rms_norm(x, layer.post_attention_layernorm, "norm 2")
        gate = tape.activation(tape.apply(mlp.gate_proj, y, "i", "gate_proj"), config.hidden_act)
        y = tape.mul(gate, tape.apply(mlp.up_proj, y, "i", "up_proj"), "gate and up")
        x = tape.add(x, tape.apply(mlp.down_proj, y, "h", "down_proj"))
    checkpoint(None)
    return tape.loss(tape.rms_norm(x, core.norm, "last norm"), model.lm_head)


def rotate(tape, x, cos, sin):
    """x cos + rotate_half(x) sin (Su et al. 2021, "RoFormer", equation 34)."""
    turned = tape.copy(x, x.shape)
    return tape.add(tape.mul(x, cos, "cos"), tape.mul(turned, sin, "sin"))


def gpt2(tape, model, config, checkpoint):
    """GPT-2: LayerNorm, learned positions, one layer for q, k and v, dropout."""
    core = model.transformer
    x = embed(tape, core.wte, "b s h")
    x = tape.dropout(tape.add(x, embed(tape, core.wpe, "s h")), config.embd_pdrop)
    tape.held = [Value("b s s", 1 if tape.fused else x.width, False)]  # the mask
    for layer in core.h:
        checkpoint(x)
        y = tape.layer_norm(x, layer.ln_1, "norm 1")
        qkv = tape.apply(layer.attn.c_attn, y, "3 h", "c_attn")
        y = tape.attention(*heads(tape, qkv), config.attn_pdrop, upcast=False)
        y = tape.apply(layer.attn.c_proj, y, "h", "attention c_proj")
        x = tape.add(tape.dropout(y, config.resid_pdrop), x)
        y = tape.layer_norm(x, layer.ln_2, "norm 2")
        y = tape.activation(tape.apply(layer.mlp.c_fc, y, "i", "c_fc"), config.activation_function)
        y = tape.apply(layer.mlp.c_proj, y, "h", "MLP c_proj")
        x = tape.add(x, tape.dropout(y, config.resid_pdrop))
    checkpoint(None)
    return tape.loss(tape.layer_norm(x, core.ln_f, "last norm"), model.lm_head)


def bloom(tape, model, config, checkpoint):
    """Bloom: LayerNorm (also on the embeddings), ALiBi, one layer for q, k and v; never fused."""
    core = model.transformer
    tape.fused = False
    mask = Value("b s s", core.word_embeddings.weight.dtype.itemsize, False)
    tape.held = [mask, Value("b a s", mask.width, False)]  # and ALiBi's distances
    x = embed(tape, core.word_embeddings, "b s h")
    x = tape.layer_norm(x, core.word_embeddings_layernorm, "embedding norm")
    for layer in core.h:
        checkpoint(x)
        attention, mlp = layer.self_attention, layer.mlp
        y = tape.layer_norm(x, layer.input_layernorm, "norm 1")
        residual = y if config.apply_residual_connection_post_layernorm else x
        qkv = tape.apply(attention.query_key_value, y, "3 h", "query_key_value")
        y = tape.attention(*heads(tape, qkv), config.attention_dropout)
        y = tape.apply(attention.dense, y, "h", "dense")
        x = tape.add(tape.dropout(y, config.hidden_dropout), residual)
        y = tape.layer_norm(x, layer.post_attention_layernorm, "norm 2")
        residual = y if config.apply_residual_connection_post_layernorm else x
        y = tape.activation(tape.apply(mlp.dense_h_to_4h, y, "i", "dense_h_to_4h"), "bloom")
        y = tape.apply(mlp.dense_4h_to_h, y, "h", "dense_4h_to_h")
        x = tape.add(tape.dropout(y, config.hidden_dropout), residual)
    checkpoint(None)
    return tape.loss(tape.layer_norm(x, core.ln_f, "last norm"), model.lm_head)


def embed(tape, module, shape):
    """Rows of a table: keeps the token ids, which are counted as inputs. Under checkpointing
    transformers makes the result of a frozen table require a gradient, which keeps it alive."""
    if hasattr(module, "on_paper"):
        return module.on_paper(tape, None, shape)
    x = tape.node("embedding", [], shape, module.weight.dtype.itemsize, [], [module.weight])
    if tape.checkpointing and not x.grad and shape == "b s h":
        x.grad = True
        tape.nodes[-1].kept.append(x)
    return x


def heads(tape, qkv):
    """Split (b s 3h) into three times (b a s d): copies sorted by heads, for one row only views."""
    split = [tape.view(qkv, "b a s d") for _ in range(3)]
    return split if tape.dims["b"] == 1 else [tape.copy(x, "b a s d") for x in split]


BLOCKS = {"llama": llama, "qwen2": llama, "mistral": llama, "gpt2": gpt2, "bloom": bloom}
