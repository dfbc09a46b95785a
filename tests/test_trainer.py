# SPDX-License-Identifier: Apache-2.0
"""The loop on a module of a few numbers: schedule, resume, interruption, logging, errors."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from test_segmentation_training import example_batch, tiny_model
from torch import nn

from efficientsam_hf import EfficientSamModel
from efficientsam_hf.data.mixture import read_mixture
from efficientsam_hf.data.numbered_batches import numbered_batches
from efficientsam_hf.training.arguments import (
    RECIPES,
    TrainerArguments,
    build_arguments,
    read_recipe,
)
from efficientsam_hf.training.checkpoints import list_checkpoints, update_manifest
from efficientsam_hf.training.ema import WeightAverage
from efficientsam_hf.training.finetune_arguments import FinetuneArguments
from efficientsam_hf.training.run_folder import RunLog, open_run
from efficientsam_hf.training.run_state import load_tree
from efficientsam_hf.training.schedule import (
    Due,
    Stage,
    decay_progress,
    learning_rate_factor,
    parse_stages,
    run_progress,
    stage_at,
)
from efficientsam_hf.training.segmentation import InteractiveSegmentation, PromptSampling
from efficientsam_hf.training.trainer import Trainer


class Line(nn.Module):
    """Learns y = Wx + b, with dropout, so that the state of torch's own generator matters too."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.poison = False

    def forward(self, batch):
        predicted = self.linear(nn.functional.dropout(batch["x"], 0.1, self.training))
        loss = (predicted - batch["y"]).square().mean()
        return {"loss": loss * (torch.nan if self.poison else 1.0), "error": loss.detach().sqrt()}

    def save_pretrained(self, folder):
        torch.save(self.state_dict(), Path(folder) / "weights.pt")


def batches(start: int, stage: Stage, delay: float = 0.0) -> Iterator[dict[str, torch.Tensor]]:
    number = start
    while True:
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(stage.batch_size, 4, generator=generator)
        yield {"x": x, "y": x[:, :2] * 2 + 1}
        time.sleep(delay)
        number += 1


def make_arguments(folder: Path, **changes) -> TrainerArguments:
    defaults = {
        "output_dir": str(folder), "max_steps": 20, "batch_size": 4, "image_sizes": "0:32,0.5:64", "warmup_steps": 3,
        "mixed_precision": "no", "cpu": True, "log_every": 4, "checkpoint_every": 5, "keep_checkpoints": 2,
        "learning_rate": 0.05, "ema_decay": 0.9,
    }  # fmt: skip
    return TrainerArguments(**(defaults | changes))


def train(folder: Path, evaluate=None, source=batches, **changes) -> dict:
    torch.manual_seed(0)
    return Trainer(Line(), source, make_arguments(folder, **changes), evaluate).train()


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def log(folder: Path, event: str) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == event]


def stop_after(count: int):
    """Batches that end the process's part of the run as SIGTERM would, while batch `count` is being made."""

    def source(start: int, stage: Stage):
        for number, batch in enumerate(batches(start, stage), start):
            if number == count:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGTERM)  # as under a launcher, which passes on what everyone gets
            yield batch

    return source


@pytest.fixture
def any_precision():
    """Accelerate keeps the precision that it was first told in a process."""
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


def bfloat16_takes(seconds: float, monkeypatch) -> None:
    """As a multiple of float32."""
    for module in ("machine", "training.precision"):
        monkeypatch.setattr(f"efficientsam_hf.{module}.relative_seconds", lambda *_: seconds)


@pytest.mark.parametrize(("seconds", "precision"), [(0.4, "bf16"), (1.5, "no")])
def test_a_run_keeps_the_precision_it_found(
    tmp_path, monkeypatch, any_precision, seconds: float, precision: str
) -> None:
    """Also on another machine, on which a new run would find another."""
    run = tmp_path / "run"
    bfloat16_takes(seconds, monkeypatch)
    train(run, max_steps=10, mixed_precision="auto")
    recorded = json.loads((run / "args.json").read_text())["arguments"]
    bfloat16_takes(1 / seconds, monkeypatch)
    shutil.rmtree(run / "model")
    train(run, max_steps=10, mixed_precision="auto", resume=True)
    assert recorded["mixed_precision"] == precision
    assert [line["mixed_precision"] for line in log(run, "start")] == [precision] * 2


def test_slow_bfloat16_is_named(tmp_path, monkeypatch, caplog, any_precision) -> None:
    """When it is asked for, and when a run goes on where it is slow."""
    bfloat16_takes(0.4, monkeypatch)
    train(tmp_path / "run", max_steps=1, mixed_precision="bf16")
    assert not caplog.text
    bfloat16_takes(30, monkeypatch)
    train(tmp_path / "run", max_steps=1, mixed_precision="auto", resume=True)
    assert "mixed_precision bf16: cpu emulates it" in caplog.text


