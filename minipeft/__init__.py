"""minipeft: parameter-efficient fine-tuning from scratch, one short module per technique."""

from minipeft.batching import Batches, Collator, encode, padding_share, position_ids_from_mask
from minipeft.training import History, evaluate, train

__all__ = [
    "Batches",
    "Collator",
    "History",
    "encode",
    "evaluate",
    "padding_share",
    "position_ids_from_mask",
    "train",
]
