# SPDX-License-Identifier: Apache-2.0
"""What the training commands share: fields from a recipe and from flags, and how a run ends."""

import argparse
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any


STOPPED = 128  # plus the signal's number: the exit code of a run that a signal ended


def add_fields(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add --recipe and a flag for each field of the arguments."""
    from ..training.arguments import add_flags

    parser.add_argument("--recipe", metavar="NAME|FILE", help="recipe of the package or a YAML file")
    add_flags(parser.add_argument_group("fields of a recipe"), kind)


def run_training(args: argparse.Namespace, command: str, kind: type, train: Callable[[Any], dict[str, Any]]) -> int:
    """Fill the arguments, train, say where the result is; `train` returns the trainer's summary."""
    from ..training.arguments import build_arguments, read_recipe

    recipe = read_recipe(args.recipe, command) if args.recipe else {}
    flags = {name: value for name, value in vars(args).items() if name in kind.__dataclass_fields__}
    arguments = build_arguments(kind, recipe, flags)
    summary = train(arguments)
    _leave_other_processes()
    print(
        f"{summary['steps']} steps, {summary['images']} images in {summary['minutes']:.1f} minutes "
        f"({summary['images_per_s']:.1f} images/s); model: {Path(arguments.output_dir) / 'model'}"
    )
    return 0 if summary["interrupted"] is None else STOPPED + signal.Signals[summary["interrupted"]]


def _leave_other_processes() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def trainer_class() -> type:
    """The training loop; ImportError that names what is missing for it."""
    try:
        from ..training.trainer import Trainer
    except ModuleNotFoundError as error:
        raise ImportError(f"training needs {error.name}: pip install 'efficientsam-hf[train]'") from error
    return Trainer
