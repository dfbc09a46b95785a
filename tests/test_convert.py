# SPDX-License-Identifier: Apache-2.0
"""Released checkpoints: what converts, and what is refused with every reason named."""

import errno
import hashlib
import os
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from property_testing import within_bounds

from efficientsam_hf import EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.cli import main
from efficientsam_hf.convert import BOX_CORNERS, convert_checkpoint, read_released_checkpoint, rename


def released_state(width: int = 192) -> dict[str, torch.Tensor]:
    """A state dict in the released layout with random numbers, made from our model by undoing the renames."""
    from efficientsam_hf import EfficientSamConfig

    prompts = {"background_points": False, "mask_prompts": False, "padded_prompt_tokens": 6}
    variant = {192: "ti", 384: "s"}[width]
    model = EfficientSamModel(EfficientSamConfig.from_preset(variant, prompt_encoder_config=prompts))
    ours = model.state_dict()
    corners = ours.pop("prompt_encoder.box_corner_embed.weight")
    names = {
        "vision_encoder.embeddings.position_embeddings": "image_encoder.pos_embed",
        "prompt_encoder.positional_encoding.gaussian_matrix": (
            "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"
        ),
    }
    parts = [
        ("vision_encoder.embeddings.projection", "image_encoder.patch_embed.proj"),
        ("vision_encoder.layers", "image_encoder.blocks"),
        ("neck.conv1", "image_encoder.neck.0"),
        ("neck.layer_norm1", "image_encoder.neck.1"),
        ("neck.conv2", "image_encoder.neck.2"),
        ("neck.layer_norm2", "image_encoder.neck.3"),
        ("padding_embed", "invalid_points"),
        ("point_embed", "point_embeddings"),
        ("upscale_conv1", "final_output_upscaling_layers.0.0"),
        ("upscale_norm", "final_output_upscaling_layers.0.1"),
        ("upscale_conv2", "final_output_upscaling_layers.1.0"),
        ("layer_norm_final_attn", "norm_final_attn"),
        ("proj_out", "fc"),
    ]
    state = {}
    for name, value in ours.items():
        released = names.get(name, name)
        for new, old in parts:
            released = released.replace(new, old)
        if "image_encoder" in released:
            released = released.replace(".attention.", ".attn.")
        else:
            released = released.replace(".layer_norm", ".norm")
            for part in (
                "mlp",
                "output_hypernetworks_mlps.0",
                "output_hypernetworks_mlps.1",
                "output_hypernetworks_mlps.2",
                "output_hypernetworks_mlps.3",
                "iou_prediction_head",
            ):
                for index in (0, 1):
                    released = released.replace(f"{part}.layers.{index}.", f"{part}.layers.{index}.0.")
        state[released] = value
    state.update(zip(BOX_CORNERS, corners.split(1), strict=True))
    return state


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("released") / "efficient_sam_vitt.pt"
    torch.save({"model": released_state()}, path)
    return path


def test_every_released_name_has_its_own_place(shared: Path) -> None:
    import json

    for variant in ("ti", "s"):
        names = json.loads((shared / "parity" / f"manifest_{variant}.json").read_text())
        renamed = [rename(name) for name in names if name not in BOX_CORNERS]
        assert len(set(renamed)) == len(renamed)
        assert sorted(names) == sorted(released_state({"ti": 192, "s": 384}[variant]))


