# SPDX-License-Identifier: Apache-2.0
"""What a GPU is asked to do, on one that is pretended: the CPU's numbers, on one device, in few operations."""

import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_mixture
import test_sami
import test_segmentation_training
import torch
from accelerate.state import AcceleratorState, PartialState
from pretend_device import PretendDevice, pretended_device
from safetensors.torch import load_file

from efficientsam_hf import (
    EfficientSamMaskGenerator,
    EfficientSamPredictor,
)
from efficientsam_hf.cli import main
from efficientsam_hf.data.scene_bank import SceneBank
from efficientsam_hf.evaluation.miou import evaluate
from efficientsam_hf.models import mask_candidates_efficientsam
from efficientsam_hf.models.fast_decoding_efficientsam import EfficientSamFastDecoder
from efficientsam_hf.training.arguments import TrainerArguments
from efficientsam_hf.training.optimizers import make_optimizers
from efficientsam_hf.training.pretraining import MaskedPretraining
from efficientsam_hf.training.scene_batches import SceneBatches
from efficientsam_hf.training.schedule import Stage
from efficientsam_hf.training.segmentation import InteractiveSegmentation, PromptSampling


LOW = {"pred_iou_thresh": 0.2, "stability_score_thresh": 0.5, "points_per_crop": 6}


@pytest.fixture(scope="module")
def bank() -> SceneBank:
    return SceneBank.build()


@pytest.fixture(params=["cuda:0", pytest.param("mps:0", marks=pytest.mark.slow)])
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendDevice]:
    with pretended_device(monkeypatch, request.param) as device:
        yield device


def moved(values: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in values.items()}


def test_what_is_pretended(gpu: PretendDevice) -> None:
    ones = torch.ones(3, device=gpu.device)
    assert ones.device == gpu.device and (ones + 1).device == gpu.device and ones.cpu().device.type == "cpu"
    near, one = torch.ones(3), torch.tensor(1.0)
    index, far_index = torch.tensor([0, 2]), torch.tensor([0, 2], device=gpu.device)
    for mistake in (
        lambda: ones + near,
        lambda: torch.cat([ones, near]),
        lambda: torch.stack([ones.sum(), one]),
        lambda: ones @ near,
        lambda: near[far_index],
        lambda: ones.index_put((index,), torch.ones(2)),
        lambda: near.index_put_((index,), ones[:2]),
        lambda: one.add_(ones.sum()),
    ):
        with pytest.raises(RuntimeError, match="expected all tensors on one device"):
            mistake()
    assert (ones[index] + one).tolist() == [2, 2]
    if gpu.device.type == "mps":
        for mistake in (lambda: ones.double(), lambda: ones.take(far_index)):
            with pytest.raises((TypeError, NotImplementedError), match="MPS"):
                mistake()
    with pytest.raises(TypeError, match="can't convert (cuda|mps):0"):
        ones.numpy()
    with pytest.raises(RuntimeError, match="Expected a (cuda|mps):0 device type for generator but found cpu"):
        torch.rand(3, generator=torch.Generator(), device=gpu.device)
    gpu.launches.clear(), gpu.waits.clear()
    view = ones[1:]
    view += 2
    assert ones.tolist() == [1, 3, 3] and gpu.launches["add_"] == 1 and gpu.waits.total() == 1
    assert float(ones[ones > 2].sum()) == 6 and gpu.waits["index"] == gpu.waits["_local_scalar_dense"] == 1


@pytest.mark.parametrize("dense", [False, True], ids=["boxes as corners", "boxes as masks too"])
@pytest.mark.parametrize("prompts", ["points", "boxes", "masks", "all"])
def test_the_model(gpu, model, processor, picture, prompts: str, dense: bool) -> None:
    given: dict[str, Any] = {}
    if prompts in ("points", "all"):
        given |= {"input_points": [[[100, 60], [20, 20]], [[40, 100]]], "input_labels": [[1, 0], [1]]}
    if prompts in ("boxes", "all"):
        given |= {"input_boxes": [[20, 20, 120, 90], [5, 60, 90, 140]]}
    given = {name: [value] for name, value in given.items()}
    if prompts in ("masks", "all"):
        given["input_masks"] = torch.randn(1, 2, 1, 64, 64)
    model = copy.deepcopy(model)
    model.prompt_encoder.dense_boxes = dense
    inputs = processor(images=picture, return_tensors="pt", **given)
    with torch.no_grad():
        expected = model(**inputs)
        result = model.to(gpu.device)(**moved(inputs, gpu.device))
    for name in ("pred_masks", "iou_scores"):
        assert result[name].device == gpu.device
        torch.testing.assert_close(result[name].cpu(), expected[name], rtol=0, atol=1e-4)
    masks = processor.post_process_masks(result.pred_masks, inputs["original_sizes"], object_mask=result.object_mask)
    assert masks[0].device == gpu.device and masks[0].shape == (2, 3, 150, 230)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crops_n_layers": 1, "crop_n_points_downscale_factor": 3},
        {"max_hole_area": 60, "max_sprinkle_area": 60},
        {"stability_score_thresh": 0.0, "crops_nms_thresh": 0.2, "output_type": "rle"},
        {"points_per_batch": 5},
    ],
    ids=["low thresholds", "crops", "small regions", "no stability", "small batches"],
)
def test_everything(gpu, model, processor, picture, options) -> None:
    options = {"output_type": "coco_rle", **LOW, **options}
    expected = EfficientSamMaskGenerator(model, processor, **options)(picture)
    result = EfficientSamMaskGenerator(copy.deepcopy(model).to(gpu.device), processor, **options)(picture)
    assert len(result["masks"]) > 8 and result["masks"] == expected["masks"]
    for name in ("scores", "boxes", "areas", "points", "stability_scores"):
        torch.testing.assert_close(result[name], expected[name], rtol=0, atol=1e-4)


