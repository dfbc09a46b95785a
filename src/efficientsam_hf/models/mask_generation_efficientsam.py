# SPDX-License-Identifier: Apache-2.0
"""Segment everything: crops, grids of points, filters and non-maximum suppression (SAM paper, appendix B).

The masks are those of the stock pipeline, which brings every mask to the size of the image and then filters. Here the
order is another: predicted IoU and, with a margin, stability are judged at low resolution, chunk by chunk of the grid.
What is left is then looked at from the highest score down, and only a mask that no better one is certain to suppress
is brought to the size of the image, in the window that it covers. So memory depends neither on the grid nor, with run
lengths as output, on the number of masks.

Coordinates: points in model pixels for the model, boxes (x0, y0, x1, y1) of first and last pixels, of a crop or of the
whole image as each docstring says; cells are the pixels of low-resolution logits.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import MaskGenerationPipeline
from transformers.image_utils import load_image

from .fast_decoding_efficientsam import EfficientSamFastDecoder
from .rle_efficientsam import compress_counts, runs_to_counts, window_to_runs


IMAGES_AT_ONCE = 8  # crops that the encoder takes in one batch
MASKS_HELD = 512  # candidates whose logits are kept; those of lower score are decoded again when their turn comes
MASKS_AT_ONCE = 16  # candidates that are looked at before the next ones are suppressed
STABILITY_MARGIN = 0.1  # what the stability of low-resolution logits may lack
SMALLEST_CROP = 8  # pixels
OUTPUT_TYPES = ("bool", "rle", "coco_rle")
SORTS = ("score", "area")


@dataclass(frozen=True)
class MaskGenerationOptions:
    """What [`EfficientSamMaskGenerator`] can be asked for; names and meaning are those of `MaskGenerationPipeline`.

    Args:
        points_per_crop: points per side of the grid on the whole image.
        points_per_batch: prompts that are decoded before their masks are filtered; no result depends on it.
        pred_iou_thresh, stability_score_thresh: lower limits of a mask's predicted IoU and stability; 0 for none.
        stability_score_offset: how far the stability score moves the cut, in logits.
        mask_threshold: logits above it belong to the mask.
        crops_n_layers: layers of crops beside the whole image; layer i has 4**i.
        crop_overlap_ratio: overlap of the first layer's crops as a part of the image's shorter side.
        crop_n_points_downscale_factor: divides points_per_crop once more in every layer.
        crops_nms_thresh: box IoU above which the better mask suppresses the other: those of smaller crops come first,
            then those of higher score.
        box_nms_thresh: the same within each crop; crops_nms_thresh when left out.
        max_hole_area, max_sprinkle_area: holes and specks of up to so many pixels of the image are filled and removed.
        output_type: "bool" for (H, W) arrays, "rle" or "coco_rle" for uncompressed or compressed run lengths alone.
        output_rle_mask, output_bboxes_mask: add "rle_mask" and "bounding_boxes" to the result, as the stock pipeline.
        sort_by: "score" or "area", the highest first.
    """

    points_per_crop: int = 32
    points_per_batch: int = 64
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    stability_score_offset: float = 1.0
    mask_threshold: float = 0.0
    crops_n_layers: int = 0
    crop_overlap_ratio: float = 512 / 1500
    crop_n_points_downscale_factor: float = 1
    crops_nms_thresh: float = 0.7
    box_nms_thresh: float | None = None
    max_hole_area: int = 0
    max_sprinkle_area: int = 0
    output_type: str = "bool"
    output_rle_mask: bool = False
    output_bboxes_mask: bool = False
    sort_by: str = "score"

    def __post_init__(self):
        for name in ("points_per_crop", "points_per_batch"):
            self._check(name, lambda value: isinstance(value, int) and value >= 1, "a whole number of at least 1")
        for name in ("pred_iou_thresh", "stability_score_thresh", "crops_nms_thresh", "box_nms_thresh"):
            self._check(name, lambda value: value is None or 0 <= value <= 1, "from 0 to 1")
        self._check("crop_overlap_ratio", lambda value: 0 <= value < 1, "from 0 to below 1")
        self._check("crops_n_layers", lambda value: isinstance(value, int) and value >= 0, "at least 0")
        self._check("crop_n_points_downscale_factor", lambda value: value >= 1, "at least 1")
        for name in ("stability_score_offset", "max_hole_area", "max_sprinkle_area"):
            self._check(name, lambda value: value >= 0, "at least 0")
        self._check("output_type", lambda value: value in OUTPUT_TYPES, f"one of {', '.join(OUTPUT_TYPES)}")
        self._check("sort_by", lambda value: value in SORTS, f"one of {', '.join(SORTS)}")

    def _check(self, name: str, accepts, expected: str) -> None:
        value = getattr(self, name)
        if not accepts(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")

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


def crop_boxes_of_layers(height: int, width: int, num_layers: int, overlap_ratio: float) -> list[list[int]]:
    """Boxes (x0, y0, x1, y1) of the whole image and, in layer i, of 2**i x 2**i overlapping crops.

    `overlap_ratio` is the overlap of the first layer as a part of the shorter side; later layers scale it down.
    Raises ValueError if the image is too small for so many layers.
    """
    if num_layers and min(height, width) < SMALLEST_CROP * 2**num_layers:
        raise ValueError(
            f"crops_n_layers {num_layers} cuts each side of an image of {width} x {height} pixels into "
            f"{2**num_layers} parts, which must be {SMALLEST_CROP} pixels or more"
        )
    boxes = [[0, 0, width, height]]
    for layer in range(1, num_layers + 1):
        count = 2**layer
        overlap = int(overlap_ratio * min(height, width) * 2 / count)
        crop_height = math.ceil((overlap * (count - 1) + height) / count)
        crop_width = math.ceil((overlap * (count - 1) + width) / count)
        for row in range(count):
            for column in range(count):
                x0, y0 = column * (crop_width - overlap), row * (crop_height - overlap)
                boxes.append([x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height)])
    return boxes


def layer_of_crop(index: int) -> int:
    """Layer that the crop at `index` of `crop_boxes_of_layers` belongs to: crop 0 is the whole image."""
    layer, first_of_next = 0, 1
    while index >= first_of_next:
        layer += 1
        first_of_next += 4**layer
    return layer


def points_per_side(crop: int, points_per_crop: int, downscale_factor: float) -> int:
    """Side of the grid of the crop at an index of `crop_boxes_of_layers`."""
    return max(1, int(points_per_crop / downscale_factor ** layer_of_crop(crop)))


def point_grid(points_per_side: int) -> torch.Tensor:
    """Centres of a grid's cells in the unit square, row by row: -> (points_per_side ** 2, 2), float32."""
    steps = (torch.arange(points_per_side, dtype=torch.float32) + 0.5) / points_per_side
    return torch.cartesian_prod(steps, steps).flip(-1)


