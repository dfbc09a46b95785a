# SPDX-License-Identifier: Apache-2.0
"""`efficientsam features`: a teacher's features of pictures, written once for many pretraining runs."""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import check_writable
from .loading import DTYPES, add_trust_option, joined_processes, model_name, pick_device, warn_if_emulated
from .running import going_on


DESCRIPTION = """\
Write a cache of a teacher's features, for `efficientsam pretrain --train-features CACHE`. With --crops K it holds K
random parts of every picture, each seen by the teacher as the paper's teacher sees it, though there are no others;
without, the features of whole pictures, of which pretraining takes what lies at the place of a fresh part.

  efficientsam features --teacher facebook/sam-vit-huge --teacher-resolution 224 --images imagenet/train \\
    --crops 20 --output caches/sam_h
  efficientsam features --teacher default --scenes 20000 --scene-size 128 --output caches/scenes
  efficientsam features ... --output caches/sam_h --check 100

A command that was stopped goes on where it was when it is given again; accelerate launch -m efficientsam_hf.cli
features ... shares the work among its processes."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "features",
        help="write a teacher's features for pretraining",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="CACHE", help="folder to write, or to complete")
    parser.add_argument("--teacher", required=True, metavar="NAME", help="folder or Hub id; default: what ships")
    parser.add_argument("--teacher-revision", metavar="R", help="commit, tag or branch on the Hub")
    parser.add_argument("--teacher-resolution", type=int, metavar="PIXELS", help="side of its images (its own)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="precision of its weights (float32)")
    add_trust_option(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--images", metavar="DIR", help="folder of pictures")
    source.add_argument("--dataset", metavar="NAME", help="data set of the datasets library")
    source.add_argument("--scenes", type=int, metavar="N", help="the first N generated scenes of --seed")
    parser.add_argument("--split", default="train", help="split of --dataset (train)")
    parser.add_argument("--image-column", default="image", help="column of --dataset with the pictures (image)")
    parser.add_argument("--scene-size", type=int, default=224, metavar="PIXELS", help="side of the scenes (224)")
    parser.add_argument("--crops", type=int, default=0, metavar="K", help="parts of every picture; 0: all of it (0)")
    parser.add_argument("--grid", type=int, metavar="N", help="cells a side (14 for parts, the teacher's for 0)")
    parser.add_argument("--crop-min-scale", type=float, default=0.2, help="smallest share of a picture (0.2)")
    parser.add_argument("--crop-max-scale", type=float, default=1.0, help="largest share of a picture (1.0)")
    parser.add_argument("--horizontal-flip", type=float, default=0.5, help="probability of a mirrored part (0.5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the parts and of the scenes (0)")
    parser.add_argument("--batch-size", type=int, default=16, help="parts in one forward (16)")
    parser.add_argument("--shard-size", type=int, default=512, metavar="N", help="parts in a file (512)")
    parser.add_argument("--workers", type=int, default=0, help="processes that read pictures (0: this one)")
    parser.add_argument("--check", type=int, metavar="N", help="compute N records of a complete cache again instead")
    parser.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write what is missing, or check what is there."""
    return going_on(args, lambda: _run(args))


def _run(args: argparse.Namespace) -> int:
    _check(args)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    import torch

    from ..data.feature_cache import check_cache
    from ..data.teacher import load_teacher

    with joined_processes(args.device):
        samples = _samples(args)
        device = pick_device(args.device)
        warn_if_emulated("--dtype", args.dtype, device)
        teacher = load_teacher(
            model_name(args.teacher),
            resolution=args.teacher_resolution,
            revision=args.teacher_revision,
            device=device,
            dtype=getattr(torch, args.dtype),
            trust_remote_code=args.trust_remote_code,
        )
        if not args.check:
            return _write(args, samples, teacher)
        count, difference = check_cache(args.output, samples, teacher, args.check, args.seed)
        print(f"{count} records computed again: largest difference {difference:.3g}")
        return 0


def _check(args: argparse.Namespace) -> None:
    for name in ("batch_size", "shard_size", "scenes", "check", "grid"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    for name in ("crops", "workers"):
        if getattr(args, name) < 0:
            raise ValueError(f"--{name} must be at least 0, got {getattr(args, name)}")
    if not args.check:
        output = Path(args.output)
        check_writable(output if output.exists() else output.parent)  # nothing is left behind by what fails below


def _samples(args: argparse.Namespace) -> Any:
    from ..data.dataset_samples import load_samples
    from ..data.images import ImageFolder, SceneImages

    if args.images:
        return ImageFolder(args.images)
    if args.dataset:
        return load_samples(args.dataset, args.split, args.image_column, masks_column=None)
    return SceneImages(args.scenes, args.seed, args.scene_size)


def _write(args: argparse.Namespace, samples: Any, teacher: Any) -> int:
    from tqdm import tqdm

    from ..data.crops import RandomCrop
    from ..data.feature_cache import FeatureCache, describe, write_cache
    from ..processes import collect, is_main, own_share

    side = args.grid or (14 if args.crops else teacher.resolution // teacher.patch_size)
    crop = RandomCrop(args.crop_min_scale, args.crop_max_scale, args.horizontal_flip)
    index = describe(
        samples, teacher, grid=(side, side), crops=args.crops, crop=crop, seed=args.seed,
        records_per_shard=args.shard_size,
    )  # fmt: skip
    share = own_share(index.shards)
    with _alone(args.output):
        collect([])
        done = write_cache(
            args.output, index, samples, teacher, share.start, share.step, args.batch_size, args.workers
        )
        own = sum(len(index.records_of(number)) for number in share)
        with tqdm(total=own, unit="record", desc="features", disable=not is_main()) as bar:
            for count in done:
                bar.update(count)
        collect([])  # all are done
    if is_main():
        problems = FeatureCache(args.output).problems()
        print(f"wrote {args.output}: {index.records} records, {index.shards} shards, {len(problems)} pictures unread")
        for number, reason in list(problems.items())[:10]:
            print(f"  picture {number}: {reason}")
    return 0


@contextmanager
def _alone(output: str) -> Iterator[None]:
    """No other command writes in the cache; of several processes of this one the main one sees to it."""
    from ..data.feature_cache import remove_leftovers
    from ..files import FolderLock
    from ..processes import is_main

    if not is_main():
        yield
        return
    Path(output).mkdir(parents=True, exist_ok=True)
    with FolderLock(Path(output)):
        remove_leftovers(output)
        yield
