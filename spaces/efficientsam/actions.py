# SPDX-License-Identifier: Apache-2.0
"""What happens on the page: every event's handler, from a visitor's session to what the components show."""

import functools
import html
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import downloads
import drawing
import gradio as gr
import numpy as np
from gradio.context import LocalContext
from gradio.utils import is_prop_update
from pictures import InputError, Picture, read_picture
from PIL import Image
from segmenting import LOW_PREDICTED_IOU, Embedding, Everything, Segmenter, are_numbers, check_grid, check_prompts
from sessions import Click, Prepared, Prompts, Session, SessionsWithPictures
from waiting import address_of, stop_if_unwanted
from widgets import (
    BACKGROUND,
    BOX,
    CLICK,
    EVERYTHING,
    EXAMPLES,
    FOLDER,
    HINTS,
    OBJECT,
    Widgets,
    cached_file,
    readable,
    view_file,
)


ROWS_SHOWN = 200
PROGRESS = gr.Progress()  # as a parameter's default it asks gradio for a bar; it holds nothing of anybody
SEARCHING = "Searching"
GONE = "The picture is no longer here. Choose it again."
Updates = dict[Any, Any]


@dataclass(frozen=True)
class Look:
    """How the page is set: mode, what a click marks, transparency in percent, thresholds of everything."""

    mode: str
    kind: str
    transparency: float
    predicted_iou: float
    stability: float

    def __post_init__(self):
        if self.mode not in HINTS or self.kind not in (OBJECT, BACKGROUND):
            raise InputError("Choose a mode, and what a click marks.")
        if not all(map(math.isfinite, (self.transparency, self.predicted_iou, self.stability))):
            raise InputError("A slider must be at a number.")

    @property
    def opacity(self) -> float:
        """Of masks, 0 to 1."""
        return 1 - self.transparency / 100


class GoneError(Exception):
    """The session holds no picture any more."""


def handler(method: Callable[..., Updates]) -> Callable[..., Updates]:
    """A method of Actions on a visitor's session, which does not end meanwhile; InputError is shown to the visitor.

    Where the picture is gone, the page says so and goes back to the start.
    """

    @functools.wraps(method)
    def call(self: "Actions", *args: Any) -> Updates:
        given = next(value for value in args if isinstance(value, Session))
        request = LocalContext.request.get(None)
        session = self.sessions.of(request and request.session_hash, given)
        args = [session if value is given else value for value in args]
        with session.in_use():
            try:
                return as_updates(method(self, *args), self.widgets)
            except InputError as error:
                raise readable(error) from None
            except GoneError:
                gr.Warning(GONE)
                return self.leave(session)

    return call


def as_updates(changes: Updates, widgets: Widgets) -> Updates:
    """Changes of what is no event's input as updates of properties.

    gradio keeps the component that it made for the last update, and another one where a value follows alone.
    """
    return {
        component: value if component in widgets.inputs or is_prop_update(value) else gr.update(value=value)
        for component, value in changes.items()
    }


