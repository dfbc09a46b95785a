# SPDX-License-Identifier: Apache-2.0
"""Segment everything in a picture of many megapixels, tile by tile: time, memory, and what the seams cost.

Usage: python benchmarks/tiles.py [--side 12000] [--scene 1000] [--tile 1024] [--overlap 128] [--grid 16]
       [--dtype bfloat16] [--json FILE]

The picture is a mosaic of generated scenes with exact masks. Scenes and tiles have different sides, so that seams of
tiles run through the objects. Objects are drawn of those that show on 1 to 30 % of their scene; an object and a part
of it may both be among them. For objects on a seam, which no tile has whole, and for the others are printed the IoU of
the mask that fits an object best, and the number of its pieces: masks that have more than half of their area in it. A
part that the model takes for a mask of its own is a piece too, seam or not: what seams cost is the difference between
the two groups. Memory is the process's peak over what it held with model and picture loaded; it is read from /proc, so
on Linux only.
"""

import argparse
import json
import time
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from efficientsam_hf import EfficientSamMaskGenerator, EfficientSamModel, EfficientSamProcessor, default_checkpoint
from efficientsam_hf.files import write_json
from efficientsam_hf.machine import describe_machine, relative_seconds
from efficientsam_hf.models.rle_efficientsam import rle_pixels
from efficientsam_hf.tiles import segment_tiles, tile_starts
from efficientsam_hf.training.scene_batches import scene_samples


SEED = 77


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=12000, help="side of the picture in pixels")
    parser.add_argument("--scene", type=int, default=1000, help="side of a scene in it")
    parser.add_argument("--tile", type=int, default=1024)
    parser.add_argument("--overlap", type=int, default=128)
    parser.add_argument("--grid", type=int, default=16, help="points per side of a tile")
    parser.add_argument("--model", default=default_checkpoint())
    parser.add_argument("--dtype", help="default: bfloat16 where the CPU multiplies it faster, else float32")
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def mosaic(side: int, scene: int) -> tuple[np.ndarray, list[tuple[int, int, np.ndarray]]]:
    """(side, side, 3) uint8, and the objects as (x, y, mask of the scene that begins there)."""
    picture, objects = np.zeros((side, side, 3), np.uint8), []
    places = [(x, y) for y in range(0, side - scene + 1, scene) for x in range(0, side - scene + 1, scene)]
    samples = scene_samples(len(places), SEED, scene, objects=6, min_area=0.01, max_area=0.3)
    for (x, y), sample in zip(places, samples):
        picture[y : y + scene, x : x + scene] = np.asarray(sample["image"])
        objects += [(x, y, mask) for mask in sample["masks"]]
    return picture, objects


def resident(kind: str) -> int:
    """Bytes of memory that the process holds (VmRSS), or held at most since the last `forget_peak` (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def crosses_seam(x: int, y: int, mask: np.ndarray, args: argparse.Namespace) -> bool:
    """Whether no tile has the whole object inside."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    starts = tile_starts(args.side, args.tile, args.overlap)

    def inside(low: int, high: int) -> bool:
        return any(start <= low and high < start + args.tile for start in starts)

    return not (inside(x + columns[0], x + columns[-1]) and inside(y + rows[0], y + rows[-1]))


def compare(objects: list[tuple[int, int, np.ndarray]], result: dict) -> tuple[np.ndarray, np.ndarray]:
    """Of each object the IoU of the mask that fits it best, over the whole picture, and the number of its pieces."""
    best, pieces = np.zeros(len(objects)), np.zeros(len(objects), int)
    boxes, mask_areas = result["boxes"].numpy(), result["areas"].numpy()
    areas = np.array([mask.sum() for _, _, mask in objects])
    corners = np.array([(x, y, x + mask.shape[1], y + mask.shape[0]) for x, y, mask in objects])
    for rle, box, area in zip(tqdm(result["masks"], unit="mask"), boxes, mask_areas):
        near = ((corners[:, :2] <= box[2:]) & (corners[:, 2:] > box[:2])).all(1)
        window = rle_pixels(rle, np.arange(box[1], box[3] + 1), np.arange(box[0], box[2] + 1))
        for index in np.flatnonzero(near):
            shared = shared_pixels(objects[index], window, box)
            best[index] = max(best[index], shared / (area + areas[index] - shared))
            pieces[index] += 2 * shared > area
    return best, pieces


def shared_pixels(item: tuple[int, int, np.ndarray], window: np.ndarray, box: np.ndarray) -> int:
    """Pixels of an object in a mask, which is given inside its box of first and last pixels."""
    x, y, mask = item
    left, top = max(x, box[0]), max(y, box[1])
    right, bottom = min(x + mask.shape[1], box[2] + 1), min(y + mask.shape[0], box[3] + 1)
    own = mask[top - y : bottom - y, left - x : right - x]
    return np.count_nonzero(own & window[top - box[1] : bottom - box[1], left - box[0] : right - box[0]])


def summary(ious: np.ndarray, pieces: np.ndarray) -> dict[str, float]:
    """Of a group of objects; null where it is empty."""
    if not len(ious):
        return {"objects": 0, "mean": None, "above_half": None, "pieces": None, "in_one_piece": None}
    return {
        "objects": len(ious),
        "mean": float(ious.mean()),
        "above_half": float((ious > 0.5).mean()),
        "pieces": float(pieces.mean()),
        "in_one_piece": float((pieces == 1).mean()),
    }


def main() -> None:
    args = parse_arguments()
    picture, objects = mosaic(args.side, args.scene)
    args.dtype = args.dtype or ("bfloat16" if relative_seconds(torch.bfloat16, "cpu") < 1 else "float32")
    model = EfficientSamModel.from_pretrained(args.model, dtype=getattr(torch, args.dtype)).eval()
    generator = EfficientSamMaskGenerator(
        model, EfficientSamProcessor.from_pretrained(args.model), points_per_crop=args.grid
    )
    forget_peak()
    before, start = resident("VmRSS"), time.perf_counter()
    result = segment_tiles(generator, picture, args.tile, args.overlap, progress=True)
    seconds = time.perf_counter() - start
    peak = (resident("VmHWM") - before) / 2**30
    ious, pieces = compare(objects, result)
    on_seam = np.array([crosses_seam(*item, args) for item in objects])
    record = {
        "megapixels": args.side**2 / 1e6,
        "seconds": seconds,
        "seconds_per_megapixel": seconds / (args.side**2 / 1e6),
        "gigabytes_over_model_and_picture": peak,
        "masks": len(result["masks"]),
        "masks_from_several_tiles": int((result["tiles"] > 1).sum()),
        "objects_on_a_seam": summary(ious[on_seam], pieces[on_seam]),
        "objects_inside_a_tile": summary(ious[~on_seam], pieces[~on_seam]),
        "machine": describe_machine(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    print(json.dumps(record, indent=2))
    if args.json:
        write_json(args.json, {**vars(args), "json": None, **record})


if __name__ == "__main__":
    main()
