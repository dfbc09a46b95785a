# SPDX-License-Identifier: Apache-2.0
"""Does pretraining by SAMI help a small encoder more than MAE, and more than none? The paper's claim, in small.

For each seed: an encoder is pretrained by SAMI (the shipped model's encoder as the teacher) and by MAE for the same
minutes on generated scenes, and not at all; then each is finetuned alike. `scratch_long` finetunes for the minutes of
both, so that it has the compute of the pretrained ones. Steps that are done are not done again, a step that was killed
goes on, and none begins that would end after --part-minutes: give the command again until it prints its table.

Usage: python examples/sami_claim.py OUT [--seeds N ...] [--pretrain-minutes M] [--finetune-minutes M]
       [--annotations A.json --images DIR] [--part-minutes M] [--size PIXELS]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml


ARMS = ("sami", "mae", "scratch", "scratch_long")
ENCODER = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 12}
PRETRAIN = {
    "train_scenes": True, "batch_size": 32, "learning_rate": 1e-3, "warmup_steps": 50, "weight_decay": 0.05,
    "adam_beta2": 0.95, "ema_decay": 0.0, "decoder_depth": 2, "decoder_width": 192, "decoder_heads": 6,
    "picture_every": 500, "checkpoint_minutes": 3,
}  # fmt: skip
TARGETS = {
    "sami": {"teacher": "default"},
    "mae": {"target": "pixels", "loss_tokens": "masked", "decoder": "full"},
}
FINETUNE = {
    "train_scenes": True, "batch_size": 16, "objects_per_image": 6, "learning_rate": 5e-4, "warmup_steps": 50,
    "weight_decay": 0.05, "ema_decay": 0.99, "uniform_prompts": 0.3, "center_prompts": 0.3, "box_prompts": 0.4,
    "box_and_point_prompts": 0.0, "exact_boxes": 0.5, "min_object_area": 0.004, "max_object_area": 0.6,
    "prompt_rounds": 1, "checkpoint_minutes": 3,
}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--pretrain-minutes", type=float, default=10.0)
    parser.add_argument("--finetune-minutes", type=float, default=6.0)
    parser.add_argument("--part-minutes", type=float, default=38.0)
    parser.add_argument("--size", type=int, default=128, help="side of the scenes in pixels")
    parser.add_argument("--scenes", type=int, default=48, help="held-out scenes to evaluate on")
    parser.add_argument("--annotations", type=Path, help="COCO file of photos to evaluate on as well")
    parser.add_argument("--images", type=Path)
    return parser.parse_args()


def efficientsam(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "efficientsam_hf.cli", *map(str, arguments)], check=True)


def train(command: str, run: Path, settings: dict) -> None:
    """Begin a run, or go on with it."""
    run.parent.mkdir(parents=True, exist_ok=True)
    recipe = run.with_suffix(".yaml")
    recipe.write_text(yaml.safe_dump(settings))
    resume = ["--resume"] if (run / "args.json").is_file() else []
    efficientsam(command, "--recipe", recipe, "--output-dir", run, *resume)


def steps(args: argparse.Namespace):
    """(name, file that exists when it is done, minutes it takes at most, what to call) of all there is to do."""
    common = {"image_sizes": str(args.size), "mixed_precision": "bf16"}
    for seed in args.seeds:
        folder = args.output / f"seed_{seed}"
        for arm, target in TARGETS.items():
            run = folder / f"pretrain_{arm}"
            settings = {**PRETRAIN, **common, **target, "seed": seed, "max_minutes": args.pretrain_minutes}
            settings["model_overrides"] = yaml.safe_dump({"vision_config": ENCODER})
            if arm == "sami":
                settings["teacher_resolution"] = args.size
            yield f"seed {seed}: pretrain {arm}", run / "run.json", args.pretrain_minutes, ("pretrain", run, settings)
        for arm in ARMS:
            run, minutes = folder / arm, args.finetune_minutes
            if arm == "scratch_long":
                minutes += args.pretrain_minutes
            settings = {**FINETUNE, **common, "seed": seed, "max_minutes": minutes}
            settings["model"] = str(folder / f"pretrain_{arm}" / "model") if arm in TARGETS else "ti"
            settings["model_overrides"] = yaml.safe_dump({} if arm in TARGETS else {"vision_config": ENCODER})
            yield f"seed {seed}: finetune {arm}", run / "run.json", minutes, ("finetune", run, settings)


def evaluate(args: argparse.Namespace) -> dict[str, dict]:
    """Numbers of all arms of all seeds, by the name of what they are measured on."""
    sources = {"scenes": ["--scenes", args.scenes]}
    if args.annotations:
        sources["photos"] = ["--annotations", args.annotations, "--images", args.images]
    models = [args.output / f"seed_{seed}" / arm / "model" for seed in args.seeds for arm in ARMS]
    results = {}
    for name, flags in sources.items():
        path = args.output / f"{name}.json"
        if not path.is_file():
            efficientsam("evaluate", *models, *flags, "--prompts", "center", "box", "--output", path)
        results[name] = json.loads(path.read_text())
    return results


def print_table(args: argparse.Namespace, results: dict[str, dict]) -> None:
    """Mean over the seeds of each arm's mIoU, and the lowest and highest of them."""
    columns = [(name, prompt) for name in results for prompt in ("center", "box")]
    print("| arm | " + " | ".join(f"{name}, {prompt}" for name, prompt in columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for number, arm in enumerate(ARMS):
        cells = []
        for name, prompt in columns:
            records = results[name]["models"][number :: len(ARMS)]
            values = [record["metrics"][prompt]["miou"] for record in records]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})")
        print(f"| {arm} | " + " | ".join(cells) + " |")


def main() -> int:
    args = parse_arguments()
    end = time.monotonic() + args.part_minutes * 60
    for name, done, minutes, call in steps(args):
        if done.is_file():
            continue
        if time.monotonic() + minutes * 60 > end:
            print(f"this part's time is used up before {name}: give the command again")
            return 0
        print(name, flush=True)
        train(*call)
    print_table(args, evaluate(args))
    return 0


if __name__ == "__main__":
    sys.exit(main())
