# SPDX-License-Identifier: Apache-2.0
"""Segment everything by our generator: the masks of the stock pipeline, whatever is computed when."""

import base64
import json
import math
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MaskGenerationPipeline, SamConfig, SamImageProcessor, SamModel, pipeline

from efficientsam_hf import (
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamMaskGenerationPipeline,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    default_checkpoint,
)
from efficientsam_hf.models import mask_candidates_efficientsam as candidates
from efficientsam_hf.models import mask_generation_efficientsam as module
from efficientsam_hf.models.found_masks_efficientsam import FoundMask, suppress, without_small_regions
from efficientsam_hf.models.mask_generation_options_efficientsam import MaskGenerationOptions
from efficientsam_hf.models.mask_geometry_efficientsam import box_iou, cells_near, masks_to_boxes
from efficientsam_hf.models.rle_efficientsam import decode_rle


LOW = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.6, "points_per_crop": 6}


@pytest.fixture(scope="module")
def generator(model, processor) -> EfficientSamMaskGenerator:
    return EfficientSamMaskGenerator(model, processor, **LOW)


def iou(first: np.ndarray, second: np.ndarray) -> float:
    return np.count_nonzero(first & second) / max(1, np.count_nonzero(first | second))


def same_masks(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return len(one["masks"]) == len(other["masks"]) and all(
        np.array_equal(a, b) for a, b in zip(one["masks"], other["masks"])
    )


# The masks


@pytest.mark.parametrize(
    "options",
    [{}, {"stability_score_thresh": 0.0, "crops_nms_thresh": 0.3}, {"pred_iou_thresh": 0.0, "mask_threshold": 0.5}],
    ids=["low thresholds", "no stability", "another cut"],
)
def test_masks_are_those_of_the_stock_pipeline(model, processor, generator, picture, options) -> None:
    stock = MaskGenerationPipeline(model=model, image_processor=processor.image_processor)
    expected = stock(picture, **{**LOW, **options}, output_bboxes_mask=True)
    result = generator(picture, **options)
    assert len(expected["masks"]) > 5
    torch.testing.assert_close(result["scores"], expected["scores"], rtol=0, atol=1e-4)
    torch.testing.assert_close(result["boxes"], expected["bounding_boxes"].long(), rtol=0, atol=1)
    for mask, other in zip(result["masks"], expected["masks"]):
        assert mask.shape == (150, 230) and iou(mask, other) > 0.99


@pytest.mark.parametrize(
    "changes", [{"HELD_CELLS": 0}, {"HELD_CELLS": 9000}, {"MASKS_AT_ONCE": 1}, {"IMAGES_AT_ONCE": 1}]
)
def test_what_is_kept_in_memory_changes_nothing(generator, picture, monkeypatch, changes) -> None:
    expected = generator(picture, crops_n_layers=1)
    for name, value in changes.items():
        monkeypatch.setattr(candidates if name == "HELD_CELLS" else module, name, value)
    result = generator(picture, crops_n_layers=1, points_per_batch=5)
    torch.testing.assert_close(result["scores"], expected["scores"], rtol=0, atol=1e-5)
    assert all(iou(a, b) > 0.999 for a, b in zip(result["masks"], expected["masks"], strict=True))


def test_the_bounds_of_a_box_hold(generator, photo, monkeypatch) -> None:
    """Masks that are certain to be suppressed are never looked at; looking at all of them gives the same."""
    options = {"points_per_crop": 20, "pred_iou_thresh": 0.1, "stability_score_thresh": 0.3, "crops_nms_thresh": 0.5}
    generator = EfficientSamMaskGenerator(
        generator.model, EfficientSamImageProcessor.from_pretrained(default_checkpoint()), **LOW
    )
    expected = generator(photo, **options)
    looked_at = []
    exact = module._Crop._exact_masks
    monkeypatch.setattr(module._Crop, "_exact_masks", lambda *a: looked_at.append(1) or exact(*a))
    assert same_masks(generator(photo, **options), expected)
    few = len(looked_at)
    monkeypatch.setattr(module, "_certain_iou", lambda inner, outer, boxes: torch.zeros(len(inner), len(boxes)))
    assert same_masks(generator(photo, **options), expected)
    assert few < len(looked_at) - few


def test_numbers_describe_the_masks(generator, picture) -> None:
    result = generator(picture, crops_n_layers=1, crop_n_points_downscale_factor=2)
    masks = torch.from_numpy(np.stack(result["masks"]))
    assert torch.equal(masks_to_boxes(masks), result["boxes"])
    assert torch.equal(masks.flatten(1).sum(1), result["areas"])
    assert result["scores"].tolist() == sorted(result["scores"].tolist(), reverse=True)
    x, y = result["points"].T
    assert ((x >= 0) & (x <= 230) & (y >= 0) & (y <= 150)).all()
    on_its_mask = masks[range(len(masks)), y.long().clamp(max=149), x.long().clamp(max=229)]
    assert on_its_mask.float().mean() > 0.7  # a click says what is meant
    assert ((result["stability_scores"] > 0.6) & (result["stability_scores"] <= 1)).all()
    by_area = generator(picture, crops_n_layers=1, crop_n_points_downscale_factor=2, sort_by="area")
    assert by_area["areas"].tolist() == sorted(result["areas"].tolist(), reverse=True)


def test_output_types(generator, picture) -> None:
    arrays = generator(picture, output_rle_mask=True, output_bboxes_mask=True)
    runs, compressed = (generator(picture, output_type=kind) for kind in ("rle", "coco_rle"))
    assert torch.equal(arrays["bounding_boxes"], arrays["boxes"]) and arrays["rle_mask"] == runs["masks"]
    for mask, plain, packed in zip(arrays["masks"], runs["masks"], compressed["masks"], strict=True):
        assert isinstance(plain["counts"], list) and isinstance(packed["counts"], str)
        np.testing.assert_array_equal(decode_rle(plain), mask)
        np.testing.assert_array_equal(decode_rle(packed), mask)


@pytest.mark.parametrize(
    "size", [(300, 180), (40, 260), (256, 256), (999, 70), (192, 320), (320, 448), (320, 960), (64, 2), (9, 1)]
)
def test_a_window_is_a_part_of_the_whole(size) -> None:
    """At odd multiples of the number of cells pixels lie on the centres of cells, and need no other ones."""
    processor = EfficientSamImageProcessor(size=256)
    logits = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    whole = processor.post_process_masks(logits[None, None, None], [size], binarize=False)[0][0, 0]
    for cells in ([0, 0, 63, 63], [10, 20, 14, 21], [60, 0, 63, 3], [5, 5, 5, 5], [3, 17, 51, 60], [31, 30, 34, 33]):
        window, (x, y) = processor.resize_window(logits, size, cells)
        part = whole[y : y + window.shape[0], x : x + window.shape[1]]
        torch.testing.assert_close(window, part, rtol=0, atol=2e-5)
        (within,) = processor.resize_within(logits[None], size, [cells])
        assert torch.equal(within[y : y + window.shape[0], x : x + window.shape[1]], part)
        assert within.isfinite().sum() == window.numel()
        if min(size) < 64 and not window.numel():
            continue
        centres = [(cells[axis] + 0.5) / 64 * size[1 - axis % 2] for axis in range(4)]
        assert x <= centres[0] and y <= centres[1]
        assert x + window.shape[1] >= centres[2] and y + window.shape[0] >= centres[3]


# Holes and specks


def found(mask: np.ndarray, x: int = 0, y: int = 0) -> FoundMask:
    box = masks_to_boxes(torch.from_numpy(mask)[None])[0] + torch.tensor([x, y, x, y])
    x0, y0, x1, y1 = box.tolist()
    window = mask[y0 - y : y1 + 1 - y, x0 - x : x1 + 1 - x]
    return FoundMask([x0, y0, x1, y1], int(mask.sum()), 0.9, 0.9, [0.0, 0.0], 100, window)


def test_small_regions() -> None:
    mask = np.zeros((20, 20), bool)
    mask[2:14, 2:14] = True
    mask[4:6, 4:6] = False  # a hole of 4 pixels
    mask[8:12, 8:12] = False  # and one of 16
    mask[17, 17:19] = True  # a speck of 3 with the pixel that touches its corner
    mask[16, 16] = True
    clean = without_small_regions(found(mask), (20, 20), 4, 3)
    assert clean.changed and clean.box == [2, 2, 13, 13] and clean.area == 144 - 16 == clean.window.sum()
    assert clean.window[2:4, 2:4].all() and not clean.window[6:10, 6:10].any()
    untouched = without_small_regions(found(mask), (20, 20), 3, 2)
    assert not untouched.changed and untouched.area == mask.sum()
    only_specks = np.zeros((20, 20), bool)
    only_specks[3, 3:5] = only_specks[9, 9] = True
    kept = without_small_regions(found(only_specks), (20, 20), 0, 50)
    assert kept.box == [3, 3, 4, 3] and kept.area == 2


def test_a_gap_at_the_edge_of_a_window_is_a_hole_only_where_the_image_ends() -> None:
    mask = np.ones((6, 6), bool)
    mask[0, 0] = mask[5, 5] = False
    inside = without_small_regions(found(mask, 10, 10), (100, 100), 5, 0)
    assert not inside.changed
    corner = without_small_regions(found(mask), (100, 100), 5, 0)
    assert corner.window[0, 0] and not corner.window[5, 5]


def test_masks_that_changed_give_way() -> None:
    """Unchanged masks keep their threshold; smaller crops come first; of two alike the unchanged one stays."""

    def at(box: list[int], score: float, crop_area: int = 100, changed: bool = False) -> FoundMask:
        return FoundMask(box, 1, score, 1.0, [0.0, 0.0], crop_area, changed=changed)

    near = [at([0, 0, 100, 100], 0.5), at([0, 0, 100, 80], 0.9), at([0, 0, 100, 100], 0.8, crop_area=50)]
    by_crop = suppress(near, 0.7, lambda mask: (mask.crop_area, -mask.score))
    assert [(mask.score, mask.crop_area) for mask in by_crop] == [(0.8, 50)]
    alike = [at([0, 0, 100, 100], 0.9, changed=True), at([0, 0, 100, 99], 0.2)]
    kept = suppress(alike, 0.7, lambda mask: (mask.changed, -mask.score))
    assert [mask.score for mask in kept] == [0.2]


class _OneAnswer(torch.nn.Module):
    """A model whose every prompt has the same masks, given as low-resolution logits (M, h, w)."""

    def __init__(self, logits: torch.Tensor, scores: list[float]):
        super().__init__()
        self.logits, self.scores = logits, torch.tensor(scores)
        self.unused = torch.nn.Parameter(torch.zeros(1))
        self.config = EfficientSamConfig()

    def get_image_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(pixels), 1, *(side // 4 for side in self.logits.shape[1:]))

    def decode_prompts(self) -> None:
        raise NotImplementedError


def generate_from(logits: torch.Tensor, scores: list[float], size: tuple[int, int], monkeypatch, **options) -> dict:
    """What the generator makes of given logits, for one point."""
    model = _OneAnswer(logits, scores)
    masks, all_scores = torch.cat([logits[:1], logits]), torch.cat([model.scores[:1], model.scores])

    class Decoder:
        def __call__(self, points, labels):
            return masks.expand(len(points), -1, -1, -1), all_scores.expand(len(points), -1)

        def decode_above(self, threshold, points, labels):
            prompts = torch.arange(len(points) if (model.scores > threshold).any() else 0)
            return *self(points[prompts], labels[prompts]), prompts

    monkeypatch.setattr(module, "EfficientSamFastDecoder", lambda *a: Decoder())
    generator = EfficientSamMaskGenerator(model, EfficientSamImageProcessor(size=1024), points_per_crop=1)
    return generator(Image.new("RGB", size), **{"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, **options})


def test_a_speck_that_vanishes_makes_no_box(monkeypatch) -> None:
    """A single weak cell is nothing at full size: a mask with one must not be suppressed as if it were there."""
    square = torch.full((256, 256), -6.0)
    square[20:120, 20:120] = 6.0
    large, speck = square.clone(), square.clone()
    large[20:201, 20:201] = 6.0
    speck[200, 200] = 0.1
    result = generate_from(torch.stack([large, speck]), [0.9, 0.8], (1024, 1024), monkeypatch)
    assert result["scores"].tolist() == pytest.approx([0.9, 0.8])
    assert result["boxes"][1].tolist()[2] < 490


@pytest.mark.parametrize("radius", [1.2, 1.8, 2.5, 4.0])
def test_small_objects_pass_the_filter_at_low_resolution(radius: float, monkeypatch) -> None:
    rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        y, x = 60 + 100 * torch.rand(2, generator=generator)
        logits = ((radius - ((rows - y) ** 2 + (columns - x) ** 2).sqrt()) * 8).clamp(-12, 12)
        exact = EfficientSamImageProcessor(size=1024).post_process_masks(logits[None, None, None], [(1024, 1024)])
        full = EfficientSamImageProcessor(size=1024).post_process_masks(
            logits[None, None, None], [(1024, 1024)], binarize=False
        )[0][0]
        stability = float(module.stability_scores(full, 0.0, 1.0)[0])
        result = generate_from(logits[None], [0.9], (1024, 1024), monkeypatch, stability_score_thresh=stability - 1e-3)
        assert len(result["masks"]) == 1 and iou(result["masks"][0], exact[0][0, 0].numpy()) > 0.999


def full_stability(logits: torch.Tensor, size: tuple[int, int]) -> tuple[float, np.ndarray]:
    """Stability and mask of low-resolution logits (h, w) at the whole size (height, width)."""
    processor = EfficientSamImageProcessor(size=1024)
    full = processor.post_process_masks(logits[None, None, None], [size], binarize=False)[0][0]
    return float(module.stability_scores(full, 0.0, 1.0)[0]), (full[0] > 0).numpy()


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.2])
@pytest.mark.parametrize("size", [(1080, 1920), (700, 500)])
@pytest.mark.parametrize(("width", "inside", "around"), [(2, 0.5, -6.0), (2, -0.1, -12.0), (3, 0.9, -8.0)])
def test_thin_objects_pass_the_filter_at_low_resolution(width, inside, around, size, angle, monkeypatch) -> None:
    """Between two cells of a ridge interpolation rises above both, by more the deeper its surroundings are."""
    rows, columns = torch.meshgrid(torch.arange(256.0) - 127.5, torch.arange(256.0) - 127.5, indexing="ij")
    across = (rows * math.cos(angle) + columns * math.sin(angle)).abs()
    along = (columns * math.cos(angle) - rows * math.sin(angle)).abs()
    logits = torch.where((across <= width / 2) & (along < 90), inside, around)
    stability, mask = full_stability(logits, size)
    assert stability > 0.3
    assert module.stability_scores(logits[None], 0.0, 1.0) < stability - candidates.STABILITY_MARGIN
    for threshold, count in ((0.1, 1), (stability - 1e-3, 1), (stability + 1e-3, 0)):
        result = generate_from(logits[None], [0.9], size[::-1], monkeypatch, stability_score_thresh=threshold)
        assert len(result["masks"]) == count
        assert all(iou(found, mask) > 0.999 for found in result["masks"])


def test_large_masks_that_are_not_stable_are_never_enlarged(monkeypatch) -> None:
    logits = torch.full((256, 256), -6.0)
    logits[40:200, 40:200] = 0.5
    logits[60:180, 60:180] = 3.0
    monkeypatch.setattr(module._Crop, "_exact_masks", lambda *a: pytest.fail("brought to the size of the image"))
    assert generate_from(logits[None], [0.9], (900, 700), monkeypatch, stability_score_thresh=0.8)["masks"] == []


def test_logits_are_held_until_the_memory_for_them_is_full(monkeypatch) -> None:
    monkeypatch.setattr(candidates, "HELD_CELLS", 2 * 81 + 40)
    masks = torch.arange(4.0)[:, None, None] + torch.rand(4, 64, 64, generator=torch.Generator().manual_seed(0))
    windows = torch.tensor([[20, 30, 20, 30], [0, 0, 60, 60], [63, 63, 63, 63], [40, 10, 40, 10]])
    held = candidates.HeldWindows()
    places = [*held.add(masks[:1], windows[:1]).tolist(), *held.add(masks[1:], windows[1:]).tolist()]
    assert [place >= 0 for place in places] == [True, False, True, True]  # the second one is too large
    for index, cells in ((0, 81), (2, 25), (3, 81)):
        window = windows[index].tolist()
        logits, near = held.get(places[index], window), cells_near(window)
        assert torch.equal(logits[near], masks[index][near])
        assert logits.count_nonzero() == cells
    assert len(held.block) == 2 * 81 + 40


def test_cleaned_masks_have_no_small_regions(generator, picture) -> None:
    from scipy import ndimage

    result = generator(picture, max_hole_area=60, max_sprinkle_area=60)
    for mask in result["masks"]:
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        sizes = np.bincount(labels.reshape(-1))[1:]
        assert count == 1 or sizes.min() > 60
        holes, _ = ndimage.label(~mask, np.ones((3, 3)))
        assert not (np.bincount(holes.reshape(-1))[1:] <= 60).any()


# Pictures of every kind


def test_pictures_of_every_kind(generator, picture, tmp_path: Path) -> None:
    expected = generator(picture)
    assert same_masks(generator(np.asarray(picture)), expected)
    for mode in ("RGBA", "L", "P", "CMYK"):
        path = tmp_path / f"{mode}.tif"
        picture.convert(mode).save(path)
        assert len(generator(path)["masks"]) > 3
    several = generator([picture, picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)])
    assert len(several) == 2 and all(iou(a, b) > 0.99 for a, b in zip(several[0]["masks"], expected["masks"]))


@pytest.mark.parametrize("thresholds", [0.0, 0.99])
@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (64, 64)])
def test_pictures_without_anything_on_them(generator, size, thresholds: float) -> None:
    result = generator(
        Image.new("RGB", size),
        points_per_crop=3,
        pred_iou_thresh=thresholds,
        stability_score_thresh=thresholds,
        max_hole_area=2,
    )
    assert result["boxes"].shape == (len(result["masks"]), 4) and result["points"].shape == (len(result["masks"]), 2)
    if thresholds:
        assert result["masks"] == [] and len(result["scores"]) == 0


