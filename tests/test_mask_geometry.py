# SPDX-License-Identifier: Apache-2.0
"""Segment everything: each step against the plainest way to write it, and the stock pipeline on top of them."""

import inspect
import sys
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import MaskGenerationPipeline

from efficientsam_hf import EfficientSamConfig, EfficientSamImageProcessor, EfficientSamModel
from efficientsam_hf.models.mask_geometry_efficientsam import (
    box_iou,
    boxes_of_changes,
    column_changes,
    count_pixels,
    crop_boxes_of_layers,
    layer_of_crop,
    masks_to_boxes,
    near_crop_edge,
    non_maximum_suppression,
    point_grid,
    stability_scores,
)
from efficientsam_hf.models.rle_efficientsam import changes_to_runs, decode_rle, mask_to_counts, runs_to_counts


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def random_boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    corner = torch.randint(0, 40, (count, 2), generator=generator)
    return torch.cat([corner, corner + torch.randint(1, 30, (count, 2), generator=generator)], dim=1)


def plain_iou(first: list[int], second: list[int]) -> float:
    width = max(0, min(first[2], second[2]) - max(first[0], second[0]))
    height = max(0, min(first[3], second[3]) - max(first[1], second[1]))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return width * height / (sum(areas) - width * height)


# Steps


def test_box_iou(generator) -> None:
    first, second = random_boxes(20, generator), random_boxes(30, generator)
    expected = [[plain_iou(a, b) for b in second.tolist()] for a in first.tolist()]
    torch.testing.assert_close(box_iou(first, second), torch.tensor(expected))


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
def test_non_maximum_suppression(threshold, generator) -> None:
    boxes = random_boxes(200, generator)
    scores = torch.rand(200, generator=generator)
    kept = []
    for index in sorted(range(200), key=lambda i: -scores[i]):
        if all(plain_iou(boxes[index].tolist(), boxes[other].tolist()) <= threshold for other in kept):
            kept.append(index)
    assert 10 < len(kept) < 190
    assert non_maximum_suppression(boxes, scores, threshold).tolist() == kept
    assert non_maximum_suppression(boxes[:0], scores[:0], threshold).tolist() == []


def test_masks_to_boxes(generator) -> None:
    masks = torch.rand(30, 12, 17, generator=generator) > 0.985
    masks[0], masks[1], masks[2] = False, True, False
    masks[2, 11, 16] = True
    boxes = masks_to_boxes(masks)
    for mask, box in zip(masks.numpy(), boxes.tolist()):
        rows, columns = np.nonzero(mask)
        expected = [columns.min(), rows.min(), columns.max(), rows.max()] if len(rows) else [0, 0, 0, 0]
        assert box == expected
    assert boxes.dtype == torch.int64


def test_count_pixels(generator) -> None:
    masks = torch.rand(5, 37, 61, generator=generator) > torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])[:, None, None]
    expected = masks.flatten(1).sum(1)
    assert torch.equal(count_pixels(masks), expected)
    assert torch.equal(count_pixels(masks.transpose(1, 2)), expected)
    assert count_pixels(masks[:0]).shape == (0,)


def test_stability_scores(generator) -> None:
    logits = 3 * torch.randn(10, 8, 9, generator=generator)
    logits[0] = -100
    scores = stability_scores(logits, 0.5, 1.0)
    for score, values in zip(scores.tolist(), logits.numpy()):
        inner, outer = (values > 1.5).sum(), (values > -0.5).sum()
        assert score == pytest.approx(inner / outer if outer else 0.0)


def test_point_grid() -> None:
    grid = point_grid(4)
    assert grid.tolist() == [[(x + 0.5) / 4, (y + 0.5) / 4] for y in range(4) for x in range(4)]


