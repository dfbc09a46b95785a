# SPDX-License-Identifier: Apache-2.0
"""The image encoder of EfficientSAM: a plain ViT with global attention, its neck, and what all models here share.

Shapes: B images, N = h * w image tokens of C channels, where h and w are the input's height and width divided by the
patch size.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BackboneOutput, BaseModelOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .checks_efficientsam import check_tensor
from .configuration_efficientsam import EfficientSamConfig, EfficientSamVisionConfig


def _warm_up_elementwise_kernels() -> None:
    """Call torch's vectorised functions once on one element.

    The first multi-threaded call of one of them in a process may answer with low precision (3e-4) in one thread's
    share (pytorch#188792); a single-threaded call beforehand avoids it.
    """
    one = torch.ones(1, dtype=torch.float32, device="cpu")
    for function in (torch.sqrt, torch.exp, torch.log, torch.sin, torch.cos, torch.tanh, torch.erf, torch.rsqrt):
        function(one)
    F.gelu(one)
    F.softmax(one, dim=0)


_warm_up_elementwise_kernels()


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Unpack[TransformersKwargs],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out: (B, heads, L, d), (B, heads, S, d) x 2 -> (B, L, heads, d), (B, heads, L, S)."""
    weights = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class EfficientSamLayerNorm2d(nn.LayerNorm):
    """Layer norm over the channels of a map: (B, C, H, W) -> (B, C, H, W)."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return super().forward(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class EfficientSamVisionEmbeddings(nn.Module):
    """Patches with their positions: (B, 3, H, W) -> (B, N, C)."""

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__()
        self.num_channels, self.patch_size = config.num_channels, config.patch_size
        self.pretrain_grid = config.pretrain_image_size // config.patch_size
        self.projection = nn.Conv2d(config.num_channels, config.hidden_size, config.patch_size, config.patch_size)
        # The first slot was the CLS token's in pretraining and stays, so that pretrained tables load as they are.
        self.position_embeddings = nn.Parameter(torch.zeros(1, self.pretrain_grid**2 + 1, config.hidden_size))

    def resized_positions(self, height: int, width: int) -> torch.Tensor:
        """Bicubically resize the position table to a grid of `height` x `width` patches: (1, h * w, C), float32."""
        table = self.position_embeddings[:, 1:].float()
        if (height, width) == (self.pretrain_grid, self.pretrain_grid):
            return table
        table = table.transpose(1, 2).unflatten(2, (self.pretrain_grid, self.pretrain_grid))
        table = F.interpolate(table, size=(height, width), mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        check_pixels(pixel_values, self.num_channels, self.patch_size)
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))
        positions = self.resized_positions(*patches.shape[2:]).to(patches.dtype)
        # A sum keeps the layout of its terms: without this all layers would add to tokens that lie channel by channel.
        return (patches.flatten(2).transpose(1, 2) + positions).contiguous()


class EfficientSamVisionAttention(nn.Module):
    """Global self-attention over patches: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__()
        self.config = config
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scaling = self.head_dim**-0.5
        self.attention_dropout = config.attention_dropout
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, config.hidden_size * 3, bias=config.qkv_bias)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        batch_size, length, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch_size, length, 3, -1, self.head_dim)
        query, key, value = (part.transpose(1, 2) for part in qkv.unbind(2))
        attention_interface: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        attended, weights = attention_interface(
            self,
            query,
            key,
            value,
            None,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            is_causal=False,
            **kwargs,
        )
        return self.proj(attended.reshape(batch_size, length, -1)), weights


class EfficientSamVisionMLP(nn.Module):
    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__()
        hidden_dim = int(config.hidden_size * config.mlp_ratio)
        self.fc1 = nn.Linear(config.hidden_size, hidden_dim)
        self.activation = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(hidden_dim, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activation(self.fc1(hidden_states)))


