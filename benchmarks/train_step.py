# SPDX-License-Identifier: Apache-2.0
"""Images/s of one training step by options, without data: `python benchmarks/train_step.py --compile --rounds 2`.

Times forward, backward and optimiser apart, over `--steps` steps after two for warming up, and prints the medians;
with `--scenes` also the time to render the batch. `--profile` prints the costliest operators of one step.
"""

import argparse
import statistics
import time

import torch

from efficientsam_hf import EfficientSamConfig, EfficientSamModel
from efficientsam_hf.training.attention import use_matrix_products
from efficientsam_hf.training.finetune_arguments import FinetuneArguments
from efficientsam_hf.training.optimizers import make_optimizers
from efficientsam_hf.training.segmentation import InteractiveSegmentation, PromptSampling


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
    return parser.parse_args()


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
        arguments = FinetuneArguments(output_dir="unused", max_steps=1, train_scenes=True, optimizer=args.optimizer)
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
        if self.batch["masks"].is_cuda:
            torch.cuda.synchronize()
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


def main() -> None:
    args = parse_arguments()
    if args.threads:
        torch.set_num_threads(args.threads)
    step = Step(args)
    start = time.perf_counter()
    step()
    print(f"first step (with compilation, if any) {time.perf_counter() - start:.1f} s", flush=True)
    step()
    parts = [statistics.median(times) for times in zip(*(step() for _ in range(args.steps)))]
    speed = args.batch_size / sum(parts)
    print(f"{speed:.2f} images/s; forward {parts[0]:.3f} s, backward {parts[1]:.3f} s, optimiser {parts[2]:.3f} s")
    if args.scenes:
        print(f"rendering {time_scenes(args):.3f} s a batch")
    if args.profile:
        with torch.profiler.profile(record_shapes=True) as profile:
            step()
        table = profile.key_averages(group_by_input_shape=True)
        print(table.table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=40))


if __name__ == "__main__":
    main()
