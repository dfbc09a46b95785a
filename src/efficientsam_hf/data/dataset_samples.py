# SPDX-License-Identifier: Apache-2.0
"""Any data set of the `datasets` library with a column of pictures, and one of masks where they are needed."""

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..models.checks_efficientsam import short
from ..models.image_processing_efficientsam import open_image
from ..models.mask_generation_efficientsam import DOWNLOAD_BYTES, download
from .rle_masks import RleMasks


LARGEST_MASKS = 2**32  # bytes of the masks of one picture as arrays


class DatasetSamples:
    """Rows of a `datasets.Dataset` as {"image": RGB PIL image, "masks": (N, H, W) bool, "image_id": row number}.

    A row's masks are one of: a label picture (each value above 0 is an object); a list of mask pictures (every pixel
    above 0 belongs to the object); a list of COCO RLE dictionaries; nested lists of numbers (N, H, W). With
    `masks_column` None there are pictures alone.

    Raises `ValueError` on construction if a column is missing, and on access if a row's masks are none of these.
    """

    def __init__(self, dataset: Any, image_column: str = "image", masks_column: str | None = "masks") -> None:
        _check_columns(dataset.column_names, image_column, masks_column)
        if not len(dataset):
            raise ValueError("the data set has no rows")
        self.dataset = dataset
        self.image_column, self.masks_column = image_column, masks_column

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if index >= len(self):
            raise IndexError(index)
        return {**read_row(self.dataset[index], self.image_column, self.masks_column), "image_id": index}

    def fingerprint(self) -> str:
        """What `datasets` knows the rows by; changes with their content and order."""
        return f"data set {self.dataset._fingerprint}"


def _check_columns(known: Any, image_column: str, masks_column: str | None) -> None:
    for argument, name in (("image_column", image_column), ("masks_column", masks_column)):
        if name is not None and name not in known:
            raise ValueError(f"{argument}: no column {name!r}, there are {', '.join(known)}")


def read_row(row: dict[str, Any], image_column: str = "image", masks_column: str | None = "masks") -> dict[str, Any]:
    """The sample of a row, {"image", "masks"}; `ValueError` or `OSError` if it is damaged or of no known form."""
    for column in (image_column, masks_column):
        if column is not None and row.get(column) is None:
            raise ValueError(f"column {column!r} is missing or empty, there are {', '.join(row)}")
    try:
        image = open_image(_picture(row[image_column]), image_column)
    except TypeError as error:
        raise ValueError(str(error)) from error
    if masks_column is None:
        return {"image": image}
    try:
        masks = read_masks(row[masks_column], (image.height, image.width))
    except (ValueError, OSError) as error:
        raise ValueError(f"{masks_column}: {error}") from error
    return {"image": image, "masks": masks}


def _picture(value: Any) -> Any:
    """A picture that `datasets` has not decoded, {"bytes", "path"}, as something to open; anything else as it is.

    In a stream the path may be one of fsspec, such as hf://datasets/... .
    """
    if isinstance(value, dict) and set(value) == {"bytes", "path"}:
        content, path = value["bytes"], value["path"]
        if (content is None and not isinstance(path, str)) or not isinstance(content, (bytes, type(None))):
            raise ValueError(f"an empty picture: neither bytes nor a path, got {short(value)}")
        if value["bytes"] is None and "://" in value["path"]:
            return io.BytesIO(_read_url(value["path"]))
        return io.BytesIO(value["bytes"]) if value["bytes"] is not None else value["path"]
    return value


def _read_url(url: str) -> bytes:
    """Content of a picture's address; OSError that names it if it cannot be read or is too large for one."""
    if url.startswith(("http://", "https://")):
        return download(url)
    import fsspec  # datasets brings it

    with fsspec.open(url, "rb") as file:
        content = file.read(DOWNLOAD_BYTES + 1)
    if len(content) > DOWNLOAD_BYTES:
        raise OSError(f"cannot download {url}: it has more than {DOWNLOAD_BYTES:,} bytes")
    return content


def read_masks(value: Any, size: tuple[int, int]) -> np.ndarray | RleMasks:
    """Masks of one row in any of the forms `DatasetSamples` knows, -> (N, H, W) bool, or `RleMasks` of RLE.

    Raises `ValueError` for others, for masks of another size than the picture's (height, width), and for more or
    larger ones than memory is there for, before it is taken.
    """
    value = _pixels(value, size)
    if isinstance(value, Image.Image):
        return _label_masks(value)
    if not isinstance(value, (list, tuple, np.ndarray)):
        raise ValueError(f"expected a label picture, or a list of pictures, RLE masks or arrays, got {type(value)}")
    if len(value) and all(isinstance(entry, dict) and set(entry) != {"bytes", "path"} for entry in value):
        return RleMasks(value, size)
    _check_room(len(value), size)
    masks = np.zeros((len(value), *size), bool)
    for mask, entry in zip(masks, value):
        mask[:] = _read_mask(entry, size)
    return masks


