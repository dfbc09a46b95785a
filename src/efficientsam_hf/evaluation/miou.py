# SPDX-License-Identifier: Apache-2.0
"""Segmentation quality by prompt: mIoU for clicks and for the tight box, on any pictures with masks.

Works for every promptable model with the calling conventions of `SamModel` and `SamProcessor`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.prompts import center_points, jitter_boxes, tight_boxes, uniform_points
from ..metrics import bootstrap_difference, chosen_and_best, mask_area, mask_iou
from ..processes import collect, is_main, own_share
from ..visualization import contact_sheet, draw_masks, draw_prompts
from .prompted_image import PromptedImage, compute_context, evaluating
from .skipped import Report, report_skipped, try_reading


DEFAULT_PROTOCOLS = ("center", "uniform", "box")
PROTOCOLS = (*DEFAULT_PROTOCOLS, "noisy_box")
SIZES = ("small", "medium", "large")


@dataclass(frozen=True)
class ObjectScores:
    """What a model reached for each object of some pictures."""

    images: torch.Tensor  # (N,) int64, the number of the object's picture
    shares: torch.Tensor  # (N,) share of the picture that the object covers
    ious: dict[str, torch.Tensor]  # per protocol (N, 2): IoU of the chosen and of the best mask
    seed: int
    skipped: int = 0  # pictures that could not be used

    def summary(self) -> dict[str, Any]:
        """Means over objects, in all and by thirds of size, as `evaluate` returns them."""
        thirds = dict(zip(SIZES, self.shares.argsort(stable=True).tensor_split(3), strict=True))
        thirds = {size: members for size, members in thirds.items() if len(members)}
        limits = {size: round(self.shares[members].max().item(), 6) for size, members in thirds.items()}
        counts = {"images": len(self.images.unique()), "objects": len(self.images), "skipped": self.skipped}
        result: dict[str, Any] = {**counts, "seed": self.seed, "sizes": limits}
        for name, values in self.ious.items():
            chosen, best = values.double().unbind(-1)
            by_size = {f"miou_{size}": chosen[members].mean().item() for size, members in thirds.items()}
            result[name] = {"miou": chosen.mean().item(), "oracle_miou": best.mean().item(), **by_size}
        return result

    def compare(self, other: "ObjectScores", seed: int = 0) -> dict[str, dict[str, float]]:
        """mIoU of the other less that of this one, per protocol of both: {"difference", "low", "high"}.

        Low and high bound the middle 95 % of 2,000 bootstrap samples of the pictures (objects of one picture go
        together). Raises ValueError if the objects are not the same.
        """
        if self.seed != other.seed or not torch.equal(self.images, other.images):
            raise ValueError("only scores of the same objects with the same prompts can be compared")
        result = {}
        for name in (name for name in self.ious if name in other.ious):
            change = other.ious[name][:, 0].double() - self.ious[name][:, 0].double()
            mean, low, high = bootstrap_difference(change, self.images, seed=seed)
            result[name] = {"difference": mean, "low": low, "high": high}
        return result


def evaluate(model: torch.nn.Module, processor: Any, samples: Sequence[dict[str, Any]], **options) -> dict[str, Any]:
    """mIoU over all objects of `samples`; arguments and errors are those of `score_objects`.

    Returns {"images", "objects", "skipped", "seed", "sizes", and per protocol {"miou", "oracle_miou" (best candidate),
    "miou_small", "miou_medium", "miou_large"}}; more clicks than one are part of the protocol's name: "uniform:3".
    The sizes are thirds of the objects by their share of the picture, whose upper limits are in "sizes".
    """
    return score_objects(model, processor, samples, **options).summary()


def score_objects(
    model: torch.nn.Module,
    processor: Any,
    samples: Sequence[dict[str, Any]],
    prompts: Sequence[str] = DEFAULT_PROTOCOLS,
    clicks: Sequence[int] = (1,),
    seed: int = 0,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    limit: int | None = None,
    prompt_chunk: int = 32,
    progress: bool = True,
    report: Report | None = None,
) -> ObjectScores:
    """IoU for every object of `samples`, {"image", "masks" (N, H, W) bool} each, prompted one by one.

    Prompts: "box" gives the tight box, "noisy_box" moves its edges by a tenth of its sides (standard deviation, drawn
    with (`seed`, image index) alone) and at most 20 pixels of the picture, as SAM was trained. "uniform" clicks pixels
    of the mask drawn with (`seed`, image index) alone, as in the paper. "center" clicks the deepest pixel of the mask
    (distance transform, the image border counting as boundary), and each further click is the deepest pixel of what
    the last answer has wrong: a background click where it has too much, if the model takes them. `clicks` are the
    numbers of clicks after which both are scored. The mask with the highest predicted IoU is scored at the original
    resolution (paper, evaluation protocol). `device` moves the model; a `dtype` other than the weights' computes under
    autocast.
    A sample whose reading raises `ValueError` or `OSError` is left out and handed to `report(index, reason)`; without
    one a warning is logged. In a distributed run the processes share the pictures: all must call, and all get the
    whole result.

    Raises `ValueError` for an unknown prompt, a limit, chunk or number of clicks below 1, masks of another size than
    their image, samples without any object, and if no sample can be used.
    """
    _check_arguments(prompts, clicks, limit, prompt_chunk)
    compute_context(model, dtype)
    count = len(samples) if limit is None else min(limit, len(samples))
    parts: list[tuple[int, torch.Tensor, dict[str, torch.Tensor]]] = []
    skipped: list[tuple[int, str]] = []
    with evaluating(model, device):
        for index in tqdm(own_share(count), desc="evaluate", unit="image", disable=not (progress and is_main())):
            sample, damage = try_reading(samples.__getitem__, index)
            if damage:
                skipped.append((index, damage))
                continue
            image, masks = _check_sample(sample, index)
            if len(masks) == 0:
                continue
            scorer = _ImageScorer(PromptedImage(model, processor, image, dtype, prompt_chunk), masks)
            ious: dict[str, torch.Tensor] = {}
            for name in prompts:
                ious |= scorer.score(name, clicks, _generator(seed, index))
            parts.append((index, mask_area(masks) / masks[0].numel(), ious))
    parts = sorted(collect(parts), key=lambda part: part[0])
    skipped = sorted(collect(skipped))
    report_skipped(skipped, count, report)
    if not parts:
        raise ValueError(f"there is nothing to evaluate: no objects in {count} of {len(samples)} samples")
    images = torch.cat([torch.full((len(shares),), index) for index, shares, _ in parts])
    scores = {name: torch.cat([ious[name] for *_, ious in parts]) for name in parts[0][2]}
    return ObjectScores(images, torch.cat([shares for _, shares, _ in parts]), scores, seed, len(skipped))


def worst_pictures(
    scores: ObjectScores,
    model: torch.nn.Module,
    processor: Any,
    samples: Sequence[dict[str, Any]],
    protocol: str,
    count: int,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[str, Image.Image]]:
    """Names, with their place from the worst on, and pictures of the `count` objects of lowest IoU in `protocol`.

    They come picture by picture, so that each is embedded and prompted once. Left the object with its prompt,
    right the answer, made again from the same prompt as for `scores`.
    """
    kind, _, clicks = protocol.partition(":")
    values = scores.ious[protocol][:, 0]
    places = {position: place for place, position in enumerate(values.argsort(stable=True)[:count].tolist(), 1)}
    last = None
    with evaluating(model, device):
        for position in sorted(places):  # objects of one picture lie together
            index = int(scores.images[position])
            number = position - int((scores.images < index).sum())  # of the object within its picture
            if index != last:
                image, masks = _check_sample(samples[index], index)
                scorer = _ImageScorer(PromptedImage(model, processor, image, dtype), masks)
                scorer.score(kind, (int(clicks or 1),), _generator(scores.seed, index))
                prompts, chosen = scorer.last
                last = index
            prompt = {name: value[0][number] for name, value in prompts.items()}
            left = draw_prompts(
                draw_masks(image, masks[number].numpy()),
                prompt.get("input_points"),
                prompt.get("input_labels"),
                [prompt["input_boxes"]] if "input_boxes" in prompt else None,
            )
            sheet = contact_sheet([left, draw_masks(image, chosen[number].numpy())], columns=2)
            yield f"{places[position]:03d}_iou_{values[position]:.3f}_image_{index}_object_{number}", sheet


class _ImageScorer:
    """One picture and the masks to compare with."""

    def __init__(self, picture: PromptedImage, masks: torch.Tensor) -> None:
        self.picture, self.masks = picture, masks
        self.last: tuple[dict[str, Any], torch.Tensor] | None = None  # prompts and chosen masks (N, H, W)
        parts = getattr(getattr(picture.model, "config", None), "prompt_encoder_config", None)
        self.background = getattr(parts, "background_points", True)  # a switch of ours; other models take them

    def score(self, prompt: str, clicks: Sequence[int], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """IoU of the chosen and of the best mask of each object, by protocol: {name: (N, 2)}."""
        if prompt in ("box", "noisy_box"):
            boxes = tight_boxes(self.masks)
            if prompt == "noisy_box":
                boxes = jitter_boxes(boxes, self.masks.shape[-2:], generator)
            return {prompt: self._answer(input_boxes=[boxes.tolist()])[0]}
        points, labels, scores = [], [], {}
        chosen = torch.zeros_like(self.masks)
        for number in range(1, max(clicks) + 1):
            if prompt == "uniform":
                points.append(uniform_points(self.masks, generator))
                labels.append(torch.ones(len(self.masks), dtype=torch.long))
            else:
                point, label = _correcting_clicks(chosen, self.masks, self.background)
                points.append(point)
                labels.append(label)
            if number in clicks or prompt == "center":
                values, chosen = self._answer(
                    input_points=[torch.stack(points, 1).tolist()], input_labels=[torch.stack(labels, 1).tolist()]
                )
            if number in clicks:
                scores[prompt if number == 1 else f"{prompt}:{number}"] = values
        return scores

    def _answer(self, **prompts: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """IoU of the chosen and of the best mask (N, 2), and the chosen masks (N, H, W)."""
        scores, chosen = [], []
        for part, masks, predicted in self.picture.answers(**prompts):
            scores.append(torch.stack(chosen_and_best(mask_iou(masks, self.masks[part, None]), predicted), -1))
            chosen.append(masks[torch.arange(len(masks)), predicted.argmax(-1)])
        self.last = prompts, torch.cat(chosen)
        return torch.cat(scores), self.last[1]


def _correcting_clicks(
    chosen: torch.Tensor, masks: torch.Tensor, background: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The deepest wrong pixel of each answer, (N, H, W) twice -> (N, 2) xy, (N,) labels: 1 missed, 0 too much.

    Without `background` clicks only what is missed counts. Where nothing is wrong the mask's own deepest pixel is
    clicked.
    """
    wrong = chosen ^ masks if background else masks & ~chosen
    points = _center_points(torch.where(wrong.flatten(1).any(1)[:, None, None], wrong, masks))
    columns, rows = points.long().unbind(-1)
    return points, masks[torch.arange(len(masks)), rows, columns].long()


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


def _check_arguments(prompts: Sequence[str], clicks: Sequence[int], limit: int | None, prompt_chunk: int) -> None:
    """`ValueError` naming the first argument out of range."""
    unknown = [name for name in prompts if name not in PROTOCOLS]
    if isinstance(prompts, str) or not prompts or unknown:
        raise ValueError(f"prompts must be some of {', '.join(PROTOCOLS)}, got {prompts!r}")
    if not clicks or min(clicks) < 1:
        raise ValueError(f"clicks must be numbers of at least 1, got {clicks!r}")
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
