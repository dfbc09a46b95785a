# SPDX-License-Identifier: Apache-2.0
"""From a picture to what a pretraining batch holds of it: a random crop, for the student and for its teacher."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.crops import RandomCrop, crop
from .normalization import normalize


PATCH_SIZE = 16  # of every student: an EfficientSAM has no other


@dataclass(frozen=True)
class CropPreparation:
    """A random part of the picture, stretched to a square.

    `teacher_size` is the side of a second copy of the same part for a teacher that looks at another resolution than
    the student; None for none.
    """

    crops: RandomCrop = field(default_factory=RandomCrop)
    teacher_size: int | None = None

    def __call__(self, sample: dict[str, Any], size: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """pixel_values (3, S, S), ImageNet-normalised, and noise (N,), which decides what is hidden.

        With `teacher_size` R there are teacher_images (3, R, R) in [0, 1] as well.
        """
        image = sample["image"]
        box, mirrored = self.crops.draw(image.size, generator)
        noise = draw_noise((size // PATCH_SIZE) ** 2, generator)
        row = {"pixel_values": normalize(crop(image, box, size, mirrored)), "noise": noise}
        if self.teacher_size is not None:
            row["teacher_images"] = crop(image, box, self.teacher_size, mirrored)
        return row

    def stand_in(self, size: int, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What stands in a batch for a picture that cannot be read: one of its good rows, or the mean colour."""
        if rows:
            return rows[0]
        grey = Image.new("RGB", (1, 1), (124, 116, 104))
        return self({"image": grey}, size, np.random.default_rng(0))


@dataclass(frozen=True)
class CachedCropPreparation:
    """A part of the picture with the teacher's features of it from a cache; samples are those of `CachedSamples`."""

    def __call__(self, sample: dict[str, Any], size: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """pixel_values (3, S, S), ImageNet-normalised, noise (N,) and target_features (N, C), float32."""
        side = size // PATCH_SIZE
        box, mirrored, features = sample["part"](generator, (side, side))
        pixels = normalize(crop(sample["image"], box, size, mirrored))
        return {"pixel_values": pixels, "noise": draw_noise(side * side, generator), "target_features": features}


def draw_noise(count: int, generator: np.random.Generator) -> torch.Tensor:
    """Numbers by which patches are hidden, -> (N,) float32."""
    return torch.from_numpy(generator.random(count, dtype=np.float32))
