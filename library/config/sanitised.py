"""Settings as they may leave the machine: without secrets, and without the folders that names lie in."""

from __future__ import annotations

import re
from typing import Any

from library.config.run_config import SECRETS, RunConfig
from library.config.runs import RUNS

# An absolute path, from its start or after a space, quote or equals sign, up to the next of them.
_ABSOLUTE = re.compile(r"(?<![^\s\"'=,])(?:~|[A-Za-z]:)?[/\\][^\s\"'=,]*")


def sanitised(cfg: RunConfig) -> dict[str, Any]:
    """Every option that is set, by name: no secret, of paths only the last name, in texts no absolute path."""
    options = RUNS[cfg.run].options()
    flat = {name: value for name, value in cfg.flat().items() if name not in SECRETS and value not in (None, ())}
    return {name: _clean(value, is_path=options[name].is_path) for name, value in flat.items()}


def _clean(value: Any, *, is_path: bool) -> Any:
    if isinstance(value, tuple | list):
        cleaned = [_clean(item, is_path=is_path) for item in value]
        return cleaned if type(value) in (tuple, list) else str(value)
    if not isinstance(value, str):
        return value
    return _last_name(value) if is_path else _ABSOLUTE.sub(lambda found: _last_name(found.group()), value)


def _last_name(path: str) -> str:
    """The end of a path; owner/name of a hub repository stays whole."""
    if re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith("."):
        return path
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]
