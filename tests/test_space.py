# SPDX-License-Identifier: Apache-2.0
"""The Space without a browser: its modules, its server and calls, hostile input, and `efficientsam demo`."""

import ast
import copy
import io
import json
import re
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from space_server import SPACE, Refused, SpaceServer, Visitor, call, save_model_with_code

from efficientsam_hf import (
    EfficientSamImageProcessor,
    EfficientSamMaskGenerationPipeline,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    EfficientSamPredictor,
    EfficientSamProcessor,
    default_checkpoint,
)
from efficientsam_hf.cli import demo, main
from efficientsam_hf.models.mask_cleaning_efficientsam import Parts
from efficientsam_hf.models.rle_efficientsam import decode_rle, encode_rle


pytest.importorskip("gradio")
sys.path.append(str(SPACE))

import app
import downloads
import drawing
import limits
import pictures
import rle
import segmenting
import sessions
import widgets
from actions import advice, parse_coordinates


COFFEE = (SPACE / "examples" / "coffee.jpg").read_bytes()
CAT = (SPACE / "examples" / "cat.jpg").read_bytes()
# pycocotools' compiled part still speaks the array protocol of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

# fastapi, starlette and anyio are what gradio is made of.
ALLOWED = {"gradio", "fastapi", "starlette", "anyio", "pycocotools", "numpy", "torch", "transformers", "PIL"}
HUB_COLORS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
# Threads of the server may differ from ours, and with them the last bits of logits.
SAME = 1e-3


