# SPDX-License-Identifier: Apache-2.0
"""What generated scenes are made of and is costly to make: outlines and textures, prepared once.

Textures are periodic tiles of two channels, a pattern (mostly used for lightness) and a companion (mostly used for
hue), each with mean 0 and standard deviation 1. Every tile is kept at four resolutions, so that a texture seen from
far away or out of focus is smooth and does not alias.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from .outlines import build_outlines, fractal_field, uniform


TEXTURE_SIZE = 256
TEXTURE_LEVELS = 4
# Each tile is one row of the atlas: 256, 128, 64 and 32 texels with a gutter of one, because the tiles repeat.
ROW_HEIGHT = TEXTURE_SIZE + 2
LEVEL_X = (1, TEXTURE_SIZE + 3, TEXTURE_SIZE + 3, TEXTURE_SIZE + 69)
LEVEL_Y = (1, 1, TEXTURE_SIZE // 2 + 3, TEXTURE_SIZE // 2 + 3)
ATLAS_WIDTH = TEXTURE_SIZE + TEXTURE_SIZE // 2 + 4


def _standard(tiles: torch.Tensor) -> torch.Tensor:
    """Mean 0, standard deviation 1 and no value beyond 3, per tile and channel."""
    tiles = tiles - tiles.mean(dim=(-2, -1), keepdim=True)
    return (tiles / tiles.std(dim=(-2, -1), keepdim=True).clamp_min(1e-6)).clamp(-3, 3)


def _noise(generator, low: float, high: float, stretch: float = 1.0) -> torch.Tensor:
    """One field of 1 / f^slope noise with a slope between low and high -> (T, T)."""
    slope = float(uniform(generator, 1, low=low, high=high))
    return fractal_field(1, TEXTURE_SIZE, slope, generator, stretch)[0]


def _axes() -> tuple[torch.Tensor, torch.Tensor]:
    axis = torch.arange(TEXTURE_SIZE) / TEXTURE_SIZE
    return axis.expand(TEXTURE_SIZE, TEXTURE_SIZE), axis[:, None].expand(TEXTURE_SIZE, TEXTURE_SIZE)


def _clouds(index: int, generator) -> torch.Tensor:
    """Fractal noise of many slopes, the companion partly the same field."""
    pattern = _noise(generator, 0.6, 2.2)
    share = float(uniform(generator, 1))
    return torch.stack([pattern, share * pattern + (1 - share) * _noise(generator, 1.0, 2.2)])


def _streaks(index: int, generator) -> torch.Tensor:
    """Stretched noise: water, fur, bark, grass."""
    stretch = float(uniform(generator, 1, low=1.5, high=4.0))
    pattern = _noise(generator, 0.7, 1.8, stretch)
    if index % 3 == 0:
        pattern = -pattern.abs()
    return torch.stack([pattern, _noise(generator, 1.0, 2.0, stretch)])


def _stripes(index: int, generator) -> torch.Tensor:
    """Bent or straight stripes of soft or hard edges, some with gaps."""
    _, y = _axes()
    count = 6 + 3 * (index % 6)
    bend = 0.0 if index % 4 == 0 else float(uniform(generator, 1, low=0.3, high=2.5))
    wave = torch.sin(2 * math.pi * count * y + bend * _noise(generator, 1.6, 2.2))
    sharp = float(uniform(generator, 1, low=0.7, high=6.0))
    pattern = torch.tanh(sharp * (wave + float(uniform(generator, 1, low=-0.6, high=0.6))))
    if index % 2:
        pattern = torch.maximum(pattern, torch.tanh(2 * _noise(generator, 1.5, 2.0)))
    return torch.stack([pattern + 0.2 * _noise(generator, 0.7, 1.5), _noise(generator, 1.2, 2.0)])


def _grid(index: int, generator) -> torch.Tensor:
    """Windows, bricks, checks and tiles: cells of their own tone within joints."""
    x, y = _axes()
    rows, columns = 4 + 4 * (index % 4), 4 + 2 * (index % 5)
    row = (y * rows).floor()
    shifted = x * columns + (0.5 * (row % 2) if index % 2 else 0)
    column = shifted.floor() % columns
    joint = float(uniform(generator, 1, low=0.05, high=0.3))
    inside = ((y * rows) % 1 > joint) & (shifted % 1 > joint)
    tones = uniform(generator, rows, columns)
    tone = tones[row.long(), column.long()]
    if index % 3 == 0:
        tone = 1.0 - 0.3 * tone + ((row + column) % 2) * float(uniform(generator, 1, high=1.5))
    pattern = torch.where(inside, tone + 0.3, float(uniform(generator, 1, low=-0.8, high=0.3)))
    return torch.stack([pattern + 0.08 * _noise(generator, 0.6, 1.5), tone + 0.3 * _noise(generator, 1.2, 2.0)])


def _cells(index: int, generator) -> torch.Tensor:
    """Cellular noise: pebbles, scales, cracked ground, spots."""
    x, y = _axes()
    count = (24, 60, 140, 260)[index % 4]
    centres = uniform(generator, count, 2)
    first = torch.full((TEXTURE_SIZE, TEXTURE_SIZE), 9.0)
    second, owner = first.clone(), torch.zeros(TEXTURE_SIZE, TEXTURE_SIZE, dtype=torch.long)
    for k in range(count):
        dx, dy = (x - centres[k, 0] + 0.5) % 1 - 0.5, (y - centres[k, 1] + 0.5) % 1 - 0.5
        distance = dx * dx + dy * dy
        closer = distance < first
        second = torch.where(closer, first, torch.minimum(second, distance))
        owner.masked_fill_(closer, k)
        first = torch.where(closer, distance, first)
    first, second = first.sqrt() * math.sqrt(count), second.sqrt() * math.sqrt(count)
    tone = uniform(generator, count)[owner]
    crack = torch.tanh(4 * (second - first))
    spot = torch.tanh(5 * (0.38 + 0.1 * tone - first))
    pattern = (crack * (0.5 + tone), spot, 0.8 * tone - 0.6 * first)[index % 3]
    return torch.stack([pattern + 0.12 * _noise(generator, 0.7, 1.5), tone + 0.3 * _noise(generator, 1.2, 2.0)])


def _leaves(index: int, generator) -> torch.Tensor:
    """Small discs or blades of power-law size on top of each other: foliage, gravel, crowds, grass."""
    pattern = torch.zeros(TEXTURE_SIZE, TEXTURE_SIZE)
    companion = torch.zeros(TEXTURE_SIZE, TEXTURE_SIZE)
    blade = index % 3 == 0
    for _ in range(900):
        u = uniform(generator, 7).tolist()
        radius = min(1.6 / max(u[0], 0.02) ** 0.6, 20.0) * (0.8 if blade else 1.0)
        reach = int(radius * (2.5 if blade else 1.0)) + 1
        axis = torch.arange(-reach, reach + 1, dtype=torch.float32)
        angle = (0.6 * (u[1] - 0.5) + math.pi / 2) if blade else math.pi * u[1]
        c, s = math.cos(angle), math.sin(angle)
        along, across = c * axis + s * axis[:, None], c * axis[:, None] - s * axis
        length, width = (radius * 2.4, radius * 0.35) if blade else (radius, radius * (0.4 + 0.6 * u[2]))
        covered = (along / length) ** 2 + (across / width) ** 2 < 1
        rows = (int(u[3] * TEXTURE_SIZE) + torch.arange(-reach, reach + 1)) % TEXTURE_SIZE
        columns = (int(u[4] * TEXTURE_SIZE) + torch.arange(-reach, reach + 1)) % TEXTURE_SIZE
        at = (rows[:, None], columns[None])
        shade = u[5] - 0.4 * (across / width)
        pattern[at] = torch.where(covered, shade, pattern[at])
        companion[at] = torch.where(covered, u[6], companion[at])
    return torch.stack([pattern + 0.25 * _noise(generator, 1.0, 1.8), companion + 0.3 * _noise(generator, 1.2, 2.0)])


def _foliage(index: int, generator) -> torch.Tensor:
    """Thresholded noise of two scales: sunlit leaves against gaps, two-tone hides, lichen."""
    fine = _noise(generator, 0.8, 1.5)
    coarse = _noise(generator, 1.6, 2.2)
    sharp = float(uniform(generator, 1, low=2.0, high=8.0))
    pattern = torch.tanh(sharp * (coarse + (0.2 + 0.6 * (index % 2)) * fine + float(uniform(generator, 1)) - 0.5))
    return torch.stack([pattern * (1 + 0.3 * fine) + 0.25 * fine, pattern + 0.5 * coarse])


def _plain(index: int, generator) -> torch.Tensor:
    """Almost nothing: slow changes only, a few specks."""
    slow = _noise(generator, 2.0, 2.8)
    specks = (torch.randn(TEXTURE_SIZE, TEXTURE_SIZE, generator=generator) > 3).float()
    return torch.stack([slow + 2.0 * specks * (index % 2), _noise(generator, 2.0, 2.8)])


def _ridges(index: int, generator) -> torch.Tensor:
    """Rocks, folds and wood: creases of fractal noise, rings along a field."""
    field = _noise(generator, 1.3, 2.0, 1.0 + 0.8 * (index % 3))
    if index % 2:
        pattern = -field.abs() - 0.5 * _noise(generator, 1.2, 1.8).abs()
    else:
        pattern = torch.sin((2 + index) * field) + 0.4 * _noise(generator, 0.9, 1.5)
    return torch.stack([pattern, 0.5 * field + _noise(generator, 1.2, 2.0)])


TEXTURE_FAMILIES = {
    "clouds": (_clouds, 28),
    "streaks": (_streaks, 20),
    "stripes": (_stripes, 14),
    "grid": (_grid, 14),
    "cells": (_cells, 12),
    "leaves": (_leaves, 12),
    "foliage": (_foliage, 14),
    "plain": (_plain, 6),
    "ridges": (_ridges, 12),
}


def _atlas_row(tile: torch.Tensor) -> torch.Tensor:
    """One tile at all its resolutions, each with its gutter, (2, T, T) -> (2, ROW_HEIGHT, ATLAS_WIDTH)."""
    row = torch.zeros(2, ROW_HEIGHT, ATLAS_WIDTH)
    for level in range(TEXTURE_LEVELS):
        size = TEXTURE_SIZE >> level
        shrunk = F.avg_pool2d(tile, 1 << level)
        x, y = LEVEL_X[level] - 1, LEVEL_Y[level] - 1
        row[:, y : y + size + 2, x : x + size + 2] = F.pad(shrunk[None], (1, 1, 1, 1), mode="circular")[0]
    return row


def _build_textures(seed: int) -> tuple[torch.Tensor, dict[str, tuple[int, int]]]:
    """The atlas (2, tiles * ROW_HEIGHT, ATLAS_WIDTH) and for each family the range [first, last) of its tiles."""
    generator = torch.Generator().manual_seed(seed)
    rows, ranges = [], {}
    for name, (make, count) in TEXTURE_FAMILIES.items():
        ranges[name] = (len(rows), len(rows) + count)
        rows += [_atlas_row(_standard(make(index, generator))) for index in range(count)]
    return torch.cat(rows, dim=1), ranges


def _grain(atlas: torch.Tensor) -> torch.Tensor:
    """Share of each tile's variation that is finer than a sixteenth of its side (tiles,), in steps of 1 / 64."""
    tiles = atlas[0].view(-1, ROW_HEIGHT, ATLAS_WIDTH)[:, 1 : TEXTURE_SIZE + 1, 1 : TEXTURE_SIZE + 1].double()
    coarse = F.avg_pool2d(tiles[:, None], TEXTURE_SIZE // 16)[:, 0]
    share = 1 - coarse.var(dim=(1, 2)) / tiles.var(dim=(1, 2))
    return (share.clamp(0, 1) * 64).round() / 64


def _build_warps(seed: int, count: int = 8) -> torch.Tensor:
    """Periodic displacement fields that roughen outlines and dapple light, with a gutter -> (2, count * 258, 258)."""
    generator = torch.Generator().manual_seed(seed)
    slopes = torch.linspace(1.35, 2.1, count).tolist()
    fields = [fractal_field(2, TEXTURE_SIZE, slope, generator) for slope in slopes]
    return torch.cat([F.pad(field[None], (1, 1, 1, 1), mode="circular")[0] for field in fields], dim=1)


@dataclass
class SceneBank:
    """Outlines, textures, displacement fields and sensor noise that `render_scenes` draws from, on one device."""

    outlines: torch.Tensor  # (tiles, 1, OUTLINE_SIZE, OUTLINE_SIZE) signed distances, positive inside
    outline_ranges: dict[str, tuple[int, int]]
    textures: torch.Tensor  # (1, 2, tiles * ROW_HEIGHT, ATLAS_WIDTH)
    texture_ranges: dict[str, tuple[int, int]]
    texture_grain: torch.Tensor  # (tiles,) float64 on the CPU, from 0 (slow changes only) to 1 (fine grain only)
    warps: torch.Tensor  # (1, 2, count * 258, 258)
    noise: torch.Tensor  # (3, NOISE_SIZE * NOISE_SIZE) normal numbers

    NOISE_SIZE: ClassVar[int] = 512

    @classmethod
    def build(cls, seed: int = 0, device: str | torch.device = "cpu") -> SceneBank:
        """Makes the bank on the CPU (some seconds), so that it is the same for every device, and moves it there."""
        threads = torch.get_num_threads()
        # One thread: every bank is the same bit for bit (several may round differently, see pytorch#188792), and the
        # thousands of small steps are not slowed down by waiting for each other.
        torch.set_num_threads(1)
        try:
            outlines, outline_ranges = build_outlines(seed)
            textures, texture_ranges = _build_textures(seed + 1)
            warps = _build_warps(seed + 2)
            noise = torch.randn(3, cls.NOISE_SIZE**2, generator=torch.Generator().manual_seed(seed + 3))
        finally:
            torch.set_num_threads(threads)
        return cls(
            outlines=outlines[:, None],
            outline_ranges=outline_ranges,
            textures=textures[None],
            texture_ranges=texture_ranges,
            texture_grain=_grain(textures),
            warps=warps[None],
            noise=noise,
        ).to(device)

    def to(self, device: str | torch.device) -> SceneBank:
        """The same on another device."""
        rendered = ("outlines", "textures", "warps", "noise")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in rendered})

    @property
    def device(self) -> torch.device:
        """Where scenes are rendered."""
        return self.outlines.device
