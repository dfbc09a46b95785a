# SPDX-License-Identifier: Apache-2.0
"""What is on the page: components, their order and their words."""

import html
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import gradio as gr
from downloads import to_jpeg
from gradio.processing_utils import save_bytes_to_cache
from pictures import InputError
from PIL import Image
from segmenting import Segmenter
from sessions import Session


FOLDER = Path(__file__).resolve().parent
EXAMPLES = {"Coffee": "coffee.jpg", "Cat": "cat.jpg", "Rocket": "rocket.jpg"}
CLICK, BOX, EVERYTHING = "Click", "Box", "Everything"
OBJECT, BACKGROUND = "Object", "Background"
HINTS = {
    CLICK: "Click on the object you want. Correct the mask with more clicks, on the object or on the background.",
    BOX: "Click on one corner of a box around the object, then on the opposite corner.",
    EVERYTHING: "Press the button to find all objects. Then move the sliders, or click on a mask to read its numbers.",
}


# Defining a component makes gradio write a .pyi file beside this one, which nobody needs.
with patch("gradio.component_meta.create_or_modify_pyi", create=True):

    class PictureFile(gr.Image):
        """An image whose file is handed over as it came: we check its header before anything is decoded."""

        is_template = True  # in the browser it is a gr.Image

        def preprocess(self, payload: Any) -> str | None:
            """Path of the uploaded file; gr.Error for what is none, such as any other file of the server.

            gradio looks at a path only where the request marks it as a file, which its sender is free not to do.
            """
            if payload is None:
                return None
            path = Path(payload.path or "").resolve()
            if not path.is_relative_to(Path(self.GRADIO_CACHE).resolve()) or not path.is_file():
                raise readable(InputError("Send the picture as an uploaded file."))
            return str(path)


@dataclass
class Widgets:
    """All components that events read or write."""

    session: gr.State
    start: gr.Column
    upload: PictureFile
    examples: list[gr.Button]
    work: gr.Column
    mode: gr.Radio
    kinds: gr.Column
    kind: gr.Radio
    hint: gr.HTML
    canvas: gr.Image
    status: gr.HTML
    undo: gr.Button
    reset: gr.Button
    another: gr.Button
    gallery: gr.Gallery
    whole: gr.Checkbox
    automatic: gr.Column
    grid: gr.Radio
    run: gr.Button
    predicted_iou: gr.Slider
    stability: gr.Slider
    table: gr.HTML
    transparency: gr.Slider
    make_files: gr.Button
    files: gr.File
    coordinates: gr.Textbox
    add: gr.Button

    @property
    def look(self) -> list[Any]:
        """What a drawing depends on beside the session: see `actions.Look`."""
        return [self.mode, self.kind, self.transparency, self.predicted_iou, self.stability]

    @property
    def inputs(self) -> list[Any]:
        """What events read and may change too: by its value alone, so that it stays the same component."""
        return [self.session, self.upload, self.kind, self.whole, self.coordinates]

    @property
    def shown(self) -> list[Any]:
        """What every event may change. None of it is the input of an event.

        A component whose properties change, or which an event may change and does not, is made anew by gradio for
        that visitor. As an input, the new one is kept beside the old for as long as the visitor is remembered.
        """
        place = [self.session, self.start, self.work]
        return [*place, self.canvas, self.status, self.gallery, self.table, self.make_files, self.files]

    @property
    def controls(self) -> list[Any]:
        """What belongs to a mode."""
        return [self.kinds, self.hint, self.undo, self.automatic]


def build_widgets(segmenter: Segmenter) -> Widgets:
    """Lay out the page inside the current `gr.Blocks`."""
    parts: dict[str, Any] = {}
    parts["session"] = gr.State(Session())
    gr.HTML(title_of(segmenter.name), elem_id="title")
    with gr.Column(elem_id="start") as parts["start"]:
        parts |= _start()
    with gr.Column(visible=False, elem_id="work") as parts["work"], gr.Row(elem_id="bench"):
        with gr.Column(scale=7, min_width=320, elem_id="left"):
            parts |= _canvas(segmenter)
        with gr.Column(scale=4, min_width=300, elem_id="right"):
            parts |= _results(segmenter)
    return Widgets(**parts)


def _start() -> dict[str, Any]:
    """What a visitor sees first: a place for a picture."""
    parts: dict[str, Any] = {}
    parts["upload"] = PictureFile(
        sources=["upload", "clipboard", "webcam"],
        type="filepath",
        label="Your picture",
        alt_text="Your picture",
        buttons=[],
        height=280,
        placeholder="Drop a picture here, or click to choose one",
        elem_id="upload",
    )
    gr.HTML("<p>or try one of these</p>", elem_id="or")
    with gr.Row(elem_id="examples"):
        parts["examples"] = [
            gr.Button(name, icon=FOLDER / "examples" / file, elem_classes="example", min_width=100)
            for name, file in EXAMPLES.items()
        ]
    for button in parts["examples"]:  # the icons are files in the cache too, for as long as the server runs
        button.keep_in_cache.update(button.temp_files)
    return parts


