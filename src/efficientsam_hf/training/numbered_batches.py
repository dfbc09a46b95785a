# SPDX-License-Identifier: Apache-2.0
"""Batches by number: what batch i holds is decided by i alone, so that a resumed run sees what it would have seen."""

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, Sampler


def numbered_batches(make: Callable[[int], dict[str, Any]], start: int, workers: int) -> Iterator[dict[str, Any]]:
    """`make(start)`, `make(start + 1)`, ... without end, made ahead in `workers` processes, with 0 between steps.

    ValueError and OSError of `make` arrive as they are, not wrapped in a worker's traceback.
    """
    loader = DataLoader(
        _Numbered(make),
        sampler=_Counting(start),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
    )
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


class _Numbered(Dataset):
    def __init__(self, make: Callable[[int], dict[str, Any]]):
        self.make = make

    def __getitem__(self, number: int) -> dict[str, Any] | Exception:
        try:
            return self.make(number)
        except (ValueError, OSError) as error:
            return error


class _Counting(Sampler):
    """start, start + 1, ... without end."""

    def __init__(self, start: int):
        self.start = start

    def __iter__(self) -> Iterator[int]:
        number = self.start
        while True:
            yield number
            number += 1