def test_plain_and_very_flat_pictures_at_the_usual_thresholds(generator) -> None:
    """What is one pixel thick is no exception to suppression, and nothing is found on nothing."""
    for color, pred_iou, stability in (("black", 0.88, 0.95), ("gray", 0.5, 0.6)):
        thresholds = {"pred_iou_thresh": pred_iou, "stability_score_thresh": stability}
        plain = generator(Image.new("RGB", (300, 200), color), points_per_crop=8, **thresholds)
        assert plain["masks"] == []
    for size in ((10_000, 1), (1, 10_000)):
        boxes = generator(Image.new("RGB", size), points_per_crop=5, pred_iou_thresh=0, stability_score_thresh=0)[
            "boxes"
        ]
        assert len(boxes) and len(boxes) == len(boxes.unique(dim=0))
        assert (box_iou(boxes, boxes).fill_diagonal_(0) <= 0.7).all()


def test_boxes_one_pixel_thick_overlap_too() -> None:
    boxes = torch.tensor([[0, 5, 9, 5], [0, 5, 4, 5], [20, 5, 29, 5], [0, 6, 9, 6], [3, 3, 3, 3], [0, 0, 9, 9]])
    ious = box_iou(boxes, boxes)
    assert torch.equal(ious.diagonal(), torch.ones(len(boxes)))
    assert ious[0, 1] == pytest.approx(4 / 9) and ious[0, 2] == ious[0, 3] == 0
    assert ious[0, 5] == pytest.approx(9 / (9 * 10))  # sides are differences, but the one that would be nothing
    assert ious[4, 5] == pytest.approx(1 / 100)


