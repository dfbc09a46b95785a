# SPDX-License-Identifier: Apache-2.0
"""A run folder is data: damage is named and passed over, nothing in it runs, and one process has it at a time."""

import errno
import io
import json
import os
import pickle
import platform
import re
import shutil
import signal
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from test_trainer import Line, batches, log, make_arguments, stop_after, train, weights

from efficientsam_hf import files
from efficientsam_hf.files import FolderInUseError, FolderLock
from efficientsam_hf.hub.run_record import read_run
from efficientsam_hf.training.checkpoints import list_checkpoints, read_manifest, update_manifest, write_manifest
from efficientsam_hf.training.run_state import OLD_AVERAGE, load_tree, save_tree
from efficientsam_hf.training.trainer import Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps with checkpoints at 15 and 20."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it without its model, which a resumed run has to write again."""
    shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    return tmp_path / "run"


def same(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same bits."""
    pair = [weights(folder / "model") for folder in (one, other)]
    return all(torch.equal(value, pair[1][name]) for name, value in pair[0].items())


# Damage


def halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 16
    path.write_bytes(content)


def with_nan(path: Path) -> None:
    """As written by something that computed it, so that sizes and checksums are right."""
    tensors = load_file(path)
    name = min(tensors)
    save_file({**tensors, name: torch.full_like(tensors[name], torch.nan)}, path, {"format": "pt"})
    state = read_manifest(path.parent)
    write_manifest(path.parent, {name: state[name] for name in state if name not in ("files", "sha256")})


def text(content: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(content)


BROKEN = {"halved": halve, "empty": empty, "flipped": flip, "gone": Path.unlink, "object": text("{}")}
NAMES = ["average.safetensors", "model.safetensors", "optimizer.safetensors", "random_states_0.safetensors"]
DAMAGES = [(name, kind) for name in [*NAMES, "trainer_state.json"] for kind in BROKEN]


def test_names_are_all_that_a_checkpoint_has(finished: Path) -> None:
    last = list_checkpoints(finished)[-1]
    assert sorted(path.name for path in last.iterdir()) == [*NAMES, "trainer_state.json"]
    manifest = read_manifest(last)
    assert sorted(manifest["files"]) == NAMES and manifest["step"] == 20
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["files"][NAMES[1]]["bytes"] == (last / NAMES[1]).stat().st_size


def expect_the_one_before(run: Path, finished: Path, caplog: pytest.LogCaptureFixture, words: str) -> None:
    train(run, resume=True)
    (line,) = [message for message in caplog.messages if message.startswith("resume: ")]
    assert "\n" not in line and re.search(words, line) and "the run goes on from step_15" in line
    assert log(run, "resume")[-1]["step"] == 15 and same(run, finished)
    assert [path.name for path in list_checkpoints(run)] == ["step_15", "step_20"]
    assert (run / "checkpoints" / "damaged_step_20").is_dir()  # nothing is lost that may still be of use


@pytest.mark.parametrize(("name", "kind"), DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(run, finished, caplog, name, kind) -> None:
    BROKEN[kind](run / "checkpoints" / "step_20" / name)
    expect_the_one_before(run, finished, caplog, f"step_20: .*{name}")


@pytest.mark.parametrize("content", ["[]", "null", '"text"', "{", "\x00", '{"step": 20}', "[" * 100_000, "NaN"])
def test_a_state_that_is_none(run, finished, caplog, content) -> None:
    text(content)(run / "checkpoints" / "step_20" / "trainer_state.json")
    expect_the_one_before(run, finished, caplog, "trainer_state.json")


@pytest.mark.parametrize("name", NAMES[:2])
def test_weights_that_are_not_numbers(run, finished, caplog, name) -> None:
    with_nan(run / "checkpoints" / "step_20" / name)
    expect_the_one_before(run, finished, caplog, f"{name} is damaged: .* is not finite")


@pytest.mark.parametrize(
    ("field", "value"),
    [("step", "20"), ("images", None), ("elapsed", -1), ("best", [1]), ("processes", 1.5),
     ("nonfinite", True), ("images", 10**400), ("best", {"step": 5, "metric": "miou", "value": "high"}),
     ("files", None), ("files", {"model.safetensors": 3, "average.safetensors": 4}), ("step", 25)],
)  # fmt: skip
def test_a_field_that_is_wrong_though_the_checksum_is_right(run, finished, caplog, field, value) -> None:
    update_manifest(run / "checkpoints" / "step_20", {field: value})
    expect_the_one_before(run, finished, caplog, "trainer_state.json|model.safetensors|average.safetensors")


def test_a_folder_with_the_name_of_another_step(run, finished, caplog) -> None:
    (run / "checkpoints" / "step_20").rename(run / "checkpoints" / "step_17")
    train(run, resume=True)
    assert "is of step 20, and the folder's name of another" in caplog.text and same(run, finished)


def test_folders_that_are_no_checkpoints_are_left_alone(run, finished) -> None:
    for name in ("step_20 (copy)", "step_", "step_9x", "step_-1"):
        shutil.copytree(run / "checkpoints" / "step_15", run / "checkpoints" / name)
    train(run, resume=True)
    assert log(run, "resume")[-1]["step"] == 20 and same(run, finished)
    assert (run / "checkpoints" / "step_20 (copy)").is_dir()


def test_without_a_whole_checkpoint_the_line_says_what_to_do(run) -> None:
    for folder in list_checkpoints(run):
        halve(folder / "optimizer.safetensors")
    with pytest.raises(
        ValueError, match=r"no checkpoint in .* is whole \(step_20: .*; step_15: .*--model .*run/model"
    ):
        train(run, resume=True)
    assert [path.name for path in list_checkpoints(run)] == ["step_15", "step_20"]


def test_a_checkpoint_of_another_model_is_named(run) -> None:
    class Wider(Line):
        def __init__(self):
            super().__init__()
            self.more = torch.nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"step_20 is not of this run: .*Move it away"):
        Trainer(Wider(), batches, make_arguments(run, resume=True)).train()


@pytest.mark.parametrize("content", ["", "{}", "[]", "3", '{"arguments": 3}', '{"arguments": ', "[" * 100_000])
def test_damaged_arguments_are_named(run, content) -> None:
    text(content)(run / "args.json")
    (run / "model").mkdir()
    (run / "model" / "config.json").touch()
    with pytest.raises(ValueError, match=r"args.json is damaged, .*--model .*run/model"):
        train(run, resume=True)
    with pytest.raises(ValueError, match=r"args\.json"):
        read_run(run)


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"step": 5, "metric": "miou", "value": "0.5"}'])
def test_a_damaged_best_model_is_named_and_passed_over(tmp_path, caplog, content) -> None:
    run = tmp_path / "run"
    train(run, lambda module: {"miou": 0.5}, evaluate_every=10)
    text(content)(run / "best_model" / "best.json")
    summary = train(run, lambda module: {"miou": 0.4}, evaluate_every=10, resume=True)
    assert "best.json" in caplog.text and summary["best"] == {"step": 10, "metric": "miou", "value": 0.5}


def test_an_evaluation_without_a_value_is_no_best(tmp_path) -> None:
    values = iter([float("nan"), 0.3, float("nan")])
    summary = train(tmp_path / "run", lambda module: {"miou": next(values)}, evaluate_every=5, max_steps=15)
    assert summary["best"] == {"step": 10, "metric": "miou", "value": 0.3}


def test_a_damaged_log_costs_its_lines(run) -> None:
    with (run / "log.jsonl").open("ab") as file:
        file.write(b'{"event": "skipped", "sa\n\xff\xfe\n[]\n{"event": 3}\n{"event": "skipped", "sample": 3}\n')
    assert train(run, resume=True)["skipped"] == 1


def test_trees_come_back(tmp_path) -> None:
    tree = {"a": [1, 2.5, None, "x", True], 3: {"b": torch.arange(3), "c": []}, "d": torch.tensor(0.5)}
    save_tree(tmp_path / "tree", tree)
    back = load_tree(tmp_path / "tree")
    assert back["a"] == tree["a"] and back[3]["c"] == [] and torch.equal(back[3]["b"], tree[3]["b"])
    assert back["d"].shape == () and list(back) == ["a", 3, "d"]


# Code


class Bomb:
    """A pickle that leaves a file behind where it is opened as one."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def bombs(mark: Path) -> list[bytes]:
    """A plain pickle, and one in torch's archive."""
    archive = io.BytesIO()
    torch.save(Bomb(mark), archive)
    return [pickle.dumps(Bomb(mark)), archive.getvalue()]


def test_the_bomb_goes_off_where_pickles_are_opened(tmp_path) -> None:
    for number, content in enumerate(bombs(tmp_path / "mark")):
        torch.load(io.BytesIO(content), weights_only=False) if number else pickle.loads(content)
        (tmp_path / "mark").rmdir()


OTHER_NAMES = ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl", "scaler.pt", "pytorch_model.bin"]


OLD_NAMES = [f"old/{name}" for name in OTHER_NAMES]
BOMBED = [(name, 0) for name in [*NAMES, "trainer_state.json", *OTHER_NAMES, *OLD_NAMES]]


@pytest.mark.parametrize(("name", "number"), [*BOMBED, *((name, 1) for name in OLD_NAMES)])
def test_nothing_in_a_checkpoint_runs(run, tmp_path, name, number) -> None:
    """Under names of ours and of earlier versions, with a manifest that knows of it and with none."""
    for folder in list_checkpoints(run):
        manifest = read_manifest(folder)
        (folder / Path(name).name).write_bytes(bombs(tmp_path / "mark")[number])
        state = {key: manifest[key] for key in manifest if key not in ("files", "sha256", "versions")}
        if name.startswith("old/"):
            (folder / OLD_AVERAGE).touch()
            (folder / "trainer_state.json").write_text(json.dumps(state))
        elif name != "trainer_state.json":
            write_manifest(folder, state)
    try:
        train(run, resume=True)
    except ValueError as error:
        assert "no checkpoint in" in str(error) or "is not of this run" in str(error)
    assert not (tmp_path / "mark").exists()


def test_nothing_beside_the_checkpoints_runs(run, finished, tmp_path) -> None:
    for path in [*run.iterdir(), run / "best_model" / "best.json", run / "run.json"]:
        if path.name in ("checkpoints", ".lock"):
            continue
        for content in bombs(tmp_path / "mark"):
            shutil.rmtree(run)
            shutil.copytree(finished, run)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
            for reader in (lambda: train(run, resume=True), lambda: read_run(run), lambda: read_run(run, best=True)):
                try:
                    reader()
                except (ValueError, OSError) as error:
                    assert str(run) in str(error)
            assert not (tmp_path / "mark").exists()


# Checkpoints of earlier versions


def write_as_before(run: Path) -> None:
    """The last checkpoint as Accelerate wrote it for earlier versions of this package."""
    folder = list_checkpoints(run)[-1]
    module = Line()
    optimizer = torch.optim.AdamW(
        [{"params": [p], "weight_decay": 0.1, "lr_scale": 1.0} for p in module.parameters()], fused=True
    )
    state = read_manifest(folder)
    module.load_state_dict(load_file(folder / "model.safetensors"))
    averages = load_tree(folder / "average.safetensors")
    optimizer.load_state_dict(load_tree(folder / "optimizer.safetensors"))
    random = load_tree(folder / "random_states_0.safetensors")
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(module, optimizer)
    for path in folder.iterdir():
        path.unlink()
    before = torch.get_rng_state()
    torch.set_rng_state(random["torch"])
    accelerator._models, accelerator._optimizers = [prepared[0]], [prepared[1]]
    accelerator.save_state(str(folder), safe_serialization=True)
    torch.set_rng_state(before)
    torch.save(averages, folder / OLD_AVERAGE)
    names = ("step", "images", "elapsed", "best", "nonfinite", "processes")
    (folder / "trainer_state.json").write_text(json.dumps({name: state[name] for name in names}))


def test_a_run_of_an_earlier_version_goes_on_with_the_same_bits(tmp_path, finished) -> None:
    run = tmp_path / "run"
    train(run, source=stop_after(7))
    write_as_before(run)
    assert (list_checkpoints(run)[-1] / "optimizer.bin").is_file()
    train(run, resume=True)
    assert log(run, "resume")[-1]["step"] == 8 and same(run, finished)


@pytest.mark.parametrize("name", ["custom_checkpoint_0.pkl", "optimizer.bin", "random_states_0.pkl"])
def test_an_earlier_versions_checkpoint_is_checked_too(tmp_path, caplog, finished, name) -> None:
    run = tmp_path / "run"
    train(run, source=stop_after(7))
    write_as_before(run)
    halve(list_checkpoints(run)[-1] / name)
    train(run, resume=True)
    assert f"{name} is damaged" in caplog.text and same(run, finished)


@pytest.mark.parametrize(
    "content", [[], {}, {"averages": 3}, {"averages": [3]}, {"averages": [torch.tensor(torch.nan)]}]
)
def test_averages_of_an_earlier_version_that_are_none(tmp_path, caplog, finished, content) -> None:
    run = tmp_path / "run"
    train(run, source=stop_after(7))
    write_as_before(run)
    torch.save(content, list_checkpoints(run)[-1] / OLD_AVERAGE)
    train(run, resume=True)
    assert f"{OLD_AVERAGE} is damaged: it does not hold finite averages" in caplog.text and same(run, finished)


# A full disk

NO_ROOM = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 660160 vs 660048"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
]


