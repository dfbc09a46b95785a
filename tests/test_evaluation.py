# SPDX-License-Identifier: Apache-2.0
"""mIoU by prompt: against numbers known by construction, and against a plain loop over the public interface."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from efficientsam_hf import EfficientSamConfig, EfficientSamImageProcessor, EfficientSamModel, EfficientSamProcessor
from efficientsam_hf.data.prompts import center_points, tight_boxes
from efficientsam_hf.evaluation import evaluate, score_objects, worst_pictures
from efficientsam_hf.metrics import mask_iou


HEIGHT, WIDTH = 48, 64


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[top:bottom, left:right] = True
    return mask


def sample(*masks: np.ndarray) -> dict[str, Any]:
    return {"image": Image.new("RGB", (WIDTH, HEIGHT)), "masks": np.stack(masks), "image_id": 1}


class PlainProcessor:
    """Model pixels are the picture's; points and boxes come back as float64, as from `SamProcessor`."""

    def __call__(self, images: Image.Image, return_tensors: str, **prompts: Any) -> dict[str, Any]:
        tensors = {name: torch.tensor(value, dtype=torch.float64) for name, value in prompts.items()}
        if "input_labels" in tensors:
            tensors["input_labels"] = tensors["input_labels"].long()
        pixels = torch.from_numpy(np.array(images)).permute(2, 0, 1)[None].float()
        size = [[images.height, images.width]]
        return {"pixel_values": pixels, "original_sizes": size, "reshaped_input_sizes": size, **tensors}

    def post_process_masks(self, masks: torch.Tensor, original_sizes: Any, reshaped_input_sizes: Any) -> list:
        assert masks.dtype == torch.float32
        return [masks[0] > 0]


