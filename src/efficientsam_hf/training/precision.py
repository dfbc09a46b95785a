# SPDX-License-Identifier: Apache-2.0
"""In which dtype a run computes, where its arguments leave that open."""

import dataclasses
import logging
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list

from ..machine import is_emulated, relative_seconds
from .arguments import TrainerArguments
from .process_state import process_state
from .run_folder import recorded_arguments


logger = logging.getLogger(__name__)


def settle_precision(arguments: TrainerArguments) -> TrainerArguments:
    """The arguments with another `mixed_precision` than "auto", the same in all processes.

    A resumed run goes on as it began. A new one computes in bfloat16 where the main process multiplies it faster than
    float32. Where bfloat16 is emulated, and wanted all the same, the log of the process says so.
    """
    state = process_state(arguments)
    precision = arguments.mixed_precision
    if precision == "auto":
        precision = _found(arguments, state.device) if state.is_main_process else None
        if state.num_processes > 1:
            precision = broadcast_object_list([precision])[0]
    if precision == "bf16" and state.is_main_process and is_emulated(torch.bfloat16, str(state.device)):
        logger.warning("mixed_precision bf16: %s emulates it, which is many times as slow as float32", state.device)
    return dataclasses.replace(arguments, mixed_precision=precision)


def _found(arguments: TrainerArguments, device: torch.device) -> str:
    before = recorded_arguments(Path(arguments.output_dir)) if arguments.resume else None
    if before is not None:
        return before.get("mixed_precision")
    return "bf16" if relative_seconds(torch.bfloat16, str(device)) < 1 else "no"