class Actions:
    """Handlers of events. Each returns what changes on the page, by component, and the session that it was given."""

    def __init__(self, segmenter: Segmenter, widgets: Widgets):
        self.segmenter = segmenter
        self.widgets = widgets
        self.sessions = SessionsWithPictures()
        self.examples: dict[str, Prepared] = {}
        self.examples_lock = threading.Lock()

    @handler
    def load(self, tab: gr.Request, session: Session, path: str | None, *look: Any) -> Updates:
        """Open and encode a picture that was uploaded, pasted or taken."""
        if path is None:
            return {self.widgets.session: session}
        self.sessions.hold(tab.session_hash, session, address_of(tab))
        return self._take(session, self._prepared(path), Look(*look))

    @handler
    def load_example(self, tab: gr.Request, session: Session, name: str, *look: Any) -> Updates:
        """Open and encode an example by its name."""
        if not isinstance(name, str) or name not in EXAMPLES:
            raise InputError("There is no such example.")
        self.sessions.hold(tab.session_hash, session, address_of(tab))
        return self._take(session, self._example(name), Look(*look))

    def close(self, tab: gr.Request) -> None:
        """A tab was closed, or cannot be reached: its session ends, unless it comes back soon."""
        self.sessions.close(tab.session_hash)

    @handler
    def leave(self, session: Session) -> Updates:
        """Free the picture and go back to the start."""
        session.free()
        w = self.widgets
        return {
            w.start: gr.update(visible=True),
            w.work: gr.update(visible=False),
            w.make_files: gr.update(interactive=False),
            w.table: "",
            w.session: session,
            **dict.fromkeys([w.canvas, w.gallery, w.files]),
        }

    @handler
    def change_mode(self, session: Session, *look: Any) -> Updates:
        """Show the controls and the picture of another mode."""
        w, mode = self.widgets, Look(*look).mode
        session.mode = mode
        controls = {
            w.kinds: gr.update(visible=mode == CLICK),
            w.hint: f"<p>{HINTS[mode]}</p>",
            w.automatic: gr.update(visible=mode == EVERYTHING),
            w.undo: gr.update(visible=mode != EVERYTHING),
        }
        return {**controls, **self._shown(session, Look(*look))}

    @handler
    def click(self, event: gr.EventData, session: Session, *look: Any) -> Updates:
        """A click on the picture: a point, a corner of a box, or the question what lies there."""
        look = Look(*look)
        place = index_of(event)
        check_place(place)
        with session.lock:
            self._require_picture(session)
            x, y = session.picture_point(place)
            if look.mode == EVERYTHING:
                return self._name_mask(session, look, x, y)
            label = None if look.mode == BOX else int(look.kind != BACKGROUND)
            return self._answer(session, look, [Click(x, y, label)])

    @handler
    def add(self, session: Session, text: str, *look: Any) -> Updates:
        """A point or a box that was typed."""
        look = Look(*look)
        numbers = parse_coordinates(text)
        with session.lock:
            self._require_picture(session)
            size = session.picture.size[::-1]
            if len(numbers) == 2:
                check_prompts([numbers], [1], None, size)
                clicks = [Click(*numbers, int(look.kind != BACKGROUND))]
            else:
                check_prompts([], [], tuple(numbers), size)
                clicks = [Click(*numbers[:2], None), Click(*numbers[2:], None)]
            return {self.widgets.coordinates: "", **self._answer(session, look, clicks)}

    @handler
    def undo(self, session: Session, *look: Any) -> Updates:
        """Take the last click back."""
        with session.lock:
            self._require_picture(session)
            self._decode(session, Prompts(session.prompts.clicks[:-1]))
            return self._shown(session, Look(*look))

    @handler
    def reset(self, session: Session, *look: Any) -> Updates:
        """Start anew on the same picture."""
        look = Look(*look)
        if look.mode == EVERYTHING:
            session.forget_everything()
        else:
            session.forget_prompts()
        return self._shown(session, look)

    @handler
    def choose(self, event: gr.EventData, session: Session, *look: Any) -> Updates:
        """Take another of the three masks."""
        index = index_of(event)
        with session.lock:
            if session.candidates is not None and index in range(len(session.candidates.scores)):
                session.chosen = int(index)
        return self._shown(session, Look(*look), with_gallery=False)

    @handler
    def make_whole(self, session: Session, whole: bool, *look: Any) -> Updates:
        """Show the masks whole, or as predicted; nothing is decoded again."""
        session.whole = bool(whole)
        return self._shown(session, Look(*look))

    @handler
    def find_everything(self, session: Session, grid: int, progress: gr.Progress = PROGRESS, *look: Any) -> Updates:
        """Segment everything with low thresholds, and keep it."""
        check_grid(grid, self.segmenter.grids)
        look = Look(*look)
        with session.lock:
            self._require_picture(session)
            picture, session.mode = session.picture, look.mode
        progress(0.0, desc=SEARCHING)

        def tell(fraction: float) -> None:
            stop_if_unwanted()
            progress(fraction, desc=SEARCHING)

        found = self.segmenter.everything(picture.open(), int(grid), tell)
        with session.lock:
            if session.picture is picture:
                session.keep_everything(found)
            elsewhere = session.picture is not picture or session.mode != look.mode
            return {self.widgets.session: session} if elsewhere else self._shown(session, look)

    @handler
    def redraw(self, session: Session, *look: Any) -> Updates:
        """Another transparency or threshold."""
        return self._shown(session, Look(*look), with_gallery=False)

    @handler
    def make_files(self, session: Session, *look: Any) -> Updates:
        """Write what is on the screen at the size of the picture."""
        look = Look(*look)
        make = self._files_of_everything if look.mode == EVERYTHING else self._files_of_candidate
        files = make(session, look)
        component = self.widgets.files
        paths = [cached_file(content, name, component) for name, content in files.items()]
        return {component: paths, self.widgets.session: session}

    def _prepared(self, path: str | Path) -> Prepared:
        picture, image = read_picture(path)
        return Prepared.of(picture, image, self.segmenter.embed(image))

    def _example(self, name: str) -> Prepared:
        """An example, encoded once for all visitors."""
        with self.examples_lock:
            if name not in self.examples:
                self.examples[name] = self._prepared(FOLDER / "examples" / EXAMPLES[name])
            return self.examples[name]

    def _take(self, session: Session, prepared: Prepared, look: Look) -> Updates:
        session.take(prepared)
        self.sessions.fit()
        w = self.widgets
        page = {w.start: gr.update(visible=False), w.work: gr.update(visible=True), w.upload: None, w.kind: OBJECT}
        whole = self.segmenter.whole if session.whole is None else session.whole
        return {**page, w.whole: whole, **self._shown(session, look)}

    def _require_picture(self, session: Session) -> None:
        if session.picture is None:
            raise GoneError

    def _answer(self, session: Session, look: Look, clicks: list[Click]) -> Updates:
        """Add clicks and decode; prompts that are refused are not kept."""
        self._decode(session, Prompts([*session.prompts.clicks, *clicks]))
        return self._shown(session, look)

    def _decode(self, session: Session, prompts: Prompts) -> None:
        candidates = None
        if prompts.asks():
            embedding = self._embedding(session)
            candidates = self.segmenter.decode(embedding, prompts.points, prompts.labels, prompts.box)
        session.prompts, session.candidates, session.chosen = prompts, candidates, 0

    def _embedding(self, session: Session) -> Embedding:
        """Of the session's picture; made again where it had to go, for others' pictures."""
        if session.embedding is None:
            session.embedding = self.segmenter.embed(session.picture.open())
            self.sessions.fit()
        return session.embedding

    def _name_mask(self, session: Session, look: Look, x: float, y: float) -> Updates:
        """Say which mask of everything lies under a pixel of the picture: the smallest, if there are several."""
        kept, windows = self._kept(session, look)
        column, row = (
            round(value) for value in drawing.picture_to_view((x, y), session.view.size, session.picture.size)
        )
        ranks = [rank for rank, window in enumerate(windows) if drawing.covers(window, column, row)]
        text = "There is no mask here."
        if ranks:
            rank = min(ranks, key=lambda rank: session.everything.areas[kept[rank]])
            text = f"Mask {rank + 1}: {describe(session.everything, kept[rank])}."
        return {self.widgets.status: paragraph(text), self.widgets.session: session}

    def _kept(self, session: Session, look: Look) -> tuple[np.ndarray, list[drawing.Window]]:
        """Numbers of the masks of everything that are shown, and what they cover of the view."""
        if session.everything is None:
            return np.zeros(0, int), []
        kept = session.everything.above(look.predicted_iou, look.stability)
        return kept, [session.windows[index] for index in kept]

    def _shown(self, session: Session, look: Look, with_gallery: bool = True) -> Updates:
        """What the page shows of a session; files that were made before are out of date."""
        w = self.widgets
        with session.lock:
            self._require_picture(session)
            shown = {w.session: session, w.files: None}
            if look.mode == EVERYTHING:
                return {**shown, w.gallery: None, **self._shown_everything(session, look)}
            return {**shown, **self._shown_candidates(session, look, with_gallery)}

    def _files_on_offer(self, session: Session, offered: bool) -> Updates:
        """The button that makes files, when it is to change."""
        if session.offers_files == offered:
            return {}
        session.offers_files = offered
        return {self.widgets.make_files: gr.update(interactive=offered)}

    def _shown_candidates(self, session: Session, look: Look, with_gallery: bool) -> Updates:
        w, candidates = self.widgets, session.candidates
        canvas, share = session.view.copy(), 0.0
        shown: Updates = {}
        if candidates is None:
            shown[w.gallery] = None
        else:
            chosen = candidates.only(session.chosen)
            mask = self.segmenter.masks(chosen, (canvas.height, canvas.width), session.whole)[0]
            share = float(mask.mean())
            drawing.draw_mask(canvas, drawing.mask_window(mask), drawing.PALETTE[0], look.opacity)
            if with_gallery:
                small = self.segmenter.masks(candidates, (session.small.height, session.small.width), session.whole)
                shown[w.gallery] = gallery_update(session, small, w.gallery)
        draw_prompts(canvas, session)
        text = status_of_prompts(session, look.mode, share)
        shown |= {w.canvas: view_file(canvas, w.canvas), w.status: paragraph(text)}
        return {**shown, **self._files_on_offer(session, candidates is not None)}

    def _shown_everything(self, session: Session, look: Look) -> Updates:
        w = self.widgets
        kept, windows = self._kept(session, look)
        canvas = session.view.copy()
        drawing.draw_windows(canvas, windows, kept.tolist(), look.opacity)
        text = status_of_everything(session, len(kept))
        shown = {
            w.canvas: view_file(canvas, w.canvas),
            w.status: paragraph(text),
            w.table: "" if session.everything is None else table_of(session.everything, kept),
        }
        return {**shown, **self._files_on_offer(session, len(kept) > 0)}

    def _files_of_candidate(self, session: Session, look: Look) -> dict[str, bytes]:
        with session.lock:  # what it holds is never changed, so the long part needs no lock
            self._require_picture(session)
            if session.candidates is None:
                raise InputError("There is no mask yet. Click on an object first.")
            chosen, picture, whole = session.candidates.only(session.chosen), session.picture, session.whole
        image = picture.open()
        mask = self.segmenter.full_masks(chosen, whole)[0]
        overlay = drawing.overlay_of(image)
        shown = self.segmenter.masks(chosen, (overlay.height, overlay.width), whole)[0]
        drawing.draw_mask(overlay, drawing.mask_window(shown), drawing.PALETTE[0], look.opacity)
        coco = downloads.candidates_to_coco(picture.name, mask[None], chosen.scores)
        return {
            "cutout.png": downloads.cutout_png(image, mask),
            "mask.png": downloads.to_png(downloads.mask_image(mask)),
            "overlay.jpg": downloads.to_jpeg(overlay),
            "masks.json": downloads.to_json(coco),
        }

    def _files_of_everything(self, session: Session, look: Look) -> dict[str, bytes]:
        with session.lock:
            self._require_picture(session)
            kept, _ = self._kept(session, look)
            if not len(kept):
                raise InputError("There are no masks yet. Find everything first, or lower the thresholds.")
            found, picture = session.everything.only(kept), session.picture
        overlay = drawing.overlay_of(picture.open())
        windows = [drawing.view_window(mask, overlay.size) for mask in found.masks]
        drawing.draw_windows(overlay, windows, kept.tolist(), look.opacity)
        return {
            "labels.png": downloads.to_png(downloads.label_image(found)),
            "overlay.jpg": downloads.to_jpeg(overlay),
            "masks.json": downloads.to_json(downloads.everything_to_coco(picture.name, found)),
        }


