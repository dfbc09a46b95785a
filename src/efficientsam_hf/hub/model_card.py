# SPDX-License-Identifier: Apache-2.0
"""The text of README.md for the Hub, made from a run, its model and what was measured of it."""

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedModel

from ..data.mixture import BLOCK, MixtureSource, Turns
from ..models.configuration_efficientsam import VISION_PRESETS
from ..models.modeling_sami import SamiForPreTraining
from .run_record import (
    RunRecord,
    curve_rows,
    last_parts,
    option,
    prompt_text,
    prompts_of,
    shorten_command,
    shorten_mixture,
    shorten_paths,
)


TEMPLATES = Path(__file__).parents[1] / "templates"
PREVIEW = "previews/training.jpg"
SCENES_PREVIEW = "previews/scenes.png"
# What a log says of a step -> heading of its column.
CURVES = {
    "loss": "loss",
    "miou": "mIoU",
    "best_miou": "mIoU, best of 3",
    "masked_error": "error, hidden patches",
    "visible_error": "error, visible patches",
    "cosine": "cosine similarity",
}
HERE = '"."'  # where a card's code looks for the model
HERE_NOTE = 'The folder of this card, or its name where it was published, goes where `"."` stands.\n\n'
PROTOCOL = (
    "Each object of the annotations is prompted alone and compared at the picture's own resolution, averaged over "
    "objects. Of the three masks the one with the highest predicted IoU counts; best of 3 is what a perfect "
    'choice would reach. "Click in the centre" is the maximum of the distance transform of the object, the border '
    "of the picture counting as its boundary; clicks after it are the deepest pixels of what is wrong. "
    "Small, medium and large are thirds of the objects by their share of the picture."
)

# What the sources of a mixture hold, by their kinds.
SOURCES = {
    "annotations": "COCO annotations",
    "sa1b": "pictures in the layout of SA-1B",
    "dataset": "data set",
    "cutouts": "cut-outs pasted on pictures",
    "scenes": "generated scenes",
}

RELEASED_LIMITS = (
    "- These weights know clicks on the object and boxes, up to six prompt tokens together; they have neither clicks "
    "on the background nor mask prompts, and asking for either is an error."
)


@dataclass
class Export:
    """What goes into a card beside the model itself."""

    record: RunRecord
    name: str
    half: bool
    with_code: bool
    license: str
    evaluations: list[dict] = field(default_factory=list)
    speed: dict[str, Any] | None = None
    preview: Path | None = None
    averaged: Sequence[dict] = ()


def model_card(export: Export, model: PreTrainedModel) -> str:
    """The text of README.md for a model that a run trained, by finetuning or by pretraining."""
    record = export.record
    pretrained = isinstance(model, SamiForPreTraining)
    describe = _describe_sami if pretrained else _describe_efficientsam
    stored = "float16 and loaded as float32" if export.half else "float32"
    parts = {
        **describe(export, model),
        "preview": _preview(export, pretrained),
        "here": HERE_NOTE,
        "storage": f"Weights are stored as {stored}; `dtype=torch.bfloat16` loads them in half precision.",
        "speed": speed_section(export.speed),
        "facts": _facts_table(record),
        "curve": _curve_table(record.curve),
        "command": shorten_command(record.description["command"]),
        "arguments": _arguments_table(record),
        "license": export.license,
        "citation": read_template("citation.md"),
    }
    return fill_template("model_card.md", parts)


def read_template(name: str) -> str:
    """Text of a file in templates/, without the line break at its end."""
    return (TEMPLATES / name).read_text(encoding="utf-8").rstrip("\n")


def fill_template(name: str, parts: dict[str, str]) -> str:
    """A template with its parts in their places; KeyError for one that is missing."""
    return Template(read_template(name)).substitute(parts) + "\n"


def point_card_at(card: str, repo_id: str, branch: str | None = None) -> str:
    """The card with a Hub repository in its code, and a branch of it, in place of the folder that it lies in."""
    code = re.compile(r"```python\n.*?```", flags=re.DOTALL)
    there = f'"{repo_id}"' + (f', revision="{branch}"' if branch else "")
    return code.sub(lambda block: block[0].replace(HERE, there), card.replace(HERE_NOTE, ""))


