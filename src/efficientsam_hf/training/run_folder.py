# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: its arguments, its log, and a description of where it ran."""

import json
import os
import platform
import shlex
import sys
import time
from dataclasses import asdict
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

from .arguments import TrainerArguments
from .checkpoints import write_json


def open_run(arguments: TrainerArguments) -> Path:
    """Create the run folder, or check that it can be resumed; returns its path.

    Raises ValueError if it holds another run, if there is nothing to resume, or if the arguments that decide what the
    run computes differ from those it was started with.
    """
    run = Path(arguments.output_dir)
    record = run / "args.json"
    if not record.is_file():
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise ValueError(f"output_dir: {run} exists and is no run folder; choose another one")
        (run / "checkpoints").mkdir(parents=True)
        write_json(record, describe_run(arguments))
        return run
    if not arguments.resume:
        raise ValueError(f"output_dir: {run} already holds a run; continue it with resume, or choose another folder")
    before, now = json.loads(record.read_text())["arguments"], asdict(arguments)
    differing = [name for name in now if name not in arguments.may_change and before.get(name) != now[name]]
    if differing:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in differing)
        raise ValueError(f"resume: {run} was started with other arguments: {changes}")
    (run / "checkpoints").mkdir(exist_ok=True)
    return run


def describe_run(arguments: TrainerArguments) -> dict:
    """Arguments, command line, versions and machine, for args.json."""
    return {
        "arguments": asdict(arguments),
        "command": shlex.join(sys.argv),
        "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("efficientsam-hf", "torch", "transformers", "accelerate")},
        "python": platform.python_version(),
        "machine": describe_machine(),
    }


def describe_machine() -> dict:
    """CPU model, instruction sets that matter for speed, cores, torch's threads, and the GPUs."""
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in cpu.splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    features = fields.get("flags", "").split()
    affinity = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_features": [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if name in features],
        "cores": len(affinity(0)) if affinity else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


class RunLog:
    """Appends lines to log.jsonl, each a JSON object with the time it was written; does nothing where not `active`."""

    def __init__(self, path: Path, active: bool = True):
        self.path = path
        self.active = active

    def __call__(self, event: str, **values) -> None:
        if not self.active:
            return
        rounded = {name: float(f"{v:.6g}") if isinstance(v, float) else v for name, v in values.items()}
        line = json.dumps({"event": event, "time": round(time.time(), 3), **rounded}, default=str)
        with self.path.open("a") as file:
            file.write(line + "\n")
