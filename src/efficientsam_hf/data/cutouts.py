# SPDX-License-Identifier: Apache-2.0
"""Things without their surroundings, to be pasted on pictures: RGBA files, and objects of annotated pictures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from ..models.image_processing_efficientsam import check_picture
from .images import find_pictures


ENDINGS = (".webp", ".png", ".tif", ".tiff")
SMALLEST_SIDE = 32  # pixels of an object of a picture; a smaller one has too little of a look to be enlarged
EDGE = 0.8  # standard deviation, in pixels, of the blur that softens a mask into alpha
SOLID = 128  # alpha from which on a pixel belongs to a thing


class CutoutFolder:
    """RGBA pictures of a folder and its subfolders, in the order of their paths; nothing is read before access.

    Item i is an RGBA `PIL.Image`, cut to what is not transparent. `like(i)` are the items of the same kind: those of
    the same folder whose names differ only in a number at the end (cup_00, cup_01).

    Raises `FileNotFoundError` on construction if the folder is missing and `ValueError` if it holds no such file; on
    access `ValueError` or `OSError` for a picture that is damaged, has no transparency, or is nowhere opaque.
    """

    def __init__(self, folder: str | Path) -> None:
        self._files = find_pictures(Path(folder), "folder of cut-outs", ENDINGS)
        kinds = [path.parent / re.sub(r"[_-]\d+$", "", path.stem) for path in self._files]
        groups: dict[Path, list[int]] = {}
        for index, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(index)
        self._alike = [groups[kind] for kind in kinds]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Image.Image:
        return open_cutout(self._files[index])

    def like(self, index: int) -> list[int]:
        """Items of the kind of item `index`, itself among them."""
        return self._alike[index]


def open_cutout(path: Path) -> Image.Image:
    """A picture with transparency as RGBA, cut to what is not transparent; `ValueError` or `OSError` as above."""
    try:
        with Image.open(path) as image:
            check_picture(image, str(path))
            if not image.has_transparency_data:
                raise ValueError(f"{path} has no transparency; a cut-out needs an alpha channel")
            image = ImageOps.exif_transpose(image).convert("RGBA")
    except FileNotFoundError:
        raise
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    alpha = image.getchannel("A")
    if alpha.getextrema()[1] < SOLID:
        raise ValueError(f"{path} is nowhere more than half opaque")
    return image.crop(alpha.getbbox())


class ObjectCutouts:
    """Objects of annotated pictures as cut-outs: item i is an RGBA `PIL.Image` of the object's box.

    `samples` are {"image": RGB PIL image, "masks": (N, H, W) bool}, and `counts[k]` is the number of objects of
    `samples[k]`. Alpha is the mask without its outermost pixels, which show some of what was behind, with a soft edge.
    On access `ValueError` for an object that the border of the picture cuts off, or that is too small or too thin;
    many may be, so each such one is looked at once, and its error kept.
    """

    def __init__(self, samples: Sequence[dict[str, Any]], counts: Sequence[int]) -> None:
        self.samples = samples
        self._owners = np.repeat(np.arange(len(counts)), counts)
        self._places = np.concatenate([np.arange(count) for count in counts])
        self._unusable: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, index: int) -> Image.Image:
        if index in self._unusable:
            raise ValueError(self._unusable[index])
        try:
            return self._cut(index)
        except ValueError as error:
            self._unusable[index] = str(error)
            raise

    def _cut(self, index: int) -> Image.Image:
        sample = self.samples[int(self._owners[index])]
        place = int(self._places[index])
        if place >= len(sample["masks"]):  # masks without a pixel are left out of a sample
            raise ValueError(f"picture {sample.get('image_id')} has {len(sample['masks'])} objects, not {place + 1}")
        return cut_out(sample["image"], sample["masks"][place])

    def like(self, index: int) -> list[int]:
        """Itself alone: what the objects are is not known here."""
        return [index]


def cut_out(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The box around a mask (H, W) of an RGB picture as RGBA.

    Raises `ValueError` if the mask is small, reaches the border of the picture, or is too thin to have an inside.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows) or min(np.ptp(rows), np.ptp(columns)) + 1 < SMALLEST_SIDE:
        raise ValueError(f"the object is smaller than {SMALLEST_SIDE} pixels")
    if rows[0] == 0 or columns[0] == 0 or rows[-1] == mask.shape[0] - 1 or columns[-1] == mask.shape[1] - 1:
        raise ValueError("the object is cut off by the border of its picture")
    box = tuple(int(side) for side in (columns[0] - 1, rows[0] - 1, columns[-1] + 2, rows[-1] + 2))
    alpha = Image.fromarray(mask.astype(np.uint8) * 255).crop(box)
    alpha = alpha.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.GaussianBlur(EDGE))
    if alpha.getextrema()[1] < SOLID:
        raise ValueError("the object is too thin to be cut out")
    cut = image.crop(box).convert("RGBA")
    cut.putalpha(alpha)
    return cut
