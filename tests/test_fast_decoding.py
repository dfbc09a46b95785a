# SPDX-License-Identifier: Apache-2.0
"""The fast prompt decoder against the plain one, which training and everything else uses."""

import copy

import pytest
import torch

from efficientsam_hf import EfficientSamConfig, EfficientSamModel
from efficientsam_hf.models import fast_decoding_efficientsam as module
from efficientsam_hf.models.fast_decoding_efficientsam import EfficientSamFastDecoder


QUERIES = 9


@pytest.fixture(scope="module", params=[None, 6], ids=["any number of tokens", "six tokens"])
def model(request: pytest.FixtureRequest) -> EfficientSamModel:
    """A real decoder behind a small encoder, every weight off its initial value, biases and norms too."""
    torch.manual_seed(0)
    config = EfficientSamConfig.from_preset(
        "ti",
        vision_config={"image_size": 128, "num_hidden_layers": 1},
        prompt_encoder_config={"padded_prompt_tokens": request.param},
    )
    model = EfficientSamModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def prompts(kind: str) -> dict[str, torch.Tensor]:
    """Prompts of Q objects, some of them padded."""
    generator = torch.Generator().manual_seed(1)
    points = torch.rand(QUERIES, 2, 2, generator=generator) * 127
    labels = torch.ones(QUERIES, 2, dtype=torch.long)
    labels[3, 1], labels[4, 0] = -1, 0
    boxes = torch.tensor([[10.0, 20, 100, 120]]).repeat(QUERIES, 1) + torch.arange(QUERIES)[:, None]
    boxes[5] = -1
    return {
        "one point": {"input_points": points[:, :1], "input_labels": torch.ones(QUERIES, 1, dtype=torch.long)},
        "two points": {"input_points": points, "input_labels": labels},
        "boxes": {"input_boxes": boxes},
        "both": {"input_points": points, "input_labels": labels, "input_boxes": boxes},
    }[kind]


@torch.no_grad()
def plain(model: EfficientSamModel, embeddings: torch.Tensor, given: dict) -> tuple[torch.Tensor, torch.Tensor]:
    masks, scores, _ = model.decode_prompts(embeddings, **{name: value[None] for name, value in given.items()})
    return masks[0], scores[0]


@pytest.mark.parametrize("kind", ["one point", "two points", "boxes", "both"])
@pytest.mark.parametrize("size", [(8, 8), (4, 6)], ids=["square", "oblong"])
def test_numbers_are_those_of_the_plain_path(model, kind: str, size: tuple[int, int]) -> None:
    embeddings = torch.randn(1, 256, *size, generator=torch.Generator().manual_seed(2))
    expected, expected_scores = plain(model, embeddings, prompts(kind))
    masks, scores = EfficientSamFastDecoder(model, embeddings)(**prompts(kind))
    assert masks.shape == (QUERIES, 4, 4 * size[0], 4 * size[1]) and expected.std() > 0.5
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_change_nothing(model, chunk: int) -> None:
    embeddings = torch.randn(1, 256, 8, 8)
    masks, scores = EfficientSamFastDecoder(model, embeddings, chunk_size=chunk)(**prompts("both"))
    expected, expected_scores = EfficientSamFastDecoder(model, embeddings)(**prompts("both"))
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("side", "dtype", "count"),
    [
        (64, torch.float32, 2),
        (32, torch.float32, 8),
        (64, torch.bfloat16, 4),
        (200, torch.float32, 1),
        (2, torch.float32, 256),
    ],
)
def test_chunks_have_the_size_of_a_cache(model, side: int, dtype: torch.dtype, count: int, monkeypatch) -> None:
    """The dtype that counts is the weights', whatever that of the embeddings is."""
    monkeypatch.setattr(EfficientSamFastDecoder, "_prepare", lambda self: None)
    decoder = EfficientSamFastDecoder(copy.deepcopy(model).to(dtype), torch.zeros(1, 256, side, side))
    assert decoder.chunk_size == count
    if count in (2, 4, 8):
        monkeypatch.setattr(module, "CPU_BYTES", 3 * module.CPU_BYTES)
        assert EfficientSamFastDecoder(decoder.model, decoder.embeddings).chunk_size == 3 * count


@pytest.mark.parametrize(("free_gib", "count"), [(0, 1), (2, 16), (20, 160), (70, 256)])
def test_chunks_take_a_part_of_a_gpu(monkeypatch, free_gib: int, count: int) -> None:
    """What torch holds and does not use is free too."""
    half = free_gib * 2**29
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (half, 80 * 2**30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: half + 1000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 1000)
    assert module._chunk_size(64 * 64 * 256 * 4, torch.device("cuda")) == count


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 0.97), (torch.float16, 0.995)])
def test_half_precision_is_no_worse_than_the_plain_path(model, dtype: torch.dtype, least: float) -> None:
    embeddings = torch.randn(1, 256, 8, 8)
    exact, exact_scores = plain(model, embeddings, prompts("both"))
    half = EfficientSamModel.from_pretrained(
        None, config=model.config, state_dict=model.state_dict(), dtype=dtype
    ).eval()
    masks, scores = EfficientSamFastDecoder(half, embeddings)(**prompts("both"))
    usual, usual_scores = plain(half, embeddings, prompts("both"))
    assert masks.dtype == dtype
    inside, other = masks > 0, exact > 0
    assert (inside & other).sum() / (inside | other).sum() > least  # of a random model, whose logits are steep nowhere
    assert (masks.float() - exact).abs().mean() < 1.3 * (usual.float() - exact).abs().mean()
    assert (scores.float() - exact_scores).abs().mean() < 2 * (usual_scores.float() - exact_scores).abs().mean() + 0.01


def test_adapters_are_not_passed_over(model) -> None:
    pytest.importorskip("peft")
    from efficientsam_hf.training.lora import add_adapters

    adapted = EfficientSamModel(model.config).eval()
    adapted.load_state_dict(model.state_dict())
    add_adapters(adapted, ["mask_decoder"], 4, 16.0)
    adapted.eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter += 0.02 * torch.randn_like(parameter)
    embeddings = torch.randn(1, 256, 8, 8)
    expected, expected_scores = plain(adapted, embeddings, prompts("both"))
    masks, scores = EfficientSamFastDecoder(adapted, embeddings)(**prompts("both"))
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-4 * expected.std().item())
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-3)
    unadapted, _ = plain(model, embeddings, prompts("both"))
    assert (expected - unadapted).abs().max() > 0.1 * unadapted.std()


@pytest.mark.parametrize(
    ("shape", "chunk", "words"),
    [((2, 256, 8, 8), None, "expected that of one image"), ((1, 256, 8, 8), 0, "chunk_size must be at least 1")],
)
def test_wrong_arguments(model, shape, chunk, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        EfficientSamFastDecoder(model, torch.zeros(shape), chunk_size=chunk)


def test_prompts_are_checked_as_usual(model) -> None:
    decoder = EfficientSamFastDecoder(model, torch.zeros(1, 256, 8, 8))
    with pytest.raises(ValueError, match="no prompt"):
        decoder()
    with pytest.raises(ValueError, match="expected 1 .object."):
        decoder(torch.zeros(1, 1, 2), torch.full((1, 1), 7))
