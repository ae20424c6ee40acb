"""What lies in the caches of a data set: which entries belong to it, which do not, and which are not what they were.

An entry is *orphaned* when its image or caption is gone; it is *unused* when that is there but the settings at hand
lead to another entry (another resolution, say). Only files that are named as cache entries and hold nothing but what
such entries hold count at all.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from library.data.cache_places import CachePlace, mirrored
from library.data.caching import usable
from library.data.latent_caching import LatentCacheOptions, LatentPass
from library.data.packed_latents import PackedLatents
from library.data.packed_text import PackedText
from library.data.table import ImageTable
from library.data.text_backends import TextCacheOptions
from library.data.text_caching import TextPass
from library.io import npz_file
from library.io.images import IMAGE_EXTENSIONS
from library.io.latent_cache import CacheCheck
from library.io.packed_maintenance import statistics
from library.io.packed_store import PackedStore

Kind = Literal["latents", "text"]

_NAMES: dict[Kind, re.Pattern[str]] = {
    "latents": re.compile(r"(?P<stem>.+)_\d{4,}x\d{4,}_sdxl(_[0-9a-f]{8})?\.npz", re.DOTALL),
    "text": re.compile(r"(?P<stem>.+)_te_outputs(_[0-9a-f]{8})?\.npz", re.DOTALL),
}
_REQUIRED: dict[Kind, frozenset[str]] = {
    "latents": frozenset({"latents", "original_size", "crop_ltrb"}),
    "text": frozenset({"hidden_state1", "hidden_state2", "pool2"}),
}
_ALLOWED: dict[Kind, frozenset[str]] = {
    "latents": frozenset({"latents_flipped", "alpha_mask", "moments", "moments_flipped"}),
    "text": frozenset({"variant_index"}),
}
_OURS = frozenset({"fingerprint", "fingerprint_crc"})
_OF_A_VARIANT = re.compile(r"(hidden_state1|hidden_state2|pool2)_v?\d+")


@dataclass(frozen=True)
class Identity:
    """The models that entries should have been made by; None where nobody named one, so that any will do."""

    vae: str | None = None
    text_encoder: str | None = None


@dataclass(frozen=True)
class EntryFile:
    """A file that is named like a cache entry; `has_image` says whether an image of its stem is in the folder."""

    path: Path
    kind: Kind
    has_image: bool


def entry_stem(name: str, kind: Kind) -> str | None:
    """The stem of the image that a file of this name would be an entry of; None for other names."""
    match = _NAMES[kind].fullmatch(name)
    return match["stem"] if match else None


def is_entry(path: Path, kind: Kind) -> bool:
    """Whether a file is named as an entry and holds what one holds, all of it, and nothing else."""
    if entry_stem(path.name, kind) is None or path.is_symlink():
        return False
    try:
        keys = npz_file.peek(path).shapes.keys()
    except npz_file.BrokenArchive:
        return False
    others = keys - _REQUIRED[kind] - _ALLOWED[kind] - _OURS
    return keys >= _REQUIRED[kind] and all(kind == "text" and _OF_A_VARIANT.fullmatch(key) for key in others)


def entry_files(table: ImageTable, place: CachePlace, kind: Kind) -> list[EntryFile]:
    """The files named like entries in the image folders of the data set and in what mirrors them, by path."""
    found: dict[Path, EntryFile] = {}
    for folder in sorted({os.path.dirname(table.paths.text(image)) for image in range(table.num_images)}):
        names = _names(Path(folder))
        stems = {os.path.splitext(name)[0] for name in names if os.path.splitext(name)[1].lower() in IMAGE_EXTENSIONS}
        where = {Path(folder): names}
        if place.folder is not None:
            mirror = mirrored(Path(folder), place.folder)
            where[mirror] = _names(mirror)
        for here, listed in where.items():
            for name in listed:
                if (stem := entry_stem(name, kind)) is not None:
                    found[here / name] = EntryFile(here / name, kind, stem in stems)
    return [found[path] for path in sorted(found)]


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
    except OSError:
        return []


class NpzPart:
    """The npz files of one kind: `checks` by number of the pass's targets, and files that are none of these."""

    store = "npz"

    def __init__(self, work: LatentPass | TextPass, kind: Kind, place: CachePlace, *, forgiven: str) -> None:
        """`forgiven` is a reason for being stale that does not count: it is not known which model is right."""
        self.work, self.kind = work, kind
        table = work.table
        self.checks = [_without(check, forgiven) for check in work.backend.look(rank=0, world=1)]
        self.files = entry_files(table, place, kind)
        own = {self.path(number) for number in range(len(self.checks))}
        rest = [file for file in self.files if file.path not in own]
        self.orphaned = [file.path for file in rest if not file.has_image]
        self.unused = [file.path for file in rest if file.has_image]

    def path(self, number: int) -> Path:
        """The file of a target."""
        return Path(self.work.backend.place(number))

    @property
    def num_bytes(self) -> int:
        """Bytes of all files, those of other settings included."""
        paths = {file.path for file in self.files}
        paths |= {self.path(number) for number, check in enumerate(self.checks) if check.status != "missing"}
        return sum(path.stat().st_size for path in paths if path.exists())

    @property
    def dead_bytes(self) -> int:
        """Nothing is kept twice."""
        return 0


