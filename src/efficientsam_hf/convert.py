# SPDX-License-Identifier: Apache-2.0
"""Released EfficientSAM checkpoints to folders for `from_pretrained` and the Hub."""

import hashlib
import io
import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch

from .files import check_place, write_folder, write_png, write_text
from .hub.model_card import SCENES_PREVIEW, released_card
from .hub.previews import draw_scenes
from .models.configuration_efficientsam import VISION_PRESETS, EfficientSamConfig
from .models.image_processing_efficientsam import EfficientSamImageProcessor
from .models.modeling_efficientsam import EfficientSamModel
from .models.processing_efficientsam import EfficientSamProcessor


# Applied in this order to every released name; what no rule touches keeps its name.
RENAMES = [
    (r"^image_encoder\.pos_embed$", "vision_encoder.embeddings.position_embeddings"),
    (r"^image_encoder\.patch_embed\.proj\.", "vision_encoder.embeddings.projection."),
    (r"^image_encoder\.blocks\.(\d+)\.attn\.", r"vision_encoder.layers.\1.attention."),
    (r"^image_encoder\.blocks\.(\d+)\.", r"vision_encoder.layers.\1."),
    (r"^image_encoder\.neck\.0\.", "neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "neck.layer_norm2."),
    (
        r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$",
        "prompt_encoder.positional_encoding.gaussian_matrix",
    ),
    (r"^prompt_encoder\.invalid_points\.", "prompt_encoder.padding_embed."),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"^mask_decoder\.transformer\.layers\.(\d+)\.norm(\d)\.", r"mask_decoder.transformer.layers.\1.layer_norm\2."),
    (r"^mask_decoder\.transformer\.norm_final_attn\.", "mask_decoder.transformer.layer_norm_final_attn."),
    (r"^mask_decoder\.final_output_upscaling_layers\.0\.0\.", "mask_decoder.upscale_conv1."),
    (r"^mask_decoder\.final_output_upscaling_layers\.0\.1\.", "mask_decoder.upscale_norm."),
    (r"^mask_decoder\.final_output_upscaling_layers\.1\.0\.", "mask_decoder.upscale_conv2."),
    (r"^(mask_decoder\..*)\.layers\.(\d)\.0\.(weight|bias)$", r"\1.layers.\2.\3"),  # a layer and its activation
    (r"^(mask_decoder\..*)\.fc\.(weight|bias)$", r"\1.proj_out.\2"),
]
# The released code keeps the two corners of a box in two tables of one row, ours in one table of two.
BOX_CORNERS = ("prompt_encoder.bbox_top_left_embeddings.weight", "prompt_encoder.bbox_bottom_right_embeddings.weight")


# Thresholds of segment-everything in the notebook of the released code (yformer/EfficientSAM, notebooks).
RELEASED_MASK_GENERATION = {"pred_iou_thresh": 0.7, "stability_score_thresh": 0.9}
SHOWN = 10  # names in a message
LARGEST = 2**30  # bytes of a checkpoint; the largest that was released has 106 MB
# An archive may unpack to this much, and beyond it to so many times its own size: weights hardly shrink by packing.
SMALL, EXPANSION = 2**26, 4


