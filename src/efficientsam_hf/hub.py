# SPDX-License-Identifier: Apache-2.0
"""A run folder becomes a folder to publish: weights, configuration, processor, metrics and a card made from them."""

import json
import os
import re
import shlex
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path, PurePath
from string import Template
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCardData

from .averaging import average_weights
from .files import write_folder, write_json, write_text
from .identity import model_type
from .models.configuration_efficientsam import VISION_PRESETS, EfficientSamConfig
from .models.modeling_efficientsam import EfficientSamModel
from .models.processing_efficientsam import EfficientSamProcessor


CARD_TEMPLATE = Path(__file__).parent / "templates" / "model_card.md"
# The only names an export writes: whoever overwrites one deletes nothing else.
EXPORTED = ("README.md", "config.json", "metrics.json", "processor_config.json", "model*.safetensors")
EXPORTED += ("model.safetensors.index.json", "*_efficientsam*.py")
PROMPTS = {"center": "click in the centre", "uniform": "click anywhere", "box": "tight box"}
CURVE_ROWS = 6
REMOTE_CODE = """
Without the package, the code beside the weights does the same:

```python
from transformers import AutoModelForMaskGeneration, AutoProcessor

model = AutoModelForMaskGeneration.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
```

and a pipeline that comes with them finds everything in a picture:

```python
from transformers import pipeline

generator = pipeline("mask-generation", model=".", trust_remote_code=True)
result = generator("photo.jpg", points_per_crop=32)
```
"""


def export_run(
    run: str | os.PathLike,
    destination: str | os.PathLike,
    half: bool = True,
    metrics: str | os.PathLike | Sequence[str | os.PathLike] | None = None,
    with_code: bool = False,
    overwrite: bool = False,
    average: Sequence[str | os.PathLike] = (),
) -> Path:
    """Write the model of a run as a folder for every `from_pretrained`, with metrics.json and a model card.

    Args:
        run: folder that `efficientsam finetune` writes; the run may still be going on.
        destination: folder to write; it appears whole or not at all.
        half: store weights as float16. The configuration says float32, so that a plain `from_pretrained` computes in
            float32; the Gaussian matrix of the positional encoding is float32 in the file too.
        metrics: files that `efficientsam evaluate --output` wrote for this model.
        with_code: add the code for `trust_remote_code`.
        overwrite: replace an earlier export.
        average: further models, folders or Hub ids; what is written is the mean of the run's weights and theirs.

    Returns:
        The destination.

    Raises:
        FileNotFoundError: if `run`, or a file of it or of `metrics`, is missing.
        FileExistsError: if `destination` holds something that is not an earlier export, or `overwrite` is off.
        ValueError: if a file is not what it should be, a weight does not fit float16, or a model of `average` does
            not go with the run's.
    """
    destination = Path(os.path.abspath(destination))
    check_destination(destination, overwrite)
    record = read_run(Path(run))
    evaluations = [read_evaluation(Path(path)) for path in _as_list(metrics)]
    kind = model_type(str(record.folder / "model"))
    if kind != EfficientSamConfig.model_type:
        raise ValueError(f"{record.folder} trained a model of type {kind!r}; only an EfficientSAM can be exported")
    model = EfficientSamModel.from_pretrained(record.folder / "model", dtype=torch.float32)
    processor = EfficientSamProcessor.from_pretrained(record.folder / "model")
    averaged = shorten_paths(average_weights(model, average))
    card = model_card(record, model, evaluations, destination.name, half, with_code, averaged)

    def fill(folder: Path) -> None:
        save_model(model, folder, half)
        processor.save_pretrained(folder)
        if not with_code:
            remove_code(folder)
        training = training_facts(record) | ({"averaged_with": averaged} if averaged else {})
        write_json(folder / "metrics.json", {"training": training, "evaluations": evaluations})
        write_text(folder / "README.md", card)

    write_folder(destination, fill)
    return destination


def _as_list(paths: str | os.PathLike | Sequence[str | os.PathLike] | None) -> list[str | os.PathLike]:
    if paths is None:
        return []
    return [paths] if isinstance(paths, (str, os.PathLike)) else list(paths)


# The folder


