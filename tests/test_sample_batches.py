# SPDX-License-Identifier: Apache-2.0
"""Annotated pictures as batches: order, repetition, what is left out, and how pictures and masks are changed."""

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf import EfficientSamImageProcessor
from efficientsam_hf.data.augmentation import Augmentation
from efficientsam_hf.training.mask_preparation import CANDIDATES, MaskPreparation, stretch_masks
from efficientsam_hf.training.sample_batches import SampleBatches
from efficientsam_hf.training.schedule import Stage


STAGE = Stage(0.0, 32, 2)


def picture(index: int, size: tuple[int, int] = (40, 60), objects: int = 2) -> dict:
    """A grey picture whose tone is its index, with rectangles of tone 200 + k that are its masks."""
    pixels = np.full((*size, 3), index, np.uint8)
    masks = np.zeros((objects, *size), bool)
    for k in range(objects):
        masks[k, 10 : 10 + 4 * (k + 1), 8 + 16 * k : 20 + 16 * k] = True
        pixels[masks[k]] = 200 + k
    return {"image": Image.fromarray(pixels), "masks": masks}


class Damaged(list):
    """Samples of which some cannot be read."""

    def __init__(self, samples, damaged):
        super().__init__(samples)
        self.damaged = damaged

    def __getitem__(self, index):
        if index in self.damaged:
            raise ValueError(f"picture {index} is truncated")
        return super().__getitem__(index)


def make(samples, **options) -> SampleBatches:
    processor = EfficientSamImageProcessor(size=32, do_normalize=False, antialias=True)
    own = {name: options.pop(name) for name in ("objects", "min_area", "augmentation") if name in options}
    return SampleBatches(samples, MaskPreparation(processor, **{"objects": 3, **own}), **options)


def tones(batch) -> list[int]:
    """Which pictures a batch holds."""
    return (batch["pixel_values"][:, 0, 0, 0] * 255).round().int().tolist()


def test_shapes_and_padding() -> None:
    batch = make([picture(7)]).batch(0, STAGE)
    assert batch["pixel_values"].shape == (2, 3, 32, 32) and batch["masks"].shape == (2, 3, 32, 32)
    assert batch["object_mask"].tolist() == [[True, True, False]] * 2
    assert batch["masks"].flatten(2).any(2).tolist() == batch["object_mask"].tolist()


def test_masks_lie_on_their_pixels() -> None:
    batch = make([picture(7, (64, 64))]).batch(0, STAGE)
    bright = batch["pixel_values"][0, 0] > 0.5
    assert torch.equal(batch["masks"][0].any(0), bright)


def test_an_epoch_holds_every_sample_once_and_the_next_has_another_order() -> None:
    batches = make([picture(index) for index in range(10)])
    order = [tone for number in range(10) for tone in tones(batches.batch(number, STAGE))]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != order[10:] and order[:10] != list(range(10))


def test_batches_depend_on_their_number_alone() -> None:
    samples = [picture(index, objects=3) for index in range(5)]
    batches = make(samples, objects=2, augmentation=Augmentation(0.5, 0.5, 2.0))
    stream = batches(0, STAGE)
    third = [next(stream) for _ in range(4)][3]
    again = next(make(samples, objects=2, augmentation=Augmentation(0.5, 0.5, 2.0), workers=1)(3, STAGE))
    assert third.keys() == again.keys() == {"pixel_values", "masks", "object_mask", "seed"}
    assert all(torch.equal(third[name], again[name]) for name in third)
    assert not torch.equal(third["seed"], batches.batch(4, STAGE)["seed"])


def test_processes_share_an_epoch() -> None:
    samples = [picture(index) for index in range(8)]
    seen = [
        tone
        for rank in (0, 1)
        for number in (0, 1)
        for tone in tones(make(samples, rank=rank, processes=2).batch(number, STAGE))
    ]
    assert sorted(seen) == list(range(8))


def test_objects_of_other_sizes_are_left_out() -> None:
    whole = picture(3)
    whole["masks"][0] = True
    batch = make([whole]).batch(0, STAGE)
    assert batch["object_mask"].sum(1).tolist() == [1, 1]
    with pytest.raises(ValueError, match=r"picture no. 3: none of 2 objects covers 0\.5 to 0\.9"):
        make([picture(3) | {"image_id": "no. 3"}], min_area=0.5).batch(0, STAGE)


