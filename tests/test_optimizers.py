# SPDX-License-Identifier: Apache-2.0
"""Which optimiser trains which weight."""

import pytest
import torch
from torch import nn

from efficientsam_hf.training.arguments import TrainerArguments
from efficientsam_hf.training.optimizers import make_optimizers


def arguments(**changes) -> TrainerArguments:
    defaults = {"output_dir": "unused", "max_steps": 1, "learning_rate": 1e-3, "weight_decay": 0.1}
    return TrainerArguments(**(defaults | changes))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 2)
        self.table = nn.Embedding(4, 8)
        self.linear = nn.Linear(8, 16)
        self.frozen = nn.Linear(16, 4)
        self.frozen.requires_grad_(False)


def owned(optimizer: torch.optim.Optimizer, module: nn.Module) -> dict[str, float]:
    """Weight decay by the name of each parameter that the optimiser has."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_adamw_takes_everything_and_decays_no_biases() -> None:
    module = Mixed()
    (adamw,) = make_optimizers(module, arguments(), fused=False)
    assert owned(adamw, module) == {
        "conv.weight": 0.1, "table.weight": 0.1, "linear.weight": 0.1, "conv.bias": 0.0, "linear.bias": 0.0,
    }  # fmt: skip


def test_muon_takes_the_linear_weights_only() -> None:
    module = Mixed()
    adamw, muon = make_optimizers(module, arguments(optimizer="muon", muon_learning_rate=4e-3), fused=False)
    assert isinstance(muon, torch.optim.Muon) and owned(muon, module) == {"linear.weight": 0.1}
    assert set(owned(adamw, module)) == {"conv.weight", "table.weight", "conv.bias", "linear.bias"}
    assert muon.param_groups[0]["lr_scale"] == pytest.approx(4.0)


def test_muon_alone_where_all_is_linear_without_bias() -> None:
    (muon,) = make_optimizers(nn.Linear(4, 4, bias=False), arguments(optimizer="muon"), fused=False)
    assert isinstance(muon, torch.optim.Muon)


def test_learning_rates_fall_with_depth() -> None:
    class Deep(Mixed):
        def depths(self):
            return {"conv.weight": 2, "conv.bias": 2, "linear.weight": 1}

    module = Deep()
    adamw, muon = make_optimizers(
        module, arguments(optimizer="muon", muon_learning_rate=4e-3, layer_decay=0.5), fused=False
    )
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    scales = {
        names[id(p)]: group["lr_scale"]
        for optimizer in (adamw, muon)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    assert scales == {
        "conv.weight": 0.25, "conv.bias": 0.25, "linear.weight": 2.0, "linear.bias": 1.0, "table.weight": 1.0,
    }  # fmt: skip


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizers(Mixed().requires_grad_(False), arguments(), fused=False)


def test_unknown_optimizer_is_named() -> None:
    with pytest.raises(ValueError, match="optimizer must be one of adamw, muon, got 'sgd'"):
        arguments(optimizer="sgd")
