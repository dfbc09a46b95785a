# SPDX-License-Identifier: Apache-2.0
"""Whatever becomes of the files of a run, it ends with the bits that it would have had, or a line names the file."""

import contextlib
import json
import os
import pickle
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_testing import bounded
from test_trainer import train, weights

from efficientsam_hf.hub.run_record import read_run
from efficientsam_hf.training.checkpoints import update_manifest


pytestmark = pytest.mark.property

STEPS = {"max_steps": 6, "checkpoint_every": 2, "evaluate_every": 2, "keep_checkpoints": 2, "log_every": 2}
VALUES = [None, True, -1, 0, 1.5, 10**20, float("nan"), "", "a", [], {}, [[]], {"step": 1}]
TEXTS = ["", "{}", "[]", "null", "3", '"a"', "{", "NaN", "[" * 50_000, "\ufeff{}", "\x00" * 100, "9" * 6000]
Values = st.sampled_from(VALUES) | st.integers(-(10**30), 10**30) | st.floats() | st.text(max_size=5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    train(folder, lambda module: {"miou": float(module.linear.weight.sum())}, **STEPS)
    (folder / "model" / "config.json").write_text("{}")  # as a model that is exported has one
    return folder


def swap(content: Any, draw: Any) -> Any:
    """Another value at a random place of a JSON document."""
    inside = isinstance(content, (dict, list)) and len(content)
    if not inside or draw(st.integers(0, 3)) == 0:
        return draw(Values)
    key = draw(st.sampled_from(sorted(content))) if isinstance(content, dict) else draw(st.integers(0, inside - 1))
    content[key] = swap(content[key], draw)
    return content


def damage(run: Path, draw: Any) -> None:
    """Do something to one file of a run."""
    path = draw(st.sampled_from(sorted(path for path in run.rglob("*") if path.is_file())))
    content = path.read_bytes()
    kind = draw(st.sampled_from(["cut", "flip", "text", "gone", "swap", "state", "bomb", "other", "step"]))
    if kind == "cut":
        os.truncate(path, draw(st.integers(0, max(len(content) - 1, 0))))
    elif kind == "flip" and content:
        place, bit = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 7))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
    elif kind == "text":
        path.write_text(draw(st.sampled_from(TEXTS)))
    elif kind == "gone":
        path.unlink()
    elif kind == "swap" and path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):  # it was damaged before
            path.write_text(json.dumps(swap(json.loads(content), draw)))
    elif kind == "state" and path.name == "trainer_state.json":  # by somebody who knows of the checksum
        with contextlib.suppress(ValueError, TypeError, RecursionError):
            names = ["step", "images", "elapsed", "best", "nonfinite", "processes", "distributed", "files", "versions"]
            update_manifest(path.parent, {draw(st.sampled_from(names)): draw(Values)})
    elif kind == "bomb":
        path.write_bytes(pickle.dumps(os.getcwd))
    elif kind == "other":
        other = draw(st.sampled_from(sorted(path for path in run.rglob("*") if path.is_file())))
        path.write_bytes(other.read_bytes())
    elif kind == "step" and path.parent.parent.name == "checkpoints":
        with contextlib.suppress(OSError):
            path.parent.rename(path.parent.with_name(f"step_{draw(st.integers(0, 9))}"))


def says_which(error: Exception, run: Path) -> bool:
    text = str(error)
    return str(run) in text or "mixed_precision" in text


@given(st.data())
@bounded
def test_a_damaged_run_ends_as_if_nothing_had_happened_or_names_the_file(whole: Path, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        shutil.copytree(whole, run)
        for _ in range(data.draw(st.integers(1, 3))):
            damage(run, data.draw)
        for best in (False, True):
            with contextlib.suppress(FileNotFoundError):
                try:
                    read_run(run, best)
                except ValueError as error:
                    assert says_which(error, run) and len(str(error)) < 1000
        shutil.rmtree(run / "model", ignore_errors=True)
        try:
            summary = train(run, lambda module: {"miou": 0.1}, resume=True, **STEPS)
        except ValueError as error:
            assert says_which(error, run) and "\n" not in str(error) and len(str(error)) < 2000
            return
        assert summary["steps"] == 6
        expected, found = weights(whole / "model"), weights(run / "model")
        assert all(torch.equal(value, found[name]) for name, value in expected.items())
