# SPDX-License-Identifier: Apache-2.0
"""Drawings: what changes, what stays, and where."""

import numpy as np
import pytest
from PIL import Image

from efficientsam_hf import visualization
from efficientsam_hf.visualization import (
    contact_sheet,
    draw_boxes,
    draw_labels,
    draw_masks,
    draw_points,
    draw_prompts,
    label_anchors,
    object_color,
)


GREY = (128, 128, 128)


@pytest.fixture
def picture() -> Image.Image:
    return Image.new("RGB", (120, 90), GREY)


@pytest.fixture
def disc() -> np.ndarray:
    rows, columns = np.mgrid[:90, :120]
    return (rows - 45) ** 2 + (columns - 60) ** 2 < 25**2


def changed(image: Image.Image) -> np.ndarray:
    """Pixels that are no longer grey, (H, W) bool."""
    return (np.asarray(image) != GREY[0]).any(axis=2)


def test_mask_is_tinted_and_the_rest_is_left(picture: Image.Image, disc: np.ndarray) -> None:
    result = draw_masks(picture, disc, opacity=0.5)
    assert np.asarray(picture).std() == 0
    middle = np.asarray(result)[45, 60].astype(float)
    np.testing.assert_allclose(middle, (np.array(GREY) + object_color(0)) / 2, atol=2)
    rows, columns = np.mgrid[:90, :120]
    far = (rows - 45) ** 2 + (columns - 60) ** 2 > 32**2
    assert not changed(result)[far].any()


def test_contour_lies_on_the_edge_in_full_colour(picture: Image.Image, disc: np.ndarray) -> None:
    plain = np.asarray(draw_masks(picture, disc, opacity=0.0, contour=False))
    assert not changed(Image.fromarray(plain)).any()
    outlined = np.asarray(draw_masks(picture, disc, opacity=0.0)).astype(int)
    distance_to_color = np.abs(outlined - object_color(0)).sum(axis=2)
    assert (distance_to_color[45, 33:37] < 60).any()
    assert (distance_to_color[45, 83:87] < 60).any()
    assert not changed(Image.fromarray(outlined.astype(np.uint8)))[45, 45:75].any()


def test_contour_is_anti_aliased(picture: Image.Image) -> None:
    rows, columns = np.mgrid[:90, :120]
    slanted = columns > 30 + 0.37 * rows
    shades = np.unique(np.asarray(draw_masks(picture, slanted, opacity=0.0)).reshape(-1, 3), axis=0)
    assert len(shades) > 20


def test_mask_that_fills_the_picture_is_outlined_at_the_border(picture: Image.Image) -> None:
    result = changed(draw_masks(picture, np.ones((90, 120), bool), opacity=0.0))
    assert result[45, 0] and result[0, 60] and result[-1, 60] and result[45, -1]
    assert not result[20:70, 20:100].any()


def test_one_pixel_and_empty_masks(picture: Image.Image) -> None:
    single = np.zeros((90, 120), bool)
    assert not changed(draw_masks(picture, single)).any()
    single[0, 0] = True
    assert changed(draw_masks(picture, single))[0, 0]
    assert not changed(draw_masks(picture, np.zeros((0, 90, 120), bool))).any()


def test_masks_may_be_tensors_and_grey_pictures_become_rgb(disc: np.ndarray) -> None:
    torch = pytest.importorskip("torch")
    result = draw_masks(Image.new("L", (120, 90), 128), torch.from_numpy(disc)[None], colors=[(255, 0, 0)])
    assert result.mode == "RGB"
    assert result.getpixel((60, 45))[0] > result.getpixel((60, 45))[1] + 50


def test_click_is_centred_on_its_pixel(picture: Image.Image) -> None:
    touched = changed(draw_points(picture, [[60, 45]]))
    rows, columns = np.nonzero(touched)
    assert rows.mean() == pytest.approx(45, abs=0.51) and columns.mean() == pytest.approx(60, abs=0.51)
    assert 7 <= np.ptp(columns) <= 24


def test_clicks_differ_by_label_in_colour_and_in_sign(picture: Image.Image) -> None:
    positive = np.asarray(draw_points(picture, [[60, 45]], [1])).astype(int)
    negative = np.asarray(draw_points(picture, [[60, 45]], [0])).astype(int)
    assert positive[47, 62, 1] > positive[47, 62, 0]
    assert negative[47, 62, 0] > negative[47, 62, 1]
    # A minus covers little of the column through the centre, a plus much of it: colour is not the only difference.
    white_in_column = [(image[41:50, 60].min(axis=1) > 200).sum() for image in (positive, negative)]
    assert white_in_column[0] > white_in_column[1]
    assert not changed(draw_points(picture, [[60, 45]], [-1])).any()


