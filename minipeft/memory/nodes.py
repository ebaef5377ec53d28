"""The tensors and operations that a `Graph` consists of.

Shapes are written in symbols, so that the size of a saved tensor is a readable formula: b batch,
s sequence, h hidden, a heads, k key-value heads, d head size, i inner size of the MLP,
V vocabulary. With virtual tokens also n, their number, w the tokens of the text, t the positions
that attention sees, l those that get logits.
"""

from dataclasses import dataclass, field

from torch import nn


@dataclass(eq=False)
class Value:
    """A tensor of the graph; it is never allocated.

    shape    symbols and numbers, such as "b s 3 h"
    width    bytes per element
    grad     does it require a gradient?
    storage  for a view the value whose memory it shares, otherwise the value itself
    """

    shape: str
    width: int
    grad: bool
    storage: "Value" = field(init=False)

    def __post_init__(self) -> None:
        self.storage = self


@dataclass(eq=False)
class Node:
    """One operation: its inputs, its output, and the values it saves for the backward pass.

    weights      parameters whose gradient is computed here
    fresh        True if the gradients of the inputs are new tensors, as for a product; False if the
                 gradient of the output is passed on, as for a sum or a view
    dequantized  elements of a 4-bit weight that is dequantized here, forward and backward
    scratch      temporaries of its backward pass, in tensors of the size of the output
    held         values that Python variables keep alive here without being saved, if they matter
    """

    name: str
    inputs: list[Value]
    output: Value
    saved: list[Value]
    weights: list[nn.Parameter] = field(default_factory=list)
    fresh: bool = True
    dequantized: int = 0
    scratch: int = 0
    held: list[Value] = field(default_factory=list)


OUTPUT = Value("", 0, False)  # stands for the node's own output in a list of saved values