@pytest.mark.parametrize(("height", "width"), [(100, 100), (71, 240), (333, 67), (134, 134), (129, 129)])
def test_crops_cover_the_image_and_overlap(height: int, width: int) -> None:
    boxes = crop_boxes_of_layers(height, width, 2, 0.3)
    assert boxes[0] == [0, 0, width, height] and len(boxes) == 1 + 4 + 16
    assert [layer_of_crop(index) for index in range(21)] == [0] + [1] * 4 + [2] * 16
    for layer, start, count in ((1, 1, 2), (2, 5, 4)):
        covered = np.zeros((height, width), int)
        for x0, y0, x1, y1 in boxes[start : start + count**2]:
            assert 0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height
            covered[y0:y1, x0:x1] += 1
        assert covered.min() == 1
        overlap = int(0.3 * min(height, width) * 2 / count)
        # Neighbours share `overlap` columns, and one more where that leaves none over.
        assert boxes[start][2] - boxes[start + 1][0] in (overlap, overlap + 1), layer
        assert len({(x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes[start : start + count**2]}) == 1


def test_masks_at_inner_edges_of_a_crop(generator) -> None:
    size, crop = (200, 300), [100, 0, 250, 120]
    corner = torch.randint(0, 90, (100, 2), generator=generator)
    boxes = torch.cat([corner, corner + torch.randint(5, 30, (100, 2), generator=generator)], dim=1)
    expected = []
    for x0, y0, x1, y1 in boxes.tolist():
        # The left, right and lower edge of this crop are inside the image; its upper edge is the image's.
        expected.append(x0 <= 20 or 100 + x0 >= 230 or 100 + x1 >= 230 or x1 <= 20 or y1 >= 100 or y0 >= 100)
    assert 10 < sum(expected) < 90
    assert near_crop_edge(boxes, crop, size).tolist() == expected
    assert not near_crop_edge(boxes, [0, 0, 300, 200], size).any()


@pytest.mark.parametrize(
    ("crop_left", "left", "near"),
    [(100, 19, True), (100, 20, True), (100, 21, False), (10, 9, False), (10, 10, False), (10, 11, True)],
)
def test_twenty_pixels_are_near_as_in_sam(crop_left: int, left: int, near: bool) -> None:
    """SAM compares by `isclose` with an absolute tolerance: exactly 20 is near, to the crop and to the image."""
    crop, box = [crop_left, 0, 300, 200], torch.tensor([[left, 50, 150, 120]])
    whole = (box + torch.tensor([crop_left, 0] * 2)).float()
    to_crop, to_image = (
        torch.isclose(whole, torch.tensor([edges]).float(), atol=20.0, rtol=0) for edges in (crop, [0, 0, 300, 200])
    )
    assert bool((to_crop & ~to_image).any()) is near
    assert near_crop_edge(box, crop, (200, 300)).tolist() == [near]


# Steps of the image processor


def test_crops_and_their_points() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    processor = EfficientSamImageProcessor(size=64)
    boxes, points, crops, labels = processor.generate_crop_boxes(
        Image.fromarray(pixels), 64, crop_n_layers=1, points_per_crop=4, crop_n_points_downscale_factor=2
    )
    assert boxes.tolist() == crop_boxes_of_layers(60, 90, 1, 512 / 1500)
    for box, crop in zip(boxes.tolist(), crops):
        x0, y0, x1, y1 = box
        np.testing.assert_array_equal(crop.permute(1, 2, 0).numpy(), pixels[y0:y1, x0:x1])
    assert points.shape == (1, 16, 5, 2) and points.dtype == torch.float32
    assert labels.shape == (1, 16, 5) and (labels == 1).all()
    # A cell is 16 pixels wide; the model reads a coordinate as a pixel's centre.
    assert points[0, :5, 0].tolist() == [[7.5, 7.5], [23.5, 7.5], [39.5, 7.5], [55.5, 7.5], [7.5, 23.5]]
    for crop in range(1, 5):
        assert points[0, :4, crop].tolist() == [[15.5, 15.5], [47.5, 15.5], [15.5, 47.5], [47.5, 47.5]]
        assert points[0, 4:, crop].tolist() == [[47.5, 47.5]] * 12


def test_filter_masks_written_out(generator) -> None:
    processor = EfficientSamImageProcessor(size=64)
    size, crop = (90, 140), [40, 10, 120, 80]
    rows, columns = torch.meshgrid(torch.arange(70.0), torch.arange(80.0), indexing="ij")
    logits = torch.empty(40, 3, 70, 80)
    for index, mask in enumerate(logits.flatten(0, 1)):
        x, y = torch.rand(2, generator=generator) * torch.tensor([80, 70])
        radius, sharpness = 2 + 12 * torch.rand(2, generator=generator)
        mask.copy_(sharpness * (radius - ((columns - x) ** 2 + (rows - y) ** 2).sqrt()))
        if index % 10 == 0:
            mask.fill_(-5)
    scores = torch.rand(40, 3, generator=generator)
    rles, kept_scores, kept_boxes = processor.filter_masks(logits, scores, size, crop, 0.3, 0.9, 0.0, 1.0)
    expected = []
    for mask, score in zip(logits.flatten(0, 1), scores.flatten()):
        stable = ((mask > 1).sum() / (mask > -1).sum().clamp(min=1)) > 0.9
        if not (score > 0.3 and stable and (mask > 0).any()):
            continue
        box = masks_to_boxes(mask[None] > 0)
        if near_crop_edge(box, crop, size)[0]:
            continue
        whole = torch.zeros(size, dtype=torch.bool)
        whole[10:80, 40:120] = mask > 0
        expected.append((whole, score))
    assert 3 < len(expected) < 90
    assert len(rles) == len(expected) == len(kept_scores) == len(kept_boxes)
    torch.testing.assert_close(kept_scores, torch.stack([score for _, score in expected]))
    for rle, box, (whole, _) in zip(rles, kept_boxes, expected):
        np.testing.assert_array_equal(decode_rle(rle), whole.numpy())
        assert torch.equal(box, masks_to_boxes(whole[None])[0])


# The stock pipeline


KEEP_ALL = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}


@pytest.fixture(scope="module")
def model() -> EfficientSamModel:
    torch.manual_seed(0)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
    config = EfficientSamConfig(
        vision_config={**vision, "output_channels": 32},
        prompt_encoder_config={"hidden_size": 32},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2},
    )
    return EfficientSamModel(config).eval()


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 60))


