"""Rules about the model."""

from __future__ import annotations

from library.config.fields import GENERATOR, SHARED, TRAINER
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("pretrained_model_name_or_path", runs=SHARED)
def model_is_named(cfg: RunConfig) -> list[Problem]:
    """A run needs a base model."""
    if cfg.model.pretrained_model_name_or_path:
        return []
    fix = "name a checkpoint file, a diffusers folder, a hub id, or `tiny`, the small model that comes with the suite"
    return [Problem("pretrained_model_name_or_path is missing", fix=fix)]


@rule("prediction_type", "v_parameterization", runs=TRAINER | GENERATOR)
def one_prediction_type(cfg: RunConfig) -> list[Problem]:
    """v_parameterization is another way to name the prediction type."""
    if not cfg.get("v_parameterization") or cfg.get("prediction_type") in (None, "v_prediction"):
        return []
    return conflict(
        cfg,
        "prediction_type and v_parameterization name two prediction types",
        "prediction_type",
        "v_parameterization",
        fix="keep one: v_parameterization is the same as prediction_type v_prediction",
    )


@rule("prediction_type", "zero_terminal_snr", runs=TRAINER | GENERATOR)
def flow_has_no_terminal_snr(cfg: RunConfig) -> list[Problem]:
    """Rectified flow ends in noise by itself."""
    if not cfg.get("zero_terminal_snr") or cfg.get("prediction_type") != "rectified_flow":
        return []
    return conflict(
        cfg,
        "zero_terminal_snr cannot act on rectified flow, which ends in pure noise by itself",
        "zero_terminal_snr",
        "prediction_type",
        fix="remove zero_terminal_snr",
    )


@rule("flow_shift", "prediction_type", "v_parameterization", runs=TRAINER | GENERATOR)
def only_flow_is_shifted(cfg: RunConfig) -> list[Problem]:
    """flow_shift belongs to rectified flow; a checkpoint that turns out to be another is refused later."""
    asked = "v_prediction" if cfg.get("v_parameterization") else cfg.get("prediction_type")
    if cfg.get("flow_shift") is None or asked in (None, "rectified_flow"):
        return []
    return conflict(
        cfg,
        f"flow_shift acts on rectified flow only, not on {asked}",
        "flow_shift",
        fix="remove flow_shift, or set prediction_type to rectified_flow",
    )
