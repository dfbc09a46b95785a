# SPDX-License-Identifier: Apache-2.0
"""The mean of several models, as an export writes it."""

import json
from pathlib import Path

import pytest
import torch
from test_hub import tiny_model, write_run

from efficientsam_hf import EfficientSamModel
from efficientsam_hf.averaging import average_weights
from efficientsam_hf.cli import main


def relatives(count: int) -> list[EfficientSamModel]:
    """Models with weights of their own and one Gaussian matrix."""
    models = [tiny_model() for _ in range(count)]
    for model in models[1:]:
        for buffer, first in zip(model.buffers(), models[0].buffers(), strict=True):
            buffer.copy_(first)
    return models


def test_mean_of_three(tmp_path: Path) -> None:
    models = relatives(3)
    expected = {
        name: torch.stack([dict(model.named_parameters())[name].detach() for model in models]).mean(0)
        for name, _ in models[0].named_parameters()
    }
    for number, model in enumerate(models[1:]):
        model.save_pretrained(tmp_path / str(number))
    found = average_weights(models[0], [tmp_path / "0", str(tmp_path / "1")])
    for name, value in models[0].named_parameters():
        torch.testing.assert_close(value.detach(), expected[name], atol=1e-6, rtol=1e-5)
    assert [other["model"] for other in found] == [str(tmp_path / "0"), str(tmp_path / "1")]
    assert all(other["revision"].startswith("sha256:") for other in found)
    assert found[0]["revision"] != found[1]["revision"]


def test_export_of_a_mean_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = relatives(2)
    run = write_run(tmp_path / "run", one, monkeypatch)
    other.save_pretrained(tmp_path / "other")
    command = ["export", str(run), str(tmp_path / "out"), "--full-precision", "--average", str(tmp_path / "other")]
    assert main(command) == 0
    written = EfficientSamModel.from_pretrained(tmp_path / "out")
    for (name, value), first, second in zip(
        written.named_parameters(), one.parameters(), other.parameters(), strict=True
    ):
        torch.testing.assert_close(value, (first + second) / 2, msg=name)
    (record,) = json.loads((tmp_path / "out" / "metrics.json").read_text())["training"]["averaged_with"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert record["revision"] in card and "mean of the run's own" in card
    assert str(tmp_path) not in card and str(tmp_path) not in record["model"]


def test_strangers_are_refused(tmp_path: Path) -> None:
    models = relatives(2)
    tiny_model().save_pretrained(tmp_path / "stranger")
    with pytest.raises(ValueError, match="no common origin with the run: its .*gaussian_matrix"):
        average_weights(models[0], [tmp_path / "stranger"])
    config = tiny_model().config
    config.mask_decoder_config.mlp_dim = 32
    EfficientSamModel(config).save_pretrained(tmp_path / "narrow")
    with pytest.raises(ValueError, match="narrow has other weights than the run: mask_decoder"):
        average_weights(models[0], [tmp_path / "narrow"])
    for part, field, value in (("prompt_encoder", "dense_boxes", True), ("mask_decoder", "num_attention_heads", 1)):
        changed = relatives(2)[1]
        setattr(getattr(changed.config, f"{part}_config"), field, value)
        changed.save_pretrained(tmp_path / field)
        with pytest.raises(ValueError, match=f"another way than the run: {part}_config.{field} is {value}, not "):
            average_weights(models[0], [tmp_path / field])
    with pytest.raises(OSError, match="nowhere"):
        average_weights(models[0], [tmp_path / "nowhere"])
