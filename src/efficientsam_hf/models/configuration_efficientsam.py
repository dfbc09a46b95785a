# SPDX-License-Identifier: Apache-2.0
"""Configuration of EfficientSAM (Xiong et al., CVPR 2024, arXiv 2312.00863)."""

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.activations import ACT2FN
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig

from .checks_efficientsam import LARGEST_SIDE, check, check_number, check_whole, with_value_errors


# Paper, section 3 and table 1: the three plain vision transformers EfficientSAM is built on. The released Ti has 3
# heads; forks of December 2023 carry it with 12, which the shapes of the weights cannot tell.
VISION_PRESETS = {
    "ti": {"hidden_size": 192, "num_attention_heads": 3},
    "s": {"hidden_size": 384, "num_attention_heads": 6},
    "b": {"hidden_size": 768, "num_attention_heads": 12},
}


# Fields of any configuration here -> least and most that they may be, so that nothing absurd takes memory first.
WHOLE = {
    "hidden_size": (1, 2**14),
    "output_channels": (1, 2**14),
    "mask_input_channels": (1, 2**14),
    "mlp_dim": (1, 2**17),
    "iou_head_hidden_dim": (1, 2**17),
    "target_width": (1, 2**17),
    "decoder_width": (1, 2**14),
    "num_hidden_layers": (1, 1000),
    "decoder_depth": (1, 1000),
    "iou_head_depth": (2, 1000),
    "num_attention_heads": (1, 1000),
    "decoder_heads": (1, 1000),
    "num_multimask_outputs": (1, 1000),
    "attention_downsample_rate": (1, 1000),
    "num_channels": (1, 1000),
    "image_size": (1, LARGEST_SIDE),
    "pretrain_image_size": (1, LARGEST_SIDE),
    "patch_size": (1, LARGEST_SIDE),
}
NUMBERS = {
    "layer_norm_eps": (0, 1),
    "attention_dropout": (0, 1),
    "mask_ratio": (0, 1),
    "mlp_ratio": (0.01, 100),
    "decoder_mlp_ratio": (0.01, 100),
}


