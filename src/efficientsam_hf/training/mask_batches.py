# SPDX-License-Identifier: Apache-2.0
"""Annotated pictures as training batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ..data.augmentation import Augmentation
from ..data.scenes import scene_seed
from .numbered_batches import numbered_batches
from .schedule import Stage


MOST_SKIPPED = 100  # unusable samples in a row after which there is no point in going on


@dataclass
class MaskBatches:
    """Batches of annotated pictures for one of `processes` processes; batch i depends on the fields and i alone.

    `samples[i]` is {"image": RGB PIL image, "masks": (N, H, W) bool array}. Every epoch goes through all samples in an
    order of its own; a new stage begins a new one. Pictures and masks are stretched to the stage's square as
    `image_processor` does it. Objects that cover less than `min_area` or more than `max_area` of the picture are left
    out; of the others up to `objects` are drawn; a random change that would leave none is not made. A sample that
    cannot be read, or without an object to train on, is replaced by the next one and handed to
    `report(index, reason)`, once for each index.

    Raises ValueError if no sample of the last 100 (or of all, if they are fewer) could be used.
    """

    samples: Sequence[dict[str, Any]]
    image_processor: Any
    seed: int = 0
    objects: int = 8
    min_area: float = 0.0
    max_area: float = 0.9
    augmentation: Augmentation = field(default_factory=Augmentation)
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
        """Batch `number`: pixel_values (B, 3, H, W), masks (B, Q, H, W), object_mask (B, Q), seed (), skipped."""
        seed = scene_seed(self.seed, round(stage.start * 1e6))  # a stage has an order and changes of its own
        first = (number * self.processes + self.rank) * stage.batch_size
        skipped: list[tuple[int, str]] = []
        rows = [
            self._row(seed, position, stage.image_size, skipped) for position in range(first, first + stage.batch_size)
        ]
        pixels, masks, real = (torch.stack(parts) for parts in zip(*rows))
        prompts = torch.tensor(scene_seed(seed, number * self.processes + self.rank))
        return {"pixel_values": pixels, "masks": masks, "object_mask": real, "seed": prompts, "skipped": skipped}

    def _row(self, seed: int, position: int, size: int, skipped: list[tuple[int, str]]) -> tuple[torch.Tensor, ...]:
        """pixel_values (3, H, W), masks (Q, H, W), object_mask (Q) of the sample at a place of the stage's order.

        Samples after it in that order stand in for one that cannot be used.
        """
        count = len(self.samples)
        epoch, place = divmod(position, count)
        order, most = _order(count, seed, epoch), min(count, MOST_SKIPPED)
        generator = np.random.default_rng((seed, position))
        for index in (int(order[(place + step) % count]) for step in range(most)):
            try:
                return self._prepare(self._read(index), size, generator)
            except (ValueError, OSError) as error:
                skipped.append((index, str(error)))
        raise ValueError(
            f"none of {most} training samples in a row could be used; sample {skipped[-1][0]}: {skipped[-1][1]}"
        )

    def _read(self, index: int) -> dict[str, Any]:
        """A sample with at least one object to train on, or `ValueError`."""
        sample = self.samples[index]
        image, masks = sample["image"], sample["masks"]
        if masks.dtype != bool or masks.ndim != 3 or masks.shape[1:] != (image.height, image.width):
            raise ValueError(
                f"masks must be bool of shape (N, {image.height}, {image.width}) like their picture, "
                f"got {masks.dtype} of shape {masks.shape}"
            )
        if not len(self._usable(masks)):
            name = sample.get("image_id", index)
            raise ValueError(
                f"picture {name}: none of {len(masks)} objects covers {self.min_area} to {self.max_area} of it"
            )
        return sample

    def _usable(self, masks: np.ndarray) -> np.ndarray:
        """Indices of the objects of fitting size."""
        shares = np.count_nonzero(masks, axis=(1, 2)) / masks[0].size if len(masks) else np.zeros(0)
        return np.flatnonzero((shares > 0) & (shares >= self.min_area) & (shares <= self.max_area))

    def _prepare(self, sample: dict[str, Any], size: int, generator: np.random.Generator) -> tuple[torch.Tensor, ...]:
        """Changed, unless no object would be left, and stretched."""
        changed = self.augmentation(sample, generator)
        if not len(self._usable(changed["masks"])):
            changed = sample
        image, masks = changed["image"], changed["masks"]
        chosen = generator.permutation(self._usable(masks))[: self.objects]
        stretched = stretch_masks(torch.from_numpy(np.ascontiguousarray(masks[chosen])), size)
        pixels = self.image_processor(images=image, size=size, return_tensors="pt")["pixel_values"][0]
        missing = self.objects - len(stretched)
        real = torch.arange(self.objects) < len(stretched)
        return pixels, F.pad(stretched, (0, 0, 0, 0, 0, missing)), real


def stretch_masks(masks: torch.Tensor, size: int) -> torch.Tensor:
    """Masks at another resolution: (N, H, W) bool -> (N, size, size) bool, pixels of which half or more is covered.

    A mask too thin to cover half of any pixel keeps those it covers most; none becomes empty.
    """
    stretched = masks.new_empty(len(masks), size, size)
    for index, mask in enumerate(masks):  # one by one: 64 large masks as floats would be a gigabyte
        covered = F.interpolate(mask[None, None].float(), (size, size), mode="area")[0, 0]
        torch.logical_and(covered >= covered.amax().clamp(max=0.5), covered > 0, out=stretched[index])
    return stretched


@lru_cache(maxsize=2)
def _order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the samples in an epoch, (count,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(count)
