# SPDX-License-Identifier: Apache-2.0
"""Segment everything: crops, grids of points, filters and non-maximum suppression (SAM paper, appendix B).

The masks are those of the stock pipeline, which brings every mask to the size of the image and then filters. Here the
order is another: predicted IoU and, with a margin, stability are judged at low resolution, chunk by chunk of the grid.
What is left is then looked at from the highest score down, and only a mask that no better one is certain to suppress
is brought to the size of the image: on a CPU by itself, in the window that it covers, on other devices, where each
operation has its price, with others. So memory is bounded: by the logits that are held, a chunk and, with run lengths
as output, little for each mask.

Coordinates: points in model pixels for the model, boxes (x0, y0, x1, y1) of first and last pixels, of a crop or of the
whole image as each docstring says; cells are the pixels of low-resolution logits.
"""

import base64
import http.client
import io
import math
import os
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np
import torch
from transformers import MaskGenerationPipeline

from .checks_efficientsam import short
from .fast_decoding_efficientsam import EfficientSamFastDecoder, place_of
from .found_masks_efficientsam import FoundMask, label_regions, suppress, suppress_alike, without_small_regions
from .mask_candidates_efficientsam import Candidates, HeldMasks, HeldWindows, promising
from .mask_cleaning_efficientsam import clean_logits
from .mask_generation_options_efficientsam import MaskGenerationOptions
from .mask_geometry_efficientsam import (
    box_iou,
    boxes_of_changes,
    column_changes,
    count_pixels,
    grid_side,
    masks_to_boxes,
    near_crop_edge,
    non_maximum_suppression,
    stability_scores,
)
from .rle_efficientsam import changes_to_runs, compress_counts, decode_rle, runs_to_counts


