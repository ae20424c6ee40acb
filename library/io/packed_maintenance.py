"""Looking after a packed cache: what is in it, whether it is undamaged, and a compaction that leaves out the rest."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from library.io import packed_record as fmt
from library.io.packed_record import Damage, Record
from library.io.packed_store import PackedStore
from library.io.packed_writer import SHARD_BYTES, PackedWriter
from library.log import get_logger

log = get_logger(__name__)

Progress = Callable[[int, int], None]
"""Called now and then with (bytes done, bytes in all)."""

_STRIDE = 1 << 24  # bytes between two calls of a Progress


class Statistics(NamedTuple):
    """Numbers of a store: entries that count, records replaced by later ones, damaged records met while scanning.

    `bytes` are those of all shards in use; `dead_bytes` what a compaction of the live entries would free.
    """

    shards: int
    entries: int
    superseded: int
    damaged: int
    bytes: int
    dead_bytes: int


class Problem(NamedTuple):
    """Something wrong in a shard. `key` is "" where it cannot be known, `positions` the entries that are lost by it.

    `tail` marks what is no damage while a process is writing to the shard: an incomplete record at the end.
    """

    shard: str
    offset: int
    length: int
    what: str
    key: str
    positions: tuple[int, ...]
    tail: bool


class Compaction(NamedTuple):
    """What a compaction did: records copied, damaged ones left out, bytes of shards removed and written.

    `busy` are shards that were left alone because they grew meanwhile or could not be removed.
    """

    copied: int
    damaged: int
    bytes_removed: int
    bytes_written: int
    busy: tuple[str, ...]


def statistics(store: PackedStore) -> Statistics:
    """Count what the store holds; reads no shard."""
    live = store.live()
    total = sum(shard.seen for shard in store.shards)
    needed = int(store.sizes(live).sum()) + sum(shard.header.length for shard in store.shards)
    damaged = sum(shard.damaged for shard in store.shards)
    return Statistics(len(store.shards), len(live), len(store) - len(live), damaged, total, total - needed)


def verify(store: PackedStore, *, progress: Progress | None = None) -> list[Problem]:
    """Read every shard and check every checksum; returns what is wrong, in order of shard and place."""
    positions = np.arange(len(store), dtype=np.int64)
    shard_of, offsets = store.column("shard", positions), store.column("offset", positions)
    total = sum(shard.seen for shard in store.shards)
    problems = [Problem(name, 0, 0, why, "", (), False) for name, why in store.ignored.items()]
    before = 0
    for number, shard in enumerate(store.shards):
        here = positions[shard_of == number]
        problems += _problems_of(
            store, number, dict(zip(offsets[here].tolist(), here.tolist())), _from(before, total, progress)
        )
        before += shard.seen
    if progress is not None:
        progress(total, total)
    return problems


def _problems_of(
    store: PackedStore, number: int, unseen: dict[int, int], progress: Callable[[int], None]
) -> Iterator[Problem]:
    """Check one shard; `unseen` maps offsets to the positions that must be found there."""
    shard = store.shards[number]
    try:
        data = fmt.map_file(store.path_of(number))
    except (OSError, ValueError) as error:
        yield Problem(shard.name, 0, 0, f"the shard cannot be read ({error})", "", tuple(unseen.values()), False)
        return
    for found in fmt.scan(data, shard.header.length, len(data)):
        if isinstance(found, Record):
            unseen.pop(found.offset, None)
            progress(found.end)
            continue
        lost = [offset for offset in unseen if found.offset <= offset < found.offset + found.length]
        positions = tuple(unseen.pop(offset) for offset in lost)
        yield Problem(shard.name, found.offset, found.length, found.what, _key(data, found), positions, found.tail)
    for offset, position in unseen.items():
        yield Problem(shard.name, offset, 0, "an entry is no longer where it was", "", (position,), False)


def _key(data: mmap.mmap, damage: Damage) -> str:
    with memoryview(data) as view:
        head = fmt.decode_head(view, damage.offset, len(data))
    return head.key.decode("utf-8", "replace") if head is not None else ""


def _from(before: int, total: int, progress: Progress | None) -> Callable[[int], None]:
    """Report the bytes of one shard as part of the whole, not more often than is worth looking at."""
    last = 0

    def report(done: int) -> None:
        nonlocal last
        if progress is not None and done - last >= _STRIDE:
            last = done
            progress(before + done, total)

    return report


def compact(
    store: PackedStore, keep: np.ndarray, *, shard_bytes: int = SHARD_BYTES, progress: Progress | None = None
) -> Compaction:
    """Write the entries at the positions `keep` into new shards, remove the shards they came from, save the index.

    Shards that hold nothing else stay as they are, unless several small ones can be joined; so do shards that grew
    since the store looked at them, and files that are no shards of this kind. At every moment everything kept is in
    the folder. Other processes may write meanwhile, and readers that have the old shards mapped go on; this store
    is outdated afterwards: open it again. Raises UserError when the disk is full.
    """
    keep = np.unique(np.asarray(keep, dtype=np.int64))
    shard_of = store.column("shard", keep)
    sources = _worth_rewriting(
        store, np.bincount(shard_of, weights=store.sizes(keep), minlength=len(store.shards)), shard_bytes
    )
    offsets = store.column("offset", keep)
    total, done, copied, damaged, written = sum(store.shards[number].seen for number in sources), 0, 0, 0, 0
    with PackedWriter(store.folder, recipe="", facts_dtype=store.facts_dtype, shard_bytes=shard_bytes) as writer:
        for number in sources:
            shard = store.shards[number]
            writer.use_recipe(shard.header.recipe)
            data, report = fmt.map_file(store.path_of(number)), _from(done, total, progress)
            for offset in np.sort(offsets[shard_of == number]).tolist():
                size = _copy(data, offset, writer)
                copied, damaged, written = copied + (size > 0), damaged + (size == 0), written + size
                report(offset + size)
            data.close()
            done += shard.seen
        writer.close()  # what is about to be removed must be safe on the disk before
        busy = [number for number in sources if not _remove(store, number, writer)]
    removed = sum(store.shards[number].seen for number in sources if number not in busy)
    PackedStore.open(store.folder, facts_dtype=store.facts_dtype).save_index()
    return Compaction(copied, damaged, removed, written, tuple(store.shards[number].name for number in busy))


def _worth_rewriting(store: PackedStore, kept_bytes: np.ndarray, shard_bytes: int) -> list[int]:
    """Shards, by recipe and name, that are as they were read and hold dead bytes or can be joined with others."""
    unchanged = []
    for number, shard in enumerate(store.shards):
        try:
            if os.stat(store.path_of(number)).st_size == shard.seen:
                unchanged.append(number)
        except FileNotFoundError:
            log.debug("%s: the shard is gone", shard.name)
    small = [number for number in unchanged if store.shards[number].seen < shard_bytes // 2]
    recipes = [store.shards[number].recipe for number in small]
    joined = {number for number in small if recipes.count(store.shards[number].recipe) > 1}
    with_dead = {
        number
        for number in unchanged
        if store.shards[number].seen > store.shards[number].header.length + kept_bytes[number]
    }
    return sorted(joined | with_dead, key=lambda number: (store.shards[number].recipe, store.shards[number].name))


def _copy(data: mmap.mmap, offset: int, writer: PackedWriter) -> int:
    """Copy one record as it is and return its length; 0 when it is damaged."""
    with memoryview(data) as view:
        head = fmt.decode_head(view, offset, len(data))
        end = 0 if head is None else offset + head.head + head.body
        if head is None or end > len(data) or not fmt.body_is_good(view, offset, head):
            return 0
        writer.append_encoded(view[offset:end])
    return end - offset


def _remove(store: PackedStore, number: int, writer: PackedWriter) -> bool:
    """Remove a shard that was copied, unless it grew; what is appended in the very moment of removal is rescued.

    A writer looks after each record whether its shard is still there, and if not writes it again elsewhere. So a
    record is either seen here, after the removal, or by its writer.
    """
    path, shard = store.path_of(number), store.shards[number]
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size != shard.seen:
                return False
            os.unlink(path)
            if (size := os.fstat(file.fileno()).st_size) > shard.seen:
                data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
                writer.use_recipe(shard.header.recipe)
                for found in fmt.scan(data, shard.scanned, size):
                    if isinstance(found, Record):
                        _copy(data, found.offset, writer)
    except OSError as error:
        log.warning("%s is not removed: %s", path, error)
        return False
    return True
