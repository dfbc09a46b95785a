# SPDX-License-Identifier: Apache-2.0
"""What a request may bring, before gradio reads it: its bytes, its uploads, and who listens for answers."""

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any
from urllib.parse import parse_qs

from anyio.to_thread import run_sync
from limits import CONNECTIONS_PER_ADDRESS, MAX_BYTES, REQUEST_BYTES, UPLOADS_PER_ADDRESS
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException
from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, PlainTextResponse
from stored_files import FileStore
from waiting import address_of


LONGEST_NUMBER = 15  # digits
FORM_BYTES = 10_000  # of an upload beside the file itself
LARGE = "This picture is larger than the maximum allowed size"  # gradio looks for these words
DRAINED_BYTES = 2 * MAX_BYTES  # of what is too large; whoever sends more finds the connection closed
FULL = "There is no room for more pictures just now. Try again in a minute."
BUSY = "Too many {what} from your network are open. Close some pages, then try again in a minute."


class Intake:
    """ASGI middleware with bounds on every request, and a count of the streams on which answers are awaited."""

    def __init__(self, app: Callable, listeners: Counter, files: FileStore):
        self.app, self.listeners, self.files = app, listeners, files
        self.connections: Counter = Counter()
        self.uploads: Counter = Counter()

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Answer a request that takes too much, and hand on all others."""
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        address = address_of(HTTPConnection(scope))
        if self.connections[address] >= CONNECTIONS_PER_ADDRESS:
            text = BUSY.format(what="connections")
            return await JSONResponse({"detail": text}, 429)(scope, receive, send)
        with counted(self.connections, address), counted(self.listeners, awaited(scope)):
            if scope["method"] == "POST" and scope["path"].endswith("/upload"):
                return await self._upload(address, scope, receive, send)
            too_large = HTTPException(413, f"A request may have at most {REQUEST_BYTES:,} bytes.")
            return await self.app(scope, bounded(receive, REQUEST_BYTES, too_large), send)

    async def _upload(self, address: str, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        length = HTTPConnection(scope).headers.get("content-length", "")
        if not (length.isdecimal() and len(length) <= LONGEST_NUMBER):
            return await refuse(411, "Say how long the upload is: Content-Length.", scope, receive, send)
        if int(length) > MAX_BYTES + FORM_BYTES:
            return await refuse(413, f"{LARGE}, {MAX_BYTES:,} bytes.", scope, receive, send)
        if self.uploads[address] >= UPLOADS_PER_ADDRESS:
            return await refuse(429, BUSY.format(what="uploads"), scope, receive, send)
        with counted(self.uploads, address), self.files.reserve(int(length)):
            if not await run_sync(self.files.make_room):
                return await refuse(429, FULL, scope, receive, send)
            # An error of this kind alone makes gradio remove what has come so far.
            too_large = MultiPartException(f"{LARGE}, {int(length):,} bytes.")
            cut_short = MultiPartException("The upload was cut short.")
            await self.app(scope, bounded(receive, int(length), too_large, cut_short), send)


def bounded(receive: Callable, most: int, too_large: Exception, cut_short: Exception | None = None) -> Callable:
    """`receive` that raises after so many bytes, and where the client leaves before the end."""
    left, complete = most, False

    async def call() -> dict[str, Any]:
        nonlocal left, complete
        message = await receive()
        if message["type"] == "http.request":
            left -= len(message.get("body", b""))
            complete = complete or not message.get("more_body", False)
        elif cut_short is not None and not complete:
            raise cut_short
        if left < 0:
            await drain(message, receive)
            raise too_large
        return message

    return call


def awaited(scope: dict[str, Any]) -> str | None:
    """The session or the event whose answers a request waits for."""
    path = scope["path"].rstrip("/").split("/")
    if scope["method"] != "GET":
        return None
    if path[-2:] == ["queue", "data"]:
        return parse_qs(scope["query_string"].decode("latin-1")).get("session_hash", [None])[0]
    return path[-1] if "call" in path[-4:-2] else None


@contextmanager
def counted(counter: Counter, key: str | None):
    """Count a key, if there is one, inside the block."""
    if key is None:
        yield
        return
    counter[key] += 1
    try:
        yield
    finally:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]


async def refuse(status: int, text: str, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
    """Answer an upload that is not taken, in plain text as gradio does."""
    await drain({"more_body": True}, receive)
    await PlainTextResponse(text, status)(scope, receive, send)


async def drain(message: dict[str, Any], receive: Callable) -> None:
    """Read what is left of a request after a message of it: many clients hear no answer before they have sent all."""
    left = DRAINED_BYTES
    while left > 0 and message.get("more_body", False):
        message = await receive()
        left -= len(message.get("body", b""))
