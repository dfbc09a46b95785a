# SPDX-License-Identifier: Apache-2.0
"""The model: its interface, prompts and batches, precision, attention, compilation, saving."""

import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pretend_device import pretended_device
from safetensors.torch import load_file, save_file
from torch.nn.attention.flex_attention import flex_attention
from transformers import AttentionInterface, AutoBackbone
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from efficientsam_hf import (
    EfficientSamBackbone,
    EfficientSamConfig,
    EfficientSamModel,
    EfficientSamVisionConfig,
    EfficientSamVisionModel,
)
from efficientsam_hf.models import modeling_efficientsam
from efficientsam_hf.models.modeling_efficientsam import fill_boxes, place_pixels
from efficientsam_hf.models.modeling_efficientsam_vision import sine_cosine_table


VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "output_channels": 32}
DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32}


def tiny_config(**prompt_encoder: Any) -> EfficientSamConfig:
    return EfficientSamConfig(
        vision_config=dict(VISION),
        prompt_encoder_config={"hidden_size": 32, "mask_input_channels": 4, **prompt_encoder},
        mask_decoder_config=dict(DECODER),
    )


def tiny_model(attention: str = "sdpa", **prompt_encoder: Any) -> EfficientSamModel:
    torch.manual_seed(0)
    model = EfficientSamModel._from_config(tiny_config(**prompt_encoder), attn_implementation=attention).eval()
    # A fresh model's norms scale by one and its biases are zero, which would hide a mistake in either.
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def model() -> EfficientSamModel:
    return tiny_model()


@pytest.fixture(scope="module")
def folder(model: EfficientSamModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(path)
    return path


@pytest.fixture
def pixel_values() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def prompts() -> dict[str, torch.Tensor]:
    """Two images with three objects of two points each; boxes and masks too."""
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(2, 3, 2, generator=generator) * 30
    return {
        "input_points": torch.rand(2, 3, 2, 2, generator=generator) * 64,
        "input_labels": torch.tensor([[[1, 0], [1, 1], [0, 1]], [[1, 1], [1, 0], [1, 1]]]),
        "input_boxes": torch.cat([corner, corner + 20], dim=-1),
        "input_masks": torch.randn(2, 3, 1, 16, 16, generator=generator),
    }


@pytest.fixture
def points(prompts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: prompts[name] for name in ("input_points", "input_labels")}


def assert_same(first: torch.Tensor, second: torch.Tensor, tolerance: float = 2e-5) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=tolerance)


# Interface


@torch.no_grad()
def test_outputs_are_those_of_sam(model, pixel_values, points) -> None:
    outputs = model(pixel_values, **points)
    assert outputs.pred_masks.shape == (2, 3, 3, 16, 16)
    assert outputs.iou_scores.shape == (2, 3, 3)
    assert outputs.object_mask.shape == (2, 3)
    assert list(outputs) == ["iou_scores", "pred_masks", "object_mask"]
    assert outputs.object_mask.dtype == torch.bool and outputs.object_mask.all()
    as_tuple = model(pixel_values, return_dict=False, **points)
    assert isinstance(as_tuple, tuple)
    for value, expected in zip(as_tuple, outputs.to_tuple(), strict=True):
        assert torch.equal(value, expected)


@torch.no_grad()
def test_multimask_output_chooses_mask_tokens(model, pixel_values, prompts) -> None:
    embeddings = model.get_image_embeddings(pixel_values)
    masks, iou_scores, object_mask = model.decode_prompts(embeddings, **prompts)
    assert masks.shape == (2, 3, 4, 16, 16) and iou_scores.shape == (2, 3, 4) and object_mask.shape == (2, 3)
    three = model(image_embeddings=embeddings, **prompts)
    one = model(image_embeddings=embeddings, multimask_output=False, **prompts)
    assert torch.equal(three.pred_masks, masks[:, :, 1:]) and torch.equal(three.iou_scores, iou_scores[:, :, 1:])
    assert torch.equal(one.pred_masks, masks[:, :, :1]) and torch.equal(one.iou_scores, iou_scores[:, :, :1])


@torch.no_grad()
def test_embed_once_prompt_many(model, pixel_values, prompts) -> None:
    embeddings = model.get_image_embeddings(pixel_values)
    assert embeddings.shape == (2, 32, 4, 4)
    for names in (["input_points", "input_labels"], ["input_boxes"], ["input_masks"], list(prompts)):
        chosen = {name: prompts[name] for name in names}
        direct, later = model(pixel_values, **chosen), model(image_embeddings=embeddings, **chosen)
        assert torch.equal(direct.pred_masks, later.pred_masks)
        assert torch.equal(direct.iou_scores, later.iou_scores)


@torch.no_grad()
def test_labels_left_out_mean_the_object(model, pixel_values, points) -> None:
    implicit = model(pixel_values, input_points=points["input_points"])
    explicit = model(pixel_values, points["input_points"], torch.ones(2, 3, 2, dtype=torch.long))
    assert torch.equal(implicit.pred_masks, explicit.pred_masks)
    assert not torch.equal(implicit.pred_masks, model(pixel_values, **points).pred_masks)


@torch.no_grad()
def test_sizes_from_the_processor_are_ignored(model, pixel_values, points) -> None:
    sizes = {"original_sizes": torch.tensor([[1, 2], [3, 4]]), "reshaped_input_sizes": torch.tensor([[5, 6], [7, 8]])}
    assert torch.equal(model(pixel_values, **points, **sizes).pred_masks, model(pixel_values, **points).pred_masks)


def test_unknown_keyword_is_refused(model, pixel_values, points) -> None:
    vision = EfficientSamVisionModel(model.config.vision_config)
    backbone = EfficientSamBackbone(model.config.vision_config)
    embeddings = model.get_image_embeddings(pixel_values)
    for call in (
        lambda: backbone(pixel_values, point_labels=1),
        lambda: model.decode_prompts(embeddings, point_labels=1, **points),
        lambda: model(pixel_values, point_labels=1, **points),
        lambda: model.get_image_embeddings(pixel_values, point_labels=1),
        lambda: vision(pixel_values, point_labels=1),
    ):
        with pytest.raises(TypeError, match="unexpected keyword argument 'point_labels'"):
            call()


