# SPDX-License-Identifier: Apache-2.0
"""This process among those of a run."""

from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from .arguments import TrainerArguments


def process_state(arguments: TrainerArguments) -> PartialState:
    """Number and device of this process; `accelerate launch --cpu` puts it on the CPU as `cpu` of the arguments does.

    Whatever asks first decides for the process, which is why all ask here.
    """
    return PartialState(cpu=arguments.cpu or parse_flag_from_env("ACCELERATE_USE_CPU"))