def check_destination(destination: Path, overwrite: bool) -> None:
    """`FileExistsError` unless the folder is new, empty, or an earlier export that may be replaced."""
    if not destination.exists():
        return
    if not destination.is_dir():
        raise FileExistsError(f"destination {str(destination)!r} is not a folder")
    names = sorted(path.name for path in destination.iterdir())
    if not names:
        return
    foreign = [name for name in names if not any(fnmatch(name, pattern) for pattern in EXPORTED)]
    if foreign or "metrics.json" not in names:
        found = f"holds {', '.join(foreign[:5])}" if foreign else "has no metrics.json"
        raise FileExistsError(f"destination {str(destination)!r} is not empty and no earlier export: it {found}")
    if not overwrite:
        raise FileExistsError(f"destination {str(destination)!r} holds an earlier export; overwrite replaces it")


def save_model(model: EfficientSamModel, folder: Path, half: bool) -> None:
    """Save float32 `model`, its weights stored as float16 if `half`, with float32 as the dtype to load them in."""
    for name in model.config.sub_configs:
        # A part that is loaded alone reads its own dtype, and without one takes the file's.
        getattr(model.config, name).dtype = "float32"
    state = model.state_dict()
    if half:
        state = {name: _to_half(name, tensor) for name, tensor in state.items()}
    model.save_pretrained(folder, state_dict=state)
    for path in folder.glob("*.safetensors"):  # safetensors makes them readable for their owner only
        path.chmod((folder / "config.json").stat().st_mode)


