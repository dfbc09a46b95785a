# SPDX-License-Identifier: Apache-2.0
"""What changes during a run: progress under a step and a time budget, learning rate, image size, and what is due."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Stage:
    """From `start` (fraction of the run) on: side of the square images in pixels, images a process takes per step."""

    start: float
    image_size: int
    batch_size: int


def parse_stages(text: str, batch_size: int) -> tuple[Stage, ...]:
    """Stages from "512" or "0:256,0.7:512" or "0:256x16,0.7:512x4" (fraction:size, optionally x images a step).

    Where no batch size is given, later stages keep the number of pixels of the first. Raises ValueError otherwise.
    """
    stages = []
    for part in text.split(","):
        start, _, rest = part.strip().rpartition(":")
        size, cross, count = rest.partition("x")
        try:
            stage = Stage(float(start or 0), int(size), int(count) if cross else 0)
        except ValueError:
            raise ValueError(
                f"image_sizes: cannot read {part.strip()!r}; expected a size like 512, or stages like 0:256,0.7:512x4"
            ) from None
        if not cross:
            first = stages[0].image_size if stages else stage.image_size
            scaled = max(1, round((stages[0].batch_size if stages else batch_size) * (first / stage.image_size) ** 2))
            stage = Stage(stage.start, stage.image_size, scaled)
        stages.append(stage)
    starts = [stage.start for stage in stages]
    if starts[0] != 0 or any(b <= a for a, b in zip(starts, starts[1:])) or starts[-1] >= 1:
        raise ValueError(f"image_sizes: stages must start at 0 and rise below 1, got {starts} from {text!r}")
    if any(stage.image_size < 16 or stage.image_size % 16 or stage.batch_size < 1 for stage in stages):
        raise ValueError(f"image_sizes: sizes must be multiples of 16 and batches at least 1, got {text!r}")
    return tuple(stages)


def stage_at(stages: tuple[Stage, ...], progress: float) -> Stage:
    """The stage that holds at `progress`, a fraction of the run."""
    return [stage for stage in stages if stage.start <= progress or stage is stages[0]][-1]


def run_progress(step: int, max_steps: int | None, elapsed: float, max_minutes: float | None) -> float:
    """Fraction of the run that is over, in [0, 1]: of the steps or of the minutes, whichever is further."""
    by_steps = step / max_steps if max_steps else 0.0
    by_time = elapsed / (60 * max_minutes) if max_minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def decay_progress(progress: float, warmup_steps: int, max_steps: int | None) -> float:
    """Fraction of the decay that is over. With a number of steps it begins after the warm-up, as in MAE.

    With minutes alone nobody knows how many steps there will be, and it begins with the run.
    """
    if not max_steps or max_steps <= warmup_steps:
        return progress
    return max(0.0, (progress * max_steps - warmup_steps) / (max_steps - warmup_steps))


def learning_rate_factor(schedule: str, step: int, warmup_steps: int, progress: float, final: float) -> float:
    """Multiple of the base learning rate: linear warm-up over steps times a decay to `final` over the progress."""
    warmup = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    decay = {
        "constant": 1.0,
        "linear": 1.0 - progress,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * progress)),
    }[schedule]
    return warmup * (final + (1.0 - final) * decay)


class Due:
    """Says when something periodic is due: every so many steps, or so many minutes after it last was, or both."""

    def __init__(self, steps: int | None, minutes: float | None, elapsed: float = 0.0):
        self.steps = steps
        self.minutes = minutes
        self.last = elapsed

    def __call__(self, step: int, elapsed: float) -> bool:
        by_steps = bool(self.steps) and step % self.steps == 0
        by_time = bool(self.minutes) and elapsed - self.last >= 60 * self.minutes
        if by_steps or by_time:
            self.last = elapsed
        return by_steps or by_time
