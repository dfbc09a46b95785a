# SPDX-License-Identifier: Apache-2.0
"""Which optimiser trains which weight."""

import copy

import pytest
import torch
from torch import nn

from efficientsam_hf.training.arguments import TrainerArguments
from efficientsam_hf.training.muon import StackedMuon, orthogonalize
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


@pytest.mark.parametrize("precision, dtype", [("no", torch.float32), ("bf16", torch.bfloat16)])
def test_muon_multiplies_as_the_run_does(precision: str, dtype: torch.dtype) -> None:
    (muon,) = make_optimizers(
        nn.Linear(4, 4, bias=False), arguments(optimizer="muon", mixed_precision=precision), False
    )
    assert muon.dtype == dtype


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


NEWTON_SCHULZ = {"coefficients": (3.4445, -4.7750, 2.0315), "steps": 5, "eps": 1e-7}


def newton_schulz(matrix: torch.Tensor) -> torch.Tensor:
    """As the method's author writes it, in float64: (A, B) -> (A, B) with A <= B."""
    a, b, c = NEWTON_SCHULZ["coefficients"]
    x = matrix.double() / matrix.double().norm()
    for _ in range(NEWTON_SCHULZ["steps"]):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(16, 16), (8, 40), (1, 5), (96, 384)])
@pytest.mark.parametrize("decay", [0.0, 1.0, 3.0, 30.0], ids=["round", "uneven", "nearly singular", "rank one"])
def test_stacks_are_orthogonalized_as_single_matrices(shape: tuple[int, int], decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    scales = 10 ** -(decay * torch.linspace(0, 1, shape[0]))
    stack = torch.randn(3, *shape, generator=generator) * scales[:, None]
    expected = torch.stack([newton_schulz(matrix) for matrix in stack]).float()
    torch.testing.assert_close(orthogonalize(stack, **NEWTON_SCHULZ), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(orthogonalize(stack.mT, **NEWTON_SCHULZ), expected.mT, rtol=0, atol=2e-3)


def test_a_gradient_of_zeros_is_no_update() -> None:
    assert not orthogonalize(torch.zeros(2, 4, 6), **NEWTON_SCHULZ).any()


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-3), (torch.bfloat16, 2e-2)], ids=str)
def test_stacked_muon_takes_the_steps_of_torch(monkeypatch, dtype: torch.dtype, error: float) -> None:
    """Where torch computes in float32 too, and in its own bfloat16; the state of one goes on in the other."""
    if dtype == torch.float32:
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.float)
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((6, 10), (10, 6), (6, 10), (8, 8))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    stacked = StackedMuon([{"params": ours[:2]}, {"params": ours[2:]}], lr=0.02, weight_decay=0.1, dtype=dtype)
    plain = torch.optim.Muon(
        [{"params": theirs[:2]}, {"params": theirs[2:]}], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"
    )
    start = [p.detach().clone() for p in ours]
    for step in range(6):
        for own, other in zip(ours, theirs):
            own.grad = torch.randn_like(own)
            other.grad = own.grad.clone()
        ours[0].grad = theirs[0].grad = None if step == 2 else ours[0].grad
        stacked.step()
        plain.step()
        if step == 3:
            stacked.load_state_dict(copy.deepcopy(plain.state_dict()))
    for own, other, before in zip(ours, theirs, start):
        assert (own - other).norm() < error * (own - before).norm()
    assert all(p.dtype == torch.float32 for p in ours)
