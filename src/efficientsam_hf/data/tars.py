# SPDX-License-Identifier: Apache-2.0
"""Tars of pictures, read from their beginning and unpacked nowhere."""

import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def find_tars(folder: str | Path) -> list[Path]:
    """The tars in a folder and its subfolders, in the order of their paths."""
    paths = (path for pattern in ("*.tar", "*.tar.gz", "*.tgz") for path in Path(folder).rglob(pattern))
    return sorted(paths)


def stream_rows(tars: list[Path], read: Callable[[list[str]], Iterator[dict[str, Any]]]) -> Any:
    """What `read(paths)` yields as a `datasets.IterableDataset`, each tar a shard.

    Raises `ImportError` without the `datasets` library.
    """
    try:
        from datasets import IterableDataset
    except ImportError as error:
        raise ImportError("tars are streamed by datasets: pip install 'efficientsam-hf[train]'") from error
    return IterableDataset.from_generator(read, gen_kwargs={"tars": [str(path) for path in tars]})


def tar_files(path: str, endings: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Name and content of the files of a tar whose names end so, in any case, but for hidden ones.

    ValueError if the tar is damaged.
    """
    try:
        with tarfile.open(path, "r|*") as archive:
            for member in archive:
                hidden = any(part.startswith(".") for part in member.name.removeprefix("./").split("/"))
                if member.isfile() and not hidden and member.name.lower().endswith(endings):
                    yield member.name.removeprefix("./"), archive.extractfile(member).read()
    except (OSError, tarfile.TarError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