def test_logits_that_find_no_room_are_decoded_again(gpu, model, processor, picture, monkeypatch) -> None:
    generator = EfficientSamMaskGenerator(copy.deepcopy(model).to(gpu.device), processor, **LOW)
    again = []
    decode = EfficientSamFastDecoder.__call__
    monkeypatch.setattr(EfficientSamFastDecoder, "__call__", lambda *a: again.append(len(a[1])) or decode(*a))
    expected = generator(picture, output_type="coco_rle")
    assert not again
    monkeypatch.setattr(mask_candidates_efficientsam, "HELD_CELLS_ELSEWHERE", 10 * 64 * 64)
    assert generator(picture, output_type="coco_rle")["masks"] == expected["masks"]
    assert sum(again) > 10


def test_everything_takes_few_operations_for_many_masks(gpu, model, processor, picture) -> None:
    """A mask on its own would be dozens of them, and several transfers: on a real device each has its price."""
    generator = EfficientSamMaskGenerator(copy.deepcopy(model).to(gpu.device), processor, output_type="coco_rle")
    counted = []
    for threshold in (0.35, 0.0):
        gpu.launches.clear(), gpu.waits.clear()
        result = generator(picture, points_per_crop=8, pred_iou_thresh=threshold, stability_score_thresh=0.0)
        counted.append((len(result["masks"]), gpu.launches.total(), gpu.waits.total()))
    (few, launches, waits), (many, more_launches, more_waits) = counted
    assert many - few > 30
    assert more_launches - launches < 4 * (many - few) and more_waits - waits < many - few


def test_the_predictor(gpu, model, processor, picture) -> None:
    answers = []
    for used in (model, copy.deepcopy(model).to(gpu.device)):
        predictor = EfficientSamPredictor(used, processor)
        predictor.set_image(picture)
        _, scores, low = predictor.predict([[100, 60], [20, 20]], [1, 0])
        box = np.array([20, 20, 120, 90])
        answers.append((scores, *predictor.predict(box=box, mask_input=low[scores.argmax()][None])[:2]))
    for one, other in zip(*answers, strict=True):
        np.testing.assert_allclose(one.astype(float), other.astype(float), atol=1e-3)


def test_evaluation(gpu, model, processor, picture) -> None:
    masks = torch.zeros(2, 150, 230, dtype=torch.bool)
    masks[0, 30:90, 40:140] = masks[1, 100:130, 20:60] = True
    samples = [{"image": picture, "masks": masks}]
    options = {"prompts": ("uniform", "center", "box"), "clicks": (1, 2), "progress": False}
    expected = evaluate(model, processor, samples, **options)
    result = evaluate(copy.deepcopy(model), processor, samples, device=gpu.device, **options)
    assert result.keys() == expected.keys() and "center:2" in result
    for name in ("uniform", "uniform:2", "center", "center:2", "box"):
        assert result[name] == pytest.approx(expected[name], abs=1e-3)


def finetuning() -> InteractiveSegmentation:
    sampling = PromptSampling(rounds=2, mask_prompts=0.5)
    return InteractiveSegmentation(test_segmentation_training.tiny_model(dense_boxes=True), sampling=sampling)


def pretraining() -> MaskedPretraining:
    return MaskedPretraining(test_sami.tiny_model())


