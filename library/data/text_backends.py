"""Where a pass over the captions keeps their encodings: in memory, or as sd-scripts' npz files beside the images."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from library.data.cache_places import BESIDE_THE_IMAGES, CachePlace, require_writable
from library.data.entry_places import EntryPaths, EntryPlaces, Seen
from library.data.stores import TextEntries, text_row
from library.data.table import text_id
from library.data.text_targets import TextTargets
from library.diffusion.conditioning import TextCond
from library.io import fingerprint, text_cache
from library.io.latent_cache import CacheCheck
from library.io.text_cache import TextEntry


@dataclass(frozen=True)
class TextCacheOptions:
    """How to cache: `batch_size` captions per call; `width_1` is the first encoder's share of the text width.

    The rest says what an entry depends on besides its caption; with `skip_check` old files may be made from something
    else; `place` is where entries on disk lie. `num_variants` wordings are kept of captions that have more than one.
    """

    text_encoder_id: str
    width_1: int
    max_token_length: int = 75
    weighted: bool = False
    to_disk: bool = False
    batch_size: int = 8
    skip_check: bool = False
    place: CachePlace = BESIDE_THE_IMAGES
    num_variants: int = 1


class TextBackend(Protocol):
    """One kind of cache during a pass; entries go by the numbers of the pass's targets."""

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """What is there of every entry; the ranks share the looking."""

    def place(self, number: int) -> str:
        """Where an entry lies, in words for the log."""

    def prepare(self, numbers: Sequence[int]) -> None:
        """Called before entries are made, with their numbers; raises UserError when they could not be kept."""

    def put(self, number: int, rows: TextCond) -> None:
        """Keep an entry: a batch on the CPU of its distinct wordings, in the order in which they first come."""

    def share(self) -> Any:
        """What other ranks have to know to read what this rank has put; can be pickled."""

    def entries(self, shared: Sequence[Any], *, right: Sequence[int], rank: int) -> TextEntries:
        """All entries, given what every rank shares and the numbers of those known to be right now."""


class MemoryText:
    """Keeps entries of one wording as they are, in float32."""

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

    def put(self, number: int, rows: TextCond) -> None:
        """Keep an entry."""
        assert len(rows) == 1
        self._entries[number] = TextCond(rows.hidden_BTD.float().clone(), rows.pooled_BP.float().clone())

    def share(self) -> Mapping[int, TextCond]:
        """The entries themselves."""
        return self._entries

    def entries(self, shared: Sequence[Mapping[int, TextCond]], *, right: Sequence[int], rank: int) -> MemoryText:
        """This object, with the entries of every rank."""
        for part in shared:
            self._entries |= part
        return self

    def read(self, number: int, variant: int) -> TextCond:
        """One entry."""
        return self._entries[number]

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are there."""
        return np.fromiter((number in self._entries for number in numbers.tolist()), bool, len(numbers))


class NpzTextEntries:
    """Entries in files, read as float32."""

    in_memory = False

    def __init__(self, paths: EntryPaths, numbers: np.ndarray) -> None:
        self._paths = paths
        self._is_there = np.zeros(len(paths), dtype=bool)
        self._is_there[numbers] = True

    def read(self, number: int, variant: int) -> TextCond:
        """One wording of an entry."""
        return text_row(text_cache.read(self._paths[number], variant))

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which of them are known to be right."""
        return self._is_there[numbers]


class NpzText:
    """Keeps every entry, all wordings of a caption, in a file of sd-scripts' format."""

    def __init__(self, targets: TextTargets, options: TextCacheOptions) -> None:
        self._targets, self._options = targets, options
        table, images = targets.wordings.table, targets.images
        assert targets.list_ids is not None, "a file holds all wordings of a caption"
        recipe = f"{options.text_encoder_id}\0{options.max_token_length}\0{options.weighted}"
        self._files = EntryPlaces(
            "text",
            options.place.npz_folders(table.folders),
            folder_of=table.folder_of[images],
            made_from=(
                table.name_ids[images],
                targets.list_ids,
                np.full(len(images), text_id(recipe), dtype=np.uint64),
            ),
        )

    def look(self, *, rank: int, world: int) -> list[CacheCheck]:
        """Ask the folders' indexes first; look for the files that they do not know, and open them."""
        rest = self._files.confirm(rank=rank)
        paths = self._targets.wordings.table.paths
        beside = [text_cache.text_cache_path(paths.text(self._targets.image(number))) for number in rest.tolist()]
        place = self._options.place
        return self._files.find(
            list(map(place.npz_path, beside)),
            self._own_path,
            self._inspect,
            beside=None if place.folder is None else beside,
            rank=rank,
            world=world,
            title="checking captions",
        )

    def place(self, number: int) -> str:
        """Its file."""
        return self._files.paths[number]

    def prepare(self, numbers: Sequence[int]) -> None:
        """Find out whether the folders can be written to."""
        require_writable({Path(self._files.paths[number]).parent for number in numbers})

    def put(self, number: int, rows: TextCond) -> None:
        """Write its file."""
        width = self._options.width_1
        first, *others = (
            TextEntry(hidden[:, :width], hidden[:, width:], pooled)
            for hidden, pooled in zip(rows.hidden_BTD, rows.pooled_BP, strict=True)
        )
        ids = self._targets.ids(number)
        row_of = {caption: row for row, caption in enumerate(dict.fromkeys(ids))}
        variant_index = [row_of[caption] for caption in ids] if len(ids) > 1 else []
        path, made_from = self._files.paths[number], self._fingerprint(number)
        text_cache.write(path, first, made_from, others=others, variant_index=variant_index)
        self._files.see(number)

    def share(self) -> Seen:
        """The files' sizes and times, for the indexes."""
        return self._files.seen()

    def entries(self, shared: Sequence[Seen], *, right: Sequence[int], rank: int) -> NpzTextEntries:
        """The files; the first rank notes in the folders' indexes which are right."""
        numbers = np.asarray(right, dtype=np.int64)
        if rank == 0 and not self._options.skip_check:
            self._files.note(shared, numbers)
        return NpzTextEntries(self._files.paths, numbers)

    def _own_path(self, number: int, standard: Path) -> Path:
        digest = hashlib.blake2b(repr(self._targets.texts(number)).encode(), digest_size=4).hexdigest()
        return standard.with_name(f"{standard.stem}_{digest}{standard.suffix}")

    def _inspect(self, number: int, path: str) -> CacheCheck:
        count, num_tokens = len(self._targets.ids(number)), self._options.max_token_length + 2
        if self._options.skip_check:
            return text_cache.inspect_contents(path, num_tokens=num_tokens, variants=count)
        return text_cache.inspect(path, self._fingerprint(number), num_tokens=num_tokens, variants=count)

    def _fingerprint(self, number: int) -> str:
        options, ids = self._options, self._targets.ids(number)
        if len(ids) > 1:
            return fingerprint.variants_fingerprint(
                caption_ids=ids,
                text_encoder_id=options.text_encoder_id,
                max_token_length=options.max_token_length,
                weighted=options.weighted,
            )
        return fingerprint.text_fingerprint(
            caption=self._targets.texts(number)[0],
            text_encoder_id=options.text_encoder_id,
            max_token_length=options.max_token_length,
            weighted=options.weighted,
        )
