# SPDX-License-Identifier: Apache-2.0
"""What computed a number: the machine and the versions, as runs and evaluations record them; what it is good at."""

import math
import os
import platform
import time
from functools import cache
from importlib import metadata
from pathlib import Path

import torch


CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")  # those that decide the speed of matrix products
SLOW = 4  # times as long as in float32: beyond that a dtype is emulated
PACKAGES = ("efficientsam-hf", "torch", "transformers", "accelerate")


def describe_machine(device: torch.device | None = None) -> dict:
    """CPU model, its instruction sets, cores, torch's threads, and the GPUs: all of them, or the one of `device`."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in cpu.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = fields.get("flags", "").split()
    affinity = getattr(os, "sched_getaffinity", None)
    used = range(torch.cuda.device_count()) if device is None else [device] if device.type == "cuda" else []
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_features": [name for name in CPU_FEATURES if name in flags],
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in used],
    }


@cache
def relative_seconds(dtype: torch.dtype, device: str) -> float:
    """How long products of matrices in a dtype take on a device ("cpu", "cuda:1", ...), as a multiple of float32.

    CPUs without instructions for half precision emulate it and take tens to hundreds of times as long. Measured in a
    fraction of a second, on one thread: several would wait for each other where other programs run. A GPU is not
    measured, it says what it emulates. infinity where there is no such dtype.
    """
    if dtype == torch.float32:
        return 1.0
    if torch.device(device).type == "cuda":
        has_bfloat16 = torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
        return 0.5 if has_bfloat16 or dtype != torch.bfloat16 else math.inf
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _product_seconds(dtype, device) / _product_seconds(torch.float32, device)
    except (RuntimeError, TypeError):  # not implemented there
        return math.inf
    finally:
        torch.set_num_threads(threads)


def is_emulated(dtype: torch.dtype, device: str) -> bool:
    """Whether a device has no instructions for products of matrices in the dtype, and takes many times as long."""
    return relative_seconds(dtype, device) > SLOW


def _product_seconds(dtype: torch.dtype, device: str, side: int = 256) -> float:
    """Shortest of a few products of square matrices."""
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def describe_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that compute; None for one that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
