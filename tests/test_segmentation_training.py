# SPDX-License-Identifier: Apache-2.0
"""The training module on a tiny model: what it asks the model, what it trains, what it depends on."""

import pytest
import torch
from torch import nn

from efficientsam_hf import EfficientSamConfig, EfficientSamModel
from efficientsam_hf.data.prompts import tight_boxes
from efficientsam_hf.data.scene_bank import SceneBank
from efficientsam_hf.training.attention import use_matrix_products
from efficientsam_hf.training.normalization import denormalize, normalize
from efficientsam_hf.training.scene_batches import SceneBatches, choose_objects
from efficientsam_hf.training.schedule import Stage
from efficientsam_hf.training.segmentation import InteractiveSegmentation, PromptSampling


def tiny_model(**prompt_encoder) -> EfficientSamModel:
    torch.manual_seed(0)
    config = EfficientSamConfig(
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "output_channels": 16,
            "image_size": 64,
        },
        prompt_encoder_config={"hidden_size": 16, "mask_input_channels": 16, **prompt_encoder},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    return EfficientSamModel(config)


def example_batch(seed: int = 3) -> dict[str, torch.Tensor]:
    """Two images of 64 pixels with three rectangles; the last one of the second image is padding."""
    masks = torch.zeros(2, 3, 64, 64, dtype=torch.bool)
    for index, (left, top, right, bottom) in enumerate([(4, 8, 30, 40), (33, 2, 60, 20), (1, 44, 63, 47)]):
        masks[:, index, top:bottom, left:right] = True
    object_mask = torch.ones(2, 3, dtype=torch.bool)
    object_mask[1, 2] = False
    masks[1, 2] = False
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "masks": masks, "object_mask": object_mask, "seed": torch.tensor(seed)}


def test_metrics_of_each_source_of_a_batch() -> None:
    module = InteractiveSegmentation(tiny_model(), sampling=PromptSampling(rounds=2), sources=["a", "b", "empty"])
    batch = example_batch()
    alone = [module({**batch, "source": torch.tensor([number, number])}) for number in (0, 1)]
    assert alone[0]["miou/a"] == alone[0]["miou"] == alone[1]["miou/b"] and alone[0]["miou/b"].isnan()
    both = module({**batch, "source": torch.tensor([1, 0])})
    assert (3 * both["miou/b"] + 2 * both["miou/a"]) / 5 == pytest.approx(both["miou"].item())
    assert both["miou/empty"].isnan() and both["loss"] == alone[0]["loss"]
    assert not any(name.startswith("miou/") for name in module(batch))


class Recorder:
    """Stands where the prompt decoder does and notes its prompts."""

    def __init__(self, model: EfficientSamModel):
        self.calls: list[dict[str, torch.Tensor]] = []
        self.decode = model.decode_prompts
        model.decode_prompts = self

    def __call__(self, embeddings, **prompt):
        self.calls.append(prompt)
        return self.decode(embeddings, **prompt)


def record(sampling: PromptSampling, **prompt_encoder) -> list[dict[str, torch.Tensor]]:
    model = tiny_model(**prompt_encoder)
    recorder = Recorder(model)
    module = InteractiveSegmentation(model, sampling=sampling)
    for seed in range(20):
        module(example_batch(seed))
    return recorder.calls