class Painter(Line):
    def picture(self, batch):
        return Image.new("RGB", (8, 8))


WRITES = {
    "weights": "efficientsam_hf.training.run_state.save_file",
    "optimiser": "efficientsam_hf.training.run_state.save_tree",
    "manifest": "efficientsam_hf.training.checkpoints.write_json",
    "model": "test_trainer.Line.save_pretrained",
    "picture": "PIL.Image.Image.save",
    "log": "efficientsam_hf.training.run_folder.RunLog._ends_torn",
    "folder": "efficientsam_hf.files.os.replace",
}


@pytest.mark.parametrize(
    ("kind", "error"), [*((kind, NO_ROOM[0]) for kind in WRITES), *(("weights", error) for error in NO_ROOM[1:])]
)
def test_a_disk_that_is_full_is_one_line_and_costs_nothing(tmp_path, monkeypatch, finished, kind, error) -> None:
    run = tmp_path / "run"

    def full(*args, **options):
        raise error

    def source(start, stage):
        for number, batch in enumerate(batches(start, stage), start):
            if number == 7:
                monkeypatch.setattr(WRITES[kind], full)
            yield batch

    def go(source=batches, **changes):
        torch.manual_seed(0)
        return Trainer(Painter(), source, make_arguments(run, picture_every=6, **changes)).train()

    with pytest.raises(OSError, match=r"could not be written, with [\d,]+ MiB free") as caught:
        go(source)
    monkeypatch.undo()
    message = str(caught.value)
    assert re.search(
        r"The last good checkpoint is \S+step_(5|10); the run goes on from it with --resume once", message
    )
    assert "\n" not in message and not list(run.rglob(".partial-*"))
    assert go(resume=True)["steps"] == 20 and same(run, finished)


