# SPDX-License-Identifier: Apache-2.0
"""From a method and a path to the function that answers."""

import re
from collections.abc import Callable
from typing import TYPE_CHECKING
from urllib.parse import unquote

from .messages import HubError, Request, Response


if TYPE_CHECKING:
    from .server import HubServer

Answer = Callable[["HubServer", Request], Response]

# Slashes inside a value are sent as %2F, so that a value ends at the next one.
FIELDS = {
    "kinds": "models|datasets|spaces",
    "page": "(?:datasets/|spaces/)?[^/]+(?:/[^/]+)?",
    "space": "spaces",
    "settings": "variables|secrets",
    "id": "[^/]+(?:/[^/]+)?",
    "path": ".+",
}
ROUTES: list[tuple[str, re.Pattern[str], Answer]] = []


def route(method: str, template: str) -> Callable[[Answer], Answer]:
    """Register the function below for a method and a path such as `/api/{kinds}/{id}/refs`."""
    pattern = re.sub(r"{(\w+)}", lambda field: f"(?P<{field[1]}>{FIELDS.get(field[1], '[^/]+')})", template)

    def register(answer: Answer) -> Answer:
        ROUTES.append((method, re.compile(pattern), answer))
        return answer

    return register


def find_route(method: str, raw_path: str) -> tuple[Answer, dict[str, str]]:
    """The function for a request and the values in its path, decoded; 501 for what is not imitated."""
    for route_method, pattern, answer in ROUTES:
        match = pattern.fullmatch(raw_path)
        if match and route_method == ("GET" if method == "HEAD" else method):
            return answer, {name: unquote(value) for name, value in match.groupdict().items()}
    # 501 is no status that the client tries again on, and none that the Hub uses for something missing.
    raise HubError(501, f"This server does not imitate {method} {raw_path}")


def split_page(page: str) -> tuple[str, str]:
    """Kind and id of a repository from the path of its page."""
    for kind in ("dataset", "space"):
        if page.startswith(f"{kind}s/"):
            return kind, page.removeprefix(f"{kind}s/")
    return "model", page
