# SPDX-License-Identifier: Apache-2.0
"""Calls of the model: a picture is encoded once, prompts on it are decoded, and everything in it is segmented.

Points and boxes are pixels of the picture, x to the right and y down; 0 <= x <= W and 0 <= y <= H are inside.
"""

import contextvars
import dataclasses
import functools
import inspect
import os
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pictures import InputError
from PIL import Image
from transformers import AutoProcessor, pipeline


MAX_POINTS = 32
LARGEST_NUMBER = 1e9  # beyond it a coordinate is no number of pixels
GRIDS = (8, 16, 24, 32)  # points per side that everything can be asked for, beside the checkpoint's own
USUAL_GRID = 32  # where the checkpoint says nothing
# Everything is computed with thresholds as low as these (or the checkpoint's own, where those are lower) and kept.
LOWEST_PREDICTED_IOU = 0.3
LOWEST_STABILITY = 0.5
# Where a checkpoint says nothing: those of Segment Anything.
USUAL_PREDICTED_IOU = 0.88
USUAL_STABILITY = 0.95
LOW_PREDICTED_IOU = 0.5  # below it a mask may not be what was meant, and the page says so
# By the names of the image processor's `mask_cleaning`: whole masks where a checkpoint leaves that open, and others.
WHOLE = {"largest_part": True, "fill_holes": 10.0, "within_box": True}
AS_PREDICTED = {"largest_part": False, "fill_holes": 0.0, "within_box": False}

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Embedding:
    """What the encoder makes of a picture of `size` (height, width), and how long it took."""

    tensor: torch.Tensor
    size: tuple[int, int]
    milliseconds: float


@dataclass(frozen=True)
class Candidates:
    """Masks that one prompt can mean, the one with the highest predicted IoU first.

    `logits` (M, h, w) at low resolution, `scores` (M) predicted IoU, `size` (height, width) of the picture; `prompts`
    as the processor returned them, by which masks are made whole at any size.
    """

    logits: torch.Tensor
    scores: list[float]
    size: tuple[int, int]
    prompts: dict[str, torch.Tensor]
    milliseconds: float

    def only(self, rank: int) -> "Candidates":
        """One of them, the best at rank 0."""
        return dataclasses.replace(self, logits=self.logits[rank : rank + 1], scores=self.scores[rank : rank + 1])


@dataclass(frozen=True)
class Everything:
    """Masks of all that is in a picture, of the highest predicted IoU first: K run lengths, and (K) values of each.

    `grid` is the number of points per side that was asked for.
    """

    masks: list[dict[str, Any]]
    scores: np.ndarray
    stability: np.ndarray
    areas: np.ndarray
    size: tuple[int, int]
    grid: int
    milliseconds: float

    def above(self, predicted_iou: float, stability: float) -> np.ndarray:
        """Numbers (N) of the masks that reach both thresholds; nothing is computed again."""
        return np.flatnonzero((self.scores >= predicted_iou) & (self.stability >= stability))

    def only(self, kept: np.ndarray) -> "Everything":
        """These masks alone, by their numbers (N)."""
        values = {name: getattr(self, name)[kept] for name in ("scores", "stability", "areas")}
        return dataclasses.replace(self, masks=[self.masks[index] for index in kept], **values)


def in_thread(name: str) -> Callable[[Callable], Callable]:
    """Run a method of Segmenter in its thread `name`, without gradients, and wait for it.

    gradio calls from dozens of threads. In each, torch would start workers of its own, and the allocator keep an area.
    The context goes along: in it gradio finds whose progress it is.
    """

    def decorate(method: Callable) -> Callable:
        without_gradients = torch.inference_mode()(method)

        @functools.wraps(method)
        def call(self: "Segmenter", *args: Any, **named: Any) -> Any:
            context = contextvars.copy_context()
            return self.threads[name].submit(context.run, without_gradients, self, *args, **named).result()

        return call

    return decorate


