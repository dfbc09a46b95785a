# SPDX-License-Identifier: Apache-2.0
"""In which dtype a run computes, where its arguments leave that open."""

import dataclasses
import logging
from pathlib import Path

import torch

from ..machine import multiplies_well
from .arguments import TrainerArguments
from .run_folder import recorded_arguments


logger = logging.getLogger(__name__)


def settle_precision(arguments: TrainerArguments, device: torch.device) -> TrainerArguments:
    """The arguments with another `mixed_precision` than "auto".

    A resumed run goes on as it began. A new one computes in bfloat16 where the device multiplies it well, else in
    float32. "bf16" stays where it does not, with a warning.
    """
    if arguments.mixed_precision == "bf16" and not multiplies_well(torch.bfloat16, str(device)):
        logger.warning("mixed_precision bf16: %s multiplies it many times as slowly as float32; take auto", device)
    if arguments.mixed_precision != "auto":
        return arguments
    before = recorded_arguments(Path(arguments.output_dir)) if arguments.resume else None
    if before is None:
        precision = "bf16" if multiplies_well(torch.bfloat16, str(device)) else "no"
    else:
        precision = before["mixed_precision"]
    return dataclasses.replace(arguments, mixed_precision=precision)
