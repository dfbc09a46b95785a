# SPDX-License-Identifier: Apache-2.0
"""Uploads: which files go to LFS, the LFS batch, storage in one piece or in parts, and what completes it."""

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from .messages import HubError, Request, Response, check_no_token, typed
from .routing import route, split_page
from .storage import Commit, Repository


if TYPE_CHECKING:
    from .server import HubServer


@dataclass
class Upload:
    """A blob on its way: with a `part_size` in parts, otherwise in one piece."""

    repository: Repository
    sha256: str
    size: int
    part_size: int | None = None
    parts: dict[int, bytes] = field(default_factory=dict)

    @property
    def number_of_parts(self) -> int:
        return -(-self.size // self.part_size) if self.part_size else 1

    def store(self, content: bytes) -> None:
        """Keep a blob that has arrived whole."""
        if len(content) != self.size:
            raise HubError(400, f"The blob has {len(content)} bytes, {self.size} were announced")
        if hashlib.sha256(content).hexdigest() != self.sha256:
            raise HubError(400, f"The blob's sha256 is not {self.sha256}")
        self.repository.lfs[self.sha256] = content


# Which files go to LFS


def lfs_patterns(commit: Commit) -> list[str]:
    attributes = commit.files.get(".gitattributes")
    lines = attributes.content.decode(errors="replace").splitlines() if attributes else []
    return [line.split()[0] for line in lines if "filter=lfs" in line.split()]


def belongs_in_lfs(path: str, size: int, sample: bytes, patterns: list[str], regular_limit: int) -> bool:
    """By name, by size, or because it is no text."""
    name = path.rsplit("/", 1)[-1]
    by_name = any(fnmatchcase(path if "/" in pattern else name, pattern) for pattern in patterns)
    return by_name or size > regular_limit or b"\0" in sample


def ignored(path: str, rules: str) -> bool:
    """Whether a .gitignore leaves a path out: names, globs, folders, rooted patterns, and exceptions by `!`."""
    answer = False
    for line in rules.splitlines():
        pattern = line.strip()
        if not pattern or pattern.startswith("#"):
            continue
        keeps, pattern = pattern.startswith("!"), pattern.removeprefix("!")
        if _matches(path, pattern):
            answer = not keeps
    return answer


def _matches(path: str, pattern: str) -> bool:
    parts = path.split("/")
    # A pattern for folders only can match every part but the last, which is the file.
    depths = range(1, len(parts) + (not pattern.endswith("/")))
    rooted, pattern = "/" in pattern.rstrip("/"), pattern.strip("/")
    return any(fnmatchcase("/".join(parts[:depth]) if rooted else parts[depth - 1], pattern) for depth in depths)


@route("POST", "/api/{kinds}/{id}/preupload/{revision}")
def preupload(hub: "HubServer", request: Request) -> Response:
    repository = hub.contributable(request) if request.flag("create_pr") else hub.committable(request)
    commit, payload = repository.commit(request.argument("revision")), request.json()
    stored = commit.files.get(".gitignore")
    rules = typed(payload, "gitIgnore", str, default=stored.content.decode() if stored else "")
    patterns = lfs_patterns(commit)
    answers = []
    for item in typed(payload, "files", list):
        path, size = typed(item, "path", str), typed(item, "size", int)
        in_lfs = belongs_in_lfs(path, size, sample_of(item), patterns, hub.regular_limit)
        answer = {"path": path, "uploadMode": "lfs" if in_lfs else "regular", "shouldIgnore": ignored(path, rules)}
        answers.append(answer | ({"oid": commit.files[path].etag} if path in commit.files else {}))
    return Response.json({"files": answers})


def sample_of(item: Mapping[str, Any]) -> bytes:
    try:
        return base64.b64decode(typed(item, "sample", str), validate=True)
    except ValueError as error:
        raise HubError(400, f'"sample" is not base64: {error}') from error


# The LFS batch


@route("POST", "/{page}.git/info/lfs/objects/batch")
def lfs_batch(hub: "HubServer", request: Request) -> Response:
    repository = hub.contributable(request, *split_page(request.argument("page")))
    payload = request.json()
    if payload.get("operation") != "upload" or payload.get("hash_algo", "sha256") != "sha256":
        raise HubError(400, 'Only "upload" by "sha256" is imitated')
    in_parts = "multipart" in typed(payload, "transfers", list, default=["basic"])
    objects = [lfs_object(hub, repository, item, in_parts) for item in typed(payload, "objects", list)]
    used_parts = any("chunk_size" in item.get("actions", {}).get("upload", {}).get("header", {}) for item in objects)
    return Response.json({"transfer": "multipart" if used_parts else "basic", "objects": objects})


def lfs_object(hub: "HubServer", repository: Repository, item: Mapping[str, Any], in_parts: bool) -> dict[str, Any]:
    """What is to be done for a blob: nothing at all if it is here already."""
    sha256, size = typed(item, "oid", str), typed(item, "size", int)
    answer: dict[str, Any] = {"oid": sha256, "size": size}
    if not re.fullmatch("[0-9a-f]{64}", sha256) or size < 1:
        return {**answer, "error": {"code": 422, "message": "oid must be a sha256 and size positive"}}
    stored = repository.lfs.get(sha256)
    if stored is not None:
        wrong = {"error": {"code": 422, "message": f"size is {len(stored)}"}} if len(stored) != size else {}
        return {**answer, **wrong}
    part_size = hub.part_size if in_parts and size > hub.multipart_threshold else None
    return {**answer, "authenticated": True, "actions": open_upload(hub, Upload(repository, sha256, size, part_size))}


def open_upload(hub: "HubServer", upload: Upload) -> dict[str, Any]:
    key = secrets.token_hex(8)
    hub.uploads[key] = upload
    storage, lfs = f"{hub.storage_url}/storage/upload/{key}", f"{hub.url}/{upload.repository.page}.git/info/lfs"
    action: dict[str, Any] = {"href": storage}
    if upload.part_size is not None:
        parts = {f"{number:05d}": f"{storage}/{number}" for number in range(1, upload.number_of_parts + 1)}
        header = {"chunk_size": str(upload.part_size), **parts}
        action = {"href": f"{lfs}/complete_multipart/{key}", "header": header}
    return {"upload": action, "verify": {"href": f"{lfs}/verify"}}


# Storage. Like the real one it asks for no token: who knows the address may write there.


def find_upload(hub: "HubServer", request: Request) -> Upload:
    upload = hub.uploads.get(request.argument("key"))
    if upload is None:
        raise HubError(403, "This link is not signed by the Hub")
    return upload


@route("PUT", "/storage/upload/{key}")
def store_blob(hub: "HubServer", request: Request) -> Response:
    check_no_token(request)
    find_upload(hub, request).store(request.body)
    return Response(200, headers={"ETag": etag(request.body)})


@route("PUT", "/storage/upload/{key}/{number}")
def store_part(hub: "HubServer", request: Request) -> Response:
    check_no_token(request)
    upload, number = find_upload(hub, request), request.argument("number")
    if not number.isdigit() or not 1 <= int(number) <= upload.number_of_parts:
        raise HubError(400, f"There is no part {number}")
    upload.parts[int(number)] = request.body
    return Response(200, headers={"ETag": etag(request.body)})


def etag(content: bytes) -> str:
    return f'"{hashlib.md5(content).hexdigest()}"'


@route("POST", "/{page}.git/info/lfs/complete_multipart/{key}")
def complete_upload(hub: "HubServer", request: Request) -> Response:
    upload, payload = find_upload(hub, request), request.json()
    if typed(payload, "oid", str) != upload.sha256:
        raise HubError(400, f"This upload is for {upload.sha256}")
    told = {typed(part, "partNumber", int): typed(part, "etag", str) for part in typed(payload, "parts", list)}
    stored = {number: etag(content) for number, content in upload.parts.items()}
    if told != stored or len(stored) != upload.number_of_parts:
        raise HubError(400, "The parts are not the ones that were uploaded")
    upload.store(b"".join(upload.parts[number] for number in sorted(upload.parts)))
    return Response.json({"success": True})


@route("POST", "/{page}.git/info/lfs/verify")
def verify_upload(hub: "HubServer", request: Request) -> Response:
    repository = hub.contributable(request, *split_page(request.argument("page")))
    stored = repository.lfs.get(typed(request.json(), "oid", str))
    if stored is None:
        raise HubError(404, "The blob was not uploaded")
    if len(stored) != typed(request.json(), "size", int):
        raise HubError(400, f"The blob has {len(stored)} bytes")
    return Response.json({})
