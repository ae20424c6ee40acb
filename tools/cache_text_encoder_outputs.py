"""Encode all captions of a data set once: `python tools/cache_text_encoder_outputs.py --config_file run.toml`.

Also under `accelerate launch`, and on several CPU processes `torchrun --nproc_per_node 2`. Takes the trainer's file
and flags, goes on where it was stopped, and rebuilds only entries that no longer fit.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.cli import parse
from library.errors import entry_point
from library.log import current_rank, setup_logging


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the settings (before torch is imported), fill the cache, print the figures; returns the exit code."""
    cfg = parse("cache_text_encoder_outputs", argv)
    setup_logging(cfg.loop.console_log_level or "INFO", cfg.loop.console_log_file, cfg.loop.console_log_simple)
    from library.inference.cache_tools import cache_text_encoder_outputs

    report = cache_text_encoder_outputs(cfg)
    if current_rank() == 0:
        print(report.line(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
