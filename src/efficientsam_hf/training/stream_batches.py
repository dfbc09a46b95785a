# SPDX-License-Identifier: Apache-2.0
"""Pictures that can only be read one after the other, as training batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count, islice
from typing import Any

import numpy as np
import torch

from ..data.numbered_batches import ordered_batches
from ..data.scenes import scene_seed
from .sample_batches import MOST_SKIPPED, stack_rows
from .schedule import Stage


@dataclass
class StreamBatches:
    """Batches of a `datasets.IterableDataset` for one of `processes` processes.

    `read(row)` makes a sample as `preparation` takes it, or raises ValueError or OSError: such a row's place in its
    batch is taken by `preparation.stand_in(side, good rows)`, and it is handed to `report(number of the row, reason)`.
    Each epoch is shuffled anew within a buffer of `shuffle_buffer` rows. Shards (tars, files) are split between the
    processes; with fewer shards than processes each process reads everything and keeps its part. Rows are read in this
    process, `workers` processes make samples of them, and their number changes nothing.

    A stream has no places to go to: to begin with batch `start`, as a new stage and a resumed run do, rows before it
    are read once more, though not decoded. Whole epochs are passed over unread as soon as one has been read to its end
    and its rows are counted, so a start costs up to one epoch of reading, and up to two where none was counted yet.
    That takes every epoch to hold as many rows, as files and tars do; once two that were counted differ, all are read.

    Raises ValueError if the last 100 rows could not be used, or if the stream is empty.
    """

    dataset: Any
    read: Callable[[dict[str, Any]], dict[str, Any]]
    preparation: Any
    seed: int = 0
    shuffle_buffer: int = 256
    rank: int = 0
    processes: int = 1
    workers: int = 0
    report: Callable[[int, str], None] | None = None
    _counted: int | None = field(default=None, init=False, repr=False, compare=False)  # 0: epochs differ

    def __call__(self, start: int, stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from number `start` on, without end."""
        seed = scene_seed(self.seed, round(stage.start * 1e6))  # a stage has an order and changes of its own
        make = _MakeBatch(self.read, self.preparation, stage.image_size, scene_seed(seed, self.rank))
        rows = self._rows(seed, start * stage.batch_size)
        items = ((number, list(islice(rows, stage.batch_size))) for number in count(start))
        unusable = 0
        for batch in ordered_batches(make, items, self.workers):
            skipped = batch.pop("skipped")
            for row, reason in skipped:
                if self.report is not None:
                    self.report(row, reason)
            unusable = unusable + stage.batch_size if len(skipped) == stage.batch_size else 0
            if unusable >= MOST_SKIPPED:
                raise ValueError(f"none of {unusable} rows in a row could be used; row {row}: {reason}")
            yield batch

    def _rows(self, seed: int, start: int) -> Iterator[dict[str, Any]]:
        """This process's rows from number `start` on, epoch after epoch."""
        own = self._own_part(seed)
        for epoch in count():
            if self._counted and start >= self._counted:
                start -= self._counted
                continue
            own.set_epoch(epoch)
            number = 0
            for number, row in enumerate(own, 1):
                if number > start:
                    yield row
            self._note_epoch(number)
            start = max(0, start - number)

    def _own_part(self, seed: int) -> Any:
        """The rows of this process as a data set, which shuffles each epoch anew."""
        from datasets.distributed import split_dataset_by_node  # scenes train without this library

        if self.dataset.num_shards >= self.processes:
            own = self.dataset.shard(num_shards=self.processes, index=self.rank, contiguous=False)
        else:
            own = split_dataset_by_node(self.dataset, rank=self.rank, world_size=self.processes)
        if self.shuffle_buffer > 1:
            own = own.shuffle(seed=seed % 2**32, buffer_size=self.shuffle_buffer)
        return own

    def _note_epoch(self, rows: int) -> None:
        """Keep the number of rows of an epoch that was read to its end; `ValueError` if it has none."""
        if rows == 0:
            raise ValueError("the stream is empty: there is no row to train on")
        self._counted = rows if self._counted in (None, rows) else 0


@dataclass(frozen=True)
class _MakeBatch:
    """(number of the batch, its rows) -> the batch."""

    read: Callable[[dict[str, Any]], dict[str, Any]]
    preparation: Any
    size: int
    seed: int

    def __call__(self, item: tuple[int, list[dict[str, Any]]]) -> dict[str, Any]:
        number, rows = item
        skipped: list[tuple[int, str]] = []
        good: dict[int, dict[str, torch.Tensor]] = {}
        for position, row in enumerate(rows, number * len(rows)):
            generator = np.random.default_rng((self.seed, position))
            try:
                good[position] = self.preparation(self.read(row), self.size, generator)
            except (ValueError, OSError) as error:
                skipped.append((position, str(error)))
        whole = list(good.values())
        every = good | {position: self.preparation.stand_in(self.size, whole) for position, _ in skipped}
        samples = [every[position] for position in sorted(every)]
        return {**stack_rows(samples), "seed": torch.tensor(scene_seed(self.seed, number)), "skipped": skipped}
