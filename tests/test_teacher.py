# SPDX-License-Identifier: Apache-2.0
"""Teachers: tiny untrained models of each family, from a folder, against their own calls."""

import json
import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CLIPConfig,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
    ViTConfig,
    ViTModel,
)
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from efficientsam_hf import (
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamModel,
    EfficientSamProcessor,
    EfficientSamVisionModel,
    SamiConfig,
    SamiForPreTraining,
)
from efficientsam_hf.data.teacher import Teacher, load_teacher


MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
PLAIN = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 16}
SAM = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 96, "patch_size": 16,
    "output_channels": 12, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 16, "num_pos_feats": 8,
}  # fmt: skip


def models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    clip_text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ours = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64}
    parts = {
        "prompt_encoder_config": {"hidden_size": 16},
        "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2},
    }
    return {
        "vit": ViTModel(ViTConfig(**PLAIN, intermediate_size=32, image_size=64)),
        "clip": CLIPModel(
            CLIPConfig(
                vision_config={**PLAIN, "intermediate_size": 32, "image_size": 64},
                text_config={**clip_text, "vocab_size": 20},
            )
        ),
        "dinov2": Dinov2Model(Dinov2Config(**PLAIN, image_size=64)),
        "dinov3": DINOv3ViTModel(DINOv3ViTConfig(**PLAIN, intermediate_size=32, image_size=64, num_register_tokens=4)),
        "sam": SamModel(
            SamConfig(
                vision_config=SAM,
                prompt_encoder_config={"hidden_size": 12, "image_size": 96, "patch_size": 16},
                mask_decoder_config={"hidden_size": 12, "mlp_dim": 8, "num_attention_heads": 2},
            )
        ),
        "sam_vision": SamVisionModel(SamVisionConfig(**SAM)),
        "efficientsam": EfficientSamModel(EfficientSamConfig(vision_config={**ours, "output_channels": 16}, **parts)),
        "sami": SamiForPreTraining(
            SamiConfig(vision_config=ours, decoder_depth=1, decoder_width=16, decoder_heads=2, target_width=4)
        ),
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("teachers")
    for name, model in models().items():
        for parameter in model.parameters():  # some tables begin as zero
            torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(root / name)
        processor = {"image_mean": MEAN, "image_std": STD}
        (root / name / "preprocessor_config.json").write_text(json.dumps(processor))
    return root


def normalized(images: torch.Tensor) -> torch.Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def test_an_encoder_that_pretraining_wrote_is_a_teacher(folders: Path, tmp_path: Path) -> None:
    """It leaves no image processor; a ViT without one is refused."""
    for name in ("sami", "vit"):
        shutil.copytree(folders / name, tmp_path / name)
        (tmp_path / name / "preprocessor_config.json").unlink()
    teacher = load_teacher(str(tmp_path / "sami"))
    assert list(teacher.mean) == IMAGENET_DEFAULT_MEAN and list(teacher.std) == IMAGENET_DEFAULT_STD
    with pytest.raises(OSError, match="preprocessor_config|image processor"):
        load_teacher(str(tmp_path / "vit"))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "width"),
    [
        ("vit", 64, 32), ("clip", 64, 32), ("dinov2", 64, 32), ("dinov3", 64, 32), ("sam", 96, 12),
        ("sam_vision", 96, 12), ("efficientsam", 64, 16), ("sami", 64, 16),
    ],
)  # fmt: skip
def test_features_are_the_models_own(folders: Path, name: str, size: int, width: int) -> None:
    teacher = load_teacher(str(folders / name))
    assert (teacher.resolution, teacher.patch_size, teacher.width, teacher.mean) == (size, 16, width, tuple(MEAN))
    assert teacher.revision.startswith("sha256:") and not any(p.requires_grad for p in teacher.model.parameters())
    images = torch.rand(2, 3, size, size)
    features = teacher.features(images, (size // 16, size // 16))
    assert features.shape == (2, (size // 16) ** 2, width) and features.dtype == torch.float32
    pixels = normalized(images)
    whole = models()[name]
    whole = type(whole).from_pretrained(folders / name).eval()
    if name == "clip":
        expected = whole.vision_model(pixels).last_hidden_state[:, 1:]
    elif name == "sami":
        expected = whole.encode(pixels)[:, 1:]
    elif name in ("sam", "efficientsam"):
        expected = whole.get_image_embeddings(pixels).flatten(2).transpose(1, 2)
    elif name == "sam_vision":
        expected = whole(pixels).last_hidden_state.flatten(2).transpose(1, 2)
    else:
        expected = whole(pixels).last_hidden_state[:, 5 if name == "dinov3" else 1 :]
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "clip", "dinov2", "dinov3", "sam", "efficientsam", "sami"])
def test_another_resolution(folders: Path, name: str) -> None:
    """Tables are resized, and the map is brought to the student's grid."""
    teacher = load_teacher(str(folders / name), resolution=128)
    images = torch.rand(1, 3, 128, 128)
    own = teacher.features(images, (8, 8))
    assert own.shape == (1, 64, teacher.width)
    resampled = teacher.features(images, (4, 4))
    maps = own.transpose(1, 2).unflatten(2, (8, 8))
    expected = F.interpolate(maps, (4, 4), mode="bilinear", antialias=True).flatten(2).transpose(1, 2)
    torch.testing.assert_close(resampled, expected)
    swapped = torch.cat([images[..., 64:], images[..., :64]], dim=-1)
    moved = teacher.features(swapped, (8, 8)).unflatten(1, (8, 8)).roll(4, dims=2).flatten(1, 2)
    if name != "dinov3":  # whose rotations by position weigh nothing in an untrained model
        assert (moved - own).abs().max() > 1e-4


@torch.no_grad()
def test_sam_at_another_size_is_sam_of_that_size(folders: Path) -> None:
    small = SamVisionModel.from_pretrained(folders / "sam_vision")
    large = SamVisionModel(SamVisionConfig(**SAM | {"image_size": 128}))
    state = small.state_dict()
    table = state["vision_encoder.pos_embed"].permute(0, 3, 1, 2)
    state["vision_encoder.pos_embed"] = F.interpolate(table, (8, 8), mode="bicubic").permute(0, 2, 3, 1)
    for name, value in large.state_dict().items():  # of layers with global attention
        if "rel_pos" in name and state[name].shape != value.shape:
            resized = F.interpolate(state[name].T[None], len(value), mode="linear")[0].T
            state[name] = resized
    large.load_state_dict(state)
    images = torch.rand(1, 3, 128, 128)
    features = load_teacher(str(folders / "sam_vision"), resolution=128).features(images, (8, 8))
    expected = large.eval()(normalized(images)).last_hidden_state.flatten(2).transpose(1, 2)
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-4)


def test_the_students_autocast_is_not_the_teachers(folders: Path) -> None:
    teacher, images = load_teacher(str(folders / "dinov2")), torch.rand(1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        inside = teacher.features(images, (4, 4))
    assert torch.equal(inside, teacher.features(images, (4, 4)))


def test_an_image_encoder_of_ours(folders: Path, tmp_path: Path) -> None:
    """Saved without its prompts it gives the same embeddings."""
    EfficientSamVisionModel.from_pretrained(folders / "efficientsam").save_pretrained(tmp_path)
    images = torch.rand(1, 3, 64, 64)
    alone = load_teacher(str(tmp_path), mean=tuple(MEAN), std=tuple(STD))
    torch.testing.assert_close(
        alone.features(images, (4, 4)), load_teacher(str(folders / "efficientsam")).features(images, (4, 4))
    )


def test_a_teacher_of_the_hub_is_its_commit(folders: Path, tmp_path: Path, monkeypatch) -> None:
    """Two commits in the cache of the Hub, read without a connection."""
    commits = {"main": "a" * 40, "v2": "b" * 40}
    repository = tmp_path / "models--some--vit"
    (repository / "refs").mkdir(parents=True)
    for branch, commit in commits.items():
        (repository / "refs" / branch).write_text(commit)
        shutil.copytree(folders / "vit", repository / "snapshots" / commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    for branch, commit in (*commits.items(), (None, commits["main"]), (commits["v2"], commits["v2"])):
        assert load_teacher("some/vit", revision=branch).revision == commit


def test_half_precision(folders: Path) -> None:
    images = torch.rand(1, 3, 64, 64)
    exact = load_teacher(str(folders / "dinov2")).features(images, (4, 4))
    half = load_teacher(str(folders / "dinov2"), dtype=torch.bfloat16).features(images, (4, 4))
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, atol=0.1, rtol=0.1)
    assert not torch.equal(half, exact)


def test_a_processor_of_ours_is_read(tmp_path: Path) -> None:
    models()["efficientsam"].save_pretrained(tmp_path)
    EfficientSamProcessor(EfficientSamImageProcessor(size=64)).save_pretrained(tmp_path)
    assert load_teacher(str(tmp_path)).mean == (0.485, 0.456, 0.406)


def test_bad_teachers_are_named(folders: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="resolution is 100, expected a multiple of the patches of .*vit, 16"):
        load_teacher(str(folders / "vit"), resolution=100)
    ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a resnet has no image_size and patch_size"):
        load_teacher(str(tmp_path))
    with pytest.raises(OSError, match="absent"):
        load_teacher(str(tmp_path / "absent"))
    with pytest.raises(OSError, match="some/absent is no folder, and cannot be found on the Hub"):
        load_teacher("some/absent")
    models()["vit"].save_pretrained(tmp_path / "bare")
    with pytest.raises(OSError, match="image processor"):
        load_teacher(str(tmp_path / "bare"))
    (tmp_path / "bare" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(ValueError, match="no image_mean and image_std"):
        load_teacher(str(tmp_path / "bare"))
    assert load_teacher(str(tmp_path / "bare"), mean=(0.5,) * 3, std=(0.5,) * 3).std == (0.5,) * 3


def test_bad_images_and_features_are_named(folders: Path) -> None:
    teacher = load_teacher(str(folders / "vit"))
    with pytest.raises(ValueError, match=r"images has shape \(1, 3, 32, 32\), expected \(B, 3, 64, 64\)"):
        teacher.features(torch.rand(1, 3, 32, 32), (4, 4))
    images = torch.rand(3, 3, 64, 64)
    images[1, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="features of image 1 of the batch are not finite"):
        teacher.features(images, (4, 4))
    pooled = Teacher(teacher.model, "pooled", teacher.mean, teacher.std, 64, 4, 32, "none")
    with pytest.raises(ValueError, match="no vector of 32 channels for each of its 16 x 16 patches"):
        pooled.features(torch.rand(1, 3, 64, 64), (4, 4))
