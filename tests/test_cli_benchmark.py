# SPDX-License-Identifier: Apache-2.0
"""`efficientsam benchmark` measures what it says it measures."""

import json
from pathlib import Path

import pytest
from PIL import Image

from efficientsam_hf.cli import main


@pytest.fixture
def picture(photo: Image.Image, tmp_path: Path) -> str:
    photo.resize((120, 80)).save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def test_times_and_where_they_come_from(picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [
        "--prompts",
        "1",
        "8",
        "--points-per-crop",
        "2",
        "--repeats",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "bfloat16",
    ]
    assert main(["benchmark", picture, *flags, "--output", str(tmp_path / "times.json")]) == 0
    record = json.loads((tmp_path / "times.json").read_text())
    rows = {row["work"]: row["seconds"] for row in record["rows"]}
    assert list(rows) == ["encoder", "1 prompts", "8 prompts", "everything, 2 x 2"]
    assert min(rows.values()) > 0
    assert record["dtype"] == "bfloat16" and record["machine"]["gpus"] == []
    assert capsys.readouterr().out.count(" ms") == 4


@pytest.mark.parametrize("flags", [["--repeats", "0"], ["--points-per-crop", "0"], ["--prompts", "0"]])
def test_refusals(picture: str, capsys: pytest.CaptureFixture[str], flags: list[str]) -> None:
    assert main(["benchmark", picture, *flags]) == 2
    assert "must be at least 1" in capsys.readouterr().err
