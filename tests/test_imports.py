# SPDX-License-Identifier: Apache-2.0
"""The package imports and runs with nothing but its core dependencies, and importing it stays cheap."""

import subprocess
import sys
from pathlib import Path

import pytest


# Takes packages out of the import system's sight: not found, and so not available to transformers either.
WITHOUT = """
import importlib, sys
from importlib.machinery import PathFinder

absent = set(sys.argv[1].split(","))

class Finder:
    invalidate_caches = PathFinder.invalidate_caches

    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.partition(".")[0] in absent else PathFinder.find_spec(name, path, target)

    @staticmethod
    def find_distributions(context):
        return [d for d in PathFinder.find_distributions(context) if d.name not in absent]

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
for name in absent:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        pass
    else:
        sys.exit(f"{name} can be imported: this test would show nothing")
"""

IMPORT_ALL = """
import pkgutil
import efficientsam_hf

for module in pkgutil.walk_packages(efficientsam_hf.__path__, "efficientsam_hf."):
    if not module.name.startswith(sys.argv[2]) and not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""

PREDICT = """
import numpy as np, torch
from efficientsam_hf import EfficientSamConfig, EfficientSamImageProcessor, EfficientSamModel, EfficientSamProcessor

config = EfficientSamConfig.from_preset("ti", vision_config={"image_size": 64, "num_hidden_layers": 1})
model = EfficientSamModel(config).eval()
processor = EfficientSamProcessor(EfficientSamImageProcessor(size={"height": 64, "width": 64}))
image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
inputs = processor(images=image, input_points=[[[[10, 20]], [[30, 5]]]], return_tensors="pt")
with torch.no_grad():
    outputs = model(**inputs)
masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])
print(tuple(masks[0].shape), masks[0].dtype)
"""


def run(code: str, *arguments: str) -> str:
    """Standard output of `code` in a process of its own; fails with what it wrote to standard error."""
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


def test_core_runs_without_optional_packages() -> None:
    absent = "torchvision,datasets,accelerate,gradio,pycocotools,skimage,scipy"
    assert run(WITHOUT + IMPORT_ALL + PREDICT, absent, "efficientsam_hf.training") == "(2, 3, 30, 40) torch.bool"


def test_training_imports_without_datasets() -> None:
    assert run(WITHOUT + IMPORT_ALL, "torchvision,datasets,gradio,pycocotools,skimage,scipy", "none left out") == ""


def test_import_brings_nothing_heavy_along() -> None:
    """Compared with what torch and the same parts of transformers import by themselves."""
    names = "import sys; print(*sorted({name.partition('.')[0] for name in sys.modules}))"
    bare = run(
        "import torch, numpy, PIL.Image, transformers.modeling_utils, transformers.processing_utils, "
        "transformers.image_processing_utils, transformers.models.auto.modeling_auto, "
        "transformers.models.auto.image_processing_auto, transformers.models.auto.processing_auto;" + names
    )
    ours = run("import efficientsam_hf;" + names)
    heavy = {"accelerate", "datasets", "gradio", "matplotlib", "pandas", "pyarrow", "pycocotools", "scipy", "skimage"}
    heavy |= {"torchvision", "yaml", "cv2", "onnx"}
    assert (set(ours.split()) - set(bare.split())) & heavy == set()


def test_import_of_the_command_line_is_cheap() -> None:
    """`efficientsam --help` should not wait for torch's optional companions."""
    loaded = run("import efficientsam_hf.cli, sys; print(*sys.modules)").split()
    assert not {"datasets", "gradio", "pandas", "pyarrow", "pycocotools", "skimage"} & set(loaded)


@pytest.mark.parametrize("name", ["efficientsam_hf"])
def test_public_names_exist(name: str) -> None:
    package = __import__(name)
    assert package.__all__ == sorted(set(package.__all__), key=package.__all__.index)
    for public in package.__all__:
        getattr(package, public)


def test_package_is_typed() -> None:
    import efficientsam_hf

    assert (Path(efficientsam_hf.__file__).parent / "py.typed").exists()
