# SPDX-License-Identifier: Apache-2.0
"""The processors: pictures and prompts in, masks out, and what they say about bad input."""

import functools
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientsam_hf import EfficientSamImageProcessor, EfficientSamProcessor
from efficientsam_hf.models.image_processing_efficientsam import MASKS_AT_ONCE, open_image


MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
ORIENTATION = 0x0112


@pytest.fixture
def processor() -> EfficientSamProcessor:
    return EfficientSamProcessor(EfficientSamImageProcessor(size=64))


@pytest.fixture
def pixels() -> np.ndarray:
    """A picture of 30 rows and 40 columns."""
    return np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)


def normalised(rgb: torch.Tensor) -> torch.Tensor:
    return (rgb - MEAN) / STD


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def resized(pixels: np.ndarray, antialias: bool = False) -> torch.Tensor:
    rgb = as_tensor(pixels).float()[None] / 255
    rgb = F.interpolate(rgb, size=(64, 64), mode="bilinear", align_corners=False, antialias=antialias)
    return normalised(rgb[0])


# Images


def test_images_are_stretched_bilinearly_and_normalised(processor, pixels) -> None:
    inputs = processor(images=pixels, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 64, 64) and inputs["pixel_values"].dtype == torch.float32
    torch.testing.assert_close(inputs["pixel_values"][0], resized(pixels), rtol=0, atol=1e-6)
    assert inputs["original_sizes"].tolist() == [[30, 40]]
    assert inputs["reshaped_input_sizes"].tolist() == [[64, 64]]
    assert set(inputs) == {"pixel_values", "original_sizes", "reshaped_input_sizes"}


def test_antialias(pixels) -> None:
    large = np.tile(pixels, (5, 5, 1))
    for antialias in (False, True):
        processor = EfficientSamImageProcessor(size={"height": 64, "width": 64}, antialias=antialias)
        values = processor(large, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(values, resized(large, antialias), rtol=0, atol=1e-6)
        overridden = processor(large, antialias=not antialias, return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(overridden, resized(large, not antialias), rtol=0, atol=1e-6)


SOURCES: dict[str, Callable[[np.ndarray, Path], Any]] = {
    "array": lambda pixels, folder: pixels,
    "array, channels first": lambda pixels, folder: pixels.transpose(2, 0, 1),
    "array, read-only": lambda pixels, folder: np.asarray(Image.fromarray(pixels)),
    "array, not contiguous": lambda pixels, folder: pixels[:, ::-1][:, ::-1],
    "pil": lambda pixels, folder: Image.fromarray(pixels),
    "pil, with alpha": lambda pixels, folder: Image.fromarray(pixels).convert("RGBA"),
    "tensor": lambda pixels, folder: as_tensor(pixels),
    "tensor, channels last": lambda pixels, folder: torch.from_numpy(pixels),
    "float tensor": lambda pixels, folder: as_tensor(pixels).float() / 255,
    "path": lambda pixels, folder: saved(pixels, folder / "picture.png"),
    "text path": lambda pixels, folder: str(saved(pixels, folder / "picture.png")),
    "list": lambda pixels, folder: [Image.fromarray(pixels)],
    "batch": lambda pixels, folder: pixels[None],
    "tensor batch": lambda pixels, folder: as_tensor(pixels)[None],
}


def saved(pixels: np.ndarray, path: Path, **kwargs: Any) -> Path:
    Image.fromarray(pixels).save(path, **kwargs)
    return path


@pytest.mark.parametrize("source", SOURCES)
def test_every_kind_of_image_is_the_same_image(source, processor, pixels, tmp_path) -> None:
    inputs = processor(images=SOURCES[source](pixels, tmp_path), return_tensors="pt")
    assert inputs["original_sizes"].tolist() == [[30, 40]]
    torch.testing.assert_close(inputs["pixel_values"][0], resized(pixels), rtol=0, atol=1e-6)


def test_three_rows_are_not_three_channels(processor) -> None:
    thin = np.random.default_rng(1).integers(0, 256, (3, 50, 3), dtype=np.uint8)
    assert processor(images=thin, return_tensors="pt")["original_sizes"].tolist() == [[3, 50]]
    assert processor(images=as_tensor(thin), return_tensors="pt")["original_sizes"].tolist() == [[3, 50]]


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "CMYK"])
def test_pil_modes_become_rgb(mode, processor, pixels) -> None:
    image = Image.fromarray(pixels).convert(mode)
    expected = resized(np.array(image.convert("RGB")))
    torch.testing.assert_close(processor(images=image, return_tensors="pt")["pixel_values"][0], expected)


