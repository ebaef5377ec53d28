"""The computation graph of a training step, without tensors: which operation saves which tensor.

The derivative decides. To send a gradient to one factor of a product, the other factor is needed:

    y = x W        dx needs W, dW needs x: x is saved only if W is trained
    y = a * b      da needs b, db needs a
    y = softmax(x) dx needs y
    y = x + c      needs nothing

A `Value` stands for a tensor. Its shape is written in symbols, so that a saved tensor is a readable
formula: b batch, s sequence, h hidden, a heads, k key-value heads, d head size, i inner size of the
MLP, V vocabulary. With virtual tokens also n, their number, w the tokens of the text, t the
positions that attention sees, l those that get logits.
"""

from dataclasses import dataclass, field


@dataclass(eq=False)
class Value:
    """A tensor of the graph that is never allocated.

    shape    symbols and numbers, such as "b s 3 h"
    width    bytes per element
    grad     does it require a gradient?
    storage  the value whose memory it shares if it is a view; itself otherwise
    """

    shape: str
    width: int
    grad: bool
    storage: "Value" = None

    def __post_init__(self):
        self.storage = self.storage or self


@dataclass(eq=False)
class Node:
    """One operation: its inputs, its output, and what it saves for the backward pass.

    weights  parameters whose gradient is computed here
    fresh    True if the gradients of the inputs are new tensors, as for a product; False if the
             gradient of the output is passed on, as for a sum or a view
    dequantised  elements of a weight that is made from 4 bits here, forward and backward
    scratch  how many tensors as large as the output its backward pass needs for itself
    held     what Python's variables hold here beside what is saved, if it matters
    """

    name: str
    inputs: list
    output: Value
    saved: list
    weights: list = field(default_factory=list)
    fresh: bool = True
    dequantised: int = 0
    scratch: int = 0
    held: list = field(default_factory=list)


