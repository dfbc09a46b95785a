# SPDX-License-Identifier: Apache-2.0
"""Whole masks: connected parts, holes and boxes, at low resolution and at the image's."""

import numpy as np
import pytest
import torch

from efficientsam_hf import EfficientSamImageProcessor, EfficientSamMaskGenerator, EfficientSamPredictor
from efficientsam_hf.models.mask_cleaning_efficientsam import MaskCleaning, Parts, clean_logits, clean_masks


def draw(*rows: str) -> torch.Tensor:
    """Logits (h, w): 3 for a #, -3 for anything else."""
    return torch.tensor([[3.0 if pixel == "#" else -3.0 for pixel in row] for row in rows])


def cleaned(logits: torch.Tensor, click=None, label: int = 1, box=None, **options) -> list[str]:
    """What is left of one mask, as `draw` takes it."""
    prompts = {}
    if click is not None:
        prompts = {"clicks": torch.tensor([[click]], dtype=torch.float), "labels": torch.tensor([[label]])}
    if box is not None:
        prompts["boxes"] = torch.tensor([box], dtype=torch.float)
    result = clean_logits(logits[None, None], MaskCleaning(**options), **prompts)[0, 0]
    return ["".join("#" if value >= 0 else "." for value in row) for row in result]


TWO_PARTS = ("##...", "##.#.", ".....")
RING = (".....", ".###.", ".#.#.", ".###.", ".....")


@pytest.mark.parametrize("corners", [True, False])
def test_parts_are_those_of_scipy(corners: bool) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    generator = np.random.default_rng(0)
    for share in np.linspace(0, 1, 40):
        mask = generator.random((17, 23)) < share
        parts = Parts.of(mask, corners)
        own = np.zeros(mask.shape, int)
        for number, row, start, end in zip(parts.numbers, parts.rows, parts.starts, parts.ends):
            own[row, start:end] = number + 1
        expected, count = ndimage.label(mask, np.ones((3, 3)) if corners else None)
        assert ((own > 0) == mask).all()
        assert len(set(zip(own.ravel(), expected.ravel()))) == count + (not mask.all()) == len(np.unique(own))
        for number, area in zip(parts.numbers, parts.areas):
            assert area == (own == number + 1).sum()


def test_a_spiral_is_one_part() -> None:
    spiral = np.zeros((41, 41), bool)
    x = y = 0
    dx, dy, side = 1, 0, 40
    while side > 0:
        for _ in range(2):
            for _ in range(side):
                spiral[y, x] = True
                x, y = x + dx, y + dy
            dx, dy = -dy, dx
        side -= 2
    assert len(set(Parts.of(spiral, corners=False).numbers)) == 1


def test_the_clicked_part_stays_and_without_a_click_the_largest() -> None:
    assert cleaned(draw(*TWO_PARTS), click=(3.5, 1.5), largest_part=True) == [".....", "...#.", "....."]
    assert cleaned(draw(*TWO_PARTS), largest_part=True) == ["##...", "##...", "....."]
    # a click that the mask does not reach, and one on the background, say nothing of the part
    assert cleaned(draw(*TWO_PARTS), click=(4.5, 2.5), largest_part=True) == ["##...", "##...", "....."]
    assert cleaned(draw(*TWO_PARTS), click=(3.5, 1.5), label=0, largest_part=True) == ["##...", "##...", "....."]


def test_parts_that_touch_at_a_corner_are_one() -> None:
    assert cleaned(draw("#..", ".#.", "..."), largest_part=True) == ["#..", ".#.", "..."]


def test_an_empty_and_a_full_mask_stay() -> None:
    options = {"largest_part": True, "fill_holes": 1.0, "within_box": True}
    assert cleaned(draw("..", ".."), click=(0.5, 0.5), **options) == ["..", ".."]
    assert cleaned(draw("##", "##"), **options) == ["##", "##"]


def test_holes_up_to_a_share_are_filled_but_not_those_that_were_clicked() -> None:
    filled = [".....", ".###.", ".###.", ".###.", "....."]
    assert cleaned(draw(*RING), fill_holes=0.2) == filled
    assert cleaned(draw(*RING), fill_holes=0.1) == list(RING)
    assert cleaned(draw(*RING), click=(2.5, 2.5), label=0, fill_holes=1.0) == list(RING)
    assert cleaned(draw(*RING), click=(0.5, 0.5), label=0, fill_holes=1.0) == filled
    assert cleaned(draw("###", "#.#", "#.#"), fill_holes=1.0) == ["###", "#.#", "#.#"]  # open below


def test_what_lies_beyond_the_box_goes() -> None:
    logits = draw(".########", "#########")
    assert cleaned(logits, box=(0, 0, 3, 1), within_box=True) == [".##......", "........."]
    assert cleaned(logits, box=(1.4, 0, 3.6, 2), within_box=True) == [".###.....", ".###....."]
    assert cleaned(logits, box=(-1, -1, -1, -1), within_box=True) == [".########", "#########"]


