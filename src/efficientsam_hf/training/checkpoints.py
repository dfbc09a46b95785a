# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: complete or not there, the last few and the best kept."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from ..files import PARTIAL


STATE_FILE = "trainer_state.json"
BEST_FILE = "best.json"  # in best_model/: the evaluation that it is the best by, and how far the run was
BEST_FIELDS = ("step", "metric", "value")


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
            aside = folder.with_name(PARTIAL + folder.name)  # so that what a kill leaves of it is a leftover
            folder.rename(aside)
            shutil.rmtree(aside)


def read_best(run: Path) -> dict[str, Any] | None:
    """Step, metric and value of the evaluation that best_model/ is the best by, if there is one."""
    path = run / "best_model" / BEST_FILE
    return {name: json.loads(path.read_text())[name] for name in BEST_FIELDS} if path.is_file() else None


def remove_leftovers(run: Path) -> None:
    """Delete what interrupted writes left behind, and put back a folder that was making way for one to come."""
    for old in run.glob(f"{PARTIAL}old-*"):
        destination = run / old.name.removeprefix(f"{PARTIAL}old-")
        if not destination.exists():
            os.replace(old, destination)
    for leftover in (*run.glob(PARTIAL + "*"), *run.glob(f"checkpoints/**/{PARTIAL}*")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)