def million_parameters(model: PreTrainedModel) -> str:
    """Number of weights, as in "10.22 million parameters"."""
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} million parameters"


def variant_of(model: PreTrainedModel) -> str:
    """ "-Ti", "-S", "-B" by the width of the encoder; nothing for another width."""
    variants = {preset["hidden_size"]: name for name, preset in VISION_PRESETS.items()}
    width = model.config.vision_config.hidden_size
    return f"-{variants[width].capitalize()}" if width in variants else ""


def usage_section(with_code: bool) -> str:
    """How an EfficientSAM is loaded: with the package, and with the code beside the weights where that is there."""
    return read_template("efficientsam_usage.md") + ("\n" + read_template("remote_code.md") if with_code else "")


def _describe_efficientsam(export: Export, model: PreTrainedModel) -> dict[str, str]:
    """Parts of the card of a model that was finetuned."""
    record, size = export.record, model.config.vision_config.image_size
    code = " Its code is beside the weights, for `trust_remote_code`." if export.with_code else ""
    about = f"This one has {million_parameters(model)} and works at {size} x {size} pixels."
    return {
        "metadata": card_metadata(export).to_yaml().strip(),
        "title": f"EfficientSAM{variant_of(model)}, {_short_data(record)}",
        "introduction": f"{read_template('efficientsam_introduction.md')} {about}{code}",
        "usage": usage_section(export.with_code),
        "evaluation": evaluation_section(record, export.evaluations),
        "data": _data_text(record) + _average_text(export.averaged) + _mixture_section(record.sources),
        "curve_note": "mIoU is that of the chosen mask with the training pictures' masks after the first prompt.",
        "limits": fill_template(
            "efficientsam_limits.md", {"data_limits": _limits(record), "image_size": str(size)}
        ).rstrip("\n"),
    }


def _describe_sami(export: Export, model: SamiForPreTraining) -> dict[str, str]:
    """Parts of the card of an encoder that was pretrained."""
    config, arguments = model.config, export.record.arguments
    teacher = shorten_paths(str(arguments.get("teacher") or arguments.get("train_features") or ""))
    target = f"the features of `{teacher}`" if config.target == "features" else "the pixels of the picture"
    encoder = f"{sum(p.numel() for p in model.vision_encoder.parameters()) / 1e6:.2f} million of them in the encoder"
    about = (
        f"It reconstructs {target} from {100 * (1 - config.mask_ratio):.0f} % of the patches of "
        f"{config.vision_config.image_size} x {config.vision_config.image_size} pixels, and has "
        f"{million_parameters(model)}, {encoder}."
    )
    remote = "\n" + read_template("sami_usage_remote.md") if export.with_code else ""
    return {
        "metadata": card_metadata(export).to_yaml().strip(),
        "title": f"{'SAMI' if config.target == 'features' else 'MAE'}{variant_of(model)} encoder, pretrained on "
        + ("generated scenes" if arguments.get("train_scenes") else "pictures"),
        "introduction": read_template("sami_introduction.md" if config.target == "features" else "mae_introduction.md")
        + f" {about}",
        "usage": read_template("sami_usage.md") + remote,
        "evaluation": "The loss below says how well it reconstructs. What the encoder is worth shows once it is "
        "finetuned, and has not been measured here.",
        "data": _start_text(export.record) + _pretraining_data(export.record),
        "curve_note": "Errors are mean squares over the patches that were hidden from the encoder, and over the rest.",
        "limits": read_template("sami_limits.md"),
    }


