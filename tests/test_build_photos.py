# SPDX-License-Identifier: Apache-2.0
"""examples/build_photos: from small downloads in the publishers' layouts to files that training opens."""

import importlib.util
import json
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw

from efficientsam_hf.data.coco import CocoSamples
from efficientsam_hf.data.cutouts import CutoutFolder
from efficientsam_hf.data.images import ImageFolder


# pycocotools' compiled part still speaks the array protocol of numpy 1.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GREY, RED = (90, 90, 90), (220, 30, 30)
BOX = (150, 90, 420, 300)  # left, top, right, bottom of the red thing in a photo of SIZE
SIZE = (600, 400)
OUTLINE = [150, 90, 420, 90, 420, 300, 150, 300]
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def command(root: Path) -> Iterator[ModuleType]:
    """The command's module, its siblings importable as they are when it is run."""
    folder = root / "examples" / "build_photos"
    spec = importlib.util.spec_from_file_location("build_photos", folder / "__main__.py")
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(folder))


@pytest.fixture
def build(command: ModuleType, tmp_path: Path) -> Build:
    """Run the command for a set; the folder that it made."""

    def run(name: str, source: Path, *flags: str) -> Path:
        command.main([name, str(source), str(tmp_path / "out"), *flags])
        return tmp_path / "out" / name

    return run


@pytest.fixture
def refusal(command: ModuleType, tmp_path: Path) -> Callable[..., str]:
    """Run the command for what it must refuse in one line, without leaving anything."""

    def run(name: str, source: Path, *flags: str, out: Path = tmp_path / "out") -> str:
        before = sorted(out.rglob("*"))
        with pytest.raises(SystemExit) as stop:
            command.main([name, str(source), str(out), *flags])
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
        assert sorted(out.rglob("*")) == before
        return stop.value.code

    return run


def names_for(command: ModuleType, pattern: str, part: str | None, share_alike: bool = False) -> Iterator[str]:
    """Names like "{:04d}.jpg" that belong to a part."""
    part_of = sys.modules["layout"].part_of
    return (name for name in map(pattern.format, range(1, 5000)) if part_of(name, share_alike) == part)


def photo(path: Path, size: tuple[int, int] = SIZE, noise: float = 0.0) -> None:
    """A red thing on grey."""
    image = Image.new("RGB", size, GREY)
    ImageDraw.Draw(image).rectangle((BOX[0], BOX[1], BOX[2] - 1, BOX[3] - 1), fill=RED)
    pixels = np.asarray(image) + noise * np.random.default_rng(0).standard_normal((*size[::-1], 3))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)).save(path, quality=95)


def check_masks(folder: Path, part: str) -> list[str]:
    """Every mask lies on the red thing of its photo; the names of the photos."""
    samples = CocoSamples(folder / f"instances_{part}.json", folder / part)
    content = json.loads((folder / f"instances_{part}.json").read_text())
    for index in range(len(samples)):
        sample = samples[index]
        pixels = np.asarray(sample["image"]).astype(int)
        assert sample["image"].size == (384, 256) and len(sample["masks"]) == 1
        red, mask = pixels[..., 0] - pixels[..., 1] > 60, sample["masks"][0]
        assert (red & mask).sum() / (red | mask).sum() > 0.97
        assert content["annotations"][index]["area"] == mask.sum()
    written = [(entry["area"], entry["bbox"], entry["category_id"]) for entry in content["annotations"]]
    objects = [entry for number in range(len(samples.file.images)) for entry in samples.objects(number)]
    assert [(entry.area, entry.box, entry.category) for entry in objects] == written
    names = [image["file_name"] for image in content["images"]]
    assert sorted(path.name for path in (folder / part).iterdir()) == sorted(names)
    return names


def coco_file(names: list[str], licenses: list[int] | None = None, categories: list[int] | None = None) -> dict:
    """COCO instances: one outlined thing in each photo."""
    images = [{"id": 7 + k, "file_name": name, "width": 600, "height": 400} for k, name in enumerate(names)]
    for image, number in zip(images, licenses or []):
        image |= {"license": number, "flickr_url": f"http://flickr/{image['id']}"}
    annotations = [
        {"id": 1000 + k, "image_id": 7 + k, "category_id": category, "iscrowd": 0, "segmentation": [OUTLINE]}
        for k, category in enumerate(categories or [1] * len(names))
    ]
    known = [
        {"id": 1, "name": "person", "supercategory": "person"},
        {"id": 18, "name": "dog", "supercategory": "animal"},
    ]
    return {"images": images, "annotations": annotations, "categories": known}


