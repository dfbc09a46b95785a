# SPDX-License-Identifier: Apache-2.0
"""Cut-outs pasted on pictures (Ghiasi et al. 2021, Simple Copy-Paste), with exact masks of what stays visible.

A cut-out of many colours is one object, so a model that trains on such pictures cannot follow colour alone.
"""

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from PIL import Image, ImageFilter, ImageStat

from .cutouts import SOLID
from .light import change_light
from .scenes import scene_seed


MOST_OBJECTS, MOST_BEHIND = 10, 16  # things pasted, and objects of a background that are kept
SIZES = (0.12, 0.95)  # longest side of a pasted thing, as a fraction of the picture's shorter side
LONGER_SIDE = (0.75, 1.15)  # of the picture that is made, as a multiple of the side asked for
LEAST_SIDE = 16  # pixels of the part of a background that is taken, and of the picture that is made
OWN_KIND = 0.3  # probability that a thing stands among others of its kind
SMALLEST_SHARE = 0.25  # of a thing must stay visible, or it is no object
DRAWS = 200  # of a picture or cut-out that can be used, after which there is no point in going on


class Cutouts(Protocol):
    """Things to paste: RGBA pictures by number, and the numbers of those of the same kind."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Image.Image: ...
    def like(self, index: int) -> list[int]: ...


@dataclass(frozen=True)
class PastedPictures:
    """Things on photos: pictures without end, each made when it is asked for.

    `cutouts` and `backgrounds` are pairs (weight, sequence); the weights say how often each is drawn. Backgrounds are
    {"image"}; where they have "masks" too, what stays visible of these objects is kept. A part of the background is
    taken; things are scaled, rotated, mirrored, lit and laid in front of each other with soft edges and shadows; then
    the whole is photographed: light, blur, noise and compression are the same for things and background. NumPy and
    Pillow compute all of it on the CPU, whatever device trains.
    """

    cutouts: Sequence[tuple[float, Cutouts]]
    backgrounds: Sequence[tuple[float, Sequence[dict[str, Any]]]]
    seed: int = 0

    def picture(self, index: int, side: int) -> dict[str, Any]:
        """Picture `index`, which depends on (seed, index, side) alone; its longer side is about `side` pixels.

        -> {"image": RGB `PIL.Image`, "masks": (N, H, W) bool array, "image_id": index}, where the mask of a pasted
        thing overlaps no other. Raises `ValueError` if none of several cut-outs or backgrounds that were drawn for it
        could be used.
        """
        generator = np.random.default_rng(scene_seed(self.seed, index))
        canvas = _Canvas(*self._background(side, generator), generator)
        count = min(MOST_OBJECTS, 1 + generator.poisson(2.0))
        while len(canvas.pasted) < count:
            self._paste_one_kind(canvas, count - len(canvas.pasted))
        return {"image": photograph(canvas.image, generator), "masks": canvas.masks(), "image_id": index}

    def _background(self, side: int, generator: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
        """A part of a background: RGB picture and masks (N, H, W) bool."""
        _, _, sample = _draw(self.backgrounds, generator)
        image, masks = sample["image"], sample.get("masks", np.zeros((0, 1, 1), bool))
        masks = np.asarray(masks[generator.permutation(len(masks))[:MOST_BEHIND]])
        share = generator.uniform(0.5, 1.0)
        cut = [min(length, max(LEAST_SIDE, round(length * share))) for length in image.size]
        left, top = (int(generator.integers(0, max(1, have - part))) for have, part in zip(image.size, cut))
        box = (left, top, left + cut[0], top + cut[1])
        scale = side * generator.uniform(*LONGER_SIDE) / max(cut)
        size = tuple(max(LEAST_SIDE, round(length * scale)) for length in cut)
        image = image.resize(size, Image.Resampling.BICUBIC, box)
        masks = np.array([_resize_mask(mask, size, box) for mask in masks], bool).reshape(len(masks), *size[::-1])
        if generator.random() < 0.5:
            image, masks = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), masks[:, :, ::-1]
        if generator.random() < 0.2:  # out of focus
            image = image.filter(ImageFilter.GaussianBlur(generator.uniform(0.001, 0.008) * side))
        return image, masks

    def _paste_one_kind(self, canvas: "_Canvas", room: int) -> None:
        """Paste a thing, or several of its kind that may cover each other, `room` at most."""
        generator = canvas.generator
        cutouts, drawn, cutout = _draw(self.cutouts, generator)
        alike = cutouts.like(drawn)
        size = np.exp(generator.uniform(*np.log(SIZES)))
        count = min(room, int(generator.integers(2, 5))) if generator.random() < OWN_KIND else 1
        middle = generator.uniform(0, 1, 2)
        for number in range(count):
            if number and len(alike) > 1:
                with suppress(ValueError, OSError):  # one that cannot be used makes way for the one before it
                    cutout = cutouts[alike[int(generator.integers(len(alike)))]]
            near = middle if not number else middle + generator.normal(0, 0.6 * size, 2)
            longest = size * generator.uniform(0.8, 1.25) * min(canvas.image.size)
            canvas.paste(_turned(cutout, longest, generator), near)


class _Canvas:
    """A picture that things are laid on, one in front of the other."""

    def __init__(self, image: Image.Image, masks: np.ndarray, generator: np.random.Generator) -> None:
        self.image, self.generator = image.copy(), generator
        self.behind = [(mask.copy(), int(mask.sum())) for mask in masks]
        self.pasted: list[tuple[np.ndarray, int]] = []

    def paste(self, thing: Image.Image, middle: np.ndarray) -> None:
        """Lay an RGBA thing with its middle at (x, y), fractions of the picture; what is beyond its border is cut."""
        place = np.clip(middle, 0.05, 0.95) * self.image.size - np.array(thing.size) / 2
        left, top = (round(float(value)) for value in place)
        alpha = thing.getchannel("A")
        if self.generator.random() < 0.6:
            self._darken(alpha, left, top)
        color = change_light(thing.convert("RGB"), self.generator, exposure=self._exposure(thing, left, top))
        self.image.paste(color, (left, top), alpha)
        covers = np.zeros(self.image.size[::-1], bool)
        solid = np.asarray(alpha) >= SOLID
        rows, columns = slice(max(0, top), max(0, top + thing.height)), slice(max(0, left), max(0, left + thing.width))
        part = covers[rows, columns]
        part[:] = solid[max(0, -top) :, max(0, -left) :][: part.shape[0], : part.shape[1]]
        for mask, _ in (*self.behind, *self.pasted):
            mask &= ~covers
        self.pasted.append((covers, int(solid.sum())))

    def _darken(self, alpha: Image.Image, left: int, top: int) -> None:
        """A shadow beside the thing: its shape, moved, blurred and weaker."""
        reach, generator = max(alpha.size), self.generator
        blur = generator.uniform(0.01, 0.12) * reach
        x, y = generator.uniform(-0.15, 0.15, 2) * reach
        strength, margin = generator.uniform(0.15, 0.6), int(2 * blur) + 1
        shadow = Image.new("L", (alpha.width + 2 * margin, alpha.height + 2 * margin))
        shadow.paste(alpha.point(lambda value: value * strength), (margin, margin))
        left, top = left - margin + round(x), top - margin + round(y)
        box = (left, top, left + shadow.width, top + shadow.height)
        self.image.paste((0, 0, 0), box, shadow.filter(ImageFilter.BoxBlur(blur)))

    def _exposure(self, thing: Image.Image, left: int, top: int) -> float:
        """Factor that brings a thing's brightness a random part of the way to that of where it lies."""
        box = (max(0, left), max(0, top), left + thing.width, top + thing.height)
        box = (*box[:2], min(self.image.width, box[2]), min(self.image.height, box[3]))
        share = self.generator.uniform(0, 0.5)
        if box[0] >= box[2] or box[1] >= box[3]:
            return 1.0
        around = sum(ImageStat.Stat(self.image.crop(box)).mean)
        solid = thing.getchannel("A").point(lambda alpha: 255 * (alpha >= SOLID))
        own = sum(ImageStat.Stat(thing.convert("RGB"), solid).sum)
        return float(np.clip(around * solid.histogram()[255] / max(own, 1.0), 0.25, 4.0) ** share)

    def masks(self) -> np.ndarray:
        """What is visible of each object, of those that are not too hidden: (N, H, W) bool."""
        kept = [mask for mask, whole in (*self.behind, *self.pasted) if mask.sum() > SMALLEST_SHARE * whole]
        return np.array(kept, bool).reshape(len(kept), *self.image.size[::-1])