IMAGES_AT_ONCE = 8  # crops that the encoder takes in one batch
FILTERED_AT_ONCE = 32  # masks that are filtered at low resolution together, so that a CPU's cache holds them
MASKS_AT_ONCE = 16  # candidates that are looked at before the next ones are suppressed
# Other devices look at those of a turn together, as far as their pixels (or, of low-resolution logits, cells) allow.
MASKS_TOGETHER = 32
PIXELS_TOGETHER = 2**26  # 32 masks of 1920 x 1080, a quarter of a gigabyte in float32
DOWNLOAD_SECONDS = 30  # without an answer; ten times as many in all
DOWNLOAD_BYTES = 2**28


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
        size = getattr(self.image_processor, "size", None)
        if not isinstance(size, Mapping):
            raise TypeError(f"processor is a {type(processor).__name__}, expected an EfficientSamProcessor")
        if size["height"] != size["width"]:
            raise ValueError(f"the size of the image processor must be square to lay out grids, got {size}")
        if not getattr(self.image_processor, "do_resize", True):
            raise ValueError("do_resize of the image processor must be True to lay out grids, got False")
        own = getattr(self.image_processor, "mask_generation", None) or {}
        whole = getattr(self.image_processor, "mask_cleaning", None) or {}
        whole = {name: value for name, value in whole.items() if name != "within_box"}
        self.options = MaskGenerationOptions().with_changes({**whole, **own, **options})

    @torch.no_grad()
    def __call__(
        self, images: Any, progress: Callable[[float], None] | None = None, **options: Any
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """All masks of an image, which is anything that the image processor takes, or of each in a list.

        `progress` is called with the finished fraction: of all images, their crops and each crop's batches of points.

        Returns:
            For an image a dict of `masks` (see `output_type`) and, for each of them, `scores` (K) float32, `boxes`
            (K, 4) int64 of first and last pixels of the image, `areas` (K) int64 in pixels, `points` (K, 2) float32,
            the click that gave it in pixels of the image, `stability_scores` (K) float32. An image without any has
            empty ones.

        Raises:
            TypeError, ValueError: for an unknown option or a wrong value, and for what is no image.
        """
        if progress is not None and not callable(progress):
            raise TypeError(f"progress must be a function of the finished fraction, or None, got {short(progress)}")
        chosen = self.options.with_changes(options)
        if chosen.max_hole_area or chosen.max_sprinkle_area:
            label_regions()
        if not isinstance(images, (list, tuple)):
            return self._generate([images], chosen, _Progress(progress, 1, chosen))[0]
        steps = _Progress(progress, len(images), chosen)
        starts = range(0, len(images), IMAGES_AT_ONCE)
        return [result for i in starts for result in self._generate(images[i : i + IMAGES_AT_ONCE], chosen, steps)]

    def _generate(
        self, images: Sequence[Any], options: MaskGenerationOptions, progress: "_Progress"
    ) -> list[dict[str, Any]]:
        """Results of a few images, whose crops pass the encoder together."""
        layouts = [self._crops(image, options) for image in images]
        embeddings = self._embeddings([crop for _, _, crops in layouts for crop in crops])
        return [self._masks_of_image(boxes, points, embeddings, options, progress) for boxes, points, _ in layouts]

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
        place = place_of(self.model)
        for start in range(0, len(crops), IMAGES_AT_ONCE):
            pixels = self.image_processor(images=crops[start : start + IMAGES_AT_ONCE], return_tensors="pt")
            yield from self.model.get_image_embeddings(pixels["pixel_values"].to(*place)).split(1)

    def _masks_of_image(
        self, boxes, points, embeddings: Iterator[torch.Tensor], options, progress: "_Progress"
    ) -> dict[str, Any]:
        image_size = (int(boxes[0, 3]), int(boxes[0, 2]))
        found: list[FoundMask] = []
        for index, box in enumerate(boxes.tolist()):
            embedding = next(embeddings)
            side = grid_side(index, options.points_per_crop, options.crop_n_points_downscale_factor)
            crop = _Crop(self, embedding, points[0, : side**2, index], box, image_size, options, progress)
            found += crop.masks()
        if len(boxes) > 1:
            found = suppress(found, options.crops_nms_thresh, lambda mask: (mask.crop_area, -mask.score))
        if any(mask.changed for mask in found):
            threshold = max(options.nms_thresh, options.crops_nms_thresh)
            found = suppress(found, threshold, lambda mask: (mask.changed, -mask.score))
        if options.mask_nms_thresh is not None:
            found = suppress_alike(found, options.mask_nms_thresh, lambda mask: (mask.crop_area, -mask.score))
        return _result(found, image_size, options)


class _Progress:
    """Reports which fraction of its steps a call has finished: each crop's batches of points, and then its masks."""

    def __init__(self, report: Callable[[float], None] | None, images: int, options: MaskGenerationOptions):
        self.report, self.images, self.options = report, images, options
        self.done = 0

    def step(self) -> None:
        """A batch of points, or a crop, is finished."""
        self.done += 1
        if self.report is not None:
            self.report(self.done / self.total)

    @cached_property
    def total(self) -> int:
        """Steps of all images. It is not asked for before crops are laid out, which refuses too many layers."""
        options, steps = self.options, 0
        for layer in range(options.crops_n_layers + 1):
            first = (4**layer - 1) // 3  # of the layer's crops
            points = grid_side(first, options.points_per_crop, options.crop_n_points_downscale_factor) ** 2
            steps += 4**layer * (1 + math.ceil(points / (options.points_per_batch or points)))
        return self.images * steps


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
        progress: _Progress,
    ):
        self.progress = progress
        self.decoder = EfficientSamFastDecoder(generator.model, embeddings)
        self.image_processor = generator.image_processor
        self.points, self.box, self.image_size, self.options = points, box, image_size, options
        self.prompts = points.to(embeddings.device)
        self.size = (box[3] - box[1], box[2] - box[0])
        self.cells = (4 * embeddings.shape[2], 4 * embeddings.shape[3])
        self.cells_per_pixel = max(1.0, math.prod(self.cells) / math.prod(self.size))
        self.patch_size = generator.model.config.vision_config.patch_size
        self.cleaning = options.cleaning()
        self.on_cpu = embeddings.device.type == "cpu"

    def masks(self) -> list[FoundMask]:
        """Masks that pass all filters and that no better one of this crop suppresses."""
        candidates, held = self._candidates()
        inner, outer = self._box_limits(candidates)
        alive = torch.ones(len(candidates.scores), dtype=torch.bool, device="cpu")
        found: list[FoundMask] = []
        boxes = torch.empty(0, 4, dtype=torch.float32, device="cpu")
        while alive.any():
            turn = alive.nonzero()[: self._turn(), 0]
            alive[turn] = False
            before = len(boxes)
            logits = self._logits(candidates[turn], held)
            # A CPU takes no pixels but those of a mask's window, which other masks do not share.
            for rows in torch.arange(len(turn), device="cpu").split(1 if self.on_cpu else len(turn)):
                masks = self._exact_masks(candidates[turn[rows]], [logits[row] for row in rows], boxes)
                found += [self._cleaned(mask).packed(self.image_size) for mask in masks]
                boxes = torch.cat([boxes, boxes.new_tensor([mask.box for mask in masks]).reshape(-1, 4)])
            if len(boxes) > before:
                alive &= ~(_certain_iou(inner, outer, boxes[before:]) > self.options.nms_thresh).any(1)
        self.progress.step()
        return found

    def _turn(self) -> int:
        """Candidates to look at before the next ones are suppressed."""
        return MASKS_AT_ONCE if self.on_cpu else max(1, min(MASKS_TOGETHER, PIXELS_TOGETHER // math.prod(self.size)))

    def _candidates(self) -> tuple[Candidates, HeldWindows | HeldMasks]:
        """Every point's masks, filtered at low resolution, and their logits as far as they are held."""
        parts: list[Candidates] = []
        held = HeldWindows() if self.on_cpu else HeldMasks()
        batch = self.options.points_per_batch or len(self.points)
        for start in range(0, len(self.points), batch):
            parts.append(self._filtered(start, min(start + batch, len(self.points)), held))
            self.progress.step()
        candidates = Candidates.joined(parts)
        return candidates[candidates.scores.argsort(descending=True, stable=True)], held

    def _filtered(self, start: int, end: int, held: HeldWindows | HeldMasks) -> Candidates:
        """What a part of the grid gives."""
        threshold = self.options.pred_iou_thresh if self.options.pred_iou_thresh > 0 else -math.inf
        masks, scores, prompts = self.decoder.decode_above(threshold, *self._clicks(self.prompts[start:end]))
        masks, scores = masks[:, 1:], scores[:, 1:].float()
        parts = []
        at_once = FILTERED_AT_ONCE if self.on_cpu else max(1, PIXELS_TOGETHER // math.prod(self.cells))
        for rows, tokens in zip(*(found.split(at_once) for found in (scores > threshold).nonzero().unbind(1))):
            logits = masks[rows, tokens]
            good, cores, windows = promising(logits, self.options, self.cells_per_pixel)
            logits, rows, tokens = logits[good], rows[good], tokens[good]
            if self.cleaning and len(rows):  # also where a mask is, by which better ones suppress it
                logits = self._whole(logits, self.prompts[start + prompts[rows]])
                good, cores, windows = promising(logits, self.options, self.cells_per_pixel)
                logits, rows, tokens = logits[good], rows[good], tokens[good]
            places = held.add(logits, windows)
            points = (start + prompts[rows]).cpu()
            parts.append(Candidates(scores[rows, tokens].cpu(), points, tokens.cpu(), cores, windows, places))
        return Candidates.joined(parts)

    def _whole(self, logits: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        """Logits (M, h, w) of masks made whole, given the points (M, 2) that they are of; in the logits' dtype."""
        clicks = (points + 0.5)[:, None] * (4 / self.patch_size)
        labels = torch.ones(len(points), 1, dtype=torch.long, device=points.device)
        threshold = self.options.mask_threshold
        cleaned = clean_logits(logits[:, None].float(), self.cleaning, threshold, clicks=clicks, labels=labels)
        return cleaned[:, 0].to(logits.dtype)

    @staticmethod
    def _clicks(points: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A prompt for each point: (Q, 2) -> (Q, 1, 2), labels (Q, 1)."""
        return points[:, None], torch.ones(len(points), 1, dtype=torch.long, device=points.device)

    def _logits(self, candidates: Candidates, held: HeldWindows | HeldMasks) -> list[torch.Tensor]:
        """Low-resolution logits of some candidates; those that are not held are decoded again."""
        places, windows = candidates.places.tolist(), candidates.windows.tolist()
        missing = (candidates.places < 0).nonzero()[:, 0]
        again: Iterator[torch.Tensor] = iter(())
        if len(missing):
            masks, _ = self.decoder(*self._clicks(self.prompts[candidates.points[missing]]))
            tokens = candidates.tokens[missing].to(masks.device)
            masks = masks[torch.arange(len(masks), device=masks.device), 1 + tokens]
            again = iter(self._whole(masks, self.prompts[candidates.points[missing]]) if self.cleaning else masks)
        return [next(again) if place < 0 else held.get(place, window) for place, window in zip(places, windows)]

    def _box_limits(self, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest and largest box in pixels of the image that each exact mask can have: (K, 4), (K, 4).

        A block of cells above the threshold stays above it between their centres, where a single cell may vanish.
        Beyond the window the logits are so far below it that interpolation, which overshoots next to larger values,
        hardly lifts them over it.
        """
        scale = _numbers([self.size[1] / self.cells[1], self.size[0] / self.cells[0]] * 2)
        outwards = _numbers([-1, -1, 1, 1])
        origin, end = _numbers(self.box[:2] * 2), _numbers(self.box[2:] * 2) - 1
        inner, outer = ((boxes + 0.5) * scale - 0.5 + origin for boxes in (candidates.cores, candidates.windows))
        return inner - outwards, (outer + outwards * (scale + 1)).clamp(origin, end)

    def _at_full_size(self, logits: list[torch.Tensor], windows: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """Logits (M, h, w) float32 of the crop's pixels, and (x, y) of the first: on a CPU for one, and its window."""
        if not self.on_cpu:
            return self.image_processor.resize_within(torch.stack(logits), self.size, windows.tolist()), (0, 0)
        (logits,), (window,) = logits, windows.tolist()
        full, corner = self.image_processor.resize_window(logits, self.size, window)
        return full[None], corner

    def _exact_masks(self, candidates: Candidates, logits: list[torch.Tensor], boxes: torch.Tensor) -> list[FoundMask]:
        """Some candidates at full size, of the best score first; on a CPU, one.

        Without those that are not stable there, empty, or at an inner edge, and those that the boxes (K, 4) of masks
        found before, or better ones among them, suppress.
        """
        options = self.options
        full, corner = self._at_full_size(logits, candidates.windows)
        if self.cleaning:  # once more: what was one part of cells can be several of pixels
            clicks = [self._crop_point(index) for index in candidates.points.tolist()]
            clicks = full.new_tensor(clicks)[:, None] - full.new_tensor(corner)
            labels = torch.ones(clicks.shape[:2], dtype=torch.long, device=full.device)
            full = clean_logits(full[:, None], self.cleaning, options.mask_threshold, clicks=clicks, labels=labels)[
                :, 0
            ]
        outlines = _Outlines(full > options.mask_threshold)
        in_crop = outlines.boxes + _numbers(corner * 2, torch.long)
        in_image = in_crop + _numbers(self.box[:2] * 2, torch.long)
        good = (outlines.areas > 0) & ~near_crop_edge(in_crop, self.box, self.image_size)
        good &= ~(box_iou(in_image, boxes) > options.nms_thresh).any(1)
        rows = good.nonzero()[:, 0]
        if not len(rows):
            return []
        stability = stability_scores(full, options.mask_threshold, options.stability_score_offset).cpu()[rows]
        if options.stability_score_thresh > 0:
            good = stability > options.stability_score_thresh
            rows, stability = rows[good], stability[good]
        best = non_maximum_suppression(in_image[rows], candidates.scores[rows], options.nms_thresh)
        return [
            FoundMask(
                box=in_image[row].tolist(),
                area=int(outlines.areas[row]),
                score=float(candidates.scores[row]),
                stability=float(stable_share),
                point=self._image_point(int(candidates.points[row])),
                crop_area=math.prod(self.size),
                **self._pixels(outlines, int(row)),
            )
            for row, stable_share in zip(rows[best], stability[best])
        ]

    def _pixels(self, outlines: "_Outlines", row: int) -> dict[str, np.ndarray]:
        """What a `FoundMask` keeps of a mask: where its outline is known, runs, unless it is to be cleaned."""
        if outlines.changes is None or self.options.max_hole_area or self.options.max_sprinkle_area:
            return {"window": outlines.window(row)}
        start, end = np.searchsorted(outlines.changes[:, 0], (row, row + 1))
        _, columns, rows = outlines.changes[start:end].T
        return {"runs": changes_to_runs(columns, rows, self.box[:2], self.image_size)}

    def _image_point(self, index: int) -> list[float]:
        """A point of the grid in pixels of the image."""
        x, y = self._crop_point(index)
        return [x + self.box[0], y + self.box[1]]

    def _crop_point(self, index: int) -> list[float]:
        """A point of the grid in pixels of the crop."""
        model_size = [side / 4 * self.patch_size for side in self.cells]
        return [
            (value + 0.5) * own / side
            for value, own, side in zip(self.points[index].tolist(), self.size[::-1], model_size[::-1])
        ]

    def _cleaned(self, mask: FoundMask) -> FoundMask:
        """The mask without small holes and specks, if they are to go."""
        hole, speck = self.options.max_hole_area or 0, self.options.max_sprinkle_area or 0
        return without_small_regions(mask, self.image_size, hole, speck) if hole or speck else mask


class _Outlines:
    """Boxes (M, 4) and areas (M) of masks (M, h, w), on the CPU.

    A CPU looks at all pixels. Another device says where columns change (`changes`, see `column_changes`), which it
    finds in few operations, and all else follows from that.
    """

    def __init__(self, masks: torch.Tensor):
        self.masks = masks
        self.changes: np.ndarray | None = None
        if masks.device.type == "cpu":
            self.boxes, self.areas = masks_to_boxes(masks), count_pixels(masks)
        else:
            self.changes = column_changes(masks).cpu().numpy()
            self.boxes, self.areas = boxes_of_changes(self.changes, len(masks))

    def window(self, row: int) -> np.ndarray:
        """What the box of a mask holds of it, (h, w) bool."""
        x0, y0, x1, y1 = self.boxes[row].tolist()
        return self.masks[row, y0 : y1 + 1, x0 : x1 + 1].cpu().numpy()


def _numbers(values: list, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers as a tensor on the CPU, whatever the caller's defaults of torch are."""
    return torch.tensor(values, dtype=dtype, device="cpu")


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
        "scores": _numbers([mask.score for mask in masks]),
        "boxes": _numbers([mask.box for mask in masks], torch.long).reshape(-1, 4),
        "areas": _numbers([mask.area for mask in masks], torch.long),
        "points": _numbers([mask.point for mask in masks]).reshape(-1, 2),
        "stability_scores": _numbers([mask.stability for mask in masks]),
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

    @property
    def mask_generator(self) -> EfficientSamMaskGenerator:
        """What the pipeline calls: it takes `progress` too."""
        return EfficientSamMaskGenerator(self.model, self.image_processor)

    def _forward(self, model_inputs: dict[str, Any], **options: Any) -> dict[str, Any]:
        return {"results": self.mask_generator(model_inputs["images"], **options)}

    def postprocess(self, model_outputs: dict[str, Any]) -> list[dict[str, Any]]:
        return model_outputs["results"]


def download(url: str, seconds: float = DOWNLOAD_SECONDS) -> bytes:
    """Fetch a picture's URL within so many seconds without an answer, ten times as many in all, and DOWNLOAD_BYTES.

    Raises OSError that names it and the reason, also for what says that it is text, sound or a film.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "efficientsam-hf"})
    end = time.monotonic() + 10 * seconds
    content = bytearray()
    try:
        with urllib.request.urlopen(request, timeout=seconds) as response:
            kind = response.headers.get("Content-Type", "image")
            if kind.startswith(("text/", "audio/", "video/")):
                raise OSError(f"it is {kind[:60]}, not a picture")
            while block := response.read1(2**16):  # what has arrived: `read` would wait for all of it
                content += block
                if len(content) > DOWNLOAD_BYTES:
                    raise OSError(f"it has more than {DOWNLOAD_BYTES:,} bytes")
                if time.monotonic() > end:
                    raise OSError(f"it is not here after {10 * seconds:g} seconds, but {len(content):,} bytes of it")
            if response.length:
                raise OSError(f"{response.length:,} bytes of it are missing")
        return bytes(content)
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
    "download",
]