def index_of(event: gr.EventData) -> Any:
    """What was selected, whatever its sender says it is: gradio's own class for it takes well-formed events alone."""
    return event._data.get("index") if isinstance(event._data, dict) else None


def check_place(place: Any) -> None:
    """InputError unless it is a pixel of the view, [x, y]."""
    if not are_numbers(place, 2):
        raise InputError("A click must be at two numbers, x and y.")


def parse_coordinates(text: str) -> list[float]:
    """Two or four numbers with commas or spaces between them; InputError for anything else."""
    try:
        numbers = [float(part) for part in str(text).replace(",", " ").split()[:5]]
    except ValueError:
        numbers = []
    if len(numbers) not in (2, 4):
        raise InputError("Type two numbers, x, y, or four, x0, y0, x1, y1.")
    return numbers


def draw_prompts(canvas: Image.Image, session: Session) -> None:
    """The session's box, points and first corner on its view."""
    sizes = (session.view.size, session.picture.size)
    prompts = session.prompts
    if prompts.box is not None:
        corners = (drawing.picture_to_view(corner, *sizes) for corner in (prompts.box[:2], prompts.box[2:]))
        drawing.draw_box(canvas, [value for corner in corners for value in corner])
    drawing.draw_points(canvas, [drawing.picture_to_view(point, *sizes) for point in prompts.points], prompts.labels)
    if prompts.corner is not None:
        drawing.draw_corner(canvas, drawing.picture_to_view((prompts.corner.x, prompts.corner.y), *sizes))


