# SPDX-License-Identifier: Apache-2.0
"""Writing results: the folder is checked before any work, and a file appears whole or not at all."""

import os
import tempfile
from pathlib import Path

from PIL import Image


def check_writable(folder: Path) -> None:
    """Create the folder where it is missing and try a file in it; `OSError` that names the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder}: {error.strerror or error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file through a temporary name."""
    temporary = _temporary(path)
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG through a temporary name."""
    temporary = _temporary(path)
    image.save(temporary, format="PNG")
    os.replace(temporary, path)


def _temporary(path: Path) -> Path:
    """A name of this process in the same folder, so that moving it is atomic."""
    return path.with_name(f".{path.name}.{os.getpid()}")
