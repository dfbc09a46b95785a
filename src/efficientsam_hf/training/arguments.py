# SPDX-License-Identifier: Apache-2.0
"""Arguments of a run: dataclasses that check themselves, filled from defaults, a YAML recipe and flags, in that order.

Every field is a flag of the command line and a key of a recipe; `transformers.HfArgumentParser` reads the classes too.
"""

import argparse
import dataclasses
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from ..data.augmentation import Augmentation
from ..data.scenes import IMAGE_SIZES
from .schedule import Stage, parse_stages
from .segmentation import PARTS, PromptSampling


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
Arguments = TypeVar("Arguments")
LOSS_WEIGHTS = ("focal_weight", "dice_weight", "iou_weight", "single_weight")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainerArguments:
    """What the training loop needs, whatever it trains."""

    output_dir: str = option("", "Run folder to write: args.json, log.jsonl, checkpoints/, model/.")
    resume: bool = option(False, "Continue the run in output_dir from its last complete checkpoint.")
    seed: int = option(0, "Seed of initial weights, data order and prompts.")
    max_steps: int | None = option(None, "Optimiser steps at which the run ends.")
    max_minutes: float | None = option(
        None, "Wall-clock minutes after which the run ends; the schedule follows whichever limit is closer."
    )
    batch_size: int = option(16, "Images of one forward of one process, at the first image size.")
    image_sizes: str = option(
        "512",
        "Side of the training images in pixels, or stages: 0:256,0.7:512 (fraction of the run : size), each "
        "optionally with its batch size: 0:256x16,0.7:512x4.",
    )
    gradient_accumulation: int = option(1, "Forwards per optimiser step.")
    optimizer: str = option(
        "adamw",
        "AdamW for everything (the paper), or Muon for the weights of linear layers and AdamW for the rest.",
        choices=["adamw", "muon"],
    )
    learning_rate: float = option(4e-4, "Peak learning rate of AdamW.")
    muon_learning_rate: float = option(5e-3, "Peak learning rate of Muon, with updates scaled to the size of AdamW's.")
    schedule: str = option("cosine", "Decay of the learning rate.", choices=["cosine", "linear", "constant"])
    final_learning_rate: float = option(0.0, "Learning rate at the end, as a fraction of the peak.")
    warmup_steps: int = option(250, "Steps of linear warm-up (SAM: 250).")
    layer_decay: float = option(
        1.0, "Factor of the learning rate from each layer of the encoder to the one below it; 1 for none."
    )
    weight_decay: float = option(0.1, "Weight decay; parameters with one dimension get none.")
    adam_beta1: float = option(0.9, "AdamW: decay of the gradient average.")
    adam_beta2: float = option(0.999, "AdamW: decay of the squared gradient average.")
    max_grad_norm: float = option(1.0, "Gradients are scaled down to this norm; 0 switches it off.")
    ema_decay: float = option(0.999, "Decay of the averaged weights that are evaluated and saved; 0 switches it off.")
    mixed_precision: str = option(
        "bf16", "Dtype of the computation; weights and optimiser stay float32.", choices=["no", "bf16", "fp16"]
    )
    compile: bool = option(False, "Compile the module's parts with torch.compile.")
    cpu: bool = option(False, "Train on the CPU even where there is a GPU.")
    num_threads: int | None = option(None, "CPU threads of torch; default is torch's own choice.")
    log_every: int = option(10, "Steps between lines of log.jsonl.")
    report_to: str = option("", "Trackers of Accelerate, separated by commas: tensorboard, trackio, wandb, ...")
    evaluate_every: int | None = option(None, "Steps between evaluations.")
    evaluate_minutes: float | None = option(None, "Minutes between evaluations.")
    best_metric: str = option(
        "miou", "Number of an evaluation by which the best checkpoint is kept; higher is better."
    )
    picture_every: int | None = option(None, "Steps between pictures of predictions against ground truth.")
    checkpoint_every: int | None = option(None, "Steps between checkpoints.")
    checkpoint_minutes: float | None = option(10.0, "Minutes between checkpoints.")
    keep_checkpoints: int = option(2, "Checkpoints to keep, beside the best one.")
    max_nonfinite: int = option(10, "Steps in a row without a finite gradient after which the run stops.")

    # Fields that may differ when a run is resumed, because they do not change what it computes.
    may_change = frozenset(
        "output_dir resume num_threads log_every report_to evaluate_every evaluate_minutes best_metric picture_every "
        "checkpoint_every checkpoint_minutes keep_checkpoints max_nonfinite".split()
    )

    def __post_init__(self):
        if not self.output_dir:
            raise ValueError("output_dir: the run needs a folder to write to, got none")
        if not self.max_steps and not self.max_minutes:
            raise ValueError("max_steps or max_minutes must be given, or the run would never end")
        self._check_choices()
        for name in ("max_minutes", "learning_rate", "muon_learning_rate", "evaluate_minutes", "checkpoint_minutes"):
            self._check(name, lambda value: value is None or value > 0, "greater than 0")
        at_least_one = "max_steps batch_size gradient_accumulation num_threads log_every evaluate_every picture_every"
        for name in (at_least_one + " checkpoint_every keep_checkpoints max_nonfinite").split():
            self._check(name, lambda value: value is None or value >= 1, "at least 1")
        for name in ("seed", "warmup_steps", "weight_decay", "max_grad_norm"):
            self._check(name, lambda value: value >= 0, "at least 0")
        for name in ("adam_beta1", "adam_beta2", "ema_decay"):
            self._check(name, lambda value: 0 <= value < 1, "in [0, 1)")
        if self.optimizer == "muon" and self.mixed_precision == "fp16":
            raise ValueError("mixed_precision fp16 scales the loss for one optimizer; muon has two, take bf16 or no")
        self._check("layer_decay", lambda value: 0 < value <= 1, "above 0 and at most 1")
        self._check("final_learning_rate", lambda value: 0 <= value <= 1, "a fraction in [0, 1]")
        self.stages()

    def _check(self, name: str, accepts, expected: str) -> None:
        value = getattr(self, name)
        if not accepts(value):
            raise ValueError(f"{name} must be {expected}, got {value!r}")

    def _check_choices(self) -> None:
        for item in dataclasses.fields(self):
            choices = item.metadata.get("choices")
            if choices and getattr(self, item.name) not in choices:
                raise ValueError(f"{item.name} must be one of {', '.join(choices)}, got {getattr(self, item.name)!r}")

    def stages(self) -> tuple[Stage, ...]:
        """Image and batch size over the run."""
        return parse_stages(self.image_sizes, self.batch_size)