def gallery_update(session: Session, masks: np.ndarray, gallery: gr.Gallery) -> Any:
    """Thumbnails of the candidates, (M, h, w) of the small picture's size, the chosen one selected."""
    captions = [f"IoU {score:.2f}" for score in session.candidates.scores]
    thumbnails = [view_file(drawing.fade_around(session.small, mask), gallery) for mask in masks]
    return gr.update(value=list(zip(thumbnails, captions)), selected_index=session.chosen)


def size_of(picture: Picture) -> str:
    """Its width and height, as the page says it."""
    return "{:,} x {:,} pixels".format(*picture.size)


def status_of_prompts(session: Session, mode: str, share: float) -> str:
    """One to three sentences on where the visitor stands."""
    encoded = f"encoded once in {session.milliseconds:,.0f} ms"
    if session.prompts.corner is not None:
        return "First corner set. Click on the opposite corner."
    if session.candidates is None:
        if session.prompts.clicks:
            return "Click on the object too."
        return f"{size_of(session.picture)}, {encoded}."
    score = session.candidates.scores[session.chosen]
    return (
        f"{advice(score, session.prompts)}Predicted IoU {score:.2f}, {100 * share:.1f} % of the picture. Decoded in "
        f"{session.candidates.milliseconds:,.0f} ms, the picture {encoded}."
    )


