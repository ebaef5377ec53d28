"""minipeft: parameter-efficient fine-tuning from scratch, one short module per technique."""

from minipeft.adapter_files.folder import load_adapter, save_adapter
from minipeft.adapters import add_adapters
from minipeft.assets.datasets import load_dialogues, load_grades, load_instructions, load_reviews
from minipeft.assets.fetch import AssetError
from minipeft.assets.models import budget, load_base, pick_device
from minipeft.batching import Batches, Collator, encode, padding_share, position_ids_from_mask
from minipeft.distillation import distil_from, distillation_loss, student_from_layers
from minipeft.evaluation import classify, complete, wilson_interval
from minipeft.freezing import count_parameters, freeze, unfreeze
from minipeft.lora import add_lora, merge_lora, unload_lora, unmerge_lora
from minipeft.lora_variants import lora_plus_groups
from minipeft.p_tuning import add_p_tuning, fold_p_tuning
from minipeft.p_tuning_v2 import add_p_tuning_v2, fold_p_tuning_v2
from minipeft.prefix_tuning import add_prefix_tuning, fold_prefix_tuning
from minipeft.prompt_tuning import add_prompt_tuning, nearest_words
from minipeft.technique.record import disabled, remove
from minipeft.training.history import History
from minipeft.training.loop import evaluate, train

__all__ = [
    "AssetError",
    "Batches",
    "Collator",
    "History",
    "add_adapters",
    "add_lora",
    "add_p_tuning",
    "add_p_tuning_v2",
    "add_prefix_tuning",
    "add_prompt_tuning",
    "budget",
    "classify",
    "complete",
    "count_parameters",
    "disabled",
    "distil_from",
    "distillation_loss",
    "encode",
    "evaluate",
    "fold_p_tuning",
    "fold_p_tuning_v2",
    "fold_prefix_tuning",
    "freeze",
    "load_adapter",
    "load_base",
    "load_dialogues",
    "load_grades",
    "load_instructions",
    "load_reviews",
    "lora_plus_groups",
    "merge_lora",
    "nearest_words",
    "padding_share",
    "pick_device",
    "position_ids_from_mask",
    "remove",
    "save_adapter",
    "student_from_layers",
    "train",
    "unfreeze",
    "unload_lora",
    "unmerge_lora",
    "wilson_interval",
]
