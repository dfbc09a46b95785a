# SPDX-License-Identifier: Apache-2.0
"""`efficientsam segment`: clicks and boxes on one picture become masks."""

import argparse
import io
import math
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import check_writable, write_json, write_png, writing_together
from ..models.rle_efficientsam import encode_rle
from ..visualization import draw_labels, draw_masks, draw_prompts, label_anchors, object_color
from . import everything
from .loading import add_cleaning_options, add_model_options, check_cleaning, load_model


DESCRIPTION = """\
Cut objects out of a picture with clicks and boxes, or all there is with --everything. Coordinates are pixels of the
picture as it is seen (EXIF rotation applied), x to the right and y down from the top left corner; outside the picture
is an error."""
EPILOG = """\
which prompts make one object:
  No box, or one box: all points, the box and the mask describe one object.
  Several boxes:      each box is an object of its own; a point or background click belongs to the one box it lies in
                      (it is an error if it lies in none or in several).
  --each-point:       each --point is an object of its own; --background clicks apply to all of them. No boxes.

written to OUT:
  overlay.png         masks, contours, prompts and scores on the picture
  mask_0.png, ...     one black and white picture per object: the mask with the highest predicted IoU of three
  mask_0_candidate_0.png, ...  with --all-masks, the three masks of each object
  masks.json          per object: prompts, score (predicted IoU), area in pixels, box [x0, y0, x1, y1] in pixels with
                      x1 and y1 exclusive (null for an empty mask), segmentation (COCO RLE), file names, and
                      low_score (true) where the score is below 0.5
  labels.png          with --everything and --label-image, the number of each pixel's mask in masks.json plus one
                      (labels.tif where there are more than 65,535)
--everything writes no picture per object, and the point of the grid in place of the prompts.

examples:
  efficientsam segment dog.jpg --point 250,180 -o out
  efficientsam segment dog.jpg --box 90,60,410,350 --background 400,300 -o out
  efficientsam segment https://example.org/street.jpg --point 40,80 --point 300,90 --each-point -o out
  efficientsam segment street.jpg --everything --points-per-crop 32 -o out
  efficientsam segment scan.tif --everything --tile 1024 -o out
  cat dog.jpg | efficientsam segment - --point 250,180 -o out"""
PROMPTS = ("input_points", "input_labels", "input_boxes")
LOW_SCORE = 0.5  # predicted IoU below which a result says that it may not be what was meant
MASK_PROMPT_LOGIT = 6.0  # about two standard deviations of the logits that the model itself answers with


