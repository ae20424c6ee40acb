"""Our safetensors reader and writer against the reference library, and what they say about bad files."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import safetensors.torch as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import UserError
from library.io import atomic, safetensors_file
from library.io.safetensors_file import TensorReader, read_header, save, serialized

DTYPES = sorted(safetensors_file._DTYPE_NAMES, key=str)


def _every_dtype() -> dict[str, torch.Tensor]:
    raw = torch.arange(48, dtype=torch.uint8)
    tensors = {
        f"x.{i}": (raw % 2).bool() if dtype is torch.bool else raw.clone().view(dtype) for i, dtype in enumerate(DTYPES)
    }
    return tensors | {"scalar": torch.tensor(1.5), "empty": torch.zeros(0, 3), "Ä": torch.ones(2), "a": torch.ones(2)}


def test_bytes_equal_the_reference_writer_for_every_dtype() -> None:
    tensors = _every_dtype()
    for metadata in (None, {"key": 'quote " back\\slash\nline \x01 é 漢 \u2028'}):
        assert b"".join(serialized(tensors, metadata)) == reference.save(tensors, metadata)


def test_any_mapping_any_memory_layout_and_shared_storage_can_be_saved(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    tensors = {
        "t": base.t(),
        "row": base[1],
        "column": base[:, 2],
        "whole": base,
        "last": base.reshape(1, 4, 2, 3).to(memory_format=torch.channels_last),
    }
    save(tensors, tmp_path / "a.safetensors", {"k": "v"})
    loaded = reference.load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_saving_casts_floating_tensors_only(tmp_path: Path) -> None:
    tensors = {"w": torch.randn(3), "ids": torch.arange(3)}
    save(tensors, tmp_path / "a.safetensors", dtype=torch.bfloat16)
    loaded = reference.load_file(tmp_path / "a.safetensors")
    assert torch.equal(loaded["w"], tensors["w"].bfloat16()) and torch.equal(loaded["ids"], tensors["ids"])


def test_a_lazy_mapping_is_streamed_one_tensor_at_a_time() -> None:
    """No more than one tensor that the mapping makes is alive when the next one is made."""

    class Lazy(dict):
        alive = 0
        peak = 0

        def __getitem__(self, name: str) -> torch.Tensor:
            tensor = torch.full((1000,), float(name))
            Lazy.alive += 1
            Lazy.peak = max(Lazy.peak, Lazy.alive)
            storage = tensor.untyped_storage()
            weakref.finalize(storage, lambda: setattr(Lazy, "alive", Lazy.alive - 1)).atexit = False
            return tensor

        def items(self):
            return ((name, self[name]) for name in self)

    for piece in serialized(Lazy(dict.fromkeys("0123456789"))):
        assert len(piece)
    assert Lazy.peak <= 3


def test_metadata_must_be_text() -> None:
    with pytest.raises(AssertionError, match="step"):
        b"".join(serialized({"a": torch.ones(1)}, {"step": 3}))


@pytest.mark.parametrize("mmap", [True, False])
def test_reading_gives_back_what_was_saved(tmp_path: Path, mmap: bool) -> None:
    tensors = _every_dtype()
    save(tensors, tmp_path / "a.safetensors", {"title": "x"})
    with TensorReader(tmp_path / "a.safetensors", mmap=mmap) as reader:
        assert set(reader) == set(tensors) and len(reader) == len(tensors) and reader.metadata == {"title": "x"}
        assert "a" in reader and "b" not in reader and reader.get("b") is None
        read = dict(reader)
        assert reader.info("empty") == ("F32", (0, 3))
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        flat, expected = (x.contiguous().reshape(-1).view(torch.uint8) for x in (read[name], tensor))
        assert torch.equal(flat, expected)


def test_writing_to_a_read_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save({"a": torch.zeros(64)}, tmp_path / "a.safetensors")
    with TensorReader(tmp_path / "a.safetensors") as reader:
        reader["a"].add_(1)
    assert torch.count_nonzero(reference.load_file(tmp_path / "a.safetensors")["a"]) == 0


def test_a_file_can_be_replaced_while_its_tensors_are_in_use(tmp_path: Path) -> None:
    save({"a": torch.ones(64)}, tmp_path / "a.safetensors")
    with TensorReader(tmp_path / "a.safetensors") as reader:
        old = reader["a"]
        save({"a": old * 2}, tmp_path / "a.safetensors")
        assert old.sum() == 64
    assert reference.load_file(tmp_path / "a.safetensors")["a"].sum() == 128


def test_files_of_the_reference_writer_have_a_readable_header(tmp_path: Path) -> None:
    reference.save_file({"w": torch.zeros(2, 3).half()}, tmp_path / "a.safetensors", {"b": "2", "a": "1"})
    assert read_header(tmp_path / "a.safetensors") == ({"a": "1", "b": "2"}, {"w": ("F16", (2, 3))})


def test_the_header_is_read_without_torch() -> None:
    code = "import sys, library.io.safetensors_header; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


GOOD = b"".join(serialized({"w": torch.arange(10.0), "b": torch.arange(4)}, {"k": "v"}))
HEADER = int.from_bytes(GOOD[:8], "little")


def _with_header(table: object) -> bytes:
    text = json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text


def _twice() -> bytes:
    entry = '"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    text = f"{{{entry},{entry}}}".encode()
    return len(text).to_bytes(8, "little") + text + bytes(4)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "empty"),
        (b"abc", "not a safetensors file"),
        (GOOD[:-1], f"cut short: expected {len(GOOD)} bytes, has {len(GOOD) - 1}"),
        (GOOD[: 8 + HEADER], f"cut short: expected {len(GOOD)} bytes, has {8 + HEADER}"),
        (GOOD[:50], f"header alone needs {8 + HEADER} bytes, the file has 50"),
        (GOOD + b"\0", "too long"),
        (b"\x80\x02}q\x00(X\x05\x00\x00\x00", "pickle"),
        (b"PK\x03\x04" + bytes(100), "zip archive or a PyTorch"),
        (b"<!DOCTYPE html><html>login</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"GGUF" + bytes(100), "GGUF"),
        (bytes(1000), "not a safetensors file"),
        (b"\xff" * 1000, "not a safetensors file"),
        (_twice(), '"x" is in it twice'),
        (GOOD[:9] + b"\xff" * 5 + GOOD[14:], "corrupt"),
        (_with_header([1, 2]), "not a safetensors file"),
        (_with_header({"a": 3}), "corrupt"),
        (_with_header({"a": {"dtype": "F32", "shape": [1]}}), "corrupt"),
        (_with_header({"a": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}) + bytes(4), "unknown dtype F99"),
        (_with_header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}) + bytes(4), "wrong place"),
        (_with_header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}) + bytes(8), "wrong place"),
        (_with_header({"__metadata__": {"a": 1}}), "metadata is not text"),
    ],
)
def test_bad_files_are_named_with_what_to_do(tmp_path: Path, content: bytes, sentence: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        TensorReader(path)
    problem = caught.value.problems[0]
    assert sentence in problem.what and problem.where == str(path) and problem.fix


def test_missing_files_and_folders_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        read_header(tmp_path / "none.safetensors")
    with pytest.raises(UserError, match="cannot be read"):
        read_header(tmp_path)


@given(place=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_one_wrong_byte_is_a_user_error_or_still_a_valid_file(tmp_path_factory, place: int, value: int) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(GOOD[:place] + bytes([value]) + GOOD[place + 1 :])
    try:
        with TensorReader(path) as reader:
            dict(reader)
    except UserError as error:
        assert error.problems[0].where == str(path)


def test_a_full_disk_while_saving_is_a_user_error_and_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    save({"a": torch.ones(4)}, path)
    before = path.read_bytes()

    def full(descriptor: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "_flush", full)
    with pytest.raises(UserError, match="no space left"):
        save({"a": torch.zeros(4)}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_really_full_device_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open = open
    monkeypatch.setattr(
        "builtins.open", lambda path, mode="r", *a, **k: real_open("/dev/full" if mode == "wb" else path, mode, *a, **k)
    )
    with pytest.raises(UserError, match="no space left"):
        save({"a": torch.ones(4_000_000)}, tmp_path / "a.safetensors")
