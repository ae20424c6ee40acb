"""Rules about the network."""

from __future__ import annotations

from library.config.fields import NETWORK
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("network_train_unet_only", "network_train_text_encoder_only", runs=NETWORK)
def something_is_trained(cfg: RunConfig) -> list[Problem]:
    """The two restrictions exclude each other."""
    if not (cfg.network.network_train_unet_only and cfg.network.network_train_text_encoder_only):
        return []
    return conflict(
        cfg,
        "network_train_unet_only and network_train_text_encoder_only leave nothing to train",
        "network_train_unet_only",
        "network_train_text_encoder_only",
        fix="keep one of them, or none to train both",
    )


@rule("dim_from_weights", "network_weights", runs=NETWORK)
def ranks_come_from_a_file(cfg: RunConfig) -> list[Problem]:
    """dim_from_weights reads network_weights."""
    if not cfg.network.dim_from_weights or cfg.network.network_weights:
        return []
    return conflict(
        cfg, "dim_from_weights needs network_weights", "dim_from_weights", fix="name the file that holds the ranks"
    )
