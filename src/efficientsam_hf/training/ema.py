# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of a module's parameters."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a tensor that FSDP has spread over processes (all must ask), and any other tensor itself."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


class WeightAverage:
    """Moving average of the trainable parameters in their own dtype, with a warm-up of the decay.

    Update n uses min(decay, (1 + n) / (10 + n)), so that the random initial weights are forgotten quickly. With decay
    0 the average is the parameters themselves and costs nothing.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self.updates = 0
        self.parameters = [p for p in module.parameters() if p.requires_grad] if decay > 0 else []
        self.averages = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the current parameters."""
        self.updates += 1
        if self.averages:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module holds the averages; its own weights come back afterwards."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, average in zip(self.parameters, self.averages):
            current = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(current)

    def state_dict(self) -> dict:
        # Gathered one by one to the CPU, or every process would hold all averages whole beside its weights.
        whole = [gathered(a).cpu() if hasattr(a, "full_tensor") else a for a in self.averages]
        return {"updates": self.updates, "averages": whole}

    def load_state_dict(self, state: dict) -> None:
        shapes = [[tuple(tensor.shape) for tensor in tensors] for tensors in (state["averages"], self.averages)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"averages of {len(shapes[0])} parameters, or of others than the {len(shapes[1])} here")
        self.updates = state["updates"]
        for average, saved in zip(self.averages, state["averages"]):
            if hasattr(average, "device_mesh"):  # spread by FSDP
                from torch.distributed.tensor import distribute_tensor

                saved = distribute_tensor(saved.to(average.device), average.device_mesh, average.placements)
            average.copy_(saved)
