"""Options about the sample pictures of a training run."""

from __future__ import annotations

from typing import ClassVar

from library.config.choices import SAMPLERS
from library.config.fields import Group, option


class PreviewOptions(Group):
    """Pictures that show how training goes."""

    title: ClassVar[str] = "sample pictures"

    sample_prompts: str | None = option(None, "prompt file (.txt, .toml or .json)", path=True)
    sample_every_n_steps: int | None = option(None, "draw after every Nth step (0: never)", ge=1, zero_is_unset=True)
    sample_every_n_epochs: int | None = option(
        None, "draw after every Nth epoch (0: never); takes the place of sample_every_n_steps", ge=1, zero_is_unset=True
    )
    sample_at_first: bool = option(False, "also draw before the first step")
    sample_sampler: str = option("euler_a", "sampler of prompts that name none", choices=SAMPLERS)
    sample_grid: bool = option(
        False,
        "keep all samples of a run in one picture, sample/NAME_grid.png: a row for each prompt, a column for each "
        "time; prompts without a seed get one that stays",
    )
    sample_with_ema: bool = option(False, "draw with the averaged weights (use_ema) instead of the current ones")
