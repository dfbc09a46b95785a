# SPDX-License-Identifier: Apache-2.0
"""`efficientsam finetune`: train a model on masks, from a preset or from a checkpoint."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .evaluate import DEFAULT_PROTOCOLS as PROMPTS
from .loading import check_name, model_name
from .running import (
    add_fields,
    announce,
    dataset_source,
    log_skipped,
    make_trainable,
    mixture_batches,
    picture_batches,
    render_device,
    run_training,
    scene_batches,
    trainer_class,
)


DESCRIPTION = """\
Train a promptable segmentation model. A recipe fills the fields below, flags change them; without one
pictures of your own are trained by `coco_custom`. The result is OUTPUT_DIR/model, a folder for
from_pretrained with the averaged weights.

  efficientsam finetune --recipe smoke --output-dir runs/smoke
  efficientsam finetune --recipe scenes_cpu --output-dir runs/scenes --eval-annotations A.json --eval-images DIR
  efficientsam finetune --train-annotations A.json --train-images DIR --max-minutes 20 --output-dir runs/mine
  efficientsam finetune --train-mix mix.yaml --max-minutes 60 --output-dir runs/mixed
  efficientsam finetune --recipe scenes_cpu --output-dir runs/scenes --resume"""

# What the generator finds with, for models that begin here: predicted IoU and stability of what is trained for minutes
# or hours stay below those of SAM. The checkpoint that ships has the same values.
TRAINED_MASK_GENERATION = {"pred_iou_thresh": 0.5, "stability_score_thresh": 0.6}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Register the command."""
    parser = subparsers.add_parser(
        "finetune",
        help="train on masks, from a checkpoint or from scratch",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    from ..training.finetune_arguments import FinetuneArguments

    add_fields(parser, FinetuneArguments)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train and say where the result is."""
    from ..training.finetune_arguments import FinetuneArguments

    return run_training(args, "finetune", FinetuneArguments, finetune, usual_recipe)


def usual_recipe(flags: dict[str, Any]) -> dict[str, Any]:
    """What a run on own pictures takes where no recipe is named: `coco_custom`, but for what the flags speak of."""
    from ..training.arguments import read_recipe

    if flags.get("train_scenes"):
        return {}
    recipe = read_recipe("coco_custom", "finetune")
    if "max_steps" in flags:
        del recipe["max_minutes"]
    if "batch_size" in flags:
        recipe["image_sizes"] = recipe["image_sizes"].partition("x")[0]
    return recipe


def finetune(arguments: Any) -> dict[str, Any]:
    """Put model, data, evaluation and trainer of a `FinetuneArguments` together and train; returns the summary."""
    import torch

    Trainer = trainer_class()
    from transformers.utils.logging import disable_progress_bar

    from ..training.segmentation import InteractiveSegmentation

    disable_progress_bar()  # one for each saved model would break ours into pieces
    annotated, evaluation_sets = _training_data(arguments), _coco_samples(arguments)
    torch.manual_seed(arguments.seed)
    model, processor = build_model(arguments)
    module = InteractiveSegmentation(
        model,
        processor,
        arguments.sampling(),
        arguments.loss_weights(),
        arguments.box_loss_weights(),
        whole_size=arguments.stages()[-1].image_size if arguments.crops else None,
        sources=[source.name for source in arguments.mixture()],
    )
    module.freeze(arguments.parts("freeze"))
    if arguments.lora_rank:
        module.add_adapters(arguments.parts("lora_parts"), arguments.lora_rank, arguments.lora_alpha)
    if arguments.train_mix:
        batches = _mixed_batches(arguments, processor, **annotated)
    else:
        batches = _annotated_batches(arguments, processor, **annotated) if annotated else _scene_batches(arguments)
    _check_best_metric(arguments, [*evaluation_sets, *(["scenes"] if arguments.evaluate_scenes else [])])
    trainer = Trainer(module, batches, arguments)
    if annotated:
        log_skipped(trainer, batches)
    if arguments.evaluate_scenes:
        evaluation_sets["scenes"] = _scene_samples(arguments)
    if evaluation_sets:
        trainer.evaluate = _evaluation(evaluation_sets, arguments)
    announce(trainer.plan(), arguments)
    return trainer.train()


def build_model(arguments: Any) -> tuple[Any, Any]:
    """Model with float32 weights, new, loaded, or new around a SAMI encoder, and a processor for the last stage."""
    import torch

    from .. import (
        EfficientSamConfig,
        EfficientSamImageProcessor,
        EfficientSamModel,
        EfficientSamProcessor,
        SamiForPreTraining,
    )
    from ..identity import model_type
    from ..pretrained import load_pretrained, load_processor
    from ..training.prompt_inputs import check_prompt_tokens, load_with_inputs

    image_size = arguments.stages()[-1].image_size
    overrides = arguments.overrides()
    vision = {**overrides.pop("vision_config", {}), "image_size": image_size}
    # Scenes are rendered at the training size; averaging is what brings a larger photo closest to that.
    image_processor = EfficientSamImageProcessor(
        size=image_size, antialias=True, mask_generation=TRAINED_MASK_GENERATION
    )
    source = model_name(arguments.model)
    check_name(source)
    if source in ("ti", "s", "b"):
        model = EfficientSamModel(EfficientSamConfig.from_preset(source, vision_config=vision, **overrides))
    elif (architecture := model_type(source)) == "sami":
        sami = load_pretrained(SamiForPreTraining, source, dtype=torch.float32)
        vision = {**sami.config.vision_config.to_dict(), "output_channels": 256, **vision}
        model = EfficientSamModel.from_sami(sami, EfficientSamConfig(vision_config=vision, **overrides))
    elif architecture != "efficientsam":
        raise ValueError(
            f"model: {source} is of model_type {architecture!r}, neither an EfficientSAM nor a SAMI model"
        )
    elif set(arguments.overrides()) - {"prompt_encoder_config"}:
        raise ValueError(
            "model_overrides is for presets (ti, s, b) and SAMI encoders; a checkpoint keeps its config, but for "
            f"prompt_encoder_config, got {arguments.model_overrides}"
        )
    else:
        changes = arguments.overrides().get("prompt_encoder_config", {})
        model = load_with_inputs(source, changes, arguments.parts("freeze"))
        model.config.vision_config.image_size = image_size
        image_processor = load_processor(EfficientSamImageProcessor, source, size=image_size)
    image_processor.mask_generation |= arguments.generation_options()
    image_processor.mask_cleaning |= arguments.cleaning_options()
    check_prompt_tokens(model, arguments.sampling())
    make_trainable(model, arguments)
    return model, EfficientSamProcessor.for_model(model.config, image_processor)


def _scene_batches(arguments: Any) -> Any:
    return scene_batches(
        arguments,
        objects=arguments.objects_per_image,
        min_area=arguments.min_object_area,
        max_area=arguments.max_object_area,
    )


def _training_data(arguments: Any) -> dict[str, Any]:
    """{"samples"} of annotated pictures, {"stream", "read"} of those that come one after the other, {} for scenes.

    {"opened"} of a mixture: what each of its sources opens.
    """
    from ..data import coco, mixture, sa1b, tars

    if arguments.train_mix:
        return {"opened": mixture.open_sources(arguments.mixture())}
    if arguments.train_annotations:
        return {"samples": coco.CocoSamples(arguments.train_annotations, arguments.train_images)}
    if arguments.train_sa1b:
        found = tars.find_tars(arguments.train_sa1b)
        if found and next(Path(arguments.train_sa1b).rglob("*.json"), None):
            raise ValueError(f"train_sa1b: {arguments.train_sa1b} holds tars and loose .json files; give one of them")
        if found and arguments.train_limit:
            raise ValueError("train_limit is for pictures that are stored; tars are streamed")
        if found:
            return {"stream": sa1b.stream_tars(found), "read": sa1b.read_row}
        return {"samples": sa1b.Sa1bFolder(arguments.train_sa1b)}
    if arguments.train_dataset:
        return dataset_source(arguments, arguments.masks_column)
    return {}


def _annotated_batches(arguments: Any, processor: Any, **source: Any) -> Any:
    from ..training.mask_preparation import MaskPreparation

    preparation = MaskPreparation(
        image_processor=processor.image_processor,
        objects=arguments.objects_per_image,
        min_area=arguments.min_object_area,
        max_area=arguments.max_object_area,
        augmentation=arguments.augmentation(),
        scale_of=arguments.stages()[-1].image_size if arguments.crops else None,
    )
    return picture_batches(arguments, preparation, **source)


def _mixed_batches(arguments: Any, processor: Any, opened: list[Any]) -> Any:
    """Batches of all sources of a mixture, given what each of them opened."""
    from ..training.mixture_batches import mixture_sources

    device = render_device(arguments)
    sources = mixture_sources(arguments, opened, processor.image_processor, device)
    return mixture_batches(arguments, sources, device)


def _scene_samples(arguments: Any) -> list[dict[str, Any]]:
    """Held-out scenes at the last stage's size, with up to `objects_per_image` objects each."""
    from ..training.scene_batches import HELD_OUT, scene_samples

    return scene_samples(
        arguments.evaluate_scenes,
        seed=arguments.seed + HELD_OUT,
        image_size=arguments.stages()[-1].image_size,
        objects=arguments.objects_per_image,
        min_area=arguments.min_object_area,
        max_area=arguments.max_object_area,
    )


def _coco_samples(arguments: Any) -> dict[str, Any]:
    """Samples to evaluate on, by name; damaged ones are named now, and ValueError if there are no others."""
    if not arguments.eval_annotations:
        return {}
    from ..data.coco import CocoSamples
    from ..evaluation.skipped import report_skipped, try_reading

    samples = CocoSamples(arguments.eval_annotations, arguments.eval_images)
    count = min(len(samples), arguments.eval_limit or len(samples))
    damages = [(index, try_reading(samples.__getitem__, index)[1]) for index in range(count)]
    report_skipped([(index, damage) for index, damage in damages if damage], count, None)
    return {"coco": samples}


def _evaluation(sets: dict[str, Any], arguments: Any) -> Callable[[Any], dict[str, float]]:
    """Numbers by name as coco/box, scenes/center, ...; `miou` is the mean over prompts on the first set."""
    from ..evaluation import evaluate

    def measure(module: Any) -> dict[str, float]:
        numbers = {}
        for name, samples in sets.items():
            limit = arguments.eval_limit if name == "coco" else None
            options = {"limit": limit, "progress": False, "report": lambda *known: None}  # named before the run
            result = evaluate(module.model, module.processor, samples, **options)
            for prompt in PROMPTS:
                numbers[f"{name}/{prompt}"] = result[prompt]["miou"]
                numbers[f"{name}/{prompt}_oracle"] = result[prompt]["oracle_miou"]
        first = next(iter(sets))
        numbers["miou"] = sum(numbers[f"{first}/{prompt}"] for prompt in PROMPTS) / len(PROMPTS)
        return numbers

    return measure


def _check_best_metric(arguments: Any, sets: list[str]) -> None:
    """ValueError unless an evaluation on these sets, if there are any, gives the number to judge by."""
    names = ["miou", *(f"{name}/{prompt}{kind}" for name in sets for prompt in PROMPTS for kind in ("", "_oracle"))]
    if sets and arguments.best_metric not in names:
        raise ValueError(f"best_metric must be one of {', '.join(names)}, got {arguments.best_metric!r}")