def test_damaged_and_deep_pictures(generator, tmp_path: Path, picture) -> None:
    Image.fromarray(np.zeros((9, 9), np.uint16)).save(tmp_path / "deep.png")
    picture.save(tmp_path / "whole.jpg")
    (tmp_path / "half.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:2000])
    for name, words in (("deep.png", "8 bits"), ("half.jpg", "truncated")):
        with pytest.raises(ValueError, match=words):
            generator(tmp_path / name)


# Options


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"points_per_crop": 0}, ValueError, "points_per_crop must be a whole number of at least 1, got 0"),
        ({"points_per_crop": 10**9}, ValueError, "points_per_crop must be at most 1024, got 1000000000"),
        ({"points_per_batch": 0}, ValueError, "points_per_batch"),
        ({"points_per_batch": True}, ValueError, "points_per_batch must be a whole number of at least 1, got True"),
        ({"crops_n_layers": 10**5000}, ValueError, "crops_n_layers .{0,90} cuts each side of an image"),
        ({"crop_n_points_downscale_factor": 1e308, "crops_n_layers": 2}, ValueError, "crop_n_points_downscale_factor"),
        ({"mask_threshold": 10**400}, ValueError, "mask_threshold must be a number, got .{0,90}$"),
        ({"stability_score_offset": 10**400}, ValueError, "stability_score_offset must be at least 0, got .{0,90}$"),
        ({"fill_holes": 10**400}, ValueError, "fill_holes must be a fraction of at least 0, got .{0,90}$"),
        ({"max_hole_area": float("nan")}, ValueError, "max_hole_area must be at least 0, got nan"),
        ({"output_type": ["rle"]}, ValueError, "output_type must be one of bool, rle, coco_rle, got"),
        ({"sort_by": "x" * 10**6}, ValueError, "sort_by must be one of score, area, got .{0,90}$"),
        ({"x" * 10**6: 1}, TypeError, "unknown option .{0,90} of mask generation"),
        ({"pred_iou_thresh": 1.5}, ValueError, "pred_iou_thresh must be a number from 0 to 1, got 1.5"),
        ({"stability_score_thresh": -0.1}, ValueError, "stability_score_thresh"),
        ({"crops_nms_thresh": 7}, ValueError, "crops_nms_thresh"),
        ({"crops_n_layers": -1}, ValueError, "crops_n_layers"),
        ({"crops_n_layers": 4}, ValueError, "crops_n_layers 4 cuts each side of an image of 230 x 150"),
        ({"pred_iou_thresh": None}, ValueError, "pred_iou_thresh must be a number from 0 to 1, got None"),
        ({"pred_iou_thresh": "0.5"}, ValueError, "pred_iou_thresh must be a number from 0 to 1, got '0.5'"),
        ({"mask_threshold": float("nan")}, ValueError, "mask_threshold must be a number, got nan"),
        ({"crop_overlap_ratio": 1.0}, ValueError, "crop_overlap_ratio"),
        ({"max_hole_area": -1}, ValueError, "max_hole_area"),
        ({"output_type": "png"}, ValueError, "output_type must be one of bool, rle, coco_rle, got 'png'"),
        ({"sort_by": "name"}, ValueError, "sort_by"),
        ({"output_rle_mask": "no"}, ValueError, "output_rle_mask must be True or False, got 'no'"),
        ({"output_bboxes_mask": 1}, ValueError, "output_bboxes_mask must be True or False, got 1"),
        ({"points_per_side": 32}, TypeError, "unknown option 'points_per_side'"),
    ],
)
def test_wrong_options(generator, picture, options, error, words: str) -> None:
    with pytest.raises(error, match=words):
        generator(picture, **options)


