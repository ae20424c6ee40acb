"""Files are compared with what was written to them."""

import pytest
import torch

from library.errors import UserError
from library.io import read_back
from library.io.safetensors_file import TensorReader, save

TENSORS = {"a": torch.arange(1000.0), "b": torch.arange(7, dtype=torch.int8), "empty": torch.zeros(0)}


def _spoil(monkeypatch, change):
    """Let the disk lose something between writing and reading."""

    def lose(descriptor):
        change(descriptor)

    monkeypatch.setattr(read_back, "_drop_cache", lose)


def test_a_checked_file_is_the_same_file(tmp_path, monkeypatch):
    monkeypatch.setattr(read_back, "_CHUNK", 999)  # large tensors are read in several pieces
    save(TENSORS, tmp_path / "plain.safetensors", {"x": "y"})
    save(TENSORS, tmp_path / "checked.safetensors", {"x": "y"}, checked=True)
    assert (tmp_path / "plain.safetensors").read_bytes() == (tmp_path / "checked.safetensors").read_bytes()


@pytest.mark.parametrize("place", [3, 20, -1, -2000])
def test_one_flipped_bit_is_found_and_the_older_file_stays(tmp_path, monkeypatch, place):
    import os

    path = tmp_path / "model.safetensors"
    save({"old": torch.ones(3)}, path)

    def flip(descriptor):
        at = place if place >= 0 else os.fstat(descriptor).st_size + place
        byte = os.pread(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY), 1, at)
        os.pwrite(descriptor, bytes([byte[0] ^ 1]), at)

    _spoil(monkeypatch, flip)
    with pytest.raises(UserError, match="not what was written"):
        save(TENSORS, path, checked=True)
    with TensorReader(path) as reader:
        assert list(reader) == ["old"]
    assert [each.name for each in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_file_that_lost_its_end_is_found(tmp_path, monkeypatch):
    import os

    _spoil(monkeypatch, lambda descriptor: os.ftruncate(descriptor, 100))
    with pytest.raises(UserError, match="100 bytes"):
        save(TENSORS, tmp_path / "model.safetensors", checked=True)


def test_an_archive_is_checked_record_by_record(tmp_path):
    path = tmp_path / "optimizer.pt"
    torch.save({"state": torch.arange(1000.0)}, path)
    read_back.check_archive(path)
    good = path.read_bytes()
    at = good.index(torch.arange(1000.0).numpy().tobytes()) + 1234
    path.write_bytes(good[:at] + bytes([good[at] ^ 4]) + good[at + 1 :])
    with pytest.raises(UserError, match=r"not what was written \(in .*data/0"):
        read_back.check_archive(path)
    path.write_bytes(good[:-30])
    with pytest.raises(UserError, match="not what was written"):
        read_back.check_archive(path)
