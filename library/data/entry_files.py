"""Which file holds which entry, when several would have the same one.

The standard name of a cache file says nothing about the bucket, so an image that is used at two resolutions has two
entries for one name (and so have a.png and a.jpg). Every entry therefore has a name of its own besides,
the standard one with a hash of what sets the entry apart behind it. What is there and right is used under either name;
what is built goes to the standard name, unless another entry of the run has that.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

from library.data.caching import agreed, inspect_all, usable
from library.io.latent_cache import CacheCheck

_OWN_NAME = re.compile(r"_[0-9a-f]{8}\.npz$")


def choose_files(
    standard: Sequence[Path],
    own: Callable[[int], Path],
    check: Callable[[int, Path], CacheCheck],
    *,
    taken: Collection[Path] = (),
    rank: int,
    world: int,
    title: str,
) -> tuple[list[Path], list[CacheCheck]]:
    """The file of every entry, all different, and what became of looking at it; equal on every rank.

    `own(number)` is the entry's own name, in the folder of its standard one; `check(number, path)` looks whether a
    file can be used for the entry. A file that can be used is used by one entry, its own name first. Of the others, one
    that has a file of its own name beside a shared standard one keeps it; else the first one that finds the standard
    name free has it. Standard names that are `taken` are never free.
    """
    with_own = agreed(_with_own_file(standard, own))
    own_found = inspect_all(
        len(with_own),
        lambda index: check(with_own[index], own(with_own[index])),
        rank=rank,
        world=world,
        title=f"{title} under names of their own",
    )
    own_checks = dict(zip(with_own, own_found, strict=True))
    rest = [
        number
        for number, path in enumerate(standard)
        if path not in taken and not (number in own_checks and usable(own_checks[number]))
    ]
    found = inspect_all(
        len(rest),
        lambda index: check(rest[index], standard[rest[index]]),
        rank=rank,
        world=world,
        title=title,
    )
    standard_checks = dict(zip(rest, found, strict=True))
    has_standard = _claim(standard, standard_checks, own_checks)
    paths, checks = [], []
    for number, path in enumerate(standard):
        is_standard = number in has_standard
        paths.append(path if is_standard else own(number))
        missing = CacheCheck("missing")
        checks.append(standard_checks[number] if is_standard else own_checks.get(number, missing))
    return paths, checks


def _claim(
    standard: Sequence[Path], standard_checks: Mapping[int, CacheCheck], own_checks: Mapping[int, CacheCheck]
) -> set[int]:
    """The entries that have their standard file; `standard_checks` are of those whose own cannot be used."""
    users = Counter(standard)
    claimed: dict[Path, int] = {}
    for number, result in standard_checks.items():
        if usable(result):
            claimed.setdefault(standard[number], number)
    for number in standard_checks:
        if number not in own_checks or users[standard[number]] == 1:
            claimed.setdefault(standard[number], number)
    return set(claimed.values())


def _with_own_file(standard: Sequence[Path], own: Callable[[int], Path]) -> list[int]:
    """The entries whose own name is taken by a file; folders are listed instead of asked for each name."""
    listed = {folder: _own_names(folder) for folder in {path.parent for path in standard}}
    return [
        number for number, path in enumerate(standard) if (names := listed[path.parent]) and own(number).name in names
    ]


def _own_names(folder: Path) -> frozenset[str]:
    try:
        with os.scandir(folder) as entries:
            return frozenset(entry.name for entry in entries if _OWN_NAME.search(entry.name))
    except OSError:
        return frozenset()
