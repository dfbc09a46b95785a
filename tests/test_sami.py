# SPDX-License-Identifier: Apache-2.0
"""SAMI's model: against the paper's equations written out in loops, and what reaches what."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForPreTraining

import efficientsam_hf.models
from efficientsam_hf import EfficientSamConfig, EfficientSamModel, SamiConfig, SamiForPreTraining
from efficientsam_hf.models.modeling_efficientsam_vision import sine_cosine_table


VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64, "output_channels": 16}
DECODER = {"decoder_depth": 2, "decoder_width": 24, "decoder_heads": 3, "target_width": 10}


def tiny_config(**changes) -> SamiConfig:
    return SamiConfig(**{"vision_config": VISION, **DECODER, **changes})


def tiny_model(**changes) -> SamiForPreTraining:
    torch.manual_seed(0)
    model = SamiForPreTraining(tiny_config(**changes)).eval()
    for parameter in model.parameters():  # norms and biases that do something
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, mean=parameter.detach().mean().item(), std=0.2)
    return model


def example(batch_size: int = 2, size: int = 64, width: int = 10) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    patches = (size // 16) ** 2
    return {
        "pixel_values": torch.randn(batch_size, 3, size, size, generator=generator),
        "target_features": torch.randn(batch_size, patches, width, generator=generator),
        "noise": torch.rand(batch_size, patches, generator=generator),
    }


# A second implementation, image by image and token by token, from the equations of the paper's section 3.1


def naive_norm(layer, token):
    mean = token.sum() / len(token)
    variance = ((token - mean) ** 2).sum() / len(token)
    return (token - mean) / torch.sqrt(variance + layer.eps) * layer.weight + layer.bias


def naive_linear(layer, token):
    return layer.weight @ token + layer.bias


def naive_mlp(mlp, token):
    hidden = naive_linear(mlp.fc1, token)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return naive_linear(mlp.fc2, hidden)


def naive_attention(query, keys, values, heads):
    """One token's answer: softmax(q k / sqrt(d)) v, head by head."""
    parts = []
    for head in range(heads):
        size = len(query) // heads
        own = slice(head * size, (head + 1) * size)
        scores = torch.stack([query[own] @ key[own] for key in keys]) / math.sqrt(size)
        weights = scores.exp() / scores.exp().sum()
        parts.append(sum(weight * value[own] for weight, value in zip(weights, values, strict=True)))
    return torch.cat(parts)


def naive_encoder(model, tokens):
    for layer in model.vision_encoder.layers:
        width = len(tokens[0])
        triples = [naive_linear(layer.attention.qkv, naive_norm(layer.norm1, token)) for token in tokens]
        keys, values = [t[width : 2 * width] for t in triples], [t[2 * width :] for t in triples]
        heads = layer.attention.config.num_attention_heads
        answers = [naive_attention(t[:width], keys, values, heads) for t in triples]
        tokens = [t + naive_linear(layer.attention.proj, a) for t, a in zip(tokens, answers, strict=True)]
        tokens = [t + naive_mlp(layer.mlp, naive_norm(layer.norm2, t)) for t in tokens]
    return [naive_norm(model.norm, token) for token in tokens]


def naive_decoder_layer(layer, tokens, anchors, heads):
    sources = [naive_norm(layer.norm1, token) for token in [*anchors, *tokens]]
    keys = [naive_linear(layer.attention.k_proj, source) for source in sources]
    values = [naive_linear(layer.attention.v_proj, source) for source in sources]
    result = []
    for token in tokens:
        query = naive_linear(layer.attention.q_proj, naive_norm(layer.norm1, token))
        token = token + naive_linear(layer.attention.out_proj, naive_attention(query, keys, values, heads))
        result.append(token + naive_mlp(layer.mlp, naive_norm(layer.norm2, token)))
    return result