def test_files_are_turned_the_way_they_were_held(processor, pixels, tmp_path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # held upright: turn clockwise by 90 degrees
    path = saved(pixels, tmp_path / "turned.png", exif=exif)
    inputs = processor(images=path, input_points=[[[30, 40]]], return_tensors="pt")
    assert inputs["original_sizes"].tolist() == [[40, 30]]
    expected = resized(np.ascontiguousarray(np.rot90(pixels, k=-1)))
    torch.testing.assert_close(inputs["pixel_values"][0], expected)
    # An opened picture is taken in the pixels of its `size`: prompts were read off those.
    with Image.open(path) as image:
        assert processor(images=image, return_tensors="pt")["original_sizes"].tolist() == [[30, 40]]


def test_open_image_turns_pictures_and_takes_streams(pixels) -> None:
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = 3
    Image.fromarray(pixels).save(stream, "PNG", exif=exif)
    stream.seek(0)
    np.testing.assert_array_equal(np.asarray(open_image(stream)), pixels[::-1, ::-1])


def test_steps_can_be_switched_off(pixels) -> None:
    processor = EfficientSamImageProcessor(size=64)
    values = processor(pixels, do_resize=False, do_normalize=False, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(values[0], as_tensor(pixels) / 255)
    values = processor(pixels, do_resize=False, do_normalize=False, do_rescale=False, return_tensors="pt")
    assert torch.equal(values["pixel_values"][0], as_tensor(pixels).float())
    values = processor(pixels, size={"height": 32, "width": 32}, return_tensors="pt")["pixel_values"]
    assert values.shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="make no batch; leave do_resize on"):
        processor([pixels, pixels[:20]], do_resize=False, return_tensors="pt")


def test_processor_round_trip(tmp_path) -> None:
    image_processor = EfficientSamImageProcessor(size=64, antialias=True)
    EfficientSamProcessor(
        image_processor, background_points=False, mask_prompts=False, max_prompt_tokens=6
    ).save_pretrained(tmp_path)
    loaded = EfficientSamProcessor.from_pretrained(tmp_path)
    assert (loaded.background_points, loaded.mask_prompts, loaded.max_prompt_tokens) == (False, False, 6)
    assert loaded.image_processor.size == {"height": 64, "width": 64} and loaded.image_processor.antialias


# Prompts


def test_coordinates_scale_with_width_and_height_apart(processor, pixels) -> None:
    inputs = processor(
        images=pixels, input_points=[[[[10, 20], [40, 30]]]], input_boxes=[[[5, 6, 20, 15]]], return_tensors="pt"
    )
    x, y = 64 / 40, 64 / 30
    assert inputs["input_points"].dtype == inputs["input_boxes"].dtype == torch.float32
    torch.testing.assert_close(inputs["input_points"], torch.tensor([[[[10 * x, 20 * y], [64.0, 64.0]]]]))
    torch.testing.assert_close(inputs["input_boxes"], torch.tensor([[[5 * x, 6 * y, 20 * x, 15 * y]]]))
    assert inputs["input_labels"].tolist() == [[[1, 1]]] and inputs["input_labels"].dtype == torch.int64


@pytest.mark.parametrize("convert", [lambda v: v, np.array, torch.tensor, lambda v: [np.array(i) for i in v]])
def test_nesting_and_kinds_of_points(convert, processor) -> None:
    """Rank 3 is one object an image with several points, rank 4 names objects."""
    sizes = [(64, 64), (64, 64)]
    three = [[[1, 2], [3, 4]], [[5, 6], [7, 8]]]
    labels = [[1, 0], [0, 1]]
    inputs = processor(
        original_sizes=sizes, input_points=convert(three), input_labels=convert(labels), return_tensors="pt"
    )
    assert inputs["input_points"].tolist() == [[[[1, 2], [3, 4]]], [[[5, 6], [7, 8]]]]
    assert inputs["input_labels"].tolist() == [[[1, 0]], [[0, 1]]]
    four = [[[point] for point in image] for image in three]
    inputs = processor(
        original_sizes=sizes, input_points=convert(four), input_labels=convert([[[1], [0]]] * 2), return_tensors="pt"
    )
    assert inputs["input_points"].tolist() == four
    assert inputs["input_labels"].tolist() == [[[1], [0]]] * 2


def test_ragged_prompts_are_padded(processor) -> None:
    inputs = processor(
        original_sizes=[(64, 64), (64, 128)],
        input_points=[[[[1, 2], [3, 4]], [], [[5, 6]]], [[]]],
        input_labels=[[[1, 0], [], [1]], [[]]],
        input_boxes=[[None, [0, 1, 2, 3], None], [[64, 0, 128, 64]]],
        return_tensors="pt",
    )
    nothing = [-1.0, -1.0]
    assert inputs["input_points"].tolist() == [
        [[[1, 2], [3, 4]], [nothing] * 2, [[5, 6], nothing]],
        [[nothing] * 2] * 3,
    ]
    assert inputs["input_labels"].tolist() == [[[1, 0], [-1, -1], [1, -1]], [[-1, -1]] * 3]
    assert inputs["input_boxes"].tolist() == [
        [[-1] * 4, [0, 1, 2, 3], [-1] * 4],
        [[32, 0, 64, 64], [-1] * 4, [-1] * 4],
    ]


def test_no_points_for_the_only_object(processor) -> None:
    inputs = processor(
        original_sizes=[(64, 64)], input_points=[[[]]], input_boxes=[[[1, 2, 3, 4]]], return_tensors="pt"
    )
    assert inputs["input_points"].shape == (1, 1, 0, 2) and inputs["input_labels"].shape == (1, 1, 0)
    assert inputs["input_boxes"].tolist() == [[[1, 2, 3, 4]]]


def test_masks_as_prompts(processor) -> None:
    first, second = torch.randn(16, 16), torch.randn(1, 16, 16)
    inputs = processor(
        original_sizes=[(30, 40), (50, 50)], input_masks=[[first, None], [second.numpy()]], return_tensors="pt"
    )
    assert inputs["input_masks"].shape == (2, 2, 1, 16, 16) and inputs["input_masks"].dtype == torch.float32
    assert torch.equal(inputs["input_masks"][0, 0, 0], first) and torch.equal(inputs["input_masks"][1, 0], second)
    assert not inputs["input_masks"][0, 1].any() and not inputs["input_masks"][1, 1].any()
    masks = torch.randn(1, 3, 1, 16, 16)
    assert torch.equal(
        processor(original_sizes=[(30, 40)], input_masks=masks, return_tensors="pt")["input_masks"], masks
    )


@pytest.mark.parametrize("sizes", [[(30, 40)], np.array([[30, 40]]), torch.tensor([[30, 40]])])
def test_prompts_alone(sizes, processor, pixels) -> None:
    prompts = {"input_points": [[[[10, 20]]]], "input_boxes": [[[1, 2, 30, 20]]]}
    alone = processor(original_sizes=sizes, return_tensors="pt", **prompts)
    together = processor(images=pixels, return_tensors="pt", **prompts)
    assert set(alone) == {"input_points", "input_labels", "input_boxes"}
    for name, value in alone.items():
        assert torch.equal(value, together[name])


@pytest.mark.parametrize(("kind", "expected"), [(None, np.ndarray), ("np", np.ndarray), ("pt", torch.Tensor)])
def test_kinds_of_results(kind, expected, processor, pixels) -> None:
    inputs = processor(images=[pixels, pixels], input_points=[[[[1, 2]]]] * 2, return_tensors=kind)
    assert isinstance(inputs["input_points"], expected) and inputs["input_points"].shape == (2, 1, 1, 2)
    assert len(inputs["pixel_values"]) == 2 and isinstance(inputs["pixel_values"][0], expected)
    assert isinstance(inputs["pixel_values"], list if kind is None else expected)
    np.testing.assert_allclose(np.asarray(inputs["pixel_values"])[1], resized(pixels).numpy(), atol=1e-6)


def test_casting_keeps_coordinates_exact(processor, pixels) -> None:
    prompts = {"input_points": [[[[33.3, 20]]]], "input_boxes": [[[1, 2, 33.3, 20]]]}
    inputs = processor(images=pixels, return_tensors="pt", **prompts)
    exact = {name: inputs[name].clone() for name in ("input_points", "input_boxes")}
    inputs = inputs.to(torch.bfloat16)
    assert inputs["pixel_values"].dtype == torch.bfloat16
    assert inputs["input_labels"].dtype == torch.int64
    for name, value in exact.items():
        assert torch.equal(inputs[name], value)
    assert inputs.to("meta")["input_points"].device.type == "meta"


def test_border_is_inside_and_boxes_are_cut_to_the_image(processor) -> None:
    corners = [[0, 0], [40, 0], [0, 30], [40, 30]]
    inputs = processor(original_sizes=[(30, 40)], input_points=[corners], return_tensors="pt")
    torch.testing.assert_close(
        inputs["input_points"][0, 0], torch.tensor([[0, 0], [64, 0], [0, 64], [64, 64]]).float()
    )
    inputs = processor(original_sizes=[(30, 40)], input_boxes=[[[-5, -3, 400, 31]]], return_tensors="pt")
    assert inputs["input_boxes"].tolist() == [[[0, 0, 64, 64]]]


# Bad input


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


NAN, INF = float("nan"), float("inf")
DEEP = functools.reduce(lambda inner, _: [inner], range(100_000), 1)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"input_points": [[[[40.5, 3]]]]}, r"input_points of image 0, object 0: \(40.5, 3\) is outside .* 40 x 30"),
        ({"input_points": [[[[5, 5]], [[-1, 3]]]]}, r"input_points of image 0, object 1: \(-1, 3\) is outside"),
        ({"input_points": [[[[3, 31]]]]}, r"\(3, 31\) is outside the image of 40 x 30 pixels"),
        ({"input_points": [[[[NAN, 3]]]]}, "input_points of image 0, object 0: .*nan.* 2 finite numbers"),
        ({"input_points": [[[[INF, 3]]]]}, "input_points of image 0, object 0: .*inf.* 2 finite numbers"),
        ({"input_points": torch.tensor([[[[NAN, 3]]]])}, "input_points of image 0.*nan.* 2 finite numbers"),
        ({"input_points": [[[[1, 2, 3]]]]}, r"input_points of image 0, object 0: \[1, 2, 3\] is not 2"),
        ({"input_points": [[[["a", 2]]]]}, r"input_points of image 0, object 0: \['a', 2\] is not 2"),
        ({"input_points": [[10, 20]]}, "input_points is nested 2 deep, expected"),
        ({"input_points": [[[[[10, 20]]]]]}, "input_points is nested 5 deep, expected"),
        ({"input_points": 3}, "input_points"),
        ({"input_points": [[[[5, 5]]]] * 3}, "input_points is for 3 images, but there are 1"),
        ({"input_labels": [[[1]]]}, "input_labels is given without input_points"),
        ({"input_points": [[[[5, 5]]]], "input_labels": [[[1, 1]]]}, r"input_labels must be nested as the points"),
        ({"input_points": [[[[5, 5]]]], "input_labels": [[1]]}, r"input_labels must be nested as the points"),
        ({"input_points": [[[[5, 5]]]], "input_labels": 1}, r"input_labels must be nested as the points"),
        ({"input_points": [[[[5, 5]]]], "input_labels": [[[2]]]}, "input_labels of image 0, object 0: 2 is not 1"),
        ({"input_points": [[[[5, 5]]]], "input_labels": [[[-1]]]}, "input_labels of image 0, object 0: -1 is not 1"),
        ({"input_points": [[[[5, 5]]]], "input_labels": [[[NAN]]]}, "input_labels of image 0, object 0: nan is not 1"),
        ({"input_points": [[[5, 5]]], "input_labels": [[[1]]]}, "input_labels"),
        ({"input_points": [[[[True, 2]]]]}, r"input_points of image 0, object 0: \[True, 2\] is not 2"),
        ({"input_points": [[[[1j, 2]]]]}, "input_points of image 0, object 0: .* is not 2 finite numbers"),
        ({"input_points": [[[[10**5000, 2]]]]}, "input_points of image 0, object 0: .{0,90} is not 2 finite numbers"),
        ({"input_points": [[[[1, 2]] * 10**5 + [[1]]]]}, r"input_points of image 0, object 0: \[1\] is not 2"),
        ({"input_points": [[["x" * 10**6]]]}, "input_points of image 0, object 0: .{0,90} is not 2 finite numbers"),
        ({"input_points": DEEP}, "input_points is nested more than 8 deep"),
        ({"input_points": [[[[5, 5]]]], "input_labels": DEEP}, "input_labels is nested more than 8 deep"),
        ({"input_points": [[[[5, 5]]]], "input_labels": [[["1"]]]}, "input_labels of image 0, object 0: '1' is not 1"),
        ({"input_points": [[[[5, 5]]]], "input_labels": [[[1 + 0j]]]}, "input_labels of image 0, object 0"),
        ({"input_boxes": DEEP}, "input_boxes is nested more than 8 deep"),
        ({"input_boxes": [[[1, 2, 3, 10**400]]]}, "input_boxes of image 0, object 0: .{0,90} is not 4 finite numbers"),
        (
            {"input_boxes": [[[20, 5, 20, 15]]]},
            r"input_boxes of image 0, object 0: \[20.0, 5.0, 20.0, 15.0\] is empty",
        ),
        ({"input_boxes": [[None, [5, 15, 20, 5]]]}, r"input_boxes of image 0, object 1: .* is empty.*y0 < y1"),
        ({"input_boxes": [[[41, 5, 50, 15]]]}, "input_boxes of image 0, object 0: .* is outside the image of 40 x 30"),
        ({"input_boxes": [[[1, 2, NAN, 4]]]}, "input_boxes of image 0, object 0: .*nan.* 4 finite numbers"),
        ({"input_boxes": [[[1, 2, 3]]]}, r"input_boxes of image 0, object 0: \[1, 2, 3\] is not 4"),
        ({"input_boxes": [[1, 2, 3, 4]]}, "input_boxes of image 0, object 0: 1 is not 4 finite numbers"),
        ({"input_boxes": [1, 2, 3, 4]}, "input_boxes must be nested"),
        ({"input_boxes": [[[1, 2, 3, 4]]] * 2}, "input_boxes is for 2 images, but there are 1"),
        (
            {"input_points": [[[[5, 5]]]], "input_boxes": [[None, None]]},
            "image 0: prompts disagree .*'input_boxes': 2",
        ),
        (
            {"input_masks": [[torch.zeros(8, 8)]]},
            r"input_masks of image 0, object 0 has shape \(8, 8\), expected .*16",
        ),
        ({"input_masks": [[torch.full((16, 16), NAN)]]}, "input_masks of image 0, object 0 holds values that are not"),
        ({"input_masks": [[np.full((16, 16), 1e300)]]}, "input_masks of image 0, object 0 holds values that are not"),
        ({"input_masks": [[[[1, 2], [3]]]]}, "input_masks of image 0, object 0 is .*, expected an array"),
        ({"input_masks": [["mask"]]}, "input_masks of image 0, object 0 is 'mask', expected an array"),
        ({"input_masks": torch.zeros(1, 1, 1, 16, 16).cfloat()}, "input_masks of image 0, object 0 holds torch.comp"),
        ({"input_masks": np.float32(3)}, "input_masks must be nested"),
    ],
)
def test_bad_prompts(prompts: dict[str, Any], message: str, processor, pixels) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=pixels, return_tensors="pt", **prompts)
    with pytest.raises(ValueError, match=message):
        processor(original_sizes=[(30, 40)], **prompts)