@torch.no_grad()
def test_standard_keywords_are_accepted_and_causal_attention_is_not(model, pixel_values, points) -> None:
    embeddings = model.get_image_embeddings(pixel_values, return_dict=False)
    assert torch.equal(embeddings, model.get_image_embeddings(pixel_values))
    with pytest.raises(TypeError, match="unexpected keyword argument 'is_causal'"):
        model(pixel_values, is_causal=True, **points)


@torch.no_grad()
def test_no_prompt_is_an_error_of_the_decoder_too(model, pixel_values) -> None:
    with pytest.raises(ValueError, match="no prompt"):
        model.decode_prompts(model.get_image_embeddings(pixel_values))


@torch.no_grad()
def test_intermediate_outputs(pixel_values, points) -> None:
    model = tiny_model("eager")
    outputs = model(pixel_values, output_hidden_states=True, output_attentions=True, **points)
    assert [tuple(state.shape) for state in outputs.vision_hidden_states] == [(2, 16, 32)] * 3
    assert [tuple(weights.shape) for weights in outputs.vision_attentions] == [(2, 2, 16, 16)] * 2
    for weights in outputs.vision_attentions + outputs.mask_decoder_attentions:
        assert_same(weights.sum(-1), torch.ones(weights.shape[:-1]))
    assert len(outputs.mask_decoder_attentions) == 7  # three in each of two blocks, and the last
    # 5 tokens of the decoder and 2 points, for each of 2 x 3 objects
    assert outputs.mask_decoder_attentions[0].shape == (6, 2, 7, 7)
    assert model(pixel_values, **points).vision_hidden_states is None


def test_vision_model_gives_intermediate_outputs(pixel_values) -> None:
    vision = EfficientSamVisionModel._from_config(EfficientSamVisionConfig(**VISION), attn_implementation="eager")
    outputs = vision(pixel_values, output_hidden_states=True, output_attentions=True)
    assert outputs.last_hidden_state.shape == (2, 32, 4, 4)
    assert len(outputs.hidden_states) == 3 and len(outputs.attentions) == 2
    assert torch.equal(vision(pixel_values, return_dict=False)[0], outputs.last_hidden_state)


# Gradients


def test_gradients_flow_through_image_embeddings(model, pixel_values) -> None:
    pixel_values.requires_grad_()
    model.get_image_embeddings(pixel_values).square().mean().backward()
    assert pixel_values.grad.abs().sum() > 0
    model.zero_grad()


def loss_of(model: EfficientSamModel, pixel_values: torch.Tensor, prompts: dict[str, torch.Tensor]) -> torch.Tensor:
    masks, iou_scores, _ = model.decode_prompts(model.get_image_embeddings(pixel_values), **prompts)
    return masks.sigmoid().square().mean() + iou_scores.square().mean()


def test_every_parameter_learns(pixel_values, prompts) -> None:
    model = tiny_model()
    prompts["input_masks"][0, 0] = 0  # so that the embedding for "no mask" takes part
    loss_of(model, pixel_values, prompts).backward()
    without = {name for name, parameter in model.named_parameters() if parameter.grad is None}
    still = {name for name, parameter in model.named_parameters() if name not in without and not parameter.grad.any()}
    assert without == set()
    assert still == {"prompt_encoder.padding_embed.weight"}  # only the six-token rule reads it


def test_gradient_checkpointing_changes_no_gradient(pixel_values, prompts) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model().train()
        calls = []
        model.vision_encoder.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        if checkpointing:
            # transformers 5.23 renames it
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        loss_of(model, pixel_values, prompts).backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([parameter.grad for parameter in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        assert_same(plain, checkpointed, 1e-6)


# Errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_points": None, "input_labels": None, "input_boxes": None, "input_masks": None}, "no prompt"),
        (
            {"input_points": torch.rand(2, 0, 2, 2), "input_labels": None, "input_boxes": None, "input_masks": None},
            "no prompt: there is no object in",
        ),
        ({"input_points": torch.rand(2, 3, 2)}, r"input_points has shape \(2, 3, 2\)"),
        ({"input_points": torch.rand(2, 3, 2, 3)}, r"input_points has shape \(2, 3, 2, 3\)"),
        ({"input_labels": torch.ones(2, 3)}, r"input_labels has shape \(2, 3\)"),
        ({"input_labels": torch.ones(2, 3, 1)}, r"input_labels has shape \(2, 3, 1\), expected that of the points"),
        ({"input_boxes": torch.rand(2, 4)}, r"input_boxes has shape \(2, 4\)"),
        ({"input_boxes": torch.rand(2, 3, 5)}, r"input_boxes has shape \(2, 3, 5\)"),
        ({"input_boxes": torch.rand(2, 2, 4)}, "number of objects.*'input_boxes': 2"),
        ({"input_boxes": torch.rand(3, 3, 4)}, "input_boxes is for 3 images, but there are 2"),
        ({"input_masks": torch.rand(2, 3, 16, 16)}, r"input_masks has shape \(2, 3, 16, 16\)"),
        ({"input_masks": torch.rand(2, 3, 1, 64, 64)}, r"input_masks has shape .* expected \(images, objects, 1, 16"),
        ({"input_points": None}, "input_labels is given without input_points"),
    ],
)
def test_malformed_prompts_are_refused(model, pixel_values, prompts, change, message) -> None:
    with pytest.raises(ValueError, match=message):
        model(pixel_values, **{**prompts, **change})


def test_exactly_one_image_argument(model, pixel_values, points) -> None:
    message = "exactly one of pixel_values and image_embeddings"
    with pytest.raises(ValueError, match=message):
        model(**points)
    with pytest.raises(ValueError, match=message):
        model(pixel_values, image_embeddings=torch.zeros(2, 32, 4, 4), **points)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((3, 64, 64), r"pixel_values has shape \(3, 64, 64\)"),
        ((1, 4, 64, 64), r"pixel_values has shape \(1, 4, 64, 64\)"),
        ((1, 3, 64, 70), "64 x 70 pixels, expected multiples of 16"),
        ((1, 3, 0, 64), "0 x 64 pixels"),
    ],
)
def test_malformed_images_are_refused(model, shape, message) -> None:
    with pytest.raises(ValueError, match=message):
        model.get_image_embeddings(torch.zeros(shape))


