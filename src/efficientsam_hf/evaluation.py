# SPDX-License-Identifier: Apache-2.0
"""Segmentation quality by prompt: mIoU for one click and for the tight box, on any pictures with masks.

Works for every promptable model with the calling conventions of `SamModel` and `SamProcessor`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from .data.prompts import center_points, tight_boxes, uniform_points
from .metrics import chosen_and_best, mask_area, mask_iou


PROTOCOLS = ("center", "uniform", "box")
SIZES = ("small", "medium", "large")
MAX_LOGITS = 2**25  # full-size logits held at once: 128 MiB in float32


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    processor: Any,
    samples: Sequence[dict[str, Any]],
    prompts: Sequence[str] = PROTOCOLS,
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    limit: int | None = None,
    prompt_chunk: int = 32,
    progress: bool = True,
) -> dict[str, Any]:
    """mIoU over all objects of `samples`, {"image", "masks" (N, H, W) bool} each, for one prompt per object.

    Prompts: "center" clicks the mask's deepest pixel (distance transform, the image border counting as boundary),
    "uniform" a pixel drawn with (`seed`, image index) alone, "box" gives the tight box. The mask with the highest
    predicted IoU is scored at the original resolution (paper, evaluation protocol).

    Returns {"images", "objects", "seed", "sizes", and per protocol {"miou", "oracle_miou" (best candidate),
    "miou_small", "miou_medium", "miou_large"}}; the sizes are thirds of the objects by their share of the picture,
    whose upper limits are in "sizes". `device` moves the model; a `dtype` other than the weights' computes under
    autocast.

    Raises `ValueError` for an unknown prompt, a limit or chunk below 1, masks of another size than their image, or
    samples without any object.
    """
    _check_arguments(prompts, limit, prompt_chunk)
    device = torch.device(device) if device is not None else next(model.parameters()).device
    compute = _compute_context(model, device, dtype)
    count = len(samples) if limit is None else min(limit, len(samples))
    shares: list[torch.Tensor] = []
    ious: dict[str, list[torch.Tensor]] = {name: [] for name in prompts}
    training = model.training
    model.to(device).eval()
    try:
        for index in tqdm(range(count), desc="evaluate", unit="image", disable=not progress):
            image, masks = _check_sample(samples[index], index)
            if len(masks) == 0:
                continue
            scorer = _ImageScorer(model, processor, image, masks, device, compute, prompt_chunk)
            for name in prompts:
                ious[name].append(scorer.score(_make_prompts(name, masks, seed, index)))
            shares.append(mask_area(masks) / masks[0].numel())
    finally:
        model.train(training)
    if not shares:
        raise ValueError(f"there is nothing to evaluate: no objects in {count} of {len(samples)} samples")
    return _summarize(torch.cat(shares), {name: torch.cat(ious[name]) for name in prompts}, len(shares), seed)


class _ImageScorer:
    """One picture, embedded at the first prompt, and the masks to compare with."""

    def __init__(
        self,
        model: torch.nn.Module,
        processor: Any,
        image: Image.Image,
        masks: torch.Tensor,
        device: torch.device,
        compute: Callable[[], AbstractContextManager],
        prompt_chunk: int,
    ) -> None:
        self.model, self.processor, self.image, self.masks = model, processor, image, masks
        self.device, self.compute = device, compute
        self.chunk = max(1, min(prompt_chunk, MAX_LOGITS // (3 * masks[0].numel())))
        self.embeddings: torch.Tensor | None = None

    def score(self, prompts: dict[str, Any]) -> torch.Tensor:
        """IoU of the chosen and of the best mask for one prompt per object, -> (N, 2)."""
        inputs = self.processor(images=self.image, return_tensors="pt", **prompts)
        names = [name for name in ("input_points", "input_labels", "input_boxes") if inputs.get(name) is not None]
        if self.embeddings is None:
            self.embeddings = self._embed(inputs["pixel_values"])
        scores = []
        for start in range(0, len(self.masks), self.chunk):
            part = slice(start, start + self.chunk)
            masks, predicted = self._decode({name: inputs[name][:, part] for name in names}, inputs)
            scores.append(torch.stack(chosen_and_best(mask_iou(masks, self.masks[part, None]), predicted), -1))
        return torch.cat(scores)

    def _embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(1, 3, H, W) -> image embeddings, in the weights' dtype."""
        weights = next(self.model.parameters())
        with self.compute():
            return self.model.get_image_embeddings(pixel_values.to(self.device, weights.dtype))

    def _decode(self, prompts: dict[str, torch.Tensor], inputs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks (Q, 3, H, W) bool at the picture's resolution and predicted IoU (Q, 3), both on the CPU."""
        prompts = {
            name: value.to(self.device, torch.float32) if value.is_floating_point() else value.to(self.device)
            for name, value in prompts.items()
        }
        with self.compute():
            outputs = self.model(image_embeddings=self.embeddings, multimask_output=True, **prompts)
        logits = outputs.pred_masks.float()
        masks = self.processor.post_process_masks(logits, inputs["original_sizes"], inputs["reshaped_input_sizes"])[0]
        return masks.cpu(), outputs.iou_scores[0].float().cpu()


def _make_prompts(name: str, masks: torch.Tensor, seed: int, index: int) -> dict[str, Any]:
    """One prompt per mask in pixels of the picture, (N, H, W) -> nested lists as processors take them."""
    if name == "box":
        return {"input_boxes": [tight_boxes(masks).tolist()]}
    points = uniform_points(masks, _generator(seed, index)) if name == "uniform" else _center_points(masks)
    return {"input_points": [points[:, None].tolist()], "input_labels": [[[1]] * len(masks)]}


def _center_points(masks: torch.Tensor) -> torch.Tensor:
    """Deepest pixel of each mask, (N, H, W) -> (N, 2), found inside the mask's tight box.

    Cutting at the tight box changes no distance: what lies around it is outside, just as what lies beyond the border.
    """
    points = []
    for mask, box in zip(masks, tight_boxes(masks).long().tolist(), strict=True):
        left, top, right, bottom = box
        points.append(center_points(mask[top:bottom, left:right]) + torch.tensor([left, top]))
    return torch.stack(points)


def _generator(seed: int, index: int) -> torch.Generator:
    """Generator that depends on the seed and the image's index alone."""
    state = np.random.SeedSequence((seed, index)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def _summarize(shares: torch.Tensor, ious: dict[str, torch.Tensor], images: int, seed: int) -> dict[str, Any]:
    """Means over objects, in all and by thirds of size: shares (N,) and IoU (N, 2) per protocol -> plain numbers."""
    thirds = dict(zip(SIZES, shares.argsort(stable=True).tensor_split(3), strict=True))
    thirds = {size: members for size, members in thirds.items() if len(members)}
    limits = {size: round(shares[members].max().item(), 6) for size, members in thirds.items()}
    result: dict[str, Any] = {"images": images, "objects": len(shares), "seed": seed, "sizes": limits}
    for name, values in ious.items():
        chosen, best = values.double().unbind(-1)
        by_size = {f"miou_{size}": chosen[members].mean().item() for size, members in thirds.items()}
        result[name] = {"miou": chosen.mean().item(), "oracle_miou": best.mean().item(), **by_size}
    return result


def _compute_context(
    model: torch.nn.Module, device: torch.device, dtype: torch.dtype | None
) -> Callable[[], AbstractContextManager]:
    """Autocast where `dtype` is not the weights' own; `ValueError` for float32 over half-precision weights."""
    weights = next(model.parameters()).dtype
    if dtype is None or dtype == weights:
        return nullcontext
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype {dtype} cannot be computed from {weights} weights: load the model in that dtype")
    return lambda: torch.autocast(device.type, dtype)


def _check_arguments(prompts: Sequence[str], limit: int | None, prompt_chunk: int) -> None:
    """`ValueError` naming the first argument out of range."""
    unknown = [name for name in prompts if name not in PROTOCOLS]
    if isinstance(prompts, str) or not prompts or unknown:
        raise ValueError(f"prompts must be some of {', '.join(PROTOCOLS)}, got {prompts!r}")
    for name, value in (("limit", limit), ("prompt_chunk", prompt_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")


def _check_sample(sample: dict[str, Any], index: int) -> tuple[Image.Image, torch.Tensor]:
    """Picture and its masks (N, H, W) bool; `ValueError` if their sizes differ."""
    image, masks = sample["image"], torch.as_tensor(sample["masks"])
    if masks.dtype != torch.bool or masks.ndim != 3 or masks.shape[1:] != (image.height, image.width):
        raise ValueError(
            f"masks of sample {index} must be bool of shape (N, {image.height}, {image.width}) like its image,"
            f" got {masks.dtype} of shape {tuple(masks.shape)}"
        )
    if not masks.flatten(1).any(1).all():
        raise ValueError(f"sample {index} holds an empty mask: there is nothing to click on")
    return image, masks
