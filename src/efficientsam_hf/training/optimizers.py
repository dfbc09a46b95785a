# SPDX-License-Identifier: Apache-2.0
"""The optimisers of a run: AdamW, or Muon for the weights of linear layers with AdamW for everything else."""

import torch
from torch import nn

from .arguments import TrainerArguments
from .muon import StackedMuon


def make_optimizers(module: nn.Module, arguments: TrainerArguments, fused: bool) -> list[torch.optim.Optimizer]:
    """One optimiser, or two with `optimizer="muon"`, that share the trainable parameters between them.

    A group's "lr_scale" is its learning rate as a multiple of `learning_rate`. With `layer_decay` below 1 the module's
    `depths()`, layers above it by the name of a parameter, say how often a parameter's learning rate is multiplied by
    it. Muon multiplies matrices in bfloat16 where `mixed_precision` is "bf16". Raises ValueError if nothing is
    trainable.
    """
    depths = module.depths() if arguments.layer_decay < 1 else {}
    trained = {p: arguments.layer_decay ** depths.get(n, 0) for n, p in module.named_parameters() if p.requires_grad}
    if not trained:
        raise ValueError("module has no trainable parameter")
    matrices = _hidden_matrices(module) if arguments.optimizer == "muon" else set()
    others = [p for p in trained if p not in matrices]
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        optimizers.append(_adamw({p: trained[p] for p in others}, arguments, fused))
    if matrices:
        optimizers.append(_muon({p: scale for p, scale in trained.items() if p in matrices}, arguments))
    return optimizers


def _hidden_matrices(module: nn.Module) -> set[nn.Parameter]:
    """Weights of linear layers: what Muon is made for; embeddings, convolutions, norms and biases are not."""
    linear = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
    return {weight for weight in linear if weight.requires_grad}


def _by_scale(scales: dict[nn.Parameter, float]) -> dict[float, list[nn.Parameter]]:
    """Parameters in their order, by their multiple of the learning rate."""
    return {scale: [p for p, own in scales.items() if own == scale] for scale in sorted(set(scales.values()))}


def _adamw(scales: dict[nn.Parameter, float], arguments: TrainerArguments, fused: bool) -> torch.optim.AdamW:
    """AdamW; parameters with one dimension (biases, norms) are not decayed."""
    groups = []
    for scale, parameters in _by_scale(scales).items():
        decayed, free = [p for p in parameters if p.dim() > 1], [p for p in parameters if p.dim() <= 1]
        groups += [
            {"params": decayed, "weight_decay": arguments.weight_decay, "lr_scale": scale},
            {"params": free, "weight_decay": 0.0, "lr_scale": scale},
        ]
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas, fused=fused)


def _muon(scales: dict[nn.Parameter, float], arguments: TrainerArguments) -> StackedMuon:
    ratio = arguments.muon_learning_rate / arguments.learning_rate
    return StackedMuon(
        [{"params": matrices, "lr_scale": ratio * scale} for scale, matrices in _by_scale(scales).items()],
        lr=arguments.muon_learning_rate,
        weight_decay=arguments.weight_decay,
        dtype=torch.bfloat16 if arguments.mixed_precision == "bf16" else torch.float32,
    )
