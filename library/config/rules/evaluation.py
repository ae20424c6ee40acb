"""Rules about the validation loss and averaged weights."""

from __future__ import annotations

from library.config.evaluation import EmaOptions, ValidationOptions
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem

_SCHEDULE_STEPS = 1000


def _asked(cfg: RunConfig, *names: str) -> list[str]:
    """The options among `names` that the user set to something else than their default."""
    return [name for name in names if cfg.is_given(name) and cfg.get(name) not in (None, False)]


@rule(*ValidationOptions.model_fields, "validation_split", "dataset_config")
def validation_needs_images(cfg: RunConfig) -> list[Problem]:
    """Only a dataset file can hold images out without validation_split."""
    names = _asked(cfg, *ValidationOptions.model_fields)
    if cfg.data.validation_split or cfg.data.dataset_config or not names:
        return []
    what = f"{' and '.join(names)} cannot act: no images are held out"
    return conflict(cfg, what, *names, fix="set validation_split, such as 0.1")


@rule("validation_timesteps", "min_timestep", "max_timestep")
def validation_timesteps_fit(cfg: RunConfig) -> list[Problem]:
    """Every band of timesteps has at least one."""
    low, high = cfg.diffusion.min_timestep or 0, cfg.diffusion.max_timestep or _SCHEDULE_STEPS
    if cfg.validation.validation_timesteps <= max(high - low, 1) or not cfg.is_given("validation_timesteps"):
        return []
    names = ("validation_timesteps", "min_timestep", "max_timestep")
    return conflict(cfg, f"there are only {high - low} timesteps to validate at", *names, fix="ask for fewer")


@rule(*EmaOptions.model_fields, "sample_with_ema", "validate_with_ema")
def ema_is_kept(cfg: RunConfig) -> list[Problem]:
    """What is done with the average needs one."""
    names = _asked(cfg, *EmaOptions.model_fields, "sample_with_ema", "validate_with_ema")
    if cfg.ema.use_ema or not names:
        return []
    return conflict(
        cfg, f"{' and '.join(names)} cannot act without use_ema", *names, fix="set use_ema, or leave it out"
    )


@rule("ema_decay", "ema_min_decay")
def ema_decays_are_in_order(cfg: RunConfig) -> list[Problem]:
    """The least decay is not above the final one."""
    if cfg.ema.ema_min_decay <= cfg.ema.ema_decay:
        return []
    return conflict(cfg, "ema_min_decay is above ema_decay", "ema_decay", "ema_min_decay", fix="lower ema_min_decay")
