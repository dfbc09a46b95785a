# SPDX-License-Identifier: Apache-2.0
"""Speed of the image encoder by attention and dtype, against attention written out in float32, the released way.

Usage: python benchmarks/encoder.py [--preset ti] [--image-size 1024] [--repeats 7] [--compile] [--json FILE]

Weights are random. The variants take turns, so that whatever else the machine does meets all of them alike; times are
medians, and speed-ups are medians of the ratios within a turn. Operations are counted by torch as two per multiply-add
(paper: 102 G multiply-adds for Ti and 246 G for S at 1024 pixels).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import torch
import transformers
from counted_work import Work, counting, synchronize

from efficientsam_hf import EfficientSamConfig, EfficientSamVisionConfig, EfficientSamVisionModel
from efficientsam_hf.files import write_json
from efficientsam_hf.machine import describe_machine, is_emulated


BASELINE = "eager float32"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ti", choices=["ti", "s", "b"])
    parser.add_argument("--image-size", type=int, default=1024)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, help="threads of torch (default: torch's own choice)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="also fused attention under torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {args.repeats}")
    return args


def build_encoder(config: EfficientSamVisionConfig, attention: str, seed: int = 0) -> EfficientSamVisionModel:
    """An encoder with the same random weights whatever the attention."""
    torch.manual_seed(seed)
    model = EfficientSamVisionModel(config)
    model.set_attn_implementation(attention)
    return model.eval()


def build_variants(args: argparse.Namespace) -> dict[str, Callable[[], torch.Tensor]]:
    """Each variant as a call that encodes the same picture."""
    generator = torch.Generator().manual_seed(0)
    shape = (args.batch_size, 3, args.image_size, args.image_size)
    pixels = torch.randn(shape, generator=generator).to(args.device)
    kinds = {BASELINE: ("eager", torch.float32), "sdpa float32": ("sdpa", torch.float32)}
    if is_emulated(torch.bfloat16, args.device):
        print(f"bfloat16 is not run: {args.device} emulates it")
    else:
        kinds["sdpa bfloat16"] = ("sdpa", torch.bfloat16)
    if args.compile:
        kinds |= {f"{name} compiled": kind for name, kind in kinds.items() if name != BASELINE}
    variants = {}
    for name, (attention, dtype) in kinds.items():
        # A config of its own: models that share one share its attention.
        config = EfficientSamConfig.from_preset(args.preset).vision_config
        model = build_encoder(config, attention).to(args.device, dtype)
        call = torch.compile(model, fullgraph=True) if name.endswith("compiled") else model
        variants[name] = lambda call=call, dtype=dtype: call(pixels.to(dtype)).last_hidden_state
    return variants


def count_operations(args: argparse.Namespace) -> int:
    """Floating-point operations of one call, counted without computing anything."""
    with torch.device("meta"):
        model = EfficientSamVisionModel(EfficientSamConfig.from_preset(args.preset).vision_config).eval()
        model.set_attn_implementation("eager")
        pixels = torch.empty(args.batch_size, 3, args.image_size, args.image_size)
    work = Work()
    with counting(work), torch.no_grad():
        model(pixels)
    return work.operations


def seconds(call: Callable[[], torch.Tensor], device: str) -> float:
    """Wall time of one call, the device's work included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Median seconds, speed-up, achieved GFLOP/s and largest difference from the baseline, by variant."""
    variants = build_variants(args)
    reference, differences = None, {}
    for name, call in variants.items():  # also warms up, and compiles
        result = call().float()
        reference = result if reference is None else reference
        differences[name] = (result - reference).abs().max().item()
    times: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(args.repeats):
        for name, call in variants.items():
            times[name].append(seconds(call, args.device))
    operations = count_operations(args)
    return {
        name: {
            "seconds": statistics.median(values),
            "speed_up": statistics.median(base / value for base, value in zip(times[BASELINE], values)),
            "gflop_per_s": operations / statistics.median(values) / 1e9,
            "largest_difference": differences[name],
        }
        for name, values in times.items()
    }


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = measure(args)
    operations = count_operations(args)
    machine = describe_machine()
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(f"EfficientSAM-{args.preset.capitalize()} encoder, {args.batch_size} x {args.image_size} px: "
          f"{operations / 2e9:.1f} G multiply-adds; medians of {args.repeats}")  # fmt: skip
    print(f"{machine}, {versions}, {date}")
    print(f"{'':<24}{'seconds':>10}{'speed-up':>10}{'GFLOP/s':>10}{'difference':>12}")
    for name, row in results.items():
        print(f"{name:<24}{row['seconds']:>10.3f}{row['speed_up']:>9.2f}x{row['gflop_per_s']:>10.0f}"
              f"{row['largest_difference']:>12.1e}")  # fmt: skip
    if args.json:
        record = {"arguments": vars(args), "operations": operations, "results": results}
        record |= {"machine": machine, "versions": versions, "date": date}
        write_json(Path(args.json), record)


if __name__ == "__main__":
    main()
