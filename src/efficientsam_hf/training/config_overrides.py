# SPDX-License-Identifier: Apache-2.0
"""Changes to a model's configuration, as the field `model_overrides` of a run gives them."""

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
    try:
        changes = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"model_overrides must be a YAML mapping, got {text!r}") from error
    _check(changes, kind, text)
    for name, part in kind.sub_configs.items():
        _check(changes.get(name, {}), part, text)
    return changes


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
