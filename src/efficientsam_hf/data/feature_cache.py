# SPDX-License-Identifier: Apache-2.0
"""Teacher features on disk, so that pretraining need not run the teacher again.

A cache is a folder: `index.json` says what it holds, and shards of safetensors hold it. It has either `crops` random
parts of every picture, with the features of each part (what the paper's teacher sees, for a fixed set of parts), or,
with `crops` 0, features of whole pictures, of which pretraining takes what lies at the place of a fresh part (cheaper
to make and without end, but the teacher never saw the part alone).
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..files import write_file, write_json
from .crops import Box, RandomCrop, crop, part_of_map
from .numbered_batches import ordered_batches
from .teacher import Teacher


INDEX = "index.json"
WAYS_TO_DIFFER = "teacher revision resolution grid width images crops crop seed records_per_shard".split()


@dataclass(frozen=True)
class CacheIndex:
    """What a cache holds: whose features, of which pictures, on which grid.

    `grid` is (h, w), the cells of a part (or, with `crops` 0, of a whole picture); `images` the number of pictures;
    part k of picture i is drawn by `crop` from (`seed`, i, k).
    """

    teacher: str
    revision: str | None
    resolution: int
    width: int
    grid: tuple[int, int]
    images: int
    crops: int
    crop: RandomCrop = field(default_factory=RandomCrop)
    seed: int = 0
    records_per_shard: int = 512

    def __post_init__(self):
        for name in ("images", "records_per_shard"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.crops < 0 or min(self.grid) < 1:
            raise ValueError(f"crops must be at least 0 and grid at least 1 x 1, got {self.crops} and {self.grid}")

    @property
    def records(self) -> int:
        """Feature maps in the whole cache."""
        return self.images * max(self.crops, 1)

    @property
    def shards(self) -> int:
        """Files of the whole cache."""
        return -(-self.records // self.records_per_shard)

    def part(self, record: int, size: tuple[int, int]) -> tuple[Box, bool]:
        """The part (left, top, right, bottom) of a picture of size (W, H) that a record is of; is it mirrored?"""
        if self.crops == 0:
            return (0, 0, *size), False
        return self.crop.draw(size, np.random.default_rng((self.seed, *divmod(record, self.crops))))

    @classmethod
    def read(cls, folder: str | Path) -> "CacheIndex":
        """The index of a cache; FileNotFoundError or ValueError if the folder is none."""
        path = Path(folder) / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no cache of features: it has no {INDEX}")
        try:
            content = json.loads(path.read_text())
            return cls(**{**content, "grid": tuple(content["grid"]), "crop": RandomCrop(**content["crop"])})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no index of a cache: {error}") from error

    def check_same(self, other: "CacheIndex", folder: str | Path) -> None:
        """ValueError that names how a cache in `folder`, described by this index, differs from what is wanted."""
        differing = [name for name in WAYS_TO_DIFFER if getattr(self, name) != getattr(other, name)]
        if differing:
            changes = ", ".join(
                f"{name} {getattr(self, name)!r} and not {getattr(other, name)!r}" for name in differing
            )
            raise ValueError(f"cache {folder} was made with {changes}")


def write_cache(
    folder: str | Path,
    index: CacheIndex,
    samples: Sequence[dict[str, Any]],
    teacher: Teacher,
    rank: int = 0,
    processes: int = 1,
    batch_size: int = 16,
    workers: int = 0,
) -> Iterator[tuple[int, int]]:
    """Compute what is missing of a cache; yields (shard, its records) whenever a shard is complete.

    Shards are shared between `processes`; those that exist are not made again, and a shard appears whole or not at
    all, so that a killed process loses what it had of one. Pictures that cannot be read are named in their shard and
    have no record. Raises ValueError if the folder holds another cache, or if a teacher's feature is not finite, with
    the picture's name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / INDEX).is_file():
        CacheIndex.read(folder).check_same(index, folder)
    elif rank == 0:
        write_json(folder / INDEX, asdict(index))
    missing = [n for n in range(rank, index.shards, processes) if not shard_path(folder, n).is_file()]
    for number in missing:
        first = number * index.records_per_shard
        records = range(first, min(first + index.records_per_shard, index.records))
        write_shard(shard_path(folder, number), _compute(index, samples, teacher, records, batch_size, workers))
        yield number, len(records)


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"features-{number:06d}.safetensors"


