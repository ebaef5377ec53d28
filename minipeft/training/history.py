"""The losses, learning rates and gradient norms of a training run, step by step."""

import json
import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from minipeft.refusals import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes  # optional at run time


def plain(number: Any) -> float:
    """A number of NumPy as Python's, which JSON can hold."""
    return number.item()


@dataclass
class History:
    """Losses, learning rates and gradient norms of a run.

    The lists have one entry per optimizer step, the eval lists one per evaluation. Losses are means
    over the targets: nats per target token for a language model, nats per row for a classifier, and
    so on (the table in loss.py). `grad_norm` is the norm before clipping, and inf where float16
    gradients overflowed and the step was skipped; `lr` has no unit.
    """

    train_loss: list[float] = field(default_factory=list)
    lr: list[float] = field(default_factory=list)
    grad_norm: list[float] = field(default_factory=list)
    eval_step: list[int] = field(default_factory=list)
    eval_loss: list[float] = field(default_factory=list)

    @property
    def best_step(self) -> int | None:
        """The step with the lowest evaluation loss, counted from 1; None without evaluations."""
        if not self.eval_loss:
            return None
        lowest = min(self.eval_loss, key=lambda loss: math.inf if math.isnan(loss) else loss)
        return self.eval_step[self.eval_loss.index(lowest)]

    def to_json(self) -> str:
        return json.dumps(asdict(self), default=plain)

    @classmethod
    def from_json(cls, text: str) -> "History":
        """The inverse of `to_json`. Raises ValueError for any other text."""
        try:
            history = cls(**json.loads(text))
            columns = asdict(history).values()
            if not all(isinstance(v, int | float) for column in columns for v in column):
                raise ValueError("not everything in it is a number")
            if len(history.eval_step) != len(history.eval_loss):
                raise ValueError("eval_step and eval_loss are not as long as each other")
        except (TypeError, ValueError) as error:
            raise ValueError(f"{shown(text)} is not a history in JSON: {error}.") from error
        return history

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Plot training and evaluation loss over the steps. Returns the axes."""
        if ax is None:
            from matplotlib import pyplot

            ax = pyplot.figure().add_subplot()
        steps = range(1, len(self.train_loss) + 1)
        ax.plot(steps, self.train_loss, color="#0072B2", linewidth=1, label="training")
        if self.eval_loss:
            ax.plot(self.eval_step, self.eval_loss, "o-", color="#D55E00", label="evaluation")
        ax.set_xlabel("optimizer step")
        ax.set_ylabel("loss (mean over targets)")
        ax.legend()
        return ax


class Results:
    """Losses and gradient norms that are still on the device.

    Reading one makes the host wait until the GPU has finished all queued work. So they are
    collected, and `read` moves them into the history together.
    """

    def __init__(self, history: History, call: dict[str, Any]) -> None:
        self.history, self.call = history, call
        # One tensor (3,) per step: loss, gradient norm, was the step skipped?
        self.unread: list[torch.Tensor] = []

    def append(self, loss: torch.Tensor, norm: torch.Tensor, skipped: torch.Tensor) -> None:
        self.unread.append(torch.stack([loss, norm.to(loss), skipped.to(loss)]))

    def read(self) -> None:
        """Raises FloatingPointError at the first step whose loss or gradients are not finite."""
        history, call = self.history, self.call
        for loss, norm, skipped in torch.stack(self.unread).tolist():
            if not math.isfinite(loss) or not (math.isfinite(norm) or skipped):
                raise FloatingPointError(
                    f"Step {len(history.train_loss) + 1}: the loss is {loss} and the gradient norm "
                    f"{norm}. Usual reasons: lr={call['lr']} is too high, warm-up is missing, the "
                    f"weights already hold NaN, or {call['precision']} overflowed. The weights are "
                    "those of the step before."
                )
            history.train_loss.append(loss)
            history.grad_norm.append(math.inf if skipped else norm)
        self.unread.clear()
