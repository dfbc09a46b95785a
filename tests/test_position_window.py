# SPDX-License-Identifier: Apache-2.0
"""A part of an image at its place in the whole has the whole's positions."""

import copy

import pytest
import torch
from test_segmentation_training import example_batch, tiny_model
from torch import nn

from efficientsam_hf import EfficientSamModel
from efficientsam_hf.training.position_window import PositionWindow
from efficientsam_hf.training.segmentation import InteractiveSegmentation, PromptSampling


SIDE = 128  # of the larger image; the part has 64 x 48 pixels, 4 x 3 patches
PLACE = torch.tensor([3, 2])


@pytest.fixture()
def model() -> EfficientSamModel:
    model = tiny_model().eval()
    with torch.no_grad():
        model.vision_encoder.embeddings.position_embeddings.normal_()
    return model


def part(whole: torch.Tensor) -> torch.Tensor:
    """The place in a grid of the larger image's patches: (8, 8, ...) -> (12, ...)."""
    return whole[3:7, 2:5].flatten(0, 1)


def test_patches_have_the_positions_of_the_whole(model: EfficientSamModel) -> None:
    window, embeddings = PositionWindow(model, SIDE), model.vision_encoder.embeddings
    pixels = torch.randn(1, 3, SIDE, SIDE)
    whole = part(embeddings(pixels)[0].unflatten(0, (8, 8)))
    cut = pixels[:, :, 48:112, 32:80]
    stretched = embeddings(cut)[0]
    assert (stretched - whole).abs().max() > 0.5  # what it is about
    with window.at(PLACE):
        torch.testing.assert_close(embeddings(cut)[0], whole)
    torch.testing.assert_close(embeddings(cut)[0], stretched, atol=0, rtol=0)


def test_prompts_and_embeddings_have_the_positions_of_the_whole(model: EfficientSamModel) -> None:
    window = PositionWindow(model, SIDE)
    points = torch.tensor([[[[10.0, 20.0], [0.0, 0.0]]]])
    boxes, labels = torch.tensor([[[5.0, 6.0, 30.0, 40.0]]]), torch.tensor([[[1, -1]]])
    offset = torch.tensor([32.0, 48.0])
    for box in (boxes, torch.full_like(boxes, -1.0), None):
        moved = box if box is None or box.max() < 0 else box + offset.repeat(2)
        expected, _ = model.prompt_encoder(points + offset, labels, moved, (SIDE, SIDE))
        with window.at(PLACE):
            found, _ = model.prompt_encoder(points, labels, box, (64, 48))
        torch.testing.assert_close(found, expected)

    seen: list[torch.Tensor] = []
    model.mask_decoder.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    with window.at(PLACE):
        model.decode_prompts(torch.randn(1, 16, 4, 3), points, labels)
    grid = model.prompt_encoder.positional_encoding.grid(8, 8).unflatten(0, (8, 8))
    torch.testing.assert_close(seen[0], part(grid))


def test_filled_boxes_stay_in_the_frame_of_the_part() -> None:
    model = tiny_model(dense_boxes=True).eval()
    window, seen = PositionWindow(model, SIDE), []
    model.prompt_encoder.mask_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    boxes, embeddings = torch.tensor([[[5.0, 6.0, 30.0, 40.0]]]), torch.randn(1, 16, 4, 3)
    model.decode_prompts(embeddings, input_boxes=boxes)
    with window.at(PLACE):
        model.decode_prompts(embeddings, input_boxes=boxes)
    assert seen[0].shape == (1, 1, 16, 12)
    torch.testing.assert_close(seen[1], seen[0], atol=0, rtol=0)


def test_places_are_all_of_the_larger_image() -> None:
    window, generator = PositionWindow(tiny_model(), SIDE), torch.Generator().manual_seed(0)
    places = {tuple(window.random_place((64, 48), generator).tolist()) for _ in range(500)}
    assert places == {(row, column) for row in range(5) for column in range(6)}
    assert window.random_place((SIDE, SIDE), generator) is None
    assert window.random_place((2 * SIDE, 64), generator) is None
    with pytest.raises(ValueError, match="side must be a multiple of 16, got 100"):
        PositionWindow(tiny_model(), 100)


def test_a_compiled_graph_is_good_for_all_places(model: EfficientSamModel) -> None:
    window, graphs = PositionWindow(model, SIDE), []
    points, labels = torch.tensor([[[[10.0, 20.0]]]]), torch.ones(1, 1, 1, dtype=torch.long)

    def backend(graph: nn.Module, inputs: list) -> nn.Module:
        graphs.append(graph)
        return graph

    def run(pixels: torch.Tensor) -> torch.Tensor:
        return model.decode_prompts(model.get_image_embeddings(pixels), points, labels)[0]

    compiled, pixels = torch.compile(run, backend=backend, fullgraph=True, dynamic=False), torch.randn(1, 3, 64, 64)
    answers = []
    for place in (PLACE, torch.tensor([0, 1]), torch.tensor([4, 4])):
        with window.at(place), torch.no_grad():
            answers.append(run(pixels))
            torch.testing.assert_close(compiled(pixels), answers[-1])
    assert len(graphs) == 1
    assert (answers[0] - answers[1]).abs().max() > 1e-4


def test_training_on_parts_moves_them_and_whole_images_stay() -> None:
    torch.manual_seed(0)
    sampling = PromptSampling(rounds=2)
    plain, placed = (
        InteractiveSegmentation(copy.deepcopy(tiny_model()), sampling=sampling, whole_size=size) for size in (64, 128)
    )
    batch = example_batch()
    losses = [module.eval()(batch)["loss"].item() for module in (plain, placed)]
    assert losses[0] != losses[1]
    without = InteractiveSegmentation(tiny_model(), sampling=sampling).eval()
    assert without(batch)["loss"].item() == losses[0]
    again = copy.deepcopy(placed)  # as FSDP keeps one; its hooks are its own
    assert again(batch)["loss"].item() == losses[1]
    placed.window.place = PLACE
    assert again.window.place is None and again(batch)["loss"].item() == losses[1]
    assert again.model.state_dict().keys() == tiny_model().state_dict().keys()
