# SPDX-License-Identifier: Apache-2.0
"""What threads may share, as README says: each of them gets what it would have got alone."""

import copy
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from test_modeling import tiny_model

from efficientsam_hf import (
    EfficientSamImageProcessor,
    EfficientSamMaskGenerationPipeline,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamPredictor,
    EfficientSamProcessor,
)


THREADS = 4
PICTURES = [np.random.default_rng(seed).integers(0, 256, (40 + 8 * seed, 60, 3), np.uint8) for seed in range(THREADS)]
ALL_MASKS = {"points_per_crop": 3, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, "output_type": "rle"}


@pytest.fixture(scope="module")
def model() -> EfficientSamModel:
    return tiny_model()


@pytest.fixture(scope="module")
def processor() -> EfficientSamProcessor:
    return EfficientSamProcessor(EfficientSamImageProcessor(size=64))


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(THREADS) as executor:
        yield executor


def assert_alone_and_together(work: Callable[[int], Any], pool: ThreadPoolExecutor) -> None:
    """Several threads at once, a picture each and several times, have the results of one after the other."""
    alone = [work(index) for index in range(THREADS)]
    start = threading.Barrier(THREADS)

    def together(index: int) -> list:
        start.wait(timeout=60)
        return [work(index) for _ in range(3)]

    for expected, results in zip(alone, pool.map(together, range(THREADS)), strict=True):
        for result in results:
            torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert len({repr(result) for result in alone}) == THREADS  # or it could not be told whose a result is


@torch.no_grad()
def test_a_model_and_a_processor(model, processor, pool) -> None:
    def work(index: int) -> list[torch.Tensor]:
        with torch.no_grad():
            inputs = processor(PICTURES[index], input_points=[[[[10 * index, 5]]]], return_tensors="pt")
            outputs = model(**inputs)
            masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"], prompts=inputs)
        return [inputs["pixel_values"], outputs.pred_masks, outputs.iou_scores, *masks]

    assert_alone_and_together(work, pool)


@pytest.mark.parametrize("route", ["generator", "pipeline"])
def test_segment_everything(model, processor, pool, route: str) -> None:
    generator = EfficientSamMaskGenerator(model, processor)
    if route == "pipeline":
        generator = EfficientSamMaskGenerationPipeline(model=model, image_processor=processor.image_processor)
    assert_alone_and_together(lambda index: generator(PICTURES[index], **ALL_MASKS), pool)


@pytest.mark.parametrize("route", ["embed", "set_image"])
def test_a_predictor(model, processor, pool, route: str) -> None:
    predictor = EfficientSamPredictor(model, processor)

    def work(index: int) -> list:
        image = predictor.embed(PICTURES[index]) if route == "embed" else predictor.set_image(PICTURES[index])
        one = predictor.predict([[10 * index, 5]], image=image)
        many = predictor.predict_torch(torch.tensor([[[10.0 * index, 5.0]], [[3.0, 9.0]]]), None, image=image)
        return [*one, *many]

    assert_alone_and_together(work, pool)


def test_one_image_of_embed_in_many_threads(model, processor, pool) -> None:
    predictor = EfficientSamPredictor(model, processor)
    images = [predictor.embed(picture) for picture in PICTURES]
    assert_alone_and_together(lambda index: predictor.predict([[9, 9]], image=images[index]), pool)
    shared = images[0]
    points = torch.tensor([[[9.0, 9.0]]])
    expected = predictor.predict_torch(points, None, image=shared)
    for result in pool.map(lambda _: predictor.predict_torch(points, None, image=shared), range(THREADS)):
        assert all(map(torch.equal, result, expected))


def test_an_image_belongs_to_the_thread_that_has_set_it(model, processor, pool) -> None:
    predictor = EfficientSamPredictor(model, processor)
    predictor.set_image(PICTURES[0])
    calls = [
        lambda: predictor.predict([[5, 5]]),
        lambda: predictor.predict_torch(torch.zeros(1, 1, 2), None),
        predictor.get_image_embedding,
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match="no image is set in this thread: call set_image first, or give image="):
            pool.submit(call).result()
    pool.submit(predictor.set_image, PICTURES[1]).result()
    assert predictor.predict([[5, 5]])[0].shape[1:] == PICTURES[0].shape[:2]
    pool.submit(predictor.reset_image).result()
    assert predictor.is_image_set and predictor.original_size == PICTURES[0].shape[:2]


def test_copies_begin_without_an_image(model, processor) -> None:
    predictor = EfficientSamPredictor(model, processor)
    predictor.set_image(PICTURES[0])
    for other in (copy.deepcopy(predictor), copy.copy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert not other.is_image_set and predictor.is_image_set
        other.set_image(PICTURES[1])
        assert other.predict([[5, 5]])[0].shape[1:] == PICTURES[1].shape[:2]


def test_only_images_of_embed_are_prompted(model, processor) -> None:
    predictor = EfficientSamPredictor(model, processor)
    with pytest.raises(TypeError, match=r"image is a ndarray of shape \(40, 60, 3\), expected what embed returns"):
        predictor.predict([[5, 5]], image=PICTURES[0])
    with pytest.raises(ValueError, match="image was embedded by another model"):
        EfficientSamPredictor(tiny_model(), processor).predict([[5, 5]], image=predictor.embed(PICTURES[0]))
