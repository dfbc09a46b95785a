# SPDX-License-Identifier: Apache-2.0
"""Changes to the configuration of a model or its processor, as fields of a run give them in YAML."""

from dataclasses import fields
from typing import Any

import yaml
from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import PreTrainedConfig


def read_overrides(text: str, kind: type[PreTrainedConfig]) -> dict[str, Any]:
    """A YAML mapping of fields of the configuration class `kind`, those of its parts as mappings of their own.

    Raises ValueError for what is no mapping, for a name that the class or the part's does not have, and for a value
    that is not of its type; whether values go together is seen when the configuration is built.
    """
    changes = read_mapping(text, "model_overrides")
    _check(changes, kind, text)
    for name, part in kind.sub_configs.items():
        _check(changes.get(name, {}), part, text)
    return changes


def read_mapping(text: str, field: str) -> dict[str, Any]:
    """A YAML mapping, empty for empty text; ValueError that names the field for anything else."""
    try:
        content = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{field} must be a YAML mapping, got {text!r}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{field} must be a YAML mapping, got {text!r}")
    return content


def _check(changes: Any, kind: type[PreTrainedConfig], text: str) -> None:
    if not isinstance(changes, dict):
        raise ValueError(f"model_overrides must be a YAML mapping, of {kind.__name__} too, got {text!r}")
    unknown = sorted(str(name) for name in set(changes) - {item.name for item in fields(kind)})
    if unknown:
        raise ValueError(f"model_overrides: {kind.__name__} has no {', '.join(unknown)}")
    config = kind()
    for name, value in changes.items():
        if name in kind.sub_configs:  # checked as a configuration of its own
            continue
        try:
            setattr(config, name, value)
        except StrictDataclassFieldValidationError as error:
            raise ValueError(f"model_overrides: {' '.join(str(error).split())}") from error
