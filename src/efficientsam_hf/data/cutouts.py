# SPDX-License-Identifier: Apache-2.0
"""Things without their surroundings, to be pasted on pictures: RGBA files, and objects of annotated pictures."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter


ENDINGS = (".webp", ".png", ".tif", ".tiff")
SMALLEST_SIDE = 32  # pixels; what is smaller has no look of its own to show
EDGE = 0.8  # standard deviation, in pixels, of the blur that softens a mask into alpha


class CutoutFolder:
    """RGBA pictures of a folder and its subfolders, in the order of their paths; nothing is read before access.

    Item i is an RGBA `PIL.Image`, cut to what is not transparent. `like(i)` are the items of the same kind: those whose
    name differs in a number at the end only (cup_00, cup_01). Raises `FileNotFoundError` on construction if the folder
    is missing and `ValueError` if it holds no such file; on access `ValueError` or `OSError` for a damaged picture, one
    without transparency, or one that is transparent all over.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FileNotFoundError(f"folder of cut-outs {self.folder} does not exist or is not a folder")
        self._files = sorted(path for path in self.folder.rglob("*") if path.suffix.lower() in ENDINGS)
        if not self._files:
            raise ValueError(f"folder of cut-outs {self.folder} holds no pictures ({', '.join(ENDINGS)})")
        kinds = [path.parent / re.sub(r"[_-]\d+$", "", path.stem) for path in self._files]
        groups: dict[Path, list[int]] = {}
        for index, kind in enumerate(kinds):
            groups.setdefault(kind, []).append(index)
        self._alike = [groups[kind] for kind in kinds]

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> Image.Image:
        path = self._files[index]
        with Image.open(path) as image:
            if not image.has_transparency_data:
                raise ValueError(f"{path} has no transparency; a cut-out needs an alpha channel")
            image = image.convert("RGBA")
        box = image.getchannel("A").getbbox()
        if box is None:
            raise ValueError(f"{path} is transparent all over")
        return image.crop(box)

    def like(self, index: int) -> list[int]:
        """Items of the kind of item `index`, itself among them."""
        return self._alike[index]


class ObjectCutouts:
    """Objects of annotated pictures as cut-outs: item i is an RGBA `PIL.Image` of the object's box.

    `samples` are {"image": RGB PIL image, "masks": (N, H, W) bool}, and `counts[k]` is the number of objects of
    `samples[k]`. Alpha is the mask, its outermost pixel left out, which shows what was behind, and its edge softened.
    On access `ValueError` for an object that the border of the picture cuts off, or that is too small.
    """

    def __init__(self, samples: Sequence[dict[str, Any]], counts: Sequence[int]) -> None:
        self.samples = samples
        self._owners = np.repeat(np.arange(len(counts)), counts)
        self._places = np.concatenate([np.arange(count) for count in counts])

    def __len__(self) -> int:
        return len(self._owners)

    def __getitem__(self, index: int) -> Image.Image:
        sample = self.samples[int(self._owners[index])]
        place = int(self._places[index])
        if place >= len(sample["masks"]):  # masks without a pixel are left out of a sample
            raise ValueError(f"picture {sample.get('image_id')} has {len(sample['masks'])} objects, not {place + 1}")
        return cut_out(sample["image"], sample["masks"][place])

    def like(self, index: int) -> list[int]:
        """Itself alone: what the objects are is not known here."""
        return [index]


def cut_out(image: Image.Image, mask: np.ndarray) -> Image.Image:
    """The box around a mask (H, W) of an RGB picture as RGBA; `ValueError` if it is cut off by the border or small."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows) or min(np.ptp(rows), np.ptp(columns)) + 1 < SMALLEST_SIDE:
        raise ValueError(f"the object is smaller than {SMALLEST_SIDE} pixels")
    if rows[0] == 0 or columns[0] == 0 or rows[-1] == mask.shape[0] - 1 or columns[-1] == mask.shape[1] - 1:
        raise ValueError("the object is cut off by the border of its picture")
    box = (columns[0] - 1, rows[0] - 1, columns[-1] + 2, rows[-1] + 2)
    alpha = Image.fromarray(mask.astype(np.uint8) * 255).crop(box)
    alpha = alpha.filter(ImageFilter.MinFilter(3)).filter(ImageFilter.GaussianBlur(EDGE))
    cut = image.crop(box).convert("RGBA")
    cut.putalpha(alpha)
    return cut
