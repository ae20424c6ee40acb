"""Logging that knows about ranks: rank 0 speaks, the others only warn."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

_MARK = "_sdxl_suite_handler"

# On a CPU it warns, when diffusers imports it, that a 4-bit kernel is missing which nothing here uses.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def get_logger(name: str) -> logging.Logger:
    """The logger of a module; usage: `log = get_logger(__name__)`."""
    return logging.getLogger(name)


class Console:
    """Standard error for progress bars: whoever reads it may have gone (`... | head`), which must not end a run."""

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(BrokenPipeError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


def current_rank() -> int:
    """This process's rank from the environment that `accelerate launch` and `torchrun` set; 0 outside of them."""
    for variable in ("RANK", "LOCAL_RANK"):
        value = os.environ.get(variable, "")
        if value.lstrip("-").isdigit():
            return max(0, int(value))
    return 0


def setup_logging(level: str = "INFO", file: str | None = None, simple: bool = True) -> None:
    """Send log lines of `level` and above to stderr, or to `file` (overwritten) instead.

    `simple` leaves out time and level. Ranks other than 0 only emit warnings, marked with their rank, and write to a
    file of their own (`<file>.rank1`). Calling it again replaces the earlier set-up; foreign handlers stay.
    """
    rank = current_rank()
    handler = _handler(file, rank)
    setattr(handler, _MARK, True)
    mark = f"[rank {rank}] " if rank else ""
    handler.setFormatter(_Formatter("%(message)s" if simple else "%(asctime)s %(levelname)s %(message)s", mark))
    threshold = logging.getLevelNamesMapping()[level]
    handler.setLevel(max(threshold, logging.WARNING) if rank else threshold)
    root = logging.getLogger()
    for old in [h for h in root.handlers if hasattr(h, _MARK)]:
        root.removeHandler(old)
        old.close()
    root.addHandler(handler)
    root.setLevel(threshold)


def _handler(file: str | None, rank: int) -> logging.Handler:
    if file is None:
        return logging.StreamHandler(sys.stderr)
    path = Path(file if rank == 0 else f"{file}.rank{rank}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return logging.FileHandler(path, mode="w", encoding="utf-8", delay=True)


class _Formatter(logging.Formatter):
    """Puts the rank in front, and the level in front of simple lines that warn."""

    def __init__(self, fmt: str, mark: str) -> None:
        super().__init__(fmt, datefmt="%H:%M:%S")
        self._mark = mark
        self._shows_level = "%(levelname)s" in fmt

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno >= logging.WARNING and not self._shows_level:
            text = f"{record.levelname.lower()}: {text}"
        return self._mark + text
