"""The memory of a training step: predicted from formulas, and measured."""

from minipeft.memory.estimate import PARTS, estimate
from minipeft.memory.measure import measure, saved_bytes

__all__ = ["PARTS", "estimate", "measure", "saved_bytes"]
