"""Walk through a `Graph`, forward and backward, and find the peak of the memory in use.

Sizes are in bytes. A composition is a `Counter` of bytes by part, such as {"activations": 2**20}.
"""

from collections import Counter

from minipeft.memory.graph import Graph
from minipeft.memory.nodes import Value


def saved_by_block(graph: Graph) -> list[tuple[str, str, int]]:
    """Rows (operation, shape, bytes) of the tensors that a block saves, each once. It is the second
    block, since the input of the first may need no gradient."""
    begin, end, _ = graph.blocks[min(1, len(graph.blocks) - 1)]
    rows, seen = [], set()
    for node in graph.nodes[begin:end]:
        for value in node.saved:
            if value.storage not in seen:
                seen.add(value.storage)
                rows.append((node.name, value.storage.shape, graph.bytes(value)))
    return rows


def forward_peak(graph: Graph) -> Counter[str]:
    """The composition at the peak of the forward pass, or of a block that is recomputed.

    Only nodes with temporaries count: those that dequantize a weight, or where Python variables
    keep tensors alive. Empty if there are none; then the loss or the backward pass needs more.
    """
    last_use = {x.storage: i for i, node in enumerate(graph.nodes) for x in node.inputs}
    last_use |= {x.storage: len(graph.nodes) for x in graph.cache}
    inputs = {begin: (end, x) for begin, end, x in graph.blocks}
    embedded = graph.blocks[0][2]
    saved, held = set(graph.shared), 0
    live: set[Value] = set()
    peak: Counter[str] = Counter()
    for i, node in enumerate(graph.nodes):
        if i in inputs:
            # Python variables: the embedded tokens, the input of the block, and that of its MLP
            end, x = inputs[i]
            named, held = {embedded.storage, x.storage}, graph.bytes(x)
            if graph.checkpointing:
                saved = set(graph.shared)
                saved |= {x.storage for begin, _, x in graph.blocks if begin <= i}
                end = _last_needed(graph, end)
                held = 2 * held + graph.bytes(graph.nodes[end].output)
        if node.held or node.dequantized and not (graph.checkpointing and i > end):
            now: Counter[str] = Counter(activations=sum(map(graph.bytes, saved)))
            if node.dequantized:
                now["temporaries"] = held + graph.dequantization(node, node.output)
            for value in (live | named | {x.storage for x in node.held}) - saved:
                now[_part(value, "temporaries")] += graph.bytes(value)
            peak = max(peak, now, key=Counter.total)
        saved |= {value.storage for value in node.saved}
        live = {v for v in live | {node.output.storage} if last_use.get(v, 0) > i}
    return peak


def backward_peaks(graph: Graph) -> tuple[dict[str, int], dict[str, Counter[str]]]:
    """Walk backward, freeing saved tensors and adding gradients.

    Returns the largest sizes of activations, logits and gradients, and the compositions at the
    peaks of the moments "loss" and "backward pass".
    """
    walk = _Backward(graph)
    walk.run()
    return walk.largest, walk.peaks


