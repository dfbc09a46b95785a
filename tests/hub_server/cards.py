# SPDX-License-Identifier: Apache-2.0
"""The YAML block on top of a README.md: reading it, and the rules that the Hub refuses a card by.

PyYAML is no dependency of its own here: huggingface_hub requires it.
"""

import re
from typing import Any

import yaml


COLORS = ("red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray")
# Some of the licences that the Hub knows.
LICENSES = (
    "apache-2.0 mit bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-nc-4.0 cc-by-sa-4.0 gpl-3.0 openrail unknown other".split()
)
SDKS = ("gradio", "streamlit", "docker", "static")
BLOCK = re.compile(r"\A\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def read_card(text: str) -> dict[str, Any] | None:
    """The YAML block of a README, None without one; ValueError says what is wrong with it."""
    block = BLOCK.match(text)
    if block is None:
        return None
    try:
        data = yaml.safe_load(block[1])
    except yaml.YAMLError as error:
        raise ValueError(f"Invalid YAML: {error}") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"The metadata must be a mapping, not {type(data).__name__}")
    return data or {}


def card_data(files: dict[str, bytes]) -> dict[str, Any] | None:
    """The metadata of a repository; None where the README has none or an unreadable one."""
    try:
        return read_card(files.get("README.md", b"").decode(errors="replace"))
    except ValueError:
        return None


def _strings(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))


def check_card(text: str, kind: str) -> tuple[list[str], list[str]]:
    """Errors and warnings about a README of a model, dataset or space."""
    try:
        data = read_card(text)
    except ValueError as error:
        return [str(error)], []
    if not data:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [
        f'"{name}" must be a string or a list of strings'
        for name in ("license", "language", "tags", "datasets", "base_model", "metrics")
        if name in data and not _strings(data[name])
    ]
    errors += [f'"{name}" must be a string' for name in ("pipeline_tag", "library_name") if _not_text(data, name)]
    errors += [
        f'"model-index[].results[].dataset.type" with value "{kind}" fails to match the required pattern'
        for kind in _dataset_types(data)
        if not re.fullmatch(r"([\w-]+/)?[\w.-]+", kind)
    ]
    if isinstance(data.get("license"), str) and data["license"] not in LICENSES:
        errors.append(f'"license" must be one of {LICENSES}')
    return errors + (_space_errors(data) if kind == "space" else []), []


def _dataset_types(data: dict[str, Any]) -> list[str]:
    results = [result for model in data.get("model-index") or [] for result in model.get("results") or []]
    return [str(result.get("dataset", {}).get("type", "")) for result in results]


def _not_text(data: dict[str, Any], name: str) -> bool:
    return name in data and not isinstance(data[name], str)


def _space_errors(data: dict[str, Any]) -> list[str]:
    errors = []
    if data.get("sdk") not in SDKS:
        errors.append(f'"sdk" must be one of {list(SDKS)}')
    for name in ("colorFrom", "colorTo"):
        if data.get(name, COLORS[0]) not in COLORS:
            errors.append(f'"{name}" must be one of {list(COLORS)}')
    if len(str(data.get("short_description", ""))) > 60:
        errors.append('"short_description" length must be less than or equal to 60 characters long')
    return errors
