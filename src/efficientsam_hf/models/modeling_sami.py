# SPDX-License-Identifier: Apache-2.0
"""SAMI (Xiong et al., CVPR 2024, arXiv 2312.00863, section 3.1): masked image pretraining with a teacher's features.

The encoder sees a quarter of the patches; a decoder reconstructs, at every patch, what a teacher sees there.

Shapes: B images, N = h * w patches of which V are visible and M masked, C channels of the target, D and W the widths
of encoder and decoder. Patches count row by row.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_sami import SamiConfig
from .modeling_efficientsam_vision import (
    EfficientSamPreTrainedModel,
    EfficientSamVisionAttention,
    EfficientSamVisionEncoder,
    EfficientSamVisionLayer,
    check_keyword_arguments,
    eager_attention_forward,
    grid_size_of,
    sine_cosine_table,
)


@dataclass
class SamiForPreTrainingOutput(ModelOutput):
    """
    Args:
        loss (`torch.Tensor` of shape `(1,)`, *optional*):
            Distance of reconstruction and target, where there is a target.
        reconstruction (`torch.Tensor` of shape `(batch_size, num_patches, target_width)`):
            Prediction of the target, in the order of the image.
        mask (`torch.Tensor` of shape `(batch_size, num_patches)`):
            1 where the encoder did not see the patch, 0 where it did.
        ids_restore (`torch.Tensor` of shape `(batch_size, num_patches)`):
            Place of every patch in the shuffled order, whose first patches are the visible ones.
        hidden_states (`tuple(torch.Tensor)`, *optional*, with `output_hidden_states=True`):
            Input of every encoder block and output of the last, `(batch_size, 1 + num_visible, width)`.
        attentions (`tuple(torch.Tensor)`, *optional*, with `output_attentions=True`):
            Attention weights of every encoder block.
    """

    loss: torch.Tensor | None = None
    reconstruction: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ids_restore: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


class SamiDecoderAttention(nn.Module):
    """Attention of some tokens to others: (B, L, W), (B, S, W) -> (B, L, W)."""

    def __init__(self, config: SamiConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.decoder_width // config.decoder_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.decoder_width, config.decoder_width)
        self.k_proj = nn.Linear(config.decoder_width, config.decoder_width)
        self.v_proj = nn.Linear(config.decoder_width, config.decoder_width)
        self.out_proj = nn.Linear(config.decoder_width, config.decoder_width)

    def forward(
        self, queries: torch.Tensor, sources: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        projected = (self.q_proj(queries), self.k_proj(sources), self.v_proj(sources))
        query, key, value = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in projected)
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, _ = attention_interface(
            self, query, key, value, None, dropout=0.0, scaling=self.scaling, is_causal=False, **kwargs
        )
        return self.out_proj(attended.flatten(2))


class SamiDecoderMLP(nn.Module):
    def __init__(self, config: SamiConfig):
        super().__init__()
        hidden_dim = int(config.decoder_width * config.decoder_mlp_ratio)
        self.fc1 = nn.Linear(config.decoder_width, hidden_dim)
        self.activation = ACT2FN[config.vision_config.hidden_act]
        self.fc2 = nn.Linear(hidden_dim, config.decoder_width)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class SamiDecoderLayer(GradientCheckpointingLayer):
    """One pre-norm block: tokens attend to anchors and to each other, (B, L, W), (B, A, W) -> (B, L, W)."""

    def __init__(self, config: SamiConfig):
        super().__init__()
        eps = config.vision_config.layer_norm_eps
        self.norm1 = nn.LayerNorm(config.decoder_width, eps=eps)
        self.attention = SamiDecoderAttention(config)
        self.norm2 = nn.LayerNorm(config.decoder_width, eps=eps)
        self.mlp = SamiDecoderMLP(config)

    def forward(
        self, hidden_states: torch.Tensor, anchors: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> torch.Tensor:
        sources = self.norm1(torch.cat([anchors, hidden_states], dim=1))
        hidden_states = hidden_states + self.attention(sources[:, anchors.shape[1] :], sources, **kwargs)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class SamiDecoder(nn.Module):
    """Encoder outputs to a reconstruction at every patch.

    A linear layer brings encoder outputs to the decoder's width. Masked tokens begin as one learned token. With
    cross-attention they alone are decoded: the encoder outputs are anchors that no block changes, and are merged
    afterwards, without the decoder's positions, which the head has no use for. Norm and head see all tokens.
    """

    def __init__(self, config: SamiConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Linear(config.vision_config.hidden_size, config.decoder_width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.decoder_width))
        self.layers = nn.ModuleList(SamiDecoderLayer(config) for _ in range(config.decoder_depth))
        self.norm = nn.LayerNorm(config.decoder_width, eps=config.vision_config.layer_norm_eps)
        self.head = nn.Linear(config.decoder_width, config.target_width)

    def forward(
        self,
        encoded: torch.Tensor,
        ids_restore: torch.Tensor,
        grid_size: tuple[int, int],
        **kwargs: Unpack[TransformersKwargs],
    ) -> torch.Tensor:
        """CLS token and visible tokens (B, 1 + V, D), (B, N) -> (B, N, C) in the order of the image."""
        embedded = self.embed(encoded)
        cls_token, visible = embedded[:, :1], embedded[:, 1:]
        positions = sine_cosine_table(*grid_size, embedded.shape[-1], embedded.device).to(embedded.dtype)
        shuffled = positions[ids_restore.argsort(1)]
        masked = self.mask_token.to(embedded.dtype) + shuffled[:, visible.shape[1] :]
        anchors = visible + shuffled[:, : visible.shape[1]]
        # CODEPATH: on in pretraining as we read the paper, off to try the other reading
        if not self.config.decode_cls_token:
            cls_token = cls_token[:, :0]
        # CODEPATH: cross_attention in SAMI, full in MAE and in the paper's ablation
        if self.config.decoder == "cross_attention":
            anchors = torch.cat([cls_token, anchors], dim=1)
            tokens = torch.cat([visible, self._decode(masked, anchors, **kwargs)], dim=1)
        else:
            tokens = self._decode(torch.cat([cls_token, anchors, masked], dim=1), anchors[:, :0], **kwargs)
            tokens = tokens[:, cls_token.shape[1] :]
        return self.head(self.norm(take_tokens(tokens, ids_restore)))

    def _decode(self, hidden_states: torch.Tensor, anchors: torch.Tensor, **kwargs) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = layer(hidden_states, anchors, **kwargs)
        return hidden_states


class SamiForPreTraining(EfficientSamPreTrainedModel):
    """The encoder of EfficientSAM, its CLS token and final norm, and a decoder that reconstructs a target.

    `EfficientSamModel.from_sami` takes the encoder; everything else is dropped after pretraining (paper, section 3.1).
    """

    config: SamiConfig
    base_model_prefix = "sami"
    _no_split_modules = ["EfficientSamVisionLayer", "SamiDecoderLayer"]
    _can_record_outputs = {"hidden_states": EfficientSamVisionLayer, "attentions": EfficientSamVisionAttention}

    def __init__(self, config: SamiConfig):
        super().__init__(config)
        vision = config.vision_config
        self.vision_encoder = EfficientSamVisionEncoder(vision)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, vision.hidden_size))
        self.norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.decoder = SamiDecoder(config)
        self.post_init()
        self._choose_positions()

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """As every model's, and a position table that is not learned stays so: loading makes all parameters new."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._choose_positions()
        return loaded

    def _choose_positions(self) -> None:
        self.vision_encoder.embeddings.position_embeddings.requires_grad_(self.config.learn_positions)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, SamiForPreTraining):  # MAE
            init.normal_(module.cls_token, std=0.02)
        elif isinstance(module, SamiDecoder):
            init.normal_(module.mask_token, std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.get_input_embeddings()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor,
        target_features: torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> SamiForPreTrainingOutput:
        r"""
        Hide patches, encode the others, reconstruct all.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Normalised images; height and width are multiples of the patch size.
            target_features (`torch.Tensor` of shape `(batch_size, num_patches, target_width)`, *optional*):
                The teacher's features at each patch, row by row. Without them there is no loss. Not with
                `target="pixels"`, which takes the target from the images.
            noise (`torch.Tensor` of shape `(batch_size, num_patches)`, *optional*):
                The patches with the smallest numbers stay visible; drawn from torch's generator when left out.

        Raises:
            TypeError: on an unknown keyword argument.
            ValueError: if a shape does not fit, if the mask ratio leaves no visible or no masked patch of an image of
                this size, or if target features are given for a pixel target.
        """
        check_keyword_arguments(type(self).__name__, kwargs)
        patches = self.vision_encoder.embeddings(pixel_values)
        if noise is None:
            noise = torch.rand(patches.shape[:2], dtype=torch.float32, device=patches.device)
        self._check_shapes(patches, target_features, noise)
        visible_ids, ids_restore, mask = shuffle_patches(noise, self.config.num_visible(patches.shape[1]))
        encoded = self._encode(take_tokens(patches, visible_ids), **kwargs)
        grid_size = grid_size_of(pixel_values, self.config.vision_config.patch_size)
        reconstruction = self.decoder(encoded, ids_restore, grid_size, **kwargs)
        # CODEPATH: features in SAMI, pixels in MAE
        target = self.pixel_target(pixel_values) if self.config.target == "pixels" else target_features
        loss = None if target is None else self.reconstruction_loss(reconstruction, target, mask)
        return SamiForPreTrainingOutput(loss=loss, reconstruction=reconstruction, mask=mask, ids_restore=ids_restore)

    def encode(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """Features of whole images, nothing hidden: (B, 3, H, W) -> (B, 1 + N, D), the CLS token first."""
        return self._encode(self.vision_encoder.embeddings(pixel_values), **kwargs)

    def _encode(self, visible: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """(B, V, D) with positions -> (B, 1 + V, D), the CLS token first."""
        cls_position = self.vision_encoder.embeddings.position_embeddings[:, :1]
        cls_token = (self.cls_token + cls_position).to(visible.dtype)
        hidden_states = torch.cat([cls_token.expand(len(visible), -1, -1), visible], dim=1)
        for layer in self.vision_encoder.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return self.norm(hidden_states)

    def pixel_target(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels of each patch, row by row with the channels last, as MAE orders them: (B, 3, H, W) -> (B, N, C)."""
        size = self.config.vision_config.patch_size
        patches = pixel_values.float().unfold(2, size, size).unfold(3, size, size)
        patches = patches.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
        # CODEPATH: on in MAE as published, off in its ablation
        if self.config.normalize_pixels:
            variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
            patches = (patches - mean) / (variance + 1e-6).sqrt()
        return patches

    def reconstruction_loss(
        self, reconstruction: torch.Tensor, target: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        """(B, N, C) twice, (B, N) with 1 for masked -> scalar, in float32."""
        reconstruction, target = reconstruction.float(), target.float()
        # CODEPATH: mse in SAMI and MAE, cosine in the paper's ablation
        if self.config.loss == "mse":
            per_token = (reconstruction - target).square().mean(-1)
        else:
            per_token = 1 - F.cosine_similarity(reconstruction, target, dim=-1)
        # CODEPATH: all tokens in SAMI, masked ones in MAE
        if self.config.loss_tokens == "masked":
            return (per_token * mask).sum() / mask.sum()
        return per_token.mean()

    def _check_shapes(self, patches, target_features, noise) -> None:
        batch_size, num_patches = patches.shape[:2]
        if noise.shape != (batch_size, num_patches):
            raise ValueError(f"noise has shape {tuple(noise.shape)}, expected {(batch_size, num_patches)}")
        if target_features is None:
            return
        if self.config.target == "pixels":
            raise ValueError("target_features is given, but target is 'pixels': the images are their own target")
        expected = (batch_size, num_patches, self.config.target_width)
        if target_features.shape != expected:
            raise ValueError(f"target_features has shape {tuple(target_features.shape)}, expected {expected}")


def shuffle_patches(noise: torch.Tensor, visible: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Choose the `visible` patches of least noise: (B, N) -> ids (B, V), ids_restore (B, N), mask (B, N) float32."""
    ids_shuffle = noise.argsort(dim=1, stable=True)
    ids_restore = ids_shuffle.argsort(dim=1)
    return ids_shuffle[:, :visible], ids_restore, (ids_restore >= visible).float()


def take_tokens(tokens: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, N, D), (B, V) -> (B, V, D)."""
    return tokens.gather(1, ids.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


__all__ = ["SamiForPreTraining"]
