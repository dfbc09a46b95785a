# SPDX-License-Identifier: Apache-2.0
"""Models and processors from folders and the Hub, which anyone can have written: what is wrong is one line.

Every `from_pretrained` of this package but the users' own goes through here.
"""

import math
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, initialization
from transformers.utils import (
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import get_checkpoint_shard_files

from .identity import read_config
from .models.checks_efficientsam import LARGEST_SIDE, is_number, is_whole, short


# Field of a config -> most that it may be: numbers of modules and tokens, names of classes, pixels.
LIMITS = {r"layers|depth|blocks|heads|multimask_outputs|prompt_tokens": 1000, r"^num_labels$": 10**5}
LIMITS |= {r"image_size$": LARGEST_SIDE}
FLAGS = ("output_hidden_states", "output_attentions", "return_dict")  # which transformers takes as they are
SPARE_BYTES = 2**26  # that a model may have beyond its weights on disk, in tables that are made new and the like
SHOWN = 3  # names in a message
OWN_CODE = (
    "it needs code of its authors, which was not run. That takes trust_remote_code (--trust-remote-code of segment, "
    "evaluate, benchmark and features) and lets them do on this machine whatever you may do"
)


def load_pretrained(
    kind: Any,
    name: str | os.PathLike,
    config: PreTrainedConfig | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    optional: str | None = None,
    part: bool = False,
    what: str = "model",
    **options: Any,
) -> PreTrainedModel:
    """A model whose weights are those that its config describes, all of them and finite.

    Args:
        kind: model class or Auto class.
        name: folder, or name on the Hub.
        config: in the place of the folder's.
        revision: commit, tag or branch on the Hub.
        trust_remote_code: whether code beside the weights may run; nobody is asked.
        optional: regular expression of weights that may be missing.
        part: whether the checkpoint may be of something larger, such as a model with a head.
        what: word for the model in messages.
        options: further ones of `from_pretrained`.

    Raises ValueError, ImportError or, where nothing can be read, OSError in one line that names the model.
    """
    name = os.fspath(name)
    with _explained(name, what):
        _check_config(read_config(name, revision), trust_remote_code)
        _check_size(kind, name, config, revision, trust_remote_code)
        if config is not None:
            options["config"] = config
        model, report = kind.from_pretrained(
            name,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # which are reported below, in one line
            **options,
        )
        _check_report(report, optional, part)
        _check_finite(model)
    return model


def load_config(
    kind: Any,
    name: str | os.PathLike,
    revision: str | None = None,
    trust_remote_code: bool = False,
    what: str = "model",
) -> PreTrainedConfig:
    """The config of a model, by its class or AutoConfig; arguments and errors as of `load_pretrained`."""
    name = os.fspath(name)
    with _explained(name, what):
        _check_config(read_config(name, revision), trust_remote_code)
        return kind.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)


def load_processor(
    kind: Any, name: str | os.PathLike, trust_remote_code: bool = False, what: str = "processor", **options: Any
) -> Any:
    """A processor, or image processor, that can prepare a picture; arguments and errors as of `load_pretrained`."""
    name = os.fspath(name)
    with _explained(name, what):
        processor = kind.from_pretrained(name, trust_remote_code=trust_remote_code, **options)
        check_preprocessing(getattr(processor, "image_processor", processor).to_dict())
    return processor


def check_preprocessing(fields: Mapping[str, Any]) -> None:
    """ValueError for fields of an image processor's file that would make no picture, or one that fills the memory."""
    for name, value in fields.items():
        if value is None:
            continue
        if name.startswith("do_"):
            fits, expected = isinstance(value, bool), "true or false"
        elif name == "image_mean":
            fits, expected = _are_numbers(value, -math.inf), "one finite number, or three"
        elif name in ("image_std", "rescale_factor"):
            fits, expected = _are_numbers(value, 0), "one finite number above 0, or three"
        elif re.search(r"(^|_)size$", name):
            sides = list(value.values()) if isinstance(value, Mapping) else [value]
            fits = all(side is None or (is_whole(side) and 1 <= side <= LARGEST_SIDE) for side in sides)
            expected = f"1 to {LARGEST_SIDE} pixels"
        else:
            continue
        if not fits:
            raise ValueError(f"{name} is {short(value)}, expected {expected}")