def test_prompts_for_three_images_of_two(processor, pixels) -> None:
    for name, prompt in (("input_points", [[[5, 5]]]), ("input_boxes", [[1, 2, 3, 4]]), ("input_masks", [None])):
        with pytest.raises(ValueError, match=f"{name} is for 3 images, but there are 2"):
            processor(images=[pixels, pixels], **{name: [prompt] * 3})


def test_what_a_checkpoint_does_not_know(pixels) -> None:
    image_processor = EfficientSamImageProcessor(size=64)
    released = EfficientSamProcessor(image_processor, background_points=False, mask_prompts=False, max_prompt_tokens=6)
    six = [[1, 1]] * 6
    with pytest.raises(ValueError, match="input_labels of image 0, object 0 has a 0.* no background points"):
        released(images=pixels, input_points=[[[[1, 1]]]], input_labels=[[[0]]])
    with pytest.raises(ValueError, match="input_masks is given.* no mask prompts"):
        released(images=pixels, input_masks=torch.zeros(1, 1, 1, 16, 16))
    with pytest.raises(ValueError, match="image 0, object 1 has 7 prompt tokens.* at most 6"):
        released(images=pixels, input_points=[[[[1, 1]], [*six, [2, 2]]]])
    with pytest.raises(ValueError, match="image 0, object 0 has 8 prompt tokens.* at most 6"):
        released(images=pixels, input_points=[[six]], input_boxes=[[[1, 1, 2, 2]]])
    assert released(images=pixels, input_points=[[six]], input_boxes=[[None]])["input_points"].shape == (1, 1, 6, 2)


