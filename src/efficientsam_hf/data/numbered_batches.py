# SPDX-License-Identifier: Apache-2.0
"""Batches in order, made ahead in other processes or between the steps of training."""

import atexit
import multiprocessing
import signal
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler


def numbered_batches(make: Callable[[int], dict[str, Any]], start: int, workers: int) -> Iterator[dict[str, Any]]:
    """`make(start)`, `make(start + 1)`, ... without end; see `ordered_batches`.

    What batch i holds is decided by i alone, so that a resumed run sees what it would have seen.
    """
    return ordered_batches(make, count(start), workers)


def ordered_batches(make: Callable[[Any], dict[str, Any]], items: Iterable[Any], workers: int) -> Iterator[Any]:
    """`make(item)` for each item in their order, made ahead in `workers` processes, with 0 between steps.

    Items come from this process. ValueError and OSError of `make` arrive as they are, not wrapped in a worker's
    traceback.
    """
    if workers:
        atexit.unregister(_end_workers)
        atexit.register(_end_workers)
    ahead = {"num_workers": workers, "prefetch_factor": 2, "worker_init_fn": _outlive_sigterm} if workers else {}
    # With a generator of its own the loader leaves torch's alone, which a resumed run finds as it was.
    loader = DataLoader(_Made(make), sampler=_Items(items), batch_size=None, generator=torch.Generator(), **ahead)
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        yield batch


def _end_workers() -> None:
    """At exit the main process waits for workers that nobody told to end, such as those of a run that failed.

    It asks them by SIGTERM, to which they do not listen. Registered after it, this comes first.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would raise for each that ends now
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _outlive_sigterm(worker: int) -> None:
    """Batch systems and closed terminals signal every process; the main one needs its workers until it has saved.

    Workers end with the loader, which tells them, or with the main process, which they watch.
    """
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


class _Made(Dataset):
    def __init__(self, make: Callable[[Any], dict[str, Any]]):
        self.make = make

    def __getitem__(self, item: Any) -> dict[str, Any] | Exception:
        try:
            return self.make(item)
        except (ValueError, OSError) as error:
            return error


class _Items(Sampler):
    """What the loader asks for, in the place of indices."""

    def __init__(self, items: Iterable[Any]):
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)