@pytest.mark.parametrize(
    ("count", "options", "steps"),
    [
        (1, {"points_per_batch": 10}, 4 + 1),  # 36 points, and the masks of the picture
        (1, {"points_per_batch": None}, 1 + 1),
        (3, {"points_per_batch": 36}, 3 * (1 + 1)),
        (1, {"points_per_batch": 12, "crops_n_layers": 1}, 5 * (3 + 1)),
        (2, {"points_per_batch": 12, "crops_n_layers": 1, "crop_n_points_downscale_factor": 2}, 2 * (4 + 4 * (1 + 1))),
    ],
)
def test_progress_is_told_of_all_images_crops_and_batches(
    generator, picture, monkeypatch, count: int, options, steps: int
) -> None:
    monkeypatch.setattr(module, "IMAGES_AT_ONCE", 2)
    told: list[float] = []
    images = picture if count == 1 else [picture] * count
    result = generator(images, progress=told.append, **options)
    assert told == [step / steps for step in range(1, steps + 1)]
    expected = generator(images, **options)
    for one, other in zip(*(([found] if count == 1 else found) for found in (result, expected))):
        assert same_masks(one, other)


def test_progress_is_told_of_nothing_where_there_is_nothing(generator, picture) -> None:
    told: list[float] = []
    assert generator([], progress=told.append) == []
    with pytest.raises(ValueError, match="crops_n_layers 5000 cuts"):
        generator(picture, progress=told.append, crops_n_layers=5000, crop_n_points_downscale_factor=2.5)
    assert not told
    with pytest.raises(TypeError, match="progress must be a function of the finished fraction, or None, got True"):
        generator(picture, progress=True)
    with pytest.raises(TypeError, match="unknown option 'progress'"):
        EfficientSamMaskGenerator(generator.model, generator.image_processor, progress=told.append)