def test_unknown_keyword(processor, pixels) -> None:
    with pytest.raises(TypeError, match="input_point"):
        processor(images=pixels, input_point=[[[1, 1]]])
    with pytest.raises(TypeError, match="input_point"):
        processor(original_sizes=[(30, 40)], input_point=[[[1, 1]]])


@pytest.mark.parametrize(
    "sizes",
    [
        [],
        3,
        "sizes",
        [(30, 40, 3)],
        [(30.5, 40)],
        [(0, 40)],
        [(-1, 40)],
        [(NAN, 40)],
        [(10**6, 10**6)],
        [(10**400, 1)],
        [None],
    ],
)
def test_sizes_of_pictures_that_cannot_be(sizes, processor) -> None:
    with pytest.raises(ValueError, match="original_sizes.*expected .*height, width"):
        processor(original_sizes=sizes, input_points=[[[1, 1]]])
    with pytest.raises(ValueError, match="original_sizes.*expected .*height, width"):
        processor.post_process_masks(torch.zeros(1, 1, 1, 16, 16), sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_std": [0, 0, 0]}, r"image_std is \[0, 0, 0\], expected three numbers from 1e-06 to"),
        ({"image_std": [1, -1, 1]}, "image_std is"),
        ({"image_std": 0.5}, "image_std is 0.5, expected three"),
        ({"image_mean": [NAN, 0, 0]}, r"image_mean is \[nan, 0, 0\], expected three numbers from -1e\+06"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is"),
        ({"image_mean": ["a", "b", "c"]}, "image_mean is"),
        ({"do_resize": "no"}, "do_resize is 'no', expected True or False"),
        ({"do_normalize": 1}, "do_normalize is 1, expected True or False"),
        ({"antialias": None}, "antialias is None"),
        ({"resample": 99}, "resample is 99, expected 2"),
        ({"rescale_factor": 0.0}, "rescale_factor is 0.0"),
        ({"size": {}}, "size is {}, expected a whole number from 1 to 8192"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": "64"}, "size is '64'"),
        ({"size": True}, "size is True"),
        ({"mask_generation": "all"}, "mask_generation is 'all', expected a dict of options"),
        ({"mask_generation": {"points_per_crop": 10**9}}, "points_per_crop must be at most 1024, got 1000000000"),
        ({"mask_cleaning": {"fill_holes": 10**400}}, "fill_holes must be a fraction of at least 0"),
    ],
)
def test_image_processors_that_make_no_picture(options, message: str, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientSamImageProcessor(**options)
    fields = {**EfficientSamImageProcessor().to_dict(), **options}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        EfficientSamImageProcessor.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_resize": "no"}, "do_resize is 'no'"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": []}, r"size is \[\]"),
        ({"return_tensors": "tf"}, "return_tensors is 'tf', expected one of pt, np, None"),
        ({"return_tensors": []}, r"return_tensors is \[\]"),
    ],
)
def test_options_of_a_call(options, message: str, processor, pixels) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=pixels, **options)


