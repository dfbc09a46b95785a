# SPDX-License-Identifier: Apache-2.0
"""What is in a repository: its description, its tree, its history, and the files themselves."""

import re
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

from .cards import card_data
from .messages import HubError, Request, Response, check_no_token
from .repositories import runtime_of
from .routing import route, split_page
from .storage import Commit, File, Repository


if TYPE_CHECKING:
    from .server import HubServer


def tags_of(card: dict[str, Any]) -> list[str]:
    tags = card.get("tags") or []
    tags = [tags] if isinstance(tags, str) else list(tags)
    licenses = card.get("license") or []
    return tags + [f"license:{name}" for name in ([licenses] if isinstance(licenses, str) else licenses)]


def siblings(commit: Commit, with_blobs: bool) -> list[dict[str, Any]]:
    entries = []
    for path, file in sorted(commit.files.items()):
        entry: dict[str, Any] = {"rfilename": path}
        if with_blobs:
            entry |= {"size": file.size, "blobId": file.git_id}
            entry |= {"lfs": file.lfs_entry("sha256")} if file.lfs else {}
        entries.append(entry)
    return entries


def describe(repository: Repository, commit: Commit, with_blobs: bool) -> dict[str, Any]:
    card = card_data({path: file.content for path, file in commit.files.items()})
    described = {
        "_id": commit.id[:24],
        "id": repository.id,
        "author": repository.namespace,
        "sha": commit.id,
        "lastModified": commit.date,
        "createdAt": repository.created,
        "private": repository.private,
        "gated": repository.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": tags_of(card or {}),
        "siblings": siblings(commit, with_blobs),
        **({"cardData": card} if card is not None else {}),
    }
    if repository.kind == "model":
        described |= {name: card[name] for name in ("library_name", "pipeline_tag") if card and name in card}
    if repository.kind == "space":
        described |= {"sdk": repository.sdk, "runtime": runtime_of(repository)}
    return described


@route("GET", "/api/{kinds}/{id}")
@route("GET", "/api/{kinds}/{id}/revision/{revision}")
def show_repository(hub: "HubServer", request: Request) -> Response:
    repository = hub.readable(request)
    commit = repository.commit(request.arguments.get("revision", "main"))
    return Response.json(describe(repository, commit, request.flag("blobs")))


def entry_of(repository: Repository, commit: Commit, path: str, expand: bool) -> dict[str, Any] | None:
    """A file or folder as trees list it; None for a path that is neither."""
    file = commit.files.get(path)
    if file is not None:
        entry = {"type": "file", "oid": file.git_id, "size": file.size, "path": path}
        entry |= {"lfs": file.lfs_entry()} if file.lfs else {}
    elif commit.under(path):
        entry = {"type": "directory", "oid": commit.tree_id(path), "size": 0, "path": path}
    else:
        return None
    if expand:
        last = repository.last_change(path, commit)
        entry["lastCommit"] = {"id": last.id, "title": last.title, "date": last.date}
    return entry


def listed(commit: Commit, folder: str, recursive: bool) -> list[str]:
    """The files and folders in a folder, or in it and in everything below."""
    start = len(folder) + 1 if folder else 0
    found = set()
    for path in commit.under(folder):
        parts = path[start:].split("/")
        depths = range(1, len(parts) + 1) if recursive else (1,)
        found.update(path[:start] + "/".join(parts[:depth]) for depth in depths)
    return sorted(found)


def one_page(hub: "HubServer", request: Request, items: list[Any]) -> Response:
    """A page of a list, with a link to the next one."""
    start = int(request.query.get("cursor", ["0"])[-1])
    end = start + hub.page_size
    headers = {}
    if end < len(items):
        query = {**{name: values[-1] for name, values in request.query.items()}, "cursor": end}
        headers["Link"] = f'<{hub.url}{quote(request.path)}?{urlencode(query)}>; rel="next"'
    return Response.json(items[start:end], headers=headers)


