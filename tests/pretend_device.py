# SPDX-License-Identifier: Apache-2.0
"""A GPU that is none: tensors that say they are on it, computed by the CPU.

Where tensors of two devices meet it raises, as a real one does, and where Apple's GPUs have no float64 or no such
operation; and it counts what a program starts on it and waits for. Numbers are the CPU's; how fast anything would be
it cannot say. Autocast does nothing on it, generators are looked at in torch.rand and its like alone, and what is
made on the device "meta" is on this one.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any

import pytest
import torch
import yaml
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map


INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
JOINING = {"cat", "stack", "mm", "bmm", "addmm", "gather", "index_select", "embedding"}  # numbers on the CPU neither
# What starts nothing.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "_unsafe_view", "_local_scalar_dense"}
WAITING = {"_local_scalar_dense", "nonzero", "equal", "_unique2"}
BY_MASK = {"index", "index_put_", "_index_put_impl_", "masked_select"}


class FarTensor(torch.Tensor):
    """What a program sees of a tensor `near` that it takes to be on the device."""

    near: torch.Tensor
    of: "PretendDevice"

    @staticmethod
    def __new__(cls, near: torch.Tensor, of: "PretendDevice") -> "FarTensor":
        if near.dtype == torch.float64 and of.device.type == "mps":
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        # For torch's C++ it is on "meta", the one device besides the CPU that every build knows.
        far = torch.Tensor._make_wrapper_subclass(
            cls, near.shape, strides=near.stride(), dtype=near.dtype, device="meta", requires_grad=near.requires_grad
        )
        far.near, far.of = near.detach(), of
        return far

    @property
    def device(self) -> torch.device:
        return self.of.device

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def is_meta(self) -> bool:
        return False

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.near.untyped_storage()

    def data_ptr(self) -> int:
        return self.near.data_ptr()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: torch.dtype | None = None, device: Any = None) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or self.device)

    def numpy(self) -> None:
        raise TypeError(f"can't convert {self.device} device type tensor to numpy. Use Tensor.cpu()")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} of a tensor on a pretended device, after its time")


def _without_lists(index: Any) -> Any:
    """Lists of an index as tensors, which torch would make on "meta", of nothing."""
    if isinstance(index, tuple):
        return tuple(_without_lists(part) for part in index)
    return torch.tensor(index) if isinstance(index, list) else index


NearGenerator = torch.Generator


class FarGenerator(NearGenerator):
    """Random numbers on the device: those of a generator on the CPU."""

    def __new__(cls, device: Any = "cpu") -> NearGenerator:
        return super().__new__(NearGenerator if torch.device(device).type == "cpu" else cls, "cpu")

    def __init__(self, device: Any = "cpu"):
        self.far = torch.device(device)

    @property
    def device(self) -> torch.device:
        return self.far


class PretendDevice(TorchDispatchMode):
    """While it is active there is such a device. `launches` and `waits` count operations by their names."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.launches: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        far = [isinstance(tensor, FarTensor) for tensor in tensors]
        if name == "to":
            return self._moved(func, args, kwargs)
        if "upsample" not in name:  # which in parts would be a hundred operations, and other numbers
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        _check_devices(func, args, tensors, far)
        if any(far) and self.device.type == "mps" and name in _without_mps():
            raise NotImplementedError(f"The operator 'aten::{name}' is not currently implemented for the MPS device")
        goes_far = any(far)
        if name == "copy_":
            goes_far = far[0]
        elif kwargs.get("device") is not None:
            goes_far = _is_far(kwargs["device"])
            kwargs |= {"device": torch.device("cpu")} if goes_far else {}
        if goes_far or any(far):
            self._count(func, name, args, far, goes_far)
        result = func(*tree_map(_near, args), **tree_map(_near, kwargs))
        return tree_map(lambda value: self._returned(value, tensors), result) if goes_far else result

    def _moved(self, func, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
        """`Tensor.to` of every form."""
        names = [argument.name for argument in func._schema.arguments]
        given = dict(zip(names, args)) | kwargs
        tensor, other = given["self"], given.get("other")
        device = given.get("device") or (tensor if other is None else other).device
        dtype = given.get("dtype") or (tensor if other is None else other).dtype
        was_far, goes_far = isinstance(tensor, FarTensor), _is_far(device)
        if was_far == goes_far and dtype == tensor.dtype and not given.get("copy"):
            return tensor
        self.launches["to"] += was_far or goes_far
        self.waits["to"] += was_far != goes_far
        return _Moved.apply(tensor, dtype, self if goes_far else None)

    def _count(self, func, name: str, args: tuple, far: list[bool], goes_far: bool) -> None:
        by_mask = name in BY_MASK and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        self.waits[name] += name in WAITING or by_mask or (name in {"_to_copy", "copy_"} and len({*far, goes_far}) > 1)
        self.launches[name] += not func.is_view and name not in FREE

    def _returned(self, value: Any, tensors: list[torch.Tensor]) -> Any:
        """The tensor for the program: the one that was changed in place, or a new one."""
        if not isinstance(value, torch.Tensor):
            return value
        for tensor in tensors:
            if isinstance(tensor, FarTensor) and tensor.near is value:
                return tensor
        return FarTensor(value, self)


class _Moved(torch.autograd.Function):
    """A tensor to a dtype, and to a pretended device or, None, the CPU."""

    @staticmethod
    def forward(ctx, tensor: torch.Tensor, dtype: torch.dtype, to: PretendDevice | None) -> torch.Tensor:
        ctx.came_from = tensor.dtype, getattr(tensor, "of", None)
        near = _near(tensor).detach().to(dtype, copy=True)
        return near if to is None else FarTensor(near, to)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple:
        return _Moved.apply(gradient, *ctx.came_from), None, None


def _near(value: Any) -> Any:
    return value.near if isinstance(value, FarTensor) else value


def _is_far(device: Any) -> bool:
    """To torch's C++ what is on the device is on "meta", and so is what it makes beside it."""
    return torch.device(device).type != "cpu"


def _check_devices(func: Any, args: tuple, tensors: list[torch.Tensor], far: list[bool]) -> None:
    """Raise where tensors of two devices meet; a single number on the CPU may meet any, other than in place."""
    name = func.overloadpacket.__name__
    empty = [tensor for tensor, there in zip(tensors, far) if not there and tensor.device.type == "meta"]
    if empty:
        raise RuntimeError(f"{func}: torch made a tensor past the pretended device, which has no numbers")
    if not any(far) or all(far) or name in {"_to_copy", "copy_"}:
        return
    if name in INDEXING:  # indices may come from the CPU
        wrong = not far[0] or any(t.ndim and not isinstance(t, FarTensor) for t in args[2:3])
    else:
        numbers = name not in JOINING and not (func._schema.is_mutable and not far[0])
        wrong = any((tensor.ndim or not numbers) and not there for tensor, there in zip(tensors, far))
    if wrong:
        raise RuntimeError(f"{func}: expected all tensors on one device, found some on the CPU and some elsewhere")


@cache
def _without_mps() -> set[str]:
    """Operations that torch has kernels for, but none for Apple's GPUs."""
    listed = files("torchgen").joinpath("packaged/ATen/native/native_functions.yaml").read_text()
    names: dict[str, bool] = {}
    for entry in yaml.load(listed, getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        kernels = "".join(entry.get("dispatch", {"Composite": ""}))
        has = "MPS" in kernels or "Composite" in kernels or "structured_delegate" in entry
        name = entry["func"].partition("(")[0].partition(".")[0]
        names[name] = names.get(name, False) or has
    return {name for name, has in names.items() if not has} - {"_linalg_svd"}  # which falls back to the CPU


def _checking_generators(draw: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function of torch that draws numbers, which raises for a generator of another device."""

    def drawn(*sizes: Any, generator: NearGenerator | None = None, device: Any = "cpu", **options: Any):
        if generator is not None and generator.device.type != torch.device(device).type:
            raise RuntimeError(f"Expected a {device} device type for generator but found {generator.device}")
        return draw(*sizes, generator=generator, device=device, **options)

    return drawn


def _made_near(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`torch.tensor`, which looks for the device itself, past every mode."""

    def tensor(data: Any, dtype: torch.dtype | None = None, device: Any = None, **options: Any) -> torch.Tensor:
        made = make(data, dtype=dtype, **options)
        return made if device is None else made.to(device)

    return tensor


@contextmanager
def pretended_device(monkeypatch: pytest.MonkeyPatch, name: str = "cuda:0") -> Iterator[PretendDevice]:
    """A device for a block: one of CUDA's, or "mps:0", which has no float64."""
    with monkeypatch.context() as patch, PretendDevice(torch.device(name)) as device:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (2**33, 2**33))
        patch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
        patch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
        patch.setattr(torch.cuda, "get_rng_state", lambda device: torch.zeros(1, dtype=torch.uint8))
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: None)
        for make in ("tensor", "as_tensor"):
            patch.setattr(torch, make, _made_near(getattr(torch, make)))
        patch.setattr(torch, "Generator", FarGenerator)
        for draw in ("rand", "randn", "randint", "randperm"):
            patch.setattr(torch, draw, _checking_generators(getattr(torch, draw)))
        yield device
