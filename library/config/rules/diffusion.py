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
