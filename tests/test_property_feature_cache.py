# SPDX-License-Identifier: Apache-2.0
"""Whatever becomes of the files of a feature cache, what is read from it is what was written, or a line names it."""

import contextlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from property_testing import bounded
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_property_run_folder import TEXTS, swap

from efficientsam_hf.data.feature_cache import CacheIndex, FeatureCache, _open_shard, _Shard, shard_path
from efficientsam_hf.files import write_json


pytestmark = pytest.mark.property

SIZE = (40, 30)
INDEX = CacheIndex("t", "sha256:0", 32, "float32", 3, (2, 2), images=4, pictures="p", crops=2, records_per_shard=3)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[torch.Tensor]]:
    """A cache of four pictures, the second of which could not be read, and its features."""
    folder = tmp_path_factory.mktemp("cache")
    features = [torch.from_numpy(np.random.default_rng(n).normal(size=(4, 3))).half() for n in range(INDEX.records)]
    for number in range(INDEX.shards):
        shard = _Shard()
        for record in INDEX.records_of(number):
            if record // 2 == 1:
                shard.problems["1"] = "not a picture"
                continue
            shard.features.append(features[record][None])
            shard.records.append(record)
            box, mirrored = INDEX.part(record, SIZE)
            shard.parts.append((*box, int(mirrored), *SIZE))
            shard.image_ids.append(str(record // 2))
        shard.write(shard_path(folder, number), INDEX)
    write_json(folder / "index.json", asdict(INDEX))
    return folder, features


def damage(folder: Path, draw: Any) -> None:
    path = draw(st.sampled_from(sorted(folder.iterdir())))
    content = path.read_bytes()
    kind = draw(st.sampled_from(["cut", "flip", "text", "gone", "swap", "moved", "tensor", "metadata"]))
    if kind == "cut":
        os.truncate(path, draw(st.integers(0, max(len(content) - 1, 0))))
    elif kind == "flip" and content:
        place, bit = draw(st.integers(0, len(content) - 1)), draw(st.integers(0, 7))
        path.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
    elif kind == "text":
        path.write_text(draw(st.sampled_from(TEXTS)))
    elif kind == "gone":
        path.unlink()
    elif kind == "swap" and path.suffix == ".json":
        with contextlib.suppress(ValueError, RecursionError):
            path.write_text(json.dumps(swap(json.loads(content), draw)))
    elif kind == "moved":
        path.replace(draw(st.sampled_from(sorted(folder.iterdir()))))
    elif kind in ("tensor", "metadata") and path.suffix == ".safetensors":
        with contextlib.suppress(SafetensorError):
            rewrite(path, kind, draw)


def rewrite(path: Path, kind: str, draw: Any) -> None:
    """Another shard, as a writer of safetensors would leave it."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    if kind == "metadata":
        name = draw(st.sampled_from(["index", "image_ids", "problems", "table"]))
        values = st.sampled_from(["", "[]", "{}", '{"1": 2}', '["a", "b"]', "[" * 10_000, '{"-5": 1}', "0" * 64])
        metadata = metadata | {name: draw(values)}
    else:
        name = draw(st.sampled_from(sorted(tensors)))
        value = torch.atleast_1d(tensors[name])
        changed = [value.float(), value[:-1].clone(), value.flatten(), value.flip(0).clone(), value + 1]
        tensors[name] = draw(st.sampled_from([*changed, torch.zeros(0), torch.tensor(3)]))
    save_file(tensors, path, metadata)


@given(st.data())
@bounded
def test_a_damaged_cache_gives_what_was_written_or_names_the_file(written: tuple, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cache"
        shutil.copytree(written[0], folder)
        for _ in range(data.draw(st.integers(1, 3))):
            damage(folder, data.draw)
        _open_shard.cache_clear()
        try:
            cache = FeatureCache(folder)
        except (ValueError, FileNotFoundError) as error:
            assert str(folder) in str(error) and len(str(error)) < 1000
            return
        for record in range(INDEX.records):
            try:
                features, (box, mirrored) = cache.features(record), cache.part(record, SIZE)
            except ValueError as error:
                assert f"record {record}" in str(error) and str(folder) in str(error)
                continue
            assert torch.equal(features, written[1][record]) and (box, mirrored) == INDEX.part(record, SIZE)
