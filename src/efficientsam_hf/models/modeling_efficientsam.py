# SPDX-License-Identifier: Apache-2.0
"""EfficientSAM (Xiong et al., CVPR 2024, arXiv 2312.00863): a plain ViT encoder and SAM's promptable mask decoder.

Shapes: B images, Q objects ("prompts") an image, P points an object, T prompt tokens an object, C channels,
N = h * w image tokens, where h and w are the input's height and width divided by the patch size. Coordinates are model
pixels: x to the right, y down, in the frame of `pixel_values`, the centre of the first pixel at (0, 0).
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForPreTraining
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .checks_efficientsam import LARGEST, check_finite, check_tensor, largest, short
from .configuration_efficientsam import (
    EfficientSamConfig,
    EfficientSamMaskDecoderConfig,
    EfficientSamPromptEncoderConfig,
)
from .modeling_efficientsam_vision import (
    EfficientSamLayerNorm2d,
    EfficientSamPositionalEncoding,
    EfficientSamPreTrainedModel,
    EfficientSamVisionEncoder,
    EfficientSamVisionNeck,
    check_keyword_arguments,
    check_pixels,
    eager_attention_forward,
    grid_size_of,
)


BOX_LOGIT = 8.0  # of a filled box; checkpoints are trained with it
NO_PROMPT = "no prompt: expected at least one of input_points, input_boxes and input_masks"


@dataclass
class EfficientSamImageSegmentationOutput(ModelOutput):
    """
    Args:
        iou_scores (`torch.Tensor` of shape `(batch_size, num_objects, num_masks)`):
            Predicted IoU of every mask with the object.
        pred_masks (`torch.Tensor` of shape `(batch_size, num_objects, num_masks, height, width)`):
            Low-resolution logits, a quarter of the input's height and width; `post_process_masks` of the processor
            brings them to the image.
        object_mask (`torch.Tensor` of shape `(batch_size, num_objects)`):
            True where the object has a prompt, False where it only pads the batch.
        vision_hidden_states (`tuple(torch.Tensor)`, *optional*, with `output_hidden_states=True`):
            Input of every encoder block and output of the last, each of shape `(batch_size, num_patches, width)`.
        vision_attentions (`tuple(torch.Tensor)`, *optional*, with `output_attentions=True`):
            Attention weights of every encoder block.
        mask_decoder_attentions (`tuple(torch.Tensor)`, *optional*, with `output_attentions=True`):
            Attention weights of every attention in the mask decoder.
    """

    iou_scores: torch.Tensor | None = None
    pred_masks: torch.Tensor | None = None
    object_mask: torch.Tensor | None = None
    vision_hidden_states: tuple[torch.Tensor, ...] | None = None
    vision_attentions: tuple[torch.Tensor, ...] | None = None
    mask_decoder_attentions: tuple[torch.Tensor, ...] | None = None


class EfficientSamMaskEmbedding(nn.Module):
    """Low-resolution logits to the grid of the image embeddings: (B, 1, 4h, 4w) -> (B, C, h, w)."""

    def __init__(self, config: EfficientSamPromptEncoderConfig):
        super().__init__()
        channels, eps = config.mask_input_channels, config.layer_norm_eps
        self.activation = ACT2FN[config.hidden_act]
        self.conv1 = nn.Conv2d(1, channels // 4, kernel_size=2, stride=2)
        self.layer_norm1 = EfficientSamLayerNorm2d(channels // 4, eps=eps)
        self.conv2 = nn.Conv2d(channels // 4, channels, kernel_size=2, stride=2)
        self.layer_norm2 = EfficientSamLayerNorm2d(channels, eps=eps)
        self.conv3 = nn.Conv2d(channels, config.hidden_size, kernel_size=1)

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        features = self.activation(self.layer_norm1(self.conv1(masks)))
        return self.conv3(self.activation(self.layer_norm2(self.conv2(features))))


class EfficientSamPromptEncoder(nn.Module):
    """Points, boxes and masks to prompt tokens and additions to the image embeddings."""

    def __init__(self, config: EfficientSamPromptEncoderConfig):
        super().__init__()
        self.padded_prompt_tokens = config.padded_prompt_tokens
        # CODEPATH: on in checkpoints of the recipes nuclei and few_shot, off in the default and the released ones
        self.dense_boxes = config.dense_boxes
        self.positional_encoding = EfficientSamPositionalEncoding(config.hidden_size)
        self.padding_embed = nn.Embedding(1, config.hidden_size)
        self.point_embed = nn.Embedding(1, config.hidden_size)
        self.box_corner_embed = nn.Embedding(2, config.hidden_size)
        # CODEPATH: on in checkpoints of this package, off in the released efficient_sam_vitt and efficient_sam_vits
        if config.background_points:
            self.background_embed = nn.Embedding(1, config.hidden_size)
        # CODEPATH: on in checkpoints of this package, off in the released efficient_sam_vitt and efficient_sam_vits
        if config.mask_prompts:
            self.mask_embed = EfficientSamMaskEmbedding(config)
            self.no_mask_embed = nn.Embedding(1, config.hidden_size)

    def gather_prompts(
        self, input_points: torch.Tensor | None, input_labels: torch.Tensor | None, input_boxes: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
        """Write boxes as two points of labels 2 and 3 before the points.

        (B, Q, P, 2), (B, Q, P), (B, Q, 4) -> (B, Q, T, 2) float32, (B, Q, T) int64 with labels 1 foreground,
        0 background, 2 top-left, 3 bottom-right, -1 padding.
        """
        points, labels = [], []
        if input_boxes is not None:
            points.append(input_boxes.float().unflatten(-1, (2, 2)))
            corners = torch.tensor([2, 3], device=input_boxes.device)
            labels.append(torch.where(_has_box(input_boxes).unsqueeze(-1), corners, -1))
        if input_points is not None:
            points.append(input_points.float())
            labels.append(input_labels.long())
        if not points:
            return None, None
        points, labels = torch.cat(points, dim=2), torch.cat(labels, dim=2)
        return points.masked_fill((labels == -1).unsqueeze(-1), -1.0), labels

    def pad_prompts(self, points: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Bring every object to `padded_prompt_tokens` tokens, real ones first: (B, Q, T, 2) -> (B, Q, limit, 2)."""
        limit, length = self.padded_prompt_tokens, labels.shape[2]
        if length > limit:
            # Labels cannot be read in a compiled graph: there padding counts too, so that nothing is cut unseen.
            compiling = torch.compiler.is_compiling()
            if compiling or bool(((labels != -1).sum(-1) > limit).any()):
                largest = length if compiling else int((labels != -1).sum(-1).max())
                raise ValueError(
                    f"an object has {largest} prompt tokens, but this checkpoint takes at most {limit} "
                    "(a point is one token, a box is two)"
                )
            order = (labels == -1).long().argsort(dim=2, stable=True)[:, :, :limit]
            return points.gather(2, order.unsqueeze(-1).expand(-1, -1, -1, 2)), labels.gather(2, order)
        padding = (0, limit - length)
        return F.pad(points, (0, 0, *padding), value=-1.0), F.pad(labels, padding, value=-1)

    def encode_points(self, points: torch.Tensor, labels: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
        """Position and kind of every point: (B, Q, T, 2) model pixels, (B, Q, T) -> (B, Q, T, C)."""
        height, width = image_size
        centres = (points + 0.5) / torch.tensor([width, height], device=points.device, dtype=torch.float32)
        encoding = self.positional_encoding(centres)
        # Row 0 is padding, so that a label indexes its row with label + 1. Row 1 is the background, which a released
        # checkpoint gives no embedding at all.
        background = self.background_embed.weight if hasattr(self, "background_embed") else None
        kinds = torch.cat(
            [
                self.padding_embed.weight,
                torch.zeros_like(self.point_embed.weight) if background is None else background,
                self.point_embed.weight,
                self.box_corner_embed.weight,
            ]
        )
        return encoding.to(kinds.dtype) + F.embedding(labels + 1, kinds)

    def encode_masks(self, input_masks: torch.Tensor | None) -> torch.Tensor | None:
        """What is added to the image embeddings: (B, Q, 1, 4h, 4w) -> (B, Q, C, h, w), or (1, 1, C, 1, 1) for none."""
        if not hasattr(self, "mask_embed"):
            return None
        nothing = self.no_mask_embed.weight.view(1, 1, -1, 1, 1)
        if input_masks is None:
            return nothing
        embedded = self.mask_embed(input_masks.flatten(0, 1).to(nothing.dtype)).unflatten(0, input_masks.shape[:2])
        return torch.where(_has_mask(input_masks)[:, :, None, None, None], embedded, nothing.to(embedded.dtype))

    def place_boxes(
        self, input_boxes: torch.Tensor | None, input_masks: torch.Tensor | None, image_size: tuple[int, int]
    ) -> torch.Tensor | None:
        """Mask prompts with boxes in them, where the checkpoint takes boxes so; else as they are.

        (B, Q, 4) model pixels, (B, Q, 1, 4h, 4w) or None -> (B, Q, 1, 4h, 4w). An object's box alone becomes a filled
        one, a mask that comes with a box is cut at it.
        """
        if not self.dense_boxes or input_boxes is None:
            return input_masks
        filled = fill_boxes(input_boxes, image_size)
        if input_masks is None:
            return filled
        has_box, has_mask = (given[..., None, None, None] for given in (_has_box(input_boxes), _has_mask(input_masks)))
        cut = torch.minimum(input_masks.to(filled.dtype), filled)
        return torch.where(has_box, torch.where(has_mask, cut, filled), input_masks.to(filled.dtype))

    def forward(
        self,
        input_points: torch.Tensor | None,
        input_labels: torch.Tensor | None,
        input_boxes: torch.Tensor | None,
        image_size: tuple[int, int],
    ) -> tuple[torch.Tensor, torch.Tensor | None] | tuple[None, None]:
        """Return prompt tokens (B, Q, T, C) and, where padding is masked out, which are real (B, Q, T)."""
        points, labels = self.gather_prompts(input_points, input_labels, input_boxes)
        if points is None:
            return None, None
        if self.padded_prompt_tokens is not None:
            points, labels = self.pad_prompts(points, labels)
            return self.encode_points(points, labels, image_size), None
        return self.encode_points(points, labels, image_size), labels != -1


def fill_boxes(boxes: torch.Tensor, image_size: tuple[int, int]) -> torch.Tensor:
    """Boxes as low-resolution logits: (B, Q, 4) pixels of an image (H, W) -> (B, Q, 1, H / 4, W / 4) float32.

    Edges lie between pixels here: a box around the first pixel alone is (0, 0, 1, 1). Cells inside have `BOX_LOGIT`,
    cells outside its negative, a cell that an edge crosses lies between them by the share of it that is inside. All
    zero, which is no mask, for four times -1.
    """
    low, high = boxes.float().unflatten(-1, (2, 2)).div(4).unbind(-2)  # in cells
    shares = []
    for axis, pixels in enumerate((image_size[1], image_size[0])):
        start = torch.arange(pixels // 4, device=boxes.device, dtype=torch.float32)
        first, last = low[..., axis, None], high[..., axis, None]
        shares.append((torch.minimum(start + 1, last) - torch.maximum(start, first)).clamp(0, 1))
    inside = shares[1][..., :, None] * shares[0][..., None, :]
    filled = (2 * inside - 1) * BOX_LOGIT
    return torch.where(_has_box(boxes)[..., None, None], filled, 0.0).unsqueeze(2)


def _has_box(input_boxes: torch.Tensor) -> torch.Tensor:
    """(B, Q, 4) -> (B, Q): a box of four -1 stands for "this object has no box"."""
    return (input_boxes != -1).any(-1)


def _has_mask(input_masks: torch.Tensor) -> torch.Tensor:
    """(B, Q, 1, h, w) -> (B, Q): logits that are all zero say nothing and stand for "this object has no mask"."""
    return (input_masks != 0).flatten(2).any(-1)


class EfficientSamAttention(nn.Module):
    """Attention of the mask decoder, optionally narrower than its inputs.

    (B, Q, L, C), (B, Q, S, C) x 2 -> (B, Q, L, C). The object axis of the query or of key and value may be 1: image
    tokens that no prompt has changed yet are projected once for all objects of an image.
    """

    def __init__(self, config: EfficientSamMaskDecoderConfig, downsample_rate: int = 1):
        super().__init__()
        self.config = config
        width = config.hidden_size // downsample_rate
        self.num_attention_heads = config.num_attention_heads
        self.scaling = (width // config.num_attention_heads) ** -0.5
        self.is_causal = False
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, width)
        self.v_proj = nn.Linear(config.hidden_size, width)
        self.out_proj = nn.Linear(width, config.hidden_size)

    def _split_heads(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """(B, Q, L, D) -> (B * Q, heads, L, D / heads)"""
        return hidden_states.flatten(0, 1).unflatten(-1, (self.num_attention_heads, -1)).transpose(1, 2)

    def _interface(self) -> Callable:
        # Flash attention takes no padding mask for cross-attention, and flex attention with a mask corrupts memory on
        # CPUs (torch 2.13). With a dozen tokens of width 16 neither has anything to save: models loaded with them run
        # their decoder in torch's own fused attention.
        implementation = self.config._attn_implementation
        if implementation is not None and ("flash" in implementation or "flex" in implementation):
            implementation = "sdpa"
        return ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_mask: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        num_objects, length = max(query.shape[1], key.shape[1]), query.shape[2]
        query, key, value = self.q_proj(query), self.k_proj(key), self.v_proj(value)
        if key.shape[1] == 1:
            query = query.flatten(1, 2).unsqueeze(1)  # one long query instead of a copy of the keys per object
        else:
            query = query.expand(-1, num_objects, -1, -1)
        mask = None
        if key_mask is not None:  # (B, Q, S) -> (B * Q, 1, L, S), added to the attention scores
            mask = torch.zeros_like(key_mask, dtype=query.dtype).masked_fill(~key_mask, torch.finfo(query.dtype).min)
            mask = mask.flatten(0, 1)[:, None, None].expand(-1, -1, length, -1)
        attended, weights = self._interface()(
            self,
            self._split_heads(query),
            self._split_heads(key),
            self._split_heads(value),
            mask,
            dropout=0.0,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        attended = attended.reshape(key.shape[0], num_objects, length, -1)
        return self.out_proj(attended), weights


class EfficientSamFeedForward(nn.Module):
    """Linear layers with an activation between them: (..., input_dim) -> (..., output_dim)."""

    def __init__(self, input_dim: int, hidden_dim: int, output_dim: int, num_layers: int, hidden_act: str):
        super().__init__()
        self.activation = ACT2FN[hidden_act]
        dims = [input_dim] + [hidden_dim] * (num_layers - 1)
        self.layers = nn.ModuleList(nn.Linear(*pair) for pair in zip(dims[:-1], dims[1:], strict=True))
        self.proj_out = nn.Linear(dims[-1], output_dim)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            hidden_states = self.activation(layer(hidden_states))
        return self.proj_out(hidden_states)


class EfficientSamTwoWayAttentionBlock(GradientCheckpointingLayer):
    """Tokens attend to themselves and to the image, then the image attends to the tokens.

    Differs from SAM's block as the released EfficientSAM does: the first block skips the positions but keeps the
    residual, and later blocks add the prompt tokens to the residual stream itself, so to the values too.
    """

    def __init__(self, config: EfficientSamMaskDecoderConfig, is_first: bool):
        super().__init__()
        width, eps, rate = config.hidden_size, config.layer_norm_eps, config.attention_downsample_rate
        self.is_first = is_first
        self.self_attn = EfficientSamAttention(config)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.cross_attn_token_to_image = EfficientSamAttention(config, rate)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = EfficientSamFeedForward(width, config.mlp_dim, width, 2, config.hidden_act)
        self.layer_norm3 = nn.LayerNorm(width, eps=eps)
        self.cross_attn_image_to_token = EfficientSamAttention(config, rate)
        self.layer_norm4 = nn.LayerNorm(width, eps=eps)

    def forward(
        self,
        tokens: torch.Tensor,
        image: torch.Tensor,
        token_positions: torch.Tensor,
        image_positions: torch.Tensor,
        token_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, Q, T, C), (B, 1 or Q, N, C) -> (B, Q, T, C), (B, Q, N, C)"""
        if not self.is_first:
            tokens = tokens + token_positions
        attended, _ = self.self_attn(tokens, tokens, tokens, token_mask, **kwargs)
        tokens = self.layer_norm1(tokens + attended)
        placed_image = image + image_positions
        attended, _ = self.cross_attn_token_to_image(tokens + token_positions, placed_image, image, **kwargs)
        tokens = self.layer_norm2(tokens + attended)
        tokens = self.layer_norm3(tokens + self.mlp(tokens))
        attended, _ = self.cross_attn_image_to_token(
            placed_image, tokens + token_positions, tokens, token_mask, **kwargs
        )
        return tokens, self.layer_norm4(image + attended)


class EfficientSamTwoWayTransformer(nn.Module):
    def __init__(self, config: EfficientSamMaskDecoderConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            EfficientSamTwoWayAttentionBlock(config, is_first=index == 0) for index in range(config.num_hidden_layers)
        )
        self.final_attn_token_to_image = EfficientSamAttention(config, config.attention_downsample_rate)
        self.layer_norm_final_attn = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(
        self,
        tokens: torch.Tensor,
        image: torch.Tensor,
        image_positions: torch.Tensor,
        token_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, Q, T, C), (B, 1 or Q, N, C) -> (B, Q, T, C), (B, Q, N, C)"""
        token_positions = tokens
        for layer in self.layers:
            tokens, image = layer(tokens, image, token_positions, image_positions, token_mask, **kwargs)
        attended, _ = self.final_attn_token_to_image(
            tokens + token_positions, image + image_positions, image, **kwargs
        )
        return self.layer_norm_final_attn(tokens + attended), image


class EfficientSamMaskDecoder(EfficientSamPreTrainedModel):
    """Image and prompts to masks with predicted IoU."""

    config: EfficientSamMaskDecoderConfig
    _can_record_outputs = {"mask_decoder_attentions": OutputRecorder(EfficientSamAttention, index=1)}

    def __init__(self, config: EfficientSamMaskDecoderConfig):
        super().__init__(config)
        width, act = config.hidden_size, config.hidden_act
        self.num_mask_tokens = config.num_multimask_outputs + 1
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(self.num_mask_tokens, width)
        self.transformer = EfficientSamTwoWayTransformer(config)
        self.activation = ACT2FN[act]
        self.upscale_conv1 = nn.ConvTranspose2d(width, width // 4, kernel_size=2, stride=2)
        self.upscale_norm = nn.GroupNorm(1, width // 4, eps=config.layer_norm_eps)
        self.upscale_conv2 = nn.ConvTranspose2d(width // 4, width // 8, kernel_size=2, stride=2)
        self.output_hypernetworks_mlps = nn.ModuleList(
            EfficientSamFeedForward(width, width, width // 8, 3, act) for _ in range(self.num_mask_tokens)
        )
        self.iou_prediction_head = EfficientSamFeedForward(
            width, config.iou_head_hidden_dim, self.num_mask_tokens, config.iou_head_depth, act
        )
        self.post_init()

    def upscale(self, image: torch.Tensor) -> torch.Tensor:
        """Split every image token into the 4 x 4 pixels of its mask: (B, Q, N, C) -> (B, Q, N * 16, C / 8).

        A transposed convolution with kernel and stride 2 is a linear layer that gives each token four children, so
        everything stays in token layout until the few channels of the masks are put in place by `place_pixels`.
        """
        features = _four_children(image, self.upscale_conv1)
        norm = self.upscale_norm  # one group: over all tokens and channels of an object
        features = F.layer_norm(features, features.shape[2:], eps=norm.eps)
        features = features * norm.weight.to(features.dtype) + norm.bias.to(features.dtype)
        return self.activation(_four_children(self.activation(features).flatten(2, 3), self.upscale_conv2)).flatten(
            2, 3
        )

    def forward(
        self,
        image_embeddings: torch.Tensor,
        image_positions: torch.Tensor,
        prompt_tokens: torch.Tensor,
        prompt_mask: torch.Tensor | None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (B, Q, 4, 4h, 4w) logits and (B, Q, 4) predicted IoU of every mask token.

        Args:
            image_embeddings: (B, 1 or Q, C, h, w), mask prompts already added.
            image_positions: (N, C), encoding of the grid.
            prompt_tokens: (B, Q, T, C).
            prompt_mask: (B, Q, T), False where a token is padding that nothing may attend to.
        """
        batch_size, num_objects = prompt_tokens.shape[:2]
        own_tokens = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        own_tokens = own_tokens.to(prompt_tokens.dtype).expand(batch_size, num_objects, -1, -1)
        tokens = torch.cat([own_tokens, prompt_tokens], dim=2)
        if prompt_mask is not None:
            prompt_mask = F.pad(prompt_mask, (own_tokens.shape[2], 0), value=True)
        image = image_embeddings.flatten(3).transpose(2, 3)
        tokens, image = self.transformer(tokens, image, image_positions, prompt_mask, **kwargs)

        weights = torch.stack(
            [mlp(tokens[:, :, 1 + index]) for index, mlp in enumerate(self.output_hypernetworks_mlps)], dim=3
        )
        masks = place_pixels(self.upscale(image) @ weights, image_embeddings.shape[3:])
        return masks, self.iou_prediction_head(tokens[:, :, 0])


def _four_children(tokens: torch.Tensor, layer: nn.ConvTranspose2d) -> torch.Tensor:
    """A transposed convolution with kernel and stride 2 on tokens: (B, Q, N, C) -> (B, Q, N, 4, C'), row by row."""
    weight = layer.weight.permute(2, 3, 1, 0).flatten(0, 2)
    return F.linear(tokens, weight, layer.bias.repeat(4)).unflatten(-1, (4, -1))


def place_pixels(values: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
    """Put the children of children of h x w tokens in their places: (B, Q, N * 16, M) -> (B, Q, M, 4h, 4w)."""
    height, width = grid_size
    values = values.unflatten(2, (height, width, 2, 2, 2, 2)).permute(0, 1, 8, 2, 4, 6, 3, 5, 7)
    return values.reshape(*values.shape[:3], 4 * height, 4 * width)


class EfficientSamModel(EfficientSamPreTrainedModel):
    """EfficientSAM: masks of the objects that points, boxes and earlier masks ask for."""

    _can_record_outputs = {"mask_decoder_attentions": OutputRecorder(EfficientSamAttention, index=1)}

    def __init__(self, config: EfficientSamConfig):
        super().__init__(config)
        self.vision_encoder = EfficientSamVisionEncoder(config.vision_config)
        self.neck = EfficientSamVisionNeck(config.vision_config)
        self.prompt_encoder = EfficientSamPromptEncoder(config.prompt_encoder_config)
        self.mask_decoder = EfficientSamMaskDecoder(config.mask_decoder_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.get_input_embeddings()

    @classmethod
    def from_sami(
        cls, source: str | os.PathLike | PreTrainedModel, config: EfficientSamConfig | None = None, **kwargs
    ) -> "EfficientSamModel":
        """Begin from a pretrained encoder; neck, prompt encoder and mask decoder are new.

        `source` is a [`SamiForPreTraining`], or what its `from_pretrained` takes with `kwargs`. Without `config` the
        encoder is that of the source at 1024 pixels. Every weight of the encoder is taken; ValueError if those of the
        source are not exactly the ones that `config` describes.
        """
        found = source.config if isinstance(source, PreTrainedModel) else AutoConfig.from_pretrained(source, **kwargs)
        if found.model_type != "sami":
            raise ValueError(f"source is of model_type {found.model_type!r}, expected a SamiForPreTraining")
        if not isinstance(source, PreTrainedModel):
            source = AutoModelForPreTraining.from_pretrained(source, **kwargs)
        if config is None:
            vision = {**source.config.vision_config.to_dict(), "image_size": 1024, "output_channels": 256}
            config = EfficientSamConfig(vision_config=vision)
        for name in ("num_attention_heads", "hidden_act", "layer_norm_eps"):  # which no weight's shape tells
            own, theirs = getattr(config.vision_config, name), getattr(source.config.vision_config, name)
            if own != theirs:
                raise ValueError(f"config.vision_config.{name} is {own!r}, but the encoder of source has {theirs!r}")
        model = cls(config)
        try:
            model.vision_encoder.load_state_dict(source.vision_encoder.state_dict())
        except RuntimeError as error:
            raise ValueError(f"the encoder of source does not fit config.vision_config: {error}") from error
        return model

    def get_image_embeddings(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        """Encode images once for any number of prompts: (B, 3, H, W) -> (B, 256, H / 16, W / 16).

        Gradients flow unless the caller disables them.
        """
        check_keyword_arguments("get_image_embeddings", kwargs)
        kwargs.pop("return_dict", None)
        tokens = self.vision_encoder(pixel_values, **kwargs).last_hidden_state
        return self.neck(tokens, grid_size_of(pixel_values, self.config.vision_config.patch_size))

    def decode_prompts(
        self,
        image_embeddings: torch.Tensor,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Decode every mask token; arguments and errors are those of `forward`.

        Returns logits (B, Q, 4, 4h, 4w), predicted IoU (B, Q, 4) and which objects are real (B, Q). Mask 0 is the
        answer for `multimask_output=False`, masks 1 to 3 are the three candidates. Objects without a prompt, which pad
        a batch, may be all there are. Within `torch.compile` and exported graphs the values of prompts are not
        checked; the processor has done that.
        """
        check_keyword_arguments("decode_prompts", kwargs)
        self._check_embeddings(image_embeddings)
        input_labels = self._check_prompts(image_embeddings, input_points, input_labels, input_boxes, input_masks)
        return self._decode(image_embeddings, input_points, input_labels, input_boxes, input_masks, **kwargs)

    def _decode(self, image_embeddings, input_points, input_labels, input_boxes, input_masks, **kwargs):
        """What `decode_prompts` does once its arguments are checked and labels are there where points are."""
        image_embeddings = image_embeddings.to(self._compute_dtype(image_embeddings.device))
        height, width = image_embeddings.shape[2:]
        patch_size = self.config.vision_config.patch_size
        image_size = (height * patch_size, width * patch_size)
        prompt_tokens, prompt_mask = self.prompt_encoder(input_points, input_labels, input_boxes, image_size)
        if prompt_tokens is None:  # a mask is the only prompt
            prompt_tokens = image_embeddings.new_zeros(*input_masks.shape[:2], 0, image_embeddings.shape[1])
        prompt_tokens = prompt_tokens.to(image_embeddings.dtype)
        image = image_embeddings.unsqueeze(1)
        dense = self.prompt_encoder.encode_masks(self.prompt_encoder.place_boxes(input_boxes, input_masks, image_size))
        image = image if dense is None else image + dense.to(image.dtype)
        positions = self.prompt_encoder.positional_encoding.grid(height, width).to(image.dtype)
        masks, iou_scores = self.mask_decoder(image, positions, prompt_tokens, prompt_mask, **kwargs)
        return masks, iou_scores, real_objects(input_labels, input_boxes, input_masks)

    def _compute_dtype(self, device: torch.device) -> torch.dtype:
        """Dtype of the decoder's tokens: autocast's where it is on, else the weights'."""
        if torch.is_autocast_enabled(device.type):
            return torch.get_autocast_dtype(device.type)
        return self.prompt_encoder.point_embed.weight.dtype

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_points: torch.Tensor | None = None,
        input_labels: torch.Tensor | None = None,
        input_boxes: torch.Tensor | None = None,
        input_masks: torch.Tensor | None = None,
        image_embeddings: torch.Tensor | None = None,
        multimask_output: bool = True,
        original_sizes: torch.Tensor | None = None,
        reshaped_input_sizes: torch.Tensor | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> EfficientSamImageSegmentationOutput:
        r"""
        Segment the objects that the prompts ask for. Exactly one of `pixel_values` and `image_embeddings` and at least
        one kind of prompt must be given.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch_size, 3, height, width)`):
                Normalised images.
            input_points (`torch.Tensor` of shape `(batch_size, num_objects, num_points, 2)`):
                Points as (x, y) in model pixels.
            input_labels (`torch.Tensor` of shape `(batch_size, num_objects, num_points)`):
                1 for the object, 0 for the background, -1 for padding. All 1 when left out.
            input_boxes (`torch.Tensor` of shape `(batch_size, num_objects, 4)`):
                One box an object as (x0, y0, x1, y1) in model pixels; four times -1 for an object without one.
            input_masks (`torch.Tensor` of shape `(batch_size, num_objects, 1, height / 4, width / 4)`):
                Low-resolution logits of an earlier prediction; all zero for an object without one. A checkpoint with
                `dense_boxes` cuts them at the object's box.
            image_embeddings (`torch.Tensor` of shape `(batch_size, 256, height / 16, width / 16)`):
                Result of `get_image_embeddings`, to prompt the same images again.
            multimask_output (`bool`, *optional*, defaults to `True`):
                Three candidates of every object for an ambiguous prompt, or one mask.
            original_sizes, reshaped_input_sizes:
                Ignored; the processor returns them for post-processing.

        Raises:
            TypeError: on an unknown keyword argument, and for what is no tensor.
            ValueError: if the prompts or images are missing, not finite, contradict each other in shape, or ask for
                what this checkpoint does not know.
        """
        check_keyword_arguments(type(self).__name__, kwargs)
        if (pixel_values is None) == (image_embeddings is None):
            raise ValueError("expected exactly one of pixel_values and image_embeddings")
        prompts = (input_points, input_labels, input_boxes, input_masks)
        vision_outputs = None
        if pixel_values is None:
            self._check_embeddings(image_embeddings)
            input_labels = self._check_prompts(image_embeddings, *prompts, needed=True)
        else:
            every = self.config.vision_config.patch_size
            check_pixels(pixel_values, self.config.vision_config.num_channels, every)
            # Every 16th pixel has the shape of the embeddings, before the encoder's work.
            input_labels = self._check_prompts(pixel_values[:, :, ::every, ::every], *prompts, needed=True)
            vision_outputs = self.vision_encoder(pixel_values, **kwargs)
            grid_size = grid_size_of(pixel_values, self.config.vision_config.patch_size)
            image_embeddings = self.neck(vision_outputs.last_hidden_state, grid_size)
        masks, iou_scores, object_mask = self._decode(
            image_embeddings, input_points, input_labels, input_boxes, input_masks, **kwargs
        )
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        return EfficientSamImageSegmentationOutput(
            iou_scores=iou_scores[:, :, chosen],
            pred_masks=masks[:, :, chosen],
            object_mask=object_mask,
            vision_hidden_states=None if vision_outputs is None else vision_outputs.hidden_states,
            vision_attentions=None if vision_outputs is None else vision_outputs.attentions,
        )

    def save_pretrained(self, save_directory, *args, **kwargs):
        """As every model's; `AutoModel` finds the class beside `AutoModelForMaskGeneration`, `pipeline` finds ours."""
        if self._auto_class is not None:
            pipeline = "mask_generation_efficientsam.EfficientSamMaskGenerationPipeline"
            self.config.custom_pipelines = {
                "mask-generation": {"impl": pipeline, "pt": ["AutoModelForMaskGeneration"]}
            }
            class_path = f"{type(self).__module__.split('.')[-1]}.{type(self).__name__}"
            self.config.auto_map = {**(getattr(self.config, "auto_map", None) or {}), "AutoModel": class_path}
        super().save_pretrained(save_directory, *args, **kwargs)

    def _check_embeddings(self, image_embeddings: torch.Tensor) -> None:
        check_tensor("image_embeddings", image_embeddings, "(images, C, h, w)")
        channels = self.config.prompt_encoder_config.hidden_size
        if image_embeddings.ndim != 4 or image_embeddings.shape[1] != channels:
            raise ValueError(
                f"image_embeddings has shape {tuple(image_embeddings.shape)}, expected (images, {channels}, h, w)"
            )

    def _check_prompts(
        self, images, input_points, input_labels, input_boxes, input_masks, needed: bool = False
    ) -> torch.Tensor | None:
        """Raise on prompts that do not fit the images, each other or the checkpoint; return the labels.

        `images` is any tensor (B, ..., h, w) of theirs. With `needed` one object at least must have a prompt.
        """
        if input_points is None and input_boxes is None and input_masks is None:
            raise ValueError(NO_PROMPT)
        _check_prompt_shapes(images, input_points, input_labels, input_boxes, input_masks)
        config = self.config.prompt_encoder_config
        if input_masks is not None and not config.mask_prompts:
            raise ValueError("input_masks is given, but this checkpoint takes no mask prompts (mask_prompts is off)")
        # Reading values makes a program wait for its device. In training without labels it would wait for this alone:
        # there the loss tells what is not finite. Masks are the model's own answers there, which may overflow for a
        # step in half precision.
        learns = self.training and torch.is_grad_enabled()
        is_read = _can_be_read(images) and not (learns and input_labels is None and images.device.type != "cpu")
        if input_points is not None and input_labels is None:
            input_labels = torch.ones(input_points.shape[:3], dtype=torch.long, device=input_points.device)
        if is_read:
            judged = {"input_points": input_points, "input_boxes": input_boxes}
            judged |= {} if learns else {"input_masks": input_masks}
            prompted = real_objects(input_labels, input_boxes, input_masks) if needed else None
            _check_prompt_values(judged, input_labels, prompted, config.background_points)
        return input_labels


def _can_be_read(tensor: torch.Tensor) -> bool:
    """Whether a program may look at values: not while torch records it, nor where there are none."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_meta:
        return False
    return not (tensor.is_cuda and torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _check_prompt_values(
    prompts: dict[str, torch.Tensor | None],
    input_labels: torch.Tensor | None,
    prompted: torch.Tensor | None,
    background_points: bool,
) -> None:
    """Raise on values that no prompt has; what must be known of them is read from the device at once.

    `prompts` are those that must be finite, `prompted` (B, Q) says which objects have one, where one at least must.
    """
    given = {name: value for name, value in prompts.items() if value is not None}
    found = {name: largest(value) for name, value in given.items()}
    if input_labels is not None:
        background = input_labels == 0
        found["background"] = background.any()
        found["known"] = (background | (input_labels == 1) | (input_labels == -1)).all()
    if prompted is not None:
        found["prompted"] = prompted.any()
    read = torch.stack([value.float() for value in found.values()]).tolist() if found else []
    found = dict(zip(found, read, strict=True))
    if not found.get("known", True):
        values = short(sorted(set(input_labels.unique().tolist())))
        raise ValueError(f"input_labels holds {values}, expected 1 (object), 0 (background) or -1 (padding)")
    if found.get("background") and not background_points:
        raise ValueError(
            "input_labels has a 0, but this checkpoint knows no background points (background_points is off)"
        )
    for name, value in given.items():
        if not found[name] <= LARGEST:  # where points only pad, values do not matter
            check_finite(name, value, ("image", "object"), input_labels == -1 if name == "input_points" else None)
    if not found.get("prompted", True):
        raise ValueError(f"{NO_PROMPT} for an object, found nothing but padding")


def _check_prompt_shapes(images, input_points, input_labels, input_boxes, input_masks) -> None:
    batch_size, (height, width) = images.shape[0], images.shape[2:]
    shapes = {
        "input_points": (input_points, 4, "(images, objects, points, 2)"),
        "input_labels": (input_labels, 3, "(images, objects, points)"),
        "input_boxes": (input_boxes, 3, "(images, objects, 4)"),
        "input_masks": (input_masks, 5, f"(images, objects, 1, {4 * height}, {4 * width})"),
    }
    given = {name: value for name, (value, _, _) in shapes.items() if value is not None}
    for name, value in given.items():
        _, ndim, expected = shapes[name]
        check_tensor(name, value, expected)
        tail = {"input_points": (2,), "input_boxes": (4,), "input_masks": (1, 4 * height, 4 * width)}.get(name, ())
        if value.ndim != ndim or tuple(value.shape[ndim - len(tail) :]) != tail:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {expected}")
        if value.shape[0] != batch_size:
            raise ValueError(f"{name} is for {value.shape[0]} images, but there are {batch_size}")
    if input_labels is not None and input_points is None:
        raise ValueError("input_labels is given without input_points")
    if input_labels is not None and input_labels.shape != input_points.shape[:3]:
        raise ValueError(
            f"input_labels has shape {tuple(input_labels.shape)}, expected that of the points, "
            f"{tuple(input_points.shape[:3])}"
        )
    # One by one: in an exported graph they are symbols, which a set cannot hold.
    counts = {name: value.shape[1] for name, value in given.items()}
    first = next(iter(counts.values()))
    if any(count != first for count in counts.values()):
        raise ValueError(f"prompts disagree on the number of objects an image: {counts}")
    if first == 0:
        raise ValueError(f"no prompt: there is no object in {sorted(counts)}")


def real_objects(input_labels, input_boxes, input_masks) -> torch.Tensor:
    """Which objects have any prompt and do not only pad the batch: -> (B, Q) bool."""
    signs = []
    if input_labels is not None:
        signs.append((input_labels != -1).any(-1))
    if input_boxes is not None:
        signs.append(_has_box(input_boxes))
    if input_masks is not None:
        signs.append(_has_mask(input_masks))
    return torch.stack(signs).any(0)


__all__ = ["EfficientSamModel"]
