# SPDX-License-Identifier: Apache-2.0
"""The training loop: it knows batches and losses, and nothing about images, masks or prompts."""

import copy
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedType, broadcast_object_list, gather_object, send_to_device
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from tqdm.auto import tqdm

from ..files import PARTIAL, is_disk_full, naming_full_disk, replace_folder, write_folder, write_json, write_png
from .arguments import TrainerArguments
from .checkpoints import (
    BEST_FILE,
    is_old,
    last_good_checkpoint,
    list_checkpoints,
    prune_checkpoints,
    read_best,
    read_manifest,
    remove_leftovers,
    update_manifest,
    write_manifest,
)
from .ema import WeightAverage, gathered
from .optimizers import make_optimizers
from .precision import settle_precision
from .run_folder import RunLog, take_run
from .run_state import RunState
from .schedule import Due, Stage, decay_progress, learning_rate_factor, run_progress, stage_at
from .stop_signals import LastingStream, StopSignal, handled


Batch = dict[str, torch.Tensor]


class WriteError(OSError):
    """What a run has to save could not be written."""


class Trainer:
    """Trains a module until its steps or its minutes are used up, and leaves RUN/model behind.

    `module(batch)` returns {"loss": scalar, ...other scalars to log}; `module.save_pretrained(folder)` writes what the
    run is for. Scalars with a "/" in their names are of a part of the data, NaN where a batch has none of it.
    A loss that is a mean over something else than the images of a batch comes with a "weight", the number of what it
    is a mean over: batches of other processes and of gradient accumulation then count by it. Optional are
    `module.compile_parts()`, `module.picture(batch) -> PIL image`, and for `layer_decay` `module.depths()`, the layers
    above each parameter by its name.
    `batches(start, stage)` yields the batches of this process from number `start` on, at the stage's image size; it is
    called again where a stage begins and on resume, so batch i may depend on i and the stage alone.
    `evaluate(module)` returns numbers by name; it is called with averaged weights, under no_grad, in every process,
    so that they can share the work, and what it returns in the main one counts.
    Under FSDP (version 2) every process keeps a whole copy of the module beside its shard of the training state, to
    evaluate and to save.
    """

    def __init__(
        self,
        module: nn.Module,
        batches: Callable[[int, Stage], Iterator[Batch]],
        arguments: TrainerArguments,
        evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    ):
        if arguments.num_threads:
            torch.set_num_threads(arguments.num_threads)
        self.arguments = arguments = settle_precision(arguments)
        trackers = _available_trackers(arguments.report_to)
        self.accelerator = Accelerator(
            mixed_precision=arguments.mixed_precision,
            cpu=arguments.cpu,
            log_with=trackers or None,
            project_dir=arguments.output_dir,
        )
        if arguments.mixed_precision == "fp16" and self.accelerator.scaler is None:  # float32 would be computed
            raise ValueError(f"mixed_precision fp16 needs a GPU, got {self.accelerator.device}: take bf16 or no")
        self.whole = self._whole_copy(module)
        main = self.accelerator.is_main_process
        self.lock = take_run(arguments, self._bytes_needed(module)) if main else None
        self.accelerator.wait_for_everyone()
        if trackers:
            plain = {name: "none" if value is None else value for name, value in vars(arguments).items()}
            self.accelerator.init_trackers("efficientsam", config=plain)
        self.run = Path(arguments.output_dir)
        self.log = RunLog(self.run / "log.jsonl", active=self.accelerator.is_main_process)
        self.batches = batches
        self.evaluate = evaluate
        self.stages = arguments.stages()
        optimizers = make_optimizers(module, arguments, fused=self.accelerator.device.type in ("cpu", "cuda"))
        self.module, *self.optimizers = self.accelerator.prepare(module, *optimizers)
        if arguments.compile and hasattr(self.plain_module, "compile_parts"):
            self.plain_module.compile_parts(dynamic=False)
        self.average = WeightAverage(self.plain_module, arguments.ema_decay)
        self.state = RunState(self.accelerator, self.module, self.optimizers, self.average)
        self.step = self.images = self.nonfinite = 0
        self.elapsed_before = 0.0
        self.exported_step: int | None = None  # by this process: what lies in model/ of an earlier one may be older
        self.best: dict[str, Any] | None = None
        self.stop_signal = StopSignal()

    @property
    def plain_module(self) -> nn.Module:
        """The module as it was given, without the wrappers of distributed training."""
        return self.accelerator.unwrap_model(self.module)

    def _whole_copy(self, module: nn.Module) -> nn.Module | None:
        """A copy for all weights where FSDP leaves each process a part of them; ValueError if FSDP cannot be."""
        if self.accelerator.distributed_type != DistributedType.FSDP:
            if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and self.accelerator.num_processes > 1:
                raise ValueError(
                    f"FSDP is asked for, but Accelerate has it for GPUs, not for {self.accelerator.device}"
                )
            return None
        if not self.accelerator.is_fsdp2:
            raise ValueError("FSDP must be of version 2 (accelerate launch --fsdp_version 2), got version 1")
        if self.arguments.optimizer == "muon":
            raise ValueError("optimizer muon is two optimizers, and Accelerate keeps one under FSDP: take adamw")
        plugin = self.accelerator.state.fsdp_plugin
        plugin.cpu_ram_efficient_loading = False  # every process has the whole model, and buffers are no part of it
        plugin.mixed_precision_policy = None  # autocast, as without FSDP: gradients and metrics stay float32
        return copy.deepcopy(module).to(self.accelerator.device).eval()

    def _bytes_needed(self, module: nn.Module) -> int:
        """Room on the disk: a checkpoint is weights, up to two moments, and their average, in float32.

        One more than is kept is there while it is written, and the best one may be kept beside the last.
        """
        trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
        weights = 4 * sum(p.numel() for p in module.parameters())
        checkpoints = 1 if self.arguments.resume else self.arguments.keep_checkpoints + 2
        return checkpoints * (weights + (12 if self.arguments.ema_decay else 8) * trained) + 3 * weights

    def elapsed(self) -> float:
        """Seconds of training so far, over all sessions of this run."""
        return self.elapsed_before + time.monotonic() - self.started

    def progress(self) -> float:
        """Fraction of the run that is over; with a time budget all processes hear it from the main one."""
        limit = self.arguments
        value = run_progress(self.step, limit.max_steps, self.elapsed(), limit.max_minutes)
        if limit.max_minutes and self.accelerator.num_processes > 1:
            value = broadcast_object_list([value])[0]
        return value

    def train(self) -> dict[str, Any]:
        """Run to the end or to SIGTERM, SIGINT or SIGHUP; the summary's "interrupted" names the signal or is None.

        What cannot be written, as on a full disk, is an OSError that names the last good checkpoint.
        """
        try:
            with self._naming_the_last_checkpoint():
                return self._train()
        finally:
            if self.lock is not None:
                self.lock.release()

    def _train(self) -> dict[str, Any]:
        self.started = time.monotonic()
        if self.arguments.resume:
            self._resume()
        self.log("start", step=self.step, elapsed=self.elapsed(), mixed_precision=self.arguments.mixed_precision)
        self._set_up_periods()
        progress = self.progress()
        # They end the loop after the step, and wait until the run is saved.
        with handled(self.stop_signal), self._progress_bar(progress) as bar:
            self.module.train()
            while progress < 1 and not self._stopping():
                self._train_step(progress)
                progress = self.progress()
                self._after_step(bar, progress)
            return self._finish(progress)

    def plan(self) -> dict[str, Any] | None:
        """How many steps `max_minutes` will give, judged by a step of each stage.

        None where that is no question: without minutes, with a number of steps, and to go on.

        {"steps", "images", "stages": [{"image_size", "steps"}]}. Nothing is learned by these steps, and they are not
        counted. Every process must come here.
        """
        limit = self.arguments
        if not limit.max_minutes or limit.max_steps or limit.resume:
            return None
        starts = [stage.start for stage in self.stages] + [1.0]
        seconds = [60 * limit.max_minutes * (end - start) for start, end in zip(starts, starts[1:])]
        steps = [int(time / self._time_step(stage)) for time, stage in zip(seconds, self.stages)]
        images = sum(
            count * stage.batch_size * limit.gradient_accumulation * self.accelerator.num_processes
            for count, stage in zip(steps, self.stages)
        )
        stages = [{"image_size": stage.image_size, "steps": count} for count, stage in zip(steps, self.stages)]
        plan = {"steps": sum(steps), "images": images, "stages": stages}
        self.log("plan", **plan)
        return plan

    def _time_step(self, stage: Stage) -> float:
        """Seconds of the second of two steps at a stage, without the optimizer's part."""
        self.module.train()
        batches = iter(self.batches(0, stage))
        for _ in range(2):
            begin = time.monotonic()
            for _ in range(self.arguments.gradient_accumulation):
                batch = send_to_device(next(batches), self.accelerator.device)
                with self.accelerator.autocast():
                    output = self.module(batch)
                self.accelerator.backward(output["loss"])
            gathered(output["loss"].detach()).item()  # waits for the device
            for optimizer in self.optimizers:
                optimizer.zero_grad(set_to_none=True)
        return time.monotonic() - begin

    def _set_up_periods(self) -> None:
        a, now = self.arguments, self.elapsed()
        self.checkpoint_due = Due(a.checkpoint_every, a.checkpoint_minutes, now)
        self.evaluation_due = Due(a.evaluate_every, a.evaluate_minutes, now)
        self.picture_due = Due(a.picture_every, None, now)
        self.stage: Stage | None = None
        self.window: list[Batch] = []
        self.window_images, self.window_start = 0, now
        self.images_before, self.train_start = self.images, now
        self.saved_step = self.step if self.step else None

    # One step

    def _train_step(self, progress: float) -> None:
        a = self.arguments
        decayed = decay_progress(progress, a.warmup_steps, a.max_steps)
        factor = learning_rate_factor(a.schedule, self.step, a.warmup_steps, decayed, a.final_learning_rate)
        self.learning_rate = a.learning_rate * factor
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            group["lr"] = self.learning_rate * group.get("lr_scale", 1.0)
        metrics, total_weight = [], torch.zeros((), device=self.accelerator.device)
        for number in range(a.gradient_accumulation):
            batch = self._next_batch(progress, number)
            last = number == a.gradient_accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.module):
                with self.accelerator.autocast():
                    output = self.module(batch)
                weight = output.pop("weight", 1)
                self.accelerator.backward(output["loss"] * weight if self._shared_steps() else output["loss"])
            total_weight += weight
            metrics.append({name: value.detach() for name, value in output.items()})
        self.last_batch = batch
        if self._shared_steps():
            self._divide_gradients(total_weight)
        self._update(metrics)

    def _shared_steps(self) -> bool:
        """Whether a step's gradient comes from several batches."""
        return self.arguments.gradient_accumulation * self.accelerator.num_processes > 1

    def _divide_gradients(self, weight: torch.Tensor) -> None:
        """Make the mean over all that the losses are means over of the sum that was accumulated, () float.

        Distributed training has divided by the number of processes already.
        """
        everywhere = self.accelerator.reduce(weight, "sum").item()
        factor = self.accelerator.num_processes / everywhere if everywhere else 0.0
        for parameter in self.module.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(factor)

    def _next_batch(self, progress: float, number: int) -> Batch:
        stage = stage_at(self.stages, progress) if number == 0 else self.stage
        if stage != self.stage:
            self.stage = stage
            self.iterator = iter(self.batches(self.step * self.arguments.gradient_accumulation, stage))
            self.log("stage", step=self.step, image_size=stage.image_size, batch_size=stage.batch_size)
        batch = next(self.iterator, None)
        if batch is None:
            raise ValueError(f"batches ended at step {self.step}, before the run did; they must go on for ever")
        count = stage.batch_size * self.accelerator.num_processes
        self.images += count
        self.window_images += count
        return send_to_device(batch, self.accelerator.device, non_blocking=True)

    def _update(self, metrics: list[Batch]) -> None:
        """Clip and step; a gradient that is not finite changes nothing, and too many in a row end the run."""
        limit = self.arguments.max_grad_norm or math.inf
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), limit)
        norm = gathered(torch.as_tensor(norm).detach())
        finite = bool(torch.isfinite(norm))
        if finite or self.accelerator.scaler is not None:  # fp16: the scaler skips the step and lowers its scale
            for optimizer in self.optimizers:
                optimizer.step()
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if finite:
            self.nonfinite = 0
            self.average.update()
            self.window.append(_means(metrics) | {"grad_norm": norm})
            return
        self.nonfinite += 1
        self.log("nonfinite", step=self.step, in_a_row=self.nonfinite)
        if self.nonfinite >= self.arguments.max_nonfinite:
            raise FloatingPointError(
                f"loss or gradient was not finite for {self.nonfinite} steps in a row, up to step {self.step}; the "
                f"last good checkpoint is in {self.run / 'checkpoints'}. A lower learning_rate may help, or "
                "mixed_precision no"
            )

    # After a step

    def _after_step(self, bar: tqdm, progress: float) -> None:
        if self.step % self.arguments.log_every == 0 or progress >= 1:
            self._log_window(bar, progress)
        if self.picture_due(self.step, self.elapsed()):
            self._save_picture()
        if self._agree(self.evaluation_due(self.step, self.elapsed())) and progress < 1:
            self._evaluate()
        if self._agree(self.checkpoint_due(self.step, self.elapsed())):
            self._save()

    def _agree(self, due: bool) -> bool:
        """What is due by the clock is due in every process when it is in the main one."""
        return broadcast_object_list([due])[0] if self.accelerator.num_processes > 1 else due

    def _log_window(self, bar: tqdm, progress: float) -> None:
        now = self.elapsed()
        speed = self.window_images / max(now - self.window_start, 1e-9)
        means = {name: value.item() for name, value in _means(self.window).items()}
        self.log(
            "train", step=self.step, progress=progress, elapsed=now, images=self.images, images_per_s=speed,
            learning_rate=self.learning_rate, image_size=self.stage.image_size, **means,
        )  # fmt: skip
        self._track("train", {**means, "learning_rate": self.learning_rate, "images_per_s": speed})
        shown = {name: f"{means[name]:.3f}" for name in ("loss", "miou") if name in means}
        bar.set_postfix(step=self.step, **shown, **{"images/s": f"{speed:.1f}"}, refresh=False)
        bar.n = progress
        bar.refresh()
        self.window, self.window_images, self.window_start = [], 0, now

    def _track(self, group: str, values: dict[str, float]) -> None:
        """Hand numbers to the trackers; without any this does nothing."""
        self.accelerator.log({f"{group}/{name}": value for name, value in values.items()}, step=self.step)

    @contextmanager
    def _averaged(self) -> Iterator[nn.Module]:
        """The plain module in evaluation mode with averaged weights; training goes on as if nothing had happened.

        Every process must come here, since under FSDP the weights are gathered from all of them.
        """
        module = self.plain_module
        module.eval()
        own = [self.accelerator.device] if self.accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(own), torch.no_grad(), self.average.applied(), self.accelerator.autocast():
            if self.whole is not None:
                for mine, sharded in zip(self.whole.parameters(), module.parameters(), strict=True):
                    mine.copy_(gathered(sharded))
            yield module if self.whole is None else self.whole
        module.train()

    def _evaluate(self) -> None:
        if self.evaluate is None:
            return
        begin = time.monotonic()
        with self._averaged() as module:
            metrics = self.evaluate(module)
        self.log("evaluation", step=self.step, seconds=time.monotonic() - begin, **metrics)
        self._track("evaluation", metrics)
        self._keep_if_best(metrics)
        self.accelerator.wait_for_everyone()

    def _keep_if_best(self, metrics: dict[str, float]) -> None:
        value = metrics.get(self.arguments.best_metric)
        if metrics and value is None:
            raise ValueError(f"best_metric {self.arguments.best_metric!r} is none of {', '.join(metrics)}")
        # NaN, such as a mean over nothing, would be surpassed by nothing.
        better = value is not None and math.isfinite(value) and (self.best is None or value > self.best["value"])
        if better:
            self.best = {"step": self.step, "metric": self.arguments.best_metric, "value": value}
        if self._agree(better):
            self._export("best_model")  # first: a run killed in between finds in it what it is the best of
            self._save()

    def _save_picture(self) -> None:
        if not hasattr(self.plain_module, "picture"):
            return
        folder = self.run / "pictures"
        with self._averaged() as module:
            if self.accelerator.is_main_process:
                folder.mkdir(exist_ok=True)
                write_png(folder / f"step_{self.step:06d}.png", module.picture(self.last_batch))

    # Saving and resuming

    def _save(self) -> None:
        """Write checkpoints/step_N and refresh model/; every process takes part, the main one moves it into place."""
        folder = self.run / "checkpoints" / f"step_{self.step}"
        if self.saved_step == self.step:
            if self.accelerator.is_main_process:
                update_manifest(folder, self._loop_state())  # an evaluation since then may have found it the best
            return
        aside = folder.with_name(PARTIAL + folder.name)
        self._write_together(folder, partial(self.state.write, aside, self.state.gather()))
        self._write_together(folder, partial(self._put_in_place, aside, folder))
        self._export()
        self.log("checkpoint", step=self.step, elapsed=self.elapsed(), folder=str(folder))
        self.saved_step = self.step
        self.accelerator.wait_for_everyone()

    def _put_in_place(self, aside: Path, folder: Path) -> None:
        if self.accelerator.is_main_process:
            write_manifest(aside, self._loop_state())
            replace_folder(aside, folder)
            prune_checkpoints(self.run, self.arguments.keep_checkpoints, self.best and self.best["step"])

    def _loop_state(self) -> dict[str, Any]:
        return {
            "step": self.step, "images": self.images, "elapsed": self.elapsed(), "best": self.best,
            "nonfinite": self.nonfinite, "processes": self.accelerator.num_processes,
            "distributed": self.accelerator.distributed_type.value,
        }  # fmt: skip

    def _write_together(self, path: Path, write: Callable[[], Any]) -> None:
        """Let every process write its part of `path`; an error of one of them is a WriteError in all."""
        problem = None
        try:
            with naming_full_disk(path):
                write()
        except OSError as error:
            problem = error
        problems = [None if problem is None else str(problem)]
        if self.accelerator.num_processes > 1:
            problems = gather_object(problems)
        first = next((text for text in problems if text is not None), None)
        if first is not None:
            named = first if str(path) in first else f"{path} could not be written: {first}"
            raise WriteError(named) from problem

    @contextmanager
    def _naming_the_last_checkpoint(self) -> Iterator[None]:
        """What cannot be written ends the run with an OSError that says what is left to go on from; others stay."""
        try:
            yield
        except Exception as error:
            full = is_disk_full(error)
            if not full and not isinstance(error, WriteError):
                raise
            if self.accelerator.is_main_process:
                remove_leftovers(self.run)
            last = next(iter(list_checkpoints(self.run)[-1:]), "none")
            raise OSError(
                f"{' '.join(str(error).split())[:500]}. The last good checkpoint is {last}; the run goes on from it "
                f"with --resume{' once there is room' if full else ''}"
            ) from error

    def _export(self, name: str = "model") -> None:
        with self._averaged() as module:
            write = partial(write_folder, self.run / name, partial(self._write_model, module, name))
            self._write_together(self.run / name, write if self.accelerator.is_main_process else lambda: None)
        if name == "model":
            self.exported_step = self.step

    def _write_model(self, module: nn.Module, name: str, folder: Path) -> None:
        module.save_pretrained(folder)
        if name == "best_model":
            write_json(folder / BEST_FILE, self.best | {"images": self.images, "elapsed": self.elapsed()})

    def _resume(self) -> None:
        """Load the last checkpoint that is whole, if the run got that far; the main process decides which it is."""
        folder = self._agreed_checkpoint()
        if folder is None:
            self.log("resume", step=0, note="no checkpoint yet, from the beginning")
            return
        state = read_manifest(folder)
        if state["processes"] != self.accelerator.num_processes:
            raise ValueError(
                f"resume: {folder} was written by {state['processes']} processes, not {self.accelerator.num_processes}"
            )
        kind = self.accelerator.distributed_type.value
        if state.get("distributed", kind) != kind:
            raise ValueError(f"resume: {folder} was written under {state['distributed']}, and this is {kind}")
        self._settle_gradients()
        try:
            self.state.load(folder, is_old(folder, state))
        except Exception as error:  # whatever loaders say of a checkpoint of another model
            raise ValueError(
                f"resume: {folder} is not of this run: {' '.join(str(error).split())[:300]}. Move it away to go on "
                "from the one before it"
            ) from error
        self.step, self.images, self.nonfinite = state["step"], state["images"], state["nonfinite"]
        self.elapsed_before, self.best = state["elapsed"], read_best(self.run) or state["best"]
        self.log("resume", step=self.step, elapsed=self.elapsed_before, folder=str(folder))

    def _agreed_checkpoint(self) -> Path | None:
        """What the main process finds to go on from, in every process; its ValueError too."""
        found: list[Any] = [None, None]
        if self.accelerator.is_main_process:
            try:
                found[0] = last_good_checkpoint(self.run)
            except ValueError as error:
                found[1] = str(error)
        if self.accelerator.num_processes > 1:
            found = broadcast_object_list(found)
        if found[1] is not None:
            raise ValueError(found[1])
        return found[0]

    def _settle_gradients(self) -> None:
        """Bring distributed training to where it is after a first step; loading undoes what else this changes.

        DDP groups gradients anew after its first backward. With three processes or more it depends on the groups in
        which order numbers are added, and a resumed run would end with other bits.
        """
        if not isinstance(self.module, DistributedDataParallel):
            return
        batch = send_to_device(next(iter(self.batches(0, self.stages[0]))), self.accelerator.device)
        with self.accelerator.autocast():
            output = self.module(batch)
        self.accelerator.backward(output["loss"])
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)

    def _finish(self, progress: float) -> dict[str, Any]:
        train_seconds = self.elapsed() - self.train_start
        self._save()
        if self.exported_step != self.step:
            self._export()
        if progress >= 1:
            self._evaluate()
        interrupted = self.stop_signal.number is not None and progress < 1
        summary = {
            "steps": self.step,
            "images": self.images,
            "minutes": self.elapsed() / 60,
            "images_per_s": (self.images - self.images_before) / max(train_seconds, 1e-9),
            "best": self.best,
            "interrupted": signal.Signals(self.stop_signal.number).name if interrupted else None,
            "skipped": self.log.count_skipped() if self.accelerator.is_main_process else 0,
        }
        self.log("end", **summary)
        if self.accelerator.is_main_process:
            write_json(self.run / "run.json", summary)
        self.accelerator.wait_for_everyone()
        for tracker in self.accelerator.trackers:
            tracker.finish()
        return summary

    # Around the loop

    def _stopping(self) -> bool:
        return self._agree(self.stop_signal.number is not None)

    def _progress_bar(self, progress: float) -> tqdm:
        layout = "{percentage:5.1f}%|{bar}| {elapsed}<{remaining}{postfix}"
        hidden = not self.accelerator.is_main_process
        screen = LastingStream(sys.stderr)
        return tqdm(total=1.0, initial=progress, bar_format=layout, disable=hidden, dynamic_ncols=True, file=screen)


def _means(rows: list[Batch]) -> Batch:
    """Mean of each scalar; for one of a part of the data, over the rows that have some of it."""
    stacks = {name: torch.stack([row[name].float() for row in rows]) for name in (rows[0] if rows else ())}
    return {name: values.nanmean() if "/" in name else values.mean() for name, values in stacks.items()}


def _available_trackers(report_to: str) -> list[str]:
    """Names from "tensorboard,wandb"; ValueError for one that Accelerate does not know or that is not installed.

    Accelerate itself passes over trackers that are missing.
    """
    names = [name.strip() for name in report_to.split(",") if name.strip()]
    installed = [str(tracker) for tracker in get_available_trackers()]
    missing = [name for name in names if name not in installed]
    if missing:
        raise ValueError(
            f"report_to: {', '.join(missing)} cannot be used; of Accelerate's trackers "
            f"{', '.join(installed) or 'none'} can be here, others must be installed first"
        )
    return names
