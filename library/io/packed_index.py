"""The columnar index of a packed cache: what is where, in one file that is mapped and never trusted blindly.

It only saves time. An index that is missing, damaged or older than the shards means that they are scanned.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.io.atomic import atomic_path
from library.io.packed_record import (
    VERSION,
    Record,
    aligned,
    describe_facts,
    encode_prefixed,
    read_prefixed,
)

INDEX_NAME = "index.sdxlidx"
INDEX_MAGIC = b"\x89SDXLIX1"
_NUMBERS = {"id": "<u8", "stamp": "<u8", "offset": "<u8", "shard": "<u4", "head": "<u4", "layout": "<u4"}
_CHUNK = 1 << 16  # records gathered as Python objects before they become columns
_READ = 1 << 20  # bytes


@dataclass(frozen=True)
class Columns:
    """Records in columns of equal length. `shard` and `layout` are numbers in the tables of their owner."""

    id: np.ndarray
    stamp: np.ndarray
    offset: np.ndarray
    shard: np.ndarray
    head: np.ndarray
    layout: np.ndarray
    facts: np.ndarray

    @staticmethod
    def empty(facts_dtype: np.dtype) -> Columns:
        """No records."""
        return Columns(**{name: np.zeros(0, code) for name, code in _dtypes(facts_dtype).items()})

    @staticmethod
    def concatenated(parts: Sequence[Columns]) -> Columns:
        """The records of all parts, in order; at least one part."""
        return Columns(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in parts[0].names()})

    def names(self) -> list[str]:
        """The names of the columns."""
        return [*_NUMBERS, "facts"]

    def take(self, rows: np.ndarray) -> Columns:
        """The records at these rows (numbers or a mask), in memory of their own."""
        return Columns(**{name: getattr(self, name)[rows] for name in self.names()})

    def order(self) -> np.ndarray:
        """Rows sorted so that of equal ids the one that holds comes last: by id, stamp, shard and place."""
        return np.lexsort((self.offset, self.shard, self.stamp, self.id))

    def __len__(self) -> int:
        return len(self.id)


class ColumnsBuilder:
    """Gathers records one by one into columns without keeping many Python objects."""

    def __init__(self, facts_dtype: np.dtype) -> None:
        self._facts_dtype = facts_dtype
        self._parts = [Columns.empty(facts_dtype)]
        self._rows: list[tuple[int, ...]] = []
        self._facts: list[bytes] = []

    def add(self, record: Record, *, shard: int, layout: int) -> None:
        """Take in a record whose facts have the right length."""
        head = record.head
        self._rows.append((head.id, head.stamp, record.offset, shard, head.head, layout))
        self._facts.append(head.facts)
        if len(self._rows) == _CHUNK:
            self._flush()

    def columns(self) -> Columns:
        """Everything added so far, in that order."""
        self._flush()
        return Columns.concatenated(self._parts)

    def _flush(self) -> None:
        if not self._rows:
            return
        numbers = np.array(self._rows, dtype=np.uint64).T
        columns = {name: numbers[place].astype(code) for place, (name, code) in enumerate(_NUMBERS.items())}
        facts = np.frombuffer(b"".join(self._facts), dtype=self._facts_dtype)
        self._parts.append(Columns(**columns, facts=facts))
        self._rows, self._facts = [], []


class ShardState(NamedTuple):
    """How far a shard was read: its name, the checksum of its header, bytes read, damaged records among them."""

    name: str
    header_crc: int
    scanned: int
    damaged: int


class Index(NamedTuple):
    """The content of an index file: its columns (sorted by `Columns.order`, mapped) and the tables they refer to."""

    shards: list[ShardState]
    layouts: list[bytes]
    columns: Columns


def save_index(folder: Path, index: Index) -> None:
    """Write the index atomically; `index.columns` must be sorted. Raises OSError or UserError when that fails."""
    columns = {name: np.ascontiguousarray(getattr(index.columns, name)) for name in index.columns.names()}
    checksum = 0
    for piece in _pieces(columns):
        checksum = zlib.crc32(piece, checksum)
    header = {
        "version": VERSION,
        "facts": describe_facts(index.columns.facts.dtype),
        "shards": [list(shard) for shard in index.shards],
        "layouts": [text.decode() for text in index.layouts],
        "count": len(index.columns),
        "crc": checksum,
    }
    with atomic_path(folder / INDEX_NAME, durable=False) as temporary, open(temporary, "wb") as file:
        file.write(encode_prefixed(INDEX_MAGIC, header))
        for piece in _pieces(columns):
            file.write(piece)


def load_index(folder: Path, facts_dtype: np.dtype) -> Index:
    """Map the index of a folder; raises OSError, EOFError or ValueError when there is none that can be used.

    Everything is checked against the checksums, by reading the file and not through the mapping, so that only what
    is used later becomes resident.
    """
    descriptor = os.open(folder / INDEX_NAME, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        header, start, _ = read_prefixed(descriptor, INDEX_MAGIC)
        if header["facts"] != describe_facts(facts_dtype):
            raise ValueError("it describes entries with other facts")
        count = header["count"]
        if not count:
            columns = Columns.empty(facts_dtype)
        else:
            _check(descriptor, start, header["crc"])
            columns = _mapped(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), start, count, facts_dtype)
    finally:
        os.close(descriptor)
    shards = [ShardState(*shard) for shard in header["shards"]]
    layouts = [text.encode() for text in header["layouts"]]
    if count and (columns.shard.max() >= len(shards) or columns.layout.max() >= len(layouts)):
        raise ValueError("it names shards or layouts that it does not list")
    return Index(shards, layouts, columns)


def _dtypes(facts_dtype: np.dtype) -> dict[str, np.dtype]:
    return {**{name: np.dtype(code) for name, code in _NUMBERS.items()}, "facts": facts_dtype}


def _pieces(columns: dict[str, np.ndarray]) -> Iterator[memoryview | bytes]:
    for column in columns.values():
        if len(column):
            yield column.view(np.uint8).data
        yield bytes(aligned(column.nbytes) - column.nbytes)


def _check(descriptor: int, start: int, expected: int) -> None:
    os.lseek(descriptor, start, os.SEEK_SET)
    checksum = 0
    while piece := os.read(descriptor, _READ):
        checksum = zlib.crc32(piece, checksum)
    if checksum != expected:
        raise ValueError("it is damaged")


def _mapped(data: mmap.mmap, start: int, count: int, facts_dtype: np.dtype) -> Columns:
    columns = {}
    for name, dtype in _dtypes(facts_dtype).items():
        columns[name] = np.frombuffer(data, dtype, count, start)
        start = aligned(start + columns[name].nbytes)
    return Columns(**columns)


def rightmost(sorted_ids: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Rows of `ids` in a sorted column, of equal ones the last; -1 where absent. int64."""
    if not len(sorted_ids):
        return np.full(len(ids), -1, np.int64)
    rows = np.searchsorted(sorted_ids, ids, side="right").astype(np.int64, copy=False) - 1
    return np.where((rows >= 0) & (sorted_ids[rows] == ids), rows, -1)
