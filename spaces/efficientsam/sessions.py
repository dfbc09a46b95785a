# SPDX-License-Identifier: Apache-2.0
"""What the app keeps for one visitor: the picture, its embedding, the prompts so far and the answers to them."""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import drawing
from PIL import Image
from segmenting import Box, Candidates, Embedding, Everything


SECONDS_TO_LIVE = 1800  # after the last action
SECONDS_AFTER_CLOSING = 600  # of the tab: a phone that sleeps or changes its network closes it too, and comes back
SECONDS_BETWEEN_LOOKS = 1
PICTURES_AT_MOST = 40  # each may be one of 75 MB


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
        self.events = 0  # that are going on
        self.tab_closed = False
        self.whole: bool | None = None  # whether masks are shown whole, once the visitor has said so
        self.deadline = math.inf  # seconds of time.monotonic() at which it ends, if the visitor does nothing
        self.free()

    def __deepcopy__(self, memo: dict) -> Session:
        """A fresh one: gradio copies the initial value for every visitor."""
        return Session()

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """An event of the visitor, who is there, then: until it is over the session does not end."""
        with self.lock:
            self.events += 1
            self.tab_closed = False
        try:
            yield
        finally:
            with self.lock:
                self.events -= 1
                self._wait_again()

    def close_tab(self) -> None:
        """The visitor has gone, perhaps while an event goes on; a visitor who was only out of reach may come back."""
        with self.lock:
            self.tab_closed = True
            self._wait_again()

    def _wait_again(self) -> None:
        self.deadline = time.monotonic() + (SECONDS_AFTER_CLOSING if self.tab_closed else SECONDS_TO_LIVE)

    def end_if_due(self) -> bool:
        """End if the deadline has passed and no event goes on; whether it holds nothing and none is coming."""
        with self.lock:
            if self.events:
                return False
            if time.monotonic() >= self.deadline:
                self.free()
            return self.picture is None

    @property
    def urgency(self) -> tuple[bool, float]:
        """Lower for those that are to end before others."""
        return self.events > 0, self.deadline

    def free(self) -> None:
        """Forget the picture and all that was made of it."""
        with self.lock:
            self.name = "picture"
            self.mode = ""  # that the page went to last
            self.offers_files = False  # what the page was told last
            self.picture: Image.Image | None = None
            self.view: Image.Image | None = None
            self.small: Image.Image | None = None
            self.embedding: Embedding | None = None
            self.forget_everything()
            self.forget_prompts()

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


class SessionsWithPictures:
    """Sessions that hold a picture, by their tabs: at most so many, each until its deadline.

    gradio itself keeps a session for an hour after its tab was closed, whatever it holds.
    """

    def __init__(self, most: int = PICTURES_AT_MOST):
        self.most = most
        self.lock = threading.Lock()
        self.by_tab: dict[str, Session] = {}
        self.watch: threading.Thread | None = None

    def hold(self, tab: str, session: Session) -> None:
        """Take a session that is about to hold a picture; where there are too many, the next one due ends now."""
        with self.lock:
            self.by_tab[tab] = session
            others = [other for other in self.by_tab if other != tab]
            surplus = None
            if len(others) >= self.most:
                surplus = self.by_tab.pop(min(others, key=lambda other: self.by_tab[other].urgency))
            if self.watch is None:
                self.watch = threading.Thread(target=self._watch, daemon=True, name="sessions")
                self.watch.start()
        if surplus is not None:
            surplus.free()

    def close(self, tab: str) -> None:
        """A tab was closed, or is out of reach."""
        with self.lock:
            session = self.by_tab.get(tab)
        if session is not None:
            session.close_tab()

    def end_due(self) -> None:
        """End what is due, and give the memory back."""
        with self.lock:
            held = list(self.by_tab.items())
        ended = [(tab, session) for tab, session in held if session.end_if_due()]
        with self.lock:
            for tab, session in ended:
                if self.by_tab.get(tab) is session:
                    del self.by_tab[tab]
        if ended:
            return_memory()

    def _watch(self) -> None:
        while True:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.end_due()


def return_memory() -> None:
    """Give back to the system what was freed: glibc keeps it for each thread that it was used in."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and no need of it
        if trim is not None:
            trim(0)
