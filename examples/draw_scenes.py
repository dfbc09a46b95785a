# SPDX-License-Identifier: Apache-2.0
"""Draws a sheet of consecutive generated scenes; with --masks, their objects' outlines in colour beside them.

Usage: python examples/draw_scenes.py OUT.png [--first N] [--count N] [--seed N] [--size PIXELS] [--masks]
"""

import argparse
import math
from pathlib import Path

import torch
from PIL import Image

from efficientsam_hf.data.scene_bank import SceneBank
from efficientsam_hf.data.scenes import SceneBatch, render_scenes


def segment_colours(batch: SceneBatch) -> torch.Tensor:
    """Every visible layer in a colour of its own, mixed with the picture: (B, 3, H, W)."""
    colours = torch.rand(batch.membership.shape[-1], 3, generator=torch.Generator().manual_seed(0))
    return 0.7 * colours[batch.segments.long()].permute(0, 3, 1, 2) + 0.3 * batch.images


def sheet(pictures: torch.Tensor, columns: int) -> Image.Image:
    """Pictures (N, 3, H, W) in [0, 1] in rows of `columns`."""
    height, width = pictures.shape[2:]
    result = Image.new("RGB", (columns * width, math.ceil(len(pictures) / columns) * height))
    for index, picture in enumerate((pictures * 255).round().byte().permute(0, 2, 3, 1)):
        place = (index % columns * width, index // columns * height)
        result.paste(Image.fromarray(picture.numpy()), place)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    for name, default in (("first", 0), ("count", 64), ("seed", 0), ("size", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--masks", action="store_true")
    arguments = parser.parse_args()
    scenes = range(arguments.first, arguments.first + arguments.count)
    batch = render_scenes(SceneBank.build(), scenes, arguments.seed, arguments.size)
    pictures = batch.images
    if arguments.masks:
        pictures = torch.stack([pictures, segment_colours(batch)], dim=1).flatten(0, 1)
    sheet(pictures, columns=8).save(arguments.output)
    usable = (batch.areas > 0).sum(1).float()
    print(f"{len(scenes)} scenes, {usable.mean():.1f} objects each, in {arguments.output}")


if __name__ == "__main__":
    main()
