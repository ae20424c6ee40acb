"""The packed cache: what is stored comes back, whoever wrote it, with an index, without one and with a wrong one."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from library.errors import UserError
from library.io import packed_record as fmt
from library.io.packed_index import INDEX_NAME
from library.io.packed_store import PackedStore
from library.io.packed_writer import PackedWriter
from tests.io.packed_entries import (
    FACTS,
    RECIPE,
    append,
    arrays_of,
    content,
    expected,
    facts_of,
    id_of,
    open_store,
    shards_of,
    writer_of,
)

NUMBERS = hnp.integer_dtypes() | hnp.unsigned_integer_dtypes() | hnp.floating_dtypes(sizes=(16, 32, 64))
ARRAYS = hnp.arrays(NUMBERS | hnp.boolean_dtypes(), hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
ENTRY = st.tuples(
    st.integers(0, 2**64 - 1), st.text(max_size=20), st.dictionaries(st.text(max_size=10), ARRAYS, max_size=4)
)


def ids(*numbers: int) -> np.ndarray:
    """Ids of several entries."""
    return np.array([id_of(number) for number in numbers], np.uint64)


def save(folder: Path) -> None:
    """Write the index of what is there now."""
    assert open_store(folder).save_index()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(ENTRY, max_size=6), st.integers(1, 3000))
def test_any_arrays_come_back_with_or_without_an_index(tmp_path_factory, entries, shard_bytes):
    folder = tmp_path_factory.mktemp("store")
    with PackedWriter(folder, recipe="r", shard_bytes=shard_bytes) as writer:
        for entry_id, key, arrays in entries:
            writer.append(entry_id, arrays, key=key)
    scanned = PackedStore.open(folder)
    assert scanned.save_index()
    last = {entry_id: (key, arrays) for entry_id, key, arrays in entries}
    for store in (scanned, PackedStore.open(folder)):
        assert len(store) == len(entries)
        assert len(store.live()) == len(last)
        positions = store.find(np.array(list(last), np.uint64))
        for position, (key, arrays) in zip(positions.tolist(), last.values()):
            found = store.read(position)
            assert store.key(position) == key
            assert list(found) == list(arrays)
            for name, array in arrays.items():
                assert found[name].dtype == array.dtype.newbyteorder("<")
                assert found[name].shape == array.shape
                assert found[name].tobytes() == array.astype(found[name].dtype).tobytes()
                assert not found[name].flags.writeable
                assert found[name].__array_interface__["data"][0] % fmt.ALIGN == 0 or not array.size
    shutil.rmtree(folder)


WRITES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 50)), max_size=8)


@settings(max_examples=40, deadline=None)
@given(WRITES, WRITES, st.lists(st.integers(0, 6)))
def test_find_gives_the_last_entry_of_an_id_wherever_it_was_found(tmp_path_factory, indexed, late, asked):
    folder = tmp_path_factory.mktemp("store")
    for name, writes in (("a", indexed), ("b", late)):
        with PackedWriter(folder / name, recipe="r") as writer:
            for number, stamp in writes:
                record, _ = fmt.encode_record(number, {"stamp": np.array(stamp)}, key="", facts=b"\0", stamp=stamp)
                writer.append_encoded(record)
    store = PackedStore.open(folder / "a")
    store.save_index()
    store = PackedStore.open(folder / "a")
    for shard in shards_of(folder / "b"):
        (folder / "a").mkdir(exist_ok=True)
        shard.rename(folder / "a" / shard.name)
    store.refresh()
    writes = [*indexed, *late]
    latest = {number: max(stamp for other, stamp in writes if other == number) for number, _ in writes}
    found = store.find(np.array(asked, np.uint64))
    assert [int(store.read(p)["stamp"]) if p >= 0 else None for p in found.tolist()] == [latest.get(n) for n in asked]
    shutil.rmtree(folder)


def test_facts_and_recipes_come_by_position(tmp_path):
    with writer_of(tmp_path) as writer:
        append(writer, 1)
        writer.use_recipe("other")
        append(writer, 2)
        writer.use_recipe("other")
        append(writer, 3)
    save(tmp_path)
    store = open_store(tmp_path)
    with writer_of(tmp_path) as writer:
        append(writer, 4)
    assert store.refresh() == 1
    positions = store.find(ids(4, 2, 1, 3))
    assert store.facts(positions)["bytes"].tolist() == [4, 2, 1, 3]
    assert store.facts(positions).dtype == FACTS
    assert [store.recipes[number] for number in store.recipe_of(positions)] == [RECIPE, "other", RECIPE, "other"]
    assert len(shards_of(tmp_path)) == 3
    with pytest.raises(IndexError):
        store.facts(np.array([4]))
    with pytest.raises(IndexError):
        store.read(-1)


def test_shards_end_at_the_limit(tmp_path):
    with writer_of(tmp_path, shard_bytes=2000) as writer:
        for number in range(20):
            append(writer, number)
    assert len(shards_of(tmp_path)) > 2
    assert all(path.stat().st_size <= 2000 for path in shards_of(tmp_path))
    assert content(open_store(tmp_path)) == expected(dict.fromkeys(range(20), 0))


def test_a_writer_without_entries_leaves_nothing(tmp_path):
    with writer_of(tmp_path / "new"):
        pass
    assert not (tmp_path / "new").exists()
    store = open_store(tmp_path / "new")
    assert len(store) == 0
    assert store.find(ids(1)).tolist() == [-1]
    assert store.live().tolist() == []


def test_positions_stay_when_entries_are_added_and_the_index_is_replaced(tmp_path):
    with writer_of(tmp_path) as writer:
        for number in range(5):
            append(writer, number)
        save(tmp_path)
        store = open_store(tmp_path)
        before = store.find(ids(*range(5)))
        store.read(0)  # maps the shard, which then grows
        for number in range(5, 9):
            append(writer, number)
        append(writer, 2, version=1)
        save(tmp_path)
        assert store.refresh() == 5
        assert store.refresh() == 0
    assert store.column("id", before).tolist() == ids(*range(5)).tolist()
    assert content(store) == content(open_store(tmp_path)) == expected({**dict.fromkeys(range(9), 0), 2: 1})
    copy = pickle.loads(pickle.dumps(store))
    after = store.find(ids(*range(9)))
    assert copy.find(ids(*range(9))).tolist() == after.tolist()
    assert content(copy) == content(store)


def test_pickles_hold_no_shard(tmp_path):
    with PackedWriter(tmp_path, recipe="r") as writer:
        writer.append(1, {"big": np.zeros(1_000_000, np.uint8)})
    store = PackedStore.open(tmp_path)
    view = store.read(0)["big"]
    data = pickle.dumps(store)
    assert len(data) < 20_000
    del store
    assert pickle.loads(data).read(0)["big"].tobytes() == view.tobytes()


def test_loader_workers_read_a_store_opened_before_them(tmp_path):
    import torch
    from torch.utils.data import DataLoader

    with writer_of(tmp_path) as writer:
        for number in range(16):
            append(writer, number * 3)
    store = open_store(tmp_path)
    positions = store.find(ids(*range(0, 48, 3)))
    store.read(0)  # mapped before the workers fork

    class Latents(torch.utils.data.Dataset):
        """One entry per number."""

        def __len__(self):
            return len(positions)

        def __getitem__(self, number):
            return torch.from_numpy(store.read(int(positions[number]))["latents"].copy())

    loaded = list(DataLoader(Latents(), batch_size=None, num_workers=2))
    assert [t.numpy().tobytes() for t in loaded] == [arrays_of(n)["latents"].tobytes() for n in range(0, 48, 3)]


def test_batches_are_stacked_and_may_be_widened(tmp_path):
    with writer_of(tmp_path) as writer:
        for number in (0, 3, 6, 7):
            append(writer, number)
    store = open_store(tmp_path)
    positions = store.find(ids(3, 0, 3))
    wanted = np.stack([arrays_of(number)["latents"] for number in (3, 0, 3)])
    batch = store.read_batch(positions, ["latents", "mean"])
    assert batch["latents"].tobytes() == wanted.tobytes()
    assert batch["mean"].tolist() == [3000, 0, 3000]
    wide = {"latents": np.empty(wanted.shape, np.float32)}
    assert store.read_batch(positions, ["latents"], out=wide)["latents"] is wide["latents"]
    assert np.array_equal(wide["latents"], wanted)
    with pytest.raises(ValueError, match="cannot be stacked"):
        store.read_batch(store.find(ids(0, 7)), ["latents"])


def test_a_vanished_shard_is_named_by_the_error(tmp_path):
    with writer_of(tmp_path) as writer:
        append(writer, 1)
    store = open_store(tmp_path)
    (shard,) = shards_of(tmp_path)
    whole = shard.read_bytes()
    shard.unlink()
    with pytest.raises(UserError, match="cannot be read") as caught:
        store.read(0)
    assert caught.value.problems[0].where == str(shard)
    shard.write_bytes(whole[: store.column("offset", np.array([0]))[0]] + b"x" * 1000)
    for reading in (store.read, store.key):
        with pytest.raises(UserError, match="is not what it was"):
            reading(0)


def test_shards_of_another_kind_are_left_out(tmp_path, caplog):
    with writer_of(tmp_path) as writer:
        append(writer, 1)
    with PackedWriter(tmp_path, recipe="r") as other:
        other.append(2, {})
    (tmp_path / f"zero{fmt.SHARD_SUFFIX}").touch()
    (tmp_path / f"foreign{fmt.SHARD_SUFFIX}").write_bytes(b"something else entirely" * 10)
    newer = fmt.encode_prefixed(fmt.SHARD_MAGIC, {"version": fmt.VERSION + 1})
    (tmp_path / f"newer{fmt.SHARD_SUFFIX}").write_bytes(newer)
    store = open_store(tmp_path)
    assert content(store) == expected({1: 0})
    assert sorted(store.ignored.values()) == sorted(
        [
            "its entries have other facts",
            "it is no file of a packed cache",
            "it has format version 2, this program reads 1",
        ]
    )
    warned = len(caplog.records)
    assert warned == 3
    store.refresh()
    assert len(caplog.records) == warned


def two_shards(folder: Path) -> None:
    """Entries 0 to 5, of which 1 and 4 were replaced; the first shard is older than the second."""
    with writer_of(folder) as writer:
        for number in range(4):
            append(writer, number)
        append(writer, 1, version=1)
    with writer_of(folder, recipe="second") as writer:
        for number in (4, 5):
            append(writer, number)
        append(writer, 2, version=1)
        append(writer, 4, version=1)


def grow(folder: Path) -> None:
    """A third process writes more after the index was saved."""
    with writer_of(folder) as writer:
        append(writer, 7)
        append(writer, 2, version=2)


def cut(folder: Path) -> None:
    """The second shard loses its end, in the middle of a record."""
    shard = shards_of(folder)[1]
    os.truncate(shard, shard.stat().st_size - 70)


CHANGES = {
    "nothing": lambda folder: None,
    "absent": lambda folder: (folder / INDEX_NAME).unlink(),
    "empty": lambda folder: (folder / INDEX_NAME).write_bytes(b""),
    "cut": lambda folder: os.truncate(folder / INDEX_NAME, 700),
    "another file": lambda folder: (folder / INDEX_NAME).write_bytes(b"no index" * 100),
    "a folder": lambda folder: ((folder / INDEX_NAME).unlink(), (folder / INDEX_NAME).mkdir()),
    "older than the entries": grow,
    "a shard vanished": lambda folder: shards_of(folder)[1].unlink(),
    "the first shard vanished": lambda folder: shards_of(folder)[0].unlink(),
    "a shard was cut": cut,
    "a shard was emptied": lambda folder: os.truncate(shards_of(folder)[0], 0),
    "a shard was replaced": lambda folder: shutil.copy(*reversed(shards_of(folder))),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_happened_to_the_index_the_store_is_what_a_scan_finds(tmp_path, change):
    two_shards(tmp_path)
    save(tmp_path)
    CHANGES[change](tmp_path)
    with_index = open_store(tmp_path)
    found = content(with_index)
    shutil.rmtree(tmp_path / INDEX_NAME) if (tmp_path / INDEX_NAME).is_dir() else (tmp_path / INDEX_NAME).unlink(True)
    assert found == content(open_store(tmp_path))
    assert with_index.save_index()
    assert content(open_store(tmp_path)) == found
    if change == "nothing":
        assert found == expected({0: 0, 1: 1, 3: 0}) | expected({4: 1, 5: 0, 2: 1}, "second")


def test_an_index_with_any_wrong_byte_changes_nothing(tmp_path):
    two_shards(tmp_path)
    save(tmp_path)
    whole = (tmp_path / INDEX_NAME).read_bytes()
    wanted = content(open_store(tmp_path))
    for place in range(0, len(whole), 11):
        (tmp_path / INDEX_NAME).write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        assert content(open_store(tmp_path)) == wanted, place


def test_an_index_spares_reading_the_shards(tmp_path, monkeypatch):
    two_shards(tmp_path)
    save(tmp_path)
    monkeypatch.setattr(fmt, "scan", lambda *_: pytest.fail("a shard was scanned"))
    assert len(store := open_store(tmp_path)) == 9
    monkeypatch.undo()
    with writer_of(tmp_path) as writer:
        append(writer, 8)
    assert store.refresh() == 1
    assert store.save_index()
    monkeypatch.setattr(fmt, "scan", lambda *_: pytest.fail("a shard was scanned"))
    assert len(open_store(tmp_path)) == 10


def test_a_folder_that_cannot_be_written_is_read(tmp_path):
    two_shards(tmp_path)
    (tmp_path / INDEX_NAME).mkdir()
    store = open_store(tmp_path)
    assert len(store.live()) == 6
    assert store.save_index() is False
    assert not list(tmp_path.glob("*.tmp")) + list(tmp_path.glob(".*.tmp"))


def test_a_file_in_the_folders_place_is_refused(tmp_path):
    (tmp_path / "store").touch()
    with pytest.raises(UserError, match="cannot be read"):
        open_store(tmp_path / "store")


def test_a_full_disk_is_a_sentence_and_costs_the_entry_only(tmp_path, monkeypatch):
    writer, real = writer_of(tmp_path), os.write
    append(writer, 1)

    def full(descriptor, data):
        real(descriptor, bytes(data)[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="no space left") as caught:
        append(writer, 2)
    assert "what was stored before is kept" in caught.value.problems[0].fix
    monkeypatch.setattr(os, "write", real)
    append(writer, 3)
    writer.close()
    assert content(open_store(tmp_path)) == expected({1: 0, 3: 0})
    assert len(shards_of(tmp_path)) == 2


def test_a_write_that_the_system_splits_is_finished(tmp_path, monkeypatch):
    real = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: real(descriptor, bytes(data)[:37]))
    with writer_of(tmp_path) as writer:
        append(writer, 1)
        append(writer, 2)
    assert content(open_store(tmp_path)) == expected({1: 0, 2: 0})


def test_the_last_entry_of_an_id_holds_when_the_clock_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr("library.io.packed_writer.time.time_ns", lambda: 5)
    with writer_of(tmp_path, shard_bytes=1) as writer:
        for version in range(12):
            append(writer, 1, version)
    assert content(open_store(tmp_path)) == expected({1: 11})


def test_facts_must_fit(tmp_path):
    with writer_of(tmp_path) as writer, pytest.raises((ValueError, TypeError)):
        writer.append(1, {}, facts=(1, 2, 3))
    row = np.array([facts_of(5)], FACTS)
    with writer_of(tmp_path) as writer:
        writer.append(1, {}, facts=row)
        writer.append(2, {}, facts=row[0])
        writer.append(3, {})
    assert open_store(tmp_path).facts(np.arange(3))["bytes"].tolist() == [5, 5, 0]
