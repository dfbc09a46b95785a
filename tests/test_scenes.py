# SPDX-License-Identifier: Apache-2.0
"""Generated scenes: exact, seeded, independent of the batch, the same at every size; what they contain."""

import hashlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from efficientsam_hf.data.outlines import polygon_distance
from efficientsam_hf.data.scene_bank import SceneBank
from efficientsam_hf.data.scene_layout import DRAWS, SLOTS, lay_out
from efficientsam_hf.data.scenes import SceneBatch, render_scenes, scene_dataset, scene_seed


@pytest.fixture(scope="module")
def bank() -> SceneBank:
    return SceneBank.build()


@pytest.fixture(scope="module")
def batch(bank: SceneBank) -> SceneBatch:
    return render_scenes(bank, range(32), image_size=128)


def equal(left: SceneBatch, right: SceneBatch) -> bool:
    return all(torch.equal(value, getattr(right, name)) for name, value in vars(left).items())


def part(batch: SceneBatch, scenes: slice) -> SceneBatch:
    return SceneBatch(**{name: value[scenes] for name, value in vars(batch).items()})


def test_a_polygon_has_its_exact_signed_distance() -> None:
    square = torch.tensor([[[-0.5, -0.5], [0.5, -0.5], [0.5, 0.5], [-0.5, 0.5]]])
    distance = polygon_distance(square, size=4)[0]  # texel centres at -0.75, -0.25, 0.25, 0.75
    assert distance[1, 1] == pytest.approx(0.25)
    assert distance[0, 1] == pytest.approx(-0.25)
    assert distance[0, 0] == pytest.approx(-(0.125**0.5))


def test_textures_repeat_without_a_seam(bank: SceneBank) -> None:
    tile = bank.textures[0, :, : 256 + 2, : 256 + 2]
    assert torch.equal(tile[:, :, 0], tile[:, :, -2])
    assert torch.equal(tile[:, -1], tile[:, 1])
    assert abs(float(tile[0, 1:-1, 1:-1].mean())) < 0.05


def test_images_are_pictures_in_steps_of_a_byte(batch: SceneBatch) -> None:
    assert batch.images.shape == (32, 3, 128, 128) and batch.images.dtype == torch.float32
    assert batch.images.min() >= 0 and batch.images.max() <= 1
    assert torch.equal((batch.images * 255).round() / 255, batch.images)
    assert batch.images.flatten(1).std(1).min() > 0.01, "a scene is blank"


def test_masks_are_the_visible_layers_of_the_objects(batch: SceneBatch) -> None:
    objects = torch.stack([areas.topk(4).indices for areas in batch.areas])
    masks = batch.masks(objects)
    assert masks.shape == (32, 4, 128, 128) and masks.dtype == torch.bool
    scene, row = 3, 2
    expected = torch.zeros(128, 128, dtype=torch.bool)
    for segment in batch.membership[scene, objects[scene, row]].nonzero()[:, 0]:
        expected |= batch.segments[scene] == segment
    assert torch.equal(masks[scene, row], expected)
    torch.testing.assert_close(masks.float().mean((2, 3)), batch.areas.gather(1, objects))


def test_used_objects_are_neither_tiny_nor_everything_and_differ(batch: SceneBatch) -> None:
    used = batch.areas > 0
    assert torch.equal(batch.membership.any(-1), used), "an unused row has members"
    assert batch.areas[used].min() >= 0.002 and batch.areas[used].max() <= 0.9
    for scene in range(4):
        rows = used[scene].nonzero()[:, 0]
        masks = batch.masks(rows.expand(32, -1))[scene].flatten(1).float()
        overlap = masks @ masks.T
        union = masks.sum(1)[:, None] + masks.sum(1) - overlap
        assert (overlap / union).fill_diagonal_(0).max() <= 0.951


def test_scenes_have_several_objects_of_all_sizes_and_parts_of_objects(batch: SceneBatch) -> None:
    used = batch.areas > 0
    assert 7 < used.sum(1).float().mean() < 25
    areas = batch.areas[used]
    assert (areas < 0.02).float().mean() > 0.1 and (areas > 0.2).float().mean() > 0.05
    members = batch.membership.float()
    shared = members @ members.transpose(1, 2)
    sizes = members.sum(-1)
    inside = (shared == sizes[:, :, None]) & (sizes[:, :, None] < sizes[:, None]) & used[:, :, None]
    assert inside.any(1).any(1).float().mean() > 0.7, "few scenes have an object within an object"


@pytest.mark.parametrize("size", [64, 66, 256])
def test_a_scene_does_not_depend_on_its_batch(bank: SceneBank, size: int) -> None:
    together = render_scenes(bank, [11, 3, 7, 100, 8, 2], image_size=size)
    for position, index in enumerate([11, 3, 7]):
        alone = render_scenes(bank, [index], image_size=size)
        assert equal(alone, part(together, slice(position, position + 1)))


