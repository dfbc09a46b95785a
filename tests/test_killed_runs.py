# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, and gone on with, end as if nothing had happened."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(not hasattr(os, "fork"), reason="killed runs are forked")
def test_a_run_killed_at_any_moment_ends_as_one_that_was_not(tmp_path: Path) -> None:
    """In a step, in a batch, in half a file, and before each operation on the files of its folder in turn."""
    result = killed_runs(tmp_path)
    assert len(result["attempts"]) > 90  # a run of six steps has more than a hundred operations
    assert result["wrong"] == {}
    assert result["whole"]["best"]["step"] == 4 and result["whole"]["steps"] == 6


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="killed runs are forked")
def test_twenty_random_moments(tmp_path: Path) -> None:
    """Once, or twice in a row."""
    result = killed_runs(tmp_path, "20")
    assert len(result["attempts"]) == 20 and result["wrong"] == {}


def killed_runs(folder: Path, *options: str) -> dict:
    """What the script of that name prints."""
    tests = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(tests / "killed_runs.py"), str(folder), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)
