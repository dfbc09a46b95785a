# SPDX-License-Identifier: Apache-2.0
"""The way from nothing to a published folder through the real command line, with a tiny model."""

import json
import os
import pickle
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_mixture import write_files
from test_prompt_inputs import RELEASED
from test_run_folder import bombs
from test_segmentation_training import tiny_model
from transformers import SamConfig

from efficientsam_hf import EfficientSamImageProcessor, EfficientSamModel, SamiConfig, SamiForPreTraining
from efficientsam_hf.cli import main
from efficientsam_hf.data.scene_bank import SceneBank
from efficientsam_hf.models.rle_efficientsam import encode_rle
from efficientsam_hf.training.arguments import read_recipe
from efficientsam_hf.training.segmentation import InteractiveSegmentation


TRAIN = "finetune --recipe smoke --image-sizes 64 --evaluate-scenes 1 --evaluate-every 2 --checkpoint-every 2".split()


def events(run: Path, name: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == name]


def test_train_resume_evaluate_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, metrics, folder = tmp_path / "run", tmp_path / "metrics.json", tmp_path / "tiny"
    command = [*TRAIN, "--max-steps", "4", "--output-dir", str(run)]
    assert main(command) == 0
    assert "4 steps, 16 images" in capsys.readouterr().out
    assert [line["step"] for line in events(run, "evaluation")] == [2, 4]
    assert main([*command, "--resume"]) == 0  # there is nothing left to do, and that is no error
    assert events(run, "resume")[0]["step"] == 4
    evaluate = ["evaluate", str(run / "model"), "--scenes", "2", "--output", str(metrics)]
    assert main([*evaluate, "--device", "cpu", "--prompts", "box"]) == 0
    assert main(["export", str(run), str(folder), "--metrics", str(metrics)]) == 0
    assert "generated scenes" in (folder / "README.md").read_text()
    trained, exported = (EfficientSamModel.from_pretrained(path) for path in (run / "model", folder))
    for name, weight in exported.state_dict().items():
        torch.testing.assert_close(weight, trained.state_dict()[name], atol=1e-3, rtol=1e-3)


STRANGE = "pytorch_model.bin model.safetensors.index.json pytorch_model.bin.index.json training_args.bin".split()


@pytest.mark.slow
def test_nothing_in_the_folders_of_a_run_runs(tmp_path: Path, hub, repo: str, capsys) -> None:
    """A pickle that leaves a mark where it is opened as one, under each name that the commands open, or might."""
    good, run, mark = tmp_path / "good", tmp_path / "run", tmp_path / "mark"
    train = [*TRAIN, "--evaluate-scenes", "0", "--max-steps", "2", "--output-dir"]
    assert main([*train, str(good)]) == 0
    assert main(["export", str(good), str(good / "exported")]) == 0
    names = [path.relative_to(good) for path in good.rglob("*") if path.is_file() and path.name != ".lock"]
    names += [Path(folder, name) for folder in ("model", "exported", "checkpoints/step_2") for name in STRANGE]
    assert len(names) > 25
    for number, name in enumerate(names):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(good, run)
        (run / name).write_bytes(bombs(mark)[number % 2])
        if name.name in STRANGE:
            (run / name).with_name("model.safetensors").unlink()
        if name.parts[0] == "model":
            main(["evaluate", str(run / "model"), "--scenes", "1", "--device", "cpu", "--prompts", "box"])
        if name.parts[0] == "exported":
            main(["push", str(run / "exported"), repo, "--token", hub.token])
        else:
            main(["export", str(run), str(tmp_path / "out"), "--overwrite"])
            main([*train, str(run), "--resume"])
        assert not mark.exists(), name


