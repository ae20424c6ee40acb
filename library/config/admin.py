"""Options of the tool that looks after caches."""

from __future__ import annotations

from typing import ClassVar

from library.config.fields import ADMIN, Group, option


class AdminOptions(Group):
    """What to do with the caches of a dataset."""

    title: ClassVar[str] = "what to do"
    acts: ClassVar[frozenset[str]] = ADMIN

    command: str | None = option(
        None,
        "`status` counts entries; `verify` reads all of them; `pack` copies npz files into the packed cache, `unpack` "
        "the other way; `clean` removes what is stale or orphaned. The name may stand first, without --command",
        choices=["status", "verify", "pack", "unpack", "clean"],
    )
    delete_broken: bool = option(False, "verify: delete broken entries, to be built again")
    remove: bool = option(False, "pack: delete npz files when everything in them was found in the packed cache")
    yes: bool = option(False, "clean: do it, and not only say what would be removed")
