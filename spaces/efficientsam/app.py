# SPDX-License-Identifier: Apache-2.0
"""EfficientSAM in the browser: segment with clicks, with a box, or everything.

The model is the Hub repository or the folder in the setting MODEL_ID, loaded with the code that it carries. `python
app.py` starts the server.
"""

import os
import sys
from collections import Counter
from typing import Any

import gradio as gr
from actions import Actions
from endpoints import add_endpoints
from intake import Intake
from limits import FILES_SECONDS, LANES, MAX_BYTES, VISITORS
from segmenting import Segmenter
from starlette.middleware import Middleware
from stored_files import FileStore
from waiting import FairQueue
from widgets import FOLDER, Widgets, build_widgets


SETTING = "MODEL_ID"
SECONDS_BETWEEN_CLEANINGS = 600
# gradio sums up all events so far after each one, for a page that is switched off here.
STATISTICS = {"GRADIO_ANALYTICS_MAX_EVENTS": "100", "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000"}
# A Space's proxies are in private networks; whom they saw is believed, what a client says of itself is not.
PRIVATE_NETWORKS = "127.0.0.0/8,::1,10.0.0.0/8,100.64.0.0/10,172.16.0.0/12,192.168.0.0/16,fc00::/7"
# What takes seconds does not hold up those who click: a click takes milliseconds.
OF_LANES = {name: {"concurrency_id": name, "concurrency_limit": lane.at_once} for name, lane in LANES.items()}


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
    files = (SECONDS_BETWEEN_CLEANINGS, FILES_SECONDS)
    with gr.Blocks(title="EfficientSAM", analytics_enabled=False, delete_cache=files) as app:
        widgets = build_widgets(segmenter)
        actions = Actions(segmenter, widgets)
        _connect(widgets, actions)
        app.unload(actions.close)
        add_endpoints(segmenter, OF_LANES)
    app.queue(api_open=False)  # nothing gets past the queue
    app._queue = FairQueue(app, Counter())
    return app


def trust_proxy() -> None:
    """On a Space, let uvicorn find a client's address in X-Forwarded-For: the last one that is no proxy's there.

    Elsewhere it believes this machine alone, or what FORWARDED_ALLOW_IPS names.
    """
    if os.environ.get("SPACE_ID") and os.environ.get("FORWARDED_ALLOW_IPS", "*") == "*":
        os.environ["FORWARDED_ALLOW_IPS"] = PRIVATE_NETWORKS


def launch(app: gr.Blocks, **options: Any) -> Any:
    """Serve the app; `options` are those of `gr.Blocks.launch`."""
    trust_proxy()
    files = FileStore(app)
    files.watch()
    intake = Middleware(Intake, listeners=app._queue.listeners, files=files)
    return app.launch(
        theme=gr.themes.Default(
            primary_hue="emerald",
            neutral_hue="slate",
            font=["system-ui", "sans-serif"],
            font_mono=["ui-monospace", "monospace"],
        ),
        css_paths=FOLDER / "style.css",
        max_file_size=MAX_BYTES,
        state_session_capacity=VISITORS,
        app_kwargs={"middleware": [intake]},
        enable_monitoring=False,
        run_history=False,
        footer_links=["api"],
        ssr_mode=False,
        **options,
    )


def _connect(w: Widgets, actions: Actions) -> None:
    """Tie events to their handlers."""
    session, look = w.session, w.look
    clicks, pictures, everything = (
        {"api_visibility": "private", **OF_LANES[name]} for name in ("clicks", "pictures", "everything")
    )
    light = {"show_progress": "hidden", **clicks}
    start = {"outputs": [*w.shown, w.upload, w.kind, w.whole], "show_progress_on": w.upload}
    # Choosing the camera or the clipboard already counts as input, of nothing; a picture that comes while that is
    # answered must not be dropped.
    uploaded = w.upload.input(actions.load, [session, w.upload, *look], trigger_mode="multiple", **start, **pictures)
    uploaded.failure(lambda: None, outputs=w.upload, api_visibility="private", queue=False)
    for button in w.examples:
        button.click(actions.load_example, [session, button, *look], **start, **clicks)
    w.run.click(actions.find_everything, [session, w.grid, *look], w.shown, show_progress_on=w.canvas, **everything)
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
    w.make_files.click(actions.make_files, [session, *look], w.shown, show_progress="minimal", **pictures)


def main() -> None:
    """Load the model and serve until stopped."""
    try:
        segmenter = Segmenter(model_id(), trust_remote_code=True)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {str(error).strip().splitlines()[0]}")
    launch(build(segmenter))


if __name__ == "__main__":
    main()