def test_a_call_can_be_repeated_and_leaves_the_generator_alone(bank: SceneBank, batch: SceneBatch) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = render_scenes(bank, range(32), image_size=128)
    assert torch.equal(before, torch.get_rng_state())
    assert equal(again, batch)


def test_other_seeds_and_indices_give_other_scenes(bank: SceneBank) -> None:
    pictures = [render_scenes(bank, [index], seed, 64).images for seed in (0, 1, -1) for index in (0, 1, 2)]
    # A seed that was added to the index would make scene 1 of seed 0 scene 0 of seed 1.
    for first in range(9):
        for second in range(first):
            assert (pictures[first] - pictures[second]).abs().mean() > 0.01


def test_seeds_are_spread_over_63_bits() -> None:
    seeds = {scene_seed(seed, index) for seed in range(-20, 20) for index in range(500)}
    assert len(seeds) == 20_000
    assert min(seeds) >= 0 and 2**62 < max(seeds) < 2**63


def test_a_larger_picture_shows_the_same_scene(bank: SceneBank) -> None:
    small, large = (render_scenes(bank, range(8), image_size=size) for size in (128, 256))
    reduced = torch.nn.functional.avg_pool2d(large.images, 2)
    assert (reduced - small.images).abs().mean() < 0.06
    assert (large.segments[:, ::2, ::2] == small.segments).float().mean() > 0.95


def test_windows_do_not_cut_things_off(bank: SceneBank) -> None:
    tables = lay_out(bank, torch.rand(24, DRAWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    indices = [k for k, slot in enumerate(SLOTS) if slot.role == "body" and slot.window > 1]
    half = torch.tensor([0.5 / SLOTS[k].window for k in indices])
    # The half sizes of an outline's tile are the lengths of the inverse matrix's rows, inverted.
    longest = (1 / tables.inverse[:, indices].norm(dim=-1)).amax(-1)
    assert (longest * 0.93 <= half).all()


def test_bank_is_the_same_every_time(bank: SceneBank) -> None:
    again = SceneBank.build()
    assert torch.equal(again.outlines, bank.outlines) and torch.equal(again.textures, bank.textures)
    assert torch.equal(again.warps, bank.warps) and torch.equal(again.noise, bank.noise)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"indices": []}, "indices must be"),
        ({"indices": [0, -1]}, "indices must be"),
        ({"indices": [0], "image_size": 255}, "image_size must be"),
        ({"indices": [0], "image_size": 32}, "image_size must be"),
        ({"indices": [0], "image_size": 2048}, "image_size must be"),
    ],
)
def test_bad_arguments_are_named(bank: SceneBank, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        render_scenes(bank, **arguments)


def test_masks_of_another_batch_size_are_refused(batch: SceneBatch) -> None:
    with pytest.raises(ValueError, match=r"objects must be \(B, Q\) with B = 32"):
        batch.masks(torch.zeros(3, 2, dtype=torch.long))


def test_dataset_yields_pictures_with_their_masks(bank: SceneBank) -> None:
    pytest.importorskip("datasets")
    samples = list(scene_dataset(seed=4, image_size=64, count=5, bank=bank, batch_size=2))
    expected = render_scenes(bank, range(5), seed=4, image_size=64)
    assert len(samples) == 5
    for index, sample in enumerate(samples):
        assert isinstance(sample["image"], Image.Image) and sample["image"].size == (64, 64)
        pixels = torch.frombuffer(bytearray(sample["image"].tobytes()), dtype=torch.uint8).view(64, 64, 3)
        assert torch.equal(pixels.permute(2, 0, 1), (expected.images[index] * 255).round().byte())
        rows = (expected.areas[index] > 0).nonzero()[:, 0]
        masks = expected.masks(rows.expand(5, -1))[index]
        assert torch.equal(torch.as_tensor(sample["masks"]), masks)


def test_dataset_without_datasets_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError, match=r"efficientsam-hf\[train\]"):
        scene_dataset()


def test_sheet_is_drawn(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, root / "examples" / "draw_scenes.py", tmp_path / "sheet.png"]
    command += ["--count", "9", "--size", "64", "--masks"]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    with Image.open(tmp_path / "sheet.png") as image:
        assert image.size == (512, 192)
    assert "9 scenes" in process.stdout


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_renders_the_same_scenes(batch: SceneBatch) -> None:
    other = render_scenes(SceneBank.build(device="cuda"), range(32), image_size=128)
    assert other.images.is_cuda and other.areas.is_cuda
    assert (other.segments.cpu() == batch.segments).float().mean() > 0.999
    assert (other.images.cpu() - batch.images).abs().mean() < 0.002


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Small pictures on a busy machine: threads that wait for each other cost more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_no_two_of_ten_thousand_scenes_are_equal(bank: SceneBank) -> None:
    digests = set()
    for first in range(0, 10_000, 50):
        images = render_scenes(bank, range(first, first + 50), image_size=64).images
        digests |= {hashlib.sha256(picture.numpy().tobytes()).hexdigest() for picture in images}
    assert len(digests) == 10_000
