# SPDX-License-Identifier: Apache-2.0
"""The evaluator on promptable models of transformers, tiny and untrained: same numbers as their own public calls."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    Sam2Config,
    Sam2Model,
    SamConfig,
    SamImageProcessor,
    SamModel,
    SamProcessor,
)

from efficientsam_hf.cli import main
from efficientsam_hf.data.prompts import tight_boxes
from efficientsam_hf.evaluation import evaluate
from efficientsam_hf.metrics import mask_iou


def make_samples() -> list[dict[str, Any]]:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    masks = np.zeros((2, 40, 60), bool)
    masks[0, 5:20, 10:40] = True
    masks[1, 22:38, 30:58] = True
    return [{"image": Image.fromarray(pixels), "masks": masks}]


def sam() -> tuple[SamModel, SamProcessor]:
    torch.manual_seed(0)
    config = SamConfig(
        vision_config={
            "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "patch_size": 16,
            "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 16, "num_pos_feats": 8,
        },
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    processor = SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    return SamModel(config).eval(), SamProcessor(processor)


def test_sam_gets_the_numbers_of_its_own_calls() -> None:
    model, processor = sam()
    samples = make_samples()
    result = evaluate(model, processor, samples, prompts=["box"], progress=False)
    masks = torch.from_numpy(samples[0]["masks"])
    inputs = processor(samples[0]["image"], input_boxes=[tight_boxes(masks).tolist()], return_tensors="pt")
    inputs["input_boxes"] = inputs["input_boxes"].float()
    sizes = inputs.pop("original_sizes"), inputs.pop("reshaped_input_sizes")
    with torch.no_grad():
        outputs = model(**inputs, multimask_output=True)
    answers = processor.post_process_masks(outputs.pred_masks, *sizes)[0]
    ious = mask_iou(answers, masks[:, None])
    chosen = ious.gather(1, outputs.iou_scores[0].argmax(-1, keepdim=True))
    assert 0 < ious.max() < 1
    assert result["box"]["miou"] == pytest.approx(chosen.mean().item(), abs=1e-6)
    assert result["box"]["oracle_miou"] == pytest.approx(ious.amax(1).mean().item(), abs=1e-6)


def test_sam_loads_from_a_folder_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, processor = sam()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    command = ["evaluate", str(tmp_path), "--device", "cpu", "--scenes", "1", "--clicks", "1", "3"]
    assert main([*command, "--prompts", "center", "uniform"]) == 0
    assert {"center:3", "uniform:3"} <= set(capsys.readouterr().out.split())


class ResizingProcessor:
    """Does for `Sam2Model` what `Sam2Processor` does, which needs torchvision: coordinates of the resized picture."""

    side = 128

    def __call__(self, images: Image.Image, return_tensors: str, **prompts: Any) -> dict[str, Any]:
        scale = torch.tensor([self.side / images.width, self.side / images.height])
        tensors = {name: torch.tensor(value) for name, value in prompts.items()}
        for name in set(tensors) - {"input_labels"}:
            tensors[name] = tensors[name] * scale.repeat(tensors[name].shape[-1] // 2)
        small = np.asarray(images.resize((self.side, self.side)), np.float32) / 127.5 - 1
        pixels = torch.from_numpy(small).permute(2, 0, 1)[None]
        return {"pixel_values": pixels, "original_sizes": [(images.height, images.width)], **tensors}

    def post_process_masks(self, masks: torch.Tensor, original_sizes: Any) -> list[torch.Tensor]:
        return [torch.nn.functional.interpolate(masks[0], original_sizes[0], mode="bilinear") > 0]


def sam2() -> Sam2Model:
    torch.manual_seed(0)
    backbone = {
        "model_type": "sam2_hiera_det_model", "hidden_size": 8, "image_size": [128, 128],
        "blocks_per_stage": [1, 1, 2, 1], "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 1, 2, 4], "global_attention_blocks": [3],
    }  # fmt: skip
    config = Sam2Config(
        vision_config={
            "backbone_config": backbone, "backbone_channel_list": [64, 32, 16, 8], "fpn_hidden_size": 32,
            "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": 128},
        mask_decoder_config={"hidden_size": 32, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )  # fmt: skip
    return Sam2Model(config).eval()


def test_sam2_answers_clicks_and_boxes() -> None:
    """Its embeddings are a list of maps, and its masks need no size but the picture's."""
    result = evaluate(sam2(), ResizingProcessor(), make_samples(), clicks=[1, 3], progress=False)
    assert {"box", "center", "center:3", "uniform", "uniform:3"} <= set(result)
    assert 0 < result["box"]["oracle_miou"] < 1


def test_sam2_with_its_own_processor() -> None:
    pytest.importorskip("torchvision", reason="Sam2Processor needs torchvision", exc_type=Exception)
    from transformers import Sam2ImageProcessor, Sam2Processor

    size = {"height": 128, "width": 128}
    processor = Sam2Processor(Sam2ImageProcessor(size=size), target_size=128)
    expected = evaluate(sam2(), ResizingProcessor(), make_samples(), prompts=["box"], progress=False)
    result = evaluate(sam2(), processor, make_samples(), prompts=["box"], progress=False)
    assert result["box"]["oracle_miou"] == pytest.approx(expected["box"]["oracle_miou"], abs=0.1)
