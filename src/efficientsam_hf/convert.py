# SPDX-License-Identifier: Apache-2.0
"""Released EfficientSAM checkpoints to folders for `from_pretrained` and the Hub."""

import hashlib
import io
import os
import pickle
import re
import struct
import zipfile
import zlib
from pathlib import Path

import torch

from .files import write_folder, write_png, write_text
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
# What reading and unpickling raise on files that are damaged or something else.
NO_CHECKPOINT = (RuntimeError, EOFError, LookupError, AssertionError, TypeError, struct.error)
NO_CHECKPOINT += (zipfile.BadZipFile, zlib.error)


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
        ValueError: if `source` is no readable checkpoint without code, or not one of EfficientSAM; the message lists
            missing, unexpected and misshapen entries.
    """
    source, destination = Path(source), Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FileExistsError(f"destination {str(destination)!r} exists and is not an empty folder")
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
    except NO_CHECKPOINT as error:
        raise ValueError(f"source {str(source)!r} is truncated or not a checkpoint ({_first_line(error)})") from None
    state = content.get("model", content) if isinstance(content, dict) else None
    if not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"source {str(source)!r} is not a state dict of tensors, nor one under the key 'model'")
    return state


def _open_checkpoint(source: Path) -> io.BytesIO | str:
    """A `.pt` file is itself a zip; the released archive is a zip with one `.pt` in it."""
    if not zipfile.is_zipfile(source):
        return str(source)
    with zipfile.ZipFile(source) as archive:
        members = [name for name in archive.namelist() if name.endswith(".pt") and "__MACOSX" not in name]
        if not members:
            return str(source)
        if len(members) > 1:
            raise ValueError(f"source {str(source)!r} holds several checkpoints: {members}")
        return io.BytesIO(archive.read(members[0]))


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
    renamed, origin = {}, {}
    for name, value in state.items():
        if name not in BOX_CORNERS:
            origin[rename(name)] = name
            renamed[rename(name)] = value
    if all(name in state for name in BOX_CORNERS):
        corners = [state[name] for name in BOX_CORNERS]
        origin["prompt_encoder.box_corner_embed.weight"] = " + ".join(BOX_CORNERS)
        fits = len({corner.shape for corner in corners}) == 1 and corners[0].ndim == 2
        renamed["prompt_encoder.box_corner_embed.weight"] = torch.cat(corners) if fits else corners[0]
    missing = sorted(expected.keys() - renamed.keys())
    unexpected = sorted(origin[name] for name in renamed.keys() - expected.keys())
    misshapen = sorted(
        f"{origin[name]} {tuple(renamed[name].shape)} instead of {expected[name]}"
        for name in renamed.keys() & expected.keys()
        if tuple(renamed[name].shape) != expected[name]
    )
    if missing or unexpected or misshapen:
        raise ValueError(
            f"the checkpoint does not fit EfficientSAM. missing: {missing}; unexpected: {unexpected}; "
            f"misshapen: {misshapen}"
        )
    model.load_state_dict(renamed, strict=True)


def rename(name: str) -> str:
    """Translate one released parameter name into ours."""
    for pattern, replacement in RENAMES:
        name = re.sub(pattern, replacement, name)
    return name
