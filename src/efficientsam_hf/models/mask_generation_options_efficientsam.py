# SPDX-License-Identifier: Apache-2.0
"""What segment everything can be asked for."""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from .checks_efficientsam import is_number, is_whole, short
from .mask_cleaning_efficientsam import MaskCleaning, changed_options


OUTPUT_TYPES = ("bool", "rle", "coco_rle")
SORTS = ("score", "area")
MOST_POINTS = 1024  # per side of a grid: a million prompts


@dataclass(frozen=True)
class MaskGenerationOptions:
    """What [`EfficientSamMaskGenerator`] can be asked for; names and meaning are those of `MaskGenerationPipeline`.

    Args:
        points_per_crop: points per side of the grid on the whole image.
        points_per_batch: prompts that are decoded before their masks are filtered, None for all; beyond rounding no
            result depends on it.
        pred_iou_thresh, stability_score_thresh: lower limits of a mask's predicted IoU and stability; 0 for none.
        stability_score_offset: how far the stability score moves the cut, in logits.
        mask_threshold: logits above it belong to the mask.
        crops_n_layers: layers of crops beside the whole image; layer i has 4**i.
        crop_overlap_ratio: overlap of the first layer's crops as a part of the image's shorter side.
        crop_n_points_downscale_factor: divides points_per_crop once more in every layer.
        crops_nms_thresh: box IoU above which the better mask suppresses the other: those of smaller crops come first,
            then those of higher score.
        box_nms_thresh: the same within each crop, by score; crops_nms_thresh when left out.
        mask_nms_thresh: IoU of masks above which the better one suppresses the other, whatever their boxes; None for
            boxes alone, as the stock pipeline does it.
        largest_part, fill_holes: as in [`MaskCleaning`], where the click of a mask is the point of the grid that gave
            it; the generator takes them from the processor's `mask_cleaning` where they are left out.
        max_hole_area, max_sprinkle_area: holes and specks of up to so many pixels of the image are filled and removed
            (needs scipy); masks that change by that give way to those that do not, above the larger of the two
            thresholds.
        output_type: "bool" for (H, W) arrays, "rle" or "coco_rle" for uncompressed or compressed run lengths alone.
        output_rle_mask, output_bboxes_mask: add "rle_mask" and "bounding_boxes" to the result, as the stock pipeline.
        sort_by: "score" or "area", the highest first.
    """

    points_per_crop: int = 32
    points_per_batch: int | None = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    mask_threshold: float = 0.0
    crops_n_layers: int = 0
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: float = 1
    crops_nms_thresh: float = 0.7
    box_nms_thresh: float | None = None
    mask_nms_thresh: float | None = None
    largest_part: bool | None = None
    fill_holes: float | None = None
    max_hole_area: int | None = None
    max_sprinkle_area: int | None = None
    output_type: str = "bool"
    output_rle_mask: bool = False
    output_bboxes_mask: bool = False
    sort_by: str = "score"

    def __post_init__(self):
        self._check("points_per_crop", is_whole, lambda value: value >= 1, "a whole number of at least 1")
        self._check("points_per_crop", is_whole, lambda value: value <= MOST_POINTS, f"at most {MOST_POINTS}")
        self._check("points_per_batch", is_whole, lambda value: value >= 1, "a whole number of at least 1", none=True)
        self._check("crops_n_layers", is_whole, lambda value: value >= 0, "a whole number of at least 0")
        for name in (
            "pred_iou_thresh",
            "stability_score_thresh",
            "crops_nms_thresh",
            "box_nms_thresh",
            "mask_nms_thresh",
        ):
            own = name in ("box_nms_thresh", "mask_nms_thresh")
            self._check(name, is_number, lambda value: 0 <= value <= 1, "a number from 0 to 1", none=own)
        self._check("crop_overlap_ratio", is_number, lambda value: 0 <= value < 1, "a number from 0 to below 1")
        factor = "crop_n_points_downscale_factor"
        self._check(factor, is_number, lambda value: 1 <= value <= MOST_POINTS, f"a number from 1 to {MOST_POINTS}")
        self._check("mask_threshold", is_number, math.isfinite, "a number")
        self._check("stability_score_offset", is_number, lambda value: 0 <= value < math.inf, "at least 0")
        for name in ("max_hole_area", "max_sprinkle_area"):
            self._check(name, is_number, lambda value: value >= 0, "at least 0", none=True)
        for name in ("output_rle_mask", "output_bboxes_mask"):
            self._check(name, lambda value: isinstance(value, bool), lambda value: True, "True or False")
        self.cleaning()
        self._check("output_type", _is_text, lambda value: value in OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}")
        self._check("sort_by", _is_text, lambda value: value in SORTS, f"one of {', '.join(SORTS)}")

    def _check(self, name: str, fits, accepts, expected: str, none: bool = False) -> None:
        value = getattr(self, name)
        if not (none and value is None) and not (fits(value) and accepts(value)):
            raise ValueError(f"{name} must be {expected}, got {short(value)}")

    def cleaning(self) -> MaskCleaning:
        """What is done to each mask, nothing where nothing is said; ValueError for a wrong value."""
        values = {name: getattr(self, name) for name in ("largest_part", "fill_holes")}
        return MaskCleaning().with_changes({name: value for name, value in values.items() if value is not None})

    @property
    def nms_thresh(self) -> float:
        """Box IoU above which masks of one crop suppress each other."""
        return self.crops_nms_thresh if self.box_nms_thresh is None else self.box_nms_thresh

    @classmethod
    def names(cls) -> list[str]:
        """Every option, in order."""
        return [field.name for field in dataclasses.fields(cls)]

    def with_changes(self, changes: dict[str, Any]) -> "MaskGenerationOptions":
        """These options with others in their place; TypeError if one is unknown, ValueError if a value is wrong."""
        return changed_options(self, changes, "mask generation")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


__all__ = ["OUTPUT_TYPES", "SORTS", "MaskGenerationOptions"]
