# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a run: complete or not there, checked before one is taken, the last few and the best kept."""

import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..files import PARTIAL, checksum, read_json, write_json
from ..machine import describe_versions
from .run_state import AVERAGE, OLD_AVERAGE, WEIGHTS, open_old


STATE_FILE = "trainer_state.json"  # how far the run was, and the list of the checkpoint's files
COUNTS = ("step", "images", "nonfinite", "processes")  # fields of it
BEST_FILE = "best.json"  # in best_model/: the evaluation that it is the best by, and how far the run was
BEST_FIELDS = ("step", "metric", "value")


logger = logging.getLogger(__name__)


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name: step_120 -> 120."""
    return int(folder.name.removeprefix("step_"))


def list_checkpoints(run: Path) -> list[Path]:
    """Checkpoints of a run, oldest first; none is half written, but any may have been damaged since."""
    folders = [path for path in (run / "checkpoints").glob("step_*") if re.fullmatch("step_[0-9]+", path.name)]
    return sorted(folders, key=checkpoint_step)


def write_manifest(folder: Path, state: dict[str, Any]) -> None:
    """Write the last file of a checkpoint: the state of the loop, and its other files with sizes and checksums."""
    others = sorted(path for path in folder.iterdir() if path.name != STATE_FILE)
    files = {path.name: {"bytes": path.stat().st_size, "sha256": checksum(path)} for path in others}
    _write_state(folder, {**state, "versions": describe_versions(), "files": files})


def update_manifest(folder: Path, state: dict[str, Any]) -> None:
    """Write another state of the loop beside the files that are there."""
    _write_state(folder, read_json(folder / STATE_FILE) | state)


def _write_state(folder: Path, content: dict[str, Any]) -> None:
    write_json(folder / STATE_FILE, content | {"sha256": _own_checksum(content)})


def _own_checksum(content: dict[str, Any]) -> str:
    """Of the manifest, but for this field."""
    text = json.dumps({name: value for name, value in content.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """State of the loop in a checkpoint; ValueError that says what is wrong with it."""
    content = read_json(folder / STATE_FILE)
    if not isinstance(content, dict):
        raise ValueError(f"{STATE_FILE} is damaged, it holds no object")
    for name in (*COUNTS, "elapsed"):
        value = content.get(name)
        if not _is_number(value) or value < 0 or (name in COUNTS and not isinstance(value, int)):
            raise ValueError(f"{STATE_FILE} is damaged: {name} is {repr(value)[:50]}, expected a number of at least 0")
    if content.get("best") is not None:
        check_best(content["best"], STATE_FILE)
    if content["step"] != checkpoint_step(folder):
        raise ValueError(f"{STATE_FILE} is of step {content['step']}, and the folder's name of another")
    if "files" in content and content.get("sha256") != _own_checksum(content):
        raise ValueError(f"{STATE_FILE} is damaged: its checksum is another")
    return content


def check_best(best: Any, name: str) -> None:
    """ValueError unless it says which evaluation was the best: a step, a metric and its value."""
    good = isinstance(best, dict) and isinstance(best.get("metric"), str) and isinstance(best.get("step"), int)
    if not good or not _is_number(best.get("step")) or not _is_number(best.get("value")):
        raise ValueError(f"{name} is damaged: it does not say which evaluation was the best")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 2**63  # NaN is not


def is_old(folder: Path, manifest: dict[str, Any]) -> bool:
    """Whether an earlier version wrote a checkpoint, without a list of its files."""
    return "files" not in manifest and (folder / OLD_AVERAGE).is_file()


def check_checkpoint(folder: Path) -> None:
    """ValueError that says what is wrong with a checkpoint: a file that is gone or another, weights not finite."""
    try:
        manifest = read_manifest(folder)
        if is_old(folder, manifest):
            _check_old(folder)
        else:
            _check_files(folder, manifest.get("files"))
            _check_finite(folder / AVERAGE)
        _check_finite(folder / WEIGHTS)
    except OSError as error:
        raise ValueError(f"a file is missing or cannot be read: {error}") from None


def _check_files(folder: Path, files: Any) -> None:
    if not isinstance(files, dict) or not {WEIGHTS, AVERAGE} <= set(files):
        raise ValueError(f"{STATE_FILE} has no list of its files")
    for name, said in files.items():
        path = folder / Path(name).name
        if not isinstance(said, dict):
            raise ValueError(f"{STATE_FILE} is damaged: {name} is {str(said)[:50]}, expected its size and checksum")
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != said.get("bytes"):
            raise ValueError(f"{name} is cut: {path.stat().st_size} bytes, expected {str(said.get('bytes'))[:50]}")
        if checksum(path) != said.get("sha256"):
            raise ValueError(f"{name} is damaged: its checksum is another")


def _check_old(folder: Path) -> None:
    """ValueError if a pickle of an earlier version's checkpoint cannot be opened without running code."""
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".pkl", ".pt")):
        content = open_old(path)
        if path.name == OLD_AVERAGE and not _has_averages(content):
            raise ValueError(f"{path.name} is damaged: it does not hold finite averages")


