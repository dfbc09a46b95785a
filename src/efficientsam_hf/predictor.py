# SPDX-License-Identifier: Apache-2.0
"""Embed an image once and prompt it many times, with the calls of `segment_anything.SamPredictor`."""

import re
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from .models.checks_efficientsam import as_tensor, check, check_finite, check_tensor, image_size, short
from .models.fast_decoding_efficientsam import EfficientSamFastDecoder, place_of
from .models.modeling_efficientsam import real_objects


# What the processor calls the arguments of `predict`.
ARGUMENTS = {
    "input_points": "point_coords",
    "input_labels": "point_labels",
    "input_boxes": "box",
    "input_masks": "mask_input",
}


@dataclass(frozen=True, eq=False)
class EmbeddedImage:
    """An image that `EfficientSamPredictor.embed` has encoded, to be prompted in any thread, any number of times.

    `embedding` (1, C, h, w) is what the encoder of `model` made of it, `original_size` its (height, width).
    """

    model: Any
    embedding: torch.Tensor
    original_size: tuple[int, int]

    @cached_property
    def decoder(self) -> EfficientSamFastDecoder:
        """For many prompts at once."""
        return EfficientSamFastDecoder(self.model, self.embedding)


class _ThreadImage(threading.local):
    """What `set_image` was given, of each thread its own."""

    image: EmbeddedImage | None = None


