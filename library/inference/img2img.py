"""Drawing over a picture: where the steps begin, and what stays of it.

Shape letters: B batch, C latent channels, h w latent cells. Source: gen_img.md section 9; Meng et al. 2022 (SDEdit);
for masks, Lugmayr et al. 2022 (RePaint), equation 8, without its repeats; diffusers' img2img and inpainting pipelines.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Init:
    """The picture that a batch is drawn over.

    latents_BChw: clean, scaled as the U-Net sees them; noise_BChw: standard normal; both float32. skipped: the number
    of steps that are left out, from the first on. mask_B1hw: 1 where the picture is drawn anew, 0 where it stays; None:
    everywhere.
    """

    latents_BChw: Tensor
    noise_BChw: Tensor
    skipped: int
    mask_B1hw: Tensor | None = None

    def begin(self, scheduler: Any) -> tuple[Tensor, Tensor]:
        """Latents to start from and the timesteps that are left, of a scheduler whose timesteps are set.

        A mask starts all steps from noise alone, since nothing of the old picture shall shine through.
        """
        timesteps = begin_at(scheduler, self.skipped)
        if self.mask_B1hw is not None and not self.skipped:
            return self.noise_BChw * getattr(scheduler, "init_noise_sigma", 1.0), timesteps
        return with_noise(scheduler, self.latents_BChw, self.noise_BChw, timesteps[0]), timesteps

    def kept(self, scheduler: Any, latents_BChw: Tensor, following: Tensor | None) -> Tensor:
        """latents_BChw after a step, with the old picture where the mask says so, as noisy as they are.

        following: the timestep that the scheduler has come to; None at the end, where no noise is left.
        """
        if self.mask_B1hw is None:
            return latents_BChw
        old = self.latents_BChw
        if following is not None:
            old = with_noise(scheduler, old, self.noise_BChw, following)
        return self.mask_B1hw * latents_BChw + (1 - self.mask_B1hw) * old


def num_timesteps(scheduler: Any, skipped: int) -> int:
    """How many timesteps a scheduler whose timesteps are set has left without its first `skipped` steps."""
    return len(begin_at(copy.copy(scheduler), skipped))


def begin_at(scheduler: Any, step: int) -> Tensor:
    """Let a scheduler whose timesteps are set begin at step number `step` (from 0); returns the timesteps left.

    Samplers that ask the model twice a step have two timesteps for each.
    """
    if hasattr(scheduler, "begin_at"):
        return scheduler.begin_at(step)
    first = step * getattr(scheduler, "order", 1)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(first)
    return scheduler.timesteps[first:]


def with_noise(scheduler: Any, latents_BChw: Tensor, noise_BChw: Tensor, t: Tensor) -> Tensor:
    """Clean latents as noisy as they are at timestep t of this scheduler, in its own scaling.

    Once a scheduler steps, those that count their steps take the noise of the step that they are at, not of t.
    """
    if hasattr(scheduler, "scale_noise"):  # rectified flow
        return scheduler.scale_noise(latents_BChw, t.reshape(1), noise_BChw)
    return scheduler.add_noise(latents_BChw, noise_BChw, t.reshape(1))


def init_noise(generators: list[torch.Generator], shape_Chw: tuple[int, int, int], *, draws_before: int) -> Tensor:
    """The noise (B, C, h, w) for pictures that are drawn over, float32 on the CPU, row i from generator i.

    As in sd-scripts, it follows the start noise (already drawn) and `draws_before` draws, one or two for every step of
    a run, whether they are used or not. The generators are left as they were.
    """
    rows = []
    for generator in generators:
        twin = generator.clone_state()
        for _ in range(draws_before):
            torch.randn(shape_Chw, generator=twin)
        rows.append(torch.randn(shape_Chw, generator=twin))
    return torch.stack(rows)