def write_shard(path: Path, content: dict[str, Any]) -> None:
    """Write features (n, h * w, C) float16, records (n,) int64, and the names of pictures and problems."""
    tensors = {name: content[name] for name in ("features", "records")}
    names = {name: json.dumps(content[name]) for name in ("image_ids", "problems")}
    write_file(path, lambda temporary: save_file(tensors, temporary, metadata=names))


def _compute(index, samples, teacher, records, batch_size, workers) -> dict[str, Any]:
    """The content of a shard, as `write_shard` takes it."""
    content: dict[str, Any] = {"features": [], "records": [], "image_ids": [], "problems": {}}
    parts = _Parts(index, samples, teacher.resolution)
    groups = [records[start : start + batch_size] for start in range(0, len(records), batch_size)]
    for batch in ordered_batches(parts, groups, workers):
        content["problems"] |= batch["problems"]
        if len(batch["records"]):
            content["features"].append(_half_features(teacher, batch, index.grid))
            content["records"] += batch["records"]
            content["image_ids"] += batch["image_ids"]
    cells = index.grid[0] * index.grid[1]
    empty = torch.zeros(0, cells, index.width, dtype=torch.float16)
    content["features"] = torch.cat([empty, *content["features"]])
    content["records"] = torch.tensor(content["records"], dtype=torch.int64)
    return content


def _half_features(teacher: Teacher, batch: dict[str, Any], grid: tuple[int, int]) -> torch.Tensor:
    """(n, h * w, C) float16 on the CPU; ValueError that names the record whose features float16 cannot hold."""
    features = teacher.features(batch["images"], grid, check=False).cpu().half()
    good = features.isfinite().flatten(1).all(1).tolist()
    if not all(good):
        first = good.index(False)
        raise ValueError(
            f"teacher {teacher.name}: features of record {batch['records'][first]}, picture "
            f"{batch['image_ids'][first]}, are not finite in float16"
        )
    return features


@dataclass(frozen=True)
class _Parts:
    """Records -> the parts of pictures that they are of, at the teacher's resolution."""

    index: CacheIndex
    samples: Sequence[dict[str, Any]]
    resolution: int

    def __call__(self, records: Sequence[int]) -> dict[str, Any]:
        result: dict[str, Any] = {"images": [], "records": [], "image_ids": [], "problems": {}}
        last, sample = None, None
        for record in records:
            number = record // max(self.index.crops, 1)
            if number != last:
                last, sample = number, self._read(number, result["problems"])
            if sample is not None:
                box, mirrored = self.index.part(record, sample["image"].size)
                result["images"].append(crop(sample["image"], box, self.resolution, mirrored))
                result["records"].append(record)
                result["image_ids"].append(str(sample.get("image_id", number)))
        if result["images"]:
            result["images"] = torch.stack(result["images"])
        return result

    def _read(self, number: int, problems: dict[str, str]) -> dict[str, Any] | None:
        try:
            return self.samples[number]
        except (ValueError, OSError) as error:
            problems[str(number)] = str(error)
            return None