def test_run_leaves_its_folder(tmp_path) -> None:
    summary = train(tmp_path / "run")
    run = tmp_path / "run"
    assert summary["steps"] == 20 and summary["images"] == 10 * 4 + 10 * 1 and summary["interrupted"] is None
    assert [path.name for path in list_checkpoints(run)] == ["step_15", "step_20"]
    names = {"args.json", "log.jsonl", "run.json", "checkpoints", "model", ".lock"}
    assert {path.name for path in run.iterdir()} == names
    record = json.loads((run / "args.json").read_text())
    assert record["arguments"]["learning_rate"] == 0.05 and record["machine"]["cores"] >= 1
    assert record["versions"]["torch"] == torch.__version__ and record["command"]
    losses = [line["loss"] for line in log(run, "train")]
    assert len(losses) == 5 and losses[-1] < 0.5 * losses[0]
    assert [line["image_size"] for line in log(run, "stage")] == [32, 64]


@pytest.mark.parametrize("stop", [3, 9, 16])
@pytest.mark.parametrize(("optimizer", "files"), [("adamw", 1), ("muon", 2)])
def test_resumed_run_ends_with_the_same_bits(tmp_path, stop, optimizer, files) -> None:
    train(tmp_path / "whole", optimizer=optimizer)
    summary = train(tmp_path / "parts", source=stop_after(stop), optimizer=optimizer)
    assert summary["interrupted"] == "SIGTERM" and summary["steps"] == stop + 1
    train(tmp_path / "parts", resume=True, optimizer=optimizer)
    for name, value in weights(tmp_path / "whole" / "model").items():
        assert torch.equal(value, weights(tmp_path / "parts" / "model")[name])
    whole, parts = (sorted((tmp_path / run / "checkpoints/step_20").glob("optimizer*")) for run in ("whole", "parts"))
    assert len(whole) == files
    for one, other in zip(whole, parts, strict=True):
        states = [load_tree(path)["state"].values() for path in (one, other)]
        for before, after in zip(*states, strict=True):
            assert all(torch.equal(before[name], after[name]) for name in before)


def test_other_data_gives_other_bits(tmp_path) -> None:
    """The comparison above can fail: a resumed run that repeats a batch ends elsewhere."""
    train(tmp_path / "whole")
    train(tmp_path / "shifted", source=lambda start, stage: batches(start + 1, stage))
    first, second = (weights(tmp_path / run / "model")["linear.weight"] for run in ("whole", "shifted"))
    assert not torch.equal(first, second)


class NoDropout(Line):
    def forward(self, batch):
        return {"loss": (self.linear(batch["x"]) - batch["y"]).square().mean()}


def train_without_dropout(folder: Path, source=batches, **changes) -> None:
    torch.manual_seed(0)
    Trainer(NoDropout(), source, make_arguments(folder, image_sizes="32", max_steps=6, **changes)).train()