def _to_half(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() or name.endswith("positional_encoding.gaussian_matrix"):
        return tensor
    halved = tensor.half()
    if not torch.isfinite(halved).all():
        raise ValueError(f"weight {name} does not fit float16 (largest {tensor.abs().max():.3g}); export without half")
    return halved


def remove_code(folder: Path) -> None:
    """Delete the modules that `save_pretrained` put beside the weights, and every pointer to them."""
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*.json"):
        write_json(path, _without_auto_map(json.loads(path.read_text(encoding="utf-8"))))


def _without_auto_map(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_auto_map(entry) for name, entry in value.items() if name != "auto_map"}
    return value


# The run


@dataclass
class RunRecord:
    """What a run folder says about the model in it."""

    folder: Path
    description: dict[str, Any]  # args.json
    progress: dict[str, Any]  # steps, images, minutes of training behind the saved weights
    curve: list[dict[str, Any]]  # lines "train" of the log up to there
    evaluation: dict[str, Any] | None  # the last line "evaluation" up to there

    @property
    def arguments(self) -> dict[str, Any]:
        return self.description["arguments"]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder; `FileNotFoundError` or `ValueError` that says what is missing."""
    if not folder.is_dir():
        raise FileNotFoundError(f"run {str(folder)!r} is not a folder")
    for name in ("args.json", "model/config.json"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"run {str(folder)!r} has no {name}: it is no run folder, or has saved no model yet"
            )
    description = _read_json(folder / "args.json", "run", ("arguments", "command", "machine", "started"))
    progress = _read_progress(folder)
    events = [line for line in _read_log(folder / "log.jsonl") if line.get("step", 0) <= progress["steps"]]
    evaluations = [line for line in events if line["event"] == "evaluation"]
    curve = [line for line in events if line["event"] == "train" and "loss" in line]
    return RunRecord(folder, description, progress, curve, evaluations[-1] if evaluations else None)


def _read_progress(folder: Path) -> dict[str, Any]:
    """Steps, images and minutes behind model/, which is written with every checkpoint; run.json is, at the end."""
    states = [_read_json(path, "run", ("step",)) for path in folder.glob("checkpoints/step_*/trainer_state.json")]
    if states:
        last = max(states, key=lambda state: state["step"])
        return {"steps": last["step"], "images": last["images"], "minutes": last["elapsed"] / 60}
    if (folder / "run.json").is_file():
        summary = _read_json(folder / "run.json", "run", ("steps", "images", "minutes"))
        return {name: summary[name] for name in ("steps", "images", "minutes")}
    raise FileNotFoundError(f"run {str(folder)!r} has neither a checkpoint nor run.json: how far it got is unknown")


def _read_log(path: Path) -> list[dict[str, Any]]:
    """Lines of log.jsonl in order of steps; those that a resumed run took back are left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except ValueError:  # cut off when the process was killed
            continue
        if line["event"] == "resume":
            lines = [earlier for earlier in lines if earlier.get("step", 0) <= line["step"]]
        lines.append(line)
    return lines


def read_evaluation(path: Path) -> dict[str, Any]:
    """Read what `efficientsam evaluate --output` wrote and give the data set a name; `ValueError` if it is another."""
    if not path.is_file():
        raise FileNotFoundError(f"metrics {str(path)!r} is not a file")
    record = _read_json(path, "metrics", ("metrics", "command", "date", "machine", "dtype"))
    if not _prompts(record["metrics"]):
        raise ValueError(f"metrics {str(path)!r} has none of the prompts {', '.join(PROMPTS)}")
    annotations = _option(record["command"], "--annotations")
    scenes = "generated scenes" if _option(record["command"], "--scenes") else path.name
    dataset = _last_parts(annotations).removesuffix(".json") if annotations else scenes
    return {"dataset": dataset, **shorten_paths(record)}


def _prompts(metrics: dict[str, Any]) -> list[str]:
    """The protocols of an evaluation: "box", "center", "uniform:3", ..."""
    return [name for name in metrics if name.partition(":")[0] in PROMPTS]


def _prompt_text(name: str) -> str:
    kind, _, clicks = name.partition(":")
    if not clicks:
        return PROMPTS[kind]
    return f"{clicks} clicks, " + ("the first in the centre" if kind == "center" else "all anywhere")


def _option(command: str, name: str) -> str | None:
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
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{argument}: {path} is not JSON: {error}") from None
    missing = [key for key in keys if not isinstance(content, dict) or key not in content]
    if missing:
        raise ValueError(f"{argument}: {path} lacks {', '.join(missing)}")
    return content


def shorten_paths(value: Any) -> Any:
    """Cut absolute paths to their last two parts, in commands too: where a machine keeps files is private."""
    if isinstance(value, dict):
        return {
            name: shorten_command(entry) if name == "command" else shorten_paths(entry)
            for name, entry in value.items()
        }
    if isinstance(value, list):
        return [shorten_paths(entry) for entry in value]
    return _last_parts(value) if isinstance(value, str) and PurePath(value).is_absolute() else value


def shorten_command(command: str) -> str:
    """A command line as one types it: the name of the program, and absolute paths shortened."""
    program, *rest = shlex.split(command)
    if PurePath(program).name in ("__main__.py", "efficientsam"):
        program = "efficientsam"
    tokens = [_last_parts(program) if PurePath(program).is_absolute() else program]
    for token in rest:
        name, sign, value = token.partition("=") if token.startswith("--") else ("", "", token)
        tokens.append(name + sign + shorten_paths(value))
    return shlex.join(tokens)


def _last_parts(path: str) -> str:
    return "/".join(part for part in PurePath(path).parts[-2:] if part not in ("..", PurePath(path).anchor))


def training_facts(record: RunRecord) -> dict[str, Any]:
    """What metrics.json says of the run: command, machine, versions, how long and how far, the end of the curve."""
    end = _curve_rows(record.curve)[-1:]
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


# The card


def model_card(
    record: RunRecord,
    model: EfficientSamModel,
    evaluations: list[dict],
    name: str,
    half: bool,
    with_code: bool,
    averaged: Sequence[dict] = (),
) -> str:
    """The text of README.md, made from the run, the model and its evaluations."""
    width, image_size = model.config.vision_config.hidden_size, model.config.vision_config.image_size
    variants = {preset["hidden_size"]: variant for variant, preset in VISION_PRESETS.items()}
    variant = f"-{variants[width].capitalize()}" if width in variants else ""
    parameters = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    code = f" Its code is beside the weights, for `trust_remote_code`; `{name}` needs no package then."
    stored = "float16 and loaded as float32" if half else "float32"
    parts = {
        "metadata": card_metadata(record, evaluations, name).to_yaml().strip(),
        "title": f"EfficientSAM{variant}, {_short_data(record)}",
        "summary": f"This one has {parameters:.2f} million parameters and works at {image_size} x {image_size} pixels."
        + (code if with_code else ""),
        "remote_code": REMOTE_CODE if with_code else "",
        "storage": f"Weights are stored as {stored}; `dtype=torch.bfloat16` loads them in half precision.",
        "evaluation": evaluation_section(record, evaluations),
        "data": _data_text(record) + _average_text(averaged),
        "facts": _facts_table(record),
        "curve": _curve_table(record.curve),
        "command": shorten_command(record.description["command"]),
        "arguments": _arguments_table(record),
        "limits": _limits(record),
        "image_size": str(image_size),
    }
    return Template(CARD_TEMPLATE.read_text(encoding="utf-8")).substitute(parts)


def _average_text(averaged: Sequence[dict]) -> str:
    """That the weights are a mean, and of what; nothing if they are the run's own."""
    if not averaged:
        return ""
    others = ", ".join(f"`{other['model']}` ({other['revision']})" for other in averaged)
    return (
        f" The weights are the mean of the run's own and of those of {others}: of runs of which one began from the "
        "result of the other. What follows describes the run alone."
    )


def card_metadata(record: RunRecord, evaluations: list[dict], name: str) -> ModelCardData:
    """The card's YAML: library, task, licence, tags, and one result per prompt and evaluation."""
    results = [
        EvalResult(
            task_type="mask-generation",
            dataset_type=evaluation["dataset"],
            dataset_name=evaluation["dataset"],
            dataset_config=f"{evaluation['metrics']['images']} images",
            metric_type="mean_iou",
            metric_name=f"mIoU, {_prompt_text(prompt)}",
            metric_config=evaluation["dtype"],
            metric_value=round(evaluation["metrics"][prompt]["miou"], 4),
        )
        for evaluation in evaluations
        for prompt in _prompts(evaluation["metrics"])
    ]
    tags = ["efficientsam", "segment-anything", "image-segmentation", "vision"]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="mask-generation",
        license="apache-2.0",
        base_model=_base_model(record),
        tags=tags + (["synthetic"] if record.arguments.get("train_scenes") else []),
        model_name=name,
        eval_results=results or None,
    )


