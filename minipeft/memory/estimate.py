"""Predict the memory of a training step from the configuration alone.

    bytes = parameters + gradients + optimizer state + activations + logits + inputs + temporaries
            + on CUDA, the workspace of cuBLAS

The formulas are in layers.py, operation by operation. The parts do not reach their largest sizes at
the same time: activations are freed while gradients are allocated. So `total`, the peak, is less
than the sum of the parts. It occurs at the loss, in the backward pass of a block, or in the
optimizer step (walk.py).
"""

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers import PretrainedConfig

from minipeft.memory.cuda import workspace
from minipeft.memory.graph import Graph
from minipeft.memory.layers import BLOCKS
from minipeft.memory.settings import Method, build_without_numbers, check_settings, storage_bytes
from minipeft.memory.virtual_tokens import lengths
from minipeft.memory.walk import backward_peaks, forward_peak, saved_by_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # optional at run time

PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "inputs", "temporaries")
UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass
class Memory:
    """Bytes of one training step.

    parts    {name: the largest size of this part during the step}; None if not measured separately
    total    the peak: the most bytes in use at one moment
    at_peak  {name: the size of this part at the peak}, summing to `total`; empty if measured
    moment   when the peak occurs: "forward pass" (with 4-bit weights, or long sequences in Bloom),
             "loss", "backward pass" or "optimizer step"
             (measured: "loss or backward pass" for the first three)
    kept     rows (operation, shape, bytes) of the tensors one block saves; empty if measured
    """

    parts: dict[str, int | None]
    total: int
    at_peak: dict[str, int]
    moment: str
    kept: list[tuple[str, str, int]]

    def __str__(self) -> str:
        unit = next((u for u in ("GiB", "MiB", "KiB") if self.total >= UNITS[u]), "B")
        lines = [f"{'':14}{'largest':>12}{'at the peak':>14}   {unit}"]
        for name, size in self.parts.items():
            if size is not None:
                at_peak = f"{self.at_peak[name] / UNITS[unit]:14.3f}" if self.at_peak else " " * 14
                lines.append(f"{name:14}{size / UNITS[unit]:12.3f}{at_peak}")
        lines.append(f"{'total':14}{'':12}{self.total / UNITS[unit]:14.3f}   at the {self.moment}")
        return "\n".join(lines)

    def block(self) -> str:
        """A table, as text, of the tensors that one block saves, largest first."""
        lines = [f"{'operation':44}{'shape':12}{'bytes':>14}"]
        for name, shape, size in sorted(self.kept, key=lambda row: -row[2]):
            lines.append(f"{name:44}{shape:12}{size:14,}")
        lines.append(f"{'one block':56}{sum(row[2] for row in self.kept):14,}")
        return "\n".join(lines)

    def plot(self, ax: "Axes | None" = None, label: str = "", unit: str = "GiB") -> "Axes":
        """Add a stacked bar of the parts at the peak to the axes. Returns the axes."""
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure().add_subplot()
        colors = ("#737373", "#147349", "#B98803", "#0B7FC7", "#8E3B9E", "#000000", "#B94500",
                  "#BBBBBB")  # fmt: skip
        bottom, first = 0.0, not ax.patches
        sizes = (self.at_peak or self.parts).items()
        for (name, nbytes), color in zip(sizes, colors, strict=False):
            size = (nbytes or 0) / UNITS[unit]
            ax.bar([label], [size], bottom=bottom, color=color, label=name if first else None)
            bottom += size
        ax.set_ylabel(f"memory ({unit})")
        return ax


