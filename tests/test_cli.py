# SPDX-License-Identifier: Apache-2.0
"""The command line, run in this process on a small model with random weights: results, grouping and every refusal."""

import contextlib
import errno
import hashlib
import io
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import efficientsam_hf.cli.evaluate as evaluate_command
import efficientsam_hf.cli.segment as segment_command
from efficientsam_hf import EfficientSamConfig, EfficientSamImageProcessor, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.cli import main
from efficientsam_hf.cli.segment import ObjectPrompt, group_prompts, mask_to_logits
from efficientsam_hf.files import write_json
from efficientsam_hf.models.rle_efficientsam import decode_rle, encode_rle


WIDTH, HEIGHT = 60, 40


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small model with random weights, saved with its processor."""
    torch.manual_seed(0)
    config = EfficientSamConfig(
        vision_config={"image_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
        prompt_encoder_config={"background_points": True, "mask_prompts": True, "padded_prompt_tokens": None},
    )
    folder = tmp_path_factory.mktemp("model")
    EfficientSamModel(config).save_pretrained(folder)
    image_processor = EfficientSamImageProcessor(size={"height": 64, "width": 64})
    EfficientSamProcessor(image_processor, background_points=True, mask_prompts=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def picture(tmp_path: Path) -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    path = tmp_path / "picture.png"
    Image.fromarray(pixels).save(path)
    return str(path)


def segment(picture: str, model_folder: str, output: Path, *options: str) -> dict[str, Any]:
    """Run the command, expect success, and read masks.json."""
    arguments = ["segment", picture, "--model", model_folder, "--device", "cpu", "-o", str(output), *options]
    assert main(arguments) == 0
    return json.loads((output / "masks.json").read_text())


def read_png(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run the command, expect exit code 2 and one line on stderr, and return it."""
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("efficientsam: error: ")
    return lines[0]


def test_results_agree_with_each_other(
    picture: str, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--point", "30,20", "--background", "5,5", "--box", "10,5,50.5,35"]
    content = segment(picture, model_folder, tmp_path / "new" / "out", *options)
    folder = tmp_path / "new" / "out"
    assert sorted(path.name for path in folder.iterdir()) == ["mask_0.png", "masks.json", "overlay.png"]
    assert content["size"] == [HEIGHT, WIDTH]
    [record] = content["objects"]
    assert record["prompts"] == {"points": [[30, 20], [5, 5]], "labels": [1, 0], "box": [10, 5, 50.5, 35]}
    mask = read_png(folder / "mask_0.png")
    assert mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 255}
    np.testing.assert_array_equal(decode_rle(record["segmentation"]), mask == 255)
    assert record["area"] == (mask == 255).sum() > 0
    x0, y0, x1, y1 = record["box"]
    assert (mask[y0:y1, x0:x1] == 255).sum() == record["area"]
    assert read_png(folder / "overlay.png").shape == (HEIGHT, WIDTH, 3)
    printed = capsys.readouterr().out
    assert "2 points, box" in printed and str(record["area"]) in printed and str(folder / "overlay.png") in printed


def test_the_mask_is_the_best_by_score_and_the_models_own(picture: str, model_folder: str, tmp_path: Path) -> None:
    content = segment(picture, model_folder, tmp_path / "out", "--point", "12,30", "--all-masks")
    model = EfficientSamModel.from_pretrained(model_folder).eval()
    processor = EfficientSamProcessor.from_pretrained(model_folder)
    inputs = processor(images=picture, input_points=[[[[12, 30]]]], return_tensors="pt")
    with torch.no_grad():
        outputs = model(**inputs)
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])[0][0]
    order = outputs.iou_scores[0, 0].argsort(descending=True)
    candidates = content["objects"][0]["candidates"]
    assert [entry["score"] for entry in candidates] == pytest.approx(
        outputs.iou_scores[0, 0, order].tolist(), abs=1e-4
    )
    for rank, index in enumerate(order):
        np.testing.assert_array_equal(decode_rle(candidates[rank]["segmentation"]), masks[index].numpy())
        assert (tmp_path / "out" / f"mask_0_candidate_{rank}.png").is_file()
    best = read_png(tmp_path / "out" / "mask_0.png") == 255
    np.testing.assert_array_equal(best, masks[order[0]].numpy())


