# SPDX-License-Identifier: Apache-2.0
"""A Space on loopback, started as the Hub starts it, and visitors who speak to it as the page does."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


SPACE = Path(__file__).resolve().parents[1] / "spaces" / "efficientsam"
SECONDS_TO_START = 180
LOOK = {"mode": "Click", "kind": "Object", "transparency": 55, "predicted_iou": 0.5, "stability": 0.6}
UNCHANGED = ({"__type__": "update"}, {"props": {"__type__": "update"}, "__type__": "update"})
# A Space has no package of ours: the model's code must come with the model. On a signal it counts its components.
START = """
import gc, runpy, signal, sys
from pathlib import Path
sys.modules["efficientsam_hf"] = None
sys.path.insert(0, sys.argv[1])
def count(*_):
    from gradio.components import Component
    gc.collect()
    number = sum(isinstance(thing, Component) for thing in gc.get_objects())
    Path("count.partial").write_text(str(number))
    Path("count.partial").rename("count.txt")
signal.signal(signal.SIGUSR1, count)
runpy.run_path(sys.argv[1] + "/app.py", run_name="__main__")
"""


def save_model_with_code(folder: Path) -> Path:
    """The checkpoint that ships, as a folder that carries its code like a published repository."""
    from efficientsam_hf import EfficientSamModel, EfficientSamProcessor, default_checkpoint

    EfficientSamModel.from_pretrained(default_checkpoint()).save_pretrained(folder)
    EfficientSamProcessor.from_pretrained(default_checkpoint()).save_pretrained(folder)
    return folder


class SpaceServer:
    """`python app.py` in a copy of the Space's folder, with a home and a cache of its own below `folder`.

    With `threads` the server's torch is bound to so many; `settings` are environment variables, such as the limits.
    `model` is a folder, or with `hub`, the address of a Hub, a repository there.
    """

    def __init__(
        self,
        folder: Path,
        model: Path | str,
        threads: int | None = None,
        hub: str | None = None,
        **settings: Any,
    ):
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.cache = folder / "cache"
        self.log = folder / "server.log"
        self.home = folder / "space"
        shutil.copytree(SPACE, self.home, ignore=shutil.ignore_patterns("__pycache__"))
        self.environment = {
            **os.environ,
            "MODEL_ID": str(model),
            "HF_HOME": str(folder / "hf_home"),
            "HF_HUB_OFFLINE": "0" if hub else "1",
            **({"HF_ENDPOINT": hub, "HF_HUB_DISABLE_XET": "1"} if hub else {}),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_SERVER_PORT": str(self.port),
            "GRADIO_TEMP_DIR": str(self.cache),
            "PYTHONDONTWRITEBYTECODE": "1",
            **({"OMP_NUM_THREADS": str(threads)} if threads else {}),
            **{name: str(value) for name, value in settings.items()},
        }

    def __enter__(self) -> "SpaceServer":
        with self.log.open("w") as log:
            command = [sys.executable, "-c", START, str(self.home)]
            self.process = subprocess.Popen(command, env=self.environment, cwd=self.home, stdout=log, stderr=log)
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: Any) -> None:
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def count_components(self) -> int:
        """How many components of gradio the server holds, of all visitors."""
        answer = self.home / "count.txt"
        self.process.send_signal(signal.SIGUSR1)
        for _ in range(600):
            if answer.exists():
                number = int(answer.read_text())
                answer.unlink()
                return number
            time.sleep(0.1)
        raise TimeoutError("the Space did not count its components")

    def _wait(self) -> None:
        for _ in range(10 * SECONDS_TO_START):
            if self.process.poll() is not None:
                raise RuntimeError(f"the Space ended with code {self.process.returncode}:\n{self.log.read_text()}")
            try:
                urllib.request.urlopen(f"{self.url}/config", timeout=10).close()
                return
            except OSError:
                time.sleep(0.1)
        raise TimeoutError(f"the Space did not answer in {SECONDS_TO_START} s:\n{self.log.read_text()}")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Refused(Exception):
    """The Space answered with an error; its message, None where it gives none."""


class Visitor:
    """One browser tab without the browser: a session of its own, events by the names of their handlers.

    With `address` it comes from there, as far as the Space can tell: by way of a proxy on this machine.
    """

    def __init__(self, url: str, address: str | None = None):
        self.url = url
        self.headers = {"X-Forwarded-For": address} if address else {}
        self.session = uuid.uuid4().hex
        config = json.loads(self._get("/config"))
        self.events: dict[str, dict[str, Any]] = {}
        for event in config["dependencies"]:
            self.events.setdefault(event["api_name"], event)
        self.names = {component["id"]: component["props"].get("elem_id") for component in config["components"]}
        self.look = dict(LOOK)

    def open(self) -> None:
        """Open the connection by which the server knows that the tab is there."""
        self.heartbeat = urllib.request.urlopen(f"{self.url}/gradio_api/heartbeat/{self.session}", timeout=60)

    def close(self) -> None:
        """Close the tab."""
        self.heartbeat.close()

    def upload(self, content: bytes, name: str) -> dict[str, Any]:
        """Send a file; -> what refers to it in events."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
        (path,) = self._post("/gradio_api/upload", body, f"multipart/form-data; boundary={boundary}")
        return {"path": path, "orig_name": name, "meta": {"_type": "gradio.FileData"}}

    def load(self, content: bytes, name: str = "picture.png") -> dict[str, Any]:
        """Send a picture to work on."""
        return self.send("load", self.upload(content, name))

    def click(self, x: float, y: float) -> dict[str, Any]:
        """Click on a pixel of the view."""
        return self.send("click", event={"index": [x, y], "value": None})

    def mask_files(self) -> dict[str, bytes]:
        """Make the files and download them: name -> content."""
        return {file["orig_name"]: self._get_url(file["url"]) for file in self.send("make_files")["files"]}

    def send(self, name: str, *values: Any, event: Any = None) -> dict[str, Any]:
        """Trigger an event and wait; -> what changes, by the components' ids in the page. Raises Refused."""
        handler = self.events[name]
        sent = self.post(name, *values, event=event)
        for message in self._messages():
            if message["msg"] == "process_completed" and message["event_id"] == sent:
                return self._changes(handler, message)
        raise Refused("the stream ended without an answer")

    def post(self, name: str, *values: Any, event: Any = None) -> str:
        """Trigger an event and do not wait; -> its id."""
        handler = self.events[name]
        body = {
            "data": [None, *values, *self.look.values()][: len(handler["inputs"])],
            "event_data": event,
            "fn_index": handler["id"],
            "trigger_id": handler["targets"][0][0],
            "session_hash": self.session,
        }
        return self._post("/gradio_api/queue/join", json.dumps(body).encode(), "application/json")["event_id"]

    def _changes(self, handler: dict[str, Any], message: dict[str, Any]) -> dict[str, Any]:
        if not message["success"]:
            raise Refused(message["output"].get("error"))
        values = dict(zip((self.names.get(output) for output in handler["outputs"]), message["output"]["data"]))
        return {name: value_of(value) for name, value in values.items() if name and value not in UNCHANGED}

    def _messages(self) -> Iterator[dict[str, Any]]:
        address = f"{self.url}/gradio_api/queue/data?session_hash={self.session}"
        with urllib.request.urlopen(address, timeout=300) as stream:
            for line in stream:
                if line.startswith(b"data:"):
                    yield json.loads(line[5:])

    def _get(self, path: str) -> bytes:
        return self._get_url(self.url + path)

    def _get_url(self, address: str) -> bytes:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read()

    def _post(self, path: str, body: bytes, kind: str) -> Any:
        request = urllib.request.Request(self.url + path, data=body, headers={"Content-Type": kind, **self.headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            raise Refused(error.read().decode(errors="replace")) from None


def value_of(change: Any) -> Any:
    """What a component shows now, where nothing but that was changed."""
    alone = isinstance(change, dict) and "value" in change and change.keys() <= {"value", "__type__", "props"}
    return change["value"] if alone else change


def post(url: str, name: str, data: str, address: str | None = None) -> str:
    """Send a call with a JSON text for its inputs, valid or not, and do not wait; -> its id. Raises Refused."""
    headers = {"Content-Type": "application/json", **({"X-Forwarded-For": address} if address else {})}
    request = urllib.request.Request(f"{url}/gradio_api/call/{name}", data=data.encode(), headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["event_id"]
    except urllib.error.HTTPError as error:
        raise Refused(error.read().decode(errors="replace")) from None


def answer_of(url: str, name: str, event: str) -> Any:
    """Wait for the outputs of a call that was sent. Raises Refused."""
    with urllib.request.urlopen(f"{url}/gradio_api/call/{name}/{event}", timeout=300) as answer:
        text = answer.read().decode()
    kind, _, value = text.strip().rpartition("\n\n")[2].partition("\ndata: ")  # after what says that it goes on
    value = json.loads(value)
    if kind != "event: complete":
        raise Refused(value.get("error") if isinstance(value, dict) else value)
    return value


def call(url: str, name: str, data: str, address: str | None = None) -> Any:
    """Send a call and wait for its outputs. Raises Refused."""
    return answer_of(url, name, post(url, name, data, address))
