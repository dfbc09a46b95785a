# SPDX-License-Identifier: Apache-2.0
"""The Space under load: visitors who click on different pictures at once, each answer checked.

Usage: python benchmarks/space_load.py [--clients 20] [--seconds 120] [--rounds 2] [--pause 1.0] [--abuser]
    [--one-address] [--json FILE]

Starts the Space on loopback with the checkpoint that ships, its code in the folder as on the Hub. Every client has a
picture of its own, and knows the model's answers for it beforehand: scores and area of each click are compared, and
every few clicks the mask itself. Times are those of whole clicks, from the event to all that the page shows, without
the picture's encoding; pauses between them are random around --pause. At the end of a round all tabs are closed, and
the next begins with new ones: memory that does not return would add up. Ends with 1 after an error or a wrong answer.

With --abuser every second round has somebody beside the visitors who sends, every second, requests for everything by
the dozen and others that cost less, and waits for one answer at a time: see `Abuser`. The 95th percentiles of rounds
with and without are compared; a visitor who is refused anything is an error. Everybody has an address of their own, as
a proxy would tell it, or with --one-address all come from one, the abuser too.
"""

import argparse
import http.client
import io
import json
import random
import re
import statistics
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps

from efficientsam_hf.files import write_json
from efficientsam_hf.machine import describe_machine


sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.append(str(Path(__file__).resolve().parents[1] / "spaces" / "efficientsam"))

import drawing
from segmenting import USUAL_GRID, Candidates, Segmenter
from space_server import SPACE, Refused, SpaceServer, Visitor, call, post, save_model_with_code


CLICKS_KNOWN = 8  # different clicks of each client
CLICKS_PER_MASK = 5  # so many for each mask that is compared pixel by pixel
SCORE_TOLERANCE, SHARE_TOLERANCE, PIXEL_TOLERANCE = 0.011, 0.11, 1e-3  # what is printed is rounded
SECONDS_BETWEEN_SAMPLES = 0.25
SECONDS_AFTER_CLOSING = 10  # shorter than the Space's own, so that nobody has to wait
# What an abuser sends every second; of the page's events, each from a tab of its own, with these inputs.
BURST = {"segment_everything": 64, "segment_points": 16, "load_example": 2, "redraw": 2}
EVENTS = {"load_example": ["Coffee"], "redraw": []}
STATUS = re.compile(r"Predicted IoU ([\d.]+), ([\d.]+) % of the picture. Decoded in ([\d,]+) ms")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120, help="how long they click in a round")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pause", type=float, default=1.0, help="mean seconds between two clicks of a client")
    parser.add_argument("--abuser", action="store_true", help="compare rounds without and with one")
    parser.add_argument("--one-address", action="store_true", help="all come from one address")
    parser.add_argument("--json", metavar="FILE", help="write the numbers here")
    args = parser.parse_args()
    if args.clients < 1 or args.rounds < 1 or args.seconds <= 0 or args.pause < 0:
        parser.error("--clients, --rounds and --seconds must be positive, and --pause not negative")
    if args.abuser and args.rounds < 2:
        parser.error("--abuser needs --rounds of 2 at least: one without it and one with it")
    return args


@dataclass
class KnownClick:
    """A pixel of the view, and what the model answers: share of the picture in percent, mask (H, W), scores (3)."""

    place: tuple[int, int]
    scores: list[float]
    share: float
    mask: np.ndarray