def test_what_stays_keeps_its_logits() -> None:
    logits = draw(*TWO_PARTS) * torch.rand(3, 5, generator=torch.Generator().manual_seed(0))
    result = clean_logits(logits[None, None], MaskCleaning(largest_part=True))[0, 0]
    changed = result != logits
    assert changed.nonzero().tolist() == [[1, 3]] and result[1, 3] <= -2


def test_objects_and_masks_are_cleaned_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.nn.functional.interpolate(torch.randn(4, 3, 6, 6, generator=generator), (24, 24), mode="bicubic")
    clicks, labels = torch.rand(4, 2, 2, generator=generator) * 24, torch.tensor([[1, 0], [1, -1], [1, 1], [0, 0]])
    boxes = torch.tensor([[2, 2, 20, 20], [-1] * 4, [0, 0, 24, 12], [5, 5, 9, 9]]).float()
    options = MaskCleaning(largest_part=True, fill_holes=0.5, within_box=True)
    together = clean_logits(logits, options, clicks=clicks, labels=labels, boxes=boxes)
    for q in range(4):
        for m in range(3):
            one = slice(q, q + 1)
            prompts = {"clicks": clicks[one], "labels": labels[one], "boxes": boxes[one]}
            alone = clean_logits(logits[one, m : m + 1], options, **prompts)
            assert torch.equal(alone[0, 0], together[q, m])


@pytest.mark.parametrize(
    "options, error, text",
    [
        ({"largest_part": 1}, ValueError, "largest_part must be True or False, got 1"),
        ({"fill_holes": -0.1}, ValueError, "fill_holes must be a fraction"),
        ({"fill_holes": float("nan")}, ValueError, "fill_holes"),
        ({"largest": True}, TypeError, "unknown option 'largest' of mask cleaning"),
    ],
)
def test_wrong_options_are_named(options, error, text) -> None:
    with pytest.raises(error, match=text):
        EfficientSamImageProcessor(mask_cleaning=options)
    with pytest.raises(error, match=text):
        EfficientSamImageProcessor().post_process_masks(torch.zeros(1, 1, 1, 8, 8), [(8, 8)], **options)


def test_post_processing_takes_prompts_in_model_pixels() -> None:
    processor = EfficientSamImageProcessor(size=32, mask_cleaning={"largest_part": True, "within_box": True})
    logits = torch.full((1, 2, 1, 8, 8), -3.0)
    logits[0, :, 0, 1:3, 1:3] = logits[0, :, 0, 5:7, 4:8] = 3.0
    prompts = {
        "input_points": torch.tensor([[[[6.0, 6.0]], [[0.0, 0.0]]]]),
        "input_labels": torch.tensor([[[1], [-1]]]),
        "input_boxes": torch.tensor([[[-1.0] * 4, [0.0, 0.0, 20.0, 32.0]]]),
    }
    (masks,) = processor.post_process_masks(logits, [(40, 80)], prompts=prompts)
    assert masks[0, 0, 5:15, 10:30].any() and not masks[0, 0, 20:].any()  # the clicked part, though it is the smaller
    assert masks[1, 0, :, :50].any() and not masks[1, 0, :, 50:].any()  # cut at 20 of 32 model pixels
    (raw,) = processor.post_process_masks(logits, [(40, 80)], prompts=prompts, largest_part=False, within_box=False)
    assert raw[0, 0, 20:].any() and raw[1, 0, :, 50:].any()
    (values,) = processor.post_process_masks(logits, [(40, 80)], prompts=prompts, binarize=False)
    assert torch.equal(values >= 0, masks)


def test_object_mask_leaves_prompts_out_with_their_masks() -> None:
    processor = EfficientSamImageProcessor(size=32, mask_cleaning={"largest_part": True})
    logits = torch.full((1, 2, 1, 8, 8), -3.0)
    logits[0, 1, 0, 1, 1] = logits[0, 1, 0, 5:7, 5:7] = 3.0
    prompts = {"input_points": torch.tensor([[[[20.0, 20.0]], [[6.0, 6.0]]]]), "input_labels": torch.ones(1, 2, 1)}
    (masks,) = processor.post_process_masks(
        logits, [(8, 8)], object_mask=torch.tensor([[False, True]]), prompts=prompts
    )
    assert masks.nonzero().tolist() == [[0, 0, 1, 1]]


def test_prompts_of_another_number_of_objects_are_an_error() -> None:
    processor = EfficientSamImageProcessor(size=32, mask_cleaning={"largest_part": True})
    prompts = {"input_points": torch.zeros(1, 3, 1, 2)}
    with pytest.raises(ValueError, match="input_points of image 0 is for 3 objects, but masks for 2"):
        processor.post_process_masks(torch.zeros(1, 2, 1, 8, 8), [(8, 8)], prompts=prompts)