@pytest.mark.parametrize("gpu", ["cuda:0", "mps:0"], indirect=True)
@pytest.mark.parametrize(
    ("build", "batch"),
    [(finetuning, test_segmentation_training.example_batch()), (pretraining, test_sami.example())],
    ids=["finetuning", "pretraining"],
)
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_steps_of_training(gpu, build, batch, optimizer: str) -> None:
    losses = []
    arguments = TrainerArguments(output_dir="unused", max_steps=1, learning_rate=1e-3, optimizer=optimizer)
    for device in (torch.device("cpu"), gpu.device):
        module = build().to(device)
        module.picture(moved(batch, device))
        optimizers = make_optimizers(module, arguments, fused=False)
        own = moved(batch, device)
        losses.append([])
        for _ in range(2):
            loss = module(own)["loss"]
            loss.backward()
            for one in optimizers:
                one.step()
                one.zero_grad()
            losses[-1].append(loss.item())
    assert np.isfinite(losses).all() and losses[1][0] != losses[1][1]
    if gpu.device.type == "cuda" or build is pretraining:  # clicks are drawn from other numbers without float64
        assert losses[1] == pytest.approx(losses[0], abs=1e-4)


def test_scenes(gpu, bank) -> None:
    """The same on every device, where objects are chosen by the same numbers."""
    stage = Stage(0.0, 64, 2)
    banks = bank, bank.to(gpu.device)
    expected, result = (SceneBatches(one, (stage,), seed=1, objects=3).batch(0, stage) for one in banks)
    assert result["masks"].device == gpu.device
    for name, value in expected.items():
        torch.testing.assert_close(result[name].cpu(), value, rtol=0, atol=1e-4)


def test_a_mixture(gpu, bank, tmp_path: Path) -> None:
    """A batch of photos, pasted pictures and scenes is on the device, as it would be on the CPU, and trains there."""
    folder, stage = test_mixture.write_files(tmp_path / "data").parent, Stage(0.0, 64, 16)
    expected, batch = (
        test_mixture.make(folder, own, device=own.device, seed=5).batch(0, stage)
        for own in (bank, bank.to(gpu.device))
    )
    assert batch["source"].tolist() == expected["source"].tolist() and len(set(batch["source"].tolist())) == 3
    for name in ("pixel_values", "masks", "object_mask", "source"):
        assert batch[name].device == gpu.device
        torch.testing.assert_close(batch[name].cpu(), expected[name], rtol=0, atol=1e-4)
    model, names = test_segmentation_training.tiny_model(), ("photos", "pasted", "scenes")
    module = InteractiveSegmentation(model, sources=names).to(gpu.device)
    arguments = TrainerArguments(output_dir="unused", max_steps=1)
    (optimizer,) = make_optimizers(module, arguments, fused=False)
    losses = []
    for _ in range(2):
        output = module(batch)
        output["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(output["loss"].item())
    assert np.isfinite(losses).all() and losses[0] != losses[1]
    assert all(0 <= output[f"miou/{name}"].item() <= 1 for name in names)


def test_the_command(gpu, photo, tmp_path: Path) -> None:
    photo.resize((230, 150)).save(tmp_path / "photo.png")
    flags = ["segment", str(tmp_path / "photo.png"), "--device", str(gpu.device)]
    assert main([*flags, "--point", "100,60", "--box", "20,20,120,90", "-o", str(tmp_path / "prompts")]) == 0
    assert main([*flags, "--everything", "--points-per-crop", "4", "-o", str(tmp_path / "all")]) == 0
    assert gpu.launches["addmm"] > 100
    for name in ("prompts", "all"):
        assert json.loads((tmp_path / name / "masks.json").read_text())


def test_a_run_and_its_resumption(gpu, bank, tmp_path: Path, monkeypatch) -> None:
    """Training, pictures, evaluation, checkpoints and export; gone on with after the last checkpoint is lost."""
    for state in (PartialState, AcceleratorState):  # which all that trains in this process shares
        monkeypatch.setattr(state, "_shared_state", {})
    monkeypatch.setattr(PartialState, "default_device", property(lambda state: gpu.device))
    monkeypatch.setattr(SceneBank, "build", lambda seed=0, device="cpu": bank.to(device))
    due = ["--log-every", "1", "--evaluate-every", "2", "--picture-every", "2", "--checkpoint-every", "1"]
    flags = ["--recipe", "smoke", "--no-cpu", "--image-sizes", "64", "--batch-size", "2", "--evaluate-scenes", "2"]
    flags += [*due, "--max-steps", "3", "--optimizer", "muon", "--output-dir", str(tmp_path)]
    assert main(["finetune", *flags]) == 0
    weights = load_file(tmp_path / "model" / "model.safetensors")
    shutil.rmtree(tmp_path / "checkpoints" / "step_3")
    shutil.rmtree(tmp_path / "model")
    assert main(["finetune", *flags, "--resume"]) == 0
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = {}
    for row in log:
        if row["event"] == "train":
            losses.setdefault(row["step"], []).append(row["loss"])
    assert len(losses[1]) == 1 and len(losses[3]) == 2 and losses[3][0] == pytest.approx(losses[3][1], abs=1e-5)
    for name, value in load_file(tmp_path / "model" / "model.safetensors").items():
        torch.testing.assert_close(value, weights[name], rtol=0, atol=1e-5)
