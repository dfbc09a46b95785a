# SPDX-License-Identifier: Apache-2.0
"""torch's first multi-threaded call of an elementwise function may be wrong in one thread's share (pytorch#188792).

Importing the modeling code therefore calls each once on one element.
"""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from efficientsam_hf.models import modeling_efficientsam_vision


FUNCTIONS = ("sqrt", "exp", "log", "sin", "cos", "tanh", "erf")
PROCESSES = 40

# Answers with the largest relative difference of a first call on two threads to the same call on one.
CHILD = """
import sys
import torch
from efficientsam_hf.models import modeling_efficientsam

torch.set_num_threads(2)
values = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)) * 3 + 0.1
features = torch.randn(1, 32, 128, 128, generator=torch.Generator().manual_seed(0))

def layer_norm_2d(features):
    centred = features - features.mean(1, keepdim=True)
    return centred / torch.sqrt(centred.pow(2).mean(1, keepdim=True) + 1e-6)

functions = [getattr(torch, name) for name in sys.argv[1:]]
first = [layer_norm_2d(features)] + [function(values) for function in functions]
torch.set_num_threads(1)
again = [layer_norm_2d(features)] + [function(values) for function in functions]
print(max(float(((a - b).abs() / b.abs().clamp(min=1e-3)).max()) for a, b in zip(first, again)))
"""


def test_importing_calls_every_function_on_one_element(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def recorded(name: str, function):
        def call(value: torch.Tensor, *args, **kwargs) -> torch.Tensor:
            calls.append((name, value.numel(), value.device.type))
            return function(value, *args, **kwargs)

        return call

    for module, names in ((torch, FUNCTIONS), (F, ("gelu", "softmax"))):
        for name in names:
            monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    path = Path(modeling_efficientsam_vision.__file__)
    spec = importlib.util.spec_from_file_location(f"{modeling_efficientsam_vision.__name__}_again", path)
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert {name for name, _, _ in calls} == {*FUNCTIONS, "gelu", "softmax"}
    assert {(count, device) for _, count, device in calls} == {(1, "cpu")}


@pytest.mark.slow
def test_first_calls_are_exact_in_fresh_processes() -> None:
    differences = []
    for _ in range(PROCESSES):
        process = subprocess.run(
            [sys.executable, "-c", CHILD, *FUNCTIONS], capture_output=True, text=True, timeout=300, check=False
        )
        assert process.returncode == 0, process.stderr
        differences.append(float(process.stdout))
    assert max(differences) <= 1e-6, f"{sum(d > 1e-6 for d in differences)} of {PROCESSES} differ: {differences}"
