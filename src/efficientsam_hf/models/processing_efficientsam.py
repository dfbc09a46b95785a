# SPDX-License-Identifier: Apache-2.0
"""Prompts in pixels of the original images to prompts in model pixels, for EfficientSAM."""

import sys
from typing import Any

import numpy as np
import torch
from transformers.image_processing_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from .checks_efficientsam import LARGEST, as_tensor, check_bool, check_choice, check_whole, image_sizes, largest, short


COORDINATE_KEYS = ("input_points", "input_boxes")
LARGEST_FLOAT = sys.float_info.max
DEEPEST = 8  # lists in each other, more than any prompt has


class EfficientSamBatchFeature(BatchFeature):
    """Model inputs whose coordinates stay float32 whatever dtype the batch is cast to: bfloat16 is pixels off."""

    def to(self, *args, **kwargs) -> "EfficientSamBatchFeature":
        coordinates = {key: self[key] for key in COORDINATE_KEYS if key in self}
        super().to(*args, **kwargs)
        for key, exact in coordinates.items():
            if isinstance(exact, torch.Tensor):
                self[key] = exact.to(self[key].device)
        return self


class EfficientSamProcessor(ProcessorMixin):
    r"""
    Prepares images and prompts for [`EfficientSamModel`] and brings its masks back to the images.

    Args:
        image_processor (`EfficientSamImageProcessor`):
            Stretches the images.
        background_points (`bool`, *optional*, defaults to `True`):
            Whether the checkpoint knows points with label 0.
        mask_prompts (`bool`, *optional*, defaults to `True`):
            Whether it takes low-resolution logits as a prompt.
        max_prompt_tokens (`int`, *optional*):
            Largest number of prompt tokens of an object (a point is one, a box is two); `None` for any.
    """

    def __init__(
        self,
        image_processor,
        background_points: bool = True,
        mask_prompts: bool = True,
        max_prompt_tokens: int | None = None,
        **kwargs,
    ):
        super().__init__(image_processor, **kwargs)
        check_bool("background_points", background_points)
        check_bool("mask_prompts", mask_prompts)
        if max_prompt_tokens is not None:
            check_whole("max_prompt_tokens", max_prompt_tokens, 1, 10**6)
        self.background_points = background_points
        self.mask_prompts = mask_prompts
        self.max_prompt_tokens = max_prompt_tokens

    @classmethod
    def for_model(cls, config, image_processor) -> "EfficientSamProcessor":
        """Processor that allows what a model of this configuration (`EfficientSamConfig`) knows."""
        prompts = config.prompt_encoder_config
        return cls(
            image_processor,
            background_points=prompts.background_points,
            mask_prompts=prompts.mask_prompts,
            max_prompt_tokens=prompts.padded_prompt_tokens,
        )

    @property
    def model_input_names(self) -> list[str]:
        prompts = ["input_points", "input_labels", "input_boxes", "input_masks"]
        return self.image_processor.model_input_names + prompts

    def __call__(
        self,
        images: Any = None,
        input_points: Any = None,
        input_labels: Any = None,
        input_boxes: Any = None,
        input_masks: Any = None,
        original_sizes: Any = None,
        return_tensors: str | None = None,
        **kwargs,
    ) -> BatchFeature:
        r"""
        Prepare images and prompts. Prompts are in pixels of the original images; images and objects may differ in
        their numbers of objects and points, what is short is padded (label -1, box of four -1).

        Args:
            images:
                What the image processor takes. Left out, prompts alone are prepared for images of `original_sizes`
                whose embeddings are known already.
            input_points:
                Points as (x, y), nested (image, object, point, xy), or (image, point, xy) for one object an image; an
                array, a tensor or nested lists, where `[]` is an object without points. A point on the border,
                0 <= x <= W and 0 <= y <= H, is inside the image.
            input_labels:
                1 for the object, 0 for the background, nested as the points; all 1 when left out.
            input_boxes:
                Boxes (x0, y0, x1, y1), nested (image, object, xyxy); `None` in a list is an object without a box. A
                box that reaches over the border is cut to the image: users drag them there.
            input_masks:
                Low-resolution logits of an earlier prediction, (B, Q, 1, h, w), or nested (image, object) with
                `None` for an object without a mask. A model with `dense_boxes` cuts them at the object's box.
            original_sizes:
                (height, width) of every image, when `images` is left out.
            return_tensors:
                "pt", "np" or None.
            kwargs:
                Arguments of the image processor.

        Raises:
            ValueError: if prompts are malformed, not finite, outside their image, or not known to this checkpoint; the
                message names the image, the object and the value.
            TypeError: on an unknown keyword argument.
        """
        check_choice("return_tensors", return_tensors, ("pt", "np", None))
        if (images is None) == (original_sizes is None):
            raise ValueError("expected exactly one of images and original_sizes")
        encoding = {}
        if images is not None:
            encoding = dict(self.image_processor(images, return_tensors=return_tensors, **kwargs))
            original_sizes = encoding["original_sizes"]
        elif kwargs:
            raise TypeError(f"unexpected keyword argument {sorted(kwargs)[0]!r} without images")
        sizes = image_sizes(original_sizes, "original_sizes")
        default = (self.image_processor.size["height"], self.image_processor.size["width"])
        # `size` and `do_resize` may be overridden in this call, so the images say what the model will see.
        targets = image_sizes(encoding.get("reshaped_input_sizes", [default] * len(sizes)), "reshaped_input_sizes")
        prompts = self._encode_prompts(sizes, targets, input_points, input_labels, input_boxes, input_masks)
        if return_tensors != "pt":
            prompts = {key: value.numpy() for key, value in prompts.items()}
        return EfficientSamBatchFeature({**encoding, **prompts}, tensor_type=return_tensors)

    def _encode_prompts(
        self, sizes, targets, input_points, input_labels, input_boxes, input_masks
    ) -> dict[str, torch.Tensor]:
        """Prompts in pixels of images of `sizes` -> padded tensors in pixels of `targets`, both (height, width)."""
        mask_size = (targets[0][0] // 4, targets[0][1] // 4)
        points, labels = parse_points(input_points, input_labels)
        boxes = parse_boxes(input_boxes)
        masks = parse_masks(input_masks, mask_size)
        given = {"input_points": points, "input_boxes": boxes, "input_masks": masks}
        given = {name: value for name, value in given.items() if value is not None}
        for name, value in given.items():
            if len(value) != len(sizes):
                raise ValueError(f"{name} is for {len(value)} images, but there are {len(sizes)}")
        for image in range(len(sizes)):
            counts = {name: len(value[image]) for name, value in given.items()}
            if len(set(counts.values())) > 1:
                raise ValueError(f"image {image}: prompts disagree on the number of objects: {counts}")
        if points is not None:
            check_points(points, labels, sizes)
        if boxes is not None:
            boxes = clipped_boxes(boxes, sizes)
        self._check_capabilities(points, labels, boxes, masks)
        # Model pixels per original pixel, (x, y) of every image.
        scales = [(to[1] / width, to[0] / height) for (height, width), to in zip(sizes, targets, strict=True)]
        encoded = {}
        if points is not None:
            encoded["input_points"], encoded["input_labels"] = pad_points(points, labels, scales)
        if boxes is not None:
            encoded["input_boxes"] = pad_boxes(boxes, scales)
        if masks is not None:
            encoded["input_masks"] = pad_masks(masks, mask_size)
        return encoded

    def _check_capabilities(self, points, labels, boxes, masks) -> None:
        if masks is not None and not self.mask_prompts:
            raise ValueError("input_masks is given, but this checkpoint takes no mask prompts")
        for image, objects in enumerate(labels or []):
            for index, object_labels in enumerate(objects):
                if 0 in object_labels and not self.background_points:
                    raise ValueError(
                        f"input_labels of image {image}, object {index} has a 0, but this checkpoint knows no "
                        "background points"
                    )
        if self.max_prompt_tokens is None:
            return
        for image, objects in enumerate(points or boxes or []):
            for index in range(len(objects)):
                tokens = len(points[image][index]) if points is not None else 0
                tokens += 2 if boxes is not None and boxes[image][index] is not None else 0
                if tokens > self.max_prompt_tokens:
                    raise ValueError(
                        f"image {image}, object {index} has {tokens} prompt tokens, but this checkpoint takes at most "
                        f"{self.max_prompt_tokens} (a point is one, a box is two)"
                    )

    def post_process_masks(self, *args, **kwargs) -> list[torch.Tensor]:
        """Bring low-resolution logits to the original images; see the image processor."""
        return self.image_processor.post_process_masks(*args, **kwargs)


def _plain(value: Any, name: str, depth: int = 0) -> Any:
    """Arrays, tensors and numpy's scalars, also inside lists, to nested lists and Python's numbers."""
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        if depth == DEEPEST:
            raise ValueError(f"{name} is nested more than {DEEPEST} deep, expected (image, object, ...)")
        return [_plain(item, name, depth + 1) for item in value]
    return value


def _depth(value: Any) -> int:
    """Levels of lists above the first number: 0 for a number, and the deepest list where there is none."""
    if not isinstance(value, list):
        return 0
    return 1 + max((_depth(item) for item in value), default=0)


def _numbers(values: Any, length: int, name: str, place: str) -> list[float]:
    """Check that `values` are `length` finite numbers."""
    fits = isinstance(values, list) and len(values) == length
    if not fits or not all(_is_finite(value) for value in values):
        raise ValueError(f"{name} of {place}: {short(values)} is not {length} finite numbers")
    return [float(value) for value in values]


def _is_finite(value: Any) -> bool:
    """Whether this is a finite number of Python, and no bool; an integer of hundreds of digits is none."""
    return isinstance(value, (int, float)) and value is not True and value is not False and abs(value) <= LARGEST_FLOAT


def _objects_of(value: Any, name: str) -> list[list]:
    if not isinstance(value, list) or not all(isinstance(objects, list) for objects in value):
        raise ValueError(f"{name} must be nested (image, object, ...), got {short(value)}")
    return value


def parse_points(input_points: Any, input_labels: Any) -> tuple[list | None, list | None]:
    """Bring points and labels to nested lists: (image, object, point) of (x, y), and of 0 or 1.

    Raises:
        ValueError: if they are no such nesting of finite numbers, or labels do not fit the points.
    """
    if input_points is None:
        if input_labels is not None:
            raise ValueError("input_labels is given without input_points")
        return None, None
    points, labels = _plain(input_points, "input_points"), _plain(input_labels, "input_labels")
    depth = _depth(points)
    if depth == 3 and _has_numbers(points):  # one object an image
        points = [[image_points] for image_points in points]
        if isinstance(labels, list):
            labels = [[image_labels] for image_labels in labels]
    elif depth > 4 or (depth < 3 and _has_numbers(points)):
        raise ValueError(f"input_points is nested {depth} deep, expected (image, object, point, xy)")
    parsed = []
    for image, objects in enumerate(_objects_of(points, "input_points")):
        parsed.append([])
        for index, object_points in enumerate(objects):
            place = f"image {image}, object {index}"
            if not isinstance(object_points, list):
                raise ValueError(f"input_points of {place}: {short(object_points)} is not a list of points")
            parsed[-1].append([_numbers(point, 2, "input_points", place) for point in object_points])
    if labels is None:
        return parsed, [[[1] * len(object_points) for object_points in objects] for objects in parsed]
    _check_labels(parsed, labels)
    return parsed, labels


def _has_numbers(value: Any) -> bool:
    return any(_has_numbers(item) for item in value) if isinstance(value, list) else True


def _check_labels(points: list, labels: Any) -> None:
    expected = [[len(object_points) for object_points in objects] for objects in points]
    try:
        found = [[len(object_labels) for object_labels in objects] for objects in labels]
    except TypeError:
        found = None
    if found != expected:
        raise ValueError(
            f"input_labels must be nested as the points: {short(expected)} points an object, got {short(labels)}"
        )
    for image, objects in enumerate(labels):
        for index, object_labels in enumerate(objects):
            for label in object_labels:
                if not isinstance(label, (int, float)) or label not in (0, 1):
                    raise ValueError(
                        f"input_labels of image {image}, object {index}: {short(label)} is not 1 (object) or 0 "
                        "(background); leave padding out"
                    )


def check_points(points: list, labels: list, sizes: list[tuple[int, int]]) -> None:
    """Raise ValueError on a point outside its image; the border, x = W or y = H, is inside."""
    for image, (objects, (height, width)) in enumerate(zip(points, sizes, strict=True)):
        for index, object_points in enumerate(objects):
            for x, y in object_points:
                if not (0 <= x <= width and 0 <= y <= height):
                    raise ValueError(
                        f"input_points of image {image}, object {index}: ({x:g}, {y:g}) is outside the image of "
                        f"{width} x {height} pixels"
                    )


def parse_boxes(input_boxes: Any) -> list | None:
    """Bring boxes to nested lists: (image, object) of (x0, y0, x1, y1) or None.

    Raises:
        ValueError: if they are no such nesting of finite numbers.
    """
    if input_boxes is None:
        return None
    parsed = []
    for image, boxes in enumerate(_objects_of(_plain(input_boxes, "input_boxes"), "input_boxes")):
        parsed.append([])
        for index, box in enumerate(boxes):
            place = f"image {image}, object {index}"
            parsed[-1].append(None if box is None else _numbers(box, 4, "input_boxes", place))
    return parsed


def clipped_boxes(boxes: list, sizes: list[tuple[int, int]]) -> list:
    """Cut boxes to their images; raise ValueError on one that is empty or lies outside."""
    result = []
    for image, (objects, (height, width)) in enumerate(zip(boxes, sizes, strict=True)):
        result.append([])
        for index, box in enumerate(objects):
            if box is None:
                result[-1].append(None)
                continue
            place = f"input_boxes of image {image}, object {index}"
            x0, y0, x1, y1 = box
            if x1 <= x0 or y1 <= y0:
                raise ValueError(f"{place}: {short(box)} is empty, expected x0 < x1 and y0 < y1")
            if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
                raise ValueError(f"{place}: {short(box)} is outside the image of {width} x {height} pixels")
            result[-1].append([max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))])
    return result


