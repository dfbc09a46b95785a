# SPDX-License-Identifier: Apache-2.0
"""Several sources of training pictures with weights: what a mixture is made of, and whose turn it is when."""

from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from . import coco, dataset_samples, sa1b
from .cutouts import CutoutFolder, ObjectCutouts
from .images import ImageFolder
from .pasting import PastedPictures
from .scenes import scene_seed
from .tars import find_tars


KINDS = ("annotations", "sa1b", "dataset", "cutouts", "scenes")
PATHS = ("annotations", "images", "sa1b")  # relative ones count from the mixture's file
BLOCK = 1000  # pictures among which every source has its share


@dataclass(frozen=True)
class MixtureSource:
    """One source: where its pictures come from (one of `KINDS`, with what belongs to it), how often, how changed.

    `cutouts` and `backgrounds` are lists of folders, of COCO files as {"annotations", "images"}, both optionally
    {"folder" or "annotations", ..., "weight"}. The last five fields replace those of the run of the same name; pasted
    pictures and scenes are changed in their own way already, and stay as they are unless told.
    """

    name: str
    weight: float = 1.0
    annotations: str | None = None
    images: str | None = None
    sa1b: str | None = None
    dataset: str | None = None
    split: str = "train"
    config: str | None = None
    revision: str | None = None
    image_column: str = "image"
    masks_column: str = "masks"
    cutouts: tuple[dict[str, Any], ...] = ()
    backgrounds: tuple[dict[str, Any], ...] = ()
    scenes: bool = False
    horizontal_flip: float | None = None
    min_scale: float | None = None
    max_scale: float | None = None
    light: float | None = None
    min_object_area: float | None = None
    max_object_area: float | None = None

    def __post_init__(self):
        given = [kind for kind in KINDS if getattr(self, kind)]
        if len(given) != 1:
            raise ValueError(
                f"source {self.name!r} must have one of {', '.join(KINDS)}, got {' and '.join(given) or 'none'}"
            )
        for one, other in (("annotations", "images"), ("cutouts", "backgrounds")):
            if bool(getattr(self, one)) != bool(getattr(self, other)):
                raise ValueError(f"source {self.name!r}: {one} and {other} go together, got only one of them")
        if not isinstance(self.weight, (int, float)) or isinstance(self.weight, bool) or not self.weight > 0:
            raise ValueError(f"source {self.name!r}: weight must be a number above 0, got {self.weight!r}")

    @property
    def kind(self) -> str:
        """The one of `KINDS` that it is."""
        return next(kind for kind in KINDS if getattr(self, kind))

    @property
    def endless(self) -> bool:
        """Whether pictures are made, each another one, and never come again."""
        return self.kind in ("cutouts", "scenes")

    def open(self, seed: int) -> Any:
        """Samples by number, or `PastedPictures`; None for scenes, which need no files.

        Raises as the source's own class does: FileNotFoundError or ValueError for what is missing or damaged.
        """
        if self.annotations:
            return coco.CocoSamples(self.annotations, self.images)
        if self.sa1b:
            if find_tars(self.sa1b):
                raise ValueError(
                    f"source {self.name!r}: {self.sa1b} holds tars, which can only be read one after the other; a "
                    "mixture needs them unpacked"
                )
            return sa1b.Sa1bFolder(self.sa1b)
        if self.dataset:
            return dataset_samples.load_samples(
                self.dataset, split=self.split, config=self.config, revision=self.revision,
                image_column=self.image_column, masks_column=self.masks_column,
            )  # fmt: skip
        if self.cutouts:
            cutouts = [(entry["weight"], _open_cutouts(entry)) for entry in self.cutouts]
            backgrounds = [(entry["weight"], _open_backgrounds(entry)) for entry in self.backgrounds]
            return PastedPictures(cutouts, backgrounds, seed)
        return None


def _open_cutouts(entry: dict[str, Any]) -> CutoutFolder | ObjectCutouts:
    if "folder" in entry:
        return CutoutFolder(entry["folder"])
    samples = coco.CocoSamples(entry["annotations"], entry["images"])
    return ObjectCutouts(samples, samples.object_counts())


def _open_backgrounds(entry: dict[str, Any]) -> Sequence[dict[str, Any]]:
    if "folder" in entry:
        return ImageFolder(entry["folder"])
    return coco.CocoSamples(entry["annotations"], entry["images"])


