# SPDX-License-Identifier: Apache-2.0
"""All that a run goes on from, as files that hold numbers and no code: tensors in safetensors, the rest in JSON.

Weights, optimisers and averages are the same in every process and written once; each process has random states of its
own. Under FSDP they are written whole, in the form that a process alone has.
"""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, clean_state_dict_for_safetensors
from accelerate.utils import load as load_pickle
from safetensors import safe_open
from safetensors.torch import load_file, load_model, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from .ema import WeightAverage


WEIGHTS, AVERAGE, SCALER = "model.safetensors", "average.safetensors", "scaler.safetensors"
OUTLINE = "outline"  # in a file's metadata: where its tensors belong
DEVICES = ("cuda", "xpu")  # with random numbers of their own
OLD_AVERAGE = "custom_checkpoint_0.pkl"  # checkpoints of earlier versions had it, and pickles for all but the weights
Optimizers = list[torch.optim.Optimizer]


class RunState:
    """Weights of a prepared module, optimisers, average of the weights, the scaler of fp16 and random states."""

    def __init__(self, accelerator: Accelerator, module: nn.Module, optimizers: Optimizers, average: WeightAverage):
        self.accelerator = accelerator
        self.module = module
        self.optimizers = optimizers
        self.average = average
        self.sharded = accelerator.distributed_type == DistributedType.FSDP

    @property
    def plain_module(self) -> nn.Module:
        """The module without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.module)

    def gather(self) -> dict[str, Any]:
        """What is the same in every process, by names of files; every process must ask.

        The tensors are those that are trained, not copies, but for sharded ones.
        """
        if self.sharded:
            whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
            weights = get_model_state_dict(self.module, options=whole)
            states = [get_optimizer_state_dict(self.module, each, options=whole) for each in self.optimizers]
        else:
            weights, states = self.plain_module.state_dict(), [each.state_dict() for each in self.optimizers]
        common = {WEIGHTS: weights, AVERAGE: self.average.state_dict()}
        common |= {_optimizer_file(number): state for number, state in enumerate(states)}
        scaler = self.accelerator.scaler
        return common if scaler is None else {**common, SCALER: scaler.state_dict()}

    def write(self, folder: Path, common: dict[str, Any]) -> None:
        """Write random states of this process and, in the main one, what all have in common."""
        folder.mkdir(exist_ok=True)
        save_tree(folder / _random_file(self.accelerator.process_index), _random_states(self.accelerator.device))
        if not self.accelerator.is_main_process:
            return
        for name, content in common.items():
            if name == WEIGHTS:
                save_file(clean_state_dict_for_safetensors(content), folder / name, {"format": "pt"})
            else:
                save_tree(folder / name, content)

    def load(self, folder: Path, old: bool) -> None:
        """Go on from what a checkpoint holds; `old` for one of an earlier version."""
        if old:
            self._load_old(folder)
            return
        self._set(folder, load_tree(folder / AVERAGE), [load_tree(folder / name) for name in self._optimizer_files()])
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(load_tree(folder / SCALER))
        states = load_tree(folder / _random_file(self.accelerator.process_index))
        _set_random_states(states["python"], states["numpy"], states["torch"])
        device = self.accelerator.device  # a run that moves to another kind of device begins anew there
        if device.type in DEVICES and "device" in states:
            torch.get_device_module(device).set_rng_state(states["device"], device)

    def _optimizer_files(self, ending: str = "safetensors") -> list[str]:
        return [_optimizer_file(number, ending) for number in range(len(self.optimizers))]

    def _set(self, folder: Path, average: dict[str, Any], states: list[dict[str, Any]], wrapped: bool = False) -> None:
        self.average.load_state_dict(average)
        if not self.sharded:
            load_model(self.module if wrapped else self.plain_module, folder / WEIGHTS)
            for optimizer, state in zip(self.optimizers, states):
                optimizer.load_state_dict(state)
            return
        whole = StateDictOptions(full_state_dict=True)
        set_model_state_dict(self.module, load_file(folder / WEIGHTS), options=whole)
        for optimizer, state in zip(self.optimizers, states):
            set_optimizer_state_dict(self.module, optimizer, state, options=whole)

    def _load_old(self, folder: Path) -> None:
        """As Accelerate wrote it: pickles, opened so that they cannot run code, of the module with its wrappers."""
        if self.sharded:
            raise ValueError("an earlier version wrote it under FSDP, in files that can run code")
        states = [open_old(folder / name) for name in self._optimizer_files("bin")]
        self._set(folder, open_old(folder / OLD_AVERAGE), states, wrapped=True)
        if self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(open_old(folder / "scaler.pt"))
        states = open_old(folder / _random_file(self.accelerator.process_index, "pkl"))
        _set_random_states(states["random_state"], states["numpy_random_seed"], states["torch_manual_seed"])
        if self.accelerator.device.type == "cuda" and "torch_cuda_manual_seed" in states:
            torch.cuda.set_rng_state_all(states["torch_cuda_manual_seed"])


def _optimizer_file(number: int, ending: str = "safetensors") -> str:
    return f"optimizer_{number}.{ending}" if number else f"optimizer.{ending}"


def _random_file(process: int, ending: str = "safetensors") -> str:
    return f"random_states_{process}.{ending}"


def _random_states(device: torch.device) -> dict[str, Any]:
    """Where this process is in the random numbers of Python, numpy, torch and its device."""
    name, keys, *rest = np.random.get_state()
    states = {"python": random.getstate(), "numpy": [name, keys.tolist(), *rest], "torch": torch.get_rng_state()}
    if device.type in DEVICES:
        states["device"] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_random_states(python: Any, numpy: Any, of_torch: torch.Tensor) -> None:
    version, numbers, following = python
    random.setstate((version, tuple(numbers), following))
    name, keys, *rest = numpy
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))
    torch.set_rng_state(of_torch)


def open_old(path: Path) -> Any:
    """Content of a pickle of numbers, tensors and text; ValueError for any other one, of which nothing runs."""
    try:
        return load_pickle(path, "cpu", weights_only=True)
    except Exception as error:  # what a pickle can do to its reader has no bounds, and no list
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path.name} is damaged, or holds more than numbers: {str(error)[:100]}") from None


def save_tree(path: Path, tree: Any) -> None:
    """Write dicts and lists of tensors, numbers and text: the tensors of a safetensors file, the rest its metadata."""
    tensors: dict[str, torch.Tensor] = {}
    outline = _outline(tree, "", tensors)
    save_file(tensors, path, {OUTLINE: json.dumps(outline)})


def load_tree(path: Path) -> Any:
    """What `save_tree` wrote, tuples as lists; tensors on the CPU."""
    with safe_open(path, "pt") as file:
        return _filled(json.loads(file.metadata()[OUTLINE]), file)


def _outline(value: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """The tree with names in the places of tensors; dicts are lists of pairs, since their keys may be numbers."""
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().contiguous()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _outline(entry, f"{name}/{key}", tensors)] for key, entry in value.items()]}
    if isinstance(value, (list, tuple)):
        return [_outline(entry, f"{name}/{number}", tensors) for number, entry in enumerate(value)]
    return value


def _filled(outline: Any, file: Any) -> Any:
    if isinstance(outline, list):
        return [_filled(entry, file) for entry in outline]
    if not isinstance(outline, dict):
        return outline
    if "tensor" in outline:
        return file.get_tensor(outline["tensor"])
    return {key: _filled(entry, file) for key, entry in outline["dict"]}
