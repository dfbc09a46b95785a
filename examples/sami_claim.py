# SPDX-License-Identifier: Apache-2.0
"""Does pretraining by SAMI help a small encoder more than MAE, and more than none? The paper's claim, in small.

For each seed: an encoder is pretrained by SAMI (the shipped model's encoder as the teacher) and by MAE with equal
compute on generated scenes, and not at all; then each is finetuned alike. `scratch_long` finetunes for the compute of
both, so that it has as much as the pretrained ones. Compute is counted in steps: what a step of each kind costs is
measured first, in turns, and the minutes asked for are divided by it, so that a busy machine changes no arm.

--ablations then changes one thing of SAMI at a time, with the first seed and as much compute again for each.

Steps that are done are not done again, a step that was killed goes on, and none begins that would end after
--part-minutes: give the command again until it prints its table. The curves of the losses are drawn by matplotlib.

Usage: python examples/sami_claim.py OUT [--seeds N ...] [--pretrain-minutes M] [--finetune-minutes M]
       [--annotations A.json --images DIR] [--ablations] [--part-minutes M] [--size PIXELS]
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml


ARMS = ("mae", "sami", "scratch", "scratch_long")  # the first is the one that the others are compared with
ENCODER = {"hidden_size": 192, "num_attention_heads": 3, "num_hidden_layers": 12}
# With so few steps Muon goes further: 2.5 minutes of finetuning from scratch gave 0.36 mIoU with boxes on held-out
# scenes, AdamW at 5e-4 0.21; one minute of SAMI a loss of 0.743 and 0.785 (2-core Intel Xeon, 2026-11-25).
OPTIMIZER = {"optimizer": "muon", "learning_rate": 1e-3, "muon_learning_rate": 6e-3}
PRETRAIN = OPTIMIZER | {
    "train_scenes": True, "batch_size": 32, "warmup_steps": 50, "weight_decay": 0.05,
    "adam_beta2": 0.95, "ema_decay": 0.0, "decoder_depth": 2, "decoder_width": 192, "decoder_heads": 6,
    "checkpoint_minutes": 3,
}  # fmt: skip
TARGETS = {
    "mae": {"target": "pixels", "loss_tokens": "masked", "decoder": "full"},
    "sami": {"teacher": "default"},
}
ABLATIONS = {
    "cosine_loss": {"teacher": "default", "loss": "cosine"},
    "full_decoder": {"teacher": "default", "decoder": "full"},
    "half_masked": {"teacher": "default", "mask_ratio": 0.5},
    "pixel_target": {"target": "pixels"},
}
FINETUNE = OPTIMIZER | {
    "train_scenes": True, "batch_size": 16, "objects_per_image": 6, "warmup_steps": 50, "weight_decay": 0.05,
    "ema_decay": 0.99, "uniform_prompts": 0.3, "center_prompts": 0.3, "box_prompts": 0.4,
    "box_and_point_prompts": 0.0, "exact_boxes": 0.5, "min_object_area": 0.004, "max_object_area": 0.6,
    "prompt_rounds": 1, "checkpoint_minutes": 3,
}  # fmt: skip
PROMPTS = ("center", "box")
Results = dict[str, list[dict]]
CALIBRATION_STEPS = 12


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--pretrain-minutes", type=float, default=8.0, help="of a machine with nothing else to do")
    parser.add_argument("--finetune-minutes", type=float, default=5.0)
    parser.add_argument("--ablations", action="store_true")
    parser.add_argument("--part-minutes", type=float, default=38.0)
    parser.add_argument("--size", type=int, default=128, help="side of the scenes in pixels")
    parser.add_argument("--scenes", type=int, default=96, help="held-out scenes to evaluate on")
    parser.add_argument("--annotations", type=Path, help="COCO file of photos to evaluate on as well")
    parser.add_argument("--images", type=Path)
    return parser.parse_args()


def check_arguments(args: argparse.Namespace) -> None:
    """Remember what the numbers in the folder belong to; ValueError for other arguments, or a run without room."""
    longest = args.pretrain_minutes + args.finetune_minutes
    if longest > args.part_minutes:
        raise ValueError(f"--part-minutes must be at least {longest:g}, the longest run, got {args.part_minutes:g}")
    free = ("output", "seeds", "ablations", "part_minutes")
    fixed = {name: str(value) for name, value in vars(args).items() if name not in free}
    path = args.output / "arguments.json"
    if path.is_file() and json.loads(path.read_text()) != fixed:
        raise ValueError(f"{args.output} holds runs with other arguments: {path.read_text()}")
    args.output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(fixed, indent=2))


def efficientsam(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "efficientsam_hf.cli", *map(str, arguments)], check=True)


@dataclass
class Run:
    """A training run of one arm: what `efficientsam COMMAND` is given, and the minutes it is meant to take."""

    command: str
    folder: Path
    settings: dict
    minutes: float = 0.0

    @property
    def done(self) -> bool:
        """Whether it has come to its end, and was not stopped before."""
        path = self.folder / "run.json"
        return path.is_file() and json.loads(path.read_text()).get("interrupted") is None

    def train(self, steps: int) -> None:
        """Begin, or go on with what was killed."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        recipe = self.folder.with_suffix(".yaml")
        recipe.write_text(yaml.safe_dump({**self.settings, "max_steps": steps}))
        resume = ["--resume"] if (self.folder / "args.json").is_file() else []
        efficientsam(self.command, "--recipe", recipe, "--output-dir", self.folder, *resume)

    def log(self, event: str) -> list[dict]:
        lines = map(json.loads, (self.folder / "log.jsonl").read_text().splitlines())
        return [line for line in lines if line["event"] == event]


