# SPDX-License-Identifier: Apache-2.0
"""Pictures of several sources in one batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from ..data.mixture import MixtureSource, Turns
from ..data.numbered_batches import numbered_batches
from ..data.pasting import PastedPictures
from ..data.scene_bank import SceneBank
from ..data.scenes import SceneBatch, render_scenes, scene_seed
from .finetune_arguments import FinetuneArguments
from .mask_preparation import MaskPreparation
from .normalization import normalize
from .sample_batches import SampleRows, stack_rows
from .scene_batches import choose_objects
from .schedule import Stage


Rows = list[dict[str, torch.Tensor]]
Skipped = list[tuple[str, str]]
ATTEMPTS = 16  # at a pasted picture, after which there is no point in going on
NEXT_ATTEMPT = 2**40  # added to the number of a pasted picture without an object to train on


class Source(Protocol):
    """Where rows of a batch come from."""

    def rows(self, places: list[int], seed: int, size: int) -> tuple[Rows, Skipped]:
        """Tensors of its pictures with these numbers, (sample, reason) of those that others stand in for.

        A row depends on its number, the seed and the size alone. Raises ValueError where there is none to use.
        """
        ...


@dataclass(frozen=True)
class StoredSource:
    """Stored pictures, epoch after epoch, each in an order of its own."""

    samples: Sequence[dict[str, Any]]
    preparation: MaskPreparation

    def rows(self, places: list[int], seed: int, size: int) -> tuple[Rows, Skipped]:
        skipped: list[tuple[int, str]] = []
        source = SampleRows(self.samples, self.preparation)
        rows = [source.row(seed, place, size, skipped) for place in places]
        return rows, [(str(index), reason) for index, reason in skipped]


@dataclass(frozen=True)
class PastedSource:
    """Pasted pictures, of which none comes twice."""

    pictures: PastedPictures
    preparation: MaskPreparation

    def rows(self, places: list[int], seed: int, size: int) -> tuple[Rows, Skipped]:
        return [self._row(place, seed, size) for place in places], []

    def _row(self, place: int, seed: int, size: int) -> dict[str, torch.Tensor]:
        """ValueError if none of several pictures has an object to train on."""
        pictures, generator = replace(self.pictures, seed=seed), np.random.default_rng((seed, place))
        for attempt in range(ATTEMPTS):
            try:
                return self.preparation(pictures.picture(place + attempt * NEXT_ATTEMPT, size), size, generator)
            except ValueError as error:
                reason = error
        raise ValueError(f"none of {ATTEMPTS} pasted pictures in a row could be used: {reason}")


@dataclass(frozen=True)
class SceneSource:
    """Generated scenes, of which none comes twice, rendered together on the bank's device."""

    bank: SceneBank
    objects: int
    min_area: float
    max_area: float

    def rows(self, places: list[int], seed: int, size: int) -> tuple[Rows, Skipped]:
        scenes = render_scenes(self.bank, places, seed=seed, image_size=size)
        return [self._row(_one_of(scenes, index), scene_seed(seed, place)) for index, place in enumerate(places)], []

    def _row(self, scene: SceneBatch, seed: int) -> dict[str, torch.Tensor]:
        """Of a scene alone, so that which objects are drawn does not depend on those beside it in a batch."""
        generator = torch.Generator(self.bank.device).manual_seed(seed)
        chosen, real = choose_objects(scene.areas, self.objects, generator, self.min_area, self.max_area)
        masks = scene.masks(chosen) & real[..., None, None]
        return {"pixel_values": normalize(scene.images)[0], "masks": masks[0], "object_mask": real[0]}


def _one_of(scenes: SceneBatch, index: int) -> SceneBatch:
    parts = (scenes.images, scenes.segments, scenes.membership, scenes.areas)
    return SceneBatch(*(part[index : index + 1] for part in parts))


def mixture_sources(
    arguments: FinetuneArguments, opened: Sequence[Any], image_processor: Any, device: torch.device | str
) -> list[tuple[str, float, Source]]:
    """(name, weight, source) of each source of a run's mixture, given what `open_sources` made of it."""
    mixture, objects = arguments.mixture(), arguments.objects_per_image
    bank = SceneBank.build(seed=0, device=device) if any(source.scenes for source in mixture) else None

    def rows_of(source: MixtureSource, samples: Any) -> Source:
        areas = arguments.object_areas(source)
        if source.scenes:
            return SceneSource(bank, objects, *areas)
        change = arguments.augmentation(source)
        preparation = MaskPreparation(image_processor, objects, *areas, augmentation=change)
        return (PastedSource if source.endless else StoredSource)(samples, preparation)

    rows = [rows_of(source, samples) for source, samples in zip(mixture, opened, strict=True)]
    return [(source.name, source.weight, own) for source, own in zip(mixture, rows)]


@dataclass
class MixtureBatches:
    """Batches of several sources for one of `processes` processes; batch i depends on the fields and i alone.

    `sources` are (name, weight, source), and `Turns` says which of them has its turn at each position. Every stage has
    orders and changes of its own. Batches lie on `device`, where scenes are rendered. Samples that cannot be used are
    handed to `report("name/sample", reason)`, once each. Raises ValueError that names a source of which none of many
    samples could be used.
    """

    sources: Sequence[tuple[str, float, Source]]
    device: torch.device | str = "cpu"
    seed: int = 0
    rank: int = 0
    processes: int = 1
    workers: int = 0
    report: Callable[[str, str], None] | None = None
    _named: set[str] = field(default_factory=set, init=False, repr=False, compare=False)

    def __call__(self, start: int, stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from number `start` on, without end."""
        make = partial(replace(self, report=None).batch, stage=stage)  # workers get no callback
        for batch in numbered_batches(make, start, self.workers):
            for name, reason in batch.pop("skipped"):
                if name not in self._named and self.report is not None:
                    self.report(name, reason)
                self._named.add(name)
            yield batch

    def batch(self, number: int, stage: Stage) -> dict[str, Any]:
        """Batch `number`: pixel_values (B, 3, H, W), masks (B, Q, H, W), object_mask (B, Q), source (B), seed ().

        "source" is the index in `sources` of each picture's; "skipped" lists (name, reason).
        """
        seed = scene_seed(self.seed, round(stage.start * 1e6))
        first = (number * self.processes + self.rank) * stage.batch_size
        turns = Turns(tuple(weight for _, weight, _ in self.sources), seed)
        at = [turns.at(position) for position in range(first, first + stage.batch_size)]
        rows: Rows = [{} for _ in at]
        skipped: Skipped = []
        for index in sorted({source for source, _ in at}):
            mine = [position for position, (source, _) in enumerate(at) if source == index]
            made, unused = self._rows(index, [at[k][1] for k in mine], scene_seed(seed, index + 1), stage.image_size)
            for k, row in zip(mine, made, strict=True):
                rows[k] = {name: tensor.to(self.device) for name, tensor in row.items()}
            skipped += unused
        source = torch.tensor([source for source, _ in at]).to(self.device)
        drawn = torch.tensor(scene_seed(seed, number * self.processes + self.rank))
        return {**stack_rows(rows), "source": source, "seed": drawn, "skipped": skipped}

    def _rows(self, index: int, places: list[int], seed: int, size: int) -> tuple[Rows, Skipped]:
        """Rows of a source, with its name before samples and errors."""
        name, _, source = self.sources[index]
        try:
            rows, skipped = source.rows(places, seed, size)
        except ValueError as error:
            raise ValueError(f"source {name!r}: {error}") from error
        return rows, [(f"{name}/{sample}", reason) for sample, reason in skipped]