def stability_scores(logits: torch.Tensor, mask_threshold: float, offset: float) -> torch.Tensor:
    """IoU of the masks cut at `mask_threshold` + and - `offset`: (M, H, W) -> (M), float32."""
    smaller = (logits > mask_threshold + offset).flatten(1).sum(1)
    larger = (logits > mask_threshold - offset).flatten(1).sum(1)
    return smaller / larger.clamp(min=1)


def masks_to_boxes(masks: torch.Tensor) -> torch.Tensor:
    """First and last column and row of every mask: (M, H, W) bool -> (M, 4) int64 (x0, y0, x1, y1), empty ones 0."""
    height, width = masks.shape[1:]
    columns, rows = masks.any(1), masks.any(2)
    x, y = torch.arange(width, device=masks.device), torch.arange(height, device=masks.device)
    boxes = torch.stack(
        [
            x.where(columns, width).amin(1),
            y.where(rows, height).amin(1),
            x.where(columns, -1).amax(1),
            y.where(rows, -1).amax(1),
        ],
        dim=1,
    )
    return boxes * columns.any(1, keepdim=True)


def near_crop_edge(boxes: torch.Tensor, crop_box: list[int], size: tuple[int, int], margin: float = 20.0):
    """Boxes (M, 4) in a crop's pixels that touch an edge of the crop which is not one of the image: -> (M) bool.

    `size` is (height, width) of the image, `crop_box` the crop in it; `margin` is in pixels (SAM's value).
    """
    x0, y0, x1, y1 = (int(value) for value in crop_box)
    boxes = boxes.float() + torch.tensor([x0, y0, x0, y0], device=boxes.device)
    crop = torch.tensor([x0, y0, x1, y1], device=boxes.device, dtype=torch.float32)
    image = torch.tensor([0, 0, size[1], size[0]], device=boxes.device, dtype=torch.float32)
    return (((boxes - crop).abs() < margin) & ((boxes - image).abs() >= margin)).any(1)


