# SPDX-License-Identifier: Apache-2.0
"""The cache of teacher features: what it holds, that it can be completed, and what it refuses."""

import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

from efficientsam_hf import default_checkpoint
from efficientsam_hf.cli import main
from efficientsam_hf.data.crops import RandomCrop, crop, part_of_map
from efficientsam_hf.data.feature_cache import (
    CachedSamples,
    CacheIndex,
    FeatureCache,
    _open_shard,
    _Table,
    _table_checksum,
    check_cache,
    describe,
    feature_checksum,
    shard_path,
    write_cache,
)
from efficientsam_hf.data.images import ImageFolder, SceneImages
from efficientsam_hf.data.teacher import Teacher, load_teacher
from efficientsam_hf.training.crop_preparation import CachedCropPreparation
from efficientsam_hf.training.normalization import denormalize


TINY_AND_WIDE = "{target_width: 100, vision_config: {num_hidden_layers: 1}}"
STEPS = "--batch-size 2 --max-steps 3 --checkpoint-every 1 --image-sizes 64".split()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    ViTModel(ViTConfig(**sizes, image_size=64, patch_size=16)).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}))
    return str(folder)


@pytest.fixture(scope="module")
def teacher(vit: str) -> Teacher:
    return load_teacher(vit)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for index in range(5):
        pixels = generator.integers(0, 256, (5, 7, 3), np.uint8)
        Image.fromarray(pixels).resize((70 + index, 50)).save(folder / f"{index}.png")
    return folder


def make_index(teacher: Teacher, samples, **changes) -> CacheIndex:
    return describe(samples, teacher, **{"crops": 3, "grid": (4, 4), "seed": 7, "records_per_shard": 4, **changes})


def write(folder: Path, index: CacheIndex, samples, teacher: Teacher, **options) -> list[int]:
    """Numbers of the shards that were made."""
    before = set(folder.glob("features-*"))
    counts = list(write_cache(folder, index, samples, teacher, batch_size=3, **options))
    share = range(options.get("rank", 0), index.shards, options.get("processes", 1))
    assert sum(counts) == sum(len(index.records_of(number)) for number in share)
    return sorted(int(path.stem.removeprefix("features-")) for path in set(folder.glob("features-*")) - before)


