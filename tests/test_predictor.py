# SPDX-License-Identifier: Apache-2.0
"""The predictor for code written for segment_anything: one embedding, many prompts."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_modeling import tiny_model

from efficientsam_hf import (
    EfficientSamImageProcessor,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamPredictor,
    EfficientSamProcessor,
    default_checkpoint,
)


NAN, INF = float("nan"), float("inf")


@pytest.fixture(scope="module")
def predictor(photo: Image.Image) -> EfficientSamPredictor:
    model = EfficientSamModel.from_pretrained(default_checkpoint()).eval()
    predictor = EfficientSamPredictor(model, EfficientSamProcessor.from_pretrained(default_checkpoint()))
    predictor.set_image(np.asarray(photo))
    return predictor


@pytest.mark.parametrize("multimask", [True, False])
def test_answers_are_the_models(predictor, photo, multimask: bool) -> None:
    points, labels, box = [[230, 120], [30, 30]], [1, 0], [60, 20, 400, 280]
    masks, scores, low = predictor.predict(np.array(points), np.array(labels), np.array(box), None, multimask)
    inputs = predictor.processor(
        photo, input_points=[[points]], input_labels=[[labels]], input_boxes=[[box]], return_tensors="pt"
    )
    with torch.no_grad():
        outputs = predictor.model(**inputs, multimask_output=multimask)
    expected = predictor.processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], prompts=inputs)[0][
        0
    ]
    assert masks.shape == (3 if multimask else 1, 300, 451) and masks.dtype == bool
    assert np.mean(masks != expected.numpy()) < 1e-4
    np.testing.assert_allclose(scores, outputs.iou_scores[0, 0].numpy(), atol=1e-4)
    np.testing.assert_allclose(low, outputs.pred_masks[0, 0].numpy(), atol=1e-3)


def test_the_image_is_encoded_once(predictor, monkeypatch) -> None:
    monkeypatch.setattr(predictor.model, "get_image_embeddings", lambda *a, **k: pytest.fail("encoded again"))
    first, second = (predictor.predict(np.array([[x, 120]]))[0] for x in (230, 40))
    assert (first != second).any()


def test_an_answer_as_the_next_prompt(predictor) -> None:
    _, scores, low = predictor.predict(point_coords=[[230, 120]])
    best = low[scores.argmax()][None]
    logits, _, _ = predictor.predict([[230, 120], [30, 30]], [1, 0], mask_input=best, return_logits=True)
    assert logits.dtype == np.float32 and logits.shape == (3, 300, 451) and logits.min() < 0 < logits.max()


POINTS = [[[230, 120], [30, 30]], [[40, 60], [400, 200]]]
LABELS = [[1, 0], [1, 1]]
BOXES = [[60, 20, 400, 280], [10, 10, 470, 150]]


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("kind", ["points", "boxes", "both"])
def test_many_prompts_at_once(predictor, kind: str, multimask: bool) -> None:
    """As if each had been asked for alone; a box that reaches over the border is cut in both."""
    points = None if kind == "boxes" else torch.tensor(POINTS)
    labels = None if kind == "boxes" else torch.tensor(LABELS)
    boxes = None if kind == "points" else torch.tensor(BOXES)
    size = predictor.original_size
    result = predictor.predict_torch(
        None if points is None else predictor.transform.apply_coords_torch(points, size),
        labels,
        None if boxes is None else predictor.transform.apply_boxes_torch(boxes, size),
        multimask_output=multimask,
    )
    count, cells = 3 if multimask else 1, 4 * predictor.image_embedding.shape[-1]
    assert [tuple(part.shape) for part in result] == [(2, count, 300, 451), (2, count), (2, count, cells, cells)]
    assert [part.dtype for part in result] == [torch.bool, torch.float32, torch.float32]
    for index in range(2):
        alone = (None if part is None else part[index].numpy() for part in (points, labels, boxes))
        masks, scores, low = predictor.predict(*alone, multimask_output=multimask)
        assert np.mean(result[0][index].numpy() != masks) < 1e-4
        np.testing.assert_allclose(result[1][index].numpy(), scores, atol=1e-4)
        np.testing.assert_allclose(result[2][index].numpy(), low, atol=1e-3)


def test_masks_as_prompts_of_many(predictor) -> None:
    points = predictor.transform.apply_coords_torch(torch.tensor(POINTS)[:, :1], predictor.original_size)
    _, scores, low = predictor.predict_torch(points, None)
    best = low[range(2), scores.argmax(1)][:, None]
    logits, _, _ = predictor.predict_torch(points, torch.ones(2, 1), mask_input=best, return_logits=True)
    assert logits.dtype == torch.float32
    for index in range(2):
        expected, _, _ = predictor.predict(POINTS[index][:1], mask_input=best[index], return_logits=True)
        np.testing.assert_allclose(logits[index].numpy(), expected, atol=1e-3)


def test_coordinates_of_the_input(predictor) -> None:
    transform, (height, width) = predictor.transform, predictor.transform.input_size
    assert (height, width) == tuple(predictor.processor.image_processor.size.values())
    points = transform.apply_coords(np.array([[451, 300], [0, 150]]), (300, 451))
    assert points.tolist() == [[width, height], [0, height / 2]]
    boxes = np.array([[0, 150, 451, 300]])
    scaled = transform.apply_boxes(boxes, (300, 451))
    assert scaled.tolist() == [[0, height / 2, width, height]]
    assert torch.equal(transform.apply_boxes_torch(torch.tensor(boxes), (300, 451)), torch.tensor(scaled))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(1, 2), None), r"point_coords has shape \(1, 2\), expected \(B, P, 2\)"),
        ((torch.zeros(1, 1, 2), torch.ones(1)), r"point_labels has shape \(1,\), expected \(1, 1\)"),
        ((None, torch.ones(1, 1), torch.tensor([[1, 1, 9, 9]])), "input_labels is given without input_points"),
        ((None, None, torch.zeros(4)), r"boxes has shape \(4,\), expected \(B, 4\)"),
        (
            (torch.zeros(1, 1, 2), None, None, torch.zeros(1, 1, 9, 9)),
            r"mask_input has shape .*, expected \(B, 1, \d+, \d+\)",
        ),
        ((torch.tensor([[[9000.0, 9.0]]]), None), r"\(9000, 9\) is outside the model's input of \d+ x \d+ pixels"),
        ((torch.full((1, 1, 2), float("nan")), None), r"point_coords: \(nan, nan\) is outside"),
        ((None, None, torch.tensor([[9, 9, 9, 30]])), r"boxes: \[9, 9, 9, 30\] is empty within the model's input"),
        ((None, None), "no prompt"),
        ((torch.zeros(1, 1, 2), torch.ones(1, 2)), r"point_labels has shape \(1, 2\), expected \(1, 1\)"),
        ((torch.zeros(2, 1, 2), None, torch.tensor([[1, 1, 9, 9]])), "disagree on the number of objects"),
    ],
)
def test_wrong_calls_of_many(predictor, arguments, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predictor.predict_torch(*arguments)


@pytest.mark.parametrize(
    ("points", "labels"),
    [
        (np.zeros((0, 2)), np.zeros(0)),
        (np.zeros((0, 2)), None),
        ([], []),
        ([[5, 5], [9, 9]], [-1, -1]),
        ([[-1, -1]], [-1]),
    ],
)
def test_clicks_of_which_none_is_left_are_no_prompt(predictor, points, labels) -> None:
    with pytest.raises(ValueError, match=r"no prompt: expected at least one of point_coords, box and mask_input"):
        predictor.predict(points, labels)
    box = [60, 20, 400, 280]
    for answer, expected in zip(predictor.predict(points, labels, box), predictor.predict(box=box), strict=True):
        np.testing.assert_array_equal(answer, expected)
    low = expected[:1]
    masks = predictor.predict(points, labels, mask_input=low)[0]
    assert (masks == predictor.predict(mask_input=low)[0]).all()
    size = predictor.original_size
    coords = torch.as_tensor(np.array(points), dtype=torch.float32).reshape(1, -1, 2)
    given = None if labels is None else torch.as_tensor(np.array(labels)).reshape(1, -1)
    with pytest.raises(ValueError, match="no prompt: expected .*point_coords, boxes and mask_input.* prompt 0 has"):
        predictor.predict_torch(coords, given)
    boxes = predictor.transform.apply_boxes_torch(torch.tensor([box]), size)
    for answer, expected in zip(
        predictor.predict_torch(coords, given, boxes), predictor.predict_torch(None, None, boxes), strict=True
    ):
        torch.testing.assert_close(answer, expected)


def test_each_of_many_prompts_must_be_one(predictor) -> None:
    points, labels = torch.full((3, 2, 2), 9.0), torch.tensor([[1, 0], [1, -1], [-1, -1]])
    with pytest.raises(ValueError, match="prompt 2 has nothing but padding"):
        predictor.predict_torch(points, labels)
    predictor.predict_torch(points[:2], labels[:2])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"point_coords": "here"}, r"^point_coords is 'here', expected \(P, 2\) clicks"),
        ({"point_coords": [[1, NAN]]}, r"^point_coords: \[1, nan\] is not 2 finite numbers"),
        ({"point_coords": [[1, 10**400]]}, r"^point_coords: \[1, 1000.{0,90} is not 2 finite numbers"),
        ({"point_coords": [[1, 2]], "point_labels": [7]}, "^point_labels: 7 is not 1"),
        ({"point_coords": [[1, 2]], "point_labels": [1, 1]}, "^point_labels must be nested as the points"),
        ({"point_labels": [1]}, "^point_labels is given without point_coords"),
        ({"box": [1, 2, 3]}, r"^box: \[1, 2, 3\] is not 4 finite numbers"),
        ({"box": [1, 2, 3, INF]}, "^box: .*inf.* is not 4 finite numbers"),
        ({"box": ["x" * 10**6] * 4}, "^box: .{0,120} is not 4 finite numbers"),
        ({"mask_input": np.full((1, 128, 128), NAN)}, "^mask_input holds values that are not finite"),
        ({"mask_input": [[1, 2], [3]]}, "^mask_input is .*, expected an array"),
        ({"mask_input": np.zeros((1, 9, 9))}, r"^mask_input has shape \(9, 9\)"),
    ],
    ids=range(12),
)
def test_errors_name_the_arguments(predictor, arguments, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        predictor.predict(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (([[[5, 5]]], None), TypeError, r"point_coords is a list, expected a tensor of shape \(B, P, 2\)"),
        ((None, None, np.zeros((1, 4))), TypeError, "boxes is a ndarray, expected a tensor"),
        ((torch.zeros(1, 1, 2).cfloat(), None), ValueError, "point_coords holds torch.complex64"),
        ((None, None, torch.tensor([[1, 1, 9, INF]])), ValueError, "boxes of prompt 0 holds inf, expected finite"),
        ((None, None, torch.tensor([[1, 1, 9, 9], [1, NAN, 9, 9]])), ValueError, "boxes of prompt 1 holds nan"),
        ((None, None, None, torch.full((1, 1, 128, 128), NAN)), ValueError, "mask_input of prompt 0 holds nan"),
        ((None, None, None, torch.zeros(1, 1, 128, 128)), ValueError, "no prompt"),
    ],
)
def test_errors_of_many_name_the_arguments(predictor, arguments, error, words: str) -> None:
    with pytest.raises(error, match=words):
        predictor.predict_torch(*arguments)


def test_what_a_predictor_is_made_of(predictor) -> None:
    with pytest.raises(TypeError, match="model is a Linear, expected an EfficientSamModel"):
        EfficientSamPredictor(torch.nn.Linear(1, 1), predictor.processor)
    with pytest.raises(
        TypeError, match="processor is a EfficientSamImageProcessor, expected an EfficientSamProcessor"
    ):
        EfficientSamPredictor(predictor.model, predictor.processor.image_processor)


def test_an_encoder_that_is_offloaded(tmp_path) -> None:
    parts = {"vision_encoder": "disk", "neck": "cpu", "prompt_encoder": "cpu", "mask_decoder": "cpu"}
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size=64))
    whole = EfficientSamModel.from_pretrained(folder)
    offloaded = EfficientSamModel.from_pretrained(folder, device_map=parts, offload_folder=tmp_path / "offload")
    assert next(offloaded.parameters()).is_meta
    picture = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    answers, found = [], []
    for model in (whole, offloaded):
        predictor = EfficientSamPredictor(model, processor)
        predictor.set_image(picture)
        answers.append(predictor.predict([[28, 24]])[2])
        generator = EfficientSamMaskGenerator(model, processor, pred_iou_thresh=0, stability_score_thresh=0)
        found.append(generator(picture, points_per_crop=2)["scores"])
    np.testing.assert_allclose(*answers, atol=1e-5)
    torch.testing.assert_close(*found)


def test_padding_may_lie_anywhere(predictor) -> None:
    inside = torch.tensor([[[512.0, 400.0], [0.0, 0.0]]])
    outside = torch.tensor([[[512.0, 400.0], [-1.0, -1.0]]])
    labels = torch.tensor([[1, -1]])
    first, second = (predictor.predict_torch(points, labels)[2] for points in (inside, outside))
    assert torch.equal(first, second)


def test_what_is_known_of_the_image(predictor, photo) -> None:
    other = EfficientSamPredictor(predictor.model, predictor.processor)
    assert not other.is_image_set and predictor.is_image_set and other.device == torch.device("cpu")
    for call in (other.get_image_embedding, lambda: other.predict_torch(torch.zeros(1, 1, 2), None)):
        with pytest.raises(RuntimeError, match="call set_image first"):
            call()
    assert predictor.get_image_embedding() is predictor.image_embedding


def test_channels_in_the_order_of_opencv(predictor, photo) -> None:
    other = EfficientSamPredictor(predictor.model, predictor.processor)
    other.set_image(np.asarray(photo)[..., ::-1], image_format="BGR")
    assert torch.equal(other.image_embedding, predictor.image_embedding)
    with pytest.raises(ValueError, match="image_format must be RGB or BGR"):
        other.set_image(photo, image_format="HSV")
    for image in (torch.zeros(3, 30, 40), photo, "photo.jpg", np.zeros((30, 40), np.uint8)):
        with pytest.raises(ValueError, match=r"BGR is for arrays of shape \(H, W, 3\), got a "):
            other.set_image(image, image_format="BGR")


def test_wrong_calls(predictor, photo) -> None:
    with pytest.raises(ValueError, match="outside the image of 451 x 300"):
        predictor.predict([[600, 10]])
    with pytest.raises(ValueError, match="no prompt"):
        predictor.predict()
    with pytest.raises(ValueError, match="holds 2 images"):
        predictor.set_image([photo, photo])
    empty = EfficientSamPredictor(predictor.model, predictor.processor)
    with pytest.raises(RuntimeError, match="call set_image first"):
        empty.predict([[1, 1]])
    empty.set_image(photo)
    empty.reset_image()
    assert not empty.is_image_set
    with pytest.raises(RuntimeError, match="call set_image first"):
        empty.predict([[1, 1]])