def test_what_a_processor_is_told_about_its_checkpoint() -> None:
    for option, value in (("background_points", "no"), ("mask_prompts", 1), ("max_prompt_tokens", 0)):
        with pytest.raises(ValueError, match=f"{option} is {value!r}, expected"):
            EfficientSamProcessor(EfficientSamImageProcessor(size=64), **{option: value})


def test_exactly_one_of_images_and_sizes(processor, pixels) -> None:
    for arguments in ({}, {"images": pixels, "original_sizes": [(30, 40)]}):
        with pytest.raises(ValueError, match="exactly one of images and original_sizes"):
            processor(input_points=[[[1, 1]]], **arguments)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((30, 40, 4), np.uint8), r"images\[0\] has shape \(30, 40, 4\), expected three channels"),
        (np.zeros((30, 40), np.uint8), r"images\[0\] has shape \(30, 40\), expected three channels"),
        (torch.zeros(1, 30, 40), r"images\[0\] has shape \(1, 30, 40\), expected three channels"),
        (np.zeros((0, 40, 3), np.uint8), r"images\[0\] is empty: 40 x 0 pixels"),
        (Image.new("RGB", (0, 5)), r"images\[0\] is empty: 0 x 5 pixels"),
        (Image.new("I;16", (4, 5)), r"images\[0\] has mode I;16, expected 8 bits"),
        (Image.new("F", (4, 5)), r"images\[0\] has mode F, expected 8 bits"),
        (np.zeros((30, 40, 3), np.int32), r"images\[0\] has dtype torch.int32, expected uint8"),
        (np.zeros((30, 40, 3), np.uint16), r"images\[0\] has dtype torch.uint16, expected uint8"),
        (np.full((30, 40, 3), 200.0), r"images\[0\] holds floats from 200 to 200, expected 0..1"),
        (torch.full((3, 30, 40), -0.5), r"images\[0\] holds floats from -0.5 to -0.5, expected 0..1"),
        (torch.full((3, 30, 40), NAN), r"images\[0\] holds floats from nan to nan, expected 0..1"),
        ([], "images is an empty list"),
        ([np.zeros((3, 4, 3), np.uint8), np.zeros((3, 4), np.uint8)], r"images\[1\] has shape \(3, 4\)"),
    ],
    ids=range(14),
)
def test_bad_images(image: Any, message: str, processor) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=image, return_tensors="pt")


