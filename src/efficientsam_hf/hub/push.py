# SPDX-License-Identifier: Apache-2.0
"""A folder becomes one commit of a repository on the Hub; a Space that shows the model stands beside it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx, validate_repo_id

from .model_card import point_card_at
from .model_folder import EXPORTED


BUSY = (408, 429, 500, 502, 503, 504)
GATES = ("auto", "manual")
SPACE_SETTING = "MODEL_ID"  # what the Space reads the name of its model from


@dataclass(frozen=True)
class HubTarget:
    """Where on the Hub a folder goes, and as what.

    Args:
        repo_id: "user/name" or "organisation/name"; made where it is missing.
        private: make it private; an error if it exists and is public.
        branch: branch that takes the commit, made where it is missing; main if left out.
        pull_request: propose the commit in a pull request of the branch.
        tag: name for the commit; it must be new.
        gated: "auto" or "manual": who wants the files must ask.
        message: first line of the commit.
    """

    repo_id: str
    private: bool = False
    branch: str | None = None
    pull_request: bool = False
    tag: str | None = None
    gated: str | None = None
    message: str = "Upload model"

    def __post_init__(self):
        check_repo_id("repo_id", self.repo_id)
        if self.gated is not None and self.gated not in GATES:
            raise ValueError(f"gated must be one of {', '.join(GATES)}, got {self.gated!r}")
        if self.tag is not None and self.pull_request:
            raise ValueError("tag names a commit of the branch, which a pull request has none of yet")


def check_repo_id(argument: str, value: str) -> None:
    """ValueError unless `value` is "owner/name" as the Hub allows it."""
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(f"{argument}: {error}") from None
    if value.count("/") != 1:
        raise ValueError(f"{argument} must be OWNER/NAME, got {value!r}")


def read_folder(folder: Path) -> dict[str, Path]:
    """Files of a folder that can be published, by their names in the repository; ValueError if it is none.

    That is one with a config, weights and a card, as `efficientsam export`, `convert` and `push` write it.
    """
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    hidden = [name for name in files if any(part.startswith(".") for part in name.split("/"))]
    files = {name: path for name, path in files.items() if name not in hidden and "__pycache__" not in name}
    for needed in ("config.json", "README.md"):
        if needed not in files:
            raise ValueError(f"folder {str(folder)!r} has no {needed}: it is neither a run nor a model with its card")
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"folder {str(folder)!r} has no weights (*.safetensors)")
    return files


def push_folder(folder: Path, target: HubTarget, token: str | None = None) -> str:
    """Publish a folder as one commit: all of it appears, or nothing does. -> the address of the commit.

    Files of an earlier push that the folder no longer has are deleted by the same commit; others stay. Weights that
    arrived before a connection broke are not sent again. The card's code names the repository in place of ".".

    Raises:
        ValueError: if the folder is no model with its card, the Hub finds the card invalid, or the tag exists.
        OSError: if the token may not write, the repository changed meanwhile, or the Hub cannot be reached.
    """
    files = read_folder(folder)
    card = point_card_at(files["README.md"].read_text(encoding="utf-8"), target.repo_id)
    api = HfApi(token=token)
    with _readable_errors(target.repo_id):
        check_card(api, card)
        _make_repository(api, target)
        contents: dict[str, Path | bytes] = {**files, "README.md": card.encode()}
        commit = _commit(api, target, contents)
        if target.gated:
            api.update_repo_settings(target.repo_id, gated=target.gated)
        if target.tag:
            api.create_tag(target.repo_id, tag=target.tag, revision=commit.oid)
    return commit.pr_url or commit.commit_url


def check_card(api: HfApi, card: str) -> None:
    """Let the Hub look at the metadata of a model's card; ValueError with what it does not accept."""
    question = {"repoType": "model", "content": card}
    headers = build_hf_headers(token=api.token)
    response = get_session().post(f"{api.endpoint}/api/validate-yaml", json=question, headers=headers)
    if response.status_code != 400:
        hf_raise_for_status(response)
        return
    errors = "; ".join(error.get("message", "") for error in response.json().get("errors", []))
    raise ValueError(f"the Hub does not accept the card: {errors}")