class EfficientSamConfigMixin:
    """What all configurations here have in common: absurd values are a ValueError, those given at load too."""

    def check_fields(self) -> None:
        """ValueError that names the first field whose value is out of bounds."""
        for name in type(self).__dataclass_fields__:
            value = getattr(self, name)
            if name in WHOLE:
                check_whole(name, value, *WHOLE[name])
            elif name in NUMBERS:
                check_number(name, value, *NUMBERS[name])
            elif name == "hidden_act":
                check(name, value, value in ACT2FN, f"one of {', '.join(sorted(ACT2FN))}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> PreTrainedConfig:
        """As every configuration's, but fields in `kwargs` are there from the start, to be checked like the others."""
        names = [name for name in cls.__annotations__ if name in kwargs]
        if names:
            saved = cls(**config_dict).to_dict()
            changes = {name: kwargs.pop(name) for name in names}
            for name, value in changes.items():
                if isinstance(value, dict) and isinstance(saved.get(name), dict):
                    changes[name] = {**saved[name], **value}
            config_dict = {**saved, **changes}
        return super().from_dict(config_dict, **kwargs)


def _check_divides(divisor: int, number: int, names: str) -> None:
    if divisor < 1 or number < divisor or number % divisor:
        raise ValueError(f"{names} do not fit: {number} is not a positive multiple of {divisor}.")


@with_value_errors
@strict
class EfficientSamVisionConfig(EfficientSamConfigMixin, BackboneConfigMixin, PreTrainedConfig):
    r"""
    Configuration of the image encoder: a plain ViT with global attention and a convolutional neck.

    Args:
        hidden_size (`int`, *optional*, defaults to 192):
            Width of the transformer (Ti; 384 for S, 768 for B).
        output_channels (`int`, *optional*, defaults to 256):
            Channels of the image embeddings the neck gives.
        num_hidden_layers (`int`, *optional*, defaults to 12):
            Number of transformer blocks.
        num_attention_heads (`int`, *optional*, defaults to 3):
            Heads of every block.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the image.
        image_size (`int`, *optional*, defaults to 1024):
            Height and width in pixels that the processor stretches images to. The encoder itself takes any height
            and width that `patch_size` divides.
        patch_size (`int`, *optional*, defaults to 16):
            Height and width of a patch in pixels.
        pretrain_image_size (`int`, *optional*, defaults to 224):
            Image size whose grid the stored position table has (14 x 14 and one slot for the CLS token of
            pretraining); the table is resized bicubically to the grid of the input.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLPs.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of every layer norm in the encoder and its neck.
        attention_dropout (`float`, *optional*, defaults to 0.0):
            Dropout of the attention weights in training.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether the query, key and value projections have a bias.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the MLPs as a multiple of `hidden_size`.
    """

    base_config_key = "vision_config"
    model_type = "efficientsam_vision_model"

    hidden_size: int = 192
    output_channels: int = 256
    num_hidden_layers: int = 12
    num_attention_heads: int = 3
    num_channels: int = 3
    image_size: int = 1024
    patch_size: int = 16
    pretrain_image_size: int = 224
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    attention_dropout: float | int = 0.0
    qkv_bias: bool = True
    mlp_ratio: float | int = 4.0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs):
        self.check_fields()
        _check_divides(self.num_attention_heads, self.hidden_size, "num_attention_heads and hidden_size")
        _check_divides(self.patch_size, self.image_size, "patch_size and image_size")
        _check_divides(self.patch_size, self.pretrain_image_size, "patch_size and pretrain_image_size")
        self.stage_names = ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        kwargs.pop("stage_names", None)  # of a saved configuration, which had other layers if they are changed at load
        super().__post_init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Without the default stage, which is the last one of however many layers are loaded."""
        fields = super().to_dict()
        if fields["out_features"] == self.stage_names[-1:]:
            fields["out_features"] = fields["out_indices"] = None
        return fields


@with_value_errors
@strict
class EfficientSamPromptEncoderConfig(EfficientSamConfigMixin, PreTrainedConfig):
    r"""
    Configuration of the prompt encoder.

    Args:
        hidden_size (`int`, *optional*, defaults to 256):
            Width of a prompt token; the image embeddings have the same number of channels.
        background_points (`bool`, *optional*, defaults to `True`):
            Whether the model knows points with label 0. Released checkpoints do not: there a point with label 0 gets
            no type embedding at all, and asking for one is an error.
        mask_prompts (`bool`, *optional*, defaults to `True`):
            Whether the model takes low-resolution logits of an earlier prediction as a prompt. Released checkpoints
            do not.
        dense_boxes (`bool`, *optional*, defaults to `False`):
            Whether a box is a mask prompt too, filled: its corners as prompt tokens say where it is to a few
            thousandths of the image, its filled cells say it to a fraction of a pixel. Needs `mask_prompts`; a mask
            prompt that comes with a box is cut at it. On in what the recipes `nuclei` and `few_shot` produce.
        padded_prompt_tokens (`int`, *optional*):
            Number of tokens that the prompts of every object are padded to with a learned padding embedding. Released
            checkpoints were trained with 6, and their results depend on it; more prompts than that are an error.
            With `None` padding is masked out of the attention, so that it has no effect.
        mask_input_channels (`int`, *optional*, defaults to 16):
            Channels of the convolutions that embed a mask prompt.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation between these convolutions.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of their layer norms.
    """

    base_config_key = "prompt_encoder_config"
    model_type = "efficientsam_prompt_encoder"

    hidden_size: int = 256
    background_points: bool = True
    mask_prompts: bool = True
    dense_boxes: bool = False
    padded_prompt_tokens: int | None = None
    mask_input_channels: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6

    def __post_init__(self, **kwargs):
        self.check_fields()
        _check_divides(2, self.hidden_size, "2 (sine and cosine) and hidden_size")
        _check_divides(4, self.mask_input_channels, "4 and mask_input_channels")
        if self.dense_boxes and not self.mask_prompts:
            raise ValueError("dense_boxes is on and mask_prompts is off: a filled box is embedded as a mask prompt is")
        if self.padded_prompt_tokens is not None:
            check_whole("padded_prompt_tokens", self.padded_prompt_tokens, 2, 1000)  # a box is two
        super().__post_init__(**kwargs)


@with_value_errors
@strict
class EfficientSamMaskDecoderConfig(EfficientSamConfigMixin, PreTrainedConfig):
    r"""
    Configuration of the mask decoder: a two-way transformer between prompt tokens and image tokens.

    Args:
        hidden_size (`int`, *optional*, defaults to 256):
            Width of prompt and image tokens.
        hidden_act (`str`, *optional*, defaults to `"gelu"`):
            Activation of the MLPs, the upscaling and the heads (SAM has ReLU in some of these places).
        mlp_dim (`int`, *optional*, defaults to 2048):
            Width of the MLP of a two-way block.
        num_hidden_layers (`int`, *optional*, defaults to 2):
            Number of two-way blocks.
        num_attention_heads (`int`, *optional*, defaults to 8):
            Heads of every attention.
        attention_downsample_rate (`int`, *optional*, defaults to 2):
            Factor by which the cross-attentions are narrower than `hidden_size`.
        num_multimask_outputs (`int`, *optional*, defaults to 3):
            Number of candidate masks for an ambiguous prompt, beside the single mask.
        iou_head_depth (`int`, *optional*, defaults to 3):
            Linear layers of the head that predicts the IoU of every mask.
        iou_head_hidden_dim (`int`, *optional*, defaults to 256):
            Width of its hidden layers.
        layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of every norm in the decoder.
    """

    base_config_key = "mask_decoder_config"
    model_type = "efficientsam_mask_decoder"

    hidden_size: int = 256
    hidden_act: str = "gelu"
    mlp_dim: int = 2048
    num_hidden_layers: int = 2
    num_attention_heads: int = 8
    attention_downsample_rate: int = 2
    num_multimask_outputs: int = 3
    iou_head_depth: int = 3
    iou_head_hidden_dim: int = 256
    layer_norm_eps: float = 1e-5

    def __post_init__(self, **kwargs):
        self.check_fields()
        _check_divides(8, self.hidden_size, "8 (upscaling divides the channels by it) and hidden_size")
        width = self.num_attention_heads * self.attention_downsample_rate
        _check_divides(width, self.hidden_size, "num_attention_heads x attention_downsample_rate and hidden_size")
        super().__post_init__(**kwargs)


@with_value_errors
@strict
class EfficientSamConfig(EfficientSamConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`EfficientSamModel`].

    The defaults describe a model of this package with the Ti encoder; `from_preset` names the encoders of the paper.

    Args:
        vision_config (`dict` or `EfficientSamVisionConfig`, *optional*):
            The image encoder.
        prompt_encoder_config (`dict` or `EfficientSamPromptEncoderConfig`, *optional*):
            The prompt encoder.
        mask_decoder_config (`dict` or `EfficientSamMaskDecoderConfig`, *optional*):
            The mask decoder.

    Raises:
        ValueError: if the widths of the three parts do not fit each other.

    Example:

    ```python
    >>> from efficientsam_hf import EfficientSamConfig, EfficientSamModel

    >>> config = EfficientSamConfig.from_preset("ti", vision_config={"image_size": 512})
    >>> model = EfficientSamModel(config)
    ```
    """

    model_type = "efficientsam"
    sub_configs = {
        "vision_config": EfficientSamVisionConfig,
        "prompt_encoder_config": EfficientSamPromptEncoderConfig,
        "mask_decoder_config": EfficientSamMaskDecoderConfig,
    }

    vision_config: dict | PreTrainedConfig | None = None
    prompt_encoder_config: dict | PreTrainedConfig | None = None
    mask_decoder_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs):
        for name, config_class in self.sub_configs.items():
            given = getattr(self, name)
            # A folder's configuration file and its modeling file are separate modules under `trust_remote_code`, so
            # the check is for a dict and never for one of our classes.
            if given is None or isinstance(given, dict):
                setattr(self, name, config_class(**(given or {})))
        widths = {
            "vision_config.output_channels": self.vision_config.output_channels,
            "prompt_encoder_config.hidden_size": self.prompt_encoder_config.hidden_size,
            "mask_decoder_config.hidden_size": self.mask_decoder_config.hidden_size,
        }
        if len(set(widths.values())) > 1:
            raise ValueError(f"These widths must be equal: {widths}")
        if self.vision_config.patch_size != 16:
            raise ValueError(
                f"vision_config.patch_size is {self.vision_config.patch_size}, expected 16: the decoder's masks are a "
                "quarter of the image's size, four times the grid of patches"
            )
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, variant: str, **kwargs) -> "EfficientSamConfig":
        """Return the configuration of `variant` ("ti", "s" or "b"); `kwargs` are those of the constructor."""
        if variant not in VISION_PRESETS:
            raise ValueError(f"variant is {variant!r}, expected one of {sorted(VISION_PRESETS)}")
        vision_config = {**VISION_PRESETS[variant], **kwargs.pop("vision_config", {})}
        return cls(vision_config=vision_config, **kwargs)


__all__ = [
    "EfficientSamConfig",
    "EfficientSamMaskDecoderConfig",
    "EfficientSamPromptEncoderConfig",
    "EfficientSamVisionConfig",
]
