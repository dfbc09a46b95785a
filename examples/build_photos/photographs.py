# SPDX-License-Identifier: Apache-2.0
"""Sets of photos whose publishers have outlines: Caltech 101, COCO 2017, building-facade-segmentation."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from layout import Backgrounds, Photo, PhotoSet
from PIL import Image

from efficientsam_hf.data.images import ENDINGS
from efficientsam_hf.models.image_processing_efficientsam import open_image


CC_BY_4 = [{"id": 1, "name": "CC-BY-4.0", "url": "https://creativecommons.org/licenses/by/4.0/"}]

# Kinds of Caltech 101 whose outlines were found good, and those whose outlines lie in a folder of another name.
KINDS = (
    "airplanes anchor ant barrel beaver binocular bonsai brain brontosaurus butterfly camera car_side ceiling_fan "
    "cellphone crab crayfish crocodile dolphin dragonfly elephant emu flamingo kangaroo panda"
).split()
OUTLINE_FOLDERS = {"airplanes": "Airplanes_Side_2"}
MOST_OF_A_KIND = 128  # there are 800 airplanes, and of no other of these kinds more than 128

# Licences of COCO's photos, by the numbers that its files have for them. Photos under the others, which forbid
# commercial use (1, 2, 3) or derivatives (6), are never read.
COCO_LICENSES = [
    {"id": 4, "name": "CC-BY-2.0", "url": "http://creativecommons.org/licenses/by/2.0/"},
    {"id": 5, "name": "CC-BY-SA-2.0", "url": "http://creativecommons.org/licenses/by-sa/2.0/"},
    {"id": 7, "name": "No known copyright restrictions", "url": "http://flickr.com/commons/usage/"},
    {"id": 8, "name": "United States Government Work", "url": "http://www.usa.gov/copyright.shtml"},
]
SHARE_ALIKE = 5
PERSON = 1


def caltech101(source: Path) -> PhotoSet:
    """SOURCE holds 101_ObjectCategories/KIND/image_NNNN.jpg and Annotations/KIND/annotation_NNNN.mat."""
    try:
        from scipy.io import loadmat
    except ImportError as error:
        raise ImportError("caltech101 needs scipy, which reads .mat files: pip install scipy") from error
    photos = []
    for number, kind in enumerate(KINDS, 1):
        outlines = source / "Annotations" / OUTLINE_FOLDERS.get(kind, kind)
        pictures = sorted((source / "101_ObjectCategories" / kind).glob("image_*.jpg"))[:MOST_OF_A_KIND]
        if not pictures or not outlines.is_dir():
            raise FileNotFoundError(
                f"SOURCE {source} is not Caltech 101 unpacked: expected pictures in 101_ObjectCategories/{kind} and "
                f"outlines in Annotations/{outlines.name}"
            )
        for picture in pictures:
            digits = picture.stem.removeprefix("image_")
            read = partial(_read_outlined, picture, outlines / f"annotation_{digits}.mat", number, loadmat)
            photos.append(Photo(f"{kind}_{digits}.jpg", read, {"license": 1}))
    description = "Caltech 101 (Li, Andreeto, Ranzato, Perona, 2022), https://doi.org/10.22002/D1.20086"
    categories = [{"id": number, "name": kind} for number, kind in enumerate(KINDS, 1)]
    return PhotoSet(photos, description, CC_BY_4, categories)


def _read_outlined(
    picture: Path, outline: Path, category: int, loadmat: Callable[..., dict[str, Any]]
) -> tuple[Image.Image, list[tuple[int, Any]]]:
    """A photo and its outline, which counts from the corner of a box; MATLAB's first pixel has its centre at 1."""
    try:
        content = loadmat(outline)
        top, _, left, _ = np.ravel(content["box_coord"]).astype(float)
        corners = np.reshape(content["obj_contour"], (2, -1)).T + np.array([left, top]) - 0.5
    except Exception as error:  # scipy has its own kinds of errors for damaged files, and zlib's come through
        raise ValueError(f"{outline} cannot be read as an outline: {error}") from error
    return open_image(picture), [(category, [corners.ravel().tolist()])]


def coco(source: Path, persons: bool = False) -> PhotoSet:
    """SOURCE holds annotations/instances_val2017.json and val2017/, or those of train2017, or both.

    With `persons`, photos in which one person is labelled, and of them that person alone.
    """
    folders = [source / name for name in ("train2017", "val2017") if (source / name).is_dir()]
    files = [source / "annotations" / f"instances_{folder.name}.json" for folder in folders]
    if not files or not all(path.is_file() for path in files):
        raise FileNotFoundError(
            f"SOURCE {source} is not COCO 2017 unpacked: expected val2017/ and annotations/instances_val2017.json, or "
            "the same of train2017"
        )
    read = [_read_labels(path, folder) for path, folder in zip(files, folders)]
    photos = [photo for labelled, _ in read for one in labelled if (photo := _licensed(one, persons))]
    categories = [entry for entry in read[0][1] if not persons or entry["id"] == PERSON]
    return PhotoSet(photos, "COCO 2017, photos chosen by licence; annotations CC BY 4.0", COCO_LICENSES, categories)