def test_what_the_stock_pipeline_takes_is_taken(generator, picture) -> None:
    expected = generator(picture)
    stock = {"points_per_batch": None, "max_hole_area": None, "max_sprinkle_area": None, "box_nms_thresh": None}
    result = generator(picture, **stock, points_per_crop=np.int64(6))
    assert len(result["masks"]) == len(expected["masks"])


def test_the_threshold_within_a_crop(generator, picture) -> None:
    loose, strict = (generator(picture, box_nms_thresh=value) for value in (0.95, 0.2))
    assert len(strict["masks"]) < len(generator(picture)["masks"]) < len(loose["masks"])
    boxes = strict["boxes"]
    overlaps = module.box_iou(boxes, boxes).fill_diagonal_(0)
    assert overlaps.max() <= 0.2


def test_other_models_and_processors(model) -> None:
    with pytest.raises(TypeError, match="for EfficientSAM models, got a Linear"):
        EfficientSamMaskGenerator(torch.nn.Linear(1, 1), EfficientSamImageProcessor(size=64))
    with pytest.raises(TypeError, match="processor is a NoneType, expected an EfficientSamProcessor"):
        EfficientSamMaskGenerator(model, None)
    with pytest.raises(ValueError, match="must be square"):
        EfficientSamMaskGenerator(model, EfficientSamImageProcessor(size={"height": 64, "width": 128}))
    with pytest.raises(ValueError, match="do_resize of the image processor must be True"):
        EfficientSamMaskGenerator(model, EfficientSamImageProcessor(size=64, do_resize=False))