@pytest.mark.slow
def test_training_goes_on_from_a_folder_and_moves_every_weight(tmp_path: Path) -> None:
    main([*TRAIN, "--max-steps", "2", "--output-dir", str(tmp_path / "first")])
    start = tmp_path / "first" / "model"
    flags = ["--model", str(start), "--model-overrides", "{}", "--optimizer", "muon", "--mask-prompts", "1"]
    assert main([*TRAIN, *flags, "--max-steps", "4", "--output-dir", str(tmp_path / "second")]) == 0
    before, after = (
        EfficientSamModel.from_pretrained(path).state_dict() for path in (start, tmp_path / "second" / "model")
    )
    still = [name for name, weight in after.items() if torch.equal(weight, before[name])]
    # What this model has no use for: padding is masked out, and the matrix of the encoding is fixed.
    assert set(still) <= {"prompt_encoder.padding_embed.weight", "prompt_encoder.positional_encoding.gaussian_matrix"}


def write_coco(folder: Path, count: int) -> list[str]:
    """Pictures of noise with a bright rectangle each as a COCO file; returns the flags that train on it."""
    generator = np.random.default_rng(0)
    content = {"images": [], "annotations": []}
    folder.mkdir()
    for index in range(count):
        mask = np.zeros((48, 64), bool)
        mask[8:30, 10 + index : 40 + index] = True
        pixels = generator.integers(0, 80, (48, 64, 3), np.uint8) + 120 * mask[..., None].astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        content["images"].append({"id": index, "file_name": f"{index}.png", "height": 48, "width": 64})
        content["annotations"].append({"id": index, "image_id": index, "segmentation": encode_rle(mask)})
    path = folder / "instances.json"
    path.write_text(json.dumps(content))
    return ["--no-train-scenes", "--train-annotations", str(path), "--train-images", str(folder)]


