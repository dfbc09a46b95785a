# SPDX-License-Identifier: Apache-2.0
"""Embed an image once and prompt it many times, with the calls of `segment_anything.SamPredictor`."""

from typing import Any

import numpy as np
import torch


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
        self.image_embedding = self.original_size = None

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
            mask_input: (1, h, w) low-resolution logits of an earlier call.
            multimask_output: three candidates for a prompt that can mean several things, or one mask.
            return_logits: logits in place of masks.

        Returns:
            (M, H, W) bool masks (float32 logits with `return_logits`), (M) float32 predicted IoU, and (M, h, w)
            float32 low-resolution logits for `mask_input`.

        Raises:
            RuntimeError: if no image is set.
            ValueError: for prompts that are malformed, outside the image, or missing.
        """
        if self.image_embedding is None:
            raise RuntimeError("no image is set: call set_image first")
        prompts = {
            "input_points": None if point_coords is None else [[_plain(point_coords)]],
            "input_labels": None if point_labels is None else [[_plain(point_labels)]],
            "input_boxes": None if box is None else [[np.asarray(_plain(box)).reshape(-1).tolist()]],
            "input_masks": None if mask_input is None else [[mask_input]],
        }
        inputs = self.processor(original_sizes=[self.original_size], return_tensors="pt", **prompts)
        outputs = self.model(
            image_embeddings=self.image_embedding,
            multimask_output=multimask_output,
            **{name: value.to(self.model.device) for name, value in inputs.items()},
        )
        low = outputs.pred_masks.float()
        masks = self.processor.post_process_masks(low, [self.original_size], binarize=not return_logits)[0][0]
        return masks.cpu().numpy(), outputs.iou_scores[0, 0].float().cpu().numpy(), low[0, 0].cpu().numpy()


def _described(image: Any) -> str:
    shape = getattr(image, "shape", None)
    return f"a {type(image).__name__}" + ("" if shape is None else f" of shape {tuple(shape)}")


def _plain(values: Any) -> list:
    return values.tolist() if hasattr(values, "tolist") else list(values)