def _pixels(value: Any, size: tuple[int, int]) -> Any:
    """A mask picture as it is stored, decoded or not; anything else as it is."""
    value = _picture(value)
    if isinstance(value, (io.BytesIO, str)):
        try:
            value = Image.open(value)
            _check_size((value.height, value.width), size)
            value.load()
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise ValueError(f"a mask picture cannot be read: {error}") from error
    if isinstance(value, Image.Image):
        _check_size((value.height, value.width), size)
    return value


def _label_masks(picture: Image.Image) -> np.ndarray:
    """A mask for each value above 0."""
    labels = np.asarray(picture)
    if labels.ndim != 2:
        raise ValueError(f"a label picture has one channel, this one has mode {picture.mode}")
    values = np.unique(labels[labels > 0])
    _check_room(len(values), labels.shape)
    return labels == values[:, None, None]


def _read_mask(entry: Any, size: tuple[int, int]) -> np.ndarray:
    """One mask, -> (H, W) bool."""
    entry = _pixels(entry, size)
    if isinstance(entry, dict):
        return RleMasks([entry], size)[0]
    mask = np.asarray(entry.convert("L") if isinstance(entry, Image.Image) else entry)
    if mask.ndim != 2 or mask.dtype.kind not in "biuf":
        raise ValueError(f"a mask must be two-dimensional numbers, got {mask.dtype} of shape {mask.shape}")
    _check_size(mask.shape, size)
    return mask > 0


def _check_size(found: tuple[int, ...], size: tuple[int, int]) -> None:
    if tuple(found) != tuple(size):
        raise ValueError(f"mask of {tuple(found)} in a picture of {size} (height, width)")


def _check_room(count: int, size: tuple[int, ...]) -> None:
    """`ValueError` for masks that take more memory than is sensible for one picture."""
    needed = count * size[0] * size[1]
    if needed > LARGEST_MASKS:
        raise ValueError(
            f"{count} masks of {size[0]} x {size[1]} pixels take {needed / 2**30:,.1f} GiB, expected at most "
            f"{LARGEST_MASKS / 2**30:.0f}; RLE masks take next to nothing"
        )


def load_samples(
    name: str,
    split: str = "train",
    image_column: str = "image",
    masks_column: str | None = "masks",
    config: str | None = None,
    revision: str | None = None,
) -> DatasetSamples:
    """Samples of a folder that `save_to_disk` wrote, or of whatever `datasets.load_dataset` finds under the name.

    `config` is one of several configurations of the data set, `revision` a branch, tag or commit of the Hub.

    Raises `ImportError` without the `datasets` library, and `ValueError` for a split or column that is not there, for
    a configuration or revision of a folder of `save_to_disk`, and for data that `datasets` cannot read.
    """
    datasets = _import_datasets()
    folder = Path(name)
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        if config or revision:
            raise ValueError(f"{name} was saved as one data set, got configuration {config!r}, revision {revision!r}")
        found = datasets.load_from_disk(name)
        if isinstance(found, datasets.DatasetDict):
            if split not in found:
                raise ValueError(f"split {split!r} is not in {name}, which has {', '.join(found)}")
            found = found[split]
    else:
        found = _load(name, split, config, revision)
    return DatasetSamples(found, image_column, masks_column)


def load_stream(
    name: str,
    split: str = "train",
    image_column: str = "image",
    masks_column: str | None = "masks",
    config: str | None = None,
    revision: str | None = None,
) -> Any:
    """What `datasets.load_dataset` finds as an `IterableDataset` of undecoded rows for `read_row`, not stored.

    `config` and `revision` are as for `load_samples`.

    Raises `ImportError` without the `datasets` library, and `ValueError` for a column that is not there.
    """
    stream = _load(name, split, config, revision, streaming=True)
    if stream.features:
        _check_columns(stream.features, image_column, masks_column)
    return stream.decode(False)  # a damaged picture would end the stream if it were decoded in there


def _load(name: str, split: str, config: str | None, revision: str | None, **options: Any) -> Any:
    """`datasets.load_dataset` with errors that name the data set; `ValueError`."""
    datasets = _import_datasets()
    try:
        return datasets.load_dataset(name, config, split=split, revision=revision, **options)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        chosen = {"split": split, "configuration": config, "revision": revision}
        wanted = ", ".join(f"{word} {value!r}" for word, value in chosen.items() if value)
        raise ValueError(f"data set {name!r}, {wanted}, cannot be loaded: {error}") from error


def _import_datasets() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data sets are read by datasets: pip install 'efficientsam-hf[train]'") from error
    return datasets