def test_a_loss_that_is_not_finite_is_one_line(tmp_path: Path, capsys) -> None:
    flags = ["--learning-rate", "1e30", "--warmup-steps", "0", "--max-steps", "40", "--max-nonfinite", "2"]
    assert main([*TRAIN, "--evaluate-scenes", "0", *flags, "--output-dir", str(tmp_path / "run")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("efficientsam: error: ")]
    assert "not finite for 2 steps in a row" in line and "Traceback" not in line


def test_damaged_pictures_to_evaluate_on_are_named_before_training(tmp_path: Path, capsys, caplog) -> None:
    flags = write_coco(tmp_path / "data", 3)
    evaluation = ["--eval-annotations", flags[2], "--eval-images", flags[4]]
    Path(flags[4], "1.png").write_bytes(b"no picture")
    base = [*TRAIN, "--max-steps", "1", "--evaluate-scenes", "0", "--output-dir", str(tmp_path / "run")]
    assert main([*base, *evaluation]) == 0
    (warning,) = caplog.records
    assert "picture 1 could not be used" in warning.getMessage() and "1.png' is not a picture" in warning.getMessage()
    assert events(tmp_path / "run", "evaluation")
    for name in ("0.png", "2.png"):
        Path(flags[4], name).write_bytes(b"no picture")
    assert main([*base[:-1], str(tmp_path / "other"), *evaluation]) == 2
    assert "none of 3 pictures could be used; picture 0: image" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_training_on_a_coco_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = write_coco(tmp_path / "data", 5)
    for name in ("3.png", "4.png"):  # the latter is beyond the limit
        Path(flags[-1], name).write_bytes(b"no picture")
    run = tmp_path / "run"
    flags += ["--horizontal-flip", "0.5", "--min-scale", "0.5", "--max-scale", "2", "--data-workers", "1"]
    flags += [
        "--train-limit",
        "4",
        "--freeze",
        "prompt_encoder",
        "--lora-rank",
        "2",
        "--layer-decay",
        "0.8",
        "--gradient-checkpointing",
    ]
    assert main([*TRAIN, *flags, "--max-steps", "5", "--output-dir", str(run)]) == 0
    skipped = events(run, "skipped")
    assert [line["sample"] for line in skipped] == [3] and "not a picture" in skipped[0]["reason"]
    assert events(run, "end")[0]["images"] == 20 and events(run, "end")[0]["skipped"] == 1
    assert "1 samples could not be used; log.jsonl names them" in capsys.readouterr().out


def test_a_killed_run_on_a_coco_file_ends_with_the_same_bits(tmp_path: Path, threads: None) -> None:
    """SIGKILL at any moment; order of the data, augmentation, prompts, optimiser and average go on as they were."""
    flags = write_coco(tmp_path / "data", 5)
    flags += ["--horizontal-flip", "0.5", "--max-scale", "2", "--max-steps", "24", "--checkpoint-every", "1"]
    command = [*TRAIN, *flags, "--evaluate-scenes", "0", "--batch-size", "2", "--num-threads", "1"]
    command += ["--output-dir"]
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
    assert 3 <= events(killed, "resume")[0]["step"] < 24
    one, two = (EfficientSamModel.from_pretrained(run / "model").state_dict() for run in (killed, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)


# The command with a bank of scenes that is made already: making one takes seconds.
WITH_BANK = """
import pickle, sys
from efficientsam_hf.data.scene_bank import SceneBank

bank = pickle.loads(open(sys.argv[1], "rb").read())
SceneBank.build = lambda seed=0, device="cpu": bank
from efficientsam_hf.cli import main

sys.exit(main(sys.argv[2:]))
"""


def test_a_killed_run_on_a_mixture_ends_with_the_same_bits(tmp_path: Path, threads: None, monkeypatch, capsys) -> None:
    """A COCO file, pasted pictures and scenes, made by a worker before the kill and by none afterwards."""
    bank, mixture = SceneBank.build(), write_files(tmp_path / "data")
    (tmp_path / "bank.pickle").write_bytes(pickle.dumps(bank))
    monkeypatch.setattr(SceneBank, "build", lambda seed=0, device="cpu": bank)
    flags = ["--no-train-scenes", "--train-mix", str(mixture), "--light", "1", "--batch-size", "2", "--log-every", "1"]
    flags += ["--evaluate-scenes", "0", "--max-steps", "12", "--checkpoint-every", "1", "--num-threads", "1"]
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    launch = [sys.executable, "-c", WITH_BANK, str(tmp_path / "bank.pickle")]
    with (tmp_path / "output.txt").open("w") as output:
        command = [*launch, *TRAIN, *flags, "--data-workers", "1", "--output-dir", str(killed)]
        process = subprocess.Popen(command, stdout=output, stderr=output)
        while process.poll() is None and not list(killed.glob("checkpoints/step_[3-9]")):
            time.sleep(0.01)
        process.kill()
        assert process.wait() == -signal.SIGKILL, (tmp_path / "output.txt").read_text()
    mixture.write_text(mixture.read_text().replace("weight: 2,", "weight: 3,"))
    assert main([*TRAIN, *flags, "--output-dir", str(killed), "--resume"]) == 2
    assert "train_mix differs in ['- weight: 2', '+ weight: 3']" in capsys.readouterr().err
    mixture.write_text(mixture.read_text().replace("weight: 3,", "weight: 2,"))
    assert main([*TRAIN, *flags, "--output-dir", str(killed), "--resume"]) == 0
    assert main([*TRAIN, *flags, "--output-dir", str(whole)]) == 0
    one, two = (EfficientSamModel.from_pretrained(run / "model").state_dict() for run in (killed, whole))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert 3 <= events(killed, "resume")[0]["step"] < 12
    names = ["loss", *(f"miou/{name}" for name in ("photos", "pasted", "scenes"))]
    numbers = {line["step"]: [line[name] for name in names] for line in events(whole, "train")}
    assert all(numbers[line["step"]] == [line[name] for name in names] for line in events(killed, "train"))
    for values in list(zip(*numbers.values(), strict=True))[1:]:  # two pictures are of two sources at most
        assert None in values and 0 <= max(value for value in values if value is not None) <= 1


def test_an_interrupted_run_says_how_to_go_on(tmp_path: Path, capsys, monkeypatch, not_ignored) -> None:
    """As it was typed, and what it prints does go on."""
    forward, steps = InteractiveSegmentation.forward, []

    def interrupted(self, batch):
        steps.append(1)
        if len(steps) == 3:
            signal.raise_signal(signal.SIGHUP)
        return forward(self, batch)

    monkeypatch.setattr(InteractiveSegmentation, "forward", interrupted)
    run = tmp_path / "my run"
    command = [*TRAIN, "--evaluate-scenes", "0", "--max-steps", "4", "--output-dir", str(run)]
    assert main(command) == 128 + signal.SIGHUP
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if line.startswith("efficientsam: interrupted")]
    assert "by SIGHUP, saved at step 3; this goes on: efficientsam finetune --recipe smoke " in line
    words = shlex.split(line.partition("this goes on: ")[2])
    assert words == ["efficientsam", *command, "--resume"]
    assert main(words[1:]) == 0 and events(run, "resume")[0]["step"] == 3


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_an_interruption_before_the_first_step_says_so_too(tmp_path: Path, capsys, monkeypatch, name: str) -> None:
    number = getattr(signal, name)
    command = [*TRAIN, "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    for where, more in (("efficientsam_hf.cli.finetune.build_model", []), ("test_trainer.Trainer.plan", ["--resume"])):
        with monkeypatch.context() as patch:
            patch.setattr(where, lambda *args: signal.raise_signal(number))
            assert main(command) == 128 + number
        words = shlex.split(capsys.readouterr().err.splitlines()[-1].partition("this goes on: ")[2])
        assert words == ["efficientsam", *command, *more]
    assert main(words[1:]) == 0


def test_training_on_tars_of_sa1b(tmp_path: Path) -> None:
    mask = np.zeros((48, 64), bool)
    mask[8:30, 10:40] = True
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "sa_0.tar", "w") as archive:
        for name in ("sa_1", "sa_2", "sa_3"):
            Image.fromarray(mask).convert("RGB").save(tmp_path / f"{name}.jpg")
            content = {"annotations": [{"segmentation": encode_rle(mask)}]}
            (tmp_path / f"{name}.json").write_text("{" if name == "sa_2" else json.dumps(content))
            for kind in ("jpg", "json"):
                archive.add(tmp_path / f"{name}.{kind}", arcname=f"{name}.{kind}")
    flags = ["--no-train-scenes", "--train-sa1b", str(tmp_path / "tars"), "--output-dir", str(tmp_path / "run")]
    assert main([*TRAIN, *flags, "--max-steps", "2"]) == 0
    assert "sa_2.json is not a JSON file" in events(tmp_path / "run", "skipped")[0]["reason"]


def test_own_pictures_without_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What `coco_custom` has measured, but for the flags; the steps are told before, and no step is spent on that."""
    mask = np.zeros((48, 64), bool)
    mask[8:30, 10:40] = True
    Image.fromarray(mask).convert("RGB").save(tmp_path / "0.png")
    content = {
        "images": [{"id": 0, "file_name": "0.png", "height": 48, "width": 64}],
        "annotations": [{"image_id": 0, "segmentation": encode_rle(mask)}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    own = ["finetune", "--train-annotations", str(tmp_path / "train.json"), "--train-images", str(tmp_path)]
    small = ["--model", "ti", "--model-overrides", read_recipe("smoke", "finetune")["model_overrides"], "--cpu"]
    small += ["--mixed-precision", "no"]  # as all runs of this process
    assert (
        main([*own, *small, "--image-sizes", "64x2", "--max-minutes", "0.03", "--output-dir", str(tmp_path / "a")])
        == 0
    )
    output = capsys.readouterr()
    told = re.search(r"0.03 minutes give about (\d+) steps of (\d+) images in all \(\d+ at 64 pixels\)", output.out)
    assert int(told[2]) == 2 * int(told[1]) > 0
    assert "warning: warmup_steps 20 is much of about" in output.err
    arguments = json.loads((tmp_path / "a" / "args.json").read_text())["arguments"]
    recipe = read_recipe("coco_custom", "finetune")
    assert all(arguments[name] == recipe[name] for name in ("optimizer", "ema_decay", "box_prompts", "warmup_steps"))
    first = [event for event in events(tmp_path / "a", "start") if event["step"] == 0]
    assert first and first[0]["elapsed"] < 0.5
    # With a number of steps nothing has to be told, and the recipe's minutes do not end the run.
    assert main([*own, *small, "--batch-size", "1", "--image-sizes", "64", "--max-steps", "1",
                 "--output-dir", str(tmp_path / "b")]) == 0  # fmt: skip
    assert "give about" not in capsys.readouterr().out
    arguments = json.loads((tmp_path / "b" / "args.json").read_text())["arguments"]
    assert (arguments["max_minutes"], arguments["max_steps"], arguments["batch_size"]) == (None, 1, 1)


def test_a_model_of_another_architecture_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    SamConfig().save_pretrained(tmp_path / "sam")
    flags = ["--model", str(tmp_path / "sam"), "--model-overrides", "{}", "--max-steps", "1"]
    assert main([*TRAIN, *flags, "--output-dir", str(tmp_path / "run")]) == 2
    assert "sam is of model_type 'sam', neither an EfficientSAM nor a SAMI" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_on_from_a_pretrained_encoder(tmp_path: Path) -> None:
    vision = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sami = SamiForPreTraining(SamiConfig(vision_config=vision, decoder_depth=1, decoder_width=16, decoder_heads=2))
    sami.save_pretrained(tmp_path / "sami")
    parts = "{prompt_encoder_config: {hidden_size: 32}, vision_config: {output_channels: 32}, mask_decoder_config: "
    parts += "{hidden_size: 32, mlp_dim: 64, num_attention_heads: 2, iou_head_hidden_dim: 32}}"
    flags = ["--model", str(tmp_path / "sami"), "--model-overrides", parts, "--learning-rate", "1e-9"]
    assert main([*TRAIN, *flags, "--max-steps", "1", "--output-dir", str(tmp_path / "run")]) == 0
    model = EfficientSamModel.from_pretrained(tmp_path / "run" / "model")
    assert model.config.vision_config.image_size == 64
    for name, weight in sami.vision_encoder.state_dict().items():
        torch.testing.assert_close(model.vision_encoder.state_dict()[name], weight, atol=1e-6, rtol=1e-5)


def test_a_model_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", "./nowhere", "--train-scenes", "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    assert main(["finetune", *flags]) == 2
    assert "model ./nowhere: no such folder" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_recipes_switch_on_what_a_released_checkpoint_lacks(tmp_path: Path) -> None:
    """Background clicks, mask prompts, filled boxes and more than six prompt tokens are trained from there on."""
    tiny_model(**RELEASED).save_pretrained(tmp_path / "released")
    EfficientSamImageProcessor(size=64).save_pretrained(tmp_path / "released")
    data = write_coco(tmp_path / "data", 2)
    expected = {  # background points, mask prompts, filled boxes, limit of tokens
        "nuclei": (True, True, True, None),
        "coco_custom": (True, True, False, None),
        "few_shot": (False, True, True, 6),
    }
    for recipe, switches in expected.items():
        run = tmp_path / recipe
        flags = [
            "--model",
            str(tmp_path / "released"),
            "--max-minutes",
            "10",
            "--max-steps",
            "2",
            "--warmup-steps",
            "0",
        ]
        flags += ["--image-sizes", "64x2", "--mixed-precision", "no"]
        assert main(["finetune", "--recipe", recipe, *flags, *data, "--output-dir", str(run)]) == 0
        model = EfficientSamModel.from_pretrained(run / "model")
        config = model.config.prompt_encoder_config
        names = ("background_points", "mask_prompts", "dense_boxes", "padded_prompt_tokens")
        assert tuple(getattr(config, name) for name in names) == switches
        if config.background_points:
            assert model.prompt_encoder.background_embed.weight.abs().sum() > 0
        assert model.prompt_encoder.mask_embed.conv3.weight.abs().sum() > 0
        generation = EfficientSamImageProcessor.from_pretrained(run / "model").mask_generation
        assert ("crops_nms_thresh" in generation) == (recipe == "nuclei")


def test_an_input_that_is_new_and_frozen_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = write_coco(tmp_path / "data", 1)
    tiny_model(**RELEASED).save_pretrained(tmp_path / "released")
    run = tmp_path / "run"
    base = ["finetune", "--recipe", "few_shot", "--model", str(tmp_path / "released"), "--freeze", "prompt_encoder"]
    assert main([*base, *flags, "--output-dir", str(run)]) == 2
    error = capsys.readouterr().err
    assert re.search("freeze: .*released was trained without mask_prompts, which model_overrides switches on", error)
    assert not run.exists()


def test_one_kind_of_training_data_is_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = write_coco(tmp_path / "data", 1)
    base = ["finetune", "--model", "ti", "--max-steps", "1", "--output-dir", str(tmp_path / "run")]
    for wrong, words in (
        ([], "got none"),
        ([*flags[1:], "--train-scenes"], "got train_scenes and train_annotations"),
        (flags[:3], "train_annotations and train_images go together"),
        (["--train-sa1b", str(tmp_path / "missing")], "train_sa1b: .*missing does not exist"),
        (["--train-scenes", "--horizontal-flip", "0.5"], "for annotated pictures"),
        (["--train-scenes", "--crops"], "for annotated pictures"),
        (["--train-scenes", "--stream"], "train_dataset, which is not given"),
        (["--train-scenes", "--train-config", "a"], "train_config must be given with train_dataset only, got 'a'"),
        (["--train-scenes", "--model-overrides", "{a: b"], "model_overrides must be a YAML mapping, got '{a: b'"),
        (["--train-scenes", "--model-overrides", "{visoin_config: {}}"], "EfficientSamConfig has no visoin_config"),
        (
            ["--train-scenes", "--model-overrides", "{vision_config: {hidden_sise: 48}}"],
            "model_overrides: EfficientSamVisionConfig has no hidden_sise",
        ),
        (
            ["--train-scenes", "--model-overrides", "{prompt_encoder_config: {dense_boxes: maybe}}"],
            "model_overrides: .*'dense_boxes' expected bool, got str .value: 'maybe'",
        ),
        (["--train-scenes", "--model-overrides", "{vision_config: 3}"], "of EfficientSamVisionConfig too, got"),
        (["--train-scenes", "--mask-generation", "[0.3]"], "mask_generation must be a YAML mapping, got '.0.3.'"),
        (["--train-scenes", "--mask-generation", "{nms: 0.3}"], "mask_generation: unknown option 'nms'"),
        (
            ["--train-scenes", "--mask-generation", "{crops_nms_thresh: 3}"],
            "mask_generation: crops_nms_thresh must be a number from 0 to 1, got 3",
        ),
        (["--train-scenes", "--train-limit", "3"], "train_limit is for pictures that are stored"),
        (
            ["--train-scenes", "--evaluate-scenes", "1", "--best-metric", "scenes/boxx"],
            "one of miou, .*scenes/box, ",
        ),
    ):
        assert main([*base, *wrong]) == 2
        assert re.search(words, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [1, 2])
@pytest.mark.parametrize("dense_boxes", [True, False])
def test_two_processes_train_one_model(tmp_path: Path, rounds: int, dense_boxes: bool) -> None:
    """Each process draws prompts of its own, such as no box, and torch waits for a gradient of every weight."""
    run = tmp_path / "run"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    launch += ["-m", "efficientsam_hf.cli"]
    flags = ["--max-steps", "4", "--prompt-rounds", str(rounds), "--output-dir", str(run)]
    changed = yaml.safe_load(read_recipe("smoke", "finetune")["model_overrides"])
    changed["prompt_encoder_config"]["dense_boxes"] = dense_boxes
    flags += ["--model-overrides", json.dumps(changed)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for resume in ([], ["--resume"]):
        done = subprocess.run([*launch, *TRAIN, *flags, *resume], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
    assert events(run, "end")[0]["images"] == 4 * 4 * 2
    assert len(list((run / "checkpoints" / "step_4").glob("random_states_*.pkl"))) == 2
