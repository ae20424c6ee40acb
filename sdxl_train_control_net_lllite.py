"""Train a ControlNet-LLLite for SDXL: `accelerate launch sdxl_train_control_net_lllite.py --config_file run.toml`."""

from __future__ import annotations

import sys

from library.config.cli import parse
from library.errors import entry_point
from library.log import setup_logging


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the settings (before torch is imported), then train; returns the exit code."""
    cfg = parse("sdxl_train_control_net_lllite", argv)
    setup_logging(cfg.loop.console_log_level or "INFO", cfg.loop.console_log_file, simple=cfg.loop.console_log_simple)
    if cfg.data.debug_dataset:
        from library.inference.dataset_report import debug_dataset

        debug_dataset(cfg)
        return 0
    from library.training.launch import train
    from library.training.trainables.lllite import LlliteTrainable

    train(cfg, LlliteTrainable(cfg))
    return 0


if __name__ == "__main__":
    sys.exit(main())
