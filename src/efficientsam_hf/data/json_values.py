# SPDX-License-Identifier: Apache-2.0
"""What values of a stranger's JSON can safely be read as."""

import math
import re
from typing import Any


WHOLE = re.compile(r"0|-?[1-9][0-9]{0,17}")  # as Python writes a number, so that "07" stays a name


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