def pieces(count: int, first: int, step: int):
    """Batches of 8 cut into `count` pieces: pieces first, first + step, ... of all of them in a row."""

    def source(start: int, stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(start, 10**9):
            batch, piece = divmod(first + number * step, count)
            whole = next(batches(batch, Stage(0.0, 32, 8)))
            yield {name: value.chunk(count)[piece] for name, value in whole.items()}

    return source


def test_accumulation_equals_a_larger_batch(tmp_path) -> None:
    train_without_dropout(tmp_path / "large", batch_size=8)
    train_without_dropout(tmp_path / "parts", pieces(4, 0, 1), batch_size=2, gradient_accumulation=4)
    large, parts = (weights(tmp_path / name / "model") for name in ("large", "parts"))
    for name, value in large.items():
        torch.testing.assert_close(value, parts[name], atol=1e-5, rtol=1e-5)
    assert log(tmp_path / "large", "end")[0]["images"] == log(tmp_path / "parts", "end")[0]["images"] == 48


def uneven_batches(count: int):
    """Batches of four images with one to three real objects each, cut into `count` pieces."""

    def source(start: int, stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
        for number in range(start, 10**9):
            batch, piece = divmod(number, count)
            halves = [example_batch(), example_batch()]
            whole = {name: torch.cat([half[name] for half in halves]) for name in ("pixel_values", "masks")}
            whole["object_mask"] = torch.tensor([[1, 0, 0], [1, 0, 0], [1, 1, 1], [1, 1, 0]], dtype=torch.bool)
            whole["masks"] = whole["masks"] & whole["object_mask"][..., None, None]
            whole["pixel_values"] = whole["pixel_values"].roll(batch, -1)
            yield {name: value.chunk(count)[piece] for name, value in whole.items()} | {"seed": torch.tensor(0)}

    return source


@pytest.mark.parametrize("rounds", [1, 2])
def test_every_object_counts_alike_in_whichever_batch_it_comes(tmp_path, monkeypatch, rounds: int) -> None:
    """Accumulation over batches of few and of many objects equals the batch of all of them."""
    # No chance in the prompts: boxes, and corrections that do not click.
    boxes = PromptSampling(
        uniform=0, center=0, box=1, box_and_point=0, box_noise=0, rounds=rounds, corrected_objects=1, mask_prompts=0
    )
    nowhere = lambda answer, cells, *args, **kwargs: (  # noqa: E731
        torch.zeros(*cells.shape[:2], 2), torch.full(cells.shape[:2], -1)
    )  # fmt: skip
    monkeypatch.setattr("efficientsam_hf.data.prompts.error_points", nowhere)
    for name, count in (("whole", 1), ("parts", 2)):
        module = InteractiveSegmentation(tiny_model(), sampling=boxes)
        settings = {"image_sizes": "64", "max_steps": 1, "batch_size": 4 // count, "gradient_accumulation": count}
        Trainer(module, uneven_batches(count), make_arguments(tmp_path / name, **settings, max_grad_norm=0)).train()
    whole, parts = (first_gradients(tmp_path / name) for name in ("whole", "parts"))
    assert len(whole) > 50
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-3)


def first_gradients(run: Path) -> list[torch.Tensor]:
    """Gradients of a run's first step, a tenth of each, as AdamW remembers them."""
    states = load_tree(run / "checkpoints/step_1/optimizer.safetensors")["state"].values()
    return [state["exp_avg"] for state in states]


TWO_PROCESSES = """
import os, sys
from pathlib import Path
from test_trainer import pieces, train_without_dropout
train_without_dropout(Path(sys.argv[1]), pieces(2, int(os.environ["RANK"]), 2), batch_size=4)
"""


RESUMED = """
import errno, os, signal, sys
from pathlib import Path
import torch
from test_segmentation_training import example_batch, tiny_model
from test_trainer import make_arguments
from efficientsam_hf.training.run_state import RunState
from efficientsam_hf.training.segmentation import InteractiveSegmentation
from efficientsam_hf.training.trainer import Trainer


def batches(start, stage):
    rank = torch.distributed.get_rank()
    for number in range(start, 10**9):
        yield example_batch(3 * number + rank)


def stopping(start, stage):
    for number, batch in enumerate(batches(start, stage), start):
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        yield batch


def run(name, source, **changes):
    torch.manual_seed(0)
    settings = {"image_sizes": "64", "batch_size": 2, "max_steps": 6, "checkpoint_every": 1, **changes}
    arguments = make_arguments(Path(sys.argv[1]) / name, **settings)
    Trainer(InteractiveSegmentation(tiny_model()), source, arguments).train()


run("whole", batches)
run("parts", stopping)
first = torch.distributed.get_rank() == 0
if first:
    os.truncate(Path(sys.argv[1]) / "parts/checkpoints/step_3/optimizer.safetensors", 1000)
torch.distributed.barrier()
run("parts", batches, resume=True)


def full(self, *arguments):
    if not first:
        raise OSError(errno.ENOSPC, "No space left on device")


RunState.write = full
try:
    run("full", batches)
    raise AssertionError("nobody noticed")
except OSError as error:
    assert "step_1 could not be written" in str(error) and "last good checkpoint is none" in str(error)
"""


def test_three_processes_resume_with_the_same_bits(tmp_path) -> None:
    """With two, sums have one order; with three it hangs on how DDP groups gradients, which a first step decides."""
    run_together(tmp_path, RESUMED, str(tmp_path), count=3)
    whole, parts = (
        EfficientSamModel.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "parts")
    )
    assert log(tmp_path / "parts", "resume")[0]["step"] == 2  # the third was damaged, of which the main process knows
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


def run_together(folder: Path, script: str, *arguments: str, count: int = 2) -> None:
    """Run a script in two processes, or more, that know of each other."""
    tests = Path(__file__).parent
    # On a busy machine torch's threads may abort an interpreter that ends (2 of 16 times); what is tested is over.
    leave = "\nimport os, torch\ntorch.distributed.barrier()\nos._exit(0)\n"
    (folder / "together.py").write_text(script + leave)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")])}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    command = [*launch, str(folder / "together.py"), *arguments]
    done = subprocess.run(command, env=environment | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]


def test_two_processes_equal_one_with_the_larger_batch(tmp_path) -> None:
    run_together(tmp_path, TWO_PROCESSES, str(tmp_path / "two"))
    train_without_dropout(tmp_path / "one", batch_size=8)
    one, two = (weights(tmp_path / name / "model") for name in ("one", "two"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-5)
    assert log(tmp_path / "one", "end")[0]["images"] == log(tmp_path / "two", "end")[0]["images"] == 48


FSDP = """
import os, signal, sys
from pathlib import Path
import accelerate
from accelerate.utils import DistributedType
from test_trainer import make_arguments, pieces, NoDropout
from efficientsam_hf.training import trainer

import torch


def accelerator(**options):
    # Accelerate turns FSDP on for processes with a GPU each alone, though torch's own works on CPUs.
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2, cpu_ram_efficient_loading=True, auto_wrap_policy="transformer_based_wrap"
    )
    if options["mixed_precision"] != "no":
        plugin.set_mixed_precision(options["mixed_precision"])
    result = accelerate.Accelerator(**options, fsdp_plugin=plugin)
    result.state.fsdp_plugin = plugin
    result.state.distributed_type = accelerate.PartialState().distributed_type = DistributedType.FSDP
    return result


trainer.Accelerator = accelerator
source = pieces(2, int(os.environ["RANK"]), 2)
seen = []


def stopping(start, stage):
    for number, batch in enumerate(source(start, stage), start):
        if number == 2:
            signal.raise_signal(signal.SIGTERM)
        yield batch


def evaluate(module):
    seen.append(module.linear.weight.clone())
    return {"miou": 0.5}


def run(folder, source=source, **changes):
    torch.manual_seed(0)
    settings = {"batch_size": 4, "image_sizes": "32", "max_steps": 6, "evaluate_every": 3, **changes}
    training = trainer.Trainer(NoDropout(), source, make_arguments(Path(folder), **settings), evaluate)
    assert [type(p).__name__ for p in training.module.parameters()] == ["DTensor"] * 2
    return training.train()


run(sys.argv[1])
assert type(seen[-1]) is torch.Tensor and seen[-1].shape == (2, 4)
assert run(sys.argv[1] + "_parts", stopping)["steps"] == 3
assert run(sys.argv[1] + "_parts", resume=True)["steps"] == 6
try:
    run(sys.argv[1] + "_muon", optimizer="muon")
    raise AssertionError("muon was taken")
except ValueError as error:
    assert "take adamw" in str(error)
assert not Path(sys.argv[1] + "_muon").exists()

# The model itself, in pieces, in half precision: metrics are not rounded to it, buffers and pictures work.
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule
from test_segmentation_training import example_batch, tiny_model
from efficientsam_hf.training.segmentation import InteractiveSegmentation

arguments = make_arguments(
    Path(sys.argv[1] + "_model"), batch_size=2, image_sizes="64", max_steps=2, gradient_accumulation=2,
    picture_every=1, mixed_precision="bf16",
)
AcceleratorState._reset_state()  # of another precision than the runs above
examples = lambda start, stage: (example_batch(number) for number in range(start, 10**6))
training = trainer.Trainer(InteractiveSegmentation(tiny_model()), examples, arguments)
assert sum(isinstance(module, FSDPModule) for module in training.module.modules()) > 2
assert training.train()["steps"] == 2
with training.accelerator.autocast():
    output = training.module(example_batch())
assert output["loss"].dtype == output["miou"].dtype == torch.float32
output["loss"].backward()
"""


def test_sharded_training_equals_one_process_and_resumes(tmp_path) -> None:
    run_together(tmp_path, FSDP, str(tmp_path / "two"))
    train_without_dropout(tmp_path / "one", batch_size=8)
    one, two, parts = (weights(tmp_path / name / "model") for name in ("one", "two", "two_parts"))
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], atol=1e-5, rtol=1e-5)
        assert type(two[name]) is torch.Tensor and torch.equal(two[name], parts[name])
    model = EfficientSamModel.from_pretrained(tmp_path / "two_model" / "model")
    moved = [not torch.equal(value, tiny_model().state_dict()[name]) for name, value in model.state_dict().items()]
    assert sum(moved) > 0.8 * len(moved)
    assert len(list((tmp_path / "two_model" / "pictures").iterdir())) == 2


