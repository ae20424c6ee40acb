"""Train new words for SDXL's prompts: `accelerate launch sdxl_train_textual_inversion.py --config_file run.toml`."""

from __future__ import annotations

import sys

from library.config.cli import parse
from library.errors import entry_point
from library.log import setup_logging
from library.models.token_names import problems_in


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the settings (before torch is imported), then train; returns the exit code."""
    cfg = parse("sdxl_train_textual_inversion", argv, checks=[problems_in])
    setup_logging(cfg.loop.console_log_level or "INFO", cfg.loop.console_log_file, simple=cfg.loop.console_log_simple)
    if cfg.data.debug_dataset:
        from library.inference.dataset_report import debug_dataset

        debug_dataset(cfg)
        return 0
    from library.training.launch import train
    from library.training.trainables.textual_inversion import TextualInversionTrainable

    train(cfg, TextualInversionTrainable(cfg))
    return 0


if __name__ == "__main__":
    sys.exit(main())
