# SPDX-License-Identifier: Apache-2.0
"""Which model, exactly: the commit of one on the Hub, the content of one in a folder."""

import hashlib
from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import cached_file
from transformers.utils.hub import extract_commit_hash


def read_config(name: str, revision: str | None = None) -> dict[str, Any]:
    """config.json of a folder or Hub model as it is written; OSError if there is none or it is no JSON object."""
    try:
        fields = PreTrainedConfig.get_config_dict(name, revision=revision)[0]
    except RecursionError:
        raise OSError(f"config.json of {name} is nested too deeply") from None
    if not isinstance(fields, dict):
        raise OSError(f"config.json of {name} holds a {type(fields).__name__}, expected an object")
    return fields


def model_type(name: str) -> str | None:
    """What a folder's or Hub model's config says it is: "efficientsam", "sami", ...; OSError if there is none."""
    return read_config(name).get("model_type")


def model_revision(name: str, revision: str | None = None) -> str:
    """Commit of a Hub model, or "sha256:..." of a folder's config and weights.

    `revision` is a commit, tag or branch of the Hub. Raises OSError if there is no such model.
    """
    folder = Path(name)
    if folder.is_dir():
        digest = hashlib.sha256()
        files = [folder / "config.json", *folder.glob("*.safetensors"), *folder.glob("*.bin")]
        for path in sorted(path for path in files if path.is_file()):
            digest.update(path.name.encode())
            _add_content(digest, path)
        return f"sha256:{digest.hexdigest()[:16]}"
    try:
        commit = extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    except OSError as error:
        raise OSError(f"{name} is no folder, and cannot be found on the Hub: {error}") from error
    if commit is None:
        raise OSError(f"{name} is no folder, and its commit on the Hub cannot be found")
    return commit


def file_revision(path: str | Path) -> str:
    """The content of a file as "sha256:..."."""
    digest = hashlib.sha256()
    _add_content(digest, Path(path))
    return f"sha256:{digest.hexdigest()[:16]}"


def _add_content(digest: "hashlib._Hash", path: Path) -> None:
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
