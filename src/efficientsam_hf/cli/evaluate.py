# SPDX-License-Identifier: Apache-2.0
"""`efficientsam evaluate`: mIoU of a model on a COCO file or on generated scenes, by kind of prompt."""

import argparse
import datetime
import io
import shlex
import shutil
import time
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..files import check_writable, write_json, write_png
from .everything import add_generator_options, generator_options
from .loading import (
    add_cleaning_options,
    add_model_options,
    check_cleaning,
    check_name,
    joined_processes,
    load_model,
    model_name,
)


DESCRIPTION = """\
Prompt a model for each object of a COCO instances file, or of generated scenes that no training run saw, and compare
its masks with theirs, at the pictures' own resolution. Of the three masks the one with the highest predicted IoU
counts; "best of 3" is what a perfect choice would reach. Several models get the same prompts (but for further
centre clicks, which correct each model's own answer), and each is compared with the first: the difference of their
mIoU and its 95 % bootstrap interval over the pictures.

prompts:
  center     a click on the object's deepest pixel (maximum of the distance transform); with --clicks, further clicks
             on the deepest pixel of what the last answer has wrong
  uniform    clicks on random pixels of the object, drawn with --seed (the paper's protocol)
  box        the object's tight box
  noisy_box  the same, its edges moved by a tenth of its sides (standard deviation, drawn with --seed; at most 20
             pixels); measured only if named

accelerate launch -m efficientsam_hf.cli evaluate ... shares the pictures among its processes."""
DEFAULT_PROTOCOLS = ("center", "uniform", "box")
PROTOCOLS = (*DEFAULT_PROTOCOLS, "noisy_box")
CLICKS = [1, 3, 5]
MOST_NAMED = 10  # pictures that could not be used


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure mIoU on a COCO file or on generated scenes",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "models", nargs="*", metavar="MODEL", help="folders or Hub names (default: the checkpoint that ships)"
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--annotations", metavar="A.json", help="COCO instances file")
    source.add_argument("--scenes", type=int, metavar="N", help="N generated scenes, at the model's image size")
    parser.add_argument("--images", metavar="DIR", help="folder with the pictures of --annotations")
    parser.add_argument(
        "--prompts",
        nargs="+",
        choices=PROTOCOLS,
        default=DEFAULT_PROTOCOLS,
        metavar="P",
        help="center, uniform, box, noisy_box (the first three)",
    )
    parser.add_argument(
        "--clicks",
        nargs="+",
        type=int,
        default=CLICKS,
        metavar="N",
        help="score after so many clicks (1 3 5)",
    )
    parser.add_argument(
        "--boxes",
        metavar="ground-truth|B.json",
        help="measure mask AP of these boxes instead: the annotations' own, or a detector's as COCO results; the COCO "
        "API counts the 100 of the highest scores, of each category in a picture",
    )
    group = parser.add_argument_group("everything", "mask AP of all that a grid of points finds, categories ignored")
    group.add_argument("--everything", action="store_true", help="measure segment-everything instead")
    add_generator_options(group)
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random clicks and of --scenes (0)")
    parser.add_argument("--prompt-chunk", type=int, default=32, metavar="N", help="prompts decoded at once (32)")
    parser.add_argument(
        "--save-worst",
        type=int,
        metavar="N",
        help="write pictures of the N worst masks of each prompt to a folder beside --output",
    )
    parser.add_argument(
        "--output", metavar="metrics.json", help="write the numbers, command, machine and versions here"
    )
    add_model_options(parser)
    add_cleaning_options(parser)
    parser.set_defaults(run=run)


@dataclass
class Result:
    """What came out for one model; `skipped` are (number of a picture that could not be used, why)."""

    record: dict[str, Any]
    table: str
    scores: Any = None  # ObjectScores
    skipped: list[tuple[int, str]] = field(default_factory=list)


def run(args: argparse.Namespace) -> int:
    """Evaluate each model, print tables, write the file; of several processes one prints and writes."""
    _check(args)
    for name in args.models:
        check_name(name)
    from ..processes import is_main

    with joined_processes(args.device), nullcontext() if is_main() else redirect_stdout(io.StringIO()):
        return _evaluate(args, write=is_main())


