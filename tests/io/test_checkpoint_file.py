"""Checkpoints of any container are read as a mapping, and never by running code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest
import torch

from library.errors import UserError
from library.io.checkpoint_file import read_checkpoint
from library.io.safetensors_file import save

TENSORS = {"model.w": torch.arange(6.0).reshape(2, 3), "model.b": torch.ones(3).half()}


def _assert_same(path: Path) -> dict[str, str]:
    with read_checkpoint(path) as source:
        assert set(source) == set(TENSORS) and len(source) == 2
        assert all(torch.equal(source[name], tensor) for name, tensor in TENSORS.items())
        return source.metadata


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_pytorch_files_old_and_new_are_read(tmp_path: Path, zipped: bool, nested: bool) -> None:
    content = {"state_dict": TENSORS, "epoch": 3, "global_step": 120, "extra": [1, 2]} if nested else TENSORS | {"n": 5}
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
    metadata = _assert_same(tmp_path / "model.ckpt")
    assert metadata == ({"epoch": "3", "global_step": "120"} if nested else {})


def test_the_content_decides_and_not_the_ending(tmp_path: Path) -> None:
    save(TENSORS, tmp_path / "really_safetensors.ckpt")
    _assert_same(tmp_path / "really_safetensors.ckpt")
    torch.save(TENSORS, tmp_path / "really_pickle.safetensors")
    _assert_same(tmp_path / "really_pickle.safetensors")


def test_a_safetensors_header_length_that_looks_like_a_pickle_is_not_one(tmp_path: Path) -> None:
    for padding in range(0x0280, 0x2000, 8):
        save(TENSORS, tmp_path / "a.safetensors", {"pad": "x" * padding})
        if (tmp_path / "a.safetensors").read_bytes()[:2] == b"\x80\x04":
            break
    else:
        pytest.fail("no padding gives this header length")
    _assert_same(tmp_path / "a.safetensors")


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self):
        return (os.mkdir, (str(self.target),))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, zipped: bool) -> None:
    torch.save(
        {"a": TENSORS, "b": _Evil(tmp_path / "ran")}, tmp_path / "evil.ckpt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(UserError, match="run code") as caught:
        read_checkpoint(tmp_path / "evil.ckpt")
    assert caught.value.problems[0].where.endswith("evil.ckpt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.ckpt"
    torch.save(TENSORS, path)
    whole = path.read_bytes()
    for content in (whole[: len(whole) // 2], b"PK\x03\x04garbage", pickle.dumps([1, 2]), b"\x80\x02", b"", b"hello"):
        path.write_bytes(content)
        with pytest.raises(UserError) as caught:
            read_checkpoint(path)
        assert caught.value.problems[0].where == str(path)
    with pytest.raises(UserError, match="does not exist"):
        read_checkpoint(tmp_path / "none.ckpt")


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": 1}}, tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no tensors"):
        read_checkpoint(tmp_path / "a.ckpt")
