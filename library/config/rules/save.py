"""Rules about saving."""

from __future__ import annotations

from library.config.rules.rule import rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("output_dir")
def output_is_named(cfg: RunConfig) -> list[Problem]:
    """A training run has to put its result somewhere."""
    if cfg.save.output_dir:
        return []
    return [Problem("output_dir is missing", fix="name the folder for the trained model")]