@dataclass
class Client:
    """One visitor and what became of its clicks."""

    number: int
    picture: bytes
    clicks: list[KnownClick]
    address: str
    milliseconds: list[float] = field(default_factory=list)
    decoder_milliseconds: list[float] = field(default_factory=list)
    masks_compared: int = 0
    errors: list[str] = field(default_factory=list)

    def run(self, url: str, ready: threading.Barrier, seconds: float, pause: float) -> None:
        """Open a tab, load the picture, wait for the others, click until time is up, close the tab."""
        chance = random.Random(self.number)
        try:
            visitor = Visitor(url, self.address)
            visitor.open()
            visitor.load(self.picture, f"picture_{self.number}.jpg")
            ready.wait(600)
            end = time.monotonic() + seconds
            time.sleep(chance.uniform(0, 2 * pause))  # people do not all start at once
            while time.monotonic() < end:
                self._click(visitor, chance.choice(self.clicks))
                time.sleep(chance.uniform(0, 2 * pause))
            visitor.close()
        except Exception as error:  # whatever it is, it is a result of this measurement
            self.errors.append(f"client {self.number}: {type(error).__name__}: {error}")
            ready.abort()

    def _click(self, visitor: Visitor, known: KnownClick) -> None:
        visitor.send("reset")
        start = time.perf_counter()
        changes = visitor.click(*known.place)
        self.milliseconds.append(1000 * (time.perf_counter() - start))
        score, share, decoded = (float(text.replace(",", "")) for text in STATUS.search(changes["status"]).groups())
        self.decoder_milliseconds.append(decoded)
        captions = [float(entry["caption"].split()[-1]) for entry in changes["gallery"]["value"]]
        near = np.abs(np.subtract([score, *captions], [known.scores[0], *known.scores])).max() <= SCORE_TOLERANCE
        if not near or abs(share - known.share) > SHARE_TOLERANCE:
            self.errors.append(f"client {self.number}: wrong answer at {known.place}: {score}, {captions}, {share} %")
        if len(self.milliseconds) % CLICKS_PER_MASK == 0:
            self._compare_mask(visitor, known)

    def _compare_mask(self, visitor: Visitor, known: KnownClick) -> None:
        with Image.open(io.BytesIO(visitor.mask_files()["mask.png"])) as image:
            mask = np.asarray(image) > 127
        self.masks_compared += 1
        if mask.shape != known.mask.shape or (mask != known.mask).mean() > PIXEL_TOLERANCE:
            self.errors.append(f"client {self.number}: wrong mask at {known.place}")


@dataclass
class Abuser:
    """One client that takes whatever it is given: counts of what was taken and refused, by the name of the event."""

    address: str
    taken: Counter = field(default_factory=Counter)
    refused: Counter = field(default_factory=Counter)
    answered: Counter = field(default_factory=Counter)
    errors: list[str] = field(default_factory=list)

    def run(self, url: str, stop: threading.Event) -> None:
        """Every second until told to stop: see BURST. Nothing of it is waited for, other calls are, one by one."""
        try:
            visitor = Visitor(url, self.address)
            picture = visitor.upload((SPACE / "examples" / "coffee.jpg").read_bytes(), "coffee.jpg")
            prompts = {"segment_everything": [USUAL_GRID, None, None], "segment_points": [[[290, 180]], [1], None]}
            calls = {name: json.dumps({"data": [picture, *inputs]}) for name, inputs in prompts.items()}
            for name, data in calls.items():
                in_background(self._call, url, name, data, stop)
            while not stop.is_set():
                next_burst = time.monotonic() + 1
                for name, count in BURST.items():
                    for _ in range(count):
                        self._send(visitor, name, calls.get(name))
                stop.wait(max(0.0, next_burst - time.monotonic()))
        except Exception as error:  # whatever it is, it is a result of this measurement
            self.errors.append(f"abuser: {type(error).__name__}: {error}")

    def _call(self, url: str, name: str, data: str, stop: threading.Event) -> None:
        """Call as often as it is let."""
        while not stop.is_set():
            try:
                call(url, name, data, self.address)
                self.answered[name] += 1
            except (Refused, OSError, http.client.HTTPException):
                stop.wait(0.1)

    def _send(self, visitor: Visitor, name: str, data: str | None) -> None:
        try:
            if data is not None:
                post(visitor.url, name, data, self.address)
            else:
                visitor.session = uuid.uuid4().hex  # a new tab each time
                visitor.post(name, *EVENTS[name])
            self.taken[name] += 1
        except Refused:
            self.refused[name] += 1


