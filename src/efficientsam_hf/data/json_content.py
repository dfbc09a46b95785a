# SPDX-License-Identifier: Apache-2.0
"""JSON of strangers, and what its values can safely be read as."""

import gc
import json
import math
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as Python writes a number, so that "07" stays a name


def read_json(path: Path, what: str, keys: Collection[str] | None = None) -> Any:
    """Content of a JSON file, which may begin with a byte order mark; `what` it holds is for messages.

    With `keys`, objects keep these and no others: half the memory of a large file. Raises `FileNotFoundError`, and
    `ValueError` for what is not JSON or is nested too deeply.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{what} {path} does not exist or is not a file")
    return parse_json(path.read_bytes(), str(path), keys)


def parse_json(content: bytes, shown: str, keys: Collection[str] | None = None) -> Any:
    """Content of a JSON text in UTF-8, UTF-16 or UTF-32; arguments and errors as of `read_json`."""

    def kept(entry: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in entry.items() if key in keys}

    try:
        text = content.decode(json.detect_encoding(content), "surrogatepass")
        del content  # bytes and text together would double what a large file takes
        with _without_garbage_collection():
            return json.loads(text, object_hook=kept if keys else None)
    except (ValueError, RecursionError) as error:  # ValueError covers malformed JSON and text that is not UTF-8
        raise ValueError(f"{shown} is not a JSON file: {error}") from None


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


def identity(value: Any) -> int | str | None:
    """An id: 1, 1.0 and "1" are the number 1, other text is itself; None for anything else."""
    if type(value) is int:
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value:
        return int(value) if WHOLE.fullmatch(value) else value
    return None


def positive(value: Any) -> int | None:
    """A whole number of at least 1, which may be text; None for anything else."""
    number = identity(value)
    return number if isinstance(number, int) and number > 0 else None


def finite(value: Any) -> bool:
    """Whether it is a number, and neither NaN nor infinite."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond the largest float
        return False