@pytest.mark.parametrize("point", [(0, 0), (119.9, 89.9), (120, 90)])
def test_clicks_at_the_border_are_drawn(picture: Image.Image, point: tuple[float, float]) -> None:
    assert changed(draw_points(picture, [point])).any()


def test_box_frame_covers_its_edge_pixels(picture: Image.Image) -> None:
    result = np.asarray(draw_boxes(picture, [[20, 30, 80, 60]]))
    for row, column in ((30, 50), (59, 50), (45, 20), (45, 79)):
        assert tuple(result[row, column]) == object_color(0)
    assert not changed(Image.fromarray(result))[40:50, 35:65].any()
    assert not changed(Image.fromarray(result))[:, 85:].any()


def test_prompts_put_clicks_over_boxes(picture: Image.Image) -> None:
    both = np.asarray(draw_prompts(picture, points=[[20, 45]], boxes=[[20, 30, 80, 60]]))
    box = np.asarray(draw_boxes(picture, [[20, 30, 80, 60]]))
    assert tuple(both[45, 20]) != tuple(box[45, 20])
    assert tuple(both[45, 79]) == tuple(box[45, 79])
    assert not changed(draw_prompts(picture)).any()


def test_label_stands_above_its_anchor_and_inside_the_picture(picture: Image.Image) -> None:
    touched = changed(draw_labels(picture, ["0.93"], [[60, 60]]))
    assert touched.any() and not touched[61:].any()
    for corner in ([0, 0], [119, 0], [0, 89], [119, 89]):
        tag = changed(draw_labels(picture, ["0.93"], [corner])).sum()
        assert tag == pytest.approx(touched.sum(), rel=0.1)


def test_labels_do_not_cover_each_other(picture: Image.Image) -> None:
    single = changed(draw_labels(picture, ["0.93"], [[60, 60]])).sum()
    three = changed(draw_labels(picture, ["0.93"] * 3, [[60, 5], [62, 5], [58, 9]])).sum()
    assert three == pytest.approx(3 * single, rel=0.1)


def test_label_anchor_is_the_middle_of_the_top_row(disc: np.ndarray) -> None:
    anchors = label_anchors(np.stack([disc, np.zeros_like(disc)]))
    np.testing.assert_array_equal(anchors, [[60, 21], [0, 0]])


def test_sheet_keeps_every_picture_and_its_proportions() -> None:
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    images = [
        Image.new("RGB", size, color) for size, color in zip([(40, 20), (20, 40), (40, 40)], colors, strict=True)
    ]
    sheet = contact_sheet(images, columns=2, cell=40, gap=5, background=(9, 9, 9))
    assert sheet.size == (2 * 45 + 5, 2 * 45 + 5)
    pixels = np.asarray(sheet)
    areas = [(np.abs(pixels.astype(int) - color).sum(axis=2) == 0).sum() for color in colors]
    assert areas == [800, 800, 1600]
    assert contact_sheet(images[:1], columns=5).size == (40 + 12, 40 + 12)


def test_lines_grow_with_the_picture() -> None:
    small, large = Image.new("RGB", (100, 100)), Image.new("RGB", (4000, 3000))
    assert visualization.line_width(large) > 5 * visualization.line_width(small)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda image: draw_masks(image, np.zeros((2, 5, 5), bool)), "masks must have shape"),
        (lambda image: draw_masks(image, np.zeros((1, 90, 120), bool), colors=[]), "one per mask"),
        (lambda image: draw_masks(image, np.zeros((1, 90, 120), bool), opacity=2), "between 0 and 1"),
        (lambda image: draw_points(image, [[1, 2]], [1, 1]), "one per point"),
        (lambda image: draw_points(image, [[1, float("nan")]]), r"points must be \(N, 2\) finite numbers"),
        (lambda image: draw_points(image, [[1, 2, 3]]), r"points must be \(N, 2\) finite numbers"),
        (lambda image: draw_boxes(image, [[1, 2, 3, 10**400]]), r"boxes must be \(N, 4\) finite numbers"),
        (lambda image: draw_boxes(image, "box"), r"boxes must be \(N, 4\) finite numbers"),
        (lambda image: draw_labels(image, ["a"], [[1e300, 1]]), r"anchors must be \(N, 2\) finite numbers"),
        (lambda image: draw_boxes(image, [[1, 2, 3, 4]], colors=[]), "one per box"),
        (lambda image: draw_labels(image, ["a"], []), "one per text"),
        (lambda image: contact_sheet([], 2), "needs pictures"),
        (lambda image: contact_sheet([image], 0), "needs pictures"),
    ],
)
def test_bad_input(picture: Image.Image, call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(picture)