def released_card(model: PreTrainedModel, source: Path, sha256: str) -> str:
    """The text of README.md for weights that the authors released, converted from the file `source`."""
    variant = variant_of(model)
    size = str(model.config.vision_config.image_size)
    known = {"-Ti": ("75.7", "45.5", "67.2", "42.3"), "-S": ("76.9", "50.0", "69.8", "44.4")}
    reported = "no numbers for this variant"
    if variant in known:
        box, click, clicks, precision = known[variant]
        reported = (
            f"{box} mIoU with tight boxes of COCO, {click} with one click and {clicks} with three (clicks drawn "
            f"uniformly, zero-shot), and {precision} mask AP on COCO with the boxes of a ViTDet-H detector"
        )
    metadata = ModelCardData(
        library_name="transformers", pipeline_tag="mask-generation", license="apache-2.0",
        tags=["efficientsam", "segment-anything", "image-segmentation", "vision"],
    )  # fmt: skip
    limits = {"data_limits": RELEASED_LIMITS, "image_size": size}
    parts = {
        "metadata": metadata.to_yaml().strip(),
        "title": f"EfficientSAM{variant}",
        "introduction": f"{read_template('efficientsam_introduction.md')} This one has {million_parameters(model)} "
        f"and works at {size} x {size} pixels.",
        "source": source.name,
        "sha256": sha256,
        "preview": f"\n![boxes and masks on generated scenes]({SCENES_PREVIEW})\n\n"
        "*Boxes as prompts, and the masks of the model, on scenes that the package generates.*\n",
        "here": HERE_NOTE,
        "usage": usage_section(with_code=True),
        "reported": reported,
        "limits": fill_template("efficientsam_limits.md", limits).rstrip("\n"),
        "citation": read_template("citation.md"),
    }
    return fill_template("released_card.md", parts)


def _pretraining_data(record: RunRecord) -> str:
    arguments = record.arguments
    if arguments.get("train_scenes"):
        return " The pictures are scenes that the package generates (`efficientsam_hf.data.scenes`), without photos."
    source = arguments.get("train_images") or arguments.get("train_dataset")
    return f" The pictures are those of `{shorten_paths(str(source))}`."


def _preview(export: Export, pretrained: bool) -> str:
    """The last picture of the run with what it shows; nothing if it drew none."""
    if export.preview is None:
        return ""
    step = int(export.preview.stem.removeprefix("step_"))
    shown = (
        "picture, its visible patches, the target's three main components, and their reconstruction"
        if pretrained
        else "masks and prompts of training pictures on the left, predictions on the right"
    )
    return f"\n![{shown}]({PREVIEW})\n\n*At step {step:,}: {shown}.*\n"


def speed_section(speed: dict[str, Any] | None) -> str:
    """Milliseconds of `efficientsam benchmark`, with machine, date and command."""
    if speed is None:
        return "Not measured."
    rows = [[row["work"], f"{1000 * row['seconds']:,.1f}"] for row in speed["rows"]]
    source = f"{machine_text(speed['machine'])}, {speed['dtype']}, {speed['date'][:10]}:"
    return "\n\n".join([_table(["work", "ms"], rows), source, f"```\n{shorten_command(speed['command'])}\n```"])


def _average_text(averaged: Sequence[dict]) -> str:
    """That the weights are a mean, and of what; nothing if they are the run's own."""
    if not averaged:
        return ""
    others = ", ".join(f"`{other['model']}` ({other['revision']})" for other in averaged)
    return (
        f" The weights are the mean of the run's own and of those of {others}: of runs of which one began from the "
        "result of the other. What follows describes the run alone."
    )


def card_metadata(export: Export) -> ModelCardData:
    """The card's YAML: library, task, licence, origin, data, and one result per prompt and evaluation."""
    record, pretrained = export.record, "target" in export.record.arguments
    results = [
        EvalResult(
            task_type="mask-generation",
            dataset_type=_dataset_type(evaluation["dataset"]),
            dataset_name=evaluation["dataset"],
            dataset_config=f"{evaluation['metrics']['images']} images",
            metric_type="mean_iou",
            metric_name=f"mIoU, {prompt_text(prompt)}",
            metric_config=evaluation["dtype"],
            metric_value=round(evaluation["metrics"][prompt]["miou"], 4),
        )
        for evaluation in export.evaluations
        for prompt in prompts_of(evaluation["metrics"])
    ]
    tags = ["efficientsam", "segment-anything", "image-segmentation", "vision"]
    datasets = [_hub_id(record, "train_dataset"), *(_as_hub_id(source.dataset) for source in record.sources)]
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="image-feature-extraction" if pretrained else "mask-generation",
        license=export.license,
        base_model=_hub_id(record, "model"),
        datasets=sorted({name for name in datasets if name}) or None,
        tags=tags + ["sami"] * pretrained + ["synthetic"] * _trained_on_scenes(record),
        model_name=export.name,
        eval_results=results or None,
    )