@dataclass
class ObjectPrompt:
    """What describes one object, in pixels of the picture; labels 1 foreground, 0 background."""

    points: list[tuple[float, ...]] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    box: tuple[float, ...] | None = None

    def add(self, point: tuple[float, ...], label: int) -> None:
        """Add one click."""
        self.points.append(point)
        self.labels.append(label)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "segment",
        help="cut objects out of a picture",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", metavar="IMAGE", help="path, URL, or - for standard input")
    parser.add_argument("-o", "--output", required=True, metavar="OUT", help="folder for the results")
    parser.add_argument("--all-masks", action="store_true", help="write the three candidates of each object too")
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--point", action="append", default=[], type=_point, metavar="X,Y", help="a click on the object"
    )
    group.add_argument(
        "--background",
        action="append",
        default=[],
        type=_point,
        metavar="X,Y",
        help="a click on what is not the object",
    )
    group.add_argument("--box", action="append", default=[], type=_box, metavar="X0,Y0,X1,Y1", help="a box around it")
    group.add_argument(
        "--mask",
        metavar="IN.png",
        help="a rough mask of it, white on black, of the picture's size, cut at --box where dense_boxes is on",
    )
    group.add_argument("--each-point", action="store_true", help="each --point is an object of its own")
    everything.add_options(parser)
    parser.add_argument("--model", metavar="M", help="folder or Hub name (default: the checkpoint that ships)")
    add_model_options(parser)
    add_cleaning_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check everything that can be checked, load the model, segment, write, print a table."""
    check_cleaning(args)
    everything.check(args)
    if args.everything:
        with everything.large_pictures(args):
            image = read_image(args.image)
        return everything.run(args, image)
    objects = group_prompts(args.point, args.background, args.box, args.mask is not None, args.each_point)
    image = read_image(args.image)
    check_inside(objects, image.size)
    mask_prompt = None if args.mask is None else read_mask_prompt(args.mask, image.size)
    folder = Path(args.output)
    check_writable(folder)
    model, processor = load_model(args.model, args)
    candidates, scores = segment(model, processor, image, objects, mask_prompt, args.all_masks)
    with writing_together(folder) as aside:
        records = write_results(aside, args.image, image, objects, candidates, scores)
    print("\n".join([format_table(records), *low_scores(records)]))
    print(f"wrote {folder / 'overlay.png'}, {folder / 'masks.json'} and {sum(len(r['files']) for r in records)} masks")
    return 0


def group_prompts(
    points: list[tuple[float, ...]],
    background: list[tuple[float, ...]],
    boxes: list[tuple[float, ...]],
    has_mask: bool,
    each_point: bool,
) -> list[ObjectPrompt]:
    """Sort prompts into objects as the help says; `ValueError` where they contradict each other or say nothing."""
    if not (points or boxes or has_mask):
        raise ValueError("nothing to segment: give at least one --point, --box or --mask, or --everything")
    if each_point and (boxes or not points):
        raise ValueError("--each-point makes an object of each --point: it needs points and excludes --box")
    if has_mask and (len(boxes) > 1 or (each_point and len(points) > 1)):
        raise ValueError("--mask describes one object: it excludes several boxes and several points with --each-point")
    clicks = [(point, 1) for point in points] + [(point, 0) for point in background]
    if each_point:
        objects = [ObjectPrompt([point], [1]) for point in points]
        for prompt in objects:
            for point in background:
                prompt.add(point, 0)
        return objects
    objects = [ObjectPrompt(box=box) for box in boxes] or [ObjectPrompt()]
    for point, label in clicks:
        _owner(point, objects).add(point, label)
    return objects


def _owner(point: tuple[float, ...], objects: list[ObjectPrompt]) -> ObjectPrompt:
    """The object a click belongs to: the only one, or the one whose box it lies in; `ValueError` if unclear."""
    if len(objects) == 1:
        return objects[0]
    owners = [prompt for prompt in objects if prompt.box and _inside(point, prompt.box)]
    if len(owners) != 1:
        where = "none" if not owners else "several"
        raise ValueError(
            f"point {_numbers(point)} lies in {where} of the {len(objects)} boxes, so it is not clear which object it"
            " describes: with several boxes each point must lie in exactly one"
        )
    return owners[0]


def check_inside(objects: list[ObjectPrompt], size: tuple[int, int]) -> None:
    """`ValueError` naming the first click or box outside a picture of size (W, H); the far edges count as inside."""
    frame = (0, 0, *size)
    for prompt in objects:
        for point, label in zip(prompt.points, prompt.labels, strict=True):
            if not _inside(point, frame):
                option = "--point" if label else "--background"
                raise ValueError(
                    f"{option} {_numbers(point)} lies outside the picture of {size[0]} x {size[1]} pixels"
                )
        if prompt.box and not (_inside(prompt.box[:2], frame) and _inside(prompt.box[2:], frame)):
            raise ValueError(
                f"--box {_numbers(prompt.box)} reaches outside the picture of {size[0]} x {size[1]} pixels"
            )


def read_image(source: str) -> Image.Image:
    """Open a path, a URL or `-` (standard input) as an upright RGB picture; raises as `open_image` does."""
    from ..models.image_processing_efficientsam import open_image

    if source != "-":
        return open_image(source)
    data = sys.stdin.buffer.read()
    if not data:
        raise ValueError("standard input is empty: pipe a picture into the command")
    return open_image(io.BytesIO(data), "standard input")


def read_mask_prompt(path: str, size: tuple[int, int]) -> Image.Image:
    """Open a mask prompt as a single-channel picture of 0 and 255; `ValueError` if empty or not of size (W, H)."""
    mask = read_image(path).convert("L").point(lambda value: 255 if value >= 128 else 0)
    if mask.size != size:
        raise ValueError(
            f"--mask {path} is {mask.width} x {mask.height} pixels, the picture {size[0]} x {size[1]}: they must agree"
        )
    if mask.getextrema()[1] == 0:
        raise ValueError(f"--mask {path} is empty: no pixel is brighter than half")
    return mask


def mask_to_logits(mask: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """Average a 0 / 255 mask down to logits, (H, W) -> (1, 1, 1, h, w) float32; `size` is (h, w)."""
    share = np.asarray(mask.convert("F").resize((size[1], size[0]), Image.Resampling.BOX)) / np.float32(255)
    return ((2 * share - 1) * MASK_PROMPT_LOGIT)[None, None, None]


def segment(
    model: Any,
    processor: Any,
    image: Image.Image,
    objects: list[ObjectPrompt],
    mask_prompt: Image.Image | None = None,
    all_masks: bool = False,
) -> tuple[list[np.ndarray], np.ndarray]:
    """Masks of every object, sorted by falling score, Q times (1 or 3, H, W) bool, and the scores (Q, 3)."""
    import torch

    prompts = _processor_prompts(objects)
    if mask_prompt is not None:
        size = processor.image_processor.size
        prompts["input_masks"] = mask_to_logits(mask_prompt, (size["height"] // 4, size["width"] // 4))
    inputs = processor(images=image, return_tensors="pt", **prompts)
    with torch.no_grad():
        outputs = model(**{name: value.to(model.device) for name, value in inputs.items()}, multimask_output=True)
    scores = outputs.iou_scores[0].float().cpu()
    if not scores.isfinite().all():
        raise ValueError(f"the scores of the model are not finite numbers, computed in {model.dtype}")
    keep = scores.argsort(dim=-1, descending=True, stable=True)[:, : 3 if all_masks else 1]
    masks = []
    for index, order in enumerate(keep):  # one object at a time: full-size logits of all of them may not fit
        logits = outputs.pred_masks[0, index, order.to(model.device)][None].float().cpu()
        own = {name: value[:, index : index + 1] for name, value in inputs.items() if name in PROMPTS}
        own["reshaped_input_sizes"] = inputs["reshaped_input_sizes"]
        full = processor.post_process_masks(logits[None], inputs["original_sizes"], prompts=own)
        masks.append(full[0][0].numpy())
    return masks, scores.gather(1, keep).numpy()


def _processor_prompts(objects: list[ObjectPrompt]) -> dict[str, Any]:
    """Prompts of one picture nested as the processor takes them; what no object has is left out."""
    prompts: dict[str, Any] = {}
    if any(prompt.points for prompt in objects):
        prompts["input_points"] = [[[list(point) for point in prompt.points] for prompt in objects]]
        prompts["input_labels"] = [[list(prompt.labels) for prompt in objects]]
    if any(prompt.box for prompt in objects):
        prompts["input_boxes"] = [[None if prompt.box is None else list(prompt.box) for prompt in objects]]
    return prompts


def write_results(
    folder: Path,
    source: str,
    image: Image.Image,
    objects: list[ObjectPrompt],
    candidates: list[np.ndarray],
    scores: np.ndarray,
) -> list[dict[str, Any]]:
    """Write the mask pictures, masks.json and overlay.png; -> the objects' records in masks.json."""
    records = []
    for index, (prompt, masks) in enumerate(zip(objects, candidates, strict=True)):
        names = [f"mask_{index}.png"]
        if len(masks) > 1:
            names += [f"mask_{index}_candidate_{rank}.png" for rank in range(len(masks))]
        for name, mask in zip(names, [masks[0], *masks], strict=False):
            write_png(folder / name, Image.fromarray(mask.astype(np.uint8) * 255))
        described = [_describe(mask, score) for mask, score in zip(masks, scores[index], strict=True)]
        record = {"prompts": asdict(prompt), **described[0], "files": names}
        if scores[index, 0] < LOW_SCORE:
            record["low_score"] = True
        records.append(record if len(masks) == 1 else {**record, "candidates": described})
    content = {"image": source, "size": [image.height, image.width], "objects": records}
    write_json(folder / "masks.json", content)
    write_png(folder / "overlay.png", draw_overlay(image, objects, [masks[0] for masks in candidates], scores[:, 0]))
    return records