def test_every_box_is_an_object(picture: str, model_folder: str, tmp_path: Path) -> None:
    options = ["--box", "0,0,20,40", "--box", "30,0,60,40", "--point", "40,10"]
    objects = segment(picture, model_folder, tmp_path / "out", *options)["objects"]
    assert [entry["prompts"]["points"] for entry in objects] == [[], [[40, 10]]]
    alone = segment(picture, model_folder, tmp_path / "alone", "--box", "0,0,20,40")["objects"][0]
    assert objects[0]["score"] == pytest.approx(alone["score"], abs=1e-3)
    assert (tmp_path / "out" / "mask_1.png").is_file()


@pytest.mark.parametrize("limit", [-1.0, 2.0], ids=["high", "low"])
def test_a_low_score_is_said_and_written(
    picture: str, model_folder: str, tmp_path: Path, capsys, monkeypatch, limit: float
) -> None:
    monkeypatch.setattr(segment_command, "LOW_SCORE", limit)
    for options, more in (
        (["--point", "12,30"], "a box, or another click,"),
        (["--box", "0,0,20,40"], "another click"),
    ):
        [record] = segment(picture, model_folder, tmp_path / "out", *options)["objects"]
        line = f"object 0: predicted IoU {record['score']:.2f} is low; {more} says more"
        printed = capsys.readouterr().out.splitlines()
        assert record.get("low_score") is (True if limit > 1 else None)
        assert (line in printed) == (limit > 1) and ("is low" in "\n".join(printed)) == (limit > 1)
        if limit > 1:
            assert printed[2] == line  # right below the table


def test_mask_prompt(picture: str, model_folder: str, tmp_path: Path) -> None:
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (10, 10, 40, 30))
    mask.save(tmp_path / "in.png")
    with_mask = segment(picture, model_folder, tmp_path / "out", "--mask", str(tmp_path / "in.png"))["objects"][0]
    mask.paste(255, (0, 0, 60, 30))
    mask.save(tmp_path / "in.png")
    other = segment(picture, model_folder, tmp_path / "out", "--mask", str(tmp_path / "in.png"))["objects"][0]
    assert with_mask["score"] != other["score"]


def test_mask_logits_average_the_mask() -> None:
    mask = Image.new("L", (8, 4))
    mask.paste(255, (0, 0, 4, 4))
    mask.paste(255, (4, 0, 6, 2))
    logits = mask_to_logits(mask, (1, 2))
    assert logits.shape == (1, 1, 1, 1, 2) and logits.dtype == np.float32
    assert logits[0, 0, 0, 0].tolist() == pytest.approx([6, -3])


def test_exif_rotation_is_respected(model_folder: str, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the picture was taken with the camera turned
    Image.new("RGB", (WIDTH, HEIGHT), (9, 90, 200)).save(tmp_path / "turned.jpg", exif=exif)
    content = segment(str(tmp_path / "turned.jpg"), model_folder, tmp_path / "out", "--point", f"5,{WIDTH - 5}")
    assert content["size"] == [WIDTH, HEIGHT]
    assert read_png(tmp_path / "out" / "overlay.png").shape == (WIDTH, HEIGHT, 3)


def test_standard_input(picture: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(Path(picture).read_bytes())))
    piped = segment("-", model_folder, tmp_path / "piped", "--point", "30,20")
    direct = segment(picture, model_folder, tmp_path / "direct", "--point", "30,20")
    assert piped["objects"] == direct["objects"]


@pytest.fixture
def server(picture: str) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=Path(picture).parent)) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_address[1]}"
        httpd.shutdown()
        thread.join()


