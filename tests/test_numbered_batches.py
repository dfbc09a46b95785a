# SPDX-License-Identifier: Apache-2.0
"""How processes that make batches end."""

import subprocess
import sys


SCRIPT = """
from efficientsam_hf.data.numbered_batches import numbered_batches

def make(number):
    return {"number": number}

if __name__ == "__main__":
    batches = numbered_batches(make, 0, workers=1)
    next(batches)
    raise ValueError("the run failed")
"""


def test_a_run_that_fails_does_not_wait_for_its_workers(tmp_path) -> None:
    (tmp_path / "run.py").write_text(SCRIPT)
    # Workers outlive SIGTERM, by which Python asks them to end at exit; it would then wait for ever.
    result = subprocess.run(
        [sys.executable, str(tmp_path / "run.py")], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 1
    assert result.stderr.strip().splitlines()[-1] == "ValueError: the run failed"