def test_malformed_embeddings_are_refused(model, points) -> None:
    with pytest.raises(ValueError, match=r"image_embeddings has shape \(32, 4, 4\)"):
        model(image_embeddings=torch.zeros(32, 4, 4), **points)


NAN, INF = float("nan"), float("inf")


@torch.no_grad()
@pytest.mark.parametrize("value", [NAN, INF, -INF, 1e10])
@pytest.mark.parametrize(
    ("name", "index"),
    [("input_points", (1, 2, 1, 0)), ("input_boxes", (0, 1, 3)), ("input_masks", (1, 0, 0, 7, 9))],
)
def test_values_that_are_not_finite_are_refused(model, pixel_values, prompts, name, index, value) -> None:
    prompts[name][index] = value
    words = f"{name} of image {index[0]}, object {index[1]}.* holds .*, expected finite numbers"
    embeddings = model.get_image_embeddings(pixel_values)
    calls = [
        lambda: model(pixel_values, **prompts),
        lambda: model(image_embeddings=embeddings, **prompts),
        lambda: model.decode_prompts(embeddings, **prompts),
        lambda: model(pixel_values, **{name: prompts[name].double()}),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=words):
            call()


def test_answers_that_overflow_do_not_end_training(pixel_values, prompts) -> None:
    """They are the next round's masks; in half precision the scaler of the loss leaves such a step out."""
    model = tiny_model()
    prompts["input_masks"][0, 1] = INF
    with pytest.raises(ValueError, match="input_masks of image 0, object 1 holds inf"):
        model(pixel_values, **prompts)
    assert not model.train()(pixel_values, **prompts).pred_masks.isfinite().all()
    prompts["input_points"][0, 1] = INF
    with pytest.raises(ValueError, match="input_points of image 0, object 1 holds inf"):
        model(pixel_values, **prompts)


@torch.no_grad()
@pytest.mark.parametrize(
    "prompt",
    [
        {"input_points": torch.ones(2, 3, 2, 2), "input_labels": torch.full((2, 3, 2), -1)},
        {"input_points": torch.ones(2, 3, 0, 2)},
        {"input_boxes": torch.full((2, 3, 4), -1.0)},
        {"input_masks": torch.zeros(2, 3, 1, 16, 16)},
    ],
    ids=lambda prompt: next(iter(prompt)),
)
def test_padding_alone_is_no_prompt(model, pixel_values, prompts, prompt) -> None:
    with pytest.raises(ValueError, match="no prompt: expected at least one of input_points, input_boxes and"):
        model(pixel_values, **prompt)
    # Batches of training may have no object; and beside other prompts padding says nothing.
    assert not model.decode_prompts(model.get_image_embeddings(pixel_values), **prompt)[2].any()
    others = {name: prompts[name] for name in ("input_points", "input_boxes", "input_masks") if name not in prompt}
    together = model(pixel_values, **prompt, **others)
    assert together.object_mask.all()
    assert_same(together.pred_masks, model(pixel_values, **others).pred_masks)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"input_points": [[[[1, 2]]]]},
            TypeError,
            r"input_points is a list, expected a tensor of shape \(images, obj",
        ),
        ({"input_boxes": "box"}, TypeError, "input_boxes is a str, expected a tensor"),
        ({"input_masks": torch.zeros(2, 3, 1, 16, 16).cfloat()}, ValueError, "input_masks holds torch.complex64"),
        ({"input_labels": torch.full((2, 3, 2), NAN)}, ValueError, r"input_labels holds \[nan"),
        ({"input_labels": torch.full((2, 3, 2), 0.5)}, ValueError, r"input_labels holds \[0.5\], expected 1"),
        ({"pixel_values": [1]}, TypeError, r"pixel_values is a list, expected a tensor of shape \(B, 3, H, W\)"),
        ({"pixel_values": torch.zeros(2, 3, 64, 64).cfloat()}, ValueError, "pixel_values holds torch.complex64"),
        (
            {"pixel_values": None, "image_embeddings": torch.zeros(2, 7, 4, 4)},
            ValueError,
            r"image_embeddings has shape \(2, 7, 4, 4\), expected \(images, 32, h, w\)",
        ),
    ],
)
def test_things_that_are_no_such_tensors_are_named(model, pixel_values, prompts, change, error, message) -> None:
    with pytest.raises(error, match=message):
        model(**{"pixel_values": pixel_values, **prompts, **change})


@pytest.mark.parametrize(("names", "training", "reads"), [("plm", True, 1), ("pb", False, 1), ("b", True, 0)])
def test_values_are_read_from_the_device_at_once(prompts, monkeypatch, names: str, training: bool, reads: int) -> None:
    """Training, whose prompts have labels, waits once for its device; where labels are left out, not at all."""
    model, waits = tiny_model().train(training), []
    parts = {"p": "input_points", "l": "input_labels", "b": "input_boxes", "m": "input_masks"}
    with pretended_device(monkeypatch) as device:
        model = model.to(device.device)
        given = {parts[name]: prompts[parts[name]].to(device.device) for name in names}
        embeddings = torch.randn(2, 32, 4, 4).to(device.device)
        for _ in range(2):
            device.waits.clear()
            model.decode_prompts(embeddings, **given)
            waits.append(device.waits.total())
            monkeypatch.setattr(modeling_efficientsam, "_can_be_read", lambda tensor: False)
    assert waits[0] - waits[1] == reads


def test_prompts_are_checked_before_the_image_is_encoded(model, pixel_values, points) -> None:
    calls = []
    handle = model.vision_encoder.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="input_boxes"):
        model(pixel_values, input_boxes=torch.rand(3, 3, 4), **points)
    with pytest.raises(ValueError, match="input_labels"):
        model(pixel_values, input_points=points["input_points"], input_labels=torch.ones(2, 3))
    handle.remove()
    assert not calls


# What a checkpoint knows


def test_switched_off_prompts_are_refused(pixel_values, prompts) -> None:
    model = tiny_model(background_points=False, mask_prompts=False)
    names = dict(model.named_parameters())
    assert not any("background_embed" in name or "mask_embed" in name for name in names)
    with pytest.raises(ValueError, match="input_labels has a 0.*background_points is off"):
        model(pixel_values, prompts["input_points"], prompts["input_labels"])
    with pytest.raises(ValueError, match="input_masks is given.*mask_prompts is off"):
        model(pixel_values, input_masks=prompts["input_masks"])


