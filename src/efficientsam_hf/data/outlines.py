# SPDX-License-Identifier: Apache-2.0
"""Outlines of the generated scenes as tiles of signed distances, positive inside.

A tile covers [-1, 1] x [-1, 1] (x right, y down); distances are in the same unit, one half of the tile's side.
Outlines of things stay within a radius of about 0.9, so that a rotated tile can be cut off at its circle. Distances
are exact for polygons and approximate elsewhere: only the zero line and a smooth slope around it matter.
"""

from __future__ import annotations

import math

import torch
from PIL import Image, ImageDraw, ImageFont


OUTLINE_SIZE = 128
GLYPHS = "ABCDEGHKLMNPQRSTUVXYZabdeghkmnqrstwy23456789&@#%?$"


def tile_grid(size: int = OUTLINE_SIZE) -> tuple[torch.Tensor, torch.Tensor]:
    """x and y of the texel centres of a tile, each (size, size)."""
    axis = (torch.arange(size) + 0.5) * (2 / size) - 1
    return axis.expand(size, size), axis[:, None].expand(size, size)


def uniform(generator: torch.Generator, *shape: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """Uniform numbers in [low, high)."""
    return low + (high - low) * torch.rand(*shape, generator=generator)


def harmonic_blobs(count: int, roughness: float, generator: torch.Generator) -> torch.Tensor:
    """Star-shaped blobs whose radius is a random Fourier series with amplitudes 1 / k^roughness -> (count, T, T)."""
    x, y = tile_grid()
    theta, radius = torch.atan2(y, x), torch.hypot(x, y)
    orders = torch.arange(1, 33, dtype=torch.float32)
    amplitude = uniform(generator, count, 32, low=0.2) / orders**roughness
    phase = uniform(generator, count, 32, high=2 * math.pi)
    outline = torch.zeros(count, *x.shape)
    for k in range(32):
        outline += amplitude[:, k, None, None] * torch.cos((k + 1) * theta + phase[:, k, None, None])
    strength = uniform(generator, count, 1, 1, low=0.15, high=0.45)
    outline = 1 + strength * outline / outline.std(dim=(1, 2), keepdim=True)
    outline = outline.clamp_min(0.12)
    outline = 0.88 * outline / outline.amax(dim=(1, 2), keepdim=True)
    return outline - radius


def polygon_distance(corners: torch.Tensor, size: int = OUTLINE_SIZE) -> torch.Tensor:
    """Exact signed distance to simple polygons, corners (N, C, 2) -> (N, size, size)."""
    x, y = tile_grid(size)
    nearest = torch.full((corners.shape[0], size, size), 1e9)
    inside = torch.zeros(corners.shape[0], size, size, dtype=torch.bool)
    for k in range(corners.shape[1]):
        x0, y0 = corners[:, k - 1, 0, None, None], corners[:, k - 1, 1, None, None]
        x1, y1 = corners[:, k, 0, None, None], corners[:, k, 1, None, None]
        ex, ey = x1 - x0, y1 - y0
        along = (((x - x0) * ex + (y - y0) * ey) / (ex * ex + ey * ey).clamp_min(1e-9)).clamp(0, 1)
        nearest = torch.minimum(nearest, (x - x0 - along * ex) ** 2 + (y - y0 - along * ey) ** 2)
        crosses = (y0 > y) != (y1 > y)
        left = x < x0 + (y - y0) * ex / torch.where(ey == 0, 1e-9, ey)
        inside ^= crosses & left
    return torch.where(inside, 1.0, -1.0) * nearest.sqrt()


def random_polygons(count: int, generator: torch.Generator) -> torch.Tensor:
    """Polygons of 3 to 9 corners at random angles and radii; small radii make them concave -> (count, T, T)."""
    tiles = []
    for index in range(count):
        corners = 3 + index % 7
        gaps = uniform(generator, corners, low=0.4)
        angle = 2 * math.pi * gaps.cumsum(0) / gaps.sum()
        radius = uniform(generator, corners, low=0.35 + 0.4 * (index % 2), high=0.9)
        tiles.append(polygon_distance(torch.stack([radius * angle.cos(), radius * angle.sin()], -1)[None]))
    return torch.cat(tiles)


def stars(count: int, generator: torch.Generator) -> torch.Tensor:
    """Stars, flowers' and gears' raw form: 4 to 12 spikes of random depth -> (count, T, T)."""
    tiles = []
    for index in range(count):
        spikes = 4 + index % 9
        angle = torch.arange(2 * spikes) * (math.pi / spikes)
        inner = 0.88 * float(uniform(generator, 1, low=0.25, high=0.8))
        radius = torch.where(torch.arange(2 * spikes) % 2 == 0, 0.88, inner)
        radius = radius * uniform(generator, 2 * spikes, low=0.85)
        tiles.append(polygon_distance(torch.stack([radius * angle.cos(), radius * angle.sin()], -1)[None]))
    return torch.cat(tiles)


def boxes(count: int, generator: torch.Generator) -> torch.Tensor:
    """Rectangles of several aspects with sharp to round corners, up to the ellipse-like -> (count, T, T)."""
    x, y = tile_grid()
    tiles = []
    for index in range(count):
        angle = float(uniform(generator, 1, low=0.25, high=1.3))
        half_width, half_height = 0.88 * math.cos(angle), 0.88 * math.sin(angle)
        corner = min(half_width, half_height) * (0.0, 0.1, 0.4, 0.9)[index % 4]
        qx, qy = x.abs() - half_width + corner, y.abs() - half_height + corner
        outside = torch.hypot(qx.clamp_min(0), qy.clamp_min(0)) + torch.maximum(qx, qy).clamp_max(0)
        tiles.append(corner - outside)
    return torch.stack(tiles)


def ellipse(cx, cy, rx, ry, angle=0.0) -> torch.Tensor:
    """Approximate signed distance to one ellipse on the tile -> (T, T)."""
    x, y = tile_grid()
    c, s = math.cos(angle), math.sin(angle)
    u, v = (c * (x - cx) + s * (y - cy)) / rx, (c * (y - cy) - s * (x - cx)) / ry
    return (1 - torch.hypot(u, v)) * min(rx, ry)


def capsule(x0, y0, x1, y1, r0, r1) -> torch.Tensor:
    """A limb: a line from (x0, y0) to (x1, y1) whose radius goes from r0 to r1 -> (T, T)."""
    x, y = tile_grid()
    ex, ey = x1 - x0, y1 - y0
    along = (((x - x0) * ex + (y - y0) * ey) / max(ex * ex + ey * ey, 1e-9)).clamp(0, 1)
    return r0 + (r1 - r0) * along - torch.hypot(x - x0 - along * ex, y - y0 - along * ey)


def smooth_union(parts: list[torch.Tensor], softness: float) -> torch.Tensor:
    """Union of distances with rounded joints of about `softness`."""
    if softness <= 0:
        return torch.stack(parts).amax(0)
    return softness * torch.logsumexp(torch.stack(parts) / softness, 0)


def _fit(distance: torch.Tensor) -> torch.Tensor:
    """Shrinks a shape that reaches beyond radius 0.92 so that it ends there."""
    x, y = tile_grid()
    return torch.minimum(distance, 0.92 - torch.hypot(x, y))


def animals(count: int, generator: torch.Generator) -> torch.Tensor:
    """Silhouettes of a body with head, ears, legs and tail in many proportions -> (count, T, T)."""
    tiles = []
    for _ in range(count):
        r = uniform(generator, 40).tolist()
        body_x, body_y, tilt = 0.3 + 0.2 * r[0], 0.15 + 0.22 * r[1], 0.9 * (r[2] - 0.5)
        shift = -0.15 + 0.2 * r[3]
        parts = [ellipse(0, shift, body_x, body_y, tilt)]
        neck_x, neck_y = body_x * 0.8 * math.cos(tilt), shift + body_x * 0.8 * math.sin(tilt)
        lift = -0.05 - 0.5 * r[4] ** 1.5
        head_x, head_y = min(neck_x + 0.1 + 0.25 * r[5], 0.72), max(neck_y + lift, -0.72)
        head = 0.08 + 0.12 * r[6]
        parts.append(capsule(neck_x * 0.7, neck_y, head_x, head_y, body_y * 0.7, head * 0.8))
        parts.append(ellipse(head_x + 0.3 * head, head_y, head * (1 + 0.8 * r[7]), head, 0.8 * r[8] - 0.2))
        if r[9] < 0.6:
            ear = 0.04 + 0.1 * r[10]
            parts.append(capsule(head_x, head_y - head * 0.6, head_x - 0.3 * ear, head_y - head - ear, 0.045, 0.015))
        if r[11] < 0.75:
            for leg in range(4):
                at = (-0.8, -0.55, 0.5, 0.75)[leg] * body_x
                start = shift + at * math.tan(tilt) * 0.8 + body_y * 0.4
                length = (0.15 + 0.5 * r[12]) * (0.8 + 0.4 * r[13 + leg])
                width = 0.03 + 0.07 * r[17]
                foot = at + 0.35 * (r[18 + leg] - 0.5)
                parts.append(capsule(at, start, foot, min(start + body_y * 0.5 + length, 0.85), width * 1.6, width))
        if r[22] < 0.7:
            back_x, back_y = -body_x * 0.9 * math.cos(tilt), shift - body_x * 0.9 * math.sin(tilt)
            end_x, end_y = max(back_x - 0.15 - 0.3 * r[23], -0.82), back_y + 0.9 * (r[24] - 0.5)
            thick = 0.02 + 0.09 * r[25] ** 2
            parts.append(capsule(back_x * 0.8, back_y * 0.8, end_x, end_y, thick * 1.4, thick))
        if r[26] < 0.25:
            parts.append(ellipse(-0.1, shift - body_y * 0.8, 0.16 + 0.2 * r[27], 0.1 + 0.15 * r[28], r[29] * 2))
        tiles.append(_fit(smooth_union(parts, 0.01 + 0.03 * r[30])))
    return torch.stack(tiles)


def people(count: int, generator: torch.Generator) -> torch.Tensor:
    """Upright figures and busts: head, shoulders, arms, legs or a skirt -> (count, T, T)."""
    tiles = []
    for index in range(count):
        r = uniform(generator, 24).tolist()
        bust = index % 3 == 0
        scale = 2.0 if bust else 1.0
        top = -0.8 + 0.05 * r[0]
        head = (0.09 + 0.04 * r[1]) * scale
        neck = top + 2 * head
        shoulder = (0.14 + 0.09 * r[2]) * scale
        hip = neck + (0.5 + 0.15 * r[3]) * scale
        lean = 0.25 * (r[4] - 0.5)
        parts = [ellipse(lean, top + head, head * 0.8, head * 1.05, 0.3 * (r[5] - 0.5))]
        parts.append(capsule(lean, top + head, 0, neck + 0.1, head * 0.45, head * 0.5))
        parts.append(capsule(0, neck + shoulder * 0.6, 0, min(hip, 0.9), shoulder, shoulder * (0.6 + 0.5 * r[6])))
        for side in (-1, 1):
            bend = r[7 + side]
            elbow_x, elbow_y = side * shoulder * (1.2 + 1.2 * bend), neck + 0.35 * scale * (0.4 + 0.6 * r[10 + side])
            hand_x, hand_y = elbow_x * (0.3 + 1.1 * r[13 + side]), elbow_y + 0.3 * scale * (r[16 + side] - 0.3)
            width = (0.04 + 0.025 * r[18]) * scale
            parts.append(capsule(side * shoulder * 0.8, neck + 0.07 * scale, elbow_x, elbow_y, width * 1.2, width))
            parts.append(capsule(elbow_x, elbow_y, hand_x, hand_y, width, width * 0.8))
            if not bust:
                foot = side * (0.06 + 0.25 * r[20 + side])
                parts.append(capsule(side * shoulder * 0.45, hip - 0.05, foot, 0.86, 0.1 + 0.05 * r[22], 0.05))
        if r[23] < 0.3 and not bust:
            parts.append(capsule(0, hip, 0, hip + 0.25, 0.16, 0.24 + 0.1 * r[22]))
        tiles.append(_fit(smooth_union(parts, 0.012)))
    return torch.stack(tiles)


def plants(count: int, generator: torch.Generator) -> torch.Tensor:
    """Trees, bushes and flowers: a stem and clustered crowns -> (count, T, T)."""
    tiles = []
    for index in range(count):
        r = uniform(generator, 60).tolist()
        trunk = 0.02 + 0.07 * r[0]
        parts = [capsule(0.3 * (r[1] - 0.5), 0.88, 0, -0.1, trunk * 1.3, trunk * 0.7)] if index % 4 else []
        clumps = 4 + int(12 * r[2])
        spread, height = 0.3 + 0.3 * r[3], 0.2 + 0.3 * r[4]
        for k in range(clumps):
            angle, distance = 2 * math.pi * r[5 + k], math.sqrt(r[22 + k])
            size = 0.07 + 0.2 * r[39 + k] ** 2
            cx, cy = spread * distance * math.cos(angle), -0.25 + height * distance * math.sin(angle)
            parts.append(ellipse(cx, cy, size, size * (0.5 + 0.5 * r[56]), angle))
            if index % 3 == 0:
                parts.append(capsule(0, 0.1, cx, cy, trunk * 0.6, 0.015))
        tiles.append(_fit(smooth_union(parts, 0.008)))
    return torch.stack(tiles)


def buildings(count: int, generator: torch.Generator) -> torch.Tensor:
    """Blocks, towers with roofs, arches and vehicles, from rectangles, triangles and wheels -> (count, T, T)."""
    tiles = []
    for index in range(count):
        r = uniform(generator, 40).tolist()
        parts = []
        for k in range(1 + index % 4):
            half = 0.1 + 0.25 * r[4 * k]
            cx, top = 0.5 * (2 * r[4 * k + 1] - 1), -0.65 + 0.8 * r[4 * k + 2]
            block = [[cx - half, 0.7], [cx - half, top], [cx + half, top], [cx + half, 0.7]]
            if r[4 * k + 3] < 0.5:
                peak = max(top - half * (0.4 + 2 * r[20 + k]), -0.85)
                block = [[cx - half, 0.7], [cx - half, top], [cx, peak], [cx + half, top], [cx + half, 0.7]]
            parts.append(polygon_distance(torch.tensor([block]))[0])
        shape = torch.stack(parts).amax(0)
        if r[30] < 0.3:
            gate, width = ellipse(0.3 * (r[31] - 0.5), 0.35, 0.12, 0.15), 0.12
            gate = torch.maximum(gate, capsule(0.3 * (r[31] - 0.5), 0.4, 0.3 * (r[31] - 0.5), 0.9, width, width))
            shape = torch.minimum(shape, -gate)
        if r[32] < 0.3:
            wheels = [ellipse(-0.4, 0.68, 0.15, 0.15), ellipse(0.4, 0.68, 0.15, 0.15)]
            body = polygon_distance(
                torch.tensor(
                    [
                        [
                            [-0.7, 0.7],
                            [-0.75, 0.3],
                            [-0.4, 0.2],
                            [-0.2, -0.1],
                            [0.3, -0.1],
                            [0.45, 0.2],
                            [0.75, 0.35],
                            [0.72, 0.7],
                        ]
                    ]
                )
            )[0]
            shape = torch.stack([body, *wheels]).amax(0)
        tiles.append(_fit(shape))
    return torch.stack(tiles)


def rings(count: int, generator: torch.Generator) -> torch.Tensor:
    """Rings and open rings: things with a hole -> (count, T, T)."""
    x, y = tile_grid()
    tiles = []
    for index in range(count):
        r = uniform(generator, 4).tolist()
        width = 0.05 + 0.25 * r[0]
        ring = width - (torch.hypot(x, y) - 0.88 + width).abs()
        if index % 2:
            ring = torch.minimum(ring, 0.4 + 0.6 * r[1] - y)
        tiles.append(ring)
    return torch.stack(tiles)


def strands(count: int, generator: torch.Generator) -> torch.Tensor:
    """Thin things across the whole tile: bent lines and branching twigs -> (count, T, T)."""
    tiles = []
    for index in range(count):
        width = 0.012 + 0.05 * float(uniform(generator, 1)) ** 2
        branches = [(-0.95, 0.3 * float(uniform(generator, 1)) - 0.15, 0.0, width)]
        parts = []
        limit = 1 if index % 3 == 0 else 6
        while branches and limit:
            x, y, heading, thick = branches.pop(0)
            for step in range(12):
                turn, split = uniform(generator, 2).tolist()
                heading += 0.5 * (turn - 0.5)
                nx, ny = x + 0.16 * math.cos(heading), y + 0.16 * math.sin(heading)
                parts.append(capsule(x, y, nx, ny, thick, thick * 0.96))
                x, y, thick = nx, ny, max(thick * 0.96, 0.008)
                if split < 0.25 and step > 0:
                    branches.append((x, y, heading + (0.8 if turn > 0.5 else -0.8), thick * 0.7))
            limit -= 1
        tiles.append(torch.stack(parts).amax(0))
    return torch.stack(tiles)


def fractal_field(count: int, size: int, slope: float, generator: torch.Generator, stretch: float = 1.0):
    """Periodic noise with amplitude spectrum 1 / f^slope, mean 0 and std 1 -> (count, size, size)."""
    fy = torch.fft.fftfreq(size)[:, None] * size
    fx = torch.fft.rfftfreq(size)[None] * size
    frequency = torch.hypot(fx * stretch, fy / stretch)
    frequency[0, 0] = 1
    spectrum = torch.fft.rfft2(torch.randn(count, size, size, generator=generator)) / frequency**slope
    spectrum[:, 0, 0] = 0
    field = torch.fft.irfft2(spectrum, s=(size, size))
    return field / field.std(dim=(1, 2), keepdim=True)


def horizons(count: int, generator: torch.Generator) -> torch.Tensor:
    """Lower half-planes y > profile(x), from straight lines over hills to ragged mountains -> (count, T, T)."""
    _, y = tile_grid()
    tiles = []
    for index in range(count):
        slope = float(uniform(generator, 1, low=1.0, high=2.4))
        profile = fractal_field(1, 256, slope, generator)[0, 0, :OUTLINE_SIZE]
        profile = profile - profile.mean()
        height = (0.0, 0.02, 0.06, 0.15)[index % 4] * float(uniform(generator, 1, low=0.5, high=1.5))
        tiles.append((y - height * profile) * 0.8)
    return torch.stack(tiles)


def patches(count: int, generator: torch.Generator) -> torch.Tensor:
    """Level sets of fractal noise: pools, clouds, clearings; they run over the tile's border -> (count, T, T)."""
    slopes = uniform(generator, count, low=1.5, high=2.6).tolist()
    field = torch.cat([fractal_field(1, OUTLINE_SIZE, slope, generator) for slope in slopes])
    return (field - uniform(generator, count, 1, 1, low=-0.3, high=0.9)) * 0.2


def _signed_distance(inside: torch.Tensor, reach: int = 24) -> torch.Tensor:
    """Euclidean distance in texels to the other side, up to `reach`, of bool pictures (N, H, W) -> (N, H, W)."""
    signed = []
    for region in (inside, ~inside):
        squared = torch.where(region, float(reach * reach), 0.0)
        for dim in (1, 2):
            best = squared.clone()
            for shift in range(1, reach):
                for sign in (-1, 1):
                    rolled = torch.roll(squared, sign * shift, dim)
                    best = torch.minimum(best, rolled + shift * shift)
            squared = best
        signed.append(squared.sqrt())
    return signed[0] - signed[1]


def glyphs() -> torch.Tensor:
    """Letters and digits of pillow's built-in font -> (count, T, T)."""
    size = 2 * OUTLINE_SIZE
    pictures = []
    for character in GLYPHS:
        picture = Image.new("L", (size, size))
        ImageDraw.Draw(picture).text(
            (size // 2, size // 2), character, fill=255, font=ImageFont.load_default(190), anchor="mm"
        )
        pictures.append(torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(size, size) > 127)
    distance = _signed_distance(torch.stack(pictures))
    distance = torch.nn.functional.avg_pool2d(distance[:, None], 2)[:, 0]
    return distance / OUTLINE_SIZE


def build_outlines(seed: int) -> tuple[torch.Tensor, dict[str, tuple[int, int]]]:
    """All tiles (N, T, T) and for each family of outlines the range [first, last) of its tiles."""
    generator = torch.Generator().manual_seed(seed)
    families = {
        "smooth": torch.cat([harmonic_blobs(24, 2.5, generator), harmonic_blobs(24, 1.8, generator)]),
        "rough": torch.cat([harmonic_blobs(32, 1.3, generator), harmonic_blobs(16, 0.8, generator)]),
        "animal": animals(96, generator),
        "person": people(36, generator),
        "plant": plants(32, generator),
        "polygon": random_polygons(28, generator),
        "box": boxes(16, generator),
        "disc": ellipse(0, 0, 0.88, 0.88)[None],
        "star": stars(18, generator),
        "building": buildings(32, generator),
        "ring": rings(8, generator),
        "glyph": glyphs(),
        "strand": strands(24, generator),
        "horizon": horizons(48, generator),
        "patch": patches(48, generator),
    }
    ranges, first = {}, 0
    for name, tiles in families.items():
        ranges[name] = (first, first + tiles.shape[0])
        first += tiles.shape[0]
    return torch.cat(list(families.values())), ranges
