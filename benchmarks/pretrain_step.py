# SPDX-License-Identifier: Apache-2.0
"""Cost of a pretraining step: cross-attention against full decoder and against no masking, cached against online.

Usage: python benchmarks/pretrain_step.py [--preset ti] [--batch-size 16] [--repeats 5] [--teacher sam-vit-huge]
       [--device cuda] [--compile]

Weights are random, which changes no time. Operations of the forward pass are counted by torch, two per multiply-add,
for one image. The variants take turns; times are medians of forward and backward, and ratios are medians of the ratios
to the first variant within a turn. "no masking" is the encoder on every patch with a linear head: what distilling
features without masked modelling costs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import SamVisionConfig, SamVisionModel

from efficientsam_hf import SamiConfig, SamiForPreTraining
from efficientsam_hf.data.teacher import Teacher
from efficientsam_hf.machine import is_emulated
from efficientsam_hf.training.attention import use_matrix_products
from efficientsam_hf.training.pretraining import MaskedPretraining


TEACHERS = {
    "sam-vit-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "sam-vit-huge": {
        "hidden_size": 1280, "num_hidden_layers": 32, "num_attention_heads": 16, "mlp_dim": 5120,
        "global_attn_indexes": [7, 15, 23, 31],
    },
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ti", choices=["ti", "s", "b"])
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--teacher", choices=sorted(TEACHERS), help="also a step with this teacher at 224 pixels")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--float32", action="store_true", help="no bfloat16, for the teacher neither")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    if not args.float32 and is_emulated(torch.bfloat16, args.device):
        parser.error(f"{args.device} emulates bfloat16, which takes many times as long: give --float32")
    return args


class Distillation(nn.Module):
    """Every patch is seen, and a linear layer predicts the teacher's features."""

    def __init__(self, sami: SamiForPreTraining):
        super().__init__()
        self.sami = sami
        self.head = nn.Linear(sami.config.vision_config.hidden_size, sami.config.target_width)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        predicted = self.head(self.sami.encode(batch["pixel_values"])[:, 1:])
        return {"loss": (predicted.float() - batch["target_features"]).square().mean()}


def random_teacher(name: str, device: str, dtype: torch.dtype) -> Teacher:
    """SAM's encoder at 224 pixels, where its grid is the student's."""
    config = SamVisionConfig(**TEACHERS[name], image_size=224)
    model = SamVisionModel(config).to(device, dtype).eval().requires_grad_(False)
    return Teacher(model, name, (0.5,) * 3, (0.25,) * 3, 224, 16, 256, "random weights")


def build_variants(args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """Name -> a forward pass that returns the loss."""
    torch.manual_seed(0)
    size = (args.batch_size, 196)
    batch = {
        "pixel_values": torch.randn(args.batch_size, 3, 224, 224, device=args.device),
        "target_features": torch.randn(*size, 256, device=args.device),
        "noise": torch.rand(*size, device=args.device),
    }
    without = {name: value for name, value in batch.items() if name != "target_features"}

    def student(**changes) -> SamiForPreTraining:
        model = SamiForPreTraining(SamiConfig.from_preset(args.preset, **changes)).to(args.device).train()
        if args.device == "cpu":
            use_matrix_products(model)
        return model

    modules = {
        "cross-attention": (MaskedPretraining(student()), batch),
        "full decoder": (MaskedPretraining(student(decoder="full")), batch),
        "no masking": (Distillation(student()).to(args.device), batch),
    }
    if args.teacher:
        dtype = torch.float32 if args.float32 else torch.bfloat16
        online = MaskedPretraining(student(), random_teacher(args.teacher, args.device, dtype))
        modules[f"online {args.teacher}"] = (online, without)
    if args.compile:
        for module, _ in modules.values():
            if isinstance(module, MaskedPretraining):
                module.compile_parts(dynamic=False)
    return {name: lambda m=module, b=given: m(b)["loss"] for name, (module, given) in modules.items()}


def seconds(forward: Callable[[], torch.Tensor], args: argparse.Namespace) -> float:
    """Forward and backward of one batch."""
    start = now(args)
    with torch.autocast(args.device, torch.bfloat16, enabled=not args.float32):
        loss = forward()
    loss.backward()
    return now(args) - start


def now(args: argparse.Namespace) -> float:
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    args = parse_arguments()
    variants = build_variants(args)
    flops = {}
    for name, forward in variants.items():
        with FlopCounterMode(display=False) as counter:
            forward()
        flops[name] = counter.get_total_flops() / args.batch_size
        seconds(forward, args)
    times = {name: [] for name in variants}
    for _ in range(args.repeats):
        for name, forward in variants.items():
            times[name].append(seconds(forward, args))
    first = next(iter(variants))
    for name in variants:
        ratio = statistics.median(own / base for own, base in zip(times[name], times[first], strict=True))
        middle = statistics.median(times[name])
        print(
            f"{name:22} {flops[name] / 1e9:8.2f} GFLOP forward an image, {args.batch_size / middle:8.1f} images/s, "
            f"{ratio:5.2f} x the time of {first}"
        )


if __name__ == "__main__":
    main()
