# SPDX-License-Identifier: Apache-2.0
"""Generated scenes as training batches."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..data.numbered_batches import numbered_batches
from ..data.scene_bank import SceneBank
from ..data.scenes import render_scenes, scene_seed
from .crop_preparation import PATCH_SIZE, draw_noise
from .normalization import normalize
from .schedule import Stage


HELD_OUT = 1_000_003  # added to a seed for scenes to evaluate on, which no run with a small seed trains on
SIZE_LIMITS = (0.003, 0.01, 0.03, 0.1, 0.3)  # fractions of the image between which objects count as of like size


@dataclass(frozen=True)
class SceneBatches:
    """Batches of scenes for one of `processes` processes; batch i depends on (seed, i, rank, stage) alone.

    Scene numbers never repeat within a run: each batch owns a block of numbers as wide as the largest stage's batches
    on all processes. With `workers` the scenes are rendered ahead in processes of one thread each, and else between
    training steps, on the bank's device. With `masked_patches` a batch also decides what masked pretraining hides,
    scene by scene, so that this does not depend on how scenes are cut into batches.
    """

    bank: SceneBank
    stages: tuple[Stage, ...]
    seed: int = 0
    objects: int = 8
    min_area: float = 0.0005
    max_area: float = 0.9
    rank: int = 0
    processes: int = 1
    workers: int = 0
    masked_patches: bool = False

    def __call__(self, start: int, stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
        """Batches from number `start` on, without end."""
        return numbered_batches(partial(self.batch, stage=stage), start, self.workers)

    def batch(self, number: int, stage: Stage) -> dict[str, torch.Tensor]:
        """Batch `number`: pixel_values (B, 3, H, W), masks (B, Q, H, W), object_mask (B, Q), seed ().

        With `masked_patches` also noise (B, N).
        """
        device = self.bank.device
        width = max(stage.batch_size for stage in self.stages)
        first = (number * self.processes + self.rank) * width
        indices = torch.arange(first, first + stage.batch_size, device=device)
        scenes = render_scenes(self.bank, indices, seed=self.seed, image_size=stage.image_size)
        seed = scene_seed(self.seed, number * self.processes + self.rank)
        generator = torch.Generator(device).manual_seed(seed)
        objects, real = choose_objects(scenes.areas, self.objects, generator, self.min_area, self.max_area)
        batch = {
            "pixel_values": normalize(scenes.images),
            "masks": scenes.masks(objects) & real[..., None, None],
            "object_mask": real,
            "seed": torch.tensor(scene_seed(seed, 1)),
        }
        return batch | {"noise": self._noise(indices.tolist(), stage)} if self.masked_patches else batch

    def _noise(self, scenes: list[int], stage: Stage) -> torch.Tensor:
        patches = (stage.image_size // PATCH_SIZE) ** 2
        rows = [draw_noise(patches, np.random.default_rng((self.seed, scene))) for scene in scenes]
        return torch.stack(rows).to(self.bank.device)


def scene_samples(
    count: int, seed: int, image_size: int, objects: int = 8, min_area: float = 0.004, max_area: float = 0.9
) -> list[dict[str, Any]]:
    """The first `count` scenes of a seed as {"image": PIL RGB, "masks": (N, H, W) bool array}, for evaluation.

    Up to `objects` objects each, drawn as in training; scenes without a fitting object are left out.
    """
    bank = SceneBank.build(seed=0, device="cpu")
    samples = []
    for index in range(count):
        scene = render_scenes(bank, torch.tensor([index]), seed=seed, image_size=image_size)
        generator = torch.Generator().manual_seed(scene_seed(seed, index))
        chosen, real = choose_objects(scene.areas, objects, generator, min_area, max_area)
        masks = scene.masks(chosen)[0][real[0]]
        image = (scene.images[0] * 255).round().byte().permute(1, 2, 0).numpy()
        if len(masks):
            samples.append({"image": Image.fromarray(image), "masks": masks.numpy()})
    return samples


def choose_objects(
    areas: torch.Tensor, count: int, generator: torch.Generator, min_area: float, max_area: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw up to `count` different objects per scene: areas (B, K) -> indices (B, count), which are real (B, count).

    Objects are weighted against the number of objects of like size in their scene, so that a few large ones are drawn
    as readily as many small ones. Where a scene has too few objects of fitting area the rest is padding, at the end.
    """
    usable = (areas >= min_area) & (areas <= max_area) & (areas > 0)
    group = torch.bucketize(areas.contiguous(), torch.tensor(SIZE_LIMITS, device=areas.device))
    alike = (group[:, :, None] == group[:, None, :]) & usable[:, None, :]
    weight = 1.0 / alike.sum(-1).clamp(min=1)
    # Adding Gumbel noise to log weights and taking the largest draws without replacement.
    noise = torch.rand(areas.shape, generator=generator, device=areas.device).clamp(1e-9, 1 - 1e-7)
    key = torch.where(usable, weight.log() - (-noise.log()).log(), -torch.inf)
    missing = count - areas.shape[1]
    if missing > 0:
        key = torch.cat([key, key.new_full((len(key), missing), -torch.inf)], 1)
    values, indices = key.topk(count, dim=1)
    real = values > -torch.inf
    return torch.where(real, indices, 0), real
