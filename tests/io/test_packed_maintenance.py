"""Looking after a packed cache: numbers, checksums, and a compaction that loses nothing, whoever else is at work."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from library.io import packed_maintenance
from library.io.packed_maintenance import compact, statistics, verify
from library.io.packed_record import NO_FACTS, SHARD_SUFFIX
from library.io.packed_writer import PackedWriter
from tests.io.packed_entries import RECIPE, append, content, expected, id_of, open_store, shards_of, writer_of


def positions_of(store, *numbers: int) -> np.ndarray:
    """Positions of entries by number."""
    return store.find(np.array([id_of(number) for number in numbers], np.uint64))


def several_shards(folder: Path) -> None:
    """Entries 0 to 39 in many shards of two recipes, a third of them replaced once, the last shard torn."""
    for recipe, numbers in ((RECIPE, range(20)), ("second", range(20, 40))):
        with writer_of(folder, recipe, shard_bytes=3000) as writer:
            for number in numbers:
                append(writer, number)
            for number in numbers[::3]:
                append(writer, number, version=1)
    with open(shards_of(folder)[-1], "ab") as file:
        file.write(b"torn" * 20)


def whole() -> dict:
    """What `several_shards` stores."""
    first = {number: int(number % 3 == 0) for number in range(20)}
    second = {number: int((number - 20) % 3 == 0) for number in range(20, 40)}
    return expected(first) | expected(second, "second")


def test_statistics_count_entries_and_dead_bytes(tmp_path):
    several_shards(tmp_path)
    store = open_store(tmp_path)
    numbers = statistics(store)
    on_disk = sum(path.stat().st_size for path in shards_of(tmp_path))
    superseded = np.setdiff1d(np.arange(len(store)), store.live())
    assert (numbers.entries, numbers.superseded, numbers.damaged, numbers.bytes) == (40, 14, 0, on_disk)
    assert numbers.shards == len(shards_of(tmp_path)) > 4
    assert numbers.dead_bytes == store.sizes(superseded).sum() + 80
    assert statistics(open_store(tmp_path / "nothing")) == (0, 0, 0, 0, 0, 0)


def test_verify_finds_every_damaged_record_and_names_it(tmp_path):
    several_shards(tmp_path)
    store = open_store(tmp_path)
    store.save_index()
    calls: list[tuple[int, int]] = []
    (torn,) = verify(store, progress=lambda done, total: calls.append((done, total)))
    assert torn.tail
    assert torn.length == 80
    assert torn.positions == ()
    assert calls[-1] == (statistics(store).bytes,) * 2
    in_body, in_head = positions_of(store, 5, 30).tolist()
    for position, place in ((in_body, int(store.sizes(np.array([in_body]))[0]) - 70), (in_head, 9)):
        path = store.path_of(int(store.column("shard", np.array([position]))[0]))
        at = int(store.column("offset", np.array([position]))[0]) + place
        data = bytearray(path.read_bytes())
        data[at] ^= 1
        path.write_bytes(data)
    for again in (store, open_store(tmp_path)):
        found = {problem.positions: problem for problem in verify(again) if not problem.tail}
        by_number = {tuple(positions_of(again, number)): number for number in (5, 30)}
        assert {by_number[positions] for positions in found} == {5, 30}
        by_key = {by_number[positions]: problem.key for positions, problem in found.items()}
        assert by_key == {5: "bild 5.png ü", 30: ""}


def test_verify_reports_what_is_gone_or_unusable(tmp_path):
    several_shards(tmp_path)
    (tmp_path / f"other{SHARD_SUFFIX}").write_bytes(b"?" * 100)
    store = open_store(tmp_path)
    first, second = shards_of(tmp_path)[:2]
    first.unlink()
    os.truncate(second, 400)
    problems = verify(store)
    lost = {position for problem in problems for position in problem.positions}
    in_two = np.flatnonzero(store.column("shard", np.arange(len(store))) < 2)
    starts = store.column("offset", in_two)
    ends = starts.astype(np.int64) + store.sizes(in_two)
    gone = in_two[(store.column("shard", in_two) == 0) | (ends > 400)]
    assert lost == set(gone.tolist())
    assert {problem.shard for problem in problems} >= {first.name, second.name, f"other{SHARD_SUFFIX}"}


@pytest.mark.parametrize("seed", range(4))
def test_compaction_keeps_exactly_what_is_to_be_kept(tmp_path, seed):
    several_shards(tmp_path)
    foreign = tmp_path / f"not-ours{SHARD_SUFFIX}"
    foreign.write_bytes(b"x" * 500)
    (tmp_path / "notes.txt").write_text("keep me")
    with PackedWriter(tmp_path, recipe="r", facts_dtype=NO_FACTS) as other:
        other.append(1, {})
    unknown = set(tmp_path.glob(f"*{SHARD_SUFFIX}")) & {*shards_of(tmp_path)[-2:]}
    store = open_store(tmp_path)
    live = store.live()
    keep = live if not seed else np.random.default_rng(seed).permutation(live)[: 10 * seed]
    ids = set(store.column("id", keep).tolist())
    view = store.read(int(keep[0]))["latents"]
    before = view.tobytes()
    done = compact(store, keep, shard_bytes=6000)
    after = open_store(tmp_path)
    assert content(after) == {entry_id: entry for entry_id, entry in whole().items() if entry_id in ids}
    assert done.copied == len(keep)
    assert done.damaged == 0
    assert done.busy == ()
    numbers = statistics(after)
    assert (numbers.superseded, numbers.dead_bytes, numbers.entries) == (0, 0, len(keep))
    assert not verify(after)[len(after.ignored) :]
    assert all(path.stat().st_size <= 6000 for path in shards_of(tmp_path))
    assert foreign.read_bytes() == b"x" * 500
    assert (tmp_path / "notes.txt").exists()
    assert len(unknown) == 2
    assert all(path.exists() for path in unknown)
    assert view.tobytes() == before


def test_a_store_without_waste_is_left_as_it_is(tmp_path):
    with writer_of(tmp_path, shard_bytes=1500) as writer:
        for number in range(10):
            append(writer, number)
    store = open_store(tmp_path)
    files = {path: path.stat().st_mtime_ns for path in shards_of(tmp_path)[:-1]}
    assert compact(store, store.live(), shard_bytes=1500).copied == 0
    assert files == {path: path.stat().st_mtime_ns for path in files}
    joined = compact(open_store(tmp_path), store.live(), shard_bytes=100_000)
    assert joined.copied == 10
    assert len(shards_of(tmp_path)) == 1
    assert content(open_store(tmp_path)) == expected(dict.fromkeys(range(10), 0))


def test_damaged_records_are_left_out_of_a_compaction(tmp_path):
    several_shards(tmp_path)
    store = open_store(tmp_path)
    store.save_index()
    (position,) = positions_of(store, 5)
    path = store.path_of(int(store.column("shard", np.array([position]))[0]))
    data = bytearray(path.read_bytes())
    data[int(store.column("offset", np.array([position]))[0]) + 200] ^= 1
    path.write_bytes(data)
    assert compact(store, store.live()).damaged == 1
    found = whole()
    del found[id_of(5)]
    assert content(open_store(tmp_path)) == found


def test_a_shard_that_grew_meanwhile_stays(tmp_path):
    with writer_of(tmp_path) as writer:
        for version in range(3):
            append(writer, 1, version)
        store = open_store(tmp_path)
        append(writer, 2)
        compact(store, store.live())
        append(writer, 3)
    assert len(shards_of(tmp_path)) == 1
    assert content(open_store(tmp_path)) == expected({1: 2, 2: 0, 3: 0})


def test_a_shard_that_grows_while_it_is_copied_stays(tmp_path, monkeypatch):
    writer, real = writer_of(tmp_path), packed_maintenance._copy
    for version in range(3):
        append(writer, 1, version)
    store = open_store(tmp_path)

    def slow(*arguments):
        append(writer, 2)
        return real(*arguments)

    monkeypatch.setattr(packed_maintenance, "_copy", slow)
    done = compact(store, store.live())
    writer.close()
    assert done.busy == (store.shards[0].name,)
    assert store.path_of(0).exists()
    assert content(open_store(tmp_path)) == expected({1: 2, 2: 0})


def test_a_writer_whose_shard_was_removed_goes_on_in_another(tmp_path):
    if os.name != "posix":
        pytest.skip("files in use cannot be removed here")
    with writer_of(tmp_path) as writer:
        for version in range(3):
            append(writer, 1, version)
        store = open_store(tmp_path)
        assert compact(store, store.live()).busy == ()
        append(writer, 2)
        append(writer, 3)
    assert content(open_store(tmp_path)) == expected({1: 2, 2: 0, 3: 0})


def test_what_is_appended_in_the_moment_of_removal_is_rescued(tmp_path, monkeypatch):
    if os.name != "posix":
        pytest.skip("files in use cannot be removed here")
    writer, real = writer_of(tmp_path), os.unlink
    for version in range(3):
        append(writer, 1, version)
    with writer_of(tmp_path, "second") as other:
        append(other, 3)
        append(other, 3, version=1)
    store = open_store(tmp_path)

    def late(path):
        if path == store.path_of(0):
            append(writer, 2)
        real(path)

    monkeypatch.setattr(packed_maintenance.os, "unlink", late)
    compact(store, store.live())
    monkeypatch.undo()
    assert content(open_store(tmp_path)) == expected({1: 2, 2: 0}) | expected({3: 1}, "second")
    writer.close()


def test_shards_that_cannot_be_removed_do_no_harm(tmp_path, monkeypatch):
    several_shards(tmp_path)
    store = open_store(tmp_path)

    def refuse(path):
        raise PermissionError(1, "Operation not permitted", str(path))

    monkeypatch.setattr(packed_maintenance.os, "unlink", refuse)
    done = compact(store, store.live())
    assert set(done.busy) == {shard.name for shard in store.shards}
    assert done.bytes_removed == 0
    assert content(open_store(tmp_path)) == whole()
