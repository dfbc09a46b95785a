# SPDX-License-Identifier: Apache-2.0
"""Puts the Space's folder into the wheel; everything else about the package is in pyproject.toml.

The Space is one folder, complete as it is uploaded, and no package: it lies outside `src` and is copied when a wheel
is built. An editable installation finds it in the checkout (src/efficientsam_hf/space.py).
"""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


SPACES = Path("spaces")


class BuildWithSpaces(build_py):
    """The usual build, and the folder `spaces` beside the modules of the package."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            destination = Path(self.build_lib) / "efficientsam_hf" / SPACES
            shutil.rmtree(destination, ignore_errors=True)
            shutil.copytree(SPACES, destination, ignore=shutil.ignore_patterns("__pycache__", "*.pyc", ".*"))


setup(cmdclass={"build_py": BuildWithSpaces})