@torch.no_grad()
def test_background_points_and_masks_change_the_answer(model, pixel_values, prompts) -> None:
    plain = model(pixel_values, prompts["input_points"]).pred_masks
    background = model(pixel_values, prompts["input_points"], prompts["input_labels"]).pred_masks
    masked = model(pixel_values, prompts["input_points"], input_masks=prompts["input_masks"]).pred_masks
    # Objects 1 of the first image, 0 and 2 of the second have no background point.
    assert torch.equal((plain != background).flatten(2).any(-1), (prompts["input_labels"] == 0).any(-1))
    assert (plain != masked).flatten(2).any(-1).all()


@torch.no_grad()
def test_all_zero_mask_is_none(model, pixel_values, points, prompts) -> None:
    without = model(pixel_values, **points)
    zero = model(pixel_values, input_masks=torch.zeros(2, 3, 1, 16, 16), **points)
    assert_same(without.pred_masks, zero.pred_masks)
    mixed = prompts["input_masks"].clone()
    mixed[:, 1] = 0
    mixed = model(pixel_values, input_masks=mixed, **points)
    full = model(pixel_values, input_masks=prompts["input_masks"], **points)
    assert_same(mixed.pred_masks[:, 1], without.pred_masks[:, 1])
    assert_same(mixed.pred_masks[:, ::2], full.pred_masks[:, ::2])


def test_boxes_are_filled_to_parts_of_cells() -> None:
    """Cells of 4 x 4 pixels, each as far from -8 to 8 as the box covers it."""
    boxes = torch.tensor([[[4.0, 4, 12, 8], [0, 0, 1, 16], [-1, -1, -1, -1], [-9, -9, 99, 99]]])
    first, thin, none, whole = fill_boxes(boxes, (16, 24))[0, :, 0]
    inside = torch.zeros(4, 6, dtype=torch.bool)
    inside[1, 1:3] = True
    assert torch.equal(first, torch.where(inside, 8.0, -8.0))
    assert thin[:, 0].tolist() == [-4.0] * 4 and bool((thin[:, 1:] == -8).all())
    assert bool((none == 0).all()) and bool((whole == 8).all())
    random = torch.rand(1, 50, 4, generator=torch.Generator().manual_seed(0)) * 60
    random = torch.cat([random[..., :2], random[..., :2] + random[..., 2:]], -1)
    share = (fill_boxes(random, (128, 128)) / 8 + 1) / 2
    area = (random[..., 2] - random[..., 0]) * (random[..., 3] - random[..., 1])
    torch.testing.assert_close(share.sum((-3, -2, -1)) * 16, area, rtol=1e-4, atol=1e-2)


@torch.no_grad()
def test_dense_boxes_are_mask_prompts_too(pixel_values, prompts) -> None:
    dense, plain = tiny_model(dense_boxes=True), tiny_model()
    boxes = prompts["input_boxes"].clone()
    boxes[:, 1] = -1
    given = {"input_points": prompts["input_points"], "input_labels": prompts["input_labels"]}
    assert_same(dense(pixel_values, **given).pred_masks, plain(pixel_values, **given).pred_masks)
    found = dense(pixel_values, input_boxes=boxes, **given).pred_masks
    by_hand = fill_boxes(boxes, (64, 64))
    assert_same(found, plain(pixel_values, input_boxes=boxes, input_masks=by_hand, **given).pred_masks)
    without = plain(pixel_values, input_boxes=boxes, **given).pred_masks
    assert_same(found[:, 1], without[:, 1])
    assert (found - without)[:, ::2].abs().amax((-3, -2, -1)).min() > 1e-3


@torch.no_grad()
def test_masks_are_cut_at_dense_boxes(pixel_values, prompts) -> None:
    model = tiny_model(dense_boxes=True)
    boxes, masks = prompts["input_boxes"].clone(), prompts["input_masks"].clone()
    boxes[0, 0], masks[0, 1] = -1, 0
    expected = torch.minimum(masks, fill_boxes(boxes, (64, 64)))
    expected[0, 0], expected[0, 1] = masks[0, 0], fill_boxes(boxes, (64, 64))[0, 1]
    found = model(pixel_values, input_boxes=boxes, input_masks=masks).pred_masks
    by_hand = tiny_model()(pixel_values, input_boxes=boxes, input_masks=expected).pred_masks
    assert_same(found, by_hand)


# Ragged batches


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dense_boxes", [False, True])
def test_an_object_does_not_depend_on_its_batch(attention, dense_boxes, pixel_values, prompts) -> None:
    """Mixed objects (box, points, both, a mask, nothing) beside each other equal each of them alone."""
    model = tiny_model(attention, dense_boxes=dense_boxes)
    p, b, m = prompts["input_points"], prompts["input_boxes"], prompts["input_masks"]
    alone = [
        {"input_points": p[:1, :1], "input_labels": prompts["input_labels"][:1, :1]},
        {"input_points": p[:1, 1:2, :1]},
        {"input_boxes": b[:1, 2:]},
        {"input_points": p[1:, :1], "input_boxes": b[1:, :1]},
        {"input_masks": m[1:, 1:2]},
    ]
    images = [0, 0, 0, 1, 1]
    slots = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    batch = {
        "input_points": torch.full((2, 4, 3, 2), -1.0),
        "input_labels": torch.full((2, 4, 3), -1),
        "input_boxes": torch.full((2, 4, 4), -1.0),
        "input_masks": torch.zeros(2, 4, 1, 16, 16),
    }
    for slot, given in zip(slots, alone):
        count = given["input_points"].shape[2] if "input_points" in given else 0
        if count:
            batch["input_points"][slot][:count] = given["input_points"][0, 0]
            batch["input_labels"][slot][:count] = given.get("input_labels", torch.ones(1, 1, count))[0, 0]
        for name in ("input_boxes", "input_masks"):
            if name in given:
                batch[name][slot] = given[name][0, 0]
    together = model(pixel_values, **batch)
    assert together.object_mask.tolist() == [[True, True, True, False], [True, True, False, False]]
    assert together.pred_masks.isfinite().all() and together.iou_scores.isfinite().all()
    for slot, image, given in zip(slots, images, alone):
        single = model(pixel_values[image : image + 1], **given)
        assert_same(together.pred_masks[slot], single.pred_masks[0, 0])
        assert_same(together.iou_scores[slot], single.iou_scores[0, 0])


