# SPDX-License-Identifier: Apache-2.0
"""Speed and memory of encoder, prompts and segment-everything against the way released code and stock pipeline go.

Usage: python benchmarks/segment_everything.py [--rows encoder prompts everything memory sam others] [--image FILE]
       [--preset ti] [--repeats 5] [--prompts 1 16 64] [--grid 32] [--json FILE]

The baseline is frozen here: attention written out in float32, the image repeated for every prompt, every mask brought
to the size of the image before any is filtered, which is done by the filter of transformers' SAM. What is compared
takes turns with it in one process; speed-ups are medians of the ratios within a turn. Weights are random; `everything`
and `memory` of Ti take those of the shipped checkpoint, at 1024 pixels and with low thresholds, so that there are
masks to find: their number is printed. In `everything` the baseline, which takes minutes, runs once, what is compared
before and after it. `sam` checks the baseline: the prompt decoder of transformers' SamModel has the same work to do.
`memory` starts a process for each grid, in the last of the dtypes, and reads its peak. `others` encodes a picture and
decodes 64 prompts by other promptable models of transformers, those that can be built here.

Beside the seconds of each row stand the operations that were counted in it (two per multiply-add), the bytes that its
operations read and wrote, and the seconds that this machine takes at least for either: products of matrices in the
row's dtype at the rate measured at the start, copies at theirs. What is used again before it leaves the cache counts
as bytes again, so a row can be faster than its bytes.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch
import transformers
from counted_work import Rates, Work, counting, measure_rates, synchronize
from PIL import Image
from torch import nn
from transformers import MaskGenerationPipeline, SamConfig, SamModel
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from efficientsam_hf import (
    EfficientSamConfig,
    EfficientSamImageProcessor,
    EfficientSamMaskGenerator,
    EfficientSamModel,
    default_checkpoint,
)
from efficientsam_hf.files import write_json
from efficientsam_hf.machine import describe_machine, is_emulated
from efficientsam_hf.models.fast_decoding_efficientsam import EfficientSamFastDecoder


ROWS = ("encoder", "prompts", "everything", "memory", "sam", "others")
OTHERS = {
    "SamModel, ViT-B": ("SamModel", "SamConfig"),
    "Sam2Model, Hiera-T": ("Sam2Model", "Sam2Config"),
    "EdgeTamModel": ("EdgeTamModel", "EdgeTamConfig"),  # needs timm
}
DTYPES = ("float32", "bfloat16", "float16")
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


class StockFilter(EfficientSamImageProcessor):
    """Our image processor with SAM's filter of masks, which no change of ours makes faster."""

    filter_masks = SamImageProcessorPil.filter_masks


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--preset", default="ti", choices=["ti", "s", "b"])
    parser.add_argument("--image", type=Path, help="picture (default: scikit-image's coffee, enlarged to 1920 x 1080)")
    parser.add_argument("--prompts", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--grid", type=int, default=32, help="points per side")
    parser.add_argument("--repeats", type=int, default=5, help="turns of encoder and prompts; everything takes one")
    parser.add_argument(
        "--dtypes",
        nargs="+",
        choices=DTYPES,
        help="default: float32, and bfloat16 where the device multiplies it well",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="also with torch.compile")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    parser.add_argument("--peak-of", type=int, metavar="GRID", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for name, values in (("prompts", args.prompts), ("repeats", [args.repeats]), ("grid", [args.grid])):
        if min(values) < 1:
            parser.error(f"--{name} must be at least 1, got {min(values)}")
    if args.dtypes is None:
        emulated = is_emulated(torch.bfloat16, args.device)
        args.dtypes = ["float32"] if emulated else ["float32", "bfloat16"]
        if emulated and not args.peak_of:
            print(f"bfloat16 is not run: {args.device} emulates it")
    if args.image and not args.image.is_file():
        parser.error(f"--image {args.image} is no file")
    return args


def build_model(preset: str, dtype: torch.dtype, attention: str = "sdpa", trained: bool = False) -> EfficientSamModel:
    """A model for 1024 pixels. It pads no prompts to six tokens, as released ones do, and all ways decode fewer."""
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


@dataclass
class Way:
    """One way to do a piece of work; the first of several is what the others are held against."""

    call: Callable[[], object]
    dtype: str = "float32"
    work: Work = field(default_factory=Work)
    seconds: list[float] = field(default_factory=list)

    def run(self, device: str, timed: bool = True, counted: bool = False) -> None:
        synchronize(device)
        start = time.perf_counter()
        with counting(self.work) if counted else nullcontext():
            self.call()
        synchronize(device)
        if timed:
            self.seconds.append(time.perf_counter() - start)


def take_turns(ways: dict[str, Way], repeats: int, device: str) -> None:
    """Run each way after the other, `repeats` times after a first time in which its work is counted."""
    for turn in range(repeats + 1):
        for way in ways.values():
            way.run(device, timed=turn > 0, counted=turn == 0 and not way.work.operations)


def print_row(title: str, ways: dict[str, Way], rates: Rates) -> list[dict]:
    """Print what came out for one kind of work; returns it too."""
    base = next(iter(ways.values()))
    rows = []
    for name, way in ways.items():
        seconds = statistics.median(way.seconds)
        speed_up = statistics.median(one / other for one, other in zip(base.seconds, way.seconds))
        least, copies = rates.limits(way.work, way.dtype)
        row = {"work": title, "how": name, "seconds": seconds, "speed_up": speed_up, "dtype": way.dtype}
        row |= {"operations": way.work.operations, "bytes": way.work.bytes}
        row |= {"seconds_of_products": least, "seconds_of_copies": copies}
        print(f"{title:<22}{name:<34}{seconds:>9.3f} s{speed_up:>8.2f}x{way.work.operations / 1e9:>10.1f} GFLOP"
              f"{least:>9.3f} s{way.work.bytes / 1e9:>9.2f} GB{copies:>9.3f} s", flush=True)  # fmt: skip
        rows.append(row)
    return rows


def variants(args: argparse.Namespace, trained: bool = False) -> dict[str, EfficientSamModel]:
    """Our models by dtype."""
    build = partial(build_model, args.preset, trained=trained)
    return {name: build(getattr(torch, name)).to(args.device) for name in args.dtypes}


def encoder_rows(args: argparse.Namespace, rates: Rates) -> list[dict]:
    pixels = torch.randn(1, 3, SIZE, SIZE, device=args.device)
    baseline = build_model(args.preset, torch.float32, "eager").to(args.device)
    ways = {"eager float32": Way(lambda: baseline.get_image_embeddings(pixels))}
    for name, model in variants(args).items():
        own = pixels.to(model.dtype)
        way = ways[f"fused {name}"] = Way(lambda model=model, own=own: model.get_image_embeddings(own), name)
        if args.compile:
            compiled = torch.compile(model.get_image_embeddings, fullgraph=True)
            # Its work is what the uncompiled way counts just before.
            ways[f"fused {name}, compiled"] = Way(lambda call=compiled, own=own: call(own), name, way.work)
    take_turns(ways, args.repeats, args.device)
    return print_row("encoder", ways, rates)


def prompt_rows(args: argparse.Namespace, rates: Rates) -> list[dict]:
    rows = []
    baseline = RepeatedImage(build_model(args.preset, torch.float32, "eager").to(args.device))
    embeddings = torch.randn(1, 256, SIZE // 16, SIZE // 16, device=args.device)
    decoders = {name: EfficientSamFastDecoder(model, embeddings) for name, model in variants(args).items()}
    for number in args.prompts:
        points = torch.rand(number, 1, 2, device=args.device) * (SIZE - 1)
        labels = torch.ones(number, 1, dtype=torch.long, device=args.device)
        batches = [(p[None], n[None]) for p, n in zip(points.split(AT_ONCE), labels.split(AT_ONCE))]
        ways = {"image repeated, float32": Way(lambda b=batches: [baseline(embeddings, *prompts) for prompts in b])}
        for name, decoder in decoders.items():
            ways[f"plain path {name}"] = Way(
                lambda m=decoder.model, b=batches: [m.decode_prompts(embeddings, *prompts) for prompts in b], name
            )
            ways[f"fast path {name}"] = Way(lambda d=decoder, p=points, n=labels: d(p, n), name)
        take_turns(ways, args.repeats, args.device)
        rows += print_row(f"{number} prompts", ways, rates)
    return rows


def everything_rows(args: argparse.Namespace, rates: Rates) -> list[dict]:
    """The baseline once, what is compared with it before and after; ours once more to count, which slows them."""
    image, processor, stock_processor = picture(args), EfficientSamImageProcessor(size=SIZE), StockFilter(size=SIZE)
    options = {"points_per_crop": args.grid, **THRESHOLDS}
    baseline = RepeatedImage(build_model(args.preset, torch.float32, "eager", trained=True).to(args.device))
    baseline.device, baseline.dtype = torch.device(args.device), torch.float32
    found: dict[str, int] = {}

    def stock() -> None:
        generate = _StockSteps(baseline, stock_processor)
        found["stock"] = len(generate(image, **options)["masks"])

    ours = {}
    for name, model in variants(args, trained=True).items():
        generator = EfficientSamMaskGenerator(model, processor, **options, output_type="coco_rle")
        ours[name] = Way(lambda g=generator, n=name: found.update({n: len(g(image)["masks"])}), name)
    for way in ours.values():
        way.run(args.device, timed=False, counted=True)
        way.run(args.device)
    first = Way(stock)
    first.run(args.device, counted=True)
    first.seconds *= 2
    for way in ours.values():
        way.run(args.device)
    ways = {"stock pipeline's steps, float32": first} | {f"generator {name}": way for name, way in ours.items()}
    rows = print_row(f"everything, {args.grid}x{args.grid}", ways, rates)
    print(f"masks found: {found}")
    return [{**row, "masks": found[name]} for row, name in zip(rows, ("stock", *ours))]


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


def memory_rows(args: argparse.Namespace, rates: Rates) -> list[dict]:
    """Peak memory over that of the loaded model, for grids of a quarter, all and four times the points."""
    rows = []
    dtype = args.dtypes[-1]
    for grid in (args.grid // 2, args.grid, 2 * args.grid):
        command = [sys.executable, __file__, "--preset", args.preset, "--dtypes", dtype]
        command += ["--peak-of", str(max(grid, 1))]
        command += ["--image", str(args.image)] if args.image else []
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = {"work": f"memory, {grid}x{grid}", "dtype": dtype, **json.loads(output.splitlines()[-1])}
        print(f"{row['work']:<22}{f'generator {dtype}':<34}{row['gigabytes']:>9.2f} GB over the loaded model, "
              f"{row['seconds']:.1f} s, {row['masks']} masks", flush=True)  # fmt: skip
        rows.append(row)
    return rows


def print_peak(args: argparse.Namespace) -> None:
    """What a process for one grid prints."""
    model, image = build_model(args.preset, getattr(torch, args.dtypes[-1]), trained=True), picture(args)
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


def sam_rows(args: argparse.Namespace, rates: Rates) -> list[dict]:
    """The prompts by transformers' SAM, whose decoder has the same size, beside the baseline."""
    baseline = RepeatedImage(build_model(args.preset, torch.float32, "eager").to(args.device))
    embeddings = torch.randn(1, 256, SIZE // 16, SIZE // 16, device=args.device)
    points = torch.rand(1, 64, 1, 2, device=args.device) * (SIZE - 1)
    labels = torch.ones(1, 64, 1, dtype=torch.long, device=args.device)
    ways = {"image repeated, float32": Way(lambda: baseline(embeddings, points, labels))}
    for attention in ("eager", "sdpa"):
        sam = SamModel(SamConfig(vision_config={"num_hidden_layers": 1}))
        sam.set_attn_implementation(attention)
        prompts = {"image_embeddings": embeddings, "input_points": points, "input_labels": labels}
        ways[f"SamModel {attention}, float32"] = Way(partial(sam.to(args.device).eval(), **prompts))
    take_turns(ways, min(args.repeats, 3), args.device)
    return print_row("64 prompts", ways, rates)


def other_rows(args: argparse.Namespace, rates: Rates) -> list[dict]:
    """Other models of transformers beside ours, all with fused attention and random weights in float32."""
    pixels = torch.randn(1, 3, SIZE, SIZE, device=args.device)
    points = torch.rand(1, 64, 1, 2, device=args.device) * (SIZE - 1)
    labels = torch.ones(1, 64, 1, dtype=torch.long, device=args.device)
    ours = build_model(args.preset, torch.float32).to(args.device)
    decoder = EfficientSamFastDecoder(ours, ours.get_image_embeddings(pixels))
    encode = {"EfficientSAM": Way(lambda: ours.get_image_embeddings(pixels))}
    decode = {"EfficientSAM": Way(lambda: decoder(points[0], labels[0]))}
    for name, (kind, config) in OTHERS.items():
        try:
            model = getattr(transformers, kind)(getattr(transformers, config)()).to(args.device).eval()
        except ImportError as error:
            print(f"{name}: not run, {str(error).strip().splitlines()[0]}")
            continue
        prompts = {"input_points": points, "input_labels": labels}
        embeddings = model.get_image_embeddings(pixels)
        encode[name] = Way(partial(model.get_image_embeddings, pixels))
        decode[name] = Way(partial(model, image_embeddings=embeddings, **prompts))
    rows = []
    for title, ways in (("encoder", encode), ("64 prompts", decode)):
        take_turns(ways, min(args.repeats, 3), args.device)
        rows += print_row(title, ways, rates)
    return rows


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
    rates = measure_rates(list(dict.fromkeys(["float32", *args.dtypes])), args.device)
    for name, rate in rates.operations.items():
        print(f"matrix products in {name}: {rate / 1e9:.0f} GFLOP/s")
    print(f"copies: {rates.bytes / 1e9:.1f} GB/s read and written")
    measure = {"encoder": encoder_rows, "prompts": prompt_rows, "everything": everything_rows, "memory": memory_rows}
    measure |= {"sam": sam_rows, "others": other_rows}
    rows = [row for name in args.rows for row in measure[name](args, rates)]
    if args.json:
        record = {
            "arguments": {**vars(args), "image": str(args.image)},
            "rates": vars(rates),
            "rows": rows,
            "machine": machine,
            "date": date,
        }
        write_json(Path(args.json), record)


if __name__ == "__main__":
    main()
