# SPDX-License-Identifier: Apache-2.0
"""What a machine is good at."""

import pytest
import torch
from PIL import Image

from efficientsam_hf import machine
from efficientsam_hf.cli import main


def seconds(monkeypatch, **by_dtype: float) -> None:
    """Let products take so long."""
    machine.multiplies_well.cache_clear()
    monkeypatch.setattr(machine, "_product_seconds", lambda dtype, device: by_dtype[str(dtype).split(".")[1]])


@pytest.fixture(autouse=True)
def forget():
    yield
    machine.multiplies_well.cache_clear()


def test_float32_is_never_slow() -> None:
    assert machine.multiplies_well(torch.float32, "cpu")
    assert 0 < machine._product_seconds(torch.float32, "cpu") < 0.1


@pytest.mark.parametrize(("half", "well"), [(0.3, True), (2.0, True), (300.0, False)])
def test_emulated_products_are_found(half: float, well: bool, monkeypatch) -> None:
    seconds(monkeypatch, float32=1.0, bfloat16=half)
    assert machine.multiplies_well(torch.bfloat16, "cpu") is well


def test_a_dtype_that_a_device_lacks(monkeypatch) -> None:
    def refuse(dtype, device):
        raise RuntimeError("not implemented for 'BFloat16'")

    machine.multiplies_well.cache_clear()
    monkeypatch.setattr(machine, "_product_seconds", refuse)
    assert not machine.multiplies_well(torch.bfloat16, "cpu")


@pytest.mark.parametrize("slow", [False, True])
def test_commands_warn_of_slow_half_precision(slow: bool, monkeypatch, capsys, tmp_path) -> None:
    seconds(monkeypatch, float32=1.0, bfloat16=300.0 if slow else 0.4)
    picture = tmp_path / "picture.png"
    Image.new("RGB", (8, 8)).save(picture)
    assert main(["benchmark", str(picture), "--model", str(tmp_path), "--dtype", "bfloat16", "--device", "cpu"]) == 2
    assert ("warning: --dtype bfloat16: cpu multiplies it many times" in capsys.readouterr().err) is slow
