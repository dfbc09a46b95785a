# SPDX-License-Identifier: Apache-2.0
"""Commits: a stream of operations becomes one new snapshot, or nothing happens at all."""

import base64
import json
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .cards import check_card
from .messages import HubError, Request, Response, typed
from .routing import route
from .storage import Commit, Discussion, File, Repository


if TYPE_CHECKING:
    from .server import HubServer

Operation = tuple[str, dict[str, Any]]


def read_lines(body: bytes) -> tuple[dict[str, Any], list[Operation]]:
    """The header and the operations of a commit, one JSON object a line."""
    lines: list[Operation] = []
    for line in body.splitlines():
        try:
            item = json.loads(line)
        except ValueError as error:
            raise HubError(400, f"Line {len(lines) + 1} of the commit is not JSON: {error}") from error
        if not isinstance(item, dict):
            raise HubError(400, f"Line {len(lines) + 1} of the commit is not an object")
        lines.append((typed(item, "key", str), typed(item, "value", dict)))
    if not lines or lines[0][0] != "header":
        raise HubError(400, 'The first line of a commit must be its "header"')
    if not typed(lines[0][1], "summary", str):
        raise HubError(400, "A commit needs a summary")
    return lines[0][1], lines[1:]


def safe_path(value: dict[str, Any], name: str = "path") -> str:
    path = typed(value, name, str).rstrip("/")
    if any(part in ("", ".", "..", ".git") for part in path.split("/")):
        raise HubError(400, f"Invalid path: {path!r}")
    return path


def regular_file(value: dict[str, Any], limit: int) -> File:
    if value.get("encoding", "base64") != "base64":
        raise HubError(400, f"Unknown encoding: {value['encoding']!r}")
    try:
        content = base64.b64decode(typed(value, "content", str), validate=True)
    except ValueError as error:
        raise HubError(400, f"The content of {value.get('path')!r} is not base64: {error}") from error
    if len(content) > limit:
        raise HubError(400, f"{value.get('path')!r} has {len(content)} bytes, files over {limit} belong in LFS")
    return File(content)


def lfs_file(value: dict[str, Any], repository: Repository) -> File:
    if value.get("algo", "sha256") != "sha256":
        raise HubError(400, f"Unknown algo: {value['algo']!r}")
    content = repository.lfs.get(typed(value, "oid", str))
    if content is None:
        raise HubError(400, f"{value.get('path')!r} points to an LFS object that does not exist: {value['oid']}")
    if value.get("size", len(content)) != len(content):
        raise HubError(400, f"{value.get('path')!r} has {len(content)} bytes, not {value['size']}")
    return File(content, lfs=True)


def remove(files: dict[str, File], path: str, what: str) -> None:
    gone = [name for name in files if (name == path if what == "file" else name.startswith(f"{path}/"))]
    if not gone:
        raise HubError(404, f"A {what} with this name doesn't exist: {path}", "EntryNotFound")
    for name in gone:
        del files[name]


def apply(hub: "HubServer", repository: Repository, base: Commit, operations: list[Operation]) -> dict[str, File]:
    """The files after the operations, which leave everything else as it is."""
    files = dict(base.files)
    for key, value in operations:
        path = safe_path(value)
        if key == "file":
            files[path] = regular_file(value, hub.regular_limit)
        elif key == "lfsFile":
            files[path] = lfs_file(value, repository)
        elif key == "copyFile":
            source = safe_path(value, "srcPath")
            from_commit = repository.commit(value["srcRevision"]) if value.get("srcRevision") else base
            if source not in from_commit.files:
                raise HubError(404, f"A file with this name doesn't exist: {source}", "EntryNotFound")
            files[path] = from_commit.files[source]
        elif key in ("deletedFile", "deletedFolder"):
            remove(files, path, key.removeprefix("deleted").lower())
        else:
            raise HubError(400, f"Unknown operation: {key!r}")
    return files


def check_files(files: dict[str, File], base: Commit, kind: str) -> None:
    """What the Hub looks at before it takes a commit: its README, and that no path is a file and a folder."""
    for path in files:
        parts = path.split("/")
        if any("/".join(parts[:depth]) in files for depth in range(1, len(parts))):
            raise HubError(400, f"A folder of {path!r} is a file")
    readme = files.get("README.md")
    if readme is not None and readme != base.files.get("README.md"):
        errors, _ = check_card(readme.content.decode(errors="replace"), kind)
        if errors:
            raise HubError(400, "Invalid metadata in README.md: " + "; ".join(errors))


def find_base(repository: Repository, revision: str, parent: str | None, as_pull_request: bool) -> tuple[str, Commit]:
    """The reference to commit on and the commit to start from; 412 if it is not the one the client knows."""
    ref = repository.ref(revision)
    if ref is None or ref.startswith("refs/tags/"):
        raise HubError(404, f"Invalid rev id: {revision} is no branch", "RevisionNotFound")
    head = repository.commit(revision)
    if parent is None or head.id.startswith(parent):
        return ref, head
    if as_pull_request and parent in repository.commits:
        return ref, repository.commits[parent]
    raise HubError(412, "A commit has happened since. Please refresh and try again.")


def open_pull_request(repository: Repository, title: str, author: str, base: str) -> Discussion:
    discussion = Discussion(len(repository.discussions) + 1, title, author, base=base.removeprefix("refs/heads/"))
    repository.discussions.append(discussion)
    return discussion


def commit_as_someone_else(repository: Repository, revision: str, path: str, content: bytes) -> None:
    """The commit that comes in between."""
    ref = repository.ref(revision) or "refs/heads/main"
    head = repository.commit(ref)
    files = MappingProxyType({**head.files, path: File(content)})
    repository.add(ref, Commit(files, f"Add {path}", author="someone-else", parent=head.id))


@route("POST", "/api/{kinds}/{id}/commit/{revision}")
def make_commit(hub: "HubServer", request: Request) -> Response:
    as_pull_request, revision = request.flag("create_pr"), request.argument("revision")
    repository = hub.contributable(request) if as_pull_request else hub.committable(request)
    header, operations = read_lines(request.body)
    if request.earlier_commit is not None:
        commit_as_someone_else(repository, revision, *request.earlier_commit)
    ref, base = find_base(repository, revision, header.get("parentCommit"), as_pull_request)
    files = apply(hub, repository, base, operations)
    check_files(files, base, repository.kind)
    author, title = hub.signed_in(request).name, header["summary"]
    commit = Commit(MappingProxyType(files), title, header.get("description") or "", author, base.id)
    answer = {"success": True, "commitOid": commit.id, "commitUrl": f"{hub.url}/{repository.page}/commit/{commit.id}"}
    if as_pull_request:
        number = open_pull_request(repository, title, author, ref).number
        ref, answer["pullRequestUrl"] = f"refs/pr/{number}", f"{hub.url}/{repository.page}/discussions/{number}"
    repository.add(ref, commit)
    return Response.json(answer)
