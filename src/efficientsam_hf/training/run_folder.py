# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its arguments, its log, and a description of what it ran on."""

import json
import math
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, fields
from datetime import datetime, timezone
from difflib import ndiff
from pathlib import Path
from typing import Any, BinaryIO

from ..files import LOCK, PARTIAL, FolderLock, naming_full_disk, read_json, read_json_lines, write_json
from ..machine import describe_machine, describe_versions
from .arguments import TrainerArguments
from .checkpoints import remove_leftovers


ARGUMENTS = "args.json"


def take_run(arguments: TrainerArguments, needed: int) -> FolderLock:
    """Open the run folder for this process alone; FolderInUseError if another one has it, else as `open_run`.

    A new run makes its folder only where there is room for `needed` bytes, and one that goes on makes room first by
    deleting what interrupted writes have left.
    """
    run = Path(arguments.output_dir)
    if not (run / ARGUMENTS).is_file():
        _check_new(arguments)
        check_room(run, needed)
        run.mkdir(parents=True, exist_ok=True)
    lock = FolderLock(run)
    try:
        if arguments.resume:
            remove_leftovers(run)
            check_room(run, needed)
        open_run(arguments)
    except BaseException:
        lock.release()
        raise
    return lock


def open_run(arguments: TrainerArguments) -> Path:
    """Create the run folder, or check that it can be resumed; returns its path.

    Raises ValueError if it holds another run, if there is nothing to resume, or if the arguments that decide what the
    run computes differ from those it was started with.
    """
    run = Path(arguments.output_dir)
    record = run / ARGUMENTS
    if not record.is_file():
        _check_new(arguments)
        (run / "checkpoints").mkdir(parents=True, exist_ok=True)
        write_json(record, describe_run(arguments))
        remove_leftovers(run)  # of a run that was killed before it had written as much
        return run
    if not arguments.resume:
        raise ValueError(f"output_dir: {run} already holds a run; continue it with resume, or choose another folder")
    # A run that began before an argument existed computes what the argument's default stands for.
    defaults = {item.name: item.default for item in fields(arguments)}
    before, now = defaults | recorded_arguments(run), asdict(arguments)
    differing = [name for name in now if name not in arguments.may_change and before[name] != now[name]]
    if differing:
        changes = ", ".join(_describe_change(name, before[name], now[name]) for name in differing)
        raise ValueError(f"resume: {run} was started with other arguments: {changes}")
    (run / "checkpoints").mkdir(exist_ok=True)
    return run


def _check_new(arguments: TrainerArguments) -> None:
    """ValueError unless a run can begin in a folder that holds none."""
    run = Path(arguments.output_dir)
    if arguments.resume:
        raise ValueError(f"resume: there is no run in {run}")
    if run.exists() and not _is_new(run):
        raise ValueError(f"output_dir: {run} exists and is no run folder; choose another one")


def _describe_change(name: str, before: Any, now: Any) -> str:
    """What an argument was and is; of texts of many lines those that differ, - and +."""
    if isinstance(before, str) and isinstance(now, str) and "\n" in before:
        lines = ndiff(before.splitlines(), now.splitlines())
        return f"{name} differs in {[f'{line[0]} {line[1:].strip()}' for line in lines if line[0] in '-+']}"
    return f"{name} was {repr(before)[:500]} and is {now!r}"


def recorded_arguments(run: Path) -> dict[str, Any] | None:
    """Arguments of the run in a folder; None if there is none, ValueError if they cannot be read."""
    record = run / ARGUMENTS
    if not record.is_file():
        return None
    try:
        return dict(read_json(record)["arguments"])
    except (ValueError, TypeError, KeyError):
        raise ValueError(
            f"{record} is damaged, it holds no arguments of a run. Bring it back from a copy, or begin a new run in "
            f"another output_dir, with --model {run / 'model'} to go on from its weights"
        ) from None


def _is_new(run: Path) -> bool:
    """Whether there is nothing in a folder but what a run leaves that is killed in its first moment."""
    if not run.is_dir():
        return False
    others = [path for path in run.iterdir() if not path.name.startswith((PARTIAL, LOCK))]
    return not others or (others == [run / "checkpoints"] and not any(others[0].iterdir()))


def describe_run(arguments: TrainerArguments) -> dict:
    """Arguments, which of them name files or folders here, command line, versions and machine, for args.json."""
    values = asdict(arguments)
    return {
        "arguments": values,
        "local": [name for name, value in values.items() if isinstance(value, str) and os.path.exists(value)],
        "command": shlex.join(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": describe_versions(),
        "machine": describe_machine(),
    }


def check_room(folder: Path, needed: int) -> None:
    """`OSError` if the disk that holds the folder, or will, has less than `needed` bytes free."""
    there = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        raise OSError(
            f"output_dir: the run needs {needed / 2**20:,.0f} MiB for its checkpoints and model, and the disk of "
            f"{folder} has {free / 2**20:,.0f} MiB free"
        )


def _rounded(value: float) -> float | None:
    """A number to six digits; None for NaN, such as a mean over nothing, which JSON does not have."""
    return None if math.isnan(value) else float(f"{value:.6g}")


class RunLog:
    """Appends lines to log.jsonl, each a JSON object with the time it was written; does nothing where not `active`."""

    def __init__(self, path: Path, active: bool = True):
        self.path = path
        self.active = active

    def __call__(self, event: str, **values) -> None:
        if not self.active:
            return
        rounded = {name: _rounded(v) if isinstance(v, float) else v for name, v in values.items()}
        line = json.dumps({"event": event, "time": round(time.time(), 3), **rounded}, default=str)
        with naming_full_disk(self.path), self.path.open("a+b") as file:
            if self._ends_torn(file):
                line = "\n" + line
            file.write((line + "\n").encode())

    @staticmethod
    def _ends_torn(file: BinaryIO) -> bool:
        """Whether the last line is not whole: a disk was full, or a process killed, while it was written."""
        if not file.seek(0, os.SEEK_END):
            return False
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"

    def count_skipped(self) -> int:
        """Different samples that the log names as skipped."""
        lines = read_json_lines(self.path)
        return len({str(line.get("sample")) for line in lines if line.get("event") == "skipped"})
