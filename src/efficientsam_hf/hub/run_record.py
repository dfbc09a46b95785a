# SPDX-License-Identifier: Apache-2.0
"""What a run folder and files of measurements say, without where a machine keeps its files."""

import re
import shlex
import statistics
from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from typing import Any

from ..data.mixture import MixtureSource, read_mixture, write_mixture
from ..files import read_json, read_json_lines


USER_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")
PATH_INSIDE = re.compile(r"(?<=[\s\"':=,])/(?:[^\s/\"',{}]+/)+[^\s/\"',{}]+")
CURVE_ROWS = 6
CURVE_NAMES = ("loss", "miou", "best_miou", "masked_error", "visible_error", "cosine")
PROMPTS = {
    "center": "click in the centre",
    "uniform": "click anywhere",
    "box": "tight box",
    "noisy_box": "box with noise (10 % of its sides)",
}


@dataclass
class RunRecord:
    """What a run folder says about the model in it."""

    folder: Path
    model: Path  # the folder of the weights
    description: dict[str, Any]  # args.json
    progress: dict[str, Any]  # steps, images, minutes of training behind the saved weights
    curve: list[dict[str, Any]]  # lines "train" of the log up to there
    evaluation: dict[str, Any] | None  # the last line "evaluation" up to there

    @property
    def arguments(self) -> dict[str, Any]:
        return self.description["arguments"]

    @property
    def sources(self) -> list[MixtureSource]:
        """Sources of the mixture that the run trained on, without where they lie; none if it was no mixture."""
        text = self.arguments.get("train_mix")
        return _private_sources(text) if text else []