def test_url(server: str, model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = segment(f"{server}/picture.png", model_folder, tmp_path / "out", "--point", "30,20")
    assert content["size"] == [HEIGHT, WIDTH]
    capsys.readouterr()
    message = refused(["segment", f"{server}/absent.png", "--point", "1,1", "-o", str(tmp_path / "o")], capsys)
    assert "cannot download" in message and "404" in message
    message = refused(["segment", "http://127.0.0.1:9/x.png", "--point", "1,1", "-o", str(tmp_path / "o")], capsys)
    assert "cannot download" in message


@pytest.fixture
def address() -> Iterator[Callable[[Iterable[bytes], dict[str, str]], str]]:
    """Answers every request with what it is given."""
    answer: dict[str, Any] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            for name, value in answer["headers"].items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):  # whoever asked has seen enough
                for block in answer["blocks"]:
                    self.wfile.write(block)
                    self.wfile.flush()

        def log_message(self, *args: Any) -> None:
            pass

    def serve(blocks: Iterable[bytes], headers: dict[str, str]) -> str:
        answer.update(blocks=blocks, headers=headers)
        return f"http://127.0.0.1:{server.server_port}/picture.png"

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield serve
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_url_is_read_with_limits_and_as_a_picture(
    address, picture: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    content = Path(picture).read_bytes()
    for headers in ({}, {"Content-Type": "application/octet-stream"}, {"Content-Type": "image/png"}):
        segment(address([content], headers), model_folder, tmp_path / "out", "--point", "5,5")
    capsys.readouterr()
    limits = "efficientsam_hf.models.mask_generation_efficientsam"
    monkeypatch.setattr(f"{limits}.DOWNLOAD_BYTES", 10**6)
    endless = itertools.repeat(bytes(2**16))
    short = {"Content-Length": str(len(content) + 9)}
    for blocks, headers, words in (
        (endless, {"Content-Type": "image/png"}, "it has more than 1,000,000 bytes"),
        ([b"<html>"], {"Content-Type": "text/html; charset=utf-8"}, "it is text/html; charset=utf-8, not a picture"),
        ([content], short, "9 bytes of it are missing"),
        ([b"no picture"], {"Content-Type": "image/png"}, "is not a picture that Pillow can read"),
    ):
        url = address(blocks, headers)
        assert words in refused(["segment", url, "--point", "1,1", "-o", str(tmp_path / "no")], capsys)
    clock = itertools.count(step=100)
    monkeypatch.setattr(f"{limits}.time", SimpleNamespace(monotonic=lambda: next(clock)))
    url = address(itertools.repeat(b"drop by drop"), {"Content-Type": "image/png"})
    line = refused(["segment", url, "--point", "1,1", "-o", str(tmp_path / "no")], capsys)
    assert f"cannot download {url}: it is not here after 300 seconds" in line


def test_grouping_of_prompts() -> None:
    one = group_prompts([(1, 1), (2, 2)], [(3, 3)], [], has_mask=False, each_point=False)
    assert one == [ObjectPrompt([(1, 1), (2, 2), (3, 3)], [1, 1, 0])]
    each = group_prompts([(1, 1), (2, 2)], [(3, 3)], [], has_mask=False, each_point=True)
    assert each == [ObjectPrompt([(1, 1), (3, 3)], [1, 0]), ObjectPrompt([(2, 2), (3, 3)], [1, 0])]
    outside_the_only_box = group_prompts([(90, 90)], [], [(0, 0, 9, 9)], has_mask=False, each_point=False)
    assert outside_the_only_box == [ObjectPrompt([(90, 90)], [1], (0, 0, 9, 9))]
    boxes = [(0, 0, 9, 9), (5, 5, 20, 20)]
    two = group_prompts([(1, 1)], [(15, 15)], boxes, has_mask=False, each_point=False)
    assert two == [ObjectPrompt([(1, 1)], [1], boxes[0]), ObjectPrompt([(15, 15)], [0], boxes[1])]
    assert group_prompts([], [], [], has_mask=True, each_point=False) == [ObjectPrompt()]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "give at least one --point, --box or --mask"),
        (["--background", "1,1"], "give at least one --point, --box or --mask"),
        (["--point", "1"], "'1' is not X,Y"),
        (["--point", "1,2,3"], "'1,2,3' is not X,Y"),
        (["--point", "a,b"], "'a,b' is not X,Y"),
        (["--point", "nan,1"], "'nan,1' is not X,Y"),
        (["--point", "inf,1"], "'inf,1' is not X,Y"),
        (["--point"], "expected one argument"),
        (["--point", f"{WIDTH + 0.5},1"], "--point 60.5,1 lies outside the picture of 60 x 40"),
        (["--point", "-5,1"], "--point -5,1 lies outside"),
        (["--point", "1,1", "--background", "1,41"], "--background 1,41 lies outside"),
        (["--box", "1,2,3"], "is not X0,Y0,X1,Y1"),
        (["--box", "10,5,10,9"], "empty box: X1 must be above X0"),
        (["--box", "10,5,20,4"], "empty box: X1 must be above X0"),
        (["--box", "10,5,20,41"], "--box 10,5,20,41 reaches outside"),
        (["--box", "0,0,9,9", "--box", "5,5,20,20", "--point", "30,30"], "point 30,30 lies in none of the 2 boxes"),
        (["--box", "0,0,9,9", "--box", "5,5,20,20", "--point", "7,7"], "point 7,7 lies in several of the 2 boxes"),
        (["--each-point", "--point", "1,1", "--box", "0,0,9,9"], "excludes --box"),
        (["--mask", "m.png", "--box", "0,0,9,9", "--box", "5,5,20,20"], "--mask describes one object"),
        (["--mask", "absent.png"], "absent.png"),
        (["--point", "1,1", "--model", "no/such/folder"], "model no/such/folder: no such folder"),
        (["--point", "1,1", "--model", "./absent"], "model ./absent: no such folder"),
        (["--point", "1,1", "--model", "nobody/nothing"], "cannot load a promptable model from nobody/nothing"),
        (["--point", "1,1", "--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--point", "1,1", "--device", "abacus"], "--device abacus cannot be used"),
        (["--point", "1,1", "--dtype", "float8"], "invalid choice"),
        (["--point", "1,1", "--sharpen"], "unrecognized arguments: --sharpen"),
    ],
)
def test_bad_prompts_and_options(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str
) -> None:
    assert message in refused(["segment", picture, "-o", str(tmp_path / "out"), *options], capsys)
    assert not (tmp_path / "out" / "masks.json").exists()