def test_what_a_full_disk_says_is_known_in_one_place() -> None:
    chained = ValueError("no such thing")
    chained.__cause__ = NO_ROOM[0]
    assert all(files.is_disk_full(error) for error in [*NO_ROOM, chained])
    others = [
        OSError(errno.EIO, "Input/output error"),
        RuntimeError("CUDA out of memory"),
        ValueError("os error 2"),
        None,
    ]
    assert not any(files.is_disk_full(error) for error in others)


# One process at a time


def test_a_run_that_another_process_has_is_refused(run, tmp_path, hold, finished) -> None:
    """Whether it goes on or begins; and a lock that a killed process has left holds nobody up."""
    new = tmp_path / "new"
    new.mkdir()
    process = hold(run, new)
    (run / "checkpoints" / ".partial-step_25").mkdir()  # what the other one is writing
    words = f"is in use by process {process.pid} on {platform.node()}"
    with pytest.raises(FolderInUseError, match=words):
        train(run, resume=True)
    with pytest.raises(FolderInUseError, match=words):
        train(new)
    assert (run / "checkpoints" / ".partial-step_25").is_dir() and not (new / "args.json").exists()
    process.kill()
    process.wait()
    assert (run / ".lock.json").is_file()
    assert train(run, resume=True)["steps"] == 20 and same(run, finished)
    assert train(new)["steps"] == 20 and not (new / ".lock.json").exists()


