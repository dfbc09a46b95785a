# SPDX-License-Identifier: Apache-2.0
"""Generated scenes: seeded, endless, with exact masks, rendered in batches on any device.

A scene is a stack of textured layers (dead leaves): background regions, things made of a body, limbs and patches,
thin things, something in front. First the visible layer of every pixel is found from the layers' outlines, then each
pixel is shaded once. Scene i of a seed depends on (seed, i) alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .scene_bank import ROW_HEIGHT, TEXTURE_SIZE, SceneBank
from .scene_layout import BODIES, DRAWS, GROUP_LENGTH, SLOTS, SceneTables, lay_out


IMAGE_SIZES = (64, 1024)  # smallest and largest side in pixels
SMALLEST_AREA, LARGEST_AREA = 0.002, 0.9
SAME_MASK = 0.95
CACHED_PIXELS = 4 * 256**2


@dataclass
class SceneBatch:
    """Pictures with the layer that is visible at each pixel, and the objects as sets of layers."""

    images: torch.Tensor  # (B, 3, H, W) float32 RGB in [0, 1], in steps of 1 / 255
    segments: torch.Tensor  # (B, H, W) uint8
    membership: torch.Tensor  # (B, K, S) bool, all False in rows that a scene does not use
    areas: torch.Tensor  # (B, K) visible share of the picture, 0 in rows that a scene does not use

    def masks(self, objects: torch.Tensor) -> torch.Tensor:
        """Masks of chosen objects, (B, Q) int64 -> (B, Q, H, W) bool."""
        if objects.ndim != 2 or objects.shape[0] != self.segments.shape[0]:
            raise ValueError(f"objects must be (B, Q) with B = {self.segments.shape[0]}, got {tuple(objects.shape)}")
        batch, height, width = self.segments.shape
        chosen = torch.gather(self.membership, 1, objects[..., None].expand(-1, -1, self.membership.shape[-1]))
        flat = self.segments.reshape(batch, 1, -1).long().expand(-1, objects.shape[1], -1)
        return torch.gather(chosen, 2, flat).view(batch, -1, height, width)


def scene_seed(seed: int, index: int) -> int:
    """A 63-bit number from (seed, index) by two rounds of splitmix64, so that neighbours have nothing in common."""
    state = seed & 0xFFFFFFFFFFFFFFFF
    for step in (index, 0x5CE7E5):
        state = (state + (step & 0xFFFFFFFFFFFFFFFF) * 0xD1342543DE82EF95 + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state >> 1


def _uniforms(seed: int, indices: Sequence[int]) -> torch.Tensor:
    """One vector of uniform numbers per scene -> (B, DRAWS) float64."""
    generator = torch.Generator()
    rows = [
        torch.rand(DRAWS, generator=generator.manual_seed(scene_seed(seed, index)), dtype=torch.float64)
        for index in indices
    ]
    return torch.stack(rows)


def _check(indices: Sequence[int], image_size: int) -> list[int]:
    indices = [int(index) for index in indices]
    if not indices or min(indices) < 0:
        raise ValueError(f"indices must be at least one number >= 0, got {indices}")
    if image_size != int(image_size) or image_size % 2 or not IMAGE_SIZES[0] <= image_size <= IMAGE_SIZES[1]:
        raise ValueError(f"image_size must be an even number from 64 to 1024, got {image_size}")
    return indices


@torch.no_grad()
def render_scenes(bank: SceneBank, indices: Sequence[int], seed: int = 0, image_size: int = 256) -> SceneBatch:
    """Renders scenes `indices` of `seed` as squares of image_size pixels on the bank's device.

    Raises ValueError for an empty or negative index and for an image size that is odd or outside 64 to 1024.
    """
    indices = _check(indices, image_size)
    tables = lay_out(bank, _uniforms(seed, indices))
    # Small groups stay in a CPU's cache: twice as fast as the whole batch at once.
    group = len(indices) if bank.device.type != "cpu" else max(1, CACHED_PIXELS // image_size**2)
    groups = [_render(bank, tables[k : k + group], image_size) for k in range(0, len(indices), group)]
    images, segments = (torch.cat(parts) for parts in zip(*groups))
    membership, areas = _objects(tables, segments)
    return SceneBatch(images, segments, membership, areas)


def _render(bank: SceneBank, tables: SceneTables, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures (B, 3, size, size) and visible slots (B, size, size) of laid out scenes."""
    warp = _warp_field(bank, tables, size)
    canvas = _visible_layers(bank, tables, warp, size)
    images = _shade(bank, tables, canvas.segments, canvas.distance, size)
    return _photograph(bank, tables, images, canvas.shade, warp, size), canvas.segments


