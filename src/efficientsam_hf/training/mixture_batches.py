# SPDX-License-Identifier: Apache-2.0
"""Pictures of several sources in one batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from ..data.mixture import Turns
from ..data.numbered_batches import numbered_batches
from ..data.pasting import PastedPictures
from ..data.scene_bank import SceneBank
from ..data.scenes import SceneBatch, render_scenes, scene_seed
from .mask_preparation import MaskPreparation
from .normalization import normalize
from .sample_batches import SampleRows, stack_rows
from .scene_batches import choose_objects
from .schedule import Stage


Skipped = list[tuple[str, str]]
ATTEMPTS = 16  # at a picture that is made, before there is no point in going on
NEXT_ATTEMPT = 2**40  # added to the number of a picture without an object to train on


class Source(Protocol):
    """Rows of one source: tensors by name of the pictures at some of its places, and what could not be used."""

    def rows(self, places: list[int], seed: int, size: int) -> tuple[list[dict[str, torch.Tensor]], Skipped]: ...


@dataclass(frozen=True)
class StoredSource:
    """Pictures that are stored, epoch after epoch, each in an order of its own."""

    samples: Sequence[dict[str, Any]]
    preparation: MaskPreparation

    def rows(self, places: list[int], seed: int, size: int) -> tuple[list[dict[str, torch.Tensor]], Skipped]:
        skipped: list[tuple[int, str]] = []
        source = SampleRows(self.samples, self.preparation)
        return [source.row(seed, place, size, skipped) for place in places], [(str(i), why) for i, why in skipped]


@dataclass(frozen=True)
class PastedSource:
    """Pictures that are made, each another one."""

    pictures: PastedPictures
    preparation: MaskPreparation

    def rows(self, places: list[int], seed: int, size: int) -> tuple[list[dict[str, torch.Tensor]], Skipped]:
        return [self._row(place, seed, size) for place in places], []

    def _row(self, place: int, seed: int, size: int) -> dict[str, torch.Tensor]:
        """ValueError if no picture of several has an object to train on."""
        pictures, generator = replace(self.pictures, seed=seed), np.random.default_rng((seed, place))
        for attempt in range(ATTEMPTS):
            try:
                return self.preparation(pictures.picture(place + attempt * NEXT_ATTEMPT, size), size, generator)
            except ValueError as error:
                reason = error
        raise ValueError(f"none of {ATTEMPTS} pasted pictures in a row could be used: {reason}")


@dataclass(frozen=True)
class SceneSource:
    """Generated scenes, each another one, rendered together on the bank's device."""

    bank: SceneBank
    objects: int
    min_area: float
    max_area: float

    def rows(self, places: list[int], seed: int, size: int) -> tuple[list[dict[str, torch.Tensor]], Skipped]:
        scenes = render_scenes(self.bank, places, seed=seed, image_size=size)
        rows = []
        for index, place in enumerate(places):  # one by one: a scene's objects depend on its place alone
            generator = torch.Generator(self.bank.device).manual_seed(scene_seed(seed, place))
            one = slice(index, index + 1)
            chosen, real = choose_objects(scenes.areas[one], self.objects, generator, self.min_area, self.max_area)
            alone = SceneBatch(*(part[one] for part in (scenes.images, scenes.segments, scenes.membership, scenes.areas)))
            rows.append(
                {
                    "pixel_values": normalize(scenes.images[one])[0],
                    "masks": (alone.masks(chosen) & real[..., None, None])[0],
                    "object_mask": real[0],
                }
            )
        return rows, []


@dataclass
class MixtureBatches:
    """Batches of several sources for one of `processes` processes; batch i depends on the fields and i alone.

    `sources` are (name, weight, source); `Turns` says whose turn it is at each position. A new stage begins every
    source anew. Batches lie on `device`, where scenes are rendered. Samples that cannot be used are handed to `report("name/sample", reason)`, once each.
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
        """Batch `number`: pixel_values (B, 3, H, W), masks (B, Q, H, W), object_mask (B, Q), source (B), seed ()."""
        seed = scene_seed(self.seed, round(stage.start * 1e6))  # a stage has an order and changes of its own
        first = (number * self.processes + self.rank) * stage.batch_size
        turns = Turns(tuple(weight for _, weight, _ in self.sources), seed)
        at = [turns.at(position) for position in range(first, first + stage.batch_size)]
        rows: list[dict[str, torch.Tensor]] = [{} for _ in at]
        skipped: Skipped = []
        for index, (name, _, source) in enumerate(self.sources):
            mine = [position for position, (turn, _) in enumerate(at) if turn == index]
            if not mine:
                continue
            made, unused = source.rows([at[k][1] for k in mine], scene_seed(seed, index + 1), stage.image_size)
            for k, row in zip(mine, made, strict=True):
                rows[k] = {key: tensor.to(self.device) for key, tensor in row.items()}
                rows[k]["source"] = torch.tensor(index, device=self.device)
            skipped += [(f"{name}/{sample}", reason) for sample, reason in unused]
        drawn = torch.tensor(scene_seed(seed, number * self.processes + self.rank))
        return {**stack_rows(rows), "seed": drawn, "skipped": skipped}