def advice(score: float, prompts: Prompts) -> str:
    """What helps where a score is low, as the command says it."""
    if score >= LOW_PREDICTED_IOU:
        return ""
    more = "another click" if prompts.box is not None else "a box, or another click,"
    return f"The score is low: {more} says more. "


def status_of_everything(session: Session, shown: int) -> str:
    """How many masks there are, and what they took."""
    if session.everything is None:
        return f"{size_of(session.picture)}. Nothing searched yet."
    seconds, side = session.everything.milliseconds / 1000, session.everything.grid
    return (
        f"{shown} of {len(session.everything.masks)} masks shown. Searched in {seconds:,.1f} s with a grid of "
        f"{side} x {side} points."
    )


def describe(found: Everything, index: int) -> str:
    """Area and scores of one mask of everything."""
    return (
        f"{int(found.areas[index]):,} pixels, predicted IoU {found.scores[index]:.2f}, "
        f"stability {found.stability[index]:.2f}"
    )


def table_of(found: Everything, kept: np.ndarray) -> str:
    """Masks of everything as an HTML table."""
    rows = []
    for rank, index in enumerate(kept[:ROWS_SHOWN], 1):
        color = "rgb({}, {}, {})".format(*drawing.object_color(int(index)))
        rows.append(
            f'<tr><th scope="row"><span class="swatch" style="background: {color}"></span>{rank}</th>'
            f"<td>{int(found.areas[index]):,}</td><td>{found.scores[index]:.2f}</td>"
            f"<td>{found.stability[index]:.2f}</td></tr>"
        )
    more = f"<p>and {len(kept) - ROWS_SHOWN} more, all in masks.json</p>" if len(kept) > ROWS_SHOWN else ""
    head = "".join(f'<th scope="col">{name}</th>' for name in ("Mask", "Area (pixels)", "Predicted IoU", "Stability"))
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Masks">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>{more}</div>"
    )


def paragraph(text: str) -> str:
    """A text that screen readers announce when it changes."""
    return f'<p role="status" aria-live="polite">{html.escape(text)}</p>'
