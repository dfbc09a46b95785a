# SPDX-License-Identifier: Apache-2.0
"""Images/s of one training step by options, without data: `python benchmarks/train_step.py --compile --rounds 2`.

Times forward, backward and optimiser apart, over `--steps` steps after two for warming up, and prints the medians;
with `--scenes` also the time to render the batch. `--profile` prints the costliest operators of one step. `--limits`
holds the step against the device: its operations at the rate that products of matrices reach (model FLOPs utilisation,
with nothing recomputed), the sum of its matrix products and of its attention, each timed by itself, and the time that
five epochs of SA-1B would take on 8 and 64 such devices if they shared the work without loss. The recipe of the paper:
    python benchmarks/train_step.py --image-size 1024 --batch-size 16 --objects 64 --rounds 3 --device cuda --limits
"""

import argparse
import copy
import statistics
import time

import torch
from counted_work import Apart, Work, counting, measure_rates, synchronize

from efficientsam_hf import EfficientSamConfig, EfficientSamModel
from efficientsam_hf.machine import is_emulated
from efficientsam_hf.training.attention import use_matrix_products
from efficientsam_hf.training.finetune_arguments import FinetuneArguments
from efficientsam_hf.training.optimizers import make_optimizers
from efficientsam_hf.training.segmentation import InteractiveSegmentation, PromptSampling


SA1B_PICTURES = 11_185_362


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="ti")
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--objects", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--corrected", type=int)
    parser.add_argument("--mask-prompts", type=float, default=0.5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--float32", action="store_true")
    parser.add_argument("--optimizer", default="adamw", choices=["adamw", "muon"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--scenes", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--limits", action="store_true")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be at least 1, got {args.steps}")
    if not args.float32 and is_emulated(torch.bfloat16, args.device):
        parser.error(f"{args.device} emulates bfloat16, which takes many times as long: give --float32")
    return args


def disc_batch(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Noise images with one random disc per object."""
    generator = torch.Generator().manual_seed(0)
    size, shape = args.image_size, (args.batch_size, args.objects)
    axis = torch.arange(size)
    centers = torch.rand(*shape, 2, 1, 1, generator=generator) * size
    radii = torch.rand(*shape, 1, 1, generator=generator) * size / 4 + 4
    masks = (axis - centers[:, :, 0]) ** 2 + (axis[:, None] - centers[:, :, 1]) ** 2 < radii**2
    batch = {
        "pixel_values": torch.randn(args.batch_size, 3, size, size, generator=generator),
        "masks": masks,
        "object_mask": torch.ones(shape, dtype=torch.bool),
    }
    return {name: value.to(args.device) for name, value in batch.items()} | {"seed": torch.tensor(0)}


class Step:
    """One optimiser step, timed in its parts."""

    def __init__(self, args: argparse.Namespace):
        torch.manual_seed(0)
        vision = {"image_size": args.image_size}
        model = EfficientSamModel(EfficientSamConfig.from_preset(args.preset, vision_config=vision)).to(args.device)
        if args.device == "cpu":
            use_matrix_products(model)
        sampling = PromptSampling(rounds=args.rounds, corrected_objects=args.corrected, mask_prompts=args.mask_prompts)
        self.module = InteractiveSegmentation(model, sampling=sampling)
        if args.compile:
            self.module.compile_parts()
        arguments = FinetuneArguments(
            output_dir="unused",
            max_steps=1,
            train_scenes=True,
            optimizer=args.optimizer,
            mixed_precision="no" if args.float32 else "bf16",
        )
        self.optimizers = make_optimizers(self.module, arguments, fused=True)
        self.batch = disc_batch(args)
        self.precision = torch.autocast(args.device, torch.bfloat16, enabled=not args.float32)

    def __call__(self) -> tuple[float, float, float]:
        times = [self._now()]
        with self.precision:
            loss = self.module(self.batch)["loss"]
        times.append(self._now())
        loss.backward()
        times.append(self._now())
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        times.append(self._now())
        return times[1] - times[0], times[2] - times[1], times[3] - times[2]

    def _now(self) -> float:
        synchronize(self.batch["masks"].device)
        return time.perf_counter()


def time_scenes(args: argparse.Namespace) -> float:
    """Seconds to render one batch of scenes with their masks."""
    from efficientsam_hf.data.scene_bank import SceneBank
    from efficientsam_hf.training.scene_batches import SceneBatches
    from efficientsam_hf.training.schedule import Stage

    stage = Stage(0.0, args.image_size, args.batch_size)
    batches = SceneBatches(SceneBank.build(device=args.device), (stage,), objects=args.objects)
    iterator = batches(0, stage)
    next(iterator)
    times = []
    for _ in range(args.steps):
        start = time.perf_counter()
        next(iterator)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def limits_of(args: argparse.Namespace) -> tuple[Work, dict[str, float]]:
    """What is counted in a step, and the seconds of its products and of its attention by themselves.

    Of a step without compilation: what is compiled can not be looked into.
    """
    plain = copy.copy(args)
    plain.compile = False
    step, work = Step(plain), Work()
    step()
    with counting(work):
        step()
    with Apart(args.device) as apart:
        step()
    return work, apart.seconds


def print_limits(args: argparse.Namespace, seconds: float, work: Work, apart: dict[str, float]) -> None:
    dtype = "float32" if args.float32 else "bfloat16"
    rates = measure_rates([dtype], args.device)
    least, _ = rates.limits(work, dtype)
    print(f"{work.operations / 1e12:.3f} TFLOP a step, {work.bytes / 1e9:.1f} GB read and written")
    print(f"products of matrices reach {rates.operations[dtype] / 1e12:.2f} TFLOP/s, at which the step would take "
          f"{least:.3f} s: utilisation {least / seconds:.3f}")  # fmt: skip
    both = sum(apart.values())
    print(f"by themselves: products {apart['products']:.3f} s, attention {apart['attention']:.3f} s; "
          f"the step takes {seconds / both:.2f} times their sum")  # fmt: skip
    days = {number: 5 * SA1B_PICTURES * seconds / args.batch_size / number / 86400 for number in (8, 64)}
    print(f"five epochs of SA-1B: {days[8]:.2f} days on 8 of these, {days[64]:.2f} on 64")
    if torch.device(args.device).type == "cuda":
        print(f"peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    limits = limits_of(args) if args.limits else None
    if torch.device(args.device).type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = Step(args)
    start = time.perf_counter()
    step()
    print(f"first step (with compilation, if any) {time.perf_counter() - start:.1f} s", flush=True)
    step()
    parts = [statistics.median(times) for times in zip(*(step() for _ in range(args.steps)))]
    speed = args.batch_size / sum(parts)
    print(f"{speed:.2f} images/s; forward {parts[0]:.3f} s, backward {parts[1]:.3f} s, optimiser {parts[2]:.3f} s")
    if limits:
        print_limits(args, sum(parts), *limits)
    if args.scenes:
        print(f"rendering {time_scenes(args):.3f} s a batch")
    if args.profile:
        with torch.profiler.profile(record_shapes=True) as profile:
            step()
        table = profile.key_averages(group_by_input_shape=True)
        print(table.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))


if __name__ == "__main__":
    main()
