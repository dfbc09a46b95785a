# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: complete or not there, the last few and the best kept."""

import shutil
from pathlib import Path

from ..files import PARTIAL


STATE_FILE = "trainer_state.json"


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name: step_120 -> 120."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step_*") if (path / STATE_FILE).is_file()]
    return sorted(folders, key=checkpoint_step)


def prune_checkpoints(run: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the last `keep` checkpoints and the best one."""
    for folder in list_checkpoints(run)[:-keep]:
        if checkpoint_step(folder) != best_step:
            shutil.rmtree(folder)


def remove_leftovers(run: Path) -> None:
    """Delete what interrupted writes left behind."""
    for leftover in (run / "checkpoints").glob(PARTIAL + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
