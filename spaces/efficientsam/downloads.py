# SPDX-License-Identifier: Apache-2.0
"""Files to take away: the cut-out, the mask, the overlay, and all masks in COCO's format."""

import io
import json
from typing import Any

import numpy as np
from PIL import Image
from rle import decode_mask, encode_mask, mask_bounds
from segmenting import Everything


def cutout_png(picture: Image.Image, mask: np.ndarray) -> bytes:
    """The object alone, cut to its box, transparent around it; mask (H, W). An empty mask gives one clear pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return to_png(Image.new("RGBA", (1, 1)))
    box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    cutout = picture.crop(box)
    cutout.putalpha(mask_image(mask).crop(box))
    return to_png(cutout)


def mask_image(mask: np.ndarray) -> Image.Image:
    """(H, W) bool -> a picture of 0 and 255."""
    return Image.fromarray(mask.astype(np.uint8) * 255)


def label_image(found: Everything) -> Image.Image:
    """The number of the mask that each pixel belongs to, 0 for none, 16 bits; smaller masks lie on top."""
    labels = np.zeros(found.size, np.uint16)
    for index in np.argsort(-found.areas, kind="stable"):
        labels[decode_mask(found.masks[index])] = index + 1
    return Image.fromarray(labels)


def to_jpeg(image: Image.Image) -> bytes:
    """A picture as the bytes of a JPEG file whose thin coloured lines stay sharp."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return buffer.getvalue()


def to_png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=3)
    return buffer.getvalue()


def candidates_to_coco(name: str, masks: np.ndarray, scores: list[float]) -> dict[str, Any]:
    """Masks (M, H, W) of one object as a COCO file: see `coco_file`."""
    records = [
        _annotation(encode_mask(mask), int(mask.sum()), predicted_iou=round(score, 4))
        for mask, score in zip(masks, scores)
    ]
    return coco_file(name, masks.shape[1:], records)


def everything_to_coco(name: str, found: Everything) -> dict[str, Any]:
    """Masks of everything as a COCO file: see `coco_file`."""
    records = [
        _annotation(mask, int(area), predicted_iou=round(float(score), 4), stability=round(float(stability), 4))
        for mask, area, score, stability in zip(found.masks, found.areas, found.scores, found.stability)
    ]
    return coco_file(name, found.size, records)


def coco_file(name: str, size: tuple[int, int], records: list[dict[str, Any]]) -> dict[str, Any]:
    """A COCO instances file of one picture of `size` (height, width).

    Its annotations have `segmentation` (compressed run lengths), `bbox` [x, y, width, height] and `area` in pixels of
    the picture, and `predicted_iou`.
    """
    return {
        "images": [{"id": 1, "file_name": name, "height": int(size[0]), "width": int(size[1])}],
        "categories": [{"id": 1, "name": "object"}],
        "annotations": [{"id": index, **record} for index, record in enumerate(records, 1)],
    }


def to_json(value: dict[str, Any]) -> bytes:
    """As the bytes of a JSON file."""
    return (json.dumps(value) + "\n").encode("utf-8")


def _annotation(rle: dict[str, Any], area: int, **scores: float) -> dict[str, Any]:
    x0, y0, x1, y1 = mask_bounds(rle)
    record = {"image_id": 1, "category_id": 1, "iscrowd": 0, "segmentation": rle, "area": area}
    return {**record, "bbox": [x0, y0, x1 - x0, y1 - y0], **scores}
