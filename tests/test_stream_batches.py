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
from efficientsam_hf.training.mask_preparation import MaskPreparation
from efficientsam_hf.training.schedule import Stage
from efficientsam_hf.training.stream_batches import StreamBatches


STAGE = Stage(0.0, 32, 2)
ROWS_READ: list[int] = []  # tones of all rows that streams of this process have read


@pytest.fixture(autouse=True)
def nothing_read() -> None:
    ROWS_READ.clear()


def rows(tones: list):
    """Each entry is a shard: one row, or a list of them."""
    for tone in tones:
        for one in tone if isinstance(tone, list) else [tone]:
            ROWS_READ.append(one)
            yield {"tone": one}


def rows_of_unlike_epochs(tones: list):
    """The rows of one shard, and all but two of them every second time."""
    yield from rows([tones[0][: -2 if ROWS_READ.count(0) % 2 else None]])


def read(row: dict[str, Any]) -> dict[str, Any]:
    """A picture of one tone with a square; odd hundreds are damaged."""
    if row["tone"] >= 100:
        raise ValueError(f"row of tone {row['tone']} is damaged")
    masks = np.zeros((1, 40, 40), bool)
    masks[0, 10:30, 12:28] = True
    return {"image": Image.new("RGB", (40, 40), (row["tone"],) * 3), "masks": masks}


def make(tones: list, augmentation: Augmentation | None = None, source: Any = rows, **options: Any) -> StreamBatches:
    processor = EfficientSamImageProcessor(size=32, do_normalize=False, antialias=True)
    stream = datasets.IterableDataset.from_generator(source, gen_kwargs={"tones": tones})
    preparation = MaskPreparation(processor, objects=2, augmentation=augmentation or Augmentation())
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
    assert tones(make([list(range(8))], shuffle_buffer=1), 8) == list(range(8)) * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_by_replay_with_any_number_of_workers(workers: int) -> None:
    augmentation = Augmentation(0.5, 0.5, 2.0)
    stream = make(list(range(6)), augmentation)(0, STAGE)
    through = [next(stream) for _ in range(5)][4]
    again = next(make(list(range(6)), augmentation, workers=workers)(4, STAGE))
    assert through.keys() == again.keys() == {"pixel_values", "masks", "object_mask", "seed"}
    assert all(torch.equal(through[name], again[name]) for name in through)


@pytest.mark.parametrize("shards", [8, 1])
def test_processes_share_the_rows(shards: int) -> None:
    groups = [list(range(8))] if shards == 1 else list(range(8))
    seen = [tone for rank in (0, 1) for tone in tones(make(groups, rank=rank, processes=2), 2)]
    assert sorted(seen) == list(range(8))


@pytest.mark.parametrize("buffer", [1, 4])
def test_a_start_in_a_later_epoch_passes_over_those_before_it(buffer: int) -> None:
    through = tones(make(list(range(6)), shuffle_buffer=buffer), 16)
    for start in range(16):
        ROWS_READ.clear()
        batches = make(list(range(6)), shuffle_buffer=buffer)
        assert tones(batches, 1, start) == through[2 * start : 2 * start + 2]
        assert len(ROWS_READ) <= (6 if start < 3 else 12)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("shards", [[list(range(7))], [0, [1, 2], [3, 4, 5], 6, 7]], ids=["one", "five"])
def test_parts_of_unlike_length_are_passed_over_alike(shards: list, rank: int) -> None:
    through = tones(make(shards, rank=rank, processes=2), 12)
    assert [tones(make(shards, rank=rank, processes=2), 1, start) for start in range(12)] == [
        through[2 * start : 2 * start + 2] for start in range(12)
    ]


def test_a_new_stage_reads_nothing_of_epochs_that_were_counted() -> None:
    batches, second = make(list(range(6))), Stage(0.5, 32, 2)
    tones(batches, 7)  # two epochs and more
    ROWS_READ.clear()
    stream = batches(9, second)
    again = next(stream)
    assert len(ROWS_READ) <= 6
    whole = make(list(range(6)))(0, second)
    expected = [next(whole) for _ in range(10)][9]
    assert all(torch.equal(again[name], expected[name]) for name in expected)


def test_epochs_of_unlike_length_are_not_passed_over() -> None:
    batches = make([list(range(7))], source=rows_of_unlike_epochs, shuffle_buffer=1)
    assert tones(batches, 7) == [*range(7), *range(5), 0, 1]
    stream = batches(6, STAGE)
    before = len(ROWS_READ)
    next(stream)
    assert len(ROWS_READ) - before == 5 + 7 + 2


def test_damaged_rows_are_padding_and_named() -> None:
    named = []
    batches = make([1, 100, 2, 101], report=lambda row, reason: named.append(reason), shuffle_buffer=1)
    stream = batches(0, STAGE)
    batch = next(stream)
    assert batch["object_mask"].any(1).tolist() == [True, False] and not batch["pixel_values"][1].any()
    assert named == ["row of tone 100 is damaged"]
    next(stream)
    assert named[1:] == ["row of tone 101 is damaged"]


def test_what_is_damaged_before_the_start_changes_nothing() -> None:
    through = make([100, 1, 2, 3])(0, STAGE)
    second = [next(through) for _ in range(2)][1]
    again = next(make([100, 1, 2, 3])(1, STAGE))
    assert all(torch.equal(second[name], again[name]) for name in second)


def test_an_order_of_its_own_for_each_stage() -> None:
    batches = make(list(range(8)))
    first, second = (
        [
            t
            for _, batch in zip(range(4), batches(0, Stage(start, 32, 2)))
            for t in batch["pixel_values"][:, 0, 16, 16].tolist()
        ]
        for start in (0.0, 0.5)
    )
    assert sorted(first) == sorted(second) and first != second


@pytest.mark.parametrize("workers", [0, 1])
def test_only_damaged_rows_are_an_error(workers: int) -> None:
    with pytest.raises(
        ValueError, match=r"^none of 100 rows in a row could be used; row \d+: row of tone 1\d\d is damaged$"
    ):
        for _ in make([100, 101, 102], workers=workers)(0, STAGE):
            pass


def test_an_empty_stream_is_an_error() -> None:
    with pytest.raises(ValueError, match="the stream is empty"):
        next(make([[]])(0, STAGE))
