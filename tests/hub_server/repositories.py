# SPDX-License-Identifier: Apache-2.0
"""Who is asking; repositories made, changed and deleted; their branches, tags, pull requests; Spaces' settings."""

import re
from typing import TYPE_CHECKING, Any

from .cards import SDKS, check_card
from .messages import HubError, Request, Response, typed
from .routing import route
from .storage import Commit, Discussion, Repository, now


if TYPE_CHECKING:
    from .server import HubServer

KINDS = ("model", "dataset", "space")


@route("GET", "/api/whoami-v2")
def who_am_i(hub: "HubServer", request: Request) -> Response:
    account = hub.signed_in(request)
    role = "write" if account.may_write else "read"
    organizations = [{"type": "org", "name": name, "roleInOrg": role} for name in account.organizations]
    token = {"type": "access_token", "accessToken": {"displayName": role, "role": role}}
    return Response.json({"type": "user", "name": account.name, "orgs": organizations, "auth": token})


def is_private(payload: dict[str, Any]) -> bool | None:
    """What a payload says about visibility, in the words of older and newer clients; None for nothing."""
    visibility = payload.get("visibility")
    if visibility not in (None, "public", "private"):
        raise HubError(400, f'"visibility" must be "public" or "private", got {visibility!r}')
    if visibility is not None:
        return visibility == "private"
    return None if payload.get("private") is None else typed(payload, "private", bool)


def named(hub: "HubServer", request: Request) -> tuple[str, str]:
    """Kind and id in the payload of create and delete; the namespace must be one the token may write to."""
    account, payload = hub.signed_in(request), request.json()
    name, namespace = typed(payload, "name", str), payload.get("organization") or account.name
    kind = payload.get("type") or "model"
    if kind not in KINDS:
        raise HubError(400, f'"type" must be one of {list(KINDS)}, got {kind!r}')
    if not re.fullmatch(r"[\w.-]{1,96}", name, re.ASCII) or "--" in name or ".." in name:
        raise HubError(400, f"Invalid repository name: {name!r}")
    hub.check_may_write(account, namespace)
    return kind, f"{namespace}/{name}"


@route("POST", "/api/repos/create")
def create(hub: "HubServer", request: Request) -> Response:
    kind, repo_id = named(hub, request)
    payload = request.json()
    existing = hub.repositories.get((kind, repo_id))
    if existing is not None:
        extra = {"url": f"{hub.url}/{existing.page}"}
        raise HubError(409, f"You already created this {kind} repo", extra=extra)
    if kind == "space" and payload.get("sdk") not in SDKS:
        raise HubError(400, f'"sdk" must be one of {list(SDKS)}, got {payload.get("sdk")!r}')
    repository = Repository(kind, repo_id, private=bool(is_private(payload)), sdk=payload.get("sdk"))
    repository.hardware = payload.get("hardware")
    for settings, name in ((repository.variables, "variables"), (repository.secrets, "secrets")):
        for item in typed(payload, name, list, default=[]):
            store_setting(settings, item)
    hub.repositories[kind, repo_id] = repository
    return Response.json({"url": f"{hub.url}/{repository.page}", "name": repo_id, "id": repo_id})


@route("DELETE", "/api/repos/delete")
def delete(hub: "HubServer", request: Request) -> Response:
    if hub.repositories.pop(named(hub, request), None) is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    return Response.json({})


@route("PUT", "/api/{kinds}/{id}/settings")
def change_settings(hub: "HubServer", request: Request) -> Response:
    repository, payload = hub.writable(request), request.json()
    private, gated = is_private(payload), payload.get("gated", repository.gated)
    if gated not in (False, "auto", "manual"):
        raise HubError(400, f'"gated" must be "auto", "manual" or false, got {gated!r}')
    repository.gated = gated
    repository.private = repository.private if private is None else private
    return Response.json({"private": repository.private, "gated": repository.gated})