def test_options_of_the_checkpoint_and_of_the_caller(model, tmp_path: Path) -> None:
    own = {"pred_iou_thresh": 0.7, "stability_score_thresh": 0.9}
    EfficientSamImageProcessor(size=64, mask_generation=own).save_pretrained(tmp_path)
    loaded = EfficientSamImageProcessor.from_pretrained(tmp_path)
    assert EfficientSamMaskGenerator(model, loaded).options == MaskGenerationOptions(**own)
    changed = EfficientSamMaskGenerator(model, loaded, pred_iou_thresh=0.1, points_per_crop=5)
    assert changed.options == MaskGenerationOptions(**{**own, "pred_iou_thresh": 0.1, "points_per_crop": 5})
    with pytest.raises(TypeError, match="unknown option 'thresh'"):
        EfficientSamMaskGenerator(model, EfficientSamImageProcessor(size=64, mask_generation={"thresh": 1}))


# The pipeline


def test_pipeline_is_ours_from_a_folder_and_from_an_object(model, processor, picture, generator, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    named = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"]["mask-generation"]["impl"]
    assert named == "mask_generation_efficientsam.EfficientSamMaskGenerationPipeline"
    assert (tmp_path / "mask_generation_efficientsam.py").is_file()
    for given in ({"model": str(tmp_path)}, {"model": model, "image_processor": processor.image_processor}):
        generate = pipeline("mask-generation", **given)
        assert isinstance(generate, EfficientSamMaskGenerationPipeline)
        assert same_masks(generate(picture, **LOW), generator(picture))


def test_a_config_keeps_the_name_of_its_pipeline(tmp_path: Path, model) -> None:
    model.save_pretrained(tmp_path / "one")
    EfficientSamConfig.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("one", "two"))
    assert one["custom_pipelines"] == two["custom_pipelines"]


