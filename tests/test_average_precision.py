# SPDX-License-Identifier: Apache-2.0
"""Mask AP of boxes: against numbers known by construction and against pycocotools run by hand."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf.data.coco import CocoSamples
from efficientsam_hf.evaluation import average_precision, everything_average_precision, read_detections
from efficientsam_hf.models import mask_generation_efficientsam
from efficientsam_hf.models.processing_efficientsam import clipped_boxes
from efficientsam_hf.models.rle_efficientsam import encode_rle


# pycocotools' compiled part still speaks the array protocol of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

HEIGHT, WIDTH = 60, 80
# (picture, box x0 y0 x1 y1), the objects being rectangles
OBJECTS = [(1, (4, 4, 44, 44)), (1, (50, 10, 70, 30)), (2, (10, 10, 60, 50))]


class Processor:
    """Model pixels are the picture's."""

    def __call__(self, images: Image.Image, return_tensors: str, input_boxes: list) -> dict[str, Any]:
        size = [[images.height, images.width]]
        pixels = torch.zeros(1, 3, images.height, images.width)
        boxes = torch.tensor(input_boxes)
        return {"pixel_values": pixels, "input_boxes": boxes, "original_sizes": size, "reshaped_input_sizes": size}

    def post_process_masks(self, masks: torch.Tensor, original_sizes: Any, reshaped_input_sizes: Any) -> list:
        return [masks[0] > 0]


