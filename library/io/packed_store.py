"""Reading a packed cache: one index for all entries, and arrays used where they lie in the mapped shards."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from library.errors import UserError
from library.io import packed_record as fmt
from library.io.packed_index import Columns, ColumnsBuilder, Index, ShardState, load_index, rightmost, save_index
from library.io.packed_record import NO_FACTS, Layout, Record, ShardHeader
from library.log import get_logger

log = get_logger(__name__)

_AGAIN = "start again; what is missing or damaged will be built again"


@dataclass
class Shard:
    """One shard as far as it is known. `recipe` is a number in the store's table.

    `scanned` is where the next record is expected; `seen` how long the file was when it was looked at, more than
    `scanned` when it ends in a torn record or one that is being written.
    """

    name: str
    header: ShardHeader
    recipe: int
    scanned: int
    seen: int
    damaged: int = 0


class _Place(NamedTuple):
    """A record in a mapped shard: where it and its body start."""

    data: mmap.mmap
    offset: int
    body: int
    layout: Layout


class _Late(NamedTuple):
    """Records that the index lacked, in the order in which they were found; replaced as a whole when more come."""

    columns: Columns
    order: np.ndarray
    sorted_ids: np.ndarray

    @staticmethod
    def of(columns: Columns) -> _Late:
        order = columns.order()
        return _Late(columns, order, columns.id[order])


class PackedStore:
    """The entries of a packed cache, found by 64-bit id; made by `open`.

    Entries are named by their position, a number that stays the same for the life of this object, in copies sent to
    other processes too. Writers may append all the time; `refresh` sees what they did. Reading goes on in other
    threads meanwhile. Array views stay valid after the store is gone.
    """

    def __init__(self, folder: Path, facts_dtype: np.dtype) -> None:
        self.folder = folder
        self.facts_dtype = facts_dtype
        self.recipes: list[str] = []
        self.shards: list[Shard] = []
        self.ignored: dict[str, str] = {}
        """Names of shards that cannot be used, and why: damaged header, other facts, a newer version."""
        self._layouts: list[Layout] = []
        self._layout_numbers: dict[bytes, int] = {}
        self._base = Columns.empty(facts_dtype)  # positions from 0, sorted
        self._late = _Late.of(Columns.empty(facts_dtype))  # the positions after those
        self._is_saved = False
        self._maps: dict[int, mmap.mmap] = {}

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, facts_dtype: np.dtype = NO_FACTS) -> Self:
        """Open a folder (one that is not there is an empty store): read the index, scan what it does not cover.

        Raises UserError when the folder cannot be listed.
        """
        store = cls(Path(folder), np.dtype(facts_dtype))
        try:
            index = load_index(store.folder, store.facts_dtype)
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            log.debug("%s: no index is used (%s)", folder, error)
            index = None
        if index is not None:
            store._adopt(index)
        store.refresh()
        return store

    def __len__(self) -> int:
        """Number of positions, superseded entries included."""
        return len(self._base) + len(self._late.columns)

    def find(self, ids: np.ndarray) -> np.ndarray:
        """Positions (int64) of the last entries of `ids` (uint64, 1-d), -1 where there is none."""
        ids = np.asarray(ids, dtype=np.uint64)
        late, order, sorted_ids = self._late
        found = rightmost(self._base.id, ids)
        if not len(late):
            return found
        rows = rightmost(sorted_ids, ids)
        both = np.flatnonzero((rows >= 0) & (found >= 0))
        rows[both[self._base.stamp[found[both]] > late.stamp[order[rows[both]]]]] = -1
        newer = rows >= 0
        found[newer] = order[rows[newer]] + len(self._base)
        return found

    def live(self) -> np.ndarray:
        """Positions of the entries that count: the last one of every id, by rising id."""
        return self.find(np.unique(np.concatenate([self._base.id, self._late.sorted_ids])))

    def column(self, name: str, positions: np.ndarray) -> np.ndarray:
        """One column of the index at these positions: id, stamp, offset, shard, head, layout or facts."""
        positions = np.asarray(positions, dtype=np.int64)
        if len(positions) and not 0 <= positions.min() <= positions.max() < len(self):
            raise IndexError("there is no entry at such a position")
        base, late = getattr(self._base, name), getattr(self._late.columns, name)
        if not len(late):
            return base[positions]
        values = np.empty(len(positions), base.dtype)
        is_late = positions >= len(base)
        values[~is_late] = base[positions[~is_late]]
        values[is_late] = late[positions[is_late] - len(base)]
        return values

    def facts(self, positions: np.ndarray) -> np.ndarray:
        """The facts of the entries: a structured array, one row per position."""
        return self.column("facts", positions)

    def recipe_of(self, positions: np.ndarray) -> np.ndarray:
        """Numbers in `recipes`, one per position (int32)."""
        of_shard = np.array([shard.recipe for shard in self.shards], dtype=np.int32)
        return of_shard[self.column("shard", positions)]

    def layouts(self, positions: np.ndarray) -> tuple[list[Layout], np.ndarray]:
        """The layouts of the store, and which of them each entry has (int64): shapes are known without reading."""
        return list(self._layouts), self.column("layout", positions).astype(np.int64)

    def sizes(self, positions: np.ndarray) -> np.ndarray:
        """Bytes that the entries take in their shards (int64)."""
        bodies = np.array([layout.nbytes for layout in self._layouts], dtype=np.int64)
        return self.column("head", positions).astype(np.int64) + bodies[self.column("layout", positions)]

    def key(self, position: int) -> str:
        """The text that was stored with an entry; read from the shard."""
        place = self._locate(position)
        with memoryview(place.data) as view:
            head = fmt.decode_head(view, place.offset, len(place.data))
        if head is None:
            raise self._broken(int(self.column("shard", np.array([position]))[0]))
        return head.key.decode("utf-8", "surrogatepass")

    def read(self, position: int) -> dict[str, np.ndarray]:
        """The arrays of an entry: read-only views of the mapped shard, nothing is copied.

        Checksums are those of `verify`; here only the beginning of the record is looked at. Raises UserError when
        the shard is gone or is not what it was.
        """
        place = self._locate(position)
        return {
            name: np.ndarray(field.shape, field.dtype, place.data, place.body + field.offset)
            for name, field in place.layout.fields.items()
        }

    def read_batch(
        self, positions: Sequence[int] | np.ndarray, names: Iterable[str], *, out: dict[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """The named arrays of several entries stacked, (B, ...) each: one copy from the mapped shard to its place.

        `out` may hold the arrays to fill (any dtype: float16 can be widened on the way). Raises ValueError when the
        entries differ in shape, KeyError when one lacks a name, UserError as `read`.
        """
        places = [self._locate(int(position)) for position in positions]
        return {name: _stack(name, places, None if out is None else out[name]) for name in names}

    def refresh(self) -> int:
        """Take in what was appended since, by this or other processes; returns how many records that were.

        Without news it costs a listing of the folder. Raises UserError when the folder cannot be listed.
        """
        builder = ColumnsBuilder(self.facts_dtype)
        known = {shard.name: number for number, shard in enumerate(self.shards)}
        for name, size in _list_shards(self.folder):
            number = known.get(name)
            if number is None:
                number = self._new_shard(name)
            if number is not None and size > self.shards[number].seen:
                self._scan(number, size, builder)
        found = builder.columns()
        if len(found):
            self._late = _Late.of(Columns.concatenated([self._late.columns, found]))
            self._is_saved = False
        return len(found)

    def save_index(self) -> bool:
        """Write the index when it would say something new; False when that was needed and not possible.

        Savers at the same time do no harm: the last one wins, and what its index lacks is scanned.
        """
        if self._is_saved:
            return True
        columns = Columns.concatenated([self._base, self._late.columns])
        states = [ShardState(shard.name, shard.header.crc, shard.scanned, shard.damaged) for shard in self.shards]
        index = Index(states, [layout.text for layout in self._layouts], columns.take(columns.order()))
        try:
            save_index(self.folder, index)
        except (OSError, UserError) as error:
            log.debug("%s: the index is not saved (%s)", self.folder, error)
            return False
        self._is_saved = True
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_maps": {}}

    def path_of(self, shard: int) -> Path:
        """The file of a shard."""
        return self.folder / self.shards[shard].name

    def _adopt(self, index: Index) -> None:
        """Take over what an index says about shards that are still there and as long as they were."""
        sizes = dict(_list_shards(self.folder))
        numbers = np.full(len(index.shards), -1, np.int64)
        limits = np.zeros(len(index.shards), np.int64)
        for place, state in enumerate(index.shards):
            number = self._new_shard(state.name) if state.name in sizes else None
            if number is None or self.shards[number].header.crc != state.header_crc:
                continue
            shard = self.shards[number]
            shard.scanned, shard.damaged = min(state.scanned, sizes[state.name]), state.damaged
            shard.seen = shard.scanned
            numbers[place], limits[place] = number, shard.scanned
        self._layouts = [Layout.parse(text) for text in index.layouts]
        self._layout_numbers = {text: number for number, text in enumerate(index.layouts)}
        whole = all(numbers == np.arange(len(numbers))) and all(
            limit == state.scanned for limit, state in zip(limits, index.shards)
        )
        self._base = index.columns if whole else self._still_there(index.columns, numbers, limits)
        self._is_saved = whole

    def _still_there(self, columns: Columns, numbers: np.ndarray, limits: np.ndarray) -> Columns:
        """The records of an outdated index that lie within what is there, with the shards' new numbers."""
        bodies = np.array([layout.nbytes for layout in self._layouts], dtype=np.int64)
        ends = columns.offset.astype(np.int64) + columns.head + bodies[columns.layout]
        kept = columns.take((numbers[columns.shard] >= 0) & (ends <= limits[columns.shard]))
        for place in np.flatnonzero(numbers >= 0):
            # A shard cut off within a record: what is left of it is looked at again when the shard grows.
            here = columns.shard == place
            if limits[place] < ends[here].max(initial=0):
                good = ends[here & (ends <= limits[place])]
                shard = self.shards[numbers[place]]
                shard.scanned = shard.seen = int(good.max(initial=shard.header.length))
        kept.shard[:] = numbers[kept.shard]
        return kept

    def _new_shard(self, name: str) -> int | None:
        """Read the header of a shard and enter it in the table; None when it cannot be used (yet)."""
        if name in self.ignored:
            return None
        try:
            header = fmt.read_shard_header(self.folder / name)
        except (EOFError, FileNotFoundError):
            return None  # just made, or just removed
        except (OSError, ValueError, KeyError) as error:
            self._ignore(name, str(error))
            return None
        if header.facts != fmt.describe_facts(self.facts_dtype):
            self._ignore(name, "its entries have other facts")
            return None
        if header.recipe not in self.recipes:
            self.recipes.append(header.recipe)
        self.shards.append(Shard(name, header, self.recipes.index(header.recipe), header.length, header.length))
        return len(self.shards) - 1

    def _ignore(self, name: str, why: str) -> None:
        log.warning("%s is not used: %s", self.folder / name, why)
        self.ignored[name] = why

    def _scan(self, number: int, size: int, builder: ColumnsBuilder) -> None:
        """Read a shard from where it was left up to `size`; a record that is not whole yet is left for later."""
        shard = self.shards[number]
        try:
            data = fmt.map_file(self.folder / shard.name)
        except (OSError, ValueError) as error:
            log.debug("%s: %s", shard.name, error)
            return
        for found in fmt.scan(data, shard.scanned, min(size, len(data))):
            if isinstance(found, Record):
                layout = self._layout_number(found.head.layout)
                if layout is None or len(found.head.facts) != self.facts_dtype.itemsize:
                    shard.damaged += 1
                else:
                    builder.add(found, shard=number, layout=layout)
                shard.scanned = found.end
            elif not found.tail:
                shard.damaged += 1
                shard.scanned = found.offset + found.length
        shard.seen = min(size, len(data))
        data.close()

    def _layout_number(self, text: bytes) -> int | None:
        if text not in self._layout_numbers:
            try:
                self._layouts.append(Layout.parse(text))
            except ValueError:
                return None
            self._layout_numbers[text] = len(self._layouts) - 1
        return self._layout_numbers[text]

    def _locate(self, position: int) -> _Place:
        """Find a record, and look whether it is the one that the index means."""
        base, late = self._base, self._late.columns
        columns, row = (base, position) if position < len(base) else (late, position - len(base))
        if position < 0 or row >= len(columns):
            raise IndexError(f"there is no entry at position {position}")
        number, offset, layout = int(columns.shard[row]), int(columns.offset[row]), self._layouts[columns.layout[row]]
        body = offset + int(columns.head[row])
        end = body + layout.nbytes
        data = self._maps.get(number)
        if data is None or len(data) < end:
            data = self._maps[number] = self._map(number)
        if len(data) < end or data[offset : offset + 16] != fmt.RECORD_MAGIC + columns.id[row].tobytes():
            raise self._broken(number)
        return _Place(data, offset, body, layout)

    def _map(self, number: int) -> mmap.mmap:
        try:
            return fmt.map_file(self.path_of(number))
        except (OSError, ValueError) as error:
            raise UserError(
                f"a shard of the cache cannot be read ({error})", str(self.path_of(number)), _AGAIN
            ) from error

    def _broken(self, number: int) -> UserError:
        return UserError("a shard of the cache is not what it was", str(self.path_of(number)), _AGAIN)


def _stack(name: str, places: list[_Place], out: np.ndarray | None) -> np.ndarray:
    first = places[0].layout.fields[name]
    if out is None:
        out = np.empty((len(places), *first.shape), first.dtype)
    for number, place in enumerate(places):
        field = place.layout.fields[name]
        if field.shape != first.shape:
            raise ValueError(f"{name}: entries of {first.shape} and {field.shape} cannot be stacked")
        np.copyto(out[number, ...], np.ndarray(field.shape, field.dtype, place.data, place.body + field.offset))
    return out


def _list_shards(folder: Path) -> list[tuple[str, int]]:
    """(name, bytes) of every shard of a folder by name; none when there is no folder."""
    found = []
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.endswith(fmt.SHARD_SUFFIX):
                    with contextlib.suppress(FileNotFoundError):  # removed since it was listed
                        found.append((entry.name, entry.stat().st_size))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(
            f"the cache folder cannot be read ({error.strerror})", str(folder), "check the path and its permissions"
        ) from error
    return sorted(found)
