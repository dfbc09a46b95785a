# SPDX-License-Identifier: Apache-2.0
"""Adapters: what they train, and that the folder of a run needs none of them."""

from pathlib import Path

import pytest
import torch
from torch import nn

from efficientsam_hf import EfficientSamConfig, EfficientSamModel
from efficientsam_hf.training.finetune_arguments import FinetuneArguments
from efficientsam_hf.training.lora import add_adapters, merged_state_dict
from efficientsam_hf.training.segmentation import InteractiveSegmentation


def tiny_model() -> EfficientSamModel:
    torch.manual_seed(0)
    config = EfficientSamConfig(
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "output_channels": 16,
            "image_size": 64,
        },
        prompt_encoder_config={"hidden_size": 16, "mask_input_channels": 16},
        mask_decoder_config={
            "hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16,
        },
    )  # fmt: skip
    return EfficientSamModel(config)


def answer(model: nn.Module) -> torch.Tensor:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    points = torch.tensor([[[[20.0, 30.0]]]])
    with torch.no_grad():
        return model(pixel_values=pixels, input_points=points, input_labels=torch.ones(1, 1, 1).long()).pred_masks


def disturb_adapters(model: nn.Module) -> None:
    """Adapters begin as zero; after training they are not."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)


def test_adapters_change_nothing_at_first_and_train_alone_in_their_parts() -> None:
    model = tiny_model()
    before = answer(model)
    InteractiveSegmentation(model).add_adapters(["encoder"], rank=4, alpha=8)
    torch.testing.assert_close(answer(model), before)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert {name.split(".")[0] for name in trained if "lora_" not in name} == {"prompt_encoder", "mask_decoder"}
    assert all(name.startswith("vision_encoder.") for name in trained if "lora_" in name)
    assert len([name for name in trained if "lora_A" in name]) == 2 * 4  # qkv, proj, fc1, fc2 of two layers
    assert not any(p.requires_grad for p in model.neck.parameters())


def test_merged_weights_have_the_old_names_and_the_new_answers() -> None:
    model, plain = tiny_model(), tiny_model()
    add_adapters(model, ["vision_encoder", "mask_decoder"], rank=4, alpha=8)
    disturb_adapters(model)
    with torch.autocast("cpu", torch.bfloat16):  # as during a run
        merged = merged_state_dict(model)
    assert merged.keys() == plain.state_dict().keys()
    assert not torch.allclose(answer(plain), answer(model), atol=1e-3)
    plain.load_state_dict(merged)
    torch.testing.assert_close(answer(plain), answer(model), atol=1e-5, rtol=1e-4)


def test_without_adapters_the_weights_are_the_models_own() -> None:
    model = tiny_model()
    merged, own = merged_state_dict(model), model.state_dict()
    assert merged.keys() == own.keys() and all(torch.equal(merged[name], own[name]) for name in own)


def test_the_saved_folder_loads_without_adapters(tmp_path: Path) -> None:
    module = InteractiveSegmentation(tiny_model())
    module.add_adapters(["encoder", "mask_decoder"], rank=2, alpha=16)
    disturb_adapters(module.model)
    module.save_pretrained(tmp_path)
    loaded, info = EfficientSamModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(answer(loaded), answer(module.model.eval()), atol=1e-5, rtol=1e-4)


def test_a_part_without_linear_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="no linear layer in neck"):
        add_adapters(tiny_model(), ["neck"], rank=2, alpha=2)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"freeze": "encode"}, "freeze must name some of encoder, prompt_encoder, mask_decoder, masks, got 'encode'"),
        ({"lora_parts": "neck"}, "lora_parts must name some of"),
        ({"lora_rank": -1}, "lora_rank must be at least 0"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "lora_alpha must be greater than 0"),
        ({"lora_rank": 4, "freeze": "encoder"}, "both name encoder"),
    ],
)
def test_bad_fields(fields, words) -> None:
    with pytest.raises(ValueError, match=words):
        FinetuneArguments(output_dir="unused", max_steps=1, train_scenes=True, **fields)