def estimate(
    config: PretrainedConfig,
    method: Method | None = None,
    *,
    batch: int = 1,
    seq: int = 128,
    optimizer: str = "adamw",
    precision: str = "float32",
    attention: str = "fused",
    checkpointing: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> Memory:
    """Predict the memory of one training step, without allocating any.

    config         a transformers configuration of a causal language model (Llama, Qwen2, Mistral,
                   GPT-2, Bloom)
    method         a function that prepares the model: lambda model: add_lora(model, r=8); None
                   trains every parameter
    batch, seq     rows, and tokens per row, to which virtual tokens are added; the batch is padded,
                   and all tokens count as targets
    optimizer      "adamw" (two moments, each as large as the trainable parameters; the fused
                   kernel, as in `train`), "adamw-foreach" (torch's default on CUDA: temporaries as
                   large as these during the step), "adamw8bit", or "sgd" (no state)
    precision      "float32", or "bfloat16" for autocast; the weights keep their dtype
    attention      "fused" or "eager"
    checkpointing  save only the input of each block, and recompute the block in the backward pass
    dtype          of the base weights
    device         "cpu" or "cuda": dropout masks, attention with dropout and the workspace differ

    Sources: Rajbhandari et al. 2020 (ZeRO), section 3.1, for parameters, gradients and optimizer;
    Korthikanti et al. 2022, section 4, for activations.
    Raises ValueError for an architecture, layer or setting that has no formula here.
    """
    check_settings(
        method, batch, seq, checkpointing, dtype,
        optimizer=optimizer, precision=precision, attention=attention, device=device,
    )  # fmt: skip
    if not isinstance(config, PretrainedConfig):
        raise ValueError(
            "memory.estimate takes a configuration of transformers, such as model.config; it was "
            f"given a {type(config).__name__}."
        )
    if config.model_type not in BLOCKS:
        raise ValueError(
            f"memory.estimate has no formulas for {config.model_type!r}, only for "
            f"{', '.join(BLOCKS)}; memory.measure needs none."
        )
    model = build_without_numbers(config, method, dtype, attention)
    if model._forward_pre_hooks and not hasattr(model, "virtual_tokens"):
        raise ValueError(
            "memory.estimate has no formulas for a method that changes the input of the model, "
            "other than virtual tokens; memory.measure needs none."
        )
    graph = Graph(
        _dims(config, batch) | lengths(model, seq),
        autocast=precision == "bfloat16",
        fused=attention == "fused",
        checkpointing=checkpointing,
        device=device,
    )
    BLOCKS[config.model_type](graph, model, config)

    fixed = {
        "parameters": storage_bytes([*model.parameters(), *model.buffers()]),
        "optimizer": _state_bytes(model, optimizer),
        "inputs": 3 * 8 * batch * seq,  # token ids, mask and labels, in int64
    }
    if device == "cuda":
        fixed["workspace"] = workspace()
    largest, moments = backward_peaks(graph)
    moments["forward pass"] = forward_peak(graph)
    moments["optimizer step"] = Counter(
        gradients=largest["gradients"], temporaries=_bytes_of_step(model, optimizer)
    )
    moment = max(moments, key=lambda name: moments[name].total())
    at_peak = Counter(fixed) + moments[moment]
    parts = {name: max(m[name] for m in moments.values()) for name in PARTS} | fixed | largest
    names = [name for name in (*PARTS, "workspace") if name in parts]
    return Memory(
        parts={name: parts[name] for name in names},
        total=at_peak.total(),
        at_peak={name: at_peak[name] for name in names},
        moment=moment,
        kept=saved_by_block(graph),
    )


def _dims(config, batch):
    """The number for each symbol of nodes.py except the lengths."""
    heads = config.num_attention_heads
    return {
        "b": batch,
        "h": config.hidden_size,
        "a": heads,
        "k": getattr(config, "num_key_value_heads", heads),
        "d": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "i": getattr(config, "intermediate_size", None)
        or getattr(config, "n_inner", None)
        or 4 * config.hidden_size,
        "V": config.vocab_size,
    }


def _state_bytes(model, optimizer):
    """Bytes of the optimizer's state. AdamW keeps two moments in the parameter's dtype. In 8 bits,
    they are whole blocks of 256 codes with one float32 each, or float32 for a parameter of fewer
    than 4,096 elements (quantized_adamw.py)."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw8bit":
        counts = [p.numel() for p in trainable]
        return sum(2 * -(-n // 256) * (256 + 4) if n >= 4096 else 8 * n for n in counts)
    return sum(2 * p.nbytes for p in trainable)


def _bytes_of_step(model, optimizer):
    """Temporary bytes of the optimizer step. foreach: sqrt(v) of all parameters at once. In 8 bits,
    one parameter at a time: both moments in float32, and 10 bytes per element to quantize the
    second."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    if optimizer == "adamw-foreach":
        return sum(p.nbytes for p in trainable)
    return 18 * max(p.numel() for p in trainable) if optimizer == "adamw8bit" else 0
