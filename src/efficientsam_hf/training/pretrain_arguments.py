# SPDX-License-Identifier: Apache-2.0
"""Arguments of a pretraining run."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.crops import RandomCrop
from ..models.configuration_sami import CHOICES, SamiConfig
from .arguments import PictureArguments, option
from .config_overrides import read_overrides
from .crop_preparation import CropPreparation


DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class PretrainArguments(PictureArguments):
    """A run of SAMI: the loop's arguments, the student, its teacher, and the pictures."""

    model: str = option("ti", "Preset to train from scratch (ti, s, b), or a SAMI folder or Hub id to go on from.")
    model_overrides: str = option(
        "{}", 'Further changes to the config of a preset, as YAML, e.g. "{vision_config: {num_hidden_layers: 6}}".'
    )
    mask_ratio: float = option(0.75, "Share of the patches that the encoder does not see.")
    target: str = option("features", "What is reconstructed.", choices=list(CHOICES["target"]))
    loss: str = option("mse", "Distance of reconstruction and target.", choices=list(CHOICES["loss"]))
    loss_tokens: str = option("all", "Patches that count (MAE: masked).", choices=list(CHOICES["loss_tokens"]))
    decoder: str = option(
        "cross_attention", "Decode masked tokens alone, or all (MAE).", choices=list(CHOICES["decoder"])
    )
    decoder_depth: int = option(8, "Blocks of the decoder.")
    decoder_width: int = option(512, "Width of the decoder.")
    decoder_heads: int = option(16, "Heads of the decoder.")
    teacher: str | None = option(
        None, "Vision model whose features are the target: a folder or Hub id, or `default`, the shipped EfficientSAM."
    )
    teacher_revision: str | None = option(None, "Commit, tag or branch of the teacher on the Hub.")
    teacher_resolution: int | None = option(
        None, "Side of the teacher's images in pixels; default its own. 224 gives SAM the student's grid."
    )
    teacher_dtype: str = option("float32", "Precision of the teacher's weights.", choices=list(DTYPES))
    train_features: str | None = option(
        None, "Cache of a teacher's features of the training pictures (efficientsam features), in place of a teacher."
    )
    train_images: str | None = option(None, "Folder of pictures, or of tars of them, which are streamed.")
    crop_min_scale: float = option(0.2, "Smallest share of a picture's area that a random crop covers (MAE: 0.2).")
    crop_max_scale: float = option(1.0, "Largest share of a picture's area that a random crop covers.")
    horizontal_flip: float = option(0.5, "Probability that a picture is mirrored left to right; not for scenes.")
    # The paper's, in the place of finetuning's.
    image_sizes: str = option("224", "Side of the training images in pixels, or stages: 0:128,0.7:224, as 0:128x64.")
    weight_decay: float = option(0.05, "Weight decay; parameters with one dimension get none.")
    adam_beta2: float = option(0.95, "AdamW: decay of the squared gradient average.")
    ema_decay: float = option(0.0, "Decay of the averaged weights that are saved; 0 switches it off.")
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory, a third more time."
    )

    may_change = PictureArguments.may_change | {"gradient_checkpointing"}

    def __post_init__(self):
        super().__post_init__()
        self.check_source("train_scenes", "train_images", "train_dataset")
        if self.train_images and not Path(self.train_images).is_dir():
            raise ValueError(f"train_images: {self.train_images} does not exist or is not a folder")
        if self.train_scenes:
            self.check_scene_sizes()
        given = [name for name in ("teacher", "train_features") if getattr(self, name)]
        if self.target == "pixels" and given:
            raise ValueError(f"target is 'pixels', which goes without {' and '.join(given)}")
        if self.target == "features" and not given:
            raise ValueError("target is 'features', which needs a teacher, or train_features with what it saw")
        if self.train_features and self.stream:
            raise ValueError("train_features is for pictures that are stored, not for a stream")
        self.preparation(None)
        if self.evaluate_every or self.evaluate_minutes:
            raise ValueError("evaluate_every and evaluate_minutes: nothing is evaluated during pretraining")
        self._check_student()

    def _check_student(self) -> None:
        """Raise ValueError unless there is such a student at every image size."""
        for stage in self.stages():
            SamiConfig(**self.student_fields(256, stage.image_size))

    def overrides(self) -> dict[str, Any]:
        """Changes to a preset's config."""
        return read_overrides(self.model_overrides, SamiConfig)

    def student_fields(self, target_width: int, image_size: int) -> dict[str, Any]:
        """Arguments of the student's config, but for the encoder's preset."""
        names = "mask_ratio target loss loss_tokens decoder decoder_depth decoder_width decoder_heads".split()
        own = {name: getattr(self, name) for name in names} | {"target_width": target_width}
        overrides = self.overrides()
        vision = {"image_size": image_size, **overrides.pop("vision_config", {})}
        return {**own, "vision_config": vision, **overrides}

    def preparation(self, teacher_size: int | None) -> CropPreparation:
        """How pictures are cropped; `teacher_size` for a teacher of another resolution than the student."""
        crops = RandomCrop(self.crop_min_scale, self.crop_max_scale, self.horizontal_flip)
        return CropPreparation(crops, teacher_size)