def test_pipeline_of_other_models_is_the_stock_one() -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64, "mlp_dim": 32}
    sam = SamModel(SamConfig(vision_config={**vision, "output_channels": 16}))
    generate = pipeline("mask-generation", model=sam, image_processor=SamImageProcessor())
    assert type(generate) is MaskGenerationPipeline


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_pipeline_in_batches(model, processor, picture, batch_size: int) -> None:
    generate = pipeline("mask-generation", model=model, image_processor=processor.image_processor, **LOW)
    pictures = [picture, picture.rotate(90, expand=True), picture.crop((0, 0, 100, 100))]
    expected = [generate(one) for one in pictures]
    for given in (pictures, (one for one in pictures)):
        results = list(generate(given, batch_size=batch_size))
        assert [mask["masks"][0].shape for mask in results] == [(150, 230), (230, 150), (100, 100)]
        for result, other in zip(results, expected):
            torch.testing.assert_close(result["scores"], other["scores"], rtol=0, atol=1e-4)


class _InOrder(torch.utils.data.IterableDataset):
    def __init__(self, images: list):
        self.images = images

    def __iter__(self):
        return iter(self.images)


class _ByIndex(torch.utils.data.Dataset):
    """Without an end of its own, which `iter` would need."""

    def __init__(self, images: list):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int):
        return self.images[index % len(self.images)]


@pytest.mark.parametrize("dataset", [_InOrder, _ByIndex])
def test_pipeline_reads_data_sets(model, processor, picture, dataset) -> None:
    generate = pipeline("mask-generation", model=model, image_processor=processor.image_processor, **LOW)
    results = list(generate(dataset([picture, picture.crop((0, 0, 100, 100))]), batch_size=2))
    assert [result["masks"][0].shape for result in results] == [(150, 230), (100, 100)]


@pytest.fixture
def served(tmp_path: Path, picture):
    """Address of a folder with a picture of 8 bits, small.png, and one of 16 bits, deep.png."""
    picture.save(tmp_path / "small.png")
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 256).save(tmp_path / "deep.png")

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=tmp_path)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("route", ["path", "URL", "URL and timeout", "base64", "base64 in lines", "data URL"])
def test_pipeline_reads_text_like_a_file(model, processor, picture, generator, tmp_path, served, route: str) -> None:
    """A picture of more than 8 bits is the same error whichever way it comes."""
    generate = pipeline("mask-generation", model=model, image_processor=processor.image_processor, **LOW)

    def given(name: str) -> str:
        if "URL" in route and route != "data URL":
            return f"{served}/{name}"
        text = base64.encodebytes((tmp_path / name).read_bytes()).decode()
        plain = text.replace("\n", "")
        texts = {"base64": plain, "base64 in lines": text, "data URL": f"data:image/png;base64,{plain}"}
        return texts.get(route, str(tmp_path / name))

    options = {"timeout": 20.0} if route == "URL and timeout" else {}
    assert same_masks(generate(given("small.png"), **options), generator(picture))
    with pytest.raises(ValueError, match="has mode I;16, expected 8 bits a channel"):
        generate(given("deep.png"), **options)


