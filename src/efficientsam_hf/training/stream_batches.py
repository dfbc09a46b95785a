# SPDX-License-Identifier: Apache-2.0
"""Annotated pictures that can only be read one after the other, as training batches."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from ..data.scenes import scene_seed
from .mask_batches import MOST_SKIPPED
from .preparation import Preparation
from .schedule import Stage


@dataclass
class StreamBatches:
    """Batches of a `datasets.IterableDataset` for one of `processes` processes.

    `read(row)` makes a sample as `preparation` takes it, or raises ValueError or OSError; such rows are passed over
    and handed to `report(number of the row, reason)`. Each epoch is shuffled anew within a buffer of `shuffle_buffer`
    rows. Shards (tars, files) are split between processes and workers; there are no more workers than shards.

    A stream has no places to go to: batch `start` is reached by making all batches before it once more, so that a
    resumed run sees what it would have seen. That takes as long as reading and preparing them took at first.

    Raises ValueError if no row of the last 100 could be used, or none of an epoch.
    """

    dataset: Any
    read: Callable[[dict[str, Any]], dict[str, Any]]
    preparation: Preparation
    seed: int = 0
    shuffle_buffer: int = 256
    rank: int = 0
    processes: int = 1
    workers: int = 0
    report: Callable[[int, str], None] | None = None

    def __call__(self, start: int, stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from number `start` on, without end."""
        from datasets.distributed import split_dataset_by_node  # scenes train without this library

        own = split_dataset_by_node(self.dataset, rank=self.rank, world_size=self.processes)
        if self.shuffle_buffer > 1:
            own = own.shuffle(seed=self.seed, buffer_size=self.shuffle_buffer)
        rows = _Rows(own, self.read, self.preparation, stage, scene_seed(self.seed, self.rank))
        workers = min(self.workers, own.num_shards)
        loader = DataLoader(rows, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)
        for number, batch in enumerate(islice(loader, start, None), start):
            if isinstance(batch, Exception):
                raise batch
            for row, reason in batch.pop("skipped"):
                if self.report is not None:
                    self.report(row, reason)
            seed = torch.tensor(scene_seed(self.seed, number * self.processes + self.rank))
            yield {**batch, "seed": seed}


class _Rows(IterableDataset):
    """Batches of one worker; the data set itself gives every worker other shards."""

    def __init__(self, dataset: Any, read: Callable, preparation: Preparation, stage: Stage, seed: int):
        self.dataset, self.read, self.preparation = dataset, read, preparation
        self.stage, self.seed = stage, seed

    def __iter__(self) -> Iterator[dict[str, Any] | Exception]:
        try:
            yield from self._batches()
        except (ValueError, OSError) as error:  # as itself, not wrapped in a worker's traceback
            yield error

    def _batches(self) -> Iterator[dict[str, Any]]:
        rows: list[tuple[torch.Tensor, ...]] = []
        skipped: list[tuple[int, str]] = []
        for prepared, failures in self._prepared():
            rows.append(prepared)
            skipped += failures
            if len(rows) == self.stage.batch_size:
                pixels, masks, real = (torch.stack(parts) for parts in zip(*rows))
                yield {"pixel_values": pixels, "masks": masks, "object_mask": real, "skipped": skipped}
                rows, skipped = [], []

    def _prepared(self) -> Iterator[tuple[tuple[torch.Tensor, ...], list[tuple[int, str]]]]:
        """Prepared samples without end, each with the rows passed over before it and why."""
        worker = get_worker_info()
        place = worker.id if worker else 0
        number, failures = 0, []
        for epoch in count():
            self.dataset.set_epoch(epoch)
            used = 0
            for row in self.dataset:
                generator = np.random.default_rng((self.seed, place, number))
                try:
                    prepared = self.preparation(self.read(row), self.stage.image_size, generator)
                except (ValueError, OSError) as error:
                    failures.append((number, str(error)))
                    if len(failures) >= MOST_SKIPPED:
                        raise ValueError(f"none of {MOST_SKIPPED} rows in a row could be used; {error}") from error
                else:
                    yield prepared, failures
                    used, failures = used + 1, []
                number += 1
            if not used:
                reason = f"; the last: {failures[-1][1]}" if failures else ""
                raise ValueError(f"no row of the stream could be used{reason}")
