# SPDX-License-Identifier: Apache-2.0
"""Scanned household objects (meshes with a texture) seen from six sides, drawn in NumPy."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from layout import LONGEST_CUTOUT, Cutout, CutoutSet
from PIL import Image


VIEWS = 6
FINER = 2  # drawn larger by this and reduced, which makes soft edges
DENSITY = 1.25  # points per pixel along the longest edge of a triangle; from 2 / sqrt(3) on every pixel gets one
POINTS_AT_ONCE = 1_000_000
LARGEST_TEXTURE = 1024  # pixels a side; more of it than pixels of the picture would flicker
AMBIENT = 0.55  # brightness of what no light falls on


@dataclass(frozen=True)
class Mesh:
    """Corners of triangles in space (F, 3, 3), z up, and on the texture (F, 3, 2); texture (H, W, 3) uint8."""

    corners: np.ndarray
    places: np.ndarray
    texture: np.ndarray


def scans3d(source: Path) -> CutoutSet:
    """SOURCE holds urdf_models/models/NAME/textured.obj with texture_map.jpg, or .png, beside it."""
    files = sorted((source / "urdf_models" / "models").glob("*/textured.obj"))
    if not files:
        raise FileNotFoundError(
            f"SOURCE {source} is not pybullet-URDF-models: expected urdf_models/models/NAME/textured.obj in it"
        )
    names = [path.parent.name for path in files]
    things = [Cutout(name, partial(_read_views, path, name), {"object": name}) for path, name in zip(files, names)]
    return CutoutSet(things, "MIT / CC-BY-4.0 (YCB)")


def _read_views(path: Path, name: str) -> list[tuple[str, Image.Image]]:
    mesh = read_mesh(path)
    generator = np.random.default_rng(list(hashlib.sha1(name.encode(), usedforsecurity=False).digest()))
    return [(f"{name}_{view:02d}.webp", draw_view(mesh, view, generator)) for view in range(VIEWS)]


def read_mesh(path: Path) -> Mesh:
    """A Wavefront OBJ file and its texture; `ValueError` if it is damaged or has no place on the texture."""
    points: list[list[str]] = []
    places: list[list[str]] = []
    faces: list[list[tuple[int, int]]] = []
    try:
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            kind, *values = line.split() or [""]
            if kind == "v":
                points.append(values[:3])
            elif kind == "vt":
                places.append(values[:2])
            elif kind == "f":
                corners = [tuple(int(number) for number in value.split("/")[:2]) for value in values]
                faces += [[corners[0], *pair] for pair in zip(corners[1:], corners[2:])]
        indices = np.array(faces).reshape(-1, 3, 2)
        indices = np.where(indices > 0, indices - 1, indices + np.array([len(points), len(places)]))
        space, flat = np.array(points, float)[indices[..., 0]], np.array(places, float)[indices[..., 1]]
    except (ValueError, IndexError) as error:
        raise ValueError(f"{path} must be triangles with places on a texture (f v/vt ...): {error}") from error
    if not len(space):
        raise ValueError(f"{path} has no faces")
    return Mesh(space, flat, _read_texture(path.parent))


def _read_texture(folder: Path) -> np.ndarray:
    files = sorted(path for path in folder.glob("texture*map.*") if path.suffix in (".jpg", ".png"))
    if not files:
        raise FileNotFoundError(f"{folder} holds no texture_map.jpg or .png")
    with Image.open(files[0]) as picture:
        picture = picture.convert("RGB")
    picture.thumbnail((LARGEST_TEXTURE, LARGEST_TEXTURE))
    return np.asarray(picture)


def draw_view(mesh: Mesh, view: int, generator: np.random.Generator) -> Image.Image:
    """A mesh from one of `VIEWS` directions around it, RGBA, with a longest side of that of cut-outs."""
    axes = _directions(view, generator)
    seen = mesh.corners @ axes.T  # x right, y down, z to the eye
    normals = np.cross(seen[:, 1] - seen[:, 0], seen[:, 2] - seen[:, 0])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-12)
    light = np.array([*generator.uniform(-1, 1, 2), 1.0])
    shade = AMBIENT + (1 - AMBIENT) * np.abs(normals @ light) / np.linalg.norm(light)
    low, high = seen.min((0, 1))[:2], seen.max((0, 1))[:2]
    side = LONGEST_CUTOUT * FINER
    seen[..., :2] = (seen[..., :2] - low) * ((side - 1) / max((high - low).max(), 1e-12))
    return _splat(seen, mesh, shade, side).reduce(FINER)


def _directions(view: int, generator: np.random.Generator) -> np.ndarray:
    """Right, down and to the eye as rows (3, 3), for an eye at one of `VIEWS` places around and above a thing."""
    around = 2 * np.pi * (view + generator.uniform(0, 0.8)) / VIEWS
    above, roll = np.radians(generator.uniform(-20, 70)), np.radians(generator.uniform(-20, 20))
    eye = np.array([np.cos(above) * np.cos(around), np.cos(above) * np.sin(around), np.sin(above)])
    right = np.array([-np.sin(around), np.cos(around), 0.0])
    down = np.cross(right, eye)
    turned = np.cos(roll) * right + np.sin(roll) * down, np.cos(roll) * down - np.sin(roll) * right
    return np.stack([*turned, eye])


def _splat(seen: np.ndarray, mesh: Mesh, shade: np.ndarray, side: int) -> Image.Image:
    """Triangles (F, 3, 3) as points, so dense that no pixel is left out; in each pixel the nearest one stays."""
    nearest = np.full(side * side, -np.inf)
    colors = np.zeros((side * side, 4), np.uint8)
    edges = np.linalg.norm(seen[..., :2] - np.roll(seen[..., :2], 1, axis=1), axis=2).max(1)
    steps = np.ceil(2 ** (np.ceil(4 * np.log2(np.maximum(1, edges * DENSITY))) / 4)).astype(int)  # few different ones
    for count in np.unique(steps):
        weights = _lattice(int(count))
        members = np.flatnonzero(steps == count)
        for part in np.array_split(members, -(-len(members) * len(weights) // POINTS_AT_ONCE)):
            points = (weights @ seen[part]).reshape(-1, 3)
            pixels = points[:, 1].round().astype(int) * side + points[:, 0].round().astype(int)
            np.maximum.at(nearest, pixels, points[:, 2])
            front = np.flatnonzero(points[:, 2] >= nearest[pixels])
            places = (weights @ mesh.places[part]).reshape(-1, 2)[front]
            bright = np.repeat(shade[part], len(weights))[front]
            colors[pixels[front], :3] = _texture_colors(mesh.texture, places) * bright[:, None]
            colors[pixels[front], 3] = 255
    return Image.fromarray(colors.reshape(side, side, 4))


def _lattice(count: int) -> np.ndarray:
    """Weights (K, 3) of the corners for points all over a triangle, `count` steps along each edge."""
    first, second = np.mgrid[: count + 1, : count + 1]
    inside = first + second <= count
    first, second = first[inside], second[inside]
    return np.stack([first, second, count - first - second], 1) / count


def _texture_colors(texture: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Colours at places (N, 2), x to the right and y up from the lower left corner -> (N, 3)."""
    height, width = texture.shape[:2]
    x, y = (places - np.floor(places)).T
    return texture[((1 - y) * (height - 1)).round().astype(int), (x * (width - 1)).round().astype(int)]