class Segmenter:
    """The model and the processor of a Hub repository or a folder, as its mask-generation pipeline loads them.

    Without `trust_remote_code` the classes are those that are registered with transformers here.
    """

    def __init__(self, model_id: str, trust_remote_code: bool):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.name = model_id
        # Those who look at the page come before programs, and before what takes long.
        ways = {"encoder": None, "decoder": None, "calls": give_way, "everything": give_way}
        self.threads = {name: ThreadPoolExecutor(1, name, initializer=way) for name, way in ways.items()}
        self.pipeline = pipeline("mask-generation", model=model_id, trust_remote_code=trust_remote_code, device=device)
        self.model = self.pipeline.model
        self.processor = AutoProcessor.from_pretrained(model_id, trust_remote_code=trust_remote_code)
        image_processor = self.processor.image_processor
        self.cleaning = getattr(image_processor, "mask_cleaning", None) or {}
        # The code beside a model can be older than this app.
        self.can_clean = "prompts" in inspect.signature(image_processor.post_process_masks).parameters
        options = getattr(image_processor, "mask_generation", None) or {}
        self.grid = int(options.get("points_per_crop", USUAL_GRID))
        self.predicted_iou = float(options.get("pred_iou_thresh", USUAL_PREDICTED_IOU))
        self.stability = float(options.get("stability_score_thresh", USUAL_STABILITY))
        self.background_points = bool(getattr(self.processor, "background_points", True))

    @property
    def grids(self) -> list[int]:
        """Points per side that everything can be asked for."""
        return sorted({*GRIDS, self.grid})

    @property
    def whole(self) -> bool:
        """Whether masks are made whole unless someone says otherwise."""
        return self.can_clean and any(self.cleaning.values())

    @property
    def lowest_thresholds(self) -> tuple[float, float]:
        """Predicted IoU and stability that everything is computed with."""
        return min(LOWEST_PREDICTED_IOU, self.predicted_iou), min(LOWEST_STABILITY, self.stability)

    @in_thread("encoder")
    def embed(self, picture: Image.Image) -> Embedding:
        """Encode a picture."""
        return self._embed(picture)

    def _embed(self, picture: Image.Image) -> Embedding:
        start = time.perf_counter()
        pixels = self.processor.image_processor(images=picture, return_tensors="pt")["pixel_values"]
        tensor = self.model.get_image_embeddings(pixels.to(self.model.device, self.model.dtype))
        return Embedding(tensor, (picture.height, picture.width), _milliseconds(start))

    @in_thread("decoder")
    def decode(
        self, embedding: Embedding, points: list[list[float]], labels: list[int], box: Box | None = None
    ) -> Candidates:
        """Masks of one object, from points (P, 2) with labels (P), 1 on it and 0 beside it, and a box around it.

        Raises InputError for prompts that are malformed, outside the picture or unknown to the checkpoint.
        """
        return self._decode(embedding, points, labels, box)

    def _decode(
        self, embedding: Embedding, points: list[list[float]], labels: list[int], box: Box | None
    ) -> Candidates:
        check_prompts(points, labels, box, embedding.size)
        start = time.perf_counter()
        prompts: dict[str, Any] = {}
        if points:
            prompts = {"input_points": [[points]], "input_labels": [[labels]]}
        if box is not None:
            prompts["input_boxes"] = [[list(box)]]
        try:
            inputs = self.processor(original_sizes=[embedding.size], return_tensors="pt", **prompts)
        except ValueError as error:  # such as more prompts than the checkpoint takes
            raise InputError(str(error)) from error
        on_device = {name: value.to(self.model.device) for name, value in inputs.items()}
        outputs = self.model(image_embeddings=embedding.tensor, multimask_output=True, **on_device)
        scores = outputs.iou_scores[0, 0].float().cpu()
        order = scores.argsort(descending=True, stable=True)
        logits = outputs.pred_masks[0, 0].float().cpu()[order]
        return Candidates(logits, scores[order].tolist(), embedding.size, dict(inputs), _milliseconds(start))

    @in_thread("calls")
    def segment(self, picture: Image.Image, points: Any, labels: Any, box: Any) -> Candidates:
        """Encode and decode at once, for prompts that are checked before; arguments and errors of `decode`."""
        check_prompts(points, labels, box, (picture.height, picture.width))
        return self._decode(self._embed(picture), points, labels, box)

    @in_thread("decoder")
    def masks(self, candidates: Candidates, size: tuple[int, int], whole: bool | None = None) -> np.ndarray:
        """The candidates at a size (height, width) of the screen, `whole` or as predicted: -> (M, H, W) bool.

        What is left out is as the checkpoint has it; a model whose code does not know whole masks gives what it has.
        """
        return self._masks(candidates, size, whole)

    @in_thread("encoder")
    def full_masks(self, candidates: Candidates, whole: bool | None = None) -> np.ndarray:
        """The same at the size of the picture, which can take seconds."""
        return self._masks(candidates, candidates.size, whole)

    def _masks(self, candidates: Candidates, size: tuple[int, int], whole: bool | None) -> np.ndarray:
        options: dict[str, Any] = {}
        if self.can_clean:
            whole = self.whole if whole is None else whole
            cleaning = (self.cleaning if self.whole else WHOLE) if whole else AS_PREDICTED
            options = {"prompts": candidates.prompts, **cleaning}
        return self.processor.post_process_masks(candidates.logits[None, None], [size], **options)[0][0].numpy()

    @in_thread("everything")
    def everything(
        self, picture: Image.Image, grid: int, progress: Callable[[float], None] | None = None
    ) -> Everything:
        """All masks above the lowest thresholds, from `grid` x `grid` points; `progress` hears the finished part."""
        start = time.perf_counter()
        predicted_iou, stability = self.lowest_thresholds
        options = {
            "points_per_crop": grid,
            "pred_iou_thresh": predicted_iou,
            "stability_score_thresh": stability,
            "output_type": "coco_rle",
        }
        generator = getattr(self.pipeline, "mask_generator", None)
        if generator is None:  # older code beside the model tells no progress
            found = self.pipeline(picture, **options)
        else:
            found = generator(picture, progress=progress, **options)
        return Everything(
            masks=found["masks"],
            scores=found["scores"].numpy(),
            stability=found["stability_scores"].numpy(),
            areas=found["areas"].numpy(),
            size=(picture.height, picture.width),
            grid=grid,
            milliseconds=_milliseconds(start),
        )


