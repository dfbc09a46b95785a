# SPDX-License-Identifier: Apache-2.0
"""Images to model pixels and masks back to the image, for EfficientSAM."""

import io
import math
import os
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .checks_efficientsam import (
    LARGEST_SIDE,
    as_tensor,
    check,
    check_bool,
    check_choice,
    check_tensor,
    image_sizes,
    is_number,
    is_whole,
    short,
)
from .mask_cleaning_efficientsam import MaskCleaning, clean_logits, clean_masks
from .mask_generation_efficientsam import download
from .mask_generation_options_efficientsam import MaskGenerationOptions
from .mask_geometry_efficientsam import (
    cells_near,
    crop_boxes_of_layers,
    grid_side,
    masks_to_boxes,
    near_crop_edge,
    non_maximum_suppression,
    point_grid,
    stability_scores,
)
from .rle_efficientsam import decode_rle, mask_to_counts


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
MASKS_AT_ONCE = 16  # full-size float32 masks in memory while the logits of a batch are resized
PIXELS_AT_ONCE = 96  # of an axis that are interpolated by one product: more of them share few cells
STEPS = ("do_resize", "do_rescale", "do_normalize", "antialias")
# What files of other image processors may say -> the value that agrees with what is done here.
OTHER_STEPS = {"resample": Image.Resampling.BILINEAR.value, "rescale_factor": 1 / 255, "do_pad": False}
OTHER_STEPS |= {"do_center_crop": False, "do_flip_channel_order": False}


def open_image(source: Any, name: str = "image") -> Image.Image:
    """Open a picture as 8-bit RGB, turned the way its EXIF orientation says: path, URL or PIL image -> PIL image.

    Args:
        source: path, `http(s)` URL, open binary file or PIL image.
        name: what error messages call it.

    Raises:
        OSError: if the path or URL cannot be read (FileNotFoundError, PermissionError, ...).
        ValueError: if it is no picture, is truncated, is larger than Pillow's safety limit or has more than 8 bits.
        TypeError: if `source` is something else.
    """
    shown = f"{name} {str(source)!r}" if isinstance(source, (str, os.PathLike)) else name
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        source = io.BytesIO(download(source))
    opened = isinstance(source, Image.Image)
    if not opened and not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise TypeError(f"{name} is a {type(source).__name__}, expected a path, a URL or a PIL image")
    try:
        if opened:
            return _upright_rgb(source, shown).copy()
        with Image.open(source) as image:
            return _upright_rgb(image, shown)
    except FileNotFoundError:
        raise FileNotFoundError(f"{shown} does not exist") from None
    except (IsADirectoryError, PermissionError) as error:
        raise type(error)(f"{shown} cannot be read: {error.strerror}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{shown} is not a picture that Pillow can read") from None
    except Image.DecompressionBombError as error:
        raise ValueError(f"{shown} is larger than Pillow's safety limit: {error}") from None
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{shown} is damaged or truncated: {error}") from None


def _upright_rgb(image: Image.Image, shown: str) -> Image.Image:
    check_picture(image, shown)
    image.load()
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    return image if image.mode == "RGB" else image.convert("RGB")  # each would copy a picture that needs nothing


def check_picture(image: Image.Image, shown: str) -> None:
    """`ValueError` for a picture without a pixel, or with more than 8 bits a channel; call it before it is loaded."""
    if not image.width or not image.height:
        raise ValueError(f"{shown} is empty: {image.width} x {image.height} pixels")
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise ValueError(f"{shown} has mode {image.mode}, expected 8 bits a channel: scale its values to 0..255 first")
    if _is_deep(image):  # Pillow keeps the high byte, and data of 10 or 12 bits becomes nearly black
        raise ValueError(f"{shown} has 16 bits a channel, expected 8: scale its values to 0..255 first")


