# SPDX-License-Identifier: Apache-2.0
"""Average precision of masks that a promptable model makes of boxes, measured by pycocotools."""

import contextlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..data.coco import CocoSamples
from ..metrics import mask_iou
from ..models.rle_efficientsam import encode_rle
from ..processes import collect, is_main, own_share
from .prompted_image import PromptedImage, compute_context, evaluating


CHOICES = ("box_iou", "predicted_iou")
NUMBERS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}
RECALLS = {"AR1": 0, "AR10": 1, "AR100": 2, "AR": 3}  # by the masks of a picture that count, all of them at last
ALL_MASKS = 100_000  # more than a picture ever has


def average_precision(
    model: torch.nn.Module,
    processor: Any,
    samples: CocoSamples,
    detections: list[dict[str, Any]] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    limit: int | None = None,
    prompt_chunk: int = 32,
    progress: bool = True,
) -> dict[str, dict[str, float]]:
    """Mask AP of the COCO API over the annotations of `samples`, each box becoming one mask.

    `detections` are COCO results, {"image_id", "category_id", "bbox": [x, y, width, height], "score"} each; None takes
    the boxes of the annotations, all with score 1. Of the three masks of a box, "box_iou" takes the one with the
    highest IoU with the box itself (EfficientSAM paper, instance segmentation), "predicted_iou" the one with the
    highest predicted IoU. As everywhere in the COCO API the 100 boxes of the highest scores count, of each category in
    a picture (its maxDets), and those beyond add nothing: of more than 100 ground-truth boxes the others are missed.
    With `limit` only the first pictures count, for both sides. In a distributed run the processes share the pictures:
    all must call, and all get the whole result.

    Returns {"box_iou": {"AP", "AP50", "AP75", "APs", "APm", "APl"}, "predicted_iou": {...}}, from 0 to 1; -1 where
    there is no object of that size. Raises ImportError without pycocotools, and ValueError for detections of pictures
    or categories that the annotations do not have.
    """
    try:
        import pycocotools.coco  # noqa: F401 - before the model runs
    except ImportError as error:
        raise ImportError("AP is measured by pycocotools: pip install 'efficientsam-hf[eval]'") from error
    for name, value in (("limit", limit), ("prompt_chunk", prompt_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    compute_context(model, dtype)
    truth = samples.complete_annotations(limit)
    boxes = _boxes_by_image(truth, detections)
    results: list[tuple[str, dict[str, Any]]] = []
    with evaluating(model, device):
        share = own_share(len(truth["images"]))
        for number in tqdm(share, desc="AP", unit="image", disable=not (progress and is_main())):
            record = truth["images"][number]
            found = boxes[record["id"]]
            if found:
                picture = PromptedImage(model, processor, samples.open_picture(record), dtype, prompt_chunk)
                results += _segment(picture, found)
    results = collect(results)
    return collect([_measure_all(truth, results)] if is_main() else [])[0]  # once, and heard by all


def everything_average_precision(
    model: torch.nn.Module,
    processor: Any,
    samples: CocoSamples,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = True,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Mask AP of segment-everything against all annotated objects, whatever their category.

    `options` are those of `EfficientSamMaskGenerator`; a mask's score is its predicted IoU. As everywhere in the COCO
    API the 100 best masks of a picture count for AP. What is not annotated counts as wrong there, so AP says something
    only where every object is annotated. Average recall, over the same IoU from 0.5 to 0.95, says which share of the
    annotated objects is found: among the best mask of a picture, the 10 or 100 best, or all of them.
    Returns {"everything": {"AP", ..., "AR1", "AR10", "AR100", "AR", "masks" (a picture)}}; otherwise as
    `average_precision`.
    """
    from ..models.mask_generation_efficientsam import EfficientSamMaskGenerator

    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    truth = samples.complete_annotations(limit)
    truth["annotations"] = [{**entry, "category_id": 1} for entry in truth["annotations"]]
    truth["categories"] = [{"id": 1, "name": "object"}]
    results: list[tuple[str, dict[str, Any]]] = []
    with evaluating(model, device):
        generator = EfficientSamMaskGenerator(model, processor, **options, output_type="coco_rle")
        share = own_share(len(truth["images"]))
        for number in tqdm(share, desc="AP", unit="image", disable=not (progress and is_main())):
            record = truth["images"][number]
            found = generator(samples.open_picture(record))
            for rle, score in zip(found["masks"], found["scores"].tolist()):
                entry = {"image_id": record["id"], "category_id": 1, "score": score, "segmentation": rle}
                results.append(("everything", entry))
    results = collect(results)
    return collect([_measure_everything(truth, results)] if is_main() else [])[0]


def read_detections(path: str | Path) -> list[dict[str, Any]]:
    """Read a COCO results file of boxes; `FileNotFoundError`, or `ValueError` that names the first bad entry."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"detections {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    if not isinstance(content, list):
        raise ValueError(f"{path} is no COCO results file: it must hold a list")
    for position, entry in enumerate(content):
        needed = ("image_id", "category_id", "bbox", "score")
        lacking = [name for name in needed if not isinstance(entry, dict) or name not in entry]
        if lacking:
            raise ValueError(f"{path}: entry {position} lacks {', '.join(lacking)}")
        box = entry["bbox"]
        finite = isinstance(box, list) and all(isinstance(n, (int, float)) and math.isfinite(n) for n in box)
        if not finite or len(box) != 4:
            raise ValueError(f"{path}: bbox of entry {position} must be finite [x, y, width, height], got {box!r}")
    return content


def _boxes_by_image(truth: dict[str, Any], detections: list[dict[str, Any]] | None) -> dict[Any, list[dict[str, Any]]]:
    """Boxes to prompt with, by picture; those that cover nothing of it are left out, since they can match nothing."""
    records = {record["id"]: record for record in truth["images"]}
    if detections is not None:
        _check_detections(truth, detections)
    source = [{**entry, "score": 1.0} for entry in truth["annotations"]] if detections is None else detections
    boxes: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for entry in source:
        record = records.get(entry["image_id"])
        if record is not None and _covers(entry["bbox"], record) and not entry.get("iscrowd"):
            boxes[entry["image_id"]].append(entry)
    return boxes


def _check_detections(truth: dict[str, Any], detections: list[dict[str, Any]]) -> None:
    """`ValueError` for a picture or a category that the annotations do not have; COCOeval would drop it in silence."""
    pictures = {record["id"] for record in truth["images"]} | set(truth["left_out"])
    categories = [category["id"] for category in truth["categories"]]
    known = set(categories)
    for entry in detections:
        if entry["image_id"] not in pictures:
            raise ValueError(f"detections: picture {entry['image_id']!r} is not among those of the annotations")
        if entry["category_id"] not in known:
            raise ValueError(
                f"detections: category_id {entry['category_id']!r} is not among those of the annotations: {categories}"
            )


def _covers(box: list[float], record: dict[str, Any]) -> bool:
    """Whether a box [x, y, width, height] has an extent and some of it lies in the picture."""
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    across = left < right and left < record["width"] and right > 0
    return across and top < bottom and top < record["height"] and bottom > 0


def _segment(picture: PromptedImage, boxes: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Prompt with all boxes of a picture; a COCO result for each box and each of `CHOICES`, by its name."""
    corners = torch.tensor([entry["bbox"] for entry in boxes], dtype=torch.float64)
    corners[:, 2:] += corners[:, :2]
    for part, masks, predicted in picture.answers(input_boxes=[corners.tolist()]):
        filled = _filled(corners[part], masks.shape[-2:])
        scores = {"box_iou": mask_iou(masks, filled[:, None]), "predicted_iou": predicted}
        for choice, values in scores.items():
            chosen = masks[torch.arange(len(masks)), values.argmax(-1)].numpy()
            for entry, mask in zip(boxes[part], chosen, strict=True):
                kept = {name: entry[name] for name in ("image_id", "category_id", "score")}
                yield choice, {**kept, "segmentation": encode_rle(mask)}


def _filled(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixels whose centres lie in the boxes, (N, 4) xyxy -> (N, H, W) bool."""
    y, x = (torch.arange(side) + 0.5 for side in size)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    inside_x, inside_y = (x >= left) & (x < right), (y >= top) & (y < bottom)
    return inside_y[:, :, None] & inside_x[:, None]


def _measure_all(
    truth: dict[str, Any],
    results: list[tuple[str, dict[str, Any]]],
    choices: Sequence[str] = CHOICES,
    names: Sequence[str] = tuple(NUMBERS),
) -> dict[str, dict[str, float]]:
    """The numbers of these names for the results of each choice."""
    from pycocotools.coco import COCO

    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        measured = {choice: _measure(coco, [entry for by, entry in results if by == choice]) for choice in choices}
    return {choice: {name: values[name] for name in names} for choice, values in measured.items()}


def _measure_everything(
    truth: dict[str, Any], results: list[tuple[str, dict[str, Any]]]
) -> dict[str, dict[str, float]]:
    """AP, average recall and the number of masks a picture."""
    measured = _measure_all(truth, results, ("everything",), (*NUMBERS, *RECALLS))["everything"]
    return {"everything": {**measured, "masks": len(results) / max(1, len(truth["images"]))}}


def _measure(coco: Any, results: list[dict[str, Any]]) -> dict[str, float]:
    from pycocotools.cocoeval import COCOeval

    if not results:
        return dict.fromkeys((*NUMBERS, *RECALLS), 0.0)
    evaluator = COCOeval(coco, coco.loadRes(results), "segm")
    evaluator.params.maxDets = [1, 10, 100, ALL_MASKS]
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    numbers = {name: float(evaluator.stats[index]) for name, index in NUMBERS.items()}
    recall = evaluator.eval["recall"][:, :, 0]  # (IoU, category, masks that count); -1 where there is no object
    for name, index in RECALLS.items():
        known = recall[..., index][recall[..., index] > -1]
        numbers[name] = float(known.mean()) if known.size else -1.0
    return numbers
