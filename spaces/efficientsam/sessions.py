# SPDX-License-Identifier: Apache-2.0
"""What the app keeps for one visitor: the picture, its embedding, the prompts so far and the answers to them."""

from __future__ import annotations

import ctypes
import sys
import threading
from dataclasses import dataclass, field

import drawing
from PIL import Image
from segmenting import Box, Candidates, Embedding, Everything


SECONDS_TO_LIVE = 1800  # after the last action
SECONDS_AFTER_CLOSING = 120  # of the tab: a phone that sleeps or loses the network closes it too, and comes back


@dataclass(frozen=True)
class Click:
    """A point in pixels of the picture: label 1 on the object, 0 beside it, None for the corner of a box."""

    x: float
    y: float
    label: int | None


@dataclass
class Prompts:
    """Clicks in the order in which they came, so that the last one can be taken back."""

    clicks: list[Click] = field(default_factory=list)

    @property
    def points(self) -> list[list[float]]:
        """[x, y] of the clicks on the object and beside it."""
        return [[click.x, click.y] for click in self.clicks if click.label is not None]

    @property
    def labels(self) -> list[int]:
        """Their labels, 1 and 0."""
        return [click.label for click in self.clicks if click.label is not None]

    @property
    def corner(self) -> Click | None:
        """The first corner of a box whose second is still to come."""
        corners = self._corners()
        return corners[-1] if len(corners) % 2 else None

    @property
    def box(self) -> Box | None:
        """The last complete box (x0, y0, x1, y1), None while the next is being drawn."""
        corners = self._corners()
        if not corners or len(corners) % 2:
            return None
        first, second = corners[-2:]
        return min(first.x, second.x), min(first.y, second.y), max(first.x, second.x), max(first.y, second.y)

    def asks(self) -> bool:
        """Whether there is an object to look for: a box, or a point on it."""
        return self.box is not None or 1 in self.labels

    def _corners(self) -> list[Click]:
        return [click for click in self.clicks if click.label is None]


class Session:
    """One visitor's state. Events of a visitor may overlap, so whoever changes it holds `lock`."""

    def __init__(self):
        self.lock = threading.RLock()
        self.uses = 0
        self.offers_files = False  # what the page was told last
        self.free()

    def __deepcopy__(self, memo: dict) -> Session:
        """A fresh one: gradio copies the initial value for every visitor."""
        return Session()

    def free(self) -> None:
        """Forget the picture and all that was made of it."""
        with self.lock:
            self.name = "picture"
            self.picture: Image.Image | None = None
            self.view: Image.Image | None = None
            self.small: Image.Image | None = None
            self.embedding: Embedding | None = None
            self.forget_everything()
            self.forget_prompts()

    def end(self) -> None:
        """Forget everything and give the memory back."""
        self.free()
        return_memory()

    def end_unless_used(self, seconds: float) -> None:
        """End after so many seconds, if the visitor does nothing until then."""
        timer = threading.Timer(seconds, self._end_if_unused_since, [self.uses])
        timer.daemon = True
        timer.start()

    def _end_if_unused_since(self, uses: int) -> None:
        if self.uses == uses:
            self.end()

    def forget_prompts(self) -> None:
        """Start anew on the same picture."""
        with self.lock:
            self.prompts = Prompts()
            self.candidates: Candidates | None = None
            self.chosen = 0

    def forget_everything(self) -> None:
        """Drop the masks of everything."""
        with self.lock:
            self.everything: Everything | None = None
            self.windows: list[drawing.Window] = []

    def keep_everything(self, found: Everything) -> None:
        """Keep masks of everything, and what they cover of the view, for as many redraws as there will be."""
        windows = [drawing.view_window(mask, self.view.size) for mask in found.masks]
        with self.lock:
            self.everything, self.windows = found, windows

    def take(self, picture: Image.Image, name: str, embedding: Embedding) -> None:
        """Work on another picture, (H, W) RGB, from now on."""
        view = drawing.make_view(picture)
        small = drawing.make_view(view, drawing.THUMBNAIL_SIDE)
        with self.lock:
            self.free()
            self.picture, self.name, self.embedding = picture, name, embedding
            self.view, self.small = view, small

    def picture_point(self, point: list[float]) -> list[float]:
        """The pixel of the picture under a pixel of the view."""
        return drawing.view_to_picture(point, self.view.size, self.picture.size)


def return_memory() -> None:
    """Give back to the system what was freed: glibc keeps it for each thread that it was used in."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and no need of it
        if trim is not None:
            trim(0)