def test_parts_are_those_of_the_default_checkpoint(command: ModuleType) -> None:
    part_of = sys.modules["layout"].part_of
    assert [part_of(f"airplanes_000{number}.jpg") for number in (1, 3, 7)] == ["train", None, "val"]
    assert part_of("flat_screwdriver") == "val" and part_of("1f30f.webp") == "val"
    names = [f"{number:012d}.jpg" for number in range(1000)]
    assert {part_of(name, share_alike=True) for name in names} == {"val", None}


def test_caltech101(build: Build, command: ModuleType, tmp_path: Path) -> None:
    from scipy.io import savemat

    source = tmp_path / "source"
    for kind in sys.modules["photographs"].KINDS:
        outlines = source / "Annotations" / ("Airplanes_Side_2" if kind == "airplanes" else kind)
        outlines.mkdir(parents=True)
        (source / "101_ObjectCategories" / kind).mkdir(parents=True)
        for part in ("train", "val", None):
            name = next(names_for(command, kind + "_{:04d}.jpg", part))
            photo(source / "101_ObjectCategories" / kind / f"image_{name[-8:]}")
            corners = np.reshape(OUTLINE, (4, 2)).T + 0.5 - np.array([[140], [80]])  # MATLAB counts from 1
            box = np.array([[80, 310, 140, 430]], np.uint16)
            savemat(outlines / f"annotation_{name[-8:-4]}.mat", {"box_coord": box, "obj_contour": corners})
    folder = build("caltech101", source)
    assert len(check_masks(folder, "train")) == len(check_masks(folder, "val")) == 24
    content = json.loads((folder / "instances_val.json").read_text())
    categories = {entry["id"]: entry["name"] for entry in content["categories"]}
    for image, annotation in zip(content["images"], content["annotations"]):
        assert image["file_name"].startswith(categories[annotation["category_id"]] + "_")
    assert content["licenses"][0]["name"] == "CC-BY-4.0"