@pytest.mark.parametrize("packed", ["pt", "zip"])
def test_conversion_gives_a_normal_folder(packed: str, released: Path, tmp_path: Path) -> None:
    source = released
    if packed == "zip":
        source = tmp_path / "efficient_sam_vits.pt.zip"
        with zipfile.ZipFile(source, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.write(released, "efficient_sam_vits.pt")
    config = convert_checkpoint(source, tmp_path / "out")
    assert config.vision_config.num_attention_heads == 3
    model = EfficientSamModel.from_pretrained(tmp_path / "out")
    processor = EfficientSamProcessor.from_pretrained(tmp_path / "out")
    state = torch.load(released, weights_only=True)["model"]
    assert torch.equal(model.mask_decoder.iou_token.weight, state["mask_decoder.iou_token.weight"])
    assert torch.equal(model.prompt_encoder.box_corner_embed.weight[1:], state[BOX_CORNERS[1]])
    assert (processor.background_points, processor.mask_prompts, processor.max_prompt_tokens) == (False, False, 6)
    card = ModelCard((tmp_path / "out" / "README.md").read_text())
    assert (card.data.license, card.data.pipeline_tag) == ("apache-2.0", "mask-generation")
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    assert f"`{source.name}` (sha256 `{digest}`)" in card.text and "authors of the paper released" in card.text
    with Image.open(tmp_path / "out" / "previews" / "scenes.png") as preview:
        assert len(preview.getcolors(10**6)) > 100
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_every_key_is_accounted_for(released: Path, tmp_path: Path) -> None:
    state = torch.load(released, weights_only=True)["model"]
    state["image_encoder.extra"] = torch.zeros(1)
    del state["mask_decoder.iou_token.weight"]
    state["image_encoder.blocks.3.attn.qkv.bias"] = torch.zeros(5)
    torch.save({"model": state}, tmp_path / "damaged.pt")
    with pytest.raises(ValueError) as error:
        convert_checkpoint(tmp_path / "damaged.pt", tmp_path / "out")
    assert "missing: ['mask_decoder.iou_token.weight']" in str(error.value)
    assert "unexpected: ['image_encoder.extra']" in str(error.value)
    assert "image_encoder.blocks.3.attn.qkv.bias (5,) instead of (576,)" in str(error.value)
    assert not (tmp_path / "out").exists()


class RunsCode:
    def __reduce__(self):
        return (print, ("code in a checkpoint ran",))


def test_code_in_a_checkpoint_does_not_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    torch.save({"model": RunsCode()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match="more than tensors"):
        convert_checkpoint(tmp_path / "evil.pt", tmp_path / "out")
    assert "ran" not in capsys.readouterr().out


def test_a_truncated_checkpoint_is_named(released: Path, tmp_path: Path) -> None:
    (tmp_path / "short.pt").write_bytes(released.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"short\.pt"):
        convert_checkpoint(tmp_path / "short.pt", tmp_path / "out")


@pytest.mark.parametrize("content", [b"t\n", b"R rather a text\n", b"", b"\x80\x02}q\x00", b"PK\x03\x04 and no zip"])
def test_what_is_no_checkpoint_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "notes.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"notes\.pt") as error:
        read_released_checkpoint(tmp_path / "notes.pt")
    assert len(str(error.value)) < 400 and "weights_only=False" not in str(error.value)


def test_misshapen_box_corners_are_named(released: Path, tmp_path: Path) -> None:
    state = torch.load(released, weights_only=True)["model"]
    state["prompt_encoder.bbox_top_left_embeddings.weight"] = torch.zeros(1, 8)
    torch.save({"model": state}, tmp_path / "corners.pt")
    with pytest.raises(ValueError, match=r"bbox_bottom_right_embeddings\.weight \(1, 8\) instead of \(2, 256\)"):
        convert_checkpoint(tmp_path / "corners.pt", tmp_path / "out")


def test_a_checkpoint_of_sam_is_named(tmp_path: Path) -> None:
    state = {"image_encoder.pos_embed": torch.zeros(1, 64, 64, 768), "image_encoder.neck.0.weight": torch.zeros(1)}
    torch.save(state, tmp_path / "sam_vit_b.pth")
    with pytest.raises(ValueError, match=r"not a checkpoint of EfficientSAM.*\(1, 64, 64, 768\)"):
        convert_checkpoint(tmp_path / "sam_vit_b.pth", tmp_path / "out")


def test_other_content_is_refused(tmp_path: Path) -> None:
    torch.save([torch.zeros(1)], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="not a state dict"):
        read_released_checkpoint(tmp_path / "list.pt")
    with pytest.raises(FileNotFoundError, match="absent"):
        read_released_checkpoint(tmp_path / "absent.pt")


def test_a_filled_destination_is_kept(released: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert_checkpoint(released, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def packed(path: Path, files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_a_zip_that_unpacks_to_too_much_is_refused_before_it_does(tmp_path: Path) -> None:
    """One file of zeros, many of them, and a checkpoint that is itself packed, plain and within a zip."""
    zeros = bytes(100 * 2**20)
    one = packed(tmp_path / "one.zip", {"a.pt": zeros})
    packed(tmp_path / "many.zip", {f"data/{number}": zeros[: 2**20] for number in range(100)} | {"a.pt": b""})
    inner = packed(tmp_path / "inner.pt", {"archive/data.pkl": b"", "archive/data/0": zeros})
    packed(tmp_path / "nested.zip", {"a.pt": inner.read_bytes()}, zipfile.ZIP_STORED)
    for name in ("one.zip", "many.zip", "inner.pt", "nested.zip"):
        with within_bounds(seconds=600, memory=2**25), pytest.raises(ValueError, match=r"would unpack to 104,857,6"):
            read_released_checkpoint(tmp_path / name)
    assert one.stat().st_size < 2**20


def test_a_file_beyond_any_checkpoint_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "huge.pt").open("wb") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(ValueError, match=r"has 1,073,741,825 bytes, a checkpoint up to 1,073,741,824"):
        read_released_checkpoint(tmp_path / "huge.pt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(released: Path, tmp_path: Path, value: float) -> None:
    state = torch.load(released, weights_only=True)["model"]
    state["image_encoder.neck.0.weight"].view(-1)[0] = value
    torch.save({"model": state}, tmp_path / "damaged.pt")
    with pytest.raises(ValueError, match=r"NaN or infinity: \['image_encoder\.neck\.0\.weight'\]"):
        convert_checkpoint(tmp_path / "damaged.pt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_place_is_not_filled_twice(released: Path, tmp_path: Path) -> None:
    state = torch.load(released, weights_only=True)["model"]
    state["neck.conv1.weight"] = state["image_encoder.neck.0.weight"]
    torch.save(state, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"unexpected: \['neck\.conv1\.weight'\]"):
        convert_checkpoint(tmp_path / "twice.pt", tmp_path / "out")


@pytest.mark.parametrize(
    "value",
    [torch.eye(2).to_sparse(), torch.zeros(1, device="meta"), torch.zeros(1, dtype=torch.complex64), "text", None],
    ids=["sparse", "meta", "complex", "text", "None"],
)
def test_what_is_no_plain_tensor_is_refused(tmp_path: Path, value: object) -> None:
    torch.save({"image_encoder.pos_embed": value}, tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="not a state dict of tensors"):
        read_released_checkpoint(tmp_path / "odd.pt")


def test_a_tensor_without_memory_of_its_own_takes_none(released: Path, tmp_path: Path) -> None:
    state = torch.load(released, weights_only=True)["model"]
    for name in BOX_CORNERS:
        state[name] = torch.zeros(1).expand(10**6, 10**6)
    torch.save(state, tmp_path / "wide.pt")
    with within_bounds(seconds=600), pytest.raises(ValueError, match=r"\(1000000, 1000000\) instead of \(2, 256\)"):
        convert_checkpoint(tmp_path / "wide.pt", tmp_path / "out")


def test_the_place_is_tried_before_the_work(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("efficientsam_hf.convert.read_released_checkpoint", lambda source: pytest.fail("too late"))
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="cannot write to the folder"):
        convert_checkpoint(released, tmp_path / "file" / "out")


def test_a_full_disk_leaves_nothing(released: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("efficientsam_hf.convert.draw_scenes", lambda model, processor: None)
    monkeypatch.setattr("efficientsam_hf.convert.write_png", full)
    assert main(["convert", str(released), str(tmp_path / "out")]) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("efficientsam")]
    assert f"{tmp_path / 'out'} could not be written" in line and "No space left on device" in line
    assert list(tmp_path.iterdir()) == []
