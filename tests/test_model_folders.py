# SPDX-License-Identifier: Apache-2.0
"""Model folders as strangers may have made them: every command says in one line what is wrong, and runs none of it."""

import io
import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from property_testing import within_bounds
from safetensors.torch import load_file, save_file
from test_hub import tiny_model, write_run
from transformers import (
    AutoModelForMaskGeneration,
    SamConfig,
    SamModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from efficientsam_hf import (
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    SamiConfig,
    SamiForPreTraining,
)
from efficientsam_hf.averaging import average_weights
from efficientsam_hf.cli import main
from efficientsam_hf.data.teacher import load_teacher
from efficientsam_hf.pretrained import load_pretrained
from efficientsam_hf.training.prompt_inputs import load_with_inputs


WEIGHTS = "model.safetensors"
GAUSSIAN = "prompt_encoder.positional_encoding.gaussian_matrix"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing wrong."""
    folder = tmp_path_factory.mktemp("whole")
    tiny_model().save_pretrained(folder)
    EfficientSamProcessor(EfficientSamImageProcessor(size=64)).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of it to damage."""
    return shutil.copytree(whole, tmp_path / "folder")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    Image.effect_mandelbrot((60, 40), (-2, -1, 1, 1), 30).convert("RGB").save(tmp_path / "picture.png")
    return str(tmp_path / "picture.png")


def refused(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run the command, expect exit code 2, nothing on stdout and one line on stderr, and return it."""
    capsys.readouterr()
    with within_bounds(seconds=600):  # of memory
        assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1, captured
    assert captured.err.startswith("efficientsam: error: ") and len(captured.err) < 1100
    return captured.err


def segmenting(picture: str, folder: Path) -> list[str]:
    return ["segment", picture, "--point", "5,5", "--device", "cpu", "--model", str(folder), "-o", f"{folder}-out"]


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def change_json(path: Path, place: str, value: Any) -> None:
    """Set a field by its dotted path."""
    content = json.loads(path.read_text())
    *parents, last = place.split(".")
    inner = content
    for name in parents:
        inner = inner[name]
    inner[last] = value
    path.write_text(json.dumps(content))


def unrelated(state: dict[str, torch.Tensor]) -> None:
    state.clear()
    state["unrelated"] = torch.zeros(3)


def one_missing(state: dict[str, torch.Tensor]) -> None:
    del state["mask_decoder.iou_token.weight"]


def one_too_many(state: dict[str, torch.Tensor]) -> None:
    state["mask_decoder.extra.weight"] = torch.zeros(1)


def misshapen(state: dict[str, torch.Tensor]) -> None:
    state["mask_decoder.iou_token.weight"] = torch.zeros(1, 31)


def with_value(value: float, name: str = "neck.conv1.weight") -> Callable[[dict[str, torch.Tensor]], None]:
    def change(state: dict[str, torch.Tensor]) -> None:
        state[name].view(-1)[3] = value

    return change


DAMAGES = {
    "unrelated": (unrelated, r"169 missing \(mask_decoder\..*, \.\.\.\), 1 without a place \(unrelated\)"),
    "missing": (one_missing, r"1 missing \(mask_decoder\.iou_token\.weight\)"),
    "unexpected": (one_too_many, r"1 without a place \(mask_decoder\.extra\.weight\)"),
    "misshapen": (misshapen, r"1 of another shape \(mask_decoder\.iou_token\.weight \(1, 31\) for \(1, 32\)\)"),
    "NaN": (with_value(float("nan")), r"1 of its weights hold NaN or infinity as torch.float32 \(neck\.conv1\.weight"),
    "infinite": (with_value(float("-inf")), r"1 of its weights hold NaN or infinity"),
    "NaN in a buffer": (with_value(float("nan"), GAUSSIAN), rf"NaN or infinity as torch.float32 \({GAUSSIAN}\)"),
}


@pytest.mark.parametrize(("change", "message"), DAMAGES.values(), ids=DAMAGES.keys())
def test_weights_are_those_of_the_config(folder: Path, picture: str, capsys, change, message: str) -> None:
    change_weights(folder, change)
    line = refused(segmenting(picture, folder), capsys)
    assert f"cannot load a promptable model from {folder}: " in line and re.search(message, line), line
    assert not list(Path(f"{folder}-out").iterdir())


def test_every_command_looks_at_the_weights(folder: Path, picture: str, tmp_path: Path, monkeypatch, capsys) -> None:
    run = write_run(tmp_path / "run", tiny_model(), monkeypatch)
    assert main(["export", str(run), str(tmp_path / "exported")]) == 0
    for place in (folder, run / "model", tmp_path / "exported"):
        change_weights(place, with_value(float("nan")))
    damaged = str(folder)
    for arguments in (
        ["segment", picture, "--everything", "--model", damaged, "-o", str(tmp_path / "out")],
        ["evaluate", damaged, "--scenes", "1", "--device", "cpu"],
        ["benchmark", picture, "--model", damaged, "--device", "cpu"],
        ["demo", damaged],
        ["finetune", "--model", damaged, "--train-scenes", "--max-steps", "1", "--output-dir", str(tmp_path / "new")],
        ["export", str(run), str(tmp_path / "other")],
        ["push", str(run), "me/model", "--dry-run"],
        ["push", str(tmp_path / "exported"), "me/model", "--dry-run"],
        ["features", "--teacher", damaged, "--images", str(tmp_path), "--output", str(tmp_path / "cache")],
    ):
        assert "of its weights hold NaN or infinity" in refused(arguments, capsys), arguments
    with pytest.raises(ValueError, match="NaN or infinity"):
        average_weights(tiny_model(), [folder])
    assert not (tmp_path / "other").exists() and not (run / "hub").exists()


CONFIGS = [  # field, value, words of the error
    ("vision_config.hidden_size", 10**12, "hidden_size"),
    ("vision_config.hidden_size", 3200, "its config describes"),
    ("vision_config.hidden_size", -32, "hidden_size"),
    ("vision_config.num_hidden_layers", 10**9, "num_hidden_layers is 1000000000, expected at most 1000"),
    ("vision_config.num_hidden_layers", -1, "cannot load"),
    ("vision_config.image_size", 16 * 10**9, "image_size is 16000000000, expected at most 8192"),
    ("vision_config.hidden_act", "shell", "cannot load"),
    ("vision_config.mlp_ratio", 1e9, "mlp_ratio"),
    ("vision_config.mlp_ratio", 1e300, "cannot load"),
    ("vision_config.layer_norm_eps", "small", "layer_norm_eps"),
    ("vision_config.attn_implementation", "someone/kernel", "it needs code of its authors, which was not run"),
    ("mask_decoder_config.num_multimask_outputs", 10**8, "num_multimask_outputs is 100000000"),
    ("mask_decoder_config.iou_head_depth", 10**8, "iou_head_depth is 100000000"),
    ("mask_decoder_config.mlp_dim", -5, "cannot load"),
    ("prompt_encoder_config.padded_prompt_tokens", 10**9, "padded_prompt_tokens is 1000000000"),
    ("vision_config", 5, "vision_config"),
    ("vision_config.num_labels", 10**9, "num_labels is 1000000000, expected at most 100000"),
    ("vision_config.output_hidden_states", 0.5, "output_hidden_states is 0.5, expected true or false"),
    ("model_type", 5, "cannot load"),
    ("model_type", "bert", "cannot load"),
    ("dtype", "float33", "cannot load"),
]


@pytest.mark.parametrize(("field", "value", "words"), CONFIGS, ids=[f"{case[0]}={case[1]}" for case in CONFIGS])
def test_absurd_configs(folder: Path, picture: str, capsys, field: str, value: Any, words: str) -> None:
    change_json(folder / "config.json", field, value)
    assert words in refused(segmenting(picture, folder), capsys)


PROCESSORS = [
    ("image_std", [0, 0, 0], "image_std"),
    ("image_std", [0.2, -0.1, 0.2], "image_std"),
    ("image_std", "wide", "image_std"),
    ("image_mean", [float("nan")] * 3, "image_mean"),
    ("image_mean", [0.5, 0.5], "image_mean"),
    ("image_mean", [float("inf"), 0, 0], "image_mean"),
    ("do_resize", "no", "do_resize"),
    ("do_normalize", 0, "do_normalize"),
    ("size", {"height": 10**9, "width": 10**9}, "size"),
    ("size", 0, "size"),
    (
        "size",
        {"height": 64, "width": 34},
        "size of its processor is {'height': 64, 'width': 34}, expected multiples of 16",
    ),
    ("size", {"height": 64.5, "width": 64.5}, "size"),
    ("mask_generation", {"grid": 5}, "grid"),
    ("mask_cleaning", 5, "cannot load"),
]


@pytest.mark.parametrize(("field", "value", "words"), PROCESSORS, ids=[f"{case[0]}={case[1]}" for case in PROCESSORS])
def test_absurd_processors(folder: Path, picture: str, capsys, field: str, value: Any, words: str) -> None:
    change_json(folder / "processor_config.json", f"image_processor.{field}", value)
    assert words in refused(segmenting(picture, folder), capsys)


def test_an_image_processor_alone_takes_no_prompts(folder: Path, picture: str, capsys) -> None:
    content = json.loads((folder / "processor_config.json").read_text())
    del content["auto_map"]
    (folder / "processor_config.json").write_text(json.dumps({**content, "processor_class": "Unknown"}))
    assert "its processor is EfficientSamImageProcessor, which takes no points" in refused(
        segmenting(picture, folder), capsys
    )


CONTENTS = [b"", b"[]", b"null", b"{}", b"\xff\xfe", b'{"a": ' * 100_000, b'{"a": ' + b"9" * 5000 + b"}", None]


@pytest.mark.parametrize("name", ["config.json", "processor_config.json", WEIGHTS])
@pytest.mark.parametrize("content", CONTENTS, ids=lambda content: str(content)[:12])
def test_damaged_files(folder: Path, picture: str, capsys, name: str, content: bytes | None) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    assert "cannot load a promptable model" in refused(segmenting(picture, folder), capsys)


def test_a_header_beyond_the_file(folder: Path, picture: str, capsys) -> None:
    for length in (2**63, 10**8, 8):
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", length) + b"{}      ")
        assert "cannot load a promptable model" in refused(segmenting(picture, folder), capsys)


# Code of strangers


def foreign(folder: Path, trace: Path, **fields: Any) -> Path:
    """A folder of an unknown kind of model whose code leaves a trace."""
    (folder / "mine.py").write_text(f"import pathlib\npathlib.Path({str(trace)!r}).touch()\nclass Model: pass\n")
    names = ("AutoConfig", "AutoModelForMaskGeneration", "AutoModel", "AutoProcessor", "AutoImageProcessor")
    pointers = {"auto_map": dict.fromkeys(names, "mine.Model")}
    (folder / "config.json").write_text(json.dumps({"model_type": "mine", **pointers, **fields}))
    processor = {"processor_class": "Mine", "image_processor_type": "MineProcessor", **pointers}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return trace


@pytest.mark.parametrize("fields", [{}, {"model_type": "sam"}, {"model_type": "efficientsam"}], ids=str)
def test_code_of_a_folder_does_not_run(
    folder: Path, picture: str, tmp_path: Path, monkeypatch, capsys, fields: dict[str, str]
) -> None:
    trace = foreign(folder, tmp_path / "trace", **fields)
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 100))
    new = str(tmp_path / "new")
    commands = [
        segmenting(picture, folder),
        ["features", "--teacher", str(folder), "--images", str(tmp_path), "--output", new],
        ["evaluate", str(folder), "--scenes", "1", "--device", "cpu"],
        ["benchmark", picture, "--model", str(folder)],
        ["demo", str(folder)],
        ["pretrain", "--recipe", "smoke", "--teacher", str(folder), "--output-dir", new],
        ["finetune", "--model", str(folder), "--train-scenes", "--max-steps", "1", "--output-dir", new],
    ]
    for arguments in commands[:2] if fields else commands:
        line = refused(arguments, capsys)
        if not fields and arguments[0] in ("segment", "evaluate", "benchmark"):
            assert "code of its authors, which was not run" in line and "--trust-remote-code" in line
    assert not trace.exists()


def test_all_models_are_loaded_in_one_place(root: Path) -> None:
    source = root / "src" / "efficientsam_hf"
    loading = re.compile(r"\.from_pretrained\((?!`)")  # a call, not a mention in a docstring
    found = {path.relative_to(source).as_posix() for path in source.rglob("*.py") if loading.search(path.read_text())}
    assert {name for name in found if not name.startswith("models/")} == {"pretrained.py"}


@pytest.mark.parametrize("command", ["segment", "features"])
def test_code_runs_where_it_is_asked_for(folder: Path, picture: str, tmp_path: Path, capsys, command: str) -> None:
    trace = foreign(folder, tmp_path / "trace")
    arguments = ["features", "--teacher", str(folder), "--images", str(tmp_path), "--output", str(tmp_path / "new")]
    arguments = segmenting(picture, folder) if command == "segment" else arguments
    refused([*arguments, "--trust-remote-code"], capsys)  # it is no model
    assert trace.exists()


# What is none of that


def test_weights_in_other_files(folder: Path, picture: str) -> None:
    expected = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    torch.save(expected, folder / "pytorch_model.bin")
    assert main(segmenting(picture, folder)) == 0
    (folder / "pytorch_model.bin").unlink()
    model = tiny_model()
    model.load_state_dict(expected)
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    loaded = load_pretrained(EfficientSamModel, folder)
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())
    next(folder.glob("model-00002*")).unlink()
    with pytest.raises(OSError, match="cannot load a model from"):
        load_pretrained(EfficientSamModel, folder)


def test_new_inputs_may_be_missing(folder: Path) -> None:
    model = tiny_model()
    fields = model.config.to_dict()
    fields["prompt_encoder_config"] |= {"background_points": False, "mask_prompts": False}
    type(model)(type(model.config).from_dict(fields)).save_pretrained(folder)
    switched_on = load_with_inputs(str(folder), {"mask_prompts": True})
    assert switched_on.prompt_encoder.mask_embed.conv3.weight.abs().sum() == 0
    with pytest.raises(ValueError, match=r"missing \(prompt_encoder\.mask_embed"):
        change_json(folder / "config.json", "prompt_encoder_config.mask_prompts", True)
        load_with_inputs(str(folder), {})


def test_models_of_others(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "mlp_dim": 16}
    vision |= {"output_channels": 16, "num_pos_feats": 8, "global_attn_indexes": [0]}
    other = {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16}
    config = SamConfig(
        vision_config=vision, prompt_encoder_config={"hidden_size": 16, "image_size": 32}, mask_decoder_config=other
    )
    SamModel(config).save_pretrained(tmp_path / "sam")
    assert isinstance(load_pretrained(SamModel, tmp_path / "sam"), SamModel)
    change_weights(tmp_path / "sam", lambda state: state.pop("mask_decoder.iou_token.weight"))
    with pytest.raises(ValueError, match="1 missing"):
        load_pretrained(SamModel, tmp_path / "sam")
    for value, words in ((10**8, "its config describes"), (10**18, "no model can be built"), (-1, "no model can be")):
        change_json(tmp_path / "sam" / "config.json", "mask_decoder_config.mlp_dim", value)
        with within_bounds(seconds=600), pytest.raises(ValueError, match=words):
            load_pretrained(AutoModelForMaskGeneration, tmp_path / "sam")

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ViTConfig(**sizes, image_size=32, patch_size=16)
    ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    ViTImageProcessor().save_pretrained(tmp_path / "vit")
    assert load_teacher(str(tmp_path / "vit")).width == 16, "it has a head too many, and no pooler"
    change_weights(tmp_path / "vit", lambda state: [state.pop(name) for name in list(state) if "layernorm" in name])
    with pytest.raises(ValueError, match="cannot load a model from .*missing"):
        load_teacher(str(tmp_path / "vit"))


def test_a_part_of_a_model_is_a_teacher(folder: Path, tmp_path: Path) -> None:
    assert load_teacher(str(folder)).width == 32
    vision = {"image_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = SamiConfig(vision_config=vision, target_width=16, decoder_depth=1, decoder_width=32, decoder_heads=2)
    SamiForPreTraining(config).save_pretrained(tmp_path / "sami")
    assert load_teacher(str(tmp_path / "sami")).width == 32
    change_weights(tmp_path / "sami", lambda state: state.pop("norm.weight"))
    with pytest.raises(ValueError, match=r"1 missing \(norm\.weight\)"):
        load_teacher(str(tmp_path / "sami"))
