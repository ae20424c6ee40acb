"""Show what a run would train on: `python tools/dataset_report.py --dataset_config data.toml --html report.html`.

Takes the trainer's file and flags. Prints buckets, crops, captions and problems; `--json` and `--html` write every
image. Needs no torch; in the data set it writes no more than the index of image sizes that training writes.
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
    """Parse the settings, look at the data, write the report; returns the exit code."""
    cfg = parse("dataset_report", argv)
    setup_logging(cfg.loop.console_log_level or "INFO", cfg.loop.console_log_file, cfg.loop.console_log_simple)
    from library.inference.dataset_report import report_dataset

    report_dataset(cfg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
