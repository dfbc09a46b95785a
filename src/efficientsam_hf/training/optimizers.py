# SPDX-License-Identifier: Apache-2.0
"""The optimisers of a run: AdamW, or Muon for the weights of linear layers with AdamW for everything else."""

import torch
from torch import nn

from .arguments import TrainerArguments


def make_optimizers(module: nn.Module, arguments: TrainerArguments, fused: bool) -> list[torch.optim.Optimizer]:
    """One optimiser, or two with `optimizer="muon"`, that share the trainable parameters between them.

    A group's "lr_scale" is its learning rate as a multiple of `learning_rate`. Raises ValueError if nothing is
    trainable.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError("module has no trainable parameter")
    matrices = _hidden_matrices(module) if arguments.optimizer == "muon" else []
    taken = {id(p) for p in matrices}
    others = [p for p in parameters if id(p) not in taken]
    optimizers: list[torch.optim.Optimizer] = []
    if others:
        optimizers.append(_adamw(others, arguments, fused))
    if matrices:
        optimizers.append(_muon(matrices, arguments))
    return optimizers


def _hidden_matrices(module: nn.Module) -> list[nn.Parameter]:
    """Weights of linear layers: what Muon is made for; embeddings, convolutions, norms and biases are not."""
    linear = (m.weight for m in module.modules() if isinstance(m, nn.Linear))
    return [weight for weight in linear if weight.requires_grad]


def _adamw(parameters: list[nn.Parameter], arguments: TrainerArguments, fused: bool) -> torch.optim.AdamW:
    """AdamW; parameters with one dimension (biases, norms) are not decayed."""
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": arguments.weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    return torch.optim.AdamW(groups, lr=arguments.learning_rate, betas=betas, fused=fused)


def _muon(matrices: list[nn.Parameter], arguments: TrainerArguments) -> torch.optim.Muon:
    """Muon (Jordan et al. 2024) with updates scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982)."""
    scale = arguments.muon_learning_rate / arguments.learning_rate
    return torch.optim.Muon(
        [{"params": matrices, "lr_scale": scale}],
        lr=arguments.muon_learning_rate,
        weight_decay=arguments.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )
