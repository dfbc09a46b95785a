# SPDX-License-Identifier: Apache-2.0
"""The predictor for code written for segment_anything: one embedding, many prompts."""

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf import EfficientSamModel, EfficientSamPredictor, EfficientSamProcessor, default_checkpoint


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
    expected = predictor.processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])[0][0]
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
    with pytest.raises(RuntimeError, match="call set_image first"):
        empty.predict([[1, 1]])