def _evaluate(args: argparse.Namespace, write: bool) -> int:
    samples = _coco_samples(args) if args.annotations else None
    measure = partial(_average_precision, detections=_detections(args)) if args.boxes else _miou
    measure = _everything if args.everything else measure
    results: list[Result] = []
    for name in args.models or [None]:
        model, processor = load_model(name, args)
        if samples is None:  # one size for all models, or they would not see the same scenes
            samples = _scene_samples(args, processor)
        start = time.perf_counter()
        result = measure(args, model, processor, samples)
        result.record |= {"seconds": round(time.perf_counter() - start, 1), **_describe_run(args, name, model)}
        result.record |= {"skipped": [reason for _, reason in result.skipped]} if result.skipped else {}
        results.append(result)
        print(f"{name}\n{result.table}" if len(args.models) > 1 else result.table)
        if result.skipped:
            print(format_skipped(result.skipped))
        if args.output and write and len(args.models) > 1:  # what is measured is not lost if a later one fails
            write_json(Path(args.output), {"models": [result.record for result in results]})
        if args.save_worst and write:
            folder = Path(args.output).with_suffix(".worst") / (str(len(results)) if len(args.models) > 1 else "")
            _save_worst(folder, args.save_worst, result.scores, model, processor, samples)
    content: dict[str, Any] = results[0].record
    if len(results) > 1:
        content = {"models": [result.record for result in results]}
    if len(results) > 1 and not args.boxes and not args.everything:
        content["differences"] = _differences(args.models, results)
    if args.output and write:
        write_json(Path(args.output), content)
        print(f"wrote {args.output}")
    return 0


def _differences(names: list[str], results: list[Result]) -> list[dict[str, Any]]:
    """Compare each model with the first, print and return what comes out."""
    first, differences = results[0], []
    for name, result in zip(names[1:], results[1:], strict=True):
        differences.append({"model": name, "than": names[0], **first.scores.compare(result.scores)})
        print(format_difference(differences[-1]))
    return differences


def _check(args: argparse.Namespace) -> None:
    """`ValueError` for options that do not go together, and `OSError` for an output that cannot be written."""
    if (args.annotations is None) != (args.images is None):
        raise ValueError("--annotations and --images go together")
    if args.scenes is not None and args.scenes < 1:
        raise ValueError(f"--scenes must be at least 1, got {args.scenes}")
    if args.seed < 0:
        raise ValueError(f"--seed must be at least 0, got {args.seed}")
    if min(args.clicks) < 1:
        raise ValueError(f"--clicks must be at least 1, got {min(args.clicks)}")
    if args.save_worst is not None and (args.save_worst < 1 or not args.output or args.boxes):
        raise ValueError("--save-worst needs a number of at least 1 and --output, and no --boxes")
    if args.output:
        check_writable(Path(args.output).parent)
    if args.boxes and not args.annotations:
        raise ValueError("--boxes needs --annotations and --images")
    generator_options(args)
    check_cleaning(args)
    if args.everything and (args.boxes or args.save_worst or not args.annotations):
        raise ValueError("--everything needs --annotations and --images, and no --boxes or --save-worst")
    for option, given, default in (("--prompts", args.prompts, DEFAULT_PROTOCOLS), ("--clicks", args.clicks, CLICKS)):
        if (args.boxes or args.everything) and list(given) != list(default):
            instead = "--boxes" if args.boxes else "--everything"
            raise ValueError(f"{option} is for mIoU and changes nothing with {instead}: give one of them, got {given}")


def _save_worst(folder: Path, count: int, scores: Any, model: Any, processor: Any, samples: Any) -> None:
    """Write FOLDER/PROTOCOL/*.png in the place of those that are there."""
    from ..evaluation import worst_pictures

    for protocol in scores.ious:
        target = folder / protocol.replace(":", "_")
        shutil.rmtree(target, ignore_errors=True)  # those of an earlier evaluation
        target.mkdir(parents=True)
        for name, picture in worst_pictures(scores, model, processor, samples, protocol, count):
            write_png(target / f"{name}.png", picture)
        print(f"wrote {target}")


def _detections(args: argparse.Namespace) -> list[dict[str, Any]] | None:
    from ..evaluation import read_detections

    return None if args.boxes == "ground-truth" else read_detections(args.boxes)


def _average_precision(args: argparse.Namespace, model: Any, processor: Any, samples: Any, detections: Any) -> Result:
    from ..evaluation import average_precision

    skipped: list[tuple[int, str]] = []
    numbers = average_precision(
        model,
        processor,
        samples,
        detections,
        limit=args.limit,
        prompt_chunk=args.prompt_chunk,
        report=lambda *picture: skipped.append(picture),
    )
    return Result({"average_precision": numbers}, format_average_precision(numbers), skipped=skipped)


def _everything(args: argparse.Namespace, model: Any, processor: Any, samples: Any) -> Result:
    from ..evaluation import everything_average_precision

    options = generator_options(args)
    skipped: list[tuple[int, str]] = []
    numbers = everything_average_precision(
        model, processor, samples, limit=args.limit, report=lambda *picture: skipped.append(picture), **options
    )
    record = {"average_precision": numbers, "options": options}
    return Result(record, format_average_precision(numbers), skipped=skipped)