def _dataset_type(name: str) -> str:
    """A data set's name as the Hub takes it for a type: like an id, without spaces."""
    return name if re.fullmatch(r"([\w-]+/)?[\w.-]+", name) else re.sub(r"[^\w.-]+", "-", name).strip("-")


def _hub_id(record: RunRecord, argument: str) -> str | None:
    """Value of an argument that is a name of the Hub's; None for folders, presets and nothing."""
    return None if argument in record.description.get("local", ()) else _as_hub_id(record.arguments.get(argument))


def _as_hub_id(name: str | None) -> str | None:
    is_id = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(name or "")) is not None
    return name if is_id and not Path(name).exists() else None


def evaluation_section(record: RunRecord, evaluations: list[dict]) -> str:
    """Protocol, table, and the command, machine and date behind each row."""
    if not evaluations:
        return _evaluation_of_run(record)
    rows, sources = [], []
    for number, evaluation in enumerate(evaluations, 1):
        metrics = evaluation["metrics"]
        for prompt in prompts_of(metrics):
            values = metrics[prompt]
            sizes = [f"{values[f'miou_{size}']:.3f}" for size in metrics["sizes"]]
            counts = f"{metrics['images']} images, {metrics['objects']} objects"
            scores = [f"**{values['miou']:.3f}**", f"{values['oracle_miou']:.3f}", " / ".join(sizes)]
            rows.append([f"[{number}] {evaluation['dataset']}", counts, prompt_text(prompt), *scores])
        sources.append(f"[{number}] {machine_text(evaluation['machine'])}, {evaluation['dtype']}, "
                       f"{evaluation['date'][:10]}:\n\n```\n{evaluation['command']}\n```")  # fmt: skip
    header = ["data", "size", "prompt", "mIoU", "best of 3", "mIoU small / medium / large"]
    return "\n\n".join([PROTOCOL, _table(header, rows), *sources])


def _evaluation_of_run(record: RunRecord) -> str:
    """The last evaluation that the run itself made, where there is no better one."""
    last, arguments = record.evaluation, record.arguments
    if last is None:
        return "Not measured."
    data = [f"scenes: {arguments['evaluate_scenes']} generated ones"] if arguments.get("evaluate_scenes") else []
    if arguments.get("eval_annotations"):
        limit = f"the first {arguments['eval_limit']} pictures of " if arguments.get("eval_limit") else ""
        data.append(f"coco: {limit}{last_parts(arguments['eval_annotations']).removesuffix('.json')}")
    rows = [[name, f"{value:.3f}"] for name, value in last.items() if name.startswith(("coco/", "scenes/"))]
    note = (
        f"Measured during the run only, at step {last['step']} ({'; '.join(data)}). oracle: the best of three masks."
    )
    return f"{note}\n\n{_table(['data/prompt', 'mIoU'], rows)}"


def _short_data(record: RunRecord) -> str:
    if _trained_on_scenes(record):
        return "trained on generated scenes"
    return "trained on a mixture" if record.sources else "trained on masks"


def _trained_on_scenes(record: RunRecord) -> bool:
    """Whether the run saw generated scenes and nothing else."""
    mixed = record.sources
    return bool(record.arguments.get("train_scenes") or (mixed and all(source.scenes for source in mixed)))


def _start_text(record: RunRecord) -> str:
    """Where the weights started."""
    source = str(record.arguments.get("model", ""))
    if source in VISION_PRESETS:
        return f"Trained from scratch (preset `{source}`, seed {record.arguments.get('seed')})."
    if source == "default":
        return "Training started from the checkpoint that shipped with the package when the run began."
    return f"Training started from `{shorten_paths(source)}`."