@torch.no_grad()
def test_values_under_padding_do_not_matter(model, pixel_values, points) -> None:
    labels = F.pad(points["input_labels"], (0, 2), value=-1)
    outputs = []
    for value in (-1.0, 37.0):
        padded = F.pad(points["input_points"], (0, 0, 0, 2), value=value)
        outputs.append(model(pixel_values, padded, labels).pred_masks)
    assert torch.equal(*outputs)
    assert_same(outputs[0], model(pixel_values, **points).pred_masks)


@torch.no_grad()
def test_six_token_rule_counts_real_tokens(pixel_values, points) -> None:
    model = tiny_model(padded_prompt_tokens=6)
    embeddings = model.get_image_embeddings(pixel_values)
    together = model(image_embeddings=embeddings, **points).pred_masks
    spread_points = torch.full((2, 3, 9, 2), -1.0)
    spread_labels = torch.full((2, 3, 9), -1)
    spread_points[:, :, 3::4], spread_labels[:, :, 3::4] = points["input_points"], points["input_labels"]
    assert_same(
        model(image_embeddings=embeddings, input_points=spread_points, input_labels=spread_labels).pred_masks, together
    )
    # Padding is part of this rule: the same prompts without it give another answer.
    assert not torch.allclose(tiny_model()(image_embeddings=embeddings, **points).pred_masks, together, atol=1e-3)


def test_six_token_rule_refuses_more(pixel_values) -> None:
    model = tiny_model(padded_prompt_tokens=6)
    boxes = torch.tensor([[[1.0, 2.0, 30.0, 40.0]]])
    with pytest.raises(ValueError, match="7 prompt tokens.*at most 6"):
        model(pixel_values[:1], input_points=torch.rand(1, 1, 7, 2))
    with pytest.raises(ValueError, match="7 prompt tokens.*at most 6"):
        model(pixel_values[:1], input_points=torch.rand(1, 1, 5, 2), input_boxes=boxes)
    assert model(pixel_values[:1], input_points=torch.rand(1, 1, 4, 2), input_boxes=boxes).pred_masks.isfinite().all()


# Precision


def gaussian(model: EfficientSamModel) -> torch.Tensor:
    return model.prompt_encoder.positional_encoding.gaussian_matrix


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gaussian_matrix_stays_float32(dtype: torch.dtype, folder: Path) -> None:
    exact = gaussian(tiny_model())
    casts = [
        tiny_model().to(dtype),
        tiny_model().half() if dtype == torch.float16 else tiny_model().bfloat16(),
        EfficientSamModel.from_pretrained(folder, dtype=dtype),
    ]
    for model in casts:
        assert gaussian(model).dtype == torch.float32 and torch.equal(gaussian(model), exact)
        assert model.neck.conv1.weight.dtype == dtype
        assert torch.equal(gaussian(model.float()), exact)


def test_gaussian_matrix_survives_a_half_precision_folder(tmp_path: Path) -> None:
    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors")["neck.conv1.weight"].dtype == torch.bfloat16
    model = EfficientSamModel.from_pretrained(tmp_path)
    assert torch.equal(gaussian(model), gaussian(tiny_model()))


def agreement(first: torch.Tensor, second: torch.Tensor) -> float:
    first, second = first > 0, second > 0
    return float((first & second).sum() / (first | second).sum())


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dense_boxes", [False, True])
def test_half_precision_gives_nearly_the_same_masks(dtype, dense_boxes, pixel_values, prompts) -> None:
    model = tiny_model(dense_boxes=dense_boxes)
    expected = model(pixel_values, **prompts)
    outputs = tiny_model(dense_boxes=dense_boxes).to(dtype)(pixel_values, **prompts)  # float32 pixels: it casts them
    assert outputs.pred_masks.dtype == dtype
    assert agreement(outputs.pred_masks, expected.pred_masks) > 0.97
    with torch.autocast("cpu", dtype):
        outputs = model(pixel_values, **prompts)
    assert agreement(outputs.pred_masks, expected.pred_masks) > 0.97


@torch.no_grad()
def test_encoding_of_positions_ignores_autocast(model) -> None:
    encoding = model.prompt_encoder.positional_encoding
    coordinates = torch.rand(50, 2)
    with torch.autocast("cpu", torch.bfloat16):
        inside, grid = encoding(coordinates), encoding.grid(5, 7)
    assert inside.dtype == torch.float32 and torch.equal(inside, encoding(coordinates))
    assert torch.equal(grid, encoding.grid(5, 7))
    half = tiny_model().bfloat16().prompt_encoder.positional_encoding
    assert torch.equal(half(coordinates), encoding(coordinates))


@torch.no_grad()
def test_encoding_is_that_of_random_fourier_features(model) -> None:
    encoding = model.prompt_encoder.positional_encoding
    x, y = 0.3, 0.9
    angles = 2 * torch.pi * ((2 * x - 1) * gaussian(model)[0] + (2 * y - 1) * gaussian(model)[1])
    assert_same(encoding(torch.tensor([x, y])), torch.cat([angles.sin(), angles.cos()]))
    cell = torch.tensor([(2 + 0.5) / 7, (3 + 0.5) / 5])  # column 2, row 3 of a grid of 5 rows
    assert_same(encoding.grid(5, 7)[3 * 7 + 2], encoding(cell))


# Attention


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], list[str]]]:
    """Register a stand-in under an attention's name; it lists the modules that call it and answers like sdpa."""

    def register(name: str) -> list[str]:
        calls = []

        def attend(module, *args, **kwargs):
            calls.append(type(module).__name__)
            return sdpa_attention_forward(module, *args, **kwargs)

        monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, name, attend)
        return calls

    return register


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "decoder"),
    [("flash_attention_2", "sdpa"), ("flash_attention_3", "sdpa"), ("flex_attention", "sdpa"), ("mine", "itself")],
)
def test_attention_is_dispatched_through_transformers(name, decoder, recorded, pixel_values, prompts) -> None:
    expected = tiny_model()(pixel_values, **prompts)
    model = tiny_model()
    own, fused = recorded(name), recorded("sdpa")
    for part in (model.config.vision_config, model.config.mask_decoder_config):
        part._attn_implementation = name  # what loading sets where the kernels are installed
    outputs = model(pixel_values, **prompts)
    in_decoder = ["EfficientSamAttention"] * 7
    assert own == ["EfficientSamVisionAttention"] * 2 + (in_decoder if decoder == "itself" else [])
    assert fused == (in_decoder if decoder == "sdpa" else [])
    assert_same(outputs.pred_masks, expected.pred_masks)


