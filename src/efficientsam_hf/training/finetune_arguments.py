# SPDX-License-Identifier: Apache-2.0
"""Arguments of a finetuning run."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from ..data.augmentation import Augmentation
from ..data.mixture import CHANGES, MixtureSource, read_mixture, write_mixture
from ..models.configuration_efficientsam import EfficientSamConfig
from ..models.mask_cleaning_efficientsam import MaskCleaning
from ..models.mask_generation_options_efficientsam import MaskGenerationOptions
from .arguments import PictureArguments, option
from .config_overrides import read_mapping, read_overrides
from .segmentation import PARTS, PromptSampling


LOSS_WEIGHTS = ("focal_weight", "dice_weight", "iou_weight", "single_weight", "ranking_weight")
# What objects with a box may have of their own, in a field with the prefix box_.
BY_PROMPT = ("focal_alpha", "relaxation")


@dataclass
class FinetuneArguments(PictureArguments):
    """A run of promptable segmentation: the loop's arguments, the model, the data, the prompts and the losses."""

    model: str = option(
        "default",
        "Preset to train from scratch (ti, s, b), `default`, or a folder or Hub id: of an EfficientSAM, or of a SAMI "
        "model whose encoder is taken.",
    )
    model_overrides: str = option(
        "{}",
        'Changes to the config of what is new, as YAML, e.g. "{vision_config: {num_hidden_layers: 2}}"; of a '
        "checkpoint's prompt_encoder_config the inputs that it was trained without: background_points, mask_prompts, "
        "dense_boxes, padded_prompt_tokens.",
    )
    mask_generation: str = option(
        "{}",
        "Options of segment-everything that the model's processor keeps, as YAML, over those of the checkpoint, e.g. "
        '"{crops_nms_thresh: 0.2}" for objects that never overlap.',
    )
    mask_cleaning: str = option(
        "{}",
        "How the model's processor makes masks whole, as YAML, over what the checkpoint says, e.g. "
        '"{largest_part: true, fill_holes: 1.0, within_box: true}".',
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory, a third more time."
    )
    freeze: str = option(
        "",
        "Parts that are not trained, separated by commas: encoder, prompt_encoder, mask_decoder, or masks, which is "
        "all of the decoder but the head that predicts the IoU.",
    )
    lora_rank: int = option(0, "Rank of adapters that are trained instead of the weights of lora_parts; 0 for none.")
    lora_alpha: float = option(16.0, "Adapters are scaled by lora_alpha / lora_rank.")
    lora_parts: str = option("encoder,mask_decoder", "Parts that get adapters, as in freeze.")
    train_annotations: str | None = option(None, "COCO instances json to train on.")
    train_images: str | None = option(None, "Image folder of train_annotations.")
    train_sa1b: str | None = option(
        None,
        "Folder in the layout of SA-1B to train on: NAME.jpg beside NAME.json, loose, or in tars that are streamed "
        "(resume reads them again up to where it goes on).",
    )
    train_mix: str | None = option(
        None,
        "Several sources with weights: a YAML file with a list of them, or such a list itself (docs/mixtures.md).",
    )
    masks_column: str = option(
        "masks", "Column of train_dataset with a label picture, a list of mask pictures, or a list of RLE masks."
    )
    min_scale: float = option(1.0, "Smallest scale of large-scale jitter of annotated pictures; below 1 they shrink.")
    max_scale: float = option(1.0, "Largest scale of large-scale jitter; above 1 a part of the picture is taken.")
    light: float = option(
        0.0, "Strength of random changes of exposure, contrast, saturation and white balance of annotated pictures."
    )
    crops: bool = option(
        False,
        "In stages with images smaller than the last stage's, show parts of annotated pictures at the last stage's "
        "scale and at positions in it, not whole pictures at a smaller one: cheap steps for small objects.",
    )
    evaluate_scenes: int = option(0, "Held-out scenes (of another seed) in each evaluation.")
    eval_annotations: str | None = option(None, "COCO instances json to evaluate on.")
    eval_images: str | None = option(None, "Image folder of eval_annotations.")
    eval_limit: int | None = option(None, "Evaluate on the first so many images of eval_annotations only.")
    objects_per_image: int = option(8, "Objects prompted per image.")
    min_object_area: float = option(0.0005, "Objects smaller than this fraction of the image are not trained.")
    max_object_area: float = option(0.9, "Objects larger than this fraction of the image are not trained (SAM: 0.9).")
    prompt_rounds: int = option(2, "Prompt rounds per forward: the first prompt, then corrections.")
    corrected_objects: int | None = option(None, "Objects per image that get the correction rounds; default all.")
    uniform_prompts: float = option(0.35, "Weight of a uniform click as first prompt.")
    center_prompts: float = option(0.25, "Weight of a centre click as first prompt.")
    box_prompts: float = option(0.3, "Weight of a noisy box as first prompt.")
    box_and_point_prompts: float = option(0.1, "Weight of box and uniform click together as first prompt.")
    mask_prompts: float = option(0.5, "Probability that a correction also gets the last logits as mask prompt.")
    box_noise: float = option(0.1, "Standard deviation of a noisy box's edges as a fraction of its side (SAM: 0.1).")
    exact_boxes: float = option(0.0, "Probability that a box is the tight one, without noise.")
    focal_weight: float = option(20.0, "Weight of the focal loss.")
    focal_alpha: float = option(0.25, "Weight of foreground against background in the focal loss (RetinaNet: 0.25).")
    box_focal_alpha: float | None = option(None, "focal_alpha for objects prompted with a box; default the same.")
    dice_weight: float = option(1.0, "Weight of the dice loss.")
    iou_weight: float = option(1.0, "Weight of the squared error of the predicted IoU.")
    ranking_weight: float = option(
        0.0, "Weight of the order of the three masks' predicted IoU, by which one of them is chosen."
    )
    single_weight: float = option(1.0, "Weight of the single-mask token beside the best of three.")
    relaxation: float = option(
        0.0, "Share of the training of three masks that all get alike; the rest is the best one's alone (SAM: 0)."
    )
    box_relaxation: float | None = option(None, "relaxation for objects prompted with a box; default the same.")

    may_change = PictureArguments.may_change | frozenset(
        "gradient_checkpointing evaluate_scenes eval_annotations eval_images eval_limit".split()
    )
    as_yaml = frozenset(["train_mix"])

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.min_object_area < self.max_object_area <= 1:
            raise ValueError(
                f"min_object_area and max_object_area must be fractions in order, got {self.min_object_area} and "
                f"{self.max_object_area}"
            )
        self._check_data()
        self._check("evaluate_scenes", lambda value: value >= 0, "at least 0")
        for name in ("objects_per_image", "eval_limit"):
            self._check(name, lambda value: value is None or value >= 1, "at least 1")
        for name in LOSS_WEIGHTS:
            self._check(name, lambda value: value >= 0, "at least 0")
        for name in ("focal_alpha", "box_focal_alpha"):
            self._check(name, lambda value: value is None or 0 < value < 1, "between 0 and 1")
        for name in ("relaxation", "box_relaxation"):
            self._check(name, lambda value: value is None or 0 <= value <= 1, "a fraction")
        self._check_parts()
        self.overrides()
        self.generation_options()
        self.cleaning_options()
        self.sampling()

    def _check_data(self) -> None:
        for one, other in (("train_annotations", "train_images"), ("eval_annotations", "eval_images")):
            if bool(getattr(self, one)) != bool(getattr(self, other)):
                raise ValueError(f"{one} and {other} go together, got only one of them")
        self.check_source("train_scenes", "train_annotations", "train_sa1b", "train_dataset", "train_mix")
        for name in ("train_annotations", "train_images", "train_sa1b", "eval_annotations", "eval_images"):
            path = getattr(self, name)
            if path and not Path(path).exists():
                raise ValueError(f"{name}: {path} does not exist")
        if self.train_mix:
            self._check_mixture()
        if self.train_scenes or self.evaluate_scenes:
            self.check_scene_sizes()
        augmentation = self.augmentation()
        if self.train_scenes and (self.crops or augmentation != Augmentation()):
            raise ValueError(
                f"horizontal_flip, the scales, light and crops are for annotated pictures, got {augmentation} and "
                f"crops {self.crops} with scenes"
            )

    def _check_mixture(self) -> None:
        """Put what a file says in the place of its path: a run that goes on must notice if the file has changed."""
        for name in ("train_limit", "crops"):
            self._check(name, lambda value: not value, "left out with train_mix, as it is for one source alone")
        sources = read_mixture(self.train_mix)
        self.train_mix = write_mixture(sources)
        if any(source.scenes for source in sources):
            self.check_scene_sizes()
        for source in sources:
            self.augmentation(source)
            self.object_areas(source)

    def _check_parts(self) -> None:
        for name in ("freeze", "lora_parts"):
            if set(self.parts(name)) - set(PARTS):
                raise ValueError(f"{name} must name some of {', '.join(PARTS)}, got {getattr(self, name)!r}")
        self._check("lora_rank", lambda value: value >= 0, "at least 0")
        self._check("lora_alpha", lambda value: value > 0, "greater than 0")
        if set(self.parts("freeze")) >= set(PARTS) - {"masks"}:
            raise ValueError(f"freeze leaves nothing to train, got {self.freeze!r}")
        both = sorted(set(self.parts("freeze")) & set(self.parts("lora_parts"))) if self.lora_rank else []
        if both:
            raise ValueError(f"freeze and lora_parts both name {', '.join(both)}")

    def parts(self, name: str) -> list[str]:
        """The parts of the model that the field `freeze` or `lora_parts` names."""
        return [part.strip() for part in getattr(self, name).split(",") if part.strip()]

    def augmentation(self, source: MixtureSource | None = None) -> Augmentation:
        """How annotated pictures are changed, those of a source of train_mix as it says."""
        run = Augmentation(*(getattr(self, name) for name in CHANGES))
        if source is None:
            return run
        usual = dataclasses.astuple(Augmentation() if source.endless else run)
        own = [getattr(source, name) for name in CHANGES]
        try:
            return Augmentation(*(default if value is None else value for default, value in zip(usual, own)))
        except ValueError as error:
            raise ValueError(f"source {source.name!r}: {error}") from None

    def mixture(self) -> list[MixtureSource]:
        """Sources of train_mix, none without it."""
        return read_mixture(self.train_mix) if self.train_mix else []

    def object_areas(self, source: MixtureSource) -> tuple[float, float]:
        """Smallest and largest object of a source of train_mix that is trained, as fractions of the picture."""
        low = self.min_object_area if source.min_object_area is None else source.min_object_area
        high = self.max_object_area if source.max_object_area is None else source.max_object_area
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"source {source.name!r}: min_object_area and max_object_area must be fractions in order, got {low} "
                f"and {high}"
            )
        return low, high

    def overrides(self) -> dict:
        """Changes to the model's config, part by part."""
        return read_overrides(self.model_overrides, EfficientSamConfig)

    def generation_options(self) -> dict:
        """What the model's processor keeps of `MaskGenerationOptions`."""
        return self._read_options("mask_generation", MaskGenerationOptions)

    def cleaning_options(self) -> dict:
        """What the model's processor keeps of `MaskCleaning`."""
        return self._read_options("mask_cleaning", MaskCleaning)

    def _read_options(self, name: str, kind: type[MaskGenerationOptions] | type[MaskCleaning]) -> dict:
        """The mapping that a field holds as YAML; ValueError that names the field if `kind` has no such options."""
        options = read_mapping(getattr(self, name), name)
        try:
            kind().with_changes(options)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from None
        return options

    def sampling(self) -> PromptSampling:
        """How prompts are drawn."""
        return PromptSampling(
            uniform=self.uniform_prompts,
            center=self.center_prompts,
            box=self.box_prompts,
            box_and_point=self.box_and_point_prompts,
            rounds=self.prompt_rounds,
            corrected_objects=self.corrected_objects,
            mask_prompts=self.mask_prompts,
            box_noise=self.box_noise,
            exact_boxes=self.exact_boxes,
        )

    def loss_weights(self) -> dict[str, float]:
        """Weights of the losses by the names `segmentation_losses` gives them."""
        return {name: getattr(self, name) for name in (*LOSS_WEIGHTS, *BY_PROMPT)}

    def box_loss_weights(self) -> dict[str, float]:
        """Those that objects with a box have of their own, by the same names."""
        values = {name: getattr(self, f"box_{name}") for name in BY_PROMPT}
        return {name: value for name, value in values.items() if value is not None}