def test_every_parameter_gets_a_gradient() -> None:
    module = InteractiveSegmentation(tiny_model(), sampling=PromptSampling(rounds=3, mask_prompts=0.5))
    for seed in range(6):
        for head in module.model.mask_decoder.output_hypernetworks_mlps:
            nn.init.normal_(head.proj_out.bias)  # so that each of the three masks is the best one somewhere
        module(example_batch(seed))["loss"].backward()
    still = [name for name, p in module.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # Padding is masked out, so its embedding is never used; the CLS slot of the table belongs to pretraining.
    assert still == ["model.prompt_encoder.padding_embed.weight"]


def test_prompts_depend_on_the_seed_alone() -> None:
    module = InteractiveSegmentation(tiny_model())
    first = module(example_batch(1))
    torch.rand(3)
    again, other = module(example_batch(1)), module(example_batch(2))
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    assert first["loss"] != other["loss"]


@pytest.mark.parametrize("kind", ["uniform", "center", "box", "box_and_point"])
def test_first_prompts_of_each_kind(kind) -> None:
    weights = dict.fromkeys(("uniform", "center", "box", "box_and_point"), 0.0) | {kind: 1.0}
    batch = example_batch()
    real, masks = batch["object_mask"], batch["masks"]
    for call in record(PromptSampling(**weights, rounds=1)):
        points, labels, boxes = (
            call["input_points"][:, :, 0].long(),
            call["input_labels"][:, :, 0],
            call["input_boxes"],
        )
        assert call["input_points"].shape == (2, 3, 1, 2) and "input_masks" not in call
        assert (labels[real] == (-1 if kind == "box" else 1)).all() and (labels[~real] == -1).all()
        assert ((boxes != -1).any(-1) == (real & torch.tensor(kind in ("box", "box_and_point")))).all()
        inside = masks.flatten(2).gather(2, (points[..., 1:] * 64 + points[..., :1]))[..., 0]
        assert inside[real].all()
        if kind == "center":
            assert (call["input_points"][0, 0, 0] - torch.tensor([17.0, 24.0])).abs().max() <= 4


@pytest.mark.parametrize("part", ["encoder", "prompt_encoder", "mask_decoder"])
def test_frozen_parts_stay_as_they_are(part) -> None:
    module = InteractiveSegmentation(tiny_model())
    module.freeze([part])
    module(example_batch())["loss"].backward()
    names = {"encoder": ("model.vision_encoder.", "model.neck.")}.get(part, (f"model.{part}.",))
    frozen = [p for name, p in module.named_parameters() if name.startswith(names)]
    assert frozen and all(p.grad is None and not p.requires_grad for p in frozen)
    assert any(p.grad is not None for p in module.parameters())


def test_with_masks_frozen_only_the_predicted_iou_is_trained() -> None:
    module = InteractiveSegmentation(tiny_model())
    module.freeze(["encoder", "prompt_encoder", "masks"])
    module(example_batch())["loss"].backward()
    trained = {name for name, p in module.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in module.named_parameters() if ".iou_prediction_head." in name} != set()


def test_depths_count_the_layers_above() -> None:
    config = EfficientSamConfig.from_preset("ti", vision_config={"num_hidden_layers": 3, "image_size": 64})
    depths = InteractiveSegmentation(EfficientSamModel(config)).depths()
    assert {depth for name, depth in depths.items() if ".layers.0." in name and "vision_encoder" in name} == {3}
    assert {depth for name, depth in depths.items() if ".layers.2." in name and "vision_encoder" in name} == {1}
    assert {depth for name, depth in depths.items() if "vision_encoder.embeddings" in name} == {4}
    assert {depth for name, depth in depths.items() if "vision_encoder" not in name} == {0}


def test_boxes_are_exact_as_often_as_asked() -> None:
    weights = {"uniform": 0.0, "center": 0.0, "box": 1.0, "box_and_point": 0.0, "rounds": 1}
    batch = example_batch()
    real = batch["object_mask"]
    tight = tight_boxes(batch["masks"])[real]
    shares, distances = {}, {}
    for name, sampling in (
        ("always", PromptSampling(**weights, exact_boxes=1.0)),
        ("half", PromptSampling(**weights, exact_boxes=0.5)),
        ("never", PromptSampling(**weights)),
        ("less noise", PromptSampling(**weights, box_noise=0.02)),
    ):
        shifts = torch.stack([call["input_boxes"][real] - tight for call in record(sampling)])
        shares[name] = (shifts == 0).all(-1).float().mean().item()
        distances[name] = shifts.abs().mean().item()
    assert shares["always"] == 1 and shares["never"] == 0
    assert 0.3 < shares["half"] < 0.7
    assert distances["less noise"] < 0.4 * distances["never"]


@pytest.mark.parametrize("name, of_clicks, of_boxes", [("focal_alpha", 0.4, 0.7), ("relaxation", 0.0, 1.0)])
def test_objects_with_a_box_may_have_weights_of_their_own(name, of_clicks, of_boxes) -> None:
    """All objects in a box: the loss is that of the box's value. None: it is that of the other."""
    for box, expected, wrong in ((1.0, of_boxes, of_clicks), (0.0, of_clicks, of_boxes)):
        sampling = PromptSampling(uniform=1.0 - box, center=0.0, box=box, box_and_point=0.0)
        model = tiny_model()
        both = InteractiveSegmentation(model, None, sampling, {name: of_clicks}, {name: of_boxes})
        one = InteractiveSegmentation(model, None, sampling, {name: expected})
        other = InteractiveSegmentation(model, None, sampling, {name: wrong})
        losses = [module(example_batch())["loss"] for module in (both, one, other)]
        torch.testing.assert_close(losses[0], losses[1])
        assert losses[0] != losses[2]


def test_rounds_keep_prompts_and_add_corrections() -> None:
    calls = record(PromptSampling(rounds=3, corrected_objects=2, mask_prompts=1.0))
    masks = example_batch()["masks"]
    seen = set()
    for first, second, third in zip(calls[::3], calls[1::3], calls[2::3], strict=True):
        assert [call["input_points"].shape[1:3] for call in (first, second, third)] == [(3, 3), (2, 3), (2, 3)]
        for before, after, slot in ((first, second, 1), (second, third, 2)):
            assert torch.equal(before["input_points"][:, :2, :slot], after["input_points"][:, :, :slot])
            assert torch.equal(before["input_boxes"][:, :2], after["input_boxes"])
            assert (before["input_labels"][:, :2, slot] == -1).all()
            points, labels = after["input_points"][:, :, slot].long(), after["input_labels"][:, :, slot]
            inside = masks[:, :2].flatten(2).gather(2, points[..., 1:] * 64 + points[..., :1])[..., 0]
            assert torch.equal(inside.long(), labels)
            assert after["input_masks"].shape == (2, 2, 1, 16, 16) and (after["input_masks"] != 0).any()
            assert not after["input_masks"].requires_grad
            seen |= set(labels.flatten().tolist())
    assert seen == {0, 1}


def test_switched_off_prompts_are_not_given() -> None:
    calls = record(PromptSampling(rounds=3, mask_prompts=1.0), background_points=False, mask_prompts=False)
    assert all("input_masks" not in call and not (call["input_labels"] == 0).any() for call in calls)


def test_padding_objects_change_nothing() -> None:
    module = InteractiveSegmentation(tiny_model(), sampling=PromptSampling(rounds=1, uniform=0, center=1, box=0))
    batch = example_batch()
    loss = module(batch)["loss"]
    changed = batch | {"masks": batch["masks"].clone()}
    changed["masks"][1, 2] = True  # what stands in a padding slot is of no account
    torch.testing.assert_close(module(changed)["loss"], loss)


def test_training_overfits_two_images() -> None:
    model = tiny_model()
    use_matrix_products(model)
    module = InteractiveSegmentation(model, sampling=PromptSampling(rounds=1))
    optimizer = torch.optim.AdamW(module.parameters(), lr=5e-3)
    losses = []
    for seed in range(60):
        loss = module(example_batch(seed % 5))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.6 * sum(losses[:5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrix_products_give_the_same_answers(dtype, tmp_path) -> None:
    module = InteractiveSegmentation(tiny_model().to(dtype), sampling=PromptSampling(rounds=1))
    batch = example_batch() | {"pixel_values": example_batch()["pixel_values"].to(dtype)}
    expected, _ = module.predict(batch)
    use_matrix_products(module.model)
    actual, _ = module.predict(batch)
    torch.testing.assert_close(actual, expected, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=0.0)
    module.save_pretrained(tmp_path)
    assert "matrix_products" not in (tmp_path / "config.json").read_text()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns about itself while it compiles
def test_compiled_parts_give_the_same_loss_and_gradients() -> None:
    results = []
    for compiled in (False, True):
        module = InteractiveSegmentation(tiny_model(), sampling=PromptSampling(rounds=2, corrected_objects=2))
        if compiled:
            module.compile_parts()
        loss = module(example_batch())["loss"]
        loss.backward()
        results.append((loss, module.model.neck.conv1.weight.grad))
    for eager, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, eager, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("rounds", 0),
        ("corrected_objects", 0),
        ("mask_prompts", 1.5),
        ("exact_boxes", -0.1),
        ("box_noise", -0.1),
        ("uniform", -1.0),
    ],
)
def test_bad_sampling_is_named(field, value) -> None:
    with pytest.raises(ValueError, match="first prompt" if field == "uniform" else field):
        PromptSampling(**{field: value})


def test_normalize_and_back() -> None:
    images = torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(denormalize(normalize(images)), images)


def test_chosen_objects_are_real_distinct_and_balanced() -> None:
    areas = torch.zeros(400, 12)
    areas[:, :8], areas[:, 8], areas[:, 9] = 0.02, 0.2, 0.95  # eight alike, one large, one too large, two unused
    indices, real = choose_objects(areas, 2, torch.Generator().manual_seed(0), 0.001, 0.9)
    assert real.all() and (indices[:, 0] != indices[:, 1]).all() and indices.max() == 8
    assert (indices == 8).any(1).float().mean() > 0.5  # drawn without weights it would be 2 / 9
    few = torch.tensor([[0.1, 0.0, 0.3]])
    indices, real = choose_objects(few, 5, torch.Generator().manual_seed(0), 0.001, 0.9)
    assert real.tolist() == [[True, True, False, False, False]]
    assert set(indices[0, :2].tolist()) == {0, 2}


@pytest.fixture(scope="module")
def bank() -> SceneBank:
    return SceneBank.build()


def test_scene_batches_depend_on_their_number(bank) -> None:
    stage = Stage(0.0, 64, 2)
    source = SceneBatches(bank, (stage,), seed=1, objects=3)
    iterator = source(0, stage)
    _, second = next(iterator), next(iterator)
    again = next(source(1, stage))
    ahead = next(SceneBatches(bank, (stage,), seed=1, objects=3, workers=1)(1, stage))
    for name, value in second.items():
        assert torch.equal(value, again[name]) and torch.equal(value, ahead[name])
    assert second["masks"].shape == (2, 3, 64, 64) and second["pixel_values"].shape == (2, 3, 64, 64)
    assert torch.equal(second["masks"].flatten(2).any(-1), second["object_mask"])


def test_scenes_are_split_between_processes_without_overlap(bank) -> None:
    stages = (Stage(0.0, 64, 4), Stage(0.5, 64, 2))
    images = []
    for stage, number in ((stages[0], 0), (stages[0], 1), (stages[1], 2)):
        for rank in range(2):
            source = SceneBatches(bank, stages, rank=rank, processes=2, objects=1)
            images += list(source.batch(number, stage)["pixel_values"])
    assert len(images) == 20
    assert len({image.numpy().tobytes() for image in images}) == 20
