# SPDX-License-Identifier: Apache-2.0
"""Disks that are really full: small ones in memory, which only root can mount; elsewhere these tests skip."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_feature_cache import make_index, pictures, teacher, vit, write  # noqa: F401 - fixtures
from test_trainer import Line, batches, make_arguments

from efficientsam_hf.cli import main
from efficientsam_hf.data.feature_cache import shard_path
from efficientsam_hf.data.images import ImageFolder
from efficientsam_hf.training.trainer import Trainer


pytestmark = pytest.mark.slow

DISK = 8 * 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 8 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if not hasattr(os, "geteuid") or os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only root can mount a disk of its own")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def leave(disk: Path, pages: int) -> None:
    """Fill a disk but for so many pages of 4 KiB."""
    free = os.statvfs(disk).f_bavail - pages
    (disk / "filler").write_bytes(bytes(4096 * free))
    assert os.statvfs(disk).f_bavail == pages


class Wide(Line):
    """Has weights of 40 pages."""

    def __init__(self):
        super().__init__()
        self.wide = torch.nn.Linear(200, 200)

    def forward(self, batch):
        result = super().forward(batch)
        used = self.wide(batch["x"].repeat(1, 50)).square().mean()
        return result | {"loss": result["loss"] + used}

    def picture(self, batch):
        return Image.effect_noise((200, 200), 50).convert("RGB")


def train(folder: Path, source=batches, **changes) -> dict:
    torch.manual_seed(0)
    settings = {"log_every": 1, "picture_every": 6, **changes}
    return Trainer(Wide(), source, make_arguments(folder, **settings)).train()


def ending(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "step_20" / "model.safetensors")


@pytest.mark.parametrize("pages", [0, 1, 2, 5, 30, 41, 60, 83, 110, 130, 160, 165, 166, 168, 180, 200, 207])
def test_a_run_on_a_disk_that_fills_up(tmp_path: Path, disk: Path, pages: int) -> None:
    """At whichever write that is: a line of the log, a picture, weights, moments, averages, their list, model/."""
    whole, run = tmp_path / "whole", disk / "run"

    def source(start, stage):
        for number, batch in enumerate(batches(start, stage), start):
            if number == 5:
                leave(disk, pages)
            yield batch

    with pytest.raises(OSError, match="could not be written, with 0 MiB free on its disk") as caught:
        train(run, source)
    message = str(caught.value)
    assert re.search(r"The last good checkpoint is \S+step_(5|10); .* with --resume once there is room$", message)
    assert "\n" not in message and not list(run.rglob(".partial-*"))
    (disk / "filler").unlink()
    assert train(run, resume=True)["steps"] == 20
    train(whole)
    one, two = ending(run), ending(whole)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("pages", [0, 1, 2])
def test_features_on_a_disk_that_is_full(tmp_path, disk, teacher, pictures, pages) -> None:  # noqa: F811
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples)
    (disk / "cache").mkdir()
    leave(disk, pages)
    with pytest.raises(OSError, match="could not be written, with 0 MiB free"):
        write(disk / "cache", index, samples, teacher)
    assert not list((disk / "cache").glob(".partial-*"))
    (disk / "filler").unlink()
    write(disk / "cache", index, samples, teacher)
    write(tmp_path / "whole", index, samples, teacher)
    for number in range(index.shards):
        one, two = (load_file(shard_path(folder, number)) for folder in (disk / "cache", tmp_path / "whole"))
        assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("pages", [0, 1, 3])
def test_segmenting_on_a_disk_that_is_full(tmp_path, disk, photo, capsys, pages) -> None:
    photo.save(tmp_path / "photo.png")
    leave(disk, pages)
    assert main(["segment", str(tmp_path / "photo.png"), "--point", "200,150", "-o", str(disk / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("efficientsam: error: ")]
    assert "No space left on device" in line
    assert not list(disk.rglob(".partial-*"))
