# SPDX-License-Identifier: Apache-2.0
"""From an annotated picture to what a training batch holds of it."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.augmentation import Augmentation
from ..data.rle_masks import RleMasks
from .losses import binary_targets


DRAWS = 4  # of a random change before the picture stays as it is
CANDIDATES = 4  # objects of a picture that are changed with it, as a multiple of `objects`


@dataclass(frozen=True)
class MaskPreparation:
    """Draws objects of an annotated picture, changes both at random, and stretches them to a square.

    A sample is {"image": RGB PIL image, "masks": (N, H, W) bool array or `RleMasks`, "image_id" (optional)}; of
    `RleMasks` only those drawn are expanded where the picture's scale stays. Pictures and masks are stretched as
    `image_processor` does it. Objects that cover less than `min_area` or more than `max_area` of what is seen of the
    picture are left out; of the others up to `objects` are drawn. A random change that would leave none is drawn
    again, and not made if that does not help. With a change of scale some objects are drawn before it and no others
    are changed, since of hundreds few are trained.

    With `scale_of`, a side in pixels, objects are as large as if the whole picture had been stretched to that side:
    a smaller image shows a random part of the picture, and so many objects fewer as it is smaller in area. The prompt
    decoder, which works on the whole image for each object, has a fraction of the work with an object of such a part.
    """

    image_processor: Any
    objects: int = 8
    min_area: float = 0.0
    max_area: float = 0.9
    augmentation: Augmentation = field(default_factory=Augmentation)
    scale_of: int | None = None

    def __call__(self, sample: dict[str, Any], size: int, generator: np.random.Generator) -> dict[str, torch.Tensor]:
        """pixel_values (3, S, S), masks (Q, S, S) bool, object_mask (Q), padded at the end to Q = `slots(size)`.

        Raises ValueError if the masks do not fit their picture, or if it holds no object to train on.
        """
        shares, slots = self._check(sample), self.slots(size)
        changed = self._changed(sample, shares, size, generator)
        image, masks = changed["image"], changed["masks"]
        chosen = generator.permutation(self._fitting(_shares(masks)))[:slots]
        stretched = stretch_masks(torch.from_numpy(np.ascontiguousarray(masks[chosen])), size)
        pixels = self.image_processor(images=image, size=size, return_tensors="pt")["pixel_values"][0]
        missing = slots - len(stretched)
        real = torch.arange(slots) < len(stretched)
        return {"pixel_values": pixels, "masks": F.pad(stretched, (0, 0, 0, 0, 0, missing)), "object_mask": real}

    def _changed(
        self, sample: dict[str, Any], shares: np.ndarray, size: int, generator: np.random.Generator
    ) -> dict[str, Any]:
        """Some objects and their picture after a random change that leaves one; unchanged if none of a few does."""
        objects, count = self._candidates(shares, size)
        few = np.sort(generator.permutation(objects)[:count])
        some = {**sample, "masks": sample["masks"][few]}
        for _ in range(DRAWS):
            changed = self.augmentation(some, generator, self._zoom(size))
            if len(self._fitting(_shares(changed["masks"]))):
                return changed
        few = np.sort(generator.permutation(self._fitting(shares))[: self.slots(size)])
        return {**sample, "masks": sample["masks"][few]}

    def _zoom(self, size: int) -> float:
        return max(1.0, self.scale_of / size) if self.scale_of else 1.0

    def _candidates(self, shares: np.ndarray, size: int) -> tuple[np.ndarray, int]:
        """Indices of the objects that may fit after a change, and how many of them to change with the picture.

        Where its scale stays, they are those that fit and are trained. A change of scale lets others fit, and loses
        some.
        """
        zoom, change = self._zoom(size), self.augmentation
        if zoom == change.min_scale == change.max_scale == 1:
            return self._fitting(shares), self.slots(size)
        largest = shares * (zoom * change.max_scale) ** 2
        return np.flatnonzero((shares > 0) & (largest >= self.min_area)), CANDIDATES * self.objects

    def slots(self, size: int) -> int:
        """Objects that an image of this side has room for."""
        share = min(1.0, size / self.scale_of) ** 2 if self.scale_of else 1.0
        return max(1, round(self.objects * share))

    def stand_in(self, size: int, rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """What stands in a batch for a picture that cannot be used, whatever its good rows: zeros, and no object."""
        return {
            "pixel_values": torch.zeros(3, size, size),
            "masks": torch.zeros(self.slots(size), size, size, dtype=torch.bool),
            "object_mask": torch.zeros(self.slots(size), dtype=torch.bool),
        }

    def _check(self, sample: dict[str, Any]) -> np.ndarray:
        """Shares of the picture that its objects cover; ValueError if none fits or if masks do not fit the picture."""
        image, masks = sample["image"], sample["masks"]
        if masks.dtype != bool or masks.ndim != 3 or masks.shape[1:] != (image.height, image.width):
            raise ValueError(
                f"masks must be bool of shape (N, {image.height}, {image.width}) like their picture, "
                f"got {masks.dtype} of shape {masks.shape}"
            )
        shares = _shares(masks)
        if not len(self._fitting(shares)):
            name = f"picture {sample['image_id']}: " if "image_id" in sample else ""
            raise ValueError(
                f"{name}none of {len(masks)} objects covers {self.min_area} to {self.max_area} of the picture"
            )
        return shares

    def _fitting(self, shares: np.ndarray) -> np.ndarray:
        """Indices of the objects of fitting size."""
        return np.flatnonzero((shares > 0) & (shares >= self.min_area) & (shares <= self.max_area))


def _shares(masks: np.ndarray | RleMasks) -> np.ndarray:
    """Shares of the picture that masks (N, H, W) cover, (N,) float."""
    areas = masks.areas() if isinstance(masks, RleMasks) else np.count_nonzero(masks, axis=(1, 2))
    return areas / max(1, math.prod(masks.shape[1:]))


def stretch_masks(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Masks at another resolution: (N, H, W) bool -> (N, size, size) bool, pixels of which half or more is covered.

    A mask too thin to cover half of any pixel keeps those it covers most; none becomes empty.
    """
    stretched = masks.new_empty(len(masks), size, size)
    for index, mask in enumerate(masks):  # one by one: 64 large masks as floats would be a gigabyte
        covered = F.interpolate(mask[None, None].float(), (size, size), mode="area")[0, 0]
        stretched[index] = binary_targets(covered)
    return stretched
