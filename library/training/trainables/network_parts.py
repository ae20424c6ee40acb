"""Which parts a network trains, and at which rates. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from library.config.cli import RunConfig
    from library.training.trainable import Part


def network_parts(cfg: RunConfig) -> tuple[Part, ...]:
    """The parts that a network is made for, text encoders first."""
    if cfg.network.network_train_unet_only:
        return ("unet",)
    if cfg.network.network_train_text_encoder_only:
        return ("te1", "te2")
    return ("te1", "te2", "unet")


def part_rate(cfg: RunConfig, part: Part) -> float:
    """The learning rate in force for a part: its own, else `--learning_rate`."""
    settings, default = cfg.network, cfg.optim.learning_rate
    if part == "unet":
        return default if settings.unet_lr is None else settings.unet_lr
    rates = settings.text_encoder_lr or [default]
    return rates[0] if part == "te1" else rates[-1]
