# SPDX-License-Identifier: Apache-2.0
"""Prompts, pictures, masks and options of every kind: a documented answer, or an error that names what is wrong."""

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from property_testing import bounded
from pycocotools import mask as coco
from test_modeling import tiny_model

from efficientsam_hf import (
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamPredictor,
    EfficientSamProcessor,
    SamiConfig,
)
from efficientsam_hf.models.mask_cleaning_efficientsam import MaskCleaning, clean_masks
from efficientsam_hf.models.mask_generation_options_efficientsam import MaskGenerationOptions
from efficientsam_hf.models.rle_efficientsam import decode_rle, encode_rle, rle_area, rle_box
from efficientsam_hf.tiles import segment_tiles


pytestmark = pytest.mark.property

SIZE = (30, 40)
LONGEST = 1000  # characters of a message


@cache
def model() -> EfficientSamModel:  # and no fixture, which would fill the report of an example
    return tiny_model()


@cache
def processor() -> EfficientSamProcessor:
    return EfficientSamProcessor(EfficientSamImageProcessor(size=64))


def outcome(names: str, call: Callable[[], Any]) -> Any:
    """What a call returns, None for a documented error, whose message names an argument and is short."""
    try:
        return call()
    except (ValueError, TypeError, OSError) as error:
        message = str(error)
        assert re.search(names, message), f"{type(error).__name__} names no argument: {message}"
        assert len(message) < LONGEST, f"{len(message)} characters: {message[:300]}"
        return None


# Values of every kind

odd_floats = [
    float("nan"),
    float("inf"),
    -float("inf"),
    1e300,
    -1e39,
    1e-300,
    -0.0,
    0,
    1,
    -1,
    2**64,
    10**400,
    -(10**4000),
]
odd_scalars = [np.float16(2.5), np.int8(-1), np.uint8(7), np.float64("nan"), np.bool_(True), True, 1j, None]
odd_numbers = st.sampled_from([*odd_floats, *odd_scalars, "1", b"1", "x" * 5000])
numbers = st.one_of(st.integers(-2, 50), st.floats(-5, 60), odd_numbers)
labels = st.one_of(st.sampled_from([0, 1, -1]), st.integers(-2, 3), odd_numbers)
odd = st.one_of(
    odd_numbers, st.just({}), st.just(object()), st.just([]), st.just([[]]), st.just([None]), st.text(max_size=9)
)
DTYPES = (np.uint8, np.int64, np.float16, np.float32, np.float64, np.bool_, np.complex64, np.uint64, "U2", "O")


def nested(numbers: st.SearchStrategy, lengths: tuple[int | None, ...]) -> st.SearchStrategy:
    """Lists in lists of about these lengths (None: any up to three), with something odd among them now and then."""
    if not lengths:
        return numbers
    inner = nested(numbers, lengths[1:])
    length = {"max_size": 3} if lengths[0] is None else {"min_size": lengths[0], "max_size": lengths[0]}
    plain = st.lists(inner, **length)
    rare = st.integers(0, 19).flatmap(lambda n: odd if n == 0 else st.lists(inner, max_size=5) if n == 1 else plain)
    return rare


@st.composite
def in_some_form(draw, values: st.SearchStrategy) -> Any:
    """Nested lists as they are, as a tuple, an array or a tensor; or an array of any shape and dtype."""
    form = draw(st.sampled_from(["list", "list", "tuple", "array", "tensor", "random"]))
    if form == "random":
        shape = draw(st.lists(st.integers(0, 4), max_size=6))
        array = np.resize(np.array([3, 0, 1], dtype=np.float32), shape)
        return array.astype(draw(st.sampled_from(DTYPES)))
    value = draw(values)
    try:
        if form == "array":
            return np.array(value)
        if form == "tensor":
            return torch.tensor(value)
    except (ValueError, TypeError, OverflowError, RuntimeError):
        pass
    return tuple(value) if form == "tuple" and isinstance(value, list) else value