def _make_repository(api: HfApi, target: HubTarget) -> None:
    """Create repository and branch where they are missing.

    ValueError if the tag is there already, or if the repository is public and should be private.
    """
    api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
    if target.private and not api.repo_info(target.repo_id).private:
        raise ValueError(f"private: {target.repo_id} exists and is public; nothing was published")
    refs = api.list_repo_refs(target.repo_id)
    if target.tag in [ref.name for ref in refs.tags]:
        raise ValueError(f"tag: {target.repo_id} has a tag {target.tag!r} already")
    if target.branch and target.branch not in [ref.name for ref in refs.branches]:
        api.create_branch(target.repo_id, branch=target.branch)


def _commit(api: HfApi, target: HubTarget, contents: dict[str, Path | bytes]) -> Any:
    """One commit on what the repository holds now; not on what someone else puts there meanwhile."""
    info = api.repo_info(target.repo_id, revision=target.branch)
    present = {sibling.rfilename for sibling in info.siblings}
    stale = sorted(name for name in present - contents.keys() if _is_ours(name))
    additions = [
        CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
        for name, content in contents.items()
    ]
    where = {"repo_id": target.repo_id, "revision": target.branch, "create_pr": target.pull_request}
    return api.create_commit(
        operations=[*additions, *(CommitOperationDelete(name) for name in stale)],
        commit_message=target.message,
        parent_commit=info.sha,
        **where,
    )


def _is_ours(name: str) -> bool:
    """Whether an earlier push wrote a file of this name."""
    return any(fnmatch(name.split("/")[0], pattern) for pattern in EXPORTED)


def push_space(space_id: str, model_id: str, folder: Path, private: bool = False, token: str | None = None) -> str:
    """Create or update the Gradio Space in `folder`, pointed at a model; -> its address. Errors as `push_folder`."""
    check_repo_id("space", space_id)
    api = HfApi(token=token)
    card = RepoCard.load(folder / "README.md", ignore_metadata_errors=False)
    card.data.models = [model_id]
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    contents = {name: path for name, path in files.items() if "__pycache__" not in name and name != "__init__.py"}
    with _readable_errors(space_id):
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=private or None, exist_ok=True)
        api.add_space_variable(space_id, SPACE_SETTING, model_id)  # before its files, so that it starts with it
        parent = api.repo_info(space_id, repo_type="space").sha
        operations = [CommitOperationAdd(name, str(path)) for name, path in contents.items() if name != "README.md"]
        operations.append(CommitOperationAdd("README.md", str(card).encode()))
        where = {"repo_id": space_id, "repo_type": "space"}
        api.create_commit(operations=operations, commit_message=f"Show {model_id}", parent_commit=parent, **where)
    return f"{api.endpoint}/spaces/{space_id}"


@contextmanager
def _readable_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub and the connection to it can say into one line that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise OSError("no token: log in with `hf auth login`, or set HF_TOKEN") from None
    except (HfHubHTTPError, httpx.TransportError) as error:
        raise OSError(_explain(repo_id, error)) from error
    except RuntimeError as error:  # how the client says that a file did not arrive
        if not isinstance(error.__cause__, (HfHubHTTPError, httpx.TransportError)):
            raise
        raise OSError(_explain(repo_id, error.__cause__)) from error


def _explain(repo_id: str, error: Exception) -> str:
    if isinstance(error, httpx.TransportError):
        reason = str(error) or type(error).__name__
        return (
            f"the connection to the Hub broke ({reason}); nothing was published by halves. Give the command again: "
            "weights that arrived are not sent twice"
        )
    status = error.response.status_code
    if isinstance(error, RepositoryNotFoundError):
        return f"{repo_id} does not exist, or the token may not see it"
    if status == 401:
        return "the Hub does not accept the token: log in with `hf auth login`, or set HF_TOKEN to a valid one"
    if status == 403:
        return f"the token may not write to {repo_id}: it needs the permission to write there"
    if status == 412:
        return f"{repo_id} was changed by someone else meanwhile; nothing was published. Give the command again"
    if status in BUSY:
        return f"the Hub answers {status}; nothing was published. Give the command again later"
    return f"the Hub refuses {repo_id} ({status}): {error.server_message or error}"