def tamper(path: Path, honest: bool = True, **changes) -> None:
    """Change tensors of a shard in place, or replace them and its metadata; `honest` ones get checksums that agree."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    content = {name: value.clone() for name, value in load_file(path).items()}
    for name, change in changes.items():
        if name == "metadata":
            metadata = change(metadata)
        elif (result := change(content[name])) is not None and result._base is None:
            content[name] = result
    if honest:
        content["checksums"] = torch.tensor([feature_checksum(row) for row in content["features"]])
        columns = [content[name].numpy() for name in ("records", "parts", "checksums")]
        names = [json.loads(metadata[name]) for name in ("image_ids", "problems")]
        metadata = metadata | {"table": _table_checksum(_Table(*columns, *names))}
    save_file(content, path, metadata)
    _open_shard.cache_clear()


def test_records_are_the_teachers_view_of_each_part(tmp_path, teacher, pictures) -> None:
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples)
    assert (index.records, index.shards) == (15, 4)
    assert write(tmp_path, index, samples, teacher) == [0, 1, 2, 3]
    assert CacheIndex.read(tmp_path) == index
    cache = FeatureCache(tmp_path)
    seen = set()
    for record in range(15):
        image = samples[record // 3]["image"]
        box, mirrored = index.part(record, image.size)
        seen.add((record // 3, box, mirrored))
        features = cache.features(record)
        expected = teacher.features(crop(image, box, 64, mirrored)[None], (4, 4))[0]
        assert features.dtype == torch.float16
        torch.testing.assert_close(features.float(), expected, atol=2e-3, rtol=2e-3)
    assert len(seen) == 15


def test_samples_bring_a_part_with_its_features(tmp_path, teacher, pictures) -> None:
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples)
    write(tmp_path, index, samples, teacher)
    cached = CachedSamples(samples, FeatureCache(tmp_path), RandomCrop())
    records = set()
    for seed in range(12):
        row = CachedCropPreparation()(cached[2], 64, np.random.default_rng(seed))
        own = teacher.features(denormalize(row["pixel_values"][None]), (4, 4))[0]
        torch.testing.assert_close(row["target_features"], own, atol=5e-3, rtol=5e-3)
        records.add(row["target_features"].sum().item())
    assert len(records) == 3  # the parts of picture 2


def test_whole_pictures_give_any_part(tmp_path, teacher, pictures) -> None:
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples, crops=0)
    write(tmp_path, index, samples, teacher)
    everything = CachedSamples(samples, FeatureCache(tmp_path), RandomCrop(flip=0.0))
    maps = FeatureCache(tmp_path).features(1).float().T.unflatten(1, (4, 4))
    whole = CachedSamples(samples, FeatureCache(tmp_path), RandomCrop(1.0, 1.0, 0.0))[1]["part"]
    box, mirrored, part = whole(np.random.default_rng(0), (4, 4))
    assert not mirrored and box == (2, 0, 69, 50)  # all but a little at both sides
    torch.testing.assert_close(part, part_of_map(maps, (71, 50), box, False, (4, 4)))
    torch.testing.assert_close(part, maps.flatten(1).T, atol=0.3, rtol=0.3)
    parts = [everything[1]["part"](np.random.default_rng(seed), (2, 2))[2] for seed in range(3)]
    assert parts[0].shape == (4, 24) and not torch.equal(parts[0], parts[1])


def test_what_is_there_is_not_made_again(tmp_path, teacher, pictures) -> None:
    """A shard that is missing, as after a kill, is made; others stay. Processes share the shards."""
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples)
    write(tmp_path / "whole", index, samples, teacher)
    assert write(tmp_path / "two", index, samples, teacher, rank=1, processes=2) == [1, 3]
    with pytest.raises(ValueError, match="not complete: 2 of 4 shards are missing"):
        FeatureCache(tmp_path / "two")
    assert write(tmp_path / "two", index, samples, teacher, rank=0, processes=2) == [0, 2]
    shard_path(tmp_path / "two", 2).unlink()
    with pytest.raises(ValueError, match="not complete: 1 of 4 shards are missing, the first is features-000002"):
        FeatureCache(tmp_path / "two")
    kept = shard_path(tmp_path / "two", 1).stat().st_mtime_ns
    assert write(tmp_path / "two", index, samples, teacher) == [2]
    assert shard_path(tmp_path / "two", 1).stat().st_mtime_ns == kept
    for number in range(4):
        one, two = (load_file(shard_path(tmp_path / name, number)) for name in ("whole", "two"))
        assert torch.equal(one["features"], two["features"]) and torch.equal(one["records"], two["records"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"revision": "abc"}, "revision 'sha256:.*' and not 'abc'"),
        ({"dtype": "bfloat16"}, "dtype 'float32' and not 'bfloat16'"),
        ({"pictures": "others"}, "pictures '5 files, sha256:.*' and not 'others'"),
        ({"resolution": 128}, "resolution 64 and not 128"),
        ({"crop": RandomCrop(flip=0.1)}, "crop RandomCrop"),
        ({"seed": 8}, "seed 7 and not 8"),
    ],
)
def test_another_cache_is_refused_by_name(tmp_path, teacher, pictures, changes, words) -> None:
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples)
    write(tmp_path, index, samples, teacher)
    with pytest.raises(ValueError, match=words):
        write(tmp_path, replace(index, **changes), samples, teacher)


def test_the_same_teacher_in_another_folder(tmp_path, teacher, pictures) -> None:
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples)
    write(tmp_path, index, samples, teacher)
    shard_path(tmp_path, 2).unlink()
    assert write(tmp_path, replace(index, teacher="moved"), samples, teacher) == [2]


def test_shards_of_another_cache_and_damaged_ones_are_named(tmp_path, teacher, pictures) -> None:
    """As when a job died before its index was written, or a disk was full."""
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples)
    write(tmp_path / "one", index, samples, teacher)
    write(tmp_path / "two", replace(index, seed=8), samples, teacher)
    shard_path(tmp_path / "two", 1).replace(shard_path(tmp_path / "one", 1))
    for options in ({}, {"rank": 1, "processes": 2}):
        with pytest.raises(ValueError, match="features-000001.* is a shard of another cache"):
            write(tmp_path / "one", index, samples, teacher, **options)
    path = shard_path(tmp_path / "one", 1)
    content = shard_path(tmp_path / "one", 0).read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="features-000001.* is damaged"):
        write(tmp_path / "one", index, samples, teacher)
    with pytest.raises(ValueError, match="features-000001.* is damaged"):
        FeatureCache(tmp_path / "one")
    path.unlink()
    assert write(tmp_path / "one", index, samples, teacher) == [1]


def test_pictures_that_were_replaced_are_named(tmp_path, teacher, pictures) -> None:
    changed = tmp_path / "pictures"
    shutil.copytree(pictures, changed)
    samples = ImageFolder(changed)
    for crops in (0, 3):
        write(tmp_path / str(crops), make_index(teacher, samples, crops=crops), samples, teacher)
    Image.new("RGB", (33, 44)).save(changed / "2.png")
    (changed / "3.png").write_bytes(b"no picture")
    for crops in (0, 3):
        cached = CachedSamples(samples, FeatureCache(tmp_path / str(crops)), RandomCrop())
        cached[1]["part"](np.random.default_rng(0), (4, 4))
        with pytest.raises(ValueError, match="picture 2.png had 72 x 50 pixels .* and has 33 x 44"):
            cached[2]["part"](np.random.default_rng(0), (4, 4))
        with pytest.raises(ValueError, match="cannot be computed again: .*3.png"):
            check_cache(tmp_path / str(crops), samples, teacher, 100)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"records": lambda value: value.add_(1)}, "records are not those from 4 to 7"),
        ({"records": lambda value: value.flip(0)}, "records are not those"),
        ({"records": lambda value: value.float()}, "records are not those"),
        ({"records": lambda value: value.fill_(5)}, "records are not those"),
        ({"metadata": lambda value: {**value, "problems": '{"1": "gone"}'}}, "records are not those"),
        ({"metadata": lambda value: {**value, "problems": '{"x": "gone"}'}}, "is damaged"),
        ({"metadata": lambda value: {**value, "problems": "[3]"}}, "unread pictures"),
        ({"metadata": lambda value: {**value, "image_ids": '["a"]'}}, "one name of a picture for each"),
        (
            {"features": lambda value: value[..., :-1].clone()},
            r"features of shape \(4, 16, 23\), expected \(4, 16, 24\)",
        ),
        ({"features": lambda value: value[:-1].clone()}, "features of shape"),
        ({"features": lambda value: value.float()}, "not float16"),
        ({"parts": lambda value: value[:, :-1].clone()}, "features of shape"),
    ],
)
def test_a_shard_that_does_not_fit_is_named_however_it_was_made(tmp_path, teacher, pictures, changes, words) -> None:
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples)
    write(tmp_path, index, samples, teacher)
    tamper(shard_path(tmp_path, 1), **changes)
    for reading in (lambda: FeatureCache(tmp_path), lambda: write(tmp_path, index, samples, teacher)):
        with pytest.raises(ValueError, match=f"features-000001.* is damaged: .*{words}|{words}"):
            reading()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"metadata": lambda value: None}, "is a shard of another cache"),
        ({"metadata": lambda value: {**value, "index": "0"}}, "is a shard of another cache"),
        ({"metadata": lambda value: {"index": value["index"]}}, "is damaged"),
        ({"parts": lambda value: value[0].add_(1)}, "is damaged: the checksum of its records is another"),
    ],
)
def test_a_shard_whose_own_words_are_damaged_is_named(tmp_path, teacher, pictures, changes, words) -> None:
    samples = ImageFolder(pictures)
    write(tmp_path, make_index(teacher, samples), samples, teacher)
    tamper(shard_path(tmp_path, 1), honest=False, **changes)
    with pytest.raises(ValueError, match=f"features-000001.* {words}"):
        FeatureCache(tmp_path)


def test_flipped_bits_of_features_cost_their_record(tmp_path, teacher, pictures) -> None:
    """As a picture that cannot be read, which training names and passes over."""
    samples = ImageFolder(pictures)
    write(tmp_path, make_index(teacher, samples), samples, teacher)
    tamper(shard_path(tmp_path, 1), honest=False, features=lambda value: value[2, 0, 0].neg_())
    cache = FeatureCache(tmp_path)
    assert cache.features(5).isfinite().all()
    with pytest.raises(ValueError, match="features of record 6, picture 2.png, are damaged"):
        cache.features(6)


def test_a_shard_of_an_earlier_version_has_no_checksums(tmp_path, teacher, pictures) -> None:
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples)
    write(tmp_path, index, samples, teacher)
    before = FeatureCache(tmp_path).features(5).clone()
    path = shard_path(tmp_path, 1)
    with safe_open(path, "pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "table"}
    tensors = {name: value.clone() for name, value in load_file(path).items() if name != "checksums"}
    save_file(tensors, path, metadata)
    _open_shard.cache_clear()
    assert torch.equal(FeatureCache(tmp_path).features(5), before)
    save_file({**tensors, "records": tensors["records"] - 1}, path, metadata)
    with pytest.raises(ValueError, match="records are not those"):
        FeatureCache(tmp_path)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": 10**12}, "not complete: [0-9]+ of 750000000000 shards are missing, the first is features-000004"),
        ({"images": 10**400}, "images must be a whole number"),
        ({"images": "5"}, "images must be a whole number of at least 1, got 5"),
        ({"images": 5.0}, "images must be a whole number"),
        ({"images": True}, "images must be a whole number"),
        ({"crops": -1}, "crops must be a whole number of at least 0"),
        ({"records_per_shard": 10**12}, "shard of another cache"),
        ({"width": 10**12}, "shard of another cache"),
        ({"grid": [10**6, 10**6]}, "shard of another cache"),
        ({"grid": [4]}, "grid must be two numbers"),
        ({"grid": None}, "is no index of a cache"),
        ({"scenes": [1]}, "scenes must be two numbers"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"crop": {"min_scale": 2}}, "min_scale and max_scale"),
        ({"crop": {"min_scale": "a"}}, "is no index of a cache"),
        ({"teacher": 3}, "teacher must be text"),
        ({"more": 3}, "is no index of a cache"),
    ],
)
def test_an_index_that_cannot_be_is_refused_at_once(tmp_path, teacher, pictures, changes, words) -> None:
    samples = ImageFolder(pictures)
    write(tmp_path, make_index(teacher, samples), samples, teacher)
    path = tmp_path / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=words):
        FeatureCache(tmp_path)


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 100_000, "\x00"])
def test_an_index_that_is_none(tmp_path, content) -> None:
    (tmp_path / "index.json").write_text(content)
    with pytest.raises(ValueError, match="index.json is no index of a cache"):
        FeatureCache(tmp_path)


def test_stored_features_that_are_not_finite_are_named(tmp_path, teacher, pictures) -> None:
    samples = ImageFolder(pictures)
    write(tmp_path, make_index(teacher, samples, records_per_shard=15), samples, teacher)
    tamper(shard_path(tmp_path, 0), features=lambda value: value[7, 0, 0].fill_(torch.nan))
    with pytest.raises(ValueError, match="features of record 7, picture 2.png, are not finite"):
        check_cache(tmp_path, samples, teacher, 15)
    with pytest.raises(ValueError, match="features of record 7, picture 2.png, are not finite"):
        FeatureCache(tmp_path).features(7)


def test_check_finds_what_was_changed(tmp_path, teacher, pictures) -> None:
    samples = ImageFolder(pictures)
    index = make_index(teacher, samples, records_per_shard=15)
    write(tmp_path, index, samples, teacher)
    count, difference = check_cache(tmp_path, samples, teacher, 100)
    assert count == 15 and difference < 5e-3

    tamper(shard_path(tmp_path, 0), features=lambda value: value[6, 3, 2].add_(1))
    assert check_cache(tmp_path, samples, teacher, 15)[1] == pytest.approx(1, abs=0.01)
    with pytest.raises(ValueError, match="images 5 and not 4"):
        check_cache(tmp_path, SceneImages(4, 0, 64), teacher, 1)


def test_pictures_that_cannot_be_read_are_named(tmp_path, teacher, pictures) -> None:
    class Damaged(ImageFolder):
        def __getitem__(self, index):
            if index == 1:
                raise ValueError("1.png is truncated")
            return super().__getitem__(index)

    samples = Damaged(pictures)
    write(tmp_path, make_index(teacher, samples), samples, teacher)
    cache = FeatureCache(tmp_path)
    assert cache.problems() == {"1": "1.png is truncated"}
    with pytest.raises(ValueError, match="record 4: its picture could not be read"):
        cache.features(4)
    assert check_cache(tmp_path, samples, teacher, 100)[0] == 12
    cached = CachedSamples(ImageFolder(pictures), cache, RandomCrop())
    with pytest.raises(ValueError, match="could not be read"):  # as a damaged sample, so that training passes over it
        CachedCropPreparation()(cached[1], 64, np.random.default_rng(0))


def test_other_pictures_and_parts_are_refused(tmp_path, teacher, pictures) -> None:
    samples = ImageFolder(pictures)
    write(tmp_path / "cache", make_index(teacher, samples), samples, teacher)
    cache = FeatureCache(tmp_path / "cache")
    with pytest.raises(ValueError, match="pictures '5 files, .*' and not 'scenes of seed 0 at 64 pixels'"):
        CachedSamples(SceneImages(5, 0, 64), cache, RandomCrop())
    with pytest.raises(ValueError, match="crop RandomCrop"):
        CachedSamples(samples, cache, RandomCrop(flip=0.0))
    (tmp_path / "cache" / "index.json").unlink()
    with pytest.raises(ValueError, match="holds features, but no index.json"):
        write(tmp_path / "cache", make_index(teacher, samples), samples, teacher)


def test_features_that_are_not_finite_name_their_record(tmp_path, vit, pictures) -> None:
    broken = load_teacher(vit)

    def features(images, grid, check=True):
        result = torch.ones(len(images), 16, 24)
        result[images.mean((1, 2, 3)) == means[4]] = torch.nan
        return result

    samples = ImageFolder(pictures)
    index = make_index(broken, samples)
    means = [crop(samples[r // 3]["image"], *_part(index, samples, r)).mean() for r in range(15)]
    broken.features = features
    with pytest.raises(ValueError, match="features of record 4, picture 1.png, are not finite"):
        write(tmp_path, index, samples, broken)
    assert shard_path(tmp_path, 0).is_file() and not shard_path(tmp_path, 1).exists()


def _part(index: CacheIndex, samples: ImageFolder, record: int):
    box, mirrored = index.part(record, samples[record // 3]["image"].size)
    return box, 64, mirrored


def test_a_folder_that_is_no_cache(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="is no cache of features"):
        FeatureCache(tmp_path)
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(ValueError, match="is no index of a cache"):
        FeatureCache(tmp_path)


# The commands


def test_scenes_read_together_are_those_read_alone() -> None:
    scenes = SceneImages(9, 3, 64)
    together = scenes.__getitems__([7, 2, 3])
    for sample, number in zip(together, (7, 2, 3)):
        alone = scenes[number]
        assert sample["image_id"] == alone["image_id"] == str(number)
        assert sample["image"].tobytes() == alone["image"].tobytes()
    with pytest.raises(IndexError):
        scenes.__getitems__([1, 9])


def test_pretraining_from_a_cache_of_scenes(tmp_path, vit, recipe_without_teacher) -> None:
    """Seed and size of the scenes come from the cache, whatever the run's are."""
    source = ["--teacher", vit, "--scenes", "4", "--scene-size", "96", "--seed", "5", "--grid", "4", "--crops", "1"]
    assert main(["features", *source, "--device", "cpu", "--output", str(tmp_path / "cache")]) == 0
    pretrain = ["pretrain", "--recipe", recipe_without_teacher, *STEPS, "--train-scenes"]
    pretrain += ["--train-features", str(tmp_path / "cache"), "--seed", "1", "--output-dir", str(tmp_path / "run")]
    assert main(pretrain) == 0


