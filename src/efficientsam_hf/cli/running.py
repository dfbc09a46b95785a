# SPDX-License-Identifier: Apache-2.0
"""What the training commands share: fields from a recipe and from flags, and how a run ends."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any


STOPPED = 128  # plus the signal's number: the exit code of a run that a signal ended


def add_fields(parser: argparse.ArgumentParser, kind: type) -> None:
    """Add --recipe and a flag for each field of the arguments."""
    from ..training.arguments import add_flags

    parser.add_argument("--recipe", metavar="NAME|FILE", help="recipe of the package or a YAML file")
    add_flags(parser.add_argument_group("fields of a recipe"), kind)


def run_training(
    args: argparse.Namespace,
    command: str,
    kind: type,
    train: Callable[[Any], dict[str, Any]],
    usual: Callable[[dict[str, Any]], dict[str, Any]] = lambda flags: {},
) -> int:
    """Fill the arguments, train, say where the result is; `train` returns the trainer's summary.

    `usual(flags)` is what stands in the place of a recipe where none is given.
    """
    flags = {name: value for name, value in vars(args).items() if name in kind.__dataclass_fields__}
    args.run_folder = None
    return going_on(args, lambda: _train(args, command, kind, train, usual, flags))


def _train(
    args: argparse.Namespace, command: str, kind: type, train: Callable, usual: Callable, flags: dict[str, Any]
) -> int:
    import torch

    from ..allocator import keep_freed_memory
    from ..processes import is_main
    from ..training.arguments import build_arguments, read_recipe

    recipe = read_recipe(args.recipe, command) if args.recipe else usual(flags)
    arguments = build_arguments(kind, recipe, flags)
    args.run_folder = Path(arguments.output_dir)
    if args.own_process and (arguments.cpu or not torch.cuda.is_available()):
        keep_freed_memory()
    summary = train(arguments)
    stopped = 0 if summary["interrupted"] is None else STOPPED + signal.Signals[summary["interrupted"]]
    shown = is_main()
    _leave_other_processes()
    if not shown:
        return stopped
    say(
        f"{summary['steps']} steps, {summary['images']} images in {summary['minutes']:.1f} minutes "
        f"({summary['images_per_s']:.1f} images/s); model: {Path(arguments.output_dir) / 'model'}"
    )
    if summary["skipped"]:
        say(f"{summary['skipped']} samples could not be used; log.jsonl names them and says why")
    if stopped:
        say_interrupted(args, summary["interrupted"], f"saved at step {summary['steps']}", resume=True)
    return stopped


def say(text: str, error: bool = False) -> None:
    """Print, if there is still somebody to read it: a terminal that was closed is no reason to fail."""
    stream = "stderr" if error else "stdout"
    try:
        print(text, file=getattr(sys, stream), flush=True)
    except OSError:
        setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 - for the rest of the process


def say_interrupted(args: argparse.Namespace, name: str, state: str, resume: bool) -> None:
    """Say by what a command was ended, what is left, and the command that goes on, as it was typed."""
    words = [*args.argv, *(["--resume"] if resume and not getattr(args, "resume", False) else [])]
    launched = ", given to the same launcher" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    command = shlex.join(["efficientsam", *words])
    say(f"efficientsam: interrupted by {name}, {state}; this goes on{launched}: {command}", error=True)


def going_on(args: argparse.Namespace, work: Callable[[], int]) -> int:
    """Do the work of a command that can go on; a signal that ends it is named, with the command for that."""
    from ..processes import is_main
    from ..training.stop_signals import handled

    received = [signal.SIGINT]

    def interrupt(number: int, frame: Any) -> None:
        received[0] = signal.Signals(number)
        raise KeyboardInterrupt

    try:
        with handled(interrupt):
            return work()
    except KeyboardInterrupt:
        folder = getattr(args, "run_folder", None)
        resume = folder is not None and (folder / "args.json").is_file()
        if is_main():
            say_interrupted(args, received[0].name, "what it has saved is kept", resume)
        return STOPPED + received[0]


def make_trainable(model: Any, arguments: Any) -> None:
    """Checkpointing of activations as the arguments say, and attention that is fast where the model trains."""
    import torch

    from ..training.attention import use_matrix_products

    if arguments.gradient_checkpointing:
        # transformers 5.23 renames it
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if arguments.cpu or not torch.cuda.is_available():
        use_matrix_products(model)


def dataset_source(arguments: Any, masks_column: str | None) -> dict[str, Any]:
    """{"samples"} of train_dataset if it is stored, {"stream", "read"} if it is streamed."""
    from ..data import dataset_samples

    columns = {"image_column": arguments.image_column, "masks_column": masks_column}
    chosen = {
        "split": arguments.train_split, "config": arguments.train_config, "revision": arguments.train_revision,
    }  # fmt: skip
    if arguments.stream:
        stream = dataset_samples.load_stream(arguments.train_dataset, **chosen, **columns)
        return {"stream": stream, "read": partial(dataset_samples.read_row, **columns)}
    return {"samples": dataset_samples.load_samples(arguments.train_dataset, **chosen, **columns)}


def picture_batches(
    arguments: Any, preparation: Any, samples: Any = None, stream: Any = None, read: Callable | None = None
) -> Any:
    """This process's batches of stored pictures, the first `train_limit` of them, or of streamed ones."""
    from torch.utils.data import Subset

    from ..training.sample_batches import SampleBatches
    from ..training.stream_batches import StreamBatches

    own = _own_part(arguments)
    if stream is not None:
        return StreamBatches(stream, read, preparation, shuffle_buffer=arguments.shuffle_buffer, **own)
    if arguments.train_limit is not None:
        samples = Subset(samples, range(min(arguments.train_limit, len(samples))))
    return SampleBatches(samples, preparation, **own)


