# SPDX-License-Identifier: Apache-2.0
"""Largest difference to the released code's answers, by stage, variant and attention, as a Markdown table.

Usage: python benchmarks/parity.py. It runs tests/test_parity.py, whose every comparison prints its difference.
"""

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
LINE = re.compile(r"^(?P<stage>[a-zA-Z -]+): largest absolute difference (?P<value>[\d.e+-]+)$")
TEST = re.compile(r"tests/test_parity\.py::\w+\[(?P<case>[^\]]+)\]")


def measured(output: str) -> dict[tuple[str, str], dict[str, float]]:
    """Verbose pytest output -> (variant, attention) -> stage -> largest difference."""
    table: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    setting = None
    for line in output.splitlines():
        if found := TEST.search(line):
            names = found["case"].split("-")
            setting = (next(n for n in names if n in ("ti", "s")), next(n for n in names if n in ("sdpa", "eager")))
            line = line.rpartition("] ")[2]
        if (match := LINE.match(line.strip())) and setting:
            stage, value = match["stage"].replace("its ", "their "), float(match["value"])
            table[setting][stage] = max(value, table[setting].get(stage, 0.0))
    return table


def main() -> int:
    command = [sys.executable, "-m", "pytest", "-v", "-s", "-p", "no:cacheprovider", "tests/test_parity.py"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    table = measured(result.stdout)
    if result.returncode or not table:
        print(result.stdout[-2000:], file=sys.stderr)
        return 1
    settings = sorted(table, reverse=True)
    stages = list(table[settings[0]])
    print("| stage | " + " | ".join(f"{variant}, {attention}" for variant, attention in settings) + " |")
    print("|---|" + "---|" * len(settings))
    for stage in stages:
        print(f"| {stage} | " + " | ".join(f"{table[setting][stage]:.1e}" for setting in settings) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