def parse_masks(input_masks: Any, size: tuple[int, int]) -> list | None:
    """Bring mask prompts to nested lists: (image, object) of (h, w) float32 tensors or None.

    Raises:
        ValueError: if a mask has another size, or holds what is not finite.
    """
    if input_masks is None:
        return None
    if not _is_nested(input_masks) or not all(_is_nested(masks) for masks in input_masks):
        raise ValueError(f"input_masks must be nested (image, object, 1, h, w), got {short(input_masks)}")
    parsed = []
    for image, masks in enumerate(input_masks):
        parsed.append([])
        for index, mask in enumerate(masks):
            if mask is None:
                parsed[-1].append(None)
                continue
            place = f"input_masks of image {image}, object {index}"
            mask = as_tensor(place, mask, "(1, h, w)").to(torch.float32)
            mask = mask[0] if mask.ndim == 3 and len(mask) == 1 else mask
            if tuple(mask.shape) != size:
                raise ValueError(f"{place} has shape {tuple(mask.shape)}, expected low-resolution logits {size}")
            if not float(largest(mask)) <= LARGEST:
                raise ValueError(f"{place} holds values that are not finite, or of more than {LARGEST:g}")
            parsed[-1].append(mask)
    return parsed


def _is_nested(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim > 0)


def pad_points(points: list, labels: list, scales: list[tuple[float, float]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and pad: nested lists -> (B, Q, P, 2) float32 in model pixels, (B, Q, P) int64, padding -1."""
    num_objects = max(len(objects) for objects in points)
    num_points = max((len(object_points) for objects in points for object_points in objects), default=0)
    padded = torch.full((len(points), num_objects, num_points, 2), -1, dtype=torch.float32, device="cpu")
    padded_labels = torch.full((len(points), num_objects, num_points), -1, dtype=torch.long, device="cpu")
    for image, objects in enumerate(points):
        scale = np.array(scales[image])
        for index, object_points in enumerate(objects):
            if object_points:
                scaled = torch.from_numpy(np.array(object_points) * scale)
                padded[image, index, : len(object_points)] = scaled.float()
                padded_labels[image, index, : len(object_points)] = torch.from_numpy(np.array(labels[image][index]))
    return padded, padded_labels


def pad_boxes(boxes: list, scales: list[tuple[float, float]]) -> torch.Tensor:
    """Scale and pad: nested lists -> (B, Q, 4) float32 in model pixels, four times -1 where there is no box."""
    most = max(len(objects) for objects in boxes)
    padded = torch.full((len(boxes), most, 4), -1, dtype=torch.float32, device="cpu")
    for image, objects in enumerate(boxes):
        scale = np.array(scales[image] * 2)
        for index, box in enumerate(objects):
            if box is not None:
                padded[image, index] = torch.from_numpy(np.array(box) * scale).float()
    return padded


def pad_masks(masks: list, size: tuple[int, int]) -> torch.Tensor:
    """Stack and pad: nested lists of (h, w) -> (B, Q, 1, h, w) float32, zeros where there is no mask."""
    shape = (len(masks), max(len(objects) for objects in masks), 1, *size)
    padded = torch.zeros(shape, dtype=torch.float32, device="cpu")
    for image, objects in enumerate(masks):
        for index, mask in enumerate(objects):
            if mask is not None:
                padded[image, index, 0] = mask
    return padded


__all__ = ["EfficientSamProcessor"]
