# SPDX-License-Identifier: Apache-2.0
"""SA-1B in its own layout: every `NAME.jpg` has a `NAME.json` with RLE masks beside it, in folders or in tars."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import parse_json
from ..models.image_processing_efficientsam import open_image
from .images import visible_files
from .rle_masks import RleMasks
from .tars import stream_rows, tar_files


MOST_HALVES = 1000  # files of a tar that wait for the other one of their picture


class Sa1bFolder:
    """Pictures of an SA-1B folder and its subfolders, in the order of their paths; nothing is read before access.

    Endings may be in any case, hidden files are left out.
    Item i is {"image": RGB `PIL.Image`, "masks": `RleMasks`, which stand for a (N, H, W) bool array and expand what is
    asked of them, "image_id": the path below the folder}.

    Raises `FileNotFoundError` on construction if the folder is missing and `ValueError` if it holds no `.json`; on
    access `ValueError` or `OSError` if a picture or its annotations are missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"SA-1B folder {self.folder} does not exist or is not a folder")
        found = list(visible_files(self.folder))
        self._files = sorted(path for path in found if path.suffix.lower() == ".json")
        self._odd = {path.with_suffix(""): path for path in found if path.suffix.lower() == ".jpg" != path.suffix}
        if not self._files:
            raise ValueError(f"SA-1B folder {self.folder} holds neither .json files nor tars")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._files[index]
        name = str(path.relative_to(self.folder).with_suffix(""))
        picture = self._odd.get(path.with_suffix(""), path.with_suffix(".jpg"))
        if not picture.is_file():
            raise FileNotFoundError(f"{name}.json has no {name}.jpg beside it")
        return make_sample(name, picture.read_bytes(), path.read_bytes())


def stream_tars(tars: list[Path]) -> Any:
    """A `datasets.IterableDataset` of rows for `read_row`; raises `ImportError` without the `datasets` library."""
    return stream_rows(tars, _read_tars)


def read_row(row: dict[str, Any]) -> dict[str, Any]:
    """The sample of a row of `stream_tars`; `ValueError` if it is damaged."""
    if row["problem"]:
        raise ValueError(row["problem"])
    return make_sample(row["name"], row["picture"], row["annotations"])


def _read_tars(tars: list[str]) -> Iterator[dict[str, Any]]:
    """Rows {"name", "picture", "annotations", "problem"}: bytes of both files, and what is wrong or ""."""
    for path in tars:
        halves: dict[str, dict[str, bytes]] = {}
        try:
            for name, content in tar_files(path, (".jpg", ".json")):
                stem, _, kind = name.rpartition(".")
                pair = halves.setdefault(stem, {})
                pair[kind.lower()] = content
                if len(pair) == 2:
                    yield {"name": stem, "picture": pair["jpg"], "annotations": pair["json"], "problem": ""}
                    del halves[stem]
                elif len(halves) > MOST_HALVES:  # or a tar with all pictures first would have to fit in memory
                    stem = next(iter(halves))  # the oldest
                    yield _half(path, stem, halves.pop(stem))
        except ValueError as error:
            yield {"name": path, "picture": b"", "annotations": b"", "problem": str(error)}
        for stem, pair in halves.items():
            yield _half(path, stem, pair)


def _half(path: str, stem: str, pair: dict[str, bytes]) -> dict[str, Any]:
    missing = "json" if "jpg" in pair else "jpg"
    problem = f"{path} holds {stem}, but no {stem}.{missing} near it"
    return {"name": stem, "picture": b"", "annotations": b"", "problem": problem}


def make_sample(name: str, picture: bytes, annotations: bytes) -> dict[str, Any]:
    """The two files of a picture -> {"image", "masks", "image_id": name}; `ValueError` that names what is damaged."""
    image = open_image(io.BytesIO(picture), f"{name}.jpg")
    rles = [annotation.get("segmentation") for annotation in _read_annotations(annotations, name)]
    try:
        masks = RleMasks(rles, (image.height, image.width))
    except ValueError as error:
        raise ValueError(f"{name}.json: {error}") from error
    return {"image": image, "masks": masks, "image_id": name}


def _read_annotations(content: bytes, name: str) -> list[dict[str, Any]]:
    record = parse_json(content, f"{name}.json")
    annotations = record.get("annotations") if isinstance(record, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(entry, dict) for entry in annotations):
        raise ValueError(f"{name}.json is not an SA-1B file: it has no list 'annotations'")
    return annotations
