# SPDX-License-Identifier: Apache-2.0
"""SA-1B in its own layout: a folder in which every `NAME.jpg` has a `NAME.json` with RLE masks beside it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..models.image_processing_efficientsam import open_image
from ..models.rle_efficientsam import decode_rle, rle_size


class Sa1bFolder:
    """Pictures of an SA-1B folder and its subfolders, in the order of their paths; nothing is read before access.

    Item i is {"image": RGB `PIL.Image`, "masks": (N, H, W) bool array, "image_id": the path below the folder}.

    Raises `FileNotFoundError` on construction if the folder is missing and `ValueError` if it holds no `.json`; on
    access `ValueError` or `OSError` if a picture or its annotations are missing or damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"SA-1B folder {self.folder} does not exist or is not a folder")
        self._files = sorted(self.folder.rglob("*.json"))
        if not self._files:
            raise ValueError(f"SA-1B folder {self.folder} holds no .json files")

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._files[index]
        image = open_image(path.with_suffix(".jpg"))
        size = (image.height, image.width)
        masks = [_mask(annotation, size, path) for annotation in read_annotations(path.read_bytes(), str(path))]
        return {
            "image": image,
            "masks": np.stack(masks) if masks else np.zeros((0, *size), bool),
            "image_id": str(path.relative_to(self.folder).with_suffix("")),
        }


def read_annotations(content: bytes, name: str) -> list[dict[str, Any]]:
    """The annotations of one SA-1B json; `ValueError` that names it if it is none."""
    try:
        record = json.loads(content)
    except ValueError as error:
        raise ValueError(f"{name} is not a JSON file: {error}") from error
    annotations = record.get("annotations") if isinstance(record, dict) else None
    if not isinstance(annotations, list) or not all(isinstance(entry, dict) for entry in annotations):
        raise ValueError(f"{name} is not an SA-1B file: it has no list 'annotations'")
    return annotations


def _mask(annotation: dict[str, Any], size: tuple[int, int], path: Path) -> np.ndarray:
    """Expand one mask, -> (H, W) bool; `ValueError` that names the file if it does not fit the picture."""
    try:
        rle = annotation.get("segmentation")
        if rle_size(rle) != size:
            raise ValueError(f"mask of {rle_size(rle)} in a picture of {size} (height, width)")
        return decode_rle(rle)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
