# SPDX-License-Identifier: Apache-2.0
"""Interactive segmentation as one differentiable forward: embed once, then rounds of simulated prompts."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import nn

from ..data import prompts
from .lora import add_adapters, merged_state_dict
from .losses import area_targets, binary_targets, segmentation_losses
from .pictures import prediction_sheet
from .position_window import PositionWindow


# What can be frozen: part -> the model's submodules that belong to it.
PARTS = {
    "encoder": ("vision_encoder", "neck"),
    "prompt_encoder": ("prompt_encoder",),
    "mask_decoder": ("mask_decoder",),
    # All of the decoder but the head that predicts the IoU, which then learns to choose among masks that stay.
    "masks": (
        "mask_decoder.transformer",
        "mask_decoder.iou_token",
        "mask_decoder.mask_tokens",
        "mask_decoder.upscale_conv1",
        "mask_decoder.upscale_norm",
        "mask_decoder.upscale_conv2",
        "mask_decoder.output_hypernetworks_mlps",
    ),
}


@dataclass(frozen=True)
class PromptSampling:
    """How prompts are simulated. The four kinds of first prompt are drawn per object by their weights."""

    uniform: float = 0.35
    center: float = 0.25
    box: float = 0.3
    box_and_point: float = 0.1
    rounds: int = 2
    corrected_objects: int | None = None
    mask_prompts: float = 0.5
    box_noise: float = 0.1
    exact_boxes: float = 0.0

    def __post_init__(self):
        weights = (self.uniform, self.center, self.box, self.box_and_point)
        if min(weights) < 0 or sum(weights) <= 0:
            raise ValueError(f"weights of the first prompt must be >= 0 and not all 0, got {weights}")
        if self.rounds < 1:
            raise ValueError(f"rounds must be at least 1, got {self.rounds}")
        if self.corrected_objects is not None and self.corrected_objects < 1:
            raise ValueError(f"corrected_objects must be at least 1 or None, got {self.corrected_objects}")
        for name in ("mask_prompts", "exact_boxes"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a probability, got {getattr(self, name)}")
        if self.box_noise < 0:
            raise ValueError(f"box_noise must be at least 0, got {self.box_noise}")


class InteractiveSegmentation(nn.Module):
    """Model and losses of promptable segmentation; everything trainable runs in `forward`.

    Round 1 prompts every object with a uniform click, a centre click, a noisy box, or box and click. Each further
    round adds a click from the error region of the last answer (background clicks only if the model has them) and,
    with probability `sampling.mask_prompts`, that answer's logits as mask prompt (if the model takes them), for the
    first `sampling.corrected_objects` objects of an image. The number of prompt tokens is the same in every round.
    `box_loss_weights` replaces the `focal_alpha` and `relaxation` of `loss_weights` for objects with a box: a box
    says which object is meant and how large it is, so its three masks need not differ, and what is uncertain in it is
    more often object than what is uncertain around a click.
    With `whole_size`, a side in pixels, smaller images are parts of pictures that would be as large: those of a batch
    lie together at a random place of it. `sources` names the numbers in a batch's "source" (B); metrics then have the
    "miou/NAME" of each, NaN where a batch has no object of it.
    """

    def __init__(
        self,
        model: nn.Module,
        processor=None,
        sampling: PromptSampling | None = None,
        loss_weights: dict[str, float] | None = None,
        box_loss_weights: dict[str, float] | None = None,
        whole_size: int | None = None,
        sources: Sequence[str] = (),
    ):
        super().__init__()
        self.model = model
        self.processor = processor
        self.sampling = sampling or PromptSampling()
        self.loss_weights = dict(loss_weights or {})
        self.box_loss_weights = dict(box_loss_weights or {})
        self.window = PositionWindow(model, whole_size) if whole_size else None
        self.sources = tuple(sources)
        self.compiled: dict[str, object] = {}
        self._no_split_modules = model._no_split_modules  # what FSDP's transformer policy wraps
        if model.config.prompt_encoder_config.mask_prompts and not (self._gives_masks() or self._fills_boxes()):
            # Without a gradient they would only be in the way: distributed training waits for every parameter.
            model.prompt_encoder.mask_embed.requires_grad_(False)

    def _gives_masks(self) -> bool:
        """Whether any round has mask prompts."""
        possible = self.model.config.prompt_encoder_config.mask_prompts
        return possible and self.sampling.rounds > 1 and self.sampling.mask_prompts > 0

    def _fills_boxes(self) -> bool:
        """Whether boxes are embedded as masks are."""
        boxed = self.sampling.box + self.sampling.box_and_point > 0
        return self.model.config.prompt_encoder_config.dense_boxes and boxed

    def freeze(self, parts: Sequence[str]) -> None:
        """Take parts of the model, names of `PARTS`, out of training."""
        for name in (submodule for part in parts for submodule in PARTS[part]):
            self.model.get_submodule(name).requires_grad_(False)

    def add_adapters(self, parts: Sequence[str], rank: int, alpha: float) -> None:
        """Train parts of the model, names of `PARTS`, through low-rank adapters at their linear layers."""
        add_adapters(self.model, [submodule for part in parts for submodule in PARTS[part]], rank, alpha)

    def depths(self) -> dict[str, int]:
        """Transformer layers of the encoder above each parameter, plus one for what follows the encoder, by name.

        Layer-wise decay of the learning rate counts by them (Bao et al. 2021, BEiT): 0 for neck, prompt encoder and
        decoder, 1 for the last layer, 1 more than the number of layers for the patch embedding.
        """
        encoder = self.model.vision_encoder
        count = len(encoder.layers)
        depths = {id(p): count + 1 for p in encoder.embeddings.parameters()}
        for index, layer in enumerate(encoder.layers):
            depths |= {id(p): count - index for p in layer.parameters()}
        return {name: depths.get(id(p), 0) for name, p in self.named_parameters()}

    def compile_parts(self, **options) -> None:
        """Compile encoder, prompt decoder and losses with `torch.compile(**options)`; prompts stay eager.

        Shapes are fixed within a stage and a round, so each is compiled for itself: kernels for dynamic shapes, which
        torch would turn to at the second round, are slower.
        """
        options = {"dynamic": False, **options}
        self.compiled = {
            "embed": torch.compile(self.model.get_image_embeddings, **options),
            "decode": torch.compile(self.model.decode_prompts, **options),
            "losses": torch.compile(segmentation_losses, **options),
        }

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Loss and detached metrics of one batch, all scalars.

        `pixel_values` (B, 3, H, W) normalised, `masks` (B, Q, H, W) bool in the same frame, `object_mask` (B, Q) bool
        with False for padding, `seed` () int64 that decides all prompts. Rounds count by the number of their real
        objects. "weight" is that of all rounds, so that an object counts alike in whichever batch, or process, it is.
        """
        generator = torch.Generator(batch["masks"].device).manual_seed(int(batch["seed"]))
        with self._placed(batch, generator):
            return self._rounds(batch, generator)

    def _placed(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> AbstractContextManager:
        """Inside the block images that are parts of pictures lie somewhere in them; all others are as they are."""
        size = batch["pixel_values"].shape[-2:]
        place = self.window.random_place(size, generator) if self.window else None
        return nullcontext() if place is None else self.window.at(place)

    def _rounds(self, batch: dict[str, torch.Tensor], generator: torch.Generator) -> dict[str, torch.Tensor]:
        """Embed once, then prompt by prompt; what `forward` returns."""
        embeddings = self._part("embed", self.model.get_image_embeddings)(batch["pixel_values"])
        masks, object_mask = batch["masks"], batch["object_mask"]
        targets, prompt = self._first_prompts(masks, object_mask, generator)
        logits = scores = None
        total, weight, metrics = 0.0, 0, {}
        for number in range(1, self.sampling.rounds + 1):
            if number > 1:
                count = min(self.sampling.corrected_objects or masks.shape[1], masks.shape[1])
                masks, object_mask, targets = masks[:, :count], object_mask[:, :count], targets[:, :count]
                prompt = self._next_prompts(prompt, logits, scores, targets, masks, number - 1, generator)
            logits, scores, _ = self._part("decode", self.model.decode_prompts)(embeddings, **prompt)
            losses = self._part("losses", segmentation_losses)(
                logits, scores, targets, object_mask, **self._loss_weights(prompt["input_boxes"])
            )
            ious = losses.pop("iou")
            if number == 1:
                metrics |= self._by_source(ious, object_mask, batch.get("source"))
            objects = object_mask.sum()
            total, weight = total + losses["loss"] * objects, weight + objects
            metrics |= {name if number == 1 else f"{name}_{number}": v.detach() for name, v in losses.items()}
        return metrics | {"loss": total / weight.clamp(min=1), "weight": weight}

    def _by_source(
        self, ious: torch.Tensor, object_mask: torch.Tensor, source: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Mean IoU of each source's objects, () by name: ious (B, Q), object_mask (B, Q), source (B)."""
        if source is None:
            return {}
        mine = {name: object_mask & (source == index)[:, None] for index, name in enumerate(self.sources)}
        return {f"miou/{name}": torch.where(real, ious, 0.0).sum() / real.sum() for name, real in mine.items()}

    def _loss_weights(self, boxes: torch.Tensor) -> dict[str, float | torch.Tensor]:
        """Arguments of the losses of objects with these boxes, (B, Q, 4) with -1 for none."""
        defaults = {"focal_alpha": 0.25, "relaxation": 0.0} | self.loss_weights
        of_boxes = {
            name: torch.where(boxes[..., 0] >= 0, value, defaults[name])
            for name, value in self.box_loss_weights.items()
        }
        return self.loss_weights | of_boxes

    def _part(self, name: str, default):
        return self.compiled.get(name, default)

    @torch.no_grad()
    def _first_prompts(self, masks, object_mask, generator):
        """Targets (B, Q, h, w) at the logits' resolution, a quarter of the masks', and the prompts of round 1."""
        height, width = masks.shape[-2:]
        targets = area_targets(masks, (height // 4, width // 4))
        cells = binary_targets(targets)
        s = self.sampling
        weights = torch.tensor([s.uniform, s.center, s.box, s.box_and_point], device=masks.device)
        shares = (weights / weights.sum()).cumsum(0)
        draw = torch.rand(object_mask.shape, generator=generator, device=masks.device)
        kind = (draw[..., None] >= shares[:-1]).sum(-1)

        clicks = torch.where(
            (kind == 1)[..., None], prompts.center_points(cells), prompts.uniform_points(cells, generator)
        )
        labels = torch.where(object_mask & (kind != 2), 1, -1)
        clicks = prompts.points_in_cells(clicks, torch.ones_like(labels), masks, 4, generator)
        tight = prompts.tight_boxes(masks)
        boxes = prompts.jitter_boxes(tight, (height, width), generator, s.box_noise)
        if s.exact_boxes:
            exact = torch.rand(object_mask.shape, generator=generator, device=masks.device) < s.exact_boxes
            boxes = torch.where(exact[..., None], tight, boxes)
        boxes = torch.where((object_mask & (kind >= 2))[..., None], boxes, -1.0)
        return targets, {
            "input_points": _pad(clicks[:, :, None], s.rounds, 0.0),
            "input_labels": _pad(labels[:, :, None], s.rounds, -1),
            "input_boxes": boxes,
        }

    @torch.no_grad()
    def _next_prompts(self, prompt, logits, scores, targets, masks, slot: int, generator):
        """Prompts of the next round for the first objects: the earlier ones, a correcting click in `slot`, a mask."""
        config = self.model.config.prompt_encoder_config
        count = masks.shape[1]
        answer = best_of_three(logits[:, :count], scores[:, :count])
        cells = binary_targets(targets)
        clicks, labels = prompts.error_points(answer >= 0, cells, generator, background=config.background_points)
        clicks = prompts.points_in_cells(clicks, labels, masks, 4, generator)
        points, point_labels = prompt["input_points"][:, :count].clone(), prompt["input_labels"][:, :count].clone()
        real = targets.flatten(-2).any(-1)
        points[:, :, slot], point_labels[:, :, slot] = clicks, torch.where(real, labels, -1)
        result = {
            "input_points": points,
            "input_labels": point_labels,
            "input_boxes": prompt["input_boxes"][:, :count],
        }
        if self._gives_masks():
            draw = torch.rand(labels.shape, generator=generator, device=labels.device)
            given = draw < self.sampling.mask_prompts
            result["input_masks"] = torch.where(given[..., None, None], answer.float(), 0.0)[:, :, None]
        return result

    @torch.no_grad()
    def predict(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Low-resolution answer to the first prompts, of the three the one scored highest: (B, Q, h, w) logits."""
        generator = torch.Generator(batch["masks"].device).manual_seed(int(batch["seed"]))
        with self._placed(batch, generator):
            _, prompt = self._first_prompts(batch["masks"], batch["object_mask"], generator)
            embeddings = self.model.get_image_embeddings(batch["pixel_values"])
            logits, scores, _ = self.model.decode_prompts(embeddings, **prompt)
        return best_of_three(logits, scores), prompt

    def picture(self, batch: dict[str, torch.Tensor]) -> Image.Image:
        """A few images of the batch with masks and prompts beside the answers to these prompts."""
        logits, prompt = self.predict(batch)
        return prediction_sheet(batch, logits, prompt)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model, adapters merged, and the processor if there is one, as one `from_pretrained` folder."""
        self.model.save_pretrained(folder, state_dict=merged_state_dict(self.model))
        if self.processor is not None:
            self.processor.save_pretrained(folder)


def best_of_three(logits: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Of mask tokens 1 to 3 the one with the highest score: (B, Q, 4, h, w), (B, Q, 4) -> (B, Q, h, w)."""
    index = scores[..., 1:].argmax(-1) + 1
    return logits.take_along_dim(index[..., None, None, None], 2)[:, :, 0]


def _pad(values: torch.Tensor, length: int, fill: float) -> torch.Tensor:
    """(B, Q, 1, ...) -> (B, Q, length, ...), the new slots filled."""
    shape = (*values.shape[:2], length - 1, *values.shape[3:])
    return torch.cat([values, values.new_full(shape, fill)], 2)