def _canvas(segmenter: Segmenter) -> dict[str, Any]:
    """The picture and what is done to it."""
    parts: dict[str, Any] = {}
    kinds = [OBJECT, BACKGROUND] if segmenter.background_points else [OBJECT]
    with gr.Row(elem_id="modes"):
        parts["mode"] = gr.Radio([CLICK, BOX, EVERYTHING], value=CLICK, label="Mode", elem_id="mode", min_width=200)
        with gr.Column(min_width=200, elem_id="kinds") as parts["kinds"]:
            parts["kind"] = gr.Radio(kinds, value=OBJECT, label="A click marks", elem_id="kind")
    parts["hint"] = gr.HTML(f"<p>{HINTS[CLICK]}</p>", elem_id="hint")
    parts["canvas"] = gr.Image(
        label="Picture",
        show_label=False,
        interactive=False,
        buttons=[],
        alt_text="Your picture",
        elem_id="canvas",
        container=False,
    )
    parts["status"] = gr.HTML(elem_id="status")
    with gr.Row(elem_id="actions"):
        parts["undo"] = gr.Button("Undo", size="md", min_width=80)
        parts["reset"] = gr.Button("Reset", size="md", min_width=80)
        parts["another"] = gr.Button("Other picture", size="md", min_width=130)
    return parts


def _results(segmenter: Segmenter) -> dict[str, Any]:
    """What came out, and how it is shown and taken away."""
    parts: dict[str, Any] = {}
    with gr.Column(elem_id="prompted"):
        gr.HTML("<p>A prompt can mean several things. Pick the mask you meant:</p>", elem_id="pick")
        parts["gallery"] = gr.Gallery(
            label="Three masks: pick one",
            show_label=False,
            columns=3,
            object_fit="contain",
            allow_preview=False,
            interactive=False,
            buttons=[],
            format="jpeg",
            elem_id="gallery",
        )
        parts["whole"] = gr.Checkbox(
            segmenter.whole,
            label="Whole masks: one part, holes filled, cut at the box",
            visible=segmenter.can_clean,
            elem_id="whole",
        )
    with gr.Column(visible=False, elem_id="automatic") as parts["automatic"]:
        parts |= _everything(segmenter)
    parts["transparency"] = gr.Slider(0, 100, value=55, step=5, label="Transparency of masks (%)", buttons=[])
    parts["make_files"] = gr.Button("Make files to download", size="md", interactive=False, elem_id="make_files")
    parts["files"] = gr.File(label="Files", file_count="multiple", interactive=False, elem_id="files")
    with gr.Accordion("Without a mouse: type coordinates", open=False):
        parts["coordinates"] = gr.Textbox(
            label="Pixels of the picture: x, y of a point, or x0, y0, x1, y1 of a box",
            placeholder="230, 120",
            max_lines=1,
            elem_id="coordinates",
        )
        parts["add"] = gr.Button("Add", size="md", elem_id="add")
    return parts


def _everything(segmenter: Segmenter) -> dict[str, Any]:
    """Controls and table of everything."""
    parts: dict[str, Any] = {}
    lowest_iou, lowest_stability = segmenter.lowest_thresholds
    parts["grid"] = gr.Radio(
        [(f"{side} x {side}", side) for side in segmenter.grids],
        value=segmenter.grid,
        label="Points of the grid",
        elem_id="grid",
    )
    parts["run"] = gr.Button("Find everything", variant="primary", elem_id="run")
    parts["predicted_iou"] = gr.Slider(
        lowest_iou, 1, value=segmenter.predicted_iou, step=0.01, label="Predicted IoU at least", buttons=[]
    )
    parts["stability"] = gr.Slider(
        lowest_stability, 1, value=segmenter.stability, step=0.01, label="Stability at least", buttons=[]
    )
    parts["table"] = gr.HTML(elem_id="table")
    return parts


def view_file(view: Image.Image, component: gr.components.Component) -> str:
    """Write what a component is to show to gradio's cache: a JPEG in which thin coloured lines stay sharp."""
    return cached_file(to_jpeg(view), "view.jpg", component)


def cached_file(content: bytes, name: str, component: gr.components.Component) -> str:
    """Write a file to gradio's cache, for a component to show; it is deleted there like all others."""
    path = save_bytes_to_cache(content, name, component.GRADIO_CACHE)
    component.temp_files.add(path)  # what gradio adds itself can be to a visitor's copy, which its cleaning never sees
    return path


def title_of(model: str) -> str:
    """The head of the page; of a folder only the last part is shown."""
    name = html.escape(Path(model).name if Path(model).is_dir() else model)
    return (
        "<h1>EfficientSAM</h1><p>Cut objects out of a picture with a click, with a box, or all at once.</p>"
        f"<p>Model: {name}</p>"
    )


def readable(error: InputError) -> gr.Error:
    """The error as the page and the clients show it."""
    return gr.Error(str(error), duration=8, print_exception=False)
