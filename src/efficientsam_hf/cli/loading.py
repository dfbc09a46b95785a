# SPDX-License-Identifier: Apache-2.0
"""Model options that commands share, and loading by them."""

import argparse
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


DTYPES = ("float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add --device, --dtype and --trust-remote-code."""
    group = parser.add_argument_group("model")
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, mps (default: a GPU where there is one)")
    group.add_argument("--dtype", choices=DTYPES, help="precision of the weights (default: as in the model's config)")
    add_trust_option(group)


def add_trust_option(group: argparse._ActionsContainer) -> None:
    """Add --trust-remote-code."""
    group.add_argument(
        "--trust-remote-code",
        action="store_true",
        help="run the code that lies beside a model of a kind that transformers does not know: it can do on this "
        "machine whatever you may do. Without this no code of a model runs, and nothing is asked",
    )


def add_cleaning_options(parser: argparse.ArgumentParser) -> None:
    """Add what makes masks whole; what is left out is as the checkpoint says."""
    group = parser.add_argument_group("whole masks", "what the checkpoint's mask_cleaning says, unless given here")
    group.add_argument(
        "--largest-part",
        action=argparse.BooleanOptionalAction,
        help="keep only the connected part that was clicked, or the largest",
    )
    group.add_argument(
        "--fill-holes", type=float, metavar="SHARE", help="fill holes of up to this fraction of the mask; 0 for none"
    )
    group.add_argument("--within-box", action=argparse.BooleanOptionalAction, help="cut masks at their box")


def check_cleaning(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_cleaning_options` was given, by the names of `MaskCleaning`.

    Raises ValueError for a wrong value, and for a box where everything is asked for without one.
    """
    from ..models.mask_cleaning_efficientsam import MaskCleaning

    values = {name: getattr(args, name, None) for name in ("largest_part", "fill_holes", "within_box")}
    given = {name: value for name, value in values.items() if value is not None}
    MaskCleaning().with_changes(given)
    if "within_box" in given and getattr(args, "everything", False):
        raise ValueError("--within-box is for prompts: --everything has no boxes")
    return given


def load_model(name: str | None, args: argparse.Namespace) -> tuple[Any, Any]:
    """Model in evaluation mode on its device, and processor; one line that names what is wrong as `load_pretrained`.

    `name` is a folder or a Hub name, None or `default` the checkpoint that ships; `args` has what `add_model_options`
    and `add_cleaning_options` added.
    """
    import torch
    from transformers import AutoModelForMaskGeneration, AutoProcessor

    from ..pretrained import load_pretrained, load_processor

    device = pick_device(args.device)
    if args.dtype:
        warn_if_emulated("--dtype", args.dtype, device)
    name = model_name(name or "default")
    check_name(name)
    options = {"trust_remote_code": args.trust_remote_code, "what": "promptable model"}
    processor = load_processor(AutoProcessor, name, **options)  # first: it is the cheaper one to refuse
    if not hasattr(processor, "image_processor"):  # what AutoProcessor finds where processor_class is missing
        found = type(processor).__name__
        raise ValueError(
            f"cannot load a promptable model from {name}: its processor is {found}, which takes no points and boxes"
        )
    if args.dtype:
        options["dtype"] = getattr(torch, args.dtype)
    model = load_pretrained(AutoModelForMaskGeneration, name, **options)
    _check_sides(processor, model, name)
    _set_cleaning(processor, check_cleaning(args), name)
    return model.to(device).eval(), processor


def _check_sides(processor: Any, model: Any, name: str) -> None:
    """ValueError for an EfficientSAM whose processor stretches pictures to what is no whole number of patches."""
    if not hasattr(model, "decode_prompts") or not hasattr(processor.image_processor, "mask_cleaning"):
        return
    size, patch = processor.image_processor.size, model.config.vision_config.patch_size
    if any(side % patch for side in size.values()):
        raise ValueError(
            f"cannot load a promptable model from {name}: size of its processor is {size}, expected multiples of "
            f"{patch}"
        )


def _set_cleaning(processor: Any, cleaning: dict[str, Any], name: str) -> None:
    """Let the processor clean masks in this way; ValueError for one that cannot."""
    if not cleaning:
        return
    if not hasattr(processor.image_processor, "mask_cleaning"):
        flag = next(iter(cleaning)).replace("_", "-")
        raise ValueError(f"--{flag} is for EfficientSAM models, {name} has a {type(processor).__name__}")
    before = processor.image_processor.mask_cleaning or {}
    processor.image_processor.mask_cleaning = {**before, **cleaning}


def model_name(name: str) -> str:
    """The folder that ships for `default`, any other name as it is."""
    from .. import default_checkpoint

    return default_checkpoint() if name == "default" else name


@contextmanager
def joined_processes(device: str | None) -> Iterator[None]:
    """Inside the block the processes of `accelerate launch` or torchrun know each other, each with a GPU of its own.

    A process that is alone does nothing. ValueError for several processes on one named GPU.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    import torch

    if device is not None and torch.device(device).index is not None:
        raise ValueError(f"--device {device}: several processes cannot share it; leave the number out")
    try:
        from accelerate import PartialState
    except ImportError as error:
        raise ImportError("several processes are joined by accelerate: pip install 'efficientsam-hf[eval]'") from error
    PartialState(cpu=device == "cpu" or not torch.cuda.is_available())
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def pick_device(name: str | None) -> Any:
    """The named device, or the best there is; `ValueError` if this machine lacks it."""
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"--device {name} cannot be used on this machine: {reason[:200]}") from error
    return device


def warn_if_emulated(option: str, dtype: str, device: Any) -> None:
    """A line on stderr where the device has no instructions for products of matrices in the dtype."""
    import torch

    from ..machine import is_emulated

    if is_emulated(getattr(torch, dtype), str(device)):
        slow = f"{device} emulates it, which is many times as slow as float32"
        print(f"efficientsam: warning: {option} {dtype}: {slow}", file=sys.stderr)


def check_name(name: str) -> None:
    """`ValueError` for a name that is neither a folder nor could be one on the Hub, before anything is downloaded."""
    if Path(name).is_dir():
        return
    if Path(name).is_file():
        raise ValueError(f"model {name} is a file: give a folder (efficientsam convert makes one of a released .pt)")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise ValueError(f"model {name}: no such folder")
