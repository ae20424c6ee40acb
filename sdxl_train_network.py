"""Train a LoRA or one of its relatives for SDXL: `accelerate launch sdxl_train_network.py --config_file run.toml`."""

from __future__ import annotations

import sys

from library.config.cli import parse
from library.config.run_config import RunConfig
from library.errors import Problem, entry_point
from library.io import lora_settings
from library.log import setup_logging
from library.models.token_names import problems_in
from networks._args import problems_of


def _network_args(cfg: RunConfig) -> list[Problem]:
    network = cfg.network
    return problems_of(
        network.network_module,
        network.network_kwargs(),
        network.network_dropout,
        network_dim=network.network_dim,
        dim_from_weights=network.dim_from_weights,
    )


@entry_point
def main(argv: list[str] | None = None) -> int:
    """Parse the settings (before torch is imported), then train; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    if lora_settings.asked(words):
        return lora_settings.run(words)
    cfg = parse("sdxl_train_network", argv, checks=[_network_args, problems_in])
    setup_logging(cfg.loop.console_log_level or "INFO", cfg.loop.console_log_file, simple=cfg.loop.console_log_simple)
    if cfg.data.debug_dataset:
        from library.inference.dataset_report import debug_dataset

        debug_dataset(cfg)
        return 0
    from library.training.launch import train
    from library.training.trainables.networks import network_trainable

    train(cfg, network_trainable(cfg))
    return 0


if __name__ == "__main__":
    sys.exit(main())
