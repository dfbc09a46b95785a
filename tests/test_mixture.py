# SPDX-License-Identifier: Apache-2.0
"""Mixtures of sources: their YAML and what is wrong with it, whose turn it is, and batches of all kinds."""

import json
from dataclasses import fields
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from efficientsam_hf import EfficientSamImageProcessor
from efficientsam_hf.data import coco
from efficientsam_hf.data.augmentation import Augmentation
from efficientsam_hf.data.mixture import BLOCK, MixtureSource, Turns, open_sources, read_mixture, write_mixture
from efficientsam_hf.data.scene_bank import SceneBank
from efficientsam_hf.models.rle_efficientsam import encode_rle
from efficientsam_hf.training.arguments import build_arguments
from efficientsam_hf.training.finetune_arguments import FinetuneArguments
from efficientsam_hf.training.mask_preparation import MaskPreparation
from efficientsam_hf.training.mixture_batches import MixtureBatches, PastedSource, SceneSource, StoredSource
from efficientsam_hf.training.schedule import Stage


MIXTURE = """\
- {name: photos, weight: 2, annotations: photos/instances.json, images: photos, horizontal_flip: 0.5, max_scale: 1.5}
- name: pasted
  weight: 1
  cutouts: [things, {annotations: photos/instances.json, images: photos, weight: 2}]
  backgrounds: rooms
- {name: scenes, weight: 1, scenes: true, min_object_area: 1e-3}
"""


