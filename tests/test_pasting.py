# SPDX-License-Identifier: Apache-2.0
"""Cut-outs, and pictures they are pasted on: exact masks, what pictures depend on, what cannot be used."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from efficientsam_hf.data import pasting
from efficientsam_hf.data.cutouts import CutoutFolder, ObjectCutouts, cut_out
from efficientsam_hf.data.images import ImageFolder
from efficientsam_hf.data.light import change_light
from efficientsam_hf.data.pasting import PastedPictures


GREY, BEHIND = (120, 120, 120), (250, 0, 250)


class Blobs:
    """Ovals, all of one kind, some of which cannot be read."""

    def __init__(self, count: int = 5, damaged: frozenset[int] = frozenset()):
        self.count, self.damaged = count, damaged

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        if index in self.damaged:
            raise ValueError(f"blob {index} is damaged")
        blob = Image.new("RGBA", (30, 40 + index))
        ImageDraw.Draw(blob).ellipse((1, 1, 28, 38 + index), (40 * index, 200, 90))
        return blob

    def like(self, index: int) -> list[int]:
        return list(range(self.count))


class Backgrounds:
    """Grey pictures of three sizes, the last one tiny, with two rectangles of another colour, which are objects."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict:
        height, width = ((150, 200), (260, 120), (8, 5))[index]
        masks = np.zeros((2, height, width), bool)
        masks[0, height // 4 : height // 2, width // 3 : width] = True
        masks[1, 3 * height // 4 :, : width // 2] = True
        pixels = np.where(masks.any(0)[..., None], BEHIND, GREY).astype(np.uint8)
        return {"image": Image.fromarray(pixels), "masks": masks}


@pytest.fixture
def wholes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Things get hard edges and a colour each, (its number, 77, 0), and nothing else changes colours: the list fills
    with the pixels of each whole thing."""
    sizes: list[int] = []
    turned = pasting._turned

    def turn(cutout, longest, generator):
        thing = turned(cutout, longest, generator)
        alpha = thing.getchannel("A").point(lambda value: 255 * (value >= 128))
        thing = Image.new("RGBA", thing.size, (len(sizes), 77, 0))
        thing.putalpha(alpha)
        sizes.append(alpha.histogram()[255])
        return thing

    monkeypatch.setattr(pasting, "_turned", turn)
    monkeypatch.setattr(pasting, "change_light", lambda image, *_, **__: image)
    monkeypatch.setattr(pasting, "photograph", lambda image, generator: image)
    monkeypatch.setattr(pasting._Canvas, "_darken", lambda *_: None)
    return sizes


def test_masks_are_exactly_what_stays_visible(wholes: list[int]) -> None:
    """Of things in front of each other and beyond the border, and of the background's own objects."""
    pictures, cut, hidden, behind = PastedPictures([(1, Blobs())], [(1, Backgrounds())]), 0, 0, 0
    for index in range(60):
        wholes.clear()
        sample = pictures.picture(index, 96)
        pixels, masks = np.asarray(sample["image"]), sample["masks"]
        assert masks.dtype == bool and masks.shape[1:] == pixels.shape[:2] and sample["image_id"] == index
        shown = np.array([(pixels == (number, 77, 0)).all(-1) for number in range(len(wholes))])
        expected = [seen for seen, whole in zip(shown, wholes) if seen.sum() > 0.25 * whole]
        count = len(masks) - len(expected)
        np.testing.assert_array_equal(masks[count:], np.array(expected).reshape(-1, *pixels.shape[:2]))
        own = masks[:count].any(0)
        assert not (own & (shown.any(0) | (pixels == GREY).all(-1))).any()
        if count == 2:
            assert own[(pixels == BEHIND).all(-1)].all()
        hidden += len(wholes) - len(expected)
        cut += sum(seen[0].any() or seen[:, 0].any() or seen[-1].any() or seen[:, -1].any() for seen in shown)
        behind += count
    assert min(hidden, cut, behind) >= 10


@pytest.mark.parametrize(("middle", "corner"), [((0, 0), np.s_[:12, :12]), ((1, 1), np.s_[-12:, -12:])])
def test_a_thing_is_cut_at_the_border(wholes: list[int], middle, corner) -> None:
    canvas = pasting._Canvas(Image.new("RGB", (40, 40)), np.zeros((0, 40, 40), bool), np.random.default_rng(0))
    canvas.paste(Image.new("RGBA", (20, 20), (9, 9, 9)), np.array(middle))
    expected = np.zeros((1, 40, 40), bool)
    expected[0][corner] = True
    np.testing.assert_array_equal(canvas.masks(), expected)
    np.testing.assert_array_equal(np.asarray(canvas.image)[..., 0], 9 * expected[0])
    canvas.paste(Image.new("RGBA", (60, 60), (9, 9, 9)), np.array(middle))
    assert len(canvas.masks()) == 1 and canvas.masks()[0].sum() == 32**2  # the first is hidden, and no object any more


def test_a_picture_depends_on_seed_number_and_size_alone() -> None:
    def make(seed: int, index: int, side: int = 64) -> tuple[bytes, bytes]:
        sample = PastedPictures([(1, Blobs())], [(1, Backgrounds())], seed).picture(index, side)
        return sample["image"].tobytes(), sample["masks"].tobytes()

    first = [make(1, index) for index in range(4)]
    assert [make(1, index) for index in (3, 2, 1, 0)] == first[::-1]
    assert len({*first, make(2, 0), make(1, 0, 128)}) == 6


def test_what_cannot_be_used_is_drawn_anew() -> None:
    some = PastedPictures([(1, Blobs(damaged=frozenset({0, 2})))], [(1, Backgrounds())])
    assert all(len(some.picture(index, 64)["masks"]) for index in range(8))
    none = PastedPictures([(1, Blobs(2, frozenset({0, 1})))], [(1, Backgrounds())])
    with pytest.raises(ValueError, match=r"none of 200 cut-outs or backgrounds .* could be used: blob \d is damaged"):
        none.picture(0, 64)


def test_weights_say_how_often_each_part_is_taken() -> None:
    one, other = Blobs(damaged=frozenset({0, 1, 2, 3})), Blobs()  # whether many can be used or few
    drawn = [pasting._draw([(3, one), (1, other)], np.random.default_rng(seed))[0] is one for seed in range(400)]
    assert 0.68 < np.mean(drawn) < 0.82


# Cut-outs


def write_cutout(path: Path, mode: str) -> None:
    """A square of 20 pixels in a transparent picture of 60 x 50, in one of the forms that PNG has."""
    inside = np.zeros((50, 60), np.uint8)
    inside[10:30, 5:25] = 255
    picture = Image.new("RGBA", (60, 50), (200, 100, 50))
    picture.putalpha(Image.fromarray(inside))
    options = {}
    if mode == "P":
        picture, options = Image.fromarray(inside // 255), {"transparency": 0}
        picture.putpalette([0, 0, 0, 200, 100, 50])
    elif mode != "RGBA":
        picture = picture.convert(mode)
    picture.save(path, **options)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_cut_out_is_cut_to_what_is_not_transparent(tmp_path: Path, mode: str) -> None:
    write_cutout(tmp_path / "thing.png", mode)
    (thing,) = CutoutFolder(tmp_path)
    assert thing.mode == "RGBA" and thing.size == (20, 20) and thing.getchannel("A").getextrema() == (255, 255)
    assert mode == "LA" or thing.getpixel((3, 3)) == (200, 100, 50, 255)


@pytest.mark.parametrize(
    ("picture", "words"),
    [
        (Image.new("RGB", (9, 9)), "has no transparency"),
        (Image.new("RGBA", (9, 9), (9, 9, 9, 90)), "nowhere more than half opaque"),
        (Image.new("I;16", (9, 9)), "expected 8 bits a channel"),
        (b"no picture", "cannot be read"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "cannot be read"),
    ],
)
def test_pictures_that_are_no_cut_outs_are_named(tmp_path: Path, picture, words: str) -> None:
    path = tmp_path / "thing_1.png"
    path.write_bytes(picture) if isinstance(picture, bytes) else picture.save(path)
    with pytest.raises(ValueError, match=rf"thing_1\.png.* {words}"):
        CutoutFolder(tmp_path)[0]


def test_names_with_a_number_at_the_end_are_of_one_kind(tmp_path: Path) -> None:
    for name in ("cup_00", "cup_01", "cup-2", "cup", "can_00", "other/cup_00"):
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(exist_ok=True)
        write_cutout(path, "RGBA")
    folder = CutoutFolder(tmp_path)
    assert [len(folder.like(index)) for index in range(6)] == [1, 4, 4, 4, 4, 1]
    assert all(index in folder.like(index) for index in range(6))


@pytest.mark.parametrize("kind", [CutoutFolder, ImageFolder])
def test_folders_without_pictures(tmp_path: Path, kind) -> None:
    with pytest.raises(FileNotFoundError, match="missing does not exist"):
        kind(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no pictures"):
        kind(tmp_path)


def objects() -> dict:
    """A picture with a square of 40 pixels, one at the border, a small one and a thin frame."""
    masks = np.zeros((4, 100, 120), bool)
    masks[0, 20:60, 30:70] = True
    masks[1, 60:, 80:] = True
    masks[2, 5:15, 5:60] = True
    masks[3, 10:90, 10:90] = True
    masks[3, 12:88, 12:88] = False
    pixels = np.where(masks[0][..., None], (200, 40, 40), (0, 0, 255)).astype(np.uint8)
    return {"image": Image.fromarray(pixels), "masks": masks, "image_id": "p"}


def test_objects_become_cut_outs_without_what_was_behind_them() -> None:
    cutouts = ObjectCutouts([objects(), objects()], [4, 4])
    assert len(cutouts) == 8 and cutouts.like(4) == [4]
    pixels = np.asarray(cutouts[4]).astype(int)
    assert pixels.shape == (42, 42, 4)
    assert (pixels[5:-5, 5:-5] == (200, 40, 40, 255)).all()
    assert pixels[0, :, 3].max() < 16 and 0 < pixels[1, 20, 3] < 128 <= pixels[2, 20, 3]
    samples = [objects()]
    cutouts = ObjectCutouts(samples, [4])
    for _ in range(2):
        for index, words in ((1, "cut off by the border"), (2, "smaller than 32 pixels"), (3, "too thin")):
            with pytest.raises(ValueError, match=words):
                cutouts[index]
        samples.clear()  # they are not looked at again
    with pytest.raises(ValueError, match="picture p has 4 objects, not 5"):
        ObjectCutouts([objects()], [5])[4]
    with pytest.raises(ValueError, match="smaller"):
        cut_out(objects()["image"], np.zeros((100, 120), bool))


# Light


def test_light_is_changed_alike_all_over_a_picture() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8))
    same = change_light(picture, np.random.default_rng(1), strength=0.0)
    assert same.tobytes() == picture.tobytes()
    double = change_light(picture, np.random.default_rng(1), strength=0.0, exposure=2.0)
    np.testing.assert_array_equal(np.asarray(double), np.minimum(255, 2 * np.asarray(picture).astype(int)))
    one, again, other = (change_light(picture, np.random.default_rng(seed)).tobytes() for seed in (1, 1, 2))
    assert one == again != other and len(one) == len(picture.tobytes())