points = in_some_form(nested(numbers, (1, None, None, 2)))
point_labels = in_some_form(nested(labels, (1, None, None)))
boxes = in_some_form(nested(numbers, (1, None, 4)))
usual_points = st.lists(
    st.lists(st.lists(st.integers(0, 30), min_size=2, max_size=2), max_size=3), min_size=1, max_size=2
)
usual_boxes = st.lists(st.none() | st.just([1, 2, 20, 25.5]), min_size=1, max_size=2)


@st.composite
def mask_prompts(draw) -> Any:
    shape = draw(
        st.sampled_from([(1, 1, 1, 16, 16), (1, 2, 16, 16), (1, 1, 8, 16), (16, 16), (1, 1, 1, 1, 16, 16), (0,)])
    )
    values = draw(st.sampled_from([0.0, 1.0, -8.0, 65504.0, 1e20, float("nan"), float("inf")]))
    array = np.full(shape, values).astype(
        draw(st.sampled_from([np.float64, np.float32, np.float16, np.int64, np.complex64]))
    )
    return draw(st.sampled_from([array, torch.from_numpy(array), array.tolist(), list(array), [[None]]]))


prompts = st.fixed_dictionaries(
    {},
    optional={
        "input_points": st.one_of(points, usual_points.map(lambda p: [p]), odd),
        "input_labels": st.one_of(point_labels, odd),
        "input_boxes": st.one_of(boxes, usual_boxes.map(lambda b: [b]), odd),
        "input_masks": st.one_of(mask_prompts(), odd),
    },
)
NAMES = r"input_(points|labels|boxes|masks)|prompt"


@given(prompts)
@bounded
@pytest.mark.filterwarnings("ignore")
def test_prompts_through_processor_and_model(given_prompts) -> None:
    inputs = outcome(NAMES, lambda: processor()(original_sizes=[SIZE], return_tensors="pt", **given_prompts))
    if inputs is None:
        return
    for name in ("input_points", "input_boxes", "input_masks"):
        assert name not in inputs or (inputs[name].dtype == torch.float32 and inputs[name].isfinite().all())
    with torch.no_grad():
        outputs = outcome(NAMES, lambda: model()(image_embeddings=torch.ones(1, 32, 4, 4), **inputs))
    if outputs is not None:
        assert outputs.pred_masks.isfinite().all() and outputs.iou_scores.isfinite().all()
        assert outputs.object_mask.any()
        (masks,) = processor().post_process_masks(outputs.pred_masks, [SIZE], prompts=inputs)
        assert masks.shape[2:] == SIZE


@given(prompts, st.sampled_from([torch.float32, torch.float64, torch.int64, torch.float16]))
@bounded
@pytest.mark.filterwarnings("ignore")
def test_prompts_of_the_bare_model(given_prompts, dtype: torch.dtype) -> None:
    """As tensors where they can be ones."""

    def as_tensor(value: Any) -> Any:
        try:
            return torch.as_tensor(value).to(dtype)
        except (ValueError, TypeError, OverflowError, RuntimeError):
            return value

    given_prompts = {name: as_tensor(value) for name, value in given_prompts.items()}
    with torch.no_grad():
        outputs = outcome(NAMES, lambda: model()(image_embeddings=torch.ones(1, 32, 4, 4), **given_prompts))
    if outputs is not None:
        assert outputs.pred_masks.isfinite().all() and outputs.object_mask.any()


one_object = st.fixed_dictionaries(
    {},
    optional={
        "point_coords": in_some_form(nested(numbers, (None, 2))),
        "point_labels": in_some_form(nested(labels, (None,))),
        "box": in_some_form(nested(numbers, (4,))),
        "mask_input": mask_prompts(),
    },
)


