"""Rules about timesteps and the loss."""

from __future__ import annotations

from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("min_timestep", "max_timestep")
def timesteps_are_left(cfg: RunConfig) -> list[Problem]:
    """Timesteps are drawn from [min_timestep, max_timestep)."""
    if cfg.diffusion.min_timestep < cfg.diffusion.max_timestep:
        return []
    return conflict(
        cfg,
        "min_timestep must be below max_timestep: no timestep is left to draw",
        "min_timestep",
        "max_timestep",
        fix="timesteps are drawn from min_timestep up to, not including, max_timestep",
    )


@rule("timestep_bias_strategy", "timestep_bias_begin", "timestep_bias_end", "timestep_bias_portion")
def bias_has_timesteps(cfg: RunConfig) -> list[Problem]:
    """A bias favours some of the timesteps that are drawn, and not all of them."""
    chosen = cfg.diffusion
    if chosen.timestep_bias_strategy == "none" or chosen.min_timestep >= chosen.max_timestep:
        return []
    count = int(chosen.timestep_bias_portion * 1000)
    favoured = {
        "earlier": range(count),
        "later": range(1000 - count, 1000),
        "range": range(chosen.timestep_bias_begin, chosen.timestep_bias_end),
    }[chosen.timestep_bias_strategy]
    drawn = range(chosen.min_timestep, chosen.max_timestep)
    both = range(max(favoured.start, drawn.start), min(favoured.stop, drawn.stop))
    if 0 < len(both) < len(drawn):
        return []
    named = ("begin", "end") if chosen.timestep_bias_strategy == "range" else ("portion",)
    how_many = "all" if both else "none"
    return conflict(
        cfg,
        f"timestep_bias_strategy {chosen.timestep_bias_strategy} has no effect: it favours {how_many} of the timesteps "
        f"{drawn.start} to {drawn.stop - 1} that are drawn",
        "timestep_bias_strategy",
        *(f"timestep_bias_{name}" for name in named),
        fix="name a part of the timesteps from min_timestep up to max_timestep",
    )


@rule("adaptive_noise_scale", "noise_offset")
def adaptive_scale_has_an_offset(cfg: RunConfig) -> list[Problem]:
    """adaptive_noise_scale changes noise_offset."""
    if not cfg.diffusion.adaptive_noise_scale or cfg.diffusion.noise_offset:
        return []
    return conflict(
        cfg,
        "adaptive_noise_scale needs noise_offset",
        "adaptive_noise_scale",
        fix="set noise_offset, the strength that it starts from, or leave adaptive_noise_scale out",
    )


@rule("min_snr_gamma", "soft_min_snr_gamma", "p2_gamma")
def one_weighting(cfg: RunConfig) -> list[Problem]:
    """Three forms of one idea: how much the clean latent's error counts at each signal-to-noise ratio."""
    named = [name for name in ("min_snr_gamma", "soft_min_snr_gamma", "p2_gamma") if cfg.get(name)]
    if len(named) < 2:
        return []
    return conflict(
        cfg, f"{' and '.join(named)} are different weightings of the timesteps", *named, fix="keep one of them"
    )


@rule("v_pred_like_loss", "v_parameterization")
def v_like_loss_is_for_noise(cfg: RunConfig) -> list[Problem]:
    """A v-prediction model has the loss of v already."""
    if not (cfg.diffusion.v_pred_like_loss and cfg.model.v_parameterization):
        return []
    return conflict(
        cfg,
        "v_pred_like_loss is for a model that predicts noise",
        "v_pred_like_loss",
        "v_parameterization",
        fix="leave v_pred_like_loss out",
    )