def _draw(weighted: Sequence[tuple[float, Any]], generator: np.random.Generator) -> tuple[Any, int, Any]:
    """An item that can be used, of a sequence drawn by the weights: (the sequence, the item's index, the item).

    Raises `ValueError` if none of many that were drawn of this sequence can be used.
    """
    weights = np.array([weight for weight, _ in weighted])
    sequence = weighted[generator.choice(len(weighted), p=weights / weights.sum())][1]
    for _ in range(DRAWS):
        index = int(generator.integers(len(sequence)))
        try:
            return sequence, index, sequence[index]
        except (ValueError, OSError) as error:
            reason = error
    raise ValueError(f"none of {DRAWS} cut-outs or backgrounds that were drawn could be used: {reason}")


def _turned(cutout: Image.Image, longest: float, generator: np.random.Generator) -> Image.Image:
    """An RGBA cut-out whose longest side is scaled to `longest` pixels, then slightly stretched and turned."""
    stretch = np.exp(generator.normal(0, 0.08))
    scale = longest / max(cutout.size)
    size = tuple(max(4, round(length * scale * by)) for length, by in zip(cutout.size, (stretch, 1 / stretch)))
    if generator.random() < 0.5:
        cutout = cutout.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    cutout = cutout.resize(size, Image.Resampling.BICUBIC)
    angle = generator.uniform(-180, 180) if generator.random() < 0.15 else generator.normal(0, 12)
    return cutout.rotate(angle, Image.Resampling.BICUBIC, expand=True)


def photograph(image: Image.Image, generator: np.random.Generator) -> Image.Image:
    """A whole picture in other light, with blur, noise and compression: RGB -> RGB."""
    grey, blur, noise, compression = generator.random(4)
    image = change_light(image, generator, 0.7)
    if grey < 0.05:
        image = image.convert("L").convert("RGB")
    if blur < 0.3:
        image = image.filter(ImageFilter.GaussianBlur(generator.uniform(0.3, 1.2)))
    if noise < 0.4:
        grain = np.float32(generator.uniform(1, 10)) * generator.standard_normal((*image.size[::-1], 3), np.float32)
        image = Image.fromarray(np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8))
    if compression < 0.4:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=int(generator.integers(40, 95)))
        image = Image.open(file).convert("RGB")
    return image


def _resize_mask(mask: np.ndarray, size: tuple[int, int], box: tuple[int, int, int, int]) -> np.ndarray:
    """Part `box` of a mask at another size (width, height): (H, W) bool -> (height, width) bool."""
    shares = Image.fromarray(mask.view(np.uint8) * 255).resize(size, Image.Resampling.BILINEAR, box)
    return np.asarray(shares) >= 128