def _base_model(record: RunRecord) -> str | None:
    """The Hub id that the run started from, if it did."""
    source = str(record.arguments.get("model", ""))
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) is not None
    return source if is_id and not Path(source).exists() else None


def evaluation_section(record: RunRecord, evaluations: list[dict]) -> str:
    """Protocol, table, and the command, machine and date behind each row."""
    if not evaluations:
        return _evaluation_of_run(record)
    rows, sources = [], []
    for number, evaluation in enumerate(evaluations, 1):
        metrics = evaluation["metrics"]
        for prompt in _prompts(metrics):
            values = metrics[prompt]
            sizes = [f"{values[f'miou_{size}']:.3f}" for size in metrics["sizes"]]
            counts = f"{metrics['images']} images, {metrics['objects']} objects"
            scores = [f"**{values['miou']:.3f}**", f"{values['oracle_miou']:.3f}", " / ".join(sizes)]
            rows.append([f"[{number}] {evaluation['dataset']}", counts, _prompt_text(prompt), *scores])
        sources.append(f"[{number}] {_machine_text(evaluation['machine'])}, {evaluation['dtype']}, "
                       f"{evaluation['date'][:10]}:\n\n```\n{evaluation['command']}\n```")  # fmt: skip
    protocol = (
        "Each object of the annotations is prompted alone and compared at the picture's own resolution, averaged over "
        "objects. Of the three masks the one with the highest predicted IoU counts; best of 3 is what a perfect "
        'choice would reach. "Click in the centre" is the maximum of the distance transform of the object, the border '
        "of the picture counting as its boundary; clicks after it are the deepest pixels of what is wrong. "
        "Small, medium and large are thirds of the objects by their share of the picture."
    )
    header = ["data", "size", "prompt", "mIoU", "best of 3", "mIoU small / medium / large"]
    return "\n\n".join([protocol, _table(header, rows), *sources])


def _evaluation_of_run(record: RunRecord) -> str:
    """The last evaluation that the run itself made, where there is no better one."""
    last, arguments = record.evaluation, record.arguments
    if last is None:
        return "Not measured."
    data = [f"scenes: {arguments['evaluate_scenes']} generated ones"] if arguments.get("evaluate_scenes") else []
    if arguments.get("eval_annotations"):
        limit = f"the first {arguments['eval_limit']} pictures of " if arguments.get("eval_limit") else ""
        data.append(f"coco: {limit}{_last_parts(arguments['eval_annotations']).removesuffix('.json')}")
    rows = [[name, f"{value:.3f}"] for name, value in last.items() if name.startswith(("coco/", "scenes/"))]
    note = (
        f"Measured during the run only, at step {last['step']} ({'; '.join(data)}). oracle: the best of three masks."
    )
    return f"{note}\n\n{_table(['data/prompt', 'mIoU'], rows)}"


