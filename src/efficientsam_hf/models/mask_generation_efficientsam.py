# SPDX-License-Identifier: Apache-2.0
"""Segment everything: crops, grids of points, filters and non-maximum suppression (SAM paper, appendix B).

The masks are those of the stock pipeline, which brings every mask to the size of the image and then filters. Here the
order is another: predicted IoU and, with a margin, stability are judged at low resolution, chunk by chunk of the grid.
What is left is then looked at from the highest score down, and only a mask that no better one is certain to suppress
is brought to the size of the image, in the window that it covers. So memory is bounded: by HELD_CELLS, a chunk and,
with run lengths as output, little for each mask.

Coordinates: points in model pixels for the model, boxes (x0, y0, x1, y1) of first and last pixels, of a crop or of the
whole image as each docstring says; cells are the pixels of low-resolution logits.
"""

import base64
import dataclasses
import http.client
import io
import math
import numbers
import os
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import MaskGenerationPipeline

from .fast_decoding_efficientsam import EfficientSamFastDecoder
from .found_masks_efficientsam import FoundMask, label_regions, suppress, without_small_regions
from .mask_geometry_efficientsam import (
    box_iou,
    cells_near,
    count_pixels,
    grid_side,
    masks_to_boxes,
    near_crop_edge,
    stability_scores,
)
from .rle_efficientsam import compress_counts, decode_rle, runs_to_counts


IMAGES_AT_ONCE = 8  # crops that the encoder takes in one batch
HELD_CELLS = 2**26  # of candidates' logits that are kept; what finds no room is decoded again when its turn comes
FILTERED_AT_ONCE = 32  # masks that are filtered at low resolution together, so that a CPU's cache holds them
MASKS_AT_ONCE = 16  # candidates that are looked at before the next ones are suppressed
STABILITY_MARGIN = 0.1  # what the stability of low-resolution logits may lack at least, where a mask has at least
STABILITY_CELLS = 64  # so many cells, each no smaller than a pixel; that of smaller ones says too little
LOGIT_MARGIN = 1.0  # how far below the threshold low-resolution logits can lie and rise above it by interpolation
DOWNLOAD_SECONDS = 30
OUTPUT_TYPES = ("bool", "rle", "coco_rle")
SORTS = ("score", "area")


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
    max_hole_area: int | None = None
    max_sprinkle_area: int | None = None
    output_type: str = "bool"
    output_rle_mask: bool = False
    output_bboxes_mask: bool = False
    sort_by: str = "score"

    def __post_init__(self):
        self._check("points_per_crop", _is_whole, lambda value: value >= 1, "a whole number of at least 1")
        self._check("points_per_batch", _is_whole, lambda value: value >= 1, "a whole number of at least 1", none=True)
        self._check("crops_n_layers", _is_whole, lambda value: value >= 0, "a whole number of at least 0")
        for name in ("pred_iou_thresh", "stability_score_thresh", "crops_nms_thresh", "box_nms_thresh"):
            own = name == "box_nms_thresh"
            self._check(name, _is_number, lambda value: 0 <= value <= 1, "a number from 0 to 1", none=own)
        self._check("crop_overlap_ratio", _is_number, lambda value: 0 <= value < 1, "a number from 0 to below 1")
        self._check("crop_n_points_downscale_factor", _is_number, lambda value: value >= 1, "a number of at least 1")
        self._check("mask_threshold", _is_number, math.isfinite, "a number")
        self._check("stability_score_offset", _is_number, lambda value: 0 <= value < math.inf, "at least 0")
        for name in ("max_hole_area", "max_sprinkle_area"):
            self._check(name, _is_number, lambda value: value >= 0, "at least 0", none=True)
        for name in ("output_rle_mask", "output_bboxes_mask"):
            self._check(name, lambda value: isinstance(value, bool), lambda value: True, "True or False")
        self._check("output_type", _is_text, lambda value: value in OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}")
        self._check("sort_by", _is_text, lambda value: value in SORTS, f"one of {', '.join(SORTS)}")

    def _check(self, name: str, fits, accepts, expected: str, none: bool = False) -> None:
        value = getattr(self, name)
        if not (none and value is None) and not (fits(value) and accepts(value)):
            raise ValueError(f"{name} must be {expected}, got {value!r}")

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
        unknown = sorted(set(changes) - set(self.names()))
        if unknown:
            raise TypeError(f"unknown option {unknown[0]!r} of mask generation, expected {', '.join(self.names())}")
        return dataclasses.replace(self, **changes)


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