@dataclass
class FinetuneArguments(TrainerArguments):
    """A run of promptable segmentation: the loop's arguments, the model, the data, the prompts and the losses."""

    model: str = option("default", "Preset to train from scratch (ti, s, b), `default`, or a folder or Hub id.")
    model_overrides: str = option(
        "{}", 'Changes to the config of a preset, as YAML, e.g. "{vision_config: {num_hidden_layers: 2}}".'
    )
    gradient_checkpointing: bool = option(
        False, "Compute activations again in the backward pass: less memory, a third more time."
    )
    freeze: str = option("", "Parts that are not trained, separated by commas: encoder, prompt_encoder, mask_decoder.")
    lora_rank: int = option(0, "Rank of adapters that are trained instead of the weights of lora_parts; 0 for none.")
    lora_alpha: float = option(16.0, "Adapters are scaled by lora_alpha / lora_rank.")
    lora_parts: str = option("encoder,mask_decoder", "Parts that get adapters, as in freeze.")
    train_scenes: bool = option(False, "Train on generated scenes.")
    train_annotations: str | None = option(None, "COCO instances json to train on.")
    train_images: str | None = option(None, "Image folder of train_annotations.")
    train_sa1b: str | None = option(
        None,
        "Folder in the layout of SA-1B to train on: NAME.jpg beside NAME.json, loose, or in tars that are streamed.",
    )
    train_dataset: str | None = option(
        None, "Data set to train on: a folder of `datasets` (save_to_disk), or what load_dataset takes."
    )
    train_split: str = option("train", "Split of train_dataset.")
    stream: bool = option(False, "Read train_dataset from its beginning as it comes, without storing it.")
    shuffle_buffer: int = option(256, "Samples of a stream among which the next one is drawn.")
    image_column: str = option("image", "Column of train_dataset with the pictures.")
    masks_column: str = option(
        "masks", "Column of train_dataset with a label picture, a list of mask pictures, or a list of RLE masks."
    )
    train_limit: int | None = option(None, "Train on the first so many pictures only; not for streams.")
    horizontal_flip: float = option(0.0, "Probability that an annotated picture is mirrored left to right.")
    min_scale: float = option(1.0, "Smallest scale of large-scale jitter of annotated pictures; below 1 they shrink.")
    max_scale: float = option(1.0, "Largest scale of large-scale jitter; above 1 a part of the picture is taken.")
    data_workers: int = option(0, "Processes that make batches ahead; 0 makes them between steps.")
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
    single_weight: float = option(1.0, "Weight of the single-mask token beside the best of three.")

    may_change = TrainerArguments.may_change | frozenset(
        "gradient_checkpointing data_workers evaluate_scenes eval_annotations eval_images eval_limit".split()
    )

    def __post_init__(self):
        super().__post_init__()
        self._check_data()
        if not 0 <= self.min_object_area < self.max_object_area <= 1:
            raise ValueError(
                f"min_object_area and max_object_area must be fractions in order, got {self.min_object_area} and "
                f"{self.max_object_area}"
            )
        for name in ("data_workers", "evaluate_scenes"):
            self._check(name, lambda value: value >= 0, "at least 0")
        for name in ("objects_per_image", "train_limit", "eval_limit", "shuffle_buffer"):
            self._check(name, lambda value: value is None or value >= 1, "at least 1")
        for name in LOSS_WEIGHTS:
            self._check(name, lambda value: value >= 0, "at least 0")
        for name in ("focal_alpha", "box_focal_alpha"):
            self._check(name, lambda value: value is None or 0 < value < 1, "between 0 and 1")
        self._check_parts()
        if not isinstance(self.overrides(), dict):
            raise ValueError(f"model_overrides must be a YAML mapping, got {self.model_overrides!r}")
        self.sampling()

    def _check_data(self) -> None:
        for one, other in (("train_annotations", "train_images"), ("eval_annotations", "eval_images")):
            if bool(getattr(self, one)) != bool(getattr(self, other)):
                raise ValueError(f"{one} and {other} go together, got only one of them")
        if self.stream and not self.train_dataset:
            raise ValueError("stream is a way to read train_dataset, which is not given")
        if self.train_limit and (self.stream or self.train_scenes):
            raise ValueError(f"train_limit is for annotated pictures that are stored, got {self.train_limit} without")
        given = [
            name
            for name in ("train_scenes", "train_annotations", "train_sa1b", "train_dataset")
            if getattr(self, name)
        ]
        if len(given) != 1:
            raise ValueError(
                "training data must be one of train_scenes, train_annotations with train_images, train_sa1b and "
                "train_dataset, got " + (" and ".join(given) or "none")
            )
        for name in ("train_annotations", "train_images", "train_sa1b", "eval_annotations", "eval_images"):
            path = getattr(self, name)
            if path and not Path(path).exists():
                raise ValueError(f"{name}: {path} does not exist")
        sizes = [stage.image_size for stage in self.stages()]
        smallest, largest = IMAGE_SIZES
        if (self.train_scenes or self.evaluate_scenes) and not smallest <= min(sizes) <= max(sizes) <= largest:
            raise ValueError(f"image_sizes: scenes are rendered at {smallest} to {largest} pixels, got {sizes}")
        self._check("horizontal_flip", lambda value: 0 <= value <= 1, "a probability")
        augmentation = self.augmentation()
        if self.train_scenes and augmentation != Augmentation():
            raise ValueError(
                f"horizontal_flip and the scales are for annotated pictures, got {augmentation} with scenes"
            )

    def _check_parts(self) -> None:
        for name in ("freeze", "lora_parts"):
            if set(self.parts(name)) - set(PARTS):
                raise ValueError(f"{name} must name some of {', '.join(PARTS)}, got {getattr(self, name)!r}")
        self._check("lora_rank", lambda value: value >= 0, "at least 0")
        self._check("lora_alpha", lambda value: value > 0, "greater than 0")
        if set(self.parts("freeze")) == set(PARTS):
            raise ValueError(f"freeze leaves nothing to train, got {self.freeze!r}")
        both = sorted(set(self.parts("freeze")) & set(self.parts("lora_parts"))) if self.lora_rank else []
        if both:
            raise ValueError(f"freeze and lora_parts both name {', '.join(both)}")

    def parts(self, name: str) -> list[str]:
        """The parts of the model that the field `freeze` or `lora_parts` names."""
        return [part.strip() for part in getattr(self, name).split(",") if part.strip()]

    def augmentation(self) -> Augmentation:
        """How annotated pictures are changed."""
        return Augmentation(self.horizontal_flip, self.min_scale, self.max_scale)

    def overrides(self) -> dict:
        """Changes to a preset's config, part by part."""
        return yaml.safe_load(self.model_overrides) or {}

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
        return {name: getattr(self, name) for name in (*LOSS_WEIGHTS, "focal_alpha")}


