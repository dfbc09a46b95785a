# SPDX-License-Identifier: Apache-2.0
"""Images with instance masks from a COCO instances file and a folder of pictures."""

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from PIL import Image

from ..models.image_processing_efficientsam import open_image
from ..models.rle_efficientsam import rle_box
from .coco_file import CocoAnnotation, CocoFile
from .polygons import import_pycocotools, polygons_to_rle
from .rle_masks import RleMasks


class CocoObject(NamedTuple):
    """An object as the COCO API measures it; its box [x, y, width, height] and area are those of the mask."""

    rle: dict[str, Any]
    area: int
    box: list[int]
    category: int | str
    crowd: bool


class CocoSamples:
    """Pictures of a COCO instances file that have objects, in the file's order; nothing is read before access.

    Item i is {"image": RGB `PIL.Image`, "masks": `RleMasks`, which stand for a (N, H, W) bool array and expand what is
    asked of them, "image_id": the file's id}. Segmentations are compressed RLE, uncompressed RLE or polygons (these
    alone need pycocotools). Left out are crowds, annotations that are boxes alone, masks that cover no pixel of their
    picture, and pictures without any other. Names of pictures may be percent-encoded or have backslashes.

    `file` holds all that the file says. Raises on construction the errors of `CocoFile`, `FileNotFoundError` if
    pictures are missing, and `ValueError` if there is no object to use; on access `ValueError` or `OSError` if a
    picture or one of its masks is damaged, or has another size than the file says.
    """

    def __init__(self, annotations: str | Path, image_folder: str | Path) -> None:
        self.file = CocoFile(annotations)
        self.image_folder = Path(image_folder)
        self._numbers = [
            number for number, entries in enumerate(self.file.annotations) if any(map(_is_object, entries))
        ]
        if not self._numbers:
            raise ValueError(f"{self.file.path} holds no objects to use: {self.file.describe_unused()}")
        if any(isinstance(entry.segmentation, list) for entries in self.file.annotations for entry in entries):
            import_pycocotools()
        self.check_pictures(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number = self._numbers[index]
        image = self.open_picture(number)
        masks = self._masks(number, filter(_is_object, self.file.annotations[number]))
        return {"image": image, "masks": masks.without_empty(), "image_id": self.file.images[number].id}

    def object_counts(self) -> list[int]:
        """How many objects the annotations of each sample name, those too small to cover a pixel among them."""
        return [sum(map(_is_object, self.file.annotations[number])) for number in self._numbers]

    def objects(self, number: int) -> list[CocoObject]:
        """All masks of image `number` of the file that cover a pixel, crowds too; errors as on access."""
        entries = [entry for entry in self.file.annotations[number] if entry.segmentation is not None]
        masks = self._masks(number, entries)
        return [
            CocoObject(rle, area, rle_box(rle), self.file.category(entry), entry.crowd)
            for entry, rle, area in zip(entries, masks.rles, masks.areas().tolist())
            if area
        ]

    def open_picture(self, number: int) -> Image.Image:
        """The picture of image `number` of the file, RGB; `ValueError` if it has another size than the file says."""
        record = self.file.images[number]
        path = self._path(record.file_name)
        image = open_image(path)
        if (image.height, image.width) != (record.height, record.width):
            raise ValueError(
                f"{path} is {image.width} x {image.height} pixels, but {self.file.path.name} says "
                f"{record.width} x {record.height}"
            )
        return image

    def check_pictures(self, numbers: Iterable[int]) -> None:
        """`FileNotFoundError` that counts the pictures missing on disk, of these images, and names the first."""
        if not self.image_folder.is_dir():
            raise FileNotFoundError(f"image folder {self.image_folder} does not exist or is not a folder")
        names = [self.file.images[number].file_name for number in numbers]
        missing = [name for name in names if not os.path.isfile(self._path(name))]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(names)} pictures of {self.file.path.name} are not in {self.image_folder},"
                f" the first is {missing[0][:200]}"
            )

    def _path(self, name: str) -> Path:
        """Where a picture lies: under its name, that with / for \\, or that decoded from a URL's."""
        names = (name, name.replace("\\", "/"), unquote(name))
        paths = [self.image_folder / each for each in dict.fromkeys(names)]
        return next((path for path in paths if os.path.isfile(path)), paths[0])

    def _masks(self, number: int, entries: Iterable[CocoAnnotation]) -> RleMasks:
        """Masks of some annotations of an image; `ValueError` that names file, picture and annotation."""
        record, entry = self.file.images[number], None
        size = (record.height, record.width)

        def rles() -> Iterator[Any]:
            nonlocal entry
            for entry in entries:
                polygons = isinstance(entry.segmentation, list)
                yield polygons_to_rle(entry.segmentation, size) if polygons else entry.segmentation

        try:
            return RleMasks(rles(), size)
        except ValueError as error:
            shown = f"{self.file.path.name}, picture {record.file_name[:200]}"
            raise ValueError(f"{shown}, entry {entry.place} of 'annotations': {error}") from error


def _is_object(entry: CocoAnnotation) -> bool:
    """Whether an annotation is an object to train on or to prompt for."""
    return entry.segmentation is not None and not entry.crowd
