# SPDX-License-Identifier: Apache-2.0
"""`efficientsam evaluate`: mIoU of a model on a COCO file, by kind of prompt."""

import argparse
import datetime
import json
import os
import platform
import shlex
import time
from pathlib import Path
from typing import Any

from .loading import add_model_options, load_model
from .output import check_writable, write_text


DESCRIPTION = """\
Give a model one prompt per object of a COCO instances file and compare its masks with the file's, at the pictures'
own resolution. Of the three masks the one with the highest predicted IoU counts; "best of 3" is what a perfect
choice would reach.

prompts:
  center   a click on the object's deepest pixel (maximum of the distance transform)
  uniform  a click on a random pixel of the object, drawn with --seed
  box      the object's tight box"""
PROTOCOLS = ("center", "uniform", "box")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure mIoU on a COCO file",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--annotations", required=True, metavar="A.json", help="COCO instances file")
    parser.add_argument("--images", required=True, metavar="DIR", help="folder with its pictures")
    parser.add_argument(
        "--prompts", nargs="+", choices=PROTOCOLS, default=PROTOCOLS, metavar="P", help="center, uniform, box (all)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N pictures")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random clicks (0)")
    parser.add_argument("--prompt-chunk", type=int, default=32, metavar="N", help="prompts decoded at once (32)")
    parser.add_argument(
        "--output", metavar="metrics.json", help="write the numbers, command, machine and versions here"
    )
    add_model_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table, write the file."""
    from ..data.coco import CocoSamples
    from ..evaluation import evaluate

    if args.output:
        check_writable(Path(args.output).parent)
    samples = CocoSamples(args.annotations, args.images)
    model, processor = load_model(args)
    start = time.perf_counter()
    metrics = evaluate(
        model, processor, samples, tuple(args.prompts), args.seed, limit=args.limit, prompt_chunk=args.prompt_chunk
    )
    seconds = time.perf_counter() - start
    print(format_table(metrics))
    if args.output:
        record = {"metrics": metrics, "seconds": round(seconds, 1), **_describe_run(args, model)}
        write_text(Path(args.output), json.dumps(record, indent=2) + "\n")
        print(f"wrote {args.output}")
    return 0


def format_table(metrics: dict[str, Any]) -> str:
    """The numbers of `evaluation.evaluate` as lines of text."""
    sizes = list(metrics["sizes"])
    header = ["prompt", "mIoU", "best of 3", *sizes]
    rows = []
    for name in PROTOCOLS:
        if name in metrics:
            values = metrics[name]
            numbers = [values["miou"], values["oracle_miou"], *(values[f"miou_{size}"] for size in sizes)]
            rows.append([name, *(f"{number:.4f}" for number in numbers)])
    lines = [
        "  ".join(cell.rjust(9) if column else cell.ljust(8) for column, cell in enumerate(row))
        for row in (header, *rows)
    ]
    limits = ", ".join(f"{size} up to {100 * share:.1f} %" for size, share in metrics["sizes"].items())
    lines.append(f"{metrics['objects']} objects in {metrics['images']} images; share of the picture: {limits}")
    return "\n".join(lines)


def _describe_run(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Command, model, date, machine and versions, so that the numbers can be repeated."""
    import torch
    import transformers

    from .. import __version__

    parameter = next(model.parameters())
    machine = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(parameter.device) if parameter.is_cuda else str(parameter.device),
    }
    versions = {
        "efficientsam_hf": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return {
        "command": shlex.join(["efficientsam", *args.argv]),
        "model": str(args.model or "default checkpoint"),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine,
        "versions": versions,
    }


def _cpu_name() -> str:
    """Model name of the processor, as Linux tells it, else the architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
