# SPDX-License-Identifier: Apache-2.0
"""The clothing dataset, whose publisher has labels but no masks: these are where two runs of GrabCut agree.

GrabCut (Rother et al. 2004) separates a thing from what the border of the picture shows by their colours. One run
begins with everything but the border as the garment, the other with a disc in the middle. Where both end alike the
outline is real; where they do not, the photo is left out.
"""

import csv
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from layout import LONGEST_PHOTO, Photo, PhotoSet
from PIL import Image

from efficientsam_hf.models.image_processing_efficientsam import open_image


LABELS = (
    "Blazer Blouse Body Dress Hat Hoodie Longsleeve Outwear Pants Polo Shirt Shorts Skirt T-Shirt Top Undershirt"
).split()  # not Shoes, which are two, nor "Not sure", "Other" and "Skip"
CC0 = [{"id": 1, "name": "CC0-1.0", "url": "https://creativecommons.org/publicdomain/zero/1.0/"}]
LONGEST = LONGEST_PHOTO // 2  # pixels that GrabCut sees: finer threads only mislead it
ITERATIONS = 5
BORDER = 0.92  # what is farther from the middle, as a fraction of half a side, is background
DISC = 0.5  # radius in the same measure
AGREEMENT = 0.97  # IoU of the two runs
ONE_PIECE = 0.95  # of a mask's pixels that hang together
AREAS = (0.1, 0.75)  # of the picture


def clothing(source: Path) -> PhotoSet:
    """SOURCE holds images.csv (image, label, ...) and images/IMAGE.jpg."""
    try:
        import cv2
    except ImportError as error:
        raise ImportError("clothing needs OpenCV for its masks: pip install opencv-python-headless") from error
    table = source / "images.csv"
    if not table.is_file() or not (source / "images").is_dir():
        raise FileNotFoundError(f"SOURCE {source} is not clothing-dataset: expected images.csv and images/ in it")
    with table.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"image", "label"} <= rows[0].keys():
        raise ValueError(f"{table} must have the columns image and label, got {list(rows[0]) if rows else 'no row'}")
    numbers = {label: number for number, label in enumerate(LABELS, 1)}
    photos = [
        Photo(
            f"{name}.jpg",
            partial(_read_garment, source / "images" / f"{name}.jpg", numbers[label], cv2),
            {"license": 1},
        )
        for name, label in sorted((row["image"], row["label"]) for row in rows)
        if label in numbers
    ]
    categories = [{"id": number, "name": label} for label, number in numbers.items()]
    description = "Clothing dataset, alexeygrigorev/clothing-dataset; masks by GrabCut"
    return PhotoSet(photos, description, CC0, categories, {"pseudo": True})


def _read_garment(path: Path, category: int, cv2: Any) -> tuple[Image.Image, list[tuple[int, Any]]]:
    image = open_image(path)
    return image, [(category, garment_mask(image, cv2))]


def garment_mask(image: Image.Image, cv2: Any) -> np.ndarray:
    """The thing in the middle of an RGB photo, (h, w) bool at `LONGEST` pixels; `ValueError` if it is not certain."""
    small = image.copy()
    small.thumbnail((LONGEST, LONGEST))
    pixels = np.ascontiguousarray(np.asarray(small)[..., ::-1])
    height, width = pixels.shape[:2]
    y, x = np.abs((np.mgrid[:height, :width] + 0.5) / np.reshape((height, width), (2, 1, 1)) * 2 - 1)
    border = np.maximum(x, y) > BORDER
    everything = np.where(border, cv2.GC_BGD, cv2.GC_PR_FGD)
    disc = np.where(border, cv2.GC_BGD, np.where(x**2 + y**2 < DISC**2, cv2.GC_PR_FGD, cv2.GC_PR_BGD))
    one, other = (_grab(pixels, start.astype(np.uint8), cv2) for start in (everything, disc))
    both = one & other
    agreement = both.sum() / max(1, (one | other).sum())
    if agreement < AGREEMENT:
        raise ValueError(f"two GrabCut runs agree to {agreement:.2f} only, {AGREEMENT} is needed")
    return _solid(both, cv2)


def _grab(pixels: np.ndarray, start: np.ndarray, cv2: Any) -> np.ndarray:
    """Foreground by GrabCut from a first guess (h, w) of its four classes -> (h, w) bool."""
    cv2.setRNGSeed(0)
    models = np.zeros((1, 65)), np.zeros((1, 65))
    try:
        cv2.grabCut(pixels, start, None, *models, ITERATIONS, cv2.GC_INIT_WITH_MASK)
    except cv2.error as error:
        raise ValueError(f"GrabCut fails: {error}") from error
    return (start == cv2.GC_FGD) | (start == cv2.GC_PR_FGD)


def _solid(mask: np.ndarray, cv2: Any) -> np.ndarray:
    """The largest piece, its holes filled (prints look like them); `ValueError` if it is not plainly one thing."""
    _, pieces = cv2.connectedComponents(mask.astype(np.uint8))
    sizes = np.bincount(pieces.ravel(), minlength=2)[1:]
    if sizes.max() < ONE_PIECE * mask.sum() or not AREAS[0] <= mask.mean() <= AREAS[1]:
        raise ValueError(f"the mask, {mask.mean():.0%} of the picture, is in pieces, too small or too large")
    piece = pieces == 1 + sizes.argmax()
    _, outside = cv2.connectedComponents(np.pad(~piece, 1, constant_values=True).astype(np.uint8), connectivity=4)
    return (outside != outside[0, 0])[1:-1, 1:-1]
