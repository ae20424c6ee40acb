"""Options about timesteps and the loss."""

from __future__ import annotations

from typing import ClassVar

from library.config.choices import LOSSES, LOSSES_LATER
from library.config.fields import Group, option


class DiffusionOptions(Group):
    """What the model is asked to predict and how the answer is scored."""

    title: ClassVar[str] = "diffusion"

    min_timestep: int = option(0, "lowest timestep that is drawn", ge=0, le=999)
    max_timestep: int = option(1000, "timesteps are drawn below this number", ge=1, le=1000)
    loss_type: str = option("l2", "how prediction and target are compared", choices=LOSSES, later=LOSSES_LATER)
