# SPDX-License-Identifier: Apache-2.0
"""The shape of the code base: imports point one way, model files stay portable, nothing grows without bound."""

import ast
import sys
from pathlib import Path

import pytest


SOURCE = Path(__file__).resolve().parents[1] / "src" / "efficientsam_hf"
CHECKPOINTS = SOURCE / "checkpoints"
MODULES = sorted(path for path in SOURCE.rglob("*.py") if CHECKPOINTS not in path.parents)
MODULE_IDS = [path.relative_to(SOURCE).as_posix() for path in MODULES]

# A part may import parts of a lower level, never one of its own level or above. The package itself
# (`efficientsam_hf/__init__.py`, the public names) counts as a part of its own, between the library and the commands.
LEVELS = {
    "models": 0,
    "metrics": 1,
    "visualization": 1,
    "files": 1,
    "identity": 1,
    "processes": 1,
    "machine": 1,
    "allocator": 1,
    "pipelines": 1,
    "tiles": 1,
    "predictor": 1,
    "space": 1,
    "pretrained": 2,
    "averaging": 3,
    "data": 3,
    "training": 4,
    "evaluation": 4,
    "convert": 5,
    "hub": 4,
    "__init__": 5,
    "cli": 6,
}

# Code in models/ is copied file by file into folders on the Hub, so it may need nothing but these and its siblings.
# (scipy only where holes and specks are to go; the error there says so.)
PORTABLE = {"torch", "numpy", "PIL", "transformers", "huggingface_hub", "scipy"}

# What pyproject.toml declares, by the name it is imported under: core, then extras.
DECLARED = {"torch", "transformers", "huggingface_hub", "safetensors", "numpy", "PIL", "tqdm", "filelock"}
DECLARED |= {"accelerate", "datasets", "fsspec", "peft", "yaml", "pycocotools", "gradio", "scipy"}


def part_of(path: Path) -> str:
    """The part a file belongs to: `data/scenes.py` -> `data`, `metrics.py` -> `metrics`."""
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_modules(path: Path) -> list[str]:
    """Absolute dotted names of everything a file imports, at any depth, relative imports resolved."""
    package = ("efficientsam_hf", *path.relative_to(SOURCE).parent.parts)
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            # `from efficientsam_hf import data` names a part, `from efficientsam_hf.data import x` already did.
            names += [f"{prefix}.{alias.name}" for alias in node.names] if prefix == "efficientsam_hf" else [prefix]
    return names


def imported_parts(path: Path) -> set[str]:
    """The parts of this package that a file imports; public names of the package count as `__init__`."""
    own = [name.split(".")[1:2] for name in imported_modules(path) if name.split(".")[0] == "efficientsam_hf"]
    return {name[0] if name and name[0] in LEVELS else "__init__" for name in own}


def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_imports_point_one_way(path: Path) -> None:
    part = part_of(path)
    assert part in LEVELS, f"{part} has no level; say in LEVELS where it stands"
    upward = {other for other in imported_parts(path) - {part} if LEVELS[other] >= LEVELS[part]}
    assert not upward, f"{path.name} ({part}) imports {sorted(upward)}"


@pytest.mark.parametrize("path", sorted((SOURCE / "models").glob("*.py")), ids=lambda path: path.name)
def test_model_files_are_portable(path: Path) -> None:
    siblings = {f"efficientsam_hf.models.{sibling.stem}" for sibling in path.parent.glob("*.py")}
    foreign = {
        name
        for name in imported_modules(path)
        if name not in siblings and name.split(".")[0] not in PORTABLE | sys.stdlib_module_names
    }
    assert not foreign, f"{path.name} imports {sorted(foreign)}"


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_imports_are_declared(path: Path) -> None:
    roots = {name.split(".")[0] for name in imported_modules(path)} - {"efficientsam_hf"} - sys.stdlib_module_names
    assert roots <= DECLARED, f"{path.name} imports {sorted(roots - DECLARED)}, which pyproject.toml does not declare"


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_files_and_functions_stay_small(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    # A model is one file by the custom of transformers, and it is copied to the Hub as one.
    assert len(text.splitlines()) < (1000 if part_of(path) == "models" else 600)
    long = [node.name for node in functions(path) if node.end_lineno - node.lineno >= 80]
    assert not long, f"over 80 lines: {long}"


@pytest.mark.parametrize("path", MODULES, ids=MODULE_IDS)
def test_files_name_their_license(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or text.startswith("# SPDX-License-Identifier: Apache-2.0\n")


def test_every_package_folder_is_a_package() -> None:
    # A folder without __init__.py would work in the checkout and be left out of the wheel.
    assert [path for path in {module.parent for module in MODULES} if not (path / "__init__.py").exists()] == []


def test_shipped_checkpoint_carries_no_code() -> None:
    # `save_pretrained` copies the model files along; inside the package a copy would only drift from the originals.
    assert list(CHECKPOINTS.rglob("*.py")) == []
    for path in CHECKPOINTS.rglob("*.json"):
        text = path.read_text(encoding="utf-8")
        assert '"auto_map"' not in text and '"custom_pipelines"' not in text, f"{path} points to code beside it"
