"""Options of Deep Shrink and Gradual Latent, which make large pictures from one small composition."""

from __future__ import annotations

from typing import ClassVar

from pydantic import field_validator

from library.config.fields import GENERATOR, Group, option
from library.config.unsharp import parse_unsharp


class UNetEffectOptions(Group):
    """What happens to the sizes inside the U-Net, and to those of the latents, while a picture is drawn."""

    title: ClassVar[str] = "large pictures"
    acts: ClassVar[frozenset[str]] = GENERATOR

    ds_depth_1: int | None = option(
        None,
        "Deep Shrink: the block of the U-Net's way down, 0 to 8, before which its maps are shrunk at high noise "
        "(unset: no Deep Shrink; prompts that have other options of it take 3)",
        ge=0,
        le=8,
    )
    ds_timesteps_1: int = option(650, "Deep Shrink: acts from the last timestep down to this one", ge=0, le=1000)
    ds_depth_2: int | None = option(
        None, "Deep Shrink: the block after that, from ds_timesteps_1 down to ds_timesteps_2", ge=0, le=8
    )
    ds_timesteps_2: int = option(650, "Deep Shrink: the timestep at which the second block ends", ge=0, le=1000)
    ds_ratio: float = option(0.5, "Deep Shrink: size of the shrunk maps, as a share of each side", gt=0, lt=1)
    gradual_latent_timesteps: int | None = option(
        None,
        "Gradual Latent: the timestep below which small latents grow (unset: no Gradual Latent; prompts that have "
        "other options of it take 650); needs euler_a",
        ge=1,
        le=1000,
    )
    gradual_latent_ratio: float = option(
        0.5, "Gradual Latent: size of the latents at the start, as a share of each side", gt=0, lt=1
    )
    gradual_latent_ratio_step: float = option(0.125, "Gradual Latent: how much that share grows at once", gt=0, le=1)
    gradual_latent_every_n_steps: int = option(3, "Gradual Latent: steps from one size to the next", ge=1)
    gradual_latent_s_noise: float = option(
        1.0, "Gradual Latent: factor of the noise of steps that change the size", ge=0, le=10
    )
    gradual_latent_unsharp_params: str | None = option(
        None,
        "Gradual Latent: sharpening when the size changes: ksize,sigma,strength[,target_x], such as 3,0.5,0.5; "
        "target_x 0 sharpens the latents before the step, not those after it",
    )

    @field_validator("gradual_latent_unsharp_params")
    @classmethod
    def _readable(cls, value: str | None) -> str | None:
        if value is not None:
            parse_unsharp(value)
        return value
