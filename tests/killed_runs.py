# SPDX-License-Identifier: Apache-2.0
"""Kill a run at chosen or random moments, go on with it, and tell how it ended: python killed_runs.py FOLDER [COUNT].

A process of its own, because it forks: torch is imported once for all the runs, and a forked one dies alone.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from test_trainer import batches, train, weights

from efficientsam_hf.training import run_state
from efficientsam_hf.training.ema import WeightAverage
from efficientsam_hf.training.trainer import Trainer


STEPS = 6
# What Python announces of an operation on files, before it happens.
EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"}


def die() -> None:
    """As by SIGKILL from outside: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_before_file_operation(number: int, folder: Path) -> None:
    """Die before operation `number`, from 1, on a file in the folder."""
    seen = 0

    def watch(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and str(folder) in str(arguments[0]):
            seen += 1
            if seen == number:
                die()

    sys.addaudithook(watch)


def kill_in_half_a_file(folder: Path) -> None:
    """Die when the optimizer's state of step 4 is half written."""
    save = run_state.save_tree

    def save_half(path: Path, tree: object) -> None:
        save(path, tree)
        if "step_4" in str(path) and "optimizer" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            die()

    run_state.save_tree = save_half


def kill_between_gradients_and_step(folder: Path) -> None:
    """Die in step 4 with its gradients made."""
    update = Trainer._update
    Trainer._update = lambda self, metrics: die() if self.step == 3 else update(self, metrics)


def kill_between_weights_and_average(folder: Path) -> None:
    """Die in step 4 with the weights moved and their average not."""
    update = WeightAverage.update
    WeightAverage.update = lambda self: die() if self.updates == 3 else update(self)


def kill_in_a_batch(folder: Path) -> None:
    """Die while batch 4 is being made."""
    global source

    def source(start: int, stage: object) -> Iterator[dict[str, torch.Tensor]]:
        for number, batch in enumerate(batches(start, stage), start):
            if number == 3:
                die()
            yield batch


source = batches


def evaluate(module: torch.nn.Module) -> dict[str, float]:
    """A number that is best at step 4: what step 2 left as the best model makes way, and step 6 is worse."""
    return {"miou": -abs(float(module.linear.weight.sum()) - 0.25)}


def run(folder: Path, **changes: object) -> dict:
    """The run that is killed, gone on with, or neither."""
    settings = {"max_steps": STEPS, "checkpoint_every": 2, "evaluate_every": 2, "keep_checkpoints": 1}
    return train(folder, evaluate, source, log_every=1, image_sizes="32", warmup_steps=1, **settings, **changes)


def in_a_child(work: Callable[[], object]) -> int:
    """Do it in a forked process; the signal that ended it, or 0."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise SystemExit("a run failed, its error is above")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def go_on(folder: Path) -> None:
    """What somebody does who finds the run dead."""
    run(folder, resume=(folder / "args.json").is_file())


def describe(folder: Path) -> dict:
    """All that must be as if nothing had happened."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    models = {name: weights(folder / name)["linear.weight"].tolist() for name in ("model", "best_model")}
    best = json.loads((folder / "best_model" / "best.json").read_text())
    summary = json.loads((folder / "run.json").read_text())
    kept = {name: summary[name] for name in ("steps", "images", "best")}
    return {"files": names, **models, **kept, "best.json": {name: best[name] for name in ("step", "value")}}


def attempt(folder: Path, arm: Callable[[Path], None]) -> dict | None:
    """Kill a run as `arm` says, go on with it, describe it; None if it ended before that moment."""
    shutil.rmtree(folder, ignore_errors=True)
    killed = in_a_child(lambda: (arm(folder), run(folder)))
    if killed == 0:
        return None
    assert killed == signal.SIGKILL
    in_a_child(lambda: go_on(folder))
    return describe(folder)


def at_random_moments(folder: Path, count: int, seconds: float) -> Iterator[tuple[str, dict]]:
    """Kill `count` runs from outside, each at a moment of its own, half of them again while they go on."""
    generator = random.Random(0)
    for number in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        moments = [generator.uniform(0, seconds) for _ in range(1 + number % 2)]
        for moment in moments:
            kill_after(moment, lambda: go_on(folder))
        in_a_child(lambda: go_on(folder))
        yield f"random {number}: {', '.join(f'{moment:.3f} s' for moment in moments)}", describe(folder)


def kill_after(seconds: float, work: Callable[[], object]) -> None:
    """Do it in a forked process that is killed after so long, or has ended before."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            work()
        os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(root: Path, count: int = 0) -> None:
    """Print as JSON how an undisturbed run ends, and what differs in which killed one; `count` at random moments."""
    torch.set_num_threads(1)  # a forked process has no other
    begin = time.monotonic()
    in_a_child(lambda: run(root / "whole"))
    seconds = time.monotonic() - begin
    whole = describe(root / "whole")
    attempts = dict(at_random_moments(root / "killed", count, seconds)) if count else all_attempts(root)
    wrong = {name: outcome for name, outcome in attempts.items() if outcome != whole}
    print(json.dumps({"whole": whole, "attempts": list(attempts), "wrong": wrong}))


def all_attempts(root: Path) -> dict[str, dict]:
    """At each chosen moment, and before each operation on a file."""
    attempts = {
        arm.__name__: attempt(root / "killed", arm)
        for arm in (
            kill_in_half_a_file, kill_between_gradients_and_step, kill_between_weights_and_average, kill_in_a_batch,
        )
    }  # fmt: skip
    number = 1
    while outcome := attempt(root / "killed", partial(kill_before_file_operation, number)):
        attempts[f"file operation {number}"] = outcome
        number += 1
    return attempts


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
