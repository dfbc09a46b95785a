# SPDX-License-Identifier: Apache-2.0
"""The form that training reads: small pictures with their masks, in parts that follow from the files' names."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from efficientsam_hf.data.polygons import polygons_to_rle
from efficientsam_hf.data.rle_masks import RleMasks
from efficientsam_hf.files import write_text
from efficientsam_hf.models.rle_efficientsam import decode_rle, encode_rle


PARTS = ("train", "val")
LONGEST_PHOTO, LONGEST_CUTOUT = 384, 256  # pixels
SMALLEST_MASK = 24  # pixels of a photo as it is written
JPEG_QUALITY, WEBP_QUALITY = 80, 90
UNREADABLE = (OSError, ValueError, SyntaxError)  # the last is what Pillow says of some damaged PNGs
FAINTEST = 8  # alpha below which a pixel at the border of a cut-out is cut off


@dataclass(frozen=True)
class Photo:
    """A photo to write as `name`; `read` gives it and its objects as (category id, polygons, RLE or (h, w) bool)."""

    name: str
    read: Callable[[], tuple[Image.Image, list[tuple[int, Any]]]]
    fields: dict[str, Any] = field(default_factory=dict)
    share_alike: bool = False


@dataclass(frozen=True)
class PhotoSet:
    """Photos with masks, and what their COCO file says of all of them."""

    photos: list[Photo]
    description: str
    licenses: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotation_fields: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path, title: str) -> tuple[list[str], list[str]]:
        """Fill a new folder: what it holds, in words, and what was left out and why."""
        files: dict[str, dict[str, Any]] = {part: self._empty_file() for part in PARTS}
        left_out: list[str] = []
        for photo, part in _parted(folder, self.photos, title, left_out):
            try:
                image, objects = _scaled(*photo.read())
            except UNREADABLE as error:
                left_out.append(f"{photo.name}: {error}")
                continue
            _save_jpeg(image, folder / part / photo.name)
            self._note(files[part], photo, image.size, objects)
        for part, content in files.items():
            write_text(folder / f"instances_{part}.json", json.dumps(content) + "\n")
        counts = [(part, len(content["images"]), len(content["annotations"])) for part, content in files.items()]
        return [f"{part}: {images:,} photos, {masks:,} masks" for part, images, masks in counts], left_out

    def _empty_file(self) -> dict[str, Any]:
        head = {"info": {"description": self.description}, "licenses": self.licenses}
        return {**head, "images": [], "annotations": [], "categories": self.categories}

    def _note(
        self, content: dict[str, Any], photo: Photo, size: tuple[int, int], objects: list[tuple[int, np.ndarray]]
    ) -> None:
        """Add a photo's entry and its masks' to the content of a COCO file."""
        number = len(content["images"]) + 1
        entry = {"id": number, "file_name": photo.name, "height": size[1], "width": size[0]}
        content["images"].append(entry | photo.fields)
        for category, mask in objects:
            annotation = {"id": len(content["annotations"]) + 1, "image_id": number, "category_id": category}
            annotation |= {"iscrowd": 0} | self.annotation_fields | _measure(mask)
            content["annotations"].append(annotation | {"segmentation": encode_rle(mask)})


@dataclass(frozen=True)
class Backgrounds:
    """Photos without masks, all to train on."""

    photos: list[Photo]

    def write(self, folder: Path, title: str) -> tuple[list[str], list[str]]:
        """As of `PhotoSet`."""
        (folder / "train").mkdir()
        entries: list[dict[str, Any]] = []
        left_out: list[str] = []
        for photo in _once(tqdm(self.photos, desc=title, unit="photo"), left_out):
            try:
                image = _shrunk(photo.read()[0], LONGEST_PHOTO)
            except UNREADABLE as error:
                left_out.append(f"{photo.name}: {error}")
                continue
            _save_jpeg(image, folder / "train" / photo.name)
            entries.append({"file_name": photo.name, "width": image.width, "height": image.height} | photo.fields)
        write_text(folder / "index_train.json", json.dumps({"photos": entries}) + "\n")
        return [f"train: {len(entries):,} photos"], left_out


@dataclass(frozen=True)
class Cutout:
    """A thing whose pictures are all of one part: `read` gives (file name, RGBA picture) of each."""

    name: str
    read: Callable[[], list[tuple[str, Image.Image]]]
    fields: dict[str, Any] = field(default_factory=dict)
    share_alike: bool = False


@dataclass(frozen=True)
class CutoutSet:
    """Things without their surroundings."""

    things: list[Cutout]
    license: str

    def write(self, folder: Path, title: str) -> tuple[list[str], list[str]]:
        """As of `PhotoSet`."""
        entries: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
        left_out: list[str] = []
        for thing, part in _parted(folder, self.things, title, left_out):
            try:
                pictures = [(name, _trimmed(picture)) for name, picture in thing.read()]
            except UNREADABLE as error:
                left_out.append(f"{thing.name}: {error}")
                continue
            for name, picture in pictures:
                picture.save(folder / part / name, format="WEBP", quality=WEBP_QUALITY, method=6)
                entries[part].append(_describe(name, picture) | thing.fields)
        for part in PARTS:
            content = {"license": self.license, "cutouts": entries[part]}
            write_text(folder / f"index_{part}.json", json.dumps(content) + "\n")
        return [f"{part}: {len(entries[part]):,} cut-outs" for part in PARTS], left_out


def part_of(name: str, share_alike: bool = False) -> str | None:
    """train, val, or None for what belongs to neither: follows from the name, so nothing ever changes sides.

    Of a hundred names 84 are for training and 8 for validation; the other 8 are kept for checks. What is under a
    share-alike licence never trains: one half is for validation, the other kept.
    """
    number = int(hashlib.sha1(name.encode(), usedforsecurity=False).hexdigest(), 16) % 100
    if share_alike:
        return "val" if number % 2 == 0 else None
    return "train" if number < 84 else "val" if number < 92 else None


def _parted(folder: Path, items: list[Any], title: str, left_out: list[str]) -> Iterator[tuple[Any, str]]:
    """What belongs to a part, with it, behind a progress bar; makes the folders of the parts."""
    for part in PARTS:
        (folder / part).mkdir()
    for item in _once(tqdm(items, desc=title, unit="picture"), left_out):
        part = part_of(item.name, item.share_alike)
        if part is not None:
            yield item, part


def _once(items: Any, left_out: list[str]) -> Iterator[Any]:
    """Items without those whose name came before: the first one's file would be lost."""
    names: set[str] = set()
    for item in items:
        if item.name in names:
            left_out.append(f"{item.name}: another picture has the same name")
        else:
            names.add(item.name)
            yield item


