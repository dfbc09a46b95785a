# SPDX-License-Identifier: Apache-2.0
"""Folders, files and command lines that nobody meant to work: the result is right, or one line says what is wrong."""

import copy
import io
import json
import math
import os
import struct
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from property_testing import bounded
from test_hub import tiny_model

from efficientsam_hf import EfficientSamImageProcessor, EfficientSamProcessor
from efficientsam_hf.cli import main
from efficientsam_hf.convert import read_released_checkpoint, released_config
from efficientsam_hf.models.rle_efficientsam import decode_rle


pytestmark = pytest.mark.property

WIDTH, HEIGHT = 60, 40
NAMES = ("config.json", "processor_config.json", "model.safetensors")
Files = dict[str, bytes]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Files:
    """Files of a folder with nothing wrong."""
    folder = tmp_path_factory.mktemp("whole")
    torch.manual_seed(0)
    tiny_model().save_pretrained(folder)
    EfficientSamProcessor(EfficientSamImageProcessor(size=64)).save_pretrained(folder)
    return {name: (folder / name).read_bytes() for name in NAMES}


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    Image.effect_mandelbrot((WIDTH, HEIGHT), (-2, -1, 1, 1), 30).convert("RGB").save(path)
    return str(path)


def segment(picture: str, options: list[str]) -> tuple[dict[str, Any] | None, str]:
    """masks.json and an empty text, or None and the line that the command ends with; nothing else is right."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with tempfile.TemporaryDirectory() as out, redirect_stdout(stdout), redirect_stderr(stderr):
        code = main(["segment", picture, "--device", "cpu", "-o", out, *options])
        if code == 0:
            return json.loads((Path(out) / "masks.json").read_text(), parse_constant=pytest.fail), ""
        assert code == 2 and os.listdir(out) == [] and stdout.getvalue() == ""
    lines = stderr.getvalue().splitlines()
    assert len(lines) == 1 and lines[0].startswith("efficientsam: error: ") and len(lines[0]) < 1100, lines
    return None, lines[0]


def check_masks(content: dict[str, Any]) -> None:
    for record in content["objects"]:
        assert math.isfinite(record["score"])
        mask = decode_rle(record["segmentation"])
        assert mask.shape == (HEIGHT, WIDTH) and mask.sum() == record["area"]


def segment_with(files: Files, picture: str) -> None:
    """Segment with a model of these files: masks, or a line that names the folder or what the model is asked for."""
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            (Path(folder) / name).write_bytes(content)
        content, line = segment(picture, ["--model", folder, "--point", "20,20", "--box", "5,5,50,30"])
    if content is not None:
        check_masks(content)
    else:
        resizing = "pixel_values" in line and b'"do_resize": false' in files[NAMES[1]]
        assert f"from {folder}: " in line or "model" in line or "points" in line or "image" in line or resizing, line


# Configurations


NUMBERS = st.one_of(
    st.integers(-4, 70), st.integers(-(10**30), 10**30), st.sampled_from([10**6, 10**9, 2**31, 2**63]), st.floats()
)
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.text(max_size=8)
    | st.sampled_from(["gelu", "float16", "sdpa", "EfficientSamModel"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["height", "width", "a"]), inner, max_size=2)
    ),
    max_leaves=4,
)


def places(content: Any, above: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Paths of all fields of nested objects."""
    found = []
    for name, value in content.items() if isinstance(content, dict) else ():
        found += [(*above, name), *places(value, (*above, name))]
    return found


def changed(content: Any, data: st.DataObject) -> Any:
    """Some fields with other values, left out or new."""
    content = copy.deepcopy(content)
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, name = data.draw(st.sampled_from(places(content)))
        inner = content
        for parent in parents:
            inner = inner[parent]
        kind = data.draw(st.sampled_from(["value", "value", "value", "gone", "new"]))
        if kind == "gone":
            del inner[name]
        else:
            new = data.draw(st.sampled_from(["quantization_config", "rope_parameters", "num_labels", "head_depth"]))
            inner[new if kind == "new" else name] = data.draw(VALUES)
        if not places(content):
            break
    return content


@given(data=st.data())
@bounded
def test_configs(whole: Files, picture: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES[:2]))
    content = changed(json.loads(whole[name]), data)
    segment_with({**whole, name: json.dumps(content).encode()}, picture)


# Bytes


def damaged(content: bytes, data: st.DataObject) -> bytes:
    """Some bytes of the beginning changed, or the end cut off, or something put in."""
    content = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(0, min(len(content), data.draw(st.sampled_from([8, 200, 20_000])))))
        kind = data.draw(st.sampled_from(["change", "cut", "insert"]))
        if kind == "change":
            new = data.draw(st.binary(min_size=1, max_size=4))
            content[place : place + len(new)] = new
        elif kind == "cut":
            del content[place : place + data.draw(st.sampled_from([1, 10, len(content)]))]
        else:
            content[place:place] = data.draw(st.binary(max_size=20))
    return bytes(content)


@given(data=st.data())
@bounded
def test_damaged_files(whole: Files, picture: str, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(NAMES))
    files = {**whole, name: damaged(whole[name], data)}
    if data.draw(st.integers(0, 9)) == 0:
        del files[data.draw(st.sampled_from(NAMES))]
    segment_with(files, picture)


