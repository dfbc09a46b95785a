# SPDX-License-Identifier: Apache-2.0
"""Embed an image once and prompt it many times, with the calls of `segment_anything.SamPredictor`."""

from typing import Any

import numpy as np
import torch

from .models.fast_decoding_efficientsam import EfficientSamFastDecoder


class EfficientSamPredictor:
    """Holds one image's embedding; every prompt after that costs only the mask decoder.

    `model` is an `EfficientSamModel`, on its device and in its dtype, `processor` its `EfficientSamProcessor`.
    Coordinates are pixels of the image, x to the right and y down; 0 <= x <= W and 0 <= y <= H are inside.
    """

    def __init__(self, model: Any, processor: Any):
        self.model = model
        self.processor = processor
        self.image_embedding: torch.Tensor | None = None
        self.original_size: tuple[int, int] | None = None
        self._decoder: EfficientSamFastDecoder | None = None

    @torch.no_grad()
    def set_image(self, image: Any, image_format: str = "RGB") -> None:
        """Encode an image: anything that the processor takes, such as a path, a PIL image or (H, W, 3) uint8.

        With `image_format` "BGR" an (H, W, 3) array's channels are in OpenCV's order. Raises ValueError for another
        format, and for "BGR" with anything but such an array.
        """
        if image_format not in ("RGB", "BGR"):
            raise ValueError(f"image_format must be RGB or BGR, got {image_format!r}")
        if image_format == "BGR":
            shape = getattr(image, "shape", None)
            if not isinstance(image, np.ndarray) or len(shape) != 3 or shape[2] != 3:
                raise ValueError(f"image_format BGR is for arrays of shape (H, W, 3), got {_described(image)}")
            image = image[..., ::-1]
        self.reset_image()
        inputs = self.processor.image_processor(images=image, return_tensors="pt")
        if len(inputs["pixel_values"]) != 1:
            raise ValueError(f"image holds {len(inputs['pixel_values'])} images, expected one")
        parameter = next(self.model.parameters())
        pixels = inputs["pixel_values"].to(parameter.device, parameter.dtype)
        self.image_embedding = self.model.get_image_embeddings(pixels)
        self.original_size = tuple(inputs["original_sizes"][0].tolist())

    def reset_image(self) -> None:
        """Forget the image."""
        self.image_embedding = self.original_size = self._decoder = None

    @property
    def is_image_set(self) -> bool:
        """Whether there is an image to prompt."""
        return self.image_embedding is not None

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.model.device

    @property
    def transform(self) -> "InputCoordinates":
        """Brings coordinates to the frame of `predict_torch`."""
        size = self.processor.image_processor.size
        return InputCoordinates((size["height"], size["width"]))

    def get_image_embedding(self) -> torch.Tensor:
        """The image's embedding, (1, C, h, w); RuntimeError if no image is set."""
        if not self.is_image_set:
            raise RuntimeError("no image is set: call set_image first")
        return self.image_embedding

    @torch.no_grad()
    def predict(
        self,
        point_coords: Any = None,
        point_labels: Any = None,
        box: Any = None,
        mask_input: Any = None,
        multimask_output: bool = True,
        return_logits: bool = False,
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Masks of one object.

        Args:
            point_coords: (P, 2) clicks (x, y).
            point_labels: (P) 1 for the object, 0 for the background; all 1 when left out.
            box: (4) x0, y0, x1, y1.
            mask_input: (1, h, w) low-resolution logits of an earlier call, cut at the box where `dense_boxes` is on.
            multimask_output: three candidates for a prompt that can mean several things, or one mask.
            return_logits: logits in place of masks.

        Returns:
            (M, H, W) bool masks (float32 logits with `return_logits`), (M) float32 predicted IoU, and (M, h, w)
            float32 low-resolution logits for `mask_input`.

        Raises:
            RuntimeError: if no image is set.
            ValueError: for prompts that are malformed, outside the image, or missing.
        """
        embedding = self.get_image_embedding()
        prompts = {
            "input_points": None if point_coords is None else [[_plain(point_coords)]],
            "input_labels": None if point_labels is None else [[_plain(point_labels)]],
            "input_boxes": None if box is None else [[np.asarray(_plain(box)).reshape(-1).tolist()]],
            "input_masks": None if mask_input is None else [[mask_input]],
        }
        inputs = self.processor(original_sizes=[self.original_size], return_tensors="pt", **prompts)
        outputs = self.model(
            image_embeddings=embedding,
            multimask_output=multimask_output,
            **{name: value.to(self.model.device) for name, value in inputs.items()},
        )
        low = outputs.pred_masks.float()
        masks = self.processor.post_process_masks(
            low, [self.original_size], binarize=not return_logits, prompts=inputs
        )[0][0]
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
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Masks of many objects, B prompts in one call, in the frame of the model's input (see `transform`).

        Args:
            point_coords: (B, P, 2) clicks (x, y).
            point_labels: (B, P) 1 for the object, 0 for the background, -1 for padding; all 1 when None.
            boxes: (B, 4) x0, y0, x1, y1; what reaches over the border is cut off.
            mask_input: (B, 1, h, w) low-resolution logits of an earlier call.
            multimask_output, return_logits: as in `predict`.

        Returns:
            (B, M, H, W) bool masks (float32 logits with `return_logits`), (B, M) float32 predicted IoU, and
            (B, M, h, w) float32 low-resolution logits, on the model's device.

        Raises:
            RuntimeError: if no image is set.
            ValueError: for prompts that are malformed, outside the model's input, or missing.
        """
        embedding = self.get_image_embedding()
        prompts = self._prompts_of_input(point_coords, point_labels, boxes, mask_input)
        if mask_input is None:
            if self._decoder is None or self._decoder.embeddings is not embedding:
                self._decoder = EfficientSamFastDecoder(self.model, embedding)
            low, scores = self._decoder(**prompts)
        else:
            decoded = self.model.decode_prompts(embedding, **{name: value[None] for name, value in prompts.items()})
            low, scores = decoded[0][0], decoded[1][0]
        chosen = slice(1, None) if multimask_output else slice(0, 1)
        low, scores = low[:, chosen].float(), scores[:, chosen].float()
        given = {name: value[None] for name, value in prompts.items()}
        masks = self.processor.post_process_masks(
            [low], [self.original_size], binarize=not return_logits, prompts=given
        )[0]
        return masks, scores, low

    def _prompts_of_input(self, point_coords, point_labels, boxes, mask_input) -> dict[str, torch.Tensor]:
        """Checked arguments of the model's decoder, those that are given, on its device."""
        height, width = self.transform.input_size
        _check_shape("point_coords", point_coords, ("B", "P", 2))
        _check_shape("point_labels", point_labels, ("B", "P") if point_coords is None else point_coords.shape[:2])
        _check_shape("boxes", boxes, ("B", 4))
        _check_shape("mask_input", mask_input, ("B", 1, height // 4, width // 4))
        if point_coords is not None:
            _check_inside(point_coords if point_labels is None else point_coords[point_labels != -1], (height, width))
        prompts = {
            "input_points": point_coords,
            "input_labels": point_labels,
            "input_boxes": None if boxes is None else _cut_boxes(boxes, (height, width)),
            "input_masks": mask_input,
        }
        return {name: value.to(self.device) for name, value in prompts.items() if value is not None}


class InputCoordinates:
    """Coordinates of an image to those of the model's input, with the calls of SAM's `ResizeLongestSide`.

    Images are stretched to the whole of the input, `input_size` (height, width). `original_size` is (height, width) of
    the image, as in `EfficientSamPredictor.original_size`.
    """

    def __init__(self, input_size: tuple[int, int]):
        self.input_size = input_size

    def apply_coords_torch(self, coords: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        """Points (x, y): (..., 2) -> (..., 2) float32."""
        scale = [to / side for to, side in zip(self.input_size[::-1], original_size[::-1])]
        return coords.float() * torch.tensor(scale, device=coords.device)

    def apply_boxes_torch(self, boxes: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        """Boxes (x0, y0, x1, y1): (..., 4) -> (..., 4) float32."""
        return self.apply_coords_torch(boxes.unflatten(-1, (2, 2)), original_size).flatten(-2)

    def apply_coords(self, coords: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """Points (x, y): (..., 2) -> (..., 2) float32."""
        return self.apply_coords_torch(torch.as_tensor(coords), original_size).numpy()

    def apply_boxes(self, boxes: np.ndarray, original_size: tuple[int, int]) -> np.ndarray:
        """Boxes (x0, y0, x1, y1): (..., 4) -> (..., 4) float32."""
        return self.apply_boxes_torch(torch.as_tensor(boxes), original_size).numpy()


def _check_shape(name: str, value: torch.Tensor | None, expected: tuple[str | int, ...]) -> None:
    """ValueError if a prompt has another number of axes, or another length where `expected` has a number."""
    if value is None:
        return
    fits = value.ndim == len(expected) and all(
        isinstance(length, str) or length == own for length, own in zip(expected, value.shape)
    )
    if not fits:
        shape = ", ".join(map(str, expected))
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

    Raises ValueError if one is empty.
    """
    height, width = size
    cut = boxes.float().clamp(min=0).minimum(torch.tensor([width, height] * 2, device=boxes.device).float())
    full = (cut[:, 2:] > cut[:, :2]).all(1)
    if not bool(full.all()):
        raise ValueError(
            f"boxes: {boxes[~full][0].tolist()} is empty within the model's input of {width} x {height} pixels, "
            "expected x0 < x1 and y0 < y1"
        )
    return cut


def _described(image: Any) -> str:
    shape = getattr(image, "shape", None)
    return f"a {type(image).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")


def _plain(values: Any) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)