def test_damaged_samples_are_replaced_and_named_once() -> None:
    named = []
    samples = Damaged([picture(index) for index in range(4)], {1, 2})
    batches = make(samples, report=lambda index, reason: named.append((index, reason)))
    stream = batches(0, STAGE)
    seen = {tone for _ in range(8) for tone in tones(next(stream))}
    assert seen == {0, 3}
    assert sorted(named) == [(1, "picture 1 is truncated"), (2, "picture 2 is truncated")]


def test_only_damaged_samples_are_an_error() -> None:
    samples = Damaged([picture(index) for index in range(3)], {0, 1, 2})
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^none of 3 training samples.*is truncated$"):
            next(make(samples, workers=workers)(0, STAGE))


def test_masks_of_another_size_than_their_picture_are_skipped_with_both_sizes() -> None:
    odd = picture(0) | {"masks": np.ones((1, 10, 10), bool)}
    numbers = picture(0) | {"masks": np.full((1, 40, 60), 255, np.uint8)}
    for wrong, words in ((odd, r"bool of shape \(1, 10, 10\)"), (numbers, r"uint8 of shape \(1, 40, 60\)")):
        with pytest.raises(ValueError, match=rf"like their picture, got {words}"):
            make([wrong], augmentation=Augmentation(0, 1, 3)).batch(0, STAGE)


def test_a_change_that_leaves_no_object_is_not_made() -> None:
    corner = picture(9, objects=1)
    corner["masks"][:] = False
    corner["masks"][0, :4, :4] = True
    batch = make([corner], augmentation=Augmentation(0, 1.25, 1.25)).batch(0, Stage(0.0, 32, 32))
    assert batch["object_mask"].sum() == 32 and not batch["skipped"]
    assert len(batch["masks"][:, 0].flatten(1).sum(1).unique()) > 1  # some windows do hold it


def test_stages_have_their_own_order() -> None:
    batches = make([picture(index) for index in range(10)])
    first, second = ([t for n in range(5) for t in tones(batches.batch(n, Stage(s, 32, 2)))] for s in (0.0, 0.5))
    assert sorted(first) == sorted(second) and first != second


def test_stretched_masks_keep_thin_objects() -> None:
    masks = torch.zeros(2, 64, 64, dtype=torch.bool)
    masks[0, 16:32, 16:48] = True
    masks[1, 5, :] = True
    stretched = stretch_masks(masks, 16)
    assert stretched[0].nonzero().aminmax() == (torch.tensor(4), torch.tensor(11))
    assert stretched[0].sum() == 4 * 8
    assert stretched[1].sum() == 16
    assert torch.equal(stretch_masks(masks, 128), masks.repeat_interleave(2, 1).repeat_interleave(2, 2))


@pytest.mark.parametrize(
    ("augmentation", "scale_of", "count"),
    [(Augmentation(0.5, light=1), None, 3), (Augmentation(0, 0.5, 2), None, CANDIDATES * 3), (Augmentation(), 64, 12)],
)
def test_of_many_objects_few_are_changed_with_their_picture(augmentation, scale_of, count, monkeypatch) -> None:
    """As many as are trained; more where a change of scale can lose some, or parts are shown, which lose most."""
    changed, change = [], Augmentation.__call__
    monkeypatch.setattr(Augmentation, "__call__", lambda *given: changed.append(given[1]["masks"]) or change(*given))
    processor = EfficientSamImageProcessor(size=32, do_normalize=False)
    preparation = MaskPreparation(processor, 3, augmentation=augmentation, scale_of=scale_of)
    sample, seen = {**picture(5), "masks": np.zeros((40, 40, 60), bool)}, set()
    sample["masks"][np.arange(40), :, np.arange(40)] = True
    for seed in range(40):
        changed.clear()
        row = preparation(sample, 32, np.random.default_rng(seed))
        assert len(changed[0]) == count and row["object_mask"].any()
        seen |= set(changed[0].any(1).argmax(1).tolist())
    assert len(seen) > 30  # not always the same


