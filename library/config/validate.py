"""Runs every rule between options, so that all problems are reported together."""

from __future__ import annotations

from collections.abc import Collection

from library.config.rules import (  # noqa: F401 (each registers its rules)
    admin,
    clip_vision,
    data,
    diffusion,
    drawing_speed,
    evaluation,
    finetune,
    generate,
    img2img,
    lllite,
    lycoris,
    model,
    network,
    optim,
    pictures,
    precision,
    preview,
    prompter,
    regions,
    save,
    tokens,
    unet_effects,
)
from library.config.rules.rule import RULES
from library.config.run_config import RunConfig
from library.errors import Problem


def check_rules(cfg: RunConfig, *, wrong: Collection[str] = ()) -> list[Problem]:
    """The problems of all rules of this run; `wrong` names options whose values are reported already."""
    return [
        problem
        for entry in RULES
        if cfg.run in entry.runs and not set(entry.options) & set(wrong)
        for problem in entry.check(cfg)
    ]