@given(one_object)
@bounded
@pytest.mark.filterwarnings("ignore")
def test_prompts_of_the_predictor(arguments) -> None:
    predictor = EfficientSamPredictor(model(), processor())
    image = predictor.embed(np.zeros((*SIZE, 3), np.uint8))
    names = r"point_coords|point_labels|\bbox\b|mask_input"
    answer = outcome(names, lambda: predictor.predict(**arguments, image=image))
    if answer is not None:
        masks, scores, low = answer
        assert masks.shape == (3, *SIZE) and np.isfinite(scores).all() and np.isfinite(low).all()
    tensors = {name: value for name, value in arguments.items() if name != "box"}
    tensors = {"point_coords": None, "point_labels": None, "boxes": arguments.get("box"), **tensors}
    names = r"point_coords|point_labels|boxes|mask_input|input_labels|prompt"
    answer = outcome(names, lambda: predictor.predict_torch(**tensors, image=image))
    if answer is not None:
        assert all(part.float().isfinite().all() for part in answer)


shapes = st.one_of(
    st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(1, 4)),
    st.tuples(st.just(3), st.integers(0, 9), st.integers(0, 9)),
    arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4),
)


@given(
    st.one_of(
        shapes.flatmap(
            lambda shape: st.sampled_from(DTYPES).map(lambda dtype: np.resize(np.array([0, 1]), shape).astype(dtype))
        ),
        st.sampled_from([np.full((5, 6, 3), value) for value in (np.nan, np.inf, 2.0, -1e-9, 0.5)]),
        odd.filter(lambda value: not isinstance(value, str) or len(value) < 100),
    ),
    st.fixed_dictionaries(
        {},
        optional={
            name: st.one_of(
                st.sampled_from([True, False, None, "no", 2, [], 10**9, {}, {"height": 32, "width": 16}, 32])
            )
            for name in ("size", "do_resize", "do_rescale", "do_normalize", "antialias", "return_tensors")
        },
    ),
    st.booleans(),
)
@bounded
@pytest.mark.filterwarnings("ignore")
def test_pictures(image, options, as_tensor: bool) -> None:
    if as_tensor and isinstance(image, np.ndarray) and image.dtype.kind in "biufc":
        image = torch.from_numpy(image)
    names = "image|size|do_|antialias|return_tensors"
    inputs = outcome(names, lambda: processor().image_processor(image, **options))
    if inputs is not None:
        assert all(np.isfinite(np.asarray(pixels)).all() for pixels in inputs["pixel_values"])


# Masks

RUNS = st.lists(
    st.one_of(st.integers(0, 12), st.sampled_from([-1, 2**31, 2**63 - 1, 10**30, 1.0, True, None, "3"])), max_size=9
)


@st.composite
def mutated_strings(draw) -> Any:
    mask = draw(arrays.arrays(np.bool_, (4, 5)))
    text = list(encode_rle(mask)["counts"])
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, len(text)))
        text[place : place + draw(st.integers(0, 2))] = draw(st.text(st.characters(max_codepoint=260), max_size=3))
    return "".join(text)


@given(
    st.one_of(mutated_strings(), mutated_strings().map(lambda text: text.encode("utf-8")), RUNS, odd),
    st.one_of(
        st.just([4, 5]),
        st.lists(st.sampled_from([4, 5, 0, -1, 1.0, 2**20, 2**40, 10**400, True, None, "4"]), max_size=3),
        odd,
    ),
)
@bounded
@pytest.mark.filterwarnings("ignore:__array__ implementation")
def test_run_lengths(counts, size) -> None:
    rle = {"size": size, "counts": counts}
    mask = outcome("RLE", lambda: decode_rle(rle))
    if mask is None:
        return
    assert mask.shape == tuple(size) and mask.sum() == rle_area(rle)
    if isinstance(counts, list):
        counts = coco.frPyObjects(rle, *size)["counts"]
    packed = {"size": size, "counts": counts}
    np.testing.assert_array_equal(coco.decode(packed).astype(bool), mask)
    assert coco.toBbox(packed).tolist() == rle_box(rle)


