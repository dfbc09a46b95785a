# SPDX-License-Identifier: Apache-2.0
"""`efficientsam pretrain`: SAMI, masked image pretraining with a teacher's features, or MAE."""

import argparse
from pathlib import Path
from typing import Any

from ..files import read_json, write_json
from .loading import model_name, warn_if_emulated
from .running import (
    add_fields,
    announce,
    dataset_source,
    log_skipped,
    make_trainable,
    picture_batches,
    run_training,
    scene_batches,
    trainer_class,
)


DESCRIPTION = """\
Pretrain an encoder: most patches of a picture are hidden, and a decoder reconstructs what a teacher sees at each. A
recipe fills the fields below, flags change them; the result is OUTPUT_DIR/model, a folder that
EfficientSamModel.from_sami begins from.

  efficientsam pretrain --recipe smoke --output-dir runs/smoke
  efficientsam pretrain --recipe sami_ti --train-images imagenet/train --output-dir runs/sami_ti
  efficientsam pretrain --recipe mae_ti --train-dataset imagenet-1k --stream --output-dir runs/mae_ti"""


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "pretrain",
        help="pretrain an encoder on pictures without annotations",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from ..training.pretrain_arguments import PretrainArguments

    add_fields(parser, PretrainArguments)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train and say where the result is."""
    from ..training.pretrain_arguments import PretrainArguments

    return run_training(args, "pretrain", PretrainArguments, pretrain)


def pretrain(arguments: Any) -> dict[str, Any]:
    """Put student, teacher, pictures and trainer of a `PretrainArguments` together; returns the summary."""
    import torch

    Trainer = trainer_class()
    from transformers.utils.logging import disable_progress_bar

    from ..training.pretraining import MaskedPretraining

    disable_progress_bar()  # one for each saved model would break ours into pieces
    cache = _cache(arguments)
    source = _source(arguments, cache)
    teacher = _teacher(arguments) if cache is None else None
    torch.manual_seed(arguments.seed)
    model = build_student(arguments, cache.index.width if cache else teacher.width if teacher else 0)
    if cache is not None and model.config.target_width != cache.index.width:
        raise ValueError(
            f"the student reconstructs {model.config.target_width} channels, but the features in cache "
            f"{cache.folder}, of {cache.index.teacher!r}, have {cache.index.width}"
        )
    batches = _batches(arguments, teacher, cache, **source)
    trainer = Trainer(MaskedPretraining(model, teacher), batches, arguments)
    if source:
        log_skipped(trainer, batches)
    _check_target(arguments, teacher, cache)
    announce(trainer.plan(), arguments)
    return trainer.train()


def _check_target(arguments: Any, teacher: Any, cache: Any) -> None:
    """Note in the run whose features it learns; ValueError where it would go on with others.

    Arguments are compared elsewhere, but a branch of the Hub, a folder or a cache can change under its name.
    """
    from ..processes import is_main

    now = {}
    if cache is not None:
        now = {name: getattr(cache.index, name) for name in ("revision", "resolution", "dtype", "fingerprint")}
    elif teacher is not None:
        dtype = str(next(teacher.model.parameters()).dtype).removeprefix("torch.")
        now = {"revision": teacher.revision, "resolution": teacher.resolution, "dtype": dtype}
    path = Path(arguments.output_dir) / "teacher.json"
    before = read_json(path) if path.is_file() else now
    if not isinstance(before, dict):
        raise ValueError(f"resume: {path} is damaged, it does not say whose features the run learns")
    if before != now:
        changes = ", ".join(f"{name} was {before.get(name)!r} and is {value!r}" for name, value in now.items())
        raise ValueError(f"resume: {arguments.output_dir} learnt other features: {changes}")
    if is_main():
        write_json(path, now)


def build_student(arguments: Any, target_width: int) -> Any:
    """A SAMI model with float32 weights, new from a preset or loaded."""
    import torch

    from .. import SamiConfig, SamiForPreTraining
    from ..identity import model_type
    from ..pretrained import load_pretrained
    from ..training.crop_preparation import PATCH_SIZE

    fields = arguments.student_fields(target_width or 256, arguments.stages()[-1].image_size)
    if arguments.model in ("ti", "s", "b"):
        model = SamiForPreTraining(SamiConfig.from_preset(arguments.model, **fields))
    else:
        architecture = model_type(arguments.model)
        if architecture != SamiConfig.model_type:
            raise ValueError(f"model: {arguments.model} is of model_type {architecture!r}, not a SAMI model")
        if arguments.overrides():
            raise ValueError("model_overrides is for presets (ti, s, b); a checkpoint keeps its config")
        model = load_pretrained(SamiForPreTraining, arguments.model, dtype=torch.float32)
        model.config.vision_config.image_size = arguments.stages()[-1].image_size
        _check_same(model.config, fields, arguments.model)
    if model.config.vision_config.patch_size != PATCH_SIZE:
        raise ValueError(f"patch_size is {model.config.vision_config.patch_size}, expected that of EfficientSAM, 16")
    make_trainable(model, arguments)
    return model


def _check_same(config: Any, fields: dict[str, Any], name: str) -> None:
    """ValueError where the arguments ask for another student than the checkpoint is."""
    wanted = {key: value for key, value in fields.items() if key != "vision_config"}
    if config.target == "pixels":
        wanted.pop("target_width")
    differing = [key for key, value in wanted.items() if getattr(config, key) != value]
    if differing:
        changes = ", ".join(f"{key} is {getattr(config, key)!r} and not {wanted[key]!r}" for key in differing)
        raise ValueError(f"model: {name} is another student: {changes}")


def _teacher(arguments: Any) -> Any:
    if arguments.teacher is None:
        return None
    import torch

    from ..data.teacher import load_teacher
    from ..training.process_state import process_state

    device = process_state(arguments).device
    warn_if_emulated("teacher_dtype", arguments.teacher_dtype, device)
    return load_teacher(
        model_name(arguments.teacher),
        resolution=arguments.teacher_resolution,
        revision=arguments.teacher_revision,
        device=device,
        dtype=getattr(torch, arguments.teacher_dtype),
    )


def _cache(arguments: Any) -> Any:
    """The cache that is given, checked against the teacher that is named and the student's grid."""
    if not arguments.train_features:
        return None
    from ..data.feature_cache import FeatureCache
    from ..identity import model_revision
    from ..training.crop_preparation import PATCH_SIZE

    cache = FeatureCache(arguments.train_features)
    index = cache.index
    if arguments.teacher is not None:
        name = model_name(arguments.teacher)
        revision = model_revision(name, arguments.teacher_revision)
        if revision != index.revision:
            raise ValueError(
                f"teacher is {name!r} ({revision}), but cache {cache.folder} was made with {index.teacher!r} "
                f"({index.revision})"
            )
    if arguments.teacher_resolution not in (None, index.resolution):
        raise ValueError(
            f"teacher_resolution is {arguments.teacher_resolution}, but cache {cache.folder} was made with "
            f"{index.resolution}"
        )
    for stage in arguments.stages() if index.crops else ():
        if index.grid != (stage.image_size // PATCH_SIZE,) * 2:
            raise ValueError(
                f"image_sizes: cache {cache.folder} has features on a grid of {index.grid}, which is not that of "
                f"{stage.image_size} pixels"
            )
    return cache


def _source(arguments: Any, cache: Any) -> dict[str, Any]:
    """{"samples"} of stored pictures, {"stream", "read"} of those that come one after the other, {} for scenes."""
    from ..data import images, tars

    if arguments.train_scenes and cache:
        if cache.index.scenes is None:
            raise ValueError(f"train_scenes: cache {cache.folder} is of other pictures, {cache.index.pictures}")
        return {"samples": images.SceneImages(cache.index.images, *cache.index.scenes)}
    if arguments.train_images:
        found = tars.find_tars(arguments.train_images)
        if found and (arguments.train_limit or cache):
            raise ValueError("train_limit and train_features are for pictures that are stored; tars are streamed")
        if found and any(path.suffix.lower() in images.ENDINGS for path in Path(arguments.train_images).rglob("*")):
            raise ValueError(f"train_images: {arguments.train_images} holds tars and loose pictures; give one of them")
        if found:
            return {"stream": images.stream_tars(found), "read": images.read_row}
        return {"samples": images.ImageFolder(arguments.train_images)}
    if arguments.train_dataset:
        return dataset_source(arguments, masks_column=None)
    return {}


def _batches(arguments: Any, teacher: Any, cache: Any, **source: Any) -> Any:
    from ..data.feature_cache import CachedSamples
    from ..training.crop_preparation import CachedCropPreparation

    alike = teacher is None or {stage.image_size for stage in arguments.stages()} == {teacher.resolution}
    if not source:  # whole scenes, never cropped: each is seen once
        if not alike:
            raise ValueError(
                f"teacher_resolution is {teacher.resolution}, expected the image_sizes of scenes, "
                f"{arguments.image_sizes}: a scene is rendered once, at one size"
            )
        return scene_batches(arguments, objects=0, masked_patches=True)
    preparation = arguments.preparation(None if alike else teacher.resolution)
    if cache:
        source["samples"] = CachedSamples(source["samples"], cache, preparation.crops)
        preparation = CachedCropPreparation()
    return picture_batches(arguments, preparation, **source)
