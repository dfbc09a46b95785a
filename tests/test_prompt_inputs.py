# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that learn inputs which they were trained without, as the released ones were."""

from pathlib import Path

import pytest
import torch
from test_segmentation_training import example_batch, tiny_model

from efficientsam_hf import EfficientSamModel
from efficientsam_hf.training.prompt_inputs import check_prompt_tokens, load_with_inputs
from efficientsam_hf.training.segmentation import InteractiveSegmentation, PromptSampling


RELEASED = {"background_points": False, "mask_prompts": False, "padded_prompt_tokens": 6}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(**RELEASED).save_pretrained(tmp_path / "released")
    return tmp_path / "released"


def masks_of_a_click(model: EfficientSamModel) -> torch.Tensor:
    prompts = {"input_points": torch.tensor([[[[20.0, 30.0]]]]), "input_labels": torch.ones(1, 1, 1, dtype=torch.long)}
    with torch.no_grad():
        return model.eval()(example_batch()["pixel_values"][:1], **prompts).pred_masks


def test_new_inputs_begin_without_an_effect(folder: Path) -> None:
    before = EfficientSamModel.from_pretrained(folder)
    model = load_with_inputs(str(folder), {"background_points": True, "mask_prompts": True})
    assert torch.equal(masks_of_a_click(model), masks_of_a_click(before))
    assert not torch.allclose(masks_of_a_click(model), masks_of_a_click(tiny_model()), atol=1e-3)
    assert model.config.prompt_encoder_config.padded_prompt_tokens == 6


def test_new_inputs_are_trained_and_saved(folder: Path, tmp_path: Path) -> None:
    changes = {"background_points": True, "mask_prompts": True, "padded_prompt_tokens": None}
    model = load_with_inputs(str(folder), changes)
    module = InteractiveSegmentation(model, sampling=PromptSampling(rounds=4, mask_prompts=1.0))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for seed in range(4):
        module(example_batch(seed))["loss"].backward()
        optimizer.step()
    encoder = model.prompt_encoder
    for weight in (encoder.background_embed.weight, encoder.no_mask_embed.weight, encoder.mask_embed.conv3.weight):
        assert weight.abs().max() > 0
    model.save_pretrained(tmp_path / "trained")
    again = EfficientSamModel.from_pretrained(tmp_path / "trained")
    assert {name: getattr(again.config.prompt_encoder_config, name) for name in changes} == changes
    assert torch.equal(again.prompt_encoder.background_embed.weight, encoder.background_embed.weight)


def test_dense_boxes_are_switched_on_and_trained(tmp_path: Path) -> None:
    """With one round there are no earlier answers, but boxes are embedded as they are."""
    tiny_model().save_pretrained(tmp_path / "before")
    for boxes, trained in ((1.0, True), (0.0, False)):
        sampling = PromptSampling(uniform=1 - boxes, center=0, box=boxes, box_and_point=0, rounds=1)
        model = load_with_inputs(str(tmp_path / "before"), {"dense_boxes": True})
        module = InteractiveSegmentation(model, sampling=sampling)
        module(example_batch())["loss"].backward()
        weight = model.prompt_encoder.mask_embed.conv3.weight
        assert weight.requires_grad == trained
        assert (weight.grad is not None and bool(weight.grad.any())) == trained
    with pytest.raises(ValueError, match="dense_boxes is on and mask_prompts is off"):
        load_with_inputs(str(tmp_path / "before"), {"dense_boxes": True, "mask_prompts": False})


def test_other_parts_of_a_checkpoint_stay(folder: Path) -> None:
    with pytest.raises(ValueError, match="model_overrides: hidden_size of a checkpoint cannot be changed"):
        load_with_inputs(str(folder), {"hidden_size": 8})


@pytest.mark.parametrize(("shares", "rounds"), [({}, 5), ({"box_and_point": 0.0}, 6)])
def test_more_prompts_than_the_checkpoint_takes(shares: dict[str, float], rounds: int) -> None:
    model = tiny_model(**RELEASED)
    check_prompt_tokens(model, PromptSampling(rounds=rounds - 1, **shares))
    with pytest.raises(ValueError, match=f"prompt_rounds {rounds} gives objects up to 7 prompt tokens .* takes 6"):
        check_prompt_tokens(model, PromptSampling(rounds=rounds, **shares))
    check_prompt_tokens(tiny_model(), PromptSampling(rounds=rounds, **shares))


def test_a_checkpoint_without_some_weights_is_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would fill them with random numbers."""
    model = EfficientSamModel.from_pretrained(folder)
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("mask_decoder.")}
    model.save_pretrained(tmp_path / "cut", state_dict=state)
    for changes in ({}, {"background_points": True}):
        with pytest.raises(ValueError, match=r"cannot load a model from .*cut: .* missing \(mask_decoder\."):
            load_with_inputs(str(tmp_path / "cut"), changes)
