"""Where a pass over the captions keeps their encodings: in memory, or as sd-scripts' npz files beside the images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from library.data.cache_index import CacheIndex
from library.data.cache_places import BESIDE_THE_IMAGES, CachePlace, require_writable
from library.data.caching import entry_paths, inspect_all, usable
from library.data.stores import Entries, text_row
from library.diffusion.conditioning import TextCond
from library.io import fingerprint, text_cache
from library.io.latent_cache import CacheCheck
from library.io.text_cache import TextEntry


@dataclass(frozen=True)
class TextCacheOptions:
    """How to cache: `batch_size` captions per call; `width_1` is the first encoder's share of the text width.

    The rest says what an entry depends on besides its caption; `skip_check` trusts old files; `place` is where entries
    on disk lie.
    """

    text_encoder_id: str
    width_1: int
    max_token_length: int = 75
    weighted: bool = False
    to_disk: bool = False
    batch_size: int = 8
    skip_check: bool = False
    place: CachePlace = BESIDE_THE_IMAGES


class TextBackend(Protocol):
    """One kind of cache during a pass; entries go by the numbers of the pass's targets."""

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """What is there of every entry; the ranks share the looking."""

    def place(self, number: int) -> str:
        """Where an entry lies, in words for the log."""

    def prepare(self, numbers: Sequence[int]) -> None:
        """Called before entries are made, with their numbers; raises UserError when they could not be kept."""

    def put(self, number: int, row: TextCond) -> None:
        """Keep an entry, a batch of 1 on the CPU."""

    def share(self) -> Any:
        """What other ranks have to know to read what this rank has put; can be pickled."""

    def entries(self, shared: Sequence[Any], *, right: Sequence[int], rank: int) -> Entries[TextCond]:
        """All entries, given what every rank shares and the numbers of those known to be right now."""


class MemoryText:
    """Keeps entries as they are, in float32."""

    in_memory = True

    def __init__(self, total: int) -> None:
        self._total = total
        self._entries: dict[int, TextCond] = {}

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Nothing is there yet."""
        return [CacheCheck("missing")] * self._total

    def place(self, number: int) -> str:
        """No entry has a place of its own."""
        return "memory"

    def prepare(self, numbers: Sequence[int]) -> None:
        """There is nothing to prepare."""

    def put(self, number: int, row: TextCond) -> None:
        """Keep an entry."""
        self._entries[number] = TextCond(row.hidden_BTD.float().clone(), row.pooled_BP.float().clone())

    def share(self) -> Mapping[int, TextCond]:
        """The entries themselves."""
        return self._entries

    def entries(self, shared: Sequence[Mapping[int, TextCond]], *, right: Sequence[int], rank: int) -> MemoryText:
        """This object, with the entries of every rank."""
        for part in shared:
            self._entries |= part
        return self

    def read(self, number: int) -> TextCond:
        """One entry."""
        return self._entries[number]

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are there."""
        return np.fromiter((number in self._entries for number in numbers.tolist()), bool, len(numbers))


class NpzTextEntries:
    """Entries in files, read as float32."""

    in_memory = False

    def __init__(self, paths: Sequence[Path], numbers: Sequence[int]) -> None:
        self._paths = list(paths)
        self._is_there = np.zeros(len(paths), dtype=bool)
        self._is_there[list(numbers)] = True

    def read(self, number: int) -> TextCond:
        """One entry."""
        return text_row(text_cache.read(self._paths[number]))

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are known to be right."""
        return self._is_there[numbers]


class NpzText:
    """Keeps every entry in a file of sd-scripts' format. `captions` are those that are encoded, one per entry."""

    def __init__(self, image_paths: Sequence[str], captions: Sequence[str], options: TextCacheOptions) -> None:
        self._captions, self._options = captions, options
        standard = list(map(text_cache.text_cache_path, image_paths))
        self._paths = self._beside = entry_paths(standard, captions)
        if options.place.folder is not None:
            self._paths = entry_paths(list(map(options.place.npz_path, standard)), captions)
        self._index = CacheIndex()
        self._unindexed: set[int] = set()
        self._is_beside: dict[int, bool] = {}

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Ask the folders' indexes first, and open the files that they do not know."""
        self._index.load({path.parent for path in (*self._paths, *self._beside)})
        checks = inspect_all(len(self._paths), self._inspect, rank=rank, world=world, title="checking captions")
        self._unindexed = {number for number, check in enumerate(checks) if check.status == "foreign"}
        if self._beside is not self._paths:
            self._use_files_beside(checks)
        return checks

    def place(self, number: int) -> str:
        """Its file."""
        return str(self._paths[number])

    def prepare(self, numbers: Sequence[int]) -> None:
        """Find out whether the folders can be written to."""
        require_writable({self._paths[number].parent for number in numbers})

    def put(self, number: int, row: TextCond) -> None:
        """Write its file."""
        hidden, width = row.hidden_BTD[0], self._options.width_1
        entry = TextEntry(hidden[:, :width], hidden[:, width:], row.pooled_BP[0])
        text_cache.write(self._paths[number], entry, self._fingerprint(number))

    def share(self) -> None:
        """The others find the files by themselves."""

    def entries(self, shared: Sequence[None], *, right: Sequence[int], rank: int) -> NpzTextEntries:
        """The files; the first rank notes in the folders' indexes which are right."""
        if rank == 0 and not self._options.skip_check:
            for number in set(right) - self._unindexed:
                self._index.add(self._paths[number], self._fingerprint(number))
            self._index.save()
        return NpzTextEntries(self._paths, right)

    def _inspect(self, number: int) -> CacheCheck:
        check = self._inspect_file(number, self._paths[number])
        if usable(check) or self._beside is self._paths:
            self._is_beside[number] = False
            return check
        found = self._inspect_file(number, self._beside[number])
        self._is_beside[number] = usable(found)
        return found if usable(found) else check

    def _use_files_beside(self, checks: Sequence[CacheCheck]) -> None:
        """Take what was found beside the images from there; what other ranks looked at is asked for once more."""
        for number in [number for number, check in enumerate(checks) if usable(check)]:
            is_beside = self._is_beside.get(number)
            if is_beside is None:
                is_beside = not usable(self._inspect_file(number, self._paths[number]))
            if is_beside:
                self._paths[number] = self._beside[number]
                self._unindexed.add(number)

    def _inspect_file(self, number: int, path: Path) -> CacheCheck:
        if self._options.skip_check:
            return CacheCheck("valid" if path.exists() else "missing")
        expected = self._fingerprint(number)
        if self._index.confirms(path, expected):
            return CacheCheck("valid")
        return text_cache.inspect(path, expected, num_tokens=self._options.max_token_length + 2)

    def _fingerprint(self, number: int) -> str:
        return fingerprint.text_fingerprint(
            caption=self._captions[number],
            text_encoder_id=self._options.text_encoder_id,
            max_token_length=self._options.max_token_length,
            weighted=self._options.weighted,
        )
