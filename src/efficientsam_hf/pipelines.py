# SPDX-License-Identifier: Apache-2.0
"""`pipeline("mask-generation")` gives our class for our models, and to everyone else's what it gave before."""

import pkgutil
from typing import Any

from transformers import MaskGenerationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

from .models import EfficientSamConfig, EfficientSamMaskGenerationPipeline


TASK = "mask-generation"


def register_pipeline() -> None:
    """Let transformers make our pipeline from a folder or a model object, without `trust_remote_code`.

    A saved config names the pipeline in `custom_pipelines`, for those who have no package; who has it would be asked
    for trust because of that name, so here it is written and read but not seen.
    """
    EfficientSamConfig.custom_pipelines = property(lambda config: {}, _set_custom_pipelines)
    entry = PIPELINE_REGISTRY.supported_tasks[TASK]
    # Newer versions of transformers name the class, older ones hold it.
    found = pkgutil.resolve_name(entry["impl"]) if isinstance(entry["impl"], str) else entry["impl"]
    if not getattr(found, "chooses_efficientsam", False):
        entry["impl"] = _pipeline_by_model(found)


def _set_custom_pipelines(config: EfficientSamConfig, value: dict[str, Any]) -> None:
    vars(config)["custom_pipelines"] = value


def _pipeline_by_model(others: type) -> type:
    """A class whose objects are our pipeline's for our models, and those of the class `others` for all others."""

    class MaskGenerationPipelineByModel(MaskGenerationPipeline):
        chooses_efficientsam = True

        def __new__(cls, *args: Any, **kwargs: Any):
            model = kwargs.get("model", args[0] if args else None)
            ours = getattr(getattr(model, "config", None), "model_type", None) == EfficientSamConfig.model_type
            return (EfficientSamMaskGenerationPipeline if ours else others)(*args, **kwargs)

    return MaskGenerationPipelineByModel