def write_files(folder: Path, pictures: int = 3) -> Path:
    """A COCO file with a square in each photo, cut-outs, pictures of rooms, and a mixture of them and of scenes."""
    generator = np.random.default_rng(0)
    for name in ("photos", "things", "rooms"):
        (folder / name).mkdir(parents=True)
    content: dict[str, list] = {"images": [], "annotations": []}
    for index in range(pictures):
        pixels = generator.integers(0, 80, (48, 64, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "rooms" / f"{index}.png")
        mask = np.zeros((48, 64), bool)
        mask[5:40, 10 + index : 44 + index] = True
        Image.fromarray(pixels + 120 * mask[..., None].astype(np.uint8)).save(folder / "photos" / f"{index}.png")
        content["images"].append({"id": index, "file_name": f"{index}.png", "height": 48, "width": 64})
        content["annotations"].append({"id": index, "image_id": index, "segmentation": encode_rle(mask)})
        thing = Image.new("RGBA", (40, 30))
        ImageDraw.Draw(thing).ellipse((2, 2, 37, 27), (250, 60 * index, 0))
        thing.save(folder / "things" / f"cup_{index}.png")
    (folder / "photos" / "instances.json").write_text(json.dumps(content))
    (folder / "mix.yaml").write_text(MIXTURE)
    return folder / "mix.yaml"


def finetuning(mixture: object, **changes: object) -> FinetuneArguments:
    """Arguments of a run whose recipe has this mixture."""
    recipe = {"output_dir": "unused", "max_steps": 1, "image_sizes": "64", "train_mix": mixture}
    return build_arguments(FinetuneArguments, recipe | changes, {})


# Turns


@pytest.mark.parametrize(
    ("weights", "shares"),
    [
        ((5, 8, 14, 4, 5, 26, 38), [50, 80, 140, 40, 50, 260, 380]),
        ((1, 1, 1), [334, 333, 333]),
        ((1e-9, 2.5, 1e-9), [1, 998, 1]),
        ((1e99, 1e99), [500, 500]),
        ((0.3,), [1000]),
    ],
)
def test_shares_and_epochs_are_exact(weights: tuple[float, ...], shares: list[int]) -> None:
    turns = Turns(weights, seed=3)
    at = [turns.at(position) for position in range(3 * BLOCK)]
    for block in range(3):
        sources = [source for source, _ in at[block * BLOCK : (block + 1) * BLOCK]]
        assert np.bincount(sources).tolist() == shares
    for source, share in enumerate(shares):  # none of its pictures is left out, none comes twice
        assert sorted(place for turn, place in at if turn == source) == list(range(3 * share))


def test_blocks_and_seeds_have_orders_of_their_own() -> None:
    orders = [
        tuple(Turns((1, 2), seed).at(position)[0] for position in range(block * BLOCK, (block + 1) * BLOCK))
        for seed, block in ((0, 0), (0, 1), (1, 0))
    ]
    assert len(set(orders)) == 3 and orders[0][:333] != (0,) * 333


# What a mixture says


def test_a_mixture_as_text_is_the_same_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths count from the file; the text that args.json keeps means the same wherever it is read."""
    path = write_files(tmp_path / "data")
    sources = read_mixture(str(path))
    assert [(source.name, source.kind, source.weight) for source in sources] == [
        ("photos", "annotations", 2), ("pasted", "cutouts", 1), ("scenes", "scenes", 1)
    ]  # fmt: skip
    assert sources[0].annotations == str(tmp_path / "data" / "photos" / "instances.json")
    assert [entry["weight"] for entry in sources[1].cutouts] == [1, 2]
    assert sources[2].min_object_area == 0.001  # which YAML reads as text
    text = write_mixture(sources)
    monkeypatch.chdir(tmp_path)
    assert read_mixture(text) == sources and write_mixture(read_mixture(text)) == text
    arguments = finetuning(str(path))
    assert arguments.train_mix == text and arguments.mixture() == sources
    monkeypatch.chdir(path.parent)
    assert finetuning(yaml.safe_load(MIXTURE)).train_mix == text  # as a list in a recipe
    monkeypatch.setenv("HOME", str(path.parent))
    assert read_mixture("~/mix.yaml") == read_mixture(MIXTURE.replace("images: photos", "images: ~/photos")) == sources
    one_line = write_mixture(sources, default_flow_style=True).strip()
    assert len(one_line) > 255 and read_mixture(one_line) == sources  # no name of a file


def test_the_documentation_shows_a_mixture_and_every_field(root: Path) -> None:
    text = (root / "docs" / "mixtures.md").read_text()
    sources = read_mixture(text.partition("```yaml\n")[2].partition("```")[0], existing=False)
    assert Turns(tuple(source.weight for source in sources)).shares().tolist() == [300, 500, 200]  # as it says
    table = "".join(line for line in text.splitlines() if line.startswith("|"))
    assert [item.name for item in fields(MixtureSource) if f"`{item.name}" not in table] == []


BAD = [
    ("3", "is neither a YAML file nor text with a list of sources"),
    ("absent.yaml", "'absent.yaml' is neither a YAML file nor text"),
    ("[]", "is neither"),
    ("[photos]", "is neither"),
    ("{a: b", "is not YAML"),
    ("- {scenes: false}", "source 'source_1': one of annotations, .* must be given, got none"),
    ("- {scenes: 'yes'}", "scenes must be true or false, got 'yes'"),
    ("- {scenes: true, sa1b: photos}", "got sa1b and scenes"),
    ("- {annotations: photos/instances.json}", "annotations and images go together"),
    ("- {cutouts: things}", "cutouts and backgrounds go together"),
    ("- {scenes: true, wight: 1}", "unknown names wight; known are annotations"),
    ("- {scenes: true, 5: 1}", "unknown names 5;"),
    ("- {name: a/b, scenes: true}", "source 'a/b': a name must be text of letters"),
    ("- {name: 5, scenes: true}", "source 5: a name must be text"),
    ("[{name: a, scenes: true}, {name: a, scenes: true}]", "a name of its own, got a, a"),
    ("- {scenes: true, weight: a}", "weight must be a number above 0, got 'a'"),
    ("- {scenes: true, weight: true}", "weight must be .* got True"),
    ("- {scenes: true, weight: .nan}", "weight must be .* got nan"),
    ("- {scenes: true, weight: .inf}", "weight must be .* got inf"),
    ("- {scenes: true, weight: 0}", "weight must be .* got 0"),
    ("- {scenes: true, min_object_area: [1]}", "min_object_area must be a number"),
    ("- {scenes: true, min_object_area: 0.95}", "source 'source_1': min_object_area and max_object_area must be"),
    ("- {scenes: true, horizontal_flip: 0.5}", "horizontal_flip is not for scenes, got 0.5"),
    ("- {scenes: true, split: test}", "split is not for scenes"),
    ("- {dataset: x, config: 2020}", "config must be text, got 2020"),
    ("- {dataset: ./x}", "dataset: x does not exist or is no folder"),
    ("- {scenes: true, url: host}", "url must begin with http"),
    ("- {annotations: 5, images: photos}", "annotations must be text, got 5"),
    ("- {annotations: '', images: photos}", "annotations must be text, got ''"),
    ("- {annotations: photos, images: photos}", "annotations: photos does not exist or is no file"),
    ("- {annotations: photos/instances.json, images: gone}", "source 'source_1': images: gone does not exist"),
    ("- {annotations: photos/instances.json, images: photos, min_scale: 3}", "source 'source_1': min_scale and max"),
    ("- {annotations: photos/instances.json, images: photos, horizontal_flip: a}", "horizontal_flip must be a number"),
    ("- {cutouts: 5, backgrounds: rooms}", "source 'source_1': cutouts must be folders, or mappings .*, got 5"),
    ("- {cutouts: [], backgrounds: rooms}", "cutouts must name a folder or COCO file at least, got an empty list"),
    ("- {cutouts: things, backgrounds: [{weight: 2}]}", "backgrounds must be folders, or mappings"),
    ("- {cutouts: [{folder: things, weight: .inf}], backgrounds: rooms}", "cutouts: weight must be .* got inf"),
    ("- {cutouts: [{folder: 5}], backgrounds: rooms}", "cutouts: folder must be a path, got 5"),
    ("- {cutouts: gone, backgrounds: rooms}", "cutouts: folder: gone does not exist"),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("data")).parent


@pytest.mark.parametrize(("text", "words"), BAD, ids=[text for text, _ in BAD])
def test_what_is_wrong_is_named(folder: Path, text: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        finetuning(text)


@pytest.mark.parametrize("change", [{"train_limit": 3}, {"crops": True}])
def test_what_is_for_one_source_alone_is_refused(change: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(change))} must be left out with train_mix"):
        finetuning("- {scenes: true}", **change)


def test_sources_replace_the_changes_of_the_run(folder: Path) -> None:
    arguments = finetuning(str(folder / "mix.yaml"), horizontal_flip=0.2, min_scale=0.7, light=1.0)
    photos, pasted, scenes = arguments.mixture()
    assert arguments.augmentation(photos) == Augmentation(0.5, 0.7, 1.5, 1.0)
    assert arguments.augmentation(pasted) == Augmentation()  # it is changed in its own way
    assert arguments.object_areas(photos) == (0.0005, 0.9) and arguments.object_areas(scenes) == (0.001, 0.9)


def test_a_file_that_several_sources_name_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, really = [], coco.CocoFile
    monkeypatch.setattr(coco, "CocoFile", lambda path: read.append(path) or really(path))
    photos, pasted, nothing = open_sources(read_mixture(str(folder / "mix.yaml")))
    assert len(read) == 1 and nothing is None
    assert pasted.cutouts[1][1].samples is photos and len(pasted.cutouts[1][1]) == 3


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ({"cutouts": "rooms", "backgrounds": "rooms"}, "cutouts: .*rooms: none of 3 .* has no transparency"),
        ({"cutouts": "things", "backgrounds": "empty"}, "empty holds no pictures"),
        ({"annotations": "mix.yaml", "images": "photos"}, "mix.yaml is not a JSON file"),
        ({"sa1b": "tars"}, "holds tars, which cannot be read in any order"),
    ],
)
def test_sources_that_cannot_be_used_are_named_before_training(folder: Path, source, words, monkeypatch) -> None:
    monkeypatch.chdir(folder)
    for name in ("empty", "tars"):
        Path(name).mkdir(exist_ok=True)
    Path("tars", "a.tar").touch()
    with pytest.raises(ValueError, match=rf"source 'mine': .*{words}"):
        open_sources(read_mixture(yaml.safe_dump([{"name": "mine", **source}])))


# Batches


@pytest.fixture(scope="module")
def bank() -> SceneBank:
    return SceneBank.build()


def make(folder: Path, bank: SceneBank | None, **options) -> MixtureBatches:
    """Batches of the folder's mixture, without scenes if there is no bank for them."""
    change = Augmentation(0.5, 0.8, 1.5, 1.0)
    preparation = MaskPreparation(EfficientSamImageProcessor(size=64), 2, 0.01, augmentation=change)
    photos, pasted, _ = open_sources(read_mixture(str(folder / "mix.yaml")))
    sources = [("photos", 2, StoredSource(photos, preparation)), ("pasted", 1, PastedSource(pasted, preparation))]
    return MixtureBatches(sources + [("scenes", 1, SceneSource(bank, 2, 0.001, 0.9))] * bool(bank), **options)


def joined(batches: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    names = ("pixel_values", "masks", "object_mask", "source")
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


def test_a_picture_depends_on_its_number_alone(folder: Path, bank: SceneBank) -> None:
    """Not on batches, on processes or workers, or on where a run went on."""
    whole = joined(list(islice(make(folder, bank, seed=5)(0, Stage(0.0, 64, 8)), 2)))
    assert {name: tuple(value.shape) for name, value in whole.items()} == {
        "pixel_values": (16, 3, 64, 64), "masks": (16, 2, 64, 64), "object_mask": (16, 2), "source": (16,)
    }  # fmt: skip
    assert whole["source"].unique().tolist() == [0, 1, 2] and whole["object_mask"].any(1).all()
    late = joined(list(islice(make(folder, bank, seed=5, workers=1)(3, Stage(0.0, 64, 2)), 2)))
    shared = [
        make(folder, bank, seed=5, rank=rank, processes=2).batch(number, Stage(0.0, 64, 2))
        for number in range(4) for rank in (0, 1)
    ]  # fmt: skip
    for part, first in ((late, 6), (joined(shared), 0)):
        for name, value in part.items():
            assert torch.equal(value, whole[name][first : first + len(value)]), name
    other = make(folder, bank, seed=5).batch(0, Stage(0.5, 64, 8))
    assert not torch.equal(other["pixel_values"], whole["pixel_values"][:8])


def test_unusable_samples_are_named_with_their_source_once(folder: Path, tmp_path: Path) -> None:
    named = []
    batches = make(write_files(tmp_path / "data").parent, None, report=lambda *entry: named.append(entry))
    (tmp_path / "data" / "photos" / "1.png").write_bytes(b"no picture")
    stream = batches(0, Stage(0.0, 64, 8))
    for _ in range(3):
        assert next(stream).keys() == {"pixel_values", "masks", "object_mask", "source", "seed"}
    ((name, reason),) = named
    assert name == "photos/1" and "1.png' is not a picture" in reason
    for path in (tmp_path / "data" / "photos").glob("*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(ValueError, match="source 'photos': none of 3 training samples in a row could be used"):
        next(stream)


def test_sources_that_are_built_in_python_are_checked_too() -> None:
    with pytest.raises(ValueError, match="source 'a': one of annotations"):
        MixtureSource("a")
