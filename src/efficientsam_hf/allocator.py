# SPDX-License-Identifier: Apache-2.0
"""What becomes of memory that a process frees."""

import ctypes
import os
import platform


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # parameters of mallopt(3), from glibc's malloc.h
VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next request; whether it does now.

    A training step on a CPU asks for hundreds of megabytes in large blocks and frees them all. glibc returns each to
    the system at once, which clears every page again when the next step asks for it. Nothing happens where the C
    library is another, and where a variable of the environment says what malloc is to do. The process stays as large
    as it ever was: this is for one that does nothing else.
    """
    chosen = any(name in os.environ for name in VARIABLES) or "glibc.malloc." in os.environ.get("GLIBC_TUNABLES", "")
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    library = ctypes.CDLL(None)
    return bool(library.mallopt(M_MMAP_MAX, 0) and library.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