@given(data=st.data())
@bounded
def test_headers_of_weights(whole: Files, picture: str, data: st.DataObject) -> None:
    weights = whole[NAMES[2]]
    (length,) = struct.unpack("<Q", weights[:8])
    header = json.dumps(changed(json.loads(weights[8 : 8 + length]), data)).encode()
    claimed = data.draw(st.sampled_from([len(header)] * 8 + [0, len(header) + 1, 2**40, 2**64 - 1]))
    segment_with({**whole, NAMES[2]: struct.pack("<Q", claimed) + header + weights[8 + length :]}, picture)


# Command lines


NUMBER = st.one_of(
    st.integers(-5, 70).map(str),
    st.floats(-5, 70).map("{:.3g}".format),
    st.floats().map(str),
    st.sampled_from(["", " ", "1e400", "-0", "0x10", "١", "1_0", "nan", "1" * 5000, "½"]),
    st.text(max_size=5),
)
COORDINATES = st.lists(NUMBER, min_size=1, max_size=5).map(",".join)
GOOD_POINT = st.tuples(st.integers(0, WIDTH), st.integers(0, HEIGHT)).map(lambda point: "{},{}".format(*point))
OPTION = st.one_of(
    st.tuples(st.sampled_from(["--point", "--background", "--box"]), COORDINATES),
    st.tuples(st.just("--point"), GOOD_POINT),
    st.tuples(st.just("--box"), st.tuples(GOOD_POINT, GOOD_POINT).map(",".join)),
    st.sampled_from(
        [("--each-point",), ("--all-masks",), ("--largest-part",), ("--no-within-box",), ("--everything",)]
    ),
    st.tuples(
        st.sampled_from(
            ["--fill-holes", "--tile", "--points-per-crop", "--mask", "--pred-iou-thresh", "--tile-overlap"]
        ),
        NUMBER,
    ),
)


@pytest.fixture(scope="module")
def loaded(whole: Files) -> Callable[..., tuple[Any, Any]]:
    """In the place of `load_model`, which takes most of the time."""
    torch.manual_seed(0)
    model, processor = tiny_model().eval(), EfficientSamProcessor(EfficientSamImageProcessor(size=64))
    return lambda name, args: (model, copy.deepcopy(processor))


@given(options=st.lists(OPTION, min_size=1, max_size=4))
@bounded
def test_command_lines(loaded: Callable[..., Any], picture: str, options: list[tuple[str, ...]]) -> None:
    flat = [part for option in options for part in option]
    with (
        patch("efficientsam_hf.cli.segment.load_model", loaded),
        patch("efficientsam_hf.cli.everything.load_model", loaded),
    ):
        content, _ = segment(picture, flat)
    if content is None:
        return
    check_masks(content)
    if "--everything" in flat:
        return
    given_points = sorted(
        value for name, *values in options for value in values if name in ("--point", "--background")
    )
    points = [point for record in content["objects"] for point in record["prompts"]["points"]]
    assert all(0 <= x <= WIDTH and 0 <= y <= HEIGHT for x, y in points)
    if "--each-point" not in flat:
        assert sorted(map(list, points)) == sorted([float(part) for part in text.split(",")] for text in given_points)


# Released checkpoints


def checkpoint_bytes() -> bytes:
    file = io.BytesIO()
    torch.save({"model": {"image_encoder.pos_embed": torch.zeros(1, 3, 192), "neck.bias": torch.ones(4)}}, file)
    return file.getvalue()


CHECKPOINT = checkpoint_bytes()
# Python writes a name up to a zero byte, and none that is empty.
MEMBER_NAMES = st.text(st.characters(exclude_characters="\0", codec="utf-8"), min_size=1, max_size=10)


def repacked(members: dict[str, bytes], compression: int) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def read(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "released.pt"
        path.write_bytes(content)
        try:
            state = read_released_checkpoint(path)
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 1000
            return
        assert state and all(isinstance(value, torch.Tensor) for value in state.values())
        try:
            assert released_config(state).vision_config.hidden_size == state["image_encoder.pos_embed"].shape[2]
        except ValueError as error:
            assert "not a checkpoint of EfficientSAM" in str(error) and len(str(error)) < 1000


@given(data=st.data())
@bounded
def test_damaged_checkpoints(data: st.DataObject) -> None:
    read(damaged(CHECKPOINT, data))


@given(data=st.data())
@bounded
def test_archives_of_anything(data: st.DataObject) -> None:
    """Sound zips with damaged or other content, within a zip too."""
    with zipfile.ZipFile(io.BytesIO(CHECKPOINT)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = data.draw(st.sampled_from(sorted(members)))
    members[name] = damaged(members[name], data)
    if data.draw(st.booleans()):
        members[data.draw(MEMBER_NAMES)] = data.draw(st.binary(max_size=50))
    compression = data.draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    content = repacked(members, compression)
    if data.draw(st.booleans()):
        names = data.draw(st.lists(st.sampled_from(["a.pt", "b.pt", "__MACOSX/a.pt", "notes.txt"]), max_size=3))
        content = repacked(dict.fromkeys(names, content), compression)
    read(content)