@given(st.one_of(shapes, st.just((4, 5))), st.sampled_from(DTYPES), st.sampled_from([0, 1, 2, float("nan")]))
@bounded
@pytest.mark.filterwarnings("ignore")
def test_masks_to_run_lengths(shape, dtype, value) -> None:
    mask = np.full(shape, value).astype(dtype)
    rle = outcome("mask", lambda: encode_rle(mask))
    if rle is not None:
        np.testing.assert_array_equal(decode_rle(rle), mask.astype(bool))


sides = st.one_of(
    st.integers(1, 40), st.sampled_from([0, -1, 2.0, 2.5, 10**6, 10**400, float("nan"), True, None, "5", np.int64(7)])
)
sizes = st.one_of(st.lists(st.lists(sides, min_size=1, max_size=3), max_size=3), st.just([[30, 40]]), odd)


@given(
    st.one_of(shapes, st.just((1, 2, 3, 8, 8)), st.just((2, 1, 1, 8, 8))),
    sizes,
    st.fixed_dictionaries(
        {},
        optional={
            "mask_threshold": st.one_of(st.floats(), odd_numbers),
            "object_mask": st.one_of(st.lists(st.lists(st.booleans(), max_size=3), max_size=3), odd),
            "prompts": st.one_of(prompts, odd),
            "largest_part": st.one_of(st.booleans(), odd),
            "fill_holes": st.one_of(st.floats(), odd_numbers),
            "reshaped_input_sizes": odd,
        },
    ),
    st.sampled_from(["tensor", "array", "list"]),
)
@bounded
@pytest.mark.filterwarnings("ignore")
def test_masks_to_pictures(shape, sizes, options, form: str) -> None:
    masks = torch.linspace(-1, 1, int(np.prod(shape))).reshape(shape) if len(shape) else torch.tensor(1.0)
    masks = {"tensor": lambda: masks, "array": masks.numpy, "list": lambda: list(masks) if masks.ndim else masks}[
        form
    ]()
    names = "masks|original_sizes|mask_threshold|object_mask|prompts|largest_part|fill_holes|input_|sizes"
    result = outcome(names, lambda: processor().post_process_masks(masks, sizes, **options))
    if result is not None:
        assert [tuple(image.shape[2:]) for image in result] == [tuple(int(side) for side in size) for size in sizes]
        assert all(image.dtype == torch.bool for image in result)


@given(
    st.one_of(shapes, st.just((1, 2, 9, 9))),
    st.fixed_dictionaries(
        {},
        optional={
            "clicks": in_some_form(nested(numbers, (1, None, 2))),
            "labels": in_some_form(nested(labels, (1, None))),
            "boxes": in_some_form(nested(numbers, (1, 4))),
        },
    ),
)
@bounded
@pytest.mark.filterwarnings("ignore")
def test_masks_made_whole(shape, given_prompts) -> None:
    masks = torch.from_numpy(np.resize(np.array([True, True, False]), shape))
    cleaning = MaskCleaning(largest_part=True, fill_holes=0.5, within_box=True)
    result = outcome("masks|clicks|labels|boxes", lambda: clean_masks(masks, cleaning, **given_prompts))
    if result is not None:
        assert result.shape == masks.shape and result.dtype == torch.bool


# Options and configurations

OPTIONS = MaskGenerationOptions.names()
option_values = st.one_of(
    st.integers(-1, 5), st.floats(), odd_numbers, odd, st.sampled_from(["bool", "rle", "coco_rle", "score"])
)


@given(st.dictionaries(st.one_of(st.sampled_from(OPTIONS), st.text(max_size=5)), option_values, max_size=3))
@bounded
@pytest.mark.filterwarnings("ignore")
def test_options_of_segment_everything(options) -> None:
    names = "|".join(map(re.escape, [*OPTIONS, *(option for option in options if option), "option"]))
    if "points_per_crop" not in options:
        options = {**options, "points_per_crop": 2}
    if options.get("points_per_crop") in range(9, 10**6):
        return
    generator = EfficientSamMaskGenerator(model(), processor())
    image = np.full((20, 24, 3), 90, np.uint8)
    result = outcome(names, lambda: generator(image, **options))
    if result is not None:
        assert len(result["masks"]) == len(result["scores"]) == len(result["boxes"])