@route("GET", "/api/{kinds}/{id}/auth-check")
def check_access(hub: "HubServer", request: Request) -> Response:
    hub.open_to(request, hub.readable(request))
    return Response.json({})


@route("GET", "/api/{kinds}/{id}/auth-check/write")
def check_write_access(hub: "HubServer", request: Request) -> Response:
    hub.writable(request)
    return Response.json({})


@route("POST", "/api/validate-yaml")
def validate_card(hub: "HubServer", request: Request) -> Response:
    payload = request.json()
    texts = check_card(typed(payload, "content", str), payload.get("repoType", "model"))
    errors, warnings = ([{"message": text} for text in group] for group in texts)
    answer = {"errors": errors, "warnings": warnings}
    if errors:
        raise HubError(400, "Invalid metadata in README.md", extra=answer)
    return Response.json(answer)


# Branches, tags, pull requests


def named_ref(name: str, ref: str, commit: str) -> dict[str, str]:
    return {"name": name, "ref": ref, "targetCommit": commit}


@route("GET", "/api/{kinds}/{id}/refs")
def list_refs(hub: "HubServer", request: Request) -> Response:
    refs = hub.readable(request).refs
    groups: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": []}
    prefixes = {"branches": "refs/heads/", "tags": "refs/tags/"}
    if request.flag("include_prs"):
        prefixes["pullRequests"] = "refs/pr/"
        groups["pullRequests"] = []
    for group, prefix in prefixes.items():
        named_here = [(ref, commit) for ref, commit in sorted(refs.items()) if ref.startswith(prefix)]
        groups[group] = [named_ref(ref.removeprefix(prefix), ref, commit) for ref, commit in named_here]
    return Response.json(groups)


def add_ref(repository: Repository, ref: str, commit: Commit) -> Response:
    if ref in repository.refs:
        raise HubError(409, f"Reference already exists: {ref}")
    repository.refs[ref] = commit.id
    return Response.json({}, 201)


def remove_ref(repository: Repository, ref: str) -> Response:
    if ref == "refs/heads/main":
        raise HubError(403, "The main branch cannot be deleted")
    if repository.refs.pop(ref, None) is None:
        raise HubError(404, f"Reference does not exist: {ref}", "RevisionNotFound")
    return Response.json({})


@route("POST", "/api/{kinds}/{id}/branch/{name}")
def create_branch(hub: "HubServer", request: Request) -> Response:
    repository = hub.writable(request)
    start = repository.commit(typed(request.json(), "startingPoint", str, default="main"))
    return add_ref(repository, f"refs/heads/{request.argument('name')}", start)


@route("DELETE", "/api/{kinds}/{id}/branch/{name}")
def delete_branch(hub: "HubServer", request: Request) -> Response:
    return remove_ref(hub.writable(request), f"refs/heads/{request.argument('name')}")


@route("POST", "/api/{kinds}/{id}/tag/{revision}")
def create_tag(hub: "HubServer", request: Request) -> Response:
    repository = hub.writable(request)
    commit = repository.commit(request.argument("revision"))
    return add_ref(repository, f"refs/tags/{typed(request.json(), 'tag', str)}", commit)


@route("DELETE", "/api/{kinds}/{id}/tag/{name}")
def delete_tag(hub: "HubServer", request: Request) -> Response:
    return remove_ref(hub.writable(request), f"refs/tags/{request.argument('name')}")


def summary(repository: Repository, discussion: Discussion) -> dict[str, Any]:
    return {
        "num": discussion.number,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "createdAt": discussion.created,
        "status": "open",
        "isPullRequest": discussion.base is not None,
        "repo": {"name": repository.id, "type": repository.kind},
    }


@route("GET", "/api/{kinds}/{id}/discussions")
def list_discussions(hub: "HubServer", request: Request) -> Response:
    repository = hub.readable(request)
    wanted = request.query.get("type", ["all"])[-1]
    found = [
        summary(repository, discussion)
        for discussion in reversed(repository.discussions)
        if wanted in ("all", "pull_request" if discussion.base else "discussion")
    ]
    return Response.json({"discussions": found, "count": len(found), "start": 0})


