# SPDX-License-Identifier: Apache-2.0
"""`efficientsam pretrain` through the real command line, with a tiny student."""

import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from efficientsam_hf import EfficientSamModel, SamiConfig, SamiForPreTraining
from efficientsam_hf.cli import main
from efficientsam_hf.training.arguments import RECIPES, build_arguments, read_recipe
from efficientsam_hf.training.pretrain_arguments import PretrainArguments
from efficientsam_hf.training.sample_batches import SampleBatches


TRAIN = "pretrain --recipe smoke --batch-size 2 --image-sizes 64 --max-steps 3 --checkpoint-every 1".split()
MAE = "--target pixels --loss-tokens masked --decoder full".split()


def events(run: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def write_pictures(folder: Path, count: int) -> Path:
    generator = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for index in range(count):
        Image.fromarray(generator.integers(0, 256, (50, 70, 3), np.uint8)).save(folder / f"{index}.JPEG")
    return folder


def test_a_student_of_the_shipped_encoder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = [*TRAIN, "--teacher-resolution", "64", "--picture-every", "2"]
    command += ["--output-dir", str(run)]
    assert main(command) == 0
    assert "3 steps, 6 images" in capsys.readouterr().out
    (line,) = events(run, "train")
    assert {"loss", "masked_error", "visible_error", "cosine"} <= set(line)
    with Image.open(run / "pictures" / "step_000002.png") as picture:
        assert picture.size == (4 * 64 + 5 * 6, 2 * 64 + 3 * 6)
    with safe_open(next((run / "checkpoints").glob("step_3/model.safetensors")), "pt") as file:
        assert {name.split(".")[0] for name in file.keys()} == {"model"}  # noqa: SIM118 - it is no dict
    assert main([*command, "--resume"]) == 0
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    card = (tmp_path / "exported" / "README.md").read_text()
    assert "SAMI encoder" in card and "features of `default`" in card and "error, hidden patches" in card
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "mean"), "--average", str(run / "model")]) == 2
    assert "average is for EfficientSAM models" in capsys.readouterr().err
    student = SamiForPreTraining.from_pretrained(run / "model")
    assert student.config.target_width == 256
    model = EfficientSamModel.from_sami(run / "model")
    weight = model.vision_encoder.layers[0].mlp.fc1.weight
    assert torch.equal(weight, student.vision_encoder.layers[0].mlp.fc1.weight)


@pytest.mark.parametrize("form", ["folder", "tars", "dataset", "stream"])
def test_mae_on_pictures(tmp_path: Path, recipe_without_teacher: str, form: str) -> None:
    folder = write_pictures(tmp_path / "pictures" / "class", 4)
    (folder / "2.JPEG").write_bytes(b"damaged")
    flags = ["--train-images", str(tmp_path / "pictures")]
    if form == "tars":
        (tmp_path / "tars").mkdir()
        with tarfile.open(tmp_path / "tars" / "a.tar", "w") as archive:
            for path in sorted(folder.iterdir()):
                archive.add(path, arcname=f"class/{path.name}")
        flags = ["--train-images", str(tmp_path / "tars")]
    if form in ("dataset", "stream"):
        (folder / "2.JPEG").unlink()
        flags = ["--train-dataset", str(folder), "--stream"] if form == "stream" else ["--train-dataset", str(folder)]
    run = tmp_path / "run"
    command = ["pretrain", "--recipe", recipe_without_teacher, *TRAIN[3:], *MAE, *flags, "--output-dir", str(run)]
    assert main(command) == 0
    skipped = events(run, "skipped")
    if form in ("folder", "tars"):
        assert skipped and "2.JPEG" in skipped[0]["reason"]
    else:
        assert not skipped
    assert SamiForPreTraining.from_pretrained(run / "model").config.target == "pixels"


def test_going_on_from_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"decoder_depth": 2, "decoder_width": 64, "decoder_heads": 4}
    vision = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}
    SamiForPreTraining(SamiConfig(vision_config=vision, **fields)).save_pretrained(tmp_path / "first")
    go_on = ["--model", str(tmp_path / "first"), "--model-overrides", "{}", "--teacher-resolution", "64"]
    assert main([*TRAIN, *go_on, "--output-dir", str(tmp_path / "second")]) == 0
    before, after = (
        SamiForPreTraining.from_pretrained(path) for path in (tmp_path / "first", tmp_path / "second/model")
    )
    still = {n for n, p in after.state_dict().items() if torch.equal(p, before.state_dict()[n])}
    assert still == {"vision_encoder.embeddings.position_embeddings"}
    assert main([*TRAIN, *go_on, "--decoder-depth", "3", "--output-dir", str(tmp_path / "third")]) == 2
    assert "decoder_depth is 2 and not 3" in capsys.readouterr().err
    assert not (tmp_path / "third").exists()