def _has_averages(content: Any) -> bool:
    averages = content.get("averages") if isinstance(content, dict) else None
    return isinstance(averages, list) and all(
        isinstance(tensor, torch.Tensor) and bool(tensor.isfinite().all()) for tensor in averages
    )


def _check_finite(path: Path) -> None:
    """ValueError if a tensor of a file holds NaN or infinity, or the file is none of safetensors."""
    try:
        with safe_open(path, "pt") as file:
            bad = [name for name in file.keys() if not file.get_tensor(name).isfinite().all()]  # noqa: SIM118
    except (SafetensorError, RuntimeError) as error:
        raise ValueError(f"{path.name} is damaged: {error}") from None
    if bad:
        raise ValueError(f"{path.name} is damaged: {bad[0]} is not finite")


def last_good_checkpoint(run: Path) -> Path | None:
    """The last checkpoint that is whole; None of a run that has none yet.

    Those after it that are damaged are named in the process's log and set aside under another name, so that none of
    them counts as one any more. Raises ValueError, which says what to do, where all are damaged.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(list_checkpoints(run)):
        try:
            check_checkpoint(folder)
        except ValueError as error:
            damaged[folder] = str(error)[:300]
            continue
        for other, problem in damaged.items():
            aside = _set_aside(other).name
            logger.warning("resume: %s: %s. It is %s now; the run goes on from %s", other, problem, aside, folder.name)
        return folder
    if damaged:
        problems = "; ".join(f"{folder.name}: {problem}" for folder, problem in damaged.items())
        raise ValueError(
            f"resume: no checkpoint in {run} is whole ({problems}). Bring one back from a copy, or begin a new run in "
            f"another output_dir, with --model {run / 'model'} to go on from its weights"
        )
    return None


def _set_aside(folder: Path) -> Path:
    """Move a damaged checkpoint to a name that is none of a checkpoint's."""
    aside = folder.with_name(f"damaged_{folder.name}")
    shutil.rmtree(aside, ignore_errors=True)
    return folder.rename(aside)


def prune_checkpoints(run: Path, keep: int, best_step: int | None) -> None:
    """Delete all but the last `keep` checkpoints and the best one."""
    for folder in list_checkpoints(run)[:-keep]:
        if checkpoint_step(folder) != best_step:
            aside = folder.with_name(PARTIAL + folder.name)  # so that what a kill leaves of it is a leftover
            folder.rename(aside)
            shutil.rmtree(aside)


def read_best(run: Path) -> dict[str, Any] | None:
    """Step, metric and value of the evaluation that best_model/ is the best by, if there is one.

    Damage is named in the process's log, and as good as none.
    """
    path = run / "best_model" / BEST_FILE
    if not path.is_file():
        return None
    try:
        content = read_json(path)
        check_best(content, str(path))
    except ValueError as error:
        logger.warning("resume: %s; what was the best is taken from the checkpoint", error)
        return None
    return {name: content[name] for name in BEST_FIELDS}


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
