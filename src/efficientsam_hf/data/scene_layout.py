# SPDX-License-Identifier: Apache-2.0
"""What is where in a generated scene, and how it looks: tables of numbers computed from one uniform vector per scene.

Every scene has the same slots, drawn from back to front; a slot that a scene does not use is inactive. Positions are
in canvas units: (0, 0) is the upper left corner of the picture and (1, 1) the lower right one. All of it is computed
in float64 on the CPU, so that a scene does not depend on the batch it is in, nor on the device that renders it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .scene_bank import LEVEL_X, LEVEL_Y, ROW_HEIGHT, TEXTURE_LEVELS, TEXTURE_SIZE, SceneBank


SHAPE_DRAWS, LOOK_DRAWS, PLACE_DRAWS, SCENE_DRAWS = 8, 40, 10, 64
REGIONS = 5  # slot 0 covers everything; slots 1 to 4 are the regions in front of it


@dataclass(frozen=True)
class Slot:
    """One layer: its role, the window it is drawn in (1 / window of the side), and the slots of its thing."""

    role: str  # region, front, strand, body, limb, inner
    window: int
    size: str = ""  # large, medium, small for body, limb and inner
    body: int = -1


def _slots() -> list[Slot]:
    slots = [Slot("region", 1) for _ in range(REGIONS)]
    parts = {
        "large": (1, [("limb", 2)] * 2 + [("inner", 1)] + [("inner", 2)] * 3),
        "medium": (2, [("limb", 4), ("inner", 2), ("inner", 4), ("inner", 4)]),
        "small": (4, [("inner", 4)]),
    }
    order = "medium large strand small small medium small large medium small medium small strand small medium front"
    for name in order.split():
        if name in ("strand", "front"):
            slots.append(Slot(name, 1))
            continue
        window, others = parts[name]
        body = len(slots)
        slots.append(Slot("body", window, name, body))
        slots += [Slot(role, part_window, name, body) for role, part_window in others]
    return slots


SLOTS = _slots()
BODIES = {
    size: [k for k, s in enumerate(SLOTS) if s.role == "body" and s.size == size]
    for size in ("large", "medium", "small")
}
GROUP_LENGTH = {"large": 7, "medium": 5, "small": 2}

OUTLINES_BY_ROLE = {
    "body": {
        "animal": 0.27,
        "person": 0.1,
        "smooth": 0.13,
        "rough": 0.12,
        "plant": 0.08,
        "building": 0.09,
        "box": 0.05,
        "polygon": 0.05,
        "disc": 0.03,
        "star": 0.02,
        "ring": 0.02,
        "glyph": 0.04,
    },
    "limb": {"smooth": 0.55, "disc": 0.2, "animal": 0.05, "box": 0.1, "rough": 0.1},
    "inner": {"smooth": 0.35, "rough": 0.25, "box": 0.1, "disc": 0.1, "polygon": 0.08, "star": 0.04, "glyph": 0.08},
    "across": {"horizon": 0.5, "patch": 0.4, "strand": 0.1},
    "blob": {"rough": 0.45, "smooth": 0.25, "plant": 0.15, "polygon": 0.05, "building": 0.1},
}
TEXTURES_BY_ROLE = {
    "region": {
        "clouds": 0.3,
        "streaks": 0.2,
        "leaves": 0.16,
        "foliage": 0.1,
        "ridges": 0.1,
        "plain": 0.06,
        "cells": 0.04,
        "grid": 0.02,
        "stripes": 0.02,
    },
    "body": {
        "clouds": 0.28,
        "streaks": 0.14,
        "leaves": 0.08,
        "foliage": 0.15,
        "ridges": 0.1,
        "plain": 0.08,
        "cells": 0.07,
        "grid": 0.03,
        "stripes": 0.07,
    },
    "building": {"grid": 0.6, "plain": 0.1, "clouds": 0.15, "stripes": 0.15},
}
PATCHES = {"foliage": 0.7, "clouds": 0.1, "stripes": 0.1, "cells": 0.1}
SECOND_TEXTURES = {"clouds": 0.4, "foliage": 0.15, "leaves": 0.15, "streaks": 0.15, "ridges": 0.15}


def _pick(u: torch.Tensor, weights: dict[str, float], ranges: dict[str, tuple[int, int]]) -> torch.Tensor:
    """Index of a tile: first the family by its weight, then uniformly in it, both from one uniform number."""
    edges = torch.tensor([0.0, *weights.values()], dtype=torch.float64).cumsum(0)
    edges = edges / edges[-1]
    family = torch.searchsorted(edges[1:-1].contiguous(), u.contiguous(), right=True)
    inside = (u - edges[family]) / (edges[family + 1] - edges[family])
    first = torch.tensor([ranges[name][0] for name in weights])[family]
    count = torch.tensor([ranges[name][1] - ranges[name][0] for name in weights])[family]
    return first + torch.minimum((inside * count).long(), count - 1)


def _in_family(tile: torch.Tensor, names: tuple[str, ...], ranges: dict[str, tuple[int, int]]) -> torch.Tensor:
    return torch.stack([(tile >= ranges[name][0]) & (tile < ranges[name][1]) for name in names]).any(0)


def _between(u: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low + (high - low) * u


def _log_between(u: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return low * torch.exp(u * math.log(high / low))


def _normal(u: torch.Tensor) -> torch.Tensor:
    """Uniform to standard normal numbers, cut at 3."""
    return (math.sqrt(2) * torch.erfinv(2 * u.clamp(1e-6, 1 - 1e-6) - 1)).clamp(-3, 3)


@dataclass
class SceneTables:
    """All numbers of a batch of scenes; S slots, positions in canvas units."""

    active: torch.Tensor  # (B, S) bool
    outline: torch.Tensor  # (B, S) tile of the outline
    centre: torch.Tensor  # (B, S, 2)
    inverse: torch.Tensor  # (B, S, 2, 2) canvas offset from the centre -> tile coordinates in [-1, 1]
    bias: torch.Tensor  # (B, S) added to the outline's distance
    reach: torch.Tensor  # (B, S) canvas length of one unit of distance
    rough: torch.Tensor  # (B, S) amplitude of the displacement of the outline
    shadow: torch.Tensor  # (B, S) strength of the shadow of a body
    own: torch.Tensor  # (B, S) bool: a part that is an object of its own
    repeats: torch.Tensor  # (B, 2) bool: medium, small things are copies of each other
    look: dict[str, torch.Tensor]  # per slot: texture placement and colours
    scene: dict[str, torch.Tensor]  # per scene: light, camera

    def __getitem__(self, scenes: slice) -> SceneTables:
        """Some of the scenes."""
        values = {}
        for name, value in vars(self).items():
            if isinstance(value, dict):
                values[name] = {key: entry[scenes] for key, entry in value.items()}
            else:
                values[name] = value[scenes]
        return SceneTables(**values)

    def outline_table(self) -> torch.Tensor:
        """What drawing a slot needs, float32 (B, S, 11): u = n0 x + n1 y + n2 and v = n3 x + n4 y + n5 on the tile,
        the displacement of the outline in tile units, the reach, the shadow's strength and where it falls from (2)."""
        start = -(self.inverse @ self.centre[..., None])[..., 0]
        fall = (self.inverse @ (-0.06 * self.scene["light"] - 0.01)[:, None, :, None])[..., 0]
        rows = [self.inverse[..., 0, 0], self.inverse[..., 0, 1], start[..., 0]]
        rows += [self.inverse[..., 1, 0], self.inverse[..., 1, 1], start[..., 1]]
        rows += [self.rough / self.reach, self.reach, self.shadow, fall[..., 0], fall[..., 1]]
        return torch.stack(rows, -1).float()

    def corners(self, image_size: int) -> torch.Tensor:
        """Upper left pixel (column, row) of the window that each slot is drawn in, (B, S, 2) int64."""
        side = torch.tensor([image_size // slot.window for slot in SLOTS])[:, None]
        corner = (self.centre * image_size - side / 2).floor().long()
        return torch.minimum(corner.clamp_min(0), image_size - side)

    def shading_table(self, image_size: int) -> torch.Tensor:
        """What the shading of a pixel needs to know of its slot, float32 (columns, B, S)."""
        look = self.look
        matrix = look["matrix"]
        density = (matrix**2).sum((-2, -1)).sqrt() / math.sqrt(2) * TEXTURE_SIZE / image_size
        level, level2 = (
            (torch.log2(texels.clamp_min(1e-3)) + look["blur"]).round().clamp(0, TEXTURE_LEVELS - 1).long()
            for texels in (density, density * look["ratio"])
        )
        columns = [matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 0], matrix[..., 1, 1]]
        columns += [look["offset"][..., 0], look["offset"][..., 1]]
        columns += [torch.tensor(LEVEL_X)[level], torch.tensor(LEVEL_Y)[level] + look["texture"] * ROW_HEIGHT]
        columns += [TEXTURE_SIZE >> level, look["ratio"]]
        columns += [torch.tensor(LEVEL_X)[level2], torch.tensor(LEVEL_Y)[level2] + look["second"] * ROW_HEIGHT]
        columns += [TEXTURE_SIZE >> level2]
        columns += [
            *look["base"].unbind(-1),
            look["contrast"],
            *look["hue"].unbind(-1),
            *look["second_colour"].unbind(-1),
        ]
        columns += [look["slope"][..., 0], look["slope"][..., 1]]
        columns += [1 - (look["slope"] * self.centre).sum(-1), look["rim"]]
        return torch.stack([column.double() for column in columns]).float()


class _Draws:
    """Hands out the columns of a block of uniform numbers one after the other."""

    def __init__(self, block: torch.Tensor):
        self.block, self.column = block, 0

    def take(self, count: int = 0) -> torch.Tensor:
        """The next column (..., ) or, with a count, the next columns (..., count)."""
        first = self.column
        self.column += max(count, 1)
        if self.column > self.block.shape[-1]:
            raise RuntimeError(f"a scene drew {self.column} numbers where {self.block.shape[-1]} are provided")
        return self.block[..., first : self.column] if count else self.block[..., first]


DRAWS = SCENE_DRAWS + len(SLOTS) * (PLACE_DRAWS + SHAPE_DRAWS + LOOK_DRAWS)


def lay_out(bank: SceneBank, uniform: torch.Tensor) -> SceneTables:
    """Scenes from their uniform numbers, (B, DRAWS) float64 in [0, 1) -> SceneTables."""
    scene_block = _Draws(uniform[:, :SCENE_DRAWS])
    slot_block = uniform[:, SCENE_DRAWS:].reshape(uniform.shape[0], len(SLOTS), -1).clone()
    scene = _scene_numbers(scene_block)
    repeats = _copy_repeats(slot_block, scene)
    same = _copy_limbs(slot_block)
    place, shape, look = slot_block.split([PLACE_DRAWS, SHAPE_DRAWS, LOOK_DRAWS], dim=-1)
    geometry = _place_slots(bank, place, shape, scene, repeats)
    looks = _look_slots(bank, look, geometry, scene)
    return SceneTables(own=~same, repeats=repeats, look=looks, scene=scene, **geometry)


def _scene_numbers(draws: _Draws) -> dict[str, torch.Tensor]:
    """Mode, light and camera of each scene, (B,) or (B, n) each."""
    take = draws.take
    mode = take()
    angle = 2 * math.pi * take()
    return {
        "landscape": mode < 0.6,
        "closeup": (mode >= 0.6) & (mode < 0.8),
        "crowd": take(),
        "horizons": take(4).sort(dim=-1).values * 0.75 + 0.12,
        "repeat": take(2),
        "spread": take(4),
        "hues": take(6),
        "saturation": take(),
        "lightness": 0.46 + 0.1 * _normal(take()),
        "variety": _between(take(), 0.6, 1.3),
        "light": torch.stack([torch.cos(angle), torch.sin(angle)], -1),
        "slope": _between(take(), 0.0, 0.5) ** 1.5,
        "dapple": (take() - 0.6).clamp_min(0) * 0.9,
        "haze": (take() - 0.5).clamp_min(0) * 1.4,
        "haze_colour": take(3),
        "shadow": take(),
        "defocus": (take() - 0.6).clamp_min(0) * 7,
        "soft": take(),
        "noise": 0.035 * take() ** 2 + 0.004,
        "colour_noise": take(),
        "grey": take() < 0.06,
        "tint": _between(take(3), 0.9, 1.1),
        "exposure": torch.exp(0.13 * _normal(take())),
        "vignette": (take() - 0.5).clamp_min(0) * 0.7,
        "warp": take(6),
        "noise_offset": take(2),
    }


def _copy_repeats(block: torch.Tensor, scene: dict[str, torch.Tensor]) -> torch.Tensor:
    """Lets all medium or all small things of some scenes have one shape and look; (B, 2) bool: which."""
    repeats = scene["repeat"] < torch.tensor([0.3, 0.4], dtype=torch.float64)
    for column, size in enumerate(("medium", "small")):
        first, *others = BODIES[size]
        length = GROUP_LENGTH[size]
        source = block[:, first : first + length, PLACE_DRAWS:]
        for body in others:
            target = block[:, body : body + length, PLACE_DRAWS:]
            target.copy_(torch.where(repeats[:, column, None, None], source, target))
    return repeats


def _copy_limbs(block: torch.Tensor) -> torch.Tensor:
    """Gives most limbs the look of their body; (B, S) bool: which."""
    same = torch.zeros(block.shape[:2], dtype=torch.bool)
    for index, slot in enumerate(SLOTS):
        if slot.role == "limb":
            same[:, index] = block[:, index, PLACE_DRAWS] < 0.5
            target = block[:, index, -LOOK_DRAWS:]
            target.copy_(torch.where(same[:, index, None], block[:, slot.body, -LOOK_DRAWS:], target))
    return same


def _matrix(angle, sx, sy) -> torch.Tensor:
    """Canvas offset -> tile coordinates: rotate by -angle, then divide by the half sizes; (..., 2, 2)."""
    c, s = torch.cos(angle), torch.sin(angle)
    return torch.stack([torch.stack([c / sx, s / sx], -1), torch.stack([-s / sy, c / sy], -1)], -2)


def _place_slots(bank, place, shape, scene, repeats) -> dict[str, torch.Tensor]:
    """Outline, position and activity of all slots."""
    batch, count = place.shape[:2]
    table = {
        "active": torch.zeros(batch, count, dtype=torch.bool),
        "composite": torch.zeros(batch, count, dtype=torch.bool),
        "outline": torch.zeros(batch, count, dtype=torch.long),
        "centre": torch.full((batch, count, 2), 0.5, dtype=torch.float64),
        "inverse": torch.eye(2, dtype=torch.float64).repeat(batch, count, 1, 1),
        "bias": torch.zeros(batch, count, dtype=torch.float64),
        "reach": torch.ones(batch, count, dtype=torch.float64),
        "rough": torch.zeros(batch, count, dtype=torch.float64),
        "shadow": torch.zeros(batch, count, dtype=torch.float64),
    }
    for index, slot in enumerate(SLOTS):
        columns = (_Draws(place[:, index]), _Draws(shape[:, index]))
        if slot.role == "region":
            values = _region(bank, index, *columns, scene)
        elif slot.role == "front":
            values = _front(bank, *columns)
        elif slot.role == "strand":
            values = _strand(bank, *columns)
        elif slot.role == "body":
            values = _body(bank, index, slot, *columns, scene, repeats)
        else:
            values = _part(bank, index, slot, *columns, table)
        for name, value in values.items():
            table[name][:, index] = value
    del table["composite"]  # only parts ask for it
    return table


def _region(bank, index, place, shape, scene) -> dict[str, torch.Tensor]:
    """A large piece of background: below a horizon, beyond a slanted border, a level set of noise, or a big blob."""
    if index == 0:
        return {"active": torch.ones_like(scene["landscape"])}
    ranges = bank.outline_ranges
    kind = torch.where(scene["landscape"], place.take() * 1.15 - 0.35, place.take())
    kind = kind.clamp(0, 0.999)
    horizon, slanted, patch, blob = (
        kind < 0.25,
        (kind >= 0.25) & (kind < 0.5),
        (kind >= 0.5) & (kind < 0.7),
        kind >= 0.7,
    )
    tile = torch.where(
        horizon | slanted,
        _pick(shape.take(), {"horizon": 1.0}, ranges),
        torch.where(
            patch, _pick(shape.take(), {"patch": 1.0}, ranges), _pick(shape.take(), OUTLINES_BY_ROLE["blob"], ranges)
        ),
    )
    wander = place.take(2)
    angle = torch.where(horizon, 0.07 * _normal(place.take()), 2 * math.pi * place.take())
    angle = torch.where(blob, 0.4 * torch.sin(angle), angle)
    scale = torch.where(patch, _between(shape.take(), 0.8, 1.7), _between(shape.take(), 0.6, 0.9))
    scale = torch.where(blob, _log_between(shape.take(), 0.2, 0.75), scale)
    room = torch.where(patch, scale - 0.72, torch.where(blob, 0.6, 0.35))
    centre = 0.5 + (2 * wander - 1) * room[:, None]
    centre[:, 1] = torch.where(horizon, scene["horizons"][:, index - 1], centre[:, 1])
    probability = torch.where(scene["landscape"], 0.62, torch.where(scene["closeup"], 0.2, 0.6))
    return {
        "active": place.take() < probability,
        "outline": tile,
        "centre": centre,
        "inverse": _matrix(angle, scale, scale),
        "reach": scale,
        "rough": 0.03 * scene["warp"][:, 0] ** 3 * torch.where(horizon | slanted, 0.5, 1.0),
    }


def _front(bank, place, shape) -> dict[str, torch.Tensor]:
    """Something at the border in front of everything: ground, a bush, an unsharp blob."""
    low = place.take() < 0.5
    tile = torch.where(
        low,
        _pick(shape.take(), {"horizon": 1.0}, bank.outline_ranges),
        _pick(shape.take(), OUTLINES_BY_ROLE["blob"], bank.outline_ranges),
    )
    scale = torch.where(low, 0.7, _between(shape.take(), 0.25, 0.6))
    side = 2 * math.pi * place.take()
    x = torch.where(low, 0.5, 0.5 + 0.6 * torch.cos(side))
    y = torch.where(low, _between(place.take(), 0.72, 0.97), 0.5 + 0.6 * torch.sin(side))
    return {
        "active": place.take() < 0.25,
        "outline": tile,
        "centre": torch.stack([x, y], -1),
        "inverse": _matrix(torch.where(low, 0.06 * _normal(place.take()), side), scale, scale),
        "reach": scale,
        "rough": 0.012 * shape.take(),
    }


def _strand(bank, place, shape) -> dict[str, torch.Tensor]:
    """Something thin or long across the picture: a twig, a rope, a pole, a trunk."""
    twig = shape.take() < 0.5
    tile = torch.where(twig, _pick(shape.take(), {"strand": 1.0}, bank.outline_ranges), bank.outline_ranges["box"][0])
    length = _between(shape.take(), 0.35, 1.1)
    width = torch.where(twig, length, _log_between(shape.take(), 0.012, 0.16))
    upright = math.pi / 2 + 0.08 * _normal(place.take())
    angle = torch.where(twig | (place.take() < 0.3), 2 * math.pi * place.take(), upright)
    return {
        "active": place.take() < 0.22,
        "outline": tile,
        "centre": _between(place.take(2), 0.0, 1.0),
        "inverse": _matrix(angle, length, width),
        "reach": width,
        "rough": 0.01 * shape.take() ** 2,
    }


def _body(bank, index, slot, place, shape, scene, repeats) -> dict[str, torch.Tensor]:
    """The main outline of a thing, and whether it is composite: has most of the patches inside that it can have."""
    ranges = bank.outline_ranges
    low, high = {"large": (0.2, 0.62), "medium": (0.08, 0.23), "small": (0.02, 0.11)}[slot.size]
    composite = shape.take() < 0.4
    tile = _pick(shape.take(), OUTLINES_BY_ROLE["body"], ranges)
    upright = _in_family(tile, ("person", "plant", "building"), ranges)
    rigid = upright | _in_family(tile, ("animal", "glyph"), ranges)
    scale = _log_between(place.take(), low, high)
    squeeze = torch.where(rigid, 0.7 + 0.3 * shape.take(), (0.35 + 0.9 * shape.take()).clamp_max(1.0))
    flip = torch.where(shape.take() < 0.5, -1.0, 1.0)
    turn = place.take()
    angle = torch.where(upright, 0.05 * _normal(turn), torch.where(rigid, 0.2 * _normal(turn), 2 * math.pi * turn))
    centre = _between(place.take(2), 0.02, 0.98)
    centre[:, 1] = 0.5 + (centre[:, 1] - 0.5) * 0.9 + 0.04
    if slot.size != "large":
        centre = _in_row(centre, index, slot, scene, repeats)
    likely = {
        "large": 0.25 + 0.5 * (1 - scene["crowd"]),
        "medium": 0.15 + 0.55 * scene["crowd"],
        "small": 0.1 + 0.5 * scene["crowd"] ** 2,
    }[slot.size]
    repeated = repeats[:, 0 if slot.size == "medium" else 1] & (slot.size != "large")
    man_made = _in_family(tile, ("building", "glyph", "box", "polygon", "disc", "star", "ring"), ranges)
    return {
        "active": place.take() < torch.where(repeated, 0.75, likely),
        "composite": composite,
        "outline": tile,
        "centre": centre,
        "inverse": _matrix(angle, scale * flip, scale * squeeze),
        "reach": scale * squeeze,
        "rough": torch.where(man_made, 0.0, scale * 0.07 * shape.take() ** 2),
        "shadow": torch.where(scene["shadow"] < 0.5, 0.0, 0.55 * (scene["shadow"] - 0.2)),
    }


def _in_row(centre, index, slot, scene, repeats) -> torch.Tensor:
    """Moves copies of each other into a row of equal steps in half of the scenes that have copies."""
    column = 0 if slot.size == "medium" else 1
    rank = BODIES[slot.size].index(index) - (len(BODIES[slot.size]) - 1) / 2
    spread = scene["spread"]
    step = {"medium": 0.22, "small": 0.13}[slot.size] * (0.6 + 0.6 * spread[:, 2 * column])
    middle = 0.3 + 0.5 * spread[:, 2 * column + 1]
    row = torch.stack([0.5 + rank * step, middle + 0.06 * (centre[:, 1] - 0.5) + 0.1 * rank * (middle - 0.5)], -1)
    in_row = repeats[:, column] & (scene["repeat"][:, column] < 0.18)
    return torch.where(in_row[:, None], row, centre)


def _part(bank, index, slot, place, shape, table) -> dict[str, torch.Tensor]:
    """A limb at the border of its body (not clipped), or a patch inside it (clipped to it when drawn)."""
    ranges = bank.outline_ranges
    shape.take()
    across = slot.role == "inner" and slot.window < {"large": 2, "medium": 4, "small": 4}[slot.size]
    weights = OUTLINES_BY_ROLE["across" if across else slot.role]
    tile = _pick(shape.take(), weights, ranges)
    angle = 2 * math.pi * place.take()
    distance = {"limb": _between(place.take(), 0.55, 0.8), "inner": 0.55 * place.take().sqrt()}[slot.role]
    if across:
        distance = 0.4 * distance
    at = torch.stack([distance * torch.cos(angle), distance * torch.sin(angle)], -1)
    (a, b), (c, d) = (row.unbind(-1) for row in table["inverse"][:, slot.body].unbind(-2))
    along = torch.stack([d * at[:, 0] - b * at[:, 1], a * at[:, 1] - c * at[:, 0]], -1) / (a * d - b * c)[:, None]
    relative = _log_between(shape.take(), *{"limb": (0.2, 0.5), "inner": (0.12, 0.6)}[slot.role])
    if across:
        relative = _between(shape.take(), 0.9, 1.05)
    squeeze = (
        torch.where(place.take() < 0.5, 1.0, 0.35 + 0.65 * shape.take()) if not across else torch.ones_like(relative)
    )
    turn = torch.where(place.take() < 0.5, 0.15 * _normal(place.take()), 2 * math.pi * place.take())
    inverse = _matrix(turn, relative, relative * squeeze) @ table["inverse"][:, slot.body]
    probability = {"limb": 0.4, "inner": 0.25 if across else 0.33}[slot.role]
    if slot.role == "inner":
        probability = torch.where(table["composite"][:, slot.body], 0.85, probability)
    return {
        "active": (place.take() < probability) & table["active"][:, slot.body],
        "outline": tile,
        "centre": table["centre"][:, slot.body] + along,
        "inverse": inverse,
        "reach": table["reach"][:, slot.body] * relative * squeeze,
        "rough": table["rough"][:, slot.body],
    }


def _hsv_to_rgb(hue: torch.Tensor, saturation: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(...) each, hue in turns -> (..., 3)."""
    phase = torch.stack([hue, hue + 2 / 3, hue + 1 / 3], -1) * 6 % 6
    pure = ((phase - 3).abs() - 1).clamp(0, 1)
    return value[..., None] * (1 - saturation[..., None] * (1 - pure))


def _natural_hue(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Hues as they are in nature: mostly browns, greens and blues, sometimes any."""
    spread = 0.03 * _normal(v)
    hue = torch.where(u < 0.42, 0.095 + 0.8 * spread, torch.where(u < 0.62, 0.24 + 1.8 * spread, 0.58 + spread))
    return torch.where(u > 0.92, v, hue)


def _base_colours(take, scene) -> tuple[torch.Tensor, torch.Tensor]:
    """Correlated colours of one scene's slots -> base (B, S, 3) and a second colour to vary towards (B, S, 3)."""
    anchors = _natural_hue(scene["hues"][:, :3], scene["hues"][:, 3:])
    colours = []
    for _ in range(2):
        which = (take() * 3.6).long()
        anchor = torch.gather(anchors, 1, which.clamp_max(2))
        hue = torch.where(which < 3, anchor + 0.025 * _normal(take()), _natural_hue(take(), take()))
        saturation = (0.07 + (0.3 + 0.65 * scene["saturation"][:, None]) * take() ** 1.4).clamp(0, 0.95)
        value = scene["lightness"][:, None] + 0.23 * scene["variety"][:, None] * _normal(take())
        colours.append(_hsv_to_rgb(hue, saturation, value.clamp(0.04, 0.97)))
    return colours[0], colours[1]


def _look_slots(bank, draws, geometry, scene) -> dict[str, torch.Tensor]:
    """Texture, colours and shading of all slots."""
    take = _Draws(draws).take
    region = torch.tensor([slot.role in ("region", "front") for slot in SLOTS])
    base, other = _base_colours(take, scene)
    body = torch.tensor([slot.body if slot.role in ("limb", "inner") else k for k, slot in enumerate(SLOTS)])
    inner = torch.tensor([slot.role == "inner" for slot in SLOTS])
    # Parts often are a lighter or darker tone of their body; things often have the colour of what is behind them.
    tone = torch.where(take() < 0.5, _between(take(), 0.35, 0.75), _between(take(), 1.3, 2.0))[..., None]
    related = take()[..., None]
    base = torch.where(inner[:, None] & (related < 0.5), (base[:, body] * tone).clamp(0, 1), base)
    hidden = (related < 0.28) & ~inner[:, None] & ~region[:, None]
    base = torch.where(hidden, 0.85 * base[:, :1] + 0.15 * base, base)
    depth = torch.tensor([max(0.0, 1 - k / REGIONS) if k < REGIONS else 0.0 for k in range(len(SLOTS))])
    haze = (scene["haze"][:, None] * depth)[..., None]
    fog = (0.45 + 0.45 * scene["haze_colour"][:, :1] + 0.1 * scene["haze_colour"])[:, None]
    base = base + (fog - base) * haze
    fade = 1 - haze[..., 0]
    texture, matrix = _texture_placement(bank, take, geometry, region)
    light = scene["light"][:, None] * torch.where(region, 0.25, 1.0)[:, None]
    strength = 1.4 * take() ** 2 / geometry["reach"].clamp_min(0.02) * torch.where(region, 0.4, 1.0)
    strength = strength[:, body]
    contrast = _log_between(take(), 0.07, 0.7) * fade
    # The second texture is fine grain in lightness, or a slow change towards another colour. Of patchy things it makes
    # two looks, as hides, snow on rock and worn paint are: a region is not what has one colour.
    patchy = (take() < 0.35) & ~inner
    fine = (take() < 0.5) & ~patchy
    towards = (other - base) * torch.where(patchy, _between(take(), 0.25, 0.5), 0.6 * take() ** 1.5)[..., None]
    base = torch.where(patchy[..., None], base + towards, base)
    second = torch.where(
        patchy,
        _pick(take(), PATCHES, bank.texture_ranges),
        _pick(take(), SECOND_TEXTURES, bank.texture_ranges),
    )
    return {
        "matrix": matrix,
        "offset": take(2),
        "texture": texture,
        "ratio": torch.where(fine, _between(take(), 1.7, 4.0), _between(take(), 0.2, 0.6)),
        "second": second,
        "blur": scene["defocus"][:, None] * torch.tensor([1.0 if k < REGIONS else 0.0 for k in range(len(SLOTS))]),
        "base": base,
        "contrast": contrast,
        "hue": 0.09 * (take(3) - 0.5) * fade[..., None],
        "second_colour": torch.where(fine[..., None], base * 0.3 * take()[..., None], towards) * fade[..., None],
        "slope": light * strength[..., None] * 0.5,
        "rim": torch.where(region, 0.0, 0.5 * take() ** 1.5) * (~inner),
    }


def _texture_placement(bank, take, geometry, region) -> tuple[torch.Tensor, torch.Tensor]:
    """Tile of each slot and the matrix from the canvas to periods of the tile, (B, S), (B, S, 2, 2)."""
    choice = take()
    building = _in_family(geometry["outline"], ("building",), bank.outline_ranges) & ~region
    texture = torch.where(
        region,
        _pick(choice, TEXTURES_BY_ROLE["region"], bank.texture_ranges),
        _pick(choice, TEXTURES_BY_ROLE["body"], bank.texture_ranges),
    )
    texture = torch.where(building, _pick(choice, TEXTURES_BY_ROLE["building"], bank.texture_ranges), texture)
    inverse = geometry["inverse"]
    along = torch.atan2(inverse[..., 0, 1], inverse[..., 0, 0])
    turn = take()
    angle = torch.where(turn < 0.45, along, torch.where(turn < 0.75, along + math.pi / 2, 2 * math.pi * turn * 4))
    angle = torch.where(region & (turn < 0.8), 0.3 * (turn - 0.4), angle)
    # Coarse tiles are not repeated often: the eye, and the model, would see the repetition.
    most = 1.0 + 5.0 * bank.texture_grain[texture]
    periods = (
        0.6
        * torch.exp(take() * torch.log(most / 0.6))
        * torch.where(region, 1.0, (0.35 / geometry["reach"]).clamp(0.8, 3.0) ** 0.6)
    )
    squash = torch.where(region, 1.0 + 1.5 * take() ** 2, 1.0)
    return texture, _matrix(angle, 1 / periods, 1 / (periods * squash))