def test_wall_clock_budget_ends_the_run_and_survives_resume(tmp_path) -> None:
    def slow(start, stage):
        return batches(start, stage, delay=0.05)

    minutes = 1.0 / 60
    summary = train(tmp_path / "run", source=slow, max_steps=None, max_minutes=minutes, log_every=1)
    lines = log(tmp_path / "run", "train")
    assert 0 < summary["steps"] < 25 and lines[-1]["progress"] == 1
    assert lines[-1]["learning_rate"] < 0.2 * max(line["learning_rate"] for line in lines)
    again = train(tmp_path / "run", source=slow, max_steps=None, max_minutes=minutes, resume=True)
    assert again["steps"] == summary["steps"]  # its time was used up already


def test_evaluation_sees_averaged_weights_and_keeps_the_best(tmp_path) -> None:
    values = iter([0.1, 0.9, 0.3, 0.2])
    seen = []

    def evaluate(module):
        torch.rand(7)  # must not disturb the training
        assert not module.training and not torch.is_grad_enabled()
        seen.append(module.linear.weight.clone())
        return {"miou": next(values)}

    summary = train(tmp_path / "run", evaluate, evaluate_every=5, checkpoint_every=4, keep_checkpoints=1)
    assert summary["best"] == {"step": 10, "metric": "miou", "value": 0.9}
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_10", "step_20"]
    train(tmp_path / "quiet")
    final = weights(tmp_path / "run" / "model")
    assert torch.equal(final["linear.weight"], weights(tmp_path / "quiet" / "model")["linear.weight"])
    assert torch.equal(seen[-1], final["linear.weight"])
    raw = load_tree(tmp_path / "run/checkpoints/step_20/optimizer.safetensors")
    assert len(raw["param_groups"]) == 2