def naive_reconstruction(model, pixels, noise):
    """(3, H, W), (N,) -> (N, C), for one image."""
    config, embeddings = model.config, model.vision_encoder.embeddings
    side = pixels.shape[-1] // 16
    order = sorted(range(side * side), key=lambda place: noise[place])
    visible = order[: int(len(order) * (1 - config.mask_ratio))]
    masked = [place for place in order if place not in visible]
    table = embeddings.resized_positions(side, side)[0]
    tokens = [model.cls_token[0, 0] + embeddings.position_embeddings[0, 0]]
    for place in visible:
        row, column = divmod(place, side)
        patch = pixels[:, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
        weight = embeddings.projection.weight.flatten(1)
        tokens.append(weight @ patch.flatten() + embeddings.projection.bias + table[place])
    decoder = model.decoder
    cls_token, *encoded = [naive_linear(decoder.embed, token) for token in naive_encoder(model, tokens)]
    places = sine_cosine_table(side, side, config.decoder_width)
    anchors = [token + places[place] for token, place in zip(encoded, visible, strict=True)]
    queries = [decoder.mask_token[0, 0] + places[place] for place in masked]
    first = [cls_token] if config.decode_cls_token else []
    for layer in decoder.layers:
        if config.decoder == "cross_attention":
            queries = naive_decoder_layer(layer, queries, [*first, *anchors], config.decoder_heads)
        else:
            everything = naive_decoder_layer(layer, [*first, *anchors, *queries], [], config.decoder_heads)
            first = everything[: len(first)]
            anchors = everything[len(first) : len(first) + len(anchors)]
            queries = everything[len(first) + len(anchors) :]
    merged = dict(zip(masked, queries, strict=True))
    merged |= dict(zip(visible, encoded if config.decoder == "cross_attention" else anchors, strict=True))
    return torch.stack([naive_linear(decoder.head, naive_norm(decoder.norm, merged[p])) for p in range(side * side)])


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["cross_attention", "full"])
@pytest.mark.parametrize("cls_token", [True, False])
def test_agrees_with_the_equations(decoder, cls_token) -> None:
    model, batch = tiny_model(decoder=decoder, decode_cls_token=cls_token), example()
    outputs = model(**batch)
    for index in range(2):
        expected = naive_reconstruction(model, batch["pixel_values"][index], batch["noise"][index])
        torch.testing.assert_close(outputs.reconstruction[index], expected, atol=2e-5, rtol=1e-4)
    expected_loss = ((outputs.reconstruction - batch["target_features"]) ** 2).sum() / (2 * 16 * 10)
    torch.testing.assert_close(outputs.loss, expected_loss)


@torch.no_grad()
def test_mask_and_order_follow_the_noise() -> None:
    batch = example()
    outputs = tiny_model(mask_ratio=0.6)(**batch)
    assert outputs.mask.sum(1).tolist() == [10, 10]  # int(16 * 0.4) = 6 stay visible
    for noise, mask, restore in zip(batch["noise"], outputs.mask, outputs.ids_restore, strict=True):
        assert noise[mask == 0].max() < noise[mask == 1].min()
        assert torch.equal(noise.sort().values[restore], noise)


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["cross_attention", "full"])
def test_hidden_pixels_reach_nothing_and_visible_ones_do(decoder) -> None:
    model, batch = tiny_model(decoder=decoder), example(batch_size=1)
    before = model(**batch)
    for place, hidden in enumerate(before.mask[0].bool().tolist()):
        row, column = divmod(place, 4)
        pixels = batch["pixel_values"].clone()
        pixels[:, :, row * 16 : row * 16 + 16, column * 16 : column * 16 + 16] += 3
        after = model(**(batch | {"pixel_values": pixels})).reconstruction
        same = torch.isclose(after, before.reconstruction, atol=1e-6).all(-1)[0]
        assert same.all() if hidden else not same.any()


@pytest.mark.parametrize(
    ("changes", "still"),
    [
        ({}, {"vision_encoder.embeddings.position_embeddings"}),
        ({"learn_positions": True}, set()),
        ({"decoder": "full", "loss_tokens": "masked"}, {"vision_encoder.embeddings.position_embeddings"}),
        ({"loss": "cosine", "loss_tokens": "masked"}, {"vision_encoder.embeddings.position_embeddings"}),
    ],
)
def test_gradients_reach_every_parameter(changes, still) -> None:
    model = tiny_model(**changes)
    model(**example()).loss.backward()
    without = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert without == still


