# SPDX-License-Identifier: Apache-2.0
"""What is asked of values from outside, and how messages show them."""

import math
import numbers
import reprlib
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError


SHOWN = 80  # characters of a value in a message
LARGEST = 1e9  # of a coordinate or logit: its square is a float32 too
LARGEST_SIDE = 2**13  # pixels of what a model sees
LARGEST_PICTURE = 2**31  # pixels of a picture that masks are brought to

_brief = reprlib.Repr()
_brief.maxlist = _brief.maxtuple = _brief.maxdict = 8
_brief.maxstring = _brief.maxother = _brief.maxlong = SHOWN


def short(value: Any, length: int = SHOWN) -> str:
    """A value as messages show it: one line, cut; of arrays and tensors the shape and dtype."""
    if isinstance(value, (np.ndarray, torch.Tensor)) and value.ndim:
        return f"a {type(value).__name__} of shape {tuple(value.shape)} and {value.dtype}"
    try:
        text = _brief.repr(value)
    except Exception:  # a number of more digits than Python writes, or an object that cannot tell
        text = f"<{type(value).__name__}>"
    return cut(text, length)


def cut(text: str, length: int = SHOWN) -> str:
    """Text in one line, with an ellipsis where it is too long."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 3] + "..."


def is_whole(value: Any) -> bool:
    """Whether this is an integer, and no bool."""
    return isinstance(value, numbers.Integral) and not isinstance(value, (bool, np.bool_))


def is_number(value: Any) -> bool:
    """Whether this is a real number that a float can hold, infinity included, and no bool."""
    if not isinstance(value, numbers.Real) or isinstance(value, (bool, np.bool_)):
        return False
    try:
        return not math.isnan(float(value))
    except OverflowError:  # an integer of hundreds of digits
        return False


def check(name: str, value: Any, fits: bool, expected: str) -> None:
    """ValueError that names the argument, its value and what was expected, unless it fits."""
    if not fits:
        raise ValueError(f"{name} is {short(value)}, expected {expected}")


def check_whole(name: str, value: Any, low: int, high: int) -> None:
    """ValueError unless the value is a whole number within bounds, both included."""
    check(name, value, is_whole(value) and low <= value <= high, f"a whole number from {low} to {high:,}")


def check_number(name: str, value: Any, low: float, high: float) -> None:
    """ValueError unless the value is a number within bounds, both included."""
    check(name, value, is_number(value) and low <= value <= high, f"a number from {low:g} to {high:g}")


def check_bool(name: str, value: Any) -> None:
    """ValueError unless the value is a bool."""
    check(name, value, isinstance(value, (bool, np.bool_)), "True or False")


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """ValueError unless the value is one of a few."""
    known = isinstance(value, (str, type(None))) and value in choices
    check(name, value, known, f"one of {', '.join(map(str, choices))}")


def check_tensor(name: str, value: Any, expected: str) -> None:
    """TypeError unless the value is a tensor, ValueError unless it holds real numbers."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is {_kind(value)}, expected a tensor of shape {expected}")
    if value.is_complex() or value.is_quantized or value.layout != torch.strided:
        raise ValueError(f"{name} holds {value.dtype} ({value.layout}), expected a dense tensor of real numbers")


def as_tensor(name: str, value: Any, expected: str) -> torch.Tensor:
    """A tensor as it is, what numpy takes as float32 on the CPU; ValueError for what has no real numbers."""
    if isinstance(value, torch.Tensor):
        check_tensor(name, value, expected)
        return value
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged
        raise ValueError(f"{name} is {short(value)}, expected an array of shape {expected}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{name} is {short(value)}, expected an array of shape {expected}")
    with np.errstate(over="ignore"):  # what becomes infinite is refused with the rest
        return torch.from_numpy(array.astype(np.float32))


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


def check_finite(name: str, values: torch.Tensor, places: Sequence[str], ignored: torch.Tensor | None = None) -> None:
    """ValueError that names the first place with a value that is not finite, or larger than `LARGEST`.

    The first axes of `values` are the `places`, such as image and object; `ignored`, bool, of the shape of the first
    axes, is True where values do not matter.
    """
    wrong = ~(values.float().abs() <= LARGEST)
    if ignored is not None:
        wrong &= ~ignored.reshape(ignored.shape + (1,) * (wrong.ndim - ignored.ndim))
    if not bool(wrong.any()):
        return
    index = wrong.nonzero()[0].tolist()
    where = ", ".join(f"{place} {number}" for place, number in zip(places, index))
    raise ValueError(
        f"{name} of {where} holds {float(values[tuple(index)]):g}, expected finite numbers of at most {LARGEST:g}"
    )


def largest(values: torch.Tensor) -> torch.Tensor:
    """The largest absolute value, NaN where there is one: -> () float32, nothing read from the device."""
    if not values.numel():
        return torch.zeros((), dtype=torch.float32, device=values.device)
    return torch.linalg.vector_norm(values.float(), math.inf)


def image_sizes(sizes: Any, name: str) -> list[tuple[int, int]]:
    """Lists, arrays or tensors of (height, width) as tuples of integers; ValueError for anything else, or for none."""
    plain = sizes.tolist() if isinstance(sizes, (np.ndarray, torch.Tensor)) else sizes
    check(name, sizes, isinstance(plain, (list, tuple)) and len(plain) > 0, "(height, width) of every image")
    return [image_size(size, f"{name} of image {index}") for index, size in enumerate(plain)]


def image_size(size: Any, name: str) -> tuple[int, int]:
    """One (height, width), a pair in whatever form."""
    plain = size.tolist() if isinstance(size, (np.ndarray, torch.Tensor)) else size
    sides = list(plain) if isinstance(plain, (list, tuple)) else []
    sides = [side.item() if isinstance(side, torch.Tensor) and side.numel() == 1 else side for side in sides]
    fits = len(sides) == 2 and all(is_number(side) and side >= 1 and side == side // 1 for side in sides)
    expected = "(height, width), two positive whole numbers"
    check(name, size, fits, expected)
    check(name, size, sides[0] * sides[1] <= LARGEST_PICTURE, f"{expected} of at most {LARGEST_PICTURE:,} pixels")
    return int(sides[0]), int(sides[1])


def with_value_errors(cls: type) -> type:
    """Class decorator: what `huggingface_hub`'s strict dataclasses refuse is a ValueError in one short line."""
    init: Callable[..., None] = cls.__init__

    @wraps(init)
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        try:
            init(self, *args, **kwargs)
        except StrictDataclassError as error:
            raise ValueError(cut(str(error), 4 * SHOWN)) from error

    cls.__init__ = __init__
    return cls


__all__ = [
    "LARGEST",
    "LARGEST_SIDE",
    "as_tensor",
    "check",
    "check_bool",
    "check_choice",
    "check_finite",
    "check_number",
    "check_tensor",
    "check_whole",
    "cut",
    "image_size",
    "image_sizes",
    "is_number",
    "is_whole",
    "largest",
    "short",
    "with_value_errors",
]