def huge_png() -> bytes:
    """The header of a grey PNG of 50,000 x 50,000 pixels, and no data."""
    body = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 0, 0, 0, 0)
    header = struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return b"\x89PNG\r\n\x1a\n" + header + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


def truncated_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()[:5000]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is text", "not a picture"),
        (b"", "not a picture"),
        (huge_png(), "safety limit"),
        (truncated_png(), "truncated"),
        (None, "does not exist"),
    ],
    ids=["text", "empty", "huge", "truncated", "missing"],
)
def test_bad_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, message: str) -> None:
    path = tmp_path / "bad.png"
    if content is not None:
        path.write_bytes(content)
    line = refused(["segment", str(path), "--point", "1,1", "-o", str(tmp_path / "out")], capsys)
    assert message in line and "bad.png" in line
    assert not (tmp_path / "out").exists()


def test_bad_standard_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for content, message in ((b"", "standard input is empty"), (truncated_png(), "standard input is damaged")):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert message in refused(["segment", "-", "--point", "1,1", "-o", str(tmp_path / "out")], capsys)


def test_bad_mask_prompts(picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mask.png"
    for size, message in (((WIDTH, HEIGHT), "is empty"), ((HEIGHT, WIDTH), "they must agree")):
        Image.new("L", size).save(path)
        assert message in refused(["segment", picture, "--mask", str(path), "-o", str(tmp_path / "out")], capsys)


def test_outputs_that_cannot_be_written(picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    occupied = tmp_path / "file"
    occupied.write_text("keep me")
    for output in (occupied, occupied / "below"):
        line = refused(["segment", picture, "--point", "1,1", "-o", str(output)], capsys)
        assert f"cannot write to the folder {output}" in line
    assert occupied.read_text() == "keep me"


def test_a_folder_without_a_model_and_a_file_are_no_models(
    picture: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["segment", picture, "--point", "1,1", "-o", str(tmp_path / "out"), "--model"]
    assert "cannot load a promptable model" in refused([*arguments, str(tmp_path)], capsys)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert "cannot load a promptable model" in refused([*arguments, str(tmp_path)], capsys)
    assert "is a file" in refused([*arguments, picture], capsys)


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, expected in (
        (["--help"], "segment"),
        (["--version"], "efficientsam-hf"),
        (["segment", "--help"], "which prompts make one object"),
        (["convert", "--help"], "released"),
        (["evaluate", "--help"], "distance transform"),
        (["finetune", "--help"], "--recipe"),
    ):
        with pytest.raises(SystemExit, match="0"):
            main(arguments)
        assert expected in capsys.readouterr().out


def test_no_command_and_unknown_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert "required: COMMAND" in refused([], capsys)
    assert "invalid choice: 'cut'" in refused(["cut"], capsys)


def test_defects_keep_their_traceback(picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str | None, args: Any) -> None:
        raise KeyError("defect")

    monkeypatch.setattr("efficientsam_hf.cli.segment.load_model", broken)
    with pytest.raises(KeyError, match="defect"):
        main(["segment", picture, "--point", "1,1", "-o", str(tmp_path / "out")])


def test_traceback_on_demand(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["--traceback", "segment", str(tmp_path / "no.png"), "--point", "1,1", "-o", str(tmp_path / "out")])


def test_interruption_is_clean(
    picture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str | None, args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("efficientsam_hf.cli.segment.load_model", interrupted)
    assert main(["segment", picture, "--point", "1,1", "-o", str(tmp_path / "out")]) == 130
    assert capsys.readouterr().err == "efficientsam: interrupted\n"


def test_as_a_module() -> None:
    command = [sys.executable, "-m", "efficientsam_hf.cli", "segment", "absent.png", "--point", "1,1", "-o", "unused"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert "absent.png" in done.stderr and "Traceback" not in done.stderr
    assert not Path("unused").exists()


@pytest.fixture
def coco(picture: str, tmp_path: Path) -> list[str]:
    """Options for one picture with two objects."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:20, 10:40] = True
    annotations = [{"image_id": 1, "segmentation": encode_rle(m)} for m in (mask, ~mask)]
    images = [{"id": 1, "file_name": "picture.png", "width": WIDTH, "height": HEIGHT}]
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations}))
    return ["--annotations", str(path), "--images", str(tmp_path)]


def test_evaluate_prints_and_writes(
    coco: list[str], model_folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "deep" / "metrics.json"
    arguments = ["evaluate", model_folder, "--device", "cpu", *coco, "--output", str(output)]
    assert main([*arguments, "--prompts", "center", "box", "--save-worst", "1"]) == 0
    assert [path.parent.name for path in sorted(output.parent.glob("metrics.worst/*/001_iou_*.png"))] == [
        "box",
        "center",
        "center_3",
        "center_5",
    ]
    record = json.loads(output.read_text())
    metrics = record["metrics"]
    assert metrics["objects"] == 2 and set(metrics) >= {"center", "center:5", "box"} and "uniform" not in metrics
    assert record["command"].startswith("efficientsam evaluate ")
    content = Path(coco[coco.index("--annotations") + 1]).read_bytes()
    assert record["protocol"]["annotations"] == f"sha256:{hashlib.sha256(content).hexdigest()[:16]}"
    assert record["protocol"]["clicks"] == [1, 3, 5] and record["revision"].startswith("sha256:")
    assert {"torch", "transformers", "python", "efficientsam-hf"} <= set(record["versions"])
    assert record["machine"]["cores"] >= 1 and record["machine"]["gpus"] == [] and record["date"].endswith("+00:00")
    printed = capsys.readouterr().out
    assert f"{metrics['box']['miou']:.4f}" in printed and "2 objects in 1 images" in printed


def test_evaluate_refuses(coco: list[str], model_folder: str, tmp_path: Path, capsys) -> None:
    arguments = ["evaluate", model_folder, "--device", "cpu"]
    assert "one of the arguments --annotations --scenes is required" in refused(arguments, capsys)
    assert "--annotations and --images go together" in refused([*arguments, *coco[:2]], capsys)
    assert "not allowed with argument" in refused([*arguments, *coco, "--scenes", "2"], capsys)
    assert "--scenes must be at least 1" in refused([*arguments, "--scenes", "0"], capsys)
    assert "invalid choice: 'click'" in refused([*arguments, *coco, "--prompts", "click"], capsys)
    assert "limit must be at least 1" in refused([*arguments, *coco, "--limit", "0"], capsys)
    assert "--save-worst needs" in refused([*arguments, *coco, "--save-worst", "2"], capsys)
    assert "--seed must be at least 0, got -1" in refused([*arguments, *coco, "--seed", "-1"], capsys)
    assert "--clicks must be" in refused([*arguments, *coco, "--clicks", "0"], capsys)
    assert "limit must be at least 1" in refused([*arguments, *coco, "--limit", "-3"], capsys)
    absent = ["--annotations", str(tmp_path / "no.json"), "--images", str(tmp_path)]
    assert "no.json does not exist" in refused([*arguments, *absent], capsys)
    for mode in (["--boxes", "ground-truth"], ["--everything"]):
        for option in (["--clicks", "1"], ["--prompts", "box"]):
            line = refused([*arguments, *coco, *mode, *option], capsys)
            assert f"{option[0]} is for mIoU and changes nothing with {mode[0]}" in line
    below_a_file = ["--output", str(tmp_path / "coco.json" / "metrics.json")]
    assert "cannot write" in refused([*arguments, *coco, *below_a_file], capsys)


def test_evaluate_compares_models(coco: list[str], model_folder: str, tmp_path: Path, capsys) -> None:
    output = tmp_path / "metrics.json"
    arguments = ["evaluate", model_folder, model_folder, "--device", "cpu", *coco, "--output", str(output)]
    assert main([*arguments, "--prompts", "uniform", "--clicks", "1", "3"]) == 0
    content = json.loads(output.read_text())
    assert [record["model"] for record in content["models"]] == [model_folder] * 2
    (difference,) = content["differences"]
    assert difference["uniform:3"] == {"difference": 0, "low": 0, "high": 0}
    printed = capsys.readouterr().out
    assert printed.count(model_folder) == 4 and "uniform:3" in printed and "+0.0000" in printed


def test_what_is_measured_outlives_a_model_that_cannot_be_loaded(
    coco: list[str], model_folder: str, tmp_path: Path, capsys
) -> None:
    (tmp_path / "broken").mkdir()
    output = tmp_path / "metrics.json"
    models = ["evaluate", model_folder, str(tmp_path / "broken"), "--device", "cpu"]
    assert main([*models, *coco, "--prompts", "box", "--output", str(output)]) == 2
    assert "broken" in capsys.readouterr().err
    assert [record["model"] for record in json.loads(output.read_text())["models"]] == [model_folder]


def test_options_are_written_out(capsys) -> None:
    """Or a new option would change what an old command line means."""
    assert "unrecognized arguments: --every" in refused(["segment", "x.png", "-o", "out", "--every"], capsys)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_evaluate_measures_average_precision(coco: list[str], model_folder: str, tmp_path: Path, capsys) -> None:
    output = tmp_path / "ap.json"
    arguments = [
        "evaluate",
        model_folder,
        "--device",
        "cpu",
        *coco,
        "--boxes",
        "ground-truth",
        "--output",
        str(output),
    ]
    assert main(arguments) == 0
    numbers = json.loads(output.read_text())["average_precision"]
    assert set(numbers) == {"box_iou", "predicted_iou"} and 0 <= numbers["box_iou"]["AP50"] <= 1
    assert f"{numbers['box_iou']['AP']:.4f}" in capsys.readouterr().out
    scenes = ["evaluate", model_folder, "--scenes", "2", "--boxes", "ground-truth"]
    assert "--boxes needs --annotations" in refused(scenes, capsys)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_evaluate_measures_everything(coco: list[str], model_folder: str, tmp_path: Path, capsys) -> None:
    output = tmp_path / "everything.json"
    options = ["--everything", "--points-per-crop", "3", "--pred-iou-thresh", "0", "--stability-score-thresh", "0"]
    arguments = ["evaluate", model_folder, "--device", "cpu", *coco, *options, "--output", str(output)]
    assert main(arguments) == 0
    record = json.loads(output.read_text())
    assert set(record["average_precision"]) == {"everything"} and record["protocol"]["points_per_crop"] == 3
    assert "everything" in capsys.readouterr().out
    for wrong, words in (
        (["--points-per-crop", "3"], "--points-per-crop is an option of --everything"),
        (["--everything", "--boxes", "ground-truth"], "and no --boxes"),
        (["--everything", "--pred-iou-thresh", "3"], "pred_iou_thresh must be a number from 0 to 1"),
    ):
        assert words in refused(["evaluate", model_folder, *coco, *wrong], capsys)


def test_two_processes_measure_the_same(coco: list[str], model_folder: str, tmp_path: Path) -> None:
    """Both share the pictures, of mIoU and of AP; one prints and writes.

    The masks to find are the model's own answers to the boxes, so that AP is not 0.
    """
    annotations = Path(coco[1])
    content = json.loads(annotations.read_text())
    boxes = [[10.0, 5.0, 30.0, 15.0], [2.0, 20.0, 40.0, 20.0], [30.0, 8.0, 20.0, 30.0]]
    content["images"] = [{**content["images"][0], "id": number} for number in (1, 2, 3)]  # for two processes
    content["annotations"] = [
        {"image_id": number, "segmentation": encode_rle(own_answer(model_folder, tmp_path, box))}
        for number, box in enumerate(boxes, 1)
    ]
    annotations.write_text(json.dumps(content))
    detections = tmp_path / "detections.json"
    detections.write_text(
        json.dumps([{"image_id": n, "category_id": 1, "bbox": box, "score": 1} for n, box in enumerate(boxes, 1)])
    )
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for number, options in enumerate((["--prompts", "uniform", "box"], ["--boxes", str(detections)])):
        arguments = ["evaluate", model_folder, "--device", "cpu", *coco, *options]
        one, two = tmp_path / f"one_{number}.json", tmp_path / f"two_{number}.json"
        assert main([*arguments, "--output", str(one)]) == 0
        command = [*launch, "-m", "efficientsam_hf.cli", *arguments, "--output", str(two)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.count("wrote") == 1
        name = "average_precision" if number else "metrics"
        first, second = (json.loads(path.read_text())[name] for path in (one, two))
        assert first == second
    assert first["predicted_iou"]["AP"] > 0.9


def own_answer(model_folder: str, pictures: Path, box: list[float]) -> np.ndarray:
    """The mask of highest predicted IoU for a box [x, y, width, height] on the picture, (H, W) bool."""
    model = EfficientSamModel.from_pretrained(model_folder)
    processor = EfficientSamProcessor.from_pretrained(model_folder)
    x, y, width, height = box
    inputs = processor(
        images=str(pictures / "picture.png"), input_boxes=[[[x, y, x + width, y + height]]], return_tensors="pt"
    )
    with torch.no_grad():
        outputs = model(**inputs)
    masks = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])[0]
    mask = masks[0, outputs.iou_scores[0, 0].argmax()].numpy()
    assert mask.any()
    return mask


def test_evaluate_on_scenes(model_folder: str, tmp_path: Path) -> None:
    output = tmp_path / "metrics.json"
    arguments = ["evaluate", model_folder, "--device", "cpu", "--scenes", "3", "--prompts", "box"]
    assert main([*arguments, "--output", str(output)]) == 0
    metrics = json.loads(output.read_text())["metrics"]
    assert metrics["images"] == 3 and metrics["objects"] > 3 and 0 <= metrics["box"]["miou"] <= 1


def test_a_damaged_model_is_named(model_folder: str, picture: str, tmp_path: Path, capsys) -> None:
    for damage in ("cut", "shape"):
        folder = shutil.copytree(model_folder, tmp_path / damage)
        if damage == "cut":
            weights = folder / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:1000])
        else:
            config = json.loads((folder / "config.json").read_text())
            config["vision_config"]["hidden_size"] *= 2
            (folder / "config.json").write_text(json.dumps(config))
        line = refused(
            ["segment", picture, "--point", "1,1", "-o", str(tmp_path / "out"), "--model", str(folder)], capsys
        )
        assert f"cannot load a promptable model from {folder}" in line


def test_evaluate_knows_the_protocols() -> None:
    from efficientsam_hf.evaluation import DEFAULT_PROTOCOLS, PROTOCOLS

    assert evaluate_command.PROTOCOLS == PROTOCOLS
    assert evaluate_command.DEFAULT_PROTOCOLS == DEFAULT_PROTOCOLS


def test_convert(shared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(shared / "parity"))
    from official_state import save_official_checkpoint

    save_official_checkpoint("ti", tmp_path / "released.pt")
    assert main(["convert", str(tmp_path / "released.pt"), str(tmp_path / "converted")]) == 0
    assert str(tmp_path / "converted") in capsys.readouterr().out
    model = EfficientSamModel.from_pretrained(tmp_path / "converted")
    capsys.readouterr()
    assert model.config.vision_config.hidden_size == 192
    assert "absent.pt" in refused(["convert", str(tmp_path / "absent.pt"), str(tmp_path / "other")], capsys)


# What comes out of the terminal, and what is left where it goes wrong


def test_a_long_error_is_cut_and_what_a_terminal_obeys_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    long = refused(["segment", "p.png", "--point", "1" * 10**7, "-o", "out"], capsys)
    assert len(long) < 1100 and "argument --point: '1111" in long and "numbers with commas between" in long
    line = refused(["segment", "\x1b[2J\u202e\udc80 ü.png", "--point", "1,1", "-o", "out"], capsys)
    assert "\\x1b[2J\\u202e\\udc80 ü.png" in line


def test_names_that_the_terminal_cannot_print(
    picture: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for encoding, name in (("cp1252", "図"), ("ascii", "ü"), ("utf-8", "\udcff")):
        printed = io.BytesIO()
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
        segment(picture, model_folder, tmp_path / name, "--point", "5,5")
        sys.stdout.flush()
        assert name.encode(encoding, "backslashreplace") in printed.getvalue()


@pytest.mark.parametrize("options", [["--point", "5,5", "--point", "9,9", "--each-point"], ["--everything"]], ids=str)
def test_a_full_disk_leaves_what_was_there(
    picture: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, options: list[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "masks.json").write_text("of an earlier call")
    save = Image.Image.save

    def save_until_full(image: Image.Image, path: Path, **options: Any) -> None:
        save(image, path, **options)
        if "overlay" in Path(path).name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Image.Image, "save", save_until_full)
    grid = ["--points-per-crop", "2"] if "--everything" in options else []
    arguments = ["segment", picture, "--model", model_folder, "-o", str(tmp_path / "out"), *options, *grid]
    assert main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("efficientsam: error: ") and "No space left on device" in line
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["masks.json"]
    assert (tmp_path / "out" / "masks.json").read_text() == "of an earlier call"


def test_scores_that_are_no_numbers_are_an_error(
    picture: str, model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Finite weights can give NaN too, by overflow."""
    forward = EfficientSamModel.forward

    def overflowing(self: EfficientSamModel, *args: Any, **kwargs: Any) -> Any:
        outputs = forward(self, *args, **kwargs)
        outputs.iou_scores *= float("nan")
        return outputs

    monkeypatch.setattr(EfficientSamModel, "forward", overflowing)
    arguments = ["segment", picture, "--point", "1,1", "--model", model_folder, "-o", str(tmp_path / "out")]
    assert "the scores of the model are not finite numbers" in refused(arguments, capsys)


def test_json_has_no_nan(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf"), -float("inf"), np.float64("nan")):
        content = {"models": [{"name": "a", "miou": 0.5}, {"name": "b", "miou": value}]}
        with pytest.raises(ValueError, match=r"m\.json is not written: models\.1\.miou is -?(nan|inf)"):
            write_json(tmp_path / "m.json", content)
    assert list(tmp_path.iterdir()) == []
