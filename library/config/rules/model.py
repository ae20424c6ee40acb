"""Rules about the model."""

from __future__ import annotations

from library.config.fields import SHARED
from library.config.rules.rule import rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("pretrained_model_name_or_path", runs=SHARED)
def model_is_named(cfg: RunConfig) -> list[Problem]:
    """A run needs a base model."""
    if cfg.model.pretrained_model_name_or_path:
        return []
    fix = "name a checkpoint file, a diffusers folder, a hub id, or `tiny`, the small model that comes with the suite"
    return [Problem("pretrained_model_name_or_path is missing", fix=fix)]
