# SPDX-License-Identifier: Apache-2.0
"""Writing results: the place is checked before any work, and what is written appears whole or not at all."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image


PARTIAL = ".partial-"  # begins the names of what is being written


def check_writable(folder: Path) -> None:
    """Create the folder where it is missing and try a file in it; `OSError` that names the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder}: {error.strerror or error}") from error


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under a temporary name in the same folder, then move it to `path`."""
    temporary = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; what JSON does not know is written as `str` gives it."""
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG file."""
    write_file(path, lambda temporary: image.save(temporary, format="PNG"))


def write_folder(destination: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder aside, then move it to `destination`; a failed write leaves what is there."""
    partial = destination.with_name(PARTIAL + destination.name)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        write(partial)
        replace_folder(partial, destination)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_folder(source: Path, destination: Path) -> None:
    """Move a complete folder to `destination`; one that is there makes way, and comes back if that fails.

    No file system call swaps two folders on every platform, so there is a moment without either: a process killed in
    it leaves the old folder beside, under the name that `PARTIAL` begins.
    """
    old = destination.with_name(f"{PARTIAL}old-{destination.name}")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        os.replace(destination, old)
    try:
        os.replace(source, destination)
    except OSError:
        if old.exists():
            os.replace(old, destination)
        raise
    shutil.rmtree(old, ignore_errors=True)