def make_picture(number: int) -> Image.Image:
    """A photo of its own for each client: an example, cut, mirrored and turned in colour."""
    chance = random.Random(number)
    files = sorted((SPACE / "examples").glob("*.jpg"))
    with Image.open(files[number % len(files)]) as image:
        picture = image.convert("RGB")
    left, top = (round(chance.uniform(0, 0.25) * side) for side in picture.size)
    picture = picture.crop((left, top, picture.width, picture.height))
    picture = ImageOps.mirror(picture) if chance.random() < 0.5 else picture
    bands = list(picture.split())
    chance.shuffle(bands)
    return Image.merge("RGB", bands)


def make_client(number: int, segmenter: Segmenter, address: str) -> Client:
    """A client whose picture is as the server will read it, with the answers to its clicks."""
    buffer = io.BytesIO()
    make_picture(number).save(buffer, "JPEG", quality=92)
    with Image.open(io.BytesIO(buffer.getvalue())) as image:
        picture = image.convert("RGB")
    view, embedding = drawing.make_view(picture), segmenter.embed(picture)
    chance = random.Random(1000 + number)
    clicks = []
    while len(clicks) < CLICKS_KNOWN:
        place = tuple(chance.randrange(side) for side in view.size)
        candidates = segmenter.decode(embedding, [drawing.view_to_picture(place, view.size, picture.size)], [1])
        if clear_order(candidates):
            shown = segmenter.masks(candidates.only(0), (view.height, view.width))[0]
            mask = segmenter.full_masks(candidates.only(0))[0]
            clicks.append(KnownClick(place, candidates.scores, 100 * float(shown.mean()), mask))
    return Client(number, buffer.getvalue(), clicks, address)


def clear_order(candidates: Candidates) -> bool:
    """Whether rounding cannot swap the best two masks."""
    return candidates.scores[0] - candidates.scores[1] > 1e-3


def bare_decoder(segmenter: Segmenter, repeats: int = 30) -> list[float]:
    """Milliseconds of the decoder alone, nothing else running here."""
    embedding = segmenter.embed(make_picture(0))
    point = [embedding.size[1] / 2, embedding.size[0] / 2]
    return [segmenter.decode(embedding, [point], [1]).milliseconds for _ in range(repeats)][5:]


def memory_of(process: int) -> float:
    """Resident memory of a process in MB (Linux)."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) / 1000


def watch(process: int, stop: threading.Event, samples: list[float]) -> None:
    """Sample a process's memory until told to stop."""
    while not stop.wait(SECONDS_BETWEEN_SAMPLES):
        samples.append(memory_of(process))