def convert_checkpoint(source: str | os.PathLike, destination: str | os.PathLike) -> EfficientSamConfig:
    """Write the released checkpoint `source` as a folder that every `from_pretrained` and `efficientsam push` take.

    Beside the weights lie the code for `trust_remote_code` and a card that names the authors.

    Args:
        source: `efficient_sam_vitt.pt`, `efficient_sam_vits.pt`, or the zip in which the latter was released.
        destination: folder to write; it must not exist or be empty.

    Returns:
        The configuration of the written model.

    Raises:
        FileNotFoundError, FileExistsError: if `source` is missing or `destination` holds something.
        OSError: if nothing can be written there.
        ValueError: if `source` is no readable checkpoint without code, would unpack to more than a checkpoint is, or
            is not one of EfficientSAM; the message lists missing, unexpected, misshapen and non-finite entries.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"destination {str(destination)!r} exists and is not an empty folder")
    check_place(destination)
    state = read_released_checkpoint(source)
    config = released_config(state)
    model = EfficientSamModel(config)
    load_released_state(model, state)
    image_processor = EfficientSamImageProcessor(
        size=config.vision_config.image_size, mask_generation=RELEASED_MASK_GENERATION
    )
    processor = EfficientSamProcessor.for_model(config, image_processor)
    card = released_card(model, source, hashlib.sha256(source.read_bytes()).hexdigest())

    def fill(folder: Path) -> None:
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        (folder / SCENES_PREVIEW).parent.mkdir()
        write_png(folder / SCENES_PREVIEW, draw_scenes(model.eval(), processor))
        write_text(folder / "README.md", card)

    write_folder(destination, fill)
    return config


def read_released_checkpoint(source: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a `.pt` file, or of the only `.pt` inside a zip, without running any code in it."""
    if not source.is_file():
        raise FileNotFoundError(f"source {str(source)!r} is not a file")
    try:
        content = torch.load(_open_checkpoint(source), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        # Its text advises to load the file without protection, so it stays out of the message.
        raise ValueError(
            f"source {str(source)!r} is no checkpoint, or holds more than tensors; no code in it ran"
        ) from error
    except CheckpointTooLargeError:
        raise
    except Exception as error:  # what is damaged, or something else, makes zipfile and torch raise of every kind
        raise ValueError(f"source {str(source)!r} is truncated or not a checkpoint ({_first_line(error)})") from None
    state = content.get("model", content) if isinstance(content, dict) else None
    named = isinstance(state, dict) and state and all(isinstance(name, str) for name in state)
    if not named or not all(_is_dense(value) for value in state.values()):
        raise ValueError(f"source {str(source)!r} is not a state dict of tensors, nor one under the key 'model'")
    return state


def _is_dense(value: Any) -> bool:
    """Whether this is a tensor of numbers, each with a place in memory."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.device.type != "cpu":
        return False
    return not value.is_quantized and not value.is_complex()


class CheckpointTooLargeError(ValueError):
    """A file holds, or unpacks to, more than a checkpoint does."""


def _open_checkpoint(source: Path) -> io.BytesIO | str:
    """A `.pt` file is itself a zip; the released archive is a zip with one `.pt` in it.

    Raises CheckpointTooLargeError before anything is unpacked.
    """
    size = source.stat().st_size
    if size > LARGEST:
        raise CheckpointTooLargeError(f"source {str(source)!r} has {size:,} bytes, a checkpoint up to {LARGEST:,}")
    if not zipfile.is_zipfile(source):
        return str(source)
    with zipfile.ZipFile(source) as archive:
        _check_unpacked(archive, size, source)
        members = [name for name in archive.namelist() if name.endswith(".pt") and "__MACOSX" not in name]
        if not members:
            return str(source)
        if len(members) > 1:
            raise ValueError(f"source {str(source)!r} holds several checkpoints: {members}")
        packed = io.BytesIO(archive.read(members[0]))
    if zipfile.is_zipfile(packed):
        with zipfile.ZipFile(packed) as archive:
            _check_unpacked(archive, len(packed.getvalue()), source)
    packed.seek(0)
    return packed


def _check_unpacked(archive: zipfile.ZipFile, size: int, source: Path) -> None:
    """Compare what a zip of so many bytes says that it unpacks to, which its readers hold it to, with bounds."""
    unpacked = sum(member.file_size for member in archive.infolist())
    bound = min(LARGEST, max(SMALL, EXPANSION * size))
    if unpacked > bound:
        raise CheckpointTooLargeError(
            f"source {str(source)!r} has {size:,} bytes and would unpack to {unpacked:,}, expected at most {bound:,}"
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


def released_config(state: dict[str, torch.Tensor]) -> EfficientSamConfig:
    """Recognise the variant by the shape of the position table; heads are the variant's, since no shape shows them."""
    table = state.get("image_encoder.pos_embed")
    widths = {preset["hidden_size"]: variant for variant, preset in VISION_PRESETS.items()}
    if table is None or table.ndim != 3 or table.shape[2] not in widths:
        found = "is missing" if table is None else f"has shape {tuple(table.shape)}"
        raise ValueError(
            f"not a checkpoint of EfficientSAM: image_encoder.pos_embed {found}, expected (1, 197, one of "
            f"{sorted(widths)}). The file has {len(state)} entries, the first is {next(iter(state))!r}"
        )
    return EfficientSamConfig.from_preset(
        widths[table.shape[2]],
        prompt_encoder_config={"background_points": False, "mask_prompts": False, "padded_prompt_tokens": 6},
    )


def load_released_state(model: EfficientSamModel, state: dict[str, torch.Tensor]) -> None:
    """Load a state dict in the released layout strictly into `model`."""
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    renamed, origin, doubled = {}, {}, []
    for name, value in state.items():
        if name not in BOX_CORNERS:
            doubled += [name] * (rename(name) in renamed)
            origin[rename(name)] = name
            renamed[rename(name)] = value
    if all(name in state for name in BOX_CORNERS):
        corners = [state[name] for name in BOX_CORNERS]
        origin["prompt_encoder.box_corner_embed.weight"] = " + ".join(BOX_CORNERS)
        row = (1, expected["prompt_encoder.box_corner_embed.weight"][1])
        odd = next((corner for corner in corners if tuple(corner.shape) != row), None)
        renamed["prompt_encoder.box_corner_embed.weight"] = torch.cat(corners) if odd is None else odd
    missing = sorted(expected.keys() - renamed.keys())
    unexpected = sorted([*doubled, *(origin[name] for name in renamed.keys() - expected.keys())])
    misshapen = sorted(
        f"{origin[name]} {tuple(renamed[name].shape)} instead of {expected[name]}"
        for name in renamed.keys() & expected.keys()
        if tuple(renamed[name].shape) != expected[name]
    )
    if missing or unexpected or misshapen:
        raise ValueError(
            f"the checkpoint does not fit EfficientSAM. missing: {_some(missing)}; unexpected: {_some(unexpected)}; "
            f"misshapen: {_some(misshapen)}"
        )
    wrong = sorted(origin[name] for name, value in renamed.items() if not value.isfinite().all())
    if wrong:
        raise ValueError(f"the checkpoint holds NaN or infinity: {_some(wrong)}")
    model.load_state_dict(renamed, strict=True)


def _some(names: list[str]) -> str:
    return str(names) if len(names) <= SHOWN else f"{names[:SHOWN]} and {len(names) - SHOWN} more"


def rename(name: str) -> str:
    """Translate one released parameter name into ours."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
