# SPDX-License-Identifier: Apache-2.0
"""A small repository's files, and short ways to upload them, to read them back, and to ask without a client."""

import base64
import hashlib
import http.client
import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import CommitInfo, HfApi
from huggingface_hub.errors import HfHubHTTPError

from .server import HubServer


REPO = "tester/tiny"
CARD = "---\nlicense: apache-2.0\ntags: [vision]\n---\n# Tiny\n"
WEIGHTS = bytes(range(256)) * 40
SHA256 = hashlib.sha256(WEIGHTS).hexdigest()
FILES = {
    "README.md": CARD.encode(),
    "config.json": b'{"hidden_size": 32}\n',
    "model.safetensors": WEIGHTS,
    "code/näme with space.py": b"print('x')\n",
    "pictures/preview.png": b"\x89PNG\r\n\0\0" + b"x" * 300,
}
# The sizes of those that go to LFS.
LFS_SIZES = [len(FILES["pictures/preview.png"]), len(WEIGHTS)]


def write_files(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_files(folder: str | Path) -> dict[str, bytes]:
    """The files in a folder, without those the Hub and its client add."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}
    return {name: content for name, content in files.items() if not name.startswith((".gitattributes", ".cache/"))}


def client_of(hub: HubServer, token: str | bool) -> HfApi:
    """A client with a token, or none for False."""
    return HfApi(endpoint=hub.url, token=token)


def upload(api: HfApi, content: bytes | Path, path: str = "model.safetensors", **more: Any) -> CommitInfo:
    return api.upload_file(path_or_fileobj=content, path_in_repo=path, repo_id=REPO, **more)


def blobs_sent(hub: HubServer) -> list[int]:
    """The sizes of the blobs and parts that arrived at the storage, in order of size."""
    return sorted(line.received for line in hub.requests("PUT", "^/storage/") if line.status == 200)


def status_of(error: pytest.ExceptionInfo[HfHubHTTPError]) -> int:
    return error.value.response.status_code


def raw_request(
    hub: HubServer, method: str, path: str, body: bytes | None = None, chunked: bool = False, **headers: str | None
) -> tuple[int, str, dict[str, str]]:
    """Status, text and headers of an answer, without huggingface_hub in between; the owner's token unless told."""
    sent = {"Authorization": f"Bearer {hub.token}", **headers}
    content = iter([body[:5000], body[5000:]]) if chunked and body else body
    connection = http.client.HTTPConnection(hub.url.removeprefix("http://"), timeout=10)
    try:
        present = {name: value for name, value in sent.items() if value is not None}
        connection.request(method, path, content, present, encode_chunked=chunked)
        answer = connection.getresponse()
        return answer.status, answer.read().decode("latin-1"), dict(answer.headers)
    finally:
        connection.close()


def commit_body(*operations: dict[str, Any]) -> bytes:
    """What a commit posts: a header, then an operation a line."""
    lines = [{"key": "header", "value": {"summary": "Test"}}, *operations]
    return "\n".join(json.dumps(line) for line in lines).encode()


def operation(key: str, **value: Any) -> dict[str, Any]:
    return {"key": key, "value": value}


def text_file(path: str, text: str = "") -> dict[str, Any]:
    return operation("file", path=path, content=base64.b64encode(text.encode()).decode())