def read_mixture(text: str) -> list[MixtureSource]:
    """Sources from a YAML file by its path, or from YAML text: a list of mappings of the fields of `MixtureSource`.

    Relative paths count from the file's folder, in text from the working directory. Raises ValueError that names the
    source for anything else than a list of sources with different names, and FileNotFoundError for a missing path.
    """
    path = Path(text)
    from_file = "\n" not in text and len(text) < 1000 and path.is_file()
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8") if from_file else text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"train_mix: {text!r} is not YAML: {error}") from None
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"train_mix must be a YAML file or text with a list of sources, got {text[:80]!r}")
    folder = path.parent if from_file else Path()
    sources = [_read_source(number, entry, folder) for number, entry in enumerate(content, 1)]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"train_mix: every source needs a name of its own, got {', '.join(names)}")
    return sources


def write_mixture(sources: Sequence[MixtureSource]) -> str:
    """YAML text that `read_mixture` reads the same sources from, with what differs from the defaults only."""
    entries = []
    for source in sources:
        values = {item.name: getattr(source, item.name) for item in fields(source)}
        entries.append(
            {
                item.name: list(values[item.name]) if isinstance(values[item.name], tuple) else values[item.name]
                for item in fields(source)
                if item.default is MISSING or values[item.name] != item.default
            }
        )
    return yaml.safe_dump(entries, sort_keys=False, width=10_000)


def _read_source(number: int, entry: dict[str, Any], folder: Path) -> MixtureSource:
    known = {item.name for item in fields(MixtureSource)}
    name = str(entry.get("name", f"source {number}"))
    unknown = sorted(str(key) for key in set(entry) - known)
    if unknown:
        raise ValueError(f"source {name!r}: unknown names {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    values = {**entry, "name": name}
    for key in PATHS:
        if values.get(key) is not None:
            values[key] = _existing(name, values[key], folder)
    for key in ("cutouts", "backgrounds"):
        if key in values:
            values[key] = _read_folders(name, key, values[key], folder)
    return MixtureSource(**values)


def _read_folders(name: str, key: str, entries: Any, folder: Path) -> tuple[dict[str, Any], ...]:
    """What cutouts or backgrounds are taken from: paths, or mappings with folder or annotations and images."""
    entries = entries if isinstance(entries, list) else [entries]
    result = []
    for entry in entries:
        entry = dict(entry) if isinstance(entry, dict) else {"folder": entry}
        weight = entry.pop("weight", 1.0)
        if set(entry) not in ({"folder"}, {"annotations", "images"}):
            raise ValueError(
                f"source {name!r}: {key} are folders, or mappings with folder or with annotations and images, got "
                f"{sorted(entry)}"
            )
        if not isinstance(weight, (int, float)) or not weight > 0:
            raise ValueError(f"source {name!r}: weights of {key} must be numbers above 0, got {weight!r}")
        result.append({**{part: _existing(name, value, folder) for part, value in entry.items()}, "weight": weight})
    return tuple(result)


def _existing(name: str, value: Any, folder: Path) -> str:
    """An absolute path."""
    path = folder / str(value)
    if not path.exists():
        raise FileNotFoundError(f"source {name!r}: {path} does not exist")
    return str(path.resolve())


@dataclass(frozen=True)
class Turns:
    """Whose turn it is at each position of a mixture, and the how manyth of its pictures that is.

    Every block of `BLOCK` positions holds each source as often as its weight says (rounded, once at least), in an
    order of its own that depends on the seed and the block's number alone. So the place of a source at a position
    follows from the position, and an epoch of the source holds each of its pictures once.
    """

    weights: tuple[float, ...]
    seed: int = 0

    def shares(self) -> np.ndarray:
        """How often each source comes in a block, (sources,) int64."""
        return _shares(self.weights)

    def at(self, position: int) -> tuple[int, int]:
        """(source, place): the place counts the source's own pictures from 0 on."""
        block, offset = divmod(position, BLOCK)
        source, rank = (int(part[offset]) for part in _block(self.weights, self.seed, block))
        return source, block * int(self.shares()[source]) + rank


@lru_cache(maxsize=8)
def _shares(weights: tuple[float, ...]) -> np.ndarray:
    exact = np.array(weights) / sum(weights) * BLOCK
    counts = np.maximum(1, np.floor(exact)).astype(np.int64)
    for index in np.argsort(counts - exact, kind="stable")[: max(0, BLOCK - counts.sum())]:
        counts[index] += 1  # largest remainders first
    while counts.sum() > BLOCK:  # where tiny weights were raised to one
        counts[counts.argmax()] -= 1
    return counts


@lru_cache(maxsize=8)
def _block(weights: tuple[float, ...], seed: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and rank of each position in a block, (BLOCK,) each."""
    counts = _shares(weights)
    order = np.random.default_rng(scene_seed(seed, block)).permutation(BLOCK)
    sources, ranks = np.repeat(np.arange(len(counts)), counts), np.concatenate([np.arange(n) for n in counts])
    return sources[order], ranks[order]