def run(model: EfficientSamModel, picture: Image.Image, dtype: torch.dtype = torch.float32, **kwargs: Any) -> dict:
    generate = MaskGenerationPipeline(model=model, image_processor=EfficientSamImageProcessor(size=64), dtype=dtype)
    return generate(picture, **{"points_per_crop": 4, "points_per_batch": 8, **KEEP_ALL, **kwargs})


def test_pipeline_needs_no_torchvision(model, picture, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)  # an import of it fails
    assert run(model, picture)["masks"]


@torch.no_grad()
def test_pipeline_gives_what_its_steps_give(model, picture) -> None:
    """Every point's three masks, duplicates dropped, best first."""
    result = run(model, picture, crops_nms_thresh=0.5)
    processor = EfficientSamImageProcessor(size=64)
    pixel_values = processor(picture, return_tensors="pt")["pixel_values"]
    points = (point_grid(4) * 64 - 0.5)[None, :, None]
    outputs = model(pixel_values, points)
    masks = processor.post_process_masks(outputs.pred_masks, [(60, 90)], binarize=False)[0].flatten(0, 1) > 0
    scores = outputs.iou_scores.flatten()
    real = masks.flatten(1).any(1)
    masks, scores = masks[real], scores[real]
    order = non_maximum_suppression(masks_to_boxes(masks), scores, 0.5)
    assert len(order) == len(result["masks"])
    torch.testing.assert_close(result["scores"], scores[order], rtol=0, atol=1e-5)
    for mask, index in zip(result["masks"], order):
        assert np.mean(mask != masks[index].numpy()) < 0.002


# Earlier pipelines embed all crops as one batch but prompt it as one image, which SAM refuses too.
@pytest.mark.skipif(
    "full_image_size" not in inspect.getsource(MaskGenerationPipeline),
    reason="this transformers prompts no crops (transformers#35530)",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pipeline_with_crops(dtype, model, picture) -> None:
    model = EfficientSamModel.from_pretrained(None, config=model.config, state_dict=model.state_dict(), dtype=dtype)
    result = run(
        model,
        picture,
        dtype,
        crops_n_layers=1,
        crop_n_points_downscale_factor=2,
        crops_nms_thresh=1.0,
        output_rle_mask=True,
        output_bboxes_mask=True,
    )
    assert set(result) >= {"masks", "scores", "rle_mask", "bounding_boxes"}
    count = len(result["masks"])
    assert count > 3 and len(result["scores"]) == len(result["rle_mask"]) == len(result["bounding_boxes"]) == count
    assert result["scores"].dtype == torch.float32
    assert result["scores"].tolist() == sorted(result["scores"].tolist(), reverse=True)
    for mask, rle, box in zip(result["masks"], result["rle_mask"], result["bounding_boxes"]):
        assert mask.shape == (60, 90) and mask.dtype == bool and mask.any()
        np.testing.assert_array_equal(decode_rle(rle), mask)
        assert masks_to_boxes(torch.from_numpy(mask)[None])[0].tolist() == box.tolist()


def test_pipeline_without_a_single_good_mask(model, picture) -> None:
    result = run(model, picture, pred_iou_thresh=100.0)
    assert result["masks"] == [] and len(result["scores"]) == 0


def test_pipeline_in_half_precision_agrees(model, picture) -> None:
    exact, half = (
        run(model.to(dtype), picture, dtype, crops_nms_thresh=1.0) for dtype in (torch.float32, torch.bfloat16)
    )
    model.float()
    count = len(exact["masks"])
    assert abs(len(half["masks"]) - count) <= 0.1 * count
    best = [max((mask & other).sum() / (mask | other).sum() for other in exact["masks"]) for mask in half["masks"]]
    assert np.mean(best) > 0.9


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (9, 1), (13, 7), (40, 31)])
def test_outlines_say_what_pixels_say(size: tuple[int, int]) -> None:
    """Boxes, areas and runs of empty and full masks, of such that touch borders, and of noise."""
    generator = torch.Generator().manual_seed(0)
    masks = [torch.zeros(size), torch.ones(size), torch.zeros(size)]
    masks += [(torch.rand(size, generator=generator) < share).float() for share in (0.05, 0.5, 0.95)]
    masks = torch.stack([*masks, torch.ones(size)]).bool()
    masks[-1, :-1] = False
    changes = column_changes(masks)
    boxes, areas = boxes_of_changes(changes.numpy(), len(masks))
    assert torch.equal(boxes, masks_to_boxes(masks)) and torch.equal(areas, count_pixels(masks))
    whole = (size[0] + 5, size[1] + 3)
    for index, mask in enumerate(masks):
        placed = np.zeros(whole, bool)
        placed[2 : 2 + size[0], 1 : 1 + size[1]] = mask
        _, columns, rows = changes[changes[:, 0] == index].numpy().T
        runs = changes_to_runs(columns, rows, (1, 2), whole)
        np.testing.assert_array_equal(runs_to_counts(runs, placed.size), mask_to_counts(placed))