def give_way() -> None:
    """Leave others the larger part of the processor: in Linux each thread has a niceness of its own."""
    if sys.platform == "linux":
        os.nice(10)


def check_grid(value: Any, grids: list[int]) -> None:
    """InputError unless it is one of the grids on offer."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value not in grids:
        raise InputError(f"The grid must be one of {', '.join(map(str, grids))} points a side, got {short(value)}.")


def check_prompts(points: Any, labels: Any, box: Any, size: tuple[int, int]) -> None:
    """Raise InputError unless these prompts describe an object in a picture of `size` (height, width)."""
    if not isinstance(points, list) or not isinstance(labels, list):
        raise InputError("Points must be a list of [x, y], and labels a list of 1 and 0.")
    if len(points) > MAX_POINTS:
        raise InputError(f"At most {MAX_POINTS} points are taken, got {len(points)}.")
    if len(labels) != len(points):
        raise InputError(f"There must be one label for each point, got {len(labels)} for {len(points)} points.")
    for point in points:
        _check_point(point, size)
    for label in labels:
        if isinstance(label, bool) or label not in (0, 1):
            raise InputError(f"A label must be 1, on the object, or 0, beside it; got {short(label)}.")
    if box is not None:
        _check_box(box, size)
    elif 1 not in labels:
        raise InputError("At least one point must be on the object.")


def _check_point(point: Any, size: tuple[int, int]) -> None:
    height, width = size
    if not are_numbers(point, 2):
        raise InputError(f"A point must be [x, y], two numbers of pixels; got {short(point)}.")
    if not (0 <= point[0] <= width and 0 <= point[1] <= height):
        raise InputError(f"The point {short(point)} is outside the picture of {width} x {height} pixels.")


def _check_box(box: Any, size: tuple[int, int]) -> None:
    height, width = size
    if not are_numbers(box, 4):
        raise InputError(f"A box must be [x0, y0, x1, y1], four numbers of pixels; got {short(box)}.")
    x0, y0, x1, y1 = box
    if x1 <= x0 or y1 <= y0:
        raise InputError(f"The box {short(list(box))} is empty: x1 must be above x0, and y1 above y0.")
    if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
        raise InputError(f"The box {short(list(box))} is outside the picture of {width} x {height} pixels.")


def are_numbers(values: Any, count: int) -> bool:
    """Whether these are so many finite numbers."""
    if not isinstance(values, (list, tuple)) or len(values) != count:
        return False
    plain = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)
    return plain and all(-LARGEST_NUMBER <= value <= LARGEST_NUMBER for value in values)  # NaN is neither


def short(value: Any) -> str:
    """The start of a value's text, for a message."""
    try:
        text = str(value)
    except ValueError:  # a whole number of thousands of digits
        return "a very large number"
    return text if len(text) <= 60 else text[:57] + "..."


def _milliseconds(start: float) -> float:
    return 1000 * (time.perf_counter() - start)