class EfficientSamVisionLayer(GradientCheckpointingLayer):
    """One pre-norm ViT block: (B, N, C) -> (B, N, C)."""

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = EfficientSamVisionAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EfficientSamVisionMLP(config)

    def forward(self, hidden_states: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> torch.Tensor:
        attended, _ = self.attention(self.norm1(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.norm2(hidden_states))


class EfficientSamVisionNeck(nn.Module):
    """Image tokens to image embeddings: (B, N, C), (h, w) -> (B, output_channels, h, w)."""

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__()
        channels, eps = config.output_channels, config.layer_norm_eps
        self.conv1 = nn.Conv2d(config.hidden_size, channels, kernel_size=1, bias=False)
        self.layer_norm1 = EfficientSamLayerNorm2d(channels, eps=eps)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.layer_norm2 = EfficientSamLayerNorm2d(channels, eps=eps)

    def forward(self, hidden_states: torch.Tensor, grid_size: tuple[int, int]) -> torch.Tensor:
        features = hidden_states.transpose(1, 2).unflatten(2, grid_size)
        features = self.layer_norm1(self.conv1(features))
        return self.layer_norm2(self.conv2(features))


class EfficientSamPositionalEncoding(nn.Module):
    """Random Fourier features of points in the unit square: (..., 2) -> (..., C), always in float32.

    A bfloat16 coordinate is off by pixels, so the matrix keeps its dtype whatever the model is cast to.
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.gaussian_matrix = nn.Buffer(torch.zeros(2, hidden_size // 2, dtype=torch.float32))

    def _apply(self, fn, recurse=True):
        exact = self.gaussian_matrix
        super()._apply(fn, recurse)
        if self.gaussian_matrix.dtype != torch.float32:
            self.gaussian_matrix = exact.to(self.gaussian_matrix.device, torch.float32)
        return self

    def forward(self, coordinates: torch.Tensor) -> torch.Tensor:
        x, y = (2.0 * coordinates.float() - 1.0).unsqueeze(-2).unbind(-1)
        # Written out, since autocast would run a matrix product in half precision.
        projected = 2.0 * torch.pi * (x * self.gaussian_matrix[0] + y * self.gaussian_matrix[1])
        return torch.cat([projected.sin(), projected.cos()], dim=-1)

    def grid(self, height: int, width: int) -> torch.Tensor:
        """Encode the centres of a grid's cells: -> (height * width, C), row by row."""
        device = self.gaussian_matrix.device
        y = (torch.arange(height, device=device, dtype=torch.float32) + 0.5) / height
        x = (torch.arange(width, device=device, dtype=torch.float32) + 0.5) / width
        return self(torch.stack([x.expand(height, width), y[:, None].expand(height, width)], dim=-1)).flatten(0, 1)


def check_pixels(pixel_values: torch.Tensor, channels: int, patch_size: int) -> None:
    """TypeError or ValueError unless these are images (B, channels, H, W) that patches divide."""
    expected = f"(B, {channels}, H, W)"
    check_tensor("pixel_values", pixel_values, expected)
    if pixel_values.ndim != 4 or pixel_values.shape[1] != channels:
        raise ValueError(f"pixel_values has shape {tuple(pixel_values.shape)}, expected {expected}")
    height, width = pixel_values.shape[2:]
    if height % patch_size or width % patch_size or not height or not width:
        raise ValueError(f"pixel_values is {height} x {width} pixels, expected multiples of {patch_size}")


def grid_size_of(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    return pixel_values.shape[2] // patch_size, pixel_values.shape[3] // patch_size


# Attention here is never causal, so that one is as unknown as any other.
STANDARD_KEYWORDS = frozenset(TransformersKwargs.__annotations__) - {"is_causal"} | {"return_dict"}


def check_keyword_arguments(name: str, kwargs: dict) -> None:
    unknown = sorted(set(kwargs) - STANDARD_KEYWORDS)
    if unknown:
        raise TypeError(f"{name} got an unexpected keyword argument {unknown[0]!r}")


class EfficientSamPreTrainedModel(PreTrainedModel):
    config: EfficientSamConfig
    base_model_prefix = "efficientsam"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["EfficientSamVisionLayer", "EfficientSamTwoWayAttentionBlock"]
    _keep_in_fp32_modules_strict = ["positional_encoding"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    # The library's scheme (normal, 0.02) suits a language model; these follow MAE and the released code.
    # trf-ignore: TRF018
    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            # A patch embedding is a linear layer over a patch, so it is initialised like one (MAE).
            if not getattr(module.weight, "_is_hf_initialized", False):
                init.xavier_uniform_(module.weight.view(module.weight.shape[0], -1))
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            init.ones_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight)
        elif isinstance(module, EfficientSamPositionalEncoding):
            init.normal_(module.gaussian_matrix)
        elif isinstance(module, EfficientSamVisionEmbeddings):
            table = sine_cosine_table(module.pretrain_grid, module.pretrain_grid, module.position_embeddings.shape[-1])
            init.copy_(module.position_embeddings, F.pad(table, (0, 0, 1, 0)).unsqueeze(0))


def sine_cosine_table(height: int, width: int, channels: int, device: torch.device | None = None) -> torch.Tensor:
    """Sines and cosines of the places in a grid (MAE, section 3): -> (height * width, channels), float32, row by row.

    x is in the first half of the channels, y in the second; what is left of four equal parts is zero.
    """
    quarter = channels // 4
    frequencies = 10000.0 ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    angles = torch.arange(max(height, width), dtype=torch.float32, device=device)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=1)
    x, y = line[None, :width].expand(height, -1, -1), line[:height, None].expand(-1, width, -1)
    return F.pad(torch.cat([x, y], dim=-1).flatten(0, 1), (0, channels - 4 * quarter))


class EfficientSamVisionEncoder(EfficientSamPreTrainedModel):
    """The plain ViT without its neck, which pretraining and segmentation share: (B, 3, H, W) -> (B, N, C)."""

    config: EfficientSamVisionConfig
    _can_record_outputs = {"hidden_states": EfficientSamVisionLayer, "attentions": EfficientSamVisionAttention}

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.embeddings = EfficientSamVisionEmbeddings(config)
        self.layers = nn.ModuleList(EfficientSamVisionLayer(config) for _ in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.projection

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        hidden_states = self.embeddings(pixel_values)
        for layer in self.layers:
            hidden_states = layer(hidden_states, **kwargs)
        return BaseModelOutput(last_hidden_state=hidden_states)


class EfficientSamVisionModel(EfficientSamPreTrainedModel):
    """The image encoder alone, as a feature extractor."""

    config: EfficientSamVisionConfig
    _keys_to_ignore_on_load_unexpected = [r"^prompt_encoder\.", r"^mask_decoder\."]

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.vision_encoder = EfficientSamVisionEncoder(config)
        self.neck = EfficientSamVisionNeck(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.get_input_embeddings()

    @can_return_tuple
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutput:
        r"""
        Return image embeddings as `last_hidden_state`: (B, 3, H, W) -> (B, output_channels, H / 16, W / 16).

        Args:
            pixel_values: normalised image; height and width are multiples of the patch size.

        Raises:
            TypeError: on an unknown keyword argument.
            ValueError: if `pixel_values` has another number of dimensions or channels, or does not divide.
        """
        check_keyword_arguments(type(self).__name__, kwargs)
        outputs = self.vision_encoder(pixel_values, **kwargs)
        grid_size = grid_size_of(pixel_values, self.config.patch_size)
        return BaseModelOutput(
            last_hidden_state=self.neck(outputs.last_hidden_state, grid_size),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


class EfficientSamBackbone(BackboneMixin, EfficientSamPreTrainedModel):
    """The encoder as a backbone: feature maps of the stages named in `config.out_features`."""

    config: EfficientSamVisionConfig
    _keys_to_ignore_on_load_unexpected = [r"^prompt_encoder\.", r"^mask_decoder\.", r"^neck\."]

    def __init__(self, config: EfficientSamVisionConfig):
        super().__init__(config)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)
        self.vision_encoder = EfficientSamVisionEncoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.vision_encoder.get_input_embeddings()

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Return maps (B, hidden_size, H / 16, W / 16), one for each stage asked for: (B, 3, H, W) -> tuple."""
        check_keyword_arguments(type(self).__name__, kwargs)
        outputs = self.vision_encoder(pixel_values, **kwargs)
        grid_size = grid_size_of(pixel_values, self.config.patch_size)
        feature_maps = tuple(
            hidden_state.transpose(1, 2).unflatten(2, grid_size)
            for stage, hidden_state in zip(self.stage_names, outputs.hidden_states, strict=True)
            if stage in self.out_features
        )
        return BackboneOutput(
            feature_maps=feature_maps, hidden_states=outputs.hidden_states, attentions=outputs.attentions
        )


__all__ = [
    "EfficientSamBackbone",
    "EfficientSamPreTrainedModel",
    "EfficientSamVisionEncoder",
    "EfficientSamVisionModel",
]
