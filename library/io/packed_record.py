"""The bytes of a packed cache: shard headers, and records that describe and check themselves. See docs/packed_store.md.

A shard is a header followed by records; everything starts at a multiple of 64 bytes and all numbers are little-endian,
so an array in a mapped file is used where it lies.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

ALIGN = 64
VERSION = 1
SHARD_SUFFIX = ".sdxlpack"
SHARD_MAGIC = b"\x89SDXLSH1"
RECORD_MAGIC = b"\x89SDXLREC"
NO_FACTS = np.dtype([("none", "u1")])
"""Facts of entries that have none: one byte, always 0."""

PREFIX = struct.Struct("<8sII")  # magic, length of the JSON text, its CRC-32: of shards and of the index
FIXED = struct.Struct("<8sQQQIIIII")  # RecordHead's numbers, the CRC-32 of the body, and last that of the head
_CRC = struct.Struct("<I")
_KINDS = "biuf"
_LONGEST_FIELD = 1 << 24  # bytes of a key, of facts or of a layout


def aligned(length: int) -> int:
    """Round up to a multiple of 64."""
    return -(-length // ALIGN) * ALIGN


class Field(NamedTuple):
    """One array of a record: what it is, where it starts in the body and how long it is, in bytes."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """Names, dtypes and shapes of a record's arrays in order; each starts at a multiple of 64 bytes in the body.

    `text` is the compact JSON `[["latents","<f2",[4,128,128]],...]`; `nbytes` the length of the body with padding.
    """

    text: bytes
    fields: dict[str, Field]
    nbytes: int

    @staticmethod
    @lru_cache(maxsize=4096)
    def parse(text: bytes) -> Layout:
        """Read the JSON form; raises ValueError when it is no layout."""
        fields: dict[str, Field] = {}
        offset = 0
        try:
            for name, code, sides in json.loads(text):
                dtype = np.dtype(code)
                if dtype.kind not in _KINDS or not isinstance(name, str) or any(side < 0 for side in sides):
                    raise ValueError(f"{name!r} is no array of numbers")
                nbytes = dtype.itemsize
                for side in sides:
                    nbytes *= int(side)
                fields[name] = Field(dtype, tuple(int(side) for side in sides), offset, nbytes)
                offset = aligned(offset + nbytes)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the layout is unreadable ({error})") from error
        return Layout(text, fields, offset)

    @staticmethod
    def of(arrays: Mapping[str, np.ndarray]) -> Layout:
        """The layout that these arrays will have; integers, floats and booleans of any byte order are accepted."""
        spec = [[name, array.dtype.newbyteorder("<").str, list(array.shape)] for name, array in arrays.items()]
        wrong = [name for name, array in arrays.items() if array.dtype.kind not in _KINDS]
        assert not wrong, f"only arrays of numbers can be stored, not {wrong}"
        return Layout.parse(json.dumps(spec, separators=(",", ":"), ensure_ascii=False).encode())


class RecordHead(NamedTuple):
    """What stands before a record's body. `head` and `body` are lengths in bytes, padding included."""

    id: int
    stamp: int
    head: int
    body: int
    key: bytes
    facts: bytes
    layout: bytes
    body_crc: int


class Record(NamedTuple):
    """A whole record found in a shard."""

    offset: int
    head: RecordHead

    @property
    def end(self) -> int:
        """Where the next record starts."""
        return self.offset + self.head.head + self.head.body


class Damage(NamedTuple):
    """Bytes of a shard that are no record. With `tail` nothing whole follows: perhaps a record being written."""

    offset: int
    length: int
    what: str
    tail: bool = False


def encode_record(
    entry_id: int, arrays: Mapping[str, np.ndarray], *, key: str, facts: bytes, stamp: int
) -> tuple[bytearray, Layout]:
    """Return the bytes of one record and its layout."""
    layout = Layout.of(arrays)
    key_bytes = key.encode("utf-8", "surrogatepass")
    head_length = aligned(FIXED.size + len(facts) + len(key_bytes) + len(layout.text))
    record = bytearray(head_length + layout.nbytes)
    for name, field in layout.fields.items():
        np.copyto(np.ndarray(field.shape, field.dtype, record, head_length + field.offset), arrays[name])
    with memoryview(record) as view:
        body_crc = zlib.crc32(view[head_length:])
        lengths = (len(key_bytes), len(facts), len(layout.text))
        record[FIXED.size : FIXED.size + sum(lengths)] = facts + key_bytes + layout.text
        FIXED.pack_into(record, 0, RECORD_MAGIC, entry_id, stamp, layout.nbytes, *lengths, body_crc, 0)
        _CRC.pack_into(record, FIXED.size - _CRC.size, head_crc(view, 0, head_length))
    return record, layout


def head_crc(view: memoryview, offset: int, length: int) -> int:
    """CRC-32 of a record's head of `length` bytes, leaving out the four bytes that hold it."""
    after = zlib.crc32(view[offset : offset + FIXED.size - 4])
    return zlib.crc32(view[offset + FIXED.size : offset + length], after)


