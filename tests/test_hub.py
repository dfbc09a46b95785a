# SPDX-License-Identifier: Apache-2.0
"""Exporting a run: weights stored in half precision that load in float32, no code, and a card the Hub accepts."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForMaskGeneration, AutoProcessor

from efficientsam_hf import (
    EfficientSamBackbone,
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamVisionModel,
)
from efficientsam_hf.cli import main
from efficientsam_hf.files import write_folder, write_json
from efficientsam_hf.hub.model_folder import export_run
from efficientsam_hf.hub.run_record import read_run, shorten_command, shorten_paths
from efficientsam_hf.models.rle_efficientsam import encode_rle
from efficientsam_hf.training.finetune_arguments import FinetuneArguments
from efficientsam_hf.training.run_folder import RunLog, open_run
from efficientsam_hf.training.segmentation import InteractiveSegmentation


GAUSSIAN = "prompt_encoder.positional_encoding.gaussian_matrix"


def tiny_model() -> EfficientSamModel:
    config = EfficientSamConfig(
        vision_config={
            "image_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
            "output_channels": 32,
        },
        prompt_encoder_config={"hidden_size": 32},
        mask_decoder_config={
            "hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32,
        },
    )  # fmt: skip
    return EfficientSamModel(config)


def write_run(folder: Path, model: EfficientSamModel, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a run of twelve steps leaves, by the writers of the trainer; it was killed and resumed at step 8."""
    command = ["/home/someone/clone/src/efficientsam_hf/cli/__main__.py", "finetune", "--recipe", "smoke"]
    monkeypatch.setattr(sys, "argv", [*command, "--output-dir", "/home/someone/runs/tiny"])
    open_run(FinetuneArguments(output_dir=str(folder), max_steps=12, train_scenes=True, model="ti", evaluate_scenes=4))
    processor = EfficientSamProcessor(EfficientSamImageProcessor(size={"height": 64, "width": 64}))
    write_folder(folder / "model", InteractiveSegmentation(model, processor).save_pretrained)
    log = RunLog(folder / "log.jsonl")
    for step in (2, 4, 6, 8, 10):
        log("train", step=step, images=16 * step, images_per_s=8.0, image_size=64, loss=5.0 - step / 4, miou=step / 20)
    log("resume", step=8, elapsed=40.0)
    for step in (10, 12):
        log("train", step=step, images=16 * step, images_per_s=9.0, image_size=64, loss=1.5, miou=0.6)
    log("evaluation", step=12, seconds=3.0, miou=0.5, **{"scenes/box": 0.55})
    write_json(folder / "run.json", {"steps": 12, "images": 192, "minutes": 1.5, "interrupted": None})
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_run(tmp_path / "runs" / "tiny", tiny_model(), monkeypatch)


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def listing(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# Weights


def test_half_file_loads_as_float32_close_to_the_run(run: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "out")
    stored = load_file(exported / "model.safetensors")
    assert {name for name, tensor in stored.items() if tensor.dtype != torch.float16} == {GAUSSIAN}
    assert stored[GAUSSIAN].dtype == torch.float32
    original = EfficientSamModel.from_pretrained(run / "model").state_dict()
    loaded = EfficientSamModel.from_pretrained(exported)
    assert loaded.dtype == torch.float32 and loaded.training is False
    state = loaded.state_dict()
    assert state.keys() == original.keys()
    for name, tensor in state.items():
        assert tensor.dtype == torch.float32, name
        torch.testing.assert_close(tensor, original[name], rtol=2**-11, atol=2**-25, msg=name)
    assert torch.equal(state[GAUSSIAN], original[GAUSSIAN])


def test_the_best_model_with_what_was_known_of_it(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="has no best_model/config.json"):
        export_run(run, tmp_path / "best", best=True)
    write_folder(run / "best_model", InteractiveSegmentation(tiny_model(), None).save_pretrained)
    EfficientSamProcessor(EfficientSamImageProcessor(size=64)).save_pretrained(run / "best_model")
    best = {"step": 8, "metric": "miou", "value": 0.7}
    for step in (8, 12):
        state = {"step": step, "images": 16 * step, "elapsed": 5.0 * step, "best": best}
        (run / "checkpoints" / f"step_{step}").mkdir()
        write_json(run / "checkpoints" / f"step_{step}" / "trainer_state.json", state)
    one, other = export_run(run, tmp_path / "last"), export_run(run, tmp_path / "best", best=True)
    states = [EfficientSamModel.from_pretrained(folder).state_dict() for folder in (other, run / "best_model")]
    for name, tensor in states[0].items():
        torch.testing.assert_close(tensor, states[1][name], rtol=2**-11, atol=2**-25)
    assert not torch.equal(states[0][GAUSSIAN], EfficientSamModel.from_pretrained(one).state_dict()[GAUSSIAN])
    assert [read_json(folder / "metrics.json")["training"]["steps"] for folder in (one, other)] == [12, 8]


def test_every_way_to_load_gives_float32(run: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "out")
    for auto in (AutoModel, AutoModelForMaskGeneration, EfficientSamVisionModel, EfficientSamBackbone):
        model, report = auto.from_pretrained(exported, output_loading_info=True)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}, auto
        assert not report["missing_keys"] and not report["unexpected_keys"], auto
    assert isinstance(AutoProcessor.from_pretrained(exported), EfficientSamProcessor)
    assert isinstance(AutoConfig.from_pretrained(exported), EfficientSamConfig)


