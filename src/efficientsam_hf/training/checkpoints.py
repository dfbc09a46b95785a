# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: complete or not there, the last few and the best kept."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path


PARTIAL = ".partial-"
STATE_FILE = "trainer_state.json"


def write_folder(destination: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder aside, then move it to `destination`, replacing what is there.

    Whoever looks at `destination` sees the old or the new folder whole; a failed write leaves the old one.
    """
    partial = destination.with_name(PARTIAL + destination.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        replace_folder(partial, destination)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def replace_folder(source: Path, destination: Path) -> None:
    """Move a complete folder to `destination`; a folder that is there already makes way in the same breath."""
    old = destination.with_name(PARTIAL + "old-" + destination.name)
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        os.replace(destination, old)
    os.replace(source, destination)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, content: dict) -> None:
    """Write a JSON file aside and move it into place."""
    partial = path.with_name(PARTIAL + path.name)
    partial.write_text(json.dumps(content, indent=2, default=str) + "\n")
    os.replace(partial, path)


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name: step_120 -> 120."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    folders = [path for path in (run / "checkpoints").glob("step_*") if (path / STATE_FILE).is_file()]
    return sorted(folders, key=checkpoint_step)


def prune_checkpoints(run: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the last `keep` checkpoints and the best one, and what interrupted writes left behind."""
    for folder in list_checkpoints(run)[:-keep]:
        if checkpoint_step(folder) != best_step:
            shutil.rmtree(folder)
    for leftover in (run / "checkpoints").glob(PARTIAL + "*"):
        shutil.rmtree(leftover, ignore_errors=True)
