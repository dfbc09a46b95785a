# SPDX-License-Identifier: Apache-2.0
"""Milliseconds per generated scene at several image sizes: medians over repeated batches.

Usage: python benchmarks/render_scenes.py [--sizes 256 512] [--batch 16] [--repeats 7] [--threads 2] [--device cpu]
"""

import argparse
import statistics
import time

import torch

from efficientsam_hf.data.scene_bank import SceneBank
from efficientsam_hf.data.scenes import render_scenes


def seconds(bank: SceneBank, first: int, count: int, size: int) -> tuple[float, float]:
    """Wall and processor seconds of one batch."""
    wall, processor = time.perf_counter(), time.process_time()
    render_scenes(bank, range(first, first + count), image_size=size)
    if bank.device.type == "cuda":
        torch.cuda.synchronize(bank.device)
    return time.perf_counter() - wall, time.process_time() - processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    start = time.perf_counter()
    bank = SceneBank.build(device=arguments.device)
    print(f"bank: {time.perf_counter() - start:.1f} s")
    for size in arguments.sizes:
        seconds(bank, 0, arguments.batch, size)
        runs = [seconds(bank, k * arguments.batch, arguments.batch, size) for k in range(1, arguments.repeats + 1)]
        wall, processor = (1000 * statistics.median(column) / arguments.batch for column in zip(*runs, strict=True))
        print(f"{size} px, {arguments.batch} a batch: {wall:.1f} ms a scene, {processor:.1f} ms of processor time")


if __name__ == "__main__":
    main()