@torch.no_grad()
def test_losses() -> None:
    batch = example()
    mse = tiny_model()(**batch)
    distance = (mse.reconstruction - batch["target_features"]).square().mean(-1)
    masked = tiny_model(loss_tokens="masked")(**batch)
    torch.testing.assert_close(masked.loss, distance[mse.mask.bool()].mean())
    cosine = tiny_model(loss="cosine")(**batch)
    lengths = mse.reconstruction.norm(dim=-1) * batch["target_features"].norm(dim=-1)
    torch.testing.assert_close(
        cosine.loss, 1 - ((mse.reconstruction * batch["target_features"]).sum(-1) / lengths).mean()
    )
    assert tiny_model()(batch["pixel_values"]).loss is None


@torch.no_grad()
def test_pixel_target_is_each_patch_in_place() -> None:
    model = tiny_model(target="pixels", loss_tokens="masked", decoder="full", normalize_pixels=False)
    assert model.config.target_width == 768
    pixels = example()["pixel_values"]
    target = model.pixel_target(pixels)
    assert target.shape == (2, 16, 768)
    torch.testing.assert_close(target[1, 6].view(16, 16, 3), pixels[1, :, 16:32, 32:48].permute(1, 2, 0))
    model.config.normalize_pixels = True
    normal = model.pixel_target(pixels)
    torch.testing.assert_close(normal[0, 3].mean(), torch.tensor(0.0), atol=1e-6, rtol=0)
    torch.testing.assert_close(normal[0, 3].std(), torch.tensor(1.0), atol=1e-4, rtol=0)
    outputs = model(pixels, noise=example()["noise"])
    distance = (outputs.reconstruction - normal).square().mean(-1)
    torch.testing.assert_close(outputs.loss, distance[outputs.mask.bool()].mean())


def test_a_few_steps_learn_the_targets() -> None:
    model, batch = tiny_model().train(), example()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@torch.no_grad()
def test_images_of_other_sizes() -> None:
    """The encoder's table is resized, the decoder's is computed for the grid; a grid need not be square."""
    model = tiny_model()
    outputs = model(torch.randn(1, 3, 96, 48))
    assert outputs.reconstruction.shape == (1, 18, 10) and outputs.mask.sum() == 14
    table = sine_cosine_table(6, 3, 24).view(6, 3, 24)
    assert (table[:, 1, :12] == table[0, 1, :12]).all() and (table[2, :, 12:] == table[2, 0, 12:]).all()


@pytest.mark.parametrize("source", ["model", "folder"])
def test_the_encoder_moves_into_segmentation(tmp_path: Path, source) -> None:
    sami = tiny_model(learn_positions=True)
    torch.nn.init.normal_(sami.vision_encoder.embeddings.position_embeddings)
    if source == "folder":
        sami.save_pretrained(tmp_path)
    model = EfficientSamModel.from_sami(sami if source == "model" else tmp_path)
    assert model.config.vision_config.hidden_size == 16 and model.config.vision_config.image_size == 1024
    assert model.vision_encoder.embeddings.position_embeddings.shape == (1, 197, 16)
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        one, other = (m.eval().vision_encoder(image).last_hidden_state for m in (sami, model))
    assert torch.equal(one, other)
    assert all(p.requires_grad for p in model.parameters())


def test_an_encoder_that_does_not_fit_is_refused() -> None:
    parts = {
        "prompt_encoder_config": {"hidden_size": 16},
        "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2},
    }
    wide = EfficientSamConfig(vision_config={**VISION, "hidden_size": 32}, **parts)
    with pytest.raises(ValueError, match="does not fit config.vision_config"):
        EfficientSamModel.from_sami(tiny_model(), wide)
    with pytest.raises(ValueError, match="model_type 'efficientsam', expected a SamiForPreTraining"):
        EfficientSamModel.from_sami(EfficientSamModel(wide))
    other_heads = EfficientSamConfig(vision_config={**VISION, "num_attention_heads": 4}, **parts)
    with pytest.raises(ValueError, match="num_attention_heads is 4, but the encoder of source has 2"):
        EfficientSamModel.from_sami(tiny_model(), other_heads)


