# SPDX-License-Identifier: Apache-2.0
"""EfficientSAM for the Hugging Face ecosystem. Importing this package registers its classes with the Auto classes."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .models import (
    EfficientSamBackbone,
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamMaskGenerationPipeline,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
    SamiConfig,
    SamiForPreTraining,
    register_auto_classes,
)
from .pipelines import register_pipeline
from .predictor import EfficientSamPredictor


try:
    __version__ = version("efficientsam-hf")
except PackageNotFoundError:  # a source tree on the path, not installed
    __version__ = "0.0.0"

register_auto_classes()
register_pipeline()


def default_checkpoint() -> str:
    """Path of the folder that ships with the package: a small model with its processor, for any `from_pretrained`."""
    return str(Path(__file__).parent / "checkpoints" / "efficientsam_ti")


__all__ = [
    "EfficientSamBackbone",
    "EfficientSamConfig",
    "EfficientSamImageProcessor",
    "EfficientSamMaskGenerationPipeline",
    "EfficientSamMaskGenerator",
    "EfficientSamModel",
    "EfficientSamPredictor",
    "EfficientSamProcessor",
    "EfficientSamVisionConfig",
    "EfficientSamVisionModel",
    "SamiConfig",
    "SamiForPreTraining",
    "__version__",
    "default_checkpoint",
]