def format_average_precision(numbers: dict[str, dict[str, float]]) -> str:
    """A line for each way of choosing among three masks."""
    names = list(next(iter(numbers.values())))
    lines = ["mask chosen by  " + "".join(name.rjust(8) for name in names)]
    for choice, values in numbers.items():
        lines.append(choice.ljust(16) + "".join(f"{values[name]:8.4f}" for name in names))
    return "\n".join(lines)


def _miou(args: argparse.Namespace, model: Any, processor: Any, samples: Any) -> Result:
    from ..evaluation import score_objects

    skipped: list[tuple[int, str]] = []
    scores = score_objects(
        model,
        processor,
        samples,
        prompts=tuple(args.prompts),
        clicks=tuple(args.clicks),
        seed=args.seed,
        limit=args.limit,
        prompt_chunk=args.prompt_chunk,
        report=lambda *picture: skipped.append(picture),
    )
    metrics = scores.summary()
    return Result({"metrics": metrics}, format_table(metrics), scores, skipped)


def _coco_samples(args: argparse.Namespace) -> Any:
    from ..data.coco import CocoSamples

    return CocoSamples(args.annotations, args.images)


def _scene_samples(args: argparse.Namespace, processor: Any) -> list[dict[str, Any]]:
    """Held-out scenes at the size the model sees pictures in."""
    from ..training.scene_batches import HELD_OUT, scene_samples

    args.scene_size = _side(processor.image_processor.size)
    return scene_samples(args.scenes, seed=args.seed + HELD_OUT, image_size=args.scene_size)


def _side(size: Any) -> int:
    """Side of a model's square input: processors of SAM name its longest edge."""
    return dict(size).get("height") or dict(size)["longest_edge"]


def format_table(metrics: dict[str, Any]) -> str:
    """The numbers of `evaluation.evaluate` as lines of text."""
    sizes = list(metrics["sizes"])
    header = ["prompt", "mIoU", "best of 3", *sizes]
    rows = []
    for name, values in metrics.items():
        if isinstance(values, dict) and "miou" in values:
            numbers = [values["miou"], values["oracle_miou"], *(values[f"miou_{size}"] for size in sizes)]
            rows.append([name, *(f"{number:.4f}" for number in numbers)])
    lines = [
        "  ".join(cell.rjust(9) if column else cell.ljust(10) for column, cell in enumerate(row))
        for row in (header, *rows)
    ]
    limits = ", ".join(f"{size} up to {100 * share:.1f} %" for size, share in metrics["sizes"].items())
    lines.append(f"{metrics['objects']} objects in {metrics['images']} images; share of the picture: {limits}")
    return "\n".join(lines)


def format_skipped(skipped: list[tuple[int, str]]) -> str:
    """How many pictures could not be used, and the first of them."""
    lines = [f"{len(skipped)} pictures could not be used and count for nothing:"]
    lines += [f"  {reason}" for _, reason in skipped[:MOST_NAMED]]
    if len(skipped) > MOST_NAMED:
        lines.append(f"  ... and {len(skipped) - MOST_NAMED} more")
    return "\n".join(lines)


def format_difference(difference: dict[str, Any]) -> str:
    """One entry of "differences" as a line for each prompt."""
    lines = [f"{difference['model']}: mIoU less that of {difference['than']}, 95 % interval"]
    for name, values in difference.items():
        if isinstance(values, dict):
            lines.append(
                f"{name:<10}  {values['difference']:+9.4f}  from {values['low']:+.4f} to {values['high']:+.4f}"
            )
    return "\n".join(lines)


def _protocol(args: argparse.Namespace) -> dict[str, Any]:
    """What the numbers mean, beyond the names of the prompts."""
    from ..identity import file_revision

    common = {"limit": args.limit, "resolution": "that of the picture", "masks_per_prompt": 3}
    if cleaning := check_cleaning(args):
        common |= {"mask_cleaning": cleaning}
    if args.scenes:
        common |= {"scenes": args.scenes, "scene_size": args.scene_size}
    else:
        common |= {"annotations": file_revision(args.annotations)}
    if args.everything:
        return {**common, "masks": "all of a grid of points, categories ignored", **generator_options(args)}
    if args.boxes:
        return {**common, "boxes": args.boxes, "mask": "each way of choosing by itself"}
    return {**common, "mask": "highest predicted IoU", "clicks": args.clicks, "seed": args.seed}


def _describe_run(args: argparse.Namespace, name: str | None, model: Any) -> dict[str, Any]:
    """Command, model, date, machine and versions, so that the numbers can be repeated."""
    from ..identity import model_revision
    from ..machine import describe_machine, describe_versions

    parameter = next(model.parameters())
    return {
        "command": shlex.join(["efficientsam", *args.argv]),
        "model": name or "default checkpoint",
        "revision": model_revision(model_name(name or "default")),
        "protocol": _protocol(args),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": describe_machine(parameter.device),
        "versions": describe_versions(),
    }
