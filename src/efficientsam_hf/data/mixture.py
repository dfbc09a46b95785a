# SPDX-License-Identifier: Apache-2.0
"""Several sources of training pictures with weights: what a mixture is made of, and whose turn it is when."""

import math
import os
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
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
PATHS = {"annotations": "file", "images": "folder", "sa1b": "folder"}  # relative ones count from the mixture's file
CHANGES = ("horizontal_flip", "min_scale", "max_scale", "light")
NUMBERS = (*CHANGES, "min_object_area", "max_object_area")
OF_DATASETS = ("split", "config", "revision", "image_column", "masks_column")
TEXTS = (*PATHS, "dataset", *OF_DATASETS, "license", "credit", "url")
BLOCK = 1000  # pictures among which every source has its share
LARGEST = 1e100  # number in a mixture
TRIED = 64  # cut-outs or backgrounds of a folder or file, before it is taken for unusable


@dataclass(frozen=True)
class MixtureSource:
    """One source: where its pictures come from (one of `KINDS`, with what goes with it), how often, how changed.

    `cutouts` and `backgrounds` are {"folder", "weight"} or, for COCO files, {"annotations", "images", "weight"}.
    `NUMBERS` replace the run's own arguments of these names; pasted pictures and scenes are changed in their own way
    already, so the run's flips, scales and light are not for them. `license`, `credit` and `url` are for the model
    card. Raises ValueError that names the source for a value of another type, for no kind or several, and for what
    does not go with the kind.
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
    license: str | None = None
    credit: str | None = None
    url: str | None = None

    def __post_init__(self):
        self._check_types()
        given = [kind for kind in KINDS if getattr(self, kind)]
        if len(given) != 1:
            self._fail(f"one of {', '.join(KINDS)} must be given, got {' and '.join(given) or 'none'}")
        for one, other in (("annotations", "images"), ("cutouts", "backgrounds")):
            if bool(getattr(self, one)) != bool(getattr(self, other)):
                self._fail(f"{one} and {other} go together, got only one of them")
        useless = [] if self.dataset else list(OF_DATASETS)
        useless += CHANGES if self.scenes else ()
        for item in fields(self):
            if item.name in useless and getattr(self, item.name) != item.default:
                self._fail(f"{item.name} is not for {self.kind}, got {getattr(self, item.name)!r}")

    def _check_types(self) -> None:
        if not isinstance(self.name, str) or not re.fullmatch(r"[\w.-]+", self.name):
            self._fail(f"a name must be text of letters, digits, '_', '.' and '-', got {self.name!r}")
        if not _is_number(self.weight) or self.weight <= 0:
            self._fail(f"weight must be a number above 0, got {self.weight!r}")
        for name in TEXTS:
            value = getattr(self, name)
            if value is not None and not (isinstance(value, str) and value.strip()):
                self._fail(f"{name} must be text, got {value!r}")
        for name in NUMBERS:
            if getattr(self, name) is not None and not _is_number(getattr(self, name)):
                self._fail(f"{name} must be a number, got {getattr(self, name)!r}")
        if not isinstance(self.scenes, bool):
            self._fail(f"scenes must be true or false, got {self.scenes!r}")
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            self._fail(f"url must begin with http:// or https://, got {self.url!r}")

    def _fail(self, reason: str) -> None:
        raise ValueError(f"source {self.name!r}: {reason}")

    @property
    def kind(self) -> str:
        """The one of `KINDS` that it is."""
        return next(kind for kind in KINDS if getattr(self, kind))

    @property
    def endless(self) -> bool:
        """Whether its pictures are made, so that none comes twice."""
        return self.kind in ("cutouts", "scenes")

    def open(self, read_coco: Callable[[str, str], coco.CocoSamples] = coco.CocoSamples) -> Any:
        """Samples by number, or `PastedPictures`; None for scenes, which need no files.

        Raises FileNotFoundError or ValueError, with the source's name, for what is missing or damaged, for folders of
        cut-outs or backgrounds of which none can be used, and for tars, which are read one after the other.
        """
        try:
            return self._open(read_coco)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"source {self.name!r}: {error}") from error
        except ValueError as error:
            raise ValueError(f"source {self.name!r}: {error}") from error

    def _open(self, read_coco: Callable[[str, str], coco.CocoSamples]) -> Any:
        if self.annotations:
            return read_coco(self.annotations, self.images)
        if self.sa1b:
            if find_tars(self.sa1b):
                raise ValueError(f"sa1b: {self.sa1b} holds tars, which cannot be read in any order; unpack them")
            return sa1b.Sa1bFolder(self.sa1b)
        if self.dataset:
            return dataset_samples.load_samples(
                self.dataset, split=self.split, config=self.config, revision=self.revision,
                image_column=self.image_column, masks_column=self.masks_column,
            )  # fmt: skip
        if self.cutouts:
            cutouts = [(entry["weight"], _open_cutouts(entry, read_coco)) for entry in self.cutouts]
            backgrounds = [(entry["weight"], _open_backgrounds(entry, read_coco)) for entry in self.backgrounds]
            return PastedPictures(cutouts, backgrounds)
        return None


def open_sources(sources: Sequence[MixtureSource]) -> list[Any]:
    """What each source opens; a COCO file that several of them name is read once. Errors as of `open`."""
    read_coco = lru_cache(maxsize=None)(coco.CocoSamples)
    return [source.open(read_coco) for source in sources]


def _open_cutouts(entry: dict[str, Any], read_coco: Callable) -> CutoutFolder | ObjectCutouts:
    if "folder" in entry:
        return _with_usable(CutoutFolder(entry["folder"]), f"cutouts: {entry['folder']}")
    samples = read_coco(entry["annotations"], entry["images"])
    return _with_usable(ObjectCutouts(samples, samples.object_counts()), f"cutouts: {entry['annotations']}")


def _open_backgrounds(entry: dict[str, Any], read_coco: Callable) -> Sequence[dict[str, Any]]:
    if "folder" in entry:
        return _with_usable(ImageFolder(entry["folder"]), f"backgrounds: {entry['folder']}")
    return _with_usable(read_coco(entry["annotations"], entry["images"]), f"backgrounds: {entry['annotations']}")


def _with_usable(samples: Any, shown: str) -> Any:
    """The samples; `ValueError` if none of some that lie all over them can be used."""
    indices = np.unique(np.linspace(0, len(samples) - 1, TRIED).round().astype(int)).tolist()
    for index in indices:
        try:
            samples[index]
            return samples
        except (ValueError, OSError) as error:
            reason = error
    raise ValueError(f"{shown}: none of {len(indices)} that were tried could be used: {reason}")


def read_mixture(text: str, existing: bool = True) -> list[MixtureSource]:
    """Sources from a YAML file by its path, or from YAML text: a list of mappings of the fields of `MixtureSource`.

    Relative paths count from the file's folder, in text from the working directory; with `existing` False they stay
    as they are, and nothing is looked for. Raises ValueError that names the source for anything else than a list of
    sources with different names, and FileNotFoundError for a missing path.
    """
    path = Path(os.path.expanduser(text))
    from_file = "\n" not in text and os.path.isfile(path)
    shown = f"train_mix: {text[:80]!r}"
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8") if from_file else text)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown} is not YAML: {error}") from None
    if not isinstance(content, list) or not content or not all(isinstance(entry, dict) for entry in content):
        raise ValueError(f"{shown} is neither a YAML file nor text with a list of sources")
    if len(content) > BLOCK:
        raise ValueError(f"{shown} has {len(content)} sources, at most {BLOCK} can take turns")
    folder = None if not existing else path.parent if from_file else Path()
    sources = [_read_source(number, entry, folder) for number, entry in enumerate(content, 1)]
    names = [source.name for source in sources]
    if len(set(names)) < len(names):
        raise ValueError(f"{shown}: every source needs a name of its own, got {', '.join(names)}")
    return sources


def write_mixture(sources: Sequence[MixtureSource], **style: Any) -> str:
    """YAML text that `read_mixture` reads the same sources from; fields that have their default are left out.

    `style` is for `yaml.safe_dump`.
    """
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
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True, width=math.inf, **style)


def _read_source(number: int, entry: dict[str, Any], folder: Path | None) -> MixtureSource:
    """The source of an entry of the YAML; paths count from `folder`, and must be there unless it is None."""
    values = {"name": f"source_{number}"} | {key: value for key, value in entry.items() if value is not None}
    known, shown = {item.name for item in fields(MixtureSource)}, f"source {values['name']!r}: "
    unknown = sorted(str(key) for key in set(entry) - known)
    if unknown:
        raise ValueError(f"{shown}unknown names {', '.join(unknown)}; known are {', '.join(sorted(known))}")
    for key in ("cutouts", "backgrounds"):
        if key in values:
            values[key] = _read_folders(f"{shown}{key}", values[key], folder)
    for key in ("weight", *NUMBERS):
        if key in values:
            values[key] = _number(values[key])
    MixtureSource(**values)  # what is wrong in it is said before its paths are looked for
    for key, what in PATHS.items():
        if key in values:
            values[key] = _find(f"{shown}{key}", values[key], what, folder)
    if "dataset" in values:
        values["dataset"] = _find_dataset(shown, values["dataset"], folder)
    return MixtureSource(**values)


def _read_folders(shown: str, entries: Any, folder: Path | None) -> tuple[dict[str, Any], ...]:
    """Where cut-outs or backgrounds are taken from: a path, a mapping, or a list of these."""
    entries = entries if isinstance(entries, list) else [entries]
    if not entries:
        raise ValueError(f"{shown} must name a folder or COCO file at least, got an empty list")
    result = []
    for entry in entries:
        parts = {"folder": entry} if isinstance(entry, str) else dict(entry) if isinstance(entry, dict) else {}
        weight = _number(parts.pop("weight", 1.0))
        if set(parts) not in ({"folder"}, {"annotations", "images"}):
            raise ValueError(
                f"{shown} must be folders, or mappings with folder or with annotations and images, got {entry!r}"
            )
        if not _is_number(weight) or weight <= 0:
            raise ValueError(f"{shown}: weight must be a number above 0, got {weight!r}")
        found = {
            part: _find(f"{shown}: {part}", value, "file" if part == "annotations" else "folder", folder)
            for part, value in parts.items()
        }
        result.append({**found, "weight": weight})
    return tuple(result)


def _find(shown: str, value: Any, what: str, folder: Path | None) -> str:
    """The absolute path of a file or folder; as it is without a folder to count from."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{shown} must be a path, got {value!r}")
    if folder is None:
        return value
    path = folder / os.path.expanduser(value)
    if not (os.path.isfile(path) if what == "file" else os.path.isdir(path)):
        raise FileNotFoundError(f"{shown}: {path} does not exist or is no {what}")
    return str(path.resolve())


def _find_dataset(shown: str, value: str, folder: Path | None) -> str:
    """The absolute path of a folder that is there; any other name is one of the Hub, and stays."""
    is_path = value.startswith(("/", ".", "~"))
    if folder is None or not (is_path or os.path.isdir(folder / value)):
        return value
    return _find(f"{shown}dataset", value, "folder", folder)


def _number(value: Any) -> Any:
    """YAML reads 4e-4 as text; anything that is no number stays what it is."""
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, and one that several can be added of."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < LARGEST


@dataclass(frozen=True)
class Turns:
    """Which source has its turn at each position of a mixture, and the number of its own picture there.

    Every block of `BLOCK` positions holds each source as often as its weight says (rounded, once at least), in an
    order that depends on the seed and the block's number alone. A source's own pictures are numbered 0, 1, 2, ...
    without gaps, so that an epoch of it holds each picture once.
    """

    weights: tuple[float, ...]
    seed: int = 0

    def shares(self) -> np.ndarray:
        """How often each source comes in a block, (sources,) int64."""
        return _shares(self.weights)

    def at(self, position: int) -> tuple[int, int]:
        """(source, place): place is the number of the source's own picture, from 0."""
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