@torch.no_grad()
def test_attention_of_ones_own(pixel_values, prompts) -> None:
    calls = []

    def attend(module, *args, **kwargs):
        calls.append(type(module).__name__)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("of_the_user", attend)
    outputs = tiny_model("of_the_user")(pixel_values, **prompts)
    assert_same(outputs.pred_masks, tiny_model()(pixel_values, **prompts).pred_masks)
    assert set(calls) == {"EfficientSamVisionAttention", "EfficientSamAttention"}


@torch.no_grad()
def test_eager_equals_sdpa(folder, pixel_values, prompts) -> None:
    outputs = []
    for attention in ("eager", "sdpa"):
        model = EfficientSamModel.from_pretrained(folder, attn_implementation=attention)
        parts = (model.config.vision_config, model.config.mask_decoder_config)
        assert {part._attn_implementation for part in parts} == {attention}
        outputs.append(model(pixel_values, **prompts))
    assert_same(outputs[0].pred_masks, outputs[1].pred_masks)
    model.set_attn_implementation("eager")
    assert torch.equal(model(pixel_values, **prompts).pred_masks, outputs[0].pred_masks)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_gives_what_sdpa_gives(pixel_values, prompts, monkeypatch) -> None:
    """Through torch's reference implementation."""

    def flex(query, key, value, training=False, **kwargs):
        return flex_attention(query, key, value, **kwargs)

    monkeypatch.setattr("transformers.integrations.flex_attention.compile_friendly_flex_attention", flex)
    model = tiny_model()
    prompts["input_labels"][:, 1, 1] = -1
    expected = model(pixel_values, **prompts)
    for part in (model.config.vision_config, model.config.mask_decoder_config):
        part._attn_implementation = "flex_attention"
    assert_same(model(pixel_values, **prompts).pred_masks, expected.pred_masks)


