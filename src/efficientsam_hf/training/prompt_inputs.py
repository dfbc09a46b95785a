# SPDX-License-Identifier: Apache-2.0
"""Inputs that a checkpoint was trained without, such as the released ones: switched on, to be trained from now on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..models.configuration_efficientsam import EfficientSamConfig
from ..models.modeling_efficientsam import EfficientSamModel
from ..pretrained import load_config, load_pretrained
from .segmentation import PromptSampling


INPUTS = ("background_points", "mask_prompts", "dense_boxes", "padded_prompt_tokens")
NEW_WEIGHTS = {"background_points": ["background_embed"], "mask_prompts": ["no_mask_embed", "mask_embed"]}


def load_with_inputs(source: str, changes: dict[str, Any], freeze: Sequence[str] = ()) -> EfficientSamModel:
    """An EfficientSAM from a folder or Hub id, in float32, with `changes` made to `config.prompt_encoder_config`.

    What is new begins without an effect: a background click is a position of no kind, as in released code, and
    neither a mask prompt nor its absence changes the image embeddings. A checkpoint that takes mask prompts already
    is the exception: with `dense_boxes` its boxes are read as earlier answers from the start.

    Raises ValueError for a change that is none of `INPUTS`, a value that the config does not take, a new input where
    `freeze` names the prompt encoder, so that it would never have an effect, or a checkpoint whose weights are not
    those of its config.
    """
    unknown = sorted(set(changes) - set(INPUTS))
    if unknown:
        raise ValueError(
            f"model_overrides: {', '.join(unknown)} of a checkpoint cannot be changed; of its prompt_encoder_config "
            f"{', '.join(INPUTS)} can"
        )
    config = load_config(EfficientSamConfig, source)
    before = config.prompt_encoder_config
    config.prompt_encoder_config = after = type(before).from_dict({**before.to_dict(), **changes})
    new = [name for name in NEW_WEIGHTS if getattr(after, name) and not getattr(before, name)]
    if new and "prompt_encoder" in freeze:
        raise ValueError(
            f"freeze: {source} was trained without {', '.join(new)}, which model_overrides switches on and a frozen "
            "prompt_encoder never learns: leave one of the two out (--freeze, --model-overrides '{}')"
        )
    parts = [part for name in new for part in NEW_WEIGHTS[name]]
    added = rf"^prompt_encoder\.({'|'.join(parts)})\." if parts else None
    model = load_pretrained(EfficientSamModel, source, config=config, optional=added, dtype=torch.float32)
    for part in parts:
        module = getattr(model.prompt_encoder, part)
        last = module.conv3 if part == "mask_embed" else module  # zeros in all of its layers would never learn
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
    return model


def check_prompt_tokens(model: EfficientSamModel, sampling: PromptSampling) -> None:
    """ValueError if the prompts that are drawn become more than the model takes."""
    limit = model.config.prompt_encoder_config.padded_prompt_tokens
    tokens = sampling.rounds + (2 if sampling.box_and_point > 0 else int(sampling.box > 0))
    if limit is not None and tokens > limit:
        raise ValueError(
            f"prompt_rounds {sampling.rounds} gives objects up to {tokens} prompt tokens (a box is two), but the "
            f"checkpoint takes {limit}: take {tokens - limit} rounds less, or lift its limit with --model-overrides "
            "'{prompt_encoder_config: {padded_prompt_tokens: null}}'"
        )