def test_bfloat16_keeps_the_gaussian_matrix(run: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(export_run(run, tmp_path / "out"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.prompt_encoder.positional_encoding.gaussian_matrix.dtype == torch.float32
    outputs = model(pixel_values=torch.zeros(1, 3, 64, 64), input_points=torch.full((1, 1, 1, 2), 20.0))
    assert outputs.pred_masks.isfinite().all()


def test_full_precision_is_exact(run: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "out", half=False)
    original = EfficientSamModel.from_pretrained(run / "model").state_dict()
    stored = load_file(exported / "model.safetensors")
    assert all(torch.equal(stored[name], tensor) for name, tensor in original.items())


def test_weight_beyond_float16_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    with torch.no_grad():
        model.neck.conv1.weight[0] = 1e5
    run = write_run(tmp_path / "run", model, monkeypatch)
    with pytest.raises(ValueError, match=r"neck\.conv1\.weight does not fit float16 \(largest 1e\+05\)"):
        export_run(run, tmp_path / "out")
    assert listing(tmp_path) == {"run"}


# Files


def test_folder_without_code(run: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "out")
    assert listing(exported) == {
        "README.md", "config.json", "metrics.json", "model.safetensors", "processor_config.json"
    }  # fmt: skip
    assert '"auto_map"' in (run / "model" / "config.json").read_text(), "the run's own folder has code to remove"
    for path in exported.glob("*.json"):
        assert "auto_map" not in path.read_text(), path
    assert read_json(exported / "config.json")["dtype"] == "float32"
    assert len({path.stat().st_mode for path in exported.iterdir()}) == 1, "some file has other permissions"
    assert listing(tmp_path) == {"out", "runs"}, "nothing is left beside the export"


def test_folder_with_code(run: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "out", with_code=True)
    modules = {path.name for path in exported.glob("*.py")}
    for name, target in read_json(exported / "config.json")["auto_map"].items():
        assert f"{target.split('.')[0]}.py" in modules, name
    assert "trust_remote_code=True" in (exported / "README.md").read_text()
    assert EfficientSamModel.from_pretrained(exported).dtype == torch.float32


def test_destination_is_replaced_only_if_it_is_an_export(run: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "out", with_code=True)
    with pytest.raises(FileExistsError, match="overwrite"):
        export_run(run, exported)
    export_run(run, exported, overwrite=True)
    assert not list(exported.glob("*.py"))
    (exported / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"holds notes\.txt"):
        export_run(run, exported, overwrite=True)
    assert (exported / "notes.txt").read_text() == "mine"
    with pytest.raises(FileExistsError, match="no earlier export: it has no metrics"):
        other = tmp_path / "saved"
        tiny_model().save_pretrained(other)
        export_run(run, other, overwrite=True)
    (tmp_path / "empty").mkdir()
    assert (export_run(run, tmp_path / "empty") / "model.safetensors").is_file()


def test_failed_write_keeps_the_earlier_export(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export_run(run, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in exported.iterdir()}

    def fail(self: Any, folder: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(EfficientSamProcessor, "save_pretrained", fail)
    with pytest.raises(OSError, match="disk full"):
        export_run(run, exported, overwrite=True)
    assert {path.name: path.read_bytes() for path in exported.iterdir()} == before
    assert listing(tmp_path) == {"out", "runs"}


def test_bad_input_is_named(run: Path, metrics: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere.* is not a folder"):
        export_run(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"has no args\.json"):
        export_run(run / "model", tmp_path / "out")
    with pytest.raises(FileNotFoundError, match=r"absent\.json' is not a file"):
        export_run(run, tmp_path / "out", metrics=[metrics, tmp_path / "absent.json"])
    with pytest.raises(ValueError, match="lacks metrics, command, date, machine, dtype"):
        export_run(run, tmp_path / "out", metrics=run / "run.json")
    (run / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="neither a checkpoint nor"):
        export_run(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# What the run says


def test_progress_is_that_of_the_saved_weights(run: Path) -> None:
    """A run that goes on has logged steps that model/ has not seen yet."""
    (run / "run.json").unlink()
    (run / "checkpoints" / "step_10").mkdir()
    write_json(run / "checkpoints" / "step_10" / "trainer_state.json", {"step": 10, "images": 160, "elapsed": 60.0})
    with (run / "log.jsonl").open("a") as log:
        log.write('{"event": "train", "st')  # cut off as the process was killed
    record = read_run(run)
    assert record.progress == {"steps": 10, "images": 160, "minutes": 1.0}
    assert [line["step"] for line in record.curve] == [2, 4, 6, 8, 10]
    assert record.curve[-1]["loss"] == 1.5, "the resumed run's step 10, not the killed one's"
    assert record.evaluation is None


def test_metrics_hold_training_and_evaluations(run: Path, metrics: Path, tmp_path: Path) -> None:
    content = read_json(export_run(run, tmp_path / "out", metrics=metrics) / "metrics.json")
    (evaluation,) = content["evaluations"]
    assert evaluation["metrics"] == read_json(metrics)["metrics"]
    assert evaluation["dataset"] == "photos/instances_val"
    assert evaluation["date"] == "2026-05-04T03:02:01+00:00" and evaluation["machine"]["cpu"] == "Some CPU"
    training = content["training"]
    assert (training["steps"], training["images"], training["minutes"]) == (12, 192, 1.5)
    assert training["images_per_s"] == pytest.approx(192 / 90)
    assert training["end_of_curve"]["loss"] == 1.5
    assert training["command"] == "efficientsam finetune --recipe smoke --output-dir runs/tiny"


def test_nothing_tells_where_a_machine_keeps_its_files(run: Path, metrics: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "out", metrics=[metrics])
    for name in ("README.md", "metrics.json", "config.json", "processor_config.json"):
        text = (exported / name).read_text()
        assert "/home/" not in text and str(tmp_path) not in text and "/data/" not in text, name


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("/a/venv/bin/efficientsam finetune --resume", "efficientsam finetune --resume"),
        ("python run.py --images=/a/b/c/val -n 3", "python run.py --images=c/val -n 3"),
        ("efficientsam x '/a/my pictures/val'", "efficientsam x 'my pictures/val'"),
        ("efficientsam x https://host/a/b/c.json ../d/e/f", "efficientsam x https://host/a/b/c.json e/f"),
        ("efficientsam x --images /home/someone/val", "efficientsam x --images val"),
        ("efficientsam x https://me:secret@host/a file:///srv/a/b/c", "efficientsam x https://host/a b/c"),
        ("efficientsam x --o '{teacher: /home/me/a/b}'", "efficientsam x --o '{teacher: a/b}'"),
    ],
)
def test_commands_are_shortened(command: str, expected: str) -> None:
    assert shorten_command(command) == expected


def test_only_absolute_paths_are_shortened() -> None:
    values = {"a": ["/x/y/z", "runs/a/b"], "sizes": "0:192x24,0.45:256x16", "n": 3, "root": "/x"}
    assert shorten_paths(values) == {"a": ["y/z", "runs/a/b"], "sizes": "0:192x24,0.45:256x16", "n": 3, "root": "x"}


# The card


def test_card_has_metadata_for_the_hub(run: Path, metrics: Path, tmp_path: Path) -> None:
    card = ModelCard((export_run(run, tmp_path / "my-model", metrics=metrics) / "README.md").read_text())
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "mask-generation", "apache-2.0")
    assert data.model_name == "my-model" and data.base_model is None
    assert [(r.metric_type, r.metric_value, r.dataset_type) for r in data.eval_results] == [
        ("mean_iou", 0.4213, "photos/instances_val"),
        ("mean_iou", 0.6679, "photos/instances_val"),
    ]
    assert len({r.metric_name for r in data.eval_results}) == 2
    assert all(isinstance(tag, str) for tag in data.tags)


def test_card_is_filled_from_the_run(run: Path, metrics: Path, tmp_path: Path) -> None:
    text = (export_run(run, tmp_path / "out", metrics=metrics) / "README.md").read_text()
    assert not re.search(r"\$\w|None\b(?! left)", text), "a placeholder is left, or has no value"
    for expected in ("| recipe | smoke |", "| images seen | 192 |", "1.5 minutes", "64 x 64 pixels", "0.421", "0.668",
                     "Some CPU", "2026-05-04", "| learning_rate | `0.0004` |", "| 12 | 64 | 1.5 |"):  # fmt: skip
        assert expected in text, expected
    assert "during the run" not in text.split("## Training")[0]


def test_card_without_evaluation_says_so(run: Path, tmp_path: Path) -> None:
    card = ModelCard((export_run(run, tmp_path / "out") / "README.md").read_text())
    assert card.data.eval_results is None
    assert (
        "Measured during the run only, at step 12 (scenes: 4 generated ones)" in card.text
        and "| scenes/box | 0.550 |" in card.text
    )


def test_base_model_is_a_hub_id_only(run: Path, tmp_path: Path) -> None:
    record = read_json(run / "args.json")
    for model, expected in (("someone/some-model", "someone/some-model"), (str(run / "model"), None), ("s", None)):
        record["arguments"]["model"] = model
        write_json(run / "args.json", record)
        card = ModelCard((export_run(run, tmp_path / "out", overwrite=True) / "README.md").read_text())
        assert card.data.base_model == expected


MIXTURE = """\
- {name: street, weight: 2.5, annotations: /home/someone/secret place/s.json, images: /home/someone/secret place/s,
   license: CC BY 4.0, credit: "Street data,\n\n A. Person", url: "https://me:secret@street.example/data"}
- {name: things, weight: 6, cutouts: [{folder: /secret/place/a|b/cups, weight: 2}], backgrounds: [{folder: /secret}]}
- {name: hub, dataset: someone/data}
- {name: scenes, weight: 0.5, scenes: true}
"""


def test_card_of_a_mixture_names_its_sources_and_not_their_places(run: Path, tmp_path: Path) -> None:
    record = read_json(run / "args.json")
    record["arguments"] |= {"train_scenes": False, "train_mix": MIXTURE}
    record["command"] = shlex.join(["efficientsam", "finetune", "--train-mix", MIXTURE, "--seed", "1"])
    write_json(run / "args.json", record)
    exported = export_run(run, tmp_path / "out")
    card = ModelCard((exported / "README.md").read_text())
    assert card.data.datasets == ["someone/data"] and "synthetic" not in card.data.tags
    for line in (
        "# EfficientSAM, trained on a mixture",
        "| street | COCO annotations | 25 % |",
        "| things | cut-outs pasted on pictures | 60 % |",
        "| hub | data set `someone/data` | 10 % |",
        "| scenes | generated scenes | 5 % |",
        "- street: Street data, A. Person, https://street.example/data, CC BY 4.0",
        "- It knows what its training data show, and little beyond.",
    ):
        assert line in card.text.splitlines(), line
    (argument,) = [line for line in card.text.splitlines() if line.startswith("| train_mix |")]
    assert r"folder: a\|b/cups, weight: 2" in argument and argument.endswith("scenes: true}]` |")
    assert "images: secret place/s" in card.text.partition("<details>")[0]  # in the command
    for name in ("README.md", "metrics.json"):
        text = (exported / name).read_text()
        assert "/secret" not in text and "me:secret" not in text and "someone/secret" not in text, name


def test_card_of_a_mixture_of_scenes_alone_is_that_of_scenes(run: Path, tmp_path: Path) -> None:
    scenes = export_run(run, tmp_path / "scenes")
    record = read_json(run / "args.json")
    record["arguments"] |= {"train_scenes": False, "train_mix": "- {name: a, scenes: true}\n"}
    write_json(run / "args.json", record)
    one, two = (ModelCard((path / "README.md").read_text()) for path in (scenes, export_run(run, tmp_path / "mixed")))
    assert one.data.tags == two.data.tags and "synthetic" in two.data.tags
    texts = [[line for line in card.text.splitlines() if "scenes" in line and "`" not in line] for card in (one, two)]
    assert set(texts[0]) <= set(texts[1]) and "| a | generated scenes | 100 % |" in texts[1]


def code_blocks(card: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", card.read_text(), flags=re.DOTALL)


def test_code_of_the_card_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = export_run(run, tmp_path / "out")
    monkeypatch.chdir(exported)
    Image.new("RGB", (300, 200)).save("photo.jpg")
    (block,) = code_blocks(exported / "README.md")
    names: dict[str, Any] = {}
    exec(block, names)
    assert tuple(names["masks"][0].shape) == (1, 3, 200, 300)


@pytest.mark.slow
def test_code_of_the_card_runs_without_the_package(run: Path, tmp_path: Path) -> None:
    exported = export_run(run, tmp_path / "out", with_code=True)
    Image.new("RGB", (300, 200)).save(exported / "photo.jpg")
    blocks = code_blocks(exported / "README.md")
    assert len(blocks) == 3
    absent = "import sys; sys.modules['efficientsam_hf'] = None\n"  # an import of it fails
    end = "\nprint(type(model).__name__, sorted(result))"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home")}
    process = subprocess.run(
        [sys.executable, "-c", absent + "\n".join(blocks[1:]) + end],
        cwd=exported, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout.splitlines()[-1] == (
        "EfficientSamModel ['areas', 'boxes', 'masks', 'points', 'scores', 'stability_scores']"
    )


# The command


def test_command(run: Path, metrics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(run), str(tmp_path / "out")]
    assert main([*command, "--metrics", str(metrics), "--with-code"]) == 0
    assert re.search(r"wrote .*out: \d\.\d MB of weights", capsys.readouterr().out)
    assert (tmp_path / "out" / "modeling_efficientsam.py").is_file()
    assert main(command) == 2
    assert "overwrite" in capsys.readouterr().err
    assert main([*command, "--overwrite", "--full-precision"]) == 0
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


def test_evaluation_of_an_export_goes_into_its_card(run: Path, tmp_path: Path) -> None:
    """One loop through the commands: export, evaluate what was exported, export again with the numbers."""
    photos = tmp_path / "photos"
    photos.mkdir()
    Image.new("RGB", (60, 40), "gray").save(photos / "one.png")
    mask = np.zeros((40, 60), bool)
    mask[10:30, 10:40] = True
    coco = {
        "images": [{"id": 1, "file_name": "one.png", "width": 60, "height": 40}],
        "annotations": [{"id": 1, "image_id": 1, "segmentation": encode_rle(mask)}],
    }
    (photos / "instances.json").write_text(json.dumps(coco))
    model, numbers = str(tmp_path / "out"), str(tmp_path / "metrics.json")
    assert main(["export", str(run), model]) == 0
    options = ["--annotations", str(photos / "instances.json"), "--images", str(photos), "--device", "cpu"]
    assert main(["evaluate", model, *options, "--clicks", "1", "3", "--output", numbers]) == 0
    assert main(["export", str(run), model, "--metrics", numbers, "--overwrite"]) == 0
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    measured = read_json(Path(numbers))["metrics"]
    prompts = ("center", "center:3", "uniform", "uniform:3", "box")
    expected = [round(measured[prompt]["miou"], 4) for prompt in prompts]
    assert [result.metric_value for result in card.data.eval_results] == expected
    assert {result.dataset_name for result in card.data.eval_results} == {"photos/instances"}
    assert "| 3 clicks, the first in the centre |" in card.text and "| 3 clicks, all anywhere |" in card.text
    assert "efficientsam evaluate " in card.text and str(tmp_path) not in card.text
