# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of encoder, prompts and segment-everything against the way released code and stock pipeline go.

Usage: python benchmarks/segment_everything.py [--rows encoder prompts everything memory sam others] [--image FILE]
       [--preset ti] [--repeats 5] [--prompts 1 16 64] [--grid 32] [--json FILE]

The baseline is frozen here: attention written out in float32, the image repeated for every prompt, every mask brought
to the size of the image before any is filtered. What is compared takes turns with it in one process; speed-ups are
medians of the ratios within a turn. Weights are random; `everything` and `memory` of Ti take those of the shipped
checkpoint, at 1024 pixels and with low thresholds, so that there are masks to find: their number is printed. In
`everything` the baseline, which takes minutes, runs once, and what is compared before and after it. `sam` checks the
baseline: the prompt decoder of transformers' SamModel has the same work to do. `memory` starts a process for each grid
and reads its peak. `others` encodes a picture and decodes 64 prompts by other promptable models of transformers, those
that can be built here.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import transformers
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import MaskGenerationPipeline, SamConfig, SamModel

from efficientsam_hf import (
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    default_checkpoint,
)
from efficientsam_hf.machine import describe_machine
from efficientsam_hf.models.fast_decoding_efficientsam import EfficientSamFastDecoder


ROWS = ("encoder", "prompts", "everything", "memory", "sam", "others")
OTHERS = {
    "SamModel, ViT-B": ("SamModel", "SamConfig"),
    "Sam2Model, Hiera-T": ("Sam2Model", "Sam2Config"),
    "EdgeTamModel": ("EdgeTamModel", "EdgeTamConfig"),  # needs timm
}
SIZE = 1024
AT_ONCE = 64  # prompts, as in the stock pipeline: 1,024 images of their own would not fit in 24 GB
# Low enough that many of the shipped checkpoint's masks survive at a size that it was not trained at.
THRESHOLDS = {"pred_iou_thresh": 0.1, "stability_score_thresh": 0.3}