@pytest.mark.parametrize("crops", ["2", "0"])
def test_pretraining_from_a_cache(tmp_path, vit, pictures, recipe_without_teacher, crops, capsys) -> None:
    source = ["--teacher", vit, "--images", str(pictures), "--crops", crops, "--grid", "4", "--shard-size", "3"]
    command = ["features", *source, "--device", "cpu", "--output", str(tmp_path / "cache")]
    assert main(command) == 0
    assert "0 pictures unread" in capsys.readouterr().out
    assert main([*command, "--check", "4"]) == 0
    difference = float(re.search(r"largest difference (\S+)", capsys.readouterr().out)[1])
    assert 0 < difference < 5e-3
    run = tmp_path / "run"
    pretrain = ["pretrain", "--recipe", recipe_without_teacher, *STEPS, "--train-images"]
    pretrain += [str(pictures), "--train-features", str(tmp_path / "cache"), "--output-dir", str(run)]
    assert main(pretrain) == 0
    assert json.loads((run / "model" / "config.json").read_text())["target_width"] == 24
    for flags, words in (
        (["--teacher", "default"], f"teacher is '{default_checkpoint()}' .*, but cache .* was made with"),
        (["--teacher-resolution", "128"], "teacher_resolution is 128, but cache .* was made with 64"),
    ):
        assert main([*pretrain[:-1], str(tmp_path / "other"), *flags]) == 2
        assert re.search(words, capsys.readouterr().err)
    wrong_grid = [*pretrain[:-1], str(tmp_path / "other"), "--image-sizes", "96"]
    assert main(wrong_grid) == (0 if crops == "0" else 2)
    capsys.readouterr()
    wrong_width = [*pretrain[:-1], str(tmp_path / "wide"), "--model-overrides", TINY_AND_WIDE]
    assert main(wrong_width) == 2
    assert re.search("reconstructs 100 channels, but the features in cache .* have 24", capsys.readouterr().err)
    assert not (tmp_path / "wide").exists()


