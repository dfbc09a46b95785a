# SPDX-License-Identifier: Apache-2.0
"""The socket and its connections: reading requests, sending answers, and cutting either short."""

import re
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from .faults import CommitFirst, CutDownload, CutUpload, Refuse
from .messages import HubError, Request, RequestRecord, Response


if TYPE_CHECKING:
    from .server import HubServer


class Listener(ThreadingHTTPServer):
    """The socket; it knows its connections, so that it can end them."""

    # Threads are waited for when the server stops.
    daemon_threads = False
    hub: "HubServer"

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def close_connections(self) -> None:
        for connection in list(self.connections):
            with suppress(OSError):  # closed in the meantime
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        # Clients may go away at any time.
        if error is not None and not isinstance(error, ConnectionError):
            self.hub.crashes.append(error)


class ConnectionCut(ConnectionError):
    """The connection is to end here, by a fault or because the client is gone."""


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    # Headers and body go out in two writes; without this the second waits for the first to be acknowledged.
    disable_nagle_algorithm = True
    server: Listener

    def serve(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        path = unquote(parts.path)
        headers = self.headers
        record = RequestRecord(
            self.command, path, headers.get("Host", ""), headers.get("Authorization"), headers.get("Range")
        )
        hub.log.append(record)
        action = hub.take_fault(self.command, path)
        try:
            body = self.read_body(record, action.after if isinstance(action, CutUpload) else None)
            if isinstance(action, CutUpload):
                raise ConnectionCut
            earlier = (action.path, action.content) if isinstance(action, CommitFirst) else None
            request = Request(self.command, path, headers, parse_qs(parts.query), body, earlier_commit=earlier)
            response = refusal(action) if isinstance(action, Refuse) else hub.answer(request, parts.path)
            self.send(response, record, action if isinstance(action, CutDownload) else None)
        except ConnectionCut:
            self.cut(reset=isinstance(action, CutUpload | CutDownload) and action.reset)
        except HubError as error:
            self.close_connection = True
            self.send(error.response(), record, None)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def read_body(self, record: RequestRecord, limit: int | None) -> bytes:
        """The body, or its first `limit` bytes."""
        body = b""
        for size in self.piece_sizes():
            wanted = size if limit is None else min(size, limit - len(body))
            piece = self.rfile.read(wanted)
            body += piece
            record.received = len(body)
            if len(piece) < size:
                raise ConnectionCut
        return body

    def piece_sizes(self) -> Iterator[int]:
        """How much to read next: all at once, or chunk by chunk."""
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            length = self.headers.get("Content-Length", "0")
            if not length.isdigit():
                raise HubError(400, f"Content-Length is not a number: {length}")
            yield int(length)
            return
        while True:
            line = self.rfile.readline().split(b";")[0].strip()
            if not re.fullmatch(rb"[0-9a-fA-F]+", line):
                raise HubError(400, f"Not the size of a chunk: {line!r}")
            if int(line, 16) > 0:
                yield int(line, 16)
            self.rfile.readline()
            if int(line, 16) == 0:
                return

    def send(self, response: Response, record: RequestRecord, cut: CutDownload | None) -> None:
        body = b"" if self.command == "HEAD" else response.body
        sent = body if cut is None else body[: cut.after]
        # Before anything goes out: a test may read the log as soon as it has the answer.
        record.status, record.sent = response.status, len(sent)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        self.wfile.write(sent)
        if cut is not None:
            raise ConnectionCut

    def cut(self, reset: bool) -> None:
        self.close_connection = True
        if reset:
            # Closed with no time to linger, a connection is reset; a shutdown before would end it in order.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            return
        with suppress(OSError):  # the client was faster
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, *_: object) -> None:
        """Tests read `HubServer.log`."""


def refusal(action: Refuse) -> Response:
    headers = {}
    if action.retry_after is not None:
        headers["Retry-After"] = str(action.retry_after)
        # The Hub's own words for the same; the client reads whichever it knows.
        headers["RateLimit"] = f'"api";r=0;t={action.retry_after}'
    return HubError(action.status, action.message, action.code, headers).response()