def test_the_model_of_the_best_evaluation_is_kept(tmp_path) -> None:
    values, seen = iter([0.1, 0.9, 0.3, 0.2]), []

    def evaluate(module):
        seen.append(module.linear.weight.clone())
        return {"miou": next(values)}

    train(tmp_path / "run", evaluate, evaluate_every=5)
    assert torch.equal(weights(tmp_path / "run" / "best_model")["linear.weight"], seen[1])
    assert not torch.equal(seen[1], seen[3])


def test_a_kill_between_best_model_and_its_checkpoint_leaves_them_agreeing(tmp_path, monkeypatch) -> None:
    """The best model says itself of which evaluation it is, and the run goes on from what it says."""
    run = tmp_path / "run"

    class Killed(BaseException):
        pass

    save = Trainer._save

    def killed(self):
        if self.best is not None and self.best["step"] == 10:
            raise Killed
        save(self)

    def evaluate(values):
        return lambda module: {"miou": next(values)}

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Trainer, "_save", killed)
        train(run, evaluate(iter([0.1, 0.9])), evaluate_every=5, checkpoint_every=4)
    assert [path.name for path in list_checkpoints(run)][-1] == "step_8"
    best = weights(run / "best_model")["linear.weight"]
    summary = train(run, evaluate(iter([0.8, 0.3, 0.2])), evaluate_every=5, checkpoint_every=4, resume=True)
    assert summary["best"] == {"step": 10, "metric": "miou", "value": 0.9}
    assert torch.equal(weights(run / "best_model")["linear.weight"], best)
    assert json.loads((run / "best_model/best.json").read_text())["images"] == 10 * 4


def test_a_run_that_was_killed_in_its_first_moment_can_begin_again(tmp_path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / ".partial-1-args.json").write_text("{")
    assert train(tmp_path / "run")["steps"] == 20


class Parts(Line):
    """Has a number of a part of the data in every second batch, and one of all data that is not always one."""

    calls = 0

    def forward(self, batch):
        self.calls += 1
        part, odd = torch.tensor([torch.nan, float(self.calls)]), self.calls % 2
        return super().forward(batch) | {"part/odd": part[odd], "part/none": part[0], "whole": part[odd]}


def test_a_part_of_the_data_counts_where_there_is_some_of_it(tmp_path: Path) -> None:
    """A number of the part is not lost by the batches without it; a number of all data that is lost is not hidden."""
    Trainer(Parts(), batches, make_arguments(tmp_path, max_steps=4, gradient_accumulation=2)).train()
    (line,) = log(tmp_path, "train")
    assert line["part/odd"] == (1 + 3 + 5 + 7) / 4 and line["part/none"] is None and line["whole"] is None
    assert line["loss"] > 0


def test_a_torn_line_of_the_log_costs_that_line(tmp_path) -> None:
    train(tmp_path / "run", max_steps=4)
    path = tmp_path / "run" / "log.jsonl"
    with path.open("a") as file:
        file.write('{"event": "skipped", "sample": 3, "rea')
    run_log = RunLog(path)
    run_log("skipped", sample=5)
    run_log("skipped", sample=5)
    assert run_log.count_skipped() == 1
    lines = path.read_text().splitlines()
    assert [json.loads(line)["sample"] for line in lines[-2:]] == [5, 5]


def test_a_last_evaluation_that_fails_costs_nothing(tmp_path) -> None:
    def evaluate(module):
        raise ValueError("7.png is not a picture")

    with pytest.raises(ValueError, match=r"7\.png"):
        train(tmp_path / "run", evaluate, checkpoint_every=None)
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_20"]
    summary = train(tmp_path / "run", lambda module: {"miou": 0.5}, checkpoint_every=None, resume=True)
    assert summary["best"] == {"step": 20, "metric": "miou", "value": 0.5}
    state = json.loads((tmp_path / "run/checkpoints/step_20/trainer_state.json").read_text())
    assert state["best"] == summary["best"]