def test_a_stopped_run_ends_with_the_same_bits(tmp_path: Path, recipe_without_teacher: str) -> None:
    """SIGTERM after some steps, and on from there: crops, what is hidden and the optimiser go on as they were."""
    write_pictures(tmp_path / "pictures", 5)
    command = ["pretrain", "--recipe", recipe_without_teacher, *TRAIN[3:], *MAE, "--max-steps", "6"]
    command += ["--train-images", str(tmp_path / "pictures"), "--output-dir"]
    assert main([*command, str(tmp_path / "whole")]) == 0
    batch, calls = SampleBatches.batch, []

    def stopping(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 3:
            signal.raise_signal(signal.SIGTERM)
        return batch(self, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SampleBatches, "batch", stopping)
        assert main([*command, str(tmp_path / "parts")]) == 128 + signal.SIGTERM
    assert main([*command, str(tmp_path / "parts"), "--resume"]) == 0
    assert events(tmp_path / "parts", "resume")[0]["step"] == 3
    runs = tmp_path / "whole", tmp_path / "parts"
    one, two = (SamiForPreTraining.from_pretrained(run / "model").state_dict() for run in runs)
    assert all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--teacher-resolution", "100"], "teacher_resolution|resolution is 100, expected a multiple"),
        (["--teacher-resolution", "80"], "teacher_resolution is 80, expected the image_sizes of scenes"),
        (["--mask-ratio", "0.99"], "mask_ratio is 0.99"),
        (["--target", "pixels"], "target is 'pixels', which goes without teacher"),
        (["--train-images", "/nowhere"], "got train_scenes and train_images"),
        (["--no-train-scenes", "--train-images", "/nowhere"], "train_images: /nowhere does not exist"),
        (["--no-train-scenes"], "got none"),
        (["--crop-min-scale", "0"], "min_scale and max_scale must be shares"),
        (["--model", "/nowhere"], "nowhere"),
        (["--image-sizes", "72"], "image_sizes"),
        (["--model-overrides", "{decodr_depth: 3}"], "SamiConfig has no decodr_depth"),
        (["--model-overrides", "{decode_cls_token: maybe}"], "model_overrides: .*decode_cls_token"),
        (["--evaluate-every", "3"], "nothing is evaluated"),
    ],
)
def test_bad_arguments_end_before_the_run(tmp_path: Path, capsys, flags: list[str], words: str) -> None:
    assert main([*TRAIN, *flags, "--output-dir", str(tmp_path / "run")]) == 2
    assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


def test_recipes_are_valid() -> None:
    names = sorted(path.stem for path in (RECIPES / "pretrain").glob("*.yaml"))
    assert {"smoke", "sami_ti", "sami_s", "sami_b", "sami_clip_ti", "mae_ti", "sami_ti_gpu", "sami_ti_cpu"} <= set(
        names
    )
    for name in names:
        recipe = read_recipe(name, "pretrain")
        data = {} if recipe.get("train_scenes") else {"train_images": str(RECIPES)}
        arguments = build_arguments(PretrainArguments, recipe, {"output_dir": "x", **data})
        assert arguments.adam_beta2 == 0.95 and arguments.ema_decay == 0


def equal(one: Path, two: Path, **tolerance: float) -> None:
    """AssertionError unless two runs ended with the same weights."""
    runs = [SamiForPreTraining.from_pretrained(run / "model").state_dict() for run in (one, two)]
    for name, value in runs[0].items():
        torch.testing.assert_close(value, runs[1][name], **(tolerance or {"atol": 0, "rtol": 0}))


# AdamW's first steps go by the sign of a gradient, also where that is rounding noise, so they are kept small.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
STEPS = ["--max-steps", "4", "--learning-rate", "1e-4"]


@pytest.fixture
def training_on(tmp_path: Path, recipe_without_teacher: str) -> Callable[[str], list[str]]:
    """The command that trains on nine pictures, on their cached features, or on scenes that a teacher sees."""

    def command(source: str) -> list[str]:
        if source == "scenes":
            return [*TRAIN, *STEPS, "--teacher-resolution", "64"]
        folder = str(write_pictures(tmp_path / "pictures", 9))
        target = MAE
        if source == "features":
            cache = str(tmp_path / "cache")
            extract = ["--teacher", "default", "--teacher-resolution", "64", "--crops", "2", "--grid", "4"]
            assert main(["features", *extract, "--images", folder, "--device", "cpu", "--output", cache]) == 0
            target = ["--train-features", cache]
        return ["pretrain", "--recipe", recipe_without_teacher, *TRAIN[3:], *STEPS, *target, "--train-images", folder]

    return command


@pytest.mark.parametrize("source", ["pictures", "features", pytest.param("scenes", marks=pytest.mark.slow)])
def test_accumulation_equals_a_larger_batch(tmp_path: Path, training_on: Callable, source: str) -> None:
    """4 x 2 and 1 x 8 hide the same patches of the same pictures."""
    command = training_on(source)
    for name, flags in (("large", ["8"]), ("parts", ["2", "--gradient-accumulation", "4"]), ("other", ["4"])):
        assert main([*command, "--batch-size", *flags, "--output-dir", str(tmp_path / name)]) == 0
    equal(tmp_path / "large", tmp_path / "parts", **CLOSE)
    with pytest.raises(AssertionError):
        equal(tmp_path / "large", tmp_path / "other", **CLOSE)


@pytest.mark.parametrize("source", ["features", pytest.param("scenes", marks=pytest.mark.slow)])
def test_a_killed_run_ends_with_the_same_bits(tmp_path: Path, training_on: Callable, source: str, threads) -> None:
    """SIGKILL at any moment, with a teacher that looks on, and with what it saw before."""
    command = [*training_on(source), "--max-steps", "30", "--num-threads", "1", "--output-dir"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with (tmp_path / "output.txt").open("w") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "efficientsam_hf.cli", *command, str(killed)], stdout=output, stderr=output
        )
        while process.poll() is None and not list(killed.glob("checkpoints/step_[3-9]")):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    assert main([*command, str(killed), "--resume"]) == 0
    assert main([*command, str(whole)]) == 0
    assert 3 <= events(killed, "resume")[0]["step"] < 30
    equal(killed, whole)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["features", "scenes"])
def test_two_processes_equal_one_with_the_larger_batch(tmp_path: Path, training_on: Callable, source: str) -> None:
    training = training_on(source)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, "-m", "efficientsam_hf.cli", *training, "--batch-size", "4", "--output-dir"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, str(tmp_path / "two")], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert main([*training, "--batch-size", "8", "--output-dir", str(tmp_path / "one")]) == 0
    equal(tmp_path / "one", tmp_path / "two", **CLOSE)
