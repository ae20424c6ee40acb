"""What the caches of latents and of encoded text share: targets, shares of the ranks, and the report.

The ranks split both parts of a pass: looking at existing files (file i by rank i mod world) and encoding (chunk i
by rank i mod world). Chunks are cut before they are dealt out, so a file holds the same bits on any number of ranks.
After each part the ranks exchange what they found, which is also the barrier between them; entries kept in memory
are exchanged in the same way, so every rank ends with all of them.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch.distributed

from library.data.progress import progress_bar
from library.data.records import Skipped
from library.io.latent_cache import CacheCheck

T = TypeVar("T")

FILE_CHECKERS = 8
"""Threads that look at existing cache files."""

PATIENCE = timedelta(days=1)
"""How long ranks wait for one that has more to encode; the usual half hour is too short for a large cache."""

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


@dataclass(frozen=True)
class Targets:
    """The distinct entries to be had.

    `first` (int64) holds for each the row or image that stands for it, ascending; `number_of` (int64) for each row
    or image the number of its entry, -1 for those that are not used.
    """

    first: np.ndarray
    number_of: np.ndarray

    def __len__(self) -> int:
        return len(self.first)


def group_targets(members: np.ndarray, identities: Sequence[np.ndarray], *, total: int) -> Targets:
    """One target for all members (numbers below `total`, ascending) whose identities, one value per column, agree."""
    first, group = groups_of(identities)
    order = np.argsort(first)
    rank_of = np.empty_like(order)
    rank_of[order] = np.arange(len(order))
    number_of = np.full(total, -1, dtype=np.int64)
    number_of[members] = rank_of[group]
    return Targets(members[first[order]], number_of)


def groups_of(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """The first row of each group of rows that agree in all columns, and the group of each row; both int64.

    Column after column, which takes a third of the time of sorting whole rows and is as exact.
    """
    group = np.zeros(len(columns[0]), dtype=np.int64)
    first = np.zeros(min(len(group), 1), dtype=np.int64)
    for column in columns:
        if not len(column) or (column == column[0]).all():
            continue
        _, codes = np.unique(column, return_inverse=True)
        _, first, group = np.unique(group * len(column) + codes, return_index=True, return_inverse=True)
    return first, group


def inspect_all(
    total: int, inspect: Callable[[int], CacheCheck], *, rank: int, world: int, title: str
) -> list[CacheCheck]:
    """The check of every entry's file, in order; the ranks share the looking and all know the result."""
    mine = range(rank, total, world)
    checks: dict[int, CacheCheck] = {}
    with ThreadPoolExecutor(FILE_CHECKERS) as pool, progress_bar(len(mine), title=title, unit="file", delay=2.0) as bar:
        for number, check in zip(mine, pool.map(inspect, mine), strict=True):
            checks[number] = check
            bar.update()
    for part in exchange(checks):
        checks |= part
    return [checks[number] for number in range(total)]


def usable(check: CacheCheck) -> bool:
    """Whether a cache file can be taken as it is."""
    return check.status in ("valid", "foreign")


def stale_entries(places: Callable[[int], str], checks: Sequence[CacheCheck]) -> list[Stale]:
    """The entries that are there and have to be built again, with what changed; `places` names them."""
    stale = []
    for number, check in enumerate(checks):
        reason = "; ".join(check.reasons)
        if check.status == "broken":
            stale.append(Stale(places(number), f"unreadable ({reason})"))
        elif check.status == "stale":
            stale.append(Stale(places(number), reason))
    return stale


def exchange(mine: T) -> list[T]:
    """What every rank brought, in order of rank; a barrier. Just `[mine]` in a run of one process."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    everything: list[Any] = [None] * torch.distributed.get_world_size()
    # Objects go through the host: NCCL would need room for all of them on every GPU.
    group = _host_group(torch.distributed.group.WORLD) if torch.distributed.get_backend() == "nccl" else None
    torch.distributed.all_gather_object(everything, mine, group=group)
    return everything


def agreed(mine: T) -> T:
    """What the first rank brought."""
    return exchange(mine)[0]


@functools.lru_cache(maxsize=1)
def _host_group(world: object) -> torch.distributed.ProcessGroup:
    """One group of all ranks for the lifetime of their `world`: each one holds sockets and threads."""
    return torch.distributed.new_group(backend="gloo", timeout=PATIENCE)


def chunked(items: Sequence[T], size: int) -> list[Sequence[T]]:
    """Consecutive pieces of at most `size` items."""
    return [items[start : start + size] for start in range(0, len(items), size)]