def read_run(folder: Path, best: bool = False) -> RunRecord:
    """Read a run folder, up to its last or, with `best`, its best model.

    Raises `FileNotFoundError` or `ValueError` that says what is missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"run {str(folder)!r} is not a folder")
    model = folder / ("best_model" if best else "model")
    for name in ("args.json", f"{model.name}/config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"run {str(folder)!r} has no {name}: it is no run folder, or has saved no model yet"
            )
    kinds = {"arguments": dict, "command": str, "machine": dict, "started": str}
    description = _read_json(folder / "args.json", "run", kinds)
    for name, kind in kinds.items():
        if not isinstance(description[name], kind):
            raise ValueError(f"run: {folder / 'args.json'} is damaged: {name} is {str(description[name])[:100]!r}")
    progress = _read_progress(folder, best)
    events = [line for line in _read_log(folder / "log.jsonl") if line.get("step", 0) <= progress["steps"]]
    evaluations = [line for line in events if line["event"] == "evaluation"]
    curve = [line for line in events if line["event"] == "train" and "loss" in line]
    return RunRecord(folder, model, description, progress, curve, evaluations[-1] if evaluations else None)


def _read_progress(folder: Path, best: bool) -> dict[str, Any]:
    """Steps, images and minutes behind model/, which is written with every checkpoint; run.json is, at the end.

    The best model holds them itself; for one of an older run there is its checkpoint, kept beside the last ones.
    """
    if best and (record := folder / "best_model" / "best.json").is_file():
        return _progress(_read_numbers(record, ("step", "images", "elapsed")))
    paths = folder.glob("checkpoints/step_*/trainer_state.json")
    states = [_read_numbers(path, ("step", "images", "elapsed")) for path in paths]
    by_step = {state["step"]: state for state in states}
    step = max(by_step, default=None)
    if best:
        found = by_step[step].get("best") if step is not None else None
        step = found.get("step") if isinstance(found, dict) else None
        if step not in by_step:
            raise FileNotFoundError(f"run {str(folder)!r} has no checkpoint of its best model, of step {step}")
    if step is not None:
        return _progress(by_step[step])
    if (folder / "run.json").is_file():
        summary = _read_numbers(folder / "run.json", ("steps", "images", "minutes"))
        return {name: summary[name] for name in ("steps", "images", "minutes")}
    raise FileNotFoundError(f"run {str(folder)!r} has neither a checkpoint nor run.json: how far it got is unknown")


def _progress(state: dict[str, Any]) -> dict[str, Any]:
    return {"steps": state["step"], "images": state["images"], "minutes": state["elapsed"] / 60}


def _read_numbers(path: Path, names: Iterable[str]) -> dict[str, Any]:
    """A JSON object of a run; ValueError unless it has these numbers, none of which can be negative."""
    content = _read_json(path, "run", names)
    for name in names:
        if not is_number(content[name]) or not 0 <= content[name] < 2**63:
            raise ValueError(f"run: {path} is damaged: {name} is {str(content[name])[:100]!r}, expected a count")
    return content


def is_number(value: Any) -> bool:
    """Whether a value of a JSON file is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of log.jsonl in order of steps; those that a resumed run took back are left out."""
    lines: list[dict[str, Any]] = []
    for line in read_json_lines(path):
        if not isinstance(line.get("event"), str) or not is_number(line.get("step", 0)):
            continue
        if line["event"] == "resume":
            lines = [earlier for earlier in lines if earlier.get("step", 0) <= line.get("step", 0)]
        lines.append(line)
    return lines


def read_speed(path: Path) -> dict[str, Any]:
    """Read what `efficientsam benchmark --output` wrote; `ValueError` if it is something else."""
    if not path.is_file():
        raise FileNotFoundError(f"speed {str(path)!r} is not a file")
    record = _read_json(path, "speed", ("rows", "command", "date", "machine", "dtype"))
    return shorten_paths(record)


def read_evaluation(path: Path, revisions: Collection[str]) -> dict[str, Any]:
    """Read what `efficientsam evaluate --output` wrote and give the data set a name; `ValueError` if it is another.

    `revisions` are those that the model can have been evaluated as (`identity.model_revision`): of several models in
    the file the one that has one of them counts, and numbers of another model are an error.
    """
    if not path.is_file():
        raise FileNotFoundError(f"metrics {str(path)!r} is not a file")
    record = _read_json(path, "metrics", ())
    record = _evaluation_of(path, record.get("models", [record]), revisions)
    _require(record, path, "metrics", ("metrics", "command", "date", "machine", "dtype"))
    if not prompts_of(record["metrics"]):
        raise ValueError(f"metrics {str(path)!r} has none of the prompts {', '.join(PROMPTS)}")
    annotations = option(record["command"], "--annotations")
    scenes = "generated scenes" if option(record["command"], "--scenes") else path.name
    dataset = last_parts(annotations).removesuffix(".json") if annotations else scenes
    return {"dataset": dataset, **shorten_paths(record)}


def _evaluation_of(path: Path, records: list[dict[str, Any]], revisions: Collection[str]) -> dict[str, Any]:
    for record in records:
        if record.get("revision") in revisions or (len(records) == 1 and "revision" not in record):
            return record
    raise ValueError(f"metrics {str(path)!r} is of another model than this one ({' or '.join(sorted(revisions))})")


def prompts_of(metrics: dict[str, Any]) -> list[str]:
    """The protocols of an evaluation: "box", "center", "uniform:3", ..."""
    return [name for name in metrics if name.partition(":")[0] in PROMPTS]


def prompt_text(name: str) -> str:
    kind, _, clicks = name.partition(":")
    if not clicks:
        return PROMPTS[kind]
    return f"{clicks} clicks, " + ("the first in the centre" if kind == "center" else "all anywhere")


def option(command: str, name: str) -> str | None:
    """Value of an option in a command line: `--name value` or `--name=value`."""
    tokens = shlex.split(command)
    for token, following in zip(tokens, [*tokens[1:], None]):
        if token == name:
            return following
        if token.startswith(name + "="):
            return token.partition("=")[2]
    return None


def _read_json(path: Path, argument: str, keys: Iterable[str]) -> dict[str, Any]:
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from None
    _require(content, path, argument, keys)
    return content


def _require(content: Any, path: Path, argument: str, keys: Iterable[str]) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{argument}: {path} is no JSON object")
    missing = [key for key in keys if key not in content]
    if missing:
        raise ValueError(f"{argument}: {path} lacks {', '.join(missing)}")


def _private_sources(text: str) -> list[MixtureSource]:
    """Sources of a mixture's text, their paths shortened and texts in one line; none of the paths need be here."""

    def shortened(value: Any) -> Any:
        return shorten_paths(" ".join(value.split()) if isinstance(value, str) else value)

    names = [item.name for item in fields(MixtureSource)]
    return [
        replace(source, **{name: shortened(getattr(source, name)) for name in names})
        for source in read_mixture(text, existing=False)
    ]