def _axis(size: int, device: torch.device) -> torch.Tensor:
    """Canvas coordinates of pixel centres (size,)."""
    return (torch.arange(size, device=device) + 0.5) / size


def _sample(pictures: torch.Tensor, grid: torch.Tensor) -> torch.Tensor:
    """Bilinear samples at (x, y) in [-1, 1] from edge to edge, (n or 1, C, H, W), (n, h, w, 2) -> (n, C, h, w)."""
    pictures = pictures.expand(len(grid), -1, -1, -1)
    return F.grid_sample(pictures, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _sample_texels(atlas: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Bilinear samples at atlas texels (x, y), centres at .5, (1, C, H, W), (B, h, w) -> (B, C, h, w)."""
    return _sample(atlas, torch.stack([x * (2 / atlas.shape[3]) - 1, y * (2 / atlas.shape[2]) - 1], -1))


def _warp_field(bank: SceneBank, tables: SceneTables, size: int) -> torch.Tensor:
    """The scene's displacement field, mean about 0 and standard deviation about 1 -> (B, 2, size, size)."""
    draws = tables.scene["warp"]
    count = bank.warps.shape[2] // ROW_HEIGHT
    tile = (draws[:, 1] * count).long()
    numbers = torch.stack([0.5 + draws[:, 2], draws[:, 3], draws[:, 4], tile * ROW_HEIGHT + 1.0]).float()
    scale, offset_x, offset_y, row = numbers.to(bank.device)[:, :, None, None]
    axis = _axis(size, bank.device)
    x, y = axis * scale + offset_x, axis[:, None] * scale + offset_y
    x, y = (x - x.floor()) * TEXTURE_SIZE + 1, (y - y.floor()) * TEXTURE_SIZE + row
    return _sample_texels(bank.warps, x.expand(-1, size, -1), y.expand(-1, -1, size))


class _Window:
    """The pixels of some scenes in which one slot is drawn: all of them, or a square around its centre."""

    def __init__(self, scenes: torch.Tensor, corner: torch.Tensor, side: int, size: int):
        self.scenes, self.whole = scenes, side == size
        self.shape = (len(scenes), side, side)
        steps = torch.arange(side, device=corner.device)
        columns, rows = corner[:, 0, None] + steps, corner[:, 1, None] + steps
        self.x = ((columns + 0.5) / size)[:, None]
        self.y = ((rows + 0.5) / size)[:, :, None]
        if not self.whole:
            start = (scenes[:, None] * size + rows) * size
            self.pixels = (start[:, :, None] + columns[:, None]).view(-1)

    def read(self, plane: torch.Tensor) -> torch.Tensor:
        """(B, H, W, ...) -> (n, side, side, ...)."""
        if not self.whole:
            return plane.flatten(0, 2).index_select(0, self.pixels).view(*self.shape, *plane.shape[3:])
        return plane if len(self.scenes) == len(plane) else plane.index_select(0, self.scenes)

    def write(self, plane: torch.Tensor, values: torch.Tensor) -> None:
        """Puts (n, side, side) back into (B, H, W)."""
        if self.whole:
            plane.index_copy_(0, self.scenes, values)
        else:
            plane.view(-1).index_copy_(0, self.pixels, values.view(-1))


@dataclass
class _Canvas:
    """What drawing has found so far for each pixel, each (B, H, W), and the displacement of outlines."""

    segments: torch.Tensor  # uint8, the visible slot
    distance: torch.Tensor  # canvas units to the outline of the visible thing
    shade: torch.Tensor  # share of the light that is not taken by shadows
    warp: torch.Tensor  # (B, H, W, 2)


def _visible_layers(bank: SceneBank, tables: SceneTables, warp: torch.Tensor, size: int) -> _Canvas:
    """Draws all slots from back to front."""
    batch, device = len(tables.active), bank.device
    canvas = _Canvas(
        segments=torch.zeros(batch, size, size, dtype=torch.uint8, device=device),
        distance=torch.ones(batch, size, size, device=device),
        shade=torch.ones(batch, size, size, device=device),
        warp=warp.permute(0, 2, 3, 1).contiguous(),
    )
    active = tables.active.T.tolist()
    numbers = tables.outline_table().to(device)
    corners = tables.corners(size).to(device)
    tiles = tables.outline.to(device)
    for index in range(1, len(SLOTS)):
        scenes = [k for k in range(batch) if active[index][k]]
        if not scenes:
            continue
        chosen = torch.tensor(scenes, device=device)
        window = _Window(chosen, corners[chosen, index], size // SLOTS[index].window, size)
        outline = bank.outlines.index_select(0, tiles[chosen, index])
        _draw(canvas, index, window, outline, numbers[chosen, index].T[:, :, None, None].unbind(0))
    return canvas


def _draw(canvas: _Canvas, index: int, window: _Window, outline: torch.Tensor, numbers: Sequence[torch.Tensor]):
    """Puts one slot on the canvas: where its outline covers, it is the visible one and in no shadow yet."""
    slot = SLOTS[index]
    rough, reach, shadow, fall_u, fall_v = numbers[6:]
    grid = torch.empty(*window.shape, 2, device=outline.device)
    torch.add(numbers[0] * window.x, numbers[1] * window.y + numbers[2], out=grid[..., 0])
    torch.add(numbers[3] * window.x, numbers[4] * window.y + numbers[5], out=grid[..., 1])
    if slot.window < 4:
        grid.addcmul_(rough[..., None], window.read(canvas.warp))
    inside = _sample(outline, grid)[:, 0]
    visible = window.read(canvas.segments)
    covered = inside > 0
    if slot.role == "inner":
        window.write(canvas.segments, visible.masked_fill(covered.logical_and_(visible >= slot.body), index))
        return
    window.write(canvas.segments, visible.masked_fill(covered, index))
    window.write(canvas.distance, torch.where(covered, inside * reach, window.read(canvas.distance)))
    darkness = window.read(canvas.shade)
    if slot.role == "body" and slot.size != "small":
        cast = _sample(outline, grid + torch.stack([fall_u, fall_v], -1))[:, 0]
        darkness = darkness * (1 - (cast * 6).add_(0.5).clamp_(0, 1) * shadow)
    window.write(canvas.shade, darkness.masked_fill(covered, 1.0))


def _shade(bank, tables, segments, distance, size) -> torch.Tensor:
    """Colour of every pixel from the texture and the shading of its visible slot -> (B, 3, H, W)."""
    batch, device = segments.shape[0], bank.device
    table = tables.shading_table(size).to(device)
    table = table.reshape(table.shape[0], -1)
    slots = len(SLOTS)
    index = (segments.int() + slots * torch.arange(batch, device=device, dtype=torch.int32)[:, None, None]).reshape(-1)
    values = (row.index_select(0, index).view(batch, size, size) for row in table)
    axis = _axis(size, device)
    x, y = axis, axis[:, None]
    u = next(values) * x + next(values) * y
    v = next(values) * x + next(values) * y
    u, v = u + next(values), v + next(values)
    left, top, texels = next(values), next(values), next(values)
    pattern = _sample_texels(bank.textures, (u - u.floor()) * texels + left, (v - v.floor()) * texels + top)
    ratio, left, top, texels = (next(values) for _ in range(4))
    u, v = u * ratio, v * ratio
    second = _sample_texels(bank.textures, (u - u.floor()) * texels + left, (v - v.floor()) * texels + top)[:, 0]
    base = [next(values) for _ in range(3)]
    bright = (1 + next(values) * pattern[:, 0]).clamp_min(0.12)
    hue = [next(values) for _ in range(3)]
    towards = [next(values) for _ in range(3)]
    light = next(values) * x + next(values) * y
    light = light + next(values)
    light = light.clamp(0.2, 1.8) * (1 - next(values) * (1 - 12 * distance).clamp(0, 1))
    planes = [(base[c] * bright + hue[c] * pattern[:, 1] + towards[c] * second).clamp_min(0) * light for c in range(3)]
    return torch.stack(planes, 1)


def _blur(images: torch.Tensor) -> torch.Tensor:
    """One pass of the binomial kernel (1, 2, 1) / 4 in both directions; borders repeat."""
    padded = F.pad(images, (1, 1, 0, 0), mode="replicate")
    images = (padded[..., :-2] + padded[..., 2:]) * 0.25 + images * 0.5
    padded = F.pad(images, (0, 0, 1, 1), mode="replicate")
    return (padded[..., :-2, :] + padded[..., 2:, :]) * 0.25 + images * 0.5


def _photograph(bank, tables, images, shade, warp, size) -> torch.Tensor:
    """Light, lens and sensor: shadows, illumination, softness, grey pictures, noise, steps of 1 / 255."""
    device = bank.device
    number = {
        name: tables.scene[name].float().to(device)
        for name in ("slope", "light", "dapple", "vignette", "exposure", "soft", "noise", "colour_noise", "tint")
    }
    one = {name: value[:, None, None] for name, value in number.items() if value.ndim == 1}
    axis = _axis(size, device) - 0.5
    across = number["light"][:, :1, None] * axis + number["light"][:, 1:, None] * axis[:, None]
    light = 1 + one["slope"] * across + one["dapple"] * warp[:, 0].clamp(-1.5, 1.5)
    light = light - one["vignette"] * 2 * (axis * axis + (axis * axis)[:, None])
    images = images * (light.clamp_min(0.2) * shade * one["exposure"])[:, None] * number["tint"][..., None, None]
    for _ in range(max(1, size // 256)):
        images = images + (0.1 + 0.8 * one["soft"][:, None]) * (_blur(images) - images)
    grey = tables.scene["grey"].to(device)[:, None, None, None]
    images = torch.where(grey, images.mean(1, keepdim=True), images)
    images = images + _sensor_noise(bank, tables, size) * one["noise"][:, None]
    return (images.clamp(0, 1) * 255).round() / 255


def _sensor_noise(bank: SceneBank, tables: SceneTables, size: int) -> torch.Tensor:
    """A piece of the bank's noise at a random place, grey to coloured -> (B, 3, size, size)."""
    side = bank.NOISE_SIZE
    start = (tables.scene["noise_offset"] * side).long().to(bank.device)
    steps = torch.arange(size, device=bank.device)
    columns, rows = (start[:, :1] + steps) % side, (start[:, 1:] + steps) % side
    pixels = (rows * side)[:, :, None] + columns[:, None]
    planes = torch.stack([plane[pixels] for plane in bank.noise], 1)
    grey = tables.scene["grey"] | (tables.scene["colour_noise"] < 0.5)
    return torch.where(grey.to(bank.device)[:, None, None, None], planes[:, :1], planes)


def _candidates() -> tuple[torch.Tensor, list[int]]:
    """All objects that a scene may have as sets of slots, (K, S) bool, and the slot that makes each one an object."""
    rows, keys = [], []

    def add(slots: list[int], key: int) -> None:
        row = torch.zeros(len(SLOTS), dtype=torch.bool)
        row[slots] = True
        rows.append(row)
        keys.append(key)

    for index, slot in enumerate(SLOTS):
        if slot.role != "body":
            add([index], index)
            continue
        members = range(index, index + GROUP_LENGTH[slot.size])
        add(list(members), index)
        add([k for k in members if SLOTS[k].role != "limb"], index)
    for size in ("medium", "small"):
        add([k for body in BODIES[size] for k in range(body, body + GROUP_LENGTH[size])], -1)
    return torch.stack(rows), keys


CANDIDATES, CANDIDATE_KEYS = _candidates()


def _objects(tables: SceneTables, segments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Objects of each scene and their visible areas, without those too small, too large or nearly equal to another."""
    batch, device = segments.shape[0], segments.device
    slots = len(SLOTS)
    flat = segments.reshape(batch, -1).long() + slots * torch.arange(batch, device=device)[:, None]
    share = torch.bincount(flat.reshape(-1), minlength=batch * slots).view(batch, slots) / flat.shape[1]
    valid = torch.cat([tables.own[:, CANDIDATE_KEYS[:-2]], tables.repeats], dim=1).to(device)
    # A body without its limbs is an object only where the limbs are objects too.
    torso = [k for k in range(1, len(CANDIDATE_KEYS) - 2) if CANDIDATE_KEYS[k] == CANDIDATE_KEYS[k - 1]]
    limbs = torch.tensor([[slot.role == "limb" and slot.body == CANDIDATE_KEYS[k] for slot in SLOTS] for k in torso])
    limbs_own = (limbs[None] & (tables.own & tables.active)[:, None]).any(-1)
    valid[:, torso] &= limbs_own.to(device)
    members = CANDIDATES.to(device).float()
    weighted = members * share[:, None]
    areas = weighted.sum(-1)
    overlap = weighted @ members.T
    union = areas[:, :, None] + areas[:, None] - overlap
    usable = valid & (areas >= SMALLEST_AREA) & (areas <= LARGEST_AREA)
    same = (overlap > SAME_MASK * union) & usable[:, None]
    usable &= ~(same.tril(-1)).any(-1)
    return CANDIDATES.to(device) & usable[..., None], areas * usable


def scene_dataset(
    seed: int = 0, image_size: int = 256, count: int | None = None, bank: SceneBank | None = None, batch_size: int = 8
):
    """Scenes 0, 1, 2, ... of a seed as a `datasets.IterableDataset`: "image" a PIL picture, "masks" (K, H, W) bool.

    Endless where `count` is None. Raises ImportError where `datasets` is not installed.
    """
    try:
        from datasets import IterableDataset
    except ImportError as error:
        raise ImportError(
            "scene_dataset needs the package `datasets`: pip install 'efficientsam-hf[train]'"
        ) from error
    _check([0], image_size)
    arguments = {"seed": seed, "image_size": image_size, "count": count, "batch_size": batch_size}
    return IterableDataset.from_generator(_scene_samples, gen_kwargs={"bank": bank, **arguments})


def _scene_samples(bank, seed, image_size, count, batch_size) -> Iterator[dict]:
    """The samples of `scene_dataset`, rendered batch by batch."""
    from PIL import Image

    bank = bank or SceneBank.build()
    first = 0
    while count is None or first < count:
        last = first + batch_size if count is None else min(first + batch_size, count)
        batch = render_scenes(bank, range(first, last), seed, image_size)
        for k in range(last - first):
            pixels = (batch.images[k].permute(1, 2, 0) * 255).round().byte().cpu().numpy()
            rows = batch.membership[k][batch.areas[k] > 0]
            masks = rows[:, batch.segments[k].long()].cpu().numpy()
            yield {"image": Image.fromarray(pixels), "masks": masks}
        first = last