def _describe(mask: np.ndarray, score: float) -> dict[str, Any]:
    """Score, area in pixels, box xyxy in pixels and COCO RLE of one mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = [int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1] if len(rows) else None
    return {
        "score": round(float(score), 4),
        "area": int(mask.sum()),
        "box": box,
        "segmentation": encode_rle(mask),
    }


def draw_overlay(
    image: Image.Image, objects: list[ObjectPrompt], masks: list[np.ndarray], scores: np.ndarray
) -> Image.Image:
    """Masks, contours, prompts and scores on the picture."""
    canvas = draw_masks(image, np.stack(masks))
    boxes = [(prompt.box, object_color(index)) for index, prompt in enumerate(objects) if prompt.box]
    points = [point for prompt in objects for point in prompt.points]
    labels = [label for prompt in objects for label in prompt.labels]
    canvas = draw_prompts(canvas, points, labels, [box for box, _ in boxes], [color for _, color in boxes])
    return draw_labels(canvas, [f"{score:.2f}" for score in scores], label_anchors(np.stack(masks)))


def format_table(records: list[dict[str, Any]]) -> str:
    """One line per object: prompts, score, area in pixels, box."""
    lines = [f"{'object':>6}  {'prompts':<24}  {'score':>5}  {'area':>9}  box"]
    for index, record in enumerate(records):
        box = "-" if record["box"] is None else _numbers(record["box"])
        prompts = _summary(record["prompts"])
        lines.append(f"{index:>6}  {prompts:<24}  {record['score']:5.2f}  {record['area']:>9}  {box}")
    return "\n".join(lines)


def low_scores(records: list[dict[str, Any]]) -> list[str]:
    """A line for each object of a low score: what would help."""
    lines = []
    for index, record in enumerate(records):
        if record.get("low_score"):
            more = "another click" if record["prompts"]["box"] else "a box, or another click,"
            lines.append(f"object {index}: predicted IoU {record['score']:.2f} is low; {more} says more")
    return lines


def _summary(prompts: dict[str, Any]) -> str:
    """What an object was described with, as in "2 points, box"."""
    count = len(prompts["points"])
    parts = [f"{count} point{'s' if count > 1 else ''}"] if count else []
    return ", ".join(parts + (["box"] if prompts["box"] else [])) or "mask"


def _point(text: str) -> tuple[float, ...]:
    """Read X,Y."""
    return _parse_numbers(text, 2, "X,Y")


def _box(text: str) -> tuple[float, ...]:
    """Read X0,Y0,X1,Y1 of a box with an area."""
    box = _parse_numbers(text, 4, "X0,Y0,X1,Y1")
    if box[2] <= box[0] or box[3] <= box[1]:
        raise argparse.ArgumentTypeError(f"{text!r} is an empty box: X1 must be above X0 and Y1 above Y0")
    return box


def _parse_numbers(text: str, count: int, form: str) -> tuple[float, ...]:
    """Read `count` finite numbers with commas between them."""
    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != count or not all(math.isfinite(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text!r} is not {form}: {count} numbers with commas between, no spaces")
    return numbers


def _inside(point: tuple[float, ...], box: tuple[float, ...]) -> bool:
    """Whether a point xy lies in a box xyxy, its edges included."""
    return box[0] <= point[0] <= box[2] and box[1] <= point[1] <= box[3]


def _numbers(values: tuple[float, ...] | list[float]) -> str:
    """Numbers as a user would write them on the command line."""
    return ",".join(f"{value:g}" for value in values)
