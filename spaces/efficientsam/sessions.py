# SPDX-License-Identifier: Apache-2.0
"""What the app keeps for one visitor: the picture, its embedding, the prompts so far and the answers to them."""

from __future__ import annotations

import ctypes
import itertools
import math
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import drawing
from limits import CLOSED_SECONDS, SESSION_SECONDS, SESSIONS_BYTES
from pictures import Picture
from PIL import Image
from segmenting import Box, Candidates, Embedding, Everything


SECONDS_BETWEEN_LOOKS, LOOKS_PER_RETURN = 1, 10


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


@dataclass(frozen=True)
class Prepared:
    """A picture with what is made of it once, and never changed: sessions on one example share it."""

    picture: Picture
    view: Image.Image
    small: Image.Image
    embedding: Embedding

    @classmethod
    def of(cls, picture: Picture, image: Image.Image, embedding: Embedding) -> Prepared:
        """From a picture and its pixels."""
        view = drawing.make_view(image)
        return cls(picture, view, drawing.make_view(view, drawing.THUMBNAIL_SIDE), embedding)


class Session:
    """One visitor's state. Events of a visitor may overlap, so whoever changes it holds `lock`."""

    def __init__(self):
        self.lock = threading.RLock()
        self.events = 0  # that are going on
        self.tab_closed = False
        self.address = ""  # whom it belongs to, for a fair share of the memory
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
        self.deadline = time.monotonic() + (CLOSED_SECONDS if self.tab_closed else SESSION_SECONDS)

    def end_if_due(self) -> bool:
        """End if the deadline has passed and no event goes on; whether it holds nothing and none is coming."""
        with self.lock:
            if self.events:
                return False
            if time.monotonic() >= self.deadline:
                self.free()
            return self.picture is None

    def free(self) -> None:
        """Forget the picture and all that was made of it."""
        with self.lock:
            self.mode = ""  # that the page went to last
            self.offers_files = False  # what the page was told last
            self.picture: Picture | None = None
            self.view: Image.Image | None = None
            self.small: Image.Image | None = None
            self.embedding: Embedding | None = None
            self.milliseconds = 0.0  # that encoding took
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
            self._windows: list[drawing.Window] | None = None

    @property
    def windows(self) -> list[drawing.Window]:
        """What masks of everything cover of the view, made once for as many redraws as there will be."""
        with self.lock:
            if self._windows is None:
                self._windows = [drawing.view_window(mask, self.view.size) for mask in self.everything.masks]
            return self._windows

    def keep_everything(self, found: Everything) -> None:
        """Keep masks of everything."""
        with self.lock:
            self.everything, self._windows = found, None

    @property
    def nbytes(self) -> int:
        """What it holds of memory, but for odds and ends."""
        picture, embedding, candidates, found = self.picture, self.embedding, self.candidates, self.everything
        views = [view.width * view.height * 3 for view in (self.view, self.small) if view is not None]
        windows = [window.nbytes for window, _ in self._windows or ()]
        return (
            (len(picture.content) if picture else 0)
            + (embedding.tensor.nbytes if embedding else 0)
            + (candidates.logits.nbytes if candidates else 0)
            + (sum(len(mask["counts"]) for mask in found.masks) if found else 0)
            + sum(views + windows)
        )

    @property
    def spares(self) -> bool:
        """Whether it holds what can be made again."""
        return self.embedding is not None or self._windows is not None

    def forget_spares(self) -> None:
        """Forget what can be made again from the picture and the masks: it takes a second, when it is needed."""
        with self.lock:
            self.embedding = self._windows = None

    def take(self, prepared: Prepared) -> None:
        """Work on another picture from now on."""
        with self.lock:
            self.free()
            self.picture, self.view, self.small = prepared.picture, prepared.view, prepared.small
            self.embedding, self.milliseconds = prepared.embedding, prepared.embedding.milliseconds

    def picture_point(self, point: list[float]) -> list[float]:
        """The pixel of the picture under a pixel of the view."""
        return drawing.view_to_picture(point, self.view.size, self.picture.size)


class SessionsWithPictures:
    """Sessions that hold a picture, by their tabs: within a bound on memory, each until its deadline.

    gradio itself keeps a session for an hour after its tab was closed, whatever it holds, and forgets one that is
    needed where many others came after it.
    """

    def __init__(self, most: int = SESSIONS_BYTES):
        self.most = most  # bytes
        self.lock = threading.Lock()
        self.by_tab: dict[str, Session] = {}
        self.watch: threading.Thread | None = None

    def hold(self, tab: str, session: Session, address: str = "") -> None:
        """Take a session that is about to hold a picture."""
        with self.lock:
            session.address = address
            self.by_tab[tab] = session
            if self.watch is None:
                self.watch = threading.Thread(target=self._watch, daemon=True, name="sessions")
                self.watch.start()

    def of(self, tab: str | None, session: Session) -> Session:
        """The session that this tab holds a picture with, or the one that gradio has for it."""
        return self.by_tab.get(tab, session)

    def fit(self) -> None:
        """Come within the bound.

        The address that holds the most gives: first what can be made again, then whole sessions, those first that have
        been away longest.
        """
        while (session := self._next_to_give()) is not None:
            with session.lock:
                if not session.events:
                    session.forget_spares() if session.spares else session.free()

    def _next_to_give(self) -> Session | None:
        """None within the bound, or where all do something just now."""
        with self.lock:
            held = list(self.by_tab.values())
        taken: Counter = Counter()
        for session in held:
            taken[session.address] += session.nbytes
        idle = [session for session in held if session.picture is not None and not session.events]
        if taken.total() <= self.most or not idle:
            return None
        return min(idle, key=lambda session: (-taken[session.address], not session.spares, session.deadline))

    def close(self, tab: str) -> None:
        """A tab was closed, or is out of reach."""
        with self.lock:
            session = self.by_tab.get(tab)
        if session is not None:
            session.close_tab()

    def end_due(self) -> None:
        """End what is due, and come within the bound."""
        with self.lock:
            held = list(self.by_tab.items())
        ended = [(tab, session) for tab, session in held if session.end_if_due()]
        with self.lock:
            for tab, session in ended:
                if self.by_tab.get(tab) is session:
                    del self.by_tab[tab]
        self.fit()

    def _watch(self) -> None:
        for look in itertools.count(1):
            time.sleep(SECONDS_BETWEEN_LOOKS)
            self.end_due()
            if look % LOOKS_PER_RETURN == 0:
                return_memory()


def return_memory() -> None:
    """Give back to the system what was freed: glibc keeps it for each thread that it was used in."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries have none, and no need of it
        if trim is not None:
            trim(0)