@route("GET", "/api/{kinds}/{id}/tree/{revision}")
@route("GET", "/api/{kinds}/{id}/tree/{revision}/{path}")
def list_tree(hub: "HubServer", request: Request) -> Response:
    repository = hub.readable(request)
    commit, folder = repository.commit(request.argument("revision")), request.arguments.get("path", "").strip("/")
    if folder and not commit.under(folder):
        raise HubError(404, f"{folder} does not exist on {request.argument('revision')}", "EntryNotFound")
    paths = listed(commit, folder, request.flag("recursive"))
    return one_page(hub, request, [entry_of(repository, commit, path, request.flag("expand")) for path in paths])


@route("POST", "/api/{kinds}/{id}/paths-info/{revision}")
def list_paths(hub: "HubServer", request: Request) -> Response:
    repository, fields = hub.readable(request), request.form_or_json()
    commit, paths = repository.commit(request.argument("revision")), fields.get("paths", [])
    if not isinstance(paths, list) or not all(isinstance(path, str) for path in paths):
        raise HubError(400, '"paths" must be a list of strings')
    expand = str(fields.get("expand", False)).strip("[']").lower() == "true"
    entries = [entry_of(repository, commit, path.strip("/"), expand) for path in paths]
    return Response.json([entry for entry in entries if entry is not None])


@route("GET", "/api/{kinds}/{id}/commits/{revision}")
def list_commits(hub: "HubServer", request: Request) -> Response:
    history = hub.readable(request).history(request.argument("revision"))
    described = [
        {
            "id": commit.id,
            "title": commit.title,
            "message": commit.description,
            "authors": [{"user": commit.author}],
            "date": commit.date,
        }
        for commit in history
    ]
    return one_page(hub, request, described)


# Files


def ranged(content: bytes, wanted: str | None, headers: dict[str, str]) -> Response:
    """Content, or the part of it that a Range header asks for."""
    if wanted is None:
        return Response(200, content, headers)
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", wanted.replace(" ", ""))
    if match is None or not (match[1] or match[2]):
        raise HubError(400, f"Range is not understood: {wanted}")
    size = len(content)
    start = int(match[1]) if match[1] else max(size - int(match[2]), 0)
    end = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if start > end:
        raise HubError(416, f"Range is outside the file: {wanted}", headers={"Content-Range": f"bytes */{size}"})
    part = {"Content-Range": f"bytes {start}-{end}/{size}"}
    return Response(206, content[start : end + 1], {**headers, **part})


def file_headers(path: str, commit: Commit) -> dict[str, str]:
    name = quote(path.rsplit("/", 1)[-1])
    return {
        "X-Repo-Commit": commit.id,
        "Accept-Ranges": "bytes",
        "Content-Type": "application/octet-stream",
        "Content-Disposition": f"inline; filename*=UTF-8''{name}; filename=\"{name}\";",
    }


def find_file(commit: Commit, path: str) -> File:
    if path not in commit.files:
        raise HubError(404, "Entry not found", "EntryNotFound", headers={"X-Repo-Commit": commit.id})
    return commit.files[path]


@route("GET", "/{page}/resolve/{revision}/{path}")
def resolve(hub: "HubServer", request: Request) -> Response:
    """Files in git are sent from here; for LFS the client is sent on to the storage, which asks for no token."""
    repository = hub.find(request, *split_page(request.argument("page")))
    hub.open_to(request, repository)
    path, commit = request.argument("path"), repository.commit(request.argument("revision"))
    file, headers = find_file(commit, path), file_headers(path, commit)
    if not file.lfs:
        return ranged(file.content, request.headers.get("Range"), {**headers, "ETag": f'"{file.etag}"'})
    linked = {"X-Linked-Etag": f'"{file.etag}"', "X-Linked-Size": str(file.size)}
    return Response(302, b"", {**headers, **linked, "Location": hub.sign_download(file.content, path)})


@route("GET", "/storage/download/{grant}/{path}")
def download(hub: "HubServer", request: Request) -> Response:
    check_no_token(request)
    content = hub.downloads.get(request.argument("grant"))
    if content is None:
        raise HubError(403, "This link is not signed by the Hub")
    headers = {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    return ranged(content, request.headers.get("Range"), headers)