def shorten_mixture(text: str) -> str:
    """A mixture's text in one line, its paths shortened."""
    return write_mixture(_private_sources(text), default_flow_style=True).strip()


def shorten_paths(value: Any) -> Any:
    """Cut paths that are absolute or go upwards to their last two parts: where a machine keeps files is private."""
    if isinstance(value, dict):
        return {
            name: shorten_command(entry) if name == "command" else shorten_paths(entry)
            for name, entry in value.items()
        }
    if isinstance(value, (list, tuple)):
        return type(value)(shorten_paths(entry) for entry in value)
    return _shorten_text(value) if isinstance(value, str) else value


def _shorten_text(value: str) -> str:
    value = USER_IN_URL.sub("", value).removeprefix("file://")
    path = PurePath(value)
    if path.is_absolute() or ".." in path.parts:
        return last_parts(value)
    return PATH_INSIDE.sub(lambda match: last_parts(match[0]), value)


def shorten_command(command: str) -> str:
    """A command line as one types it: the name of the program, and absolute paths shortened."""
    program, *rest = shlex.split(command)
    if PurePath(program).name in ("__main__.py", "efficientsam"):
        program = "efficientsam"
    tokens, option = [last_parts(program) if PurePath(program).is_absolute() else program], ""
    for token in rest:
        name, sign, value = token.partition("=") if token.startswith("--") else ("", "", token)
        option = name or option
        is_mixture = option == "--train-mix" and value.lstrip().startswith(("[", "-"))  # and not a file's path
        tokens.append(name + sign + (shorten_mixture(value) if is_mixture else shorten_paths(value)))
    return shlex.join(tokens)


def last_parts(path: str) -> str:
    """The last two parts of a path, but for the name of a user whose home it is."""
    parts = [part for part in PurePath(path).parts if part not in ("..", PurePath(path).anchor)]
    at_home = len(parts) == 3 and parts[0] in ("home", "Users")
    return "/".join(parts[-1:] if at_home else parts[-2:])


def curve_rows(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over up to CURVE_ROWS equal stretches of the log: "step" and "image_size" at the end, and CURVE_NAMES."""
    count = min(CURVE_ROWS, len(curve))
    bounds = [len(curve) * index // max(count, 1) for index in range(count + 1)]
    return [_mean_line(curve[first:last]) for first, last in zip(bounds, bounds[1:])]


def _mean_line(lines: list[dict[str, Any]]) -> dict[str, Any]:
    row = {name: lines[-1][name] for name in ("step", "image_size") if name in lines[-1]}
    for name in CURVE_NAMES:
        values = [line[name] for line in lines if is_number(line.get(name))]
        if values:
            row[name] = round(statistics.fmean(values), 4)
    return row


def training_facts(record: RunRecord) -> dict[str, Any]:
    """What metrics.json says of the run: command, machine, versions, how long and how far, the end of the curve."""
    end = curve_rows(record.curve)[-1:]
    facts = {
        "command": record.description["command"],
        "started": record.description["started"],
        "machine": record.description["machine"],
        "versions": record.description.get("versions"),
        **record.progress,
        "images_per_s": record.progress["images"] / max(60 * record.progress["minutes"], 1e-9),
        "end_of_curve": end[0] if end else None,
        "last_evaluation": record.evaluation,
        "exported_by": f"efficientsam-hf {_package_version()}",
    }
    return shorten_paths(facts)


def _package_version() -> str:
    try:
        return version("efficientsam-hf")
    except PackageNotFoundError:
        return "from source"
