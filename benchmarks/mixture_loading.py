# SPDX-License-Identifier: Apache-2.0
"""Pictures/s that each source of a mixture makes, and the mixture, against a training step of Ti at the same size.

`python benchmarks/mixture_loading.py --mix mix.yaml --image-size 256` times the sources and the mixture in turns, and
then training steps on batches of the mixture. Prints medians of pictures/s, and how many times as fast as training
each of them is. Without --mix the mixture is made of generated scenes in a temporary folder: as photos of a COCO file,
cut out and pasted on each other, and rendered when they are asked for.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from loading import seconds_per_step

from efficientsam_hf import EfficientSamImageProcessor
from efficientsam_hf.data.mixture import open_sources
from efficientsam_hf.models.rle_efficientsam import encode_rle
from efficientsam_hf.training.finetune_arguments import FinetuneArguments
from efficientsam_hf.training.mixture_batches import MixtureBatches, mixture_sources
from efficientsam_hf.training.scene_batches import scene_samples
from efficientsam_hf.training.schedule import Stage


MIXTURE = """\
- {name: photos, annotations: instances.json, images: .}
- {name: pasted, cutouts: {annotations: instances.json, images: .}, backgrounds: .}
- {name: scenes, scenes: true}
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mix", help="YAML file of the mixture")
    parser.add_argument("--pictures", type=int, default=64, help="pictures of a source in a round")
    parser.add_argument("--size", type=int, default=384, help="side of the generated pictures on disk")
    parser.add_argument("--image-size", type=int, default=256, help="side of the training images")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="training steps to time, 0 for none")
    parser.add_argument("--device", default="cpu", help="where it trains and, without workers, renders scenes")
    args = parser.parse_args()
    if args.pictures < args.batch_size:
        parser.error(f"--pictures must be at least one batch of {args.batch_size}, got {args.pictures}")
    return args


def write_mixture(folder: Path, size: int) -> Path:
    """Twenty generated scenes as a COCO file, and a mixture of them."""
    content: dict[str, list] = {"images": [], "annotations": []}
    for index, sample in enumerate(scene_samples(20, 5, size)):
        name = f"{index}.jpg"
        sample["image"].save(folder / name, quality=90)
        content["images"].append({"id": index, "file_name": name, "height": size, "width": size})
        content["annotations"] += [{"image_id": index, "segmentation": encode_rle(mask)} for mask in sample["masks"]]
    (folder / "instances.json").write_text(json.dumps(content))
    (folder / "mix.yaml").write_text(MIXTURE)
    return folder / "mix.yaml"


def make_batches(args: argparse.Namespace, mixture: str) -> dict[str, MixtureBatches]:
    """Batches of each source alone by its name, and of all."""
    arguments = FinetuneArguments(
        output_dir="unused", max_steps=1, train_mix=mixture, image_sizes=str(args.image_size),
        objects_per_image=args.objects,
    )  # fmt: skip
    device = "cpu" if args.workers else args.device
    processor = EfficientSamImageProcessor(size=args.image_size, antialias=True)
    sources = mixture_sources(arguments, open_sources(arguments.mixture()), processor, device)
    parts = {source[0]: [source] for source in sources} | {"the mixture": sources}
    return {name: MixtureBatches(part, device=device, workers=args.workers) for name, part in parts.items()}


def pictures_per_second(batches: MixtureBatches, args: argparse.Namespace, first: int) -> float:
    """Speed of making `pictures` from batch `first` on, after one batch."""
    source, count = batches(first, Stage(0.0, args.image_size, args.batch_size)), args.pictures // args.batch_size
    next(source)
    start = time.perf_counter()
    for _ in range(count):
        next(source)
    return count * args.batch_size / (time.perf_counter() - start)


def main() -> None:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as name:
        batches = make_batches(args, args.mix or str(write_mixture(Path(name), args.size)))
        speeds: dict[str, list[float]] = {name: [] for name in batches}
        for number in range(args.rounds):
            for name, own in batches.items():
                speeds[name].append(pictures_per_second(own, args, number * (args.pictures // args.batch_size + 1)))
        trained = args.batch_size / seconds_per_step(batches["the mixture"], args) if args.steps else None
    width = max(map(len, batches))
    for name, values in speeds.items():
        speed = statistics.median(values)
        ratio = f", {speed / trained:6.2f} times as fast as training" if trained else ""
        print(f"{name:<{width}} {speed:8.2f} images/s{ratio}")
    if trained:
        print(f"{'training':<{width}} {trained:8.2f} images/s")


if __name__ == "__main__":
    main()
