# SPDX-License-Identifier: Apache-2.0
"""Whatever dtype and device torch makes tensors in when nobody says: ours say, and the numbers are the same."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from test_modeling import tiny_config, tiny_model
from test_sami import tiny_model as tiny_sami

from efficientsam_hf import (
    EfficientSamImageProcessor,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamPredictor,
    EfficientSamProcessor,
)
from efficientsam_hf.models import image_processing_efficientsam as module
from efficientsam_hf.models.rle_efficientsam import decode_rle
from efficientsam_hf.tiles import segment_tiles


PICTURE = np.random.default_rng(0).integers(0, 256, (70, 90, 3), np.uint8)
ALL_MASKS = {"points_per_crop": 2, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "crops_nms_thresh": 0.4}


@pytest.fixture(params=["bfloat16", "float64", "meta"])
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Another dtype, or "meta", a device on which there are no numbers, so that what is made there is seen."""
    dtype = torch.get_default_dtype()
    module._resize_weights.cache_clear()
    if request.param == "meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param))
    yield
    torch.set_default_dtype(dtype)
    torch.set_default_device(None)
    module._resize_weights.cache_clear()


def everything(model: EfficientSamModel, processor: EfficientSamProcessor) -> dict[str, Any]:
    """What each of the public calls answers."""
    points, boxes = [[[[20.3, 31.7], [60, 5]], [[89, 69]]]], [[[3.1, 7, 71, 66], None]]
    logits = np.linspace(-3, 4, 256).reshape(1, 1, 1, 16, 16).repeat(2, 1).tolist()
    with torch.no_grad():
        inputs = processor(PICTURE, input_points=points, input_boxes=boxes, input_masks=logits, return_tensors="pt")
        outputs = model(**inputs)
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], prompts=inputs, fill_holes=0.1)
    predictor = EfficientSamPredictor(model, processor)
    predictor.set_image(PICTURE)
    scaled = predictor.transform.apply_coords(np.array([[[20.3, 31.7]]]), predictor.original_size)
    many = predictor.predict_torch(torch.from_numpy(scaled), None)
    generator = EfficientSamMaskGenerator(model, processor, **ALL_MASKS)
    tiles = segment_tiles(generator, PICTURE, tile=64, overlap=16)
    return {
        "inputs": dict(inputs),
        "outputs": dict(outputs),
        "masks": masks,
        "one": predictor.predict(points[0][0], box=boxes[0][0]),
        "many": many,
        "found": generator(PICTURE, crops_n_layers=1, mask_nms_thresh=0.8, largest_part=True, output_type="rle"),
        "tiles": {**tiles, "masks": [decode_rle(mask) for mask in tiles["masks"]]},
    }


def test_nothing_depends_on_them(defaults, request) -> None:
    """A model that is there already: a device of one's own is where new ones are made."""
    torch.set_default_device(None)
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    model, processor = tiny_model(dense_boxes=True), EfficientSamProcessor(EfficientSamImageProcessor(size=64))
    expected = everything(model, processor)
    assert len(expected["found"]["masks"]) > 3 and expected["tiles"]["masks"]
    torch.set_default_dtype(dtype)
    if "meta" in request.node.name:
        torch.set_default_device("meta")
    result = everything(model, processor)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    torch.testing.assert_close(everything(model, processor), expected, rtol=0, atol=0)


def test_positions_are_exact_in_new_models_and_noise_in_pretraining() -> None:
    sami = tiny_sami()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = EfficientSamModel(tiny_config())
        torch.manual_seed(0)
        order = sami(torch.zeros(1, 3, 64, 64)).ids_restore
    finally:
        torch.set_default_dtype(torch.float32)
    assert model.prompt_encoder.positional_encoding.gaussian_matrix.dtype == torch.float32
    torch.manual_seed(0)
    assert torch.equal(order, sami(torch.zeros(1, 3, 64, 64)).ids_restore)
