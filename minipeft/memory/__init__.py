"""Bytes of a training step: predicted from formulas, estimate.py, and measured, measure.py."""

from minipeft.memory.estimate import PARTS, estimate, measure, saved_bytes

__all__ = ["PARTS", "estimate", "measure", "saved_bytes"]
