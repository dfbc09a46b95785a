# SPDX-License-Identifier: Apache-2.0
"""Calls for programs: a picture and prompts in, masks out, nothing kept. gradio_client and MCP clients see these."""

import json
from typing import Any

import downloads
import gradio as gr
from pictures import InputError, open_picture, picture_name
from PIL import Image
from segmenting import Segmenter, check_grid, short
from waiting import stop_if_unwanted
from widgets import PictureFile, readable


LONGEST_TEXT = 10_000  # characters of prompts
NUMBERS = {"type": "array", "items": {"type": "number"}}


class Endpoints:
    """The stateless calls on one model."""

    def __init__(self, segmenter: Segmenter):
        self.segmenter = segmenter

    def segment_points(
        self, image: str, points: Any, labels: Any = None, whole: Any = None
    ) -> tuple[dict[str, Any], Image.Image]:
        """Cut one object out of a picture, from points on it and beside it.

        Args:
            image: the picture: JPEG, PNG, WebP, GIF or BMP.
            points: list of [x, y] in pixels of the picture, from its top left corner, such as [[230, 120]].
            labels: list with a 1 for each point on the object and a 0 for each beside it; all 1 when left out.
            whole: true for masks of the clicked part without holes, false for masks as they are predicted; as the
                model has it when left out.

        Returns:
            A COCO instances file with the three masks that the points can mean, the most likely one (highest
            predicted_iou) first, and that one as a black and white PNG of the picture's size.
        """
        try:
            points = parse(points, "points")
            labels = parse(labels, "labels")
            labels = [1] * len(points) if labels is None and isinstance(points, list) else labels
            return self._segment(image, points, labels, None, whole)
        except InputError as error:
            raise readable(error) from None

    def segment_box(self, image: str, box: Any, whole: Any = None) -> tuple[dict[str, Any], Image.Image]:
        """Cut one object out of a picture, from a box around it.

        Args:
            image: the picture: JPEG, PNG, WebP, GIF or BMP.
            box: [x0, y0, x1, y1] in pixels of the picture, from its top left corner, such as [100, 40, 300, 220].
            whole: true for masks of one part without holes, cut at the box, false for masks as they are predicted; as
                the model has it when left out.

        Returns:
            A COCO instances file with the three masks that the box can mean, the most likely one (highest
            predicted_iou) first, and that one as a black and white PNG of the picture's size.
        """
        try:
            box = parse(box, "box")
            if box is None:
                raise InputError("A box must be given: [x0, y0, x1, y1].")
            return self._segment(image, [], [], box, whole)
        except InputError as error:
            raise readable(error) from None

    def segment_everything(
        self,
        image: str,
        grid: int | None = None,
        predicted_iou: float | None = None,
        stability: float | None = None,
    ) -> tuple[dict[str, Any], Image.Image]:
        """Find all objects in a picture.

        Args:
            image: the picture: JPEG, PNG, WebP, GIF or BMP.
            grid: points per side of the grid that is asked for: 8, 16, 24 or 32; the model's usual one when left out.
            predicted_iou: least predicted IoU of a mask, 0 to 1; the model's usual threshold when left out.
            stability: least stability of a mask, 0 to 1; the model's usual threshold when left out.

        Returns:
            A COCO instances file with all masks, and a PNG in which each pixel has the id of its mask, 0 for none.
        """
        try:
            limits = [
                check_threshold(self.segmenter.predicted_iou if predicted_iou is None else predicted_iou),
                check_threshold(self.segmenter.stability if stability is None else stability),
            ]
            grid = self.segmenter.grid if grid is None else grid
            check_grid(grid, self.segmenter.grids)
            found = self.segmenter.everything(open_given(image), int(grid), lambda _: stop_if_unwanted())
            found = found.only(found.above(*limits))
            return downloads.everything_to_coco(picture_name(image), found), downloads.label_image(found)
        except InputError as error:
            raise readable(error) from None

    def _segment(
        self, image: str, points: Any, labels: Any, box: Any, whole: Any
    ) -> tuple[dict[str, Any], Image.Image]:
        check_whole(whole)
        picture = open_given(image)
        candidates = self.segmenter.segment(picture, points, labels, box)
        masks = self.segmenter.full_masks(candidates, whole)
        coco = downloads.candidates_to_coco(picture_name(image), masks, candidates.scores)
        return coco, downloads.mask_image(masks[0])


def add_endpoints(segmenter: Segmenter, lanes: dict[str, dict[str, Any]]) -> None:
    """Offer the calls in the current `gr.Blocks`, each in one of the `lanes`: options of events, by name."""
    endpoints = Endpoints(segmenter)
    with gr.Group(visible=False):
        image = PictureFile(type="filepath", label="Image")
        points = _list_input("Points", [[230, 120]], {"type": "array", "items": NUMBERS})
        labels = _list_input("Labels", [1], {"type": "array", "items": {"type": "integer"}})
        box = _list_input("Box", [100, 40, 300, 220], NUMBERS)
        grid = gr.Number(segmenter.grid, label="Grid")
        # What the code beside the model does not know is not on offer.
        whole = [gr.Checkbox(segmenter.whole, label="Whole")] if segmenter.can_clean else []
        predicted_iou, stability = gr.Number(label="Predicted IoU"), gr.Number(label="Stability")
        coco = gr.JSON(label="COCO")
        mask, numbers = (gr.Image(format="png", label=name, buttons=[]) for name in ("Mask", "Numbers"))
        trigger = gr.Button()
    calls = {
        "segment_points": ([image, points, labels, *whole], mask, "calls"),
        "segment_box": ([image, box, *whole], mask, "calls"),
        "segment_everything": ([image, grid, predicted_iou, stability], numbers, "everything"),
    }
    for name, (inputs, picture, lane) in calls.items():
        trigger.click(getattr(endpoints, name), inputs, [coco, picture], api_name=name, **lanes[lane])


def _list_input(label: str, example: Any, schema: dict[str, Any]) -> gr.JSON:
    """A JSON input that describes itself, as gradio's own does not: what it takes, and an example."""
    component = gr.JSON(label=label)
    component.api_info = lambda: schema
    component.example_payload = component.example_value = lambda: example
    return component


def open_given(image: str | None) -> Image.Image:
    """The picture of a call; InputError if there is none."""
    if image is None:
        raise InputError("An image must be given.")
    return open_picture(image)


def parse(value: Any, name: str) -> Any:
    """A list as it is, or written as JSON; InputError for a text that is none."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value[: LONGEST_TEXT + 1]) if len(value) <= LONGEST_TEXT else None
    except (ValueError, RecursionError):
        raise InputError(f"{name} must be a list, as JSON; got {short(value)}.") from None


def check_whole(value: Any) -> None:
    """InputError unless it is true, false, or left out."""
    if value is not None and not isinstance(value, bool):
        raise InputError(f"whole must be true or false, got {short(value)}.")


def check_threshold(value: Any) -> float:
    """A number from 0 to 1; InputError for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise InputError(f"A threshold must be a number from 0 to 1, got {short(value)}.")
    return float(value)