def box_iou(boxes: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """IoU of every pair: (M, 4), (K, 4) as (x0, y0, x1, y1) -> (M, K), float32."""
    boxes, others = boxes.float(), others.float()
    corner0 = torch.maximum(boxes[:, None, :2], others[:, :2])
    corner1 = torch.minimum(boxes[:, None, 2:], others[:, 2:])
    shared = (corner1 - corner0).clamp(min=0).prod(-1)
    areas = [(corners[:, 2:] - corners[:, :2]).prod(-1) for corners in (boxes, others)]
    return shared / (areas[0][:, None] + areas[1] - shared).clamp(min=1e-6)


def non_maximum_suppression(boxes: torch.Tensor, scores: torch.Tensor, iou_threshold: float) -> torch.Tensor:
    """Greedily keep boxes that overlap no better one by more than the threshold: (M, 4), (M) -> (K) indices.

    The result is ordered by falling score. (torchvision has this too, but does not import beside a CPU build of
    torch, and the core must not need it.)
    """
    order = scores.float().argsort(descending=True, stable=True)
    overlaps = (box_iou(boxes[order], boxes[order]) > iou_threshold).cpu()
    dropped = torch.zeros(len(order), dtype=torch.bool)
    for index in range(len(order)):
        if not dropped[index]:
            dropped[index + 1 :] |= overlaps[index, index + 1 :]
    return order[~dropped.to(order.device)]


@dataclass
class _Candidates:
    """What passed the filters at low resolution in one crop, of the highest predicted IoU first.

    `scores` (K) predicted IoU, `points` (K) and `tokens` (K) say which prompt and mask token gave a mask, `boxes`
    (K, 4) and `windows` (K, 4) where it is in cells: those above the threshold, and those that stability looks at.
    `logits` has the (h, w) logits, or None for those that are decoded again.
    """

    scores: torch.Tensor
    points: torch.Tensor
    tokens: torch.Tensor
    boxes: torch.Tensor
    windows: torch.Tensor
    logits: list[torch.Tensor | None]


@dataclass
class _FoundMask:
    """A mask at the size of the image: `window` (h, w) bool with its first pixel at `corner` (x, y) of the image."""

    window: np.ndarray
    corner: tuple[int, int]
    box: list[int]
    area: int
    score: float
    stability: float
    point: list[float]
    crop_area: int
    changed: bool = False


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
    """

    def __init__(self, model: Any, processor: Any, **options: Any):
        self.model = model
        self.image_processor = getattr(processor, "image_processor", processor)
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
        several = isinstance(images, (list, tuple))
        layouts = [self._crops(image, chosen) for image in (images if several else [images])]
        embeddings = self._embeddings([crop for layout in layouts for crop in layout[2]])
        results = [self._masks_of_image(*layout, embeddings, chosen) for layout in layouts]
        return results if several else results[0]

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

    def _masks_of_image(self, boxes, points, crops, embeddings: Iterator[torch.Tensor], options) -> dict[str, Any]:
        image_size = (int(boxes[0, 3]), int(boxes[0, 2]))
        found: list[_FoundMask] = []
        for index, box in enumerate(boxes.tolist()):
            embedding = next(embeddings)
            per_side = points_per_side(index, options.points_per_crop, options.crop_n_points_downscale_factor)
            grid = points[0, : per_side**2, index].to(embedding.device)
            found += _Crop(self, embedding, grid, box, image_size, options).masks()
        if len(crops) > 1 or any(mask.changed for mask in found):
            found = _suppress_across_crops(found, options.crops_nms_thresh)
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

    def masks(self) -> list[_FoundMask]:
        """Masks that pass all filters and that no better one of this crop suppresses."""
        candidates = self._candidates()
        threshold = self.options.box_nms_thresh
        threshold = self.options.crops_nms_thresh if threshold is None else threshold
        inner, outer = self._box_limits(candidates.boxes)
        alive = torch.ones(len(candidates.scores), dtype=torch.bool)
        kept: list[_FoundMask] = []
        boxes = torch.empty(0, 4)
        while alive.any():
            turn = alive.nonzero()[:MASKS_AT_ONCE, 0].tolist()
            alive[turn] = False
            before = len(boxes)
            for index, logits in zip(turn, self._logits(candidates, turn)):
                mask = self._exact_mask(candidates, index, logits)
                if mask is None:
                    continue
                box = torch.tensor([mask.box], dtype=torch.float32)
                if not (box_iou(box, boxes) > threshold).any():
                    boxes = torch.cat([boxes, box])
                    kept.append(mask)
            if len(boxes) > before:
                alive &= ~(_certain_iou(inner, outer, boxes[before:]) > threshold).any(1)
        hole, speck = self.options.max_hole_area, self.options.max_sprinkle_area
        if hole or speck:
            kept = [_without_small_regions(mask, self.image_size, hole, speck) for mask in kept]
        return kept

    def _candidates(self) -> _Candidates:
        """Every point's three masks, filtered at low resolution."""
        options, pieces, held = self.options, [], []
        for start in range(0, len(self.points), options.points_per_batch):
            points = self.points[start : start + options.points_per_batch, None]
            masks, scores = self.decoder(points, torch.ones(points.shape[:2], dtype=torch.long, device=points.device))
            masks, scores = masks[:, 1:].flatten(0, 1), scores[:, 1:].flatten().float()
            keep = scores > options.pred_iou_thresh if options.pred_iou_thresh > 0 else torch.ones_like(scores) > 0
            index = keep.nonzero()[:, 0]
            masks = masks[index]
            if options.stability_score_thresh > 0 and len(index):
                stable = stability_scores(masks, options.mask_threshold, options.stability_score_offset)
                stable = stable > options.stability_score_thresh - STABILITY_MARGIN
                index, masks = index[stable], masks[stable]
            windows = masks_to_boxes(masks > options.mask_threshold - options.stability_score_offset)
            some = (masks > options.mask_threshold).flatten(1).any(1)
            boxes = masks_to_boxes(masks > options.mask_threshold)
            index, boxes, windows = index[some], boxes[some], windows[some]
            held += [mask.clone() for mask in masks[some]]
            count = masks.new_tensor(3, dtype=torch.long)
            pieces.append(
                [v.cpu() for v in (scores[index], start + index // count, index % count + 1, boxes, windows)]
            )
            held = _drop_logits(held, torch.cat([piece[0] for piece in pieces]))
        scores, *rest = (torch.cat(values) for values in zip(*pieces))
        order = scores.argsort(descending=True, stable=True)
        return _Candidates(scores[order], *(value[order] for value in rest), [held[i] for i in order.tolist()])

    def _logits(self, candidates: _Candidates, turn: list[int]) -> list[torch.Tensor]:
        """Low-resolution logits of some candidates; those that are not held are decoded again."""
        missing = [index for index in turn if candidates.logits[index] is None]
        if missing:
            points = self.points[candidates.points[missing].to(self.points.device), None]
            labels = torch.ones(points.shape[:2], dtype=torch.long, device=points.device)
            masks, _ = self.decoder(points, labels)
            for row, index in enumerate(missing):
                candidates.logits[index] = masks[row, candidates.tokens[index]]
        logits = [candidates.logits[index] for index in turn]
        for index in turn:
            candidates.logits[index] = None  # its turn is over
        return logits

    def _box_limits(self, boxes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Boxes in cells -> smallest and largest box in pixels of the image that the exact mask can have, (K, 4) each.

        Its edge lies between the centre of the outermost cell and that of the next, give or take a pixel, short of
        what bicubic interpolation can overshoot. Cells at the border reach it.
        """
        scale = torch.tensor([self.size[1] / self.cells[1], self.size[0] / self.cells[0]] * 2)
        outwards = torch.tensor([-1.0, -1.0, 1.0, 1.0])
        centres = (boxes + 0.5) * scale - 0.5 + torch.tensor(self.box[:2] * 2)
        low, high = torch.tensor(self.box[:2] * 2), torch.tensor(self.box[2:] * 2) - 1
        outer = (centres + outwards * (scale + 1)).clamp(low, high)
        at_border = boxes == torch.tensor([0, 0, self.cells[1] - 1, self.cells[0] - 1])
        return torch.where(at_border, outer, centres - outwards), outer

    def _exact_mask(self, candidates: _Candidates, index: int, logits: torch.Tensor) -> _FoundMask | None:
        """A candidate at the size of the crop; None if it is not stable there, empty, or at an inner edge."""
        options = self.options
        logits, (x, y) = self.image_processor.resize_window(logits, self.size, candidates.windows[index].tolist())
        stability = float(stability_scores(logits[None], options.mask_threshold, options.stability_score_offset)[0])
        if options.stability_score_thresh > 0 and not stability > options.stability_score_thresh:
            return None
        mask = logits > options.mask_threshold
        box = masks_to_boxes(mask[None]).cpu() + torch.tensor([x, y, x, y])
        area = int(mask.sum())
        if not area or near_crop_edge(box, self.box, self.image_size)[0]:
            return None
        left, top = self.box[:2]
        scale = torch.tensor([self.size[1] / self.cells[1] / 4, self.size[0] / self.cells[0] / 4])
        point = (self.points[candidates.points[index]].cpu() + 0.5) * scale + torch.tensor([left, top])
        return _FoundMask(
            window=mask.cpu().numpy(),
            corner=(x + left, y + top),
            box=(box[0] + torch.tensor([left, top] * 2)).tolist(),
            area=area,
            score=float(candidates.scores[index]),
            stability=stability,
            point=point.tolist(),
            crop_area=self.size[0] * self.size[1],
        )


def _drop_logits(held: list[torch.Tensor | None], scores: torch.Tensor) -> list[torch.Tensor | None]:
    """Logits of the candidates with the highest scores, and None for the others."""
    if len(held) <= MASKS_HELD:
        return held
    lowest = scores.topk(MASKS_HELD).values[-1]
    return [logits if score >= lowest else None for logits, score in zip(held, scores.tolist())]


def _certain_iou(inner: torch.Tensor, outer: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """Lower limit of the IoU of boxes that lie between two, (K, 4) and (K, 4), with others, (M, 4): -> (K, M)."""
    corner0 = torch.maximum(inner[:, None, :2], boxes[:, :2])
    corner1 = torch.minimum(inner[:, None, 2:], boxes[:, 2:])
    shared = (corner1 - corner0).clamp(min=0).prod(-1)
    most = (outer[:, 2:] - outer[:, :2]).prod(-1)[:, None] + (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return shared / (most - shared).clamp(min=1e-6)


def _without_small_regions(mask: _FoundMask, image_size: tuple[int, int], max_hole: int, max_speck: int) -> _FoundMask:
    """The mask with holes filled and specks removed; of a mask that is nothing but specks the largest stays."""
    try:
        from scipy import ndimage
    except ImportError:
        raise ImportError("max_hole_area and max_sprinkle_area need scipy: pip install scipy") from None
    eight = np.ones((3, 3), bool)
    (x, y), (height, width) = mask.corner, mask.window.shape
    # Beyond the window is background, unless the image ends there.
    sides = ((int(y > 0), int(y + height < image_size[0])), (int(x > 0), int(x + width < image_size[1])))
    padded = np.pad(mask.window, sides)
    cleaned = padded.copy()
    if max_hole:
        labels, count = ndimage.label(~padded, eight)
        areas = np.bincount(labels.reshape(-1), minlength=count + 1)
        beyond = np.pad(np.zeros_like(mask.window), sides, constant_values=True)
        small = areas <= max_hole
        small[0] = False
        small[np.unique(labels[beyond])] = False
        cleaned |= small[labels]
    if max_speck:
        labels, count = ndimage.label(cleaned, eight)
        areas = np.bincount(labels.reshape(-1), minlength=count + 1)
        areas[0] = 0
        small = areas <= max_speck
        small[areas.argmax()] = False
        cleaned &= ~small[labels]
    cleaned = cleaned[sides[0][0] : sides[0][0] + height, sides[1][0] : sides[1][0] + width]
    if (cleaned == mask.window).all():
        return mask
    box = masks_to_boxes(torch.from_numpy(cleaned)[None])[0] + torch.tensor([x, y, x, y])
    return dataclasses.replace(
        mask, window=cleaned, box=box.tolist(), area=int(np.count_nonzero(cleaned)), changed=True
    )


def _suppress_across_crops(masks: list[_FoundMask], threshold: float) -> list[_FoundMask]:
    """Non-maximum suppression where masks without changes come first, then those of smaller crops, then by score."""
    ranked = sorted(masks, key=lambda mask: (mask.changed, mask.crop_area, -mask.score))
    if not ranked:
        return []
    boxes = torch.tensor([mask.box for mask in ranked])
    kept = non_maximum_suppression(boxes, -torch.arange(len(ranked)).float(), threshold)
    return [ranked[index] for index in kept.tolist()]


def _result(masks: list[_FoundMask], image_size: tuple[int, int], options: MaskGenerationOptions) -> dict[str, Any]:
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


def _encoded(mask: _FoundMask, image_size: tuple[int, int], output_type: str) -> np.ndarray | dict[str, Any]:
    """A mask of the whole image: (H, W) bool, or its run lengths."""
    if output_type == "bool":
        whole = np.zeros(image_size, bool)
        (x, y), (height, width) = mask.corner, mask.window.shape
        whole[y : y + height, x : x + width] = mask.window
        return whole
    runs = window_to_runs(mask.window, mask.corner, image_size)
    counts = runs_to_counts(runs, image_size[0] * image_size[1])
    if output_type == "rle":
        return {"size": list(image_size), "counts": counts.tolist()}
    return compress_counts(counts, image_size)


class EfficientSamMaskGenerationPipeline(MaskGenerationPipeline):
    """`pipeline("mask-generation")` on [`EfficientSamMaskGenerator`].

    It takes images as the stock pipeline does (also arrays and tensors) and every option of [`MaskGenerationOptions`];
    unknown ones are a TypeError. With `batch_size` so many images pass the encoder together.
    """

    def _sanitize_parameters(self, timeout: float | None = None, **options: Any) -> tuple[dict, dict, dict]:
        MaskGenerationOptions().with_changes(options)
        return ({} if timeout is None else {"timeout": timeout}), options, {}

    def get_iterator(
        self, inputs, num_workers, batch_size, preprocess_params, forward_params, postprocess_params
    ) -> Iterator[dict[str, Any]]:
        """Results of images, one by one, computed in batches."""
        images = iter(inputs)
        while batch := list(islice(images, batch_size)):
            loaded = [self.preprocess(image, **preprocess_params) for image in batch]
            yield from self.postprocess(self.forward({"images": loaded}, **forward_params), **postprocess_params)

    def preprocess(self, image: Any, timeout: float | None = None) -> Any:
        """Open what is a path, a URL or base64 text; everything else is left to the image processor."""
        return load_image(image, timeout=timeout) if isinstance(image, (str, Image.Image)) else image

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {
            "results": EfficientSamMaskGenerator(self.model, self.image_processor)(model_inputs["images"], **options)
        }

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        return model_outputs["results"]


__all__ = [
    "EfficientSamMaskGenerationPipeline",
    "EfficientSamMaskGenerator",
    "MaskGenerationOptions",
    "box_iou",
    "crop_boxes_of_layers",
    "layer_of_crop",
    "masks_to_boxes",
    "near_crop_edge",
    "non_maximum_suppression",
    "point_grid",
    "points_per_side",
    "stability_scores",
]