def to_bytes(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A valid PNG of one bit a pixel, all black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def random_masks() -> list[np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = [(1, 1), (7, 5), (40, 33), (64, 64)]
    masks = [generator.random(shape) < share for shape in shapes for share in (0.0, 0.1, 0.6, 1.0)]
    blob = np.zeros((50, 70), bool)
    blob[10:30, 20:61] = True
    return [*masks, blob, ~blob]


# Modules


@pytest.mark.parametrize("mask", random_masks(), ids=lambda mask: f"{mask.shape} {mask.mean():.2f}")
def test_run_lengths_are_those_of_coco(mask: np.ndarray) -> None:
    encoded = rle.encode_mask(mask)
    assert encoded == encode_rle(mask)
    assert (rle.decode_mask(encoded) == mask).all() and (decode_rle(encoded) == mask).all()
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    bounds = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1) if len(rows) else (0, 0, 0, 0)
    assert rle.mask_bounds(encoded) == bounds


def test_run_lengths_beyond_one_group_of_bits() -> None:
    mask = np.zeros((3000, 700), bool)
    mask[100:2900, 300:310] = True
    encoded = rle.encode_mask(mask)
    assert encoded == encode_rle(mask)
    assert (rle.decode_mask(encoded) == mask).all()


def test_pictures_are_read_as_they_are_meant_to_be_seen(tmp_path: Path) -> None:
    upright = Image.fromarray(np.arange(30 * 20 * 3, dtype=np.uint8).reshape(20, 30, 3))
    turned = upright.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held on its side
    frames = [Image.new("RGB", (30, 20), color) for color in ("red", "blue")]
    deep = Image.fromarray(np.full((20, 30), 65535 // 2, np.uint16))
    files = {
        "turned.png": to_bytes(turned, "PNG", exif=exif),
        "cmyk.jpg": to_bytes(frames[0].convert("CMYK"), "JPEG"),
        "frames.gif": to_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "deep.png": to_bytes(deep, "PNG"),
        "palette.png": to_bytes(frames[0].convert("P"), "PNG"),
        "alpha.webp": to_bytes(frames[0].convert("RGBA"), "WEBP", lossless=True),
    }
    opened = {}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        opened[name] = pictures.open_picture(tmp_path / name)
    assert {(image.mode, image.size) for image in opened.values()} == {("RGB", (30, 20))}
    assert (np.asarray(opened["turned.png"]) == np.asarray(upright)).all()
    assert opened["deep.png"].getpixel((0, 0)) == (127, 127, 127)
    for name in ("cmyk.jpg", "frames.gif", "palette.png", "alpha.webp"):
        red, green, blue = opened[name].getpixel((5, 5))
        assert red > 240 and green < 30 and blue < 30, name


HOSTILE = {
    "huge.png": (png_of_size(30_000, 30_000), "too large|30,000 x 30,000"),
    "large.png": (png_of_size(6_000, 5_000), "6,000 x 5,000 pixels"),
    "cut.jpg": (COFFEE[: len(COFFEE) // 2], "damaged or cut short"),
    "cut_header.jpg": (COFFEE[:40], "not a picture|damaged"),
    "text.png": (b"no picture\n", "not a picture"),
    "drawing.svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "not a picture"),
    "empty.png": (b"", "not a picture"),
    "document.tiff": (to_bytes(Image.new("RGB", (9, 9)), "TIFF"), "not a picture"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_before_they_are_decoded(name: str, tmp_path: Path, monkeypatch) -> None:
    content, message = HOSTILE[name]
    assert len(content) < 200_000
    (tmp_path / name).write_bytes(content)
    if "," in message:  # too large: nothing may be decoded
        monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(pictures.InputError, match=message):
        pictures.open_picture(tmp_path / name)


def test_files_of_many_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "MAX_BYTES", 1_000_000)
    (tmp_path / "big.bmp").write_bytes(bytes(1_000_001))
    with pytest.raises(pictures.InputError, match="larger than 1 MB"):
        pictures.open_picture(tmp_path / "big.bmp")


@pytest.mark.parametrize(
    "path, name",
    [
        ("/tmp/x/photo 1.jpg", "photo_1.jpg"),
        ("..\\..\\secret.png", "secret.png"),
        ("../../..", "picture"),
        ("<script>.png", "script_.png"),
        ("a" * 300, "a" * 80),
    ],
)
def test_names_of_pictures_hold_no_path(path: str, name: str) -> None:
    assert pictures.picture_name(path) == name


def test_view_and_picture_share_pixels() -> None:
    picture = Image.new("RGB", (4000, 3000))
    view = drawing.make_view(picture)
    assert view.size == (1200, 900)
    assert drawing.view_to_picture((0, 0), view.size, picture.size) == [1.2, 1.2]  # the middle of what pixel 0 shows
    assert drawing.view_to_picture((1199, 899), view.size, picture.size) == [3997.8, 2997.8]
    assert drawing.view_to_picture((17, 5), (600, 400), (600, 400)) == [17.0, 5.0]
    point = drawing.picture_to_view(
        drawing.view_to_picture((321, 123), view.size, picture.size), *[view.size, (4000, 3000)]
    )
    assert np.allclose(point, (321, 123), atol=0.05)
    assert drawing.make_view(Image.new("RGB", (10, 4000))).size == (3, 1200)


def test_masks_of_everything_cover_the_view_where_they_cover_the_picture() -> None:
    mask = np.zeros((90, 60), bool)
    mask[30:60, 12:21] = True
    window, corner = drawing.view_window(rle.encode_mask(mask), (600, 900))
    assert corner == (120, 300) and window.shape == (300, 90) and window.all()
    small, corner = drawing.view_window(rle.encode_mask(mask), (20, 30))
    assert corner == (4, 10) and small.shape == (10, 3) and small.all()
    assert drawing.covers((window, (120, 300)), 150, 400) and not drawing.covers((window, (120, 300)), 119, 400)
    empty, _ = drawing.view_window(rle.encode_mask(np.zeros((90, 60), bool)), (600, 900))
    assert not empty.size


def test_masks_are_tinted_and_outlined_and_nothing_else() -> None:
    view = Image.new("RGB", (1200, 800), (100, 100, 100))
    mask = np.zeros((800, 1200), bool)
    mask[200:600, 300:900] = True
    drawn = view.copy()
    drawing.draw_mask(drawn, drawing.mask_window(mask), (200, 0, 0), 0.5)
    pixels = np.asarray(drawn).astype(int)
    assert np.abs(pixels[400, 600] - (150, 50, 50)).max() <= 1
    assert (pixels[:180] == 100).all() and (pixels[:, :280] == 100).all()
    assert np.abs(pixels[400, 300] - (200, 0, 0)).max() < 40  # the contour in full colour
    clear = view.copy()
    drawing.draw_mask(clear, drawing.mask_window(mask), (200, 0, 0), 0.0)
    assert clear.getpixel((600, 400)) == (100, 100, 100)
    assert view.getpixel((600, 400)) == (100, 100, 100)


def test_prompts_are_taken_back_one_by_one() -> None:
    click = sessions.Click
    clicks = [click(5, 5, 1), click(9, 2, None), click(1, 7, None), click(3, 3, 0), click(8, 8, None)]
    boxes = [sessions.Prompts(clicks[:count]).box for count in range(6)]
    assert boxes == [None, None, None, (1, 2, 9, 7), (1, 2, 9, 7), None]
    whole = sessions.Prompts(clicks)
    assert whole.corner == clicks[-1] and whole.points == [[5, 5], [3, 3]] and whole.labels == [1, 0]
    assert whole.asks() and not sessions.Prompts([click(3, 3, 0)]).asks() and not sessions.Prompts(clicks[1:2]).asks()


def test_a_session_that_ends_holds_nothing() -> None:
    session = sessions.Session()
    take_picture(session)
    session.prompts.clicks.append(sessions.Click(1, 1, 1))
    assert copy.deepcopy(session).picture is None  # visitors get a fresh one, never a copy
    session.free()
    assert (
        session.picture
        is session.view
        is session.small
        is session.embedding
        is session.everything
        is session.candidates
        is None
    )


def take_picture(session: sessions.Session) -> None:
    image = Image.new("RGB", (40, 30))
    picture = pictures.Picture(to_bytes(image, "PNG"), "a.png", image.size)
    session.take(sessions.Prepared.of(picture, image, segmenting.Embedding(torch.zeros(1), (30, 40), 1.0)))


def held_session(held: sessions.SessionsWithPictures, tab: str) -> sessions.Session:
    session = sessions.Session()
    held.hold(tab, session)
    with session.in_use():
        take_picture(session)
    return session


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, in an item that tests set; nobody but they look for sessions that are due."""
    now = [1000.0]
    monkeypatch.setattr(sessions.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(sessions.SessionsWithPictures, "_watch", lambda self: None)
    return now


def test_sessions_end_when_the_visitor_has_been_away(clock: list[float]) -> None:
    held = sessions.SessionsWithPictures()
    open_one, closed = held_session(held, "open"), held_session(held, "closed")
    held.close("closed")
    held.close("unknown")
    clock[0] += sessions.CLOSED_SECONDS - 1
    held.end_due()
    assert open_one.picture and closed.picture
    clock[0] += 2
    held.end_due()
    assert open_one.picture and closed.picture is None and set(held.by_tab) == {"open"}
    clock[0] += sessions.SESSION_SECONDS
    held.end_due()
    assert open_one.picture is None and not held.by_tab


def test_a_visitor_who_comes_back_keeps_the_picture(clock: list[float]) -> None:
    held = sessions.SessionsWithPictures()
    session = held_session(held, "tab")
    held.close("tab")
    clock[0] += sessions.CLOSED_SECONDS - 1
    with session.in_use():
        clock[0] += 10
        held.end_due()
        assert session.picture, "it ended in the middle of an event"
    clock[0] += sessions.CLOSED_SECONDS + 1
    held.end_due()
    assert session.picture


def test_a_tab_that_is_closed_during_an_event_ends_after_it(clock: list[float]) -> None:
    held = sessions.SessionsWithPictures()
    session = held_session(held, "tab")
    with session.in_use():
        held.close("tab")
    clock[0] += sessions.CLOSED_SECONDS + 1
    held.end_due()
    assert session.picture is None


SIZE = (300, 400)
NAN, INFINITY = float("nan"), float("inf")


@pytest.mark.parametrize(
    "points, labels, box, message",
    [
        ([[400.5, 3]], [1], None, "outside the picture of 400 x 300"),
        ([[-1, 3]], [1], None, "outside"),
        ([[NAN, 3]], [1], None, "two numbers"),
        ([[INFINITY, 3]], [1], None, "two numbers"),
        ([[1e300, 3]], [1], None, "two numbers"),
        ([[10**6000, 3]], [1], None, "two numbers"),
        ([["4", 3]], [1], None, "two numbers"),
        ([[True, 3]], [1], None, "two numbers"),
        ([[1, 2, 3]], [1], None, "two numbers"),
        ([5], [1], None, "two numbers"),
        ({"x": 1}, [1], None, "list of"),
        ([[1, 2]], "1", None, "list of"),
        ([[1, 2]], [], None, "one label for each point"),
        ([[1, 2]], [2], None, "label must be 1"),
        ([[1, 2]], [[1]], None, "label must be 1"),
        ([[1, 2]], [0], None, "must be on the object"),
        ([], [], None, "must be on the object"),
        ([[1, 2]] * 33, [1] * 33, None, "At most 32"),
        ([], [], [1, 2, 3], "four numbers"),
        ([], [], [1, 2, NAN, 4], "four numbers"),
        ([], [], "box", "four numbers"),
        ([], [], [9, 9, 9, 20], "empty"),
        ([], [], [20, 20, 9, 9], "empty"),
        ([], [], [401, 1, 500, 9], "outside"),
    ],
)
def test_bad_prompts_are_named(points, labels, box, message: str) -> None:
    with pytest.raises(pictures.InputError, match=message):
        segmenting.check_prompts(points, labels, box, SIZE)


def test_prompts_on_the_border_are_inside() -> None:
    assert segmenting.check_prompts([[0, 0], [400, 300]], [1, 0], None, SIZE) is None
    assert segmenting.check_prompts([], [], [-50, -50, 4000, 9], SIZE) is None


@pytest.mark.parametrize("text, numbers", [("230, 120", [230, 120]), (" 1 2,3 ; 4".replace(";", ""), [1, 2, 3, 4])])
def test_typed_coordinates(text: str, numbers: list[float]) -> None:
    assert parse_coordinates(text) == numbers


@pytest.mark.parametrize("text", ["", "5", "1,2,3", "1,2,3,4,5", "a, b", None])
def test_typed_coordinates_that_are_none(text) -> None:
    with pytest.raises(pictures.InputError, match="Type two numbers"):
        parse_coordinates(text)


def test_files_of_one_mask(tmp_path: Path) -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), dtype=np.uint8))
    mask = random_masks()[-2]
    cutout = Image.open(io.BytesIO(downloads.cutout_png(picture, mask)))
    assert cutout.mode == "RGBA" and cutout.size == (41, 20)
    assert (np.asarray(cutout)[..., :3] == np.asarray(picture)[10:30, 20:61]).all()
    ragged = mask & (np.indices(mask.shape).sum(0) % 3 > 0)
    alpha = np.asarray(Image.open(io.BytesIO(downloads.cutout_png(picture, ragged))))[..., 3]
    assert (alpha == 255 * ragged[10:30, 20:61]).all()
    assert Image.open(io.BytesIO(downloads.cutout_png(picture, np.zeros_like(mask)))).size == (1, 1)
    path = tmp_path / "masks.json"
    path.write_bytes(downloads.to_json(downloads.candidates_to_coco("a.png", np.stack([mask, ~mask]), [0.9, 0.1])))
    coco = load_coco(path)
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=1))
    assert [annotation["area"] for annotation in annotations] == [820, 50 * 70 - 820]
    assert annotations[0]["bbox"] == [20, 10, 41, 20] and annotations[0]["predicted_iou"] == 0.9
    assert (decode_rle(coco.annToRLE(annotations[0])) == mask).all()


def load_coco(path: Path) -> COCO:
    """The file as pycocotools reads it, without what it prints."""
    coco = COCO()
    coco.dataset = json.loads(path.read_text())
    coco.createIndex()
    return coco


# The page and its settings


# Building the app leaves an event loop of gradio's behind, which tests here would be blamed for: a process of its own
# builds it on models that are never asked, runs `efficientsam demo`, and tells what it saw.
INSPECT = """
import json, sys
from types import SimpleNamespace

from pathlib import Path

import gradio as gr
from gradio.route_utils import delete_files_created_by_app
from PIL import Image

from efficientsam_hf.cli import main

served = {}
gr.Blocks.launch = lambda self, **options: served.update(options, blocks=self)
code = main(["demo", "--port", "7999"])
app = sys.modules["app"]
import sessions, widgets

blocks = served.pop("blocks")
served.pop("theme")
functions = blocks.fns.values()
limited = SimpleNamespace(
    name="a/b", lowest_thresholds=(0.3, 0.5), predicted_iou=0.5, stability=0.6, background_points=False,
    can_clean=False, whole=False, grid=20, grids=[8, 16, 20, 24, 32],
)
by_name = {block.elem_id: block for block in blocks.blocks.values() if getattr(block, "elem_id", None)}
made = widgets.cached_file(b"private", "made.txt", by_name["files"])
thumbnail = widgets.view_file(Image.new("RGB", (4, 4)), by_name["gallery"])
delete_files_created_by_app(blocks, age=0)
icons = [Path(b.icon["path"]) for b in blocks.blocks.values() if isinstance(b, gr.Button) and b.icon]
with gr.Blocks():
    of_limited = widgets.build_widgets(limited)
made_for = {"today": SimpleNamespace(**{**vars(limited), "can_clean": True}), "limited": limited}
described = {name: app.build(segmenter).get_api_info()["named_endpoints"] for name, segmenter in made_for.items()}
facts = {
    "code": code,
    "file": app.__file__,
    "options": served,
    "public": [f.api_name for f in functions if f.api_visibility != "private"],
    "queue": type(blocks._queue).__name__,
    "api_open": blocks.api_open,
    "lanes": [
        [f.api_name, f.concurrency_id, f.concurrency_limit] for f in functions if f.queue and f.api_name != "close"
    ],
    "icons_stay": all(map(Path.is_file, icons)) and len(icons),
    "made_goes": not Path(made).exists() and not Path(thumbnail).exists(),
    "title": next(block.value for block in blocks.blocks.values() if block.elem_id == "title"),
    "kinds_without_background": [value for _, value in of_limited.kind.choices],
    "whole": [by_name["whole"].visible, by_name["whole"].value, of_limited.whole.visible],
    "grids": [[grid.value, [value for _, value in grid.choices]] for grid in (by_name["grid"], of_limited.grid)],
    "takes": {
        name: {call: [p["parameter_name"] for p in value["parameters"]] for call, value in calls.items()}
        for name, calls in described.items()
    },
    "usual_grid": described["limited"]["/segment_everything"]["parameters"][1]["parameter_default"],
}
print(json.dumps(facts, default=str))
"""


@pytest.fixture(scope="module")
def demo_facts() -> dict:
    """What `efficientsam demo` would serve."""
    command = [sys.executable, "-c", INSPECT]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_demo_serves_the_files_of_the_space(demo_facts: dict) -> None:
    options = demo_facts["options"]
    assert demo_facts["code"] == 0 and demo_facts["file"] == str(SPACE / "app.py")
    assert (options["server_name"], options["server_port"], options["share"]) == ("127.0.0.1", 7999, False)
    assert options["max_file_size"] == pictures.MAX_BYTES and not options["run_history"]
    assert not options["enable_monitoring"]
    assert "Model: efficientsam_ti" in demo_facts["title"]


def test_only_the_calls_for_programs_are_public(demo_facts: dict) -> None:
    assert demo_facts["public"] == ["segment_points", "segment_box", "segment_everything"]


def test_every_event_is_in_a_lane_and_sessions_are_bounded(demo_facts: dict) -> None:
    assert demo_facts["queue"] == "FairQueue" and not demo_facts["api_open"]
    assert demo_facts["options"]["state_session_capacity"] == limits.VISITORS
    lanes = {event: (lane, at_once) for event, lane, at_once in demo_facts["lanes"]}
    assert set(lanes.values()) == {(lane.name, lane.at_once) for lane in limits.LANES.values()}
    quick = ("click", "add", "choose", "undo", "reset", "redraw", "change_mode", "make_whole", "load_example")
    assert {lanes[event][0] for event in quick} == {"clicks"}
    assert lanes["find_everything"] == lanes["segment_everything"] == ("everything", 1)


def test_cleaning_takes_what_was_made_and_leaves_the_page(demo_facts: dict) -> None:
    assert demo_facts["icons_stay"] == len(widgets.EXAMPLES)
    assert demo_facts["made_goes"]


def test_checkpoints_without_background_points_offer_none(demo_facts: dict) -> None:
    assert demo_facts["kinds_without_background"] == ["Object"]


def shipped() -> EfficientSamImageProcessor:
    """The image processor of the checkpoint that the demo shows without a name."""
    return EfficientSamImageProcessor.from_pretrained(default_checkpoint())


def test_whole_masks_are_on_offer_where_the_code_of_the_model_knows_them(demo_facts: dict) -> None:
    assert demo_facts["whole"] == [True, any(shipped().mask_cleaning.values()), False]
    today, older = demo_facts["takes"]["today"], demo_facts["takes"]["limited"]
    assert today["/segment_points"] == ["image", "points", "labels", "whole"]
    assert today["/segment_box"] == ["image", "box", "whole"]
    assert older["/segment_points"] == ["image", "points", "labels"] and older["/segment_box"] == ["image", "box"]


def test_the_grid_of_the_checkpoint_is_the_usual_one(demo_facts: dict) -> None:
    usual = shipped().mask_generation.get("points_per_crop", 32)
    assert demo_facts["grids"] == [[usual, sorted({8, 16, 24, 32, usual})], [20, [8, 16, 20, 24, 32]]]
    assert demo_facts["usual_grid"] == 20


def test_missing_setting_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_ID", raising=False)
    with pytest.raises(SystemExit, match="the setting MODEL_ID is missing"):
        app.main()
    monkeypatch.setenv("MODEL_ID", "/no/such/folder")
    with pytest.raises(SystemExit, match="/no/such/folder"):
        app.main()


# The folder


def space_modules() -> list[Path]:
    return sorted(SPACE.glob("*.py"))


@pytest.mark.parametrize("path", space_modules(), ids=lambda path: path.name)
def test_modules_need_nothing_that_a_space_lacks(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# SPDX-License-Identifier: Apache-2.0\n") and len(text.splitlines()) < 600
    siblings = {module.stem for module in space_modules()}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "files of a Space are no package"
            names = [node.module]
        else:
            continue
        foreign = {name.split(".")[0] for name in names} - ALLOWED - siblings - sys.stdlib_module_names
        assert not foreign


def test_requirements_are_the_versions_that_are_tested(root: Path) -> None:
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if "==" in line)
    assert set(pins) == {"torch", "transformers", "gradio", "numpy", "pillow", "pycocotools"}
    constraints = (root / "constraints.txt").read_text()
    for name, version in pins.items():
        assert re.search(rf'^{name}=={re.escape(version)}( *;.*>= *"3.11")?$', constraints, re.MULTILINE), name


def test_metadata_of_the_space(root: Path) -> None:
    from huggingface_hub import SpaceCard

    data = SpaceCard.load(SPACE / "README.md").data.to_dict()
    assert data["sdk"] == "gradio" and (SPACE / data["app_file"]).is_file()
    assert f"gradio=={data['sdk_version']}" in (root / "constraints.txt").read_text().splitlines()
    assert {data["colorFrom"], data["colorTo"]} <= HUB_COLORS
    assert data["license"] == "apache-2.0" and data["python_version"] == "3.11"
    assert data["title"] and data["emoji"] and len(data["short_description"]) <= 60
    assert "models" not in data  # publishing fills in what it published


def test_examples_are_small_photos() -> None:
    files = sorted(path.name for path in (SPACE / "examples").iterdir())
    assert files == sorted(widgets.EXAMPLES.values())
    readme = (SPACE / "README.md").read_text()
    for name in files:
        path = SPACE / "examples" / name
        assert path.stat().st_size < 100_000 and f"`{name}`" in readme
        with Image.open(path) as image:
            assert image.format == "JPEG"


# The command


def test_demo_explains_itself(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("[MODEL]", "--host", "--port", "--share", "in the browser"))


def test_demo_without_gradio_says_what_to_install(monkeypatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == (
        "efficientsam: error: the demo needs gradio: pip install 'efficientsam-hf[demo]'\n"
    )


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["/no/such/folder"], "model /no/such/folder: no such folder"),
        (["--port", "0"], "--port must be between 1 and 65535, got 0"),
        (["other"], "the demo is for EfficientSAM models, other is of type sam"),
        (["code"], "cannot load a model from code"),
    ],
)
def test_demo_refuses_in_one_line(arguments, message: str, tmp_path: Path, monkeypatch, capsys) -> None:
    for name, config in {
        "other": {"model_type": "sam"},
        "code": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}},
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps(config))
    (tmp_path / "code" / "mine.py").write_text("raise SystemExit('executed')")
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


# The model


@pytest.fixture(scope="module")
def coffee_picture() -> Image.Image:
    return Image.open(io.BytesIO(COFFEE)).convert("RGB")


@pytest.fixture(scope="module")
def segmenter() -> segmenting.Segmenter:
    """The model of the server, in this process."""
    return segmenting.Segmenter(default_checkpoint(), trust_remote_code=False)


def save_with(folder: Path, **options: dict) -> segmenting.Segmenter:
    """The checkpoint that ships, with other options in its image processor."""
    EfficientSamModel.from_pretrained(default_checkpoint()).save_pretrained(folder)
    processor = EfficientSamProcessor.from_pretrained(default_checkpoint())
    for name, value in options.items():
        setattr(processor.image_processor, name, value)
    processor.save_pretrained(folder)
    return segmenting.Segmenter(str(folder), trust_remote_code=False)


def parts_and_holes(mask: np.ndarray) -> tuple[int, int]:
    parts = Parts.of(mask, corners=True)
    around = Parts.of(np.pad(~mask, 1, constant_values=True), corners=False)
    return len(set(parts.numbers)), len(set(around.numbers)) - 1


def is_whole(mask: np.ndarray) -> bool:
    return parts_and_holes(mask) == (1, 0)


def drawn_candidates() -> segmenting.Candidates:
    """A large part, and a ring that was clicked and reaches over the right side of its box, at x = 300 of 600."""
    logits = torch.full((1, 128, 128), -6.0)
    logits[0, 10:50, 10:80] = 6.0
    logits[0, 20:40, 20:40] = -6.0
    logits[0, 60:120, 5:120] = 6.0
    prompts = {
        "input_points": torch.tensor([[[[60.0, 60.0]]]]),
        "input_labels": torch.tensor([[[1]]]),
        "input_boxes": torch.tensor([[[4.0, 4.0, 256.0, 400.0]]]),
    }
    return segmenting.Candidates(logits, [0.9], (400, 600), prompts, 1.0)


@pytest.mark.parametrize(
    ("own", "parts", "holes", "cut"), [({}, 1, 0, True), ({"largest_part": True}, 1, 1, False)], ids=["none", "some"]
)
def test_masks_are_whole_as_the_checkpoint_says(tmp_path: Path, own: dict, parts: int, holes: int, cut: bool) -> None:
    segmenter = save_with(tmp_path, mask_cleaning=own)
    assert segmenter.can_clean and segmenter.whole == bool(own)
    candidates = drawn_candidates()
    for height, width in ((400, 600), (800, 1200), (214, 320)):
        at = [segmenter.masks(candidates, (height, width), value)[0] for value in (None, True, False)]
        usual, whole, plain = at
        assert (usual == (whole if own else plain)).all()
        assert parts_and_holes(plain) == (2, 1) and parts_and_holes(whole) == (parts, holes)
        assert (
            whole[height // 8, width // 8] and not whole[7 * height // 10].any()
        )  # the clicked part, not the large one
        assert whole[:, width // 2 :].any() != cut and plain[:, width // 2 :].any()
    assert (segmenter.full_masks(candidates, True)[0] == segmenter.masks(candidates, (400, 600), True)[0]).all()


def test_everything_has_the_options_of_the_checkpoint(tmp_path: Path, coffee_picture) -> None:
    options = {"points_per_crop": 4, "pred_iou_thresh": 0.2, "stability_score_thresh": 0.4, "crops_nms_thresh": 1.0}
    counts = []
    for limit in (0.05, 1.0):
        segmenter = save_with(tmp_path, mask_generation={**options, "mask_nms_thresh": limit})
        assert segmenter.grid == 4 and segmenter.grids == [4, 8, 16, 24, 32]
        told: list[float] = []
        found = segmenter.everything(coffee_picture, 4, told.append)
        assert found.grid == 4 and told == [0.5, 1.0]
        counts.append(len(found.masks))
    assert 0 < counts[0] < counts[1]
    assert found.only(np.array([1, 0])).areas.tolist() == found.areas[[1, 0]].tolist()


def test_the_older_code_of_a_model_works_as_it_did(
    monkeypatch, coffee_picture, segmenter: segmenting.Segmenter
) -> None:
    candidates = segmenter.segment(coffee_picture, [[463, 260]], [1], None)
    plain = segmenter.full_masks(candidates, False)
    newer = EfficientSamImageProcessor.post_process_masks

    def older(self, masks, original_sizes, reshaped_input_sizes=None, mask_threshold=0.0, binarize=True):
        return newer(self, masks, original_sizes, None, mask_threshold, binarize, **segmenting.AS_PREDICTED)

    def forward(self, inputs, **options):
        return {"results": EfficientSamMaskGenerator(self.model, self.image_processor)(inputs["images"], **options)}

    monkeypatch.setattr(EfficientSamImageProcessor, "post_process_masks", older)
    monkeypatch.setattr(EfficientSamMaskGenerationPipeline, "_forward", forward)
    monkeypatch.delattr(EfficientSamMaskGenerationPipeline, "mask_generator")
    before = segmenting.Segmenter(default_checkpoint(), trust_remote_code=False)
    assert not before.can_clean and not before.whole
    for whole in (None, True, False):
        assert differ(before.full_masks(before.segment(coffee_picture, [[463, 260]], [1], None), whole), plain) < SAME
    told: list[float] = []
    assert before.everything(coffee_picture, 8, told.append).milliseconds > 0 and not told


def test_a_low_score_says_what_helps() -> None:
    point, box = sessions.Prompts([sessions.Click(5, 5, 1)]), sessions.Prompts([sessions.Click(1, 1, None)])
    box.clicks.append(sessions.Click(9, 9, None))
    assert advice(0.5, point) == ""
    assert advice(0.49, point) == "The score is low: a box, or another click, says more. "
    assert advice(0.49, box) == "The score is low: another click says more. "


# The server


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SpaceServer]:
    folder = tmp_path_factory.mktemp("space")
    model = save_model_with_code(folder / "model")
    with SpaceServer(folder, model, threads=1, CLOSED_SECONDS=1) as running:
        yield running


@pytest.fixture
def visitor(server: SpaceServer) -> Visitor:
    return Visitor(server.url)


@pytest.fixture(scope="module")
def predictor() -> EfficientSamPredictor:
    """The model's own answers, by this package."""
    model = EfficientSamModel.from_pretrained(default_checkpoint()).eval()
    return EfficientSamPredictor(model, EfficientSamProcessor.from_pretrained(default_checkpoint()))


@pytest.fixture(scope="module")
def own_answer(predictor: EfficientSamPredictor):
    """Masks (3, H, W) and predicted IoU (3) of a prompt on the coffee, the best first."""
    predictor.set_image(Image.open(io.BytesIO(COFFEE)))

    def answer(**prompts) -> tuple[np.ndarray, np.ndarray]:
        masks, scores, _ = predictor.predict(**prompts)
        order = np.argsort(-scores, kind="stable")
        return masks[order], scores[order]

    return answer


@pytest.fixture(scope="module")
def client(server: SpaceServer, tmp_path_factory: pytest.TempPathFactory):
    gradio_client = pytest.importorskip("gradio_client")
    folder = tmp_path_factory.mktemp("downloads")
    return gradio_client.Client(server.url, verbose=False, download_files=folder, analytics_enabled=False)


@pytest.fixture(scope="module")
def coffee():
    from gradio_client import handle_file

    return handle_file(SPACE / "examples" / "coffee.jpg")


def masks_of(coco: dict) -> np.ndarray:
    return np.stack([decode_rle(record["segmentation"]) for record in coco["annotations"]])


def read_mask(content: bytes | str | Path) -> np.ndarray:
    with Image.open(io.BytesIO(content) if isinstance(content, bytes) else content) as image:
        assert image.mode == "L"
        return np.asarray(image) > 127


def differ(first: np.ndarray, second: np.ndarray) -> float:
    assert first.shape == second.shape
    return float((first != second).mean())


def status(changes: dict) -> str:
    return re.sub("<[^>]+>", "", changes["status"])


@pytest.mark.parametrize("as_text", [False, True], ids=["lists", "texts"])
def test_points_through_a_client(client, coffee, own_answer, as_text: bool) -> None:
    points, labels = [[290, 180], [500, 100]], [1, 0]
    given = (json.dumps(points), json.dumps(labels)) if as_text else (points, labels)
    coco, mask = client.predict(image=coffee, points=given[0], labels=given[1], api_name="/segment_points")
    masks, scores = own_answer(point_coords=points, point_labels=labels)
    assert differ(masks_of(coco), masks) < SAME and differ(read_mask(mask), masks[0]) < SAME
    found = [record["predicted_iou"] for record in coco["annotations"]]
    assert np.allclose(found, scores, atol=1e-3) and found == sorted(found, reverse=True)
    assert coco["images"] == [{"id": 1, "file_name": "coffee.jpg", "height": 400, "width": 600}]


def test_labels_left_out_are_on_the_object(client, coffee, own_answer) -> None:
    coco, _ = client.predict(image=coffee, points=[[290, 180]], api_name="/segment_points")
    assert differ(masks_of(coco), own_answer(point_coords=[[290, 180]])[0]) < SAME


def test_box_through_a_client(client, coffee, own_answer) -> None:
    box = [172, 17, 410, 305]
    coco, mask = client.predict(image=coffee, box=box, api_name="/segment_box")
    masks, _ = own_answer(box=box)
    assert differ(masks_of(coco), masks) < SAME and differ(read_mask(mask), masks[0]) < SAME


def test_everything_through_a_client(client, coffee, predictor, threads) -> None:
    torch.set_num_threads(1)
    coco, numbers = client.predict(
        image=coffee, grid=8, predicted_iou=0.4, stability=0.55, api_name="/segment_everything"
    )
    generator = EfficientSamMaskGenerator(predictor.model, predictor.processor)
    lowest = {"pred_iou_thresh": 0.3, "stability_score_thresh": 0.5}
    own = generator(Image.open(io.BytesIO(COFFEE)), points_per_crop=8, **lowest)
    kept = [i for i, (a, b) in enumerate(zip(own["scores"], own["stability_scores"])) if a >= 0.4 and b >= 0.55]
    assert 2 < len(kept) < len(own["masks"])
    assert differ(masks_of(coco), np.stack([own["masks"][i] for i in kept])) < SAME
    with Image.open(numbers) as image:
        labels = np.asarray(image)
    areas = [record["area"] for record in coco["annotations"]]
    smallest = int(np.argmin(areas))
    assert set(np.unique(labels)) <= set(range(len(areas) + 1))
    assert (labels[masks_of(coco)[smallest]] == coco["annotations"][smallest]["id"]).all()


def test_every_part_of_the_page_has_a_text(server: SpaceServer, visitor: Visitor) -> None:
    components = json.loads(visitor._get("/config"))["components"]
    props = {kind: [c["props"] for c in components if c["type"] == kind] for kind in {c["type"] for c in components}}
    pictures_shown = [image for image in props["image"] if image.get("elem_id")]
    assert {image["elem_id"] for image in pictures_shown} == {"upload", "canvas"}
    assert all(image["alt_text"] and image["buttons"] == [] for image in pictures_shown)  # no full screen
    for kind in ("radio", "slider", "textbox", "gallery", "file"):
        assert props[kind] and all(component["label"] for component in props[kind]), kind
    assert [button["value"] for button in props["button"]].count("Button") <= 1  # the hidden one of the calls


def test_calls_describe_themselves(client) -> None:
    described = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(described) == {"/segment_points", "/segment_box", "/segment_everything"}
    assert all(endpoint["description"] for endpoint in described.values())
    names = [parameter["parameter_name"] for parameter in described["/segment_points"]["parameters"]]
    assert names == ["image", "points", "labels", "whole"]
    assert described["/segment_box"]["parameters"][1]["type"] == {"type": "array", "items": {"type": "number"}}


def test_bad_calls_are_answered_readably(client, coffee) -> None:
    cases = [
        ("/segment_points", {"points": [[9000, 1]]}, "outside the picture of 600 x 400"),
        ("/segment_points", {"points": "[[NaN, 1]]"}, "two numbers"),
        ("/segment_points", {"points": "[" * 5000}, "list, as JSON"),
        ("/segment_points", {"points": "x" * 20_000}, "list of"),
        ("/segment_box", {"box": [5, 5, 4, 4]}, "empty"),
        ("/segment_everything", {"grid": 5000}, "grid must be one of 8, 16, 24, 32"),
        ("/segment_everything", {"grid": 8.5}, "grid must be one of 8, 16, 24, 32"),
        ("/segment_everything", {"grid": 8, "stability": 3}, "number from 0 to 1"),
    ]
    for name, inputs, message in cases:
        with pytest.raises(Exception, match=message):
            client.predict(image=coffee, api_name=name, **inputs)


def test_numbers_that_json_does_not_have(server: SpaceServer, visitor: Visitor) -> None:
    image = json.dumps(visitor.upload(COFFEE, "coffee.jpg"))
    with pytest.raises(Refused, match="whole must be true or false, got yes"):
        call(server.url, "segment_box", f'{{"data": [{image}, [1, 2, 30, 40], "yes"]}}')
    for number in ("NaN", "Infinity", "1e999", "-1e300", "9" * 400):
        with pytest.raises(Refused, match="two numbers of pixels"):
            call(server.url, "segment_points", f'{{"data": [{image}, [[{number}, 2]], [1], null]}}')
        with pytest.raises(Refused, match="four numbers of pixels"):
            call(server.url, "segment_box", f'{{"data": [{image}, [1, 2, {number}, 9], null]}}')
        with pytest.raises(Refused, match="grid must be one of"):
            call(server.url, "segment_everything", f'{{"data": [{image}, {number}, null, null]}}')
        with pytest.raises(Refused, match="from 0 to 1"):
            call(server.url, "segment_everything", f'{{"data": [{image}, 8, {number}, null]}}')
    visitor.load(COFFEE)
    for place in ([float("nan"), 3], [float("inf"), 3], [1], "ab", None, [1, "2"]):
        with pytest.raises(Refused, match="two numbers"):
            visitor.send("click", event={"index": place, "value": None})
    visitor.look["transparency"] = float("nan")
    with pytest.raises(Refused, match="slider"):
        visitor.click(3, 3)


@pytest.mark.parametrize("name", HOSTILE)
def test_server_survives_hostile_files(server: SpaceServer, visitor: Visitor, name: str) -> None:
    content, message = HOSTILE[name]
    visitor.load(CAT, "cat.jpg")
    with pytest.raises(Refused, match=message):
        visitor.load(content, name)
    with pytest.raises(Refused, match=message):
        call(server.url, "segment_points", json.dumps({"data": [visitor.upload(content, name), [[1, 1]], [1], None]}))
    assert "Decoded" in status(visitor.click(600, 400))  # on the picture that was there before


def test_other_files_of_the_server_are_out_of_reach(server: SpaceServer, visitor: Visitor) -> None:
    example = server.home / "examples" / "coffee.jpg"
    meta = {"_type": "gradio.FileData"}
    paths = [example, "/etc/passwd", server.cache / ".." / "space" / "examples" / "coffee.jpg", server.log, "", "/"]
    for path in map(str, paths):
        for image in ({"path": path}, {"path": path, "meta": meta}, {"path": path, "url": "data:image/png;base64,A"}):
            with pytest.raises(Refused):
                call(server.url, "segment_points", json.dumps({"data": [image, [[1, 1]], [1], None]}))
            with pytest.raises(Refused):
                visitor.send("load", image)
        with pytest.raises(OSError, match="403|404"):
            visitor._get(f"/gradio_api/file={path}")
    assert str(server.home) not in json.dumps(json.loads(visitor._get("/config")))


def test_names_that_look_like_paths_stay_in_the_cache(server: SpaceServer, visitor: Visitor) -> None:
    before = {path for path in server.folder.rglob("*") if server.cache not in path.parents}
    for name in ("../../../evil.jpg", "/etc/evil.jpg", "..\\evil.jpg", "a" * 300 + ".jpg", ".hidden.jpg"):
        image = visitor.upload(CAT, name)
        assert Path(image["path"]).resolve().is_relative_to(server.cache.resolve())
        coco, _ = call(server.url, "segment_points", json.dumps({"data": [image, [[200, 150]], [1], None]}))
        assert "/" not in coco["images"][0]["file_name"] and "\\" not in coco["images"][0]["file_name"]
    assert {path for path in server.folder.rglob("*") if server.cache not in path.parents} == before


def test_a_click_is_the_models_answer_for_that_pixel(visitor: Visitor, own_answer) -> None:
    visitor.load(COFFEE, "coffee.jpg")
    first = visitor.click(580, 360)
    files = visitor.mask_files()
    point = drawing.view_to_picture((580, 360), (1200, 800), (600, 400))
    masks, scores = own_answer(point_coords=[point])
    assert differ(read_mask(files["mask.png"]), masks[0]) < SAME
    assert f"Predicted IoU {scores[0]:.2f}" in status(first) and "Decoded in" in status(first)
    assert len(first["gallery"]["value"]) == 3
    assert set(files) == {"cutout.png", "mask.png", "overlay.jpg", "masks.json"}
    assert json.loads(files["masks.json"])["images"][0]["file_name"] == "coffee.jpg"
    with Image.open(io.BytesIO(files["overlay.jpg"])) as overlay:
        assert overlay.size == (600, 400)


def test_another_candidate_can_be_chosen(visitor: Visitor, own_answer) -> None:
    visitor.load(COFFEE, "coffee.jpg")
    visitor.click(580, 360)
    changes = visitor.send("choose", event={"index": 2, "value": None})
    masks, scores = own_answer(point_coords=[drawing.view_to_picture((580, 360), (1200, 800), (600, 400))])
    assert f"Predicted IoU {scores[2]:.2f}" in status(changes)
    assert differ(read_mask(visitor.mask_files()["mask.png"]), masks[2]) < SAME
    visitor.send("choose", event={"index": 7, "value": None})  # there is none: nothing changes
    assert differ(read_mask(visitor.mask_files()["mask.png"]), masks[2]) < SAME


def test_a_picture_is_encoded_once(visitor: Visitor) -> None:
    encoded = re.search(r"encoded once in ([\d,]+ ms)", status(visitor.load(COFFEE)))[1]
    assert all(f"encoded once in {encoded}" in status(visitor.click(x, 300)) for x in (300, 500, 700))


def test_background_undo_and_reset(visitor: Visitor, own_answer) -> None:
    visitor.load(COFFEE)
    assert "600 x 400 pixels" in status(visitor.send("undo"))  # nothing to take back
    visitor.click(580, 360)
    before = visitor.mask_files()["mask.png"]
    visitor.look["kind"] = "Background"
    visitor.click(520, 330)
    points = [drawing.view_to_picture(point, (1200, 800), (600, 400)) for point in ((580, 360), (520, 330))]
    masks, _ = own_answer(point_coords=points, point_labels=[1, 0])
    after = read_mask(visitor.mask_files()["mask.png"])
    assert differ(after, masks[0]) < SAME and (after != read_mask(before)).any()
    visitor.send("undo")
    assert visitor.mask_files()["mask.png"] == before
    assert "600 x 400 pixels" in status(visitor.send("reset"))
    with pytest.raises(Refused, match="no mask yet"):
        visitor.mask_files()
    assert status(visitor.click(520, 330)) == "Click on the object too."


def test_a_box_of_two_clicks(visitor: Visitor, own_answer) -> None:
    visitor.load(COFFEE)
    visitor.look["mode"] = "Box"
    first = visitor.click(820, 610)
    assert "opposite corner" in status(first) and first["canvas"]["url"]
    visitor.click(344, 34)
    corners = [drawing.view_to_picture(point, (1200, 800), (600, 400)) for point in ((344, 34), (820, 610))]
    masks, _ = own_answer(box=[*corners[0], *corners[1]])
    assert differ(read_mask(visitor.mask_files()["mask.png"]), masks[0]) < SAME
    with pytest.raises(Refused, match="empty"):  # a box of no area is not kept
        visitor.click(100, 100)
        visitor.click(100, 100)
    visitor.send("undo")
    assert differ(read_mask(visitor.mask_files()["mask.png"]), masks[0]) < SAME


def test_typed_prompts_are_those_of_clicks(visitor: Visitor, own_answer) -> None:
    visitor.load(COFFEE)
    visitor.send("add", "172, 17, 410, 305")
    assert differ(read_mask(visitor.mask_files()["mask.png"]), own_answer(box=[172, 17, 410, 305])[0][0]) < SAME
    visitor.send("reset")
    visitor.send("add", "290 180")
    assert differ(read_mask(visitor.mask_files()["mask.png"]), own_answer(point_coords=[[290, 180]])[0][0]) < SAME
    for text, message in (("nan, 4", "two numbers"), ("700, 4", "outside"), ("x", "Type two numbers")):
        with pytest.raises(Refused, match=message):
            visitor.send("add", text)


def test_everything_is_filtered_without_computing_again(visitor: Visitor) -> None:
    visitor.load(COFFEE)
    visitor.look["mode"] = "Everything"
    assert "Nothing searched" in status(visitor.send("change_mode"))
    first = visitor.send("find_everything", 8)
    shown, found, took = re.search(r"(\d+) of (\d+) masks shown. Searched in ([\d.]+) s", status(first)).groups()
    visitor.look |= {"predicted_iou": 0.3, "stability": 0.5}
    more = visitor.send("redraw")
    assert f"{found} of {found} masks shown. Searched in {took} s with a grid of 8 x 8 points." in status(more)
    assert 0 < int(shown) < int(found) == more["table"].count('<th scope="row">')
    files = visitor.mask_files()
    coco = json.loads(files["masks.json"])
    assert len(coco["annotations"]) == int(found) and coco["annotations"][0]["stability"] >= 0.5
    with Image.open(io.BytesIO(files["labels.png"])) as image:
        labels = np.asarray(image)
    assert labels.shape == (400, 600) and labels.max() <= int(found)
    rows, columns = np.nonzero(labels)
    x, y = drawing.picture_to_view((columns[0], rows[0]), (1200, 800), (600, 400))
    assert f"Mask {labels[rows[0], columns[0]]}:" in status(visitor.click(round(x), round(y)))
    visitor.look |= {"predicted_iou": 1.0}
    assert f"0 of {found} masks" in status(visitor.send("redraw"))
    with pytest.raises(Refused, match="no masks yet"):
        visitor.mask_files()
    with pytest.raises(Refused):
        visitor.send("find_everything", 500)


def test_everything_tells_its_progress(visitor: Visitor, monkeypatch: pytest.MonkeyPatch) -> None:
    visitor.load(COFFEE)
    visitor.look["mode"] = "Everything"
    messages: list[dict] = []
    listen = visitor._messages
    monkeypatch.setattr(visitor, "_messages", lambda: (messages.append(message) or message for message in listen()))
    visitor.send("find_everything", 16)
    told = [part for message in messages if message["msg"] == "progress" for part in message["progress_data"]]
    assert told and all(0 <= part["progress"] <= 1 and part["desc"] == "Searching" for part in told)


def took(text: str) -> tuple[str, ...]:
    """How long decoding and encoding took, as the page says it."""
    return re.search(r"Decoded in ([\d,]+ ms), the picture encoded once in ([\d,]+ ms)", text).groups()


@pytest.fixture(scope="module")
def ragged(segmenter: segmenting.Segmenter, coffee_picture) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """A pixel of the view, and the mask that the model has for it: not whole, and made whole."""
    for place in ((926, 520), (580, 360), (1000, 200), (200, 200), (520, 340), (600, 600), (300, 700)):
        point = drawing.view_to_picture(place, (1200, 800), (600, 400))
        candidates = segmenter.segment(coffee_picture, [point], [1], None).only(0)
        plain, whole = (segmenter.full_masks(candidates, value)[0] for value in (False, True))
        if not is_whole(plain) and differ(plain, whole) > 2 * SAME:
            return place, plain, whole
    raise AssertionError("all masks are whole: add clicks")


def test_whole_masks_are_a_switch_that_decodes_nothing(visitor: Visitor, ragged) -> None:
    place, plain, whole = ragged
    usual = any(shipped().mask_cleaning.values())
    assert visitor.load(COFFEE, "coffee.jpg")["whole"] is usual
    shown = {usual: visitor.click(*place)}
    assert differ(read_mask(visitor.mask_files()["mask.png"]), whole if usual else plain) < SAME
    shown[not usual] = visitor.send("make_whole", not usual)
    assert took(status(shown[True])) == took(status(shown[False]))
    assert shown[True]["canvas"]["path"] != shown[False]["canvas"]["path"]
    assert len(shown[not usual]["gallery"]["value"]) == 3 and shown[not usual]["files"] is None
    assert differ(read_mask(visitor.mask_files()["mask.png"]), plain if usual else whole) < SAME
    assert is_whole(whole)
    again = visitor.send("make_whole", usual)
    assert again["canvas"]["path"] == shown[usual]["canvas"]["path"]


def test_the_switch_stays_as_the_visitor_left_it(visitor: Visitor) -> None:
    visitor.load(COFFEE, "coffee.jpg")
    for whole in (True, False):
        visitor.send("make_whole", whole)
        assert visitor.load(CAT, "cat.jpg")["whole"] is whole
        visitor.send("leave")
        assert visitor.load(COFFEE)["whole"] is whole
    visitor.send("make_whole", True)
    visitor.click(580, 360)
    assert is_whole(read_mask(visitor.mask_files()["mask.png"]))


def test_whole_masks_end_at_their_box_at_every_size(visitor: Visitor) -> None:
    photo = Image.open(io.BytesIO(COFFEE)).resize((1800, 1200))
    visitor.load(to_bytes(photo, "JPEG", quality=85), "large.jpg")
    visitor.send("make_whole", True)
    visitor.send("add", "600, 200, 1100, 700")
    files = visitor.mask_files()
    mask = read_mask(files["mask.png"])
    assert is_whole(mask) and mask[200:700, 600:1100].sum() == mask.sum() > 1000
    with Image.open(io.BytesIO(files["cutout.png"])) as cutout:
        assert cutout.width <= 500 and cutout.height <= 500


@pytest.mark.parametrize("kind", ["points", "box"])
def test_whole_masks_through_a_client(client, coffee, coffee_picture, segmenter, kind: str) -> None:
    prompt = {"points": [[463, 260]]} if kind == "points" else {"box": [172, 17, 410, 305]}
    candidates = segmenter.segment(
        coffee_picture, prompt.get("points", []), [1][: kind == "points"], prompt.get("box")
    )
    for whole in ({"whole": True}, {"whole": False}, {}):
        coco, mask = client.predict(image=coffee, **prompt, **whole, api_name=f"/segment_{kind}")
        assert differ(masks_of(coco), segmenter.full_masks(candidates, whole.get("whole"))) < SAME
        assert differ(read_mask(mask), masks_of(coco)[0]) == 0


def test_sessions_do_not_see_each_other(server: SpaceServer, own_answer) -> None:
    coffee, cat, empty = (Visitor(server.url) for _ in range(3))
    coffee.load(COFFEE, "coffee.jpg")
    cat.load(CAT, "cat.jpg")
    coffee.click(580, 360)
    cat.click(580, 360)
    files = {name: visitor.mask_files() for name, visitor in (("coffee", coffee), ("cat", cat))}
    assert read_mask(files["coffee"]["mask.png"]).shape == (400, 600)
    assert read_mask(files["cat"]["mask.png"]).shape == (300, 451)
    masks, _ = own_answer(point_coords=[drawing.view_to_picture((580, 360), (1200, 800), (600, 400))])
    assert differ(read_mask(files["coffee"]["mask.png"]), masks[0]) < SAME
    assert is_start(empty.click(580, 360))
    assert is_start(coffee.send("leave"))
    assert is_start(coffee.click(580, 360))
    assert "Decoded" in status(cat.click(500, 300))


def is_start(changes: dict) -> bool:
    """Whether the page went back to the start, with nothing left of a picture."""
    assert changes["start"]["visible"] == (not changes["work"]["visible"])
    if changes["start"]["visible"]:
        assert not changes["make_files"]["interactive"]
        assert not any(changes[name] for name in ("canvas", "gallery", "files"))
    return changes["start"]["visible"]


def test_a_page_whose_picture_is_gone_goes_back_to_the_start(visitor: Visitor) -> None:
    visitor.load(COFFEE)
    visitor.click(580, 360)
    visitor.send("leave")
    for event, values in (("undo", ()), ("redraw", ()), ("change_mode", ()), ("make_files", ()), ("reset", ())):
        assert is_start(visitor.send(event, *values))
    assert is_start(visitor.send("choose", event={"index": 0, "value": None}))
    visitor.look["mode"] = "Everything"
    assert is_start(visitor.send("find_everything", 8))
    visitor.look["mode"] = "Click"
    visitor.load(COFFEE)
    assert visitor.click(580, 360)["make_files"]["interactive"]


def test_a_visitor_who_goes_on_costs_no_more(server: SpaceServer, visitor: Visitor) -> None:
    """gradio makes components anew for a visitor; those before them are not to stay."""

    def look_around() -> int:
        for place in ((580, 360), (200, 300)):
            assert "Decoded" in status(visitor.click(*place))
            visitor.send("choose", event={"index": 1, "value": None})
            visitor.mask_files()
            visitor.send("undo")
            visitor.send("reset")
        for mode in ("Box", "Everything", "Click"):
            visitor.look["mode"] = mode
            visitor.send("change_mode")
        visitor.send("add", "300, 200")
        visitor.send("leave")
        assert visitor.load(COFFEE)["upload"] is None
        return server.count_components()

    visitor.load(COFFEE)
    assert look_around() == look_around() == look_around()


def test_a_closed_tab_is_forgotten_and_one_that_comes_back_is_not(server: SpaceServer) -> None:
    gone, back = Visitor(server.url), Visitor(server.url)
    for visitor in (gone, back):
        visitor.open()
        visitor.load(COFFEE)
        visitor.close()
    for _ in range(10):
        time.sleep(0.5)
        assert "Decoded in" in status(back.click(580, 360))
    assert is_start(gone.click(580, 360))


def test_a_space_loads_the_published_model(hub, api, repo: str, tmp_path: Path, own_answer) -> None:
    """From a Hub by its name, with the code that lies there and no package of ours."""
    folder = save_model_with_code(tmp_path / "model")
    api.upload_folder(repo_id=repo, folder_path=folder)
    with SpaceServer(tmp_path / "space", repo, threads=1, hub=hub.url) as server:
        visitor = Visitor(server.url)
        assert f"Model: {repo}" in visitor._get("/config").decode()
        visitor.load(COFFEE)
        assert "Decoded in" in status(visitor.click(580, 360))
        mask = read_mask(visitor.mask_files()["mask.png"])
        assert list((tmp_path / "space" / "hf_home").rglob("modeling_efficientsam.py"))
    masks, _ = own_answer(point_coords=[drawing.view_to_picture((580, 360), (1200, 800), (600, 400))])
    assert differ(mask, masks[0]) < SAME


def test_large_pictures_keep_their_coordinates(visitor: Visitor, predictor) -> None:
    photo = Image.open(io.BytesIO(COFFEE)).resize((1800, 1200))
    content = to_bytes(photo, "JPEG", quality=85)
    visitor.load(content, "large.jpg")
    visitor.click(580, 360)
    mask = read_mask(visitor.mask_files()["mask.png"])
    own = EfficientSamPredictor(predictor.model, predictor.processor)
    own.set_image(Image.open(io.BytesIO(content)))
    masks, scores, _ = own.predict([drawing.view_to_picture((580, 360), (1200, 800), (1800, 1200))])
    assert differ(mask, masks[scores.argmax()]) < SAME


def test_server_wrote_no_traceback(server: SpaceServer) -> None:
    log = server.log.read_text()
    unexpected = [line for line in log.splitlines() if re.match(r"\w*(Error|Exception)\b", line)]
    # gradio reports what it refuses itself: paths that are no uploads, values that are not on offer.
    assert all(re.search("InvalidPath|gradio.exceptions|ValidationError", line) for line in unexpected), unexpected
