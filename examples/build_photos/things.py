# SPDX-License-Identifier: Apache-2.0
"""Fluent Emoji in 3D: shaded, many-coloured drawings with exact transparency."""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from layout import Cutout, CutoutSet
from PIL import Image


NO_THINGS = ("Symbols", "Flags")  # groups of emoji
TONES = ("Default", "Light", "Medium-Light", "Medium", "Medium-Dark", "Dark")  # in the order of unicodeSkintones


def fluent3d(source: Path) -> CutoutSet:
    """SOURCE holds assets/NAME/metadata.json with 3D/*.png, or TONE/3D/*.png, beside it.

    Of people, who come in six tones of skin, the default and one more are taken, by the hash of the name.
    """
    files = sorted((source / "assets").glob("*/metadata.json"))
    if not files:
        raise FileNotFoundError(f"SOURCE {source} is not fluentui-emoji: expected assets/NAME/metadata.json in it")
    things = []
    for path in files:
        for code, folder in _variants(path):
            name = code.lower().replace(" ", "-") + ".webp"
            things.append(Cutout(name, partial(_read_drawing, name, folder)))
    return CutoutSet(things, "MIT")


def _variants(metadata: Path) -> list[tuple[str, Path]]:
    """Code points and folder of each drawing that is taken of an emoji; `ValueError` if its file is damaged."""
    try:
        content: dict[str, Any] = json.loads(metadata.read_text(encoding="utf-8"))
        group, code, codes = content["group"], content["unicode"], content.get("unicodeSkintones", [])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{metadata} must have the fields group and unicode: {error}") from error
    if group in NO_THINGS:
        return []
    if len(codes) != len(TONES):
        return [(code, metadata.parent / "3D")]
    number = 1 + int(hashlib.sha1(code.encode(), usedforsecurity=False).hexdigest(), 16) % (len(TONES) - 1)
    return [(codes[index], metadata.parent / TONES[index] / "3D") for index in (0, number)]


def _read_drawing(name: str, folder: Path) -> list[tuple[str, Image.Image]]:
    pictures = sorted(folder.glob("*.png"))
    if not pictures:
        raise FileNotFoundError(f"{folder} holds no PNG")
    with Image.open(pictures[0]) as picture:
        return [(name, picture.convert("RGBA"))]
