# SPDX-License-Identifier: Apache-2.0
"""Configuration of SAMI pretraining (Xiong et al., CVPR 2024, arXiv 2312.00863, section 3.1)."""

from huggingface_hub.dataclasses import strict
from transformers.configuration_utils import PreTrainedConfig

from .checks_efficientsam import with_value_errors
from .configuration_efficientsam import VISION_PRESETS, EfficientSamConfigMixin, EfficientSamVisionConfig


CHOICES = {
    "target": ("features", "pixels"),
    "decoder": ("cross_attention", "full"),
    "loss": ("mse", "cosine"),
    "loss_tokens": ("all", "masked"),
}


@with_value_errors
@strict
class SamiConfig(EfficientSamConfigMixin, PreTrainedConfig):
    r"""
    Configuration of [`SamiForPreTraining`]; the defaults are the paper's Ti, pretrained with SAM's features as target.

    What the paper leaves open is marked "ours" with the reason, or "MAE" where its code, which the paper builds on,
    decides.

    Args:
        vision_config (`dict` or `EfficientSamVisionConfig`, *optional*):
            The encoder; `image_size` is 224 unless it is given.
        mask_ratio (`float`, *optional*, defaults to 0.75):
            Share of the patches that the encoder does not see.
        target (`str`, *optional*, defaults to `"features"`):
            `"features"`: a teacher's, given with every batch. `"pixels"`: the patches' own pixels (MAE mode).
        target_width (`int`, *optional*, defaults to 256):
            Channels of the teacher's features; with `target="pixels"` it is that of a patch, whatever is given.
        normalize_pixels (`bool`, *optional*, defaults to `True`):
            Whether every patch of a pixel target has mean 0 and variance 1 (MAE). Features are never normalised.
        loss (`str`, *optional*, defaults to `"mse"`):
            `"mse"`, or `"cosine"`: 1 - cosine similarity of a token's reconstruction and target.
        loss_tokens (`str`, *optional*, defaults to `"all"`):
            `"all"` tokens or `"masked"` ones alone (MAE).
        decoder (`str`, *optional*, defaults to `"cross_attention"`):
            `"cross_attention"`: masked tokens attend to encoder outputs and to each other, encoder outputs stay as
            they are. `"full"`: self-attention of all tokens, of which all are decoded (MAE).
        decoder_depth (`int`, *optional*, defaults to 8):
            Blocks of the decoder.
        decoder_width (`int`, *optional*, defaults to 512):
            Width of the decoder (MAE).
        decoder_heads (`int`, *optional*, defaults to 16):
            Heads of the decoder (MAE).
        decoder_mlp_ratio (`float`, *optional*, defaults to 4.0):
            Width of the decoder's MLPs as a multiple of `decoder_width` (MAE).
        decode_cls_token (`bool`, *optional*, defaults to `True`):
            Whether the encoder's CLS token is among what the decoder attends to. Ours: MAE's decoder has it, and
            without it nothing would train that token.
        learn_positions (`bool`, *optional*, defaults to `False`):
            Whether the encoder's position table is trained. MAE: it stays the sine-cosine one; finetuning trains it.

    Raises:
        ValueError: for an unknown choice, or a mask ratio that leaves no visible or no masked patch.

    Example:

    ```python
    >>> from efficientsam_hf import SamiConfig, SamiForPreTraining

    >>> model = SamiForPreTraining(SamiConfig.from_preset("s", mask_ratio=0.6))
    >>> mae = SamiForPreTraining(SamiConfig(target="pixels", loss_tokens="masked", decoder="full"))
    ```
    """

    model_type = "sami"
    sub_configs = {"vision_config": EfficientSamVisionConfig}

    vision_config: dict | PreTrainedConfig | None = None
    mask_ratio: float = 0.75
    target: str = "features"
    target_width: int = 256
    normalize_pixels: bool = True
    loss: str = "mse"
    loss_tokens: str = "all"
    decoder: str = "cross_attention"
    decoder_depth: int = 8
    decoder_width: int = 512
    decoder_heads: int = 16
    decoder_mlp_ratio: float | int = 4.0
    decode_cls_token: bool = True
    learn_positions: bool = False

    def __post_init__(self, **kwargs):
        self.check_fields()
        if self.vision_config is None or isinstance(self.vision_config, dict):
            self.vision_config = EfficientSamVisionConfig(**{"image_size": 224, **(self.vision_config or {})})
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected one of {', '.join(known)}")
        if self.decoder_width % self.decoder_heads:
            raise ValueError(
                f"decoder_width is {self.decoder_width}, expected a multiple of decoder_heads ({self.decoder_heads})"
            )
        if self.target == "pixels":
            self.target_width = self.vision_config.num_channels * self.vision_config.patch_size**2
        self.num_visible((self.vision_config.image_size // self.vision_config.patch_size) ** 2)
        super().__post_init__(**kwargs)

    @classmethod
    def from_preset(cls, variant: str, **kwargs) -> "SamiConfig":
        """Return the configuration of `variant` ("ti", "s" or "b"); `kwargs` are those of the constructor."""
        if variant not in VISION_PRESETS:
            raise ValueError(f"variant is {variant!r}, expected one of {sorted(VISION_PRESETS)}")
        return cls(vision_config={**VISION_PRESETS[variant], **kwargs.pop("vision_config", {})}, **kwargs)

    def num_visible(self, num_patches: int) -> int:
        """How many of an image's patches the encoder sees; ValueError if that is none or all of them."""
        visible = int(num_patches * (1 - self.mask_ratio))
        if not 0 < visible < num_patches:
            raise ValueError(
                f"mask_ratio is {self.mask_ratio}: of {num_patches} patches it leaves {visible} visible, expected at "
                "least one visible and one masked"
            )
        return visible


__all__ = ["SamiConfig"]
