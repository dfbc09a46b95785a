# SPDX-License-Identifier: Apache-2.0
"""Files and folders that appear whole or not at all."""

import json
import os
from pathlib import Path

import pytest

from efficientsam_hf.files import check_writable, replace_folder, write_file, write_folder, write_json


def test_a_failed_folder_leaves_the_old_one(tmp_path) -> None:
    target = tmp_path / "model"
    write_folder(target, lambda folder: (folder / "a").write_text("1"))

    def fail(folder):
        (folder / "a").write_text("2")
        raise OSError("no room left")

    with pytest.raises(OSError, match="no room"):
        write_folder(target, fail)
    assert (target / "a").read_text() == "1" and list(tmp_path.iterdir()) == [target]


def test_a_new_folder_replaces_all_of_the_old_one(tmp_path) -> None:
    for name in ("a", "b"):
        write_folder(tmp_path / "model", lambda folder, name=name: (folder / name).touch())
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["b"]


def test_the_old_folder_comes_back_if_moving_fails(tmp_path, monkeypatch) -> None:
    for name in ("old", "new"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    move = os.replace

    def fail_on_new(source, destination):
        if Path(source).name == "new":
            raise OSError("disk on fire")
        move(source, destination)

    monkeypatch.setattr(os, "replace", fail_on_new)
    with pytest.raises(OSError, match="on fire"):
        replace_folder(tmp_path / "new", tmp_path / "old")
    assert (tmp_path / "old" / "old").exists()


def test_a_failed_file_leaves_the_old_one(tmp_path) -> None:
    path = tmp_path / "numbers.json"
    write_json(path, {"a": 1})

    def fail(temporary):
        temporary.write_text("{")
        raise OSError("no room left")

    with pytest.raises(OSError, match="no room"):
        write_file(path, fail)
    assert json.loads(path.read_text()) == {"a": 1} and list(tmp_path.iterdir()) == [path]


def test_a_folder_below_a_file_is_named(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write to the folder .*file/below"):
        check_writable(tmp_path / "file" / "below")