class EfficientSamPredictor:
    """Holds one image's embedding; every prompt after that costs only the mask decoder.

    `model` is an `EfficientSamModel`, on its device and in its dtype, `processor` its `EfficientSamProcessor`.
    Coordinates are pixels of the image, x to the right and y down; 0 <= x <= W and 0 <= y <= H are inside.

    Threads may share a predictor. An image of `set_image` is there for the thread that has set it, and no other sees
    it; one of `embed`, given as `image=` with each prompt, is for all of them. Copies begin without an image.
    """

    def __init__(self, model: Any, processor: Any):
        if not hasattr(model, "decode_prompts"):
            raise TypeError(f"model is a {type(model).__name__}, expected an EfficientSamModel")
        if not hasattr(processor, "image_processor"):
            raise TypeError(f"processor is a {type(processor).__name__}, expected an EfficientSamProcessor")
        self.model = model
        self.processor = processor
        self._own = _ThreadImage()

    def __reduce__(self) -> tuple:
        return type(self), (self.model, self.processor)

    @torch.no_grad()
    def embed(self, image: Any, image_format: str = "RGB") -> EmbeddedImage:
        """Encode an image for `predict(..., image=)`: what the processor takes, a path, PIL image or (H, W, 3) uint8.

        With `image_format` "BGR" an (H, W, 3) array's channels are in OpenCV's order. Raises ValueError for another
        format, and for "BGR" with anything but such an array.
        """
        if not isinstance(image_format, str) or image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be RGB or BGR, got {short(image_format)}")
        if image_format == "BGR":
            shape = getattr(image, "shape", None)
            if not isinstance(image, np.ndarray) or len(shape) != 3 or shape[2] != 3:
                raise ValueError(f"image_format BGR is for arrays of shape (H, W, 3), got {_described(image)}")
            image = image[..., ::-1]
        inputs = self.processor.image_processor(images=image, return_tensors="pt")
        if len(inputs["pixel_values"]) != 1:
            raise ValueError(f"image holds {len(inputs['pixel_values'])} images, expected one")
        embedding = self.model.get_image_embeddings(inputs["pixel_values"].to(*place_of(self.model)))
        return EmbeddedImage(self.model, embedding, tuple(inputs["original_sizes"][0].tolist()))

    def set_image(self, image: Any, image_format: str = "RGB") -> None:
        """Encode an image and keep it for prompts without `image=` of this thread; arguments and errors of `embed`."""
        self.reset_image()
        self._own.image = self.embed(image, image_format)

    def reset_image(self) -> None:
        """Forget this thread's image."""
        self._own.image = None

    @property
    def is_image_set(self) -> bool:
        """Whether this thread has an image to prompt."""
        return self._own.image is not None

    @property
    def image_embedding(self) -> torch.Tensor | None:
        """The embedding of this thread's image, (1, C, h, w)."""
        return None if self._own.image is None else self._own.image.embedding

    @property
    def original_size(self) -> tuple[int, int] | None:
        """(height, width) of this thread's image."""
        return None if self._own.image is None else self._own.image.original_size

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return place_of(self.model)[0]

    @property
    def transform(self) -> "InputCoordinates":
        """Brings coordinates to the frame of `predict_torch`."""
        size = self.processor.image_processor.size
        return InputCoordinates((size["height"], size["width"]))

    def get_image_embedding(self) -> torch.Tensor:
        """The image's embedding, (1, C, h, w); RuntimeError if this thread has set no image."""
        return self._chosen(None).embedding

    def _chosen(self, image: EmbeddedImage | None) -> EmbeddedImage:
        """The image to prompt: the one that was given, or this thread's own."""
        if image is None and self._own.image is None:
            raise RuntimeError(
                "no image is set in this thread: call set_image first, or give image= what embed has returned, which "
                "may come from any thread"
            )
        if image is None:
            return self._own.image
        if not isinstance(image, EmbeddedImage):
            raise TypeError(f"image is {_described(image)}, expected what embed returns")
        if image.model is not self.model:
            raise ValueError("image was embedded by another model than that of this predictor")
        return image

    @torch.no_grad()
    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        *,
        image: EmbeddedImage | None = None,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks of one object.

        Args:
            point_coords: (P, 2) clicks (x, y).
            point_labels: (P) 1 for the object, 0 for the background, -1 for padding; all 1 when left out.
            box: (4) x0, y0, x1, y1.
            mask_input: (1, h, w) low-resolution logits of an earlier call, cut at the box where `dense_boxes` is on.
            multimask_output: three candidates for a prompt that can mean several things, or one mask.
            return_logits: logits in place of masks.
            image: what `embed` has returned, in the place of this thread's image.

        Returns:
            (M, H, W) bool masks (float32 logits with `return_logits`), (M) float32 predicted IoU, and (M, h, w)
            float32 low-resolution logits for `mask_input`.

        Raises:
            RuntimeError: if there is no image.
            ValueError: for prompts that are malformed, outside the image, or missing; clicks of which none is left
                are no prompt.
            TypeError: for an image that `embed` has not returned.
        """
        chosen = self._chosen(image)
        points, labels = _without_padding(point_coords, point_labels)
        prompts = {
            "input_points": None if points is None else [[points]],
            "input_labels": None if labels is None else [[labels]],
            "input_boxes": None if box is None else [[_flat(box)]],
            "input_masks": None if mask_input is None else [[mask_input]],
        }
        size = [chosen.original_size]
        try:
            inputs = self.processor(original_sizes=size, return_tensors="pt", **prompts)
            outputs = self.model(
                image_embeddings=chosen.embedding,
                multimask_output=multimask_output,
                **{name: value.to(chosen.embedding.device) for name, value in inputs.items()},
            )
        except (TypeError, ValueError) as error:
            raise type(error)(_in_own_words(str(error))) from error
        low = outputs.pred_masks.float()
        masks = self.processor.post_process_masks(low, size, binarize=not return_logits, prompts=inputs)[0][0]
        return masks.cpu().numpy(), outputs.iou_scores[0, 0].float().cpu().numpy(), low[0, 0].cpu().numpy()

    @torch.no_grad()
    def predict_torch(
        self,
        point_coords: torch.Tensor | None,
        point_labels: torch.Tensor | None,
        boxes: torch.Tensor | None = None,
        mask_input: torch.Tensor | None = None,
        multimask_output: bool = True,
        return_logits: bool = False,
        *,
        image: EmbeddedImage | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks of many objects, B prompts in one call, in the frame of the model's input (see `transform`).

        Args:
            point_coords: (B, P, 2) clicks (x, y).
            point_labels: (B, P) 1 for the object, 0 for the background, -1 for padding; all 1 when None.
            boxes: (B, 4) x0, y0, x1, y1; what reaches over the border is cut off.
            mask_input: (B, 1, h, w) low-resolution logits of an earlier call.
            multimask_output, return_logits, image: as in `predict`.

        Returns:
            (B, M, H, W) bool masks (float32 logits with `return_logits`), (B, M) float32 predicted IoU, and
            (B, M, h, w) float32 low-resolution logits, on the model's device.

        Raises:
            RuntimeError: if there is no image.
            ValueError: for prompts that are malformed, not finite, outside the model's input, or missing, each of the
                B by itself.
            TypeError: for what is no tensor, and for an image that `embed` has not returned.
        """
        chosen = self._chosen(image)
        prompts = self._prompts_of_input(point_coords, point_labels, boxes, mask_input, chosen.embedding.device)
        if mask_input is None:
            low, scores = chosen.decoder(**prompts)
        else:
            given = {name: value[None] for name, value in prompts.items()}
            low, scores = (part[0] for part in self.model.decode_prompts(chosen.embedding, **given)[:2])
        kept = slice(1, None) if multimask_output else slice(0, 1)
        low, scores = low[:, kept].float(), scores[:, kept].float()
        given = {name: value[None] for name, value in prompts.items()}
        masks = self.processor.post_process_masks(
            [low], [chosen.original_size], binarize=not return_logits, prompts=given
        )[0]
        return masks, scores, low

    def _prompts_of_input(
        self, point_coords, point_labels, boxes, mask_input, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Checked arguments of the model's decoder, those that are given, on its device."""
        height, width = self.transform.input_size
        _check_shape("point_coords", point_coords, ("B", "P", 2))
        _check_shape("point_labels", point_labels, ("B", "P") if point_coords is None else point_coords.shape[:2])
        _check_shape("boxes", boxes, ("B", 4))
        _check_shape("mask_input", mask_input, ("B", 1, height // 4, width // 4))
        if point_coords is not None:
            _check_inside(point_coords if point_labels is None else point_coords[point_labels != -1], (height, width))
        if mask_input is not None:
            check_finite("mask_input", mask_input, ("prompt",))
        prompts = {
            "input_points": point_coords,
            "input_labels": point_labels,
            "input_boxes": None if boxes is None else _cut_boxes(boxes, (height, width)),
            "input_masks": mask_input,
        }
        prompts = {name: value.to(device) for name, value in prompts.items() if value is not None}
        _check_prompted(prompts)
        return prompts


class InputCoordinates:
    """Coordinates of an image to those of the model's input, with the calls of SAM's `ResizeLongestSide`.

    Images are stretched to the whole of the input, `input_size` (height, width). `original_size` is (height, width) of
    the image, as in `EfficientSamPredictor.original_size`.
    """

    def __init__(self, input_size: tuple[int, int]):
        self.input_size = input_size

    def apply_coords_torch(self, coords: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        """Points (x, y): (..., 2) -> (..., 2) float32."""
        return self._scaled("coords", coords, 2, original_size)

    def apply_boxes_torch(self, boxes: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        """Boxes (x0, y0, x1, y1): (..., 4) -> (..., 4) float32."""
        return self._scaled("boxes", boxes, 4, original_size)

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """Points (x, y): (..., 2) -> (..., 2) float32."""
        return self._scaled("coords", as_tensor("coords", coords, "(..., 2)"), 2, original_size).numpy()

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """Boxes (x0, y0, x1, y1): (..., 4) -> (..., 4) float32."""
        return self._scaled("boxes", as_tensor("boxes", boxes, "(..., 4)"), 4, original_size).numpy()

    def _scaled(self, name: str, values: torch.Tensor, length: int, original_size: tuple[int, int]) -> torch.Tensor:
        """Numbers x, y, ... along the last axis of `length`, in float32."""
        check_tensor(name, values, f"(..., {length})")
        if not values.ndim or values.shape[-1] != length:
            raise ValueError(f"{name} has shape {tuple(values.shape)}, expected (..., {length})")
        sizes = zip(self.input_size[::-1], image_size(original_size, "original_size")[::-1], strict=True)
        scale = [to / side for to, side in sizes] * (length // 2)
        return values.float() * torch.tensor(scale, dtype=torch.float32, device=values.device)


def _without_padding(coords: Any, labels: Any) -> tuple[Any, Any]:
    """Clicks and labels as lists, those of label -1 left out; None for both where no click is left."""
    coords, labels = _plain(coords), _plain(labels)
    check("point_coords", coords, coords is None or isinstance(coords, list), "(P, 2) clicks")
    check("point_labels", labels, labels is None or isinstance(labels, list), "(P) labels")
    if coords is None:
        return coords, labels
    if isinstance(labels, list) and len(labels) == len(coords):
        labels = [_plain(label) for label in labels]
        kept = [index for index, label in enumerate(labels) if label != -1]
        coords, labels = [coords[index] for index in kept], [labels[index] for index in kept]
    return (coords, labels) if coords or labels else (None, None)


def _flat(box: Any) -> list:
    """A box as one list, also of shape (1, 4), which SAM takes, or (2, 2)."""
    parts = _plain(box)
    check("box", parts, isinstance(parts, list), "x0, y0, x1, y1")
    parts = [_plain(part) for part in parts]
    return [number for part in parts for number in (part if isinstance(part, list) else [part])]


def _plain(values: Any) -> Any:
    """Arrays and tensors as lists, a tuple as one."""
    values = values.tolist() if isinstance(values, (np.ndarray, torch.Tensor)) else values
    return list(values) if isinstance(values, tuple) else values


def _in_own_words(message: str) -> str:
    """What processor and model say of one object's prompts, with the names that `predict` has for them."""
    return re.sub(r"(input_\w+)( of image 0, object 0)?", lambda found: ARGUMENTS.get(found[1], found[0]), message)


def _check_shape(name: str, value: torch.Tensor | None, expected: tuple[str | int, ...]) -> None:
    """ValueError if a prompt has another number of axes, or another length where `expected` has a number."""
    if value is None:
        return
    shape = ", ".join(map(str, expected))
    check_tensor(name, value, f"({shape})")
    fits = value.ndim == len(expected) and all(
        isinstance(length, str) or length == own for length, own in zip(expected, value.shape)
    )
    if not fits:
        raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({shape})")


def _check_inside(points: torch.Tensor, size: tuple[int, int]) -> None:
    """ValueError if one of the points (..., 2) is outside the model's input of `size` (height, width)."""
    height, width = size
    inside = ((points >= 0) & (points <= torch.tensor([width, height], device=points.device))).all(-1)
    if not bool(inside.all()):
        x, y = points[~inside][0].tolist()
        raise ValueError(f"point_coords: ({x:g}, {y:g}) is outside the model's input of {width} x {height} pixels")


def _cut_boxes(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Boxes cut to the model's input of `size` (height, width): (B, 4) -> (B, 4) float32.

    Raises ValueError if one is empty or not finite.
    """
    height, width = size
    check_finite("boxes", boxes, ("prompt",))
    cut = boxes.float().clamp(min=0).minimum(torch.tensor([width, height] * 2, device=boxes.device).float())
    full = (cut[:, 2:] > cut[:, :2]).all(1)
    if not bool(full.all()):
        raise ValueError(
            f"boxes: {boxes[~full][0].tolist()} is empty within the model's input of {width} x {height} pixels, "
            "expected x0 < x1 and y0 < y1"
        )
    return cut


def _check_prompted(prompts: dict[str, torch.Tensor]) -> None:
    """ValueError if one of several prompts, by the names of the model's arguments, is nothing but padding."""
    given = {name: value[None] for name, value in prompts.items()}
    points = given.pop("input_points", None)
    if points is not None:
        given.setdefault("input_labels", torch.ones(points.shape[:3], device=points.device))
    if len({len(value) for value in prompts.values()}) != 1:  # none or several, which the model refuses
        return
    real = real_objects(*(given.get(name) for name in ("input_labels", "input_boxes", "input_masks")))[0]
    if not bool(real.all()):
        raise ValueError(
            "no prompt: expected at least one of point_coords, boxes and mask_input for each object, and prompt "
            f"{int((~real).nonzero()[0])} has nothing but padding"
        )


def _described(image: Any) -> str:
    shape = getattr(image, "shape", None)
    return f"a {type(image).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")
