# SPDX-License-Identifier: Apache-2.0
"""Wheel and source distribution: what they carry, and that the installed wheel segments."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image


NOT_SOURCE = shutil.ignore_patterns(
    ".*", "*.egg-info", "__pycache__", "build", "dist", "outputs", "runs", "docs", "node_modules"
)
DATA_FOLDERS = ("checkpoints", "recipes", "templates")


def execute(*command: str | Path, **options) -> str:
    """Standard output of a command; fails with everything it printed."""
    process = subprocess.run(command, capture_output=True, text=True, timeout=600, **options)
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


@pytest.fixture(scope="module")
def distributions(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source distribution, wheel), the wheel built from the source distribution as an index would have it."""
    # A copy, because setuptools leaves traces in the tree it builds and takes files from the ones it finds.
    project = tmp_path_factory.mktemp("build") / "project"
    shutil.copytree(root, project, ignore=NOT_SOURCE)
    execute(sys.executable, "-m", "build", "--no-isolation", "--outdir", project / "dist", project)
    (source,) = (project / "dist").glob("*.tar.gz")
    (wheel,) = (project / "dist").glob("*.whl")
    return source, wheel


def package_files(root: Path) -> set[str]:
    """Everything the checkout has in the package folder, relative to it."""
    package = root / "src" / "efficientsam_hf"
    files = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(package).as_posix() for path in files}


def space_files(root: Path) -> set[str]:
    """Everything in the folder of Spaces, relative to the checkout."""
    files = [path for path in (root / "spaces").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(root).as_posix() for path in files}


def test_wheel_carries_the_whole_package(root: Path, distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as wheel:
        prefix = "efficientsam_hf/"
        carried = {name.removeprefix(prefix) for name in wheel.namelist() if name.startswith(prefix)}
        licenses = [name for name in wheel.namelist() if name.endswith("licenses/LICENSE")]
    assert carried == package_files(root) | space_files(root)
    assert "spaces/efficientsam/app.py" in carried
    assert "py.typed" in carried
    assert any(name.startswith("checkpoints/") and name.endswith(".safetensors") for name in carried)
    assert len(licenses) == 1


def test_source_distribution_carries_package_tests_and_texts(root: Path, distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        carried = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/efficientsam_hf/{name}" for name in package_files(root)} | space_files(root) <= carried
    assert {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "constraints.txt", "tests/conftest.py"} <= carried


def test_installed_wheel_segments(distributions: tuple[Path, Path], photo: Image.Image, tmp_path: Path) -> None:
    site = tmp_path / "site"
    execute(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, distributions[1])
    photo.save(tmp_path / "cat.png")
    # The installed copy goes before the checkout's, which the environment may hold as an editable install.
    environment = {**os.environ, "PYTHONPATH": str(site)}
    location = execute(
        sys.executable, "-c", "import efficientsam_hf; print(efficientsam_hf.__file__)", env=environment, cwd=tmp_path
    )
    assert Path(location.strip()).is_relative_to(site)
    script = "from efficientsam_hf.space import space_folder; print(space_folder())"
    folder = execute(sys.executable, "-c", script, env=environment, cwd=tmp_path)
    assert Path(folder.strip()) == site / "efficientsam_hf" / "spaces" / "efficientsam"
    command = [sys.executable, site / "bin" / "efficientsam", "segment", "cat.png", "--point", "230,120", "-o", "out"]
    execute(*command, env=environment, cwd=tmp_path)
    with Image.open(tmp_path / "out" / "overlay.png") as overlay:
        assert overlay.size == photo.size
    result = json.loads((tmp_path / "out" / "masks.json").read_text(encoding="utf-8"))
    assert [0 < thing["area"] < overlay.width * overlay.height for thing in result["objects"]] == [True]