class _Backward:
    """The state of a backward pass at some node.

    now      bytes in use, by part
    uses     {storage: how many nodes still need it}
    flowing  {value: [bytes, users, part]}, the gradients not yet consumed; several values share one
             gradient where it is passed on
    """

    def __init__(self, graph):
        self.graph = graph
        self.recomputed = [b for b in graph.blocks if graph.checkpointing]  # (begin, end, input)
        inside = {i for begin, end, _ in self.recomputed for i in range(begin, end)}
        self.uses = _saved(node for i, node in enumerate(graph.nodes) if i not in inside)
        if graph.checkpointing:
            self.uses += Counter(x.storage for *_, x in graph.blocks)
            self.uses += Counter(graph.shared)
        self.now = Counter()
        for value in self.uses:
            self.now[_part(value, "activations")] += graph.bytes(value)
        self.largest = {"activations": self.now["activations"], "logits": 0, "gradients": 0}
        self.temporary = set()  # storages that a recomputed block saves
        loss = Counter(self.now)
        for value in {x.storage for x in graph.held} - set(self.uses):
            loss[_part(value, "temporaries")] += graph.bytes(value)
        self.peaks = {"loss": loss, "backward pass": Counter()}
        self.flowing, self.have_gradient = {}, set()

    def run(self):
        graph = self.graph
        ends = {_last_needed(graph, end): (begin, end) for begin, end, _ in self.recomputed}
        inputs = {begin: x for begin, _, x in self.recomputed}
        self.flowing[graph.nodes[-1].output] = [0, 1, "temporaries"]
        for i in range(len(graph.nodes) - 1, -1, -1):
            if i in ends:
                self.recompute(slice(*ends[i]))
            node = graph.nodes[i]
            gradient = self.flowing.pop(node.output, None)
            if gradient:
                moment = "loss" if i >= graph.blocks[-1][1] else "backward pass"
                self.differentiate(node, gradient, moment)
            for value in node.saved:
                self.free(value.storage)
            if i in inputs:
                self.free(inputs[i].storage)
        self.largest["gradients"] = self.now["gradients"]

    def recompute(self, block):
        """Recompute a block: the values that its nodes save are back, as temporaries."""
        for value, uses in _saved(self.graph.nodes[block]).items():
            if not self.uses[value]:
                self.temporary.add(value)
                self.now["temporaries"] += self.graph.bytes(value)
            self.uses[value] += uses

    def differentiate(self, node, gradient, moment):
        """Compute the gradients of a node's inputs and weights from that of its output."""
        scratch = node.scratch * self.graph.bytes(node.output)
        if node.inputs and node.inputs[0].grad:
            scratch += self.graph.dequantization(node, node.inputs[0])
        self.now["temporaries"] += scratch
        self.record_peak(moment)
        self.now["temporaries"] -= scratch
        for x in node.inputs:
            if x.grad:
                self.pass_on(node, x, gradient, moment)
        for weight in node.weights:
            size = weight.numel() * weight.dtype.itemsize
            tied = weight in self.have_gradient  # a second gradient, and the sum of both
            self.now["temporaries" if tied else "gradients"] += 2 * size if tied else size
        self.record_peak(moment)
        for weight in node.weights:
            if weight in self.have_gradient:
                self.now["temporaries"] -= 2 * weight.numel() * weight.dtype.itemsize
            self.have_gradient.add(weight)
        self.drop(gradient)

    def pass_on(self, node, x, gradient, moment):
        """Create the gradient of the input x, or pass on that of the output. If x has one already,
        the two are summed, in place unless that one is shared."""
        if node.fresh:
            part = _part(x, "temporaries")
            new = [self.graph.count(x.shape) * x.width, 1, part]
            self.now[part] += new[0]
        else:
            new = gradient
            gradient[1] += 1
        if x not in self.flowing:
            self.flowing[x] = new
            return
        old = self.flowing[x]
        self.record_peak(moment)
        self.drop(new)
        if old[1] > 1:
            old[1] -= 1
            self.flowing[x] = [old[0], 1, old[2]]
            self.now[old[2]] += old[0]

    def free(self, storage):
        self.uses[storage] -= 1
        if not self.uses[storage]:
            part = "temporaries" if storage in self.temporary else _part(storage, "activations")
            self.now[part] -= self.graph.bytes(storage)

    def drop(self, gradient):
        gradient[1] -= 1
        if not gradient[1]:
            self.now[gradient[2]] -= gradient[0]

    def record_peak(self, moment):
        if self.now.total() > self.peaks[moment].total():
            self.peaks[moment] = Counter(self.now)
        self.largest["logits"] = max(self.largest["logits"], self.now["logits"])


def _last_needed(graph, end):
    """The last node of the block that ends before `end` whose gradient needs a saved tensor.

    When the backward pass reaches it, checkpointing recomputes the block up to this node."""
    end -= 1
    while graph.nodes[end].dequantized or not graph.nodes[end].fresh:  # these save nothing
        end -= 1
    return end


def _saved(nodes):
    """{storage: how many nodes save it}."""
    return Counter(value.storage for node in nodes for value in node.saved)


def _part(value, other):
    """The part that a value counts as: logits are a part of their own, anything else is `other`."""
    return "logits" if "V" in value.storage.shape.split() else other
