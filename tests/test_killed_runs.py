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
    tests = Path(__file__).parent
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(tests / "killed_runs.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert len(result["attempts"]) > 90  # a run of six steps has more than a hundred operations
    assert result["wrong"] == {}
    assert result["whole"]["best"]["step"] == 4 and result["whole"]["steps"] == 6
