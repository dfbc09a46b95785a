# SPDX-License-Identifier: Apache-2.0
"""Pictures that can be read in any order, as training batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch

from ..data.numbered_batches import numbered_batches
from ..data.scenes import scene_seed
from .schedule import Stage


# (sample, side in pixels, generator) -> its tensors by name; ValueError or OSError for one that cannot be used.
Preparation = Callable[[dict[str, Any], int, np.random.Generator], dict[str, torch.Tensor]]
MOST_SKIPPED = 100  # unusable samples in a row after which there is no point in going on


@dataclass(frozen=True)
class SampleRows:
    """Tensors of one picture at a time, of samples that can be read in any order."""

    samples: Sequence[dict[str, Any]]
    preparation: Preparation

    def row(self, seed: int, position: int, size: int, skipped: list[tuple[int, str]]) -> dict[str, torch.Tensor]:
        """Tensors of the sample at a position of the seed's order, which is another one in every epoch.

        The one after it in that order stands in for a sample that cannot be used, whose (index, reason) is appended to
        `skipped`. Raises ValueError if none of 100 in a row (or of all, if they are fewer) could be used.
        """
        count = len(self.samples)
        epoch, place = divmod(position, count)
        order, most = _order(count, seed, epoch), min(count, MOST_SKIPPED)
        generator = np.random.default_rng((seed, position))
        for index in (int(order[(place + step) % count]) for step in range(most)):
            try:
                return self.preparation(self.samples[index], size, generator)
            except (ValueError, OSError) as error:
                skipped.append((index, str(error)))
        raise ValueError(
            f"none of {most} training samples in a row could be used; sample {skipped[-1][0]}: {skipped[-1][1]}"
        )


@dataclass
class SampleBatches:
    """Batches of pictures for one of `processes` processes; batch i depends on the fields and i alone.

    `samples[i]` is what `preparation` takes, and its tensors are stacked under the names it gives them. Every epoch
    goes through all samples in an order of its own; a new stage begins a new one. A sample that cannot be read, or
    without an object to train on, is replaced by the next one and handed to `report(index, reason)`, once for each
    index.

    Raises ValueError if no sample of the last 100 (or of all, if they are fewer) could be used.
    """

    samples: Sequence[dict[str, Any]]
    preparation: Preparation
    seed: int = 0
    rank: int = 0
    processes: int = 1
    workers: int = 0
    report: Callable[[int, str], None] | None = None
    _named: set[int] = field(default_factory=set, init=False, repr=False, compare=False)

    def __call__(self, start: int, stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from number `start` on, without end."""
        make = partial(replace(self, report=None).batch, stage=stage)  # workers get no callback
        for batch in numbered_batches(make, start, self.workers):
            for index, reason in batch.pop("skipped"):
                if index not in self._named and self.report is not None:
                    self.report(index, reason)
                self._named.add(index)
            yield batch

    def batch(self, number: int, stage: Stage) -> dict[str, Any]:
        """Batch `number`: what `preparation` gives, with B in front, seed (), and skipped, a list."""
        seed = scene_seed(self.seed, round(stage.start * 1e6))  # a stage has an order and changes of its own
        first = (number * self.processes + self.rank) * stage.batch_size
        skipped: list[tuple[int, str]] = []
        source = SampleRows(self.samples, self.preparation)
        rows = [
            source.row(seed, position, stage.image_size, skipped)
            for position in range(first, first + stage.batch_size)
        ]
        drawn = torch.tensor(scene_seed(seed, number * self.processes + self.rank))
        return {**stack_rows(rows), "seed": drawn, "skipped": skipped}


def stack_rows(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Tensors of several samples as those of a batch."""
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


@lru_cache(maxsize=16)  # sources of a mixture take turns
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the samples in an epoch, (count,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(count)
