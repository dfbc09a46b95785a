# SPDX-License-Identifier: Apache-2.0
"""Low-rank adapters (Hu et al. 2021) through PEFT, and the weights that they add up to."""

from collections.abc import Sequence

import torch
from torch import nn


def add_adapters(model: nn.Module, submodules: Sequence[str], rank: int, alpha: float) -> None:
    """Put an adapter at every linear layer of these submodules of the model and freeze everything else in them.

    What lies outside them stays trainable or frozen as it was. At first the adapters change nothing. Raises
    ImportError without PEFT, and ValueError if there is no linear layer.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("adapters are those of PEFT: pip install 'efficientsam-hf[train]'") from error
    inside = tuple(f"{name}." for name in submodules)
    layers = [name for name, part in model.named_modules() if isinstance(part, nn.Linear) and name.startswith(inside)]
    if not layers:
        raise ValueError(f"there is no linear layer in {', '.join(submodules)} to put an adapter at")
    outside = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith(inside)]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=layers), model)
    for parameter in outside:  # PEFT freezes the whole model
        parameter.requires_grad_(True)


def merged_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights, in float32 sums with their adapters, by the names they have without adapters."""
    state = model.state_dict()
    for prefix, layer in [(name, part) for name, part in model.named_modules() if hasattr(part, "lora_A")]:
        weight = state[f"{prefix}.base_layer.weight"]
        with torch.autocast(weight.device.type, enabled=False):
            for name, scale in layer.scaling.items():
                change = layer.lora_B[name].weight.float() @ layer.lora_A[name].weight.float()
                weight = (weight.float() + scale * change).to(weight.dtype)
        state[f"{prefix}.base_layer.weight"] = weight
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}