@given(
    st.sampled_from(
        [
            np.zeros((40, 50, 3), np.uint8),
            np.zeros((40, 50)),
            np.full((9, 9, 3), np.nan),
            None,
            "x",
            np.zeros((0, 4, 3)),
        ]
    ),
    st.one_of(st.just(64), odd),
    st.one_of(st.just(8), st.integers(-1, 70), odd),
    st.one_of(st.just("area"), odd),
)
@bounded
@pytest.mark.filterwarnings("ignore")
def test_tiles(image, tile, overlap, sort_by) -> None:
    generator = EfficientSamMaskGenerator(model(), processor(), points_per_crop=1)
    outcome("image|tile|overlap|sort_by", lambda: segment_tiles(generator, image, tile, overlap, sort_by=sort_by))


FIELDS = [
    *("hidden_size", "output_channels", "num_hidden_layers", "num_attention_heads", "num_channels", "image_size"),
    *(
        "patch_size",
        "pretrain_image_size",
        "hidden_act",
        "layer_norm_eps",
        "attention_dropout",
        "qkv_bias",
        "mlp_ratio",
    ),
    *("mlp_dim", "attention_downsample_rate", "num_multimask_outputs", "iou_head_depth", "iou_head_hidden_dim"),
    *("background_points", "mask_prompts", "dense_boxes", "padded_prompt_tokens", "mask_input_channels"),
]
SAMI_FIELDS = [
    "mask_ratio",
    "target_width",
    "decoder_depth",
    "decoder_width",
    "decoder_heads",
    "decoder_mlp_ratio",
    "loss",
]
field_values = st.one_of(st.integers(-2, 64), st.floats(), odd_numbers, odd, st.sampled_from([10**9, 0, "no", "relu"]))
PARTS = ("vision_config", "prompt_encoder_config", "mask_decoder_config")


@given(st.sampled_from(PARTS), st.dictionaries(st.sampled_from(FIELDS), field_values, min_size=1, max_size=2))
@bounded
def test_configurations(part: str, fields) -> None:
    fields = {name: value for name, value in fields.items() if name in EfficientSamConfig().to_dict()[part]}
    config = outcome("|".join([*fields, "equal", "-"]), lambda: EfficientSamConfig(**{part: fields}))
    if config is not None:
        assert config.vision_config.image_size <= 2**13 and config.vision_config.hidden_size > 0


@given(st.dictionaries(st.sampled_from([*SAMI_FIELDS, "vision_config"]), field_values, min_size=1, max_size=2))
@bounded
def test_configurations_of_pretraining(fields) -> None:
    outcome("|".join(fields), lambda: SamiConfig(**fields))


@given(
    st.dictionaries(
        st.sampled_from(
            [
                "size",
                "antialias",
                "do_resize",
                "do_rescale",
                "do_normalize",
                "image_mean",
                "image_std",
                "resample",
                "mask_generation",
                "mask_cleaning",
                "rescale_factor",
            ]
        ),
        st.one_of(odd, option_values, st.lists(st.one_of(st.floats(), odd_numbers), min_size=3, max_size=3)),
        min_size=1,
        max_size=2,
    )
)
@bounded
@pytest.mark.filterwarnings("ignore")
def test_image_processors(fields) -> None:
    built = outcome("|".join([*fields, "option"]), lambda: EfficientSamImageProcessor(**fields))
    if built is not None:
        built.size = {"height": 16, "width": 16}
        assert built(np.zeros((4, 5, 3), np.uint8), return_tensors="pt")["pixel_values"].isfinite().all()
