# SPDX-License-Identifier: Apache-2.0
"""Average precision of masks that a promptable model makes of boxes, measured by pycocotools."""

import contextlib
import io
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm

from ..data.coco import CocoObject, CocoSamples
from ..data.coco_file import CocoFile
from ..data.json_values import finite, identity
from ..files import read_json
from ..metrics import mask_iou
from ..models.checks_efficientsam import short
from ..models.rle_efficientsam import encode_rle
from ..processes import collect, is_main, own_share
from .prompted_image import PromptedImage, compute_context, evaluating
from .skipped import Report, report_skipped, try_reading


CHOICES = ("box_iou", "predicted_iou")
NUMBERS = {"AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5}
RECALLS = {"AR1": 0, "AR10": 1, "AR100": 2, "AR": 3}  # by the masks of a picture that count, all of them at last
ALL_MASKS = 100_000  # more than a picture ever has


class Detection(NamedTuple):
    """A box of a detector, [x, y, width, height]."""

    image: int | str
    category: int | str
    box: list[float]
    score: float


@dataclass
class _Found:
    """One picture: its annotated objects, and the model's masks by the way each was chosen.

    A mask is (RLE, score, category). `damage` says why the picture could not be used.
    """

    number: int
    objects: list[CocoObject]
    masks: dict[str, list[tuple[dict[str, Any], float, int | str]]]
    damage: str | None = None


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
    report: Report | None = None,
) -> dict[str, dict[str, float]]:
    """Mask AP of the COCO API over the annotations of `samples`, each box becoming one mask.

    `detections` are COCO results, {"image_id", "category_id", "bbox": [x, y, width, height], "score"} each; None takes
    the boxes of the annotated masks, all with score 1. Of the three masks of a box, "box_iou" takes the one with the
    highest IoU with the box itself (EfficientSAM paper, instance segmentation), "predicted_iou" the one with the
    highest predicted IoU. As everywhere in the COCO API the 100 boxes of the highest scores count, of each category in
    a picture (its maxDets), and those beyond add nothing: of more than 100 ground-truth boxes the others are missed.
    With `limit` only the first pictures count, for both sides. A picture that is damaged or has a damaged mask is left
    out of both, and handed to `report(number, reason)`; without one a warning is logged. In a distributed run the
    processes share the pictures: all must call, and all get the whole result.

    Returns {"box_iou": {"AP", "AP50", "AP75", "APs", "APm", "APl"}, "predicted_iou": {...}}, from 0 to 1; -1 where
    there is no object of that size. Raises ImportError without pycocotools, FileNotFoundError if a picture is missing,
    and ValueError for detections that are malformed, of pictures or categories that the annotations do not have, for
    annotations of categories that are not listed, and if no picture can be used.
    """
    for name, value in (("limit", limit), ("prompt_chunk", prompt_chunk)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    compute_context(model, dtype)
    samples.file.check_categories()
    boxes = None if detections is None else _group(samples, check_detections(detections, "detections"))

    def segment(number: int, image: Image.Image, objects: list[CocoObject]) -> dict[str, list]:
        if boxes is None:
            prompts = [Detection(number, entry.category, entry.box, 1.0) for entry in objects if not entry.crowd]
        else:
            prompts = [entry for entry in boxes[number] if _covers(entry.box, image)]
        return _segment(PromptedImage(model, processor, image, dtype, prompt_chunk), prompts) if prompts else {}

    with evaluating(model, device):
        found = _go_through(samples, limit, segment, progress, report)
    return collect([_measure_all(samples, found)] if is_main() else [])[0]  # once, and heard by all


def everything_average_precision(
    model: torch.nn.Module,
    processor: Any,
    samples: CocoSamples,
    device: str | torch.device | None = None,
    limit: int | None = None,
    progress: bool = True,
    report: Report | None = None,
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

    def segment(number: int, image: Image.Image, objects: list[CocoObject]) -> dict[str, list]:
        found = generator(image)
        return {"everything": [(rle, score, 1) for rle, score in zip(found["masks"], found["scores"].tolist())]}

    with evaluating(model, device):
        generator = EfficientSamMaskGenerator(model, processor, **options, output_type="coco_rle")
        found = _go_through(samples, limit, segment, progress, report)
    return collect([_measure_everything(samples, found)] if is_main() else [])[0]


def _go_through(
    samples: CocoSamples,
    limit: int | None,
    segment: Callable[[int, Image.Image, list[CocoObject]], dict[str, list]],
    progress: bool,
    report: Report | None,
) -> list[_Found]:
    """What is annotated and found in the pictures of the file that can be used, from all processes and in order."""
    _import_pycocotools()  # before the model runs
    count = len(samples.file.images[:limit])
    samples.check_pictures(range(count))

    def read(number: int) -> tuple[Image.Image, list[CocoObject]]:
        return samples.open_picture(number), samples.objects(number)

    found = []
    for number in tqdm(own_share(count), desc="AP", unit="image", disable=not (progress and is_main())):
        sample, damage = try_reading(read, number)
        found.append(_Found(number, [], {}, damage) if damage else _Found(number, sample[1], segment(number, *sample)))
    found = sorted(collect(found), key=lambda one: one.number)
    report_skipped([(one.number, one.damage) for one in found if one.damage], count, report)
    return [one for one in found if not one.damage]


def read_detections(path: str | Path) -> list[dict[str, Any]]:
    """Read a COCO results file of boxes; `FileNotFoundError`, or `ValueError` that names the first bad entry."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"detections {path} does not exist or is not a file")
    content = read_json(path)
    check_detections(content, str(path))
    return content


def check_detections(content: Any, shown: str) -> list[Detection]:
    """COCO results of boxes, checked; `ValueError` that names the first bad entry. Ids are as of `CocoFile`."""
    if not isinstance(content, list):
        raise ValueError(f"{shown} is no COCO results file: it must hold a list, got {short(content)}")
    return [_check_detection(entry, f"{shown}: entry {position}") for position, entry in enumerate(content)]


def _check_detection(entry: Any, shown: str) -> Detection:
    needed = ("image_id", "category_id", "bbox", "score")
    lacking = [name for name in needed if not isinstance(entry, dict) or name not in entry]
    if lacking:
        raise ValueError(f"{shown} lacks {', '.join(lacking)}")
    image, category, box, score = (entry[name] for name in needed)
    for name, value in (("image_id", image), ("category_id", category)):
        if identity(value) is None:
            raise ValueError(f"{shown}: {name} must be a whole number or text, got {short(value)}")
    if not isinstance(box, (list, tuple)) or len(box) != 4 or not all(map(finite, box)):
        raise ValueError(f"{shown}: bbox must be finite [x, y, width, height], got {short(box)}")
    if not finite(score):
        raise ValueError(f"{shown}: score must be a finite number, got {short(score)}")
    return Detection(identity(image), identity(category), [float(side) for side in box], float(score))


def _group(samples: CocoSamples, detections: list[Detection]) -> dict[int, list[Detection]]:
    """Detections by the number of their picture.

    `ValueError` for a picture or a category that the annotations do not have; COCOeval would drop it in silence.
    """
    numbers = {image.id: number for number, image in enumerate(samples.file.images)}
    known = set(samples.file.categories)
    groups: dict[int, list[Detection]] = defaultdict(list)
    for entry in detections:
        if entry.image not in numbers:
            raise ValueError(f"detections: picture {short(entry.image)} is not among those of the annotations")
        if entry.category not in known:
            raise ValueError(
                f"detections: category_id {short(entry.category)} is not among those of the annotations: "
                f"{short(samples.file.categories)}"
            )
        groups[numbers[entry.image]].append(entry)
    return groups


def _covers(box: list[float], image: Image.Image) -> bool:
    """Whether a box [x, y, width, height] has an extent and some of it lies in the picture."""
    left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
    across = left < right and left < image.width and right > 0
    return across and top < bottom and top < image.height and bottom > 0


def _segment(picture: PromptedImage, boxes: list[Detection]) -> dict[str, list]:
    """Prompt with all boxes of a picture; a mask of each box for each of `CHOICES`, by its name."""
    corners = torch.tensor([entry.box for entry in boxes], dtype=torch.float64)
    corners[:, 2:] += corners[:, :2]
    found: dict[str, list] = {choice: [] for choice in CHOICES}
    for part, masks, predicted in picture.answers(input_boxes=[corners.tolist()]):
        filled = _filled(corners[part], masks.shape[-2:])
        scores = {"box_iou": mask_iou(masks, filled[:, None]), "predicted_iou": predicted}
        for choice, values in scores.items():
            chosen = masks[torch.arange(len(masks)), values.argmax(-1)].numpy()
            for entry, mask in zip(boxes[part], chosen, strict=True):
                found[choice].append((encode_rle(mask), entry.score, entry.category))
    return found


def _filled(boxes: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pixels whose centres lie in the boxes, (N, 4) xyxy -> (N, H, W) bool."""
    y, x = (torch.arange(side) + 0.5 for side in size)
    left, top, right, bottom = boxes[:, :, None].unbind(1)
    inside_x, inside_y = (x >= left) & (x < right), (y >= top) & (y < bottom)
    return inside_y[:, :, None] & inside_x[:, None]


def _measure_all(samples: CocoSamples, found: list[_Found]) -> dict[str, dict[str, float]]:
    """AP of each choice."""
    places = {category: place for place, category in enumerate(samples.file.categories, 1)}
    measured = {choice: _measure(samples.file, found, choice, places) for choice in CHOICES}
    return {choice: {name: values[name] for name in NUMBERS} for choice, values in measured.items()}


def _measure_everything(samples: CocoSamples, found: list[_Found]) -> dict[str, dict[str, float]]:
    """AP, average recall and the number of masks a picture; every category is the first."""
    measured = _measure(samples.file, found, "everything", dict.fromkeys((*samples.file.categories, 1), 1))
    masks = sum(len(one.masks["everything"]) for one in found)
    return {"everything": {**measured, "masks": masks / len(found)}}


def _measure(file: CocoFile, found: list[_Found], choice: str, places: dict[int | str, int]) -> dict[str, float]:
    """What pycocotools measures of one choice; `places` numbers the categories from 1 on."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    results = [
        {"image_id": one.number, "category_id": places[category], "segmentation": rle, "score": score}
        for one in found
        for rle, score, category in one.masks.get(choice, [])
    ]
    if not results:
        return dict.fromkeys((*NUMBERS, *RECALLS), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        coco = COCO()
        coco.dataset = _truth(file, found, places)
        coco.createIndex()
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


def _truth(file: CocoFile, found: list[_Found], places: dict[int | str, int]) -> dict[str, Any]:
    """The annotated objects for the COCO API, which knows pictures and categories by numbers alone."""
    objects = [(one.number, entry) for one in found for entry in one.objects]
    annotations = [
        {
            "id": number, "image_id": image, "category_id": places[entry.category], "segmentation": entry.rle,
            "area": entry.area, "bbox": entry.box, "iscrowd": int(entry.crowd),
        }
        for number, (image, entry) in enumerate(objects, 1)
    ]  # fmt: skip
    images = [
        {"id": one.number, "height": file.images[one.number].height, "width": file.images[one.number].width}
        for one in found
    ]
    return {"images": images, "annotations": annotations, "categories": [{"id": n} for n in set(places.values())]}


def _import_pycocotools() -> None:
    try:
        import pycocotools.coco  # noqa: F401
    except ImportError as error:
        raise ImportError("AP is measured by pycocotools: pip install 'efficientsam-hf[eval]'") from error
