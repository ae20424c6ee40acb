"""What the caches of latents and of encoded text share: targets, shares of the ranks, and the report.

The ranks split both parts of a pass: looking at existing files (file i by rank i mod world) and encoding (chunk i
by rank i mod world). Chunks are cut before they are dealt out, so a file holds the same bits on any number of ranks.
After each part the ranks exchange what they found, which is also the barrier between them; entries kept in memory
are exchanged in the same way, so every rank ends with all of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed

from library.data.progress import progress_bar
from library.data.types import PlacedImage, Skipped
from library.io.latent_cache import CacheCheck

T = TypeVar("T")

FILE_CHECKERS = 8
"""Threads that look at existing cache files."""

LISTED = 5
"""How many failures the log names."""


class Stale(NamedTuple):
    """A cache file that was there and could not be used, and why."""

    path: str
    reason: str


@dataclass
class CacheReport:
    """What a pass did. Every image or caption file is either built, reused or failed; those in `stale` were built
    again (or failed), because what they were made from has changed."""

    built: int = 0
    reused: int = 0
    stale: list[Stale] = field(default_factory=list)
    failed: list[Skipped] = field(default_factory=list)

    def line(self) -> str:
        """The figures in one line."""
        return f"built {self.built}, reused {self.reused}, stale {len(self.stale)}, failed {len(self.failed)}"

    def text(self, what: str) -> str:
        """Lines for the log: the figures, why entries were stale, with counts, and which images failed."""
        reasons = Counter(stale.reason for stale in self.stale)
        lines = [f"{what}: {self.line()}"]
        lines += [f"  stale: {reason} ({count})" for reason, count in reasons.most_common()]
        lines += [f"  failed: {path}: {reason}" for path, reason in self.failed[:LISTED]]
        if len(self.failed) > LISTED:
            lines.append(f"  ... and {len(self.failed) - LISTED} more failed")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Target:
    """One cache entry to be had, and the images (uses of one file, as a rule a single one) that share it."""

    path: Path
    images: tuple[PlacedImage, ...]


def make_targets(
    images: Sequence[PlacedImage],
    *,
    standard_path: Callable[[PlacedImage], Path],
    identity: Callable[[PlacedImage], Hashable],
) -> list[Target]:
    """One target per distinct entry.

    Images of one standard path share the entry when their identity is equal. Otherwise (a.png beside a.jpg, or one
    folder used at two resolutions) the first in order has the standard path, and later ones get one with a hash of
    the identity in it, so that they do not overwrite each other in turn.
    """
    shared: dict[tuple[Path, Hashable], list[PlacedImage]] = {}
    for image in images:
        shared.setdefault((standard_path(image), identity(image)), []).append(image)
    taken: set[Path] = set()
    targets = []
    for (path, what), group in shared.items():
        if path in taken:
            digest = hashlib.blake2b(repr(what).encode(), digest_size=4).hexdigest()
            path = path.with_name(f"{path.stem}_{digest}{path.suffix}")
        taken.add(path)
        targets.append(Target(path, tuple(group)))
    return targets


def inspect_all(
    targets: Sequence[Target],
    inspect: Callable[[Target], CacheCheck],
    *,
    rank: int,
    world: int,
    title: str,
) -> list[CacheCheck]:
    """The check of every target's file, in order; the ranks share the looking and all know the result."""
    mine = range(rank, len(targets), world)
    checks: dict[int, CacheCheck] = {}
    with ThreadPoolExecutor(FILE_CHECKERS) as pool, progress_bar(len(mine), title=title, unit="file", delay=2.0) as bar:
        for index, check in zip(mine, pool.map(lambda i: inspect(targets[i]), mine), strict=True):
            checks[index] = check
            bar.update()
    for part in exchange(checks):
        checks |= part
    return [checks[index] for index in range(len(targets))]


def usable(check: CacheCheck) -> bool:
    """Whether a cache file can be taken as it is."""
    return check.status in ("valid", "foreign")


def stale_entries(targets: Sequence[Target], checks: Sequence[CacheCheck]) -> list[Stale]:
    """The files that are there and have to be built again, with what changed."""
    stale = []
    for target, check in zip(targets, checks, strict=True):
        reason = "; ".join(check.reasons)
        if check.status == "broken":
            stale.append(Stale(str(target.path), f"unreadable ({reason})"))
        elif check.status == "stale":
            stale.append(Stale(str(target.path), reason))
    return stale


def exchange(mine: T) -> list[T]:
    """What every rank brought, in order of rank; a barrier. Just `[mine]` in a run of one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    everything: list[Any] = [None] * torch.distributed.get_world_size()
    # Objects go through the host: NCCL would need room for all of them on every GPU.
    group = torch.distributed.new_group(backend="gloo") if torch.distributed.get_backend() == "nccl" else None
    torch.distributed.all_gather_object(everything, mine, group=group)
    return everything


def chunked(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive pieces of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]
