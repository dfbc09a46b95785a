# SPDX-License-Identifier: Apache-2.0
"""Attention as matrix products, for training on CPUs."""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface


MATRIX_PRODUCTS = "matrix_products"


def matrix_product_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention in the inputs' dtype throughout: (B, heads, L, d), (B, heads, S, d) x 2 -> (B, L, heads, d), None.

    On CPUs the backward pass of torch's fused kernel is slow for short sequences: in bfloat16, for 256 image tokens
    that attend to 8 prompt tokens, these two products take a fifth of its time, and within the encoder at 256 pixels
    half. The weights are held in memory, so on GPUs and for long sequences the fused kernel is the better one.
    """
    weights = torch.matmul(query * scaling, key.transpose(2, 3))
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.dropout(F.softmax(weights, dim=-1, dtype=query.dtype), p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2), None


def use_matrix_products(model: nn.Module) -> None:
    """Let a transformers model compute attention by `matrix_product_attention`; its saved config stays as it is."""
    AttentionInterface.register(MATRIX_PRODUCTS, matrix_product_attention)
    # Not through set_attn_implementation, which warns about every sub-config that has no model of its own.
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = MATRIX_PRODUCTS