def _check_config(fields: Mapping[str, Any], trust_remote_code: bool) -> None:
    """ValueError, before anything is built, for absurd numbers of layers and the like, wrong flags, code by name."""
    for name, value in fields.items():
        entries = value if isinstance(value, (list, tuple)) else [value]
        for pattern, limit in LIMITS.items():
            if re.search(pattern, name) and any(
                isinstance(entry, (int, float)) and entry > limit for entry in entries
            ):
                raise ValueError(f"{name} is {short(value)}, expected at most {limit}")
        if name in FLAGS and not isinstance(value, (bool, type(None))):
            raise ValueError(f"{name} is {short(value)}, expected true or false")
        if name.endswith("_implementation") and "/" in str(value) and not trust_remote_code:
            raise ValueError(f"{name} is {short(value)}: {OWN_CODE}")
        for entry in entries:
            if isinstance(entry, Mapping):
                _check_config(entry, trust_remote_code)


def _check_size(
    kind: Any, name: str, config: PreTrainedConfig | None, revision: str | None, trust_remote_code: bool
) -> None:
    """ValueError if the config describes more weights than are stored: loading would make the others up."""
    stored = _stored_bytes(name, revision)
    if stored is None:  # from_pretrained says so
        return
    auto = not issubclass(kind, PreTrainedModel)
    if config is None:
        source = AutoConfig if auto else kind.config_class
        config = source.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    build = kind.from_config if auto else kind
    options = {"trust_remote_code": trust_remote_code} if auto else {}
    safe = getattr(initialization, "meta_device_safe_creation_ops", nullcontext)  # as from_pretrained itself builds
    try:
        with initialization.no_init_weights(), torch.device("meta"), safe():
            numbers = sum(weight.numel() for weight in build(config, **options).parameters())
    except Exception as error:  # whatever values that do not go together lead to
        raise ValueError(f"no model can be built by its config: {_reason(error)}") from error
    if numbers > 2 * stored + SPARE_BYTES:  # a weight has a byte at least
        raise ValueError(f"its config describes {numbers:,} weights, but its files hold {stored:,} bytes")


def _stored_bytes(name: str, revision: str | None) -> int | None:
    """Bytes of the weights that `from_pretrained` would read; None if there are none under a usual name."""
    for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, WEIGHTS_NAME, WEIGHTS_INDEX_NAME):
        path = cached_file(name, file, revision=revision, _raise_exceptions_for_missing_entries=False)
        if path is not None:
            sharded = file.endswith(".json")
            paths = get_checkpoint_shard_files(name, path, revision=revision)[0] if sharded else [path]
            return sum(os.path.getsize(path) for path in paths)
    return None


def _check_report(report: Mapping[str, Any], optional: str | None, part: bool) -> None:
    """ValueError that counts and names weights which are missing, have no place or another shape."""
    missing = [key for key in report["missing_keys"] if not (optional and re.search(optional, key))]
    misshapen = [f"{key} {tuple(own)} for {tuple(due)}" for key, own, due in report["mismatched_keys"]]
    found = {
        "missing": missing,
        "without a place": [] if part else list(report["unexpected_keys"]),
        "of another shape": misshapen,
    }
    problems = [f"{len(keys)} {problem} ({_first(keys)})" for problem, keys in found.items() if keys]
    if problems:
        raise ValueError(f"its weights are not those of its config: {', '.join(problems)}")


def _check_finite(model: PreTrainedModel) -> None:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    wrong = [name for name, value in tensors if value.is_floating_point() and not value.isfinite().all()]
    if wrong:
        raise ValueError(f"{len(wrong)} of its weights hold NaN or infinity as {model.dtype} ({_first(wrong)})")


@contextmanager
def _explained(name: str, what: str) -> Iterator[None]:
    """Say in one line what failed inside, and let transformers print nothing besides."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()  # "Loading weights" is over before it can be read
    try:
        yield
    except Exception as error:  # transformers looks into files as if they were its own: a wrong one may raise any kind
        kind = next((kind for kind in (OSError, ImportError) if isinstance(error, kind)), ValueError)
        raise kind(f"cannot load a {what} from {name}: {_reason(error)}") from error
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _reason(error: Exception) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text:
        return OWN_CODE
    if not isinstance(error, (ValueError, OSError, RuntimeError, ImportError)):
        text = f"{type(error).__name__}: {text}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    more = 2 if text.partition("\n")[0].endswith(":") else 1
    return (" ".join(lines[:more]) or type(error).__name__)[:400]


def _first(names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN])
    return shown + ", ..." * (len(names) > SHOWN)


def _are_numbers(value: Any, above: float) -> bool:
    """Whether this is one number or three, for all channels or each, and all above that."""
    numbers = value if isinstance(value, (list, tuple)) else [value]
    return len(numbers) in (1, 3) and all(_is_finite(number) and number > above for number in numbers)


def _is_finite(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)