def decode_head(view: memoryview, offset: int, end: int) -> RecordHead | None:
    """Read the head of the record at `offset`, or None when there is no whole and undamaged head before `end`."""
    if offset + FIXED.size > end:
        return None
    magic, entry_id, stamp, body, *lengths, body_crc, crc = FIXED.unpack_from(view, offset)
    if magic != RECORD_MAGIC or max(lengths) > _LONGEST_FIELD:
        return None
    key_length, facts_length, layout_length = lengths
    key_at = offset + FIXED.size + facts_length
    layout_at = key_at + key_length
    length = aligned(layout_at + layout_length - offset)
    if offset + length > end or head_crc(view, offset, length) != crc:
        return None
    facts, key = bytes(view[offset + FIXED.size : key_at]), bytes(view[key_at:layout_at])
    return RecordHead(
        entry_id, stamp, length, body, key, facts, bytes(view[layout_at : layout_at + layout_length]), body_crc
    )


def body_is_good(view: memoryview, offset: int, head: RecordHead) -> bool:
    """Whether the body of the record at `offset` has its checksum."""
    return zlib.crc32(view[offset + head.head : offset + head.head + head.body]) == head.body_crc


def scan(data: mmap.mmap, start: int, end: int) -> Iterator[Record | Damage]:
    """Yield the whole, checked records of a mapped shard from `start` on, and what lies between them that is none.

    A record that may still be being written (cut off at `end`, or the last one with a wrong checksum) is the last
    thing yielded, as Damage with `tail`.
    """
    with memoryview(data) as view:
        offset = start
        while offset < end:
            head = decode_head(view, offset, end)
            if head is None:
                following = _next_head(data, view, offset + ALIGN, end)
                if following is None:
                    yield Damage(offset, end - offset, "incomplete or unreadable record at the end", tail=True)
                    return
                yield Damage(offset, following - offset, "unreadable record")
                offset = following
                continue
            after = offset + head.head + head.body
            if after > end:
                yield Damage(offset, end - offset, "incomplete record at the end", tail=True)
                return
            if body_is_good(view, offset, head):
                yield Record(offset, head)
            else:
                yield Damage(offset, after - offset, "wrong checksum", tail=after == end)
            offset = after


def _next_head(data: mmap.mmap, view: memoryview, start: int, end: int) -> int | None:
    """Where the next undamaged head starts, so that one bad head costs one record and not the rest of the shard."""
    place = data.find(RECORD_MAGIC, start, end)
    while place >= 0:
        if place % ALIGN == 0 and decode_head(view, place, end) is not None:
            return place
        place = data.find(RECORD_MAGIC, place + 1, end)
    return None


def describe_facts(dtype: np.dtype) -> str:
    """The facts' dtype as a text that equals another's exactly when the bytes mean the same."""
    return json.dumps(np.lib.format.dtype_to_descr(dtype))


class ShardHeader(NamedTuple):
    """What a shard's header says. `length` is where the first record starts, `crc` identifies the header."""

    recipe: str
    facts: str
    length: int
    crc: int


def encode_prefixed(magic: bytes, content: Mapping[str, object]) -> bytes:
    """JSON with magic, length and checksum before it, padded to a multiple of 64: the start of both kinds of file."""
    text = json.dumps(content, separators=(",", ":")).encode()
    whole = PREFIX.pack(magic, len(text), zlib.crc32(text)) + text
    return whole.ljust(aligned(len(whole)), b"\0")


def read_prefixed(descriptor: int, magic: bytes) -> tuple[dict, int, int]:
    """Return (content, padded length, checksum) of the start of a file; raises ValueError when it is not one of ours.

    Raises EOFError when the file is shorter than it says: the process that makes it may not be done yet.
    """
    prefix = os.read(descriptor, PREFIX.size)
    if len(prefix) < PREFIX.size:
        raise EOFError("the file ends within its header")
    found, length, crc = PREFIX.unpack(prefix)
    if found != magic:
        raise ValueError("it is no file of a packed cache")
    if os.fstat(descriptor).st_size < aligned(PREFIX.size + length):
        raise EOFError("the file ends within its header")
    text = b""
    while len(text) < length:
        text += os.read(descriptor, length - len(text))
    if zlib.crc32(text) != crc:
        raise ValueError("its header is damaged")
    content = json.loads(text)
    if content.get("version") != VERSION:
        raise ValueError(f"it has format version {content.get('version')}, this program reads {VERSION}")
    return content, aligned(PREFIX.size + length), crc


def encode_shard_header(recipe: str, facts_dtype: np.dtype) -> bytes:
    """The bytes that a shard starts with."""
    return encode_prefixed(SHARD_MAGIC, {"version": VERSION, "recipe": recipe, "facts": describe_facts(facts_dtype)})


def read_shard_header(path: str | os.PathLike[str]) -> ShardHeader:
    """Read the header of a shard; raises ValueError (not ours, damaged), EOFError (not yet whole) or OSError."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    try:
        content, length, crc = read_prefixed(descriptor, SHARD_MAGIC)
    finally:
        os.close(descriptor)
    return ShardHeader(content["recipe"], content["facts"], length, crc)


def map_file(path: str | os.PathLike[str]) -> mmap.mmap:
    """Map a whole file for reading; raises OSError, and ValueError when it is empty."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
