"""The file of `--log_tracker_config`: arguments for the trackers."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from library.errors import Problem, UserError

TRACKERS = ("tensorboard", "wandb")


def tracker_problem(path: str, *, where: str) -> Problem | None:
    """The problem with the file, if it has one."""
    try:
        read_tracker_file(path, where=where)
    except UserError as error:
        return error.problems[0]
    return None


def read_tracker_file(path: str, *, where: str = "") -> dict[str, dict[str, Any]]:
    """One table per tracker, as keyword arguments of its start. Raises UserError."""
    what = f"log_tracker_config {path}"
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{what} does not exist", where, "name an existing file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{what} cannot be read: {error}", where, "name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{what} is not TOML: {error}", where, "correct the line") from error
    wrong = [name for name, table in content.items() if name not in TRACKERS or not isinstance(table, dict)]
    if wrong:
        fix = "write one table per tracker: [wandb] or [tensorboard], with the arguments of wandb.init or SummaryWriter"
        raise UserError(f"{what}: {wrong[0]} is no table of a tracker", where, fix)
    return content