def _licensed(labelled: "Labelled", persons: bool) -> Photo | None:
    """A photo of COCO under one of the licences, with what is known of it; None if it is no such photo."""
    record, entries = labelled.record, labelled.entries
    if persons:
        entries = [entry for entry in entries if entry["category_id"] == PERSON]
    single = [entry for entry in entries if not entry.get("iscrowd")]
    allowed = {entry["id"] for entry in COCO_LICENSES}
    if record.get("license") not in allowed or not single or (persons and len(entries) > 1):
        return None
    known = {key: record[key] for key in ("license", "flickr_url", "coco_url") if key in record}
    read = replace(labelled, entries=single).read
    return Photo(record["file_name"], read, known, share_alike=record["license"] == SHARE_ALIKE)


def facade(source: Path) -> PhotoSet:
    """SOURCE holds train/, valid/ and test/, each with its pictures and _annotations.coco.json, as Roboflow exports.

    The publisher's parts are put together and split anew, by names without what Roboflow appends to them.
    """
    files = sorted(source.glob("*/_annotations.coco.json"))
    if not files:
        raise FileNotFoundError(
            f"SOURCE {source} is not building-facade-segmentation: expected train/_annotations.coco.json, valid/... "
            "and test/... with their pictures beside them"
        )
    read = [_read_labels(path, path.parent) for path in files]
    photos = [
        Photo(re.sub(r"\.rf\.[^.]+(?=\.\w+$)", "", one.record["file_name"]), one.read, {"license": 1})
        for labelled, _ in read
        for one in labelled
    ]
    return PhotoSet(photos, "building-facade-segmentation, a-hwang", CC_BY_4, read[0][1])


@dataclass(frozen=True)
class Labelled:
    """A picture of a COCO file: its entry, its annotations, and where it lies (None if it is missing)."""

    record: dict[str, Any]
    entries: list[dict[str, Any]]
    path: Path | None

    def read(self) -> tuple[Image.Image, list[tuple[int, Any]]]:
        """The picture and its masks; `ValueError` or `OSError` if it is missing, damaged or of another size."""
        if self.path is None:
            raise FileNotFoundError("the picture is missing")
        image = open_image(self.path)
        if image.size != (self.record["width"], self.record["height"]):
            said = f"{self.record['width']} x {self.record['height']}"
            raise ValueError(f"the picture is {image.width} x {image.height} pixels, its COCO file says {said}")
        return image, [(entry["category_id"], entry["segmentation"]) for entry in self.entries]


def _read_labels(path: Path, folder: Path) -> tuple[list[Labelled], list[dict[str, Any]]]:
    """Pictures of a COCO file by their names, with those in a folder or its subfolders, and the categories."""
    places = {place.name: place for place in folder.rglob("*") if place.suffix.lower() in ENDINGS}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries: dict[Any, list[dict[str, Any]]] = {record["id"]: [] for record in content["images"]}
        for annotation in content["annotations"]:
            if annotation["segmentation"]:
                entries[annotation["image_id"]].append(annotation)
        # Roboflow puts the name of the whole project before the categories.
        real = [entry for entry in content["categories"] if entry.get("supercategory") != "none"]
        categories = [{"id": entry["id"], "name": entry["name"]} for entry in real]
        records = sorted(content["images"], key=lambda record: record["file_name"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a COCO instances file: {type(error).__name__} {error}") from error
    return [Labelled(record, entries[record["id"]], places.get(record["file_name"])) for record in records], categories


def backgrounds(source: Path, license_name: str, credit: str) -> Backgrounds:
    """SOURCE is any folder of photos. Lines `PATH CC-BY by NAME - ADDRESS` of its LICENSE.txt become credits."""
    paths = sorted(path for path in source.rglob("*") if path.suffix.lower() in ENDINGS)
    if not paths:
        raise FileNotFoundError(f"SOURCE {source} holds no pictures: expected {', '.join(ENDINGS)}")
    credits = _read_credits(source / "LICENSE.txt")
    photos = []
    for path in paths:
        place = path.relative_to(source)
        known = {"license": license_name, "credit": credits.get(place.as_posix(), credit)}
        name = "_".join(place.with_suffix(".jpg").parts).replace(" ", "-")
        photos.append(Photo(name, partial(_read_plain, path), known))
    return Backgrounds(photos)


def _read_credits(path: Path) -> dict[str, str]:
    """Who is to be named for each picture, by its path; nothing if there is no such file."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    found = (re.fullmatch(r"(\S+) CC-BY by (.+)", line.strip()) for line in lines)
    return {match[1]: match[2] for match in found if match}


def _read_plain(path: Path) -> tuple[Image.Image, list[tuple[int, Any]]]:
    return open_image(path), []
