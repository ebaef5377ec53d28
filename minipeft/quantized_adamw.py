"""AdamW with 8-bit moments (Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization").

    p <- p - lr * (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + weight_decay * p)

After each step the moments m and v are quantized block-wise with the dynamic code of section 1.3:
signed for m, unsigned for v, which is a mean of squares (section 2.2).
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from minipeft.quantization import BLOCK_8BIT, dequantize, dynamic_code, quantize, table
from minipeft.refusals import require


class AdamW8bit(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) with moments in 8 bits, in blocks of 256: 2.03 bytes per
    trainable parameter instead of 8. The update itself is computed in float32.

    Parameters of fewer than 4,096 elements keep float32 moments: they take little memory, and norms
    and biases are sensitive (8-bit Optimizers, section 2.3, says so of embeddings).

    Where the gradients of one block differ by a factor of some thousands, the small v round to zero
    while their m do not, and these parameters take steps far longer than AdamW's.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        try:
            beta1, beta2 = betas
            valid = eps > 0 and all(0 <= beta < 1 for beta in (beta1, beta2))
            valid = valid and all(0 <= value < math.inf for value in (lr, eps, weight_decay))
        except (TypeError, ValueError):
            valid = False
        require(
            valid,
            f"lr={lr}, betas={betas}, eps={eps} or weight_decay={weight_decay} is out of range.",
        )
        settings = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, settings)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Callable[[], float] | None = None
    ) -> float | None:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._update(p, group)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load without torch's cast of the state to the dtype of the parameter: codes are uint8,
        and moments and absmax float32 for any parameter."""
        super().load_state_dict(state_dict)
        keys = [key for group in state_dict["param_groups"] for key in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        for key, p in zip(keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if torch.is_tensor(value):
                    self.state[p][name] = value.to(p.device, copy=True)

    def _update(self, p, group):
        """Update the parameter p; its moments m and v have its shape."""
        state, (beta1, beta2) = self.state[p], group["betas"]
        state["step"] = state.get("step", 0) + 1
        m, v = (self._read(state, name, p) for name in ("m", "v"))
        m.lerp_(p.grad.float(), 1 - beta1)
        v.mul_(beta2).addcmul_(p.grad.float(), p.grad.float(), value=1 - beta2)
        self._write(state, "m", m)
        self._write(state, "v", v)
        v.sqrt_().div_(math.sqrt(1 - beta2 ** state["step"])).add_(group["eps"])
        p.mul_(1 - group["lr"] * group["weight_decay"])
        # Not in p's dtype: eps is 0 in float16, and 0 / 0 is NaN.
        p.addcdiv_(m, v, value=-group["lr"] / (1 - beta1 ** state["step"]))

    def _read(self, state, name, p):
        """The moment "m" or "v" of p, dequantized to float32; zeros before the first step."""
        if name not in state:
            return torch.zeros_like(p, dtype=torch.float32)
        if f"{name}_absmax" not in state:
            return state[name]
        code = table(dynamic_code, p, name == "m")
        return dequantize(state[name], state[f"{name}_absmax"], code, p.numel()).view(p.shape)

    def _write(self, state, name, moment):
        """Store a moment; a large one as uint8 codes (blocks, 256) and absmax (blocks,)."""
        if moment.numel() < 4096:
            state[name] = moment.clone()
        else:
            code = table(dynamic_code, moment, name == "m")
            state[name], state[f"{name}_absmax"] = quantize(moment, code, BLOCK_8BIT)