@route("POST", "/api/{kinds}/{id}/discussions")
def open_discussion(hub: "HubServer", request: Request) -> Response:
    repository, payload = hub.contributable(request), request.json()
    base = "main" if payload.get("pullRequest") else None
    texts = typed(payload, "title", str), hub.signed_in(request).name, typed(payload, "description", str, default="")
    discussion = Discussion(len(repository.discussions) + 1, *texts, base=base)
    repository.discussions.append(discussion)
    if base:
        repository.refs[f"refs/pr/{discussion.number}"] = repository.commit(base).id
    return Response.json({"num": discussion.number, "pullRequest": bool(base)})


@route("GET", "/api/{kinds}/{id}/discussions/{number}")
def show_discussion(hub: "HubServer", request: Request) -> Response:
    repository, number = hub.readable(request), request.argument("number")
    found = next((item for item in repository.discussions if str(item.number) == number), None)
    if found is None:
        raise HubError(404, f"Discussion not found: {number}")
    author, created = {"name": found.author}, found.created
    comment = {"edited": False, "hidden": False, "latest": {"raw": found.description}}
    events = [{"id": f"{number}-1", "type": "comment", "createdAt": created, "author": author, "data": comment}]
    changes = {"base": f"refs/heads/{found.base}"} if found.base else None
    details = {"events": events, "changes": changes, "filesWithConflicts": [], "diff": ""}
    return Response.json({**summary(repository, found), **details})


# Settings of Spaces


def store_setting(settings: dict[str, dict[str, Any]], item: dict[str, Any]) -> None:
    key, value = typed(item, "key", str), typed(item, "value", str)
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", key):
        raise HubError(400, f"Invalid key: {key!r}")
    settings[key] = {"key": key, "value": value, "description": item.get("description"), "updatedAt": now()}


def settings_of(hub: "HubServer", request: Request) -> tuple[dict[str, dict[str, Any]], bool]:
    """The variables or the secrets of a Space, and whether they are secrets."""
    hidden = request.argument("settings") == "secrets"
    repository = hub.writable(request)
    return (repository.secrets if hidden else repository.variables), hidden


def show_settings(settings: dict[str, dict[str, Any]], hidden: bool) -> Response:
    shown = {key: {n: v for n, v in item.items() if not (hidden and n == "value")} for key, item in settings.items()}
    return Response.json(shown)


@route("GET", "/api/{space}/{id}/{settings}")
def list_settings(hub: "HubServer", request: Request) -> Response:
    return show_settings(*settings_of(hub, request))


@route("POST", "/api/{space}/{id}/{settings}")
def set_setting(hub: "HubServer", request: Request) -> Response:
    settings, hidden = settings_of(hub, request)
    store_setting(settings, request.json())
    return show_settings(settings, hidden)


@route("DELETE", "/api/{space}/{id}/{settings}")
def remove_setting(hub: "HubServer", request: Request) -> Response:
    settings, hidden = settings_of(hub, request)
    settings.pop(typed(request.json(), "key", str), None)
    return show_settings(settings, hidden)


def runtime_of(repository: Repository) -> dict[str, Any]:
    """Runs as soon as there is an application file, unless a test says otherwise."""
    files = repository.commit().files
    stage = repository.stage or ("RUNNING" if {"app.py", "Dockerfile", "index.html"} & set(files) else "NO_APP_FILE")
    wanted = repository.hardware or "cpu-basic"
    hardware = {"current": wanted if stage == "RUNNING" else None, "requested": wanted}
    return {"stage": stage, "hardware": hardware, "storage": None, "gcTimeout": 172800}


@route("GET", "/api/{space}/{id}/runtime")
def show_runtime(hub: "HubServer", request: Request) -> Response:
    return Response.json(runtime_of(hub.readable(request)))