def test_options_are_part_of_the_saved_processor(tmp_path) -> None:
    options = {"largest_part": True, "fill_holes": 0.5}
    EfficientSamImageProcessor(size=64, mask_cleaning=options).save_pretrained(tmp_path)
    assert EfficientSamImageProcessor.from_pretrained(tmp_path).mask_cleaning == options


@pytest.fixture
def cleaning(processor):
    """The shared processor, which cleans masks for the length of a test."""
    before = processor.image_processor.mask_cleaning
    processor.image_processor.mask_cleaning = {"largest_part": True, "fill_holes": 10.0, "within_box": True}
    yield processor
    processor.image_processor.mask_cleaning = before


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"masks": np.zeros((1, 1, 4, 4), bool)}, TypeError, "masks is a ndarray, expected a tensor"),
        (
            {"masks": torch.zeros(1, 1, 4, 4)},
            ValueError,
            r"masks is a Tensor of shape .* expected \(Q, M, H, W\) bool",
        ),
        ({"masks": torch.zeros(1, 4, 4, dtype=torch.bool)}, ValueError, "masks is a Tensor of shape"),
        ({"clicks": torch.zeros(1, 1, 2)}, ValueError, "clicks is given alone"),
        ({"labels": torch.zeros(1, 1)}, ValueError, "labels is given alone"),
        ({"clicks": torch.zeros(1, 1, 3), "labels": torch.zeros(1, 1)}, ValueError, r"clicks has shape \(1, 1, 3\)"),
        ({"clicks": torch.zeros(1, 1, 2), "labels": torch.zeros(1, 2)}, ValueError, r"labels has shape \(1, 2\)"),
        (
            {"clicks": torch.full((1, 1, 2), torch.nan), "labels": torch.ones(1, 1)},
            ValueError,
            "clicks of object 0 ho",
        ),
        ({"boxes": torch.tensor([[0, 0, 4, torch.inf]])}, ValueError, "boxes of object 0 holds inf"),
        ({"boxes": [[0, 0, 4, 4]]}, TypeError, "boxes is a list, expected a tensor"),
    ],
)
def test_things_that_cannot_be_cleaned_are_named(arguments, error, words: str) -> None:
    arguments = {"masks": torch.ones(1, 1, 4, 4, dtype=torch.bool), **arguments}
    with pytest.raises(error, match=words):
        clean_masks(arguments.pop("masks"), MaskCleaning(largest_part=True, within_box=True), **arguments)


def test_values_under_padding_do_not_matter() -> None:
    mask = torch.zeros(1, 1, 5, 7, dtype=torch.bool)
    mask[0, 0, 1, 1:3] = mask[0, 0, 3, 3:6] = True
    clicks, labels = torch.tensor([[[1.0, 1.0], [torch.nan, torch.inf]]]), torch.tensor([[1, -1]])
    cleaned = clean_masks(mask, MaskCleaning(largest_part=True), clicks, labels)
    assert cleaned.sum() == 2 and cleaned[0, 0, 1, 1:3].all()


def test_the_predictor_answers_with_whole_masks(model, cleaning, picture) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    predictor = EfficientSamPredictor(model, cleaning)
    predictor.set_image(picture)
    masks, _, low = predictor.predict(point_coords=[[115, 70]], point_labels=[1])
    logits, _, same = predictor.predict(point_coords=[[115, 70]], point_labels=[1], return_logits=True)
    assert np.array_equal(low, same) and np.array_equal(logits >= 0, masks)
    assert all(ndimage.label(mask, np.ones((3, 3)))[1] == 1 for mask in masks if mask.any())
    box = np.array([40, 30, 120, 100])
    (inside,), _, _ = predictor.predict(box=box, multimask_output=False)
    rows, columns = np.nonzero(inside)
    assert columns.min() >= 40 and columns.max() < 120 and rows.min() >= 30 and rows.max() < 100
    transform = predictor.transform
    points = transform.apply_coords_torch(torch.tensor([[[115.0, 70.0]]]), predictor.original_size)
    together, _, _ = predictor.predict_torch(points, torch.ones(1, 1, dtype=torch.long))
    assert np.array_equal(together[0].numpy(), masks)


def test_everything_is_whole_and_no_mask_is_there_twice(model, cleaning, picture) -> None:
    ndimage = pytest.importorskip("scipy.ndimage")
    options = {"points_per_crop": 8, "pred_iou_thresh": 0.2, "stability_score_thresh": 0.2, "crops_nms_thresh": 1.0}
    found = EfficientSamMaskGenerator(model, cleaning)(picture, **options)["masks"]
    parts = [ndimage.label(mask, np.ones((3, 3)))[1] for mask in found]
    assert len(found) > 10 and set(parts) == {1}
    apart = EfficientSamMaskGenerator(model, cleaning)(picture, **options, mask_nms_thresh=0.6)["masks"]
    flat = np.stack(apart).reshape(len(apart), -1).astype(float)
    shared = flat @ flat.T
    iou = shared / (flat.sum(1)[:, None] + flat.sum(1) - shared)
    assert len(apart) < len(found) and np.triu(iou, 1).max() <= 0.6