class RepeatedImage(nn.Module):
    """The model as released code runs it: every prompt has an image of its own, all attention is written out."""

    def __init__(self, model: EfficientSamModel):
        super().__init__()
        self.model = model
        self.config = model.config

    def get_image_embeddings(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model.get_image_embeddings(pixel_values)

    def forward(self, image_embeddings: torch.Tensor, input_points: torch.Tensor, input_labels: torch.Tensor):
        points, labels = input_points.transpose(0, 1), input_labels.transpose(0, 1)
        masks, scores, _ = self.model.decode_prompts(image_embeddings.repeat(len(points), 1, 1, 1), points, labels)
        return {"pred_masks": masks[:, :, 1:].transpose(0, 1), "iou_scores": scores[:, :, 1:].transpose(0, 1)}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--preset", default="ti", choices=["ti", "s", "b"])
    parser.add_argument("--image", type=Path, help="picture (default: scikit-image's coffee, enlarged to 1920 x 1080)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--grid", type=int, default=32, help="points per side")
    parser.add_argument("--repeats", type=int, default=5, help="turns of encoder and prompts; everything takes one")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--peak-of", type=int, metavar="GRID", help=argparse.SUPPRESS)
    return parser.parse_args()


def build_model(preset: str, dtype: torch.dtype, attention: str = "sdpa", trained: bool = False) -> EfficientSamModel:
    """A model for 1024 pixels that pads prompts to six tokens, as released ones do."""
    config = EfficientSamConfig.from_preset(preset)
    torch.manual_seed(0)
    model = EfficientSamModel(config)
    if trained and preset == "ti":
        weights = EfficientSamModel.from_pretrained(default_checkpoint()).state_dict()
        model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def picture(args: argparse.Namespace) -> Image.Image:
    """The photo at 1920 x 1080 pixels."""
    path = args.image
    if path is None:
        import skimage.data

        path = Path(skimage.data.data_dir) / "coffee.png"
    with Image.open(path) as image:
        return image.convert("RGB").resize((1920, 1080))


def take_turns(calls: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    """Seconds of each call, one after the other, `repeats` times after a first time that does not count."""
    synchronize = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            synchronize()
            start = time.perf_counter()
            call()
            synchronize()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def print_row(title: str, times: dict[str, list[float]], operations: float | None = None) -> list[dict]:
    """Print what came out for one kind of work, the first call being the baseline; returns it too."""
    base = next(iter(times.values()))
    rows = []
    for name, values in times.items():
        row = {"work": title, "how": name, "seconds": statistics.median(values)}
        row["speed_up"] = statistics.median(one / other for one, other in zip(base, values))
        line = f"{title:<22}{name:<34}{row['seconds']:>9.3f} s{row['speed_up']:>8.2f}x"
        if operations:
            row["gflop_per_s"] = operations / row["seconds"] / 1e9
            line += f"{row['gflop_per_s']:>8.0f} GFLOP/s of the baseline's work"
        print(line, flush=True)
        rows.append(row)
    return rows


def count(call: Callable[[], object]) -> int:
    """Floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def variants(args: argparse.Namespace, trained: bool = False) -> dict[str, EfficientSamModel]:
    """Our models by dtype."""
    build = partial(build_model, args.preset, trained=trained)
    return {name: build(getattr(torch, name)).to(args.device) for name in args.dtypes}


def measure_machine(args: argparse.Namespace) -> None:
    """Matrix products and copies this machine does at best, which every row is to be held against."""
    for name in args.dtypes:
        dtype = getattr(torch, name)
        a, b = (torch.randn(2048, 2048, device=args.device).to(dtype) for _ in range(2))
        values = take_turns({"product": lambda a=a, b=b: a @ b}, 5, args.device)["product"]
        print(f"matrix products in {name}: {2 * 2048**3 / min(values) / 1e9:.0f} GFLOP/s")
    source = torch.zeros(64 * 2**20, device=args.device)
    target = torch.empty_like(source)
    values = take_turns({"copy": lambda: target.copy_(source)}, 5, args.device)["copy"]
    print(f"copies: {2 * source.nbytes / min(values) / 1e9:.1f} GB/s read and written")


def encoder_rows(args: argparse.Namespace) -> list[dict]:
    pixels = torch.randn(1, 3, SIZE, SIZE, device=args.device)
    baseline = build_model(args.preset, torch.float32, "eager").to(args.device)
    calls = {"eager float32": lambda: baseline.get_image_embeddings(pixels)}
    for name, model in variants(args).items():
        own = pixels.to(model.dtype)
        calls[f"fused {name}"] = lambda model=model, own=own: model.get_image_embeddings(own)
        if args.compile:
            compiled = torch.compile(model.get_image_embeddings, fullgraph=True)
            calls[f"fused {name}, compiled"] = lambda compiled=compiled, own=own: compiled(own)
    return print_row("encoder", take_turns(calls, args.repeats, args.device), count(calls["eager float32"]))


def prompt_rows(args: argparse.Namespace) -> list[dict]:
    rows = []
    baseline = RepeatedImage(build_model(args.preset, torch.float32, "eager").to(args.device))
    embeddings = torch.randn(1, 256, SIZE // 16, SIZE // 16, device=args.device)
    decoders = {name: EfficientSamFastDecoder(model, embeddings) for name, model in variants(args).items()}
    for number in args.prompts:
        points = torch.rand(number, 1, 2, device=args.device) * (SIZE - 1)
        labels = torch.ones(number, 1, dtype=torch.long, device=args.device)
        batches = [(p[None], n[None]) for p, n in zip(points.split(AT_ONCE), labels.split(AT_ONCE))]
        calls = {"image repeated, float32": lambda b=batches: [baseline(embeddings, *prompts) for prompts in b]}
        for name, decoder in decoders.items():
            calls[f"plain path {name}"] = lambda m=decoder.model, b=batches: [
                m.decode_prompts(embeddings, *prompts) for prompts in b
            ]
            calls[f"fast path {name}"] = lambda d=decoder, p=points, n=labels: d(p, n)
        operations = count(next(iter(calls.values())))
        rows += print_row(f"{number} prompts", take_turns(calls, args.repeats, args.device), operations)
    return rows


def everything_rows(args: argparse.Namespace) -> list[dict]:
    """The baseline once, what is compared with it before and after."""
    image, processor = picture(args), EfficientSamImageProcessor(size=SIZE)
    options = {"points_per_crop": args.grid, **THRESHOLDS}
    baseline = RepeatedImage(build_model(args.preset, torch.float32, "eager", trained=True).to(args.device))
    baseline.device, baseline.dtype = torch.device(args.device), torch.float32
    models = variants(args, trained=True)
    found: dict[str, int] = {}

    def stock() -> None:
        generate = _StockSteps(baseline, processor)
        found["stock"] = len(generate(image, **options)["masks"])

    calls: dict[str, Callable[[], object]] = {"stock pipeline's steps, float32": stock}
    for name, model in models.items():
        generator = EfficientSamMaskGenerator(model, processor, **options, output_type="coco_rle")
        calls[f"generator {name}"] = lambda g=generator, n=name: found.update({n: len(g(image)["masks"])})
    baseline_name, *ours = calls
    times: dict[str, list[float]] = {name: [] for name in calls}
    for name in (*ours, baseline_name, *ours):
        start = time.perf_counter()
        calls[name]()
        times[name].append(time.perf_counter() - start)
    times[baseline_name] *= 2
    rows = print_row(f"everything, {args.grid}x{args.grid}", times)
    print(f"masks found: {found}")
    return [{**row, "masks": found[name]} for row, name in zip(rows, ("stock", *models))]


class _StockSteps:
    """`MaskGenerationPipeline` on a model that is no `PreTrainedModel`: the same calls in the same order."""

    def __init__(self, model: RepeatedImage, image_processor: EfficientSamImageProcessor):
        pipeline = object.__new__(MaskGenerationPipeline)
        pipeline.model, pipeline.image_processor, pipeline.feature_extractor = model, image_processor, None
        pipeline.device, pipeline.tokenizer = model.device, None
        self.pipeline = pipeline

    @torch.no_grad()
    def __call__(self, image: Image.Image, points_per_crop: int, **thresholds: float) -> dict:
        boxes, points, crops, labels = self.pipeline.image_processor.generate_crop_boxes(
            image, SIZE, points_per_crop=points_per_crop
        )
        pixels = self.pipeline.image_processor(images=crops, return_tensors="pt")["pixel_values"]
        embeddings = self.pipeline.model.get_image_embeddings(pixels.to(self.pipeline.device))
        outputs = []
        for start in range(0, points.shape[1], AT_ONCE):
            inputs = {
                "input_boxes": boxes,
                "is_last": False,
                "original_sizes": torch.tensor([image.size[::-1]]),
                "full_image_size": torch.tensor(image.size[::-1]),
                "image_embeddings": embeddings,
                "input_points": points[:, start : start + AT_ONCE].to(self.pipeline.device),
                "input_labels": labels[:, start : start + AT_ONCE].to(self.pipeline.device),
            }
            outputs.append(self.pipeline._forward(inputs, **thresholds))
        return self.pipeline.postprocess(outputs, output_rle_mask=True)


def memory_rows(args: argparse.Namespace) -> list[dict]:
    """Peak memory over that of the loaded model, for grids of a quarter, all and four times the points."""
    rows = []
    for grid in (args.grid // 2, args.grid, 2 * args.grid):
        command = [sys.executable, __file__, "--preset", args.preset, "--peak-of", str(max(grid, 1))]
        command += ["--image", str(args.image)] if args.image else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = {"work": f"memory, {grid}x{grid}", **json.loads(output.splitlines()[-1])}
        print(f"{row['work']:<22}{'generator bfloat16':<34}{row['gigabytes']:>9.2f} GB over the loaded model, "
              f"{row['seconds']:.1f} s, {row['masks']} masks", flush=True)  # fmt: skip
        rows.append(row)
    return rows


def print_peak(args: argparse.Namespace) -> None:
    """What a process for one grid prints."""
    model, image = build_model(args.preset, torch.bfloat16, trained=True), picture(args)
    generator = EfficientSamMaskGenerator(
        model,
        EfficientSamImageProcessor(size=SIZE),
        **THRESHOLDS,
        points_per_crop=args.peak_of,
        output_type="coco_rle",
    )
    Path("/proc/self/clear_refs").write_text("5")  # the peak that is inherited, and that of loading
    before, start = memory("VmRSS"), time.perf_counter()
    masks = len(generator(image)["masks"])
    peak = memory("VmHWM") - before
    print(json.dumps({"gigabytes": peak / 2**20, "seconds": time.perf_counter() - start, "masks": masks}))


def memory(kind: str) -> int:
    """VmRSS or VmHWM of this process in kB (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(kind))


def sam_rows(args: argparse.Namespace) -> list[dict]:
    """64 prompts by transformers' SAM, whose decoder has the same size, beside the baseline."""
    baseline = RepeatedImage(build_model(args.preset, torch.float32, "eager").to(args.device))
    sam = SamModel(SamConfig(vision_config={"num_hidden_layers": 1})).to(args.device).eval()
    embeddings = torch.randn(1, 256, SIZE // 16, SIZE // 16, device=args.device)
    points = torch.rand(1, 64, 1, 2, device=args.device) * (SIZE - 1)
    labels = torch.ones(1, 64, 1, dtype=torch.long, device=args.device)
    calls = {
        "image repeated, float32": lambda: baseline(embeddings, points, labels),
        "SamModel, float32": lambda: sam(image_embeddings=embeddings, input_points=points, input_labels=labels),
    }
    return print_row("64 prompts", take_turns(calls, min(args.repeats, 3), args.device))


def other_rows(args: argparse.Namespace) -> list[dict]:
    """Other models of transformers beside ours, all with fused attention and random weights in float32."""
    pixels = torch.randn(1, 3, SIZE, SIZE, device=args.device)
    points = torch.rand(1, 64, 1, 2, device=args.device) * (SIZE - 1)
    labels = torch.ones(1, 64, 1, dtype=torch.long, device=args.device)
    ours = build_model(args.preset, torch.float32).to(args.device)
    decoder = EfficientSamFastDecoder(ours, ours.get_image_embeddings(pixels))
    encode: dict[str, Callable[[], object]] = {"EfficientSAM": lambda: ours.get_image_embeddings(pixels)}
    decode: dict[str, Callable[[], object]] = {"EfficientSAM": lambda: decoder(points[0], labels[0])}
    for name, (kind, config) in OTHERS.items():
        try:
            model = getattr(transformers, kind)(getattr(transformers, config)()).to(args.device).eval()
        except ImportError as error:
            print(f"{name}: not run, {str(error).strip().splitlines()[0]}")
            continue
        prompts = {"input_points": points, "input_labels": labels}
        embeddings = model.get_image_embeddings(pixels)
        encode[name] = partial(model.get_image_embeddings, pixels)
        decode[name] = partial(model, image_embeddings=embeddings, **prompts)
    repeats = min(args.repeats, 3)
    encoded = print_row("encoder", take_turns(encode, repeats, args.device))
    return encoded + print_row("64 prompts", take_turns(decode, repeats, args.device))


@torch.inference_mode()
def main() -> None:
    args = parse_arguments()
    if args.peak_of:
        print_peak(args)
        return
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    machine = describe_machine(torch.device(args.device))
    print(f"EfficientSAM-{args.preset.capitalize()} at {SIZE} px; torch {torch.__version__}, "
          f"transformers {transformers.__version__}, {machine}, {date}")  # fmt: skip
    measure_machine(args)
    measure = {"encoder": encoder_rows, "prompts": prompt_rows, "everything": everything_rows, "memory": memory_rows}
    measure |= {"sam": sam_rows, "others": other_rows}
    rows = [row for name in args.rows for row in measure[name](args)]
    if args.json:
        record = {
            "arguments": {**vars(args), "image": str(args.image)},
            "rows": rows,
            "machine": machine,
            "date": date,
        }
        partial = Path(args.json).with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        partial.replace(args.json)


if __name__ == "__main__":
    main()
