"""Encodes every distinct caption once and keeps the result: in memory, as sd-scripts' npz files, or in a packed cache.

What is encoded is the caption with its prefix and suffix, the same on each visit; of a caption that is shuffled,
thinned out or has wildcards, several variants. The encoding of the empty caption is always at hand, so that caption
dropout works.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from library.data.caching import CacheReport, chunked, exchange, stale_entries, usable
from library.data.captions import has_one_wording
from library.data.packed_text import PackedText
from library.data.progress import progress_bar
from library.data.stores import TextStore
from library.data.table import ImageTable
from library.data.text_backends import MemoryText, NpzText, TextBackend, TextCacheOptions
from library.data.text_targets import TextTargets, Wordings
from library.diffusion.conditioning import TextCond

TextEncoder = Callable[[list[str]], TextCond]
"""Captions -> their encodings, one row each, on the CPU."""


class Built(NamedTuple):
    """What a rank brought about: encoded captions by number, what the others need to read them, and how many."""

    numbers: list[int]
    shared: Any


class Alike(NamedTuple):
    """Entries to build that hold the same wordings, maybe in different order: all are written at once."""

    ids: tuple[int, ...]
    numbers: list[int]


def build_text(
    table: ImageTable,
    encode: TextEncoder,
    *,
    options: TextCacheOptions,
    rank: int = 0,
    world: int = 1,
) -> tuple[TextStore, CacheReport]:
    """Make the encoded captions of the images in use available to every rank and say what had to be done.

    Equal captions are encoded once. The report counts entries: one per image file in npz files, which hold all wordings
    of a caption, one per distinct wording in memory and in a packed cache. Every subset must have one wording, or
    `options` ask for several, and no token warm-up.
    """
    assert options.num_variants > 1 or all(map(has_one_wording, table.subsets)), "a cached caption has one wording"
    work = TextPass(table, options)
    targets, backend = work.targets, work.backend
    checks = backend.look(rank=rank, world=world)
    missing = [number for number, check in enumerate(checks) if not usable(check)]
    backend.prepare(missing)
    if isinstance(backend, PackedText):
        empty = backend.empty(encode, rank=rank)
    else:
        empty = encode([""]).to("cpu", torch.float32)
    mine = _chunks(_alike(targets, missing), options.batch_size)[rank::world]
    parts = exchange(_build(mine, targets, encode, backend, batch_size=options.batch_size))
    reused = [number for number, check in enumerate(checks) if usable(check)]
    built = sorted(number for part in parts for number in part.numbers)
    report = CacheReport(stale=stale_entries(backend.place, checks), built=len(built), reused=len(reused))
    entries = backend.entries([part.shared for part in parts], right=[*reused, *built], rank=rank)
    return TextStore(work.wordings.starts, targets.number_of, entries, empty=empty), report


class TextPass:
    """What a pass works on: the distinct entries, their wordings, and where they are kept."""

    def __init__(self, table: ImageTable, options: TextCacheOptions) -> None:
        self.table = table
        self.wordings = Wordings(
            table,
            num_variants=options.num_variants,
            max_token_length=options.max_token_length,
            weighted=options.weighted,
        )
        is_npz = options.to_disk and options.place.store == "npz"
        self.targets = self.wordings.by_file() if is_npz else self.wordings.by_caption()
        self.backend = self._backend(options)

    def text(self, number: int) -> str:
        """The wording of an entry, the first of several."""
        return self.targets.texts(number)[0]

    def _backend(self, options: TextCacheOptions) -> TextBackend:
        if not options.to_disk:
            return MemoryText(len(self.targets))
        if options.place.store == "npz":
            return NpzText(self.targets, options)
        return PackedText(self.targets.first_ids, self.text, options, folder=options.place.text)


def _alike(targets: TextTargets, numbers: Sequence[int]) -> list[Alike]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        groups.setdefault(tuple(sorted(set(targets.ids(number)))), []).append(number)
    return [Alike(*item) for item in groups.items()]


def _chunks(waiting: Sequence[Alike], batch_size: int) -> list[list[Alike]]:
    """Consecutive groups of at most `batch_size` captions; a group of more is a chunk of its own."""
    chunks: list[list[Alike]] = []
    total = 0
    for alike in waiting:
        total += len(alike.ids)
        if not chunks or total > batch_size:
            chunks.append([])
            total = len(alike.ids)
        chunks[-1].append(alike)
    return chunks


def _build(
    chunks: Sequence[Sequence[Alike]],
    targets: TextTargets,
    encode: TextEncoder,
    backend: TextBackend,
    *,
    batch_size: int,
) -> Built:
    """Encode this rank's captions."""
    numbers: list[int] = []
    if chunks:
        total = sum(len(alike.ids) for chunk in chunks for alike in chunk)
        with progress_bar(total, title="caching captions", unit="caption") as bar:
            for chunk in chunks:
                rows = _encode(chunk, targets, encode, batch_size=batch_size)
                for alike in chunk:
                    for number in alike.numbers:
                        distinct = dict.fromkeys(targets.ids(number))
                        backend.put(number, TextCond.cat([rows[caption] for caption in distinct]))
                        numbers.append(number)
                    bar.update(len(alike.ids))
    return Built(numbers, backend.share())


def _encode(
    chunk: Sequence[Alike], targets: TextTargets, encode: TextEncoder, *, batch_size: int
) -> dict[int, TextCond]:
    """The encodings of all captions of a chunk by their ids, a batch of 1 each."""
    texts: dict[int, str] = {}
    for alike in chunk:
        number = alike.numbers[0]
        texts.update(zip(targets.ids(number), targets.texts(number), strict=True))
    rows: dict[int, TextCond] = {}
    for ids in chunked(list(texts), batch_size):
        encoded = encode([texts[caption] for caption in ids]).to("cpu")
        rows.update({caption: encoded[position : position + 1] for position, caption in enumerate(ids)})
    return rows