def _saw_scenes_only(record: RunRecord) -> bool:
    """Whether neither the run nor what it started from can have seen a photo."""
    start = str(record.arguments.get("model", ""))
    return _trained_on_scenes(record) and start in VISION_PRESETS


def _data_text(record: RunRecord) -> str:
    """Where the weights started and what they saw."""
    start, arguments = _start_text(record), record.arguments
    if _trained_on_scenes(record):
        return (
            f"{start} The data are scenes that the package generates (`efficientsam_hf.data.scenes`): layered "
            "textured shapes with occlusion, parts, shadows, blur and noise, and exact masks. No photograph and no "
            "annotation by a person is among them; evaluations during the run only chose which checkpoints to keep."
        )
    if record.sources:
        return f"{start} The data are the mixture of {len(record.sources)} sources in the table below."
    names = [arguments.get(name) for name in ("train_annotations", "train_sa1b", "train_dataset")]
    return start + "".join(f" The masks are those of `{shorten_paths(str(name))}`." for name in names if name)


def _mixture_section(sources: list[MixtureSource]) -> str:
    """Which sources a mixture has, what is in them, their shares, and whom they are by; nothing without sources."""
    if not sources:
        return ""
    shares = Turns(tuple(source.weight for source in sources)).shares()
    rows = [
        [source.name, SOURCES[source.kind] + (f" `{source.dataset}`" if source.dataset else ""), f"{share:g} %"]
        for source, share in zip(sources, 100 * shares / BLOCK)
    ]
    credits = {source.name: [source.credit, source.url, source.license] for source in sources}
    lines = [
        f"- {name}: " + ", ".join(part for part in parts if part) for name, parts in credits.items() if any(parts)
    ]
    text = "\n\n" + _table(["source", "holds", "share of the pictures"], rows)
    return text + ("\n\nCredits of the data:\n\n" + "\n".join(lines) if lines else "")


def _limits(record: RunRecord) -> str:
    if not _trained_on_scenes(record):
        return "- It knows what its training data show, and little beyond."
    if not _saw_scenes_only(record):
        return "- Its last run showed it generated scenes; what it started from may have seen more."
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
        ["recipe", shorten_paths(option(record.description["command"], "--recipe") or "none")],
        ["started", record.description["started"]],
        ["machine", machine_text(record.description["machine"])],
        ["wall time", f"{progress['minutes']:.1f} minutes"],
        ["steps", f"{progress['steps']:,}"],
        ["images seen", f"{progress['images']:,}"],
        ["images/s", f"{overall:.1f} over all{training}"],
        ["versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number)],
    ]
    return _table(["", ""], rows)


def machine_text(machine: dict[str, Any]) -> str:
    """GPUs or processor, cores and threads, as `machine.describe_machine` gives them."""
    text = f"{machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads"
    return ", ".join([*machine["gpus"], text])


def _curve_table(curve: list[dict[str, Any]]) -> str:
    """The course of a run, a column for each number that its log has."""
    rows = curve_rows(curve)
    names = [name for name in CURVES if any(name in row for row in rows)]
    if not names:
        return "The log has no losses."
    cells = [[str(row.get(name, "–")) for name in ("step", "image_size", *names)] for row in rows]
    return _table(["up to step", "image size", *(CURVES[name] for name in names)], cells)


def _arguments_table(record: RunRecord) -> str:
    """Every argument of the run that has a value, but for those that only say where to write."""
    names = [name for name, value in record.arguments.items() if value is not None]
    values = shorten_paths(record.arguments)
    if record.sources:
        values["train_mix"] = shorten_mixture(record.arguments["train_mix"])
    rows = [[name, f"`{values[name]}`"] for name in names if name not in ("output_dir", "resume")]
    return _table(["argument", "value"], rows)


def _table(header: list[str], rows: list[list[str]]) -> str:
    """Rows of text as a Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)
