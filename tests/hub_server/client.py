# SPDX-License-Identifier: Apache-2.0
"""What it takes to let huggingface_hub, which this process keeps offline, talk to the server on loopback."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import constants, file_download, hf_api
from huggingface_hub.utils import _http, close_session

from .server import HubServer


# Anything that would send a client elsewhere, or give it a token or a cache of this machine.
UNWANTED = (
    "HF_HUB_OFFLINE TRANSFORMERS_OFFLINE HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_TOKEN_PATH HF_STORED_TOKENS_PATH "
    "HF_OIDC_RESOURCE HF_HUB_CACHE HUGGINGFACE_HUB_CACHE HF_ASSETS_CACHE HF_XET_CACHE HF_MODULES_CACHE"
)

# The HTTP library changed its name; this is what a broken connection raises.
ConnectionFailed = (getattr(_http, "httpx2", None) or _http.httpx).TransportError


def point_client_at(server: HubServer, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Online, with this server as the Hub and `home` as HF_HOME, here and in processes started from here.

    Xet is off: a client of version 2 that has hf_xet asks no server whether to use it.
    """
    close_session()
    # The client sends files in a way that its HTTP library has a newer one for.
    warnings.filterwarnings("ignore", message="Use 'content=", category=DeprecationWarning)
    for name in UNWANTED.split():
        monkeypatch.delenv(name, raising=False)
    loopback = "127.0.0.1,localhost"
    environment = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": loopback}
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    values = {
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "ENDPOINT": server.url,
        "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
        **home_values(home),
    }
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    # The functions of the module are methods of an object that was made with the endpoint of the real Hub.
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)


def home_values(home: Path) -> dict[str, str]:
    """The constants that name something in HF_HOME, for another HF_HOME."""
    old = constants.HF_HOME
    inside = {name: value for name, value in vars(constants).items() if str(value).startswith(old + os.sep)}
    moved = {name: str(home) + value[len(old) :] for name, value in inside.items()}
    # These may have been set apart from it.
    apart = {"HF_HUB_CACHE": "hub", "HF_TOKEN_PATH": "token", "HF_STORED_TOKENS_PATH": "stored_tokens"}
    return {"HF_HOME": str(home), **moved, **{name: str(home / path) for name, path in apart.items()}}


def record_waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The client waits no more before it tries again; how long it would have waited is noted here."""
    waits: list[float] = []
    for module in (_http, file_download):
        monkeypatch.setattr(module, "time", SimpleNamespace(sleep=waits.append))
    return waits