def _short_data(record: RunRecord) -> str:
    return "trained on generated scenes" if record.arguments.get("train_scenes") else "trained on masks"


def _data_text(record: RunRecord) -> str:
    """Where the weights started and what they saw."""
    source = str(record.arguments.get("model", ""))
    if source in VISION_PRESETS:
        start = f"Trained from scratch (preset `{source}`, seed {record.arguments.get('seed')})."
    elif source == "default":
        start = "Training started from the checkpoint that shipped with the package when the run began."
    else:
        start = f"Training started from `{shorten_paths(source)}`."
    if not record.arguments.get("train_scenes"):
        return start
    return (
        f"{start} The data are scenes that the package generates (`efficientsam_hf.data.scenes`): layered textured "
        "shapes with occlusion, parts, shadows, blur and noise, and exact masks. No photograph and no annotation by "
        "a person is among them; evaluations during the run only chose which checkpoints to keep."
    )


def _limits(record: RunRecord) -> str:
    if not record.arguments.get("train_scenes"):
        return "- It knows what its training data show, and little beyond."
    return (
        "- It has seen generated scenes only, never a photograph: it follows edges, colours and textures and knows no "
        "kinds of things. Where a thing is several regions, or looks like what is behind it, the mask can be a "
        "part, or too much; a box says more than a click. The released EfficientSAM checkpoints were trained on the "
        "11 million photos of SA-1B and are the better choice for photos."
    )


def _facts_table(record: RunRecord) -> str:
    """Recipe, machine, time and throughput as a table."""
    progress, versions = record.progress, record.description.get("versions") or {}
    overall = progress["images"] / max(60 * progress["minutes"], 1e-9)
    speeds = [line["images_per_s"] for line in record.curve if "images_per_s" in line]
    training = f", {statistics.median(speeds):.1f} between evaluations (median)" if speeds else ""
    rows = [
        ["recipe", shorten_paths(_option(record.description["command"], "--recipe") or "none")],
        ["started", record.description["started"]],
        ["machine", _machine_text(record.description["machine"])],
        ["wall time", f"{progress['minutes']:.1f} minutes"],
        ["steps", f"{progress['steps']:,}"],
        ["images seen", f"{progress['images']:,}"],
        ["images/s", f"{overall:.1f} over all{training}"],
        ["versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number)],
    ]
    return _table(["", ""], rows)


def _machine_text(machine: dict[str, Any]) -> str:
    """GPUs or processor, cores and threads, as `machine.describe_machine` gives them."""
    text = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    return ", ".join([*machine["gpus"], text])


def _curve_rows(curve: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over up to six equal stretches of the log."""
    count = min(CURVE_ROWS, len(curve))
    bounds = [len(curve) * index // max(count, 1) for index in range(count + 1)]
    rows = []
    for first, last in zip(bounds, bounds[1:]):
        lines = curve[first:last]
        row = {"step": lines[-1]["step"], "image_size": lines[-1].get("image_size")}
        for name in ("loss", "miou", "best_miou"):
            values = [line[name] for line in lines if name in line]
            row[name] = round(statistics.fmean(values), 4) if values else None
        rows.append(row)
    return rows


def _curve_table(curve: list[dict[str, Any]]) -> str:
    header = ["up to step", "image size", "loss", "mIoU", "mIoU, best of 3"]
    rows = [["–" if value is None else str(value) for value in row.values()] for row in _curve_rows(curve)]
    return _table(header, rows) if rows else "The log has no losses."


def _arguments_table(record: RunRecord) -> str:
    """Every argument of the run that has a value, but for those that only say where to write."""
    names = [name for name, value in record.arguments.items() if value is not None]
    values = shorten_paths(record.arguments)
    rows = [[name, f"`{values[name]}`"] for name in names if name not in ("output_dir", "resume")]
    return _table(["argument", "value"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of text as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