@pytest.fixture
def coco_source(command: ModuleType, tmp_path: Path) -> Path:
    """COCO's layout: for each licence photos of every part, a crowd, and a photo of two persons and a dog."""
    names, licenses = [], []
    for number in (1, 4, 5, 6, 7):
        for part in ("train", "val"):
            found = names_for(command, f"{number:04d}{{:08d}}.jpg", part, share_alike=False)
            names += [next(found) for _ in range(4)]
            licenses += [number] * 4
    content = coco_file(names, licenses)
    several = content["images"][8]["id"]  # CC BY, of the part train
    content["annotations"] += [
        {"id": 1, "image_id": several, "category_id": 1, "iscrowd": 0, "segmentation": [OUTLINE]},
        {"id": 2, "image_id": several, "category_id": 18, "iscrowd": 0, "segmentation": [OUTLINE]},
        {
            "id": 3,
            "image_id": content["images"][9]["id"],
            "category_id": 18,
            "iscrowd": 1,
            "segmentation": {"size": [400, 600], "counts": [0, 240_000]},
        },
    ]
    source = tmp_path / "source"
    (source / "annotations").mkdir(parents=True)
    (source / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    for name in names:
        photo(source / "val2017" / name)
    return source


def test_coco_trains_on_no_share_alike_picture(build: Build, coco_source: Path) -> None:
    folder = build("coco", coco_source)
    content = {part: json.loads((folder / f"instances_{part}.json").read_text()) for part in ("train", "val")}
    licenses = {part: {image["license"] for image in content[part]["images"]} for part in content}
    assert licenses["train"] == {4, 7} and 5 in licenses["val"] and licenses["val"] <= {4, 5, 7}
    assert all("flickr_url" in image for image in content["train"]["images"])
    assert {entry["id"] for entry in content["train"]["licenses"]} == {4, 5, 7, 8}
    first = CocoSamples(folder / "instances_train.json", folder / "train")
    assert [len(first[index]["masks"]) for index in range(len(first))] == [3] + [
        1
    ] * 7  # and the crowd is none of them
    check_masks(folder, "val")


def test_coco_persons_are_alone(build: Build, coco_source: Path) -> None:
    folder = build("coco_persons", coco_source)
    assert len(check_masks(folder, "train")) == 7
    content = json.loads((folder / "instances_train.json").read_text())
    assert content["categories"] == [{"id": 1, "name": "person"}]


def test_facade_is_split_anew(build: Build, command: ModuleType, tmp_path: Path, capsys) -> None:
    source = tmp_path / "source"
    names = [next(names_for(command, "IMG_{}_png.jpg", part)) for part in ("train", "val", None)]
    for folder, part in zip(("train", "valid", "test"), (names[:1], names[1:], names[:1])):
        exported = [name.replace("_png.jpg", f"_png.rf.{folder}0a1b.jpg") for name in part]
        content = coco_file(exported)
        content["categories"] = [
            {"id": 0, "name": "facade", "supercategory": "none"},
            {"id": 1, "name": "window", "supercategory": "facade"},
        ]
        (source / folder).mkdir(parents=True)
        (source / folder / "_annotations.coco.json").write_text(json.dumps(content))
        for name in exported:
            photo(source / folder / ("images" if folder == "valid" else "") / name)
    folder = build("facade", source)
    assert check_masks(folder, "train") == names[:1] and check_masks(folder, "val") == names[1:2]
    assert json.loads((folder / "instances_val.json").read_text())["categories"] == [{"id": 1, "name": "window"}]
    assert "1 left out" in capsys.readouterr().out
    assert "another picture has the same name" in (folder / "left_out.txt").read_text()


def stand_in_for_opencv() -> SimpleNamespace:
    """What is called of OpenCV: foreground is what differs from the border, or the first guess if nothing does."""
    from scipy import ndimage

    def grab_cut(pixels, start, rectangle, background, foreground, iterations, mode) -> None:
        differs = np.abs(pixels.astype(int) - pixels[start == 0].mean(0)).max(2) > 40
        if differs.any():
            start[...] = np.where(differs, 3, 2)

    def connected_components(mask, connectivity=8) -> tuple[int, np.ndarray]:
        pieces, count = ndimage.label(mask, np.ones((3, 3)) if connectivity == 8 else None)
        return count + 1, pieces

    constants = {"GC_BGD": 0, "GC_FGD": 1, "GC_PR_BGD": 2, "GC_PR_FGD": 3, "GC_INIT_WITH_MASK": 1}
    functions = {"grabCut": grab_cut, "connectedComponents": connected_components, "setRNGSeed": lambda seed: None}
    return SimpleNamespace(**constants, **functions, error=RuntimeError)


def clothing_source(command: ModuleType, folder: Path) -> tuple[Path, list[str]]:
    """A garment for each part, one that cannot be told from its surroundings, shoes, and a missing picture."""
    names = [next(names_for(command, "shirt-{}.jpg", part)) for part in ("train", "val", None)]
    plain, shoes, missing = [name for name, _ in zip(names_for(command, "other-{}.jpg", "train"), range(3))]
    for name in (*names, shoes):
        photo(folder / "images" / name, noise=12.0)
    Image.new("RGB", SIZE, GREY).save(folder / "images" / plain)
    labels = {**dict.fromkeys(names, "T-Shirt"), plain: "Dress", shoes: "Shoes", missing: "Hat"}
    lines = ["image,sender_id,label,kids", *(f"{name[:-4]},1,{label},False" for name, label in labels.items())]
    (folder / "images.csv").write_text("\n".join(lines) + "\n")
    return folder, [*names, plain, missing]


@pytest.mark.parametrize("kind", ["stand-in", "OpenCV"])
def test_clothing(kind: str, build: Build, command: ModuleType, tmp_path: Path, monkeypatch) -> None:
    if kind == "OpenCV":
        pytest.importorskip("cv2")
    else:
        monkeypatch.setitem(sys.modules, "cv2", stand_in_for_opencv())
    source, names = clothing_source(command, tmp_path / "source")
    folder = build("clothing", source)
    assert check_masks(folder, "train") == names[:1] and check_masks(folder, "val") == names[1:2]
    annotation = json.loads((folder / "instances_train.json").read_text())["annotations"][0]
    assert annotation["pseudo"] is True and annotation["category_id"] == 14  # T-Shirt of 16 labels
    left_out = (folder / "left_out.txt").read_text()
    assert f"{names[3]}: two GrabCut runs agree" in left_out and f"{names[4]}: " in left_out


def test_clothing_without_opencv(
    refusal: Callable[..., str], command: ModuleType, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    source, _ = clothing_source(command, tmp_path / "source")
    assert "pip install opencv-python-headless" in refusal("clothing", source)


def drawing(path: Path, color: tuple[int, int, int] = RED) -> None:
    """A disc in the middle of nothing."""
    image = Image.new("RGBA", (64, 64))
    ImageDraw.Draw(image).ellipse((10, 20, 49, 59), fill=(*color, 255))
    path.parent.mkdir(parents=True)
    image.save(path)


def test_fluent3d(build: Build, command: ModuleType, tmp_path: Path) -> None:
    assets = tmp_path / "source" / "assets"
    codes = [next(names_for(command, "1f{:03d} fe0f.webp".replace(" ", "-"), part)) for part in ("train", "val", None)]
    part_of = sys.modules["layout"].part_of
    hands = ([hand, *(f"{hand} 1f3f{letter}" for letter in "bcdef")] for hand in map("2f{:03d}".format, range(1000)))
    tones = next(tones for tones in hands if all(part_of(f"{tone.replace(' ', '-')}.webp") for tone in tones))
    hand = tones[0]
    emoji = {f"thing {code}": {"group": "Objects", "unicode": code[:-5].replace("-", " ")} for code in codes}
    emoji["heart"] = {"group": "Symbols", "unicode": "2764"}
    for name, content in emoji.items():
        drawing(assets / name / "3D" / f"{name}_3d.png")
        (assets / name / "metadata.json").write_text(json.dumps(content))
    for tone in sys.modules["things"].TONES:
        drawing(assets / "hand" / tone / "3D" / "hand_3d.png", GREY)
    content = {"group": "People & Body", "unicode": hand, "unicodeSkintones": tones}
    (assets / "hand" / "metadata.json").write_text(json.dumps(content))
    folder = build("fluent3d", tmp_path / "source")
    index = {part: json.loads((folder / f"index_{part}.json").read_text()) for part in ("train", "val")}
    names = {part: [entry["file_name"] for entry in index[part]["cutouts"]] for part in index}
    assert codes[0] in names["train"] and codes[1] in names["val"]
    assert "2764.webp" not in names["train"] + names["val"]
    assert sorted(name[len(hand) :][:5] for name in names["train"] + names["val"] if name.startswith(hand)) == [
        "-1f3f",
        ".webp",
    ]
    assert all(len(CutoutFolder(folder / part)) == len(names[part]) for part in names)
    cutout = CutoutFolder(folder / "val")[0]
    assert cutout.size == (40, 40) and index["val"]["license"] == "MIT"
    solid = np.asarray(cutout)[..., 3] == 255
    assert solid[20, 20] and not solid[0, 0] and solid.mean() == pytest.approx(np.pi / 4, abs=0.02)


CUBE = """
v -1 -1 -1\nv 1 -1 -1\nv 1 1 -1\nv -1 1 -1\nv -1 -1 1\nv 1 -1 1\nv 1 1 1\nv -1 1 1
vt 0.1 0.1\nvt 0.9 0.1\nvt 0.9 0.9\nvt 0.1 0.9
f 1/1 2/2 3/3 4/4\nf 5/1 6/2 7/3 8/4\nf 1/1 2/2 6/3 5/4
f 2/1 3/2 7/3 6/4\nf 3/1 4/2 8/3 7/4\nf -5/-4 -8/-3 -4/-2 -1/-1
"""


def test_scans3d(build: Build, command: ModuleType, tmp_path: Path) -> None:
    models = tmp_path / "source" / "urdf_models" / "models"
    names = [next(names_for(command, "cup_{}", part)) for part in ("train", "val", None)]
    for name in (*names, "cup_without_texture"):
        (models / name).mkdir(parents=True)
        (models / name / "textured.obj").write_text(CUBE)
        Image.new("RGB", (32, 32), RED).save(models / name / "texture_map.png")
    (models / "cup_without_texture" / "texture_map.png").unlink()
    folder = build("scans3d", tmp_path / "source")
    for part, name in zip(("train", "val"), names):
        entries = json.loads((folder / f"index_{part}.json").read_text())["cutouts"]
        assert [entry["file_name"] for entry in entries] == [f"{name}_{view:02d}.webp" for view in range(6)]
        cutouts = CutoutFolder(folder / part)
        assert len(cutouts) == 6 and cutouts.like(0) == list(range(6))
        for index in range(6):
            pixels = np.asarray(cutouts[index]).astype(int)
            assert max(cutouts[index].size) == 256
            solid = pixels[..., 3] == 255
            rows = np.flatnonzero(solid.any(1))
            assert all(np.ptp(np.flatnonzero(solid[row])) + 1 == solid[row].sum() for row in rows), "holes"
            assert (pixels[solid][:, 0] > 2 * pixels[solid][:, 1]).all(), "not the texture's colour"
            assert np.ptp(pixels[solid][:, 0]) > 10, "all sides are equally bright"


def test_backgrounds_keep_credits(build: Build, tmp_path: Path) -> None:
    source = tmp_path / "source"
    photo(source / "daisy" / "12 34.png")
    photo(source / "tulips" / "56.jpg", (100, 80))
    (source / "LICENSE.txt").write_text("Pictures\n\ntulips/56.jpg CC-BY by Some One - https://example.org/56/\n")
    folder = build("backgrounds", source, "--license", "CC-BY-2.0", "--credit", "unknown")
    photos = json.loads((folder / "index_train.json").read_text())["photos"]
    assert [entry["file_name"] for entry in photos] == ["daisy_12-34.jpg", "tulips_56.jpg"]
    assert [entry["credit"] for entry in photos] == ["unknown", "Some One - https://example.org/56/"]
    assert [(entry["width"], entry["height"]) for entry in photos] == [(384, 256), (100, 80)]
    assert len(ImageFolder(folder / "train")) == 2


def test_same_download_gives_same_files(command: ModuleType, coco_source: Path, tmp_path: Path) -> None:
    for out in ("one", "other"):
        command.main(["coco", str(coco_source), str(tmp_path / out)])
    paths = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert len(paths) > 10
    assert all((tmp_path / "one" / path).read_bytes() == (tmp_path / "other" / path).read_bytes() for path in paths)


def test_damaged_pictures_are_left_out_and_listed(build: Build, coco_source: Path, capsys) -> None:
    content = json.loads((coco_source / "annotations" / "instances_val2017.json").read_text())
    cut, gone, other = [image["file_name"] for image in content["images"][8:11]]  # CC BY, of the part train
    (coco_source / "val2017" / cut).write_bytes((coco_source / "val2017" / cut).read_bytes()[:900])
    (coco_source / "val2017" / gone).unlink()
    photo(coco_source / "val2017" / other, (500, 400))
    folder = build("coco", coco_source)
    assert "3 left out" in capsys.readouterr().out
    reasons = (folder / "left_out.txt").read_text().splitlines()
    assert [line.partition(":")[0] for line in reasons] == [cut, gone, other]
    assert "damaged" in reasons[0] and "missing" in reasons[1] and "500 x 400" in reasons[2]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("caltech101", "101_ObjectCategories"),
        ("coco", "annotations/instances_val2017.json"),
        ("coco_persons", "annotations/instances_val2017.json"),
        ("facade", "_annotations.coco.json"),
        ("clothing", "images.csv"),
        ("fluent3d", "assets/NAME/metadata.json"),
        ("scans3d", "urdf_models/models/NAME/textured.obj"),
        ("backgrounds", ".jpg"),
    ],
)
def test_another_download_is_one_error(
    name: str, expected: str, refusal: Callable[..., str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", stand_in_for_opencv())
    (tmp_path / "source").mkdir()
    (tmp_path / "out").mkdir()
    flags = ["--license", "MIT"] if name == "backgrounds" else []
    message = refusal(name, tmp_path / "source", *flags)
    assert f"SOURCE {tmp_path / 'source'}" in message and expected in message


def test_arguments_are_checked(refusal: Callable[..., str], coco_source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert "SOURCE" in refusal("coco", tmp_path / "nowhere")
    assert "--license" in refusal("backgrounds", coco_source)
    assert "--license and --credit belong to backgrounds" in refusal("coco", coco_source, "--license", "MIT")
    assert "must not lie in SOURCE" in refusal("coco", coco_source, out=coco_source / "out")
    (coco_source / "coco").mkdir()
    (tmp_path / "out" / "coco").mkdir()
    assert "has a folder coco already" in refusal("coco", coco_source)


def test_nothing_to_use_is_an_error(refusal: Callable[..., str], coco_source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    path = coco_source / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for image in content["images"]:
        image["license"] = 1
    path.write_text(json.dumps(content))
    assert "nothing to use" in refusal("coco", coco_source)
    path.write_text('{"images": [{"id": 1}]}')
    assert "is not a COCO instances file" in refusal("coco", coco_source)


def test_folder_is_run_as_a_script(root: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, "argv", ["build_photos", "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(root / "examples" / "build_photos"), run_name="__main__")
    assert stop.value.code == 0 and "caltech101" in capsys.readouterr().out
