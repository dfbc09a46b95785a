# SPDX-License-Identifier: Apache-2.0
"""`efficientsam segment --everything`: all masks of a picture, from a grid of points."""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ..files import check_writable, write_file, write_json, write_png, writing_together
from ..models.rle_efficientsam import rle_pixels
from ..visualization import draw_mask, line_width, object_color
from .loading import load_model


LABEL_IMAGES = ("labels.png", "labels.tif")
LARGEST_OVERLAY = 2048  # pixels of its longer side
OPACITY = 0.45  # of the tint of a mask
LARGEST_PICTURE = 2**30  # pixels in all
BAR = "everything: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
# Option of the generator -> type and help; defaults are those of the checkpoint.
OPTIONS = {
    "points_per_crop": (int, "points per side of the grid"),
    "pred_iou_thresh": (float, "least predicted IoU of a mask"),
    "stability_score_thresh": (float, "least stability of a mask"),
    "crops_n_layers": (int, "layers of crops beside the whole picture, 4**i in layer i"),
    "crops_nms_thresh": (float, "box IoU above which the better of two masks stays"),
    "mask_nms_thresh": (float, "the same by the masks' own IoU"),
    "max_hole_area": (int, "fill holes of up to so many pixels"),
    "max_sprinkle_area": (int, "remove specks of up to so many pixels"),
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Flags of `segment` that belong to --everything."""
    group = parser.add_argument_group("everything", "no prompts: a grid of points asks for all there is")
    group.add_argument("--everything", action="store_true", help="segment everything")
    add_generator_options(group)
    group.add_argument(
        "--tile", type=int, metavar="PIXELS", help="go through a large picture in tiles of this side, and join masks"
    )
    group.add_argument("--tile-overlap", type=int, metavar="PIXELS", help="pixels that tiles share (an eighth)")
    group.add_argument(
        "--label-image",
        action="store_true",
        help="write labels.png: a 16-bit number for each pixel (labels.tif with 32 bits for more than 65,535 masks)",
    )


def add_generator_options(group: argparse._ArgumentGroup) -> None:
    """A flag for each of OPTIONS."""
    for name, (kind, text) in OPTIONS.items():
        group.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="N", help=text)


def generator_options(args: argparse.Namespace) -> dict[str, Any]:
    """Those that were given; `ValueError` for a wrong value, or for any without --everything."""
    from ..models.mask_generation_options_efficientsam import MaskGenerationOptions

    given = {name: getattr(args, name) for name in OPTIONS if getattr(args, name) is not None}
    if given and not args.everything:
        raise ValueError(f"--{next(iter(given)).replace('_', '-')} is an option of --everything")
    MaskGenerationOptions().with_changes(given)
    return given


def check(args: argparse.Namespace) -> None:
    """`ValueError` for prompts beside --everything, and for its options where they are wrong or without it."""
    options = generator_options(args)
    if options.get("max_hole_area") or options.get("max_sprinkle_area"):
        from ..models.found_masks_efficientsam import label_regions

        label_regions()
    if args.tile is not None and not args.everything:
        raise ValueError("--tile is an option of --everything")
    if args.label_image and not args.everything:
        raise ValueError("--label-image is an option of --everything")
    if args.tile_overlap is not None and args.tile is None:
        raise ValueError("--tile-overlap is an option of --tile")
    if args.tile is not None:
        from ..tiles import check_tiles

        check_tiles(args.tile, tile_overlap(args))
    if args.everything and (args.point or args.background or args.box or args.mask or args.each_point):
        raise ValueError("--everything takes no prompts")
    if args.everything and args.all_masks:
        raise ValueError("--all-masks is for prompts: --everything keeps every mask that is good")


def tile_overlap(args: argparse.Namespace) -> int:
    """Pixels that tiles share."""
    return args.tile // 8 if args.tile_overlap is None else args.tile_overlap


@contextmanager
def large_pictures(args: argparse.Namespace) -> Iterator[None]:
    """With --tile, pictures of up to LARGEST_PICTURE pixels are no attack but the purpose."""
    before = Image.MAX_IMAGE_PIXELS
    if args.tile is not None:
        Image.MAX_IMAGE_PIXELS = LARGEST_PICTURE
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def run(args: argparse.Namespace, image: Image.Image) -> int:
    """Segment, write overlay.png and masks.json, print what came out."""
    from .. import EfficientSamMaskGenerator
    from ..tiles import label_image

    folder = Path(args.output)
    check_writable(folder)
    options = generator_options(args)
    model, processor = load_model(args.model, args)
    if not hasattr(model, "decode_prompts"):
        raise ValueError(f"--everything is for EfficientSAM models, {args.model} holds a {type(model).__name__}")
    generator = EfficientSamMaskGenerator(model, processor, **options, output_type="coco_rle")
    start = time.perf_counter()
    result = search(generator, image, args)
    seconds = time.perf_counter() - start
    records = _records(result)
    written = [folder / "overlay.png", folder / "masks.json"]
    content = {"image": args.image, "size": [image.height, image.width], "objects": records}
    with writing_together(folder) as aside:
        write_json(aside / "masks.json", content)
        overlay = _overlay(image, result["masks"], result["areas"].tolist(), result["boxes"].numpy())
        write_png(aside / "overlay.png", overlay)
        if args.label_image:
            name = write_labels(aside, label_image(result["masks"], (image.height, image.width)))
            written.append(folder / name)
    if args.label_image:
        for name in set(LABEL_IMAGES) - {written[-1].name}:
            (folder / name).unlink(missing_ok=True)  # of an earlier call
    print(_summary(result, image))
    print(_effort(seconds, generator.options.points_per_crop, args.tile))
    print(f"wrote {', '.join(map(str, written[:-1]))} and {written[-1]}")
    return 0


def search(generator: Any, image: Image.Image, args: argparse.Namespace) -> dict[str, Any]:
    """What the generator finds in the picture, or in its tiles, with a bar on stderr."""
    from ..tiles import segment_tiles

    if args.tile is not None:
        return segment_tiles(generator, image, args.tile, tile_overlap(args), progress=True)
    # With a delay nothing is drawn before the first step, so that the error of a refusal stands alone.
    with tqdm(total=1.0, bar_format=BAR, delay=1e-3, mininterval=0, dynamic_ncols=True) as bar:
        return generator(image, progress=lambda fraction: bar.update(fraction - bar.n))


def write_labels(folder: Path, labels: np.ndarray) -> str:
    """Write the numbers of pixels, (H, W) int32, as labels.png, or labels.tif where 16 bits are too few; -> which."""
    png, tif = LABEL_IMAGES
    if labels.max() < 2**16:
        write_png(folder / png, Image.fromarray(labels.astype(np.uint16)))
        return png
    picture = Image.fromarray(labels.astype(np.int32))  # a PNG of Pillow has 16 bits at most
    write_file(folder / tif, lambda path: picture.save(path, format="TIFF", compression="tiff_deflate"))
    return tif


def _records(result: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry of masks.json for each mask, boxes with x1 and y1 exclusive as for prompts."""
    columns = zip(result["masks"], result["scores"].tolist(), result["areas"].tolist(), result["boxes"].tolist())
    records = [
        {"score": round(score, 4), "area": area, "box": [x0, y0, x1 + 1, y1 + 1], "segmentation": rle}
        for rle, score, area, (x0, y0, x1, y1) in columns
    ]
    for record, point in zip(records, result.get("points", [])):
        record["point"] = [round(value, 2) for value in point.tolist()]
    return records


def _overlay(image: Image.Image, masks: list[dict[str, Any]], areas: list[int], boxes: np.ndarray) -> Image.Image:
    """The masks on the picture, the largest at the bottom; boxes (K, 4) of first and last pixels."""
    width, height = image.size
    largest = max(image.size)
    if largest > LARGEST_OVERLAY:  # a picture to look at
        scale = LARGEST_OVERLAY / largest
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(size, Image.Resampling.BOX)
    canvas = image.convert("RGB")  # once: draw_masks would copy the picture for every mask
    rows = ((np.arange(image.height) + 0.5) * height / image.height).astype(int)
    columns = ((np.arange(image.width) + 0.5) * width / image.width).astype(int)
    for index in sorted(range(len(masks)), key=lambda i: -areas[i]):
        shown = np.zeros((image.height, image.width), bool)
        (left, right), (top, bottom) = (
            np.searchsorted(places, (box[0], box[1] + 1))
            for places, box in ((columns, boxes[index, ::2]), (rows, boxes[index, 1::2]))
        )
        shown[top:bottom, left:right] = rle_pixels(masks[index], rows[top:bottom], columns[left:right])
        draw_mask(canvas, shown, object_color(index), OPACITY, line_width(canvas))
    return canvas


def _summary(result: dict[str, Any], image: Image.Image) -> str:
    areas = result["areas"].numpy()
    if not len(areas):
        return "no masks"
    shares = np.percentile(areas, [0, 50, 100]) / (image.width * image.height)
    sizes = ", ".join(f"{name} {100 * share:.2g} %" for name, share in zip(("smallest", "median", "largest"), shares))
    return f"{len(areas)} masks; of the picture: {sizes}"


def _effort(seconds: float, side: int, tile: int | None) -> str:
    """What it took; the demo says it in the same words."""
    where = "" if tile is None else " in each tile"
    return f"searched in {seconds:,.1f} s with a grid of {side} x {side} points{where}"