def test_a_run_does_not_go_on_with_other_features(tmp_path, vit, pictures, recipe_without_teacher, capsys) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    for seed in ("1", "2"):
        source = ["--teacher", vit, "--images", str(pictures), "--crops", "2", "--grid", "4", "--seed", seed]
        assert main(["features", *source, "--device", "cpu", "--output", str(tmp_path / seed)]) == 0
    shutil.copytree(tmp_path / "1", cache)
    pretrain = ["pretrain", "--recipe", recipe_without_teacher, *STEPS, "--train-images", str(pictures)]
    pretrain += ["--train-features", str(cache), "--output-dir", str(run)]
    assert main(pretrain) == 0
    assert main([*pretrain, "--resume"]) == 0
    shutil.rmtree(cache)
    shutil.copytree(tmp_path / "2", cache)
    capsys.readouterr()
    assert main([*pretrain, "--resume"]) == 2
    assert "learnt other features: " in capsys.readouterr().err


def test_one_command_writes_a_cache_at_a_time(tmp_path, vit, pictures, recipe_without_teacher, capsys, hold) -> None:
    """And another, or a run, is told who does; what a killed one leaves holds nobody up."""
    cache = tmp_path / "cache"
    command = ["features", "--teacher", vit, "--images", str(pictures), "--grid", "4", "--shard-size", "2"]
    command += ["--device", "cpu", "--output", str(cache)]
    assert main(command) == 0
    shard_path(cache, 1).rename(cache / f".partial-{os.getpid()}-features-000001.safetensors")
    process = hold(cache)
    capsys.readouterr()
    assert main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("efficientsam: ")]
    assert f"{cache} is in use by process {process.pid} on {platform.node()}" in line
    assert (cache / f".partial-{os.getpid()}-features-000001.safetensors").is_file()
    pretrain = ["pretrain", "--recipe", recipe_without_teacher, *STEPS, "--train-images", str(pictures)]
    pretrain += ["--train-features", str(cache), "--output-dir", str(tmp_path / "run")]
    assert main(pretrain) == 2
    assert re.search(f"1 of 3 shards are missing, .*in use by process {process.pid} on ", capsys.readouterr().err)
    process.kill()
    process.wait()
    assert main(command) == 0
    assert main(pretrain) == 0