def test_objects_that_are_large_enough_only_in_a_part_of_the_picture_are_trained() -> None:
    masks, pixels = np.zeros((2, 64, 64), bool), np.zeros((64, 64, 3), np.uint8)
    masks[0, 5:25, 5:25] = masks[1, 40:44, 40:44] = True  # the second covers 0.004 of the picture
    pixels[masks[0]], pixels[masks[1]] = 100, 200
    sample = {"image": Image.fromarray(pixels), "masks": masks}
    processor = EfficientSamImageProcessor(size=64, do_normalize=False)
    for scale, expected in ((1.0, {False}), (4.0, {False, True})):
        preparation = MaskPreparation(processor, 1, 0.01, augmentation=Augmentation(0, 1, scale))
        rows = [preparation(sample, 64, np.random.default_rng(seed)) for seed in range(60)]
        assert all(row["object_mask"].all() for row in rows)
        assert {float(row["pixel_values"][0][row["masks"][0]].median()) > 150 / 255 for row in rows} == expected


@pytest.mark.parametrize("augmentation", [Augmentation(flip=1.0), Augmentation(0.5, 0.3, 3.0), Augmentation()])
def test_augmentation_keeps_masks_on_their_pixels(augmentation) -> None:
    sample = picture(5, (50, 70))
    sizes, areas = set(), []
    for seed in range(30):
        changed = augmentation(sample, np.random.default_rng(seed))
        pixels = np.asarray(changed["image"])[..., 0]
        sizes.add(pixels.shape)
        for k, mask in enumerate(changed["masks"]):
            tone = pixels.astype(int)
            np.testing.assert_array_equal(mask[tone == 200 + k], True)  # what is between them at an edge is mixed
            np.testing.assert_array_equal(mask[tone < 60], False)
            areas.append(mask.sum())
    assert (len(sizes) > 5) == (augmentation.max_scale > 1)
    assert (min(areas) < 0.5 * sample["masks"].sum((1, 2)).min()) == (augmentation.min_scale < 1)
    if augmentation.flip == 1:
        np.testing.assert_array_equal(changed["masks"], sample["masks"][:, :, ::-1])


@pytest.mark.parametrize("scale_of", [None, 128])
def test_crops_show_objects_at_the_scale_of_the_last_stage(scale_of) -> None:
    processor = EfficientSamImageProcessor(size=128, do_normalize=False, antialias=True)
    preparation = MaskPreparation(processor, objects=1, scale_of=scale_of)
    sample = picture(5, (96, 96), objects=1)  # 12 x 4 pixels: 16 x 5.3 of 128, 4 x 1.3 of 32
    drawn = [preparation(sample, 32, np.random.default_rng(seed)) for seed in range(80)]
    areas = torch.stack([row["masks"].sum() for row in drawn]).float()
    whole = areas.max()  # some crops cut the object, others miss it and give the whole picture
    assert (abs(whole - 85) < 20) if scale_of else (abs(whole - 5.3) < 2)
    assert all(row["pixel_values"][0][row["masks"][0]].mean() > 0.5 for row in drawn)
    last = preparation(sample, 128, np.random.default_rng(0))
    assert abs(last["masks"].sum() - 85) < 20
    many = MaskPreparation(processor, objects=24, scale_of=scale_of)
    assert len(many(sample, 64, np.random.default_rng(0))["masks"]) == (6 if scale_of else 24)
    assert len(many.stand_in(64, [])["masks"]) == (6 if scale_of else 24)


def test_augmentation_is_drawn_from_its_generator() -> None:
    augmentation, sample = Augmentation(0.5, 0.5, 2.0), picture(5)
    one, two, other = (augmentation(sample, np.random.default_rng(seed))["masks"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, two)
    assert one.shape != other.shape


def test_light_changes_pictures_and_leaves_masks() -> None:
    sample = picture(5)
    dark, bright = (Augmentation(0.5, 0.5, 2.0, light)(sample, np.random.default_rng(3)) for light in (0.0, 1.0))
    np.testing.assert_array_equal(dark["masks"], bright["masks"])
    assert dark["image"].size == bright["image"].size and dark["image"].tobytes() != bright["image"].tobytes()
    with pytest.raises(ValueError, match="light must be a strength from 0 to 5, got -1"):
        Augmentation(light=-1)


@pytest.mark.parametrize(("flip", "low", "high"), [(1.5, 1, 1), (0, 2, 1), (0, 0.01, 1), (0, 1, 30)])
def test_bad_augmentation(flip: float, low: float, high: float) -> None:
    with pytest.raises(ValueError, match="flip" if flip else "min_scale"):
        Augmentation(flip, low, high)
