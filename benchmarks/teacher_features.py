# SPDX-License-Identifier: Apache-2.0
"""Extraction of a teacher's features: images/s of its parts, and a large cache that is killed half-way and completed.

Usage: python benchmarks/teacher_features.py [--images 512] [--cache 20000] [--check 200] [--json FILE]

First, on generated scenes and in turns: pictures alone (made and cut, without a teacher), the teacher alone (pictures
in memory), and both together with writing. Then `efficientsam features` writes a cache of --cache scenes, is killed
when half of its shards are there, and is given again; shards of before must keep their bytes and times, nothing that
is half-written may stay, and --check records are computed again.
"""

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from efficientsam_hf import default_checkpoint
from efficientsam_hf.data.crops import RandomCrop
from efficientsam_hf.data.feature_cache import INDEX, CacheIndex, describe, write_cache
from efficientsam_hf.data.images import SceneImages
from efficientsam_hf.data.teacher import Teacher, load_teacher
from efficientsam_hf.files import write_json
from efficientsam_hf.machine import describe_machine


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default=str(default_checkpoint()))
    parser.add_argument("--resolution", type=int, default=128, help="side of the teacher's images")
    parser.add_argument("--scene-size", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--workers", type=int, default=0, help="of the command")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--images", type=int, default=512, help="of one measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", type=int, default=20000, help="scenes of the large cache, 0 for none")
    parser.add_argument("--check", type=int, default=200, help="of its records")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    return parser.parse_args()


def measure_parts(args: argparse.Namespace) -> dict[str, float]:
    """Images/s of pictures alone, the teacher alone, and everything with writing: medians of turns."""
    dtype = getattr(torch, args.dtype)
    teacher = load_teacher(args.teacher, resolution=args.resolution, device=torch.device(args.device), dtype=dtype)
    samples = SceneImages(args.images, 0, args.scene_size)
    side = teacher.resolution // teacher.patch_size
    index = describe(samples, teacher, grid=(side, side), crops=0, crop=RandomCrop(), seed=0)
    images = torch.rand(args.batch_size, 3, args.resolution, args.resolution)
    batches = args.images // args.batch_size

    def forward() -> None:
        for _ in range(batches):
            teacher.features(images, (side, side), check=False).cpu()

    parts = {
        "pictures alone": lambda: make_pictures(samples, args.batch_size),
        "teacher alone": forward,
        "all, with writing": lambda: write_once(index, samples, teacher, args.batch_size),
    }
    forward()
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(args.repeats):
        for name, part in parts.items():
            times[name].append(seconds(part))
    return {name: args.images / statistics.median(values) for name, values in times.items()}


def make_pictures(samples: SceneImages, batch_size: int) -> None:
    for start in range(0, len(samples), batch_size):
        samples.__getitems__(list(range(start, min(start + batch_size, len(samples)))))


def write_once(index: CacheIndex, samples: SceneImages, teacher: Teacher, batch_size: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for _ in write_cache(Path(folder) / "cache", index, samples, teacher, batch_size=batch_size):
            pass


def seconds(part: Callable[[], Any]) -> float:
    start = time.perf_counter()
    part()
    return time.perf_counter() - start


def measure_cache(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write, kill, complete and check the large cache."""
    command = [
        sys.executable, "-m", "efficientsam_hf.cli", "features", "--teacher", args.teacher, "--device", args.device,
        "--teacher-resolution", str(args.resolution), "--scenes", str(args.cache), "--scene-size",
        str(args.scene_size), "--batch-size", str(args.batch_size), "--workers", str(args.workers), "--dtype",
        args.dtype, "--output", str(folder),
    ]  # fmt: skip
    first = seconds(lambda: run_and_kill(command, folder))
    kept = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("features-*.safetensors")}
    second = seconds(lambda: subprocess.run(command, check=True))
    changed = [
        name
        for name, (modified, content) in kept.items()
        if ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) != (modified, content)
    ]
    index = CacheIndex.read(folder)
    names = {path.name for path in folder.iterdir()}
    expected = {INDEX} | {f"features-{number:06d}.safetensors" for number in range(index.shards)}
    checked = subprocess.run([*command, "--check", str(args.check)], check=True, capture_output=True, text=True).stdout
    return {
        "records": index.records,
        "shards": index.shards,
        "gigabytes": sum(path.stat().st_size for path in folder.iterdir()) / 1e9,
        "shards_when_killed": len(kept),
        "seconds_until_killed": first,
        "seconds_after_it": second,
        "shards_written_twice": len(changed),
        "other_files": sorted(names ^ expected),
        "checked": int(re.match(r"(\d+) records", checked)[1]),
        "largest_difference": float(checked.rsplit(maxsplit=1)[-1]),
    }


def run_and_kill(command: list[str], folder: Path) -> None:
    """SIGKILL when half of the shards are there; RuntimeError if the command ends before."""
    process = subprocess.Popen(command)
    while process.poll() is None:
        there = len(list(folder.glob("features-*.safetensors")))
        if there and there >= CacheIndex.read(folder).shards / 2:
            process.kill()
        time.sleep(0.1)
    if process.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the command ended with {process.returncode} before it was killed")


def main() -> int:
    args = parse_arguments()
    record: dict[str, Any] = {"images_per_second": measure_parts(args)}
    if args.cache:
        with tempfile.TemporaryDirectory() as folder:
            record["cache"] = measure_cache(args, Path(folder) / "cache")
    record |= {
        "machine": describe_machine(),
        "torch": torch.__version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    print(json.dumps(record, indent=2))
    if args.json:
        arguments = {name: str(value) for name, value in vars(args).items()}
        write_json(args.json, {"arguments": arguments, **record})
    cache = record.get("cache", {})
    return 1 if cache.get("shards_written_twice") or cache.get("other_files") else 0


if __name__ == "__main__":
    sys.exit(main())
