"""A save that fails is tried again, then reported: a full disk or a lost share must not cost a night of training."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from library.errors import UserError
from library.log import get_logger

log = get_logger(__name__)

# What writing raises: the system, our own explanations of it, and torch.save on a full disk.
_FAILURES = (OSError, UserError, RuntimeError)


@dataclass(frozen=True)
class Attempts:
    """Tries to write, and again after each of `pauses` (seconds; together less than launchers wait for a stop)."""

    pauses: tuple[float, ...] = (1.0, 5.0, 15.0)

    def __call__(self, path: Path, write: Callable[[], None]) -> UserError | None:
        """Do `write`; None when it worked, else why the last try did not. `path` is named."""
        for number, pause in enumerate((*self.pauses, None), start=1):
            try:
                write()
                return None
            except _FAILURES as error:
                failure = error
            if pause is None:
                break
            log.warning(f"saving {path.name} failed ({_reason(failure)}); try {number + 1} in {pause:g} s")
            time.sleep(pause)
        fix = failure.problems[0].fix if isinstance(failure, UserError) else "look at the disk and its permissions"
        return UserError(f"{path.name} could not be saved after {number} tries: {_reason(failure)}", str(path), fix)


def _reason(error: Exception) -> str:
    if isinstance(error, UserError):
        return error.problems[0].what
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