class Graph:
    """Records a forward pass as a list of nodes. Each operation returns the `Value` of its output.

    dims           the number for each symbol
    autocast       do matrix products run in 16 bits?
    fused          is attention one kernel, which saves no scores?
    checkpointing  are blocks recomputed in the backward pass?
    device         "cpu" or "cuda": a dropout mask has one byte per element on CUDA, and as many as
                   its tensor on the CPU
    """

    def __init__(self, dims, autocast=False, fused=True, checkpointing=False, device="cpu"):
        self.dims, self.autocast, self.fused = dims, autocast, fused
        self.checkpointing, self.device = checkpointing, device
        self.seen = "t" if "t" in dims else "s"  # the positions that attention sees
        self.nodes, self.where = [], ""  # where: prefix of the names of new nodes
        self.blocks = []  # [index of the first node, index after the last, the input]
        self.shared = []  # made once and passed to all blocks, kept throughout by checkpointing
        self.cache = []  # keys and values of all layers
        self.held = []  # what is held until the forward pass is over, if there is a cache

    def begin_block(self, x):
        self.blocks.append([len(self.nodes), None, x])

    def end_block(self):
        self.blocks[-1][1] = len(self.nodes)

    def count(self, shape):
        """The number of elements of a shape such as "b s h" or "b s 3 h"."""
        n = 1
        for symbol in shape.split():
            n *= self.dims[symbol] if symbol in self.dims else int(symbol)
        return n

    def bytes(self, value):
        """The size of a value's storage, in bytes."""
        return self.count(value.storage.shape) * value.storage.width

    def dequantisation(self, node, product):
        """Bytes in use while a weight is made from 4 bits and multiplied; 0 for other nodes: first
        the codes as int32 and float32 values, then the float32 values and the weight in the type of
        the product, last the weight and the product."""
        n, width = node.dequantised, node.output.width
        product = self.count(product.shape) * product.width
        return max(n * (6 if width == 4 else 4 + width), n * width + product) if n else 0

    def node(self, name, inputs, shape, width, saved=(), weights=(), fresh=True):
        """Record one operation. `OUTPUT` in `saved` stands for its own output."""
        weights = [w for w in weights if w is not None and w.requires_grad]
        grad = any(x.grad for x in inputs) or bool(weights)
        output = Value(shape, width, grad)
        saved = [output if x is OUTPUT else x for x in saved] if grad else []
        name = f"{self.where}: {name}" if self.where else name
        self.nodes.append(Node(name, inputs, output, saved, weights, fresh))
        return output

    # ---- operations ----------------------------------------------------------------------------

    def parameter(self, weight, shape):
        """A parameter used as a tensor. Its memory is counted with the parameters."""
        x = self.node("parameter", [], shape, weight.dtype.itemsize, weights=[weight])
        x.storage = Value("0", 0, False)
        return x

    def view(self, x, shape, fresh=False):
        """Another shape on the same memory. `fresh`: the gradient of x is a new tensor, as it is
        for a slice, and for an expanded dimension, over which it is a sum."""
        y = self.node("view", [x], shape, x.width, fresh=fresh)
        y.storage = x.storage
        return y

    def copy(self, x, shape):
        """The same numbers in another order: a transpose made contiguous, repeated heads."""
        return self.node("copy", [x], shape, x.width)

    def cat(self, xs, shape):
        """Concatenate, in the widest type. The gradients of the parts are views."""
        width = max(x.width for x in xs)
        return self.node("cat", [self.cast(x, width) for x in xs], shape, width, fresh=False)

    def cast(self, x, width):
        """To another precision. Saves nothing, but makes a new tensor."""
        return x if x.width == width else self.node("cast", [x], x.shape, width)

    def add(self, x, y):
        return self.node("add", [x, y], x.shape, max(x.width, y.width), fresh=False)

    def scale(self, x):
        """Times a number."""
        return self.node("scale", [x], x.shape, x.width)

    def mul(self, x, y, name="product"):
        saved = [x] * y.grad + [y] * x.grad
        return self.node(name, [x, y], x.shape, max(x.width, y.width), saved)

    def matmul(self, x, y, shape, name):
        if self.autocast:
            x, y = self.cast(x, 2), self.cast(y, 2)
        return self.node(name, [x, y], shape, x.width, [x] * y.grad + [y] * x.grad)

    def linear(self, x, weight, out, bias=None, name="linear"):
        """y = x W. Saves x if W is trained; under autocast also the 16-bit copy of W if x requires
        a gradient. `out` is the symbol of the output features."""
        width = weight.dtype.itemsize
        saved = []
        if self.autocast:
            x = self.cast(x, 2)
            if width != 2 and x.grad:
                saved.append(Value(str(weight.numel()), 2, False))
            width = 2
        saved += [x] * weight.requires_grad
        shape = f"{x.shape.rsplit(' ', 1)[0]} {out}"
        return self.node(name, [x], shape, width, saved, [weight, bias])

    def linear_in_4_bits(self, x, weight_count, bias, out):
        """y = x W, where W is made from its codes forward and backward: saves nothing."""
        if self.autocast:
            x = self.cast(x, 2)
        shape = f"{x.shape.rsplit(' ', 1)[0]} {out}"
        y = self.node("4-bit", [x], shape, x.width, weights=[bias])
        self.nodes[-1].dequantised = weight_count
        return y

    def dropout(self, x, p):
        """Saves which elements were dropped: a byte each on CUDA, a factor each on the CPU."""
        if not p:
            return x
        mask = Value(x.shape, 1 if self.device == "cuda" else x.width, False)
        return self.node("dropout mask", [x], x.shape, x.width, [mask])

    def layer_norm(self, x, module, name):
        """One kernel: saves its input, and mean and 1/deviation of each position in float32."""
        rows = x.shape.rsplit(" ", 1)[0]
        saved = [x, Value(rows, 4, False), Value(rows, 4, False)]
        weights = [module.weight, module.bias]
        return self.node(f"{name} input", [x], x.shape, x.width, saved, weights)

    def rms_norm(self, x, module, name):
        """x / rms(x) * weight, in the single operations of transformers, in float32."""
        width, rows = x.width, x.shape.rsplit(" ", 1)[0]
        x = self.cast(x, 4)
        squares = self.node(f"{name} input", [x], x.shape, 4, [x])
        mean = self.node("mean", [squares], rows, 4)
        rms = self.node(f"{name} 1/rms", [mean], rows, 4, [OUTPUT])
        x = self.cast(self.mul(x, rms, f"{name} input"), width)
        width = max(width, module.weight.dtype.itemsize)
        saved = [x] * module.weight.requires_grad
        return self.node(f"{name} normed", [x], x.shape, width, saved, [module.weight])

    def activation(self, x, kind):
        """silu, gelu and Bloom's own save their input. gelu_new consists of eight operations
        and saves four tensors: x, tanh(...), 0.5 x and 1 + tanh(...). The derivative of Bloom's own
        is written in Python, and has five tensors at once."""
        if kind == "gelu_new":
            cube = self.node("gelu_new x", [x], x.shape, x.width, [x])
            inner = self.scale(self.add(x, self.scale(cube)))
            tanh = self.node("gelu_new tanh", [inner], x.shape, x.width, [OUTPUT])
            # 1 + tanh is a new tensor, unlike the gradient that passes through it
            shifted = self.node("shift", [tanh], x.shape, x.width, fresh=False)
            return self.mul(self.scale(x), shifted, "gelu_new factors")
        if kind not in ("silu", "gelu", "gelu_pytorch_tanh", "bloom"):
            raise ValueError(f"memory.estimate has no formula for the activation {kind!r}.")
        y = self.node(f"{kind} input", [x], x.shape, x.width, [x])
        self.nodes[-1].scratch = 5 if kind == "bloom" else 0
        return y

    def in_one_kernel(self, dropout):
        """Is attention fused? With dropout, on the CPU, torch falls back to single operations."""
        return self.fused and not (dropout and self.device == "cpu")

    def attention(self, q, k, v, dropout=0.0, upcast=True):
        """softmax(q k^T) v for q (b a s d), k and v (b a s d) or, with a prefix, (b a t d).
        Returns (b s h).

        Eager: the weights of all pairs, (b a s s), are saved as they leave the softmax, in float32
        with `upcast` or under autocast (and once more in 16 bits), and as they leave the dropout.
        Fused (Dao et al. 2022, "FlashAttention", section 3): q, k, v, the output and one number per
        row are saved instead, and on the CPU the mask as numbers.
        """
        if self.in_one_kernel(dropout):
            if self.autocast:
                q, k, v = (self.cast(x, 2) for x in (q, k, v))
            rows, mask = Value("b a s", 4, False), Value(f"b s {self.seen}", q.width, False)
            saved = [mask, q, k, v, rows, OUTPUT]
            y = self.node("fused attention", [q, k, v], "b s h", q.width, saved)
            return self.view(y, "b s h")
        autocast, width = self.autocast, 2 if self.autocast else v.width
        if self.fused:  # the fallback takes float32, scales q and k first, and knows no autocast
            q, k, v = (self.cast(x, 4) for x in (q, k, self.cast(v, width)))
            q, k, self.autocast = self.scale(q), self.scale(k), False
        scores = self.scale(self.matmul(q, k, f"b a s {self.seen}", "queries and keys"))
        scores = self.cast(scores, 4 if upcast or autocast else v.width)
        probs = self.node("softmax output", [scores], scores.shape, scores.width, [OUTPUT])
        probs = self.dropout(self.cast(probs, v.width), dropout)
        y = self.matmul(probs, v, "b a s d", "weights and values")
        self.autocast = autocast
        return self.copy(self.cast(y, width), "b s h")


OUTPUT = Value("", 0, False)  # stands for the node's own output in a list of saved values