def _scaled(image: Image.Image, objects: list[tuple[int, Any]]) -> tuple[Image.Image, list[tuple[int, np.ndarray]]]:
    """A photo and its masks (H, W) at the size they are written in; `ValueError` if no mask is left."""
    small = _shrunk(image, LONGEST_PHOTO)
    masks = [(category, fit_mask(shape, image.size, small.size)) for category, shape in objects]
    masks = [(category, mask) for category, mask in masks if mask.sum() >= SMALLEST_MASK]
    if not masks:
        raise ValueError(f"has no mask of {SMALLEST_MASK} pixels")
    return small, masks


def fit_mask(shape: Any, size: tuple[int, int], target: tuple[int, int]) -> np.ndarray:
    """A mask at another size of its picture, both (width, height): polygons, RLE or (h, w) bool -> (H, W) bool."""
    if isinstance(shape, list):
        factors = np.divide(target, size)
        polygons = [(np.reshape(corners, (-1, 2)) * factors).ravel().tolist() for corners in shape]
        return decode_rle(polygons_to_rle(polygons, target[::-1]))
    if isinstance(shape, dict):
        shape = RleMasks([shape], size[::-1])[0]
    return np.asarray(Image.fromarray(shape).resize(target, Image.Resampling.NEAREST))


def _shrunk(image: Image.Image, longest: int) -> Image.Image:
    """A picture with a longest side of at most `longest` pixels."""
    factor = longest / max(image.size)
    if factor >= 1:
        return image
    return image.resize(tuple(max(1, round(side * factor)) for side in image.size), Image.Resampling.BICUBIC)


def _trimmed(picture: Image.Image) -> Image.Image:
    """An RGBA picture without its empty border, not larger than cut-outs are; `ValueError` if it is empty."""
    box = picture.getchannel("A").point(lambda alpha: 255 if alpha >= FAINTEST else 0).getbbox()
    if box is None:
        raise ValueError("is transparent all over")
    return _shrunk(picture.crop(box), LONGEST_CUTOUT)


def _save_jpeg(image: Image.Image, path: Path) -> None:
    image.save(path, format="JPEG", quality=JPEG_QUALITY)


def _measure(mask: np.ndarray) -> dict[str, Any]:
    """Area and box [x, y, width, height] of a mask (H, W)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    corner = [float(columns[0]), float(rows[0])]
    sides = [float(np.ptp(columns) + 1), float(np.ptp(rows) + 1)]
    return {"area": int(mask.sum()), "bbox": corner + sides}


def _describe(name: str, picture: Image.Image) -> dict[str, Any]:
    """Entry of a cut-out: its size, and how much of its box it covers."""
    covered = float((np.asarray(picture.getchannel("A")) >= 128).mean())
    return {"file_name": name, "width": picture.width, "height": picture.height, "covered": round(covered, 4)}
