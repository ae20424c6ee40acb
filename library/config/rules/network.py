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


@rule("base_weights", "base_weights_multiplier", runs=NETWORK)
def strengths_belong_to_files(cfg: RunConfig) -> list[Problem]:
    """Every value of base_weights_multiplier is the strength of a file."""
    if len(cfg.network.base_weights_multiplier) <= len(cfg.network.base_weights):
        return []
    return conflict(
        cfg,
        "base_weights_multiplier has more values than base_weights has files",
        "base_weights_multiplier",
        "base_weights",
        fix="remove some",
    )


@rule("scale_weight_norms", "network_module", "optimizer_type", runs=NETWORK)
def norms_can_be_limited(cfg: RunConfig) -> list[Problem]:
    """A norm of the addition exists for the LoRA family, and the optimizer must not keep a copy of the weights."""
    if not cfg.network.scale_weight_norms:
        return []
    if _kind(cfg) == "oft":
        return conflict(
            cfg,
            "scale_weight_norms has no meaning for networks.oft, which turns weights and keeps their norms",
            "scale_weight_norms",
            "network_module",
            fix="remove it; network_alpha bounds the rotation",
        )
    if cfg.optim.is_schedule_free:
        return conflict(
            cfg,
            f"scale_weight_norms cannot be used with {cfg.optim.optimizer_type}, which keeps averages of the weights",
            "scale_weight_norms",
            "optimizer_type",
            fix="remove it, or use an optimizer with a schedule",
        )
    return []


@rule("network_module", "network_train_text_encoder_only", runs=NETWORK)
def oft_is_for_the_unet(cfg: RunConfig) -> list[Problem]:
    """OFT adapts the U-Net only."""
    if _kind(cfg) != "oft" or not cfg.network.network_train_text_encoder_only:
        return []
    return conflict(
        cfg,
        "networks.oft adapts the U-Net only",
        "network_train_text_encoder_only",
        "network_module",
        fix="remove network_train_text_encoder_only, or use another kind",
    )


@rule("network_module", "fp8_base", "fp8_base_unet", runs=NETWORK)
def dora_reads_the_base(cfg: RunConfig) -> list[Problem]:
    """DoRA needs the norms of the base's weights, which float8 storage hides behind its scales."""
    if _kind(cfg) != "dora" or not (cfg.frozen.fp8_base or cfg.frozen.fp8_base_unet):
        return []
    name = "fp8_base" if cfg.frozen.fp8_base else "fp8_base_unet"
    return conflict(
        cfg, f"networks.dora cannot be used with {name}", name, "network_module", fix="remove it, or use networks.lora"
    )


@rule("network_args", "optimizer_type", runs=NETWORK)
def one_rate_for_all_modules(cfg: RunConfig) -> list[Problem]:
    """D-Adaptation and Prodigy estimate one step size for everything, so modules cannot have rates of their own."""
    if not cfg.optim.estimates_rate or cfg.optim.optimizer_type.endswith("ProdigyPlusScheduleFree"):
        return []
    given = cfg.network.network_kwargs()
    several = [key for key in given if key.startswith("loraplus_") or key.endswith("_lr_weight")]
    several += [key for key in given if key == "target_rules" and "lr=" in given[key]]
    if not several:
        return []
    return conflict(
        cfg,
        f"{cfg.optim.optimizer_type} takes one learning rate for everything that trains, {several[0]} makes several",
        "network_args",
        "optimizer_type",
        fix=f"remove {several[0]}, or use another optimizer",
    )


def _kind(cfg: RunConfig) -> str:
    """The file of networks/ that is trained; other modules keep their dots."""
    return (cfg.network.network_module or "").removeprefix("networks.")
