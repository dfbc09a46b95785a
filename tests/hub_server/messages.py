# SPDX-License-Identifier: Apache-2.0
"""What goes over the wire: requests as the routes see them, answers, errors with the Hub's codes, and the log."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and whether the token may write."""

    name: str
    may_write: bool = True
    organizations: tuple[str, ...] = ()

    def belongs_to(self, namespace: str) -> bool:
        return namespace == self.name or namespace in self.organizations


@dataclass(frozen=True)
class Response:
    """An answer; `Content-Length` is added when it is sent."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def json(cls, value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> "Response":
        # Dates of a card's YAML become text.
        body = json.dumps(value, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})


class HubError(Exception):
    """An answer of 4xx or 5xx; `code` becomes X-Error-Code, by which the client picks its exception."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.headers, self.extra = dict(headers or {}), dict(extra or {})

    def response(self) -> Response:
        one_line = " ".join(self.message.split()).encode("ascii", "replace").decode()
        headers = {"X-Error-Message": one_line, **self.headers}
        if self.code:
            headers["X-Error-Code"] = self.code
        return Response.json({"error": self.message, **self.extra}, self.status, headers)


@dataclass
class RequestRecord:
    """A line of the log: `received` and `sent` count bytes of bodies; no status means the connection was cut."""

    method: str
    path: str
    host: str = ""
    authorization: str | None = None
    range: str | None = None
    status: int | None = None
    received: int = 0
    sent: int = 0


@dataclass(frozen=True)
class Request:
    """A request whose body has arrived whole."""

    method: str
    path: str
    headers: Mapping[str, str]
    query: Mapping[str, list[str]] = field(default_factory=dict)
    body: bytes = b""
    account: Account | None = None
    # Someone else's commit, to be made right before the one that this request makes.
    earlier_commit: tuple[str, bytes] | None = None
    arguments: Mapping[str, str] = field(default_factory=dict)

    def argument(self, name: str) -> str:
        return self.arguments[name]

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[-1].lower() in ("1", "true")

    def json(self) -> dict[str, Any]:
        """The body, which must be a JSON object; none at all counts as an empty one."""
        try:
            value = json.loads(self.body or b"{}")
        except ValueError as error:
            raise HubError(400, f"The body is not JSON: {error}") from error
        if not isinstance(value, dict):
            raise HubError(400, f"The body must be a JSON object, not {type(value).__name__}")
        return value

    def form_or_json(self) -> dict[str, Any]:
        """The body of endpoints that take a form too: every field of a form is a list of strings."""
        if "x-www-form-urlencoded" not in self.headers.get("Content-Type", ""):
            return self.json()
        return dict(parse_qs(self.body.decode(errors="replace")))


def typed(payload: Mapping[str, Any], name: str, kind: type, default: Any = None) -> Any:
    """A field of a payload, refused with 400 when it is missing (and has no default) or of another type."""
    value = payload.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise HubError(400, f'"{name}" must be of type {kind.__name__}, got {value!r}')
    return value


def check_no_token(request: Request) -> None:
    """The storage takes its own signature only; a token of the Hub has no business there."""
    if "Authorization" in request.headers:
        raise HubError(400, "Only one auth mechanism allowed")
