# SPDX-License-Identifier: Apache-2.0
"""A folder becomes one commit of a repository on the Hub; a Space that shows the model stands beside it."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, RepoCard
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status, httpx, validate_repo_id

from ..models.configuration_efficientsam import EfficientSamConfig
from .contents import check_contents, refuse_links
from .model_card import PREVIEW, SCENES_PREVIEW, point_card_at
from .model_folder import EXPORTED, load_folder


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
        tag: name for the commit; an error if another commit has it.
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


def visible_files(folder: Path) -> dict[str, Path]:
    """Files of a folder by their names in a repository, without hidden ones and Python's caches.

    ValueError for links out of the folder.
    """
    refuse_links(folder)
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    unwanted = re.compile(r"(^|/)(\.|__pycache__/)")
    return {name: path for name, path in files.items() if not unwanted.search(name)}


def read_folder(folder: Path) -> dict[str, Path]:
    """Files of a folder that can be published, by their names in the repository; ValueError if it is none.

    That is one with a config, weights and a card, as `efficientsam export`, `convert` and `push` write it, and nothing
    else: what lies in it by chance is not sent to others. Every file is what its name says, and the model loads.
    """
    files = visible_files(folder)
    for needed in ("config.json", "README.md"):
        if needed not in files:
            raise ValueError(f"folder {str(folder)!r} has no {needed}: it is neither a run nor a model with its card")
    if not any(name.endswith(".safetensors") for name in files):
        raise ValueError(f"folder {str(folder)!r} has no weights (*.safetensors)")
    foreign = [name for name in files if not _is_ours(name)]
    if foreign:
        raise ValueError(f"folder {str(folder)!r} holds {', '.join(foreign[:5])}, which belongs to no model")
    check_contents(files)
    load_folder(folder)
    return files


def push_folder(folder: Path, target: HubTarget, token: str | None = None) -> str:
    """Publish a folder as one commit: all of it appears, or nothing does. -> the address of the commit.

    Files of an earlier push that the folder no longer has are deleted by the same commit; others stay. Weights that
    arrived before a connection broke are not sent again. The card's code names the repository in place of ".".

    Raises:
        ValueError: if the folder is no model with its card, the Hub finds the card invalid, the repository is public
            and should be private, or the tag is on another commit.
        OSError: if the token may not write, the repository changed meanwhile, or the Hub cannot be reached.
    """
    files = read_folder(folder)
    card = point_card_at(files["README.md"].read_text(encoding="utf-8"), target.repo_id, target.branch)
    api = HfApi(token=token)
    with _readable_errors(target.repo_id):
        check_card(api, card)
        tagged = _make_repository(api, target)
        contents: dict[str, Path | bytes] = {**files, "README.md": card.encode()}
        commit = _commit(api, target, contents)
        if target.tag and tagged is None:
            api.create_tag(target.repo_id, tag=target.tag, revision=commit.oid)
    if target.tag and tagged not in (None, commit.oid):
        raise ValueError(f"tag: {commit.oid} was published, but {target.tag!r} stays on {tagged}: give another")
    if target.pull_request and not commit.pr_url:
        return f"nothing: {target.repo_id} holds all of this already"
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


def _make_repository(api: HfApi, target: HubTarget) -> str | None:
    """Create repository and branch where they are missing, and set who may see them before there is anything to see.

    Returns the commit that has the tag already. ValueError if the repository is public and should be private, or if
    the tag is on a commit before the last.
    """
    api.create_repo(target.repo_id, private=target.private or None, exist_ok=True)
    info = api.repo_info(target.repo_id)
    if target.private and not info.private:
        raise ValueError(f"private: {target.repo_id} exists and is public; nothing was published")
    if target.gated:
        api.update_repo_settings(target.repo_id, gated=target.gated)
    refs = api.list_repo_refs(target.repo_id)
    heads = {ref.name: ref.target_commit for ref in refs.branches}
    if target.branch and target.branch not in heads:
        api.create_branch(target.repo_id, branch=target.branch)
        heads[target.branch] = info.sha
    tagged = {ref.name: ref.target_commit for ref in refs.tags}.get(target.tag)
    if tagged not in (None, heads.get(target.branch or "main")):
        raise ValueError(f"tag: {target.repo_id} has a tag {target.tag!r} on another commit already")
    return tagged


def _commit(api: HfApi, target: HubTarget, contents: dict[str, Path | bytes]) -> Any:
    """One commit on what the repository holds now; not on what someone else puts there meanwhile."""
    info = api.repo_info(target.repo_id, revision=target.branch)
    present = {sibling.rfilename for sibling in info.siblings}
    stale = sorted(name for name in present - contents.keys() if _is_ours(name))
    additions = [
        CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
        for name, content in contents.items()
    ]
    return api.create_commit(
        target.repo_id,
        [*additions, *(CommitOperationDelete(name) for name in stale)],
        commit_message=target.message,
        revision=target.branch,
        create_pr=target.pull_request,
        parent_commit=info.sha,
    )


def _is_ours(name: str) -> bool:
    """Whether an export writes a file of this name."""
    if "/" in name:
        return name in (PREVIEW, SCENES_PREVIEW)
    return any(fnmatch(name, pattern) for pattern in EXPORTED)


def check_space(space_id: str, model_id: str, files: dict[str, Path], private: bool, token: str | None = None) -> None:
    """ValueError, before anything is sent, if a Space cannot show the model in these files, or would show too much.

    `private` is what the model is to be made; a repository that is there already says itself what it is.
    """
    config = json.loads(files["config.json"].read_text(encoding="utf-8"))
    if config.get("model_type") != EfficientSamConfig.model_type:
        raise ValueError(f"space: it shows EfficientSAM models, and this one is of type {config.get('model_type')!r}")
    if "auto_map" not in config:
        raise ValueError("space: it runs the code beside the weights, and this folder has none (export --with-code)")
    api = HfApi(token=token)
    with _readable_errors(model_id):
        private = api.model_info(model_id).private if api.repo_exists(model_id) else private
    if private:
        with _readable_errors(space_id):
            public = api.repo_exists(space_id, repo_type="space") and not api.space_info(space_id).private
        if public:
            raise ValueError(f"space: {space_id} is public, and would show a private model; nothing was published")


def push_space(space_id: str, model_id: str, folder: Path, token: str | None = None) -> tuple[str, bool]:
    """Create or update the Gradio Space in `folder`, pointed at a model, and private if that is.

    Returns its address, and whether it needs a token of its own to read the model. Errors as of `push_folder`.
    """
    api = HfApi(token=token)
    card = RepoCard.load(folder / "README.md", ignore_metadata_errors=False)
    card.data.models = [model_id]
    contents = {name: str(path) for name, path in visible_files(folder).items()} | {"README.md": str(card).encode()}
    operations = [CommitOperationAdd(name, content) for name, content in contents.items()]
    with _readable_errors(space_id):
        model = api.model_info(model_id)
        new = not api.repo_exists(space_id, repo_type="space")
        api.create_repo(space_id, repo_type="space", space_sdk="gradio", private=model.private or None, exist_ok=True)
        if new:  # or it would start without its model
            api.add_space_variable(space_id, SPACE_SETTING, model_id)
        parent = api.space_info(space_id).sha
        api.create_commit(
            space_id, operations, commit_message=f"Show {model_id}", repo_type="space", parent_commit=parent
        )
        if not new:
            api.add_space_variable(space_id, SPACE_SETTING, model_id)
    return f"{api.endpoint}/spaces/{space_id}", bool(model.private or model.gated)


@contextmanager
def _readable_errors(repo_id: str) -> Iterator[None]:
    """Turn what the Hub and the connection to it can say into one line that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError:
        raise OSError("no token: log in with `hf auth login`, or set HF_TOKEN") from None
    except (HfHubHTTPError, httpx.TransportError) as error:
        raise OSError(_explain(repo_id, error)) from error
    except (RuntimeError, ConnectionError, TimeoutError) as error:  # how the client says that a file did not arrive
        cause = error.__cause__ if isinstance(error.__cause__, (HfHubHTTPError, httpx.TransportError)) else error
        raise OSError(_explain(repo_id, cause)) from error


def _explain(repo_id: str, error: Exception) -> str:
    if not isinstance(error, HfHubHTTPError):
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
        return f"the token may not write to {repo_id}, or not do this there: {error.server_message or error}"
    if status == 412:
        return f"{repo_id} was changed by someone else meanwhile; nothing was published. Give the command again"
    if status in BUSY:
        return f"the Hub answers {status}; nothing was published. Give the command again later"
    return f"the Hub refuses {repo_id} ({status}): {error.server_message or error}"
