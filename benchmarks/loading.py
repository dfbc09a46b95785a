# SPDX-License-Identifier: Apache-2.0
"""Images/s of loading alone, from loose files and from a tar in SA-1B's layout, against the training step.

`python benchmarks/loading.py --pictures 200 --size 1024` generates the pictures in a temporary folder, reads them in
both forms in turns, and times training steps of the Ti model on the same batches. Prints medians, the ratios that
matter, and by how much memory grew while the tar was read again and again.
"""

import argparse
import json
import resource
import statistics
import tarfile
import tempfile
import time
from pathlib import Path

import torch

from efficientsam_hf import EfficientSamConfig, EfficientSamImageProcessor, EfficientSamModel
from efficientsam_hf.data.sa1b import Sa1bFolder, read_row, stream_tars
from efficientsam_hf.data.tars import find_tars
from efficientsam_hf.machine import is_emulated
from efficientsam_hf.models.rle_efficientsam import encode_rle
from efficientsam_hf.training.attention import use_matrix_products
from efficientsam_hf.training.finetune_arguments import FinetuneArguments
from efficientsam_hf.training.mask_preparation import MaskPreparation
from efficientsam_hf.training.mixture_batches import MixtureBatches
from efficientsam_hf.training.optimizers import make_optimizers
from efficientsam_hf.training.sample_batches import SampleBatches
from efficientsam_hf.training.scene_batches import scene_samples
from efficientsam_hf.training.schedule import Stage
from efficientsam_hf.training.segmentation import InteractiveSegmentation
from efficientsam_hf.training.stream_batches import StreamBatches


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--size", type=int, default=1024, help="side of the pictures on disk")
    parser.add_argument("--image-size", type=int, default=512, help="side of the training images")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--objects", type=int, default=32)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="training steps to time, 0 for none")
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


def write_pictures(args: argparse.Namespace, folder: Path) -> None:
    """Scenes as FOLDER/loose/NAME.{jpg,json} and the same in FOLDER/tars/sa_0.tar."""
    loose, tars = folder / "loose", folder / "tars"
    loose.mkdir()
    tars.mkdir()
    with tarfile.open(tars / "sa_0.tar", "w") as archive:
        for number, sample in enumerate(scene_samples(args.pictures, 5, args.size, objects=args.objects)):
            name = f"sa_{number}"
            sample["image"].save(loose / f"{name}.jpg", quality=90)
            annotations = [{"segmentation": encode_rle(mask)} for mask in sample["masks"]]
            (loose / f"{name}.json").write_text(json.dumps({"annotations": annotations}))
            for kind in ("jpg", "json"):
                archive.add(loose / f"{name}.{kind}", arcname=f"{name}.{kind}")


def seconds_per_epoch(batches: SampleBatches | StreamBatches, args: argparse.Namespace) -> float:
    """Seconds to make as many batches as hold all pictures."""
    start = time.perf_counter()
    source = batches(0, Stage(0.0, args.image_size, args.batch_size))
    for _ in range(args.pictures // args.batch_size):
        next(source)
    return time.perf_counter() - start


def seconds_per_step(batches: SampleBatches | MixtureBatches, args: argparse.Namespace) -> float:
    """Median seconds of forward, backward and optimiser, after one step for warming up."""
    model = EfficientSamModel(EfficientSamConfig.from_preset("ti", vision_config={"image_size": args.image_size}))
    if args.device == "cpu":
        use_matrix_products(model)
    module = InteractiveSegmentation(model.to(args.device))
    arguments = FinetuneArguments(output_dir="unused", max_steps=1, train_scenes=True)
    (optimizer,) = make_optimizers(module, arguments, fused=True)
    source = batches(0, Stage(0.0, args.image_size, args.batch_size))
    times, emulated = [], is_emulated(torch.bfloat16, args.device)
    for _ in range(args.steps + 1):
        batch = {name: value.to(args.device) for name, value in next(source).items()}
        start = time.perf_counter()
        with torch.autocast(args.device, torch.bfloat16, enabled=not emulated):
            loss = module(batch)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if args.device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def memory() -> float:
    """Largest memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    args = parse_arguments()
    preparation = MaskPreparation(
        EfficientSamImageProcessor(size=args.image_size, antialias=True), objects=args.objects
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_pictures(args, folder)
        loose = SampleBatches(Sa1bFolder(folder / "loose"), preparation, workers=args.workers)
        tars = StreamBatches(stream_tars(find_tars(folder / "tars")), read_row, preparation, workers=args.workers)
        times: dict[str, list[float]] = {"loose files": [], "tar": []}
        peaks = []
        for _ in range(args.rounds):
            for form, batches in (("loose files", loose), ("tar", tars)):
                times[form].append(seconds_per_epoch(batches, args))
            peaks.append(memory())
        speeds = {form: args.pictures / statistics.median(values) for form, values in times.items()}
        for form, speed in speeds.items():
            print(f"{form:<12} {speed:7.2f} images/s")
        print(f"loose / tar  {speeds['loose files'] / speeds['tar']:7.3f}")
        print(f"largest memory after round 1: {peaks[0]:.0f} MB, after round {args.rounds}: {peaks[-1]:.0f} MB")
        if args.steps:
            step = args.batch_size / seconds_per_step(loose, args)
            print(f"training     {step:7.2f} images/s; loading is {speeds['loose files'] / step:.1f} times as fast")


if __name__ == "__main__":
    main()