class BoxFiller(torch.nn.Module):
    """Answers a box with its left half, the whole of it and nothing, a click with 5 x 5 pixels around it."""

    def __init__(self, scores: tuple[float, float, float]) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.scores = scores
        self.embedded = 0
        self.clicks: list[tuple[int, int]] = []
        self.most_prompts = 0

    def get_image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        self.embedded += 1
        assert not self.training
        return pixel_values

    def forward(
        self, image_embeddings, multimask_output, input_points=None, input_labels=None, input_boxes=None
    ) -> SimpleNamespace:
        assert multimask_output
        if input_boxes is None:
            assert input_points.dtype == torch.float32 and (input_labels == 1).all()
            self.clicks += [tuple(point) for point in input_points[0, :, 0].int().tolist()]
            boxes = torch.cat([input_points[0, :, 0] - 2, input_points[0, :, 0] + 3], dim=1)
        else:
            assert input_boxes.dtype == torch.float32
            boxes = input_boxes[0]
        self.most_prompts = max(self.most_prompts, len(boxes))
        logits = -torch.ones(1, len(boxes), 3, *image_embeddings.shape[-2:])
        for index, (left, top, right, bottom) in enumerate(boxes.int().tolist()):
            logits[0, index, 0, top:bottom, left : (left + right) // 2] = 1
            logits[0, index, 1, top:bottom, left:right] = 1
        return SimpleNamespace(pred_masks=logits, iou_scores=torch.tensor(self.scores).expand(1, len(boxes), 3))


SAMPLES = [sample(rectangle(4, 6, 24, 16), rectangle(30, 10, 50, 40)), sample(rectangle(10, 10, 15, 15))]


def test_the_mask_with_the_highest_score_counts() -> None:
    whole = evaluate(BoxFiller((0.1, 0.9, 0.2)), PlainProcessor(), SAMPLES, prompts=["box"], progress=False)
    half = evaluate(BoxFiller((0.9, 0.1, 0.2)), PlainProcessor(), SAMPLES, prompts=["box"], progress=False)
    assert (whole["images"], whole["objects"]) == (2, 3)
    assert whole["box"]["miou"] == pytest.approx(1) and half["box"]["oracle_miou"] == pytest.approx(1)
    assert half["box"]["miou"] == pytest.approx((0.5 + 0.5 + 0.4) / 3)
    assert set(whole) == {"images", "objects", "skipped", "seed", "sizes", "box"} and whole["skipped"] == 0


def test_boxes_with_noise_depend_on_seed_and_image_alone() -> None:
    def scores(**options: Any) -> torch.Tensor:
        model = BoxFiller((0.1, 0.9, 0.2))
        return score_objects(model, PlainProcessor(), SAMPLES, progress=False, **options).ious["noisy_box"][:, 0]

    first = scores(prompts=["noisy_box"])
    assert torch.equal(first, scores(prompts=["uniform", "noisy_box"])) and 0.4 < first.mean() < 0.95
    assert not torch.equal(first, scores(prompts=["noisy_box"], seed=1))
    assert "noisy_box" not in evaluate(BoxFiller((0.1, 0.9, 0.2)), PlainProcessor(), SAMPLES, progress=False)


def test_thirds_by_size() -> None:
    result = evaluate(BoxFiller((0.9, 0.1, 0.2)), PlainProcessor(), SAMPLES, prompts=["box"], progress=False)
    sizes = {name: share * HEIGHT * WIDTH for name, share in result["sizes"].items()}
    assert sizes == pytest.approx({"small": 25, "medium": 200, "large": 600}, rel=0.01)
    assert [result["box"][f"miou_{size}"] for size in sizes] == pytest.approx([0.4, 0.5, 0.5])


def test_centre_click_is_the_deepest_pixel() -> None:
    model = BoxFiller((0.1, 0.9, 0.2))
    result = evaluate(model, PlainProcessor(), SAMPLES[1:], prompts=["center"], progress=False)
    assert model.clicks == [(12, 12)]
    assert result["center"]["miou"] == pytest.approx(1)


def test_centre_click_counts_the_border_as_boundary() -> None:
    model = BoxFiller((0.1, 0.9, 0.2))
    corner, blob = rectangle(0, 0, 21, 9), rectangle(20, 30, 64, 48) | rectangle(30, 36, 31, 37)
    evaluate(model, PlainProcessor(), [sample(corner, blob)], prompts=["center"], progress=False)
    expected = center_points(torch.from_numpy(np.stack([corner, blob]))).int().tolist()
    assert model.clicks == [tuple(point) for point in expected]
    assert model.clicks[0][1] == 4


def test_uniform_click_depends_on_seed_and_image_alone() -> None:
    def clicks(samples: list[dict[str, Any]], **options: Any) -> list[tuple[int, int]]:
        model = BoxFiller((0.1, 0.9, 0.2))
        evaluate(model, PlainProcessor(), samples, prompts=["uniform"], progress=False, **options)
        return model.clicks

    same = [sample(SAMPLES[0]["masks"][1])] * 6
    assert clicks(same) == clicks(same) == clicks(same, prompt_chunk=1)
    assert clicks(same)[:3] == clicks(same, limit=3)
    assert clicks(same) != clicks(same, seed=1)
    assert len(set(clicks(same))) > 1
    assert all(same[0]["masks"][0, y, x] for x, y in clicks(same))


class Stamps(torch.nn.Module):
    """Answers with 5 x 5 pixels around each foreground click, less those around each background click."""

    def __init__(self, background: bool = True) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = SimpleNamespace(prompt_encoder_config=SimpleNamespace(background_points=background))
        self.calls: list[tuple[list, list]] = []

    def get_image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return pixel_values

    def forward(self, image_embeddings, multimask_output, input_points, input_labels) -> SimpleNamespace:
        points, labels = input_points[0].int().tolist(), input_labels[0].tolist()
        self.calls.append((points, labels))
        logits = -torch.ones(1, len(points), 3, *image_embeddings.shape[-2:])
        for index, clicks in enumerate(points):
            for (x, y), label in sorted(zip(clicks, labels[index]), key=lambda click: -click[1]):
                logits[0, index, :, max(0, y - 2) : y + 3, max(0, x - 2) : x + 3] = 1 if label else -1
        return SimpleNamespace(pred_masks=logits, iou_scores=torch.zeros(1, len(points), 3))


def test_further_clicks_correct_the_last_answer() -> None:
    wide, small = rectangle(10, 10, 20, 15), rectangle(31, 31, 34, 34)
    model = Stamps()
    clicks = (1, 2, 3)
    result = evaluate(
        model, PlainProcessor(), [sample(wide, small)], prompts=["center"], clicks=clicks, progress=False
    )
    points, labels = model.calls[2]
    assert points[0] == [[12, 12], [17, 12], [12, 12]] and labels[0] == [1, 1, 1]  # at last nothing is wrong
    assert points[1][:2] == [[32, 32], [30, 30]] and labels[1][:2] == [1, 0]  # the corner of what is too much
    assert result["center"]["miou"] == pytest.approx((25 / 50 + 9 / 25) / 2)
    assert result["center:2"]["miou"] == pytest.approx((1 + 5 / 20) / 2)
    assert set(result) == {"images", "objects", "skipped", "seed", "sizes", "center", "center:2", "center:3"}


def test_models_without_background_points_get_none() -> None:
    model = Stamps(background=False)
    small = [sample(rectangle(31, 31, 34, 34))]
    evaluate(model, PlainProcessor(), small, prompts=["center"], clicks=(3,), progress=False)
    assert model.calls[-1] == ([[[32, 32]] * 3], [[1, 1, 1]])


def test_uniform_clicks_add_up() -> None:
    model = Stamps()
    result = evaluate(model, PlainProcessor(), SAMPLES[:1], prompts=["uniform"], clicks=(1, 4), progress=False)
    (first, _), (more, labels) = model.calls
    assert [clicks[:1] for clicks in more] == first and labels == [[1] * 4] * 2
    masks = SAMPLES[0]["masks"]
    assert all(masks[index, y, x] for index, clicks in enumerate(more) for x, y in clicks)
    assert result["uniform:4"]["miou"] > result["uniform"]["miou"]


def test_two_models_are_compared_object_by_object() -> None:
    def scores(answer: tuple[float, float, float], **options: Any):
        return score_objects(BoxFiller(answer), PlainProcessor(), SAMPLES, progress=False, **options)

    whole, half = scores((0.1, 0.9, 0.2)), scores((0.9, 0.1, 0.2))
    result = whole.compare(half)["box"]
    assert result["difference"] == pytest.approx((0.5 + 0.5 + 0.4) / 3 - 1)
    assert result["low"] == pytest.approx(-0.6) and result["high"] == pytest.approx(-0.5)  # one picture or the other
    assert half.compare(whole)["box"]["difference"] == -result["difference"]
    assert whole.compare(whole)["center"] == {"difference": 0, "low": 0, "high": 0}
    with pytest.raises(ValueError, match="same objects"):
        whole.compare(scores((0.1, 0.9, 0.2), limit=1))
    with pytest.raises(ValueError, match="same prompts"):
        whole.compare(scores((0.1, 0.9, 0.2), seed=1))


def test_the_worst_come_first_with_the_answer_that_was_scored() -> None:
    model, samples = BoxFiller((0.9, 0.1, 0.2)), SAMPLES[::-1]
    scores = score_objects(model, PlainProcessor(), samples, clicks=(1,), progress=False)
    pictures = dict(worst_pictures(scores, model, PlainProcessor(), samples, "box", 2))
    assert list(pictures) == ["001_iou_0.400_image_0_object_0", "002_iou_0.500_image_1_object_0"]
    uniform = worst_pictures(scores, model, PlainProcessor(), samples, "uniform", 9)
    clicked, embedded = len(model.clicks), model.embedded
    assert len(list(uniform)) == 3
    assert model.embedded == embedded + 2  # each picture once
    assert set(model.clicks[clicked:]) <= set(model.clicks[:clicked])  # the same clicks once more
    # The answer's left half is drawn on the right of the sheet, the object with its box on the left.
    sheet = np.asarray(pictures["002_iou_0.500_image_1_object_0"]).astype(int)
    left, right = sheet[:, : sheet.shape[1] // 2], sheet[:, sheet.shape[1] // 2 :]
    blue = [(half[..., 2] - half[..., 0] > 40).sum() for half in (left, right)]
    assert 0 < blue[1] < blue[0]


def test_each_image_is_embedded_once_and_prompts_come_in_chunks() -> None:
    model = BoxFiller((0.1, 0.9, 0.2)).train()
    many = [sample(*[rectangle(i, i, i + 5, i + 5) for i in range(7)])]
    chunked = evaluate(model, PlainProcessor(), many, prompt_chunk=3, progress=False)
    assert model.embedded == 1 and model.most_prompts == 3 and model.training
    assert chunked == evaluate(model, PlainProcessor(), many, progress=False)
    assert chunked["box"]["miou"] == pytest.approx(1)


class Damaged(list):
    """Samples of which some cannot be read."""

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        if isinstance(item, Exception):
            raise item
        return item


def test_damaged_samples_are_left_out_counted_and_named(caplog) -> None:
    samples = Damaged([SAMPLES[0], ValueError("torn"), SAMPLES[1], OSError("gone")])
    options = {"prompts": ["box"], "progress": False}
    named = []
    scores = score_objects(
        BoxFiller((0.1, 0.9, 0.2)), PlainProcessor(), samples, report=lambda *one: named.append(one), **options
    )
    assert named == [(1, "torn"), (3, "gone")] and not caplog.records
    assert scores.images.tolist() == [0, 0, 2] and scores.summary()["skipped"] == 2
    evaluate(BoxFiller((0.1, 0.9, 0.2)), PlainProcessor(), samples, limit=2, **options)
    assert [record.getMessage() for record in caplog.records] == ["picture 1 could not be used: torn"]
    with pytest.raises(ValueError, match="none of 1 pictures could be used; picture 0: torn"):
        evaluate(BoxFiller((0.1, 0.9, 0.2)), PlainProcessor(), Damaged([ValueError("torn")]), **options)
    with pytest.raises(KeyError):  # a defect is not damage
        evaluate(BoxFiller((0.1, 0.9, 0.2)), PlainProcessor(), Damaged([KeyError("image")]), **options)


def test_images_without_objects_do_not_count() -> None:
    empty = {"image": Image.new("RGB", (WIDTH, HEIGHT)), "masks": np.zeros((0, HEIGHT, WIDTH), bool)}
    model = BoxFiller((0.1, 0.9, 0.2))
    assert evaluate(model, PlainProcessor(), [empty, *SAMPLES], progress=False)["images"] == 2
    with pytest.raises(ValueError, match="no objects in 1 of 1"):
        evaluate(model, PlainProcessor(), [empty], progress=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ["centre"]}, "prompts must be some of"),
        ({"prompts": []}, "prompts must be some of"),
        ({"prompts": "box"}, "prompts must be some of"),
        ({"clicks": ()}, "clicks must be numbers"),
        ({"clicks": (0, 1)}, "clicks must be numbers"),
        ({"limit": 0}, "limit must be at least 1"),
        ({"prompt_chunk": 0}, "prompt_chunk must be at least 1"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(BoxFiller((0.1, 0.9, 0.2)), PlainProcessor(), SAMPLES, progress=False, **options)


def test_bad_samples_and_dtype() -> None:
    model = BoxFiller((0.1, 0.9, 0.2))
    turned = {"image": Image.new("RGB", (HEIGHT, WIDTH)), "masks": SAMPLES[0]["masks"]}
    with pytest.raises(ValueError, match="masks of sample 0 must be bool of shape"):
        evaluate(model, PlainProcessor(), [turned], progress=False)
    with pytest.raises(ValueError, match="sample 0 holds an empty mask"):
        evaluate(model, PlainProcessor(), [sample(rectangle(0, 0, 0, 0))], progress=False)
    with pytest.raises(ValueError, match="load the model in that dtype"):
        evaluate(model.half(), PlainProcessor(), SAMPLES, dtype=torch.float32, progress=False)


@pytest.fixture(scope="module")
def tiny() -> tuple[EfficientSamModel, EfficientSamProcessor]:
    """A small model with random weights, and its processor."""
    torch.manual_seed(0)
    config = EfficientSamConfig(
        vision_config={"image_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    )
    image_processor = EfficientSamImageProcessor(size={"height": 64, "width": 64})
    return EfficientSamModel(config).eval(), EfficientSamProcessor(image_processor)


def noisy_samples() -> list[dict[str, Any]]:
    generator = np.random.default_rng(0)
    picture = Image.fromarray(generator.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    return [{"image": picture, "masks": np.stack([rectangle(4, 6, 24, 16), rectangle(30, 10, 50, 40)])}]


def test_agrees_with_a_plain_loop(tiny: tuple[EfficientSamModel, EfficientSamProcessor]) -> None:
    model, processor = tiny
    result = evaluate(model, processor, noisy_samples(), prompts=("center", "box"), prompt_chunk=1, progress=False)
    masks = torch.from_numpy(noisy_samples()[0]["masks"])
    image = noisy_samples()[0]["image"]
    center = center_points(masks)[None, :, None].tolist()
    for name, prompts in (
        ("center", {"input_points": center}),
        ("box", {"input_boxes": [tight_boxes(masks).tolist()]}),
    ):
        inputs = processor(images=image, return_tensors="pt", **prompts)
        with torch.no_grad():
            outputs = model(**inputs)
        candidates = processor.post_process_masks(outputs.pred_masks, inputs["original_sizes"])[0]
        best = [candidates[index, outputs.iou_scores[0, index].argmax()] for index in range(2)]
        expected = mask_iou(torch.stack(best), masks).mean().item()
        assert result[name]["miou"] == pytest.approx(expected, abs=1e-6)


def test_bfloat16_by_autocast_leaves_the_weights(tiny: tuple[EfficientSamModel, EfficientSamProcessor]) -> None:
    model, processor = tiny
    result = evaluate(model, processor, noisy_samples(), dtype=torch.bfloat16, progress=False)
    assert 0 <= result["box"]["miou"] <= result["box"]["oracle_miou"] <= 1
    assert next(model.parameters()).dtype == torch.float32


def test_any_promptable_model() -> None:
    from transformers import SamConfig, SamModel, SamProcessor

    # The version of the image processor that needs no torchvision.
    SamImageProcessor = pytest.importorskip("transformers.models.sam.image_processing_pil_sam").SamImageProcessorPil

    config = SamConfig(
        vision_config={
            "image_size": 64,
            "hidden_size": 16,
            "output_channels": 16,
            "num_pos_feats": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "mlp_dim": 16,
            "global_attn_indexes": [0],
            "window_size": 2,
        },
        prompt_encoder_config={"image_size": 64, "hidden_size": 16},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 16, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
    )
    processor = SamProcessor(
        SamImageProcessor(
            size={"longest_edge": 64},
            pad_size={"height": 64, "width": 64},
            mask_size={"longest_edge": 16},
            mask_pad_size={"height": 16, "width": 16},
        )
    )
    result = evaluate(SamModel(config), processor, noisy_samples(), progress=False)
    assert result["objects"] == 2
    assert 0 <= result["center"]["miou"] <= result["center"]["oracle_miou"] <= 1
