# SPDX-License-Identifier: Apache-2.0
"""Property-based tests: whatever comes in, what comes out is a result or a documented error, in time and in bounds.

The files test_property_*.py hold them, each test `@given(...)` above `@bounded`, each file marked
`pytestmark = pytest.mark.property`. The default run tries 100 examples of each, `make test-slow` 2,000, the same ones
every time; `make fuzz MINUTES=30` tries others for as long as asked.
"""

import faulthandler
import functools
import resource
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from hypothesis import HealthCheck, settings


PROFILES = {"default": 100, "slow": 2000, "fuzz": 2000}
SECONDS = 60  # an example that takes longer hangs: the process ends with a traceback of where
MEMORY = 512 * 2**20  # bytes that one example may add to what the process has held at most


def register_profiles() -> None:
    """Numbers of examples by name, for HYPOTHESIS_PROFILE; those of `default` and `slow` are the same on every run."""
    for name, examples in PROFILES.items():
        settings.register_profile(
            name,
            max_examples=examples,
            derandomize=name != "fuzz",
            print_blob=True,
            database=None,
            deadline=None,  # the machine is noisy; `bounded` ends what hangs
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
        )


def bounded(test: Callable[..., Any]) -> Callable[..., Any]:
    """End each example of a property that hangs or takes too much memory; goes below `@given`."""

    @functools.wraps(test)
    def example(*args: Any, **kwargs: Any) -> None:
        with within_bounds():
            test(*args, **kwargs)

    return example


@contextmanager
def within_bounds(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """What runs inside must end in time, even in C, and must not raise the process's peak memory by more."""
    before = _peak_memory()
    faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
    grown = _peak_memory() - before
    assert grown <= memory, f"one example took {grown / 2**20:,.0f} MiB"


def _peak_memory() -> int:
    """Bytes that the process has held at most."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
