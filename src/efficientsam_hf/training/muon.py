# SPDX-License-Identifier: Apache-2.0
"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon) in few products of matrices."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class StackedMuon(torch.optim.Muon):
    """torch's Muon, with updates scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982).

    torch takes matrix by matrix, always in bfloat16, which CPUs without instructions for it emulate: a step of
    EfficientSAM-Ti then takes half a minute. Here `dtype` is what matrices are multiplied in. The state is that of
    `torch.optim.Muon`.
    """

    def __init__(self, params: Any, lr: float, weight_decay: float, dtype: torch.dtype = torch.float32):
        super().__init__(params, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape, parameter.dtype, parameter.device].append(parameter)
            for (shape, *_), parameters in alike.items():
                self._update(parameters, group, 0.2 * max(shape) ** 0.5)
        return loss

    def _update(self, parameters: list[nn.Parameter], group: dict[str, Any], scale: float) -> None:
        """One step of parameters of the same shape; `scale` makes their updates as large as AdamW's."""
        directions = torch.stack([self._direction(parameter, group) for parameter in parameters])
        directions = orthogonalize(directions, group["ns_coefficients"], group["ns_steps"], group["eps"], self.dtype)
        for parameter, direction in zip(parameters, directions):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(direction, alpha=-group["lr"] * scale)

    def _direction(self, parameter: nn.Parameter, group: dict[str, Any]) -> torch.Tensor:
        """Where momentum leads, (A, B)."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter.grad)
        average = state["momentum_buffer"].lerp_(parameter.grad, 1 - group["momentum"])
        return parameter.grad.lerp(average, group["momentum"]) if group["nesterov"] else average


def orthogonalize(
    matrices: torch.Tensor,
    coefficients: tuple[float, float, float],
    steps: int,
    eps: float,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Bring all singular values near 1 by Newton-Schulz iterations: (M, A, B) -> (M, A, B) float32.

    They come to lie between about 0.7 and 1.2, so that products in bfloat16 are exact enough (Jordan et al.).
    """
    a, b, c = coefficients
    wide = (matrices if matrices.shape[1] <= matrices.shape[2] else matrices.mT).float()
    # Of Tensor.norm torch warns on Apple's GPUs.
    wide = (wide / torch.linalg.vector_norm(wide, dim=(1, 2), keepdim=True).clamp(min=eps)).to(dtype)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    wide = wide.float()
    return wide if matrices.shape[1] <= matrices.shape[2] else wide.mT
