# SPDX-License-Identifier: Apache-2.0
"""Files that visitors send become RGB pictures, or an error that says what to do."""

import contextlib
import io
import re
import struct
import warnings
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from limits import MAX_BYTES, MAX_PIXELS
from PIL import Image, ImageOps


FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
UNREADABLE = "This is not a picture that can be read here. Send a JPEG, PNG, WebP, GIF or BMP file."
GONE = "This file is no longer here. Send it again."
DAMAGED = "This picture is damaged or cut short. Send it again, or another one."


class InputError(ValueError):
    """Something that the visitor can set right; the message says how."""


@dataclass(frozen=True)
class Picture:
    """A picture as the file that came, a tenth of its pixels in memory; size (W, H) as it is meant to be seen."""

    content: bytes = field(repr=False)
    name: str
    size: tuple[int, int]

    def open(self) -> Image.Image:
        """Its pixels, the same every time, RGB."""
        return decode(self.content)


def read_picture(path: str | Path) -> tuple[Picture, Image.Image]:
    """Read a picture file, to keep it and to work on its pixels now; errors of `open_picture`."""
    content = _read(Path(path))
    image = decode(content)
    return Picture(content, picture_name(path), image.size), image


def open_picture(path: str | Path) -> Image.Image:
    """Read a picture file as it is meant to be seen, size (W, H), RGB.

    Its EXIF orientation is applied, CMYK and 16 bits are converted, of an animation the first frame is taken. The size
    in its header is checked before anything is decoded. Raises InputError for what is no picture, too large, or
    damaged.
    """
    return decode(_read(Path(path)))


def decode(content: bytes) -> Image.Image:
    """The pixels of a picture file: see `open_picture`."""
    with _readable_errors(), warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            check_size(image.size)
            image.load()
            return _as_seen(image)


def _read(path: Path) -> bytes:
    """A file that is no larger than the app takes."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"This file is larger than {MAX_BYTES // 1_000_000} MB. Send a smaller one.")
        return path.read_bytes()
    except FileNotFoundError:
        raise InputError(GONE) from None


def check_size(size: tuple[int, int]) -> None:
    """Raise InputError for a picture of more pixels, (W, H), than the app takes."""
    width, height = size
    if width * height > MAX_PIXELS:
        raise InputError(
            f"This picture has {width:,} x {height:,} pixels. At most {MAX_PIXELS // 1_000_000} million are taken: "
            "make it smaller first."
        )


def picture_name(path: str | Path) -> str:
    """The last part of a path, of letters, digits, dots, dashes and underscores alone."""
    last = str(path).replace("\\", "/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "_", last).strip("._")[:80] or "picture"


@contextlib.contextmanager
def _readable_errors():
    """What Pillow raises inside the block, as InputError."""
    try:
        yield
    except InputError:
        raise
    except Image.UnidentifiedImageError:
        raise InputError(UNREADABLE) from None
    except Image.DecompressionBombError:
        raise InputError(
            f"This picture is too large. At most {MAX_PIXELS // 1_000_000} million pixels are taken: make it smaller "
            "first."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error):
        raise InputError(DAMAGED) from None


def _as_seen(image: Image.Image) -> Image.Image:
    """Eight bits a channel, upright, RGB, without the file's other contents."""
    with contextlib.suppress(OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        image = ImageOps.exif_transpose(image)  # EXIF that cannot be read turns nothing
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        values = np.asarray(image).clip(0, 65535).astype(np.float32)
        image = Image.fromarray(np.rint(values / 257).astype(np.uint8))
    image = image.convert("RGB")
    image.info.clear()
    return image
