# SPDX-License-Identifier: Apache-2.0
"""Teacher features on disk, so that pretraining need not run the teacher again.

A cache is a folder: `index.json` says what it holds, and shards of safetensors hold it. It has either `crops` random
parts of every picture, with the features of each part (what the paper's teacher sees, for a fixed set of parts), or,
with `crops` 0, features of whole pictures, of which pretraining takes what lies at the place of a fresh part (cheaper
to make and without end, but the teacher never saw the part alone).
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import lru_cache
from itertools import count, groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..files import PARTIAL, read_json, write_file, write_json, writer_of
from .crops import Box, RandomCrop, crop, part_of_map
from .images import SceneImages
from .numbered_batches import ordered_batches
from .teacher import Teacher


INDEX = "index.json"
HANDLES = 256  # open shards


def _check_count(name: str, value: Any, smallest: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not smallest <= value < 2**53:
        raise ValueError(f"{name} must be a whole number of at least {smallest}, got {str(value)[:100]}")


@dataclass(frozen=True)
class CacheIndex:
    """What a cache holds: whose features, of which pictures, on which grid.

    `teacher`, `revision`, `resolution`, `dtype` and `width` are those of a `Teacher` and its weights. `grid` is (h,
    w), the cells of a part (or, with `crops` 0, of a whole picture). `images` is the number of pictures and `pictures`
    a fingerprint of them; for generated scenes `scenes` is their seed and size. Part k of picture i is drawn by `crop`
    from (`seed`, i, k), and stored beside its features.
    """

    teacher: str
    revision: str
    resolution: int
    dtype: str
    width: int
    grid: tuple[int, int]
    images: int
    pictures: str
    crops: int
    scenes: tuple[int, int] | None = None
    crop: RandomCrop = field(default_factory=RandomCrop)
    seed: int = 0
    records_per_shard: int = 512

    def __post_init__(self):
        for name in ("teacher", "revision", "dtype", "pictures"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be text, got {getattr(self, name)!r}")
        least = {"images": 1, "records_per_shard": 1, "resolution": 1, "width": 1, "crops": 0, "seed": 0}
        for name, smallest in least.items():
            _check_count(name, getattr(self, name), smallest)
        for name in ("grid", "scenes"):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                if name == "grid" or pair is not None:
                    raise ValueError(f"{name} must be two numbers, got {str(pair)[:100]}")
                continue
            for value in pair:
                _check_count(name, value, 1 if name == "grid" else 0)

    @property
    def records(self) -> int:
        """Feature maps in the whole cache."""
        return self.images * max(self.crops, 1)

    @property
    def shards(self) -> int:
        """Files of the whole cache."""
        return -(-self.records // self.records_per_shard)

    def records_of(self, shard: int) -> range:
        """Records that a shard holds."""
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, self.records))

    def part(self, record: int, size: tuple[int, int]) -> tuple[Box, bool]:
        """The part (left, top, right, bottom) of a picture of size (W, H) that a record is of; is it mirrored?"""
        if self.crops == 0:
            return (0, 0, *size), False
        return self.crop.draw(size, np.random.default_rng((self.seed, *divmod(record, self.crops))))

    @property
    def fingerprint(self) -> str:
        """Of all that decides what a shard holds."""
        content = {name: value for name, value in asdict(self).items() if name != "teacher"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, folder: str | Path) -> "CacheIndex":
        """The index of a cache; FileNotFoundError or ValueError if the folder is none."""
        path = Path(folder) / INDEX
        if not path.is_file():
            raise FileNotFoundError(f"{folder} is no cache of features: it has no {INDEX}")
        try:
            content = read_json(path)
            scenes = content["scenes"] and tuple(content["scenes"])
            crop = RandomCrop(**content["crop"])
            return cls(**{**content, "grid": tuple(content["grid"]), "crop": crop, "scenes": scenes})
        except (TypeError, KeyError, ValueError) as error:
            raise ValueError(f"{path} is no index of a cache: {str(error)[:200]}") from error

    def check_same(self, other: "CacheIndex", folder: str | Path) -> None:
        """ValueError that names how a cache in `folder`, described by this index, differs from what is wanted."""
        names = [item.name for item in fields(self) if getattr(self, item.name) != getattr(other, item.name)]
        if names == ["teacher"] and self.revision.startswith("sha256:"):
            return  # the same files in another folder
        if names:
            changes = ", ".join(f"{name} {getattr(self, name)!r} and not {getattr(other, name)!r}" for name in names)
            raise ValueError(f"cache {folder} was made with {changes}")


def describe(samples: Sequence[dict[str, Any]], teacher: Teacher, **rest: Any) -> CacheIndex:
    """The index of a cache of these pictures by this teacher; `rest` are the fields about parts, grid and shards."""
    return CacheIndex(
        teacher=teacher.name,
        revision=teacher.revision,
        resolution=teacher.resolution,
        dtype=str(next(teacher.model.parameters()).dtype).removeprefix("torch."),
        width=teacher.width,
        images=len(samples),
        pictures=samples.fingerprint(),
        scenes=(samples.seed, samples.image_size) if isinstance(samples, SceneImages) else None,
        **rest,
    )


def write_cache(
    folder: str | Path,
    index: CacheIndex,
    samples: Sequence[dict[str, Any]],
    teacher: Teacher,
    rank: int = 0,
    processes: int = 1,
    batch_size: int = 16,
    workers: int = 0,
) -> Iterator[int]:
    """Compute what is missing of a cache; yields numbers of records, as they are there or computed.

    Shards are shared between `processes`; those that exist are not made again, and a shard appears whole or not at
    all, so that a killed process loses what it had of one. Pictures that cannot be read are named in their shard and
    have no record. Raises ValueError if the folder or a shard is of another cache, or a shard is damaged, and if a
    teacher's feature is not finite, with the picture's name.
    """
    folder = Path(folder)
    _begin(folder, index)
    own = range(rank, index.shards, processes)
    missing = [number for number in own if not shard_path(folder, number).is_file()]
    for number in sorted(set(own) - set(missing)):
        _read_table(shard_path(folder, number), index, number)
    yield sum(len(index.records_of(number)) for number in own) - sum(len(index.records_of(n)) for n in missing)
    shard = _Shard()
    groups = (group for number in missing for group in _groups(index.records_of(number), batch_size))
    for batch in ordered_batches(_Parts(index, samples), groups, workers):
        shard.add(batch, teacher, index.grid)
        yield len(batch["asked"])
        number, last = batch["asked"][-1] // index.records_per_shard, batch["asked"][-1]
        if last == index.records_of(number)[-1]:
            shard.write(shard_path(folder, number), index)
            shard = _Shard()


def _begin(folder: Path, index: CacheIndex) -> None:
    """Write the index, or check that it is this one. Of several processes each does so before it writes a shard."""
    folder.mkdir(parents=True, exist_ok=True)
    has_shards = any(folder.glob("features-*"))
    if (folder / INDEX).is_file():
        CacheIndex.read(folder).check_same(index, folder)
    elif has_shards:
        raise ValueError(f"{folder} holds features, but no {INDEX} that says whose; choose another folder")
    else:
        write_json(folder / INDEX, asdict(index))


def remove_leftovers(folder: str | Path) -> None:
    """Delete what killed processes left of shards; only while none is writing."""
    for path in Path(folder).glob(f"{PARTIAL}*-features-*"):
        path.unlink()


@dataclass(frozen=True)
class _Table:
    """What a shard says of its rows."""

    records: np.ndarray  # (n,) int64, ascending
    parts: np.ndarray  # (n, 7) int64
    checksums: np.ndarray | None  # (n,) int64, of the features; None in a shard of an earlier version
    image_ids: list[str]
    problems: dict[str, str]  # pictures that could not be read, by their number


def _read_table(path: Path, index: CacheIndex, number: int) -> _Table:
    """All of shard `number` but the features; ValueError if it is damaged, or a shard of another cache."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            own = metadata.get("index") == index.fingerprint
            table = _table(file, metadata, index, number) if own else None
    except (SafetensorError, ValueError, LookupError, TypeError, ArithmeticError, RuntimeError) as error:
        reason = str(error)[:200]
        raise ValueError(f"{path} is damaged: {reason}; delete it and give the command that makes it again") from None
    if table is None:
        raise ValueError(f"{path} is a shard of another cache; choose another folder, or delete what is in this one")
    return table


