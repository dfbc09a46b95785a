# SPDX-License-Identifier: Apache-2.0
"""The fast prompt decoder against the plain one, which training and everything else uses."""

import copy
import platform
import subprocess
import sys

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


@pytest.mark.parametrize("kind", ["two points", "boxes", "both"])
def test_boxes_that_change_the_image(kind: str) -> None:
    torch.manual_seed(0)
    vision = {"image_size": 128, "num_hidden_layers": 1}
    config = EfficientSamConfig.from_preset("ti", vision_config=vision, prompt_encoder_config={"dense_boxes": True})
    model = EfficientSamModel(config).eval()
    embeddings = torch.randn(1, 256, 8, 8)
    expected, _ = plain(model, embeddings, prompts(kind))
    masks, _ = EfficientSamFastDecoder(model, embeddings, chunk_size=4)(**prompts(kind))
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-4)
    model.prompt_encoder.dense_boxes = False
    unchanged, _ = plain(model, embeddings, prompts(kind))
    assert ((unchanged - expected).abs().max() > 1e-2) == (kind != "two points")


@pytest.mark.parametrize("chunk", [1, 2, 4])
def test_chunks_change_nothing(model, chunk: int) -> None:
    embeddings = torch.randn(1, 256, 8, 8)
    masks, scores = EfficientSamFastDecoder(model, embeddings, chunk_size=chunk)(**prompts("both"))
    expected, expected_scores = EfficientSamFastDecoder(model, embeddings)(**prompts("both"))
    torch.testing.assert_close(masks, expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(scores, expected_scores, rtol=0, atol=1e-4)


@pytest.mark.parametrize("plainly", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_only_prompts_above_a_threshold(model, share: float, plainly: bool, monkeypatch) -> None:
    """Their masks are those of a call; the score of mask token 0, which is no candidate, counts for nothing."""
    embeddings = torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(3))
    points, labels = (prompts("two points")[name] for name in ("input_points", "input_labels"))
    if plainly:
        monkeypatch.setattr(module, "_has_plain_layers", lambda decoder: False)
    decoder = EfficientSamFastDecoder(model, embeddings, chunk_size=2)
    masks, scores = decoder(points, labels)
    best = scores[:, 1:].amax(1)
    threshold = {0.0: best.max(), 0.5: best.median(), 1.0: best.min() - 1}[share].item()
    above = (best > threshold).nonzero()[:, 0]
    assert len(above) == {0.0: 0, 0.5: QUERIES // 2, 1.0: QUERIES}[share]
    found, found_scores, index = decoder.decode_above(threshold, points, labels)
    assert index.tolist() == above.tolist()
    torch.testing.assert_close(found, masks[above], rtol=0, atol=1e-5)
    torch.testing.assert_close(found_scores, scores[above], rtol=0, atol=1e-5)


def test_the_single_mask_is_no_candidate() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.0, 0.1, 0.6, 0.3]])
    assert module._is_above(scores, 0.5).tolist() == [False, True]
    assert module._is_above(scores, None).tolist() == [True, True]


def test_logits_have_the_dtype_of_the_plain_path(model) -> None:
    embeddings = torch.randn(1, 256, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = plain(model, embeddings, prompts("one point"))
        masks, _ = EfficientSamFastDecoder(model, embeddings)(**prompts("one point"))
    assert masks.dtype == expected.dtype == torch.bfloat16


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_rows_at_once_change_nothing(model, rows: int, monkeypatch) -> None:
    embeddings = torch.randn(1, 256, 8, 8, generator=torch.Generator().manual_seed(4))
    expected, _ = EfficientSamFastDecoder(model, embeddings, chunk_size=3)(**prompts("boxes"))
    monkeypatch.setattr(module, "CPU_UPSCALED_BYTES", rows * 3 * 8 * 512 * 4)
    decoder = EfficientSamFastDecoder(model, embeddings, chunk_size=3)
    assert decoder.tokens_at_once == rows * 8
    torch.testing.assert_close(decoder(**prompts("boxes"))[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dim", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_sharp_attention_has_no_denormal_weights(dim: int, dtype: torch.dtype) -> None:
    scores = (100 * torch.randn(4, 64, 1024, generator=torch.Generator().manual_seed(0))).to(dtype)
    expected = scores.double().softmax(dim)
    weights = module._softmax(scores, dim)
    assert 0 < expected[expected > 0].min() < torch.finfo(torch.float32).tiny <= weights.min()
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="for memory as glibc keeps it")
def test_chunks_use_the_memory_of_those_before_them() -> None:
    """Beyond the logits, 2 MiB a prompt, hardly a page of memory is asked of the system once the first are decoded."""
    script = """
import ctypes, resource, torch
from efficientsam_hf import EfficientSamConfig, EfficientSamModel
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # no huge pages, which are asked for one by one
from efficientsam_hf.models.fast_decoding_efficientsam import EfficientSamFastDecoder
model = EfficientSamModel(EfficientSamConfig.from_preset("ti", vision_config={"num_hidden_layers": 1})).eval()
decoder = EfficientSamFastDecoder(model, torch.randn(1, 256, 64, 64))
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for count in (4, 24):
    before = faults()
    masks, _ = decoder(torch.rand(count, 1, 2) * 1023, torch.ones(count, 1, dtype=torch.long))
    pages = masks.nbytes / resource.getpagesize()
print((faults() - before) / pages)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 4  # 7 if each chunk asks for its memory again


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