def _is_deep(image: Image.Image) -> bool:
    """Whether a file that is not loaded yet has more than 8 bits a channel, which its mode does not tell."""
    if max(getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (8,))) > 8:  # TIFF
        return True
    return any(";16" in mode and not mode.startswith("BGR") for mode in _stored_modes(image))  # BGR;16: 5, 6, 5


def _stored_modes(image: Image.Image) -> list[str]:
    """How pixels lie in a file that is not loaded yet, in Pillow's words: RGB, RGB;16B."""
    arguments = [tile[3] for tile in getattr(image, "tile", None) or []]
    parts = [part for one in arguments for part in (one if isinstance(one, tuple) else (one,))]
    return [part for part in parts if isinstance(part, str)]


class EfficientSamImageProcessor(BaseImageProcessor):
    r"""
    Stretches images to the model's square input and brings masks back.

    Args:
        size (`int` or `dict`, *optional*, defaults to 1024):
            Height and width of the model's input in pixels, `{"height": int, "width": int}`. The aspect ratio is not
            kept, as in the released model.
        antialias (`bool`, *optional*, defaults to `False`):
            Whether shrinking averages over the pixels it drops. Released checkpoints were trained without.
        do_resize, do_rescale, do_normalize (`bool`, *optional*, default to `True`):
            The steps: bilinear resizing, 0..255 to 0..1, subtracting the mean and dividing by the deviation.
        image_mean, image_std (`list[float]`, *optional*):
            Mean and deviation of every channel; ImageNet's by default.
        mask_generation (`dict`, *optional*):
            Options of segment-everything that suit the checkpoint, by the names of [`MaskGenerationOptions`]; an
            unknown one is a TypeError, a value that does not fit a ValueError.
        mask_cleaning (`dict`, *optional*):
            What `post_process_masks` does to make masks whole, by the names of [`MaskCleaning`]; nothing by default.

    Raises ValueError for values that would make no picture, or one that fills the memory, and for steps of other image
    processors that these pictures do not take.
    """

    model_input_names = ["pixel_values", "original_sizes", "reshaped_input_sizes"]

    def __init__(
        self,
        size: int | dict[str, int] | None = None,
        antialias: bool = False,
        do_resize: bool = True,
        do_rescale: bool = True,
        do_normalize: bool = True,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        mask_generation: dict[str, Any] | None = None,
        mask_cleaning: dict[str, Any] | None = None,
        **kwargs,
    ):
        for name, value in (("mask_generation", mask_generation), ("mask_cleaning", mask_cleaning)):
            check(name, value, value is None or isinstance(value, Mapping), "a dict of options")
        for name, known in OTHER_STEPS.items():
            check(name, kwargs.get(name), kwargs.get(name) in (None, known), f"{known}: there is no other here")
        super().__init__(**kwargs)
        self.size = _square(1024 if size is None else size)
        self.antialias = antialias
        self.do_resize, self.do_rescale, self.do_normalize = do_resize, do_rescale, do_normalize
        for name in STEPS:
            check_bool(name, getattr(self, name))
        self.image_mean = _of_channels("image_mean", IMAGENET_DEFAULT_MEAN if image_mean is None else image_mean)
        self.image_std = _of_channels("image_std", IMAGENET_DEFAULT_STD if image_std is None else image_std, low=1e-6)
        self.mask_generation = dict(mask_generation or {})
        MaskGenerationOptions().with_changes(self.mask_generation)
        self.mask_cleaning = dict(mask_cleaning or {})
        MaskCleaning().with_changes(self.mask_cleaning)

    def preprocess(
        self,
        images: Any,
        size: int | dict[str, int] | None = None,
        antialias: bool | None = None,
        do_resize: bool | None = None,
        do_rescale: bool | None = None,
        do_normalize: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchFeature:
        """Prepare one image or a list for the model; arguments left out are those of the processor.

        Args:
            images: PIL image, path, URL, uint8 array (H, W, 3), tensor (3, H, W) (uint8, or float in 0..1), or a list
                or batch of these.
            return_tensors: "pt", "np" or None (lists).

        Returns:
            `pixel_values` (B, 3, size, size) float32, `original_sizes` and `reshaped_input_sizes` (B, 2) int64 as
            (height, width).

        Raises:
            FileNotFoundError, ValueError, TypeError: on anything that is not such an image; the message names it.
        """
        size = self.size if size is None else _square(size)
        do_resize = self.do_resize if do_resize is None else do_resize
        do_rescale = self.do_rescale if do_rescale is None else do_rescale
        do_normalize = self.do_normalize if do_normalize is None else do_normalize
        antialias = self.antialias if antialias is None else antialias
        for name, value in zip(STEPS, (do_resize, do_rescale, do_normalize, antialias), strict=True):
            check_bool(name, value)
        check_choice("return_tensors", return_tensors, ("pt", "np", None))
        tensors = [image_to_tensor(image, f"images[{index}]") for index, image in enumerate(_as_list(images))]
        original_sizes = [tuple(tensor.shape[1:]) for tensor in tensors]
        target = (size["height"], size["width"])
        prepared = []
        for tensor in tensors:
            # Integers are rescaled; a float image is in 0..1 by convention and stays as it is.
            tensor = tensor.float() / 255.0 if do_rescale and tensor.dtype == torch.uint8 else tensor.float()
            if do_resize and tuple(tensor.shape[1:]) != target:
                tensor = F.interpolate(
                    tensor[None], size=target, mode="bilinear", align_corners=False, antialias=antialias
                )[0]
            prepared.append(self._normalize(tensor) if do_normalize else tensor)
        return _batch(prepared, original_sizes, return_tensors)

    def _normalize(self, image: torch.Tensor) -> torch.Tensor:
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device=image.device).view(-1, 1, 1)
            for values in (self.image_mean, self.image_std)
        )
        return (image - mean) / std

    def post_process_masks(
        self,
        masks: torch.Tensor | list[torch.Tensor],
        original_sizes: Any,
        reshaped_input_sizes: Any = None,
        mask_threshold: float = 0.0,
        binarize: bool = True,
        object_mask: torch.Tensor | None = None,
        prompts: Mapping[str, Any] | None = None,
        **cleaning: Any,
    ) -> list[torch.Tensor]:
        """Bring low-resolution logits to the pixels of the original images.

        Where the checkpoint's `mask_cleaning` says so, masks are made whole on the way: see [`MaskCleaning`].

        Args:
            masks: (B, Q, M, h, w) logits, or a list over images of (Q, M, h, w).
            original_sizes: (height, width) of every image.
            reshaped_input_sizes: accepted for code written for SAM and not needed: nothing is padded.
            mask_threshold: logits of at least this much belong to the object.
            binarize: whether to cut at the threshold, or return the logits.
            object_mask: (B, Q) of the model's output; only objects with True are returned.
            prompts: what the processor returned ("input_points", "input_labels", "input_boxes" in model pixels): by
                these cleaning knows which part was clicked, and where the box is.
            cleaning: options of [`MaskCleaning`] for this call, in the place of the checkpoint's.

        Returns:
            A list over images of (Q, M, H, W) bool, or float32 with `binarize=False`.

        Raises:
            ValueError: for malformed masks, sizes or prompts, or if their numbers of images or objects differ.
            TypeError: for an unknown option.
        """
        options = MaskCleaning().with_changes({**(self.mask_cleaning or {}), **cleaning})
        check("mask_threshold", mask_threshold, is_number(mask_threshold), "a number")
        check("prompts", prompts, prompts is None or isinstance(prompts, Mapping), "what the processor returned")
        masks, sizes = _logits_of_images(masks), image_sizes(original_sizes, "original_sizes")
        if len(sizes) != len(masks):
            raise ValueError(f"original_sizes is for {len(sizes)} images, but masks for {len(masks)}")
        object_mask = None if object_mask is None else _real_of_images(object_mask, masks)
        given = [
            self._prompts_of(prompts or {}, index, image_masks, size)
            for index, (image_masks, size) in enumerate(zip(masks, sizes, strict=True))
        ]
        if object_mask is not None:
            masks = [image_masks[real.to(image_masks.device)] for image_masks, real in zip(masks, object_mask)]
            given = [
                {name: value[real.to(value.device)] for name, value in own.items()}
                for own, real in zip(given, object_mask)
            ]
        result = []
        for image_masks, size, own in zip(masks, sizes, given, strict=True):
            resized = _resize_logits(image_masks, size, mask_threshold if binarize else None)
            if options and binarize:
                resized = clean_masks(resized, options, **own)
            elif options:
                resized = clean_logits(resized, options, mask_threshold, **own)
            result.append(resized)
        return result

    def _prompts_of(
        self, prompts: Mapping[str, Any], index: int, masks: torch.Tensor, size: tuple[int, int]
    ) -> dict[str, torch.Tensor]:
        """Prompts of one image of `size` in its pixels: clicks (Q, P, 2), labels (Q, P), boxes (Q, 4)."""
        found: dict[str, torch.Tensor] = {}
        for name, key in (("input_points", "clicks"), ("input_labels", "labels"), ("input_boxes", "boxes")):
            if prompts.get(name) is not None:
                found[key] = _of_image(name, prompts[name], index, masks)
        if "labels" in found and ("clicks" not in found or found["labels"].shape != found["clicks"].shape[:2]):
            raise ValueError(f"input_labels of image {index} is not one for each of input_points")
        height, width = self.size["height"], self.size["width"]
        if prompts.get("reshaped_input_sizes") is not None:  # of the call that made them
            sizes = image_sizes(prompts["reshaped_input_sizes"], "reshaped_input_sizes")
            if index >= len(sizes):
                raise ValueError(f"reshaped_input_sizes is for {len(sizes)} images, but masks for more")
            height, width = sizes[index]
        scale = torch.tensor([size[1] / width, size[0] / height], dtype=torch.float32, device=masks.device)
        if "clicks" in found:
            # A click names a pixel, and scaling there and back must not bring it into the one before.
            found["clicks"] = (found["clicks"].float() * scale * 64).round() / 64
            found.setdefault("labels", torch.ones(found["clicks"].shape[:2], dtype=torch.long, device=masks.device))
        if "boxes" in found:
            boxes = found["boxes"].float()
            found["boxes"] = torch.where((boxes == -1).all(-1, keepdim=True), boxes, boxes * scale.repeat(2))
        return found

    @torch.no_grad()
    def resize_window(
        self, logits: torch.Tensor, size: tuple[int, int], cells: list[int]
    ) -> tuple[torch.Tensor, tuple[int, int]]:
        """What `post_process_masks` makes of logits, where they matter.

        Args:
            logits: (h, w) low-resolution logits of a mask.
            size: (height, width) of the image.
            cells: (x0, y0, x1, y1), the first and last cells that matter.

        Returns:
            (h', w') float32 logits of the image's pixels up to two cells around those, and (x, y) of the first pixel.
            In an image smaller than the logits there may be none.
        """
        (x0, x1), (y0, y1) = (
            _pixels_of(cells[axis], cells[axis + 2], *sides)
            for axis, sides in enumerate(zip(logits.shape[::-1], size[::-1]))
        )
        near_y, near_x = cells_near(cells)
        with torch.autocast(logits.device.type, enabled=False):
            window = logits[near_y, near_x].float()
            window = _resize_axis(window.T, near_x.start, logits.shape[1], (x0, x1), size[1]).T
            window = _resize_axis(window, near_y.start, logits.shape[0], (y0, y1), size[0])
        return window, (x0, y0)

    @torch.no_grad()
    def resize_within(self, logits: torch.Tensor, size: tuple[int, int], cells: list[list[int]]) -> torch.Tensor:
        """The same for many masks at once, at the size of the image, where most of it need not be saved.

        (M, h, w) logits, and for each of them the cells that matter -> (M, height, width) float32, -inf where
        `resize_window` ends.
        """
        outside = []
        for axis, (count, pixels) in enumerate(zip(logits.shape[:0:-1], size[::-1])):
            spans = [_pixels_of(window[axis], window[axis + 2], count, pixels) for window in cells]
            first, end = torch.tensor(spans, device=logits.device)[:, :, None].unbind(1)
            pixel = torch.arange(pixels, device=logits.device)
            outside.append((pixel < first) | (pixel >= end))
        resized = _resize_logits(logits[None], size, None)[0]
        return resized.masked_fill_(outside[0][:, None, :] | outside[1][:, :, None], -math.inf)

    def generate_crop_boxes(
        self,
        image: Any,
        target_size: int,
        crop_n_layers: int = 0,
        overlap_ratio: float = 512 / 1500,
        points_per_crop: int = 32,
        crop_n_points_downscale_factor: int = 1,
        device: torch.device | str | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], torch.Tensor]:
        """Crops of an image and a grid of points for each, as `MaskGenerationPipeline` asks for them.

        Args:
            image: any image that `preprocess` takes.
            target_size: height and width of the model's input; the points are in its pixels.
            crop_n_layers: layers of crops beside the whole image; layer i has 4**i.
            overlap_ratio: overlap of the crops of the first layer, as a part of the image's shorter side.
            points_per_crop: points per side of the grid.
            crop_n_points_downscale_factor: divides that number once more in every layer.
            device: where the tensors go.

        Returns:
            Boxes (crops, 4) int64 in original pixels, points (1, n, crops, 2) float32 in model pixels, the crops
            (3, h, w), labels (1, n, crops). A crop with a smaller grid repeats its last point.
        """
        tensor = image_to_tensor(image, "image")
        boxes = crop_boxes_of_layers(*tensor.shape[1:], crop_n_layers, overlap_ratio)
        crops = [tensor[:, y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]
        grids = []
        for index in range(len(boxes)):
            side = grid_side(index, points_per_crop, crop_n_points_downscale_factor)
            # The model reads coordinates as pixel centres, half a pixel from those of the unit square.
            grid = point_grid(side) * target_size - 0.5
            grids.append(torch.cat([grid, grid[-1:].expand(points_per_crop**2 - len(grid), 2)]))
        points = torch.stack(grids, dim=1)[None].to(device or "cpu")
        labels = torch.ones(points.shape[:3], dtype=torch.long, device=points.device)
        return torch.tensor(boxes, device=points.device), points, crops, labels

    def filter_masks(
        self,
        masks: torch.Tensor,
        iou_scores: torch.Tensor,
        original_size: tuple[int, int],
        cropped_box_image: Any,
        pred_iou_thresh: float = 0.88,
        stability_score_thresh: float = 0.95,
        mask_threshold: float = 0.0,
        stability_score_offset: float = 1.0,
    ) -> tuple[list[dict[str, Any]], torch.Tensor, torch.Tensor]:
        """Keep sure and stable masks of one crop that do not touch its inner edges.

        Args:
            masks: (Q, M, h, w) logits in the crop's pixels.
            iou_scores: (Q, M) predicted IoU.
            original_size: (height, width) of the whole image.
            cropped_box_image: (x0, y0, x1, y1) of the crop in it.
            pred_iou_thresh, stability_score_thresh: lower limits, 0 for none.
            mask_threshold, stability_score_offset: logits to cut at, and how far the stability score moves the cut.

        Returns:
            Uncompressed RLE of the masks in the whole image, scores (K) float32, boxes (K, 4) in its pixels.
        """
        masks, iou_scores = masks.flatten(0, 1), iou_scores.flatten(0, 1).float()
        keep = torch.ones_like(iou_scores, dtype=torch.bool)
        if pred_iou_thresh > 0.0:
            keep &= iou_scores > pred_iou_thresh
        if stability_score_thresh > 0.0:
            keep &= stability_scores(masks, mask_threshold, stability_score_offset) > stability_score_thresh
        masks, scores = masks[keep] > mask_threshold, iou_scores[keep]
        boxes = masks_to_boxes(masks)
        keep = masks.flatten(1).any(1) & ~near_crop_edge(boxes, cropped_box_image, original_size)
        x0, y0, x1, y1 = (int(value) for value in cropped_box_image)
        height, width = original_size
        whole = F.pad(masks[keep], (x0, width - x1, y0, height - y1)).cpu().numpy()
        rles = [{"size": [height, width], "counts": mask_to_counts(mask).tolist()} for mask in whole]
        return rles, scores[keep], boxes[keep] + torch.tensor([x0, y0, x0, y0], device=boxes.device)

    def post_process_for_mask_generation(
        self,
        all_masks: list[dict[str, Any]],
        all_scores: torch.Tensor,
        all_boxes: torch.Tensor,
        crops_nms_thresh: float,
    ) -> tuple[list[np.ndarray], torch.Tensor, list[dict[str, Any]], torch.Tensor]:
        """Drop duplicates: RLE masks, scores (K), boxes (K, 4) -> masks (H, W) bool, scores, RLE masks, boxes."""
        kept = non_maximum_suppression(all_boxes, all_scores, crops_nms_thresh)
        rles = [all_masks[index] for index in kept.tolist()]
        return [decode_rle(rle) for rle in rles], all_scores[kept], rles, all_boxes[kept]


def image_to_tensor(image: Any, name: str) -> torch.Tensor:
    """Turn one image into a tensor: -> (3, H, W), uint8, or float in 0..1 for a float tensor.

    Raises:
        ValueError: if it has not three channels, is empty, or holds floats outside 0..1.
        FileNotFoundError, TypeError: as `open_image`.
    """
    if isinstance(image, np.ndarray):
        if image.dtype.kind not in "biuf":
            raise ValueError(f"{name} has dtype {image.dtype}, expected uint8, or floats in 0..1")
        tensor = torch.from_numpy(np.require(image, requirements="CW"))
    elif isinstance(image, torch.Tensor):
        check_tensor(name, image, "(3, H, W)")
        tensor = image
    else:
        return torch.from_numpy(np.array(_upright(image, name))).permute(2, 0, 1)
    if tensor.ndim != 3 or 3 not in (tensor.shape[0], tensor.shape[2]):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected three channels: (H, W, 3) or (3, H, W)")
    channels_last = tensor.shape[2] == 3 and (tensor.shape[0] != 3 or isinstance(image, np.ndarray))
    tensor = tensor.permute(2, 0, 1) if channels_last else tensor
    if not tensor.numel():
        raise ValueError(f"{name} is empty: {tensor.shape[2]} x {tensor.shape[1]} pixels")
    return _checked_values(tensor, name)


def _upright(image: Any, name: str) -> Image.Image:
    """A PIL image is taken as it is shown, in the pixels of `image.size`; a file as its EXIF orientation says."""
    if isinstance(image, Image.Image):
        check_picture(image, name)
        try:
            if image.getexif().get(0x0112, 1) != 1:
                image = Image.fromarray(np.asarray(image.convert("RGB")))
        except (OSError, SyntaxError) as error:
            raise ValueError(f"{name} is damaged or truncated: {error}") from None
    return open_image(image, name)


def _checked_values(tensor: torch.Tensor, name: str) -> torch.Tensor:
    if tensor.dtype == torch.uint8:
        return tensor
    if tensor.dtype not in FLOATS:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected uint8, or floats in 0..1")
    low, high = (float(value) for value in tensor.aminmax())
    if not (low >= 0.0 and high <= 1.0):
        raise ValueError(f"{name} holds floats from {low:g} to {high:g}, expected 0..1 (or uint8 in 0..255)")
    return tensor


def _as_list(images: Any) -> list[Any]:
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    images = list(images) if is_batch or isinstance(images, (list, tuple)) else [images]
    if not images:
        raise ValueError("images is an empty list, expected at least one image")
    return images


def _square(size: int | dict[str, int]) -> dict[str, int]:
    expected = f"a whole number from 1 to {LARGEST_SIDE}, or {{'height': int, 'width': int}} of such"
    sides = {"height": size, "width": size} if is_whole(size) else size
    check("size", size, isinstance(sides, Mapping), expected)
    sides = {key: value for key, value in sides.items() if value is not None}
    fits = set(sides) == {"height", "width"} and all(is_whole(n) and 1 <= n <= LARGEST_SIDE for n in sides.values())
    check("size", size, fits, expected)
    return {key: int(value) for key, value in sides.items()}


def _of_channels(name: str, values: Any, low: float = -1e6, high: float = 1e6) -> list[float]:
    """A number for each channel; ValueError for anything else, or numbers out of bounds."""
    numbers = list(values) if isinstance(values, (list, tuple, np.ndarray)) else []
    fits = len(numbers) == 3 and all(is_number(value) and low <= value <= high for value in numbers)
    check(name, values, fits, f"three numbers from {low:g} to {high:g}")
    return [float(value) for value in numbers]


def _batch(images: list[torch.Tensor], original_sizes: list[tuple[int, int]], return_tensors: str | None):
    reshaped_input_sizes = [tuple(image.shape[1:]) for image in images]
    if return_tensors is None:
        images = [image.numpy() for image in images]
    elif len(set(reshaped_input_sizes)) > 1:
        raise ValueError(f"images of sizes {reshaped_input_sizes} make no batch; leave do_resize on")
    else:
        images = torch.stack(images)
    data = {"pixel_values": images, "original_sizes": original_sizes, "reshaped_input_sizes": reshaped_input_sizes}
    if return_tensors == "np":
        data["pixel_values"] = images.numpy()
    elif return_tensors == "pt":
        data |= {name: torch.tensor(sizes, device="cpu") for name, sizes in data.items() if name != "pixel_values"}
    return BatchFeature(data, tensor_type=return_tensors)


def _logits_of_images(masks: Any) -> list[torch.Tensor]:
    """Masks of `post_process_masks` as a tensor (Q, M, h, w) of each image."""
    is_nested = isinstance(masks, (list, tuple)) or getattr(masks, "ndim", 0) > 0
    check("masks", masks, is_nested, "(objects, masks, h, w) of each image")
    found = []
    for index, own in enumerate(masks):
        name = f"masks of image {index}"
        logits = as_tensor(name, own, "(objects, masks, h, w)")
        if logits.ndim != 4 or 0 in logits.shape[1:]:
            raise ValueError(f"{name} has shape {tuple(logits.shape)}, expected (objects, masks, h, w)")
        found.append(logits)
    return found


def _real_of_images(object_mask: Any, masks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Which objects are real as a tensor (Q) bool for each image; ValueError if it does not fit the masks."""
    is_nested = isinstance(object_mask, (list, tuple)) or getattr(object_mask, "ndim", 0) == 2
    check("object_mask", object_mask, is_nested, "a bool for each object of each image")
    real = [as_tensor(f"object_mask of image {index}", own, "(Q)").bool() for index, own in enumerate(object_mask)]
    shapes, expected = [tuple(own.shape) for own in real], [(len(image_masks),) for image_masks in masks]
    if shapes != expected:
        raise ValueError(f"object_mask has shapes {short(shapes)}, expected those of masks, {short(expected)}")
    return real


def _of_image(name: str, prompts: Any, index: int, masks: torch.Tensor) -> torch.Tensor:
    """What `post_process_masks` is given of one kind of prompt, of one image whose masks are (Q, M, h, w)."""
    tail = {"input_points": ("P", 2), "input_labels": ("P",), "input_boxes": (4,)}[name]
    try:
        value = torch.as_tensor(prompts[index], device=masks.device)
    except (TypeError, ValueError, IndexError, KeyError, RuntimeError) as error:
        raise ValueError(f"{name} is {short(prompts)}, expected that of the processor") from error
    fits = value.ndim == 1 + len(tail) and (tail[-1] in ("P", value.shape[-1])) and not value.is_complex()
    if not fits:
        expected = ", ".join(map(str, ("Q", *tail)))
        raise ValueError(f"{name} of image {index} has shape {tuple(value.shape)}, expected ({expected})")
    if len(value) != len(masks):
        raise ValueError(f"{name} of image {index} is for {len(value)} objects, but masks for {len(masks)}")
    return value


def _resize_logits(logits: torch.Tensor, size: tuple[int, int], threshold: float | None) -> torch.Tensor:
    """(Q, M, h, w) -> (Q, M, H, W), cut at `threshold` piece by piece so that few full-size floats exist at once."""
    flat = logits.flatten(0, 1)
    result = torch.empty(
        len(flat), *size, dtype=torch.float32 if threshold is None else torch.bool, device=flat.device
    )
    for start in range(0, len(flat), MASKS_AT_ONCE):
        piece = flat[start : start + MASKS_AT_ONCE, None].float()
        piece = F.interpolate(piece, size=size, mode="bicubic", align_corners=False)[:, 0]
        result[start : start + MASKS_AT_ONCE] = piece if threshold is None else piece >= threshold
    return result.unflatten(0, logits.shape[:2])


def _pixels_of(first: int, last: int, cells: int, pixels: int) -> tuple[int, int]:
    """Range of pixels whose centres are not more than two cells away from cells `first` to `last`."""
    scale = pixels / cells
    start, end = math.ceil((first - 1.5) * scale - 0.5), math.floor((last + 2.5) * scale - 0.5)
    start = max(0, start)
    return start, max(start, min(pixels, end + 1))


def _resize_axis(values: torch.Tensor, first: int, cells: int, span: tuple[int, int], pixels: int) -> torch.Tensor:
    """Bicubic interpolation from `cells` to `pixels` along the first axis, of pixels `span[0]` to before `span[1]`.

    (n, m) float32 values of the cells from `first` on -> (span[1] - span[0], m). What is not among them is zero.
    """
    weights = _resize_weights(cells, pixels, values.device)
    start, end = span
    result = values.new_empty(end - start, values.shape[1])
    for pixel in range(start, end, PIXELS_AT_ONCE):
        stop = min(pixel + PIXELS_AT_ONCE, end)
        low = max(_first_cell(pixel, cells, pixels), first)
        high = max(low, min(_first_cell(stop - 1, cells, pixels) + 4, first + len(values)))
        torch.mm(
            weights[pixel:stop, low:high],
            values[low - first : high - first],
            out=result[pixel - start : stop - start],
        )
    return result


def _first_cell(pixel: int, cells: int, pixels: int) -> int:
    """The first of the four cells that a pixel is interpolated from, where the outermost stand for those beyond."""
    return max(0, min(math.floor((pixel + 0.5) * cells / pixels - 0.5) - 1, cells - 4))


@lru_cache(maxsize=16)
def _resize_weights(cells: int, pixels: int, device: torch.device) -> torch.Tensor:
    """Bicubic interpolation along one axis as a matrix: (pixels, cells) float32."""
    identity = torch.eye(cells, dtype=torch.float32, device=device)[None, None]
    return F.interpolate(identity, size=(pixels, cells), mode="bicubic", align_corners=False)[0, 0]


__all__ = ["EfficientSamImageProcessor"]