def test_flex_attention_is_for_the_encoder_alone(pixel_values, prompts, monkeypatch) -> None:
    """On CPUs it corrupts memory where it is given a mask, which the decoder's padding is."""
    masks = []

    def flex(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flex_attention", flex)
    model = tiny_model("flex_attention")
    assert_same(model(pixel_values, **prompts).pred_masks, tiny_model()(pixel_values, **prompts).pred_masks)
    assert masks == [None, None]


# Compilation


@torch.no_grad()
@pytest.mark.parametrize(
    "backend",
    # inductor warns about itself
    ["eager", pytest.param("inductor", marks=[pytest.mark.slow, pytest.mark.filterwarnings("ignore")])],
)
@pytest.mark.parametrize("dense_boxes", [False, True])
def test_compiles_as_one_graph(backend, dense_boxes, pixel_values, prompts) -> None:
    model = tiny_model(dense_boxes=dense_boxes)
    torch.compiler.reset()
    embeddings = model.get_image_embeddings(pixel_values)
    compiled = torch.compile(model.get_image_embeddings, fullgraph=True, backend=backend)
    assert_same(compiled(pixel_values), embeddings)
    compiled = torch.compile(model.decode_prompts, fullgraph=True, backend=backend)
    for names in (["input_points", "input_labels"], list(prompts)):
        chosen = {name: prompts[name] for name in names}
        masks, iou_scores, object_mask = compiled(embeddings, **chosen)
        expected = model.decode_prompts(embeddings, **chosen)
        assert_same(masks, expected[0])
        assert_same(iou_scores, expected[1])
        assert torch.equal(object_mask, expected[2])


class Decoder(torch.nn.Module):
    """What is exported of a model, where an image is encoded elsewhere."""

    def __init__(self, **prompt_encoder: Any):
        super().__init__()
        self.model = tiny_model(**prompt_encoder)

    def forward(self, embeddings, points, labels, boxes, masks):
        return self.model(
            image_embeddings=embeddings,
            input_points=points,
            input_labels=labels,
            input_boxes=boxes,
            input_masks=masks,
            return_dict=False,
        )


def example_of_decoder(images: int, objects: int, points: int) -> tuple[torch.Tensor, ...]:
    return (
        torch.randn(images, 32, 4, 4),
        torch.rand(images, objects, points, 2) * 60,
        torch.ones(images, objects, points, dtype=torch.long),
        torch.tensor([3.0, 5.0, 30.0, 40.0]).expand(images, objects, 4).contiguous(),
        torch.randn(images, objects, 1, 16, 16),
    )


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects")  # of transformers
@pytest.mark.parametrize(
    ("dense_boxes", "strict"),
    [(True, False), *(pytest.param(dense, True, marks=pytest.mark.slow) for dense in (False, True))],
)
def test_exports_with_any_number_of_objects_and_points(dense_boxes: bool, strict: bool) -> None:
    decoder = Decoder(dense_boxes=dense_boxes)
    images, objects, points = (torch.export.Dim(name) for name in ("images", "objects", "points"))
    both = {0: images, 1: objects}
    shapes = ({0: images}, {**both, 2: points}, {**both, 2: points}, both, both)
    exported = torch.export.export(decoder, example_of_decoder(2, 3, 2), dynamic_shapes=shapes, strict=strict)
    for numbers in ((2, 3, 2), (3, 5, 4)):
        inputs = example_of_decoder(*numbers)
        for result, expected in zip(exported.module()(*inputs), decoder(*inputs), strict=True):
            torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of sizes that become constants
def test_is_traced_without_a_false_error() -> None:
    decoder, inputs = Decoder(), example_of_decoder(1, 3, 2)
    traced = torch.jit.trace(decoder, inputs)
    for result, expected in zip(traced(*inputs), decoder(*inputs), strict=True):
        torch.testing.assert_close(result, expected, rtol=0, atol=2e-5)


def test_six_token_rule_compiles(pixel_values, points) -> None:
    model = tiny_model(padded_prompt_tokens=6, background_points=False)
    torch.compiler.reset()
    with torch.no_grad():
        embeddings = model.get_image_embeddings(pixel_values)
        expected = model.decode_prompts(embeddings, points["input_points"])
        compiled = torch.compile(model.decode_prompts, fullgraph=True, backend="eager")
        assert_same(compiled(embeddings, points["input_points"])[0], expected[0])
        torch.compiler.reset()
        with pytest.raises((ValueError, torch._dynamo.exc.TorchDynamoException)):  # and no answer to six of seven
            compiled(embeddings, torch.rand(2, 3, 7, 2))


# Sizes and layers


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(16, 16), (32, 96), (80, 48), (224, 224)])
def test_any_size_the_patch_divides(model, height, width) -> None:
    image = torch.randn(1, 3, height, width)
    outputs = model(image, input_points=torch.tensor([[[[5.0, 6.0]]]]))
    assert outputs.pred_masks.shape == (1, 1, 3, height // 4, width // 4)


@torch.no_grad()
def test_rows_and_columns_are_not_mixed_up(model) -> None:
    """Mirroring x and y of the position table, image and prompt mirrors the embedding's input tokens."""
    embeddings = model.vision_encoder.embeddings
    image = torch.randn(1, 3, 32, 96)
    patches = embeddings(image) - embeddings.resized_positions(2, 6)
    single = embeddings.projection(image[:, :, 16:, 32:48]).flatten(2).transpose(1, 2)
    assert_same(patches[:, 1 * 6 + 2 : 1 * 6 + 3], single)
    table = sine_cosine_table(14, 14, 32).view(14, 14, 32)
    assert torch.equal(table[3, :, :16], table[9, :, :16])  # x in the first half
    assert torch.equal(table[:, 3, 16:], table[:, 9, 16:])  # y in the second


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_image_tokens_lie_token_by_token(model, layout: torch.memory_format) -> None:
    """Every layer adds to them: sums of tensors in two layouts are several times as slow."""
    pixel_values = torch.randn(2, 3, 64, 64).to(memory_format=layout)
    assert model.vision_encoder.embeddings(pixel_values).is_contiguous()


def test_position_table_is_resized_from_its_own_size(model) -> None:
    embeddings = model.vision_encoder.embeddings
    table = embeddings.position_embeddings[:, 1:]
    assert torch.equal(embeddings.resized_positions(14, 14), table)
    expected = F.interpolate(table.view(1, 14, 14, 32).permute(0, 3, 1, 2), size=(4, 9), mode="bicubic")
    assert_same(embeddings.resized_positions(4, 9), expected.permute(0, 2, 3, 1).flatten(1, 2))
    other = EfficientSamVisionModel(EfficientSamVisionConfig(**VISION, pretrain_image_size=64))
    assert other.vision_encoder.embeddings.position_embeddings.shape == (1, 17, 32)


@torch.no_grad()
def test_upscaling_is_two_transposed_convolutions(model) -> None:
    decoder = model.mask_decoder
    image = torch.randn(2, 3, 4 * 5, 32)  # 4 rows of 5 tokens
    features = decoder.upscale_conv1(image.flatten(0, 1).transpose(1, 2).unflatten(2, (4, 5)))
    expected = F.gelu(decoder.upscale_conv2(F.gelu(decoder.upscale_norm(features))))
    ours = place_pixels(decoder.upscale(image), (4, 5))
    assert_same(ours.flatten(0, 1), expected)


# Saving and loading


@torch.no_grad()
def test_saved_model_gives_equal_outputs(model, folder, pixel_values, prompts) -> None:
    loaded = EfficientSamModel.from_pretrained(folder)
    assert not loaded.training
    first, second = model(pixel_values, **prompts), loaded(pixel_values, **prompts)
    assert torch.equal(first.pred_masks, second.pred_masks) and torch.equal(first.iou_scores, second.iou_scores)


def test_missing_weights_are_initialised(folder: Path, tmp_path: Path) -> None:
    """Loading builds the model on the meta device, so what the file lacks must be filled by `_init_weights`."""
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    save_file({"neck.layer_norm2.bias": torch.ones(32)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model = EfficientSamModel.from_pretrained(tmp_path)
    state = model.state_dict()
    assert all(value.device.type == "cpu" and value.isfinite().all() for value in state.values())
    assert torch.equal(state["neck.layer_norm2.bias"], torch.ones(32))
    table = state["vision_encoder.embeddings.position_embeddings"]
    assert_same(table[0, 1:], sine_cosine_table(14, 14, 32))
    assert 0.5 < gaussian(model).std() < 1.5
    for name, value in state.items():
        if "norm" in name and name != "neck.layer_norm2.bias":
            assert torch.equal(value, torch.full_like(value, float(name.endswith("weight")))), name
        elif name.endswith("weight"):
            assert 1e-3 < value.std() < 2 and value.abs().max() < 5, name
        elif name.endswith("bias") and name != "neck.layer_norm2.bias":
            assert not value.any(), name


@pytest.fixture
def complaints(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What transformers logs as a warning; its loggers do not propagate by themselves."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


@torch.no_grad()
def test_encoder_loads_from_a_folder_of_the_whole_model(model, folder, pixel_values, complaints) -> None:
    vision = EfficientSamVisionModel.from_pretrained(folder)
    assert torch.equal(vision(pixel_values).last_hidden_state, model.get_image_embeddings(pixel_values))
    assert complaints.text == ""


@torch.no_grad()
@pytest.mark.parametrize(
    ("chosen", "stages"),
    [({}, [2]), ({"out_features": ["stem", "stage2"]}, [0, 2]), ({"out_indices": [1, 2]}, [1, 2])],
)
def test_backbone_loads_from_a_folder_of_the_whole_model(
    model, folder, pixel_values, complaints, chosen, stages
) -> None:
    states = model.vision_encoder(pixel_values, output_hidden_states=True).hidden_states
    config = EfficientSamVisionConfig.from_pretrained(folder, **chosen)
    direct = EfficientSamBackbone.from_pretrained(folder, config=config)
    automatic = AutoBackbone.from_config(config)
    automatic.load_state_dict(direct.state_dict())
    for backbone in (direct, automatic):
        assert type(backbone) is EfficientSamBackbone
        maps = backbone(pixel_values).feature_maps
        assert len(maps) == len(backbone.channels) == len(stages)
        for feature_map, stage in zip(maps, stages):
            assert torch.equal(feature_map, states[stage].transpose(1, 2).unflatten(2, (4, 4)))
    assert complaints.text == ""


# Configuration


def test_presets() -> None:
    with torch.device("meta"):
        sizes = {
            name: sum(p.numel() for p in EfficientSamModel(EfficientSamConfig.from_preset(name)).parameters()) / 1e6
            for name in ("ti", "s", "b")
        }
    assert sizes == pytest.approx({"ti": 10.2, "s": 26.4, "b": 90.6}, rel=0.02)
    config = EfficientSamConfig.from_preset("s", vision_config={"image_size": 512})
    assert (config.vision_config.hidden_size, config.vision_config.image_size) == (384, 512)
    with pytest.raises(ValueError, match="variant is 'xl'"):
        EfficientSamConfig.from_preset("xl")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"vision_config": {"num_attention_heads": 5}}, "num_attention_heads and hidden_size"),
        ({"vision_config": {"image_size": 1000}}, "patch_size and image_size"),
        ({"vision_config": {"patch_size": 8, "pretrain_image_size": 224}}, "patch_size is 8, expected 16"),
        ({"vision_config": {"pretrain_image_size": 100}}, "patch_size and pretrain_image_size"),
        ({"vision_config": {"output_channels": 128}}, "widths must be equal.*128"),
        ({"prompt_encoder_config": {"padded_prompt_tokens": 1}}, "padded_prompt_tokens is 1"),
        ({"prompt_encoder_config": {"mask_input_channels": 6}}, "mask_input_channels"),
        (
            {"prompt_encoder_config": {"dense_boxes": True, "mask_prompts": False}},
            "dense_boxes is on and mask_prompts is off",
        ),
        ({"mask_decoder_config": {"num_attention_heads": 3}}, "num_attention_heads x attention_downsample_rate"),
        ({"mask_decoder_config": {"iou_head_depth": 1}}, "iou_head_depth is 1"),
        (
            {"vision_config": {"image_size": 10**9}},
            "image_size is 1000000000, expected a whole number from 1 to 8,192",
        ),
        ({"vision_config": {"image_size": 0}}, "image_size is 0"),
        ({"vision_config": {"image_size": "large"}}, "field 'image_size': TypeError: .* expected int, got str"),
        ({"vision_config": {"image_size": "x" * 10**6}}, "^Validation error for field 'image_size'.{0,300}$"),
        ({"vision_config": {"hidden_size": -192}}, "hidden_size is -192"),
        ({"vision_config": {"hidden_size": 3 * 10**7}}, "hidden_size is 30000000"),
        ({"vision_config": {"num_hidden_layers": 0}}, "num_hidden_layers is 0"),
        ({"vision_config": {"num_hidden_layers": 10**7}}, "num_hidden_layers is 10000000"),
        ({"vision_config": {"num_attention_heads": -3}}, "num_attention_heads is -3"),
        ({"vision_config": {"layer_norm_eps": NAN}}, "layer_norm_eps is nan, expected a number from 0 to 1"),
        ({"vision_config": {"mlp_ratio": INF}}, "mlp_ratio is inf"),
        ({"vision_config": {"attention_dropout": 2.0}}, "attention_dropout is 2.0"),
        ({"vision_config": {"hidden_act": "gelo"}}, "hidden_act is 'gelo', expected one of .*gelu"),
        ({"vision_config": {"qkv_bias": "no"}}, "'qkv_bias'"),
        ({"vision_config": "ti"}, "'vision_config'.* 'ti'"),
        ({"mask_decoder_config": {"num_multimask_outputs": 0}}, "num_multimask_outputs is 0"),
        ({"mask_decoder_config": {"mlp_dim": 2**40}}, "mlp_dim is 1099511627776"),
        ({"prompt_encoder_config": {"padded_prompt_tokens": 10**9}}, "padded_prompt_tokens is 1000000000"),
        ({"prompt_encoder_config": {"layer_norm_eps": -1.0}}, "layer_norm_eps is -1.0"),
    ],
    ids=range(29),
)
def test_impossible_configurations_are_refused(parts: dict[str, dict], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientSamConfig(**parts)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vision_config": {"image_size": 10**9}}, "image_size is 1000000000"),
        ({"vision_config": {"output_channels": 64}}, "widths must be equal.*64"),
        ({"mask_decoder_config": {"num_hidden_layers": -1}}, "num_hidden_layers is -1"),
    ],
)
def test_changes_at_load_are_checked_like_the_rest(folder: Path, changes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EfficientSamConfig.from_pretrained(folder, **changes)
    with pytest.raises(ValueError, match=message):
        EfficientSamModel.from_pretrained(folder, **changes)


def test_fewer_layers_at_load(model, folder: Path, tmp_path: Path, pixel_values, complaints) -> None:
    """A saved configuration does not hold on to the last stage of the layers it was saved with."""
    fewer = EfficientSamModel.from_pretrained(folder, vision_config={"num_hidden_layers": 1})
    vision = fewer.config.vision_config
    assert len(fewer.vision_encoder.layers) == 1 and vision.stage_names == ["stem", "stage1"]
    assert vision.out_features == ["stage1"] and vision.hidden_size == 32
    with torch.no_grad():
        states = model.vision_encoder(pixel_values, output_hidden_states=True).hidden_states
        (last,) = EfficientSamBackbone.from_pretrained(folder, num_hidden_layers=1)(pixel_values).feature_maps
    assert torch.equal(last, states[1].transpose(1, 2).unflatten(2, (4, 4)))
    chosen = EfficientSamVisionConfig(**{**VISION, "out_features": ["stem", "stage2"]})
    chosen.save_pretrained(tmp_path)
    assert EfficientSamVisionConfig.from_pretrained(tmp_path).out_features == ["stem", "stage2"]
    with pytest.raises(ValueError, match="out_features must be a subset of stage_names"):
        EfficientSamVisionConfig.from_pretrained(tmp_path, num_hidden_layers=1)


def test_configuration_round_trip(tmp_path: Path) -> None:
    config = tiny_config(padded_prompt_tokens=6, background_points=False)
    config.save_pretrained(tmp_path)
    loaded = EfficientSamConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert loaded.prompt_encoder_config.padded_prompt_tokens == 6
    assert loaded.vision_config.hidden_size == 32 and loaded.mask_decoder_config.mlp_dim == 64
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "efficientsam"
