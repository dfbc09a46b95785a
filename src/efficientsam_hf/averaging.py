# SPDX-License-Identifier: Apache-2.0
"""The mean of models that went on from one another (Wortsman et al. 2022, model soups)."""

import os
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig

from .identity import model_revision
from .models.modeling_efficientsam import EfficientSamModel
from .pretrained import load_pretrained


@torch.no_grad()
def average_weights(model: EfficientSamModel, others: Sequence[str | os.PathLike]) -> list[dict[str, Any]]:
    """Set the float32 weights of `model` to their mean with those of other folders or Hub models, all alike.

    Runs that began from each other's results lie close enough for their mean to be better than each; models trained
    apart do not. Returns name and revision of each other one. Raises ValueError if one has other weights by name or
    shape, computes with them in another way (heads, `dense_boxes`, ...; the image size may differ), or has another
    Gaussian matrix, which no training changes: it has no common origin then.
    """
    weights, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    found = []
    for number, name in enumerate(map(os.fspath, others), 1):
        other = load_pretrained(EfficientSamModel, name, dtype=torch.float32)
        theirs = dict(other.named_parameters())
        differing = sorted(
            key for key in weights.keys() | theirs.keys() if _shape(weights, key) != _shape(theirs, key)
        )
        if differing:
            raise ValueError(f"average: {name} has other weights than the run: {', '.join(differing[:3])}, ...")
        ours, own = _computation(model), _computation(other)
        ways = [f"{key} is {own[key]!r}, not {value!r}" for key, value in ours.items() if own[key] != value]
        if ways:
            raise ValueError(f"average: {name} computes in another way than the run: {', '.join(ways)}")
        moved = [key for key, value in other.named_buffers() if not torch.equal(value, buffers[key])]
        if moved:
            raise ValueError(f"average: {name} has no common origin with the run: its {moved[0]} is another")
        for key, value in weights.items():
            value.lerp_(theirs[key], 1 / (number + 1))
        found.append({"model": name, "revision": model_revision(name)})
    return found


def _shape(tensors: dict[str, torch.Tensor], key: str) -> torch.Size | None:
    return tensors[key].shape if key in tensors else None


def _computation(model: EfficientSamModel) -> dict[str, Any]:
    """What the config says of its parts, without what every config of transformers has."""
    common = {*PreTrainedConfig().to_dict(), "image_size"}
    parts = {part: getattr(model.config, part).to_dict() for part in model.config.sub_configs}
    return {f"{part}.{key}": fields[key] for part, fields in parts.items() for key in fields if key not in common}
