"""Rules about sample pictures."""

from __future__ import annotations

from library.config.rules.rule import conflict, rule
from library.config.run_config import RunConfig
from library.errors import Problem

_ASKING = ("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first", "sample_grid", "sample_with_ema")


@rule("sample_prompts", *_ASKING)
def samples_need_prompts(cfg: RunConfig) -> list[Problem]:
    """Drawing needs prompts."""
    names = [name for name in _ASKING if cfg.get(name) and cfg.is_given(name)]
    if cfg.preview.sample_prompts or not names:
        return []
    what = f"{' and '.join(names)} need{'s' if len(names) == 1 else ''} sample_prompts"
    return conflict(cfg, what, *names, fix="name a prompt file in sample_prompts")