def test_a_signal_while_the_run_ends_does_not_cut_it_short(tmp_path) -> None:
    def evaluate(module):
        signal.raise_signal(signal.SIGTERM)
        return {"miou": 0.5}

    summary = train(tmp_path / "run", evaluate)
    assert summary["interrupted"] is None and summary["best"]["step"] == 20
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_resume_writes_the_model_that_a_full_disk_prevented(tmp_path) -> None:
    class Full(Line):
        def save_pretrained(self, folder):
            if (Path(folder).parent / "checkpoints" / "step_20").exists():
                raise OSError("No space left on device")
            super().save_pretrained(folder)

    torch.manual_seed(0)
    with pytest.raises(OSError, match="step_20"):
        Trainer(Full(), batches, make_arguments(tmp_path / "run")).train()
    train(tmp_path / "whole")
    expected = weights(tmp_path / "whole" / "model")["linear.weight"]
    assert not torch.equal(weights(tmp_path / "run" / "model")["linear.weight"], expected)
    train(tmp_path / "run", resume=True)
    assert torch.equal(weights(tmp_path / "run" / "model")["linear.weight"], expected)


def worker_batches(start: int, stage: Stage) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of a worker process, which gets the signal that this one gets at step 4, as batch systems send it."""
    make = partial(one_batch, stage=stage)
    for number, batch in enumerate(numbered_batches(make, start, workers=1), start):
        if number == 4:
            for child in multiprocessing.active_children():
                os.kill(child.pid, signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.5)
        yield batch


def one_batch(number: int, stage: Stage) -> dict[str, torch.Tensor]:
    return next(batches(number, stage))


def test_a_signal_to_every_process_lets_the_step_end(tmp_path) -> None:
    summary = train(tmp_path / "run", source=worker_batches)
    assert summary["interrupted"] == "SIGTERM" and summary["steps"] == 5
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_5"]
    train(tmp_path / "run", resume=True)
    train(tmp_path / "whole")
    one, two = (weights(tmp_path / name / "model")["linear.weight"] for name in ("run", "whole"))
    assert torch.equal(one, two)


def test_missing_best_metric_is_named(tmp_path) -> None:
    with pytest.raises(ValueError, match="best_metric 'miou' is none of box"):
        train(tmp_path / "run", lambda module: {"box": 1.0}, evaluate_every=2)


def test_nonfinite_loss_stops_the_run_and_changes_nothing(tmp_path) -> None:
    module = Line()
    module.poison = True
    before = {name: value.clone() for name, value in module.state_dict().items()}
    with pytest.raises(FloatingPointError, match="not finite for 3 steps in a row"):
        Trainer(module, batches, make_arguments(tmp_path / "run", max_nonfinite=3)).train()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_half_precision_that_cannot_be_had_is_refused(tmp_path) -> None:
    """Accelerate would compute in float32 without a word. In a process of its own: Accelerate has one precision."""
    script = "from test_trainer import *; train(Path(sys.argv[1]), mixed_precision='fp16')"
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")])}
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "ValueError: mixed_precision fp16 needs a GPU, got cpu: take bf16 or no" in done.stderr
    assert not (tmp_path / "run").exists()


def test_picture_is_written(tmp_path) -> None:
    from PIL import Image

    class Painter(Line):
        def picture(self, batch):
            return Image.new("RGB", (8, 8))

    Trainer(Painter(), batches, make_arguments(tmp_path / "run", picture_every=10)).train()
    assert [path.name for path in sorted((tmp_path / "run/pictures").iterdir())] == [
        "step_000010.png",
        "step_000020.png",
    ]


def test_run_folders_are_not_overwritten(tmp_path) -> None:
    open_run(make_arguments(tmp_path / "run"))
    with pytest.raises(ValueError, match="already holds a run"):
        open_run(make_arguments(tmp_path / "run"))
    with pytest.raises(ValueError, match="learning_rate was 0.05 and is 0.1"):
        open_run(make_arguments(tmp_path / "run", resume=True, learning_rate=0.1))
    assert open_run(make_arguments(tmp_path / "run", resume=True, log_every=1)) == tmp_path / "run"
    record = json.loads((tmp_path / "run" / "args.json").read_text())
    del record["arguments"]["optimizer"]  # as a run of a version that did not have the argument yet
    (tmp_path / "run" / "args.json").write_text(json.dumps(record))
    assert open_run(make_arguments(tmp_path / "run", resume=True)) == tmp_path / "run"
    with pytest.raises(ValueError, match="optimizer was 'adamw' and is 'muon'"):
        open_run(make_arguments(tmp_path / "run", resume=True, optimizer="muon"))
    with pytest.raises(ValueError, match="there is no run in .*absent"):
        open_run(make_arguments(tmp_path / "absent", resume=True))
    assert not (tmp_path / "absent").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="no run folder"):
        open_run(make_arguments(tmp_path / "other"))


def test_a_full_disk_is_seen_before_the_run(tmp_path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    # 10 weights: four checkpoints of 4 numbers each, of 4 bytes, and the model three times
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10 * 4 * 4 * 4 + 10 * 4 * 3 - 1))
    with pytest.raises(OSError, match="output_dir: the run needs .* for its checkpoints"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=10 * 4 * 4 * 4 + 10 * 4 * 3))
    train(tmp_path / "run")


FULL = """
import resource, sys
from pathlib import Path
from test_trainer import train
try:
    # No file may be longer than a few bytes once training has begun: as on a disk that is full.
    def source(start, stage):
        from test_trainer import batches
        for number, batch in enumerate(batches(start, stage), start):
            if number == 7:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
            yield batch
    import signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    train(Path(sys.argv[1]), source=source, log_every=100)