def _table(file: Any, metadata: dict[str, str], index: CacheIndex, number: int) -> _Table:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118 - it is no dict
    rows, cells = shapes["records"][0], index.grid[0] * index.grid[1]
    if shapes["features"] != (rows, cells, index.width) or shapes["parts"] != (rows, 7):
        raise ValueError(f"features of shape {shapes['features']}, expected {(rows, cells, index.width)}")
    if file.get_slice("features").get_dtype() != "F16":
        raise ValueError("its features are not float16")
    table = _Table(
        file.get_tensor("records").numpy(),
        file.get_tensor("parts").numpy(),
        file.get_tensor("checksums").numpy() if "checksums" in shapes else None,
        json.loads(metadata["image_ids"]),
        json.loads(metadata["problems"]),
    )
    if table.checksums is not None and metadata.get("table") != _table_checksum(table):
        raise ValueError("the checksum of its records is another")
    _check_records(table, index, number)
    return table


def _table_checksum(table: _Table) -> str:
    digest = hashlib.sha256()
    for column in (table.records, table.parts, table.checksums):
        digest.update(np.ascontiguousarray(column, np.int64).tobytes())
    digest.update(json.dumps([table.image_ids, table.problems]).encode())
    return digest.hexdigest()


def _check_records(table: _Table, index: CacheIndex, number: int) -> None:
    """ValueError unless a shard holds all records of its range but those of pictures that could not be read."""
    expected, records, views = index.records_of(number), table.records, max(index.crops, 1)
    if not isinstance(table.image_ids, list) or len(table.image_ids) != len(records):
        raise ValueError(f"it has not one name of a picture for each of its {len(records)} records")
    if not isinstance(table.problems, dict):
        raise ValueError("its list of unread pictures is none")
    unread = {int(picture) for picture in table.problems}
    without = sum(len(range(max(p * views, expected[0]), min((p + 1) * views, expected[-1] + 1))) for p in unread)
    inside = len(records) == 0 or (records[0] >= expected[0] and records[-1] <= expected[-1])
    ascending = records.dtype == np.int64 and bool((np.diff(records) > 0).all())
    complete = len(records) + without == len(expected) and not unread & set((records // views).tolist())
    if not (inside and ascending and complete):
        raise ValueError(f"its records are not those from {expected[0]} to {expected[-1]}")


def feature_checksum(features: torch.Tensor) -> int:
    """Of one record's features (h * w, C) float16."""
    return zlib.crc32(features.contiguous().numpy().tobytes())


def _groups(records: range, batch_size: int) -> list[range]:
    return [records[start : start + batch_size] for start in range(0, len(records), batch_size)]


def _present(folder: Path) -> set[int]:
    """Numbers of the shards that are there; an index may claim any number of them."""
    names = (re.fullmatch(r"features-([0-9]{6,18})\.safetensors", path.name) for path in folder.iterdir())
    return {int(name[1]) for name in names if name}


def shard_path(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"features-{number:06d}.safetensors"


class _Shard:
    """What is computed of a shard so far."""

    def __init__(self) -> None:
        self.features: list[torch.Tensor] = []
        self.records: list[int] = []
        self.parts: list[tuple[int, ...]] = []
        self.image_ids: list[str] = []
        self.problems: dict[str, str] = {}

    def add(self, batch: dict[str, Any], teacher: Teacher, grid: tuple[int, int]) -> None:
        self.problems |= batch["problems"]
        if batch["records"]:
            self.features.append(_half_features(teacher, batch, grid))
            self.records += batch["records"]
            self.parts += batch["parts"]
            self.image_ids += batch["image_ids"]

    def write(self, path: Path, index: CacheIndex) -> None:
        """Features (n, h * w, C) float16, their checksums (n,) int64, records (n,) int64, and parts (n, 7) int64:
        left, top, right, bottom, mirrored, and width and height of the picture; names of pictures, problems, the
        index's print and a checksum of all but the features as metadata.
        """
        empty = torch.zeros(0, index.grid[0] * index.grid[1], index.width, dtype=torch.float16)
        features = torch.cat([empty, *self.features])
        table = _Table(
            np.array(self.records, np.int64),
            np.array(self.parts, np.int64).reshape(-1, 7),
            np.array([feature_checksum(row) for row in features], np.int64),
            self.image_ids,
            self.problems,
        )
        names = {
            "index": index.fingerprint,
            "image_ids": json.dumps(self.image_ids),
            "problems": json.dumps(self.problems),
            "table": _table_checksum(table),
        }
        columns = {name: torch.from_numpy(getattr(table, name)) for name in ("records", "parts", "checksums")}
        write_file(path, lambda temporary: save_file({"features": features, **columns}, temporary, metadata=names))


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

    def __call__(self, records: Sequence[int]) -> dict[str, Any]:
        result: dict[str, Any] = {"asked": list(records), "problems": {}}
        result |= {name: [] for name in ("images", "records", "parts", "image_ids")}
        parts = groupby(records, lambda record: record // max(self.index.crops, 1))
        wanted = {number: list(own) for number, own in parts}
        for number, sample in self._read(list(wanted), result["problems"]):
            for record in wanted[number]:
                box, mirrored = self.index.part(record, sample["image"].size)
                result["images"].append(crop(sample["image"], box, self.index.resolution, mirrored))
                result["records"].append(record)
                result["parts"].append((*box, int(mirrored), *sample["image"].size))
                result["image_ids"].append(str(sample.get("image_id", number)))
        if result["images"]:
            result["images"] = torch.stack(result["images"])
        return result

    def _read(self, numbers: list[int], problems: dict[str, str]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Pictures by their numbers: all at once where that is cheaper, else one after the other, to hold only one."""
        if hasattr(self.samples, "__getitems__"):
            yield from zip(numbers, self.samples.__getitems__(numbers))
            return
        for number in numbers:
            try:
                yield number, self.samples[number]
            except (ValueError, OSError) as error:
                problems[str(number)] = str(error)


class FeatureCache:
    """A complete cache to read from; maps are read when they are asked for, and checked then.

    Raises FileNotFoundError if the folder is no cache, and ValueError if shards are missing, damaged or another one's.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = CacheIndex.read(folder)
        present = _present(self.folder)
        missing = self.index.shards - sum(number < self.index.shards for number in present)
        if missing:
            first = next(number for number in count() if number not in present)
            raise ValueError(
                f"cache {folder} is not complete: {missing} of {self.index.shards} shards are missing, the first "
                f"is {shard_path(self.folder, first).name}; {self._what_to_do()}"
            )
        self._problems: dict[str, str] = {}
        for number in range(self.index.shards):
            self._problems |= _read_table(shard_path(self.folder, number), self.index, number).problems

    def _what_to_do(self) -> str:
        writer = writer_of(self.folder)
        return "run the command that makes it again" if writer is None else f"it is in use by {writer}; wait for it"

    def features(self, record: int) -> torch.Tensor:
        """(h * w, C) float16; ValueError for a picture that could not be read, and for numbers that are damaged."""
        file, table, row = self._find(record)
        features = file.get_slice("features")[row]
        which = f"cache {self.folder}: features of record {record}, picture {table.image_ids[row]},"
        if table.checksums is not None and feature_checksum(features) != table.checksums[row]:
            raise ValueError(f"{which} are damaged: their checksum is another")
        if not features.isfinite().all():
            raise ValueError(f"{which} are not finite")
        return features

    def part(self, record: int, size: tuple[int, int]) -> tuple[Box, bool]:
        """The part that a record is of, and whether it is mirrored; ValueError unless the picture has this size."""
        _, table, row = self._find(record)
        *box, mirrored, width, height = table.parts[row].tolist()
        if (width, height) != size:
            raise ValueError(
                f"cache {self.folder}: picture {table.image_ids[row]} had {width} x {height} pixels when its features "
                f"were made, and has {size[0]} x {size[1]}"
            )
        return tuple(box), bool(mirrored)

    def _find(self, record: int) -> tuple[Any, _Table, int]:
        """The shard of a record, open, with its table and the record's row."""
        file, table = _open_shard(self.folder, self.index, record // self.index.records_per_shard)
        row = int(np.searchsorted(table.records, record))
        if row == len(table.records) or table.records[row] != record:
            raise ValueError(f"cache {self.folder} has no features of record {record}: its picture could not be read")
        return file, table, row

    def problems(self) -> dict[str, str]:
        """Pictures that could not be read, by their number."""
        return self._problems


@lru_cache(maxsize=HANDLES)
def _open_shard(folder: Path, index: CacheIndex, number: int) -> tuple[Any, _Table]:
    """A shard to read from, and its table."""
    path = shard_path(folder, number)
    table = _read_table(path, index, number)
    return safe_open(path, "pt").__enter__(), table


@dataclass(frozen=True)
class CachedSamples:
    """Pictures with their cached features: item i is a sample with "part", the function that gives a part of it.

    `part(generator, grid)` -> (box, mirrored, features (h * w, C) float32): one of the cached parts, or a fresh part
    and the features at its place. Raises ValueError if the pictures are not those of the cache, or `crops` not what
    its parts were drawn by.
    """

    samples: Sequence[dict[str, Any]]
    cache: FeatureCache
    crops: RandomCrop

    def __post_init__(self):
        index = self.cache.index
        own = replace(index, images=len(self.samples), pictures=self.samples.fingerprint())
        if index.crops:  # the parts that are there, and no others
            own = replace(own, crop=self.crops)
        index.check_same(own, self.cache.folder)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, number: int) -> dict[str, Any]:
        sample = self.samples[number]
        return {**sample, "part": _PartOf(self.cache, self.crops, number, sample["image"].size)}


@dataclass(frozen=True)
class _PartOf:
    cache: FeatureCache
    crops: RandomCrop
    number: int
    size: tuple[int, int]

    def __call__(self, generator: np.random.Generator, grid: tuple[int, int]) -> tuple[Box, bool, torch.Tensor]:
        index = self.cache.index
        if index.crops:
            record = self.number * index.crops + int(generator.integers(index.crops))
            return *self.cache.part(record, self.size), self.cache.features(record).float()
        self.cache.part(self.number, self.size)  # the picture is the one that the teacher saw
        box, mirrored = self.crops.draw(self.size, generator)
        maps = self.cache.features(self.number).T.unflatten(1, index.grid)
        return box, mirrored, part_of_map(maps, self.size, box, mirrored, grid)


def check_cache(
    folder: str | Path, samples: Sequence[dict[str, Any]], teacher: Teacher, count: int, seed: int = 0
) -> tuple[int, float]:
    """Compute up to `count` random records again: how many, and the largest absolute difference to what is stored.

    Raises ValueError if the cache is another teacher's or other pictures'.
    """
    cache = FeatureCache(folder)
    index = cache.index
    names = ("grid", "crops", "crop", "seed", "records_per_shard")
    index.check_same(describe(samples, teacher, **{name: getattr(index, name) for name in names}), folder)
    problems = cache.problems()
    good = [r for r in range(index.records) if str(r // max(index.crops, 1)) not in problems]
    chosen = np.random.default_rng(seed).permutation(good)[:count].tolist()
    largest = 0.0
    for record in chosen:
        batch = _Parts(index, samples)([record])
        if not batch["records"]:
            raise ValueError(f"record {record} cannot be computed again: {next(iter(batch['problems'].values()))}")
        again = teacher.features(batch["images"], index.grid)[0].cpu()
        largest = max(largest, (again - cache.features(record).float()).abs().max().item())
    return len(chosen), largest