def add_flags(parser: argparse.ArgumentParser, arguments: type) -> None:
    """Give the parser a flag for each field of the dataclass; a flag left out leaves no value behind."""
    hints = get_type_hints(arguments)
    for item in dataclasses.fields(arguments):
        flag = "--" + item.name.replace("_", "-")
        text = item.metadata["help"].replace("%", "%%")
        settings: dict[str, Any] = {"dest": item.name, "default": argparse.SUPPRESS}
        kind = _plain_type(hints[item.name])
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        else:
            settings |= {"type": kind, "choices": item.metadata.get("choices"), "metavar": kind.__name__.upper()}
            if settings["choices"]:
                del settings["metavar"]
        shown = "" if item.default in ("", None) or kind is bool else f" Default: {item.default}."
        parser.add_argument(flag, help=text + shown, **settings)


def read_recipe(name: str) -> dict[str, Any]:
    """Read a recipe by its name in the package or by its path; raises ValueError if it is neither or not a mapping."""
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    path = RECIPES / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise ValueError(f"recipe: {name!r} is neither a file nor one of {', '.join(known)}")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe: {path} is not YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"recipe: {path} must be a mapping of field names to values")
    return content


def build_arguments(kind: type[Arguments], recipe: dict[str, Any], flags: dict[str, Any]) -> Arguments:
    """Fill the dataclass from a recipe and, over it, flags; raises ValueError on unknown names and wrong types."""
    hints = get_type_hints(kind)
    fields = {item.name for item in dataclasses.fields(kind)}
    unknown = sorted(set(recipe) - fields)
    if unknown:
        raise ValueError(f"recipe: unknown names {', '.join(unknown)}; known are {', '.join(sorted(fields))}")
    values = {name: _typed(name, value, hints[name]) for name, value in (recipe | flags).items()}
    return kind(**values)


def _plain_type(hint: Any) -> type:
    """int of `int | None`, and any other type itself."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(kind for kind in get_args(hint) if kind is not type(None))
    return hint


def _typed(name: str, value: Any, hint: Any) -> Any:
    """A recipe's value in the field's type: YAML reads 4e-4 as text and 512 as a number."""
    kind = _plain_type(hint)
    if value is None and kind is not hint:
        return None
    if kind is bool and isinstance(value, bool):
        return value
    if kind is str and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    if kind in (int, float) and isinstance(value, (str, int, float)) and not isinstance(value, bool):
        try:
            converted = kind(value)
            if kind is float or converted == float(value):
                return converted
        except ValueError:
            pass
    raise ValueError(f"{name} must be of type {kind.__name__}, got {value!r}")