except OSError as error:
    print(error)
"""


def test_a_disk_that_fills_up_leaves_the_last_checkpoint(tmp_path) -> None:
    """What cannot be written is the first file of the second checkpoint, by the writer of safetensors."""
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")])}
    command = [sys.executable, "-c", FULL, str(tmp_path / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "step_10 could not be written" in done.stdout, done.stderr
    assert "last good checkpoint is" in done.stdout and "step_5; the run goes on" in done.stdout
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_5"]
    assert train(tmp_path / "run", resume=True)["steps"] == 20
    train(tmp_path / "whole")
    whole, parts = (weights(tmp_path / name / "model") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 660160 vs 660048"), True),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (OSError(errno.EIO, "Input/output error"), True),
        (RuntimeError("CUDA out of memory"), False),
    ],
)
def test_only_errors_of_writing_are_called_so(tmp_path, monkeypatch, error, named) -> None:
    def fail(*args, **options):
        raise error

    monkeypatch.setattr(Trainer, "_export", lambda self: None)
    training = Trainer(Line(), batches, make_arguments(tmp_path / "run"))
    monkeypatch.setattr(training.state, "write", fail)
    with pytest.raises(OSError if named else RuntimeError, match="step_5 could not be written" if named else "memory"):
        training.train()


def test_what_was_left_behind_makes_room(tmp_path, monkeypatch) -> None:
    train(tmp_path / "run")
    leftover = tmp_path / "run" / "checkpoints" / ".partial-step_25"
    leftover.mkdir()
    usage = shutil.disk_usage(tmp_path)
    free = {True: 0, False: 10**9}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=free[leftover.exists()]))
    assert train(tmp_path / "run", resume=True)["steps"] == 20
    assert not leftover.exists()


def test_another_kind_of_distribution_is_refused(tmp_path) -> None:
    train(tmp_path / "run")
    update_manifest(tmp_path / "run" / "checkpoints" / "step_20", {"distributed": "FSDP"})
    with pytest.raises(ValueError, match="was written under FSDP, and this is NO"):
        train(tmp_path / "run", resume=True)


def test_average_follows_its_formula_and_comes_and_goes() -> None:
    module = nn.Linear(1, 1, bias=False)
    average = WeightAverage(module, decay=0.5)
    expected = module.weight.item()
    for value in (1.0, 2.0, 4.0):
        module.weight.data.fill_(value)
        average.update()
        decay = min(0.5, (1 + average.updates) / (10 + average.updates))
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        assert module.weight.item() == pytest.approx(expected)
    assert module.weight.item() == 4.0


def test_stages() -> None:
    stages = parse_stages("0:256,0.5:512,0.9:1024x2", 16)
    assert stages == (Stage(0.0, 256, 16), Stage(0.5, 512, 4), Stage(0.9, 1024, 2))
    assert [stage_at(stages, progress).image_size for progress in (0, 0.49, 0.5, 1.0)] == [256, 256, 512, 1024]
    assert parse_stages("64", 3) == (Stage(0.0, 64, 3),)


@pytest.mark.parametrize("text", ["", "abc", "0.5:256", "0:256,0:512", "0:250", "0:256,1.0:512", "256x", "0:256x0"])
def test_bad_stages_are_named(text) -> None:
    with pytest.raises(ValueError, match="image_sizes"):
        parse_stages(text, 4)


def test_schedules() -> None:
    assert run_progress(10, 100, 30.0, 1.0) == 0.5 and run_progress(80, 100, 30.0, None) == 0.8
    assert run_progress(0, None, 90.0, 1.0) == 1.0
    assert learning_rate_factor("cosine", 0, 10, 0.0, 0.0) == pytest.approx(0.1)
    assert learning_rate_factor("cosine", 99, 10, 0.5, 0.0) == pytest.approx(0.5)
    assert learning_rate_factor("linear", 99, 10, 1.0, 0.1) == pytest.approx(0.1)
    assert learning_rate_factor("constant", 99, 0, 0.7, 0.0) == 1
    assert [decay_progress(p, 20, 100) for p in (0.1, 0.2, 0.6, 1.0)] == pytest.approx([0, 0, 0.5, 1])
    assert decay_progress(0.3, 20, None) == decay_progress(0.3, 20, 10) == 0.3


def test_due() -> None:
    due = Due(3, 1.0)
    assert [due(step, elapsed) for step, elapsed in ((1, 10), (2, 60), (3, 70), (4, 125), (5, 130))] == [
        False, True, True, False, True,
    ]  # fmt: skip
    assert not any(Due(None, None)(step, 1e6) for step in range(5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": ""}, "output_dir"),
        ({"max_steps": None}, "max_steps or max_minutes"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, constant, got 'step'"),
        ({"learning_rate": -1.0}, "learning_rate must be greater than 0, got -1.0"),
        ({"keep_checkpoints": 0}, "keep_checkpoints must be at least 1"),
        ({"ema_decay": 1.0}, "ema_decay"),
        ({"image_sizes": "100"}, "image_sizes"),
        ({"optimizer": "muon", "mixed_precision": "fp16"}, "mixed_precision fp16"),
    ],
)
def test_bad_arguments_are_named(tmp_path, changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        make_arguments(tmp_path, **changes)


def test_recipes_are_valid_and_flags_win() -> None:
    names = sorted(path.stem for path in (RECIPES / "finetune").glob("*.yaml"))
    assert {"smoke", "scenes_cpu", "scenes_gpu", "sa1b_ti", "sa1b_s"} <= set(names)
    for name in names:
        recipe = read_recipe(name, "finetune")
        mixture = read_mixture(yaml.safe_dump(recipe["train_mix"]), existing=False) if "train_mix" in recipe else []
        if mixture:  # whose photos are not here
            recipe["train_mix"] = [{"name": "scenes", "scenes": True}]
        data = {} if recipe.get("train_scenes") or mixture else {"train_sa1b": str(RECIPES)}
        arguments = build_arguments(FinetuneArguments, recipe, {"output_dir": "x", "learning_rate": 0.5, **data})
        assert arguments.learning_rate == 0.5
        for source in mixture:
            arguments.augmentation(source), arguments.object_areas(source)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"learning_rat": 1}, "unknown names learning_rat"),
        ({"max_steps": "many"}, "max_steps must be of type int, got 'many'"),
        ({"max_steps": 1.5}, "max_steps must be of type int"),
        ({"train_scenes": "yes"}, "train_scenes must be of type bool"),
    ],
)
def test_bad_recipes_are_named(recipe, message) -> None:
    with pytest.raises(ValueError, match=message):
        build_arguments(FinetuneArguments, {"output_dir": "x", "max_steps": 1, "train_scenes": True} | recipe, {})


def test_recipe_values_are_read_as_their_fields_type() -> None:
    recipe = {"output_dir": "x", "max_steps": 1e3, "train_scenes": True, "learning_rate": "4e-4", "image_sizes": 256}
    arguments = build_arguments(FinetuneArguments, recipe, {})
    assert (arguments.max_steps, arguments.learning_rate, arguments.image_sizes) == (1000, 4e-4, "256")


def test_a_batch_size_that_would_be_ignored_is_refused() -> None:
    recipe = {"output_dir": "x", "max_steps": 1, "train_scenes": True, "image_sizes": "0:64x4,0.5:128x2"}
    with pytest.raises(ValueError, match="batch_size 2 has no effect beside image_sizes '0:64x4,0.5:128x2'"):
        build_arguments(FinetuneArguments, recipe, {"batch_size": 2})
    assert (
        build_arguments(FinetuneArguments, recipe, {"batch_size": 2, "image_sizes": "64"}).stages()[0].batch_size == 2
    )


def test_unknown_recipe_lists_the_known(tmp_path) -> None:
    with pytest.raises(ValueError, match="smoke"):
        read_recipe("smoek", "finetune")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(ValueError, match="mapping"):
        read_recipe(str(tmp_path / "list.yaml"), "finetune")


def test_transformers_parser_reads_the_arguments() -> None:
    from transformers import HfArgumentParser

    flags = ["--output_dir", "x", "--max_minutes", "2.5", "--train_scenes", "--schedule", "linear"]
    (arguments,) = HfArgumentParser(FinetuneArguments).parse_args_into_dataclasses(flags)
    assert arguments.max_minutes == 2.5 and arguments.train_scenes and arguments.schedule == "linear"


def test_trackers_get_the_numbers(tmp_path: Path) -> None:
    train(tmp_path / "run", lambda module: {"miou": 0.5}, evaluate_every=10, report_to="tensorboard")
    folder = tmp_path / "run" / "efficientsam"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "train/error", "train/learning_rate", "train/images_per_s"} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("evaluation/miou")] == [10, 20]
    logged = [line["loss"] for line in log(tmp_path / "run", "train")]
    assert [point.value for point in events.Scalars("train/loss")] == pytest.approx(logged, rel=1e-5)


@pytest.mark.parametrize("name", ["tensorbored", "tensorboard,comet_ml"])
def test_a_tracker_that_is_not_there_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match=f"report_to: {name.split(',')[-1]} cannot be used; .*tensorboard"):
        Trainer(Line(), batches, make_arguments(tmp_path / "run", report_to=name))
    assert not (tmp_path / "run").exists()
