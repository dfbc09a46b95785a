# SPDX-License-Identifier: Apache-2.0
"""A run folder becomes a folder to publish: weights, configuration, processor, code, metrics, pictures and a card."""

import json
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedModel

from ..averaging import average_weights
from ..files import check_place, write_folder, write_json, write_text
from ..identity import model_revision, model_type
from ..models.configuration_efficientsam import EfficientSamConfig
from ..models.configuration_sami import SamiConfig
from ..models.image_processing_efficientsam import open_image
from ..models.modeling_efficientsam import EfficientSamModel
from ..models.modeling_sami import SamiForPreTraining
from ..models.processing_efficientsam import EfficientSamProcessor
from ..pretrained import load_pretrained, load_processor
from .contents import POINTERS, refuse_links
from .model_card import PREVIEW, Export, model_card
from .run_record import RunRecord, read_evaluation, read_run, read_speed, shorten_paths, training_facts


# The only names an export writes: whoever overwrites one deletes nothing else.
EXPORTED = ("README.md", "config.json", "metrics.json", "processor_config.json", "model*.safetensors")
EXPORTED += ("model.safetensors.index.json", "*_efficientsam*.py", "*_sami.py", "previews")
MAX_SHARD_SIZE = "5GB"
PREVIEW_SIDE = 1600  # pixels of the longer side


def export_run(
    run: str | os.PathLike,
    destination: str | os.PathLike,
    half: bool = True,
    metrics: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    speed: str | os.PathLike | None = None,
    with_code: bool = False,
    overwrite: bool = False,
    average: Sequence[str | os.PathLike] = (),
    license: str = "apache-2.0",
    name: str | None = None,
    preview: bool = False,
    best: bool = False,
) -> Path:
    """Write the model of a run as a folder for every `from_pretrained`, with metrics.json and a model card.

    Args:
        run: folder that `efficientsam finetune` or `pretrain` writes; the run may still be going on.
        destination: folder to write; it appears whole or not at all.
        half: store weights as float16. The configuration says float32, so that a plain `from_pretrained` computes in
            float32; the Gaussian matrix of the positional encoding is float32 in the file too.
        metrics: files that `efficientsam evaluate --output` wrote for this model.
        speed: file that `efficientsam benchmark --output` wrote for this model.
        with_code: add what a repository has: the code for `trust_remote_code`, and the last picture of a run on
            generated scenes.
        overwrite: replace an earlier export.
        average: further models, folders or Hub ids; what is written is the mean of the run's weights and theirs.
        license: the weights' licence, by the Hub's names.
        name: what the card calls the model, the destination's name if left out.
        preview: add the last picture of a run on other data too, which shows some of them.
        best: take the model of the best evaluation in the place of the last one.

    Returns:
        The destination.

    Raises:
        FileNotFoundError: if `run`, or a file of it, of `metrics` or `speed`, is missing.
        FileExistsError: if `destination` holds something that is not an earlier export, or `overwrite` is off.
        OSError: if nothing can be written there.
        ValueError: if a file is not what it should be or a link leads out of the run, a weight does not fit float16,
            or a model of `average` does not go with the run's.
    """
    destination = Path(os.path.abspath(destination))
    check_destination(destination, overwrite)
    check_place(destination)
    refuse_links(Path(run))
    record = read_run(Path(run), best)
    drawn = preview or (with_code and bool(record.arguments.get("train_scenes")))
    known = _revisions(record, destination, average)
    export = Export(
        record, name or destination.name, half, with_code, license,
        evaluations=[read_evaluation(Path(path), known) for path in _as_list(metrics)],
        speed=read_speed(Path(speed)) if speed else None,
        preview=last_picture(record) if drawn else None,
    )  # fmt: skip
    model, processor = load_trained(record)
    export.averaged = _average(model, average)
    card = model_card(export, model)
    training = training_facts(record) | ({"averaged_with": export.averaged} if export.averaged else {})
    measured = {"training": training, "evaluations": export.evaluations, "speed": export.speed}

    def fill(folder: Path) -> None:
        save_model(model, folder, half)
        if processor is not None:
            processor.save_pretrained(folder)
        if not with_code:
            remove_code(folder)
        if export.preview is not None:
            write_preview(export.preview, folder / PREVIEW)
        write_json(folder / "metrics.json", measured)
        write_text(folder / "README.md", card)

    write_folder(destination, fill)
    return destination


