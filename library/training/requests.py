"""Wishes to a running training: files that a user touches in the output folder."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SAVE, SAMPLE, STOP = "save_now", "sample_now", "stop_now"
NAMES = (SAVE, SAMPLE, STOP)


@dataclass
class RequestFiles:
    """Looks for the files in `folder`, at most once in `pause` seconds; only the main process has one.

    A file is removed by `done`, once its wish is fulfilled, so that whoever made it sees when that is.
    """

    folder: Path
    pause: float = 1.0
    now: Callable[[], float] = time.monotonic
    _next: float = field(default=float("-inf"))

    def poll(self) -> frozenset[str]:
        """The names of the files that are there."""
        if self.now() < self._next:
            return frozenset()
        self._next = self.now() + self.pause
        return frozenset(name for name in NAMES if (self.folder / name).exists())

    def done(self, names: frozenset[str]) -> None:
        """Remove the files of fulfilled wishes."""
        for name in names:
            (self.folder / name).unlink(missing_ok=True)

    def forget(self) -> frozenset[str]:
        """Remove what an earlier run left unanswered; returns the names."""
        left = frozenset(name for name in NAMES if (self.folder / name).exists())
        self.done(left)
        return left