class FeatureCache:
    """A complete cache to read from; maps are read when they are asked for.

    Raises FileNotFoundError if the folder is no cache, and ValueError if shards are missing.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = CacheIndex.read(folder)
        missing = [n for n in range(self.index.shards) if not shard_path(self.folder, n).is_file()]
        if missing:
            raise ValueError(
                f"cache {folder} is not complete: {len(missing)} of {self.index.shards} shards are missing, the first "
                f"is {shard_path(self.folder, missing[0]).name}; run the command that makes it again"
            )

    def features(self, record: int) -> tuple[torch.Tensor, str]:
        """(h * w, C) float16 and the id of the picture; ValueError for a picture that could not be read."""
        path = shard_path(self.folder, record // self.index.records_per_shard)
        rows, image_ids = _shard_rows(path)
        row = rows.get(record)
        if row is None:
            raise ValueError(f"cache {self.folder} has no features of record {record}: its picture could not be read")
        with safe_open(path, "pt") as file:
            return file.get_slice("features")[row], image_ids[row]

    def problems(self) -> dict[str, str]:
        """Pictures that could not be read, by their number."""
        result: dict[str, str] = {}
        for number in range(self.index.shards):
            with safe_open(shard_path(self.folder, number), "pt") as file:
                result |= json.loads(file.metadata()["problems"])
        return result


@lru_cache(maxsize=4096)
def _shard_rows(path: Path) -> tuple[dict[int, int], list[str]]:
    """Row of each record of a shard, and the pictures' ids by row."""
    with safe_open(path, "pt") as file:
        records = file.get_tensor("records").tolist()
        return {record: row for row, record in enumerate(records)}, json.loads(file.metadata()["image_ids"])


@dataclass(frozen=True)
class CachedSamples:
    """Pictures with their cached features: item i is a sample with "part", the function that gives a part of it.

    `part(generator, grid)` -> (box, mirrored, features (h * w, C) float32): one of the cached parts, or a fresh part
    and the features at its place. Raises ValueError if the pictures are not those of the cache.
    """

    samples: Sequence[dict[str, Any]]
    cache: FeatureCache
    crops: RandomCrop

    def __post_init__(self):
        if len(self.samples) != self.cache.index.images:
            raise ValueError(
                f"cache {self.cache.folder} is of {self.cache.index.images} pictures, but there are "
                f"{len(self.samples)}"
            )

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self.samples[number]
        return {**sample, "part": _PartOf(self.cache, self.crops, number, sample)}


@dataclass(frozen=True)
class _PartOf:
    cache: FeatureCache
    crops: RandomCrop
    number: int
    sample: dict[str, Any]

    def __call__(self, generator: np.random.Generator, grid: tuple[int, int]) -> tuple[Box, bool, torch.Tensor]:
        index, size = self.cache.index, self.sample["image"].size
        if index.crops:
            record = self.number * index.crops + int(generator.integers(index.crops))
            return *index.part(record, size), self._features(record).float()
        box, mirrored = self.crops.draw(size, generator)
        maps = self._features(self.number).T.unflatten(1, index.grid)
        return box, mirrored, part_of_map(maps, size, box, mirrored, grid)

    def _features(self, record: int) -> torch.Tensor:
        features, image_id = self.cache.features(record)
        own = str(self.sample.get("image_id", self.number))
        if image_id != own:
            raise ValueError(
                f"cache {self.cache.folder} has {image_id!r} as picture {self.number}, here it is {own!r}"
            )
        return features


def check_cache(
    folder: str | Path, samples: Sequence[dict[str, Any]], teacher: Teacher, count: int, seed: int = 0
) -> float:
    """Compute `count` random records again and return the largest absolute difference to what is stored.

    Raises ValueError if the cache is another teacher's or other pictures'.
    """
    cache = FeatureCache(folder)
    index = cache.index
    own = replace(index, teacher=teacher.name, revision=teacher.revision, resolution=teacher.resolution)
    index.check_same(replace(own, width=teacher.width, images=len(samples)), folder)
    problems = cache.problems()
    good = [r for r in range(index.records) if str(r // max(index.crops, 1)) not in problems]
    largest = 0.0
    for record in np.random.default_rng(seed).permutation(good)[:count].tolist():
        batch = _Parts(index, samples, teacher.resolution)([record])
        stored, image_id = cache.features(record)
        if batch["image_ids"] != [image_id]:
            raise ValueError(f"cache {folder} has {image_id!r} in record {record}, here it is {batch['image_ids']}")
        again = teacher.features(batch["images"], index.grid)[0].cpu()
        largest = max(largest, (again - stored.float()).abs().max().item())
    return largest
