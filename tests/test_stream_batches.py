# SPDX-License-Identifier: Apache-2.0
"""Streams as training batches: order, shards, repetition by replay, and rows that cannot be used."""

from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf import EfficientSamImageProcessor
from efficientsam_hf.data.augmentation import Augmentation
from efficientsam_hf.training.preparation import Preparation
from efficientsam_hf.training.schedule import Stage
from efficientsam_hf.training.stream_batches import StreamBatches


STAGE = Stage(0.0, 32, 2)


def rows(tones: list[int]):
    for tone in tones:
        yield {"tone": tone}


def read(row: dict[str, Any]) -> dict[str, Any]:
    """A picture of one tone with a square; odd hundreds are damaged."""
    if row["tone"] >= 100:
        raise ValueError(f"row of tone {row['tone']} is damaged")
    masks = np.zeros((1, 40, 40), bool)
    masks[0, 10:30, 12:28] = True
    return {"image": Image.new("RGB", (40, 40), (row["tone"],) * 3), "masks": masks}


def make(tones: list[int], augmentation: Augmentation | None = None, **options: Any) -> StreamBatches:
    processor = EfficientSamImageProcessor(size=32, do_normalize=False, antialias=True)
    stream = datasets.IterableDataset.from_generator(rows, gen_kwargs={"tones": tones})
    preparation = Preparation(processor, objects=2, augmentation=augmentation or Augmentation())
    return StreamBatches(stream, read, preparation, **{"shuffle_buffer": 4, **options})


def tones(batches: StreamBatches, count: int, start: int = 0) -> list[int]:
    stream = batches(start, STAGE)
    return [
        tone
        for _ in range(count)
        for tone in (next(stream)["pixel_values"][:, 0, 16, 16] * 255).round().int().tolist()
    ]


def test_an_epoch_holds_every_row_once_and_is_shuffled_anew() -> None:
    seen = tones(make(list(range(8))), 8)
    assert sorted(seen[:8]) == sorted(seen[8:]) == list(range(8))
    assert seen[:8] != seen[8:] and seen[:8] != list(range(8))
    assert tones(make(list(range(8)), shuffle_buffer=1), 4) == list(range(8))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_by_replay(workers: int) -> None:
    options = {"augmentation": Augmentation(0.5, 0.5, 2.0), "workers": workers}
    stream = make(list(range(6)), **options)(0, STAGE)
    through = [next(stream) for _ in range(5)][4]
    again = next(make(list(range(6)), **options)(4, STAGE))
    assert through.keys() == again.keys() == {"pixel_values", "masks", "object_mask", "seed"}
    assert all(torch.equal(through[name], again[name]) for name in through)


def test_processes_and_workers_share_the_shards() -> None:
    seen = [tone for rank in (0, 1) for tone in tones(make(list(range(8)), rank=rank, processes=2), 2)]
    assert sorted(seen) == list(range(8))
    # One shard for each process: the other workers would have nothing.
    assert [tones(make([3, 4], rank=rank, processes=2, workers=5), 1) for rank in (0, 1)] == [[3, 3], [4, 4]]


def test_damaged_rows_are_passed_over_and_named() -> None:
    named = []
    batches = make([1, 100, 2, 101], report=lambda row, reason: named.append(reason))
    assert set(tones(batches, 4)) == {1, 2}
    assert {"row of tone 100 is damaged", "row of tone 101 is damaged"} == set(named)


@pytest.mark.parametrize("workers", [0, 1])
def test_only_damaged_rows_are_an_error(workers: int) -> None:
    with pytest.raises(
        ValueError, match=r"^no row of the stream could be used; the last: row of tone 1\d\d is damaged$"
    ):
        next(make([100, 101, 102], workers=workers)(0, STAGE))
    with pytest.raises(ValueError, match=r"^none of 100 rows in a row could be used; row of tone"):
        next(make(list(range(100, 250)), workers=workers)(0, STAGE))
