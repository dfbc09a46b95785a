# SPDX-License-Identifier: Apache-2.0
"""Pictures without annotations, to pretrain on: in folders, in tars that are streamed, or generated."""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ..models.image_processing_efficientsam import open_image
from .scene_bank import SceneBank
from .scenes import render_scenes
from .tars import stream_rows, tar_files


# Those that Pillow needs help with are pictures all the same: one that cannot be read is said, not passed over.
ENDINGS = tuple(
    ".jpg .jpeg .jfif .png .webp .bmp .tif .tiff .gif .jp2 .avif .mpo .heic .heif .jxl .dng .cr2 .nef .arw".split()
)


def find_pictures(folder: Path, shown: str, endings: tuple[str, ...]) -> list[Path]:
    """Files of a folder and its subfolders whose names end so, in any case, in the order of their paths.

    Hidden files and folders are left out. Raises `FileNotFoundError` if the folder, which messages call `shown`, is
    missing, and `ValueError` if it has none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"{shown} {folder} does not exist or is not a folder")
    files = sorted(path for path in visible_files(folder) if path.suffix.lower() in endings)
    if not files:
        raise ValueError(f"{shown} {folder} holds no pictures ({', '.join(endings)})")
    return files


def visible_files(folder: Path) -> Iterator[Path]:
    """Files of a folder and its subfolders but for hidden ones, such as ._a.jpg and .ipynb_checkpoints/a.jpg."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


class ImageFolder:
    """Pictures of a folder and its subfolders, in the order of their paths; nothing is read before access.

    Item i is {"image": RGB `PIL.Image`, "image_id": the path below the folder}. Raises `FileNotFoundError` on
    construction if the folder is missing and `ValueError` if it holds no picture; on access `ValueError` or `OSError`
    if one is damaged.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._files = find_pictures(self.folder, "image folder", ENDINGS)

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": open_image(self._files[index]), "image_id": self._name(index)}

    def _name(self, index: int) -> str:
        return self._files[index].relative_to(self.folder).as_posix()

    def fingerprint(self) -> str:
        """Changes with the names of the files, and with nothing else."""
        names = "\n".join(self._name(index) for index in range(len(self)))
        return f"{len(self)} files, sha256:{hashlib.sha256(names.encode()).hexdigest()[:16]}"


def stream_tars(tars: list[Path]) -> Any:
    """A `datasets.IterableDataset` of rows for `read_row`; raises `ImportError` without the `datasets` library."""
    return stream_rows(tars, _read_tars)


def read_row(row: dict[str, Any]) -> dict[str, Any]:
    """The sample of a row of `stream_tars`; `ValueError` if it is damaged."""
    if row["problem"]:
        raise ValueError(row["problem"])
    return {"image": open_image(io.BytesIO(row["picture"]), row["name"]), "image_id": row["name"]}


def _read_tars(tars: list[str]) -> Iterator[dict[str, Any]]:
    """Rows {"name", "picture": bytes, "problem": what is wrong or ""}."""
    for path in tars:
        try:
            for name, picture in tar_files(path, ENDINGS):
                yield {"name": name, "picture": picture, "problem": ""}
        except ValueError as error:
            yield {"name": path, "picture": b"", "problem": str(error)}


class SceneImages:
    """The first `count` generated scenes of a seed, at one size, each rendered when it is asked for.

    Item i is {"image": RGB `PIL.Image`, "image_id": its number}. Several at once (`__getitems__`, as torch's loaders
    call it) take a sixth of the time each.
    """

    def __init__(self, count: int, seed: int, image_size: int) -> None:
        if count < 1:
            raise ValueError(f"count must be at least 1, got {count}")
        self.count, self.seed, self.image_size = count, seed, image_size
        self.bank = SceneBank.build(seed=0, device="cpu")

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        for index in indices:
            if not 0 <= index < self.count:
                raise IndexError(index)
        scenes = render_scenes(self.bank, torch.tensor(indices), seed=self.seed, image_size=self.image_size)
        pixels = (scenes.images * 255).round().byte().permute(0, 2, 3, 1).numpy()
        return [{"image": Image.fromarray(one), "image_id": str(index)} for one, index in zip(pixels, indices)]

    def fingerprint(self) -> str:
        """Seed and size."""
        return f"scenes of seed {self.seed} at {self.image_size} pixels"
