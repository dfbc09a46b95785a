# SPDX-License-Identifier: Apache-2.0
"""Operations and bytes of a piece of work, and the rates of a machine that they are held against."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry


# torch knows the operations of fused attention on GPUs alone.
OPERATIONS = flop_registry | {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        torch.ops.aten._scaled_dot_product_flash_attention
    ]
}
NOTHING_MOVED = {torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like}
RESIZING = {torch.ops.aten.upsample_bicubic2d, torch.ops.aten.upsample_bilinear2d}
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
ONLY_WRITTEN = {torch.ops.aten.copy_, torch.ops.aten.fill_, torch.ops.aten.zero_}


@dataclass
class Work:
    """What was counted: floating-point operations (two per multiply-add) and bytes that operations read and wrote."""

    operations: int = 0
    bytes: int = 0


@dataclass
class Rates:
    """What a machine does at best: operations a second of matrix products by dtype, bytes a second of copies."""

    operations: dict[str, float] = field(default_factory=dict)
    bytes: float = 0.0

    def limits(self, work: Work, dtype: str) -> tuple[float, float]:
        """Seconds that the operations of `work` take at least, and its bytes if all of them come from memory."""
        return work.operations / self.operations[dtype], work.bytes / self.bytes


class counting(TorchDispatchMode):
    """Adds to `work` what is computed in the block.

    Bytes are those of the tensors that operations take and give, each operation for itself, views left out: a tensor
    that stays in the cache counts as often as it is used, so that work may go faster than its bytes could be copied.
    """

    def __init__(self, work: Work):
        super().__init__()
        self.work = work

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.overloadpacket not in RESIZING:  # which in parts would be a hundred slow operations
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if not func.is_view and func.overloadpacket not in NOTHING_MOVED:
            taken = args[1:] if func.overloadpacket in ONLY_WRITTEN else args
            tensors = [leaf for leaf in tree_leaves((taken, kwargs, result)) if isinstance(leaf, torch.Tensor)]
            self.work.bytes += sum(_touched(tensor) for tensor in tensors)
        if func.overloadpacket in OPERATIONS:
            self.work.operations += OPERATIONS[func.overloadpacket](*args, **kwargs, out_val=result)
        return result


def _touched(tensor: torch.Tensor) -> int:
    """Bytes of a tensor without those that are there only by expansion (stride 0)."""
    number = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        number *= size if stride or not size else 1
    return number * tensor.element_size()


class Apart(TorchDispatchMode):
    """Times each matrix product (convolutions among them) and each fused attention of a block by itself.

    An operation is repeated where it is met first with its shapes; the block itself gets slow by it. `seconds` has the
    sums over all calls: {"products", "attention"}.
    """

    def __init__(self, device: str):
        super().__init__()
        self.device = device
        self.seconds = {"products": 0.0, "attention": 0.0}
        self._known: dict[tuple, float] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        kind = "attention" if "_attention" in name else "products" if name in PRODUCTS else None
        if kind:
            key = (name, *(_form(leaf) for leaf in tree_leaves((args, kwargs))))
            if key not in self._known:
                self._known[key] = least_seconds(lambda: func(*args, **kwargs), self.device)
            self.seconds[kind] += self._known[key]
        return func(*args, **kwargs)


def _form(leaf: object) -> object:
    """What the time of an operation depends on."""
    return (tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else repr(leaf)


def synchronize(device: str | torch.device) -> None:
    """Wait until the device has done what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def measure_rates(dtypes: list[str], device: str) -> Rates:
    """Best of five products of 2048 x 2048 matrices in each dtype, and of five copies of 256 MB."""
    rates = Rates()
    for name in dtypes:
        a, b = (torch.randn(2048, 2048, device=device).to(getattr(torch, name)) for _ in range(2))
        rates.operations[name] = 2 * 2048**3 / least_seconds(lambda a=a, b=b: a @ b, device)
    source = torch.zeros(64 * 2**20, device=device)
    target = torch.empty_like(source)
    rates.bytes = 2 * source.nbytes / least_seconds(lambda: target.copy_(source), device)
    return rates


def least_seconds(call: Callable[[], object], device: str, repeats: int = 5) -> float:
    """The least time of some calls after one that does not count."""
    values = []
    for _ in range(repeats + 1):
        synchronize(device)
        start = time.perf_counter()
        call()
        synchronize(device)
        values.append(time.perf_counter() - start)
    return min(values[1:])
