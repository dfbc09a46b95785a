# SPDX-License-Identifier: Apache-2.0
"""`efficientsam benchmark`: what a model costs on this machine."""

import argparse
import datetime
import shlex
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ..files import check_writable, write_json
from .loading import add_model_options, load_model
from .segment import read_image


DESCRIPTION = """\
Time a model on this machine: the encoder, prompts on an encoded image, and segment-everything. Times are medians after
one run that does not count."""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser("benchmark", help="time a model on this machine", description=DESCRIPTION)
    parser.add_argument("image", metavar="IMAGE", help="path, URL, or - for standard input")
    parser.add_argument("--model", metavar="M", help="folder or Hub name (default: the checkpoint that ships)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16, 64], metavar="N", help="prompts at once")
    parser.add_argument("--points-per-crop", type=int, default=32, metavar="N", help="grid of everything (32)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="runs of each, everything has one (5)")
    parser.add_argument("--output", metavar="FILE.json", help="write times, command, machine and versions here")
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print a table, write the file."""
    given = {"--repeats": args.repeats, "--points-per-crop": args.points_per_crop, "--prompts": min(args.prompts)}
    for flag, value in given.items():
        if value < 1:
            raise ValueError(f"{flag} must be at least 1, got {value}")
    image = read_image(args.image)
    if args.output:
        check_writable(Path(args.output).parent)
    model, processor = load_model(args.model, args)
    rows = measure(model, processor, image, args.prompts, args.points_per_crop, args.repeats)
    for row in rows:
        print(f"{row['work']:<28}{1000 * row['seconds']:>12.1f} ms")
    if args.output:
        from ..machine import describe_machine, describe_versions

        record = {"model": args.model or "default", "dtype": str(model.dtype).removeprefix("torch."), "rows": rows}
        record["command"] = shlex.join(["efficientsam", *args.argv])
        record["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        record |= {"machine": describe_machine(model.device), "versions": describe_versions()}
        write_json(Path(args.output), record)
        print(f"wrote {args.output}")
    return 0


def measure(
    model: Any, processor: Any, image: Any, prompts: list[int], points_per_crop: int, repeats: int
) -> list[dict[str, Any]]:
    """Seconds of each kind of work, {"work", "seconds"} in order."""
    import torch

    from .. import EfficientSamMaskGenerator
    from ..models.fast_decoding_efficientsam import EfficientSamFastDecoder

    if not hasattr(model, "decode_prompts"):
        raise ValueError(f"benchmark is for EfficientSAM models, got a {type(model).__name__}")
    with torch.inference_mode():
        pixels = processor.image_processor(images=image, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(model.device, model.dtype)
        side = pixels.shape[-1]
        rows = [("encoder", _median(lambda: model.get_image_embeddings(pixels), repeats, model.device))]
        decoder = EfficientSamFastDecoder(model, model.get_image_embeddings(pixels))
        for number in prompts:
            points = torch.rand(number, 1, 2, generator=torch.Generator().manual_seed(0)).to(model.device) * (side - 1)
            labels = torch.ones(number, 1, dtype=torch.long, device=model.device)
            rows.append((f"{number} prompts", _median(partial(decoder, points, labels), repeats, model.device)))
        generator = EfficientSamMaskGenerator(
            model, processor, points_per_crop=points_per_crop, output_type="coco_rle"
        )
        name = f"everything, {points_per_crop} x {points_per_crop}"
        rows.append((name, _median(lambda: generator(image), 1, model.device)))
    return [{"work": name, "seconds": seconds} for name, seconds in rows]


def _median(call: Callable[[], Any], repeats: int, device: Any) -> float:
    """Median seconds of a call, the device's work included."""
    import torch

    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(repeats + 1):
        synchronize()
        start = time.perf_counter()
        call()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