def scene_batches(arguments: Any, **options: Any) -> Any:
    """This process's batches of generated scenes, rendered where it trains or by its workers."""
    from ..data.scene_bank import SceneBank
    from ..training.scene_batches import SceneBatches

    bank = SceneBank.build(seed=0, device=render_device(arguments))
    return SceneBatches(bank=bank, stages=arguments.stages(), **options, **_own_part(arguments))


def mixture_batches(arguments: Any, sources: list[tuple[str, float, Any]], device: Any) -> Any:
    """This process's batches of several sources, (name, weight, source) each."""
    from ..training.mixture_batches import MixtureBatches

    return MixtureBatches(sources, device=device, **_own_part(arguments))


def render_device(arguments: Any) -> Any:
    """Where scenes are rendered: by workers on the CPU, else where it trains."""
    from ..training.process_state import process_state

    return "cpu" if arguments.data_workers else process_state(arguments).device


def announce(plan: dict[str, Any] | None, arguments: Any) -> None:
    """Say before a run of so many minutes how many steps they will give."""
    if plan is None:
        return
    sizes = ", ".join(f"{stage['steps']} at {stage['image_size']} pixels" for stage in plan["stages"])
    print(
        f"{arguments.max_minutes:g} minutes give about {plan['steps']} steps of {plan['images']} images in all "
        f"({sizes}), judging by one step of each size"
    )
    if arguments.warmup_steps > plan["steps"] / 4:
        print(
            f"efficientsam: warning: warmup_steps {arguments.warmup_steps} is much of about {plan['steps']} steps",
            file=sys.stderr,
        )


def _own_part(arguments: Any) -> dict[str, Any]:
    """What all batches know of the process they are for."""
    from ..training.process_state import process_state

    state = process_state(arguments)
    processes = {"rank": state.process_index, "processes": state.num_processes}
    return {"seed": arguments.seed, "workers": arguments.data_workers, **processes}


def log_skipped(trainer: Any, batches: Any) -> None:
    """Let samples that cannot be used be named in log.jsonl, by every process: each meets others."""
    from ..training.run_folder import RunLog

    log = RunLog(trainer.run / "log.jsonl")
    batches.report = lambda index, reason: log("skipped", sample=index, reason=reason)


def _leave_other_processes() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def trainer_class() -> type:
    """The training loop; ImportError that names what is missing for it."""
    try:
        from ..training.trainer import Trainer
    except ModuleNotFoundError as error:
        raise ImportError(f"training needs {error.name}: pip install 'efficientsam-hf[train]'") from error
    return Trainer
