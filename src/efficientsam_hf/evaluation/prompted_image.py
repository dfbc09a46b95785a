# SPDX-License-Identifier: Apache-2.0
"""Many prompts on one picture, for every promptable model with the conventions of `SamModel` and `SamProcessor`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from PIL import Image


PROMPTS = ("input_points", "input_labels", "input_boxes")
SIZES = ("original_sizes", "reshaped_input_sizes")  # processors that do not pad have the first alone
MAX_LOGITS = 2**25  # full-size logits held at once: 128 MiB in float32


class PromptedImage:
    """A picture that is embedded at its first prompt and answers prompts chunk by chunk.

    `dtype` other than the weights' computes under autocast; ValueError for float32 over half-precision weights.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        image: Image.Image,
        dtype: torch.dtype | None = None,
        prompt_chunk: int = 32,
    ) -> None:
        self.model, self.processor, self.image = model, processor, image
        self.compute = compute_context(model, dtype)
        self.chunk = max(1, min(prompt_chunk, MAX_LOGITS // (3 * image.width * image.height)))
        self.embeddings: Any = None

    def answers(self, **prompts: Any) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """Prompts as the processor takes them for one picture -> which of them, masks (q, 3, H, W) bool, IoU (q, 3).

        Masks are at the picture's resolution, IoU is predicted, both are on the CPU.
        """
        inputs = self.processor(images=self.image, return_tensors="pt", **prompts)
        tensors = {name: inputs[name] for name in PROMPTS if inputs.get(name) is not None}
        if self.embeddings is None:
            self.embeddings = self._embed(inputs["pixel_values"])
        count = next(iter(tensors.values())).shape[1]
        for start in range(0, count, self.chunk):
            part = slice(start, start + self.chunk)
            yield part, *self._decode({name: value[:, part] for name, value in tensors.items()}, inputs)

    def _embed(self, pixel_values: torch.Tensor) -> Any:
        """(1, 3, H, W) -> image embeddings as the model gives them, in the weights' dtype."""
        weights = next(self.model.parameters())
        with self.compute():
            return self.model.get_image_embeddings(pixel_values.to(weights.device, weights.dtype))

    def _decode(self, prompts: dict[str, torch.Tensor], inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        device = next(self.model.parameters()).device
        prompts = {
            name: value.to(device, torch.float32) if value.is_floating_point() else value.to(device)
            for name, value in prompts.items()
        }
        with self.compute():
            outputs = self.model(image_embeddings=self.embeddings, multimask_output=True, **prompts)
        logits = outputs.pred_masks.float()
        sizes = [inputs[name] for name in SIZES if name in inputs]
        masks = self.processor.post_process_masks(logits, *sizes, **self._cleaning(prompts))[0]
        return masks.cpu(), outputs.iou_scores[0].float().cpu()

    def _cleaning(self, prompts: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Prompts for a processor of ours, whose checkpoint may clean masks by them."""
        ours = getattr(getattr(self.processor, "image_processor", None), "mask_cleaning", None)
        return {"prompts": prompts} if ours else {}


@contextmanager
def evaluating(model: torch.nn.Module, device: str | torch.device | None = None) -> Iterator[None]:
    """Inside the block the model is on the device (its own by default), in evaluation mode and without gradients."""
    training = model.training
    model.to(device or next(model.parameters()).device).eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def compute_context(model: torch.nn.Module, dtype: torch.dtype | None) -> Callable[[], AbstractContextManager]:
    """Autocast where `dtype` is not the weights' own; `ValueError` for float32 over half-precision weights."""
    weights = next(model.parameters())
    if dtype is None or dtype == weights.dtype:
        return nullcontext
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"dtype {dtype} cannot be computed from {weights.dtype} weights: load the model in that dtype"
        )
    return lambda: torch.autocast(weights.device.type, dtype)
