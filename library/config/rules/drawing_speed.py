"""Rules about the speed of generation."""

from __future__ import annotations

from library.config.fields import GENERATOR
from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem


@rule("compile", "control_net_lllite_models", runs=GENERATOR)
def compiled_blocks_stay_as_they_are(cfg: RunConfig) -> list[Problem]:
    """LLLites change what happens within the compiled blocks from batch to batch and step to step."""
    if not (cfg.drawing_speed.compile and cfg.generate.control_net_lllite_models):
        return []
    what = "compile cannot act: ControlNet-LLLites change the blocks of the U-Net while it draws"
    return conflict(cfg, what, "compile", "control_net_lllite_models", fix="remove compile")
