"""The computation graph of a training step, without tensors: which operation saves which tensor.

That follows from the derivative. The gradient of one factor of a product needs the other factor:

    y = x W        dx needs W, dW needs x: x is saved only if W is trained
    y = a * b      da needs b, db needs a
    y = softmax(x) dx needs y
    y = x + c      needs nothing
"""

from collections.abc import Iterable

from torch import nn

from minipeft.memory.nodes import OUTPUT, Node, Value


class Graph:
    """Records a forward pass as a list of nodes. Each operation returns its output as a `Value`.

    dims           the number for each symbol
    autocast       do matrix products run in 16 bits?
    fused          is attention one kernel, which saves no scores?
    checkpointing  are blocks recomputed in the backward pass?
    device         "cpu" or "cuda": per element, a dropout mask takes one byte on CUDA, and as many
                   bytes as its tensor on the CPU
    """

    def __init__(
        self,
        dims: dict[str, int],
        autocast: bool = False,
        fused: bool = True,
        checkpointing: bool = False,
        device: str = "cpu",
    ) -> None:
        self.dims, self.autocast, self.fused = dims, autocast, fused
        self.checkpointing, self.device = checkpointing, device
        self.seen = "t" if "t" in dims else "s"  # the positions that attention sees
        self.where = ""  # prefix of the names of new nodes
        self.nodes: list[Node] = []
        self.blocks: list[tuple[int, int, Value]] = []  # first node, node after the last, input
        self.shared: list[Value] = []  # created once for all blocks; checkpointing keeps them
        self.cache: list[Value] = []  # keys and values of all layers
        self.held: list[Value] = []  # kept alive to the end of the forward pass by a cache

    def begin_block(self, x: Value) -> None:
        """Start a block with the input x."""
        self.blocks.append((len(self.nodes), len(self.nodes), x))

    def end_block(self) -> None:
        """End the block at the last node so far."""
        begin, _, x = self.blocks[-1]
        self.blocks[-1] = (begin, len(self.nodes), x)

    def count(self, shape: str) -> int:
        """The number of elements of a shape such as "b s h" or "b s 3 h"."""
        n = 1
        for symbol in shape.split():
            n *= self.dims[symbol] if symbol in self.dims else int(symbol)
        return n

    def bytes(self, value: Value) -> int:
        """The size of a value's storage, in bytes."""
        return self.count(value.storage.shape) * value.storage.width

    def dequantization(self, node: Node, product: Value) -> int:
        """Bytes in use while a 4-bit weight is dequantized and multiplied; 0 for other nodes.

        First the codes as int32 and the float32 values, then these and the weight in the dtype of
        the product, last the weight and the product.
        """
        n, width = node.dequantized, node.output.width
        result = self.count(product.shape) * product.width
        return max(n * (6 if width == 4 else 4 + width), n * width + result) if n else 0

    def node(
        self,
        name: str,
        inputs: list[Value],
        shape: str,
        width: int,
        saved: Iterable[Value] = (),
        weights: Iterable[nn.Parameter | None] = (),
        fresh: bool = True,
    ) -> Value:
        """Record one operation. `OUTPUT` in `saved` stands for the operation's own output."""
        trained = [w for w in weights if w is not None and w.requires_grad]
        grad = any(x.grad for x in inputs) or bool(trained)
        output = Value(shape, width, grad)
        kept = [output if x is OUTPUT else x for x in saved] if grad else []
        name = f"{self.where}: {name}" if self.where else name
        self.nodes.append(Node(name, inputs, output, kept, trained, fresh))
        return output

    # ---- operations ----------------------------------------------------------------------------

    def parameter(self, weight: nn.Parameter, shape: str) -> Value:
        """A parameter used as a tensor. Its memory is counted with the parameters."""
        x = self.node("parameter", [], shape, weight.dtype.itemsize, weights=[weight])
        x.storage = Value("0", 0, False)
        return x

    def view(self, x: Value, shape: str, fresh: bool = False) -> Value:
        """Another shape on the same memory. `fresh`: the gradient of x is a new tensor, as for a
        slice or an expanded dimension."""
        y = self.node("view", [x], shape, x.width, fresh=fresh)
        y.storage = x.storage
        return y

    def copy(self, x: Value, shape: str) -> Value:
        """The same numbers in new memory: a transpose made contiguous, repeated heads."""
        return self.node("copy", [x], shape, x.width)

    def cat(self, xs: Iterable[Value], shape: str) -> Value:
        """Concatenate, in the widest dtype. The gradients of the inputs are views."""
        width = max(x.width for x in xs)
        return self.node("cat", [self.cast(x, width) for x in xs], shape, width, fresh=False)

    def cast(self, x: Value, width: int) -> Value:
        """To another precision. Saves nothing, but creates a new tensor."""
        return x if x.width == width else self.node("cast", [x], x.shape, width)

    def add(self, x: Value, y: Value) -> Value:
        """x + y, which saves nothing."""
        return self.node("add", [x, y], x.shape, max(x.width, y.width), fresh=False)

    def scale(self, x: Value) -> Value:
        """x times a number, which saves nothing."""
        return self.node("scale", [x], x.shape, x.width)

    def mul(self, x: Value, y: Value, name: str = "product") -> Value:
        """x * y, elementwise. Saves each factor if the other requires a gradient."""
        saved = [x] * y.grad + [y] * x.grad
        return self.node(name, [x, y], x.shape, max(x.width, y.width), saved)

    def matmul(self, x: Value, y: Value, shape: str, name: str) -> Value:
        """x y, which saves what `mul` saves, under autocast in 16 bits."""
        if self.autocast:
            x, y = self.cast(x, 2), self.cast(y, 2)
        return self.node(name, [x, y], shape, x.width, [x] * y.grad + [y] * x.grad)

    def linear(
        self,
        x: Value,
        weight: nn.Parameter,
        out: str,
        bias: nn.Parameter | None = None,
        name: str = "linear",
    ) -> Value:
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

    def linear_in_4_bits(
        self, x: Value, weight_count: int, bias: nn.Parameter | None, out: str
    ) -> Value:
        """y = x W, where W is dequantized in the forward and the backward pass: saves nothing."""
        if self.autocast:
            x = self.cast(x, 2)
        shape = f"{x.shape.rsplit(' ', 1)[0]} {out}"
        y = self.node("4-bit", [x], shape, x.width, weights=[bias])
        self.nodes[-1].dequantized = weight_count
        return y

    def dropout(self, x: Value, p: float) -> Value:
        """Saves the mask: one byte per element on CUDA, one factor per element on the CPU."""
        if not p:
            return x
        mask = Value(x.shape, 1 if self.device == "cuda" else x.width, False)
        return self.node("dropout mask", [x], x.shape, x.width, [mask])

    def layer_norm(self, x: Value, module: nn.LayerNorm, name: str) -> Value:
        """One kernel: saves its input, and each position's mean and 1/std in float32."""
        rows = x.shape.rsplit(" ", 1)[0]
        saved = [x, Value(rows, 4, False), Value(rows, 4, False)]
        weights = [module.weight, module.bias]
        return self.node(f"{name} input", [x], x.shape, x.width, saved, weights)

    def rms_norm(self, x: Value, module: nn.Module, name: str) -> Value:
        """x / rms(x) * weight in float32, in the single operations of transformers."""
        weight = module.get_parameter("weight")
        width, rows = x.width, x.shape.rsplit(" ", 1)[0]
        x = self.cast(x, 4)
        squares = self.node(f"{name} input", [x], x.shape, 4, [x])
        mean = self.node("mean", [squares], rows, 4)
        rms = self.node(f"{name} 1/rms", [mean], rows, 4, [OUTPUT])
        x = self.cast(self.mul(x, rms, f"{name} input"), width)
        width = max(width, weight.dtype.itemsize)
        saved = [x] * weight.requires_grad
        return self.node(f"{name} normed", [x], x.shape, width, saved, [weight])

    def activation(self, x: Value, kind: str) -> Value:
        """silu, gelu and Bloom's own gelu save their input. gelu_new consists of eight operations
        and saves four tensors: x, tanh(...), 0.5 x and 1 + tanh(...). The backward pass of Bloom's
        gelu is written in Python and has five temporaries at once."""
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

    def in_one_kernel(self, dropout: float) -> bool:
        """Is attention fused? With dropout, on the CPU, torch falls back to single operations."""
        return self.fused and not (dropout and self.device == "cpu")

    def attention(
        self, q: Value, k: Value, v: Value, dropout: float = 0.0, upcast: bool = True
    ) -> Value:
        """softmax(q k^T) v for q (b a s d), k and v (b a s d) or, with a prefix, (b a t d).
        Returns (b s h).

        Eager: saves the attention weights (b a s s) after the softmax, in float32 with `upcast` or
        under autocast (and once more in 16 bits), and after the dropout.
        Fused (Dao et al. 2022, "FlashAttention", section 3): saves q, k, v, the output and one
        number per row instead, and on the CPU the mask as numbers.
        """
        if self.in_one_kernel(dropout):
            if self.autocast:
                q, k, v = (self.cast(x, 2) for x in (q, k, v))
            rows, mask = Value("b a s", 4, False), Value(f"b s {self.seen}", q.width, False)
            saved = [mask, q, k, v, rows, OUTPUT]
            y = self.node("fused attention", [q, k, v], "b s h", q.width, saved)
            return self.view(y, "b s h")
        autocast, width = self.autocast, 2 if self.autocast else v.width
        if self.fused:  # the fallback runs in float32 also under autocast, and scales q and k first
            q, k, v = (self.cast(x, 4) for x in (q, k, self.cast(v, width)))
            q, k, self.autocast = self.scale(q), self.scale(k), False
        scores = self.scale(self.matmul(q, k, f"b a s {self.seen}", "queries and keys"))
        scores = self.cast(scores, 4 if upcast or autocast else v.width)
        probs = self.node("softmax output", [scores], scores.shape, scores.width, [OUTPUT])
        probs = self.dropout(self.cast(probs, v.width), dropout)
        y = self.matmul(probs, v, "b a s d", "weights and values")
        self.autocast = autocast
        return self.copy(self.cast(y, width), "b s h")
