"""minipeft: parameter-efficient fine-tuning from scratch, one short module per technique."""

from minipeft.training import History, evaluate, train

__all__ = [
    "History",
    "evaluate",
    "train",
]