def test_pipeline_says_what_is_not_there(model, processor, served) -> None:
    generate = pipeline("mask-generation", model=model, image_processor=processor.image_processor)
    with pytest.raises(FileNotFoundError, match=r"'nowhere.png' does not exist"):
        generate("nowhere.png")
    for options in ({}, {"timeout": 20.0}):
        with pytest.raises(OSError, match=r"cannot download http://.*nowhere.png: HTTP Error 404"):
            generate(f"{served}/nowhere.png", **options)
    with pytest.raises(ValueError, match="is not a picture that Pillow can read"):
        generate(base64.b64encode(b"no picture at all").decode())


def test_pipeline_refuses_what_it_does_not_know(model, processor, picture) -> None:
    with pytest.raises(TypeError, match="unknown option 'point_per_crop'"):
        pipeline("mask-generation", model=model, image_processor=processor.image_processor, point_per_crop=3)
    generate = pipeline("mask-generation", model=model, image_processor=processor.image_processor)
    with pytest.raises(ValueError, match="points_per_batch"):
        generate(picture, points_per_batch=0)


def test_pipeline_has_the_generator_that_tells_progress(model, processor, picture, generator) -> None:
    pipe = pipeline("mask-generation", model=model, image_processor=processor.image_processor)
    told: list[float] = []
    assert same_masks(pipe.mask_generator(picture, progress=told.append, **LOW), generator(picture))
    assert told[-1] == 1
    with pytest.raises(TypeError, match="unknown option 'progress'"):
        pipe(picture, progress=told.append)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_gives_the_same_masks(model, processor, picture, dtype: torch.dtype) -> None:
    """Every mask has its partner, in either direction, and all together share 99 % of their pixels."""
    half = EfficientSamModel.from_pretrained(default_checkpoint(), dtype=dtype)
    options = LOW | {"pred_iou_thresh": 0.46}  # no mask is so near to it that rounding decides
    result, expected = (EfficientSamMaskGenerator(one, processor, **options)(picture) for one in (half, model))
    assert result["scores"].dtype == torch.float32 and len(expected["masks"]) > 5
    for masks, others in ((result["masks"], expected["masks"]), (expected["masks"], result["masks"])):
        partners = [max(others, key=lambda other: iou(mask, other)) for mask in masks]
        assert min(map(iou, masks, partners)) > 0.9
        assert iou(np.stack(masks), np.stack(partners)) >= 0.99


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (2000, 1), (1, 2000)])
def test_an_object_that_no_pixel_sees_is_no_mask(size, monkeypatch) -> None:
    """Also where the threshold is below zero, which is what nothing looks like."""
    logits = torch.full((1, 256, 256), -9.0)
    logits[0, :8, :8] = 4.0
    whole = EfficientSamImageProcessor(size=1024).post_process_masks(
        logits[None, None], [size[::-1]], mask_threshold=-2.0
    )[0]
    result = generate_from(logits, [0.9], size, monkeypatch, mask_threshold=-2.0)
    assert len(result["masks"]) == int(whole.any())
    assert sum(int(mask.sum()) for mask in result["masks"]) == int(whole.sum())


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (24, 16)])
def test_tiny_pictures_lose_no_stable_mask(size, monkeypatch) -> None:
    """A pixel of theirs is many cells, of which the few above a threshold say little about stability."""
    rows, columns = torch.meshgrid(torch.arange(256.0), torch.arange(256.0), indexing="ij")
    generator, stable = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        y, x, radius = (torch.rand(3, generator=generator) * torch.tensor([256, 256, 40])).tolist()
        logits = ((radius - ((rows - y) ** 2 + (columns - x) ** 2).sqrt()) * 0.4).clamp(-12, 12)
        stability, mask = full_stability(logits, size[::-1])
        if not mask.any() or stability <= 0.01:
            continue
        stable += 1
        result = generate_from(logits[None], [0.9], size, monkeypatch, stability_score_thresh=stability - 1e-3)
        assert len(result["masks"]) == 1
    assert stable > 10