def test_a_run_is_free_again_when_it_ends_or_fails(tmp_path) -> None:
    def evaluate(module):
        raise ValueError("7.png is not a picture")

    with pytest.raises(ValueError, match=r"7\.png"):
        train(tmp_path / "run", evaluate)
    with FolderLock(tmp_path / "run"):
        pass
    assert not (tmp_path / "run" / ".lock.json").exists()


def test_a_disk_without_locks_is_no_reason_to_stop(tmp_path, monkeypatch, caplog) -> None:
    def none(self, **options):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.FileLock, "acquire", none)
    with FolderLock(tmp_path):
        pass
    assert "this disk has no locks" in caplog.text


# Signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_signals_let_the_run_be_saved(tmp_path, finished, not_ignored, name) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)

    def source(start, stage):
        for count, batch in enumerate(batches(start, stage), start):
            if count == 7:
                signal.raise_signal(number)
            yield batch

    summary = train(tmp_path / "run", source=source)
    assert summary["interrupted"] == name and summary["steps"] == 8 and signal.getsignal(number) is before
    train(tmp_path / "run", resume=True)
    assert same(tmp_path / "run", finished)


def test_a_signal_that_is_ignored_stays_ignored(tmp_path) -> None:
    """As nohup has it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        summary = train(tmp_path / "run", lambda module: signal.raise_signal(signal.SIGHUP) or {"miou": 0.5})
    finally:
        signal.signal(signal.SIGHUP, before)
    assert summary["interrupted"] is None and summary["steps"] == 20


def test_a_second_interrupt_does_not_wait(tmp_path, finished) -> None:
    def source(start, stage):
        for number, batch in enumerate(batches(start, stage), start):
            if number == 7:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            yield batch

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", source=source)
    assert signal.getsignal(signal.SIGINT) is before
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step_5"]
    train(tmp_path / "run", resume=True)
    assert same(tmp_path / "run", finished)


HANG_UP = """
import os, sys
from pathlib import Path
from test_trainer import Line, Trainer, batches, make_arguments
import torch
torch.manual_seed(0)
slow = lambda start, stage: batches(start, stage, delay=0.1)
summary = Trainer(Line(), slow, make_arguments(Path(sys.argv[1]))).train()
from efficientsam_hf.cli.running import say
say("who reads this?")
say("or this?", error=True)
os._exit(0 if summary["interrupted"] == "SIGHUP" else 3)
"""


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a terminal")
def test_a_closed_terminal_does_not_keep_a_run_from_being_saved(tmp_path, finished, not_ignored) -> None:
    """It sends SIGHUP, and takes no more of what is written to it."""
    import fcntl
    import termios

    ours, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    tests = Path(__file__).parent
    process = subprocess.Popen(
        [sys.executable, "-c", HANG_UP, str(tmp_path / "run")], stdin=its, stdout=its, stderr=its,
        start_new_session=True, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tests), str(tests.parent / "src")])},
    )  # fmt: skip
    os.close(its)
    shown = b""
    try:
        while b"step=4" not in shown:  # a line of the progress bar
            shown += os.read(ours, 1000)
    finally:
        os.close(ours)
        code = process.wait()
    assert code == 0, shown
    assert log(tmp_path / "run", "end")[0]["interrupted"] == "SIGHUP"
    train(tmp_path / "run", resume=True)
    assert same(tmp_path / "run", finished)
