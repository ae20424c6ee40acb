"""Writing to a packed cache: every writer has a shard of its own, so any number of processes write without locks.

A record is written by one call and never changed. What a killed process leaves is a torn tail that readers ignore.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from library.io.atomic import explained
from library.io.packed_record import NO_FACTS, SHARD_SUFFIX, encode_record, encode_shard_header

SHARD_BYTES = 1 << 30
_LEFT_BEHIND = "what was stored before is kept"


class PackedWriter:
    """Appends entries to a packed cache; a context manager. Not for several threads at once.

    The folder and the shard are made by the first append. A new shard is begun when `shard_bytes` would be passed,
    when the recipe changes, after a failed write, and in a forked child. `recipe` is a text that says how all
    entries of a shard were made; `facts_dtype` a structured dtype with what differs between entries.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        recipe: str,
        facts_dtype: np.dtype = NO_FACTS,
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        self.folder = Path(folder)
        self.recipe = recipe
        self.facts_dtype = np.dtype(facts_dtype)
        self.shard_bytes = shard_bytes
        self._shard: Path | None = None
        self._descriptor = -1
        self._process = -1
        self._written = 0
        self._stamp = 0
        self._has_link_counts = False

    def append(
        self,
        entry_id: int,
        arrays: Mapping[str, np.ndarray],
        *,
        key: str = "",
        facts: np.void | np.ndarray | tuple | None = None,
    ) -> None:
        """Store one entry (numbers only, any shapes); it replaces an earlier one of the same 64-bit id.

        Raises UserError when the disk is full or the folder not writable.
        """
        values = np.zeros((), self.facts_dtype) if facts is None else np.array(facts, dtype=self.facts_dtype)
        assert values.size == 1, "an entry has one row of facts"
        # Strictly rising, so that the last entry of an id is the last one also when the clock stands still.
        self._stamp = max(self._stamp + 1, time.time_ns())
        record, _ = encode_record(entry_id, arrays, key=key, facts=values.tobytes(), stamp=self._stamp)
        self.append_encoded(record)

    def append_encoded(self, record: bytes | bytearray | memoryview) -> None:
        """Store a whole record as it is, such as one of another shard with the same recipe and facts."""
        with explained(self._shard or self.folder, left_behind=_LEFT_BEHIND):
            if self._descriptor < 0 or self._process != os.getpid() or self._written + len(record) > self.shard_bytes:
                self._begin_shard()
            self._write(record)
            # A compaction may have removed the shard after it had read it: what came too late goes to a new one.
            if self._has_link_counts and os.fstat(self._descriptor).st_nlink == 0:
                self._begin_shard()
                self._write(record)

    def use_recipe(self, recipe: str) -> None:
        """Store what follows under this recipe; another one than before begins another shard."""
        if recipe != self.recipe:
            self.close()
            self.recipe = recipe

    def close(self) -> None:
        """Flush the shard to the disk and let go of it; a later append begins another."""
        if self._descriptor < 0:
            return
        descriptor, self._descriptor = self._descriptor, -1
        if self._process != os.getpid():  # the parent's shard: its flush is the parent's business
            os.close(descriptor)
            return
        with explained(self._shard or self.folder, left_behind=_LEFT_BEHIND):
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _begin_shard(self) -> None:
        self.close()
        self.folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time_ns():016x}-{os.getpid()}-{secrets.token_hex(4)}{SHARD_SUFFIX}"
        self._shard = self.folder / name
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | getattr(os, "O_BINARY", 0)
        self._descriptor = os.open(self._shard, flags, 0o666)
        self._process, self._written = os.getpid(), 0
        self._has_link_counts = os.fstat(self._descriptor).st_nlink > 0
        self._write(encode_shard_header(self.recipe, self.facts_dtype))

    def _write(self, data: bytes | bytearray | memoryview) -> None:
        """Write in one call (the system may split it when the disk is full or a signal comes)."""
        try:
            done = os.write(self._descriptor, data)
            while done < len(data):
                done += os.write(self._descriptor, memoryview(data)[done:])
        except BaseException:
            # Nothing may follow a torn record. It is not cut off: other processes may have the file mapped.
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
            raise
        self._written += len(data)
