"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from library.errors import UserError
from library.io import atomic


def test_a_finished_file_is_there_and_nothing_else(tmp_path: Path) -> None:
    atomic.write_text(tmp_path / "new" / "a.txt", "ä\nb")
    assert (tmp_path / "new" / "a.txt").read_bytes() == "ä\nb".encode()
    assert os.listdir(tmp_path / "new") == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt])
def test_a_failure_leaves_the_old_file_and_no_temporary(tmp_path: Path, failure: type[BaseException]) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(failure), atomic.atomic_path(target) as temporary:
        temporary.write_text("half")
        raise failure
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["a.txt"]


def test_the_temporary_lies_beside_the_target_and_has_no_ending_a_scan_looks_for(tmp_path: Path) -> None:
    with atomic.atomic_path(tmp_path / "cat.png") as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".tmp" and temporary.name.startswith(".")
        temporary.touch()


def test_names_near_the_length_limit_can_be_written(tmp_path: Path) -> None:
    name = "n" * 250 + ".npz"
    atomic.write_text(tmp_path / name, "x")
    assert os.listdir(tmp_path) == [name]


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    atomic.write_text(tmp_path / "ours", "x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_symlink_is_written_through(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "link.txt").symlink_to(tmp_path / "store" / "real.txt")
    atomic.write_text(tmp_path / "link.txt", "x")
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "store" / "real.txt").read_text() == "x"


@pytest.mark.parametrize(
    ("code", "sentence"), [(errno.ENOSPC, "no space left"), (errno.EDQUOT, "no space left"), (errno.EROFS, "cannot be")]
)
def test_a_refusing_disk_is_a_sentence_with_the_path(tmp_path: Path, code: int, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught, atomic.atomic_path(tmp_path / "a.bin") as temporary:
        temporary.write_bytes(b"half")
        raise OSError(code, os.strerror(code))
    problem = caught.value.problems[0]
    assert problem.where == str(tmp_path / "a.bin") and problem.fix
    assert os.listdir(tmp_path) == []


def test_other_errors_of_the_block_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic.atomic_path(tmp_path / "a.bin"):
        raise FileNotFoundError(errno.ENOENT, "an input is missing")


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    final = tmp_path / "state"
    for content in ("one", "two"):
        with atomic.atomic_folder(final) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / content).write_text(content)
            assert not (final / "sub" / content).exists()
    assert os.listdir(tmp_path) == ["state"] and os.listdir(final / "sub") == ["two"]


def test_a_failed_folder_leaves_the_old_one(tmp_path: Path) -> None:
    final = tmp_path / "state"
    final.mkdir()
    (final / "old").touch()
    with pytest.raises(UserError), atomic.atomic_folder(final) as folder:
        (folder / "new").touch()
        raise OSError(errno.ENOSPC, "full")
    assert os.listdir(tmp_path) == ["state"] and os.listdir(final) == ["old"]


def test_a_failed_swap_of_folders_puts_the_old_one_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = tmp_path / "state"
    final.mkdir()
    (final / "old").touch()
    rename = os.rename

    def failing(source: os.PathLike[str], target: os.PathLike[str]) -> None:
        if Path(source).suffix == ".tmp":
            raise OSError(errno.EIO, "disk error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(OSError, match="disk error"), atomic.atomic_folder(final) as folder:
        (folder / "new").touch()
    assert os.listdir(tmp_path) == ["state"] and os.listdir(final) == ["old"]


def test_json_is_readable_and_strict(tmp_path: Path) -> None:
    atomic.write_json(tmp_path / "a.json", {"ключ": [1, 2.5, None]})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"ключ": [1, 2.5, None]} and "ключ" in text
    with pytest.raises(ValueError, match="JSON"):
        atomic.write_json(tmp_path / "b.json", float("nan"))
    assert os.listdir(tmp_path) == ["a.json"]