def _revisions(record: RunRecord, destination: Path, average: Sequence[Any]) -> set[str]:
    """What numbers of this model can be of: the run's own weights unless a mean is made, or an earlier export."""
    folders = [destination] if average else [record.model, destination]
    return {model_revision(str(folder)) for folder in folders if folder.is_dir()}


def load_trained(record: RunRecord) -> tuple[PreTrainedModel, EfficientSamProcessor | None]:
    """Model of a run in float32 and its processor; errors as of `load_folder`."""
    return load_folder(record.model)


def load_folder(folder: Path) -> tuple[PreTrainedModel, EfficientSamProcessor | None]:
    """Model in float32 and its processor, which a SAMI model has none of; ValueError for others and damaged ones."""
    kind = model_type(str(folder))
    if kind == EfficientSamConfig.model_type:
        model = load_pretrained(EfficientSamModel, folder, dtype=torch.float32)
        return model, load_processor(EfficientSamProcessor, folder)
    if kind == SamiConfig.model_type:
        return load_pretrained(SamiForPreTraining, folder, dtype=torch.float32), None
    raise ValueError(f"{folder} holds a model of type {str(kind)[:60]!r}, expected an EfficientSAM or SAMI model")


def _average(model: PreTrainedModel, others: Sequence[str | os.PathLike]) -> list[dict[str, Any]]:
    """Set the weights to their mean with those of others; what the others are."""
    if others and not isinstance(model, EfficientSamModel):
        raise ValueError("average is for EfficientSAM models, and the run pretrained a SAMI one")
    return shorten_paths(average_weights(model, others)) if others else []


def last_picture(record: RunRecord) -> Path | None:
    """The last picture of predictions that a run drew before its weights were saved."""
    pictures = sorted((record.folder / "pictures").glob("step_*.png"))
    seen = [path for path in pictures if int(path.stem.removeprefix("step_")) <= record.progress["steps"]]
    return seen[-1] if seen else None


def _as_list(paths: str | os.PathLike | Sequence[str | os.PathLike] | None) -> list[str | os.PathLike]:
    if paths is None:
        return []
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


def check_destination(destination: Path, overwrite: bool) -> None:
    """`FileExistsError` unless the folder is new, empty, or an earlier export that may be replaced."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise FileExistsError(f"destination {str(destination)!r} is not a folder")
    names = sorted(path.name for path in destination.iterdir())
    if not names:
        return
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in EXPORTED)]
    if foreign or "metrics.json" not in names:
        found = f"holds {', '.join(foreign[:5])}" if foreign else "has no metrics.json"
        raise FileExistsError(f"destination {str(destination)!r} is not empty and no earlier export: it {found}")
    if not overwrite:
        raise FileExistsError(f"destination {str(destination)!r} holds an earlier export; overwrite replaces it")


def write_preview(source: Path, destination: Path) -> None:
    """A picture small enough for a page."""
    destination.parent.mkdir()
    small = open_image(source, "picture of the run")
    small.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE), Image.Resampling.LANCZOS)
    small.save(destination, quality=85)


def save_model(model: PreTrainedModel, folder: Path, half: bool) -> None:
    """Save float32 `model`, its weights stored as float16 if `half`, with float32 as the dtype to load them in."""
    for name in model.config.sub_configs:
        # A part that is loaded alone reads its own dtype, and without one takes the file's.
        getattr(model.config, name).dtype = "float32"
    state = model.state_dict()
    if half:
        state = {name: _to_half(name, tensor) for name, tensor in state.items()}
    model.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_SIZE)
    for path in folder.glob("*.safetensors"):  # safetensors makes them readable for their owner only
        path.chmod((folder / "config.json").stat().st_mode)


def _to_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() or name.endswith("positional_encoding.gaussian_matrix"):
        return tensor
    halved = tensor.half()
    if not torch.isfinite(halved).all():
        raise ValueError(f"weight {name} does not fit float16 (largest {tensor.abs().max():.3g}); export without half")
    return halved


def remove_code(folder: Path) -> None:
    """Delete the modules that `save_pretrained` put beside the weights, and every pointer to them."""
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*.json"):
        write_json(path, _without_pointers(json.loads(path.read_text(encoding="utf-8"))))


def _without_pointers(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_pointers(entry) for name, entry in value.items() if name not in POINTERS}
    return value
