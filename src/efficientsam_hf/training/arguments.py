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

from ..data.scenes import IMAGE_SIZES
from .schedule import Stage, parse_stages


RECIPES = Path(__file__).resolve().parent.parent / "recipes"
Arguments = TypeVar("Arguments")


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A dataclass field with its help text."""
    return field(default=default, metadata={"help": help, **metadata})


@dataclass
class TrainerArguments:
    """What the training loop needs, whatever it trains."""

    output_dir: str = option("", "Run folder to write: args.json, log.jsonl, checkpoints/, model/, best_model/.")
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
        "auto",
        "Dtype of the computation; weights and optimiser stay float32. auto: bf16 where the device multiplies it "
        "faster, else no.",
        choices=["auto", "no", "bf16", "fp16"],
    )
    compile: bool = option(False, "Compile the module's parts with torch.compile.")
    cpu: bool = option(False, "Train on the CPU even where there is a GPU.")
    num_threads: int | None = option(None, "CPU threads of torch; default is torch's own choice.")
    log_every: int = option(10, "Steps between lines of log.jsonl.")
    report_to: str = option("", "Trackers of Accelerate, separated by commas: tensorboard, trackio, wandb, ...")
    evaluate_every: int | None = option(None, "Steps between evaluations.")
    evaluate_minutes: float | None = option(None, "Minutes between evaluations.")
    best_metric: str = option(
        "miou",
        "Number of an evaluation by which the best checkpoint is kept, and its model as best_model; higher is better.",
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

    as_yaml = frozenset()  # fields that hold YAML text, which a recipe may write as what it stands for

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
class PictureArguments(TrainerArguments):
    """A run on pictures, and where pictures can come from whatever is trained on them."""

    train_scenes: bool = option(False, "Train on generated scenes.")
    train_dataset: str | None = option(
        None, "Data set to train on: a folder of `datasets` (save_to_disk), or what load_dataset takes."
    )
    train_split: str = option("train", "Split of train_dataset.")
    train_config: str | None = option(None, "Configuration of train_dataset, where it has several.")
    train_revision: str | None = option(None, "Branch, tag or commit of a train_dataset on the Hub.")
    stream: bool = option(
        False,
        "Read train_dataset from its beginning as it comes, without storing it; resume reads again what it has seen.",
    )
    shuffle_buffer: int = option(256, "Samples of a stream among which the next one is drawn.")
    image_column: str = option("image", "Column of train_dataset with the pictures.")
    train_limit: int | None = option(None, "Train on the first so many pictures only; not for streams.")
    horizontal_flip: float = option(0.0, "Probability that a picture is mirrored left to right; not for scenes.")
    data_workers: int = option(0, "Processes that make batches ahead; 0 makes them between steps.")

    may_change = TrainerArguments.may_change | {"data_workers"}

    def check_source(self, *names: str) -> None:
        """Raise ValueError unless exactly one of the named fields is given, with what goes with it."""
        if self.stream and not self.train_dataset:
            raise ValueError("stream is a way to read train_dataset, which is not given")
        for name in ("train_config", "train_revision"):
            self._check(name, lambda value: value is None or self.train_dataset, "given with train_dataset only")
        if self.train_limit and (self.stream or self.train_scenes):
            raise ValueError(f"train_limit is for pictures that are stored, got {self.train_limit} without any")
        given = [name for name in names if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"training data must be one of {', '.join(names)}, got {' and '.join(given) or 'none'}")
        self._check("horizontal_flip", lambda value: 0 <= value <= 1, "a probability")
        self._check("data_workers", lambda value: value >= 0, "at least 0")
        for name in ("train_limit", "shuffle_buffer"):
            self._check(name, lambda value: value is None or value >= 1, "at least 1")

    def check_scene_sizes(self) -> None:
        """Raise ValueError for an image size that scenes cannot be rendered at."""
        sizes = [stage.image_size for stage in self.stages()]
        smallest, largest = IMAGE_SIZES
        if not smallest <= min(sizes) <= max(sizes) <= largest:
            raise ValueError(f"image_sizes: scenes are rendered at {smallest} to {largest} pixels, got {sizes}")


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


def read_recipe(name: str, command: str) -> dict[str, Any]:
    """Read a command's recipe by its name in the package or by its path.

    Raises ValueError if it is neither or not a mapping.
    """
    known = sorted(path.stem for path in (RECIPES / command).glob("*.yaml"))
    path = RECIPES / command / f"{name}.yaml" if name in known else Path(name)
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
    recipe = {
        name: yaml.safe_dump(value) if name in kind.as_yaml and isinstance(value, (list, dict)) else value
        for name, value in recipe.items()
    }
    values = {name: _typed(name, value, hints[name]) for name, value in (recipe | flags).items()}
    _check_batch_size(values, flags)
    return kind(**values)


def _check_batch_size(values: dict[str, Any], flags: dict[str, Any]) -> None:
    """ValueError for a flag that the stages' own batch sizes would silence."""
    sizes = values.get("image_sizes") or ""
    if "batch_size" in flags and sizes and all("x" in stage for stage in sizes.split(",")):
        raise ValueError(
            f"batch_size {flags['batch_size']} has no effect beside image_sizes {sizes!r}, which says how many images "
            "a step takes after each x; change it there"
        )


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
