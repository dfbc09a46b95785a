# SPDX-License-Identifier: Apache-2.0
"""What lies in a folder that is to be published: nothing from elsewhere, and every file is what its name says."""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors import SafetensorError, safe_open

from .. import models
from ..files import read_json


POINTERS = ("auto_map", "custom_pipelines")  # entries of a config that name code beside it
INDEX = "model.safetensors.index.json"
# Files of this name -> keys that they may have; transformers reads the others, and says what is wrong.
KEYS = {"metrics.json": {"training", "evaluations", "speed"}, INDEX: {"metadata", "weight_map"}}
PICTURES = {".png": "PNG", ".jpg": "JPEG"}


def refuse_links(folder: Path) -> None:
    """ValueError for a symbolic link out of the folder: nobody sees from the folder what would be published.

    A snapshot in the Hub's cache consists of links into the `blobs` beside it, which hold nothing but what came from
    the Hub: those are followed.
    """
    home = Path(os.path.realpath(folder))
    places = [home, *([home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(place) for place in places):
                raise ValueError(f"{path} is a link out of the folder, to {target}: put a copy in its place")


def check_contents(files: Mapping[str, Path]) -> None:
    """ValueError for the first file of a model's folder, by its name there, whose content is something else."""
    for name, path in files.items():
        if path.suffix == ".safetensors":
            _check_weights(path)
        elif path.suffix == ".json":
            _check_json(name, path, files)
        elif path.suffix == ".py":
            _check_code(path)
        elif path.suffix in PICTURES:
            _check_picture(path)
        elif path.suffix == ".md":
            _check_text(path)
    weights = {name for name in files if name.endswith(".safetensors")}
    expected = set(read_json(files[INDEX])["weight_map"].values()) if INDEX in files else {"model.safetensors"}
    if weights != expected:
        odd = ", ".join(map(str, sorted(weights ^ expected, key=str)[:5]))
        raise ValueError(f"folder holds other weights than it should: {odd} is too much, or missing")


def _check_weights(path: Path) -> None:
    try:
        with safe_open(path, framework="pt") as file:
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is no safetensors file: {error}") from None


def _check_json(name: str, path: Path, files: Mapping[str, Path]) -> None:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, expected a JSON object")
    odd = sorted(content.keys() - KEYS.get(name, content.keys()))
    if odd:
        raise ValueError(f"{path} is something else: it has {odd[0][:60]!r}, expected {', '.join(sorted(KEYS[name]))}")
    if name == INDEX and not isinstance(content.get("weight_map"), dict):
        raise ValueError(f"{path} has no weight_map")
    for pointer in _pointers(content):
        module = f"{pointer.partition('.')[0]}.py"
        if module not in files:
            raise ValueError(f"{path} points to code that is not in the folder: {pointer[:100]!r}")


def _pointers(content: Any) -> Iterator[str]:
    """Classes by module, "modeling_efficientsam.EfficientSamModel", that the entries POINTERS name at any depth."""
    for name, value in content.items() if isinstance(content, dict) else ():
        if name in POINTERS:
            yield from _classes(value)
        else:
            yield from _pointers(value)


def _classes(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for entry in value:
            yield from _classes(entry)
    elif isinstance(value, dict):  # the other entries of a pipeline name classes of transformers
        for entry in [value["impl"]] if "impl" in value else value.values():
            yield from _classes(entry)


def _check_code(path: Path) -> None:
    """Published code runs with `trust_remote_code` in the name of who published it, so it is ours to the byte."""
    own = Path(models.__file__).with_name(path.name)
    if not own.is_file() or own.read_bytes() != path.read_bytes():
        raise ValueError(f"{path} is not the code of this version of efficientsam-hf: export or convert again")


def _check_picture(path: Path) -> None:
    try:
        with Image.open(path, formats=[PICTURES[path.suffix]]) as picture:
            picture.verify()
    except Exception as error:  # Pillow's readers raise of every kind
        raise ValueError(f"{path} is no {PICTURES[path.suffix]} picture: {str(error)[:200]}") from None


def _check_text(path: Path) -> None:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8: {error}") from None
    if "\0" in text:
        raise ValueError(f"{path} is no text: it holds a zero byte")