def test_things_that_are_no_images(processor) -> None:
    with pytest.raises(TypeError, match=r"images\[0\] is a int, expected a path"):
        processor(images=7)


def test_pictures_that_were_opened_before(processor, pixels, tmp_path) -> None:
    """Pillow reads on access: what is wrong with a file can show only then."""
    whole = saved(np.tile(pixels, (9, 9, 1)), tmp_path / "whole.png").read_bytes()
    with pytest.raises(ValueError, match=r"images\[0\] is damaged or truncated"):
        processor(images=Image.open(io.BytesIO(whole[: len(whole) // 2])))
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("I;16", (4, 5)).save(tmp_path / "deep.tif", exif=exif)
    with Image.open(tmp_path / "deep.tif") as deep, pytest.raises(ValueError, match="has mode I;16, expected 8 bits"):
        assert deep.getexif()[0x0112] == 3
        processor(images=deep)


def test_bad_files(processor, pixels, tmp_path) -> None:
    whole = saved(np.tile(pixels, (9, 9, 1)), tmp_path / "whole.png").read_bytes()
    contents = {
        "text.png": (b"this is no picture", "is not a picture that Pillow can read"),
        "empty.png": (b"", "is not a picture that Pillow can read"),
        "cut.png": (whole[: len(whole) // 2], "is damaged or truncated"),
        "huge.png": (png_header(50_000, 50_000), "is larger than Pillow's safety limit"),
    }
    for name, (content, message) in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.*{message}"):
            processor(images=tmp_path / name)
        with pytest.raises(ValueError, match=message):
            open_image(io.BytesIO(content))
    with pytest.raises(FileNotFoundError, match=r"absent.png.* does not exist"):
        processor(images=str(tmp_path / "absent.png"))
    with pytest.raises(IsADirectoryError, match="cannot be read"):
        processor(images=tmp_path)


@pytest.mark.parametrize("size", [0, -4, 3.5, {"height": 64}, {"longest_edge": 64}, {"height": 64, "width": 0}])
def test_bad_sizes(size: Any) -> None:
    with pytest.raises((ValueError, TypeError)):
        EfficientSamImageProcessor(size=size)


# Masks


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(2, 7, 3, 16, 16, generator=torch.Generator().manual_seed(4))


def test_masks_are_resized_bicubically_and_cut(processor, logits) -> None:
    assert MASKS_AT_ONCE < 7 * 3  # so that the pieces it works in meet
    sizes = torch.tensor([[30, 40], [50, 20]])
    results = processor.post_process_masks(logits, sizes)
    raw = processor.post_process_masks(logits, sizes, binarize=False)
    for result, floats, image, size in zip(results, raw, logits, sizes.tolist(), strict=True):
        expected = F.interpolate(image, size=size, mode="bicubic", align_corners=False)
        torch.testing.assert_close(floats, expected)
        assert result.dtype == torch.bool and torch.equal(result, floats >= 0)
    cut = processor.image_processor.post_process_masks(list(logits), sizes.tolist(), mask_threshold=0.7)
    assert torch.equal(cut[1], raw[1] >= 0.7)


def test_masks_take_what_code_for_sam_passes(processor, logits) -> None:
    sizes = [(30, 40), (50, 20)]
    positional = processor.post_process_masks(logits, sizes, [(64, 64)] * 2, 0.5, False)
    assert torch.equal(positional[0], processor.post_process_masks(logits, sizes, binarize=False)[0])
    half = processor.post_process_masks(logits.bfloat16(), np.array(sizes), binarize=False)
    assert half[0].dtype == torch.float32


def test_only_real_objects_come_back(processor, logits) -> None:
    object_mask = torch.ones(2, 7, dtype=torch.bool)
    object_mask[0, 3:] = False
    object_mask[1] = False
    results = processor.post_process_masks(logits, [(30, 40), (50, 20)], object_mask=object_mask)
    everything = processor.post_process_masks(logits, [(30, 40), (50, 20)])
    assert torch.equal(results[0], everything[0][:3])
    assert results[1].shape == (0, 3, 50, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"masks": torch.zeros(1, 1, 16, 16)}, r"masks of image 0 has shape \(1, 16, 16\), expected \(objects, masks"),
        ({"masks": torch.zeros(1, 1, 1, 0, 16)}, "masks of image 0 has shape"),
        ({"masks": torch.zeros(1, 1, 1, 4, 4).cfloat()}, "masks of image 0 holds torch.complex64"),
        ({"masks": "masks"}, "masks is 'masks'"),
        ({"masks": [None]}, "masks of image 0 is None"),
        ({"mask_threshold": NAN}, "mask_threshold is nan"),
        ({"mask_threshold": "0"}, "mask_threshold is '0'"),
        ({"object_mask": [[True, False]]}, r"object_mask has shapes \[\(2,\)\], expected those of masks, \[\(1,\)\]"),
        ({"object_mask": True}, "object_mask is True"),
        ({"prompts": []}, r"prompts is \[\], expected what the processor returned"),
        (
            {"prompts": {"input_points": [[[1, 2]]]}},
            r"input_points of image 0 has shape \(1, 2\), expected \(Q, P, 2\)",
        ),
        ({"prompts": {"input_boxes": "box"}}, "input_boxes is 'box'"),
        ({"prompts": {"input_labels": [[[1]]]}}, "input_labels of image 0 is not one for each of input_points"),
        ({"prompts": {"input_points": [[[[NAN, 2]]]]}, "largest_part": True}, "clicks of object 0 holds nan"),
    ],
    ids=range(14),
)
def test_malformed_masks_are_named(processor, arguments, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor.post_process_masks(**{"masks": torch.zeros(1, 1, 1, 4, 4), "original_sizes": [(9, 9)], **arguments})


def test_masks_and_sizes_must_agree(processor, logits) -> None:
    with pytest.raises(ValueError, match="original_sizes is for 3 images, but masks for 2"):
        processor.post_process_masks(logits, [(30, 40)] * 3)
    with pytest.raises(ValueError):
        processor.post_process_masks(logits, [(30, 40)] * 2, object_mask=torch.ones(3, 7, dtype=torch.bool))


@pytest.mark.parametrize(("options", "height", "width"), [({"size": 32}, 32, 32), ({"do_resize": False}, 30, 40)])
def test_prompts_follow_what_a_call_changes_about_the_image(processor, pixels, options, height, width) -> None:
    mask = np.zeros((1, 1, 1, height // 4, width // 4), np.float32)
    prompts = {"input_points": [[[[20, 15]]]], "input_boxes": [[[0, 0, 40, 30]]], "input_masks": mask}
    inputs = processor(images=pixels, return_tensors="pt", **prompts, **options)
    assert inputs["pixel_values"].shape[2:] == (height, width)
    assert inputs["input_points"].flatten().tolist() == [width / 2, height / 2]
    assert inputs["input_boxes"].flatten().tolist() == [0, 0, width, height]
    assert inputs["input_masks"].shape == mask.shape


def test_scalars_of_numpy_are_numbers(processor, pixels) -> None:
    rows, columns = np.nonzero(pixels[..., 0] == pixels[..., 0].max())
    inputs = processor(
        images=pixels,
        input_points=[[[[columns[0], rows[0]]]]],
        input_labels=[[[np.int64(1)]]],
        input_boxes=[[[np.float32(1.5), np.int32(2), np.float64(30), 20]]],
        return_tensors="pt",
    )
    assert inputs["input_points"].flatten().tolist() == pytest.approx([columns[0] * 1.6, rows[0] * 64 / 30])
    assert inputs["input_boxes"][0, 0, 0].item() == pytest.approx(1.5 * 1.6)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"input_points": [[[5, 5]]], "input_labels": 1}, "input_labels must be nested as the points"),
        ({"input_masks": [None]}, "input_masks must be nested"),
        ({"input_masks": 3}, "input_masks must be nested"),
    ],
)
def test_flat_prompts_are_named(processor, pixels, prompts, message) -> None:
    with pytest.raises(ValueError, match=message):
        processor(images=pixels, **prompts)
