# SPDX-License-Identifier: Apache-2.0
"""Repositories in memory: files by content, commits that never change, branches and tags that name them."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from types import MappingProxyType
from typing import Any

from .messages import HubError


LFS_PATTERNS = "*.arrow *.bin *.ckpt *.npy *.npz *.onnx *.parquet *.pt *.pth *.safetensors *.tar *.zip *tfevents*"
GIT_ATTRIBUTES = "".join(f"{pattern} filter=lfs diff=lfs merge=lfs -text\n" for pattern in LFS_PATTERNS.split())


def now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def git_hash(content: bytes) -> str:
    """The name git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass(frozen=True)
class File:
    """A file of a commit: kept in git, or in LFS with a pointer to it in git."""

    content: bytes
    lfs: bool = False

    @property
    def size(self) -> int:
        return len(self.content)

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n"
        return text.encode()

    @cached_property
    def git_id(self) -> str:
        return git_hash(self.pointer if self.lfs else self.content)

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.git_id

    def lfs_entry(self, id_name: str = "oid") -> dict[str, Any] | None:
        return {id_name: self.sha256, "size": self.size, "pointerSize": len(self.pointer)} if self.lfs else None


@dataclass(frozen=True)
class Commit:
    """A snapshot of every file, with its parent."""

    files: Mapping[str, File]
    title: str
    description: str = ""
    author: str = "hub"
    parent: str | None = None
    date: str = field(default_factory=now)

    @cached_property
    def id(self) -> str:
        names = {path: file.git_id for path, file in self.files.items()}
        parts = [names, self.title, self.description, self.author, self.parent, self.date]
        return hashlib.sha1(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def under(self, folder: str) -> dict[str, File]:
        """The files below a folder; all of them for the empty name."""
        prefix = f"{folder}/" if folder else ""
        return {path: file for path, file in self.files.items() if path.startswith(prefix)}

    def tree_id(self, folder: str) -> str:
        names = {path: file.git_id for path, file in self.under(folder).items()}
        return hashlib.sha1(json.dumps(names, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Discussion:
    """A discussion; a pull request when `base` names the branch it is to change."""

    number: int
    title: str
    author: str
    description: str = ""
    base: str | None = None
    created: str = field(default_factory=now)


@dataclass
class Repository:
    """A repository as tests may look into it; `lfs` holds every blob that was uploaded whole, by its sha256."""

    kind: str
    id: str
    private: bool = False
    gated: bool | str = False
    sdk: str | None = None
    hardware: str | None = None
    stage: str | None = None
    created: str = field(default_factory=now)
    granted: set[str] = field(default_factory=set)
    lfs: dict[str, bytes] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)
    variables: dict[str, dict[str, Any]] = field(default_factory=dict)
    secrets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = {".gitattributes": File(GIT_ATTRIBUTES.encode())}
        self.add("refs/heads/main", Commit(MappingProxyType(first), "initial commit", author=self.namespace))

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def page(self) -> str:
        """Where the web page is, relative to the server."""
        return self.id if self.kind == "model" else f"{self.kind}s/{self.id}"

    def add(self, ref: str, commit: Commit) -> Commit:
        self.commits[commit.id] = commit
        self.refs[ref] = commit.id
        return commit

    def ref(self, revision: str) -> str | None:
        """The full name of a branch, tag or pull request."""
        names = (f"refs/heads/{revision}", f"refs/tags/{revision}", revision)
        return next((name for name in names if name in self.refs), None)

    def commit(self, revision: str = "main") -> Commit:
        """The commit that a branch, tag, pull request or commit id names."""
        name = self.ref(revision)
        commit = self.commits.get(self.refs[name] if name else revision)
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def history(self, revision: str = "main") -> Iterator[Commit]:
        """The commits from this one back to the first."""
        commit: Commit | None = self.commit(revision)
        while commit is not None:
            yield commit
            commit = self.commits.get(commit.parent or "")

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: file.content for path, file in self.commit(revision).files.items()}

    def last_change(self, path: str, start: Commit) -> Commit:
        """The commit up to `start` that gave a file, or anything below a folder, what it holds there."""
        changed = start
        for commit in self.history(start.id):
            same = {p: f.git_id for p, f in commit.files.items() if p == path or p.startswith(f"{path}/")}
            if same != {p: f.git_id for p, f in start.files.items() if p == path or p.startswith(f"{path}/")}:
                break
            changed = commit
        return changed

    def uncommitted(self) -> set[str]:
        """The blobs in LFS storage that no commit names."""
        named = {file.sha256 for commit in self.commits.values() for file in commit.files.values() if file.lfs}
        return set(self.lfs) - named
