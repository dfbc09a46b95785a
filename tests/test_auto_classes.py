# SPDX-License-Identifier: Apache-2.0
"""Auto classes: by import here, and by the code a saved folder carries in a process without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoProcessor,
    MaskGenerationPipeline,
)

import efficientsam_hf.models
from efficientsam_hf import (
    EfficientSamBackbone,
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
)


PROMPTS = {"input_points": [[[[10, 20], [30, 5]], [[3, 4]]]], "input_labels": [[[1, 0], [1]]]}
GENERATE = {"points_per_crop": 4, "pred_iou_thresh": 0.0, "stability_score_thresh": 0.0}

# Runs where this package cannot be imported: everything comes from the folder of argument 1, and goes to argument 2.
CHILD = """
import json, sys
sys.modules["efficientsam_hf"] = None

import numpy as np, torch
from PIL import Image
from transformers import (
    AutoConfig, AutoImageProcessor, AutoModel, AutoModelForMaskGeneration, AutoProcessor, pipeline
)

folder, destination, prompts, generate = sys.argv[1], sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4])
remote = {"trust_remote_code": True}
image = Image.open(folder + "/picture.png")
processor = AutoProcessor.from_pretrained(folder, **remote)
inputs = processor(images=image, return_tensors="pt", **prompts)
answers = {}
for auto in (AutoModel, AutoModelForMaskGeneration):
    model = auto.from_pretrained(folder, **remote)
    assert type(model).__name__ == "EfficientSamModel", type(model)
    assert type(model).__module__.startswith("transformers_modules."), type(model).__module__
    with torch.no_grad():
        outputs = model(**inputs)
    answers[auto.__name__] = outputs.pred_masks.numpy()
assert AutoConfig.from_pretrained(folder, **remote).model_type == "efficientsam"
has_auto = type(AutoImageProcessor).__name__ != "DummyObject"  # transformers 5.17 has it only beside torchvision
image_processor = AutoImageProcessor.from_pretrained(folder, **remote) if has_auto else processor.image_processor
assert type(image_processor).__name__ == "EfficientSamImageProcessor"

generator = pipeline("mask-generation", model=model, image_processor=image_processor)
assert type(generator).__module__ == "transformers.pipelines.mask_generation"  # an object brings no pipeline along
everything = generator(image, **generate)
answers["masks"], answers["scores"] = np.stack(everything["masks"]), everything["scores"].numpy()
if has_auto:
    generator = pipeline("mask-generation", model=folder, **remote)
    assert type(generator).__name__ == "EfficientSamMaskGenerationPipeline", type(generator)
    assert type(generator).__module__.startswith("transformers_modules."), type(generator).__module__
    whole = generator(image, **generate)
    assert all((a != b).mean() < 0.01 for a, b in zip(whole["masks"], everything["masks"], strict=True))

model.save_pretrained(destination)
processor.save_pretrained(destination)
np.savez(destination + "/answers.npz", **answers)
"""


def tiny_config() -> EfficientSamConfig:
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
    return EfficientSamConfig(
        vision_config={**vision, "output_channels": 32},
        prompt_encoder_config={"hidden_size": 32},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2},
    )


@pytest.fixture(scope="module")
def model() -> EfficientSamModel:
    torch.manual_seed(0)
    return EfficientSamModel(tiny_config()).eval()


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 60))


@pytest.fixture(scope="module")
def folder(model: EfficientSamModel, picture: Image.Image, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved")
    model.save_pretrained(path)
    EfficientSamProcessor(EfficientSamImageProcessor(size=64)).save_pretrained(path)
    picture.save(path / "picture.png")
    return path


def test_auto_classes_by_import(folder) -> None:
    assert type(AutoConfig.from_pretrained(folder)) is EfficientSamConfig
    assert type(AutoModel.from_pretrained(folder)) is EfficientSamModel
    assert type(AutoModelForMaskGeneration.from_pretrained(folder)) is EfficientSamModel
    assert type(AutoProcessor.from_pretrained(folder)) is EfficientSamProcessor
    if type(AutoImageProcessor).__name__ != "DummyObject":  # transformers 5.17 has it only beside torchvision
        assert type(AutoImageProcessor.from_pretrained(folder)) is EfficientSamImageProcessor
    vision = EfficientSamVisionConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    assert type(AutoModel.from_config(vision)) is EfficientSamVisionModel
    assert type(AutoBackbone.from_config(vision)) is EfficientSamBackbone


def test_saved_vision_model_is_found(tmp_path) -> None:
    vision = EfficientSamVisionModel(tiny_config().vision_config)
    vision.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert type(loaded) is EfficientSamVisionModel
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(loaded(image).last_hidden_state, vision.eval()(image).last_hidden_state)


def test_folder_carries_its_code(folder) -> None:
    models = Path(efficientsam_hf.models.__file__).parent
    for path in models.glob("*_efficientsam*.py"):
        assert (folder / path.name).read_text() == path.read_text()
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    assert auto_map == {
        "AutoConfig": "configuration_efficientsam.EfficientSamConfig",
        "AutoModel": "modeling_efficientsam.EfficientSamModel",
        "AutoModelForMaskGeneration": "modeling_efficientsam.EfficientSamModel",
    }
    processing = json.loads((folder / "processor_config.json").read_text())
    assert processing["auto_map"]["AutoProcessor"] == "processing_efficientsam.EfficientSamProcessor"


def without_package(folder: Path, destination: Path, workplace: Path) -> dict[str, np.ndarray]:
    """Load and run a saved folder in a process of its own that knows neither the package nor the checkout."""
    destination.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(workplace), "HF_MODULES_CACHE": str(workplace / "modules")}
    process = subprocess.run(
        [sys.executable, "-c", CHILD, str(folder), str(destination), json.dumps(PROMPTS), json.dumps(GENERATE)],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=destination,
        env=environment,
        check=False,
    )
    assert process.returncode == 0, process.stderr
    return dict(np.load(destination / "answers.npz"))


@torch.no_grad()
def test_folder_works_without_the_package(folder, model, picture, tmp_path) -> None:
    """Equal outputs through Auto classes, stock pipeline and ours; then again from a folder saved over there."""
    processor = EfficientSamProcessor.from_pretrained(folder)
    expected = model(**processor(images=picture, return_tensors="pt", **PROMPTS)).pred_masks.numpy()
    everything = MaskGenerationPipeline(model=model, image_processor=processor.image_processor)(picture, **GENERATE)
    source = folder
    for name in ("first", "second"):
        answers = without_package(source, tmp_path / name, tmp_path / f"{name}_home")
        np.testing.assert_array_equal(answers["AutoModel"], expected)
        np.testing.assert_array_equal(answers["AutoModelForMaskGeneration"], expected)
        np.testing.assert_array_equal(answers["masks"], np.stack(everything["masks"]))
        np.testing.assert_array_equal(answers["scores"], everything["scores"].numpy())
        source = tmp_path / name
        picture.save(source / "picture.png")
    assert (source / "modeling_efficientsam.py").read_text() == (folder / "modeling_efficientsam.py").read_text()
    loaded = EfficientSamModel.from_pretrained(source)  # and back with the package
    for name, value in loaded.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