def pretraining(args: argparse.Namespace, folder: Path, arm: str, seed: int) -> Run:
    """Run that gives an arm its encoder."""
    own = (TARGETS | ABLATIONS)[arm]
    settings = {**PRETRAIN, **own, "image_sizes": str(args.size), "mixed_precision": "auto", "seed": seed}
    settings["model_overrides"] = yaml.safe_dump({"vision_config": ENCODER})
    if "teacher" in own:
        settings["teacher_resolution"] = args.size
    return Run("pretrain", folder / f"pretrain_{arm}", settings, args.pretrain_minutes)


def finetuning(args: argparse.Namespace, folder: Path, arm: str, seed: int) -> Run:
    """Run that makes a segmentation model of an arm's encoder, or of a new one."""
    settings = {**FINETUNE, "image_sizes": str(args.size), "mixed_precision": "auto", "seed": seed}
    pretrained = arm in TARGETS | ABLATIONS
    settings["model"] = str(folder / f"pretrain_{arm}" / "model") if pretrained else "ti"
    settings["model_overrides"] = yaml.safe_dump({} if pretrained else {"vision_config": ENCODER})
    minutes = args.finetune_minutes + (args.pretrain_minutes if arm == "scratch_long" else 0.0)
    return Run("finetune", folder / arm, settings, minutes)


