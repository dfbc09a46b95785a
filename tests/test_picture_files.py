# SPDX-License-Identifier: Apache-2.0
"""Which files of a folder are pictures, and what is said of those that cannot be read."""

import io
import struct
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from efficientsam_hf.data.images import ImageFolder, read_row, stream_tars
from efficientsam_hf.data.sa1b import Sa1bFolder
from efficientsam_hf.models.image_processing_efficientsam import open_image
from efficientsam_hf.models.rle_efficientsam import encode_rle


PICTURE = Image.new("RGB", (32, 24), (200, 30, 10))
HIDDEN = [".hidden.jpg", "._a.jpg", ".ipynb_checkpoints/a-checkpoint.jpg", "sub/.trash/a.jpg"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures in all formats, among what is none."""
    for name, kind in (
        ("a.jpg", "JPEG"),
        ("b.jfif", "JPEG"),
        ("c.PNG", "PNG"),
        ("sub/d.webp", "WEBP"),
        ("e.gif", "GIF"),
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        PICTURE.save(tmp_path / name, kind)
    for name in HIDDEN:
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        PICTURE.save(tmp_path / name, "JPEG")
    (tmp_path / "f.jpg").mkdir()
    (tmp_path / "notes.txt").write_text("no picture")
    return tmp_path


def test_pictures_are_found_and_nothing_else(folder: Path) -> None:
    samples = ImageFolder(folder)
    assert [samples[index]["image_id"] for index in range(len(samples))] == [
        "a.jpg", "b.jfif", "c.PNG", "e.gif", "sub/d.webp",
    ]  # fmt: skip


def test_a_picture_that_pillow_cannot_read_is_named(folder: Path) -> None:
    (folder / "photo.HEIC").write_bytes(b"....ftypheic....")
    samples = ImageFolder(folder)
    names = [path.name for path in samples._files]
    with pytest.raises(ValueError, match=r"photo\.HEIC' is not a picture that Pillow can read"):
        samples[names.index("photo.HEIC")]


def test_tars_hold_the_same_pictures_as_folders(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("tars") / "pictures.tar"
    with tarfile.open(path, "w") as archive:
        archive.add(folder, arcname=".")
    names = {read_row(row)["image_id"] for row in stream_tars([path])}
    assert names == {"a.jpg", "b.jfif", "c.PNG", "e.gif", "sub/d.webp"}


@pytest.mark.parametrize("picture", ["B.JPG", "B.Jpg", "B.jpg"])
@pytest.mark.parametrize("annotations", ["B.json", "B.JSON"])
def test_sa1b_takes_endings_in_any_case(tmp_path: Path, picture: str, annotations: str) -> None:
    mask = np.zeros((24, 32), bool)
    mask[3:9, 4:12] = True
    PICTURE.save(tmp_path / picture, "JPEG")
    (tmp_path / annotations).write_text(
        f'{{"annotations": [{{"segmentation": {encode_rle(mask)}}}]}}'.replace("'", '"')
    )
    (tmp_path / f"._{annotations}").write_bytes(b"\0\5\26\7")
    samples = Sa1bFolder(tmp_path)
    assert len(samples) == 1
    np.testing.assert_array_equal(samples[0]["masks"], [mask])


def deep_png(color_type: int, channels: int) -> bytes:
    """A PNG with 16 bits a channel, which Pillow cannot write itself."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    rows = b"".join(b"\0" + np.full(5 * channels, 3600, ">u2").tobytes() for _ in range(4))
    header = struct.pack(">IIBBBBB", 5, 4, 16, color_type, 0, 0, 0)
    parts = (chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize(("color_type", "channels"), [(2, 3), (6, 4), (4, 2), (0, 1)], ids=["RGB", "RGBA", "LA", "L"])
def test_sixteen_bits_a_channel_are_refused_in_png(color_type: int, channels: int) -> None:
    with pytest.raises(ValueError, match="scale its values to 0..255 first"):
        open_image(io.BytesIO(deep_png(color_type, channels)))


@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("channels", [3, 4])
def test_sixteen_bits_a_channel_are_refused_in_tiff(tmp_path: Path, planes: str, channels: int) -> None:
    tifffile = pytest.importorskip("tifffile")
    pixels = np.full((48, 64, channels), 3600, np.uint16)
    pixels = pixels if planes == "contig" else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    extra = {"extrasamples": ["unassalpha"]} if channels == 4 else {}
    tifffile.imwrite(tmp_path / "deep.tif", pixels, photometric="rgb", planarconfig=planes, **extra)
    with pytest.raises(ValueError, match="16 bits a channel, expected 8: scale its values"):
        open_image(tmp_path / "deep.tif")


def test_eight_bits_stay_what_they_are(tmp_path: Path) -> None:
    for name in ("a.tif", "a.png", "a.bmp", "a.tga"):
        PICTURE.save(tmp_path / name)
        np.testing.assert_array_equal(open_image(tmp_path / name), PICTURE)
    header = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, 4, 4, 16, 0)  # five bits a channel, 16 a pixel
    (tmp_path / "small.tga").write_bytes(header + b"\x00\x7c" * 16)
    assert open_image(tmp_path / "small.tga").getpixel((0, 0)) == (255, 0, 0)
