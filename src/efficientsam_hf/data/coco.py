# SPDX-License-Identifier: Apache-2.0
"""Images with instance masks from a COCO instances file and a folder of pictures."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..models.image_processing_efficientsam import open_image
from ..models.rle_efficientsam import decode_rle, rle_size


class CocoSamples:
    """Pictures of a COCO instances file that have objects, in the file's order; masks are expanded on access.

    Item i is {"image": RGB `PIL.Image`, "masks": (N, H, W) bool array, "image_id": the file's id}. Segmentations are
    compressed RLE, uncompressed RLE or polygons (these alone need pycocotools). Crowd annotations are left out unless
    `skip_crowd` is False; so are annotations that are boxes alone (their segmentation is []), pictures without any
    other, and objects too small to cover a pixel.

    Raises on construction `FileNotFoundError` if the file or pictures are missing, and `ValueError` if the file is not
    COCO instances, has no object to use, or an RLE mask of another size than its picture's entry; on access
    `ValueError` if a mask is damaged or a picture has another size than the file says.
    """

    def __init__(self, annotations: str | Path, image_folder: str | Path, skip_crowd: bool = True) -> None:
        self.annotations = Path(annotations)
        self.image_folder = Path(image_folder)
        content = self._content = _read_instances(self.annotations)
        self._segmentations = self._group_by_image(content, skip_crowd)
        if any(isinstance(entry, list) for entries in self._segmentations.values() for entry in entries):
            _import_pycocotools()
        self._images = [image for image in content["images"] if self._segmentations[image["id"]]]
        if not self._images:
            raise ValueError(f"{self.annotations} holds no objects to use: {_describe_unused(content['annotations'])}")
        self._check_pictures(self._images)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self._images[index]
        image = self.open_picture(record)
        size = (image.height, image.width)
        masks = [self._mask(segmentation, size, record) for segmentation in self._segmentations[record["id"]]]
        masks = [mask for mask in masks if mask.any()]
        return {
            "image": image,
            "masks": np.stack(masks) if masks else np.zeros((0, *size), bool),
            "image_id": record["id"],
        }

    def object_counts(self) -> list[int]:
        """How many objects the annotations of each sample name, those too small to cover a pixel among them."""
        return [len(self._segmentations[record["id"]]) for record in self._images]

    def open_picture(self, record: dict[str, Any]) -> Image.Image:
        """The picture of an entry of "images", RGB; `ValueError` if it has another size than the entry says."""
        path = self.image_folder / record["file_name"]
        image = open_image(path)
        if (image.height, image.width) != (record["height"], record["width"]):
            raise ValueError(
                f"{path} is {image.width} x {image.height} pixels,"
                f" but {self.annotations.name} says {record['width']} x {record['height']}"
            )
        return image

    def complete_annotations(self, limit: int | None = None) -> dict[str, Any]:
        """The file's content for the COCO API, of all pictures or the first `limit`, with or without objects.

        Annotations get numbers from 1 on, and where the file lacks them, "area" and "bbox" of their mask, "iscrowd" 0
        and the category of those that have none. Empty masks are left out. "left_out" has the ids of the pictures
        beyond the limit. Raises `FileNotFoundError` if a picture is missing, and `ValueError` for a mask that does not
        fit its picture or an annotation of no category where there are several.
        """
        images = self._content["images"][:limit]
        self._check_pictures(images)
        by_id = {image["id"]: image for image in images}
        kept = [
            {**self._missing_fields(entry, by_id[entry["image_id"]]), **entry}
            for entry in self._content["annotations"]
            if entry["image_id"] in by_id
        ]
        annotations = [
            {**entry, "id": number}
            for number, entry in enumerate((e for e in kept if e["segmentation"] != [] and e["area"] > 0), 1)
        ]
        used = {entry.get("category_id", 1) for entry in self._content["annotations"]}  # beyond the limit too
        categories = self._content.get("categories") or [
            {"id": number, "name": str(number)} for number in sorted(used)
        ]
        left_out = [image["id"] for image in self._content["images"] if image["id"] not in by_id]
        return {"images": images, "annotations": annotations, "categories": categories, "left_out": left_out}

    def _missing_fields(self, annotation: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
        """Defaults of what an annotation may lack; its mask is expanded only if it must be measured."""
        categories = self._content.get("categories") or [{"id": 1}]
        if "category_id" not in annotation and len(categories) > 1:
            raise ValueError(
                f"{self.annotations.name}: annotation {annotation.get('id')} has no category_id, and there are "
                f"{len(categories)} categories"
            )
        fields: dict[str, Any] = {"iscrowd": 0, "category_id": categories[0]["id"]}
        segmentation, size = annotation["segmentation"], (record["height"], record["width"])
        if segmentation == []:
            return fields | {"area": 0.0}
        self._check_size(segmentation, record)
        if "area" not in annotation or "bbox" not in annotation:
            mask = self._mask(segmentation, size, record)
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            box = [0.0] * 4
            if len(rows):
                left, top = float(columns[0]), float(rows[0])
                box = [left, top, float(columns[-1]) + 1 - left, float(rows[-1]) + 1 - top]
            fields |= {"area": float(mask.sum()), "bbox": box}
        return fields

    def _group_by_image(self, content: dict[str, Any], skip_crowd: bool) -> dict[Any, list[Any]]:
        """Segmentations to use of each image id; `ValueError` if the image is not listed or of another size."""
        records = {image["id"]: image for image in content["images"]}
        groups: dict[Any, list[Any]] = {number: [] for number in records}
        for annotation in content["annotations"]:
            number, segmentation = annotation["image_id"], annotation["segmentation"]
            if number not in groups:
                raise ValueError(
                    f"{self.annotations}: annotation {annotation.get('id')} belongs to image"
                    f" {number!r}, which is not in 'images'"
                )
            if segmentation == [] or (skip_crowd and annotation.get("iscrowd", 0)):
                continue
            self._check_size(segmentation, records[number])
            groups[number].append(segmentation)
        return groups

    def _check_pictures(self, images: list[dict[str, Any]]) -> None:
        """`FileNotFoundError` that counts the pictures missing on disk and names the first."""
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"image folder {self.image_folder} does not exist or is not a folder")
        names = [image["file_name"] for image in images]
        missing = [name for name in names if not (self.image_folder / name).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} pictures of {self.annotations.name} are not in {self.image_folder},"
                f" the first is {missing[0]}"
            )

    def _mask(self, segmentation: Any, size: tuple[int, int], record: dict[str, Any]) -> np.ndarray:
        """Expand one segmentation, -> (H, W) bool; `ValueError` that names the picture if it does not fit."""
        try:
            if isinstance(segmentation, list):
                return rasterize_polygons(segmentation, size)
            return decode_rle(segmentation)
        except ValueError as error:
            raise ValueError(f"{self.annotations.name}, picture {record['file_name']}: {error}") from error

    def _check_size(self, segmentation: Any, record: dict[str, Any]) -> None:
        """`ValueError` that names file, picture and both sizes unless a mask that is no polygon fits its picture."""
        if isinstance(segmentation, list):
            return
        try:
            check_rle_size(segmentation, (record["height"], record["width"]))
        except ValueError as error:
            raise ValueError(f"{self.annotations.name}, picture {record['file_name']}: {error}") from error


def _describe_unused(annotations: list[dict[str, Any]]) -> str:
    """Why none of a file's annotations is an object to use, in words."""
    count, boxes = len(annotations), sum(entry["segmentation"] == [] for entry in annotations)
    if count and boxes == count:
        return f"none of {count} annotations has a segmentation, and boxes alone cannot be trained on or measured"
    return f"{count} annotations" + (f", {boxes} of them boxes without a segmentation" if boxes else "")


def check_rle_size(rle: Any, size: tuple[int, int]) -> None:
    """`ValueError` if an RLE mask is not of its picture's size (height, width)."""
    if rle_size(rle) != size:
        raise ValueError(f"mask of {rle_size(rle)} in a picture of {size} (height, width)")


def rasterize_polygons(polygons: list[list[float]], size: tuple[int, int]) -> np.ndarray:
    """Fill the union of polygons [x0, y0, x1, y1, ...] in pixels of the image, -> (H, W) bool, as the COCO API does.

    Raises `ValueError` if a polygon has fewer than three corners, `ImportError` if pycocotools is missing.
    """
    for polygon in polygons:
        numbers = isinstance(polygon, list) and all(isinstance(value, (int, float)) for value in polygon)
        if not numbers or len(polygon) < 6 or len(polygon) % 2:
            raise ValueError(f"a polygon must be a flat list of at least three x, y pairs, got {str(polygon)[:60]}")
    if not polygons:
        return np.zeros(size, bool)
    coco_mask = _import_pycocotools()
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects(polygons, *size))).astype(bool)


def _import_pycocotools() -> Any:
    try:
        from pycocotools import mask
    except ImportError as error:
        raise ImportError(
            "polygons of COCO files are drawn by pycocotools: pip install 'efficientsam-hf[eval]'"
            " (files with RLE masks work without it)"
        ) from error
    return mask


def _read_instances(path: Path) -> dict[str, Any]:
    """Parse a COCO instances file; `ValueError` naming the first entry that lacks a needed key."""
    if not path.is_file():
        raise FileNotFoundError(f"annotation file {path} does not exist")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # covers malformed JSON and text that is not UTF-8
        raise ValueError(f"{path} is not a JSON file: {error}") from error
    needed = {"images": ("id", "file_name", "width", "height"), "annotations": ("image_id", "segmentation")}
    for section, keys in needed.items():
        entries = content.get(section) if isinstance(content, dict) else None
        if not isinstance(entries, list):
            raise ValueError(f"{path} is not a COCO instances file: it has no list '{section}'")
        for position, entry in enumerate(entries):
            lacking = [key for key in keys if not isinstance(entry, dict) or key not in entry]
            if lacking:
                raise ValueError(f"{path}: entry {position} of '{section}' lacks {', '.join(lacking)}")
    return content
