# SPDX-License-Identifier: Apache-2.0
"""Teachers of SAMI pretraining: frozen vision models whose features a student learns to reconstruct."""

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from transformers.modeling_outputs import BaseModelOutput

from ..identity import model_revision
from ..models.modeling_efficientsam_vision import EfficientSamVisionModel
from ..models.modeling_sami import SamiForPreTraining
from ..pretrained import check_preprocessing, load_config, load_pretrained


PARTS = ("vision_model", "vision_encoder")  # where models of two modalities, and promptable ones, keep the encoder
UNUSED = r"(^|\.)pooler\."  # of a ViT that was saved with a head; what is used comes before it


@dataclass
class Teacher:
    """A frozen encoder with the normalisation and resolution of its input.

    `name` and `revision` (the commit on the Hub, or "sha256:..." of a folder) say which it is; `resolution` is the
    side of its input in pixels, `patch_size` that of its patches, `width` the channels of its features. They are
    computed in the dtype of its weights, also where the student's forward runs under autocast.
    """

    model: nn.Module
    name: str
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    resolution: int
    patch_size: int
    width: int
    revision: str

    def __deepcopy__(self, memo: dict) -> "Teacher":
        """Nothing changes a teacher, so copies of what holds one share it."""
        return self

    @torch.no_grad()
    def features(self, images: torch.Tensor, grid: tuple[int, int], check: bool = True) -> torch.Tensor:
        """Patch features at a student's grid: (B, 3, R, R) RGB in [0, 1] -> (B, h * w, C) float32, row by row.

        R is the teacher's resolution. A map of another size is resampled, averaging where it shrinks; nothing is
        normalised (paper, section 3.1). Raises ValueError for images of another size, and for features that are not
        one vector a patch or, with `check`, not finite.
        """
        if images.ndim != 4 or images.shape[1:] != (3, self.resolution, self.resolution):
            raise ValueError(
                f"images has shape {tuple(images.shape)}, expected (B, 3, {self.resolution}, {self.resolution}) for "
                f"teacher {self.name}"
            )
        weights = next(self.model.parameters())
        images = images.to(weights.device, torch.float32)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (self.mean, self.std))
        with torch.autocast(weights.device.type, enabled=False):
            maps = self._maps(((images - mean) / std).to(weights.dtype))
        if maps.shape[2:] != tuple(grid):
            maps = F.interpolate(maps, grid, mode="bilinear", antialias=True, align_corners=False)
        if check and not maps.isfinite().all():
            number = int((~maps.isfinite()).flatten(1).any(1).int().argmax())
            raise ValueError(f"teacher {self.name}: features of image {number} of the batch are not finite")
        return maps.flatten(2).transpose(1, 2)

    def _maps(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B, 3, R, R) normalised -> (B, C, r, r) float32."""
        # Position tables for another image size: some models resize theirs only when they are asked to.
        asks = "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters
        outputs = self.model(pixel_values, **({"interpolate_pos_encoding": True} if asks else {}))
        features = outputs.last_hidden_state.float()
        side = self.resolution // self.patch_size
        tokens = features.ndim == 3 and features.shape[1] >= side * side and features.shape[2] == self.width
        if tokens:  # CLS and register tokens come first
            return features[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))
        if features.ndim == 4 and features.shape[1] == self.width:
            return features
        raise ValueError(
            f"teacher {self.name}: features of shape {tuple(features.shape)} are no vector of {self.width} channels "
            f"for each of its {side} x {side} patches"
        )


def load_teacher(
    name: str,
    resolution: int | None = None,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    mean: tuple[float, float, float] | None = None,
    std: tuple[float, float, float] | None = None,
    trust_remote_code: bool = False,
) -> Teacher:
    """Load the encoder of a transformers vision model (SAM, CLIP, SigLIP, DINOv2 and v3, ViT, ...) or of one of ours.

    `resolution` is that of its training unless it is given; position tables are resized for another one. For SAM the
    paper leaves it open: 224 makes SAM's own grid the student's, 1024 is what SAM was made for. `mean` and `std` are
    those of its image processor unless they are given. Code beside a model of an unknown kind runs only with
    `trust_remote_code`. Features are the encoder's `last_hidden_state`, without CLS and
    register tokens: of SAM and EfficientSAM the image embeddings, of a SAMI model the tokens after its final norm, of
    CLIP the tokens before its last norm, which is for the CLS token alone.

    Raises ValueError if the resolution does not fit its patches or the model is no vision transformer, and OSError if
    there is no such model or, but for SAMI models, no normalisation beside it.
    """
    commit = model_revision(name, revision)
    revision = None if Path(name).is_dir() else commit  # of all that is loaded
    config = load_config(AutoConfig, name, revision, trust_remote_code)
    vision = getattr(config, "vision_config", config)
    own_size, patch_size = (_side(getattr(vision, field, None)) for field in ("image_size", "patch_size"))
    if not own_size or not patch_size:
        raise ValueError(f"teacher {name}: a {config.model_type} has no image_size and patch_size, expected a ViT")
    resolution = resolution or own_size
    if resolution < patch_size or resolution % patch_size:
        raise ValueError(f"resolution is {resolution}, expected a multiple of the patches of {name}, {patch_size}")
    if mean is None or std is None:
        processor = _image_processor(name, revision, config.model_type)
        mean, std = mean or processor.get("image_mean"), std or processor.get("image_std")
    if not mean or not std:
        raise ValueError(f"teacher {name}: its image processor has no image_mean and image_std")
    try:
        check_preprocessing({"image_mean": mean, "image_std": std})
    except ValueError as error:
        raise ValueError(f"teacher {name}: {error}") from None
    model = _load_encoder(name, config.model_type, revision, dtype, trust_remote_code)
    if getattr(getattr(model, "pos_embed", None), "ndim", 0) == 4:  # SAM
        _resize_positions(model, resolution // patch_size, patch_size)
    of_tokens = config.model_type == "sami"  # whose config knows the neck that only segmentation has
    width = vision.hidden_size if of_tokens else getattr(vision, "output_channels", vision.hidden_size)
    model = model.to(device).eval().requires_grad_(False)
    return Teacher(model, name, tuple(mean), tuple(std), resolution, patch_size, width, commit)


def _image_processor(name: str, revision: str | None, model_type: str) -> dict[str, Any]:
    """What lies beside the model; pretraining leaves none beside a SAMI model, and normalises as for ImageNet."""
    try:
        return ImageProcessingMixin.get_image_processor_dict(name, revision=revision)[0]
    except OSError:
        if model_type != "sami":
            raise
        return {"image_mean": IMAGENET_DEFAULT_MEAN, "image_std": IMAGENET_DEFAULT_STD}


def _side(size: Any) -> int | None:
    """Of a square, given by one number or two."""
    if isinstance(size, (list, tuple)):
        return size[0] if len(set(size)) == 1 else None
    return size


def _load_encoder(
    name: str, model_type: str, revision: str | None, dtype: torch.dtype | None, trust_remote_code: bool
) -> nn.Module:
    options: dict[str, Any] = {"revision": revision, **({"dtype": dtype} if dtype else {})}
    if model_type == "sami":
        return _SamiTokens(load_pretrained(SamiForPreTraining, name, **options))
    if model_type.startswith("efficientsam"):
        return load_pretrained(EfficientSamVisionModel, name, part=True, **options)
    options |= {"trust_remote_code": trust_remote_code, "optional": UNUSED, "part": True}
    model = load_pretrained(AutoModel, name, **options)
    return next((getattr(model, part) for part in PARTS if hasattr(model, part)), model)


class _SamiTokens(nn.Module):
    def __init__(self, sami: SamiForPreTraining) -> None:
        super().__init__()
        self.sami = sami

    def forward(self, pixel_values: torch.Tensor) -> BaseModelOutput:
        return BaseModelOutput(last_hidden_state=self.sami.encode(pixel_values))


def _resize_positions(encoder: nn.Module, grid: int, patch_size: int) -> None:
    """Let SAM's encoder take images of another size; its relative positions follow by themselves."""
    table = encoder.pos_embed
    if table.shape[1:3] == (grid, grid):
        return
    resized = F.interpolate(table.detach().float().permute(0, 3, 1, 2), (grid, grid), mode="bicubic")
    encoder.pos_embed = nn.Parameter(resized.permute(0, 2, 3, 1).to(table.dtype))
    encoder.patch_embed.image_size = (grid * patch_size, grid * patch_size)