def in_background(call: Callable[..., None], *values: Any) -> threading.Thread:
    thread = threading.Thread(target=call, args=values, daemon=True)
    thread.start()
    return thread


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Start the Space, let the clients click, -> the numbers."""
    model = save_model_with_code(folder / "model")
    segmenter = Segmenter(str(model), trust_remote_code=True)
    addresses = ["203.0.113.1" if args.one_address else f"203.0.113.{number + 1}" for number in range(args.clients)]
    clients = [make_client(number, segmenter, address) for number, address in enumerate(addresses)]
    abuser = Abuser(addresses[0] if args.one_address else "198.51.100.1")
    with SpaceServer(folder, model, CLOSED_SECONDS=SECONDS_AFTER_CLOSING) as server:
        bare = bare_decoder(segmenter)
        before = memory_of(server.process.pid)
        beside = [abuser if args.abuser and number % 2 else None for number in range(args.rounds)]
        rounds = [one_round(clients, server, args, other) for other in beside]
        bare += bare_decoder(segmenter)
        traceback = "Traceback" in server.log.read_text()
    clicks = [value for client in clients for value in client.milliseconds]
    return {
        "clicks": len(clicks),
        "masks_compared": sum(client.masks_compared for client in clients),
        "errors": [error for one in (*clients, abuser) for error in one.errors] + ["traceback in the log"] * traceback,
        "click_ms": percentiles(clicks),
        "server_decoder_ms": percentiles([value for client in clients for value in client.decoder_milliseconds]),
        "bare_decoder_ms": percentiles(bare),
        "memory_mb": {"before": before, "rounds": rounds},
        "abuser": {name: [count[name] for count in (abuser.taken, abuser.refused, abuser.answered)] for name in BURST},
    }


def one_round(
    clients: list[Client], server: SpaceServer, args: argparse.Namespace, abuser: Abuser | None
) -> dict[str, Any]:
    """All clients at once; -> the server's memory in MB at most, when the tabs are closed, and when sessions ended.

    With the times of the clicks, and whether there was an abuser.
    """
    samples, stop = [], threading.Event()
    others = [in_background(watch, server.process.pid, stop, samples)]
    if abuser is not None:
        others.append(in_background(abuser.run, server.url, stop))
    known = [len(client.milliseconds) for client in clients]
    ready = threading.Barrier(args.clients)
    threads = [in_background(client.run, server.url, ready, args.seconds, args.pause) for client in clients]
    for thread in threads:
        thread.join()
    stop.set()
    for thread in others:
        thread.join()
    closed = memory_of(server.process.pid)
    time.sleep(SECONDS_AFTER_CLOSING + 20)  # gradio sees within 15 s that a tab is gone
    clicks = [value for client, count in zip(clients, known) for value in client.milliseconds[count:]]
    memory = {"most": max(samples), "closed": closed, "ended": memory_of(server.process.pid)}
    return {**memory, "abuser": abuser is not None, "click_ms": percentiles(clicks), "clicks": clicks}


def percentiles(values: list[float]) -> dict[str, float]:
    """Median and 95th percentile; NaN for both where there are no values."""
    if not values:
        return {"median": float("nan"), "p95": float("nan")}
    return {"median": statistics.median(values), "p95": float(np.percentile(values, 95))}


def print_comparison(results: dict[str, Any]) -> None:
    """Clicks without and with the abuser, over all rounds of each kind, and what became of the abuser's requests."""
    p95 = {}
    for beside in (False, True):
        rounds = [round for round in results["memory_mb"]["rounds"] if round["abuser"] == beside]
        clicks = [value for round in rounds for value in round["clicks"]]
        times, p95[beside] = percentiles(clicks), percentiles(clicks)["p95"]
        print(f"{'with' if beside else 'without':<8}abuser{len(clicks):>6} clicks{times['median']:>9.1f} ms median"
              f"{times['p95']:>9.1f} ms 95th percentile")  # fmt: skip
    print(f"95th percentile with the abuser: {p95[True] / p95[False]:.2f} times that without")
    for name, (taken, refused, answered) in results["abuser"].items():
        print(f"abuser's {name}: {taken} taken and {refused} refused of those without a listener, {answered} answered")


def main() -> int:
    args = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        results = measure(args, Path(folder))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    date, machine = datetime.now(timezone.utc).isoformat(timespec="seconds"), describe_machine()
    print(f"{args.clients} clients, {args.rounds} x {args.seconds:g} s, {results['clicks']} clicks, "
          f"{results['masks_compared']} masks compared, {len(results['errors'])} errors\n"
          f"{machine}, {versions}, {date}")  # fmt: skip
    for name, key in (
        ("click, whole", "click_ms"),
        ("decoder in it", "server_decoder_ms"),
        ("decoder alone", "bare_decoder_ms"),
    ):
        print(f"{name:<16}{results[key]['median']:>9.1f} ms median{results[key]['p95']:>9.1f} ms 95th percentile")
    print(f"memory of the server: {results['memory_mb']['before']:.0f} MB before")
    for number, memory in enumerate(results["memory_mb"]["rounds"], 1):
        print(f"round {number}: {memory['most']:.0f} MB at most, {memory['closed']:.0f} when the tabs were closed, "
              f"{memory['ended']:.0f} when their sessions had ended")  # fmt: skip
    if args.abuser:
        print_comparison(results)
    print("\n".join(results["errors"][:20]))
    if args.json:
        record = {"arguments": vars(args), "results": results, "machine": machine, "versions": versions, "date": date}
        write_json(Path(args.json), record)
    return 1 if results["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