def test_saved_folders_carry_what_they_need(tmp_path: Path) -> None:
    """Loaded through the Auto classes, here and in a process that has no package."""
    model, batch = tiny_model(), example()
    model.save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is SamiConfig
    loaded = AutoModelForPreTraining.from_pretrained(tmp_path)
    assert type(loaded) is SamiForPreTraining
    with torch.no_grad():
        expected = model(**batch).loss
        assert torch.equal(loaded(**batch).loss, expected)
    assert (tmp_path / "modeling_sami.py").read_text() == Path(
        efficientsam_hf.models.__file__, "..", "modeling_sami.py"
    ).resolve().read_text()
    torch.save(batch, tmp_path / "batch.pt")
    script = (
        "import sys; sys.modules['efficientsam_hf'] = None\n"
        "import torch; from transformers import AutoModelForPreTraining\n"
        "model = AutoModelForPreTraining.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules.')\n"
        "print(model(**torch.load(sys.argv[1] + '/batch.pt')).loss.item())"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(expected.item(), rel=1e-6)
    assert "AutoModelForPreTraining" in json.loads((tmp_path / "config.json").read_text())["auto_map"]


def test_presets_have_the_papers_sizes() -> None:
    with torch.device("meta"):
        counts = {
            name: sum(p.numel() for p in SamiForPreTraining(SamiConfig.from_preset(name)).vision_encoder.parameters())
            for name in ("ti", "s", "b")
        }
    assert [round(count / 1e6, 1) for count in counts.values()] == [5.5, 21.7, 85.8]
    config = SamiConfig()
    assert (config.vision_config.image_size, config.mask_ratio, config.target_width) == (224, 0.75, 256)
    assert (config.decoder_depth, config.decoder_width, config.decoder_heads) == (8, 512, 16)
    with pytest.raises(ValueError, match="variant is 'xl'"):
        SamiConfig.from_preset("xl")


def test_gradient_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for checkpointed in (False, True):
        model = tiny_model().train()
        if checkpointed:
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        calls = []
        for layer in (model.vision_encoder.layers[0].mlp, model.decoder.layers[0].mlp):
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        model(**example()).loss.backward()
        assert len(calls) == (4 if checkpointed else 2)  # once more in the backward pass
        gradients.append(model.decoder.layers[0].attention.q_proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_hidden_states_of_the_encoder() -> None:
    outputs = tiny_model()(**example(), output_hidden_states=True)
    assert [tuple(state.shape) for state in outputs.hidden_states] == [(2, 5, 16)] * 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_ratio": 0.99}, "mask_ratio is 0.99: of 16 patches it leaves 0 visible"),
        ({"mask_ratio": 0.0}, "mask_ratio is 0.0: of 16 patches it leaves 16 visible"),
        ({"loss": "l1"}, "loss is 'l1', expected one of mse, cosine"),
        ({"decoder": "none"}, "decoder is 'none'"),
        ({"target": "clip"}, "target is 'clip'"),
        ({"loss_tokens": "visible"}, "loss_tokens is 'visible'"),
        ({"decoder_width": 25}, "decoder_width is 25, expected a multiple of decoder_heads"),
        ({"decoder_depth": 0}, "decoder_depth is 0"),
        ({"decoder_width": 2**40}, "decoder_width is 1099511627776"),
        ({"mask_ratio": float("nan")}, "mask_ratio is nan, expected a number from 0 to 1"),
        ({"decoder_mlp_ratio": float("inf")}, "decoder_mlp_ratio is inf"),
        ({"loss": 3}, "'loss'"),
    ],
)
def test_bad_configs_are_named(changes, words) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_config(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"target_features": torch.zeros(2, 16, 9)},
            r"target_features has shape \(2, 16, 9\), expected \(2, 16, 10\)",
        ),
        ({"noise": torch.zeros(2, 15)}, r"noise has shape \(2, 15\), expected \(2, 16\)"),
        ({"pixel_values": torch.zeros(2, 3, 60, 64)}, "60 x 64 pixels, expected multiples of 16"),
        ({"pixel_values": torch.zeros(2, 3, 16, 16), "noise": None, "target_features": None}, "of 1 patches"),
    ],
)
def test_bad_inputs_are_named(changes, words) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_model()(**(example() | changes))
    with pytest.raises(TypeError, match="targets"):
        tiny_model()(**example(), targets=None)


def test_a_pixel_target_takes_no_features() -> None:
    with pytest.raises(ValueError, match="target is 'pixels'"):
        tiny_model(target="pixels")(**example(width=768))