def test_an_interrupted_command_says_how_to_go_on(tmp_path, vit, pictures, capsys, monkeypatch) -> None:
    command = ["features", "--teacher", vit, "--images", str(pictures), "--grid", "4", "--shard-size", "2"]
    command += ["--device", "cpu", "--output", str(tmp_path / "cache")]
    features = Teacher.features

    def interrupted(self, images, grid, check=True):
        if shard_path(tmp_path / "cache", 0).is_file():
            signal.raise_signal(signal.SIGTERM)
        return features(self, images, grid, check)

    with monkeypatch.context() as patch:
        patch.setattr(Teacher, "features", interrupted)
        assert main([*command, "--batch-size", "1"]) == 128 + signal.SIGTERM
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("efficientsam: interrupted by SIGTERM") and "--resume" not in line
    assert main(shlex.split(line.partition("this goes on: ")[2])[1:]) == 0
    assert len(list((tmp_path / "cache").glob("features-*"))) == 3


@pytest.mark.slow
def test_a_killed_command_goes_on(tmp_path, vit) -> None:
    """SIGKILL while shards are being written; then the cache is completed, and equal to one made at a stroke."""
    command = ["features", "--teacher", vit, "--scenes", "60", "--scene-size", "64", "--shard-size", "2"]
    command += ["--device", "cpu", "--batch-size", "2", "--output"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    process = subprocess.Popen(
        [sys.executable, "-m", "efficientsam_hf.cli", *command, str(killed)], env=environment, stderr=subprocess.PIPE
    )
    while process.poll() is None and len(list(killed.glob("features-*"))) < 3:
        time.sleep(0.005)
    process.kill()
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.stderr.close()
    before = len(list(killed.glob("features-*")))
    (killed / ".partial-1-features-000009.safetensors").write_bytes(b"left by the one that was killed")
    assert 3 <= before < 30
    for folder in (killed, whole):
        assert main([*command, str(folder)]) == 0
    assert sorted(path.name for path in killed.iterdir()) == sorted(path.name for path in whole.iterdir())
    for number in range(30):
        one, two = (load_file(shard_path(folder, number))["features"] for folder in (killed, whole))
        torch.testing.assert_close(one, two, atol=2e-3, rtol=2e-3)


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path, vit) -> None:
    """Each writes shards of its own; together they are the cache that one process makes."""
    command = ["features", "--teacher", vit, "--scenes", "12", "--scene-size", "64", "--shard-size", "2"]
    command += ["--device", "cpu", "--batch-size", "2", "--output"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*launch, "-m", "efficientsam_hf.cli", *command, str(shared)], env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    assert main([*command, str(alone)]) == 0
    assert main([*command, str(shared), "--check", "6"]) == 0
    assert sorted(path.name for path in shared.iterdir()) == sorted(path.name for path in alone.iterdir())
    for number in range(6):
        one, two = (load_file(shard_path(folder, number))["features"] for folder in (shared, alone))
        torch.testing.assert_close(one, two, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--crops", "-1"], "--crops must be at least 0, got -1"),
        (["--scenes", "0"], "--scenes must be at least 1, got 0"),
        (["--crop-min-scale", "2"], "min_scale and max_scale"),
        (["--teacher-resolution", "70"], "expected a multiple of the patches"),
        (["--check", "1"], "no cache"),
    ],
)
def test_bad_options(tmp_path, vit, capsys, flags, words) -> None:
    source = [] if "--scenes" in flags else ["--scenes", "2"]
    command = ["features", "--teacher", vit, *source, "--device", "cpu", "--output", str(tmp_path / "cache")]
    assert main([*command, *flags]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()
