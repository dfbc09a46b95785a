# SPDX-License-Identifier: Apache-2.0
"""`efficientsam pretrain`: SAMI, masked image pretraining with a teacher's features, or MAE."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from .running import add_fields, run_training, trainer_class


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
    from ..training.run_folder import RunLog

    disable_progress_bar()  # one for each saved model would break ours into pieces
    cache = _cache(arguments)
    source = _source(arguments, cache)
    teacher = _teacher(arguments) if cache is None else None
    torch.manual_seed(arguments.seed)
    model = build_student(arguments, cache.index.width if cache else teacher.width if teacher else 0)
    batches = _batches(arguments, teacher, cache, **source)
    trainer = Trainer(MaskedPretraining(model, teacher), batches, arguments)
    if source:
        log = RunLog(trainer.run / "log.jsonl")  # of every process: each meets other pictures
        batches.report = lambda index, reason: log("skipped", sample=index, reason=reason)
    return trainer.train()


def build_student(arguments: Any, target_width: int) -> Any:
    """A SAMI model with float32 weights, new from a preset or loaded."""
    import torch

    from .. import SamiConfig, SamiForPreTraining
    from ..training.attention import use_matrix_products

    fields = arguments.student_fields(target_width or 256, arguments.stages()[-1].image_size)
    if arguments.model in ("ti", "s", "b"):
        model = SamiForPreTraining(SamiConfig.from_preset(arguments.model, **fields))
    else:
        model_type = SamiConfig.get_config_dict(arguments.model)[0].get("model_type")
        if model_type != SamiConfig.model_type:
            raise ValueError(f"model: {arguments.model} is of model_type {model_type!r}, not a SAMI model")
        if arguments.overrides():
            raise ValueError("model_overrides is for presets (ti, s, b); a checkpoint keeps its config")
        model = SamiForPreTraining.from_pretrained(arguments.model, dtype=torch.float32)
        model.config.vision_config.image_size = arguments.stages()[-1].image_size
        _check_same(model.config, fields, arguments.model)
    if arguments.gradient_checkpointing:
        # transformers 5.23 renames it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if arguments.cpu or not torch.cuda.is_available():
        use_matrix_products(model)
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
    from accelerate import PartialState

    from ..data.teacher import load_teacher

    return load_teacher(
        teacher_name(arguments.teacher),
        resolution=arguments.teacher_resolution,
        revision=arguments.teacher_revision,
        device=PartialState(cpu=arguments.cpu).device,
        dtype=getattr(torch, arguments.teacher_dtype),
    )


def teacher_name(name: Any) -> Any:
    """The folder behind `default`, anything else as it is."""
    from .. import default_checkpoint

    return default_checkpoint() if name == "default" else name


def _cache(arguments: Any) -> Any:
    """The cache that is given, checked against the teacher that is named and the student's grid."""
    if not arguments.train_features:
        return None
    from ..data.feature_cache import FeatureCache
    from ..identity import model_revision

    cache = FeatureCache(arguments.train_features)
    index = cache.index
    if arguments.teacher is not None:
        name = teacher_name(arguments.teacher)
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
        if index.grid != (stage.image_size // 16, stage.image_size // 16):
            raise ValueError(
                f"image_sizes: cache {cache.folder} has features on a grid of {index.grid}, which is not that of "
                f"{stage.image_size} pixels"
            )
    return cache


def _source(arguments: Any, cache: Any) -> dict[str, Any]:
    """{"samples"} of stored pictures, {"stream", "read"} of those that come one after the other, {} for scenes."""
    from ..data import dataset_samples, images, sa1b

    if arguments.train_scenes and cache:
        if cache.index.scenes is None:
            raise ValueError(f"train_scenes: cache {cache.folder} is of other pictures, {cache.index.pictures}")
        return {"samples": images.SceneImages(cache.index.images, *cache.index.scenes)}
    if arguments.train_images:
        tars = sa1b.find_tars(arguments.train_images)
        if tars and (arguments.train_limit or cache):
            raise ValueError("train_limit and train_features are for pictures that are stored; tars are streamed")
        if tars and any(path.suffix.lower() in images.ENDINGS for path in Path(arguments.train_images).rglob("*")):
            raise ValueError(f"train_images: {arguments.train_images} holds tars and loose pictures; give one of them")
        if tars:
            return {"stream": images.stream_tars(tars), "read": images.read_row}
        return {"samples": images.ImageFolder(arguments.train_images)}
    if arguments.train_dataset:
        columns = {"image_column": arguments.image_column, "masks_column": None}
        name, split = arguments.train_dataset, arguments.train_split
        if arguments.stream:
            stream = dataset_samples.load_stream(name, split, **columns)
            return {"stream": stream, "read": partial(dataset_samples.read_row, **columns)}
        return {"samples": dataset_samples.load_samples(name, split, **columns)}
    return {}


def _batches(
    arguments: Any, teacher: Any, cache: Any, samples: Any = None, stream: Any = None, read: Any = None
) -> Any:
    from accelerate import PartialState
    from torch.utils.data import Subset

    from ..data.feature_cache import CachedSamples
    from ..training.crop_preparation import CachedCropPreparation
    from ..training.sample_batches import SampleBatches
    from ..training.stream_batches import StreamBatches

    state = PartialState(cpu=arguments.cpu)
    common = {
        "seed": arguments.seed,
        "rank": state.process_index,
        "processes": state.num_processes,
        "workers": arguments.data_workers,
    }
    if samples is None and stream is None:
        return _scene_batches(arguments, teacher, state.device, **common)
    alike = teacher is None or {stage.image_size for stage in arguments.stages()} == {teacher.resolution}
    preparation = arguments.preparation(None if alike else teacher.resolution)
    if stream is not None:
        buffer = arguments.shuffle_buffer
        return StreamBatches(stream, read, preparation, shuffle_buffer=buffer, **common)
    if cache:
        samples, preparation = CachedSamples(samples, cache, preparation.crops), CachedCropPreparation()
    if arguments.train_limit is not None:
        samples = Subset(samples, range(min(arguments.train_limit, len(samples))))
    return SampleBatches(samples, preparation, **common)


def _scene_batches(arguments: Any, teacher: Any, device: Any, **common: Any) -> Any:
    """Whole scenes, never cropped: each is seen once."""
    from ..data.scene_bank import SceneBank
    from ..training.scene_batches import SceneBatches

    sizes = {stage.image_size for stage in arguments.stages()}
    if teacher is not None and sizes != {teacher.resolution}:
        raise ValueError(
            f"teacher_resolution is {teacher.resolution}, expected the image_sizes of scenes, {sorted(sizes)}: a "
            "scene is rendered once, at one size"
        )
    bank = SceneBank.build(seed=0, device=device if arguments.data_workers == 0 else "cpu")
    return SceneBatches(bank=bank, stages=arguments.stages(), objects=0, **common)
