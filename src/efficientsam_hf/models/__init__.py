# SPDX-License-Identifier: Apache-2.0
"""All that a Hub repository needs to run on its own: `save_pretrained` copies these files flat beside the weights."""

from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoModel,
    AutoModelForMaskGeneration,
    AutoModelForPreTraining,
    AutoProcessor,
)
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING

from .configuration_efficientsam import EfficientSamConfig, EfficientSamVisionConfig
from .configuration_sami import SamiConfig
from .image_processing_efficientsam import EfficientSamImageProcessor
from .mask_generation_efficientsam import EfficientSamMaskGenerationPipeline, EfficientSamMaskGenerator
from .modeling_efficientsam import EfficientSamModel
from .modeling_efficientsam_vision import EfficientSamBackbone, EfficientSamVisionModel
from .modeling_sami import SamiForPreTraining
from .processing_efficientsam import EfficientSamProcessor


def register_auto_classes() -> None:
    """Make the Auto classes know ours, and `save_pretrained` write the code for `trust_remote_code`."""
    AutoConfig.register(EfficientSamConfig.model_type, EfficientSamConfig, exist_ok=True)
    AutoConfig.register(EfficientSamVisionConfig.model_type, EfficientSamVisionConfig, exist_ok=True)
    AutoConfig.register(SamiConfig.model_type, SamiConfig, exist_ok=True)
    AutoModel.register(EfficientSamConfig, EfficientSamModel, exist_ok=True)
    AutoModel.register(EfficientSamVisionConfig, EfficientSamVisionModel, exist_ok=True)
    AutoModelForMaskGeneration.register(EfficientSamConfig, EfficientSamModel, exist_ok=True)
    AutoModelForPreTraining.register(SamiConfig, SamiForPreTraining, exist_ok=True)
    AutoBackbone.register(EfficientSamVisionConfig, EfficientSamBackbone, exist_ok=True)
    # Without torchvision `AutoImageProcessor.register` is a dummy that raises on transformers 5.17.
    IMAGE_PROCESSOR_MAPPING.register(EfficientSamConfig, {"pil": EfficientSamImageProcessor}, exist_ok=True)
    AutoProcessor.register(EfficientSamConfig, EfficientSamProcessor, exist_ok=True)

    EfficientSamConfig.register_for_auto_class()
    EfficientSamVisionConfig.register_for_auto_class()
    SamiConfig.register_for_auto_class()
    EfficientSamModel.register_for_auto_class("AutoModelForMaskGeneration")
    EfficientSamVisionModel.register_for_auto_class("AutoModel")
    EfficientSamBackbone.register_for_auto_class("AutoBackbone")
    SamiForPreTraining.register_for_auto_class("AutoModelForPreTraining")
    EfficientSamImageProcessor.register_for_auto_class()
    EfficientSamProcessor.register_for_auto_class()


__all__ = [
    "EfficientSamBackbone",
    "EfficientSamConfig",
    "EfficientSamImageProcessor",
    "EfficientSamMaskGenerationPipeline",
    "EfficientSamMaskGenerator",
    "EfficientSamModel",
    "EfficientSamProcessor",
    "EfficientSamVisionConfig",
    "EfficientSamVisionModel",
    "SamiConfig",
    "SamiForPreTraining",
    "register_auto_classes",
]
