"""Looks for damage in the caches of a data set, and removes what is of no use to it any more."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from library.data.cache_survey import Kind, NpzPart, PackedPart, Part, entry_stem, is_entry
from library.data.progress import progress_bar
from library.errors import UserError
from library.io import npz_file
from library.io.packed_maintenance import compact, verify
from library.io.packed_store import PackedStore

_SHAPES = {"latents": 3, "latents_flipped": 3, "hidden_state1": 2, "hidden_state2": 2, "pool2": 1}


class Broken(NamedTuple):
    """An entry, or a piece of a shard, that cannot be used, and why."""

    place: str
    reason: str


@dataclass(frozen=True)
class Removal:
    """What is of no use: npz files, or positions of a packed store and the bytes that compacting it would free."""

    part: Part
    files: tuple[Path, ...] = ()
    positions: np.ndarray | None = None
    num_bytes: int = 0

    @property
    def has_work(self) -> bool:
        """Whether there is anything to remove."""
        return bool(self.files) or self.num_bytes > 0


def find_broken(part: Part) -> list[Broken]:
    """Read everything: checksums, shapes, and whether all numbers are finite."""
    return list(_broken_files(part) if isinstance(part, NpzPart) else _broken_entries(part))


def delete_broken(part: Part, broken: Sequence[Broken]) -> int:
    """Delete the files found broken that are named as entries, or leave broken records out of the packed store.

    Returns how many; a file with another name stays, whoever put it there.
    """
    if isinstance(part, PackedPart):
        if not broken:
            return 0
        store = PackedStore.open(part.store.folder, facts_dtype=part.store.facts_dtype)
        live = store.live()
        bad = _not_finite(store, live) | {position for problem in verify(store) for position in problem.positions}
        compact(store, live[~np.isin(live, list(bad))])
        return len(broken)
    removed = 0
    for item in broken:
        path = Path(item.place)
        if entry_stem(path.name, part.kind) is not None and not path.is_symlink():
            path.unlink(missing_ok=True)
            removed += 1
    return removed


def find_removable(part: Part) -> Removal:
    """Entries that are stale or orphaned; those of other settings stay."""
    if isinstance(part, NpzPart):
        stale = [part.path(number) for number, check in enumerate(part.checks) if check.status == "stale"]
        files = tuple(path for path in (*stale, *part.orphaned) if is_entry(path, part.kind))
        return Removal(part, files=files, num_bytes=sum(path.stat().st_size for path in files))
    positions = np.unique(np.concatenate([part.stale, part.orphaned]))
    freed = part.dead_bytes + int(part.store.sizes(positions).sum())
    return Removal(part, positions=positions, num_bytes=freed)


def remove(removal: Removal) -> None:
    """Do what `find_removable` found."""
    part = removal.part
    if isinstance(part, NpzPart):
        for path in removal.files:
            path.unlink(missing_ok=True)
    elif removal.has_work and removal.positions is not None:
        compact(part.store, np.setdiff1d(part.live, removal.positions))


def _broken_files(part: NpzPart) -> Iterator[Broken]:
    targets = {part.path(number) for number, check in enumerate(part.checks) if check.status != "missing"}
    paths = sorted(targets | {file.path for file in part.files})
    with progress_bar(len(paths), title=f"verifying {part.kind} in npz files", unit="file") as bar:
        for path in paths:
            bar.update()
            try:
                reason = _wrong(npz_file.read_arrays(path), part.kind)
            except npz_file.BrokenArchive as error:
                reason = f"unreadable ({error})"
            if reason:
                yield Broken(str(path), reason)


def _broken_entries(part: PackedPart) -> Iterator[Broken]:
    store = part.store
    total = sum(shard.seen for shard in store.shards)
    with progress_bar(total, title=f"verifying packed {part.kind}", unit="byte") as bar:
        problems = verify(store, progress=lambda done, _: bar.update(done - bar.n))
    for problem in problems:
        yield Broken(f"{store.folder / problem.shard}: {problem.key or f'byte {problem.offset}'}", problem.what)
    lost = {position for problem in problems for position in problem.positions}
    live = part.live[~np.isin(part.live, list(lost))] if lost else part.live
    for position in sorted(_not_finite(store, live)):
        yield Broken(f"{store.folder}: {store.key(position)}", "numbers that are not finite")


def _not_finite(store: PackedStore, positions: np.ndarray) -> set[int]:
    found = set()
    for position in positions.tolist():
        try:
            arrays = store.read(position)
        except UserError:
            continue  # damage of another kind
        if not all(np.isfinite(array).all() for array in arrays.values()):
            found.add(position)
    return found


def _wrong(arrays: dict[str, np.ndarray], kind: Kind) -> str:
    """Why these arrays are no entry; empty when they are."""
    required = (
        ("latents", "original_size", "crop_ltrb") if kind == "latents" else ("hidden_state1", "hidden_state2", "pool2")
    )
    for key in required:
        if key not in arrays:
            return f"no {key}"
    for key, axes in _SHAPES.items():
        if key in arrays and arrays[key].ndim != axes:
            return f"{key} has {arrays[key].ndim} dimensions"
        if key in arrays and not np.isfinite(arrays[key]).all():
            return f"{key} has numbers that are not finite"
    if "latents_flipped" in arrays and arrays["latents_flipped"].shape != arrays["latents"].shape:
        return "latents and latents_flipped have different shapes"
    return ""
