# SPDX-License-Identifier: Apache-2.0
"""Files and folders of results: written whole or not at all, by one process at a time, and read with care."""

import errno
import gc
import hashlib
import json
import logging
import math
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from PIL import Image


PARTIAL = ".partial-"  # begins the names of what is being written
LOCK, HOLDER = ".lock", ".lock.json"  # the lock stays behind, which holds nobody up; who holds it does not

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# What writers that do not say it by a number say of a full disk: safetensors, and torch of its archives.
DISK_FULL_TEXT = re.compile(
    rf"os error ({'|'.join(map(str, sorted(DISK_FULL)))})\b|No space left on device|Disk quota exceeded|File too large"
    r"|PytorchStreamWriter failed writing|enforce fail at inline_container\.cc.* unexpected pos"
)
NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP}  # some network disks

logger = logging.getLogger(__name__)


class DiskFullError(OSError):
    """A disk or a quota is full."""


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or one that it came from, means that a disk or a quota is full."""
    while error is not None:
        if getattr(error, "errno", None) in DISK_FULL or isinstance(error, DiskFullError):
            return True
        if DISK_FULL_TEXT.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


@contextmanager
def naming_full_disk(path: Path) -> Iterator[None]:
    """What cannot be written there because the disk is full ends as a `DiskFullError` that names the path."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        folder = next(folder for folder in path.absolute().parents if folder.is_dir())
        free = shutil.disk_usage(folder).free / 2**20
        reason = " ".join(str(error).split())[:200]
        raise DiskFullError(f"{path} could not be written, with {free:,.0f} MiB free on its disk: {reason}") from error


def check_writable(folder: Path) -> None:
    """Create the folder where it is missing and try a file in it; `OSError` that names the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(f"cannot write to the folder {folder}: {error.strerror or error}") from error


def check_place(destination: Path) -> None:
    """`OSError` unless something can be made there, by itself and with the folders above it; makes none of them."""
    check_writable(next(folder for folder in destination.absolute().parents if folder.exists()))


def write_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Let `write` make a file under a temporary name in the same folder, then move it to `path`."""
    temporary = path.with_name(f"{PARTIAL}{os.getpid()}-{path.name}")
    with naming_full_disk(path):
        try:
            write(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in UTF-8."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file; what JSON does not know is written as `str` gives it. ValueError for NaN and infinity."""
    if place := _not_finite(content):
        raise ValueError(f"{path} is not written: {place}, and JSON has only finite numbers")
    write_text(path, json.dumps(content, indent=2, default=str) + "\n")


def _not_finite(content: Any, place: str = "") -> str | None:
    """What to say of the first number in some content that is not finite."""
    if isinstance(content, float) and not math.isfinite(content):
        return f"{place or 'it'} is {content}"
    entries = content.items() if isinstance(content, dict) else ()
    entries = enumerate(content) if isinstance(content, (list, tuple)) else entries
    found = (_not_finite(value, f"{place}.{key}".lstrip(".")) for key, value in entries)
    return next((text for text in found if text), None)


def write_png(path: Path, image: Image.Image) -> None:
    """Write a PNG file."""
    write_file(path, lambda temporary: image.save(temporary, format="PNG"))


@contextmanager
def writing_together(folder: Path) -> Iterator[Path]:
    """A folder aside to write files in, which are moved into `folder` at the end: all, or none of them on an error."""
    with naming_full_disk(folder), tempfile.TemporaryDirectory(prefix=PARTIAL, dir=folder) as aside:
        yield Path(aside)
        for path in sorted(Path(aside).iterdir()):
            os.replace(path, folder / path.name)


def write_folder(destination: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder aside, then move it to `destination`; a failed write leaves what is there."""
    partial = destination.with_name(PARTIAL + destination.name)
    shutil.rmtree(partial, ignore_errors=True)
    with naming_full_disk(destination):
        try:
            partial.mkdir(parents=True)
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


def read_json(path: Path, keys: Collection[str] | None = None) -> Any:
    """Content of a JSON file; arguments and errors of `parse_json`, FileNotFoundError if it is not there."""
    return parse_json(path.read_bytes(), str(path), keys)


def parse_json(content: bytes, shown: str, keys: Collection[str] | None = None) -> Any:
    """Content of a JSON text in UTF-8, UTF-16 or UTF-32, with or without a byte order mark.

    With `keys`, objects keep these and no others: half the memory of a large file. Raises ValueError, which calls the
    text `shown`, if it is no JSON: not text at all, cut, with a number of 5,000 digits, nested without end.
    """

    def kept(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key in keys}

    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        del content  # bytes and text together would double what a large file takes
        with _without_garbage_collection():
            return json.loads(text, object_hook=kept if keys else None)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{shown} is not a JSON file, or damaged: {str(error)[:200]}") from None


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """A million new objects would be gone through again and again; none of them is garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a file that has one a line; lines that are none, as where a process was killed, are left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            try:
                line = json.loads(text)
            except (ValueError, RecursionError):
                continue
            if isinstance(line, dict):
                yield line


def checksum(path: Path) -> str:
    """SHA-256 of a file's content, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


class FolderInUseError(OSError):
    """Another process writes in a folder."""


class FolderLock:
    """A folder that one process at a time writes in; ends with `release`, and with the process in any case.

    Raises FolderInUseError that names the process that has it. The same process can have it again.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.lock = FileLock(folder / LOCK, thread_local=False, is_singleton=True)
        try:
            self.lock.acquire(timeout=0)
        except Timeout:
            raise FolderInUseError(f"{folder} is in use by {_holder(folder)}; wait for it, or end it") from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            logger.warning("%s: this disk has no locks; see that no other process writes there", folder)
        write_json(folder / HOLDER, {"pid": os.getpid(), "host": platform.node()})

    def release(self) -> None:
        """Let others have the folder."""
        if self.lock.is_locked:
            (self.folder / HOLDER).unlink(missing_ok=True)
        self.lock.release(force=True)

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *error: Any) -> None:
        self.release()


def writer_of(folder: Path) -> str | None:
    """The other process that has a folder by a `FolderLock`, in words; None if there is none."""
    if not (folder / LOCK).is_file():
        return None
    lock = FileLock(folder / LOCK, thread_local=False, is_singleton=True)
    if lock.is_locked:  # it is this one
        return None
    try:
        with lock.acquire(timeout=0):
            return None
    except Timeout:
        return _holder(folder)
    except OSError:  # a folder that one may not write in, or a disk without locks
        return None


def _holder(folder: Path) -> str:
    """Who has a folder, as far as it says."""
    try:
        holder = read_json(folder / HOLDER)
        return f"process {int(holder['pid'])} on {str(holder['host'])[:100]}"
    except (OSError, ValueError, TypeError, KeyError):
        return "another process"
