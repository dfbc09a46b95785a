# SPDX-License-Identifier: Apache-2.0
"""EfficientSAM in the browser: segment with clicks, with a box, or everything.

The model is the Hub repository or the folder in the setting MODEL_ID, loaded with the code that it carries. `python
app.py` starts the server.
"""

import os
import sys
from typing import Any

import gradio as gr
from actions import Actions
from endpoints import add_endpoints
from pictures import MAX_BYTES
from segmenting import Segmenter
from widgets import FOLDER, Widgets, build_widgets


SETTING = "MODEL_ID"
WAITING_AT_MOST = 64  # events in the queue, beyond which visitors are told to come back
VISITORS_AT_MOST = 500  # that gradio remembers; how many of them may hold a picture is in sessions.py
SECONDS_BETWEEN_CLEANINGS, SECONDS_OF_FILES = 600, 3600
# gradio sums up all events so far after each one, for a page that is switched off here.
STATISTICS = {"GRADIO_ANALYTICS_MAX_EVENTS": "100", "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000"}
# What takes seconds does not hold up those who click: a click takes milliseconds.
ENCODER = {"concurrency_id": "encoder", "concurrency_limit": 1}
DECODER = {"concurrency_id": "decoder", "concurrency_limit": 1}


def model_id() -> str:
    """The setting MODEL_ID; ValueError if it is missing."""
    name = os.environ.get(SETTING, "").strip()
    if not name:
        raise ValueError(f"the setting {SETTING} is missing: set it to a Hub repository or a folder with a model")
    return name


def build(segmenter: Segmenter) -> gr.Blocks:
    """The app on a model."""
    for setting, value in STATISTICS.items():
        os.environ.setdefault(setting, value)
    files = (SECONDS_BETWEEN_CLEANINGS, SECONDS_OF_FILES)
    with gr.Blocks(title="EfficientSAM", analytics_enabled=False, delete_cache=files) as app:
        widgets = build_widgets(segmenter)
        actions = Actions(segmenter, widgets)
        _connect(widgets, actions)
        app.unload(actions.close)
        add_endpoints(segmenter, **ENCODER)
    return app.queue(max_size=WAITING_AT_MOST, default_concurrency_limit=1)


def launch(app: gr.Blocks, **options: Any) -> Any:
    """Serve the app; `options` are those of `gr.Blocks.launch`."""
    return app.launch(
        theme=gr.themes.Default(
            primary_hue="emerald",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css_paths=FOLDER / "style.css",
        max_file_size=MAX_BYTES,
        state_session_capacity=VISITORS_AT_MOST,
        enable_monitoring=False,
        run_history=False,
        footer_links=["api"],
        ssr_mode=False,
        **options,
    )


def _connect(w: Widgets, actions: Actions) -> None:
    """Tie events to their handlers."""
    session, look = w.session, w.look
    heavy = {"api_visibility": "private", **ENCODER}
    light = {"api_visibility": "private", "show_progress": "hidden", **DECODER}
    start = {"outputs": [*w.shown, w.upload, w.kind, w.whole], "show_progress_on": w.upload, **heavy}
    # Choosing the camera or the clipboard already counts as input, of nothing; a picture that comes while that is
    # answered must not be dropped.
    uploaded = w.upload.input(actions.load, [session, w.upload, *look], trigger_mode="multiple", **start)
    uploaded.failure(lambda: None, outputs=w.upload, api_visibility="private", queue=False)
    for button in w.examples:
        button.click(actions.load_example, [session, button, *look], **start)
    w.run.click(actions.find_everything, [session, w.grid, *look], w.shown, show_progress_on=w.canvas, **heavy)
    w.canvas.select(actions.click, [session, *look], w.shown, trigger_mode="multiple", **light)
    w.gallery.select(actions.choose, [session, *look], w.shown, trigger_mode="always_last", **light)
    w.whole.input(actions.make_whole, [session, w.whole, *look], w.shown, trigger_mode="always_last", **light)
    w.mode.input(actions.change_mode, [session, *look], [*w.shown, *w.controls], trigger_mode="always_last", **light)
    w.undo.click(actions.undo, [session, *look], w.shown, trigger_mode="multiple", **light)
    w.reset.click(actions.reset, [session, *look], w.shown, **light)
    w.another.click(actions.leave, session, w.shown, **light)
    for slider in (w.transparency, w.predicted_iou, w.stability):
        slider.input(actions.redraw, [session, *look], w.shown, trigger_mode="always_last", **light)
    typed = [w.add.click, w.coordinates.submit]
    gr.on(typed, actions.add, [session, w.coordinates, *look], [*w.shown, w.coordinates], **light)
    # At the size of the picture, which can be large: nothing for those who click to wait for.
    w.make_files.click(actions.make_files, [session, *look], w.shown, show_progress="minimal", **heavy)


def main() -> None:
    """Load the model and serve until stopped."""
    try:
        segmenter = Segmenter(model_id(), trust_remote_code=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {str(error).strip().splitlines()[0]}")
    launch(build(segmenter))


if __name__ == "__main__":
    main()
