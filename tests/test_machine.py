# SPDX-License-Identifier: Apache-2.0
"""What a machine is good at."""

import platform
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from efficientsam_hf import machine
from efficientsam_hf.cli import main


def seconds(monkeypatch, **by_dtype: float) -> None:
    """Let products take so long."""
    machine.relative_seconds.cache_clear()
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype, device: by_dtype[str(dtype).split(".")[1]])


@pytest.fixture(autouse=True)
def forget():
    machine.relative_seconds.cache_clear()
    yield
    machine.relative_seconds.cache_clear()


@pytest.mark.skipif(
    platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "DEFAULT"),
    reason="for CPUs that are known to emulate bfloat16",
)
def test_emulation_shows_beside_other_programs() -> None:
    """Products on several threads would wait for a core, in float32 too."""
    code = "import torch\nm = torch.ones(512, 512)\nwhile True: m @ m"
    others = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    threads = torch.get_num_threads()
    try:
        time.sleep(3)
        for _ in range(5):
            machine.relative_seconds.cache_clear()
            assert machine.relative_seconds(torch.bfloat16, "cpu") > machine.SLOW
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert torch.get_num_threads() == threads


def test_seconds_relative_to_float32(monkeypatch) -> None:
    assert machine._product_seconds(torch.float32, "cpu") > 0
    seconds(monkeypatch, float32=2.0, bfloat16=1.0)
    assert machine.relative_seconds(torch.bfloat16, "cpu") == 0.5
    assert machine.relative_seconds(torch.float32, "cpu") == 1.0


@pytest.mark.parametrize(("capability", "bfloat16"), [((7, 5), float("inf")), ((8, 0), 0.5)])
def test_gpus_are_asked_by_their_number(capability: tuple[int, int], bfloat16: float, monkeypatch) -> None:
    other = (17 - capability[0], 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: capability if device == "cuda:1" else other
    )
    monkeypatch.setattr(torch.version, "hip", None)
    assert machine.relative_seconds(torch.bfloat16, "cuda:1") == bfloat16
    assert machine.relative_seconds(torch.float16, "cuda:1") == 0.5


def test_a_dtype_that_a_device_lacks(monkeypatch) -> None:
    def refuse(dtype, device):
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(machine, "_product_seconds", refuse)
    assert machine.relative_seconds(torch.bfloat16, "cpu") == float("inf")


@pytest.mark.parametrize("slow", [False, True])
def test_commands_warn_of_slow_half_precision(slow: bool, monkeypatch, capsys, tmp_path) -> None:
    seconds(monkeypatch, float32=1.0, bfloat16=300.0 if slow else 0.4)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert main(["benchmark", str(picture), "--model", str(tmp_path), "--dtype", "bfloat16", "--device", "cpu"]) == 2
    assert ("warning: --dtype bfloat16: cpu emulates it" in capsys.readouterr().err) is slow
