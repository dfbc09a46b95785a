# SPDX-License-Identifier: Apache-2.0
"""Memory that a process frees stays with it when it says so."""

import os
import platform
import subprocess
import sys

import pytest


pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told")
SCRIPT = """
import resource, torch
from efficientsam_hf.allocator import keep_freed_memory
kept = {keeps}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24)
before = faults()
for _ in range(4):
    torch.ones(2**24)
print(kept, (faults() - before) / (4 * 2**26 / resource.getpagesize()))
"""


def asked_again(keeps: str, **environment: str) -> tuple[str, float]:
    """What `keeps` says, and the part of four blocks of 64 MiB for which the system was asked again."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    script = SCRIPT.format(keeps=keeps)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=env)
    kept, share = done.stdout.split()
    return kept, float(share)


def test_blocks_are_used_again() -> None:
    kept, share = asked_again("keep_freed_memory()")
    assert kept == "True" and share < 0.3 * asked_again("None")[1]  # pages may be large ones


def test_what_the_environment_says_stands() -> None:
    kept, share = asked_again("keep_freed_memory()", MALLOC_TRIM_THRESHOLD_="131072")
    assert kept == "False" and share > 3 * asked_again("keep_freed_memory()")[1]
