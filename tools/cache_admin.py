"""Look after the caches of a data set: `python tools/cache_admin.py status --config_file run.toml`.

Commands: status, verify, pack, unpack, clean (which only says what it would do, without --yes). Takes the trainer's
file and flags, so that it knows which entries belong to the data set.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.cli import parse
from library.errors import entry_point
from library.log import setup_logging


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the settings, do what the command says; returns the exit code, 1 when `verify` found something broken."""
    words = sys.argv[1:] if argv is None else argv
    if words and not words[0].startswith("-"):
        words = ["--command", *words]
    cfg = parse("cache_admin", words)
    setup_logging(cfg.loop.console_log_level or "INFO", cfg.loop.console_log_file, cfg.loop.console_log_simple)
    from library.inference.cache_admin import run

    return run(cfg)


if __name__ == "__main__":
    sys.exit(main())
