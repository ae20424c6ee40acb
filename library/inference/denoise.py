"""The denoising loop, as a pure function of a prediction and a scheduler.

Shape letters: B batch, C latent channels, h w latent cells.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from library.inference.samplers import step_arguments

# (x_BChw, t) -> noise or velocity of the same shape; t is a 0-d tensor, not always a whole number.
Predict = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def denoise(
    predict: Predict,
    noise_BChw: Tensor,
    scheduler: Any,
    *,
    generators: list[torch.Generator],
    on_step: Callable[[], None] | None = None,
) -> Tensor:
    """Latents (scaled, as the U-Net sees them) from standard normal noise; float32 whatever the model computes in.

    The scheduler has its timesteps set. generators: one per row, for samplers that add noise while they run.
    on_step is called after every call of the model.
    """
    arguments = step_arguments(scheduler, generators)
    latents = noise_BChw.float() * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.scale_model_input(latents, t)
        latents = scheduler.step(predict(x, t).float(), t, latents, **arguments).prev_sample
        if on_step is not None:
            on_step()
    return latents
