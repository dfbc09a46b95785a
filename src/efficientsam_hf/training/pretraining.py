# SPDX-License-Identifier: Apache-2.0
"""SAMI pretraining as one forward: hide patches, reconstruct what a teacher sees."""

from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from ..data.teacher import Teacher
from ..models.modeling_sami import SamiForPreTraining
from .normalization import denormalize
from .pictures import feature_sheet


class MaskedPretraining(nn.Module):
    """A SAMI model with the teacher beside it, for the training loop.

    The teacher is no part of the module: it is neither trained nor saved. It is None for a pixel target, and where
    batches bring its features from a cache. Raises ValueError if the width of its features is not the model's.
    """

    def __init__(self, model: SamiForPreTraining, teacher: Teacher | None = None):
        super().__init__()
        if teacher is not None and teacher.width != model.config.target_width:
            raise ValueError(
                f"target_width is {model.config.target_width}, but features of teacher {teacher.name} have "
                f"{teacher.width} channels"
            )
        self.model = model
        self.teacher = teacher
        self._no_split_modules = model._no_split_modules  # what FSDP's transformer policy wraps

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss, and how far the reconstruction is off at masked and at visible patches, all scalars.

        `pixel_values` (B, 3, H, W), ImageNet-normalised; `target_features` (B, N, C) from a cache, or `teacher_images`
        (B, 3, R, R) in [0, 1] where a teacher has another resolution; `noise` (B, N) that decides which patches are
        hidden.
        """
        outputs, target = self._reconstruct(batch)
        if target is None:
            target = self.model.pixel_target(batch["pixel_values"])
        error = (outputs.reconstruction.detach().float() - target).square().mean(-1)
        hidden = outputs.mask
        similarity = F.cosine_similarity(outputs.reconstruction.detach().float(), target, dim=-1)
        return {
            "loss": outputs.loss,
            "masked_error": (error * hidden).sum() / hidden.sum(),
            "visible_error": (error * (1 - hidden)).sum() / (1 - hidden).sum(),
            "cosine": similarity.mean(),
        }

    def _reconstruct(self, batch: dict[str, torch.Tensor]):
        """The model's outputs and the teacher's features, None without one."""
        pixels = batch["pixel_values"]
        size = self.model.config.vision_config.patch_size
        grid = (pixels.shape[2] // size, pixels.shape[3] // size)
        target = batch.get("target_features")
        if self.teacher is not None and target is None:
            images = batch["teacher_images"] if "teacher_images" in batch else denormalize(pixels)
            target = self.teacher.features(images, grid)
        return self.model(pixels, target, batch["noise"]), target

    def compile_parts(self, **options) -> None:
        """Compile student and teacher with `torch.compile(**options)`; what is drawn stays eager."""
        self.model.forward = torch.compile(self.model.forward, **options)
        if self.teacher is not None:
            self.teacher.model.forward = torch.compile(self.teacher.model.forward, **options)

    def depths(self) -> dict[str, int]:
        """Transformer layers of the encoder above each parameter, plus one for what follows it, by name."""
        layers = self.model.vision_encoder.layers
        depths = {id(p): len(layers) + 1 for p in self.model.vision_encoder.embeddings.parameters()}
        for index, layer in enumerate(layers):
            depths |= {id(p): len(layers) - index for p in layer.parameters()}
        return {name: depths.get(id(p), 0) for name, p in self.named_parameters()}

    @torch.no_grad()
    def picture(self, batch: dict[str, torch.Tensor]) -> Image.Image:
        """A few images: what the encoder saw, the target and the reconstruction, as colours of main components."""
        few = {name: value[:4] if value.ndim else value for name, value in batch.items()}
        outputs, target = self._reconstruct(few)
        if target is None:
            target = self.model.pixel_target(few["pixel_values"])
        return feature_sheet(few["pixel_values"], outputs.mask, target, outputs.reconstruction.float())

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pretrained model as one `from_pretrained` folder; the teacher stays where it is."""
        self.model.save_pretrained(folder)
