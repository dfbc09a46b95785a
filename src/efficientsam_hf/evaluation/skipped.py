# SPDX-License-Identifier: Apache-2.0
"""Pictures that cannot be used: they are left out of a measurement, counted and named."""

import logging
from collections.abc import Callable
from typing import Any

from ..processes import is_main


Report = Callable[[int, str], None]  # (number of the picture, reason)


def try_reading(read: Callable[[int], Any], index: int) -> tuple[Any, str | None]:
    """What `read(index)` returns and None; None and the reason if what it reads is damaged."""
    try:
        return read(index), None
    except (ValueError, OSError) as error:
        return None, str(error)


def report_skipped(skipped: list[tuple[int, str]], count: int, report: Report | None) -> None:
    """Hand each (number, reason) to `report`, or to the log, in the main process.

    Raises ValueError if they are all of the `count` pictures.
    """
    if skipped and len(skipped) == count:
        raise ValueError(f"none of {count} pictures could be used; picture {skipped[0][0]}: {skipped[0][1]}")
    if is_main():
        for number, reason in skipped:
            (report or _warn)(number, reason)


def _warn(number: int, reason: str) -> None:
    logging.getLogger(__name__).warning("picture %d could not be used: %s", number, reason)