def _belongs(work: LatentPass | TextPass) -> Callable[[str], bool]:
    """Whether the key of an entry is that of a caption or image of the data set, or of an image in another folder.

    An image whose file is there counts, though a scan may leave it out today (for a missing mask, say).
    """
    if isinstance(work, TextPass):
        captions = {*map(work.text, range(len(work.targets))), ""}
        return captions.__contains__
    table = work.table
    keys = {table.keys.text(image) for image in range(table.num_images)}
    roots: dict[str, set[str]] = {}
    for image in range(table.num_images):
        folder, name = _parts(table.keys.text(image))
        if table.paths.text(image).endswith(name):
            roots.setdefault(folder, set()).add(table.paths.text(image).removesuffix(name))

    def belongs(key: str) -> bool:
        folder, name = _parts(key)
        return key in keys or folder not in roots or any(os.path.exists(root + name) for root in roots[folder])

    return belongs


def _parts(key: str) -> tuple[str, str]:
    """The folder of a key, and the name of the file in it without the number of a second use."""
    folder, _, name = key.partition("/")
    return folder, re.sub(r"#\d+$", "", name)


class PackedPart:
    """The packed store of one kind: `checks` by number of the pass's targets, and positions of other entries."""

    def __init__(self, work: LatentPass | TextPass, kind: Kind) -> None:
        assert isinstance(work.backend, PackedLatents | PackedText)
        self.work, self.kind, self.packed = work, kind, work.backend
        self.store: PackedStore = work.backend.store
        self.checks = work.backend.look(rank=0, world=1)
        live = self.store.live()
        ids = self.store.column("id", live)
        own = np.isin(ids, work.backend.ids)
        if isinstance(work.backend, PackedText):
            own |= ids == work.backend.empty_id
        rest = live[~own]
        belongs = _belongs(work)
        is_there = np.array([belongs(self.store.key(position)) for position in rest.tolist()], dtype=bool)
        self.live, self.unused, self.orphaned = live, rest[is_there], rest[~is_there]

    @property
    def stale(self) -> np.ndarray:
        """Positions of the targets' entries that would be built again (int64)."""
        numbers = [n for n, check in enumerate(self.checks) if check.status == "stale"]
        found = self.store.find(self.packed.ids[numbers])
        return found[found >= 0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all shards."""
        return statistics(self.store).bytes

    @property
    def dead_bytes(self) -> int:
        """Bytes of replaced records, which a compaction frees."""
        return statistics(self.store).dead_bytes


Part = NpzPart | PackedPart


class Survey:
    """The caches of a data set: parts are looked at when they are asked for."""

    def __init__(
        self,
        table: ImageTable,
        *,
        npz: CachePlace,
        packed: CachePlace,
        models: Identity,
        max_token_length: int,
        weighted: bool,
    ) -> None:
        self.table, self.npz, self.packed, self.models = table, npz, packed, models
        self.max_token_length, self.weighted = max_token_length, weighted

    def npz_part(self, kind: Kind) -> NpzPart:
        """The npz files of one kind."""
        named = self.models.vae if kind == "latents" else self.models.text_encoder
        model = "VAE" if kind == "latents" else "text encoder"
        forgiven = "" if named else f"{model} changed"
        return NpzPart(self._pass(kind, self.npz), kind, self.npz, forgiven=forgiven)

    def packed_part(self, kind: Kind) -> PackedPart:
        """The packed store of one kind."""
        return PackedPart(self._pass(kind, self.packed), kind)

    def parts(self, kinds: Sequence[Kind]) -> list[Part]:
        """Every part of these kinds."""
        makers: tuple[Callable[[Kind], Part], ...] = (self.npz_part, self.packed_part)
        return [make(kind) for kind in kinds for make in makers]

    def _pass(self, kind: Kind, place: CachePlace) -> LatentPass | TextPass:
        if kind == "latents":
            return LatentPass(self.table, LatentCacheOptions(self.models.vae or "", to_disk=True, place=place))
        encoder = self.models.text_encoder or ""
        options = TextCacheOptions(encoder, 0, self.max_token_length, self.weighted, to_disk=True, place=place)
        return TextPass(self.table, options)


def counts(part: Part) -> Counter[str]:
    """How many targets have which status."""
    return Counter(check.status for check in part.checks)


def usable_numbers(part: Part) -> list[int]:
    """Targets whose entry can be used as it is."""
    return [number for number, check in enumerate(part.checks) if usable(check)]


def _without(check: CacheCheck, reason: str) -> CacheCheck:
    """A check without one of the reasons why an entry is stale."""
    if check.status != "stale" or reason not in check.reasons:
        return check
    others = tuple(other for other in check.reasons if other != reason)
    return CacheCheck("stale", others) if others else check._replace(status="valid", reasons=())