@dataclass
class _Candidates:
    """What passed the filters at low resolution in one crop, of the highest predicted IoU first.

    `scores` (K) predicted IoU, `points` (K) and `tokens` (K) say which prompt and mask token gave a mask; `cores`
    (K, 4) and `windows` (K, 4) where it is in cells: those above the threshold in blocks of 2 x 2 (x1 < x0 where there
    is none), and all down to LOGIT_MARGIN below it, or further where stability looks further; `places` (K) where their
    logits are held, -1 for those that are not.
    """

    scores: torch.Tensor
    points: torch.Tensor
    tokens: torch.Tensor
    cores: torch.Tensor
    windows: torch.Tensor
    places: torch.Tensor

    def __getitem__(self, index: torch.Tensor) -> "_Candidates":
        return _Candidates(*(value[index] for value in vars(self).values()))

    @staticmethod
    def joined(parts: list["_Candidates"]) -> "_Candidates":
        return _Candidates(*map(torch.cat, zip(*(vars(part).values() for part in parts))))


class _HeldLogits:
    """Low-resolution logits of candidates: in one block of memory what each needs of them, until it is full."""

    def __init__(self):
        self.block = torch.empty(0)
        self.shape: tuple[int, int] = (0, 0)
        self.used = 0

    def add(self, masks: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
        """Take logits (M, h, w) with the windows (M, 4) of cells that matter: -> (M) places for `get`, -1 for none."""
        if not len(self.block):
            self.block, self.shape = masks.new_empty(HELD_CELLS), masks.shape[1:]
        places = []
        for mask, window in zip(masks, windows.tolist()):
            part = mask[cells_near(window)].reshape(-1)
            fits = self.used + len(part) <= len(self.block)
            places.append(self.used if fits else -1)
            if fits:
                self.block[self.used : self.used + len(part)] = part
                self.used += len(part)
        return torch.tensor(places, dtype=torch.long)

    def get(self, place: int, window: list[int]) -> torch.Tensor:
        """(h, w), with zeros where nothing matters."""
        logits = self.block.new_zeros(self.shape)
        part = logits[cells_near(window)]
        part.copy_(self.block[place : place + part.numel()].view_as(part))
        return logits


class EfficientSamMaskGenerator:
    r"""
    Masks of everything in an image, from a grid of points.

    Args:
        model (`EfficientSamModel`):
            Any model of this package, on its device and in its dtype.
        processor (`EfficientSamProcessor` or `EfficientSamImageProcessor`):
            Its processor; `mask_generation` of its config holds the options that suit the checkpoint.
        options:
            [`MaskGenerationOptions`] by name, for every image.

    Raises TypeError for another kind of model, and ValueError if the processor's size is not square or it does not
    bring images to that size.
    """

    def __init__(self, model: Any, processor: Any, **options: Any):
        if not hasattr(model, "decode_prompts"):
            raise TypeError(f"mask generation by this class is for EfficientSAM models, got a {type(model).__name__}")
        self.model = model
        self.image_processor = getattr(processor, "image_processor", processor)
        size = self.image_processor.size
        if size["height"] != size["width"]:
            raise ValueError(f"the size of the image processor must be square to lay out grids, got {size}")
        if not getattr(self.image_processor, "do_resize", True):
            raise ValueError("do_resize of the image processor must be True to lay out grids, got False")
        own = getattr(self.image_processor, "mask_generation", None) or {}
        self.options = MaskGenerationOptions().with_changes({**own, **options})

    @torch.no_grad()
    def __call__(self, images: Any, **options: Any) -> dict[str, Any] | list[dict[str, Any]]:
        """All masks of an image, which is anything that the image processor takes, or of each in a list.

        Returns:
            For an image a dict of `masks` (see `output_type`) and, for each of them, `scores` (K) float32, `boxes`
            (K, 4) int64 of first and last pixels of the image, `areas` (K) int64 in pixels, `points` (K, 2) float32,
            the click that gave it in pixels of the image, `stability_scores` (K) float32. An image without any has
            empty ones.

        Raises:
            TypeError, ValueError: for an unknown option or a wrong value, and for what is no image.
        """
        chosen = self.options.with_changes(options)
        if chosen.max_hole_area or chosen.max_sprinkle_area:
            label_regions()
        if not isinstance(images, (list, tuple)):
            return self._generate([images], chosen)[0]
        starts = range(0, len(images), IMAGES_AT_ONCE)
        return [result for i in starts for result in self._generate(images[i : i + IMAGES_AT_ONCE], chosen)]

    def _generate(self, images: Sequence[Any], options: MaskGenerationOptions) -> list[dict[str, Any]]:
        """Results of a few images, whose crops pass the encoder together."""
        layouts = [self._crops(image, options) for image in images]
        embeddings = self._embeddings([crop for _, _, crops in layouts for crop in crops])
        return [self._masks_of_image(boxes, points, embeddings, options) for boxes, points, _ in layouts]

    def _crops(self, image: Any, options: MaskGenerationOptions) -> tuple[torch.Tensor, torch.Tensor, list]:
        """Boxes of an image's crops, a grid for each, and the crops."""
        boxes, points, crops, _ = self.image_processor.generate_crop_boxes(
            image,
            self.image_processor.size["height"],
            options.crops_n_layers,
            options.crop_overlap_ratio,
            options.points_per_crop,
            options.crop_n_points_downscale_factor,
        )
        return boxes, points, crops

    def _embeddings(self, crops: list[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Embeddings of each crop, (1, C, h, w)."""
        parameter = next(self.model.parameters())
        for start in range(0, len(crops), IMAGES_AT_ONCE):
            pixels = self.image_processor(images=crops[start : start + IMAGES_AT_ONCE], return_tensors="pt")
            pixels = pixels["pixel_values"].to(parameter.device, parameter.dtype)
            yield from self.model.get_image_embeddings(pixels).split(1)

    def _masks_of_image(self, boxes, points, embeddings: Iterator[torch.Tensor], options) -> dict[str, Any]:
        image_size = (int(boxes[0, 3]), int(boxes[0, 2]))
        found: list[FoundMask] = []
        for index, box in enumerate(boxes.tolist()):
            embedding = next(embeddings)
            side = grid_side(index, options.points_per_crop, options.crop_n_points_downscale_factor)
            grid = points[0, : side**2, index].to(embedding.device)
            found += _Crop(self, embedding, grid, box, image_size, options).masks()
        if len(boxes) > 1:
            found = suppress(found, options.crops_nms_thresh, lambda mask: (mask.crop_area, -mask.score))
        if any(mask.changed for mask in found):
            threshold = max(options.nms_thresh, options.crops_nms_thresh)
            found = suppress(found, threshold, lambda mask: (mask.changed, -mask.score))
        return _result(found, image_size, options)


class _Crop:
    """One crop of an image, or the whole of it, with its grid of points."""

    def __init__(
        self,
        generator: EfficientSamMaskGenerator,
        embeddings: torch.Tensor,
        points: torch.Tensor,
        box: list[int],
        image_size: tuple[int, int],
        options: MaskGenerationOptions,
    ):
        self.decoder = EfficientSamFastDecoder(generator.model, embeddings)
        self.image_processor = generator.image_processor
        self.points, self.box, self.image_size, self.options = points, box, image_size, options
        self.size = (box[3] - box[1], box[2] - box[0])
        self.cells = (4 * embeddings.shape[2], 4 * embeddings.shape[3])
        self.cells_per_pixel = max(1.0, math.prod(self.cells) / math.prod(self.size))
        self.patch_size = generator.model.config.vision_config.patch_size

    def masks(self) -> list[FoundMask]:
        """Masks that pass all filters and that no better one of this crop suppresses."""
        candidates, held = self._candidates()
        threshold = self.options.nms_thresh
        inner, outer = self._box_limits(candidates)
        alive = torch.ones(len(candidates.scores), dtype=torch.bool)
        kept: list[FoundMask] = []
        boxes = torch.empty(0, 4)
        while alive.any():
            turn = alive.nonzero()[:MASKS_AT_ONCE, 0].tolist()
            alive[turn] = False
            before = len(boxes)
            for index, logits in zip(turn, self._logits(candidates, turn, held)):
                mask = self._exact_mask(candidates, index, logits)
                if mask is None:
                    continue
                box = torch.tensor([mask.box], dtype=torch.float32)
                if not (box_iou(box, boxes) > threshold).any():
                    boxes = torch.cat([boxes, box])
                    kept.append(self._cleaned(mask).packed(self.image_size))
            if len(boxes) > before:
                alive &= ~(_certain_iou(inner, outer, boxes[before:]) > threshold).any(1)
        return kept

    def _candidates(self) -> tuple[_Candidates, _HeldLogits]:
        """Every point's masks, filtered at low resolution, and their logits as far as they are held."""
        parts: list[_Candidates] = []
        held = _HeldLogits()
        batch = self.options.points_per_batch or len(self.points)
        for start in range(0, len(self.points), batch):
            parts.append(self._filtered(start, min(start + batch, len(self.points)), held))
        candidates = _Candidates.joined(parts)
        return candidates[candidates.scores.argsort(descending=True, stable=True)], held

    def _filtered(self, start: int, end: int, held: _HeldLogits) -> _Candidates:
        """What a part of the grid gives."""
        threshold = self.options.pred_iou_thresh if self.options.pred_iou_thresh > 0 else -math.inf
        masks, scores, prompts = self.decoder.decode_above(threshold, *self._clicks(self.points[start:end]))
        masks, scores = masks[:, 1:], scores[:, 1:].float()
        parts = []
        for rows, tokens in zip(
            *(found.split(FILTERED_AT_ONCE) for found in (scores > threshold).nonzero().unbind(1))
        ):
            logits = masks[rows, tokens]
            good, cores, windows = self._promising(logits)
            rows, tokens = rows[good], tokens[good]
            places = held.add(logits[good], windows)
            points = (start + prompts[rows]).cpu()
            parts.append(_Candidates(scores[rows, tokens].cpu(), points, tokens.cpu(), cores, windows, places))
        return _Candidates.joined(parts)

    def _promising(self, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Which logits (M, h, w) may be masks at full size, and where: -> (M) bool, (K, 4) cores, (K, 4) windows."""
        options = self.options
        logits = masks.float()  # CPUs compare these many times as fast as bfloat16
        inside = logits > options.mask_threshold
        around = logits > options.mask_threshold - max(options.stability_score_offset, LOGIT_MARGIN)
        cells = count_pixels(around)
        good = cells > 0
        if options.stability_score_thresh > 0:
            good &= (cells < STABILITY_CELLS * self.cells_per_pixel) | _may_be_stable(logits, options)
        return good, _block_boxes(inside[good]).cpu(), masks_to_boxes(around[good]).cpu()

    @staticmethod
    def _clicks(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt for each point: (Q, 2) -> (Q, 1, 2), labels (Q, 1)."""
        return points[:, None], torch.ones(len(points), 1, dtype=torch.long, device=points.device)

    def _logits(self, candidates: _Candidates, turn: list[int], held: _HeldLogits) -> list[torch.Tensor]:
        """Low-resolution logits of some candidates; those that are not held are decoded again."""
        missing = [index for index in turn if candidates.places[index] < 0]
        logits = {
            index: held.get(int(candidates.places[index]), candidates.windows[index].tolist())
            for index in turn
            if index not in missing
        }
        if missing:
            points = self.points[candidates.points[missing].to(self.points.device)]
            masks, _ = self.decoder(*self._clicks(points))
            for row, index in enumerate(missing):
                logits[index] = masks[row, 1 + candidates.tokens[index]]
        return [logits[index] for index in turn]

    def _box_limits(self, candidates: _Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest box in pixels of the image that each exact mask can have: (K, 4), (K, 4).

        A block of cells above the threshold stays above it between their centres, where a single cell may vanish.
        Beyond the window the logits are so far below it that interpolation, which overshoots next to larger values,
        hardly lifts them over it.
        """
        scale = torch.tensor([self.size[1] / self.cells[1], self.size[0] / self.cells[0]] * 2)
        outwards = torch.tensor([-1.0, -1.0, 1.0, 1.0])
        origin, end = torch.tensor(self.box[:2] * 2), torch.tensor(self.box[2:] * 2) - 1
        inner, outer = ((boxes + 0.5) * scale - 0.5 + origin for boxes in (candidates.cores, candidates.windows))
        return inner - outwards, (outer + outwards * (scale + 1)).clamp(origin, end)

    def _exact_mask(self, candidates: _Candidates, index: int, logits: torch.Tensor) -> FoundMask | None:
        """A candidate at the size of the crop; None if it is not stable there, empty, or at an inner edge."""
        options = self.options
        logits, (x, y) = self.image_processor.resize_window(logits, self.size, candidates.windows[index].tolist())
        stability = float(stability_scores(logits[None], options.mask_threshold, options.stability_score_offset)[0])
        if options.stability_score_thresh > 0 and not stability > options.stability_score_thresh:
            return None
        mask = logits > options.mask_threshold
        area = int(count_pixels(mask[None]))
        if not area:
            return None
        own = masks_to_boxes(mask[None]).cpu()
        box = own + torch.tensor([x, y, x, y])
        if near_crop_edge(box, self.box, self.image_size)[0]:
            return None
        left, top = self.box[:2]
        x0, y0, x1, y1 = own[0].tolist()
        return FoundMask(
            window=mask[y0 : y1 + 1, x0 : x1 + 1].cpu().numpy(),
            box=(box[0] + torch.tensor([left, top] * 2)).tolist(),
            area=area,
            score=float(candidates.scores[index]),
            stability=stability,
            point=self._image_point(int(candidates.points[index])),
            crop_area=self.size[0] * self.size[1],
        )

    def _image_point(self, index: int) -> list[float]:
        """A point of the grid in pixels of the image."""
        model_size = [side / 4 * self.patch_size for side in self.cells]
        x, y = (
            (value + 0.5) * own / side
            for value, own, side in zip(self.points[index].tolist(), self.size[::-1], model_size[::-1])
        )
        return [x + self.box[0], y + self.box[1]]

    def _cleaned(self, mask: FoundMask) -> FoundMask:
        """The mask without small holes and specks, if they are to go."""
        hole, speck = self.options.max_hole_area or 0, self.options.max_sprinkle_area or 0
        return without_small_regions(mask, self.image_size, hole, speck) if hole or speck else mask


def _may_be_stable(logits: torch.Tensor, options: MaskGenerationOptions) -> torch.Tensor:
    """Whether masks can pass the limit of stability at full size: (M, h, w) float32 -> (M) bool."""
    threshold, offset = options.mask_threshold, options.stability_score_offset
    lacking = options.stability_score_thresh - stability_scores(logits, threshold, offset)
    good = lacking < STABILITY_MARGIN
    doubtful = (~good).nonzero()[:, 0]
    good[doubtful] = lacking[doubtful] < _rising_share(logits[doubtful], threshold, offset)
    return good


def _rising_share(logits: torch.Tensor, mask_threshold: float, offset: float) -> torch.Tensor:
    """What the stability of masks at full size hardly gains: (M, h, w) -> (M), a part of their cells.

    Where a mask ends steeply, interpolation rises above its outermost cells, and those may belong to the smaller of
    the two masks too. Of a large mask they are few; of a thin one all are. Cells near the lower cut lie on a gentle
    slope, or too deep to rise so far.
    """
    larger = logits > mask_threshold - offset
    rows = larger[:, :, :-2] & larger[:, :, 1:-1] & larger[:, :, 2:]
    inner = F.pad(rows[:, :-2] & rows[:, 1:-1] & rows[:, 2:], (1, 1, 1, 1))
    rising = (logits > mask_threshold - offset / 2) & (logits <= mask_threshold + offset) & ~inner
    return count_pixels(rising) / count_pixels(larger).clamp(min=1)


def _block_boxes(masks: torch.Tensor) -> torch.Tensor:
    """Boxes of what masks have in blocks of 2 x 2: (M, H, W) bool -> (M, 4) int64, x1 < x0 where there is none."""
    blocks = masks[:, 1:, 1:] & masks[:, 1:, :-1] & masks[:, :-1, 1:] & masks[:, :-1, :-1]
    boxes = masks_to_boxes(blocks) + torch.tensor([0, 0, 1, 1], device=masks.device)
    nothing = torch.tensor([0, 0, -1, -1], device=masks.device)
    return torch.where((count_pixels(blocks) > 0)[:, None], boxes, nothing)


def _certain_iou(inner: torch.Tensor, outer: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Lower limit of the IoU of boxes that lie between two, (K, 4) and (K, 4), with others, (M, 4): -> (K, M)."""
    corner0 = torch.maximum(inner[:, None, :2], boxes[:, :2])
    corner1 = torch.minimum(inner[:, None, 2:], boxes[:, 2:])
    shared = (corner1 - corner0).clamp(min=0).prod(-1)
    most = (outer[:, 2:] - outer[:, :2]).prod(-1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (most - shared).clamp(min=1e-6)


def _result(masks: list[FoundMask], image_size: tuple[int, int], options: MaskGenerationOptions) -> dict[str, Any]:
    """What the generator returns for an image."""
    masks = sorted(masks, key=lambda mask: -(mask.score if options.sort_by == "score" else mask.area))
    result = {
        "masks": [_encoded(mask, image_size, options.output_type) for mask in masks],
        "scores": torch.tensor([mask.score for mask in masks], dtype=torch.float32),
        "boxes": torch.tensor([mask.box for mask in masks], dtype=torch.long).reshape(-1, 4),
        "areas": torch.tensor([mask.area for mask in masks], dtype=torch.long),
        "points": torch.tensor([mask.point for mask in masks], dtype=torch.float32).reshape(-1, 2),
        "stability_scores": torch.tensor([mask.stability for mask in masks], dtype=torch.float32),
    }
    if options.output_rle_mask:
        result["rle_mask"] = [_encoded(mask, image_size, "rle") for mask in masks]
    if options.output_bboxes_mask:
        result["bounding_boxes"] = result["boxes"]
    return result


def _encoded(mask: FoundMask, image_size: tuple[int, int], output_type: str) -> np.ndarray | dict[str, Any]:
    """A mask of the whole image: (H, W) bool, or its run lengths."""
    counts = runs_to_counts(mask.runs, image_size[0] * image_size[1])
    if output_type == "coco_rle":
        return compress_counts(counts, image_size)
    rle = {"size": list(image_size), "counts": counts.tolist()}
    return rle if output_type == "rle" else decode_rle(rle)


class EfficientSamMaskGenerationPipeline(MaskGenerationPipeline):
    """`pipeline("mask-generation")` on [`EfficientSamMaskGenerator`].

    It takes images as the stock pipeline does, arrays and tensors too, and every option of [`MaskGenerationOptions`];
    unknown ones are a TypeError. With `batch_size` so many images pass the encoder together. `num_workers` changes
    nothing: images are decoded in this process. A file is turned the way its EXIF orientation says; a PIL image is
    taken in the pixels it has.
    """

    def _sanitize_parameters(self, timeout: float | None = None, **options: Any) -> tuple[dict, dict, dict]:
        MaskGenerationOptions().with_changes(options)
        return ({} if timeout is None else {"timeout": timeout}), options, {}

    def get_iterator(
        self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[dict[str, Any]]:
        """Results of images, one by one, computed in batches."""
        # Of the data sets of torch those read by index do not end by themselves, those read in order have no length.
        images = iter(inputs) if isinstance(inputs, Iterable) else (inputs[i] for i in range(len(inputs)))
        while batch := list(islice(images, batch_size)):
            loaded = [self.preprocess(image, **preprocess_params) for image in batch]
            yield from self.postprocess(self.forward({"images": loaded}, **forward_params), **postprocess_params)

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:
        """Fetch a URL within `timeout` seconds, decode base64 text; everything else is left to the image processor.

        Raises OSError if a URL cannot be read.
        """
        if not isinstance(image, str) or os.path.exists(image):
            return image
        if image.startswith(("http://", "https://")):
            return image if timeout is None else io.BytesIO(download(image, timeout))
        return _decoded(image)

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {
            "results": EfficientSamMaskGenerator(self.model, self.image_processor)(model_inputs["images"], **options)
        }

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        return model_outputs["results"]


def download(url: str, seconds: float = DOWNLOAD_SECONDS) -> bytes:
    """Fetch a URL within so many seconds without an answer; OSError that names it and the reason."""
    request = urllib.request.Request(url, headers={"User-Agent": "efficientsam-hf"})
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return response.read()
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise OSError(f"cannot download {url}: {error}") from error


def _decoded(text: str) -> io.BytesIO | str:
    """The file that base64 text stands for; text that is something else, such as a path, as it is."""
    data = text.partition(",")[2] if text.startswith("data:image/") else text
    try:
        return io.BytesIO(base64.b64decode("".join(data.split()), validate=True))
    except ValueError:
        return text


__all__ = [
    "EfficientSamMaskGenerationPipeline",
    "EfficientSamMaskGenerator",
    "MaskGenerationOptions",
    "download",
]