class Filler(torch.nn.Module):
    """Answers a box with its upper half, its whole and its left tenth; the score prefers the half."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def get_image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values

    def forward(self, image_embeddings, multimask_output, input_boxes) -> SimpleNamespace:
        boxes = input_boxes[0].round().int().tolist()
        logits = -torch.ones(1, len(boxes), 3, *image_embeddings.shape[-2:])
        for index, (left, top, right, bottom) in enumerate(boxes):
            logits[0, index, 0, top : (top + bottom) // 2, left:right] = 1
            logits[0, index, 1, top:bottom, left:right] = 1
            logits[0, index, 2, top:bottom, left : left + (right - left) // 10] = 1
        return SimpleNamespace(pred_masks=logits, iou_scores=torch.tensor([0.9, 0.5, 0.1]).expand(1, len(boxes), 3))


@pytest.fixture
def samples(tmp_path: Path) -> CocoSamples:
    annotations = []
    for number, (picture, (left, top, right, bottom)) in enumerate(OBJECTS):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[top:bottom, left:right] = True
        annotations.append({"id": number, "image_id": picture, "segmentation": encode_rle(mask)})
    images = [{"id": k, "file_name": f"{k}.png", "width": WIDTH, "height": HEIGHT} for k in (1, 2, 3)]
    path = tmp_path / "instances.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    for k in (1, 2, 3):
        Image.new("RGB", (WIDTH, HEIGHT)).save(tmp_path / f"{k}.png")
    return CocoSamples(path, tmp_path)


def detection(picture: int, box: tuple[int, int, int, int], score: float) -> dict[str, Any]:
    left, top, right, bottom = box
    return {
        "image_id": picture, "category_id": 1, "bbox": [left, top, right - left, bottom - top], "score": score,
    }  # fmt: skip


def measure(samples: CocoSamples, **options: Any) -> dict[str, dict[str, float]]:
    return average_precision(Filler(), Processor(), samples, progress=False, **options)


def test_boxes_of_the_annotations(samples: CocoSamples) -> None:
    result = measure(samples)
    assert result["box_iou"]["AP"] == pytest.approx(1)
    assert result["box_iou"]["APs"] == pytest.approx(1)  # 20 x 20
    assert result["box_iou"]["APl"] == -1
    # Half of the object is IoU 0.5, which counts at the first of the ten thresholds only.
    assert result["predicted_iou"]["AP50"] == pytest.approx(1) and result["predicted_iou"]["AP"] == pytest.approx(0.1)
    assert result == measure(samples, prompt_chunk=1)


def test_boxes_of_a_detector_with_a_false_and_a_missing_one(samples: CocoSamples) -> None:
    found = [detection(*OBJECTS[0], 0.9), detection(3, (0, 0, 20, 20), 0.8), detection(*OBJECTS[2], 0.7)]
    result = measure(samples, detections=found)["box_iou"]
    # Precision at recall up to 1/3 is 1, up to 2/3 it is 2/3: 34 and 33 of the 101 recall levels.
    assert result["AP"] == pytest.approx((34 + 33 * 2 / 3) / 101, abs=1e-6)


def test_agrees_with_pycocotools_run_by_hand(samples: CocoSamples, tmp_path: Path, capsys) -> None:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    generator = np.random.default_rng(0)
    found = [
        detection(picture, tuple(int(v) for v in np.array(box) + generator.integers(-6, 7, 4).clip(-4)), float(score))
        for (picture, box), score in zip(OBJECTS * 4, generator.random(12))
    ]
    truth: dict[str, Any] = {
        "images": [{"id": k, "width": WIDTH, "height": HEIGHT} for k in (1, 2, 3)],
        "categories": [{"id": 1}],
        "annotations": [],
    }
    for number, (picture, (left, top, right, bottom)) in enumerate(OBJECTS, 1):
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[top:bottom, left:right] = True
        truth["annotations"].append(
            {
                "id": number, "image_id": picture, "category_id": 1, "segmentation": encode_rle(mask),
                "area": int(mask.sum()), "bbox": [left, top, right - left, bottom - top], "iscrowd": 0,
            }
        )  # fmt: skip
    results = []
    for entry in found:
        x, y, width, height = entry["bbox"]
        mask = np.zeros((HEIGHT, WIDTH), bool)
        mask[max(y, 0) : y + height, max(x, 0) : x + width] = True
        results.append({**entry, "segmentation": encode_rle(mask)})
        del results[-1]["bbox"]
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "results.json").write_text(json.dumps(results))
    coco = COCO(str(tmp_path / "truth.json"))
    by_hand = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), "segm")
    by_hand.evaluate()
    by_hand.accumulate()
    by_hand.summarize()
    capsys.readouterr()
    ours = measure(samples, detections=found)["box_iou"]
    assert list(ours.values()) == pytest.approx(by_hand.stats[:6].tolist())
    assert 0 < ours["AP"] < 1
    assert capsys.readouterr().out == ""


def test_the_limit_holds_for_both_sides(samples: CocoSamples) -> None:
    found = [detection(*entry, 0.5) for entry in OBJECTS]
    assert measure(samples, detections=found, limit=1)["box_iou"]["AP"] == pytest.approx(1)


def test_detections_that_cannot_be_used(samples: CocoSamples, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="picture 9 is not among"):
        measure(samples, detections=[detection(9, (0, 0, 5, 5), 1.0)])
    other = detection(1, (0, 0, 5, 5), 1.0) | {"category_id": 18}
    with pytest.raises(ValueError, match=r"category_id 18 is not among those of the annotations: \[1\]"):
        measure(samples, detections=[detection(*OBJECTS[0], 0.9), other])
    assert measure(samples, detections=[])["box_iou"]["AP"] == 0
    path = tmp_path / "detections.json"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_detections(path)
    for content, words in (
        ("{", "not a JSON"),
        ("{}", "must hold a list"),
        ('[{"score": 1}]', "entry 0 lacks image_id"),
        ("[7]", "entry 0 lacks image_id"),
        ('[{"image_id": 1, "category_id": 1, "score": 1, "bbox": [0, 0, 5]}]', "entry 0: bbox must be"),
        ('[{"image_id": 1, "category_id": 1, "score": 1, "bbox": [0, 0, 5, Infinity]}]', "entry 0: bbox must be"),
        ('[{"image_id": [1], "category_id": 1, "score": 1, "bbox": [0, 0, 5, 5]}]', "entry 0: image_id must be"),
        ('[{"image_id": 1, "category_id": null, "score": 1, "bbox": [0, 0, 5, 5]}]', "entry 0: category_id must be"),
        ('[{"image_id": 1, "category_id": 1, "score": "1", "bbox": [0, 0, 5, 5]}]', "entry 0: score must be"),
        ('[{"image_id": 1, "category_id": 1, "score": true, "bbox": [0, 0, 5, 5]}]', "entry 0: score must be"),
        ('[{"image_id": 1, "category_id": 1, "score": NaN, "bbox": [0, 0, 5, 5]}]', "entry 0: score must be"),
    ):
        path.write_text(content)
        with pytest.raises(ValueError, match=words):
            read_detections(path)


def test_categories_beyond_the_limit_are_known(samples: CocoSamples) -> None:
    content = json.loads(samples.file.path.read_text())
    content["annotations"][-1]["category_id"] = 4  # of picture 2
    samples.file.path.write_text(json.dumps(content))
    changed = CocoSamples(samples.file.path, samples.image_folder)
    found = [
        detection(*OBJECTS[0], 0.9),
        detection(*OBJECTS[1], 0.8),
        detection(*OBJECTS[2], 0.7) | {"category_id": 4},
    ]
    assert measure(changed, detections=found, limit=1)["box_iou"]["AP"] == pytest.approx(1)
    assert measure(changed, detections=found)["box_iou"]["AP"] == pytest.approx(1)
    with pytest.raises(ValueError, match=r"category_id 5 is not among those of the annotations: \[1, 4\]"):
        measure(changed, detections=[found[2] | {"category_id": 5}], limit=1)


@pytest.mark.parametrize(
    "box",
    [
        (-9, 0, 0, 20),
        (0, -9, 20, 0),
        (WIDTH, 0, WIDTH + 5, 20),
        (0, HEIGHT, 20, HEIGHT + 5),
        (4, 4, 4, 9),
        (9, 4, 4, 9),
    ],
)
def test_boxes_that_cover_nothing_of_their_picture_are_left_out(samples: CocoSamples, box) -> None:
    prompted = []

    class Recording(Processor):
        def __call__(self, images: Image.Image, return_tensors: str, input_boxes: list) -> dict[str, Any]:
            prompted.extend(input_boxes[0])
            clipped_boxes(input_boxes, [(images.height, images.width)])  # as ours does it, or it raises ValueError
            return super().__call__(images, return_tensors, input_boxes)

    found = [detection(*entry, 0.5) for entry in OBJECTS]
    outside = [detection(1, box, 0.9), detection(3, box, 0.9)]
    result = average_precision(Filler(), Recording(), samples, outside + found, progress=False)
    assert result == measure(samples, detections=found) and len(prompted) == 3


def test_annotations_that_cannot_be_measured(samples: CocoSamples) -> None:
    for limit in (0, -1):
        with pytest.raises(ValueError, match="limit must be at least 1"):
            measure(samples, limit=limit)
    content = json.loads(samples.file.path.read_text())
    boxes_only = {"image_id": 3, "segmentation": [], "bbox": [1, 1, 5, 5], "area": 25}

    def changed(**changes: Any) -> CocoSamples:
        samples.file.path.write_text(json.dumps(content | changes))
        return CocoSamples(samples.file.path, samples.image_folder)

    assert measure(changed(annotations=[*content["annotations"], boxes_only]))["box_iou"]["AP"] == pytest.approx(1)
    assert measure(changed(categories=[{"id": 7, "name": "only"}]))["box_iou"]["AP"] == pytest.approx(1)
    with pytest.raises(ValueError, match="entry 0 of 'annotations' has no category_id, and there are 2"):
        measure(changed(categories=[{"id": 7, "name": "a"}, {"id": 8, "name": "b"}]))
    with pytest.raises(ValueError, match=r"category_id 1 is not among those of 'categories': \[7\]"):
        listed = [{**entry, "category_id": 1} for entry in content["annotations"]]
        measure(changed(annotations=listed, categories=[{"id": 7, "name": "only"}]))


def test_damaged_pictures_count_for_neither_side(samples: CocoSamples, caplog) -> None:
    content = json.loads(samples.file.path.read_text())
    content["annotations"][2]["segmentation"]["counts"] = "~~~~"  # of picture 2
    samples.file.path.write_text(json.dumps(content))
    changed, skipped = CocoSamples(samples.file.path, samples.image_folder), []
    result = measure(changed, report=lambda number, reason: skipped.append((number, reason)))
    assert result == measure(samples, limit=1)
    assert len(skipped) == 1 and skipped[0][0] == 1 and "picture 2.png, entry 2 of 'annotations'" in skipped[0][1]
    Image.new("RGB", (HEIGHT, WIDTH)).save(samples.image_folder / "1.png")
    (samples.image_folder / "3.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match="none of 3 pictures could be used; picture 0: .*1.png is 60 x 80 pixels"):
        measure(changed)
    measure(samples, detections=[detection(*OBJECTS[2], 0.5)])
    warned = [record.getMessage() for record in caplog.records]
    assert [message.split(": ")[0] for message in warned] == [f"picture {k} could not be used" for k in (0, 2)]


def everything(
    samples: CocoSamples, monkeypatch, masks_of: dict[int, list[tuple]], **options: Any
) -> dict[str, float]:
    """AP of segment-everything that finds rectangles, as (box, score), in pictures told apart by their place."""
    pictures = iter(sorted(masks_of))

    def generator(model: Any, processor: Any, **given: Any) -> Any:
        assert given == {**options, "output_type": "coco_rle"}

        def generate(picture: Image.Image) -> dict[str, Any]:
            rles, scores = [], []
            for (left, top, right, bottom), score in masks_of[next(pictures)]:
                mask = np.zeros((HEIGHT, WIDTH), bool)
                mask[top:bottom, left:right] = True
                rles.append(encode_rle(mask))
                scores.append(score)
            return {"masks": rles, "scores": torch.tensor(scores)}

        return generate

    monkeypatch.setattr(mask_generation_efficientsam, "EfficientSamMaskGenerator", generator)
    return everything_average_precision(Filler(), Processor(), samples, progress=False, **options)["everything"]


def test_everything_that_is_there_and_something_that_is_not(samples: CocoSamples, monkeypatch) -> None:
    found = {1: [(OBJECTS[0][1], 0.9), (OBJECTS[1][1], 0.8)], 2: [(OBJECTS[2][1], 0.7)], 3: []}
    assert everything(samples, monkeypatch, found, points_per_crop=4)["AP"] == pytest.approx(1)
    found[3] = [((0, 0, 20, 20), 0.85)]  # before the second of three true ones
    worse = everything(samples, monkeypatch, found)["AP"]
    assert worse == pytest.approx((34 + 33 * 3 / 4 + 34 * 3 / 4) / 101, abs=0.01)
    assert everything(samples, monkeypatch, {1: [], 2: [], 3: []})["AP50"] == 0.0


def test_recall_counts_the_best_masks_of_a_picture(samples: CocoSamples, monkeypatch) -> None:
    # the second picture's object comes after 100 masks of nothing, one of the first's is found with an IoU of 0.7
    nothing = [((0, 0, 2 + k % 20, 2), 0.9) for k in range(100)]
    left, top, right, bottom = OBJECTS[1][1]
    worse = (left, top, left + round(0.7 * (right - left)), bottom)
    found = {1: [(OBJECTS[0][1], 0.9), (worse, 0.8)], 2: [*nothing, (OBJECTS[2][1], 0.1)], 3: []}
    numbers = everything(samples, monkeypatch, found)
    share = sum((worse[2] - left) / (right - left) >= threshold - 1e-9 for threshold in np.arange(0.5, 1.0, 0.05)) / 10
    assert 0 < share < 1
    assert numbers["AR1"] == pytest.approx(1 / 3)
    assert numbers["AR10"] == numbers["AR100"] == pytest.approx((1 + share) / 3)
    assert numbers["AR"] == pytest.approx((2 + share) / 3)
    assert numbers["masks"] == pytest.approx(103 / 3)


def test_everything_counts_no_categories(samples: CocoSamples, tmp_path: Path, monkeypatch) -> None:
    content = json.loads((tmp_path / "instances.json").read_text())
    content["annotations"][0]["category_id"] = 7
    content["categories"] = [{"id": 7, "name": "a"}, {"id": 1, "name": "b"}]
    for entry in content["annotations"][1:]:
        entry["category_id"] = 1
    (tmp_path / "other.json").write_text(json.dumps(content))
    found = {1: [(OBJECTS[0][1], 0.9), (OBJECTS[1][1], 0.8)], 2: [(OBJECTS[2][1], 0.7)], 3: []}
    other = CocoSamples(tmp_path / "other.json", tmp_path)
    assert everything(other, monkeypatch, found)["AP"] == pytest.approx(1)