def runs(args: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    """(kind of step, run) of all there is to train, in the order it is trained in."""
    yield from claim_runs(args)
    if args.ablations:
        seed = args.seeds[0]
        folder = args.output / f"seed_{seed}"
        for arm in ABLATIONS:
            yield arm, pretraining(args, folder, arm, seed)
            yield "finetune", finetuning(args, folder, arm, seed)


def claim_runs(args: argparse.Namespace) -> Iterator[tuple[str, Run]]:
    """Those of the claim itself."""
    for seed in args.seeds:
        folder = args.output / f"seed_{seed}"
        yield from ((arm, pretraining(args, folder, arm, seed)) for arm in TARGETS)
        yield from (("finetune", finetuning(args, folder, arm, seed)) for arm in ARMS)


def step_seconds(args: argparse.Namespace) -> dict[str, float]:
    """Seconds of a step of each kind that there is to train, measured once."""
    path = args.output / "step_seconds.json"
    seconds = json.loads(path.read_text()) if path.is_file() else {}
    missing = sorted({kind for kind, _ in runs(args)} - seconds.keys())
    if missing:
        known = ["sami"] if seconds else []  # what comes later is measured beside it, for the machine's speed changes
        measured = measure_steps(args, [*known, *missing], f"calibration_{len(seconds)}")
        speed = seconds["sami"] / measured["sami"] if seconds else 1.0
        seconds |= {kind: speed * measured[kind] for kind in missing}
        path.with_suffix(".partial").write_text(json.dumps(seconds, indent=2))
        path.with_suffix(".partial").replace(path)
    return seconds


def measure_steps(args: argparse.Namespace, kinds: list[str], name: str) -> dict[str, float]:
    """Seconds of a step of each kind, the lower quartile of three turns; their runs lie in folders of this name.

    Whatever else the machine did meanwhile made steps longer and none shorter.
    """
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(3):
        folder = args.output / f"{name}_{turn}"
        for kind in kinds:
            finetunes = kind == "finetune"
            run = finetuning(args, folder, "scratch", 0) if finetunes else pretraining(args, folder, kind, 0)
            run.settings |= {"log_every": 1}
            if not run.done:
                run.train(CALIBRATION_STEPS)
            times = [line["elapsed"] for line in run.log("train")]
            found[kind] += [after - before for before, after in zip(times[2:], times[3:])]  # the first ones warm up
    return {kind: statistics.quantiles(values, n=4)[0] for kind, values in found.items()}


def evaluate(args: argparse.Namespace, seeds: list[int], arms: Sequence[str], prefix: str = "") -> Results:
    """What `efficientsam evaluate` says of these arms, a record for each seed, by what it is measured on."""
    sources = {"scenes": ["--scenes", args.scenes]}
    if args.annotations:
        sources["photos"] = ["--annotations", args.annotations, "--images", args.images]
    results: Results = {}
    for name, flags in sources.items():
        for seed in seeds:
            folder = args.output / f"seed_{seed}"
            path = folder / f"{prefix}{name}.json"
            if not path.is_file():
                models = [folder / arm / "model" for arm in arms]
                efficientsam("evaluate", *models, *flags, "--prompts", *PROMPTS, "--output", path)
            results.setdefault(name, []).append(json.loads(path.read_text()))
    return results


def print_tables(results: Results, arms: Sequence[str]) -> None:
    """mIoU of each arm (mean over the seeds, lowest and highest), and its difference from the first's seed by seed."""
    columns = [(name, prompt) for name in results for prompt in PROMPTS]
    header = "| arm | " + " | ".join(f"{name}, {prompt}" for name, prompt in columns) + " |"
    rule = "|---" * (len(columns) + 1) + "|"
    print(header, rule, sep="\n")
    for number, arm in enumerate(arms):
        cells = []
        for name, prompt in columns:
            values = [record["models"][number]["metrics"][prompt]["miou"] for record in results[name]]
            spread = f" ({min(values):.3f} to {max(values):.3f})" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        print(f"| {arm} | " + " | ".join(cells) + " |")
    print(f"\nLess {arms[0]} on the same prompts, 95 % interval over pictures, seed by seed:", "", sep="\n")
    print(header, rule, sep="\n")
    for number, arm in enumerate(arms[1:]):
        cells = []
        for name, prompt in columns:
            pairs = [record["differences"][number][prompt] for record in results[name]]
            cells.append("; ".join(f"{p['difference']:+.3f} [{p['low']:+.3f}, {p['high']:+.3f}]" for p in pairs))
        print(f"| {arm} | " + " | ".join(cells) + " |")
    print()


def draw_curves(args: argparse.Namespace, path: Path) -> None:
    """Losses of pretraining and of finetuning over the images seen, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = {f"pretraining, {arm}": axis for arm, axis in zip(TARGETS, figure.subplots(1, 3))}
    panels["finetuning"] = figure.axes[2]
    for title, axis in panels.items():
        axis.set(title=title, xlabel="images", ylabel="loss", yscale="log")
    for kind, run in claim_runs(args):
        panel = panels["finetuning" if kind == "finetune" else f"pretraining, {kind}"]
        lines = run.log("train")
        arm, seed = run.folder.name, run.folder.parent.name.removeprefix("seed_")
        color = f"C{ARMS.index(arm)}" if kind == "finetune" else f"C{seed}"
        label = arm if kind == "finetune" and seed == str(args.seeds[0]) else None
        panel.plot([x["images"] for x in lines], [x["loss"] for x in lines], color=color, label=label, linewidth=0.8)
    panels["finetuning"].legend()
    figure.savefig(path, dpi=120)
    print(f"wrote {path}")


def main() -> int:
    args = parse_arguments()
    end = time.monotonic() + args.part_minutes * 60
    check_arguments(args)
    seconds = step_seconds(args)
    for kind, run in runs(args):
        if run.done:
            continue
        if time.monotonic() + run.minutes * 60 > end:
            print(f"this part's time is used up before {run.folder}: give the command again")
            return 0
        steps = max(1, round(60 * run.minutes / seconds[kind]))
        print(f"{run.folder}: {steps} steps", flush=True)
        run.train(steps)
    print_tables(evaluate(args, args.seeds, ARMS), ARMS)
    if args.ablations:
        changed = ("sami", *ABLATIONS)
        print_tables(evaluate(args, args.seeds[:1], changed, "ablations_"), changed)
    draw_curves(args, args.output / "losses.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
